"""Subspaces and Hessian-action estimators: means over all subspaces and all signs, computed exactly."""

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial

import pytest
import torch
from exact_answers import CoupledHessian, exact_bases, mean_projected_twice, restricted_on_both_sides
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_bilevel.core.subspace import (
    bi_probe,
    carry_over,
    coverage,
    haar_basis,
    lift,
    one_sided,
    refresh_schedule,
    restrict,
    two_sided,
)

assert_exact = partial(torch.testing.assert_close, rtol=0, atol=0)
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=1e-12)

Bases = list[Tensor | None]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mean(blocks: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(values).mean(0) for values in zip(*blocks, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# The means that the tests below rest on


@pytest.mark.parametrize(("dim", "rank"), [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3)])
def test_exact_bases_have_the_moments_of_all_subspaces(dim: int, rank: int) -> None:
    """E[Q] and E[Q A Q] for every A say what the mean of any quadratic function of Q is."""
    bases = torch.stack(exact_bases(dim, rank))
    scaled_identity = torch.eye(rank, dtype=torch.float64).expand(len(bases), -1, -1) * dim / rank
    assert_equal(bases.mT @ bases, scaled_identity)
    projections = bases @ bases.mT
    assert_equal(projections.mean(0), torch.eye(dim, dtype=torch.float64))
    for unit in torch.eye(dim * dim, dtype=torch.float64).view(-1, dim, dim):
        assert_equal((projections @ unit @ projections).mean(0), mean_projected_twice(unit, rank))


# ---------------------------------------------------------------------------------------------------------------------
# haar_basis


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)],
)
@pytest.mark.parametrize(("dim", "rank"), [(1, 1), (7, 1), (7, 3), (7, 7)])
def test_columns_are_orthogonal_and_scaled(dim: int, rank: int, dtype: torch.dtype, tolerance: float) -> None:
    basis = haar_basis(dim, rank, seeded(0), dtype)
    assert basis.shape == (dim, rank) and basis.dtype == dtype and basis.device.type == "cpu"
    wide = basis.double()
    gram = torch.eye(rank, dtype=torch.float64) * dim / rank
    torch.testing.assert_close(wide.T @ wide, gram, rtol=0, atol=tolerance * dim / rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    assert_exact(haar_basis(7, 3, seeded(0), dtype), haar_basis(7, 3, seeded(0)).to(dtype))


def test_basis_is_a_function_of_the_generator_alone() -> None:
    generator, before = seeded(3), torch.get_rng_state()
    first, second = haar_basis(6, 2, generator), haar_basis(6, 2, generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.dtype == torch.float32 and not torch.equal(first, second)
    torch.manual_seed(17)
    assert_exact(haar_basis(6, 2, seeded(3)), first)
    assert not torch.equal(haar_basis(6, 2, seeded(4)), first)


def test_basis_is_distributed_by_the_haar_measure() -> None:
    """Its first moments are zero, and those of the projection are those of all subspaces, to 5 standard errors."""
    dim, rank, num = 4, 2, 4_000
    generator = seeded(0)
    bases = torch.stack([haar_basis(dim, rank, generator, torch.float64) for _ in range(num)])
    projections = bases @ bases.mT
    # Every entry has variance 1 / rank. Without the signs of R one of them has mean -0.6.
    assert bases.mean(0).abs().max() < 5 / math.sqrt(rank * num)
    a = torch.arange(16, dtype=torch.float64).view(4, 4).cos()
    assert (a - a.T).norm() > 1 and (mean_projected_twice(a, rank) - a).norm() > 0.5
    left = haar_basis(dim, dim, seeded(1), torch.float64)  # a fixed rotation, which must not matter
    for samples, expected in [
        (projections, torch.eye(dim, dtype=torch.float64)),
        (projections @ a @ projections, mean_projected_twice(a, rank)),
        # From one column to the other: E[p_1 p_2'] = 0, and fourth moments of one column.
        (bases[:, :, :1] @ bases[:, :, 1:].mT, torch.zeros(dim, dim, dtype=torch.float64)),
        ((left @ bases)[:, :, 0].pow(4), torch.full((dim,), (dim / rank) ** 2 * 3 / (dim * (dim + 2)))),
        (bases[:, :, 1].pow(4), torch.full((dim,), (dim / rank) ** 2 * 3 / (dim * (dim + 2)))),
    ]:
        standard_error = samples.std(0) / math.sqrt(num)
        assert (samples.mean(0) - expected).abs().sub(5 * standard_error).max() < 0
        assert 0 < standard_error.max() < 0.05


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_haar_basis_rejects(rank: int) -> None:
    with pytest.raises(ValueError, match=f"The rank must be from 1 to the dimension 6, got {rank}."):
        haar_basis(6, rank, seeded(0))


# ---------------------------------------------------------------------------------------------------------------------
# restrict, lift

SHAPES = [(2, 4), (4,), (3, 5), (2, 2, 3), ()]


def test_restrict_and_lift_by_hand() -> None:
    matrix, basis = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[1.0, 0], [0, 2], [0, 0]])
    vector = torch.tensor([7.0, 8.0, 9.0])
    coordinates = restrict([matrix, vector], [basis, None])
    assert_exact(coordinates, [torch.tensor([[1.0, 4.0], [4.0, 10.0]]), vector])
    assert_exact(lift(coordinates, [basis, None]), [torch.tensor([[1.0, 8.0, 0.0], [4.0, 20.0, 0.0]]), vector])


