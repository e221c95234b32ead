"""Train a model afresh on the rows that a mask keeps, and ask for the loss it then has: one mask at a time, or all as one.

Both engines answer the same question for a few masks: *start from one stored initialisation, train on these rows, and what is
the upper loss?* The rows of a mask are gathered, so that a training costs what its own rows cost and not what the pool costs.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_bilevel.data import CollatedRows, derive_seed, private_randomness
from hf_bilevel.losses import UnitLosses, evaluating

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}

MAX_STACKED_PARAMETERS = 10_000_000

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class InnerTraining:
    """How a model is trained on the rows of a mask.

    Attributes:
        num_steps: Optimizer steps, at least 1.
        batch_size: Rows of a step; None for all rows of the mask in every step.
        learning_rate: Positive, constant.
        optimizer: ``"adam"``, or ``"sgd"`` with a momentum of 0.9.
    """

    num_steps: int
    batch_size: int | None
    learning_rate: float
    optimizer: str = "adam"

    def schedule(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Say which rows are trained on in which step: permutation after permutation of them, cut into batches.

        Args:
            rows: Rows that the mask keeps, int64, ``(k,)``, k at least 1.
            generator: On the CPU.

        Returns:
            ``(num_steps, batch)``, int64; or ``(1, k)``, the batch of every step.

        Example:
            >>> InnerTraining(3, 2, 0.1).schedule(torch.tensor([7, 8, 9]), torch.Generator().manual_seed(0)).tolist()
            [[9, 7], [8, 9], [8, 7]]
        """
        if self.batch_size is None:
            return rows[None]
        num = self.num_steps * self.batch_size
        passes = [torch.randperm(len(rows), generator=generator) for _ in range(math.ceil(num / len(rows)))]
        return rows[torch.cat(passes)[:num]].view(self.num_steps, self.batch_size)


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Let a model compute attention by plain matrix products, which ``torch.func`` can take.

    Other implementations look at the values of the mask, or have no rule for ``vmap``.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    chosen = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    changed = [key for key, attention in chosen.items() if attention is not None]
    for key in changed:
        configs[key]._attn_implementation = "eager"
    try:
        yield
    finally:
        for key in changed:
            configs[key]._attn_implementation = chosen[key]


@dataclass(frozen=True)
class InnerProblem:
    """What is trained on the rows of a mask, and what it is judged on.

    Attributes:
        model: What is trained; it is moved nowhere. Parameters without ``requires_grad`` stay as they are.
        losses: Losses of a batch's units, (model, batch) -> ``UnitLosses`` at sample level.
        pool: Rows that masks index.
        training: How to train.
        upper: Rows that the upper loss is measured on.
        upper_batch_size: Rows of one forward pass of the upper loss.
        autocast: Makes a context for mixed precision.
    """

    model: nn.Module
    losses: Callable[[nn.Module, Any], UnitLosses]
    pool: CollatedRows
    training: InnerTraining
    upper: CollatedRows
    upper_batch_size: int
    autocast: Callable[[], AbstractContextManager] = nullcontext


