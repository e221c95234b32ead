r"""Random subspaces of matrices, and estimators of a Hessian action that see only the subspace.

A matrix :math:`M` of shape (n, m) is restricted on its last side: with a random orthonormal :math:`P` of shape (m, r)
and :math:`\tilde P = \sqrt{m/r}\,P`, restricting gives :math:`M\tilde P` of shape (n, r), lifting a coordinate matrix
:math:`B` gives :math:`B\tilde P^\top`. Then :math:`E[\tilde P\tilde P^\top] = I`: what is restricted and lifted again is
right on average.

The functions work on several matrices at once, as lists: the blocks of one variable, coupled by one Hessian. A block whose
basis is None stays in full space, with any shape.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Bases = list[Tensor | None]

RestrictedHessianAction = Callable[[list[Tensor]], list[Tensor]]
"""From one full-size direction per block to the restricted Hessian action: the coordinates of H[D] in each basis."""


def haar_basis(dim: int, rank: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""Draw the scaled basis :math:`\tilde P` of a uniformly distributed random subspace.

    The Q of a QR decomposition of a Gaussian matrix is distributed by the Haar measure once the signs of R's diagonal are
    taken out.

    Args:
        dim: m, the size of the space; positive.
        rank: r, the size of the subspace, from 1 to m.
        generator: Source of randomness, on the CPU.
        dtype: Floating dtype of the result; the decomposition is made in it, in float32 at least.

    Returns:
        Shape ``(m, r)``, on the CPU, with ``P.T @ P`` equal to m / r times the identity.

    Raises:
        ValueError: If the rank is not from 1 to m.

    Cost: O(m r²).

    Example:
        >>> basis = haar_basis(6, 2, torch.Generator().manual_seed(0), torch.float64)
        >>> (basis.T @ basis).round(decimals=6)
        tensor([[3., 0.],
                [0., 3.]], dtype=torch.float64)
    """
    if not 1 <= rank <= dim:
        raise ValueError(f"The rank must be from 1 to the dimension {dim}, got {rank}.")
    gaussian = torch.randn(dim, rank, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign() * math.sqrt(dim / rank)).to(dtype)


def restrict(matrices: list[Tensor], bases: Bases) -> list[Tensor]:
    r"""Take every block into its subspace: :math:`M\tilde P`, or the block itself where there is no basis.

    Args:
        matrices: Blocks of shape ``(n, m)``, or of any shape without a basis; brought to a basis's dtype and device.
        bases: A basis of shape ``(m, r)`` or None for each.

    Returns:
        Coordinates, ``(n, r)`` each.
    """
    pairs = zip(matrices, bases, strict=True)
    return [matrix if basis is None else matrix.to(basis) @ basis for matrix, basis in pairs]


def lift(coordinates: list[Tensor], bases: Bases) -> list[Tensor]:
    r"""Bring coordinates back to full size: :math:`B\tilde P^\top`; the adjoint of ``restrict``.

    Args:
        coordinates: Blocks of shape ``(n, r)``, or of any shape without a basis.
        bases: A basis of shape ``(m, r)`` or None for each.

    Returns:
        Matrices, ``(n, m)`` each.
    """
    pairs = zip(coordinates, bases, strict=True)
    return [block if basis is None else block @ basis.T for block, basis in pairs]


def one_sided(action: RestrictedHessianAction, auxiliary: list[Tensor], bases: Bases) -> list[Tensor]:
    r"""Estimate :math:`H[Z]` as :math:`\tilde P\tilde P^\top H[Z]`: perturb with the whole Z, restrict only the result.

    Unbiased for every rank and any number of blocks, since :math:`E[\tilde P\tilde P^\top] = I` and the basis enters
    once. The least noisy of the estimators here. Without a basis it is the full-space action, exactly.

    Args:
        action: The restricted Hessian action.
        auxiliary: Z, full size.
        bases: The bases that ``action`` restricts with.

    Returns:
        Coordinates of the estimate; ``lift`` brings it to full size.

    Cost: one call of ``action``.
    """
    return action(auxiliary)


def bi_probe(
    action: RestrictedHessianAction, auxiliary: list[Tensor], bases: Bases, generator: torch.Generator
) -> list[Tensor]:
    r"""Estimate :math:`H[Z]` from directions inside the subspace alone, with the bias taken out by sign probes.

    Restricting on both sides is biased: :math:`E[\tilde P\tilde P^\top A \tilde P\tilde P^\top] = A + \delta(A^\top +
    \mathrm{tr}(A) I - \tfrac{2}{m}A)` with :math:`\delta = \frac{m(m-r)}{r(m-1)(m+2)}`. With :math:`V = Z\tilde P`,
    :math:`R = H[V\tilde P^\top]\tilde P`, random signs :math:`\Omega` and :math:`Y = H[\Omega\tilde P^\top]\tilde P`,
    all of shape (n, r),

    .. math:: \hat H = R - \delta'\left(Y V^\top\Omega + Y\Omega^\top V - \tfrac{2}{r}\langle\Omega, V\rangle Y\right),
              \qquad \delta' = \frac{r(m-r)}{m(r-1)(r+2)},

    is unbiased, also for coupled blocks: the signs of other blocks average out.

    Args:
        action: The restricted Hessian action.
        auxiliary: Z, full size.
        bases: The bases that ``action`` restricts with; ranks of at least 2.
        generator: Source of the signs, on the CPU.

    Returns:
        Coordinates of the estimate; ``lift`` brings it to full size.

    Raises:
        ValueError: If a rank is 1: the correction divides by r - 1.

    Cost: two calls of ``action``.

    References:
        BROS (arXiv 2605.10288). The matrix form is derived from the paper's second moments of a projection.
    """
    if any(basis is not None and basis.shape[1] < 2 for basis in bases):
        raise ValueError("The bi-probe needs a rank of at least 2. Use `one_sided`, which is unbiased at any rank.")
    inside = restrict(auxiliary, bases)
    result = action(lift(inside, bases))
    signs = [
        torch.zeros_like(block) if basis is None else _random_signs(block, generator)
        for block, basis in zip(inside, bases, strict=True)
    ]
    probed = action(lift(signs, bases))
    return [
        r if basis is None else r - _bi_probe_bias(*basis.shape, v, omega, y)
        for r, v, omega, y, basis in zip(result, inside, signs, probed, bases, strict=True)
    ]


