"""The reference model beside the model being trained: when it may be there, and its training."""

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from hf_bilevel.data import EndlessLoader, derive_seed, plain_copy
from hf_bilevel.trainers.base import BilevelMixin
from hf_bilevel.trainers.reference_models import (
    Reference,
    ReferenceAdapter,
    ReferenceCopy,
    ShardedReference,
    check_adapter,
    copy_of,
    is_peft_model,
    restore_forwards,
)
from hf_bilevel.trainers.sharding import is_sharded, reshard

NUM_RECENT_BATCHES = 32
"""Candidate batches of a stream that the reference model trains on; a stream cannot be read twice."""

_TARGET_STREAM, _POOL_STREAM = 1, 2  # tell the seeds of the two loaders apart


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
            if not isinstance(self.reference_model, nn.Module):
                raise TypeError(
                    "`reference_model` must be a model, `AutoModelForCausalLM.from_pretrained(...)` for instance, got "
                    f"{self.reference_model!r:.80}."
                )
            restore_forwards(self.reference_model)
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
        if self.reference is not None:  # of a run that was prepared and not begun
            self.reference.remove()
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

    def _end_training(self, failed: bool) -> None:
        super()._end_training(failed)
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
            self._share_statistics(reference)
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
        own, self.optimizer, self.model = (self.optimizer, self.model), None, reference
        try:
            optimizer = self.create_optimizer()  # as the Trainer calls it: a user's own may take no argument
        finally:
            self.optimizer, self.model = own
        parameters = {id(parameter) for parameter in reference.parameters()}
        if any(id(parameter) not in parameters for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(
                f"`{type(self).__name__}.create_optimizer` makes an optimizer of other parameters than the reference's, which would "
                "never be trained. Take them from `self.model`, which is the reference while its optimizer is made."
            )
        if callable(getattr(optimizer, "train", None)):  # schedule-free optimizers
            optimizer.train()
        return optimizer

    def _step_reference(self, reference: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for p in reference.parameters() if p.requires_grad]
        if self.args.world_size > 1 and not self.is_fsdp_enabled:  # the reference is not wrapped in DDP
            # Layers that are skipped, and experts without tokens, have gradients on some processes only.
            counts = torch.tensor(
                [p.grad is not None for p in parameters], dtype=torch.float32, device=self.args.device
            )
            for parameter, count in zip(parameters, self.accelerator.reduce(counts).tolist(), strict=True):
                if count:
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = self.accelerator.reduce(gradient, reduction="mean")
        parameters = [p for p in parameters if p.grad is not None]
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
