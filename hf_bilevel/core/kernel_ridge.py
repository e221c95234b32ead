r"""A lower problem with a closed form: kernel ridge regression on the samples that a mask keeps.

Its upper loss is known for a mask and, for hardly more, for every mask that differs from it in one sample. These differences
are the exact gradient of the expected loss in all probabilities, of which the policy gradient sees one number a mask:
:math:`\partial E[L] / \partial s_i = E[L(m_i = 1) - L(m_i = 0)]`.

References:
    Borsos, Mutny, Krause, Coresets via Bilevel Optimization for Continual Learning and Streaming, NeurIPS 2020 (the proxy).
    Titsias, Lazaro-Gredilla, Local Expectation Gradients for Black Box Variational Inference, NeurIPS 2015 (the estimator).
"""

import torch
from torch import Tensor


class KernelRidge:
    r"""Fit the samples S of a mask and measure the fit: :math:`f(x) = K_{xS} A^{-1} Y_S` with :math:`A = K_{SS} + \lambda I`.

    The upper loss is :math:`L = \frac{1}{u} \sum_o |f(x_o) - t_o|^2`. With :math:`r_i = y_i - f(x_i)`, the kernel that is left
    :math:`\tilde K = K - K_{\cdot S} A^{-1} K_{S \cdot}` and :math:`e = f - t` on the upper samples, a sample :math:`i \notin S`
    that joins moves f by :math:`\tilde k_i r_i^T / (\tilde K_{ii} + \lambda)`, and one that leaves by
    :math:`-b_i \alpha_i^T / A^{-1}_{ii}`, where :math:`\alpha = A^{-1} Y_S` and b is its column of :math:`K_{oS} A^{-1}`.

    Args:
        kernel: Of the samples with themselves, ``(n, n)``, symmetric and positive semi-definite; float64 is advised.
        targets: Y, ``(n, c)``.
        upper_kernel: Of the upper samples with the samples, ``(u, n)``.
        upper_targets: t, ``(u, c)``.
        ridge: :math:`\lambda`, positive.

    Raises:
        ValueError: If shapes do not fit, or the ridge is not positive.

    Cost: :math:`O(u n^2)` once, after which nothing depends on the number u of upper samples; two matrices of n × n.

    Example:
        >>> kernel, targets = torch.eye(3).double(), torch.tensor([[1.0], [2.0], [4.0]]).double()
        >>> KernelRidge(kernel, targets, kernel, targets, ridge=1.0).loss_and_differences(torch.tensor([True, True, False]))
        (tensor(5.7500, dtype=torch.float64), tensor([-0.2500, -1.0000, -4.0000], dtype=torch.float64))
    """

    def __init__(
        self, kernel: Tensor, targets: Tensor, upper_kernel: Tensor, upper_targets: Tensor, ridge: float
    ) -> None:
        n, u = len(kernel), len(upper_kernel)
        if kernel.shape != (n, n) or upper_kernel.shape != (u, n) or len(targets) != n or len(upper_targets) != u:
            raise ValueError(
                "Kernels of shape (n, n) and (u, n) need targets of n and u rows; got kernels of shape "
                f"{tuple(kernel.shape)} and {tuple(upper_kernel.shape)} and {len(targets)} and {len(upper_targets)} targets."
            )
        if not ridge > 0:
            raise ValueError(f"`ridge` must be positive, got {ridge}.")
        self.ridge = ridge
        self._kernel, self._targets = kernel, targets
        self._products = upper_kernel.T @ upper_kernel  # sums over the upper samples, (n, n) and (n, c)
        self._pulls = upper_kernel.T @ upper_targets
        self._sum_of_squares = upper_targets.square().sum()
        self._num_upper = u

    def loss_and_differences(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Measure what a mask's samples fit, and what each sample of the pool changes.

        Args:
            mask: Samples to fit, ``(n,)``, bool; it may be empty or full.

        Returns:
            The upper loss, a scalar; and ``(n,)``: the loss with sample i less that without it, the others as in the mask.

        Cost: :math:`O(n k^2 + n k c)` for a mask of k samples.
        """
        chosen = mask.nonzero().flatten()
        columns, products = self._kernel[:, chosen], self._products[:, chosen]
        own_products = products[chosen]
        eye = torch.eye(len(chosen), dtype=columns.dtype, device=columns.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(columns[chosen] + self.ridge * eye))
        coefficients = inverse @ self._targets[chosen]
        fits = own_products @ coefficients
        loss = (coefficients * (fits - 2 * self._pulls[chosen])).sum() + self._sum_of_squares

        pulls = products @ coefficients - self._pulls  # K_{i o} e_o
        weights = columns @ inverse
        left = self._kernel.diagonal() - (weights * columns).sum(1) + self.ridge
        residuals = self._targets - columns @ coefficients
        squares = self._products.diagonal() + (weights * (weights @ own_products - 2 * products)).sum(1)
        slopes = ((pulls - weights @ pulls[chosen]) * residuals).sum(1)
        differences = 2 * slopes / left + squares * residuals.square().sum(1) / left.square()

        curvature = inverse.diagonal()
        squares = (inverse @ own_products * inverse).sum(1)
        slopes = (inverse @ pulls[chosen] * coefficients).sum(1)
        differences[chosen] = 2 * slopes / curvature - squares * coefficients.square().sum(1) / curvature.square()
        return loss / self._num_upper, differences / self._num_upper
