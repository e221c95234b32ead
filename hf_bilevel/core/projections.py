"""Projections onto the sets that upper variables live in."""

import torch
from torch import Tensor


def projection_simplex(point: Tensor, floor: float = 0.0) -> Tensor:
    r"""Project onto the weights that sum to 1 and are not below a floor, in the Euclidean norm.

    The projection is :math:`\max(x_j - \tau, f)` with the one :math:`\tau` that makes the sum 1, found by sorting.

    Args:
        point: x, ``(M,)``, finite.
        floor: f, in [0, 1 / M].

    Returns:
        The nearest such weights, ``(M,)``.

    Cost: O(M log M); no host sync.

    Example:
        >>> projection_simplex(torch.tensor([0.9, 0.5, -1.0]))
        tensor([0.7000, 0.3000, 0.0000])
        >>> projection_simplex(torch.tensor([0.9, 0.5, -1.0]), floor=0.1)
        tensor([0.6500, 0.2500, 0.1000])
    """
    excess = point - floor
    ordered = excess.sort(descending=True).values
    places = torch.arange(1, len(point) + 1, device=point.device)
    shifts = (ordered.cumsum(0) - (1 - len(point) * floor)) / places
    num = (ordered > shifts).sum().clamp(min=1)
    return (excess - shifts.take(num - 1)).clamp(min=0) + floor


def kl_projection_simplex(weights: Tensor, floor: float = 0.0) -> Tensor:
    r"""Project positive weights onto those that sum to 1 and are not below a floor, in the Kullback-Leibler divergence.

    The projection is :math:`\max(c\,v_j, f)` with the one :math:`c` that makes the sum 1: what is not held at the floor
    keeps its proportions.

    Args:
        weights: v, ``(M,)``, not negative, not all zero.
        floor: f, in [0, 1 / M].

    Returns:
        The nearest such weights, ``(M,)``.

    Cost: O(M log M); no host sync.

    Example:
        >>> kl_projection_simplex(torch.tensor([6.0, 2.0, 0.0]), floor=0.2)
        tensor([0.6000, 0.2000, 0.2000])
    """
    ordered = weights.sort(descending=True).values
    # How many smaller ones are at the floor; times a number, integers would become float32.
    held = torch.arange(len(weights) - 1, -1, -1, device=weights.device).to(weights)
    scales = (1 - held * floor) / ordered.cumsum(0).clamp(min=torch.finfo(weights.dtype).tiny)
    num = (ordered * scales > floor).sum().clamp(min=1)
    return (weights * scales.take(num - 1)).clamp(min=floor)


def projection_capped_simplex(point: Tensor, size: float) -> Tensor:
    r"""Project onto the probabilities whose expected number is at most K, :math:`\{0 \le s \le 1, \sum_i s_i \le K\}`.

    The projection is :math:`\mathrm{clip}(x_i - v, 0, 1)`. If v = 0 keeps the sum at or below K, that is all; otherwise v > 0
    is where the sum, which falls piecewise linearly with breaks at :math:`x_i` and :math:`x_i - 1`, is K: the piece is found by
    bisection over the sorted breaks, and v is solved for inside it.

    Args:
        point: x, ``(n,)``, finite, n at least 1.
        size: K, not negative; a fraction is allowed.

    Returns:
        The nearest such probabilities, ``(n,)``; computed in float64.

    Cost: one sort, O(n log n), and about 50 bytes of memory per entry; no host sync.

    Example:
        >>> projection_capped_simplex(torch.tensor([1.5, 1.0, 0.5, -1.0]), size=1.5)
        tensor([1.0000, 0.5000, 0.0000, 0.0000])
        >>> projection_capped_simplex(torch.tensor([1.5, 0.5, 0.25, -1.0]), size=2)  # already few enough
        tensor([1.0000, 0.5000, 0.2500, 0.0000])
    """
    num = len(point)  # take(), because indexing by a scalar waits for the device
    # Negative entries are 0 for every v: without them the sums do not cancel.
    ordered = point.sort().values.double().clamp(min=0)
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])

    def mass(shift: Tensor) -> Tensor:
        places = torch.searchsorted(ordered, torch.stack([shift, shift + 1]))
        return sums.take(places).diff()[0] - shift * places.diff()[0] + (num - places[1])

    low, high = ordered.new_zeros(()), ordered.new_full((), torch.inf)
    for breaks in (ordered, ordered - 1):
        count = torch.zeros((), dtype=torch.int64, device=point.device)  # breaks with a mass of at least K
        for power in reversed(range(num.bit_length())):
            more = count + (1 << power)
            enough = (more <= num) & (mass(breaks.take(more.clamp(max=num) - 1)) >= size)
            count = torch.where(enough, more, count)
        low = torch.where(count > 0, breaks.take((count - 1).clamp(min=0)).maximum(low), low)
        high = torch.where(count < num, breaks.take(count.clamp(max=num - 1)).minimum(high), high)
    # Between low and high, these entries are neither 0 nor 1. The prefix sums found the piece; a plain sum is more precise.
    # With few enough at v = 0, low is 0 and the excess not positive, or nothing lies between.
    num_between = torch.searchsorted(ordered - 1, low, right=True) - torch.searchsorted(ordered, high)
    wide = point.double()
    excess = (wide - low).clamp(0, 1).sum() - size
    shift = (low + excess / num_between.clamp(min=1)).minimum(high).maximum(low)
    return (wide - shift).clamp(0, 1).to(point.dtype)
