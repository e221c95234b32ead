"""Replace inner trainings by their closed form: a linear model in the gradients of a network, fitted by ridge regression."""

import itertools
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_bilevel.core.kernel_ridge import KernelRidge
from hf_bilevel.data import CollatedRows
from hf_bilevel.inner_training import eager_attention
from hf_bilevel.losses import class_logits, evaluating

NUM_DRAWS = 3  # random combinations of the logits whose gradients make the kernel
BLOCK_NUMBERS = 2**28  # entries of the gradients that are held at once, 1 GiB in float32
MANY_BLOCKS = 8
MAX_ROWS = 30_000  # of the pool: two matrices of 7 GB, or three

_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, UserWarning)  # of a model by vmap

logger = logging.getLogger(__name__)


class KernelEngine:
    r"""Answer what a model fitted to the rows of a mask is worth, by kernel ridge regression with its tangent kernel.

    .. math:: K(x, x') = \sum_c \nabla_\theta f_c(x) \cdot \nabla_\theta f_c(x'), \qquad
        E_{v \sim N(0, I)} [\nabla_\theta (v \cdot f(x)) \cdot \nabla_\theta (v \cdot f(x'))] = K(x, x')

    over the parameters that are trained, estimated with a few v and scaled so that its mean over the diagonal of the pool is 1.
    A wide network, trained by small steps, fits as the kernel at its initial weights does; with only a linear head trained, it
    is the regression on the features at any weights. Narrower networks learn features: ``trainings`` brings the model to
    weights at which it has, and the kernel is the mean of those there. Labels are one-hot vectors less their mean, the upper
    loss is the mean squared distance to them. With a pool share it is in part that of the pool's rows, each fitted by the others
    (see ``KernelRidge``), and weighted so that the classes count about as among other upper rows.

    Args:
        model: A classifier with one label for each row. Parameters without ``requires_grad`` do not count. It is only read,
            unless ``trainings`` change it; afterwards it is not looked at any more.
        pool: Rows that masks index, with ``labels``.
        upper: Rows that the upper loss is measured on; the same object as the pool for the pool.
        ridge: Of the regression, positive, in units of the kernel's diagonal.
        generator: Of the combinations of logits, on the CPU.
        pool_share: Share of the pool in the upper loss, in [0, 1].
        show_progress: Whether to show a bar while the kernel is computed.
        trainings: Each leaves the model at other weights, and the mean of the kernels there is taken; the kernel at the weights
            that the model has if there are none.

    Raises:
        ValueError: If there is not one integer label for each row, within the classes of the model; a gradient is not finite;
            nothing is trained; or the pool is larger than ``MAX_ROWS``.

    Cost: once, three forward and backward passes of every row, or one for each training if those are more, in blocks whose
    gradients fit into 1 GiB; with b blocks of the pool instead of one, (b + 1) / 2 times as many. Models that ``vmap`` cannot
    take go row by row. Then, for a mask of k of n rows, :math:`O(n k^2)` and no pass of the model. Memory: two matrices of
    n × n in float64, or three with a pool share.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: CollatedRows,
        upper: CollatedRows,
        ridge: float,
        generator: torch.Generator,
        pool_share: float = 0.0,
        show_progress: bool = False,
        trainings: Sequence[Callable[[], Any]] = (),
    ) -> None:
        self.model, self.pool, self.upper = model, pool, upper
        self._logits = _Logits(model)
        self._trained = self._trained_parameters()
        self._goes_row_by_row = False
        if not self._trained:
            raise ValueError("The tangent kernel is that of the trained parameters, and the model has none.")
        if len(pool) > MAX_ROWS:
            raise ValueError(
                f"`engine='kernel'` keeps two matrices of pool by pool and takes up to {MAX_ROWS} rows; the pool has {len(pool)}. "
                "Use another engine, or search in parts."
            )
        with evaluating(model), eager_attention(model), torch.no_grad():
            num_classes = class_logits(model, pool.take(torch.tensor([0]))).shape[1]
            targets = [_one_hot(rows.batch["labels"], num_classes, name) for rows, name in self._named_rows()]
            combinations = torch.randn(num_draws(len(trainings)), num_classes, generator=generator)
        self._combinations = combinations.to(self._device)
        self._shows_progress = show_progress
        weights = _class_weights(targets[0] > 0, targets[1] > 0) if pool_share > 0 and len(targets) > 1 else None
        kernel, upper_kernel = self._kernels(trainings)
        self._problem = KernelRidge(kernel, targets[0], upper_kernel, targets[-1], ridge, pool_share, weights)

    def _named_rows(self) -> list[tuple[CollatedRows, str]]:
        pool = [(self.pool, "train_dataset")]
        return pool if self.upper is self.pool else [*pool, (self.upper, "target_dataset")]

    def _trained_parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._logits.named_parameters() if p.requires_grad}

    # The kernel -----------------------------------------------------------------------------------------------------

    def _kernels(self, trainings: Sequence[Callable[[], Any]] = ()) -> tuple[Tensor, Tensor]:
        blocks = self._blocks()
        num = len(self.pool)
        kernel = torch.zeros(num, num, dtype=torch.float64, device=self._device)
        upper_kernel = kernel if self.upper is self.pool else kernel.new_zeros(len(self.upper), num)
        parts = self._combinations.chunk(max(1, len(trainings)))
        shown = len(self._combinations) * len(blocks[0])
        with tqdm(total=shown, desc="Tangent kernel", disable=not self._shows_progress) as bar:
            for number, combinations in enumerate(parts):
                if trainings:
                    trainings[number]()
                    self._trained = self._trained_parameters()
                with evaluating(self.model), eager_attention(self.model):
                    there, upper_there = self._sums_over_blocks(combinations, *blocks, bar)
                if not there.isfinite().all() or not upper_there.isfinite().all():
                    broken = (~there.diagonal().isfinite()).nonzero().flatten().tolist()
                    where = f"rows {broken[:5]} of `train_dataset`" if broken else "`target_dataset`"
                    raise ValueError(f"The model's gradients are not finite for {where}.")
                weight = 1 / (len(parts) * there.diagonal().mean())
                kernel.add_(there.mul_(weight))
                if upper_there is not there:
                    upper_kernel.add_(upper_there.mul_(weight))
        return kernel, upper_kernel

    def _blocks(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        num_parameters = sum(p.numel() for p in self._trained.values())
        at_once = rows_at_once(num_parameters)
        blocks, upper_blocks = (torch.arange(len(rows)).split(at_once) for rows in (self.pool, self.upper))
        if len(blocks) > MANY_BLOCKS:
            warnings.warn(
                f"The tangent kernel of {num_parameters:,} trained parameters is computed in {len(blocks)} blocks, which takes "
                f"about {(len(blocks) + 1) // 2 * len(self._combinations)} forward and backward passes of the pool. Freeze the "
                "lower layers (`requires_grad_(False)`), or pass a smaller `search_model`.",
                stacklevel=6,
            )
        return blocks, upper_blocks

    def _sums_over_blocks(
        self, combinations: Tensor, blocks: tuple[Tensor, ...], upper_blocks: tuple[Tensor, ...], bar: tqdm
    ) -> tuple[Tensor, Tensor]:
        kernel = torch.zeros(len(self.pool), len(self.pool), dtype=torch.float64, device=self._device)
        upper_kernel = torch.zeros(len(self.upper), len(self.pool), dtype=torch.float64, device=self._device)
        for combination, number in itertools.product(combinations, range(len(blocks))):
            block = blocks[number]
            gradients = self._gradients(self.pool, block, combination)
            self._add(kernel, block, block, gradients @ gradients.T)
            for other in blocks[number + 1 :]:
                products = self._gradients(self.pool, other, combination) @ gradients.T
                self._add(kernel, other, block, products)
                self._add(kernel, block, other, products.T)
            for other in upper_blocks if self.upper is not self.pool else ():
                products = self._gradients(self.upper, other, combination) @ gradients.T
                self._add(upper_kernel, other, block, products)
            bar.update()
        return kernel, kernel if self.upper is self.pool else upper_kernel

    @staticmethod
    def _add(kernel: Tensor, rows: Tensor, columns: Tensor, products: Tensor) -> None:
        kernel[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] += products

    def _gradients(self, rows: CollatedRows, block: Tensor, combination: Tensor) -> Tensor:
        """Differentiate a combination of the logits of each row, ``(rows, parameters)``."""
        if not self._goes_row_by_row:
            try:
                return self._gradients_at_once(rows.take(block), combination)
            except _REFUSALS as error:
                logger.info("The tangent kernel is computed row by row: %s", error)
                self._goes_row_by_row = True
        return torch.stack([self._gradient(rows.take(row[None]), combination) for row in block])

    def _gradients_at_once(self, batch: Mapping[str, Any], combination: Tensor) -> Tensor:
        inputs = {key: entry for key, entry in batch.items() if isinstance(entry, Tensor) and entry.ndim}
        fixed = {key: entry for key, entry in batch.items() if key not in inputs}

        def combined(parameters: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
            row = {key: entry[None] for key, entry in row.items()}
            logits = torch.func.functional_call(self._logits, parameters, ({**row, **fixed},))
            return (logits * combination).sum()

        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="There is a performance drop")
            gradient = torch.func.vmap(torch.func.grad(combined), in_dims=(None, 0), chunk_size=64)
            parts = gradient(self._trained, inputs)
        return torch.cat([part.flatten(1).float() for part in parts.values()], dim=1)

    def _gradient(self, batch: Mapping[str, Any], combination: Tensor) -> Tensor:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        combined = (class_logits(self.model, batch) * combination).sum()
        parts = torch.autograd.grad(combined, parameters, materialize_grads=True)
        return torch.cat([part.flatten().float() for part in parts])

    # What the search asks -------------------------------------------------------------------------------------------

    def upper_losses(self, masks: Tensor, seeds: list[int], upper_rows: Tensor | None = None) -> Tensor:
        """Fit each mask and measure the upper loss on all upper rows; nothing is random in it.

        Args:
            masks: ``(C, n)``, bool, on the CPU.
            seeds: Not used; for ``SequentialEngine``.
            upper_rows: Not used.

        Returns:
            Mean squared distances, ``(C,)``, float64, on the CPU.
        """
        return self.losses_and_differences(masks)[0]

    def losses_and_differences(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Measure masks, and what each sample changes: see ``KernelRidge.loss_and_differences``.

        Args:
            masks: ``(C, n)``, bool.

        Returns:
            ``(C,)`` and ``(C, n)``, float64, on the CPU.
        """
        found = [self._problem.loss_and_differences(mask) for mask in masks.to(self._device)]
        losses, differences = zip(*found, strict=True)
        return torch.stack(losses).cpu(), torch.stack(differences).cpu()

    @property
    def _device(self) -> torch.device:
        return next(iter(self._trained.values())).device


