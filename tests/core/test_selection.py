"""Selection: against brute force on small batches, and against the exact hypergradient of ridge regression."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import ROUND_CEILING, Decimal
from functools import partial

import pytest
import torch
from exact_answers import RidgeBilevel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_bilevel.core.selection import (
    SelectionTally,
    excess_loss,
    num_selected,
    synchronisation_schedule,
    top_units,
)

assert_exact = partial(torch.testing.assert_close, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# num_selected


@given(st.integers(1, 10_000), st.integers(0, 3_000_000))
def test_num_selected_is_the_ceiling_in_decimal_arithmetic(ten_thousandths: int, num_units: int) -> None:
    text = f"{ten_thousandths / 10_000:.4f}"
    expected = int((Decimal(text) * num_units).to_integral_value(ROUND_CEILING))
    assert num_selected(float(text), num_units) == expected
    assert 0 <= expected <= num_units


def test_num_selected_where_floating_point_is_off_by_one() -> None:
    cases = [(0.1, 30, 3), (0.7, 10, 7), (0.55, 100, 55), (0.6, 5, 3), (0.07, 100, 7)]
    assert any(math.ceil(ratio * num) != expected for ratio, num, expected in cases)  # else this test is vacuous
    for ratio, num, expected in cases:
        assert num_selected(ratio, num) == expected


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, [0, 1, 2, 7]), (1 / 3, [0, 1, 1, 3]), (0.001, [0, 1, 1, 1])])
def test_num_selected_by_hand(ratio: float, expected: list[int]) -> None:
    assert [num_selected(ratio, num) for num in (0, 1, 2, 7)] == expected


@given(st.floats(0.001, 1.0), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6))
def test_num_selected_agrees_for_ints_and_tensors(ratio: float, nums: list[int]) -> None:
    expected = [num_selected(ratio, num) for num in nums]
    assert all(isinstance(value, int) for value in expected)
    for shape in ((len(nums),), (1, len(nums))):
        # int32 too: the product with the numerator does not fit into it.
        for dtype in (torch.int32, torch.int64):
            result = num_selected(ratio, torch.tensor(nums, dtype=dtype).view(shape))
            assert result.dtype == torch.int64 and result.shape == shape
            assert result.flatten().tolist() == expected
    assert num_selected(ratio, torch.tensor(nums[0])).ndim == 0


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_num_selected_rejects(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"`selection_ratio` must be in \(0, 1\], got {ratio}"):
        num_selected(ratio, 4)


# ---------------------------------------------------------------------------------------------------------------------
# excess_loss


def test_excess_loss_by_hand() -> None:
    proxy, reference = torch.tensor([[2.0, 1.0], [0.5, 0.0]]), torch.tensor([[0.5, 3.0], [0.5, 0.25]])
    assert_exact(excess_loss(proxy, reference), torch.tensor([[1.5, -2.0], [0.0, -0.25]]))


def test_excess_loss_is_detached() -> None:
    proxy, reference = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    assert not excess_loss(proxy, reference).requires_grad


@pytest.mark.parametrize(
    ("proxy_dtype", "reference_dtype", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_excess_loss_is_computed_wide(
    proxy_dtype: torch.dtype, reference_dtype: torch.dtype, expected: torch.dtype
) -> None:
    # In half precision 10 - 2**-9 rounds to 10.
    excess = excess_loss(torch.tensor([10.0], dtype=proxy_dtype), torch.tensor([2.0**-9], dtype=reference_dtype))
    assert_exact(excess, torch.tensor([10 - 2.0**-9], dtype=expected))


def test_excess_loss_rejects_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"must have one shape, got \(2, 1\) and \(2,\)"):
        excess_loss(torch.zeros(2, 1), torch.zeros(2))


# ---------------------------------------------------------------------------------------------------------------------
# top_units


def brute_force_top_units(scores: list[float], eligible: list[bool], num: int) -> list[bool]:
    """Sort Python tuples: highest score first, then lowest index."""
    candidates = [(-score, i) for i, score in enumerate(scores) if eligible[i] and math.isfinite(score)]
    kept = {i for _, i in sorted(candidates)[:num]}
    return [i in kept for i in range(len(scores))]


@st.composite
def scored_batches(draw: st.DrawFn) -> tuple[list[float], list[bool], int]:
    """Scores (from a coarse grid half of the time, so that ties are common), eligibility, and how many to keep."""
    n = draw(st.integers(1, 24))
    grid = st.sampled_from([-1.0, -0.0, 0.0, 0.25, 1.0, float("nan"), float("inf"), float("-inf")])
    entry = draw(st.sampled_from([grid, st.one_of(grid, st.floats(width=32))]))
    scores = draw(st.lists(entry, min_size=n, max_size=n))
    return scores, draw(st.lists(st.booleans(), min_size=n, max_size=n)), draw(st.integers(0, n + 3))


@given(scored_batches())
def test_top_units_matches_brute_force(problem: tuple[list[float], list[bool], int]) -> None:
    scores, eligible, num = problem
    expected = torch.tensor(brute_force_top_units(scores, eligible, num))
    score_tensor, eligible_tensor = torch.tensor(scores), torch.tensor(eligible)
    kept = top_units(score_tensor, eligible_tensor, num)
    assert kept.dtype == torch.bool
    assert torch.equal(kept, expected)
    # The documented properties, said without the oracle.
    assert not (kept & ~eligible_tensor).any()
    assert not (kept & ~score_tensor.isfinite()).any()
    assert kept.sum() == min(num, int((eligible_tensor & score_tensor.isfinite()).sum()))
    # Any shape, and the count as a tensor.
    for shape in ((len(scores), 1), (1, len(scores))):
        for count in (num, torch.tensor(num), torch.tensor([num])):
            again = top_units(score_tensor.view(shape), eligible_tensor.view(shape), count)
            assert again.shape == shape and torch.equal(again.flatten(), expected)


def test_top_units_breaks_ties_by_the_order_of_large_batches() -> None:
    # Unstable sorts are stable by accident below a few dozen entries.
    scores = torch.randint(0, 3, (64, 100), generator=torch.Generator().manual_seed(0)).float()
    eligible = torch.rand(64, 100, generator=torch.Generator().manual_seed(1)) < 0.8
    expected = brute_force_top_units(scores.flatten().tolist(), eligible.flatten().tolist(), 2_000)
    assert torch.equal(top_units(scores, eligible, 2_000).flatten(), torch.tensor(expected))


def test_top_units_is_for_the_layout_in_memory_order_of_the_tensor() -> None:
    scores = torch.zeros(3, 4).T  # not contiguous: the order is that of its rows all the same
    kept = top_units(scores, torch.ones(4, 3, dtype=torch.bool), 4)
    assert kept.tolist() == [[True, True, True], [True, False, False], [False] * 3, [False] * 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_top_units_leaves_its_arguments_alone(dtype: torch.dtype) -> None:
    scores, eligible = (
        torch.tensor([3.0, float("nan"), 1.0, 2.0], dtype=dtype),
        torch.tensor([True, True, True, False]),
    )
    before = scores.clone(), eligible.clone()
    assert top_units(scores, eligible, 2).tolist() == [True, False, True, False]
    torch.testing.assert_close((scores, eligible), before, rtol=0, atol=0, equal_nan=True)


def test_top_units_of_nothing() -> None:
    assert top_units(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 3).shape == (0,)
    assert not top_units(torch.ones(3), torch.zeros(3, dtype=torch.bool), 3).any()
    assert not top_units(torch.full((3,), float("nan")), torch.ones(3, dtype=torch.bool), 3).any()


# ---------------------------------------------------------------------------------------------------------------------
# The published claim, on ridge regression


@pytest.fixture(scope="module")
def ridge() -> RidgeBilevel:
    return RidgeBilevel.random(num_train=40, num_target=20, dim=6, ridge=0.1, seed=0)


def uneven_weights(num: int) -> Tensor:
    return 0.5 + torch.rand(num, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_ridge_solutions_are_stationary(ridge: RidgeBilevel) -> None:
    alpha = uneven_weights(len(ridge.x))
    u = ridge.lower_solution(alpha).requires_grad_()
    w = ridge.reference_solution(alpha, penalty=3.0).requires_grad_()
    zero = torch.zeros_like(u)
    torch.testing.assert_close(torch.autograd.grad(ridge.lower_loss(alpha, u), u)[0], zero, rtol=0, atol=1e-12)
    objective = ridge.upper_loss(w) + 3.0 * ridge.lower_loss(alpha, w)
    torch.testing.assert_close(torch.autograd.grad(objective, w)[0], zero, rtol=0, atol=1e-12)
    assert (u - w).norm() > 1e-2  # the two models differ, or nothing below means anything


def test_ridge_hypergradient_matches_central_differences(ridge: RidgeBilevel) -> None:
    alpha, step = uneven_weights(len(ridge.x)), 1e-5
    differences = torch.stack(
        [
            (
                ridge.upper_loss(ridge.lower_solution(alpha + step * unit))
                - ridge.upper_loss(ridge.lower_solution(alpha - step * unit))
            )
            / (2 * step)
            for unit in torch.eye(len(alpha), dtype=torch.float64)
        ]
    )
    exact = ridge.hypergradient(alpha)
    assert exact.abs().max() > 1e-3
    torch.testing.assert_close(exact, differences, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_excess_loss_tends_to_the_exact_hypergradient(seed: int) -> None:
    """The derivative of the penalised objective by alpha is lambda (l(w) - l(u)) / N, and tends to df(u*)/dalpha."""
    ridge = RidgeBilevel.random(num_train=40, num_target=20, dim=6, ridge=0.1, seed=seed)
    alpha = torch.ones(len(ridge.x), dtype=torch.float64)
    exact = ridge.hypergradient(alpha)
    proxy_losses = ridge.sample_losses(ridge.lower_solution(alpha))

    cosines, relative_errors = [], []
    for penalty in (1.0, 10.0, 100.0, 1e4):
        reference_losses = ridge.sample_losses(ridge.reference_solution(alpha, penalty))
        penalised = -penalty * excess_loss(proxy_losses, reference_losses) / len(alpha)
        cosines.append(torch.cosine_similarity(penalised, exact, dim=0).item())
        relative_errors.append(((penalised - exact).norm() / exact.norm()).item())
    assert cosines == sorted(cosines)
    assert cosines[1] >= 0.99 and cosines[2] > 0.9999 and cosines[3] > 1 - 1e-8
    # Not only the direction: the value too, at the rate 1 / lambda.
    assert relative_errors == sorted(relative_errors, reverse=True)
    assert relative_errors[3] == pytest.approx(relative_errors[2] / 100, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_selected_set_is_that_of_the_exact_hypergradient(seed: int) -> None:
    ridge = RidgeBilevel.random(num_train=40, num_target=20, dim=6, ridge=0.1, seed=seed)
    alpha = torch.ones(len(ridge.x), dtype=torch.float64)
    everything, num = torch.ones(len(alpha), dtype=torch.bool), num_selected(0.6, len(alpha))

    def selected(penalty: float) -> Tensor:
        u, w = ridge.lower_solution(alpha), ridge.reference_solution(alpha, penalty)
        return top_units(excess_loss(ridge.sample_losses(u), ridge.sample_losses(w)), everything, num)

    # More weight on a sample with a negative hypergradient lowers the target loss.
    most_helpful = set(ridge.hypergradient(alpha).argsort()[:24].tolist())
    assert num == 24
    assert set(selected(1e4).nonzero().flatten().tolist()) == most_helpful
    # Keeping by the loss alone would keep another set, so agreement is not a matter of course.
    highest_loss = top_units(ridge.sample_losses(ridge.lower_solution(alpha)), everything, num)
    assert set(highest_loss.nonzero().flatten().tolist()) != most_helpful


# ---------------------------------------------------------------------------------------------------------------------
# synchronisation_schedule


@pytest.mark.parametrize(
    ("sync_steps", "reference_steps", "max_steps", "expected"),
    [
        (None, None, 5_000, (1_000, 80)),
        (None, None, 2_000, (400, 32)),
        (None, None, 10**7, (1_000, 80)),  # never more than 1,000 apart
        (None, None, 5_001, (834, 67)),  # and no last one for a single step
        (None, None, 1_001, (201, 20)),  # rounded up
        (None, None, 101, (40, 20)),  # never so close that the reference hardly moves
        (None, None, 25, (25, 20)),
        (None, None, 1, (1, 1)),
        (700, None, 10, (700, 56)),
        (None, 3, 1_000, (200, 3)),
        (2, None, 1_000, (2, 2)),
        (1, None, 1_000, (1, 1)),
        (1_000, 300, 5_000, (1_000, 300)),  # as published
    ],
)
def test_synchronisation_schedule(
    sync_steps: int | None, reference_steps: int | None, max_steps: int, expected: tuple[int, int]
) -> None:
    assert synchronisation_schedule(sync_steps, reference_steps, max_steps) == expected


@given(st.integers(1, 10**9))
def test_automatic_schedule_keeps_its_promises(max_steps: int) -> None:
    sync_steps, reference_steps = synchronisation_schedule(None, None, max_steps)
    assert 1 <= reference_steps <= sync_steps <= min(1_000, max_steps)
    assert -(-max_steps // sync_steps) >= min(5, max_steps // 40) * 0.5 and sync_steps >= min(40, max_steps)
    assert abs(reference_steps - max(0.08 * sync_steps, min(sync_steps, 20))) <= 0.5


@given(st.integers(1_000, 10**9))
def test_automatic_schedule_is_affordable(max_steps: int) -> None:
    """The whole of token-level selection costs at most 1.45 plain steps where runs are not short."""
    sync_steps, reference_steps = synchronisation_schedule(None, None, max_steps)
    phases = -(-max_steps // sync_steps)
    assert 4 / 3 + phases * reference_steps / max_steps <= 1.44


# ---------------------------------------------------------------------------------------------------------------------
# SelectionTally


class BruteForceTally:
    """Count in dicts, one unit at a time."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[int, float]] = {field: {} for field in SelectionTally.fields}

    def update(self, ids: list[int], *columns: list[float]) -> None:
        for field, column in zip(SelectionTally.fields, columns, strict=True):
            for i, value in zip(ids, column, strict=True):
                self.counts[field][i] = self.counts[field].get(i, 0.0) + value

    def table(self, field: str, num_ids: int) -> Tensor:
        return torch.tensor([self.counts[field].get(i, 0.0) for i in range(num_ids)], dtype=torch.float64)