def test_lift_is_the_adjoint_of_restrict() -> None:
    bases = [haar_basis(4, 2, seeded(0), torch.float64), None, haar_basis(5, 1, seeded(1), torch.float64), None, None]
    generator = seeded(2)
    full = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    inside = [torch.randn(block.shape, generator=generator, dtype=torch.float64) for block in restrict(full, bases)]
    assert [block.shape for block in inside] == [(2, 2), (4,), (3, 1), (2, 2, 3), ()]
    assert [block.shape for block in lift(inside, bases)] == SHAPES
    for a, b, c, d in zip(restrict(full, bases), inside, full, lift(inside, bases), strict=True):
        assert abs((a * b).sum() - (c * d).sum()) < 1e-12 and (a * b).sum().abs() > 1e-3


def test_blocks_without_a_basis_are_handed_through() -> None:
    blocks = [torch.ones(shape) for shape in SHAPES]
    for function in (restrict, lift):
        assert all(a is b for a, b in zip(function(blocks, [None] * len(blocks)), blocks, strict=True))


def test_blocks_and_bases_must_be_as_many() -> None:
    for function in (restrict, lift):
        with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
            function([torch.ones(2, 2)], [None, None])


# ---------------------------------------------------------------------------------------------------------------------
# The mean of every estimator, over all subspaces

# Blocks (rank, or None for full space), coupled by one Hessian. Ranks on both sides of m / 2; m - r is not always 1.
Problem = list[tuple[tuple[int, ...], int | None]]
PROBLEMS: dict[str, Problem] = {
    "one matrix": [((2, 3), 2)],
    "coupled": [((2, 3), 2), ((1, 3), 2), ((4,), None)],
    "planes in four dimensions": [((2, 4), 2), ((2, 1, 2), None)],
    "most of four dimensions": [((2, 4), 3), ((2,), None)],
}
ANY_RANK: dict[str, Problem] = PROBLEMS | {
    "lines": [((2, 2), 1), ((1, 2), 1), ((2, 2), None)],
    "lines in four dimensions": [((1, 4), 1), ((1, 2), 1)],
}
each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
each_problem_of_any_rank = pytest.mark.parametrize("problem", ANY_RANK.values(), ids=ANY_RANK.keys())


