"""Online selection by excess loss: what is kept of a candidate batch, and the objective of the reference model."""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor


def num_selected(selection_ratio: float, num_units: int | Tensor) -> int | Tensor:
    r"""Count the units to keep of a candidate batch, :math:`\lceil \gamma n \rceil`.

    Exact for ratios written in decimals: ``0.1`` of 30 is 3, although ``0.1 * 30 > 3`` in floating point.

    Args:
        selection_ratio: The ratio :math:`\gamma`, in (0, 1]; read as the nearest fraction with a denominator of at
            most one million (of more than a million units, at most their number), and as one millionth below that.
        num_units: Number of candidates, an int or an integer tensor of any shape; ``>= 0``.

    Returns:
        The count, of the type of ``num_units`` (tensors become int64 and stay on their device, without a host sync).

    Raises:
        ValueError: If ``selection_ratio`` is outside (0, 1].

    Example:
        >>> num_selected(0.1, 30), num_selected(0.6, 4)
        (3, 3)
        >>> num_selected(0.5, torch.tensor([0, 1, 3]))
        tensor([0, 1, 2])
    """
    if not 0 < selection_ratio <= 1:
        raise ValueError(f"`selection_ratio` must be in (0, 1], got {selection_ratio}.")
    finest = 1_000_000 if isinstance(num_units, Tensor) else max(1_000_000, num_units)
    ratio = Fraction(selection_ratio).limit_denominator(finest) or Fraction(1, finest)
    if isinstance(num_units, Tensor):
        num_units = num_units.to(torch.int64)
    return (num_units * ratio.numerator + ratio.denominator - 1) // ratio.denominator