Update = tuple[list[int], list[int], list[int], list[float]]


@st.composite
def updates(draw: st.DrawFn) -> list[Update]:
    """A few candidate batches; ids repeat within and across them. Scores are multiples of 1/4, so sums are exact."""
    batches = []
    for _ in range(draw(st.integers(0, 6))):
        n = draw(st.integers(0, 5))
        columns = [
            draw(st.lists(entry, min_size=n, max_size=n))
            for entry in (
                st.integers(0, 9),
                st.integers(0, 5),
                st.integers(0, 5),
                st.integers(-20, 20).map(lambda quarter: quarter / 4),
            )
        ]
        batches.append(tuple(columns))
    return batches


def tensors(update: Update) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids, offered, selected, score_sum = update
    return (
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(offered, dtype=torch.int64),
        torch.tensor(selected, dtype=torch.int64),
        torch.tensor(score_sum, dtype=torch.float32),
    )


def assert_equals(tally: SelectionTally, expected: BruteForceTally) -> None:
    state = tally.state_dict()
    assert set(state) == set(SelectionTally.fields)
    for field in SelectionTally.fields:
        assert state[field].dtype == torch.float64
        assert_exact(state[field], expected.table(field, len(tally)))


@given(updates(), st.sampled_from([0, 3, 20]), st.sampled_from([1, 2, 64]))
def test_tally_matches_dicts(batches: list[Update], num_ids: int, flush_every: int) -> None:
    tally, expected = SelectionTally(num_ids, flush_every), BruteForceTally()
    for batch in batches:
        tally.update(*tensors(batch))
        expected.update(*batch)
    tally.flush()
    largest = max((i for ids, *_ in batches for i in ids), default=-1)
    assert len(tally) == max(num_ids, largest + 1)
    assert_equals(tally, expected)


