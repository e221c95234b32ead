"""Models whose parameters are spread over the processes: by FSDP2, PyTorch's ``fully_shard`` as Accelerate applies it, or ZeRO-3."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Say whether FSDP2 manages the parameters of a model."""
    return isinstance(model, FSDPModule)


def is_partitioned(model: nn.Module) -> bool:
    """Say whether the parameters of a model are parts that DeepSpeed's ZeRO-3 has made, while loading it or for an engine."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Free what forward passes have gathered, so that ``model.parameters()`` are the shards that optimizers step on.

    After a forward pass without a backward pass the modules that FSDP2 does not reshard hold plain tensors instead, which would
    go stale, and writing to them would be lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(value: Any, keep: bool = True) -> Any:
    """Copy the tensors of nested containers to the CPU, those that are spread over the processes as a whole.

    Args:
        value: Tensors, and dictionaries, lists and tuples of them; everything else stays.
        keep: Whether this process wants the result. All processes call this in step, and only one of them writes a file.

    Returns:
        The same containers; None instead of a tensor where ``keep`` is False.

    Traffic: one all-gather of every tensor that is spread, one at a time.
    """
    if isinstance(value, Tensor):
        whole = value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()
        return whole.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {key: gathered(entry, keep) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gathered(entry, keep) for entry in value)
    return value


def spread_like(whole: Tensor, like: Tensor) -> Tensor:
    """Take this process's part of a tensor that every process has as a whole; no traffic.

    Args:
        whole: On any device.
        like: Says how: a tensor that is spread over the processes, or a plain one, on its device.

    Returns:
        A tensor of the values and dtype of ``whole``, spread and placed as ``like`` is.
    """
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def spread_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Spread a whole ``state_dict`` of an optimizer as the parameters of another one are spread.

    Args:
        state: As ``gathered`` returns it for an optimizer of the same parameters; entries that are spread already stay.
        optimizer: The one that will load it.

    Returns:
        What ``optimizer.load_state_dict`` takes.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def spread(value: Any, parameter: Tensor) -> Any:
        fits = isinstance(value, Tensor) and not isinstance(value, DTensor) and value.shape == parameter.shape
        return spread_like(value, parameter) if fits else value

    entries = {
        index: {name: spread(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}