def all_bases(problem: Problem) -> Iterator[Bases]:
    """Every combination of a few subspaces, one for each block: together they average like independent random ones."""
    yield from map(
        list, itertools.product(*[[None] if rank is None else exact_bases(shape[-1], rank) for shape, rank in problem])
    )


def instance(problem: Problem) -> tuple[CoupledHessian, list[Tensor]]:
    hessian = CoupledHessian.random([shape for shape, _ in problem])
    return hessian, hessian.random_blocks(seed=1)


def mean_estimate(
    estimate: Callable[..., list[Tensor]], hessian: CoupledHessian, auxiliary: list[Tensor], problem: Problem
) -> list[Tensor]:
    """Lift the estimates to full size and average them over all subspaces."""
    return mean([lift(estimate(hessian.restricted(bases), auxiliary, bases), bases) for bases in all_bases(problem)])


@each_problem_of_any_rank
def test_one_sided_is_unbiased(problem: Problem) -> None:
    hessian, z = instance(problem)
    assert_equal(mean_estimate(one_sided, hessian, z, problem), hessian(z))


@each_problem_of_any_rank
def test_two_sided_is_unbiased(problem: Problem) -> None:
    hessian, z = instance(problem)

    def estimate(action: Callable[..., list[Tensor]], z: list[Tensor], bases: Bases) -> list[Tensor]:
        return mean([two_sided(action, z, bases, other_bases) for other_bases in all_bases(problem)])

    assert_equal(mean_estimate(estimate, hessian, z, problem), hessian(z))


def signs_seen(auxiliary: list[Tensor], bases: Bases, generator: torch.Generator) -> list[Tensor]:
    """Read the signs off the second direction that the bi-probe asks about; a block in full space has none."""
    directions = []

    def action(blocks: list[Tensor]) -> list[Tensor]:
        directions.append(blocks)
        return restrict(blocks, bases)

    bi_probe(action, auxiliary, bases, generator)
    return [
        block if basis is None else block @ torch.linalg.pinv(basis.T)
        for block, basis in zip(directions[1], bases, strict=True)
    ]


def seeds_of_all_signs(auxiliary: list[Tensor], bases: Bases) -> list[int]:
    """Return one seed for every pattern of signs, so that the mean over the seeds is the mean over the signs."""
    num_signs = sum(b.shape[0] * p.shape[1] for b, p in zip(auxiliary, bases, strict=True) if p is not None)
    seeds: dict[tuple[int, ...], int] = {}
    for seed in range(50 * 2**num_signs):
        seen = signs_seen(auxiliary, bases, seeded(seed))
        pattern = [b.flatten().round() for b, p in zip(seen, bases, strict=True) if p is not None]
        seeds.setdefault(tuple(torch.cat(pattern).int().tolist()), seed)
        if len(seeds) == 2**num_signs:
            break
    assert set(seeds) == set(itertools.product((-1, 1), repeat=num_signs))
    return list(seeds.values())


@each_problem
def test_bi_probe_is_unbiased(problem: Problem) -> None:
    hessian, z = instance(problem)
    seeds = seeds_of_all_signs(z, next(all_bases(problem)))

    def estimate(action: Callable[..., list[Tensor]], z: list[Tensor], bases: Bases) -> list[Tensor]:
        return mean([bi_probe(action, z, bases, seeded(seed)) for seed in seeds])

    assert_equal(mean_estimate(estimate, hessian, z, problem), hessian(z))


@each_problem_of_any_rank
def test_restricting_on_both_sides_is_biased_within_a_block_only(problem: Problem) -> None:
    """The naive estimator, which the others replace. What one block does to another is right on average."""
    hessian, z = instance(problem)
    expected = []
    for i, (shape, rank) in enumerate(problem):
        total = torch.zeros(shape, dtype=torch.float64)
        for j in range(len(problem)):
            others_zero = [block if j == k else torch.zeros_like(block) for k, block in enumerate(z)]
            part = hessian(others_zero)[i]
            if i == j and rank is not None:
                part = biased_within_a_block(hessian, i, z[i], rank)
                assert (part - hessian(others_zero)[i]).norm() > 0.1 * part.norm()
            total += part
        expected.append(total)
    assert_equal(mean_estimate(restricted_on_both_sides, hessian, z, problem), expected)


