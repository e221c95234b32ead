"""A check, for debugging, that all processes hold the same values where they must."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

NUM_SHOWN = 8


def digests(state: Any, name: str = "") -> dict[str, str]:
    """Hash every leaf of nested dictionaries and lists.

    Args:
        state: Tensors of any dtype on any device, and values whose ``repr`` tells them apart.
        name: Put in front of the leaves' names.

    Returns:
        From the leaf's path, its keys joined by dots, to the SHA-256 of its dtype, shape and bytes.

    Cost: one copy of every tensor to the CPU, one pass over its bytes.

    Example:
        >>> one, other = ({"table": torch.tensor([0.5, x]), "step": 3} for x in (0.0, -0.0))
        >>> [path for path, digest in digests(one).items() if digest != digests(other)[path]]
        ['table']
    """
    if isinstance(state, Mapping):
        items = list(state.items())
    elif isinstance(state, (list, tuple)):
        items = list(enumerate(state))
    else:
        return {name: _digest(state)}
    found = {name: str(len(items))}  # an empty one is something too
    for key, value in items:
        found |= digests(value, f"{name}.{key}" if name else str(key))
    return found


def _digest(leaf: Any) -> str:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    content = leaf.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{content.dtype}{tuple(content.shape)}".encode())
    digest.update(content.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_agreement(state: Any, when: str) -> None:
    """Compare a state over all processes; each of them calls it, in step.

    Args:
        state: What must be the same on all of them, as for ``digests``.
        when: Said in the error, "after step 3" for instance.

    Raises:
        RuntimeError: On all processes, with the names of what differs, if anything does.

    Traffic: 64 characters and a name for every leaf of every process.
    """
    (first, *others) = gather_object([digests(state)])
    paths = list(dict.fromkeys([*first, *(path for other in others for path in other)]))
    differ = [path for path in paths if any(other.get(path) != first.get(path) for other in others)]
    if differ:
        named = ", ".join(differ[:NUM_SHOWN]) + (
            f" and {len(differ) - NUM_SHOWN} more" if len(differ) > NUM_SHOWN else ""
        )
        raise RuntimeError(
            f"The processes do not agree {when}: {named} differ. Something of the run depends on the process that should not, "
            "a model, a dataset or a callback that is not the same everywhere for instance."
        )


class AgreementCallback(TrainerCallback):
    """Checks at the end of every optimizer step; ``state`` returns what must be the same on all processes."""

    def __init__(self, state: Callable[[], Any]) -> None:
        self.state = state

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if args.world_size > 1:
            check_agreement(self.state(), f"after step {state.global_step}")
