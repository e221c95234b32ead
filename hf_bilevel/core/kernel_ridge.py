r"""A lower problem with a closed form: kernel ridge regression on the samples that a mask keeps.

Its upper loss is known for a mask and, for hardly more, for every mask that differs from it in one sample. These differences
are the exact gradient of the expected loss in all probabilities, of which the policy gradient sees one number a mask:
:math:`\partial E[L] / \partial s_i = E[L(m_i = 1) - L(m_i = 0)]`.

References:
    Borsos, Mutny, Krause, Coresets via Bilevel Optimization for Continual Learning and Streaming, NeurIPS 2020 (the proxy).
    Titsias, Lazaro-Gredilla, Local Expectation Gradients for Black Box Variational Inference, NeurIPS 2015 (the estimator).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class KernelRidge:
    r"""Fit the samples S of a mask and measure the fit: :math:`f(x) = K_{xS} A^{-1} Y_S` with :math:`A = K_{SS} + \lambda I`.

    The upper loss is :math:`L = \frac{1}{u} \sum_o |f(x_o) - t_o|^2`. With :math:`r_i = y_i - f(x_i)`, the kernel that is left
    :math:`\tilde K = K - K_{\cdot S} A^{-1} K_{S \cdot}` and :math:`e = f - t` on the upper samples, a sample :math:`i \notin S`
    that joins moves f by :math:`\tilde k_i r_i^T / (\tilde K_{ii} + \lambda)`, and one that leaves by
    :math:`-b_i \alpha_i^T / A^{-1}_{ii}`, where :math:`\alpha = A^{-1} Y_S` and b is its column of :math:`K_{oS} A^{-1}`.

    With a pool share p the samples are judged on too, each by what the *others* say of it:

    .. math:: (1 - p)\, L + p\, \frac{1}{n} \sum_i w_i |f_{S \setminus i}(x_i) - y_i|^2, \qquad
        f_{S \setminus i}(x_i) - y_i = -\alpha_i / A^{-1}_{ii} \text{ for } i \in S,

    so that a sample whose label is wrong is not worth keeping for its own sake.

    Args:
        kernel: Of the samples with themselves, ``(n, n)``, symmetric and positive semi-definite; float64 is advised.
        targets: Y, ``(n, c)``.
        upper_kernel: Of the upper samples with the samples, ``(u, n)``.
        upper_targets: t, ``(u, c)``.
        ridge: :math:`\lambda`, positive.
        pool_share: p, in [0, 1].
        pool_weights: w, ``(n,)``, not negative; 1 for all if None.

    Raises:
        ValueError: If shapes do not fit, the ridge is not positive, or the share is not in [0, 1].

    Cost: :math:`O(u n^2)` once, after which nothing depends on the number u of upper samples, and :math:`O(n^3)` with a pool
    share; two matrices of n × n, or three.

    Example:
        >>> kernel, targets = torch.eye(3).double(), torch.tensor([[1.0], [2.0], [4.0]]).double()
        >>> KernelRidge(kernel, targets, kernel, targets, ridge=1.0).loss_and_differences(torch.tensor([True, True, False]))
        (tensor(5.7500, dtype=torch.float64), tensor([-0.2500, -1.0000, -4.0000], dtype=torch.float64))
    """

    def __init__(
        self,
        kernel: Tensor,
        targets: Tensor,
        upper_kernel: Tensor,
        upper_targets: Tensor,
        ridge: float,
        pool_share: float = 0.0,
        pool_weights: Tensor | None = None,
    ) -> None:
        n, u = len(kernel), len(upper_kernel)
        if kernel.shape != (n, n) or upper_kernel.shape != (u, n) or len(targets) != n or len(upper_targets) != u:
            raise ValueError(
                "Kernels of shape (n, n) and (u, n) need targets of n and u rows; got kernels of shape "
                f"{tuple(kernel.shape)} and {tuple(upper_kernel.shape)} and {len(targets)} and {len(upper_targets)} targets."
            )
        if not ridge > 0:
            raise ValueError(f"`ridge` must be positive, got {ridge}.")
        if not 0 <= pool_share <= 1:
            raise ValueError(f"`pool_share` must be in [0, 1], got {pool_share}.")
        self.ridge = ridge
        self.pool_share = pool_share
        self._kernel, self._targets = kernel, targets
        self._weights = torch.ones_like(kernel[0]) if pool_weights is None else pool_weights.to(kernel)
        self._upper = _Judge(upper_kernel, upper_targets)
        root = self._weights.sqrt()[:, None]
        self._pool = _Judge(root * kernel, root * targets) if pool_share > 0 else None

    def loss_and_differences(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Measure what a mask's samples fit, and what each sample of the pool changes.

        Args:
            mask: Samples to fit, ``(n,)``, bool; it may be empty or full.

        Returns:
            The upper loss, a scalar; and ``(n,)``: the loss with sample i less that without it, the others as in the mask.

        Cost: :math:`O(n k^2 + n k c)` for a mask of k samples.
        """
        fit = self._fit(mask)
        loss = self._upper.total(fit) / self._upper.num
        differences = fit.differences(self._upper.joining(fit), self._upper.leaving(fit)) / self._upper.num
        if self._pool is None:
            return loss, differences
        left_out, its_differences = self._left_out(fit)
        rest, share = 1 - self.pool_share, self.pool_share / self._pool.num
        return rest * loss + share * left_out, rest * differences + share * its_differences

    def _fit(self, mask: Tensor) -> "_Fit":
        chosen = mask.nonzero().flatten()
        columns = self._kernel[:, chosen]
        eye = torch.eye(len(chosen), dtype=columns.dtype, device=columns.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(columns[chosen] + self.ridge * eye))
        coefficients = inverse @ self._targets[chosen]
        weights = columns @ inverse
        return _Fit(
            chosen=chosen,
            inverse=inverse,
            coefficients=coefficients,
            weights=weights,
            left=self._kernel.diagonal() - (weights * columns).sum(1) + self.ridge,
            residuals=self._targets - columns @ coefficients,
        )

    def _left_out(self, fit: "_Fit") -> tuple[Tensor, Tensor]:
        r"""Sum the squared distances of all samples to what the others say of them.

        The judge of the pool counts what is fitted too, for which :math:`e_o = -\lambda \alpha_o` and
        :math:`\tilde K_{oi} = \lambda B_{io}`. That, and what a sample that joins changes for itself, comes off again.

        Returns:
            The sum, and the differences that each sample makes in it, ``(n,)``.
        """
        ridge, alpha, inverse, weights = self.ridge, fit.coefficients, fit.inverse, fit.weights
        curvature, sizes, of_chosen = inverse.diagonal(), alpha.square().sum(1), self._weights[fit.chosen]
        distances = of_chosen * sizes / curvature.square()  # of the chosen, left out
        total = self._pool.total(fit) - ridge**2 * of_chosen @ sizes + distances.sum()

        own, of_residuals = fit.left - ridge, fit.residuals.square().sum(1)
        aligned, gram = fit.residuals @ alpha.T, alpha @ alpha.T
        slopes, squares = self._pool.joining(fit)
        slopes = slopes + ridge**2 * (weights * aligned) @ of_chosen + self._weights * own * of_residuals
        joining = slopes, squares - ridge**2 * weights.square() @ of_chosen - self._weights * own.square()
        # Row i: what its joining does to the coefficients of the chosen, times r_i; below what its leaving does.
        moves = weights / fit.left[:, None]
        changed = sizes - 2 * moves * aligned + moves.square() * of_residuals[:, None]
        with_it = changed / (curvature + weights * moves).square() @ of_chosen

        kept = torch.eye(len(alpha), dtype=alpha.dtype, device=alpha.device) - ridge * inverse  # K_SS A^-1
        slopes, squares = self._pool.leaving(fit)
        leaving = slopes + ridge * (kept * gram) @ of_chosen, squares - kept.square() @ of_chosen
        moves = inverse / curvature[:, None]
        changed = sizes - 2 * moves * gram + moves.square() * sizes[:, None]
        remaining = (curvature - inverse * moves).fill_diagonal_(1.0)
        without_it = (changed / remaining.square()).fill_diagonal_(0.0) @ of_chosen

        of_others = (with_it - distances.sum()).index_copy(0, fit.chosen, distances.sum() - distances - without_it)
        return total, fit.differences(joining, leaving) + of_others


