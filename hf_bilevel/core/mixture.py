r"""Domain weights w on the simplex: :math:`\min_w L_V(\theta(w))` where :math:`\theta` takes T steps on :math:`\sum_j w_j L_j`.

Between two updates of w the parameters take T inner steps. Their hypergradient looks T steps ahead, and near equilibrium is

.. math:: g_j(T) = -\langle \nabla L_V, [I - (I - \eta H)^T] H^{-1} \nabla L_j \rangle :

T = 1 replaces the inverse Hessian by :math:`\eta I`, which can rank the domains wrongly; more steps leave fewer updates of w in
the same budget.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_bilevel.core.projections import kl_projection_simplex, projection_simplex


def optimal_inner_steps(num_steps: int, condition_number: float | None = None) -> int:
    r"""Choose T, the inner steps between two updates of the weights, for a budget of N steps in total.

    :math:`\sqrt{N \log N}` with stochastic gradients; :math:`\kappa \log N` with full ones, where a longer look ahead is all that
    more steps buy. Both are the orders of the theory with the constant 1.

    Args:
        num_steps: N, positive.
        condition_number: :math:`\kappa` of the lower problem, at least 1, for full gradients; None for stochastic ones.

    Returns:
        T, at least 1 and at most N.

    References:
        Das, Patel, Razaviyayn, Mirrokni, arXiv 2602.19510.

    Example:
        >>> optimal_inner_steps(400), optimal_inner_steps(100_000), optimal_inner_steps(100_000, condition_number=10)
        (49, 1073, 115)
    """
    log = math.log(max(num_steps, 2))
    best = math.sqrt(num_steps * log) if condition_number is None else condition_number * log
    return min(max(round(best), 1), num_steps)


def mirror_step(weights: Tensor, hypergradient: Tensor, learning_rate: Tensor | float, floor: float = 0.0) -> Tensor:
    r"""Take a step of exponentiated gradient, :math:`w_j \propto w_j \exp(-\alpha g_j)`, not below a floor.

    A weight that is 0 stays 0 without a floor.

    Args:
        weights: w, ``(M,)``, on the simplex.
        hypergradient: g, ``(M,)``.
        learning_rate: :math:`\alpha`.
        floor: Smallest weight, in [0, 1 / M].

    Returns:
        The next weights, ``(M,)``.

    Example:
        >>> mirror_step(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]), learning_rate=math.log(3))
        tensor([0.7500, 0.2500])
    """
    logits = weights.log() - learning_rate * hypergradient
    return kl_projection_simplex((logits - logits.max()).exp(), floor)


def projected_step(
    weights: Tensor, hypergradient: Tensor, learning_rate: Tensor | float, floor: float = 0.0
) -> Tensor:
    r"""Take a gradient step and project it back onto the simplex.

    Args:
        weights: w, ``(M,)``, on the simplex.
        hypergradient: g, ``(M,)``.
        learning_rate: :math:`\alpha`.
        floor: Smallest weight, in [0, 1 / M].

    Returns:
        The next weights, ``(M,)``.

    Example:
        >>> projected_step(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]), learning_rate=0.2)
        tensor([0.6000, 0.4000])
    """
    return projection_simplex(weights - learning_rate * hypergradient, floor)


def weight_learning_rate(num_domains: int, num_updates: int, rule: str) -> float:
    r"""Choose :math:`\alpha` for R updates whose hypergradients have the norm 1, as the theory of mirror descent does.

    :math:`\sqrt{2 \log M / R}` for mirror steps (norm: the largest entry), :math:`\sqrt{2 / R}` for projected ones (Euclidean).

    Args:
        num_domains: M, at least 2.
        num_updates: R.
        rule: ``"mirror"`` or ``"projected"``.

    Returns:
        The learning rate.

    Example:
        >>> round(weight_learning_rate(6, 8, "mirror"), 3)
        0.669
    """
    size = math.log(num_domains) if rule == "mirror" else 1.0
    return math.sqrt(2 * size / max(1, num_updates))


class DomainWeights:
    r"""Domain weights, their steps and their average.

    A step is :math:`w \leftarrow (1 - c)\,\mathrm{step}(w, g, \alpha / s) + c / M` with smoothing c. Only differences between
    domains matter, so g is centred first; s is the root mean square of its norm over the updates so far, which frees
    :math:`\alpha` of the scale of the losses: see ``weight_learning_rate``.

    The average gives update t the weight t, so that first guesses fade. It is less noisy than the last weights.

    Args:
        weights: Initial weights, ``(M,)``, on the simplex.
        rule: ``"mirror"`` or ``"projected"``.
        smoothing: c, in [0, 1].
        floor: Smallest weight before smoothing, in [0, 1 / M].

    Attributes:
        weights: w, ``(M,)``.
        average: Their average over the updates, ``(M,)``; the initial weights before the first.
        num_updates: Updates so far.

    Example:
        >>> domains = DomainWeights(torch.tensor([0.5, 0.5]), "mirror")
        >>> domains.step(torch.tensor([30.0, 10.0]), learning_rate=math.log(2))
        >>> domains.weights
        tensor([0.2000, 0.8000])
    """

    def __init__(self, weights: Tensor, rule: str, smoothing: float = 0.0, floor: float = 0.0) -> None:
        self.weights = weights.clone()
        self.average = weights.clone()
        self.num_updates = 0
        self.rule = rule
        self.smoothing = smoothing
        self.floor = floor
        self._square = torch.zeros((), dtype=weights.dtype)

    def step(self, hypergradient: Tensor, learning_rate: float) -> None:
        """Take one step; a hypergradient with a NaN or an infinity in it, or without differences, changes nothing.

        Args:
            hypergradient: g, ``(M,)``, on the CPU.
            learning_rate: Positive.
        """
        centred = (hypergradient - hypergradient.mean()).to(self.weights)
        norm = centred.abs().max() if self.rule == "mirror" else centred.norm()
        if not norm.isfinite() or norm == 0:
            return
        self.num_updates += 1
        self._square.lerp_(norm.square(), 1 / self.num_updates)
        take = mirror_step if self.rule == "mirror" else projected_step
        stepped = take(self.weights, centred, learning_rate / self._square.sqrt(), self.floor)
        self.weights = stepped.lerp(torch.full_like(stepped, 1 / len(stepped)), self.smoothing)
        self.average = self.average.lerp(self.weights, 2 / (self.num_updates + 1))

    def state_dict(self) -> dict[str, Any]:
        """Return weights, average and scale."""
        tensors = {"weights": self.weights.clone(), "average": self.average.clone(), "square": self._square.clone()}
        return {**tensors, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.weights, self.average = state["weights"].clone(), state["average"].clone()
        self._square, self.num_updates = state["square"].clone(), state["num_updates"]


def domain_means(losses: Tensor, counts: Tensor, domain_ids: Tensor, num_domains: int) -> tuple[Tensor, Tensor]:
    """Sum losses and units by domain; their quotient is the mean loss per unit of every domain.

    Args:
        losses: Mean loss of each sample's units, ``(n,)``.
        counts: Units of each sample, ``(n,)``.
        domain_ids: ``(n,)``, int64.
        num_domains: M.

    Returns:
        Sums of losses and of units, each ``(M,)`` and float32 or wider: they can be added up over batches and processes.

    Example:
        >>> sums, units = domain_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1, 1, 2]), torch.tensor([0, 0, 2]), 3)
        >>> sums / units.clamp(min=1)
        tensor([2., 0., 5.])
    """
    wide = torch.promote_types(losses.dtype, torch.float32)
    zeros = torch.zeros(num_domains, dtype=wide, device=losses.device)
    units = counts.to(wide)
    # A sample without units has no loss, which may be reported as NaN.
    totals = torch.where(counts > 0, losses.to(wide) * units, 0.0)
    return zeros.index_add(0, domain_ids, totals), zeros.index_add(0, domain_ids, units)


def adjoint_step(
    loss: Tensor, parameters: Sequence[Tensor], weights: Tensor, adjoint: Sequence[Tensor], rates: Sequence[float]
) -> tuple[list[Tensor], Tensor]:
    r"""Go back through one inner step :math:`\theta' = \theta - \eta \nabla_\theta L(\theta, w)`.

    With the adjoint :math:`\lambda' = dL_V/d\theta'` it is :math:`\lambda = \lambda' - \eta \nabla^2_\theta L\,\lambda'`, and the step's
    part of the hypergradient is :math:`-\eta \nabla_w \langle \nabla_\theta L, \lambda' \rangle`. Both come from one double backward.

    Args:
        loss: L at the parameters before the step, a scalar with a graph.
        parameters: :math:`\theta` before the step, leaves of that graph.
        weights: w, ``(M,)``, a leaf of it.
        adjoint: :math:`\lambda'`, one tensor for each parameter.
        rates: :math:`\eta` of each parameter.

    Returns:
        :math:`\lambda` and the part of the hypergradient, ``(M,)``.

    Example:
        >>> theta, w = torch.tensor([1.0], requires_grad=True), torch.tensor([0.5, 0.5], requires_grad=True)
        >>> loss = w[0] * 0.5 * theta.square().sum() + w[1] * 0.5 * (theta - 3).square().sum()
        >>> adjoint, part = adjoint_step(loss, [theta], w, [torch.tensor([1.0])], [0.1])
        >>> adjoint[0], part
        (tensor([0.9000]), tensor([-0.1000,  0.2000]))
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    along = sum(
        (rate * (g * a).sum() for g, a, rate in zip(gradients, adjoint, rates, strict=True)), loss.new_zeros(())
    )
    if not along.requires_grad:  # a loss without curvature and without weights
        return list(adjoint), torch.zeros_like(weights)
    *curved, part = torch.autograd.grad(along, [*parameters, weights], allow_unused=True, materialize_grads=True)
    return [a - c for a, c in zip(adjoint, curved, strict=True)], -part


