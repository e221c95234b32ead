"""Projections onto the simplex with a floor: against bisection, and by the conditions that make a point the nearest one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_bilevel.core.projections import kl_projection_simplex, projection_simplex

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
