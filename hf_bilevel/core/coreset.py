r"""Probabilistic bilevel coreset selection: :math:`\min_s E_{m \sim s}[L(\theta^*(m))]` over :math:`0 \le s \le 1, \sum_i s_i \le K`.

Every sample of a pool is kept with its own probability; :math:`\theta^*(m)` is trained on the samples that the mask m keeps. The
gradient needs only the upper losses of a few masks, and nothing of how :math:`\theta^*` was found.

References:
    Zhou, Pi, Zhang, Lin, Zhang, Probabilistic Bilevel Coreset Selection, ICML 2022.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_bilevel.core.projections import projection_capped_simplex


def cubic_size(step: int, initial_size: float, size: float, start: int, end: int) -> float:
    r"""Anneal the size, :math:`K + (K_0 - K) (1 - (t - a) / (b - a))^3` between the steps a and b.

    Published runs anneal from 16 % to 60 % of the steps.

    Args:
        step: t, from 0.
        initial_size: :math:`K_0`, the size up to step a, such as that of the pool.
        size: K, the size from step b on.
        start: a.
        end: b, at least a; if they are equal, the size jumps there.

    Returns:
        The size at that step, which may be a fraction.

    Example:
        >>> [cubic_size(t, initial_size=1000, size=200, start=2, end=6) for t in (0, 2, 3, 4, 5, 6, 9)]
        [1000, 1000, 537.5, 300.0, 212.5, 200, 200]
    """
    if step >= end:
        return size
    if step <= start:
        return initial_size
    return size + (initial_size - size) * ((end - step) / (end - start)) ** 3


def cosine_decay(step: int, num_steps: int) -> float:
    r"""Decay from 1 towards 0, :math:`(1 + \cos(\pi t / T)) / 2`.

    Args:
        step: t, from 0 to T.
        num_steps: T, positive.

    Returns:
        The factor of the learning rate at that step.

    Example:
        >>> [round(cosine_decay(t, num_steps=4), 3) for t in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    return (1 + math.cos(math.pi * step / num_steps)) / 2


def search_schedule(
    step: int, num_steps: int, learning_rate: float, initial_size: float, size: float
) -> tuple[float, float]:
    """Say with which learning rate and down to which size the probabilities take a step.

    The learning rate falls by ``cosine_decay``, the size by ``cubic_size`` between 16 % and 60 % of the steps, as published.

    Args:
        step: From 0.
        num_steps: Of the search, positive.
        learning_rate: At the first step.
        initial_size: Expected size at the start.
        size: Of the coreset.

    Returns:
        Learning rate and size.

    Example:
        >>> search_schedule(0, 100, 0.1, initial_size=500, size=100), search_schedule(59, 100, 0.1, 500, 100)[1]
        ((0.1, 500), 100)
    """
    annealed = cubic_size(step + 1, initial_size, size, round(0.16 * num_steps), round(0.6 * num_steps))
    return learning_rate * cosine_decay(step, num_steps), annealed


def first_probabilities(num_samples: int, size: float) -> Tensor:
    """Give all samples the same probability, with an expected size of K, but at most 1/2: what starts at 1 has no gradient.

    Args:
        num_samples: n.
        size: K.

    Returns:
        s, ``(n,)``, float32.

    Example:
        >>> first_probabilities(4, 1), first_probabilities(2, 2)
        (tensor([0.2500, 0.2500, 0.2500, 0.2500]), tensor([0.5000, 0.5000]))
    """
    return torch.full((num_samples,), min(size / num_samples, 0.5))


def uniform_masks(num_samples: int, size: int, num: int, generator: torch.Generator) -> Tensor:
    """Draw masks that keep K samples each, every subset of this size as likely as any other.

    Args:
        num_samples: n.
        size: K, at most n.
        num: C.
        generator: On the CPU.

    Returns:
        The masks, ``(C, n)``, bool.

    Example:
        >>> uniform_masks(5, 2, 3, torch.Generator().manual_seed(0)).sum(1)
        tensor([2, 2, 2])
    """
    chosen = torch.stack([torch.randperm(num_samples, generator=generator)[:size] for _ in range(num)])
    return torch.zeros(num, num_samples, dtype=torch.bool).scatter_(1, chosen, True)


def sample_masks(probabilities: Tensor, num: int, generator: torch.Generator) -> Tensor:
    r"""Draw masks, :math:`m_{ci} \sim \mathrm{Bernoulli}(s_i)`, all independent.

    A probability of 0 or 1 decides; a mask may be empty. The first masks do not depend on how many are drawn.

    Args:
        probabilities: s, ``(n,)``, in [0, 1].
        num: C.
        generator: On the device of the probabilities.

    Returns:
        The masks, ``(C, n)``, bool.

    Example:
        >>> sample_masks(torch.tensor([0.0, 1.0, 0.5]), 3, torch.Generator().manual_seed(0))[:, :2]
        tensor([[False,  True],
                [False,  True],
                [False,  True]])
    """
    # In float32 no draw lies between 0 and 6e-8, so smaller probabilities would be exceeded.
    uniform = partial(torch.rand, generator=generator, dtype=torch.float64, device=probabilities.device)
    return torch.stack([uniform(len(probabilities)) < probabilities for _ in range(num)])


def policy_gradient(masks: Tensor, losses: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    r"""Estimate the gradient of the expected loss, each mask against the mean loss of the others.

    .. math:: \frac{1}{C} \sum_c \Big(L_c - \frac{1}{C - 1} \sum_{j \ne c} L_j\Big) \nabla_s \ln p(m_c | s)
        = \frac{1}{C - 1} \sum_c (L_c - \bar L)\, \frac{m_c - s}{s (1 - s)}

    with :math:`\nabla_s \ln p = m / s - (1 - m) / (1 - s)`. It is unbiased for probabilities between 0 and 1. One that is 0
    or 1 gives all masks the same entry, which says nothing about it: its gradient is 0.

    A mask whose loss is not finite is dropped, and the others form the estimate: if at least two are left, it is unbiased for
    the gradient of the expected loss of the masks that have a finite one. If fewer are left, it is 0.

    Args:
        masks: ``(C, n)``, bool, C at least 2.
        losses: ``(C,)``; NaN for a lower training that went wrong.
        probabilities: s that the masks were drawn from, ``(n,)``.

    Returns:
        The gradient, ``(n,)``, and the number of masks dropped, a scalar.

    Raises:
        ValueError: If there is only one mask, or not one loss for each.

    Cost: O(C n); no host sync.

    Example:
        >>> masks = torch.tensor([[True, False, True], [False, True, True], [False, False, True]])
        >>> policy_gradient(masks, torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([0.5, 0.5, 1.0]))
        (tensor([-4.,  4.,  0.]), tensor(1))
    """
    if len(masks) < 2 or losses.shape != masks.shape[:1]:
        raise ValueError(
            "The baseline of a mask is the mean loss of the others, so it takes at least two masks and one loss for each; "
            f"got {len(masks)} masks and losses of shape {tuple(losses.shape)}."
        )
    kept = losses.isfinite()
    num_kept = kept.sum()
    finite = torch.where(kept, losses, 0.0).double()
    centred = torch.where(kept, finite - finite.sum() / num_kept.clamp(min=1), 0.0) / (num_kept - 1).clamp(min=1)
    # The centred losses sum to 0, so that sum_c (m_c - s) and -sum_c ((1 - m_c) - s) are equal; whichever has the fewer
    # ones leaves no rounding error to be divided by a small variance.
    likely = probabilities > 0.5
    weights = centred.to(probabilities)
    total = weights @ (masks ^ likely).to(weights.dtype)
    variance = probabilities * (1 - probabilities)
    gradient = torch.where(variance > 0, torch.where(likely, -total, total) / variance, 0.0)
    return gradient, len(masks) - num_kept


def straight_through_masks(probabilities: Tensor, num: int, temperature: float, generator: torch.Generator) -> Tensor:
    r"""Draw masks that a loss can be differentiated through: Bernoulli samples with the gradient of their relaxation.

    .. math:: m_{ci} = \mathbb{1}[u_{ci} < s_i], \qquad \frac{\partial m_{ci}}{\partial s_i} :=
        \frac{\partial}{\partial s_i}\, \mathrm{sigmoid}\Big(\frac{\mathrm{logit}\, s_i - \mathrm{logit}\, u_{ci}}{\tau}\Big)

    The masks are exact; the gradient of the mean loss is biased, with less variance than ``policy_gradient``, and takes a loss
    that is differentiable in the masks, which weigh the samples.

    Args:
        probabilities: s, ``(n,)``, floating. One that is 0 or 1 has no gradient.
        num: C.
        temperature: :math:`\tau`, positive: the lower, the smaller the bias and the larger the variance.
        generator: On the device of the probabilities.

    Returns:
        The masks, ``(C, n)``, 0 or 1, of the dtype of the probabilities, with a gradient if those have one.

    Example:
        >>> s = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
        >>> masks = straight_through_masks(s, 4, temperature=0.5, generator=torch.Generator().manual_seed(0))
        >>> masks[:, [0, 2]].tolist()
        [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
        >>> masks.mean(0).sum().backward()
        >>> s.grad > 0
        tensor([False,  True, False])
    """
    uniform = torch.rand(
        num, len(probabilities), generator=generator, dtype=torch.float64, device=probabilities.device
    )
    between = (probabilities > 0) & (probabilities < 1)
    inside = torch.where(between, probabilities, 0.5).double()
    relaxed = torch.sigmoid((inside.logit() - uniform.logit()) / temperature)
    relaxed = torch.where(between, relaxed, 0.0).to(probabilities.dtype)
    return (uniform < probabilities).to(probabilities.dtype) + (relaxed - relaxed.detach())


def coreset_step(probabilities: Tensor, gradient: Tensor, learning_rate: float, size: float) -> Tensor:
    r"""Take a gradient step and project it back, :math:`P(s - \alpha g)` onto :math:`\{0 \le s \le 1, \sum_i s_i \le K\}`.

    Args:
        probabilities: s, ``(n,)``.
        gradient: g, ``(n,)``.
        learning_rate: :math:`\alpha`.
        size: K, not negative.

    Returns:
        The next probabilities, ``(n,)``.

    Cost: that of ``projection_capped_simplex``.

    Example:
        >>> coreset_step(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([-2.0, 0.0, 2.0]), learning_rate=0.25, size=1.5)
        tensor([1.0000, 0.5000, 0.0000])
        >>> coreset_step(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([-2.0, 0.0, 2.0]), learning_rate=0.25, size=1)
        tensor([0.7500, 0.2500, 0.0000])
    """
    return projection_capped_simplex(probabilities - learning_rate * gradient, size)


class CoresetProbabilities:
    r"""Probabilities of a pool's samples, and the steps of a search for them.

    A step clips the gradient's norm, divides its running mean by the root of its running square as Adam does, and projects:
    see ``coreset_step``. The published analysis is for plain steps; the published results come from these. With
    ``shared_scale`` it divides by one number instead, the spread of the running mean over the samples: for gradients with little
    noise, whose sizes tell what the samples are worth. Adam would forget that.

    Args:
        probabilities: Where to start, ``(n,)``, in [0, 1]. What starts at 0 stays there, and what starts at 1 changes only
            as the size falls: neither has a gradient.
        max_norm: Largest norm of a gradient; longer ones are scaled down to it.
        betas: How much of the running mean and of the running square a step keeps.
        shared_scale: Whether one number scales all entries of a step.

    Attributes:
        probabilities: s, ``(n,)``.
        num_updates: Updates so far, without the gradients that said nothing.

    Example:
        >>> search = CoresetProbabilities(torch.tensor([0.5, 0.5, 0.5]))
        >>> search.step(torch.tensor([-2.0, 0.0, 1.0]), learning_rate=0.1, size=2)
        >>> search.probabilities
        tensor([0.6000, 0.5000, 0.4000])
    """

    def __init__(
        self,
        probabilities: Tensor,
        max_norm: float = 3.0,
        betas: tuple[float, float] = (0.9, 0.999),
        shared_scale: bool = False,
    ) -> None:
        self.probabilities = probabilities.clone()
        self.num_updates = 0
        self.max_norm = max_norm
        self.betas = betas
        self.shared_scale = shared_scale
        self._mean = torch.zeros_like(probabilities)
        self._square = torch.zeros_like(probabilities)

    def step(self, gradient: Tensor, learning_rate: float, size: float) -> None:
        """Take one step; a gradient that is 0 or not finite only lets the probabilities follow the size.

        Args:
            gradient: ``(n,)``.
            learning_rate: Positive.
            size: K of this step, not negative.
        """
        norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        direction = torch.zeros_like(self.probabilities)
        if norm > 0 and math.isfinite(norm):
            clipped = gradient * min(1.0, self.max_norm / norm)
            self.num_updates += 1
            self._mean.lerp_(clipped, 1 - self.betas[0])
            self._square.lerp_(clipped.square(), 1 - self.betas[1])
            mean, square = (
                moment / (1 - beta**self.num_updates)
                for moment, beta in zip((self._mean, self._square), self.betas, strict=True)
            )
            scale = mean.std(correction=0) if self.shared_scale else square.sqrt()
            direction = mean / (scale + 1e-8)
        self.probabilities = coreset_step(self.probabilities, direction, learning_rate, size)

    def state_dict(self) -> dict[str, Any]:
        """Return probabilities and moments."""
        tensors = {
            "probabilities": self.probabilities.clone(),
            "mean": self._mean.clone(),
            "square": self._square.clone(),
        }
        return {**tensors, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.probabilities, self.num_updates = state["probabilities"].clone(), state["num_updates"]
        self._mean, self._square = state["mean"].clone(), state["square"].clone()


def search_progress(probabilities: Tensor, margin: float = 0.01) -> dict[str, float]:
    """Say how far a search has decided.

    Args:
        probabilities: s, ``(n,)``, in [0, 1].
        margin: A probability this close to 0 or 1 counts as settled.

    Returns:
        ``expected_size``, the sum of the probabilities; ``entropy``, the mean over the samples in nats, at most log 2;
        ``settled``, the share of settled samples.

    Example:
        >>> search_progress(torch.tensor([0.0, 1.0, 0.5, 0.5]))
        {'expected_size': 2.0, 'entropy': 0.34657359027997264, 'settled': 0.5}
    """
    s = probabilities.double()
    entropy = (torch.special.entr(s) + torch.special.entr(1 - s)).mean()
    settled = (torch.minimum(s, 1 - s) <= margin).double().mean()
    return {"expected_size": float(s.sum()), "entropy": float(entropy), "settled": float(settled)}


def resize_mask(mask: Tensor, probabilities: Tensor, size: int) -> Tensor:
    """Make a mask keep exactly K samples: drop the least probable it keeps, or add the most probable it does not.

    Of samples with one probability, the first is kept.

    Args:
        mask: ``(n,)``, bool.
        probabilities: s, ``(n,)``.
        size: K, in [0, n].

    Returns:
        The mask, ``(n,)``, bool.

    Raises:
        ValueError: If there are fewer than K samples.

    Example:
        >>> s = torch.tensor([0.9, 0.1, 0.5])
        >>> resize_mask(torch.tensor([True, True, False]), s, 1), resize_mask(torch.tensor([False, True, False]), s, 2)
        (tensor([ True, False, False]), tensor([ True,  True, False]))
    """
    if not 0 <= size <= len(mask):
        raise ValueError(f"A coreset of {len(mask)} samples can have 0 to {len(mask)} of them, got {size}.")
    by_probability = probabilities.sort(descending=True, stable=True).indices
    kept_first = mask[by_probability].to(torch.uint8).sort(descending=True, stable=True).indices
    return torch.zeros_like(mask).index_fill(0, by_probability[kept_first[:size]], True)


def top_mask(probabilities: Tensor, size: int) -> Tensor:
    """Keep the K most probable samples; of samples with one probability, the first.

    Args:
        probabilities: s, ``(n,)``.
        size: K, in [0, n].

    Returns:
        The mask, ``(n,)``, bool.

    Example:
        >>> top_mask(torch.tensor([0.9, 0.1, 0.5, 0.5]), 2)
        tensor([ True, False,  True, False])
    """
    return resize_mask(torch.zeros_like(probabilities, dtype=torch.bool), probabilities, size)


def with_zeros_in_random_order(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Give samples of probability zero different ones, below any other, so that a coreset is filled up with them at random.

    Args:
        probabilities: s, ``(n,)``, floating, n at most 16 million in float32.
        generator: On the CPU.

    Returns:
        The same but for the zeros, ``(n,)``.

    Example:
        >>> s = with_zeros_in_random_order(torch.tensor([0.0, 0.5, 0.0, 0.0]), torch.Generator().manual_seed(0))
        >>> top_mask(s, 2), float(s[1]), bool(s.max() == 0.5), len(s.unique())
        (tensor([False,  True,  True, False]), 0.5, True, 4)
    """
    order = 1 + torch.randperm(len(probabilities), generator=generator).to(probabilities)
    return torch.where(probabilities > 0, probabilities, torch.finfo(probabilities.dtype).tiny * order)


def best_sampled_mask(
    probabilities: Tensor, size: int, num: int, losses: Callable[[Tensor], Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw masks, make each keep exactly K samples, and take the one with the lowest loss.

    A search that has settled draws the same mask many times; its loss is asked for once.

    Args:
        probabilities: s, ``(n,)``.
        size: K, in [0, n].
        num: How many to draw, positive.
        losses: Upper losses, ``(k,)``, of different masks, ``(k, n)``, k at most ``num``. One that is not finite is passed over.
        generator: On the device of the probabilities.

    Returns:
        The mask, ``(n,)``, bool, and its loss, a scalar.

    Raises:
        ValueError: If no loss is finite.

    Example:
        >>> s, costs = torch.tensor([0.5, 0.5, 0.5, 0.0]), torch.tensor([3.0, 1.0, 2.0, 0.0])
        >>> best_sampled_mask(s, 2, 50, lambda masks: (masks * costs).sum(1), torch.Generator().manual_seed(0))
        (tensor([False,  True,  True, False]), tensor(3.))
    """
    drawn = sample_masks(probabilities, num, generator)
    masks = torch.stack([resize_mask(mask, probabilities, size) for mask in drawn]).unique(dim=0)
    values = losses(masks)
    finite = values.isfinite()
    if not finite.any():
        raise ValueError(
            f"None of the {len(masks)} masks drawn for the final coreset has a finite loss ({values.tolist()}): every inner "
            "training diverged, or a sample that they are judged on is broken. Lower the inner learning rate, or look for NaN "
            "and infinite values in the pool and the target dataset."
        )
    best = values.masked_fill(~finite, torch.inf).argmin()
    return masks[best], values[best]