def unrolled_hypergradient(
    losses: Sequence[Callable[[list[Tensor], Tensor], Tensor]],
    target_loss: Callable[[list[Tensor]], Tensor],
    parameters: Sequence[Tensor],
    weights: Tensor,
    learning_rate: float,
) -> tuple[list[Tensor], Tensor]:
    r"""Take T gradient steps and differentiate the target loss at their end with respect to the weights.

    Args:
        losses: The T lower losses, (parameters, weights) -> scalar, twice differentiable.
        target_loss: Upper loss, parameters -> scalar.
        parameters: :math:`\theta_0`; not changed.
        weights: w, ``(M,)``.
        learning_rate: :math:`\eta`.

    Returns:
        :math:`\theta_T`, detached, and the hypergradient, ``(M,)``.

    Cost: T + 1 gradients and T double backwards; memory T copies of the parameters and one graph.

    Example:
        >>> def loss(parameters, weights):
        ...     return 0.5 * (weights * (parameters[0] - torch.tensor([0.0, 3.0])).square()).sum()
        >>> theta, hypergradient = unrolled_hypergradient(
        ...     [loss] * 200, lambda p: 0.5 * (p[0] - 3).square().sum(), [torch.zeros(1)], torch.tensor([0.5, 0.5]), 0.1)
        >>> theta[0], hypergradient  # the second domain pulls towards the target
        (tensor([1.5000]), tensor([ 2.2500, -2.2500]))
    """
    trajectory = [[p.detach() for p in parameters]]
    w = weights.detach().requires_grad_(True)
    for loss in losses:
        theta = [p.requires_grad_(True) for p in trajectory[-1]]
        gradients = torch.autograd.grad(loss(theta, w), theta, allow_unused=True, materialize_grads=True)
        trajectory.append([(p - learning_rate * g).detach() for p, g in zip(theta, gradients, strict=True)])
    theta = [p.requires_grad_(True) for p in trajectory.pop()]
    adjoint = list(torch.autograd.grad(target_loss(theta), theta, allow_unused=True, materialize_grads=True))
    hypergradient = torch.zeros_like(weights)
    rates = [learning_rate] * len(theta)
    for loss, start in zip(reversed(losses), reversed(trajectory), strict=True):
        adjoint, part = adjoint_step(loss(start, w), start, w, adjoint, rates)
        hypergradient = hypergradient + part
    return [p.detach() for p in theta], hypergradient


def apportion(credit: Tensor, num: int) -> Tensor:
    """Split whole draws over domains as their credits say, the largest remainders first.

    Args:
        credit: How many draws each domain is owed, ``(M,)``; may be a fraction, and slightly negative; sums to ``num``.
        num: Draws to split.

    Returns:
        Draws of each domain, ``(M,)``, int64, summing to ``num``, each less than 1 from its credit where that is possible.

    Example:
        >>> apportion(torch.tensor([2.6, 0.9, 0.5]), 4)
        tensor([3, 1, 0])
    """
    whole = credit.floor().clamp(min=0).to(torch.int64)
    missing = num - int(whole.sum())
    order = (credit - whole).sort(descending=True, stable=True).indices
    whole[order[: max(missing, 0)]] += 1
    for _ in range(-missing):  # credits below zero were raised to it
        whole[(credit - whole).masked_fill(whole == 0, torch.inf).argmin()] -= 1
    return whole
