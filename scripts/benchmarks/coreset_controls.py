"""Other ways to choose a coreset, as plain functions on tensors: what CoresetTrainer is compared with.

The ids of what is chosen come in the order of the choice, so that a prefix is a smaller coreset of the same rule.

References:
    Sener, Savarese, Active Learning for Convolutional Neural Networks: A Core-Set Approach, ICLR 2018 (k-center).
    Rebuffi, Kolesnikov, Sperl, Lampert, iCaRL: Incremental Classifier and Representation Learning, CVPR 2017
        (herding).
    Borsos, Mutny, Krause, Coresets via Bilevel Optimization for Continual Learning and Streaming, NeurIPS 2020
        (greedy; merge and reduce).
    Vitter, Random Sampling with a Reservoir, ACM Transactions on Mathematical Software 1985.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def uniform(num_samples: int, size: int, generator: Generator) -> Tensor:
    """Every subset of this size is as likely as any other."""
    return torch.randperm(num_samples, generator=generator)[:size]


def balanced(labels: Tensor, size: int, generator: Generator) -> Tensor:
    """As many of each class as it has, at most one more of one class than of another; at random within a class."""
    order = torch.randperm(len(labels), generator=generator)
    classes = labels.unique()
    classes = classes[torch.randperm(len(classes), generator=generator)]
    return take_turns([order[labels[order] == label] for label in classes], size)


def take_turns(rankings: list[Tensor], size: int) -> Tensor:
    """The first of each ranking, then the second of each that has one, and so on."""
    turns = [ranking[k] for k in range(max(map(len, rankings))) for ranking in rankings if k < len(ranking)]
    return torch.stack(turns[:size])


def k_center(features: Tensor, size: int, first: int = 0) -> Tensor:
    """Add the sample that is farthest from all chosen so far, again and again."""
    ids = [first]
    distances = torch.full((len(features),), math.inf)
    while len(ids) < size:
        distances = torch.minimum(distances, (features - features[ids[-1]]).square().sum(1))
        distances[ids] = -1.0  # below the distance of a sample that equals a chosen one
        ids.append(int(distances.argmax()))
    return torch.tensor(ids)


def herding(features: Tensor, labels: Tensor, size: int) -> Tensor:
    """In each class add the sample that brings the mean of the chosen closest to the mean of the class.

    Features are scaled to length 1. The classes take turns.
    """
    features = F.normalize(features, dim=1)
    rankings = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        own = features[members]
        mean, total, order = own.mean(0), torch.zeros_like(own[0]), []
        for count in range(1, min(size, len(members)) + 1):
            distances = (mean - (total + own) / count).square().sum(1)
            distances[order] = math.inf
            order.append(int(distances.argmin()))
            total = total + own[order[-1]]
        rankings.append(members[order])
    return take_turns(rankings, size)


def hardest(losses: Tensor, size: int) -> Tensor:
    """The largest losses of a model that was trained on the pool."""
    return losses.topk(size).indices


def best_of(
    num_draws: int, num_samples: int, size: int, loss: Callable[[Tensor], float], generator: Generator
) -> Tensor:
    """The uniform draw with the lowest loss of a model that is trained on it."""
    draws = [uniform(num_samples, size, generator) for _ in range(num_draws)]
    return min(draws, key=loss)


# Greedy bilevel selection --------------------------------------------------------------------------------------------


def tangent_kernel(one: Tensor, two: Tensor, num_layers: int = 2) -> Tensor:
    """Neural tangent kernel of an infinitely wide ReLU network with so many hidden layers.

    Inputs are scaled to length 1, and the kernel so that its diagonal is 1.
    """
    correlation = (F.normalize(one, dim=1) @ F.normalize(two, dim=1).T).clamp(-1, 1)
    kernel = correlation
    for _ in range(num_layers):
        angle = correlation.arccos()
        slope = 1 - angle / math.pi  # correlation of the ReLU's derivatives
        correlation = (correlation * slope + angle.sin() / math.pi).clamp(-1, 1)
        kernel = kernel * slope + correlation
    return kernel / (num_layers + 1)


def fit_ridge(kernel: Tensor, targets: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Solve the inner problem: kernel ridge regression with a weight for every sample.

    It minimises the sum of w_i |f(x_i) - y_i|² plus ridge |f|². Returns a with f(x) = sum of a_i k(x, x_i), and the
    Cholesky factor of ridge I + W^½ K W^½.
    """
    root = weights.sqrt()[:, None]
    factor = torch.linalg.cholesky(root * kernel * root.T + ridge * torch.eye(len(kernel), dtype=kernel.dtype))
    return root * torch.cholesky_solve(root * targets, factor), factor


def weight_derivatives(
    kernel: Tensor,
    targets: Tensor,
    ids: Tensor,
    weights: Tensor,
    outer_kernel: Tensor,
    outer_targets: Tensor,
    ridge: float,
    outer_weights: Tensor | None = None,
) -> Tensor:
    r"""Derivative of the outer loss by the weight of every sample of the pool, those without weight included.

    With A = ridge I + sum of w_i k_i k_i^T on functions, the solution moves by df/dw_c = -A^{-1} k_c (f(x_c) - y_c),
    and A^{-1} k_c is (k_c - K_{.S} W^½ (ridge I + W^½ K_SS W^½)^{-1} W^½ K_Sc) / ridge. The outer loss is the mean
    of |f(x_j) - y_j|².

    Args:
        kernel: Of the pool with itself, (n, n).
        targets: (n, c).
        ids: Chosen samples S, (k,).
        weights: Theirs, (k,), not negative.
        outer_kernel: Of the outer samples with the pool, (m, n).
        outer_targets: (m, c).
        ridge: Positive.
        outer_weights: Of the outer samples in the mean, (m,), summing to 1; alike if None.

    Returns:
        (n,).
    """
    columns = kernel[:, ids]
    coefficients, factor = fit_ridge(columns[ids], targets[ids], weights, ridge)
    shares = torch.full((len(outer_targets),), 1 / len(outer_targets)) if outer_weights is None else outer_weights
    outer_residuals = (outer_kernel[:, ids] @ coefficients - outer_targets) * shares.to(outer_kernel)[:, None]
    pulled = outer_kernel.T @ outer_residuals
    root = weights.sqrt()[:, None]
    explained = columns @ (root * torch.cholesky_solve(root * pulled[ids], factor))
    residuals = columns @ coefficients - targets
    return -2 / ridge * (residuals * (pulled - explained)).sum(1)


