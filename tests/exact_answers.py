"""Bilevel problems with closed forms: what the methods approximate, computed exactly."""

import itertools
import math
from collections.abc import Callable
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


@dataclass(frozen=True)
class CoupledHessian:
    """A symmetric positive definite operator on several blocks of one variable, with cross-Hessians between them.

    Attributes:
        shapes: Of the blocks.
        matrix: The operator on all blocks, flattened and joined, (d, d).
    """

    shapes: list[tuple[int, ...]]
    matrix: Tensor

    @classmethod
    def random(cls, shapes: list[tuple[int, ...]], spectrum: Tensor | None = None, seed: int = 0) -> "CoupledHessian":
        """Draw the eigenvectors in float64; the eigenvalues are from 1 to 5 unless they are given."""
        size = sum(math.prod(shape) for shape in shapes)
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        values = torch.linspace(1, 5, size, dtype=torch.float64) if spectrum is None else spectrum
        matrix = (vectors * values) @ vectors.T
        return cls(shapes, (matrix + matrix.T) / 2)

    def join(self, blocks: list[Tensor]) -> Tensor:
        return torch.cat([block.flatten() for block in blocks])

    def split(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([math.prod(shape) for shape in self.shapes])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def __call__(self, blocks: list[Tensor]) -> list[Tensor]:
        return self.split(self.matrix @ self.join(blocks))

    def solve(self, blocks: list[Tensor], damping: float = 0.0) -> list[Tensor]:
        damped = self.matrix + damping * torch.eye(len(self.matrix)).to(self.matrix)
        return self.split(torch.linalg.solve(damped, self.join(blocks)))

    def random_blocks(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]

    def restricted(self, bases: list[Tensor | None]) -> Callable[[list[Tensor]], list[Tensor]]:
        """Return the restricted Hessian action."""

        def action(directions: list[Tensor]) -> list[Tensor]:
            pairs = zip(self(directions), bases, strict=True)
            return [block if basis is None else block @ basis for block, basis in pairs]

        return action


def exact_bases(dim: int, rank: int) -> list[Tensor]:
    """Scaled bases of a few subspaces over which everything quadratic in Q = P P' has its mean over all subspaces.

    They come from the lines through the corners of a triangle, an icosahedron and a 24-cell: the lines, their complements
    and, in four dimensions, the planes through two lines at a right angle.
    """
    half, golden = 3**0.5 / 2, (1 + 5**0.5) / 2
    lines = {
        2: [(1, 0), (0.5, half), (0.5, -half)],
        3: [corner for s in (1, -1) for corner in [(0, s, golden), (s, golden, 0), (golden, 0, s)]],
        4: [*torch.eye(4).tolist(), *itertools.product((1,), (1, -1), (1, -1), (1, -1))],
    }[dim]
    units = torch.nn.functional.normalize(torch.tensor(lines, dtype=torch.float64))
    if rank == 1:
        frames = [unit[:, None] for unit in units]
    elif rank == dim - 1:
        frames = [torch.linalg.qr(unit[:, None], mode="complete").Q[:, 1:] for unit in units]
    else:
        frames = [torch.stack([a, b], dim=1) for a, b in itertools.combinations(units, 2) if a @ b == 0]
    return [frame * math.sqrt(dim / rank) for frame in frames]


def mean_projected_twice(matrix: Tensor, rank: int) -> Tensor:
    """Return E[Q A Q] for the scaled projection Q onto a random subspace, from the second moments of a projection."""
    dim = len(matrix)
    delta = dim * (dim - rank) / (rank * (dim - 1) * (dim + 2))
    return matrix + delta * (matrix.T + matrix.trace() * torch.eye(dim).to(matrix) - 2 / dim * matrix)


def restricted_on_both_sides(
    action: Callable[[list[Tensor]], list[Tensor]], auxiliary: list[Tensor], bases: list[Tensor | None]
) -> list[Tensor]:
    """Estimate a Hessian action naively, with a bias: the control for the estimators of the package."""
    pairs = zip(auxiliary, bases, strict=True)
    return action([block if basis is None else block @ basis @ basis.T for block, basis in pairs])
