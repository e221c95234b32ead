"""The controls of the coreset benchmark, against brute force and hand-written references."""

import itertools
import math
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

BENCHMARKS = Path(__file__).parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def controls(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("coreset_controls", None)
    return import_module("coreset_controls")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_uniform_draws_every_pair_equally_often(controls: ModuleType) -> None:
    generator = seeded(0)
    counts = dict.fromkeys(itertools.combinations(range(4), 2), 0)
    for _ in range(3000):
        counts[tuple(sorted(controls.uniform(4, 2, generator).tolist()))] += 1
    assert all(abs(count - 500) < 5 * (500 * 5 / 6) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("size", [7, 12, 20])
def test_balanced_takes_as_many_of_each_class_as_there_are(controls: ModuleType, size: int) -> None:
    labels = torch.tensor([0] * 10 + [1] * 7 + [2] * 3)[torch.randperm(20, generator=seeded(1))]
    for seed in range(20):
        ids = controls.balanced(labels, size, seeded(seed))
        assert len(ids.unique()) == len(ids) == size
        counts = labels[ids].bincount(minlength=3).tolist()
        full = {7: None, 12: [5, 4, 3], 20: [10, 7, 3]}[size]
        assert max(counts) - min(counts) <= 1 if full is None else sorted(counts, reverse=True) == full
    firsts = {tuple(controls.balanced(labels, 7, seeded(seed)).tolist()) for seed in range(5)}
    assert len(firsts) == 5, "at random within a class"


def test_k_center_is_the_greedy_rule(controls: ModuleType) -> None:
    features = torch.randn(30, 3, generator=seeded(2), dtype=torch.float64)
    chosen = [4]
    while len(chosen) < 12:
        gaps = {i: min(math.dist(features[i], features[j]) for j in chosen) for i in range(30) if i not in chosen}
        chosen.append(max(gaps, key=gaps.__getitem__))
    assert controls.k_center(features, 12, first=4).tolist() == chosen
    twins = torch.zeros(4, 2)
    assert sorted(controls.k_center(twins, 4).tolist()) == [0, 1, 2, 3]


def test_herding_follows_the_mean_of_each_class(controls: ModuleType) -> None:
    features = torch.randn(25, 4, generator=seeded(3), dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 0, 1] * 5)
    labels[[3, 8]] = 2
    scaled = [row / math.sqrt(sum(v * v for v in row)) for row in features]
    rankings = []
    for label in range(3):
        members = [i for i in range(25) if labels[i] == label]
        mean = sum(scaled[i] for i in members) / len(members)
        order = []
        while len(order) < len(members):
            rest = [i for i in members if i not in order]
            order.append(
                min(rest, key=lambda i: math.dist(mean, sum(scaled[j] for j in [*order, i]) / (len(order) + 1)))
            )
        rankings.append(order)
    expected = [order[turn] for turn in range(9) for order in rankings if turn < len(order)]
    assert controls.herding(features, labels, 17).tolist() == expected[:17]
    assert controls.herding(features, labels, 5).tolist() == expected[:5]
    assert labels[controls.herding(features, labels, 5)].tolist() == [0, 1, 2, 0, 1]


def test_hardest_and_best_of(controls: ModuleType) -> None:
    assert controls.hardest(torch.tensor([0.1, 3.0, 2.0, 0.5]), 2).tolist() == [1, 2]
    asked = []

    def loss(ids: torch.Tensor) -> float:
        asked.append(ids.tolist())
        return abs(float(ids.sum()) - 20)

    best = controls.best_of(20, 12, 3, loss, seeded(4)).tolist()
    assert len(asked) == 20 and all(len(set(ids)) == 3 for ids in asked)
    assert abs(sum(best) - 20) == min(abs(sum(ids) - 20) for ids in asked)


def test_the_tangent_kernel_is_that_of_a_wide_network(controls: ModuleType) -> None:
    inputs = F.normalize(torch.randn(4, 3, generator=seeded(5), dtype=torch.float64), dim=1)
    width = 3000
    torch.manual_seed(0)
    first, second, last = (torch.randn(width, k, dtype=torch.float64) for k in (3, width, 1))
    gradients = []
    for x in inputs:
        layers = [layer.clone().requires_grad_() for layer in (first, second, last)]
        hidden = F.relu(layers[0] @ x) * (2 / width) ** 0.5
        hidden = F.relu(layers[1] @ hidden) * (2 / width) ** 0.5
        (layers[2][:, 0] @ hidden).backward()
        gradients.append(torch.cat([layer.grad.flatten() for layer in layers]))
    empirical = torch.stack(gradients) @ torch.stack(gradients).T / 3
    kernel = controls.tangent_kernel(inputs, inputs)
    torch.testing.assert_close(kernel.diagonal(), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(kernel.trace(), empirical.trace(), rtol=0.1, atol=0)
    lengths = empirical.diagonal().sqrt()
    torch.testing.assert_close(kernel, empirical / lengths / lengths[:, None], rtol=0, atol=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# Greedy bilevel selection

RIDGE = 0.05


class Ridge:
    """A small pool with another target set, and its outer loss as a function of all weights, solved in another way."""

    def __init__(self, outer_weights: torch.Tensor | None = None) -> None:
        self.outer_weights = outer_weights
        generator = seeded(6)
        pool, target = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (12, 7))
        self.kernel, self.outer_kernel = (torch.exp(-torch.cdist(x, pool).square() / 4) for x in (pool, target))
        self.labels, self.outer_labels = torch.arange(12) % 3, torch.arange(7) % 3
        self.targets, self.outer_targets = (F.one_hot(y, 3).double() for y in (self.labels, self.outer_labels))

    def loss(self, weights: torch.Tensor) -> float:
        """Through (W K + ridge I) a = W y, which takes any weights, small negative ones too."""
        system = weights[:, None] * self.kernel + RIDGE * torch.eye(12, dtype=torch.float64)
        coefficients = torch.linalg.solve(system, weights[:, None] * self.targets)
        residuals = self.outer_kernel @ coefficients - self.outer_targets
        shares = torch.full((7,), 1 / 7) if self.outer_weights is None else self.outer_weights
        return float(shares.double() @ residuals.square().sum(1))

    def derivatives(self, controls: ModuleType, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        outer = (self.outer_kernel, self.outer_targets)
        return controls.weight_derivatives(self.kernel, self.targets, ids, weights, *outer, RIDGE, self.outer_weights)


def test_the_solution_minimises_the_weighted_ridge_loss(controls: ModuleType) -> None:
    problem = Ridge()
    weights = torch.linspace(0, 2, 12, dtype=torch.float64)
    coefficients, _ = controls.fit_ridge(problem.kernel, problem.targets, weights, RIDGE)
    a = coefficients.clone().requires_grad_()
    values = problem.kernel @ a
    loss = (weights[:, None] * (values - problem.targets).square()).sum() + RIDGE * (a * values).sum()
    (gradient,) = torch.autograd.grad(loss, a)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("outer_weights", [None, torch.linspace(0, 2 / 7, 7)])
@pytest.mark.parametrize("ids", [[], [3], [5, 0, 11, 2]])
def test_derivatives_are_finite_differences(
    controls: ModuleType, ids: list[int], outer_weights: torch.Tensor | None
) -> None:
    problem = Ridge(outer_weights)
    chosen = torch.tensor(ids, dtype=torch.int64)
    weights = torch.tensor([0.7, 1.3, 0.0, 2.0][: len(ids)], dtype=torch.float64)
    at = torch.zeros(12, dtype=torch.float64).index_put_((chosen,), weights)
    step = 1e-5 * torch.eye(12, dtype=torch.float64)
    expected = [(problem.loss(at + step[i]) - problem.loss(at - step[i])) / 2e-5 for i in range(12)]
    found = problem.derivatives(controls, chosen, weights)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_greedy_adds_the_best_of_all_candidates(controls: ModuleType) -> None:
    problem = Ridge()
    weights, chosen = torch.zeros(12, dtype=torch.float64), []
    for _ in range(6):  # a little weight for each candidate in turn
        losses = {
            i: problem.loss(weights + 1e-6 * F.one_hot(torch.tensor(i), 12)) for i in range(12) if i not in chosen
        }
        chosen.append(min(losses, key=losses.__getitem__))
        weights[chosen[-1]] = 1
    outer = (problem.outer_kernel, problem.outer_labels)
    ids, found = controls.greedy(problem.kernel, problem.labels, 6, *outer, ridge=RIDGE, weight_steps=0)
    assert ids.tolist() == chosen and found.tolist() == [1.0] * 6


def test_greedy_improves_its_weights(controls: ModuleType) -> None:
    problem = Ridge()
    outer = (problem.outer_kernel, problem.outer_labels)
    losses = []
    for steps in (0, 20):
        ids, weights = controls.greedy(problem.kernel, problem.labels, 4, *outer, ridge=RIDGE, weight_steps=steps)
        assert len(ids.unique()) == 4 and (weights >= 0).all()
        losses.append(problem.loss(torch.zeros(12, dtype=torch.float64).index_put_((ids,), weights)))
    assert losses[1] < losses[0]
    ids, weights = controls.greedy(problem.kernel, problem.labels, 12)
    assert sorted(ids.tolist()) == list(range(12)), "the whole pool, judged on itself"


def test_greedy_goes_on_from_what_is_required(controls: ModuleType) -> None:
    problem = Ridge()
    whole, _ = controls.greedy(problem.kernel, problem.labels, 6, weight_steps=0)
    required = whole[:3].flip(0)
    ids, weights = controls.greedy(problem.kernel, problem.labels, 6, weight_steps=0, required=required)
    assert ids.tolist() == [*required.tolist(), *whole[3:].tolist()] and (weights == 1).all()
    assert controls.greedy(problem.kernel, problem.labels, 6, required=torch.empty(0, dtype=torch.int64))[0].equal(
        controls.greedy(problem.kernel, problem.labels, 6)[0]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def test_a_reservoir_holds_every_sample_with_the_same_probability(controls: ModuleType) -> None:
    generator, num_streams = seeded(7), 2000
    counts = torch.zeros(12)
    for _ in range(num_streams):
        memory = torch.empty(0, dtype=torch.int64)
        for start in (0, 5, 10):
            arrivals = torch.arange(start, min(start + 5, 12))
            memory = controls.reservoir(memory, start, arrivals, 3, generator)
        assert len(memory.unique()) == len(memory) == 3
        counts[memory] += 1
    spread = (num_streams * 0.25 * 0.75) ** 0.5
    assert ((counts - num_streams / 4).abs() < 4.5 * spread).all()


def test_merge_reduce_keeps_the_memory_and_counts_the_batches(controls: ModuleType) -> None:
    calls = []

    def reduce(ids: torch.Tensor, weights: torch.Tensor, size: int) -> torch.Tensor:
        calls.append((ids, weights))
        return ids[torch.randperm(len(ids), generator=seeded(len(calls)))[:size]]

    slots, history = [], []
    for batch in range(12):
        calls.clear()
        slots = controls.merge_reduce(slots, torch.arange(25 * batch, 25 * batch + 25), 5, 3, reduce)
        history.append([weight for _, weight in slots])
        assert sum(history[-1]) == batch + 1
        assert all(len(ids) == 5 for ids, _ in slots) and len(slots) == min(batch + 1, 3)
        memory = torch.cat([ids for ids, _ in slots])
        assert len(memory.unique()) == len(memory) and (memory < 25 * (batch + 1)).all()
        assert all(one.max() < two.min() for (one, _), (two, _) in itertools.pairwise(slots)), "the oldest first"
        arrived, *merged = calls
        assert arrived[1].tolist() == [1.0] * 25 and len(merged) == (batch >= 3)
        for ids, weights in merged:
            assert len(ids) == 10 and int(weights[0] + weights[-1]) in history[-1]
    assert history[2:7] == [[1, 1, 1], [2, 1, 1], [2, 2, 1], [2, 2, 2], [4, 2, 1]]