class SequentialEngine:
    """Train on one mask after another, with ordinary steps on the model itself; for any model.

    The weights and buffers of the model are as they were when ``restored`` ends.

    Args:
        problem: Model, rows and training.

    Cost: for every mask ``num_steps`` forward and backward passes of its rows and a forward pass of the upper rows. Memory: the
    model, its initialisation, and gradients and optimizer state of what is trained.
    """

    def __init__(self, problem: InnerProblem) -> None:
        self.problem, self.model, self.upper = problem, problem.model, problem.upper
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._state = [*self._trained, *self.model.buffers()]
        self._initial = [tensor.detach().clone() for tensor in self._state]

    @torch.no_grad()
    def _restore(self) -> None:
        for tensor, initial in zip(self._state, self._initial, strict=True):
            tensor.copy_(initial)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Leave the model as it was: weights, buffers, gradients and whether it is in training mode."""
        was_training = self.model.training
        gradients = [parameter.grad for parameter in self._trained]
        try:
            yield
        finally:
            self._restore()
            self.model.train(was_training)
            for parameter, gradient in zip(self._trained, gradients, strict=True):
                parameter.grad = gradient

    def upper_losses(self, masks: Tensor, seeds: list[int], upper_rows: Tensor | None = None) -> Tensor:
        """Train on each mask and measure the upper loss of what comes out.

        Args:
            masks: ``(C, n)``, bool, on the CPU. An empty one leaves the model untrained.
            seeds: One for each mask, of batches and dropout.
            upper_rows: Rows of the upper loss, ``(u,)``; None for all.

        Returns:
            Mean upper losses, ``(C,)``, float64, on the CPU; not finite where a training diverged.
        """
        rows = torch.arange(len(self.upper)) if upper_rows is None else upper_rows
        return torch.stack([self._upper_loss(mask, seed, rows) for mask, seed in zip(masks, seeds, strict=True)])

    def train_on(self, mask: Tensor, seed: int) -> None:
        """Train the model from its initial weights on the rows of a mask, and leave it so.

        Args:
            mask: ``(n,)``, bool, on the CPU. An empty one leaves the model untrained.
            seed: Of batches and dropout.
        """
        self._restore()
        self.model.train()
        with private_randomness(derive_seed(seed), self._initial[0].device):
            if mask.any():
                self._train(mask.nonzero().flatten(), torch.Generator().manual_seed(seed))

    def _upper_loss(self, mask: Tensor, seed: int, upper_rows: Tensor) -> Tensor:
        self.train_on(mask, seed)
        return self._measure(upper_rows)

    def _train(self, rows: Tensor, generator: torch.Generator) -> None:
        batches = self.problem.training.schedule(rows, generator)
        whole = self.problem.pool.take(batches[0]) if self.problem.training.batch_size is None else None
        optimizer = OPTIMIZERS[self.problem.training.optimizer](self._trained, lr=self.problem.training.learning_rate)
        for step in range(self.problem.training.num_steps):
            batch = self.problem.pool.take(batches[step]) if whole is None else whole
            with self.problem.autocast():
                loss = self.problem.losses(self.model, batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def _measure(self, rows: Tensor) -> Tensor:
        total, count = 0.0, 0
        with evaluating(self.model), self.problem.autocast():
            for chunk in rows.split(self.problem.upper_batch_size):
                units = self.problem.losses(self.model, self.upper.take(chunk))
                total = total + torch.where(units.valid, units.losses * units.counts, 0.0).sum(dtype=torch.float64)
                count = count + units.counts.sum()
        return (total / count).cpu()


class _UnitLossesOf(nn.Module):
    """A model together with its losses, so that ``functional_call`` can exchange the parameters for both."""

    def __init__(self, model: nn.Module, losses: Callable[[nn.Module, Any], UnitLosses]) -> None:
        super().__init__()
        self.model = model
        self._losses = losses

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        units = self._losses(self.model, batch)
        return units.losses, units.counts


class BatchedEngine:
    """Train on all masks at once, as one model with stacked parameters; the model itself is never written to.

    Every operation runs once for all masks (``torch.func.vmap``), which pays where a single training does not fill the device.
    Masks with fewer rows than the largest are padded with rows that weigh nothing. Adam and SGD act on every entry by itself,
    so that stacked trainings do not mix. One that diverges takes no other with it.

    Args:
        problem: As for ``SequentialEngine``; a model without batch statistics, which would be shared between the masks, and a
            pool that is a flat dict of tensors.

    Raises:
        ValueError: If the model has batch statistics, or ``vmap`` cannot take the model.

    Cost: as there, in 1 / C as many passes, each C times as large. Memory: C times that of one training.
    """

    def __init__(self, problem: InnerProblem) -> None:
        batch_norms = [name for name, module in problem.model.named_modules() if isinstance(module, _BATCH_NORMS)]
        if batch_norms:
            raise ValueError(
                f"`{type(problem.model).__name__}` has batch statistics (`{batch_norms[0]}`), which trainings that run as one would "
                "share. Use `engine='sequential'`, or a model with group or layer normalisation."
            )
        self.problem, self.model, self.upper = problem, _UnitLossesOf(problem.model, problem.losses), problem.upper
        self._initial = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        self._fixed = {
            n: t.detach()
            for n, t in [*self.model.named_parameters(), *self.model.named_buffers()]
            if n not in self._initial
        }
        self._try()

    def _try(self) -> None:
        try:
            with warnings.catch_warnings(), self.restored(), private_randomness(0, self._device):
                # Where vmap knows no rule for an operation it runs a loop over the masks and says so.
                warnings.filterwarnings("error", message="There is a performance drop")
                stacked = {n: v.repeat(2, *[1] * v.ndim).requires_grad_() for n, v in self._initial.items()}
                batch = _stack(self.problem.pool.take(torch.zeros(4, dtype=torch.int64)), 2)
                with self.problem.autocast():
                    losses, _ = self._losses(stacked, batch, 0)
                losses.sum().backward()
        except (RuntimeError, ValueError, TypeError, AttributeError, UserWarning) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"`{type(self.model.model).__name__}` cannot run as one model with stacked parameters ({reason}). Use "
                "`engine='sequential'`."
            ) from error

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the model into training mode inside, with attention that vmap can take, and leave it as it was."""
        was_training = self.model.model.training
        self.model.train()
        try:
            with eager_attention(self.model):
                yield
        finally:
            self.model.model.train(was_training)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._initial.values())).device

    def _losses(self, parameters: dict[str, Tensor], batch: Any, batch_dim: int | None) -> tuple[Tensor, Tensor]:
        def losses(parameters: dict[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
            return torch.func.functional_call(self.model, {**self._fixed, **parameters}, (batch,))

        return torch.vmap(losses, in_dims=(0, batch_dim), randomness="different")(parameters, batch)

    def upper_losses(self, masks: Tensor, seeds: list[int], upper_rows: Tensor | None = None) -> Tensor:
        """Train on each mask and measure the upper loss of what comes out; see ``SequentialEngine.upper_losses``."""
        rows = torch.arange(len(self.upper)) if upper_rows is None else upper_rows
        parameters = {n: v.expand(len(masks), *v.shape).clone() for n, v in self._initial.items()}
        kept = masks.any(1).nonzero().flatten()
        with private_randomness(derive_seed(*seeds), self._device):
            if len(kept):
                for name, trained in self._train(masks[kept], [seeds[c] for c in kept]).items():
                    parameters[name][kept.to(self._device)] = trained.detach()
            return self._measure(parameters, rows)

    def _train(self, masks: Tensor, seeds: list[int]) -> dict[str, Tensor]:
        parameters = {
            name: value.expand(len(masks), *value.shape).clone().requires_grad_()
            for name, value in self._initial.items()
        }
        schedules = [
            self.problem.training.schedule(mask.nonzero().flatten(), torch.Generator().manual_seed(seed))
            for mask, seed in zip(masks, seeds, strict=True)
        ]
        # Padded with a row of the mask's own: a broken row of the pool must not reach those that do not hold it.
        width = max(schedule.shape[1] for schedule in schedules)
        rows = torch.stack([torch.cat([s, s[:, :1].expand(-1, width - s.shape[1])], 1) for s in schedules], 1)
        weights = torch.stack([torch.arange(width) < schedule.shape[1] for schedule in schedules]).to(self._device)
        optimizer = OPTIMIZERS[self.problem.training.optimizer](
            list(parameters.values()), lr=self.problem.training.learning_rate
        )
        batch = None
        for step in range(self.problem.training.num_steps):
            if batch is None or self.problem.training.batch_size is not None:
                batch = _stack(self.problem.pool.take(rows[step].flatten()), len(masks))
            with self.problem.autocast():
                losses, counts = self._losses(parameters, batch, 0)
            counts = counts * weights
            means = torch.where(counts > 0, losses * counts, 0.0).sum(1) / counts.sum(1).clamp(min=1)
            optimizer.zero_grad()
            means.sum().backward()
            optimizer.step()
        return parameters

    @torch.no_grad()
    def _measure(self, parameters: dict[str, Tensor], rows: Tensor) -> Tensor:
        total, count = 0.0, 0
        with evaluating(self.model), self.problem.autocast():
            for chunk in rows.split(self.problem.upper_batch_size):
                losses, counts = self._losses(parameters, self.upper.take(chunk), None)
                total = total + torch.where(counts > 0, losses * counts, 0.0).sum(1, dtype=torch.float64)
                count = count + counts.sum(1)
        return (total / count).cpu()


def stacking_pays(model: nn.Module, device: torch.device) -> bool:
    """Say whether one training leaves most of the device idle, so that several as one are faster.

    Args:
        model: What would be trained.
        device: Where.

    Returns:
        True up to 10 million trained parameters; on a CPU not with convolutions whose windows overlap, which are slower in
        groups. ``scripts/benchmarks/coreset_speed.py`` measures both engines.
    """
    overlaps = any(
        isinstance(module, nn.modules.conv._ConvNd) and module.stride != module.kernel_size
        for module in model.modules()
    )
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return num_trained <= MAX_STACKED_PARAMETERS and not (overlaps and device.type == "cpu")


def _stack(batch: Mapping[str, Any], num: int) -> dict[str, Any]:
    """Split the rows of a batch into ``num`` batches, one behind the other in a new first dimension."""
    stacked = {}
    for key, entry in batch.items():
        if not isinstance(entry, Tensor) or entry.ndim == 0:
            raise ValueError(f"the batch's `{key}` is a {type(entry).__name__}, not a tensor with rows")
        stacked[key] = entry.unflatten(0, (num, -1))
    return stacked