class AllReduce:
    """Sum tables over two threads that play two processes."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)
        self._tables: list[Tensor] = [torch.empty(0)] * 2

    def __call__(self, rank: int, table: Tensor) -> Tensor:
        self._tables[rank] = table
        self._barrier.wait(timeout=10)
        total = self._tables[0] + self._tables[1]
        self._barrier.wait(timeout=10)
        return total


@settings(max_examples=50)
@given(updates(), updates(), updates(), st.sampled_from([1, 64]))
def test_tally_merges_only_what_is_new(
    mine: list[Update], theirs: list[Update], later: list[Update], flush_every: int
) -> None:
    """Two processes, two merges, and a third without anything new: every update is counted once."""
    tallies = SelectionTally(10, flush_every), SelectionTally(10, flush_every)
    expected = BruteForceTally()

    def count(rank: int, batches: list[Update]) -> None:
        for batch in batches:
            tallies[rank].update(*tensors(batch))
            expected.update(*batch)

    def merge() -> None:
        all_reduce = AllReduce()
        with ThreadPoolExecutor(2) as pool:
            merges = [pool.submit(tally.merge, partial(all_reduce, rank)) for rank, tally in enumerate(tallies)]
        for done in merges:
            done.result()

    count(0, mine)
    count(1, theirs)
    merge()
    for tally in tallies:
        assert_equals(tally, expected)
    count(1, later)
    merge()
    merge()
    for tally in tallies:
        assert_equals(tally, expected)


def one_unit(sample_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one = torch.tensor([1])
    return torch.tensor([sample_id]), one, one, torch.tensor([0.5])


def test_reduce_sees_only_what_was_counted_since_the_last_merge() -> None:
    tally, seen = SelectionTally(3), []

    def reduce(table: Tensor) -> Tensor:
        seen.append(table.tolist())
        return 2 * table  # another process counted the same

    tally.update(*one_unit(1))
    tally.merge(reduce)
    tally.update(*one_unit(2))
    tally.merge(reduce)
    assert seen == [[0, 1, 0]] * 2 + [[0, 0.5, 0]] + [[0, 0, 1]] * 2 + [[0, 0, 0.5]]
    assert tally.state_dict()["offered"].tolist() == [0, 2, 2]
    assert tally.state_dict()["score_sum"].tolist() == [0, 1, 1]


def test_tally_grows_and_never_shrinks() -> None:
    tally = SelectionTally(2)
    tally.update(*one_unit(0))
    tally.merge(lambda table: table)
    tally.update(*one_unit(6))
    tally.flush()
    assert len(tally) == 7
    tally.grow(4)
    assert len(tally) == 7
    tally.grow(9)
    assert len(tally) == 9
    assert tally.state_dict()["offered"].tolist() == [1, 0, 0, 0, 0, 0, 1, 0, 0]


def test_tally_holds_updates_back_until_they_are_due() -> None:
    tally = SelectionTally(0, flush_every=3)
    lengths = []
    for sample_id in range(4):
        tally.update(*one_unit(sample_id))
        lengths.append(len(tally))
    assert lengths == [0, 0, 3, 3]


def test_one_process_keeps_one_set_of_tables() -> None:
    """What a process restores as its own is kept once, and is a copy of the state."""
    tally = SelectionTally(3)
    tally.update(*one_unit(1))
    state = tally.state_dict()
    alone = SelectionTally(3)
    alone.load_state_dict(state, merged=False)
    alone.update(*one_unit(1))
    assert state["offered"].tolist() == [0, 1, 0] and alone.state_dict()["offered"].tolist() == [0, 2, 0]
    assert tally._merged is None and alone._merged is None


@given(updates(), updates(), updates())
def test_restored_tally_counts_on_without_counting_twice(
    merged: list[Update], own: list[Update], later: list[Update]
) -> None:
    tally, expected = SelectionTally(10), BruteForceTally()
    for batch in merged:
        tally.update(*tensors(batch))
        expected.update(*batch)
    tally.merge(lambda table: table)
    for batch in own:
        tally.update(*tensors(batch))
        expected.update(*batch)

    state = {field: table.clone() for field, table in tally.state_dict().items()}
    restored = SelectionTally(2)
    for batch in later:  # what it held before, pending or not, is replaced
        restored.update(*tensors(batch))
    restored.load_state_dict(state)
    assert_equals(restored, expected)
    for batch in later:
        restored.update(*tensors(batch))
        expected.update(*batch)
    assert_equals(restored, expected)
    # A second process that loaded the same state and counted nothing since contributes nothing.
    idle = SelectionTally()
    idle.load_state_dict(state)
    idle.flush()
    contributions: list[Tensor] = []
    idle.merge(lambda table: (contributions.append(table), table)[1])
    assert not any(contribution.any() for contribution in contributions)
    restored.merge(lambda table: table)
    assert_equals(restored, expected)
    # The state is a copy, in both directions.
    for field, table in tally.state_dict().items():
        assert_exact(state[field], table)