def greedy(
    kernel: Tensor,
    labels: Tensor,
    size: int,
    outer_kernel: Tensor | None = None,
    outer_labels: Tensor | None = None,
    ridge: float = 1e-2,
    weight_steps: int = 5,
    learning_rate: float = 0.05,
    outer_weights: Tensor | None = None,
    required: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the sample whose weight would lower the outer loss fastest, then improve the weights of all chosen.

    The inner problem is kernel ridge regression on the labels as one-hot vectors, a proxy for the network, so that the
    derivatives are exact. A new sample starts with weight 1; all weights then take a few steps of Adam, and stay
    positive or 0.

    Args:
        kernel: Of the pool with itself, (n, n), about 1 on the diagonal.
        labels: (n,).
        size: Samples to choose, at most n.
        outer_kernel: Of the target samples with the pool, (m, n); None to judge on the pool.
        outer_labels: Of the target samples, (m,).
        ridge: Strength of the regularisation.
        weight_steps: After every addition.
        learning_rate: Of these steps.
        outer_weights: Of the target samples in the outer loss, (m,), summing to 1; alike if None.
        required: Ids that are chosen already, with weight 1; ``size`` counts them.

    Returns:
        The ids, (size,), those required in front, and their weights.
    """
    outer_labels = labels if outer_labels is None else outer_labels
    outer_kernel = kernel if outer_kernel is None else outer_kernel
    num_classes = int(max(labels.max(), outer_labels.max())) + 1
    kernel, outer_kernel = kernel.double(), outer_kernel.double()
    targets, outer_targets = (F.one_hot(entry, num_classes).double() for entry in (labels, outer_labels))

    ids = torch.empty(0, dtype=torch.int64) if required is None else required
    weights = torch.ones(len(ids), dtype=torch.float64)
    for _ in range(size - len(ids)):
        slopes = weight_derivatives(kernel, targets, ids, weights, outer_kernel, outer_targets, ridge, outer_weights)
        ids = torch.cat([ids, slopes.index_fill(0, ids, math.inf).argmin()[None]])
        weights = F.pad(weights, (0, 1), value=1.0)
        own_kernel, own_outer_kernel, everyone = kernel[ids][:, ids], outer_kernel[:, ids], torch.arange(len(ids))
        optimizer = torch.optim.Adam([weights], lr=learning_rate)
        for _ in range(weight_steps):
            weights.grad = weight_derivatives(
                own_kernel, targets[ids], everyone, weights, own_outer_kernel, outer_targets, ridge, outer_weights
            )
            optimizer.step()
            weights.clamp_(min=0)
        weights.grad = None
    return ids, weights


# Streams -------------------------------------------------------------------------------------------------------------


def reservoir(memory: Tensor, num_seen: int, arrivals: Tensor, size: int, generator: Generator) -> Tensor:
    """Let samples arrive at a memory, which afterwards holds each of those seen so far with the same probability."""
    kept = memory.tolist()
    for sample in arrivals.tolist():
        num_seen += 1
        place = int(torch.randint(num_seen, (), generator=generator))
        if len(kept) < size:
            kept.append(sample)
        elif place < size:
            kept[place] = sample
    return torch.tensor(kept)


def merge_reduce(
    slots: list[tuple[Tensor, int]],
    arrivals: Tensor,
    slot_size: int,
    num_slots: int,
    reduce: Callable[[Tensor, Tensor, int], Tensor],
) -> list[tuple[Tensor, int]]:
    """Reduce a batch of a stream to a slot of the memory; if there are too many, merge and reduce two neighbours.

    The weight of a slot counts the batches it stands for. If the last slot is lighter than the one before, the new one
    joins it; otherwise the first two of the lightest neighbours of equal weight are merged.

    Args:
        slots: Ids and weight of each, the oldest first.
        arrivals: Ids of the new batch.
        slot_size: Samples of a slot.
        num_slots: At least 2.
        reduce: (ids, weight of each, how many) -> the ids to keep.

    Returns:
        The slots afterwards.
    """
    kept = reduce(arrivals, torch.ones(len(arrivals)), slot_size)
    slots = [*slots, (kept, 1)]
    if len(slots) <= num_slots:
        return slots
    weights = [weight for _, weight in slots]
    if weights[-2] < weights[-3]:
        left = len(slots) - 2
    else:
        left = min((k for k in range(num_slots) if weights[k] == weights[k + 1]), key=lambda k: weights[k])
    (one, one_weight), (two, two_weight) = slots[left : left + 2]
    each = torch.cat([torch.full((len(one),), float(one_weight)), torch.full((len(two),), float(two_weight))])
    merged = reduce(torch.cat([one, two]), each, slot_size)
    return [*slots[:left], (merged, one_weight + two_weight), *slots[left + 2 :]]
