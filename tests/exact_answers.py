"""Bilevel problems with closed forms: what the methods approximate, computed exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RidgeBilevel:
    """Weighted ridge regression: min over alpha of f(u*(alpha)), u*(alpha) = argmin_u g(alpha, u).

    g(alpha, u) = 1/N sum_n alpha_n l_n(u) + ridge/2 |u|^2 with l_n(u) = 1/2 (x_n'u - y_n)^2, and
    f(w) = 1/M sum_m 1/2 (a_m'w - b_m)^2 on the target set.

    Attributes:
        x: Training inputs, (N, d).
        y: Training outputs, (N,).
        a: Target inputs, (M, d).
        b: Target outputs, (M,).
        ridge: Positive.
    """

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    ridge: float

    @classmethod
    def random(cls, num_train: int, num_target: int, dim: int, ridge: float, seed: int) -> "RidgeBilevel":
        """Draw an instance in float64: one truth for both sets, and noise on the training outputs alone."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        truth, x, a = normal(dim), normal(num_train, dim), normal(num_target, dim)
        return cls(x, x @ truth + normal(num_train), a, a @ truth, ridge)

    def sample_losses(self, u: Tensor) -> Tensor:
        return 0.5 * (self.x @ u - self.y).square()

    def lower_loss(self, alpha: Tensor, u: Tensor) -> Tensor:
        return (alpha * self.sample_losses(u)).mean() + 0.5 * self.ridge * u.square().sum()

    def upper_loss(self, w: Tensor) -> Tensor:
        return 0.5 * (self.a @ w - self.b).square().mean()

    def lower_hessian(self, alpha: Tensor) -> Tensor:
        return self.x.T @ (alpha[:, None] * self.x) / len(self.x) + self.ridge * torch.eye(self.x.shape[1]).to(self.x)

    def lower_solution(self, alpha: Tensor) -> Tensor:
        """Return u*(alpha) = argmin g(alpha, .)."""
        return torch.linalg.solve(self.lower_hessian(alpha), self.x.T @ (alpha * self.y) / len(self.x))

    def reference_solution(self, alpha: Tensor, penalty: float) -> Tensor:
        """Return w*(alpha, lambda) = argmin f + lambda g(alpha, .)."""
        hessian = self.a.T @ self.a / len(self.a) + penalty * self.lower_hessian(alpha)
        linear = self.a.T @ self.b / len(self.a) + penalty * self.x.T @ (alpha * self.y) / len(self.x)
        return torch.linalg.solve(hessian, linear)

    def hypergradient(self, alpha: Tensor) -> Tensor:
        """Return d f(u*(alpha)) / d alpha, by the implicit function theorem."""
        u = self.lower_solution(alpha)
        upper_gradient = self.a.T @ (self.a @ u - self.b) / len(self.a)
        auxiliary = torch.linalg.solve(self.lower_hessian(alpha), upper_gradient)
        return -(self.x @ auxiliary) * (self.x @ u - self.y) / len(self.x)