def biased_within_a_block(hessian: CoupledHessian, i: int, z: Tensor, rank: int) -> Tensor:
    """Sum over pairs of rows: each has a matrix A of the Hessian, of which the naive estimator sees Q A Q."""
    rows, dim = z.shape
    start = sum(math.prod(shape) for shape in hessian.shapes[:i])
    a = hessian.matrix[start : start + rows * dim, start : start + rows * dim].view(rows, dim, rows, dim)
    return torch.stack([sum(mean_projected_twice(a[n, :, k], rank) @ z[k] for k in range(rows)) for n in range(rows)])


# ---------------------------------------------------------------------------------------------------------------------
# The estimators in other respects


def test_signs_are_fair_and_independent() -> None:
    """Each has mean zero and no correlation with another, in its block or the other, to 5 standard errors."""
    z = [torch.ones(5_000, 3, dtype=torch.float64), torch.ones(2), torch.ones(5_000, 3, dtype=torch.float64)]
    bases = [haar_basis(3, 2, seeded(0), torch.float64), None, haar_basis(3, 2, seeded(1), torch.float64)]
    first, nothing, second = signs_seen(z, bases, seeded(2))
    assert not nothing.any()
    assert_equal(torch.cat([first, second]).abs(), torch.ones(10_000, 2, dtype=torch.float64))
    variables = torch.stack([first[:, 0], first[:, 1], second[:, 0], second[:, 1], first[:, 0].roll(1)])
    five_standard_errors = 5 / math.sqrt(5_000)
    assert variables.mean(1).abs().max() < five_standard_errors
    assert (variables @ variables.T / 5_000 - torch.eye(5)).abs().max() < five_standard_errors
    again, _, _ = signs_seen(z, bases, seeded(2))
    assert_equal(again, first)


def test_two_sided_looks_along_the_other_subspace() -> None:
    problem = PROBLEMS["coupled"]
    hessian, z = instance(problem)
    bases, *_, other_bases = all_bases(problem)
    inside = [block if p is None else block @ p @ p.T for block, p in zip(z, other_bases, strict=True)]
    expected = [block if p is None else block @ p for block, p in zip(hessian(inside), bases, strict=True)]
    assert_equal(two_sided(hessian.restricted(bases), z, bases, other_bases), expected)


ESTIMATORS: dict[str, tuple[Callable[..., list[Tensor]], int]] = {
    "one_sided": (one_sided, 1),
    "bi_probe": (lambda action, z, bases: bi_probe(action, z, bases, seeded(0)), 2),
    "two_sided": (
        lambda action, z, bases: two_sided(
            action,
            z,
            bases,
            [None if p is None else haar_basis(*p.shape, seeded(9 + i), p.dtype) for i, p in enumerate(bases)],
        ),
        1,
    ),
}
each_estimator = pytest.mark.parametrize(("estimate", "num_calls"), ESTIMATORS.values(), ids=ESTIMATORS.keys())


@each_estimator
def test_number_of_calls_of_the_action(estimate: Callable[..., list[Tensor]], num_calls: int) -> None:
    hessian, z = instance(PROBLEMS["coupled"])
    before, calls = [block.clone() for block in z], []
    bases = next(all_bases(PROBLEMS["coupled"]))

    def action(directions: list[Tensor]) -> list[Tensor]:
        calls.append([block.shape for block in directions])
        return hessian.restricted(bases)(directions)

    estimate(action, z, bases)
    assert calls == [hessian.shapes] * num_calls  # directions of full size
    assert_exact(z, before)


