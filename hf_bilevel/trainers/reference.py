"""The reference model beside the model being trained, and its training.

A copy of the model for full fine-tuning, a second adapter for PEFT models, a sharded copy with FSDP2.
"""

import copy
import math
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from hf_bilevel.data import EndlessLoader, derive_seed, plain_copy
from hf_bilevel.trainers.base import BilevelMixin
from hf_bilevel.trainers.sharding import gathered, is_sharded, reshard, spread_like

ADAPTER_NAME = "bilevel_reference"

NUM_RECENT_BATCHES = 32
"""Candidate batches of a stream that the reference model trains on; a stream cannot be read twice."""

_TARGET_STREAM, _POOL_STREAM = 1, 2  # tell the seeds of the two loaders apart


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
    contents = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return any(content is model or getattr(content, "__self__", None) is model for content in contents)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class ReferenceMixin(BilevelMixin):
    """A reference model beside the model being trained: static, or dynamic with training data and an optimizer of its own.

    Args:
        *args: As for ``BilevelMixin``.
        reference_model: A frozen model to compare with, for a static reference.
        **kwargs: As for ``BilevelMixin``.
    """

    def __init__(self, *args: Any, reference_model: nn.Module | None = None, **kwargs: Any) -> None:
        self.reference_model = reference_model
        self.reference: Reference | None = None
        super().__init__(*args, **kwargs)

    def _check_reference(self, kind: str) -> None:
        """Refuse what cannot serve as a reference of this kind: "dynamic", "static" or "none"."""
        config = self.bilevel_config
        if kind != "none" and self.is_fsdp_enabled:
            self._check_sharded_reference(kind)
        if kind == "static":
            if self.reference_model is None:
                raise ValueError(
                    "`reference='static'` needs a `reference_model`: a frozen model of the same kind, trained on the "
                    "target data for instance. Pass one, or use `reference='dynamic'`."
                )
            pairs = zip(self.model.parameters(), self.reference_model.parameters(), strict=False)
            if any(own is given for own, given in pairs):
                raise ValueError(
                    "`reference_model` shares its weights with `model`, so the excess loss would be 0 everywhere. Pass a "
                    "copy, `copy.deepcopy(model)`."
                )
        elif kind == "dynamic":
            self._check_target_dataset()
            if self.accelerator.mixed_precision == "fp16":
                raise ValueError(
                    "A dynamic reference is not trained in fp16, where its small gradients vanish without a scaler of its "
                    "own. Use `bf16=True`, or `reference='static'`."
                )
            if self.reference_model is not None:
                warnings.warn("`reference_model` is ignored with `reference='dynamic'`; use 'static'.", stacklevel=5)
            if is_peft_model(self.model):
                check_adapter(self.model)
                if config.reference_dtype != "auto" or config.reference_device != "auto":
                    warnings.warn(
                        "`reference_dtype` and `reference_device` are ignored: the reference of a PEFT model is a second "
                        "adapter on the same base.",
                        stacklevel=5,
                    )

    def _check_sharded_reference(self, kind: str) -> None:
        config = self.bilevel_config
        for name in ("reference_dtype", "reference_device"):
            if getattr(config, name) != "auto":
                raise ValueError(
                    f'With FSDP the reference is sharded like the model, so `{name}` must be "auto", got '
                    f"{getattr(config, name)!r}. Choose dtypes and offloading for both in `fsdp_config`."
                )
        if kind == "dynamic" and is_peft_model(self.model):
            raise ValueError(
                "The dynamic reference of a PEFT model is a second adapter, which is not tested with FSDP. Use DDP, or "
                "`reference='static'` with a `reference_model`."
            )
        if kind == "dynamic" and self.args.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size` starts training again with a model that FSDP has sharded by then, which cannot be copied for "
                "a reference. Set `per_device_train_batch_size`."
            )

    def _begin_reference(self, kind: str) -> None:
        """Set up the reference and its data at the start of a run."""
        config, device = self.bilevel_config, self.args.device
        self.reference = None
        self._target_loader: EndlessLoader | None = None
        self._pool_loader: EndlessLoader | None = None
        self._recent: deque[dict[str, Any]] = deque(maxlen=NUM_RECENT_BATCHES)
        if kind == "none":
            return
        dtype = None if config.reference_dtype == "auto" else getattr(torch, config.reference_dtype)
        parked = config.reference_device == "cpu"
        if self.is_fsdp_enabled:
            weights = self.reference_model if kind == "static" else self._whole_copy()
            self.reference = ShardedReference(self.model, weights, self.accelerator, self._keeps_state)
        elif kind == "static":
            self.reference = ReferenceCopy(self.model, self.reference_model, dtype, device, parked)
        elif is_peft_model(self.model):
            self.reference = ReferenceAdapter(self.model)
        else:
            self.reference = ReferenceCopy(self.model, copy_of(self.model), dtype, device, parked)
        if kind == "static":
            return
        target_batch_size = config.target_batch_size or self._candidate_batch_size
        if self.args.auto_find_batch_size:
            target_batch_size = min(target_batch_size, self._candidate_batch_size)
        self._target_loader = self._endless_loader(self.target_dataset, target_batch_size, _TARGET_STREAM)
        if not self._is_stream:
            self._pool_loader = self._endless_loader(self.train_dataset, self._candidate_batch_size, _POOL_STREAM)

    def _whole_copy(self) -> nn.Module:
        if is_sharded(self.model):
            raise ValueError(
                "FSDP has sharded the model already, in an earlier `train()` or while it was loaded, and it can then not be copied for "
                "a reference. Build a new trainer with a model that is whole."
            )
        return copy_of(self.model)

    def _end_training(self) -> None:
        if self.reference is not None:
            self.reference.remove()
            self.reference = None

    # Training data of the reference ---------------------------------------------------------------------------------

    def _remember(self, batches: list[Any]) -> None:
        """Keep candidate batches of a stream, from which a dynamic reference is trained."""
        if self._is_stream and self._target_loader is not None:
            self._recent.extend(plain_copy(batch) for batch in batches)

    def _draw_target_batch(self) -> Any:
        return self._prepare_inputs(self._target_loader.draw())

    def _pool_batch(self, step: int, k: int) -> Any:
        """Return training batch k of the reference phase at an optimizer step; the same one when asked again."""
        if self._pool_loader is not None:
            return self._prepare_inputs(self._pool_loader.batch_at(self._pool_loader.position + k))
        index = derive_seed(self._seed, step, k, self.args.process_index) % len(self._recent)
        return self._prepare_inputs(self._recent[index])

    # Its optimizer --------------------------------------------------------------------------------------------------

    @property
    def _reference_learning_rate(self) -> float:
        given = self.bilevel_config.reference_learning_rate
        return self.args.learning_rate if given is None else given

    def _train_reference(
        self,
        num_steps: int,
        losses: Callable[[nn.Module, int], Iterator[Tensor]],
        before_step: Callable[[torch.optim.Optimizer, int], None] | None = None,
    ) -> Tensor:
        """Take optimizer steps on the reference with a fresh optimizer.

        Args:
            num_steps: Number of steps.
            losses: From the reference's module and the index of the step to the terms of the loss to minimise. The
                gradient of each is computed before the next is asked for, so their activations never live together.
            before_step: Called with the optimizer and the index of the step before each step.

        Returns:
            The loss of every step, ``(num_steps,)``, the mean over processes, on the device: no host sync.
        """
        totals = []
        with self.reference.active(training=True) as reference:
            optimizer = self._reference_optimizer(reference)
            steps = tqdm(
                range(num_steps),
                desc="Reference model",
                leave=False,
                disable=self.args.disable_tqdm or not self.is_local_process_zero(),
            )
            for k in steps:
                total = torch.zeros((), device=self.args.device)
                terms = losses(reference, k)
                while True:
                    with self.accelerator.autocast():
                        term = next(terms, None)
                    if term is None:
                        break
                    term.backward()
                    total = total + term.detach()
                if before_step is not None:
                    before_step(optimizer, k)
                self._step_reference(reference, optimizer)
                totals.append(total)
        if self._pool_loader is not None:
            self._pool_loader.position += num_steps
        losses = torch.stack(totals)
        return self.accelerator.reduce(losses, "mean") if self.args.world_size > 1 else losses

    def _reference_optimizer(self, reference: nn.Module) -> torch.optim.Optimizer:
        """Build an optimizer for the reference."""
        optimizer = self._fresh_optimizer(reference)
        if self.bilevel_config.reference_learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.bilevel_config.reference_learning_rate
        return optimizer

    def _fresh_optimizer(self, reference: nn.Module) -> torch.optim.Optimizer:
        """Build an optimizer as the Trainer (or a subclass of it) builds its own."""
        own, self.optimizer = self.optimizer, None
        try:
            optimizer = self.create_optimizer(reference)
        finally:
            self.optimizer = own
        if callable(getattr(optimizer, "train", None)):  # schedule-free optimizers
            optimizer.train()
        return optimizer

    def _step_reference(self, reference: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for p in reference.parameters() if p.requires_grad and p.grad is not None]
        if self.args.world_size > 1 and not self.is_fsdp_enabled:  # the reference is not wrapped in DDP
            for parameter in parameters:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        if self.args.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    # State ----------------------------------------------------------------------------------------------------------

    def _reference_state(self) -> dict[str, Any]:
        """Return the reference's state, the same on all ranks."""
        if self._target_loader is not None:
            return {
                "weights": self.reference.state_dict(),
                "target_position": self._target_loader.position,
                "pool_position": 0 if self._pool_loader is None else self._pool_loader.position,
            }
        return {} if self.reference is None else {"fingerprint": self._reference_fingerprint()}

    def _rank_state(self) -> dict[str, Any]:
        return {"recent": list(self._recent)} if self._recent else {}

    def _load_reference_state(self, state: dict[str, Any], rank: dict[str, Any]) -> None:
        """Restore both."""
        if "fingerprint" in state and self.reference is not None and self._target_loader is None:
            # Not equal to the bit: the order of a sum depends on device and threads.
            if not math.isclose(state["fingerprint"], self._reference_fingerprint(), rel_tol=1e-9):
                raise ValueError(
                    "`reference_model` has other weights than the one of the checkpoint, so the run would select other "
                    "data. Pass the same model, or start a new run."
                )
        if "weights" in state and self._target_loader is not None:
            self.reference.load_state_dict(state["weights"])
            self._target_loader.position = state["target_position"]
            if self._pool_loader is not None:
                self._pool_loader.position = state["pool_position"]
        self._recent.extend(rank.get("recent", ()))

    def _reference_fingerprint(self) -> float:
        reshard(self.reference_model)
        parameters = [p.detach() for p in self.reference_model.parameters()]
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        total = torch.stack([part.double().abs().sum() for part in parts]).sum()
        return float(self.accelerator.reduce(total) if self.is_fsdp_enabled else total)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if isinstance(self.reference, ReferenceAdapter):
            with self.reference.hidden():
                super()._save(output_dir, state_dict=state_dict)
        else:
            super()._save(output_dir, state_dict=state_dict)
