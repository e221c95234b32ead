"""The single loop: against exact arithmetic, a dense hand-written loop, and the exact hypergradient of ridge regression."""

import io
import itertools
import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from exact_answers import CoupledHessian, RidgeBilevel, exact_bases, restricted_on_both_sides
from torch import Tensor

from hf_bilevel.core.single_loop import Auxiliary, SingleLoop, UpperStep, stochastically_rounded
from hf_bilevel.core.subspace import bi_probe, haar_basis, one_sided, restrict

assert_exact = partial(torch.testing.assert_close, rtol=0, atol=0)
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=1e-12)

Bases = list[Tensor | None]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(blocks: list[Tensor]) -> Tensor:
    return torch.cat([block.flatten() for block in blocks])


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Tell 0 from -0, and one NaN from another."""
    integers = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.view(integers[a.dtype]), b.view(integers[b.dtype]))


# ---------------------------------------------------------------------------------------------------------------------
# stochastically_rounded

ULP = 2.0**-7  # from 1 to the next bfloat16
LARGEST = torch.finfo(torch.bfloat16).max


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("value", "below", "above"),
    [
        (1 + 2.0**-9, 1, 1 + ULP),
        (1 + ULP - 2.0**-16, 1, 1 + ULP),
        (2 - 2.0**-11, 2 - ULP, 2.0),  # up to the next power of two
        (3.1415927410125732, 3.140625, 3.15625),
        (1e-30, None, None),
        (1e-40, None, None),  # subnormal
        (2.0**-149, 0.0, 2.0**-133),  # the smallest float32: up once in 65,536 times
        (3e38, None, None),
    ],
)
def test_rounding_is_unbiased(value: float, below: float | None, above: float | None, sign: int) -> None:
    """The rounded value is one of two neighbours, with the value as its mean, to 5 standard errors."""
    num = 20_000
    wide = torch.full((num,), sign * value)
    rounded = stochastically_rounded(wide, torch.bfloat16, seeded(0))
    assert rounded.dtype == torch.bfloat16 and rounded.shape == (num,)
    seen, exact = rounded.double().abs(), wide[0].double().abs().item()
    assert torch.equal(rounded.double().sign()[seen > 0], torch.full((int((seen > 0).sum()),), sign).double())
    low, high = seen.min().item(), seen.max().item()
    if below is not None:
        assert low >= below and high <= above
        low, high = below, above
    assert set(seen.tolist()) <= {low, high} and low <= exact <= high
    probability = (exact - low) / (high - low)
    standard_error = (high - low) * math.sqrt(probability * (1 - probability) / num)
    assert abs(seen.mean().item() - exact) <= 5 * standard_error


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, -1.0, 1 + ULP, -0.15625, 2.0**100, 2.0**-126, 2.0**-133, LARGEST, -LARGEST]
)
def test_what_bfloat16_can_hold_is_kept(value: float) -> None:
    rounded = stochastically_rounded(torch.full((1_000,), value), torch.bfloat16, seeded(0))
    assert_same_bits([rounded], [torch.full((1_000,), value, dtype=torch.bfloat16)])


def test_infinities_and_nan_are_kept() -> None:
    # The largest and the smallest patterns of bits are NaN: noise added to them overflows.
    patterns = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -0x00400000, -1], dtype=torch.int32)
    for value in [*patterns.view(torch.float32), torch.tensor(math.inf), torch.tensor(-math.inf)]:
        rounded = stochastically_rounded(value.expand(1_000), torch.bfloat16, seeded(0)).float()
        torch.testing.assert_close(rounded, value.expand(1_000).clone(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sign", [1, -1])
def test_beyond_the_largest_bfloat16_is_it_or_infinity(sign: int) -> None:
    largest = torch.full((100_000,), sign * torch.finfo(torch.float32).max)
    halfway = sign * (torch.tensor([LARGEST]).view(torch.int32) + 2**15).view(torch.float32).expand(1_000)
    assert set(stochastically_rounded(halfway, torch.bfloat16, seeded(0)).tolist()) == {
        sign * LARGEST,
        sign * math.inf,
    }
    assert set(stochastically_rounded(largest, torch.bfloat16, seeded(0)).tolist()) <= {
        sign * LARGEST,
        sign * math.inf,
    }


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_rounding_keeps_the_shape(shape: tuple[int, ...]) -> None:
    value = torch.ones(shape)
    assert_exact(stochastically_rounded(value, torch.bfloat16, seeded(0)), value.to(torch.bfloat16))


def test_rounding_of_a_strided_tensor_leaves_it_alone() -> None:
    whole = torch.randn(6, 8, generator=seeded(0))
    value, before = whole.T[::2], whole.clone()
    assert not value.is_contiguous()
    rounded = stochastically_rounded(value, torch.bfloat16, seeded(1))
    assert_exact(rounded, stochastically_rounded(value.contiguous(), torch.bfloat16, seeded(1)))
    assert (rounded.float() - value).abs().max() > 0
    assert_exact(whole, before)


def test_rounding_is_a_function_of_the_generator() -> None:
    value, state = torch.full((1_000,), 1 + 2.0**-8), torch.get_rng_state()
    generator = seeded(0)
    first, second = (stochastically_rounded(value, torch.bfloat16, generator) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    assert_exact(stochastically_rounded(value, torch.bfloat16, seeded(0)), first)
    torch.manual_seed(0)
    assert set(stochastically_rounded(value, torch.bfloat16).tolist()) == {1.0, 1 + ULP}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_dtypes_are_cast(dtype: torch.dtype) -> None:
    value = torch.tensor([1 + 2.0**-12, -3.3])
    assert_exact(stochastically_rounded(value, dtype, seeded(0)), value.to(dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Auxiliary

# Blocks (rank, or None for full space), coupled by one Hessian.
COUPLED: list[tuple[tuple[int, ...], int | None]] = [((2, 3), 2), ((1, 4), 2), ((4,), None)]


def coupled_hessian(spectrum: Tensor | None = None) -> CoupledHessian:
    return CoupledHessian.random([shape for shape, _ in COUPLED], spectrum)


def relative_error(blocks: list[Tensor], exact: list[Tensor]) -> float:
    return ((flat(blocks) - flat(exact)).norm() / flat(exact).norm()).item()


def draw_bases(generator: torch.Generator) -> Bases:
    return [None if rank is None else haar_basis(shape[-1], rank, generator, torch.float64) for shape, rank in COUPLED]


def test_auxiliary_begins_at_zero_with_the_shapes_of_the_blocks() -> None:
    blocks = [torch.ones(2, 3, requires_grad=True), torch.ones(4, dtype=torch.float64)]
    auxiliary = Auxiliary(blocks)
    assert_exact(auxiliary.blocks, [torch.zeros(2, 3), torch.zeros(4, dtype=torch.float64)])
    assert not any(block.requires_grad for block in auxiliary.blocks)
    assert [block.dtype for block in Auxiliary(blocks, dtype=torch.bfloat16).blocks] == [torch.bfloat16] * 2
    assert auxiliary.norm() == 0


def test_norm_is_over_all_blocks() -> None:
    auxiliary = Auxiliary([torch.zeros(2, 2), torch.zeros(1)])
    auxiliary.load_state_dict(
        {"blocks": [torch.tensor([[1.0, 4.0], [2.0, 2.0]]), torch.tensor([12.0])], "curvature": 0.0}
    )
    assert auxiliary.norm() == 13


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_fixed_point_in_full_space(damping: float) -> None:
    hessian = coupled_hessian()
    b = hessian.random_blocks(seed=1)
    exact = hessian.solve(b, damping)
    auxiliary = Auxiliary(b, learning_rate=0.3, damping=damping)
    for _ in range(150):
        auxiliary.step(hessian(auxiliary.blocks), b, [None] * 3)
    assert_equal(auxiliary.blocks, exact)
    assert relative_error(hessian.solve(b), exact) > 0.05 or damping == 0


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_expected_step_in_subspaces(damping: float) -> None:
    """On average over all subspaces: z - rate (r / m) ((H + damping I) z - b), which has the fixed point of full space."""
    hessian, rate = coupled_hessian(), 0.3
    b, start = hessian.random_blocks(seed=1), hessian.random_blocks(seed=2)
    steps = []
    for bases in itertools.product(exact_bases(3, 2), exact_bases(4, 2), [None]):
        auxiliary = Auxiliary(b, learning_rate=rate, damping=damping)
        auxiliary.load_state_dict({"blocks": start, "curvature": torch.zeros(())})
        action = hessian.restricted(list(bases))
        auxiliary.step(one_sided(action, auxiliary.blocks, list(bases)), restrict(b, list(bases)), list(bases))
        steps.append(auxiliary.blocks)
    expected = [
        z - rate * share * (h + damping * z - v)
        for z, h, v, share in zip(start, hessian(start), b, (2 / 3, 2 / 4, 1.0), strict=True)
    ]
    mean = [torch.stack(blocks).mean(0) for blocks in zip(*steps, strict=True)]
    assert_equal(mean, expected)
    assert (steps[0][0] - mean[0]).norm() > 1e-2  # the subspaces do differ


def test_fixed_point_in_random_subspaces() -> None:
    """At the solution the one-sided residual is zero in every subspace, so the noise dies out."""
    hessian, generator = coupled_hessian(), seeded(0)
    b = hessian.random_blocks(seed=1)
    auxiliary = Auxiliary(b, learning_rate=0.25)
    for _ in range(300):
        bases = draw_bases(generator)
        action = hessian.restricted(bases)
        auxiliary.step(one_sided(action, auxiliary.blocks, bases), restrict(b, bases), bases)
    assert relative_error(auxiliary.blocks, hessian.solve(b)) < 1e-9


# The automatic step


def rotated(eigenvalues: list[float]) -> tuple[CoupledHessian, Tensor]:
    """Return a Hessian of one block and its eigenvectors, as rows, in the order of the eigenvalues."""
    hessian = CoupledHessian.random([(1, len(eigenvalues))], torch.tensor(eigenvalues, dtype=torch.float64))
    return hessian, torch.linalg.eigh(hessian.matrix).eigenvectors.T


def test_automatic_step_by_hand() -> None:
    auxiliary = Auxiliary([torch.zeros(2)], damping=1.0)
    b = [torch.tensor([12.0, 16.0])]
    assert [value.item() for value in auxiliary.rate_and_damping()] == [0.25, 1.0]
    auxiliary.step([torch.zeros(2)], b, [None])  # nothing is known, and z was zero
    assert_exact(auxiliary.blocks, [torch.tensor([3.0, 4.0])])
    auxiliary.step([torch.tensor([0.0, 20.0])], b, [None])  # curvature 20 / 5, damping 4: rate 1 / 16
    assert_exact(auxiliary.blocks, [torch.tensor([3.0, 4.0]) * 0.75 - torch.tensor([-12.0, 4.0]) / 16])
    assert [value.item() for value in auxiliary.rate_and_damping()] == [0.0625, 4.0]
    auxiliary.step([torch.zeros(2)], b, [None])  # a smaller one is forgotten slowly
    assert auxiliary.rate_and_damping()[0].item() == pytest.approx(0.0625 / 0.99, rel=1e-6)
    # Given, both are what was given.
    given = Auxiliary([torch.zeros(2)], learning_rate=0.5, damping=0.25)
    given.step([torch.ones(2)], b, [None])
    assert [value.item() for value in given.rate_and_damping()] == [0.5, 0.25]


def test_noise_on_a_zero_auxiliary_is_no_curvature() -> None:
    auxiliary = Auxiliary([torch.zeros(2)])
    auxiliary.step([torch.tensor([1e-6, 0.0])], [torch.ones(2)], [None])
    assert auxiliary.curvature == 0 and auxiliary.blocks[0].tolist() == pytest.approx([0.5, 0.5], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_automatic_step_solves_a_well_conditioned_system(scale: float, dtype: torch.dtype) -> None:
    hessian, vectors = rotated([scale, 2 * scale, 3 * scale, 4 * scale])
    b = vectors.sum(0, keepdim=True)
    auxiliary = Auxiliary([torch.zeros(1, 4, dtype=dtype)])
    for _ in range(300):
        auxiliary.step([auxiliary.blocks[0] @ hessian.matrix.to(dtype)], [b.to(dtype)], [None])
    assert relative_error([auxiliary.blocks[0].double()], hessian.solve([b])) < (
        1e-12 if dtype == torch.float64 else 1e-6
    )


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("top", [1.0, 0.0, 1e-6])
@pytest.mark.parametrize("eigenvalues", [[1, 2, 3, 10], [1, 2, 3, 1e4], [1, 100, 1000, 1e6]])
def test_automatic_step_is_stable(eigenvalues: list[float], top: float, rank: int | None) -> None:
    """The rule sees the top curvature only once z aligns with its eigenvector, and must lower the step in time.

    ``top`` is how much of that eigenvector there is in the right-hand side, and so in z to begin with. The step that fits
    the curvature of the other eigenvectors would multiply the top component by up to thousands every time.
    """
    hessian, vectors = rotated(eigenvalues)
    b = [vectors[:-1].sum(0, keepdim=True) + top * vectors[-1:]]
    auxiliary, generator, norms = Auxiliary(b), seeded(0), []
    for _ in range(200):
        bases: Bases = [None if rank is None else haar_basis(4, rank, generator, torch.float64)]
        auxiliary.step(one_sided(hessian.restricted(bases), auxiliary.blocks, bases), restrict(b, bases), bases)
        norms.append(auxiliary.norm().item())
    assert max(norms) < 3 * max(hessian.solve(b)[0].norm(), b[0].norm())
    # Restricting amplifies by the root of m / r at most.
    largest = eigenvalues[-1] * (1 if rank is None else (4 / rank) ** 0.5)
    assert 0.5 * eigenvalues[0] < auxiliary.curvature < 1.001 * largest


# Non-finite input, bfloat16, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learning_rate", [None, 0.25])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("which", ["hessian", "upper_gradient"])
def test_a_step_with_a_bad_number_leaves_every_block_alone(
    which: str, position: int, bad: float, learning_rate: float | None, dtype: torch.dtype
) -> None:
    bases: Bases = [haar_basis(4, 2, seeded(0)), None]
    auxiliary = Auxiliary([torch.zeros(3, 4), torch.zeros(2)], dtype=dtype, learning_rate=learning_rate, damping=0.1)
    good = {"hessian": [torch.ones(3, 2), torch.ones(2)], "upper_gradient": [torch.full((3, 2), 0.3), torch.zeros(2)]}
    generator = seeded(1)
    for _ in range(2):
        auxiliary.step(**good, bases=bases, generator=generator)
    before = [block.clone() for block in auxiliary.blocks]
    assert all(block.any() for block in before)
    broken = {name: [block.clone() for block in blocks] for name, blocks in good.items()}
    broken[which][position].view(-1)[1] = bad
    auxiliary.step(**broken, bases=bases, generator=generator)
    assert_same_bits(auxiliary.blocks, before)
    assert all(value.isfinite() for value in auxiliary.rate_and_damping())
    auxiliary.step(**good, bases=bases, generator=generator)  # and goes on
    assert all(a.isfinite().all() and not torch.equal(a, b) for a, b in zip(auxiliary.blocks, before, strict=True))


def test_a_first_step_with_a_bad_number() -> None:
    auxiliary = Auxiliary([torch.zeros(3)])
    auxiliary.step([torch.zeros(3)], [torch.tensor([1.0, math.nan, 0.0])], [None])
    assert_same_bits(auxiliary.blocks, [torch.zeros(3)])
    auxiliary.step([torch.zeros(3)], [torch.ones(3)], [None])
    assert_exact(auxiliary.blocks, [torch.full((3,), 0.5)])


@pytest.mark.parametrize("rank", [None, 2])
def test_many_small_steps_of_bfloat16_add_up(rank: int | None) -> None:
    """To 5 standard errors; nearest rounding would lose every one of them."""
    rows, num_steps, step = 4_000, 200, 2.0**-12
    basis = None if rank is None else haar_basis(4, rank, seeded(0))
    drift = torch.full((rows, 4), step)
    expected = drift if basis is None else rank / 4 * drift @ basis @ basis.T
    assert expected.abs().max() < ULP / 4  # lost by nearest rounding
    auxiliary, generator = Auxiliary([drift], dtype=torch.bfloat16, learning_rate=1.0), seeded(1)
    auxiliary.blocks[0].fill_(1.5)
    b = restrict([drift], [basis])
    zero = [torch.zeros_like(b[0])]
    for _ in range(num_steps):
        auxiliary.step(zero, b, [basis], generator)
    moved = (auxiliary.blocks[0].double() - 1.5).mean(0)
    # One step is a coin of size ULP with probability |step| / ULP.
    standard_error = (num_steps / rows * expected[0].abs().double() * ULP).sqrt()
    assert ((moved - num_steps * expected[0].double()).abs() < 5 * standard_error + 1e-6).all()
    assert (num_steps * expected[0].abs().max()) > 20 * standard_error.max()


def test_bfloat16_auxiliary_solves_the_system_on_average() -> None:
    """The mean over independent rows and a tail of steps, to 5 standard errors over rows."""
    rows = 1_000
    matrix, b = torch.tensor([[2.0, 0.5], [0.5, 1.0]]), torch.tensor([1.0, -0.7])
    auxiliary, generator = Auxiliary([torch.zeros(rows, 2)], dtype=torch.bfloat16, learning_rate=0.1), seeded(0)
    tail = []
    for k in range(200):
        z = auxiliary.blocks[0].float()
        auxiliary.step([z @ matrix], [b.expand(rows, 2)], [None], generator)
        if k >= 120:
            tail.append(z)
    per_row = torch.stack(tail).mean(0)
    standard_error = per_row.std(0) / math.sqrt(rows)
    assert ((per_row.mean(0) - torch.linalg.solve(matrix, b)).abs() < 5 * standard_error + 1e-4).all()
    assert standard_error.max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_auxiliary_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    hessian = coupled_hessian()
    b = [block.float() for block in hessian.random_blocks(seed=1)]

    def steps(auxiliary: Auxiliary, first: int, last: int) -> None:
        for k in range(first, last):
            bases = [None if rank is None else haar_basis(shape[-1], rank, seeded(k)) for shape, rank in COUPLED]
            full = hessian([block.double() for block in auxiliary.blocks])
            action = restrict([block.float() for block in full], bases)
            # A curvature that falls: what is remembered of it matters.
            action = [block / (k + 1) for block in action]
            auxiliary.step(action, restrict(b, bases), bases, seeded(1_000 + k))

    whole, half = Auxiliary(b, dtype=dtype, damping=0.01), Auxiliary(b, dtype=dtype, damping=0.01)
    steps(whole, 0, 20)
    steps(half, 0, 10)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    restored = Auxiliary(b, dtype=dtype, damping=0.01)
    steps(restored, 0, 3)  # replaced
    restored.load_state_dict(torch.load(file, weights_only=True))
    steps(restored, 10, 20)
    assert_same_bits(restored.blocks, whole.blocks)
    assert_same_bits([restored.curvature], [whole.curvature])
    # Without the curvature it would have gone another way.
    forgetful = Auxiliary(b, dtype=dtype, damping=0.01)
    forgetful.load_state_dict({**half.state_dict(), "curvature": torch.zeros(())})
    steps(forgetful, 10, 20)
    assert not torch.equal(forgetful.blocks[0], whole.blocks[0])


# ---------------------------------------------------------------------------------------------------------------------
# UpperStep


def upper_variables() -> list[Tensor]:
    return [torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)]


def hypergradients(num: int) -> list[list[Tensor]]:
    """Some, of quickly changing length, with entries that are zero."""
    generator, result = seeded(0), []
    for k in range(num):
        first = torch.randn(2, 2, generator=generator, dtype=torch.float64) * (k + 1) ** 2
        first[k % 2, 0] = 0
        result.append([first, torch.randn(1, generator=generator, dtype=torch.float64)])
    return result


def upper_steps(**options) -> UpperStep:
    defaults = {"learning_rate": 0.1, "moving_average": 0.25, "normalised": True}
    return UpperStep(upper_variables(), **defaults | options)


@pytest.mark.parametrize("normalised", [True, False])
def test_upper_step_is_a_loop_written_by_hand(normalised: bool) -> None:
    """In Python numbers: the mean square of what is not zero, over all steps, younger ones counting more."""
    upper = upper_steps(normalised=normalised)
    x, h, squares = flat(upper_variables()).tolist(), [0.0] * 5, []
    for k, hypergradient in enumerate(hypergradients(6)):
        schedule = 1 / (k + 1)
        upper.step(hypergradient, schedule)
        d = flat(hypergradient).tolist()
        seen = [value**2 for value in d if value != 0]
        squares.append(sum(seen) / len(seen))
        ages = [0.99 ** (len(squares) - 1 - i) for i in range(len(squares))]
        mean_square = sum(age * square for age, square in zip(ages, squares, strict=True)) / sum(ages)
        rate = 0.1 * schedule / (mean_square**0.5 if normalised else 1)
        x = [a - rate * b for a, b in zip(x, h, strict=True)]
        h = [0.75 * a + 0.25 * b for a, b in zip(h, d, strict=True)]
    # The weights of the steps, 0.99^k, sum to 1 - 0.99^n over 1 - 0.99, which cancels a few digits.
    torch.testing.assert_close(flat(upper.variables), torch.tensor(x, dtype=torch.float64), rtol=0, atol=1e-10)
    assert_equal(flat(upper.average), torch.tensor(h, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_normalised_step_does_not_depend_on_the_scale(scale: float) -> None:
    scaled, plain = upper_steps(), upper_steps()
    for hypergradient in hypergradients(6):
        plain.step(hypergradient)
        scaled.step([scale * d for d in hypergradient])
    assert_equal(scaled.variables, plain.variables)
    assert (flat(plain.variables) - flat(upper_variables())).abs().min() > 1e-2


def test_entries_that_are_zero_do_not_count() -> None:
    alone, among = torch.zeros(2), torch.zeros(100)
    for x in (alone, among):
        upper = UpperStep([x], learning_rate=0.1, moving_average=1.0, normalised=True)
        d = torch.zeros(len(x))
        d[:2] = torch.tensor([3e-4, -4e-4])
        upper.step([torch.zeros(len(x))])  # nor does a step without any
        upper.step([d])
        upper.step([torch.zeros(len(x))])
    root_mean_square = (12.5 * 1e-8) ** 0.5
    torch.testing.assert_close(alone, torch.tensor([-3e-5, 4e-5]) / root_mean_square, rtol=1e-5, atol=0)
    torch.testing.assert_close(among[:2], alone, rtol=1e-6, atol=0)
    assert not among[2:].any()


@pytest.mark.parametrize("normalised", [True, False])
def test_upper_step_without_a_hypergradient_stays(normalised: bool) -> None:
    upper = upper_steps(normalised=normalised)
    for _ in range(3):
        upper.step([torch.zeros(2, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    assert_same_bits(upper.variables, upper_variables())


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_upper_step_counts_a_bad_hypergradient_as_zero(bad: float, normalised: bool) -> None:
    zero, broken = upper_steps(normalised=normalised), upper_steps(normalised=normalised)
    for k, hypergradient in enumerate(hypergradients(6)):
        instead = [torch.zeros_like(d) for d in hypergradient] if k in (0, 3) else hypergradient
        zero.step(instead)
        if k in (0, 3):
            hypergradient[1][0] = bad
        broken.step(hypergradient)
    assert_same_bits(broken.variables, zero.variables)
    assert_same_bits(broken.average, zero.average)
    assert (flat(broken.variables) - flat(upper_variables())).abs().min() > 1e-3


def test_restored_upper_step_goes_on_bit_for_bit() -> None:
    whole, half, restored, forgetful = (upper_steps() for _ in range(4))
    steps = hypergradients(8)
    for k, hypergradient in enumerate(steps):
        whole.step(hypergradient)
        if k < 4:
            half.step(hypergradient)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    restored.step(steps[7])  # replaced
    restored.load_state_dict(torch.load(file, weights_only=True))
    forgetful.load_state_dict({**restored.state_dict(), "square": upper_steps().state_dict()["square"]})
    for upper in (restored, forgetful):
        for x, value in zip(upper.variables, half.variables, strict=True):
            x.copy_(value)
        for hypergradient in steps[4:]:
            upper.step(hypergradient)
    assert_same_bits(restored.variables, whole.variables)
    assert_same_bits(restored.average, whole.average)
    assert not torch.equal(forgetful.variables[0], whole.variables[0])


@pytest.mark.parametrize("moving_average", [0.0, -0.1, 1.1, math.nan])
def test_rejects_a_moving_average(moving_average: float) -> None:
    message = rf"`moving_average` must be in \(0, 1\], got {moving_average}"
    with pytest.raises(ValueError, match=message):
        upper_steps(moving_average=moving_average)
    y, rates = [torch.zeros(1, requires_grad=True)], {"upper_learning_rate": 0.1, "lower_learning_rate": 0.1}
    with pytest.raises(ValueError, match=message):
        SingleLoop(y, y, **rates, auxiliary=Auxiliary(y), moving_average=moving_average)


# ---------------------------------------------------------------------------------------------------------------------
# SingleLoop: its arithmetic


@pytest.mark.parametrize("theta", [1.0, 0.5, 0.25])
def test_arithmetic_of_the_loop_is_that_of_fractions(theta: float) -> None:
    """Rates and data are multiples of powers of two and the steps few, so float64 makes no error: every bit must agree.

    g = 1/2 y'Hy - x'Cy and f = 1/2 |y - t|² + 1/2 |x|² + x'y.
    """
    num_steps, alpha, beta, gamma = 6, 0.5, 0.25, 0.125
    hessian, cross, target = [[2, 1], [1, 3]], [[1, -2], [3, 1]], [1, -1]
    x0, y0, z0 = [0.5, -1.0], [1.5, 0.25], [-0.5, 0.75]
    h64, c64, t64 = (torch.tensor(value, dtype=torch.float64) for value in (hessian, cross, target))

    x = torch.tensor(x0, dtype=torch.float64, requires_grad=True)
    y = torch.tensor(y0, dtype=torch.float64, requires_grad=True)
    auxiliary = Auxiliary([y], learning_rate=gamma)
    auxiliary.blocks[0].copy_(torch.tensor(z0))
    loop = SingleLoop(
        [x], [y], upper_learning_rate=alpha, lower_learning_rate=beta, auxiliary=auxiliary, moving_average=theta
    )

    def lower(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return 0.5 * y[0] @ h64 @ y[0] - x[0] @ c64 @ y[0]

    def upper(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return 0.5 * (y[0] - t64).square().sum() + 0.5 * x[0].square().sum() + x[0] @ y[0]

    fx, fy, fz = ([Fraction(v) for v in values] for values in (x0, y0, z0))
    fh, ft, fa, fb, fc = [Fraction(0)] * 2, *(Fraction(v) for v in (theta, alpha, beta, gamma))
    pair = range(2)
    for _ in range(num_steps):
        losses = loop.step(lower, upper)
        exact_lower = sum(fy[i] * hessian[i][j] * fy[j] / 2 - fx[i] * cross[i][j] * fy[j] for i in pair for j in pair)
        exact_upper = sum((fy[i] - target[i]) ** 2 / 2 + fx[i] ** 2 / 2 + fx[i] * fy[i] for i in pair)
        assert [Fraction(loss.item()) for loss in losses] == [exact_lower, exact_upper]  # before the step
        assert not any(loss.requires_grad for loss in losses)
        gradient = [sum(hessian[i][j] * fy[j] - cross[j][i] * fx[j] for j in pair) for i in pair]
        residual = [sum(hessian[i][j] * fz[j] for j in pair) - (fy[i] - target[i] + fx[i]) for i in pair]
        hypergradient = [fx[i] + fy[i] + sum(cross[i][j] * fz[j] for j in pair) for i in pair]
        fx = [fx[i] - fa * fh[i] for i in pair]
        fh = [(1 - ft) * fh[i] + ft * hypergradient[i] for i in pair]
        fy = [fy[i] - fb * gradient[i] for i in pair]
        fz = [fz[i] - fc * residual[i] for i in pair]
        for tensor, exact in ((x, fx), (y, fy), (auxiliary.blocks[0], fz), (loop.upper_step.average[0], fh)):
            assert [Fraction(v) for v in tensor.tolist()] == exact
    assert x.grad is None and y.grad is None


def test_loop_in_subspaces_is_a_dense_one_written_by_hand() -> None:
    """Losses that are not quadratic, so that every derivative must be that of the current point; one block with a basis
    and two without. The dense loop builds the projection, the Hessian and the cross derivative as matrices."""
    generator = seeded(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, y, mixing, target = normal(3), normal(13), normal(3, 13), normal(13)

    def lower_loss(x: Tensor, y: Tensor) -> Tensor:
        return (y.square() * (1 + (x @ mixing).square())).sum() / 2 + y.sin().prod() + (x @ mixing @ y).tanh()

    def upper_loss(x: Tensor, y: Tensor) -> Tensor:
        return (y - target).pow(4).sum() / 10 + x.exp().sum() * y[0]

    lower = [y[:8].view(2, 4), y[8:11], y[11:].view(1, 2)]  # no room for rank 2 in the last
    lower = [block.clone().requires_grad_() for block in lower]
    auxiliary = Auxiliary(lower, learning_rate=0.15, damping=0.1)
    loop = SingleLoop(
        [x.clone().requires_grad_()],
        lower,
        upper_learning_rate=0.2,
        lower_learning_rate=0.1,
        auxiliary=auxiliary,
        moving_average=0.3,
        rank=2,
        generator=seeded(7),
    )
    for _ in range(4):
        loop.step(lambda x, y: lower_loss(x[0], flat(y)), lambda x, y: upper_loss(x[0], flat(y)))

    z, h, generator = torch.zeros_like(y), torch.zeros_like(x), seeded(7)
    share = torch.tensor([2 / 4] * 8 + [1.0] * 5, dtype=torch.float64)
    for _ in range(4):
        basis = haar_basis(4, 2, generator, torch.float64)
        projection = torch.block_diag(basis @ basis.T, basis @ basis.T, torch.eye(5, dtype=torch.float64))
        lower_x, lower_y = torch.autograd.functional.jacobian(lower_loss, (x, y))
        upper_x, upper_y = torch.autograd.functional.jacobian(upper_loss, (x, y))
        (_, cross), (_, hessian) = torch.autograd.functional.hessian(lower_loss, (x, y))
        residual = projection @ (hessian @ z - upper_y) + 0.1 * z
        x, h = x - 0.2 * h, 0.7 * h + 0.3 * (upper_x - cross @ z)
        y, z = y - 0.1 * projection @ lower_y, z - 0.15 * share * residual
    assert_equal(loop.upper[0].detach(), x)
    assert_equal(flat(loop.lower).detach(), y)
    assert_equal(flat(auxiliary.blocks), z)
    assert_equal(loop.upper_step.average[0], h)
    assert z.abs().min() > 1e-3 and h.abs().min() > 1e-3


def test_bases_are_for_matrices_wider_than_the_rank() -> None:
    shapes = [(2, 5), (2, 3), (1, 4), (7,), (2, 2, 7), ()]
    lower = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    settings = {"upper_learning_rate": 0.1, "lower_learning_rate": 0.1, "auxiliary": Auxiliary(lower)}
    loop = SingleLoop([torch.zeros(1, requires_grad=True)], lower, **settings, rank=3, generator=seeded(0))
    first, second = loop.draw_bases(), loop.draw_bases()
    assert [None if basis is None else tuple(basis.shape) for basis in first] == [
        (5, 3),
        None,
        (4, 3),
        None,
        None,
        None,
    ]
    assert not torch.equal(first[0], second[0])  # fresh at every step
    full = SingleLoop([torch.zeros(1, requires_grad=True)], lower, **settings)
    assert full.draw_bases() == [None] * len(shapes)


def test_losses_may_lack_a_variable_or_a_curvature() -> None:
    """f of y alone, of x alone and of neither, g linear: what is missing counts as zero."""
    x = [torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)]
    y = [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    auxiliary = Auxiliary(y, learning_rate=1.0)
    loop = SingleLoop(
        x, y, upper_learning_rate=0.0, lower_learning_rate=0.0, auxiliary=auxiliary, moving_average=1.0
    )  # fmt: skip

    def lower(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return y[0].sum() + (x[0] * y[1]).sum()

    loop.step(lower, lambda x, y: 3 * y[1].sum())
    assert_exact(auxiliary.blocks, [torch.zeros(2), torch.full((2,), 3.0)])
    assert_exact(loop.upper_step.average, [torch.zeros(2), torch.zeros(1)])
    loop.step(lower, lambda x, y: 5 * x[1].sum())
    assert_exact(loop.upper_step.average, [torch.full((2,), -3.0), torch.full((1,), 5.0)])
    loop.step(lambda x, y: y[0].sum() - y[1].sum(), lambda x, y: torch.tensor(2.0))
    assert_exact(auxiliary.blocks, [torch.zeros(2), torch.full((2,), 3.0)])
    assert_exact(loop.upper_step.average, [torch.zeros(2), torch.zeros(1)])


def test_rejects_a_rank_without_a_generator() -> None:
    y = [torch.zeros(1, 4, requires_grad=True)]
    rates = {"upper_learning_rate": 0.1, "lower_learning_rate": 0.1}
    with pytest.raises(ValueError, match="A `rank` needs a `generator` to draw subspaces with."):
        SingleLoop(y, y, **rates, auxiliary=Auxiliary(y), rank=2)


# ---------------------------------------------------------------------------------------------------------------------
# SingleLoop: where it goes


@pytest.fixture(scope="module")
def ridge() -> RidgeBilevel:
    return RidgeBilevel.random(num_train=30, num_target=20, dim=6, ridge=0.3, seed=0)


def ridge_loop(ridge: RidgeBilevel, alpha: Tensor, upper_learning_rate: float, rank: int | None) -> SingleLoop:
    """A loop over the weights of the samples, with the model in two blocks: a matrix, and a vector that stays full."""
    lower = [
        torch.zeros(1, 4, dtype=torch.float64, requires_grad=True),
        torch.zeros(2, dtype=torch.float64, requires_grad=True),
    ]
    top = torch.linalg.eigvalsh(ridge.lower_hessian(alpha)).max().item()
    return SingleLoop(
        [alpha.clone().requires_grad_()],
        lower,
        upper_learning_rate=upper_learning_rate,
        lower_learning_rate=1 / top * (1 if rank is None else rank / 4),
        auxiliary=Auxiliary(lower, learning_rate=1 / top),
        moving_average=0.5,
        rank=rank,
        generator=seeded(0),
    )


def uneven_weights(num: int) -> Tensor:
    return 0.5 + torch.rand(num, generator=seeded(1), dtype=torch.float64)


@pytest.mark.parametrize(("rank", "num_steps", "tolerance"), [(None, 60, 1e-9), (2, 150, 1e-9)])
def test_hypergradient_at_fixed_weights_is_the_exact_one(
    ridge: RidgeBilevel, rank: int | None, num_steps: int, tolerance: float
) -> None:
    """In subspaces too: with the one-sided estimator the noise of y and z dies out at their solutions."""
    alpha = uneven_weights(len(ridge.x))
    loop = ridge_loop(ridge, alpha, upper_learning_rate=1e-300, rank=rank)
    for _ in range(num_steps):
        loop.step(lambda x, y: ridge.lower_loss(x[0], flat(y)), lambda x, y: ridge.upper_loss(flat(y)))
    assert_exact(loop.upper[0].detach(), alpha)
    exact = ridge.hypergradient(alpha)
    assert ((loop.upper_step.average[0] - exact).norm() / exact.norm()).item() < tolerance
    assert relative_error([flat(loop.lower).detach()], [ridge.lower_solution(alpha)]) < tolerance


@pytest.mark.parametrize(("rank", "num_steps", "tolerance"), [(None, 150, 1e-6), (2, 200, 1e-6)])
def test_loop_ends_where_the_exact_hypergradient_vanishes(
    ridge: RidgeBilevel, rank: int | None, num_steps: int, tolerance: float
) -> None:
    """With a penalty on unequal weights, so that the weights have an optimum of their own."""
    start, pull = uneven_weights(len(ridge.x)), 0.05

    def exact(alpha: Tensor) -> Tensor:
        return ridge.hypergradient(alpha) + pull * (alpha - 1)

    def upper(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return ridge.upper_loss(flat(y)) + 0.5 * pull * (x[0] - 1).square().sum()

    loop = ridge_loop(ridge, start, upper_learning_rate=2.0, rank=rank)
    for _ in range(num_steps):
        loop.step(lambda x, y: ridge.lower_loss(x[0], flat(y)), upper)
    alpha = loop.upper[0].detach()
    assert exact(alpha).norm() < tolerance * exact(start).norm()
    assert pull * (alpha - 1).norm() > 0.1 * exact(start).norm()  # the data have their say
    assert ridge.upper_loss(ridge.lower_solution(alpha)) < ridge.upper_loss(ridge.lower_solution(start))


@pytest.mark.parametrize(
    ("estimator", "expected", "tolerance"),
    [("naive", -20 / 39, 0.05), ("one_sided", -1.0, 1e-4), ("bi_probe", -1.0, 0.15)],
)
def test_noisy_loop_on_the_counter_example(estimator: str, expected: float, tolerance: float) -> None:
    """The mean of x over the last 200 steps: its standard deviation over seeds is a quarter of the tolerance, or less."""
    hessian = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    generator = seeded(0)
    estimate = {
        "naive": restricted_on_both_sides,
        "one_sided": one_sided,
        "bi_probe": partial(bi_probe, generator=generator),
    }[estimator]
    loop = SingleLoop(
        [x],
        [y],
        upper_learning_rate=0.2,
        lower_learning_rate=0.1,
        auxiliary=Auxiliary([y], learning_rate=0.15),
        moving_average=0.3,
        rank=2,
        estimate=estimate,
        generator=generator,
    )
    tail = []
    for k in range(300):
        loop.step(
            lambda x, y: 0.5 * (y[0] @ hessian * y[0]).sum() - x[0][0] * y[0][0, 0],
            lambda x, y: 0.5 * x[0][0].square() + y[0][0, 0],
        )
        if k >= 100:
            tail.append(x.item())
    assert sum(tail) / len(tail) == pytest.approx(expected, abs=tolerance)