def excess_loss(proxy_losses: Tensor, reference_losses: Tensor) -> Tensor:
    r"""Score units by how much worse the proxy model does than the reference model.

    For the penalised objective :math:`f(w) + \lambda\,(g(\alpha, w) - \min_u g(\alpha, u))` with
    :math:`g = \sum_n \alpha_n \ell_n`, the derivative by :math:`\alpha_n` is
    :math:`\lambda\,(\ell_n(w) - \ell_n(u))`, so the Frank-Wolfe vertex keeps the units with the largest
    :math:`\ell_n(u) - \ell_n(w)`.

    Args:
        proxy_losses: :math:`\ell_n(u)`, any shape, floating, in nats.
        reference_losses: :math:`\ell_n(w)`, of the same shape.

    Returns:
        The difference, detached, in float32 or wider; may be negative.

    Raises:
        ValueError: If the shapes differ.

    References:
        BLADE (arXiv 2606.18650). With a static reference: RHO-LOSS (arXiv 2206.07137) for samples, Rho-1
        (arXiv 2404.07965) for tokens.

    Example:
        >>> excess_loss(torch.tensor([2.0, 1.0]), torch.tensor([0.5, 3.0]))
        tensor([ 1.5000, -2.0000])
    """
    if proxy_losses.shape != reference_losses.shape:
        raise ValueError(
            f"Proxy and reference losses must have one shape, got {tuple(proxy_losses.shape)} and "
            f"{tuple(reference_losses.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(proxy_losses.dtype, reference_losses.dtype), torch.float32)
    return proxy_losses.detach().to(dtype) - reference_losses.detach().to(dtype)


@torch.no_grad()
def top_units(scores: Tensor, eligible: Tensor, num: int | Tensor) -> Tensor:
    """Keep the units with the highest scores.

    Ties go to the unit that comes first in memory order, so the result is a function of the scores alone. A unit whose
    score is not finite is never kept, even when fewer than ``num`` others are left.

    Args:
        scores: Any shape, floating; higher is kept first.
        eligible: Same shape, bool; units that may be kept (not padding, not ignored).
        num: How many to keep, ``>= 0``; an int or a tensor with one element.

    Returns:
        A bool mask of the shape of ``scores``; its sum is the smallest of ``num`` and the number of eligible units
        with a finite score.

    Complexity: one stable sort, O(n log n); no host sync.

    Example:
        >>> scores = torch.tensor([[0.3, 0.9], [float("nan"), 0.3]])
        >>> top_units(scores, torch.ones(2, 2, dtype=torch.bool), 2)
        tensor([[ True,  True],
                [False, False]])
    """
    candidates = (eligible & scores.isfinite()).flatten()
    # -inf only orders the units; the mask below, not the score, decides who may be kept.
    ranked = scores.flatten().masked_fill(~candidates, float("-inf")).argsort(descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(0, ranked, torch.arange(len(ranked), device=ranked.device))
    return ((rank < num) & candidates).view(scores.shape)


def synchronisation_schedule(sync_steps: int | None, reference_steps: int | None, max_steps: int) -> tuple[int, int]:
    """Resolve the synchronisation period T and the reference steps K.

    Published: five synchronisations in 5,000 steps (T = 1,000) with K = 300, and no difference for T from 500 to
    2,000. "auto": as many in a run of up to 5,000 steps, more in longer ones, 40 to 1,000 steps apart; and K = 0.08 T,
    but at least 20 steps, or T if that is less: a reference that had taken a handful of steps did worse than no selection. With 0.08
    to 0.12 it hardly mattered whether T was a tenth, a fifth or half of the run, as long as K was 19 or more; all did better than the
    published K / T with T a quarter of the run, and a little worse than it with T a twentieth, which costs a seventh more
    (``scripts/benchmarks/schedules.py``).

    Args:
        sync_steps: T, or None for "auto".
        reference_steps: K, or None for "auto".
        max_steps: Number of optimizer steps of the run, positive.

    Returns:
        T and K, both at least 1.

    Example:
        >>> [synchronisation_schedule(None, None, max_steps) for max_steps in (100_000, 5_001, 1_000, 100, 10)]
        [(1000, 80), (834, 67), (200, 20), (40, 20), (10, 10)]
    """
    if sync_steps is None:
        num = max(5, math.ceil(max_steps / 1000))
        sync_steps = min(max_steps, max(40, math.ceil(max_steps / num)))
    if reference_steps is None:
        reference_steps = max(round(0.08 * sync_steps), min(sync_steps, 20))
    return sync_steps, reference_steps


class SelectionTally:
    """Count, for every sample or domain, how often its units were offered and how often they were selected.

    Updates stay on the device of their arguments and are added to tables on the CPU every ``flush_every`` calls, so a
    step costs no host sync of its own. Tables grow with the largest id seen, as streams have no known length.

    Each process counts its own batches; ``merge`` adds up what all of them counted since the last merge. Memory: 24 bytes for
    an id, and as many again once there are merged counts.

    Args:
        num_ids: Initial length of the tables.
        flush_every: Number of updates that are held back.

    Example:
        >>> tally = SelectionTally(3)
        >>> one = torch.tensor([1, 1])
        >>> tally.update(torch.tensor([0, 2]), one, torch.tensor([0, 1]), torch.tensor([0.1, 0.7]))
        >>> tally.state_dict()["selected"]
        tensor([0., 0., 1.], dtype=torch.float64)
    """

    fields = ("offered", "selected", "score_sum")

    def __init__(self, num_ids: int = 0, flush_every: int = 64) -> None:
        self.flush_every = flush_every
        self._merged: dict[str, Tensor] | None = None  # of all processes
        self._own = {field: torch.zeros(num_ids, dtype=torch.float64) for field in self.fields}
        self._pending: list[tuple[Tensor, ...]] = []

    def __len__(self) -> int:
        return len(self._own["offered"])

    def update(self, ids: Tensor, offered: Tensor, selected: Tensor, score_sum: Tensor) -> None:
        """Add a candidate batch.

        Args:
            ids: Sample or domain ids, int64, non-negative, shape ``(n,)``; may repeat.
            offered: Units offered for each, ``(n,)``.
            selected: Units selected, ``(n,)``.
            score_sum: Sum of the units' finite scores, ``(n,)``, in nats.
        """
        self._pending.append((ids, offered, selected, score_sum))
        if len(self._pending) >= self.flush_every:
            self.flush()

    def flush(self) -> None:
        """Add what is pending to the tables; one host sync."""
        if not self._pending:
            return
        ids, *columns = (torch.cat(column).cpu() for column in zip(*self._pending, strict=True))
        self._pending = []
        self.grow(int(ids.max()) + 1 if len(ids) else 0)  # a batch may be empty
        for field, column in zip(self.fields, columns, strict=True):
            self._own[field].index_add_(0, ids, column.double())

    def grow(self, num_ids: int) -> None:
        """Make room for ids below ``num_ids``; never shrinks."""
        missing = num_ids - len(self)
        if missing > 0:
            for tables in (self._own,) if self._merged is None else (self._own, self._merged):
                for field in self.fields:
                    tables[field] = torch.cat([tables[field], torch.zeros(missing, dtype=torch.float64)])

    def merge(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Add up what all processes counted since the last merge.

        Args:
            reduce: From this process's table, float64 on the CPU, to the sum over all of them; tables must have one
                length, see ``grow``.
        """
        self.flush()
        counted = {field: reduce(self._own[field]) for field in self.fields}
        if self._merged is not None:
            counted = {field: table + self._merged[field] for field, table in counted.items()}
        self._merged = counted
        self._own = {field: torch.zeros_like(table) for field, table in self._own.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tables: merged counts, and this process's own since, float64, ``(num_ids,)``."""
        self.flush()
        if self._merged is None:
            return {field: table.clone() for field, table in self._own.items()}
        return {field: self._merged[field] + self._own[field] for field in self.fields}

    def load_state_dict(self, state: dict[str, Tensor], merged: bool = True) -> None:
        """Replace all counts.

        Args:
            state: From ``state_dict``.
            merged: Whether the counts are those of all processes together; there is one process otherwise.
        """
        self._pending = []
        self._own = {field: state[field].clone() for field in self.fields}
        self._merged = None
        if merged:
            self._merged, self._own = self._own, {field: torch.zeros_like(state[field]) for field in self.fields}