@dataclass(frozen=True)
class _Fit:
    """The regression on k chosen samples."""

    chosen: Tensor  # (k,)
    inverse: Tensor  # A^-1, (k, k)
    coefficients: Tensor  # alpha, (k, c)
    weights: Tensor  # B = K_{.S} A^-1, (n, k)
    left: Tensor  # what is left of the kernel's diagonal, plus the ridge, (n,)
    residuals: Tensor  # r = y - f, (n, c)

    def differences(self, joining: tuple[Tensor, Tensor], leaving: tuple[Tensor, Tensor]) -> Tensor:
        """Put the sums of a judge together: the total with sample i less that without it, ``(n,)``."""
        slopes, squares = joining
        differences = 2 * slopes / self.left + squares * self.residuals.square().sum(1) / self.left.square()
        slopes, squares = leaving
        curvature = self.inverse.diagonal()
        of_chosen = 2 * slopes / curvature - squares * self.coefficients.square().sum(1) / curvature.square()
        return differences.index_copy(0, self.chosen, of_chosen)


class _Judge:
    """Sums over the samples that a fit is judged on, computed from products over them once."""

    def __init__(self, kernel: Tensor, targets: Tensor) -> None:
        self.num = len(kernel)
        self._products = kernel.T @ kernel  # (n, n)
        self._pulls = kernel.T @ targets  # (n, c)
        self._sum_of_squares = targets.square().sum()

    def total(self, fit: _Fit) -> Tensor:
        """Sum the squared distances."""
        fits = self._products[fit.chosen][:, fit.chosen] @ fit.coefficients
        return (fit.coefficients * (fits - 2 * self._pulls[fit.chosen])).sum() + self._sum_of_squares

    def joining(self, fit: _Fit) -> tuple[Tensor, Tensor]:
        r"""Sum :math:`\tilde K_{oi} e_o \cdot r_i` and :math:`\tilde K_{oi}^2` over the judge's samples o, for each sample i."""
        products, weights = self._products[:, fit.chosen], fit.weights
        pulls = self._pulled(fit)
        slopes = ((pulls - weights @ pulls[fit.chosen]) * fit.residuals).sum(1)
        squares = self._products.diagonal() + (weights * (weights @ products[fit.chosen] - 2 * products)).sum(1)
        return slopes, squares

    def leaving(self, fit: _Fit) -> tuple[Tensor, Tensor]:
        r"""Sum :math:`b_{oi} e_o \cdot \alpha_i` and :math:`b_{oi}^2` over the judge's samples o, for each chosen i."""
        own_products = self._products[fit.chosen][:, fit.chosen]
        slopes = (fit.inverse @ self._pulled(fit)[fit.chosen] * fit.coefficients).sum(1)
        return slopes, (fit.inverse @ own_products * fit.inverse).sum(1)

    def _pulled(self, fit: _Fit) -> Tensor:
        """Compute :math:`K_{i o} e_o` for each sample i."""
        return self._products[:, fit.chosen] @ fit.coefficients - self._pulls
