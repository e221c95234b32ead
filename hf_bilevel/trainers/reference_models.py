"""Models that can stand beside the one being trained: a copy, a second adapter for PEFT models, a sharded copy with FSDP2."""

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn

from hf_bilevel.trainers.sharding import gathered, reshard, spread_like

ADAPTER_NAME = "bilevel_reference"


class Reference(Protocol):
    """A second set of weights that can stand in for the model being trained."""

    def synchronise(self) -> None:
        """Take over the weights of the model being trained."""

    def active(self, training: bool = False) -> Any:
        """Context that yields a module which computes with these weights; trainable if ``training``."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights, on the CPU."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the weights."""

    def remove(self) -> None:
        """Leave the model as it was before."""


class ReferenceCopy:
    """A copy of the model, in a dtype and on a device of its own between uses.

    Args:
        model: The model to synchronise with, without wrappers. Ignored by a static reference.
        weights: The module that holds the reference's weights.
        dtype: Dtype of the weights while they score; None for their own. Training a dynamic reference uses the dtypes of
            ``model``.
        device: Where the model computes.
        parked: Keep the weights on the CPU between uses. Costs one transfer of the model to the device for every
            optimizer step.
    """

    def __init__(
        self, model: nn.Module, weights: nn.Module, dtype: torch.dtype | None, device: torch.device, parked: bool
    ) -> None:
        self.model = model
        self.module = weights.requires_grad_(False)
        self.dtype = dtype
        self.device = device
        self.parked = parked
        self._settle()

    def _settle(self) -> None:
        """Bring the weights to their place and dtype between uses."""
        self.module.eval().to("cpu" if self.parked else self.device)
        if self.dtype is not None:
            # Not buffers: rotary frequencies and batch statistics lose too much in bfloat16.
            for parameter in self.module.parameters():
                parameter.data = parameter.data.to(self.dtype)

    def synchronise(self) -> None:  # noqa: D102
        self.module.to(self.device)
        with torch.no_grad():
            for target, source in zip(_tensors(self.module), _tensors(self.model), strict=True):
                if target.dtype != source.dtype:
                    target.data = target.data.to(source.dtype)
                target.copy_(source)

    @contextmanager
    def active(self, training: bool = False) -> Iterator[nn.Module]:  # noqa: D102
        if not training and not self.parked:  # every step passes here: the weights are in place, frozen, in eval mode
            yield self.module
            return
        resting = [tensor.data for tensor in _tensors(self.module)] if self.parked and not training else None
        self.module.to(self.device)
        if training:
            for target, source in zip(self.module.parameters(), self.model.parameters(), strict=True):
                target.requires_grad_(source.requires_grad)
        self.module.train(training)
        try:
            yield self.module
        finally:
            self.module.eval().requires_grad_(False)
            if resting is None:
                self._settle()
            else:  # scoring changed nothing, so the copies on the device are dropped, not sent back
                for tensor, data in zip(_tensors(self.module), resting, strict=True):
                    tensor.data = data

    def state_dict(self) -> dict[str, Tensor]:  # noqa: D102
        return {name: tensor.detach().cpu().clone() for name, tensor in self.module.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: D102
        self.module.load_state_dict(state)

    def remove(self) -> None:  # noqa: D102
        pass


class ShardedReference:
    """A second model of which FSDP2 gives each process a part, like the model being trained.

    Args:
        model: The model to synchronise with, which Accelerate shards before training. Ignored by a static reference.
        weights: The module that holds the reference's weights; whole, or sharded by an earlier run.
        accelerator: The Trainer's, which says how to shard.
        keep: Whether this process wants ``state_dict``.

    Traffic: the parameters in each forward and each backward pass, as for the model.
    """

    def __init__(self, model: nn.Module, weights: nn.Module, accelerator: Accelerator, keep: bool) -> None:
        self.model = model
        self.module = fsdp2_prepare_model(accelerator, weights).eval()
        self.keep = keep

    def synchronise(self) -> None:  # noqa: D102
        reshard(self.model)
        reshard(self.module)
        with torch.no_grad():
            for target, source in zip(_tensors(self.module), _tensors(self.model), strict=True):
                target.copy_(source)

    @contextmanager
    def active(self, training: bool = False) -> Iterator[nn.Module]:  # noqa: D102
        # Never frozen: FSDP2 remembers from the first forward pass which parameters have gradients.
        if training:
            reshard(self.module)
        self.module.train(training)
        try:
            yield self.module
        finally:
            self.module.eval()

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        reshard(self.module)
        return gathered(dict(self.module.state_dict()), self.keep)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: D102
        reshard(self.module)
        with torch.no_grad():
            for name, target in self.module.state_dict().items():
                target.copy_(spread_like(state[name], target))

    def remove(self) -> None:  # noqa: D102
        pass


class ReferenceAdapter:
    """A second LoRA adapter on the base of the model being trained: no second backbone in memory.

    The adapter exists only while training runs, is never in the optimizer, and is hidden from ``save_pretrained``.

    Args:
        model: A ``PeftModel`` with one active LoRA adapter.

    Raises:
        ValueError: If the model's adapters are of another kind, several, or train more than LoRA matrices.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        check_adapter(model)
        self.proxy_name = model.active_adapter
        flags = self._flags()
        config = copy.deepcopy(model.peft_config[self.proxy_name])
        config.init_lora_weights = True  # PiSSA and its kin would subtract from the shared base a second time
        model.add_adapter(ADAPTER_NAME, config)
        self._restore(flags)

    def _flags(self) -> dict[str, bool]:
        return {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}

    def _restore(self, flags: dict[str, bool]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(flags.get(name, False))

    def _weights(self) -> dict[str, Tensor]:
        part = f".{ADAPTER_NAME}"
        return {name: tensor for name, tensor in self.model.state_dict().items() if part in name}

    def synchronise(self) -> None:  # noqa: D102
        weights = self.model.state_dict()
        with torch.no_grad():
            for name, target in self._weights().items():
                target.copy_(weights[name.replace(f".{ADAPTER_NAME}", f".{self.proxy_name}")])

    @contextmanager
    def active(self, training: bool = False) -> Iterator[nn.Module]:  # noqa: D102
        flags = self._flags()
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.set_adapter(ADAPTER_NAME)
        self.model.train(training)
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # its running statistics belong to the model being trained
        try:
            yield self.model
        finally:
            self.model.set_adapter(self.proxy_name)
            self._restore(flags)
            for module, mode in modes:
                module.training = mode

    def state_dict(self) -> dict[str, Tensor]:  # noqa: D102
        return {name: tensor.detach().cpu().clone() for name, tensor in self._weights().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: D102
        weights = self._weights()
        with torch.no_grad():
            for name, tensor in state.items():
                weights[name].copy_(tensor)

    def remove(self) -> None:  # noqa: D102
        flags = self._flags()
        self.model.delete_adapter(ADAPTER_NAME)
        self.model.set_adapter(self.proxy_name)
        self._restore(flags)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Keep the adapter out of what ``save_pretrained`` writes."""
        config = self.model.peft_config.pop(ADAPTER_NAME)
        try:
            yield
        finally:
            self.model.peft_config[ADAPTER_NAME] = config


def check_adapter(model: Any) -> None:
    """Refuse PEFT models whose second adapter would not be the whole of what is trained."""
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"A PEFT model must have one active adapter for a dynamic reference, got {list(active)}.")
    config = model.peft_config[active[0]]
    if config.peft_type.value != "LORA":
        raise ValueError(
            f"A dynamic reference is a second adapter, which is supported for LoRA, got {config.peft_type.value}. Use LoRA, "
            "or `reference='static'` with a `reference_model`."
        )
    if config.bias != "none" or getattr(config, "layer_replication", None):
        given = f"bias={config.bias!r}" if config.bias != "none" else "layer_replication"
        raise ValueError(
            f"A dynamic reference is a second adapter, which PEFT does not add beside one with `{given}`. Leave it out, or use "
            "`reference='static'` with a `reference_model`."
        )
    others = [name for name, p in model.named_parameters() if p.requires_grad and f".{active[0]}" not in name]
    if config.modules_to_save or others:
        named = list(config.modules_to_save or others[:3])
        raise ValueError(
            f"The model trains more than LoRA matrices ({named}), which a second adapter would share with the model being "
            "trained. Train them with LoRA instead (`target_modules`), or use `reference='static'`."
        )


