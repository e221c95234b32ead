"""Projections onto the simplex with a floor and onto probabilities of a bounded sum: against bisection and brute force, and by the
conditions that make a point the nearest one."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_bilevel.core.projections import kl_projection_simplex, projection_capped_simplex, projection_simplex

ENTRY = st.one_of(st.integers(-3, 3).map(float), st.floats(-50, 50), st.floats(-1e-3, 1e-3))
POINTS = st.lists(ENTRY, min_size=1, max_size=8)
SHARES = st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1))  # of the largest floor, 1 / M


def bisect(increasing, low: float, high: float) -> float:
    for _ in range(90):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < 0 else (low, middle)
    return (low + high) / 2


def nearest_by_bisection(point: Tensor, floor: float) -> Tensor:
    excess = point.double() - floor
    rest = 1 - len(point) * floor

    def missing(tau: float) -> float:
        return rest - float((excess - tau).clamp(min=0).sum())

    return (excess - bisect(missing, float(excess.min()) - 2, float(excess.max()) + 2)).clamp(min=0) + floor


def nearest_in_kl_by_bisection(weights: Tensor, floor: float) -> Tensor:
    scaled = weights.double() / weights.double().sum()
    c = bisect(lambda c: float((c * scaled).clamp(min=floor).sum()) - 1, 0.0, 2.0)
    return (c * scaled).clamp(min=floor)


def assert_on_the_simplex(weights: Tensor, floor: float, tolerance: float) -> None:
    assert float(weights.double().sum()) == pytest.approx(1, abs=tolerance * len(weights))
    assert float(weights.min()) >= floor - tolerance


@settings(max_examples=50)
@given(POINTS, SHARES)
def test_euclidean_against_bisection(entries: list[float], share: float) -> None:
    point, floor = torch.tensor(entries, dtype=torch.float64), share / len(entries)
    projected = projection_simplex(point, floor)
    assert_on_the_simplex(projected, floor, 1e-13)
    torch.testing.assert_close(projected, nearest_by_bisection(point, floor), rtol=0, atol=1e-12)


@given(POINTS, SHARES, st.sampled_from([torch.float32, torch.float64]))
def test_euclidean_conditions(entries: list[float], share: float, dtype: torch.dtype) -> None:
    """What is above the floor was moved by one shift, and nothing at the floor by less."""
    point, floor = torch.tensor(entries, dtype=dtype), share / len(entries)
    projected = projection_simplex(point, floor)
    assert projected.dtype == dtype
    tolerance = 1e3 * torch.finfo(dtype).eps
    assert_on_the_simplex(projected, floor, tolerance)
    shift, above = point - projected, projected > floor + tolerance
    if above.any():
        assert float(shift[above].max() - shift[above].min()) <= tolerance
        assert float(shift.max()) <= float(shift[above].max()) + tolerance
    torch.testing.assert_close(projection_simplex(projected, floor), projected, rtol=0, atol=tolerance)


# Zeros, ties, and numbers over many magnitudes; at least one is positive.
MASSES = st.lists(st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-6, 1e3)), min_size=1, max_size=8).filter(any)


@settings(max_examples=60)
@given(MASSES, SHARES, st.sampled_from([torch.float32, torch.float64]))
def test_kl_against_bisection_and_conditions(entries: list[float], share: float, dtype: torch.dtype) -> None:
    weights, floor = torch.tensor(entries, dtype=dtype), share / len(entries)
    projected = kl_projection_simplex(weights, floor)
    assert projected.dtype == dtype
    tolerance = 1e2 * torch.finfo(dtype).eps
    assert_on_the_simplex(projected, floor, tolerance)
    expected = nearest_in_kl_by_bisection(weights, floor)
    torch.testing.assert_close(projected.double(), expected, rtol=0, atol=tolerance)
    above = projected > floor + tolerance
    if above.any():
        # The conditions: one factor for all above the floor, and none at the floor below its own.
        factor = projected[above] / weights[above]
        torch.testing.assert_close(
            factor, factor.mean().expand_as(factor), rtol=2 * tolerance / max(floor, 0.01), atol=0
        )
        assert (weights * factor.mean() <= projected * (1 + tolerance) + tolerance).all()


@pytest.mark.parametrize("project", [projection_simplex, kl_projection_simplex])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("floor", [0.0, 5e-4, 1e-3])  # 1e-3 = 1 / M leaves one point only
def test_a_thousand_domains(project, dtype: torch.dtype, floor: float) -> None:
    entries = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).pow(4).to(dtype)
    projected = project(entries, floor)
    brute = nearest_by_bisection if project is projection_simplex else nearest_in_kl_by_bisection
    tolerance = 1e-5 if dtype == torch.float32 else 1e-14
    assert_on_the_simplex(projected, floor, tolerance / 10)
    torch.testing.assert_close(projected.double(), brute(entries, floor), rtol=0, atol=tolerance)
    if floor == 1e-3:
        torch.testing.assert_close(projected, torch.full_like(projected, 1e-3), rtol=0, atol=tolerance)


def test_a_domain_without_mass_gets_the_floor() -> None:
    assert kl_projection_simplex(torch.tensor([0.0, 0.0, 2.0])).tolist() == [0, 0, 1]
    assert kl_projection_simplex(torch.tensor([0.0, 0.0, 2.0]), 0.25).tolist() == [0.25, 0.25, 0.5]
    assert (
        projection_simplex(torch.tensor([7.0])).tolist() == kl_projection_simplex(torch.tensor([7.0])).tolist() == [1]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Probabilities whose sum is at most K

# Ties, entries that are breaks of one another (they differ by 1), and numbers over many magnitudes.
CAPPED_ENTRY = st.one_of(st.integers(-2, 3).map(float), st.integers(-4, 8).map(lambda i: i / 4), st.floats(-50, 50))
CAPPED_POINTS = st.lists(st.one_of(CAPPED_ENTRY, st.floats(0, 1), st.floats(-1e-9, 1e-9)), min_size=1, max_size=8)
SIZES = st.one_of(st.integers(0, 9).map(float), st.floats(0, 9))


def nearest_by_enumeration(point: list[float], size: float) -> list[float]:
    """Try every way to hold entries at 0 or 1 and to move the rest by one shift or none, in exact arithmetic."""
    x, bound = [Fraction(value) for value in point], Fraction(size)
    nearest, best = [], Fraction(10**9)
    for held in itertools.product([Fraction(0), Fraction(1), None], repeat=len(x)):
        free = [value for value, hold in zip(x, held, strict=True) if hold is None]
        rest = bound - sum(hold for hold in held if hold is not None)
        for shift in {Fraction(0), (sum(free) - rest) / len(free)} if free else {Fraction(0)}:
            candidate = [value - shift if hold is None else hold for value, hold in zip(x, held, strict=True)]
            distance = sum((c - value) ** 2 for c, value in zip(candidate, x, strict=True))
            if distance < best and min(candidate) >= 0 and max(candidate) <= 1 and sum(candidate) <= bound:
                nearest, best = candidate, distance
    return [float(value) for value in nearest]


@settings(max_examples=50)
@given(st.lists(CAPPED_ENTRY, min_size=1, max_size=4), SIZES)
def test_capped_against_enumeration(entries: list[float], size: float) -> None:
    projected = projection_capped_simplex(torch.tensor(entries, dtype=torch.float64), size)
    assert projected.tolist() == pytest.approx(nearest_by_enumeration(entries, size), rel=0, abs=1e-13)


@settings(max_examples=120)
@given(CAPPED_POINTS, SIZES, st.sampled_from([torch.float32, torch.float64]))
def test_capped_conditions(entries: list[float], size: float, dtype: torch.dtype) -> None:
    """What lies between 0 and 1 was lowered by one multiplier, which is 0 unless the sum is K; what is at 1 by no less, at 0 by no more."""
    point = torch.tensor(entries, dtype=dtype)
    projected = projection_capped_simplex(point, size)
    assert projected.dtype == dtype
    tolerance = 1e2 * torch.finfo(dtype).eps
    assert 0 <= float(projected.min()) and float(projected.max()) <= 1
    total = float(projected.double().sum())
    assert total <= size + tolerance
    lowered = point.double() - projected.double()
    least = max([0.0, *lowered[projected < 1].tolist()])
    most = min([math.inf, *lowered[projected > 0].clamp(min=0).tolist()])
    assert least <= most + tolerance
    if total < size - tolerance:
        assert least <= tolerance
    again = projection_capped_simplex(projected, size)
    torch.testing.assert_close(again, projected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("point", "size", "expected"),
    [
        ([0.25, 0.375, -1.0], 2, [0.25, 0.375, 0]),  # already few
        ([0.5, 0.5, 1.0], 2, [0.5, 0.5, 1]),  # exactly K
        ([-3.0, -1.0], 1, [0, 0]),
        ([5.0, 7.0, 1.5], 3, [1, 1, 1]),  # K = n
        ([5.0, 7.0, 1.5], 9, [1, 1, 1]),
        ([5.0, 7.0, -0.5], 0, [0, 0, 0]),
        ([0.0, 0.0], 0, [0, 0]),
        ([4.0, 4.0, 4.0, 4.0], 1, [0.25] * 4),  # one tie
        ([9.0, 2.0, 2.0, 0.0], 1.5, [1, 0.25, 0.25, 0]),
        ([9.0, 4.0, 2.0, -3.0], 2, [1, 1, 0, 0]),  # the sum is K over a whole range of shifts
        ([3.0, 2.5, 1.0], 0.5, [0.5, 0, 0]),
        ([2.0, 1.0, 0.0], 1.5, [1, 0.5, 0]),  # the breaks of one are those of another
        ([-1e20, 1.0, 0.75], 1.25, [0, 0.75, 0.5]),  # what is far below 0 spoils no sum
        ([7.0], 0.25, [0.25]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_capped_by_hand(point: list[float], size: float, expected: list[float], dtype: torch.dtype) -> None:
    assert projection_capped_simplex(torch.tensor(point, dtype=dtype), size).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.5, 1, 777.25, 8_000])
def test_capped_ten_thousand_entries(size: float, dtype: torch.dtype) -> None:
    """Bisection as the other answer; some entries are far outside, as a step along a steep gradient leaves them."""
    generator = torch.Generator().manual_seed(1)
    point = torch.randn(10_000, generator=generator, dtype=torch.float64).add(1.5)
    point[:50] *= 1e7
    point = point.to(dtype)
    wide = point.double()
    shift = bisect(lambda v: size - float((wide - v).clamp(0, 1).sum()), 0.0, float(wide.max()))
    expected = (wide - shift).clamp(0, 1)
    projected = projection_capped_simplex(point, size)
    # Where v is millions, float64 knows it, and x, to a few billionths.
    tolerance = 4 * torch.finfo(torch.float64).eps * max(shift, 1e3) + (1e-7 if dtype == torch.float32 else 0)
    torch.testing.assert_close(projected.double(), expected, rtol=0, atol=tolerance)
    assert float(projected.double().sum()) == pytest.approx(size, abs=1e-6 if dtype == torch.float64 else 1e-4)


def test_capped_leaves_its_argument_alone() -> None:
    point = torch.tensor([3.0, 0.5, -1.0], dtype=torch.float64)
    projection_capped_simplex(point, 0.75)
    assert point.tolist() == [3.0, 0.5, -1.0]


def test_capped_does_not_wait_for_the_device() -> None:
    """A tensor without values cannot be asked for one."""
    point = torch.empty(10, device="meta")
    assert projection_capped_simplex(point, 2).shape == (10,)
    with pytest.raises(RuntimeError, match="item"):
        point[point.argmax()]