@each_estimator
def test_full_space_is_the_exact_action(estimate: Callable[..., list[Tensor]], num_calls: int) -> None:
    hessian, z = instance(PROBLEMS["coupled"])
    bases: Bases = [None] * len(z)
    assert_exact(estimate(hessian.restricted(bases), z, bases), hessian(z))


@each_estimator
def test_full_rank_is_full_space(estimate: Callable[..., list[Tensor]], num_calls: int) -> None:
    hessian, z = instance(PROBLEMS["coupled"])
    bases = [haar_basis(3, 3, seeded(0), torch.float64), haar_basis(3, 3, seeded(1), torch.float64), None]
    assert_equal(lift(estimate(hessian.restricted(bases), z, bases), bases), hessian(z))


@each_estimator
def test_estimates_are_coordinates_and_vary(estimate: Callable[..., list[Tensor]], num_calls: int) -> None:
    hessian, z = instance(PROBLEMS["coupled"])
    several = [
        estimate(hessian.restricted(bases), z, bases) for bases in itertools.islice(all_bases(PROBLEMS["coupled"]), 2)
    ]
    for coordinates in several:
        assert [block.shape for block in coordinates] == [(2, 2), (1, 2), (4,)]
    assert (several[0][1] - several[1][1]).norm() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bi_probe_keeps_the_dtype(dtype: torch.dtype) -> None:
    bases = [haar_basis(4, 2, seeded(0), dtype)]
    estimate = bi_probe(lambda blocks: restrict(blocks, bases), [torch.ones(3, 4, dtype=dtype)], bases, seeded(0))
    assert estimate[0].dtype == dtype


@pytest.mark.parametrize("position", [0, 1])
def test_bi_probe_rejects_rank_one(position: int) -> None:
    bases: Bases = [haar_basis(3, 2, seeded(0)), haar_basis(3, 2, seeded(0)), None]
    bases[position] = haar_basis(3, 1, seeded(0))
    z = [torch.ones(1, 3), torch.ones(1, 3), torch.ones(1)]
    with pytest.raises(ValueError, match="needs a rank of at least 2. Use `one_sided`, which is unbiased at any rank"):
        bi_probe(lambda blocks: restrict(blocks, bases), z, bases, seeded(0))


def test_counter_example_of_the_paper() -> None:
    """Minimise 1/2 x² + y_1 where y minimises 1/2 y'Hy - x y_1: the hypergradient is x + z_1, and z = H^-1 e_1.

    The recursions of the single loop are linear in z, so their expected fixed point is that of the expected operator. The
    naive one ends at x = -20/39, where the hypergradient is 19/39, and the others at -1, where it is zero.
    """
    problem: Problem = [((1, 3), 2)]
    hessian = CoupledHessian([(1, 3)], torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)))
    seeds = seeds_of_all_signs([torch.ones(1, 3, dtype=torch.float64)], next(all_bases(problem)))

    def stationary_point(estimate: Callable[..., list[Tensor]]) -> float:
        units = torch.eye(3, dtype=torch.float64)
        operator = torch.cat([mean_estimate(estimate, hessian, [unit[None]], problem)[0] for unit in units]).T
        return -torch.linalg.solve(operator, units[0])[0].item()

    def two_independent(action: Callable[..., list[Tensor]], z: list[Tensor], bases: Bases) -> list[Tensor]:
        return mean([two_sided(action, z, bases, other_bases) for other_bases in all_bases(problem)])

    def both_probes(action: Callable[..., list[Tensor]], z: list[Tensor], bases: Bases) -> list[Tensor]:
        return mean([bi_probe(action, z, bases, seeded(seed)) for seed in seeds])

    assert stationary_point(restricted_on_both_sides) == pytest.approx(-20 / 39, abs=1e-12)
    for estimate in (one_sided, two_independent, both_probes):
        assert stationary_point(estimate) == pytest.approx(-1, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# coverage, refresh_schedule


def test_coverage_by_hand() -> None:
    assert coverage(1_000, 10, 400, 40) == 10.0
    assert coverage(100, 1, 8, 4) == 50.0
    assert coverage(100, 200, 8, 8) == 0.5


run_lengths = st.tuples(st.integers(1, 100_000), st.integers(1, 512)).flatmap(
    lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), st.integers(1, pair[1]))
)