def two_sided(
    action: RestrictedHessianAction, auxiliary: list[Tensor], bases: Bases, other_bases: Bases
) -> list[Tensor]:
    r"""Estimate :math:`H[Z]` with two independent projections, :math:`\tilde P\tilde P^\top H[Z\tilde P'\tilde P'^\top]`.

    Unbiased for every rank, since the projections are independent.

    Args:
        action: The restricted Hessian action.
        auxiliary: Z, full size.
        bases: The bases that ``action`` restricts with.
        other_bases: Bases of the same shapes, drawn independently.

    Returns:
        Coordinates of the estimate; ``lift`` brings it to full size.

    Cost: one call of ``action``.
    """
    return action(lift(restrict(auxiliary, other_bases), other_bases))


def _random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)


def _bi_probe_bias(dim: int, rank: int, inside: Tensor, signs: Tensor, probed: Tensor) -> Tensor:
    scale = rank * (dim - rank) / (dim * (rank - 1) * (rank + 2))
    correction = probed @ (inside.T @ signs) + probed @ (signs.T @ inside)
    return scale * (correction - (2 / rank) * (signs * inside).sum() * probed)


def coverage(num_steps: int, refresh_steps: int, dim: int, rank: int) -> float:
    r"""Count how often the subspaces of a run cover the space, (steps / refresh_steps) · (r / m).

    Below about 10 the hypergradient suffers (cosine with the exact one 0.98 at 4 and 0.88 at 2, against 1.00 at 10, for a
    logistic regression): a hypothesis from one instance, and a warning rather than an error.

    Args:
        num_steps: Optimizer steps of the run.
        refresh_steps: Steps that share a basis, at least 1.
        dim: m.
        rank: r.

    Returns:
        The number of times.

    Example:
        >>> coverage(1000, 10, 400, 40)
        10.0
    """
    return num_steps / refresh_steps * rank / dim


def refresh_schedule(num_steps: int, dim: int, rank: int, longest: int = 200) -> int:
    """Choose the longest period for which the subspaces cover the space ten times, up to ``longest`` steps.

    Args:
        num_steps: Optimizer steps of the run.
        dim: m.
        rank: r.
        longest: An upper limit.

    Returns:
        ``refresh_steps``, at least 1.

    Example:
        >>> refresh_schedule(1000, 400, 40), refresh_schedule(50, 400, 40)
        (10, 1)
    """
    return max(1, min(longest, int(num_steps * rank / dim / 10)))


# Averages of gradients and the like, which mean nothing in another subspace. "z" is a position in it (schedule-free).
_FORGOTTEN = {"exp_avg", "momentum_buffer", "grad_avg", "exp_inf", "acc_delta", "ax", "z"}


def _is_known(name: str) -> bool:
    return name in _FORGOTTEN or _is_second_moment(name)


def _is_second_moment(name: str) -> bool:
    return "sq" in name or name == "sum"  # "sum" is Adagrad's


@torch.no_grad()
def carry_over(state: dict[str, Tensor] | None) -> None:
    """Carry an optimizer's state on coordinates over to a fresh subspace.

    A direction of the old subspace means nothing in the new one, so averages of gradients are forgotten. Second moments are
    kept, averaged over each row: in a uniformly random subspace all coordinates of a row have the same distribution.

    Args:
        state: The optimizer's state of one leaf, changed in place; None or empty before the first step. Matrices are recognised by
            the names that PyTorch's and transformers' optimizers give them. With one of another name, as bitsandbytes' have, all of
            the state is dropped, and the optimizer begins anew.
    """
    if any(isinstance(v, Tensor) and v.ndim == 2 and not _is_known(name) for name, v in (state or {}).items()):
        state.clear()
    for name, value in (state or {}).items():
        if not isinstance(value, Tensor):
            continue
        if name == "exp_avg_sq_col":  # Adafactor's, one number for each coordinate
            value.fill_(value.mean())
        elif value.ndim == 2 and _is_second_moment(name):
            value.copy_(value.mean(1, keepdim=True).expand_as(value))
        elif value.ndim == 2:
            value.zero_()
