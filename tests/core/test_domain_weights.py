"""Domain weights: their steps by hand, their hypergradient against finite differences and in closed form."""

import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from hf_bilevel.core.mixture import (
    DomainWeights,
    adjoint_step,
    apportion,
    domain_means,
    mirror_step,
    optimal_inner_steps,
    projected_step,
    unrolled_hypergradient,
    weight_learning_rate,
)

wide = partial(torch.tensor, dtype=torch.float64)
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
RULES = ["mirror", "projected"]


# ---------------------------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize(
    ("num", "condition", "expected"),
    [
        (1, None, 1),
        (2, None, 1),
        (3, None, 2),
        (400, None, 49),
        (20_000, None, 445),
        (100_000, 10, 115),
        (50, 100, 50),
    ],
)
def test_optimal_inner_steps(num: int, condition: float | None, expected: int) -> None:
    assert optimal_inner_steps(num, condition) == expected
    if 1 < expected < num:
        order = math.sqrt(num * math.log(num)) if condition is None else condition * math.log(num)
        assert abs(expected - order) <= 0.5


def test_mirror_step() -> None:
    w, g = wide([0.1, 0.2, 0.7]), wide([3.0, -1.0, 0.5])
    unscaled = w * torch.exp(-0.4 * g)
    close(mirror_step(w, g, 0.4), unscaled / unscaled.sum())
    assert mirror_step(wide([0.0, 0.4, 0.6]), wide([-9.0, 0.0, 0.0]), 1.0)[0] == 0
    close(mirror_step(wide([0.5, 0.5]), wide([0.0, 1e6]), 1.0, floor=0.2), wide([0.8, 0.2]))  # no overflow
    close(mirror_step(wide([0.5, 0.5]), wide([-1e6, 0.0]), 1.0), wide([1.0, 0.0]))


def test_projected_step() -> None:
    close(projected_step(wide([0.5, 0.3, 0.2]), wide([1.0, 2.0, 3.0]), 0.1), wide([0.6, 0.3, 0.1]))
    close(projected_step(wide([0.5, 0.3, 0.2]), wide([0.0, 0.0, 9.0]), 0.1, floor=0.1), wide([0.55, 0.35, 0.1]))


def test_weight_learning_rate() -> None:
    assert weight_learning_rate(6, 8, "mirror") == pytest.approx(math.sqrt(2 * math.log(6) / 8))
    assert weight_learning_rate(6, 8, "projected") == pytest.approx(math.sqrt(2 / 8))
    assert weight_learning_rate(2, 0, "projected") == pytest.approx(math.sqrt(2))


def hypergradients(num: int, domains: int = 3) -> Tensor:
    return torch.randn(num, domains, generator=torch.Generator().manual_seed(num), dtype=torch.float64)


@pytest.mark.parametrize("rule", RULES)
def test_domain_weights_by_hand(rule: str) -> None:
    start, smoothing, floor, rate = wide([0.5, 0.3, 0.2]), 0.1, 0.05, 0.3
    domains = DomainWeights(start, rule, smoothing, floor)
    close(domains.average, start)
    w, squares, seen = start, [], []
    for g in hypergradients(7):
        domains.step(g, rate)
        g = g - g.mean()
        squares.append(float(g.abs().max() if rule == "mirror" else g.square().sum().sqrt()) ** 2)
        take = mirror_step if rule == "mirror" else projected_step
        w = 0.9 * take(w, g, rate / math.sqrt(sum(squares) / len(squares)), floor) + 0.1 / 3
        seen.append(w)
        close(domains.weights, w)
        assert float(w.min()) >= 0.9 * floor + 0.1 / 3 - 1e-12
        t = torch.arange(1.0, len(seen) + 1, dtype=torch.float64)
        close(domains.average, t / t.sum() @ torch.stack(seen))
    assert domains.num_updates == 7
    close(start, wide([0.5, 0.3, 0.2]))