@settings(max_examples=25)
@given(run_lengths, st.integers(1, 1_000))
def test_refresh_schedule_is_the_longest_that_covers_ten_times(run: tuple[int, int, int], longest: int) -> None:
    """In exact arithmetic: one step more would cover less than ten times, unless a limit holds."""
    num_steps, dim, rank = run
    period = refresh_schedule(num_steps, dim, rank, longest)
    assert isinstance(period, int) and 1 <= period <= longest
    assert period == 1 or Fraction(num_steps * rank, period * dim) >= 10
    assert period == longest or Fraction(num_steps * rank, (period + 1) * dim) < 10
    assert coverage(num_steps, period, dim, rank) == pytest.approx(num_steps * rank / (period * dim), rel=1e-12)


def test_refresh_schedule_by_hand() -> None:
    assert refresh_schedule(1_000, 400, 40) == 10
    assert refresh_schedule(1_009, 400, 40) == 10
    assert refresh_schedule(50, 400, 40) == 1
    assert refresh_schedule(10**6, 400, 40) == 200  # as long as one may be
    assert refresh_schedule(10**6, 400, 40, longest=7) == 7


# ---------------------------------------------------------------------------------------------------------------------
# carry_over


def test_carry_over_by_hand() -> None:
    state = {
        "step": torch.tensor(3.0),
        "exp_avg": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "exp_avg_sq": torch.tensor([[1.0, 3.0], [0.0, 8.0]]),
        "max_exp_avg_sq": torch.tensor([[2.0, 6.0], [0.0, 1.0]]),
        "count": 5,
    }
    tensors = dict(state)
    carry_over(state)
    expected = {
        "step": torch.tensor(3.0),
        "exp_avg": torch.zeros(2, 2),
        "exp_avg_sq": torch.tensor([[2.0, 2.0], [4.0, 4.0]]),
        "max_exp_avg_sq": torch.tensor([[4.0, 4.0], [0.5, 0.5]]),
        "count": 5,
    }
    assert set(state) == set(expected)
    for name, value in expected.items():
        assert state[name] is tensors[name]  # in place
        assert_exact(state[name], value)


def test_carry_over_of_a_state_of_other_names_begins_anew() -> None:
    """bitsandbytes has `state1` and `state2`, in 8 bits as codes: which is a second moment, and what 0 means, is not known."""
    state = {
        "step": 7,
        "state1": torch.ones(2, 3),
        "state2": torch.ones(2, 3, dtype=torch.uint8),
        "absmax1": torch.ones(1),
    }
    carry_over(state)
    assert state == {}


def test_carry_over_before_the_first_step() -> None:
    carry_over(None)
    carry_over({})


def test_carry_over_of_the_state_of_adam() -> None:
    leaf = torch.zeros(2, 3, requires_grad=True)
    optimizer = torch.optim.AdamW([leaf], lr=0.1, betas=(0.5, 0.75))
    leaf.grad = torch.tensor([[1.0, 2.0, 4.0], [0.0, 2.0, 2.0]])
    optimizer.step()
    carry_over(optimizer.state[leaf])
    assert_exact(optimizer.state[leaf]["exp_avg"], torch.zeros(2, 3))
    second = torch.tensor([[21.0], [8.0]]).expand(2, 3) * 0.25 / 3
    torch.testing.assert_close(optimizer.state[leaf]["exp_avg_sq"], second, rtol=1e-6, atol=0)
    assert optimizer.state[leaf]["step"] == 1
