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
    return (excess - shifts[num - 1]).clamp(min=0) + floor


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
    return (weights * scales[num - 1]).clamp(min=floor)