def num_draws(num_trainings: int) -> int:
    """Count the random combinations of logits: as many after each training, and three at least.

    Args:
        num_trainings: Trainings at whose ends the kernel is taken, 0 for the initial weights.

    Returns:
        A multiple of the trainings.

    Example:
        >>> [num_draws(num) for num in (0, 1, 2, 3, 5)]
        [3, 3, 4, 3, 5]
    """
    return max(1, num_trainings) * math.ceil(NUM_DRAWS / max(1, num_trainings))


def rows_at_once(num_parameters: int) -> int:
    """Count the rows whose gradients are held at once: as many as fit into 1 GiB, one at least.

    Args:
        num_parameters: That are trained.

    Returns:
        Rows of a block.

    Example:
        >>> [rows_at_once(num) for num in (10_000, 12_000_000, 10**9)]
        [26843, 22, 1]
    """
    return max(1, BLOCK_NUMBERS // num_parameters)


class _Logits(nn.Module):
    """A model that takes a batch and returns its logits, so that ``functional_call`` can exchange the parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        return class_logits(self.model, batch)


def _class_weights(pool: Tensor, upper: Tensor) -> Tensor:
    """Weight the rows of the pool, with the mean 1, so that each class has the share of it that it has of the upper rows.

    The shares are taken with one upper row more, spread over the classes of the pool: a few dozen rows miss classes by chance,
    and a class that is not wanted, which wrong labels name, must not count much.

    Returns:
        Float64, ``(n,)``.
    """
    in_pool = pool.sum(0).double()
    is_in_pool = in_pool > 0
    wanted = torch.where(is_in_pool, upper.sum(0) + 1 / is_in_pool.sum(), 0)
    weights = (pool * (wanted / in_pool.clamp(min=1))).sum(1)
    return weights / weights.mean()


def _one_hot(labels: Any, num_classes: int, name: str) -> Tensor:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.numel() != len(labels):
        raise ValueError(
            f"`engine='kernel'` fits one class for each row; the labels of `{name}` are something else. Use another engine."
        )
    labels = labels.flatten()
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"The labels of `{name}` lie between {int(labels.min())} and {int(labels.max())}, and the model has the classes 0 to "
            f"{num_classes - 1}."
        )
    return F.one_hot(labels, num_classes).double() - 1 / num_classes