@pytest.mark.parametrize("rule", RULES)
def test_scale_and_shift_of_the_hypergradient_do_not_matter(rule: str) -> None:
    runs = [DomainWeights(wide([0.2, 0.3, 0.5]), rule) for _ in range(2)]
    for t, g in enumerate(hypergradients(5)):
        runs[0].step(g, 0.2)
        runs[1].step(1e4 * g + 100 * t, 0.2)
    torch.testing.assert_close(runs[0].weights, runs[1].weights, rtol=1e-9, atol=1e-9)
    assert not torch.equal(runs[0].weights, wide([0.2, 0.3, 0.5]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [[math.nan, 0, 1], [math.inf, 0, 1], [-math.inf, 0, 1], [0, 0, 0], [2, 2, 2]])
def test_a_hypergradient_that_says_nothing_changes_nothing(rule: str, bad: list[float]) -> None:
    domains, plain = (DomainWeights(wide([0.2, 0.3, 0.5]), rule, smoothing=0.1) for _ in range(2))
    for g in hypergradients(3):
        domains.step(wide(bad), 0.2)
        domains.step(g, 0.2)
        plain.step(g, 0.2)
    for key, value in plain.state_dict().items():
        assert (torch.equal if isinstance(value, Tensor) else int.__eq__)(domains.state_dict()[key], value)


@pytest.mark.parametrize("rule", RULES)
def test_domain_weights_continue_from_their_state(rule: str) -> None:
    whole, gradients = DomainWeights(wide([0.2, 0.3, 0.5]), rule), hypergradients(6)
    for t, g in enumerate(gradients):
        if t == 3:
            state = whole.state_dict()
        whole.step(g, 0.2)
    resumed = DomainWeights(wide([1 / 3] * 3), rule)
    resumed.load_state_dict(state)
    for g in gradients[3:]:
        resumed.step(g, 0.2)
    assert torch.equal(resumed.weights, whole.weights) and torch.equal(resumed.average, whole.average)


# ---------------------------------------------------------------------------------------------------------------------
# Losses by domain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_domain_means(dtype: torch.dtype) -> None:
    losses = torch.tensor([1.5, math.nan, 3.0, 0.25, 8.0], dtype=dtype)
    counts, ids = torch.tensor([2, 0, 1, 4, 3]), torch.tensor([1, 1, 0, 1, 3])
    sums, units = domain_means(losses, counts, ids, 4)
    assert sums.dtype == units.dtype == torch.promote_types(dtype, torch.float32)
    assert sums.tolist() == [3, 4, 0, 24] and units.tolist() == [1, 6, 0, 3]


def test_domain_means_of_many_half_precision_losses_are_not_rounded() -> None:
    losses, counts = torch.full((500,), 0.1).half(), torch.full((500,), 333)
    sums, units = domain_means(losses, counts, torch.zeros(500).long(), 1)
    assert units.tolist() == [333 * 500]
    assert float(sums / units) == pytest.approx(float(losses[0]), rel=2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The hypergradient


class TanhModel:
    """Two layers and a parameter that nothing uses; other samples of every domain in every step."""

    def __init__(self, num_steps: int, num_domains: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(num_steps + 1, num_domains, 5, 2, generator=generator, dtype=torch.float64)
        self.y = torch.randn(num_steps + 1, num_domains, 5, generator=generator, dtype=torch.float64)
        shapes = [(2, 3), (3,), (4,)]
        self.start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.losses = [partial(self.loss, t) for t in range(num_steps)]

    def loss(self, t: int, parameters: list[Tensor], weights: Tensor) -> Tensor:
        out = torch.tanh(self.x[t] @ parameters[0]) @ parameters[1]
        return (weights * (out - self.y[t]).square().mean(-1)).sum()

    def target(self, parameters: list[Tensor]) -> Tensor:
        return self.loss(-1, parameters, wide([1.0, 0.5, 0.0]))

    def after_training(self, weights: Tensor, rate: float) -> list[Tensor]:
        theta = [p.clone() for p in self.start]
        for loss in self.losses:
            theta = [p.requires_grad_() for p in theta]
            gradient = torch.autograd.grad(loss(theta, weights), theta[:2])
            theta = [*(p.detach() - rate * g for p, g in zip(theta, gradient, strict=False)), theta[2].detach()]
        return theta


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_unrolled_hypergradient_against_finite_differences(num_steps: int) -> None:
    model, w, rate, h = TanhModel(num_steps), wide([0.2, 0.5, 0.3]), 0.2, 1e-5
    theta, hypergradient = unrolled_hypergradient(model.losses, model.target, model.start, w, rate)
    for got, expected in zip(theta, model.after_training(w, rate), strict=True):
        close(got, expected)
    expected = [
        (model.target(model.after_training(w + h * e, rate)) - model.target(model.after_training(w - h * e, rate)))
        / (2 * h)
        for e in torch.eye(3, dtype=torch.float64)
    ]
    torch.testing.assert_close(hypergradient, torch.stack(expected).detach(), rtol=1e-7, atol=1e-9)
    assert hypergradient.abs().min() > 1e-3
    assert not any(p.requires_grad for p in model.start) and not w.requires_grad


def test_adjoint_step_with_a_rate_for_each_parameter() -> None:
    model, w, rates, h = TanhModel(1), wide([0.2, 0.5, 0.3]), [0.3, 0.1, 0.7], 1e-5
    theta, w = [p.clone().requires_grad_() for p in model.start], w.requires_grad_()
    after = [torch.full_like(p, i + 1.0) for i, p in enumerate(theta)]  # the adjoint: of a linear target loss

    def target(theta: list[Tensor], w: Tensor) -> Tensor:
        theta = [p.detach().requires_grad_() for p in theta]
        gradient = torch.autograd.grad(model.losses[0](theta, w), theta, allow_unused=True, materialize_grads=True)
        stepped = [p - r * g for p, r, g in zip(theta, rates, gradient, strict=True)]
        return sum((a * p).sum() for a, p in zip(after, stepped, strict=True)).detach()

    adjoint, part = adjoint_step(model.losses[0](theta, w), theta, w, after, rates)
    for j, e in enumerate(torch.eye(3, dtype=torch.float64)):
        slope = (target(theta, w.detach() + h * e) - target(theta, w.detach() - h * e)) / (2 * h)
        torch.testing.assert_close(part[j], slope, rtol=1e-8, atol=1e-9)
    for i, p in enumerate(theta):
        e = torch.zeros_like(p)
        e.view(-1)[1] = h
        moved = [[q + sign * e if q is p else q for q in theta] for sign in (1, -1)]
        slope = (target(moved[0], w.detach()) - target(moved[1], w.detach())) / (2 * h)
        torch.testing.assert_close(adjoint[i].view(-1)[1], slope, rtol=1e-8, atol=1e-9)


def test_adjoint_step_through_a_loss_without_anything_to_differentiate() -> None:
    theta, w = torch.zeros(2, requires_grad=True), torch.ones(3, requires_grad=True)
    adjoint, part = adjoint_step(3 * theta.sum(), [theta], w, [torch.ones(2)], [0.1])
    assert adjoint[0].tolist() == [1, 1] and part.tolist() == [0, 0, 0]
    adjoint, part = adjoint_step((w[0] * theta).sum(), [theta], w, [torch.ones(2)], [0.1])
    assert adjoint[0].tolist() == [1, 1] and part.tolist() == pytest.approx([-0.2, 0, 0])


# The counter-example: both domains have the same Hessian, one target.
ETA, H, CENTRES, TARGET = 0.1, wide([1.0, 10.0]), wide([[0.0, 0.0], [1.0, 1.0]]), wide([2.5, -0.5])


def quadratic_loss(parameters: list[Tensor], weights: Tensor) -> Tensor:
    return 0.5 * (weights[:, None] * H * (parameters[0] - CENTRES).square()).sum()


def target_loss(parameters: list[Tensor]) -> Tensor:
    return 0.5 * (parameters[0] - TARGET).square().sum()


@pytest.mark.parametrize("num_steps", [1, 2, 5, 30])
def test_unrolled_hypergradient_at_equilibrium_in_closed_form(num_steps: int) -> None:
    w = wide([0.3, 0.7])
    theta = w @ CENTRES
    end, got = unrolled_hypergradient([quadratic_loss] * num_steps, target_loss, [theta], w, ETA)
    close(end[0], theta)
    looked_ahead = (1 - (1 - ETA * H) ** num_steps) / H
    close(got, -(H * (theta - CENTRES)) @ (looked_ahead * (theta - TARGET)))
    if num_steps == 1:
        close(got, -ETA * (H * (theta - CENTRES)) @ (theta - TARGET))


class CounterExample:
    """The same run in plain numbers: theta after T steps from theta_0 on w, and the two domains' hypergradients."""

    def __init__(self, num_inner: int) -> None:
        self.num_inner = num_inner
        self.theta, self.w = [0.5, 0.5], 0.5  # w of the second domain
        self.shrink = [(1 - ETA * h) ** num_inner for h in H.tolist()]
        self.slow = [num_inner * (1 - ETA * h) ** (num_inner - 1) * ETA * h for h in H.tolist()]

    def hypergradient(self) -> list[float]:
        start = self.theta
        self.theta = [self.w + a * (p - self.w) for a, p in zip(self.shrink, start, strict=True)]
        return [
            -sum(
                (p - v) * ((1 - a) * (self.w - c) + b * (s - self.w))
                for p, v, a, b, s in zip(self.theta, TARGET.tolist(), self.shrink, self.slow, start, strict=True)
            )
            for c in (0.0, 1.0)
        ]

    def run(self, num_steps: int, rule: str, rate: float) -> float:
        """Return the weight of the second domain after that many inner steps."""
        logit = 0.0
        for _ in range(num_steps // self.num_inner):
            first, second = self.hypergradient()
            if rule == "mirror":
                logit = max(logit - rate * (second - first), -700.0)
                self.w = 1 / (1 + math.exp(-logit))
            else:
                self.w = min(1.0, max(0.0, self.w - rate * (second - first) / 2))
        return self.w


@pytest.mark.parametrize("rule", RULES)
def test_recurrence_of_the_counter_example(rule: str) -> None:
    example = CounterExample(4)
    w, theta = wide([0.5, 0.5]), [wide([0.5, 0.5])]
    take = mirror_step if rule == "mirror" else projected_step
    for _ in range(12):
        theta, g = unrolled_hypergradient([quadratic_loss] * 4, target_loss, theta, w, ETA)
        w = take(w, g, 0.3)
    assert example.run(48, rule, 0.3) == pytest.approx(float(w[1]), abs=1e-12)
    assert example.theta == pytest.approx(theta[0].tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("num_inner", "expected"), [(1, 0.0), (2, 0.0), (5, 0.372), (10, 0.683), (20, 0.903), (50, 0.985)]
)
def test_looking_one_step_ahead_finds_the_worst_vertex(num_inner: int, expected: float) -> None:
    """The optimum is the second domain alone; the longer the look ahead, the closer the equilibrium is to it."""
    assert CounterExample(num_inner).run(20_000, "mirror", 0.1) == pytest.approx(expected, abs=1e-3)
    if num_inner in (5, 10):
        assert CounterExample(num_inner).run(2_000, "mirror", 0.1) == pytest.approx(expected, abs=1e-3)
    if num_inner < 50:  # there projected steps are the faster ones, and see further than 20,000 mirror steps
        assert CounterExample(num_inner).run(20_000, "projected", 0.1) == pytest.approx(expected, abs=1e-3)


def test_the_best_look_ahead_grows_with_the_logarithm_of_the_budget() -> None:
    budgets = [100, 300, 1000, 3000, 10_000]
    best = [min(range(5, 100), key=lambda t: 1 - CounterExample(t).run(num, "mirror", 1.0)) for num in budgets]
    assert all(later - earlier >= 5 for earlier, later in zip(best, best[1:], strict=False))
    # About 1 / log(1 / (1 - eta mu)) = 9.5 more for every factor e: it is not the square root of the budget.
    slope = (best[-1] - best[0]) / math.log(100)
    assert 6 < slope < 10
    assert best == pytest.approx([25, 30, 41, 50, 62], abs=5)


# ---------------------------------------------------------------------------------------------------------------------
# Draws


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=9), st.integers(0, 40))
def test_apportion(parts: list[float], num: int) -> None:
    credit = wide(parts)
    credit *= num / credit.sum()
    counts = apportion(credit, num)
    assert counts.dtype == torch.int64 and int(counts.sum()) == num
    assert float((counts - credit).abs().max()) < 1 + 1e-9
    # The largest remainders are rounded up.
    up = counts - credit.floor() > 0.5
    if up.any() and not up.all():
        assert float((credit - credit.floor())[up].min()) >= float((credit - credit.floor())[~up].max()) - 1e-9


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=9), st.integers(0, 12))
def test_apportion_of_negative_credits(parts: list[float], num: int) -> None:
    credit = wide(parts)
    credit += (num - credit.sum()) / len(parts)
    counts = apportion(credit, num)
    assert int(counts.sum()) == num and int(counts.min()) >= 0
    assume(float(credit.clamp(min=0).floor().sum()) <= num and float(credit.min()) > -1)
    assert float((counts - credit).abs().max()) < 1 + 1e-9


@pytest.mark.parametrize(
    ("credit", "num", "expected"),
    [
        ([1.5, 1.5, 1.0], 4, [2, 1, 1]),  # the first of a tie
        ([0.5, 0.5, 0.5, 0.5], 2, [1, 1, 0, 0]),
        ([-0.2, 1.1, 1.1], 2, [0, 1, 1]),
        ([-0.4, 1.2, 2.2, 0.0], 3, [0, 1, 2, 0]),
        ([-0.5, -0.5, 2.0, 2.0], 3, [0, 0, 1, 2]),  # one too many after raising: taken where the least was left
        ([-2.0, 5.0], 3, [0, 3]),  # several too many, of one domain
        ([2.0, 0.0, 1.0], 3, [2, 0, 1]),
        ([0.0, 0.0], 0, [0, 0]),
    ],
)
def test_apportion_by_hand(credit: list[float], num: int, expected: list[int]) -> None:
    assert apportion(wide(credit), num).tolist() == expected