def copy_of(model: nn.Module) -> nn.Module:
    """Copy a model. A ``forward`` that was put on it runs that very model: the copy has its own."""
    patches = {name: vars(model).pop(name) for name in ("forward", "_original_forward") if name in vars(model)}
    try:
        copied = copy.deepcopy(model)
    finally:
        vars(model).update(patches)
    # Accelerate's autocast stays with the original. A method that somebody bound is bound to the copy, unless it holds on to
    # the original, as that of TRL does for its fused output embedding: the copy then has the forward of its class.
    patch = patches.get("_original_forward", patches.get("forward"))
    bound = getattr(patch, "__self__", None) is model and patch.__func__ is not type(model).forward
    if bound and not _holds(patch.__func__, model):
        copied.forward = types.MethodType(patch.__func__, copied)
    return copied


def is_peft_model(model: nn.Module) -> bool:
    """Say whether adapters are attached by PEFT's wrapper."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def has_forward_of_its_own(model: nn.Module) -> bool:
    """Say whether somebody has put a ``forward`` on a model that runs that very model, so that a copy cannot have it."""
    patch = vars(model).get("_original_forward", vars(model).get("forward"))
    return patch is not None and _holds(getattr(patch, "__func__", patch), model)


def _holds(function: Any, model: nn.Module) -> bool:
    """Say whether a function is a closure over a model or one of its methods."""
    return any(content is model or getattr(content, "__self__", None) is model for content in _contents(function))


def _contents(function: Any) -> list[Any]:
    cells = getattr(function, "__closure__", None) or ()
    return [cell.cell_contents for cell in cells if cell != types.CellType()]  # one that is empty has no contents


def restore_forwards(model: nn.Module) -> None:
    """Give modules the ``forward`` of their class where they have one that runs another model, as ``copy.deepcopy`` leaves them.

    TRL's SFTTrainer puts such a method on the model that it trains. In a copy it still runs the original, with its weights.

    Args:
        model: Changed in place.
    """
    own = set(model.modules())
    for module in own:
        patches = [vars(module).get(name) for name in ("forward", "_original_forward")]
        if any(isinstance(held, nn.Module) and held not in own for patch in patches for held in _held_by(patch)):
            for name in ("forward", "_original_forward"):
                vars(module).pop(name, None)


def _held_by(function: Any) -> Iterator[Any]:
    """Yield what a function is a closure over, its methods' owners and inner functions included."""
    waiting, seen = [getattr(function, "__func__", function)], set()
    while waiting:
        inner = waiting.pop()
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        yield inner
        waiting += _contents(inner)
        waiting += [getattr(inner, name) for name in ("__wrapped__", "__self__") if hasattr(inner, name)]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
