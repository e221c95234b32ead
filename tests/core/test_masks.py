"""Coreset search: its gradient by enumerating every draw, its steps against torch's Adam, its result against every subset."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_bilevel.core.coreset import (
    CoresetProbabilities,
    best_sampled_mask,
    coreset_step,
    cosine_decay,
    cubic_size,
    policy_gradient,
    resize_mask,
    sample_masks,
    search_progress,
    straight_through_masks,
    top_mask,
    uniform_masks,
)
from hf_bilevel.core.projections import projection_capped_simplex

wide = partial(torch.tensor, dtype=torch.float64)
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def all_masks(num: int) -> Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=num)))


def chances(masks: Tensor, s: Tensor) -> Tensor:
    return torch.where(masks, s, 1 - s).prod(-1)


def rough_losses(num: int, seed: int = 0) -> Tensor:
    """One loss for each mask of a pool, without any structure, and far from 0."""
    return 20 + torch.randn(2**num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


def test_cubic_size_by_hand() -> None:
    sizes = [cubic_size(t, 100, 20, start=4, end=8) for t in range(11)]
    assert sizes[:5] == [100] * 5 and sizes[8:] == [20] * 3
    assert sizes[5:8] == pytest.approx([20 + 80 * 27 / 64, 20 + 80 / 8, 20 + 80 / 64])
    assert [cubic_size(t, 100, 20, start=3, end=3) for t in (2, 3, 4)] == [100, 20, 20]
    assert [cubic_size(t, 50, 50, start=1, end=5) for t in range(7)] == [50] * 7


@given(st.integers(1, 10**6), st.floats(0, 1), st.integers(0, 500), st.integers(0, 500))
def test_cubic_size_falls_from_one_end_to_the_other(num: int, share: float, start: int, length: int) -> None:
    size, end = share * num, start + length
    sizes = [cubic_size(t, num, size, start, end) for t in range(end + 3)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(sizes))
    assert sizes[end:] == [size] * 3
    assert sizes[:start] == [num] * start
    if length:
        assert sizes[start] == num
    assert all(size <= value <= num for value in sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def test_masks_have_the_frequencies_of_their_probabilities() -> None:
    s = torch.tensor([0.0, 1.0, 0.1, 0.5, 0.9])
    masks = sample_masks(s, 4000, torch.Generator().manual_seed(0))
    assert masks.shape == (4000, 5) and masks.dtype == torch.bool
    frequencies = masks.double().mean(0)
    assert frequencies[:2].tolist() == [0, 1]
    assert float((frequencies - s).abs().max()) < 4 * math.sqrt(0.25 / 4000)
    # All samples of all masks are independent: pairs have the products.
    pairs = masks.double().T @ masks.double() / 4000
    off = ~torch.eye(5, dtype=torch.bool)
    assert float((pairs - s[:, None].double() * s.double())[off].abs().max()) < 0.03
    assert float((masks[1:] & masks[:-1]).double().mean(0).sub(s.double().square()).abs().max()) < 0.03


def test_masks_are_a_function_of_the_generator() -> None:
    s = torch.full((200,), 0.4)
    five, two = (sample_masks(s, num, torch.Generator().manual_seed(3)) for num in (5, 2))
    assert torch.equal(five[:2], two)
    assert not torch.equal(five, sample_masks(s, 5, torch.Generator().manual_seed(4)))
    state = torch.get_rng_state()
    sample_masks(s, 2, torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())


def test_small_probabilities_are_not_exceeded() -> None:
    """A float32 draw is 0 once in 2^24 times; with this seed there is one."""
    num, seed = 2**23, 1
    assert (torch.rand(num, generator=torch.Generator().manual_seed(seed)) == 0).any()
    assert not sample_masks(torch.tensor(1e-12).expand(num), 1, torch.Generator().manual_seed(seed)).any()


# ---------------------------------------------------------------------------------------------------------------------
# The gradient


@pytest.mark.parametrize(("num", "num_masks"), [(4, 2), (6, 2), (4, 3)])
def test_policy_gradient_is_unbiased(num: int, num_masks: int) -> None:
    """The expectation over all tuples of masks, against autograd through the expected loss."""
    masks, losses = all_masks(num), rough_losses(num)
    s = wide([0.7, 0.2, 0.5, 0.04, 0.9, 0.35])[:num].requires_grad_()
    (exact,) = torch.autograd.grad((chances(masks, s) * losses).sum(), s)
    s = s.detach()
    probability, expected, total = chances(masks, s), torch.zeros(num, dtype=torch.float64), 0.0
    for chosen in itertools.product(range(2**num), repeat=num_masks):
        index = list(chosen)
        chance = probability[index].prod()
        gradient, dropped = policy_gradient(masks[index], losses[index], s)
        expected += chance * gradient
        total += float(chance)
        assert int(dropped) == 0
    assert total == pytest.approx(1, abs=1e-12)
    close(expected, exact)
    assert float(exact.abs().min()) > 0.01


@pytest.mark.parametrize("num_masks", [2, 3])
def test_policy_gradient_without_the_masks_that_diverge(num_masks: int) -> None:
    """If two are left, its expectation is the gradient of the expected loss of the masks that do not diverge."""
    masks, losses = all_masks(4), rough_losses(4, seed=1)
    losses[[0, 3, 7, 12]] = wide([math.nan, math.inf, -math.inf, math.nan])
    finite = losses.isfinite()
    s = wide([0.7, 0.2, 0.5, 0.4]).requires_grad_()
    probability = chances(masks[finite], s)
    (exact,) = torch.autograd.grad((probability * losses[finite]).sum() / probability.sum(), s)
    s = s.detach()
    probability, expected, total = chances(masks, s), torch.zeros(4, dtype=torch.float64), 0.0
    for chosen in itertools.product(range(16), repeat=num_masks):
        index = list(chosen)
        gradient, dropped = policy_gradient(masks[index], losses[index], s)
        kept = int(finite[index].sum())
        assert int(dropped) == num_masks - kept
        if kept < 2:
            assert gradient.tolist() == [0] * 4
        else:
            expected += probability[index].prod() * gradient
            total += float(probability[index].prod())
    assert 0.1 < total < 0.95
    close(expected / total, exact)


def definition(masks: Tensor, losses: Tensor, s: Tensor) -> Tensor:
    """Mask by mask: the loss less the mean of the others', times the derivative of ln p."""
    terms = []
    for c in range(len(masks)):
        others = [float(losses[j]) for j in range(len(masks)) if j != c]
        leaf = s.clone().requires_grad_()
        (score,) = torch.autograd.grad(chances(masks[c], leaf).log(), leaf)
        terms.append((float(losses[c]) - sum(others) / len(others)) * score)
    return torch.stack(terms).mean(0)


@pytest.mark.parametrize("num_masks", [2, 3, 7])
def test_policy_gradient_is_its_definition(num_masks: int) -> None:
    generator = torch.Generator().manual_seed(num_masks)
    s = torch.rand(30, generator=generator, dtype=torch.float64)
    masks = sample_masks(s, num_masks, generator)
    losses = torch.randn(num_masks, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        policy_gradient(masks, losses, s)[0], definition(masks, losses, s), rtol=1e-10, atol=1e-10
    )
    # A dropped mask leaves the estimate of the others.
    more = torch.cat([masks[:1], ~masks[:1], masks[1:]])
    with_nan = torch.cat([losses[:1], wide([math.nan]), losses[1:]])
    gradient, dropped = policy_gradient(more, with_nan, s)
    close(gradient, policy_gradient(masks, losses, s)[0])
    assert int(dropped) == 1


def test_the_baseline_lowers_the_variance() -> None:
    masks, losses, s = all_masks(4), rough_losses(4), wide([0.7, 0.2, 0.5, 0.4])
    probability = chances(masks, s)
    scores = torch.where(masks, 1 / s, -1 / (1 - s))
    exact = probability @ (losses[:, None] * scores)

    def variance(estimate) -> float:
        pairs = itertools.product(range(16), repeat=2)
        return sum(
            float(probability[i] * probability[j] * (estimate([i, j]) - exact).square().sum()) for i, j in pairs
        )

    with_baseline = variance(lambda index: policy_gradient(masks[index], losses[index], s)[0])
    without = variance(lambda index: (losses[index, None] * scores[index]).mean(0))
    assert with_baseline < 0.02 * without


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_settled_probabilities_have_no_gradient(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    s = torch.tensor([0.0, 1.0, 0.5, tiny, 1 - torch.finfo(dtype).eps / 2], dtype=dtype)
    masks = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 0, 0, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    for seed in range(10):
        losses = 1e3 * torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        gradient, _ = policy_gradient(masks, losses, s)
        assert gradient.dtype == dtype and float(gradient[2]) != 0
        # Nearly settled ones neither: all masks agree about them, and no rounding error is divided by their variance.
        assert gradient[[0, 1, 3, 4]].tolist() == [0, 0, 0, 0]
    # Masks that were not drawn from these probabilities do no harm.
    gradient, _ = policy_gradient(~masks[:, :2], losses, s[:2])
    assert gradient.tolist() == [0, 0]


def test_a_shift_of_the_losses_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    s = torch.rand(50, generator=generator)
    masks = sample_masks(s, 4, generator)
    losses = wide([1.0, 2.0, 4.0, 8.0])
    plain, _ = policy_gradient(masks, losses, s)
    torch.testing.assert_close(policy_gradient(masks, losses + 1e6, s)[0], plain, rtol=1e-5, atol=1e-6)
    assert policy_gradient(masks, torch.full((4,), 3.3), s)[0].abs().max() < 1e-4
    # Losses that overflow in a sum do not spoil it either.
    large = torch.tensor([1e38, 2e38, 3e38, 3e38])
    direction, _ = policy_gradient(masks, large, s.double())
    assert direction.isfinite().all() and direction.abs().max() > 0


def test_policy_gradient_does_not_wait_for_the_device() -> None:
    masks = torch.empty(3, 10, dtype=torch.bool, device="meta")
    gradient, dropped = policy_gradient(masks, torch.empty(3, device="meta"), torch.empty(10, device="meta"))
    assert gradient.shape == (10,) and dropped.shape == ()


@pytest.mark.parametrize(("num_masks", "num_losses"), [(1, 1), (3, 2), (2, 3)])
def test_policy_gradient_needs_two_masks_and_their_losses(num_masks: int, num_losses: int) -> None:
    with pytest.raises(ValueError, match=rf"at least two masks .* got {num_masks} masks .*\({num_losses},\)"):
        policy_gradient(torch.ones(num_masks, 4, dtype=torch.bool), torch.zeros(num_losses), torch.full((4,), 0.5))


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def test_coreset_step_by_hand() -> None:
    s, g = wide([0.5, 0.25, 0.75]), wide([-1.0, 2.0, 0.5])
    close(coreset_step(s, g, 0.1, 3), wide([0.6, 0.05, 0.7]))
    close(coreset_step(s, g, 0.5, 3), wide([1.0, 0.0, 0.5]))
    close(coreset_step(s, g, 0.1, 1.05), wide([0.5, 0.0, 0.6]) - wide([0.025, 0.0, 0.025]))


def gradients(num: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(num, 5, generator=torch.Generator().manual_seed(num), dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_steps_are_those_of_adam_projected(scale: float) -> None:
    start, rates, sizes = wide([0.5, 0.4, 0.6, 0.3, 0.5]), [0.1, 0.05, 0.2, 0.1, 0.01, 0.05], [4, 3, 2.5, 2, 2, 2]
    search = CoresetProbabilities(start, max_norm=3.0)
    leaf = start.clone().requires_grad_()
    adam = torch.optim.Adam([leaf])
    for g, rate, size in zip(gradients(6, scale), rates, sizes, strict=True):
        search.step(g, rate, size)
        adam.param_groups[0]["lr"] = rate
        leaf.grad = g.clone()
        torch.nn.utils.clip_grad_norm_([leaf], 3.0)
        adam.step()
        with torch.no_grad():
            leaf.copy_(projection_capped_simplex(leaf, size))
        torch.testing.assert_close(search.probabilities, leaf.detach(), rtol=0, atol=1e-6)
        assert float(search.probabilities.sum()) <= size + 1e-12
    assert search.num_updates == 6
    close(start, wide([0.5, 0.4, 0.6, 0.3, 0.5]))
    search = CoresetProbabilities(start)
    start.zero_()
    assert float(search.probabilities.min()) == 0.3


def test_betas_are_those_of_adam() -> None:
    search = CoresetProbabilities(wide([0.5] * 5), max_norm=math.inf, betas=(0.5, 0.9))
    leaf = wide([0.5] * 5).requires_grad_()
    adam = torch.optim.Adam([leaf], lr=0.02, betas=(0.5, 0.9))
    for g in gradients(4, 50.0):
        search.step(g, 0.02, 5)
        leaf.grad = g.clone()
        adam.step()
    torch.testing.assert_close(search.probabilities, leaf.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("bad", [[math.nan, 0, 0, 0, 1], [math.inf, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
def test_a_gradient_that_says_nothing_only_lets_the_probabilities_follow_the_size(bad: list[float]) -> None:
    search, plain = (CoresetProbabilities(wide([0.5, 0.4, 0.6, 0.3, 0.5])) for _ in range(2))
    for g in gradients(3):
        before = search.probabilities
        search.step(wide(bad), 0.1, 5)
        assert torch.equal(search.probabilities, before)
        search.step(g, 0.1, 5)
        plain.step(g, 0.1, 5)
    for key, value in plain.state_dict().items():
        assert (torch.equal if isinstance(value, Tensor) else int.__eq__)(search.state_dict()[key], value)
    search.step(wide(bad), 0.1, 0.8)
    close(search.probabilities, projection_capped_simplex(plain.probabilities, 0.8))


def test_a_search_continues_from_its_state() -> None:
    whole, steps = CoresetProbabilities(wide([0.5, 0.4, 0.6, 0.3, 0.5])), gradients(8)
    for t, g in enumerate(steps):
        if t == 4:
            state = whole.state_dict()
        whole.step(g, 0.05, 2.5)
    for _ in range(2):  # the state is not changed by who goes on from it
        resumed = CoresetProbabilities(wide([0.1] * 5))
        resumed.load_state_dict(state)
        for g in steps[4:]:
            resumed.step(g, 0.05, 2.5)
        for key, value in whole.state_dict().items():
            assert (torch.equal if isinstance(value, Tensor) else int.__eq__)(resumed.state_dict()[key], value)


def test_search_progress() -> None:
    assert search_progress(wide([0.0, 1.0, 1.0])) == {"expected_size": 2, "entropy": 0, "settled": 1}
    s = torch.tensor([0.005, 0.3, 0.995, 0.5, 0.02])
    progress = search_progress(s)
    entropy = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in s.tolist()]
    assert progress["entropy"] == pytest.approx(sum(entropy) / 5, rel=1e-12)
    assert progress["expected_size"] == pytest.approx(sum(s.tolist()), rel=1e-12)
    assert progress["settled"] == pytest.approx(2 / 5)
    assert search_progress(s, margin=0.3 + 1e-6)["settled"] == pytest.approx(4 / 5)
    assert search_progress(torch.full((7,), 0.5))["entropy"] == pytest.approx(math.log(2))
    # A float32 sum would be off by more.
    assert search_progress(torch.full((1_000_001,), 0.3))["expected_size"] == pytest.approx(300_000.3, abs=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# The final coreset


@given(st.data())
def test_resize_mask_against_sorting_by_hand(data: st.DataObject) -> None:
    entry = st.sampled_from([0.0, 0.25, 0.5, 1.0])  # many ties
    s = data.draw(st.lists(entry, min_size=1, max_size=8))
    mask = data.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s)))
    size = data.draw(st.integers(0, len(s)))
    resized = resize_mask(torch.tensor(mask), torch.tensor(s), size)
    assert resized.dtype == torch.bool and int(resized.sum()) == size
    order = sorted(range(len(s)), key=lambda i: (not mask[i], -s[i], i))
    assert resized.nonzero().flatten().tolist() == sorted(order[:size])
    top = sorted(range(len(s)), key=lambda i: (-s[i], i))
    assert top_mask(torch.tensor(s), size).nonzero().flatten().tolist() == sorted(top[:size])


def test_many_ties_keep_the_first() -> None:
    s, places = torch.full((5000,), 0.1), torch.arange(5000)
    assert torch.equal(top_mask(s, 70), places < 70)
    assert torch.equal(resize_mask(places >= 100, s, 70), (places >= 100) & (places < 170))
    assert torch.equal(resize_mask(places >= 4990, s, 70), (places >= 4990) | (places < 60))


@pytest.mark.parametrize("size", [-1, 4])
def test_a_coreset_larger_than_the_pool(size: int) -> None:
    with pytest.raises(ValueError, match=f"A coreset of 3 samples can have 0 to 3 of them, got {size}"):
        top_mask(torch.tensor([0.1, 0.2, 0.3]), size)


class Asked:
    """Losses of masks: costs of their samples. Remembers the masks."""

    def __init__(self, costs: list[float]) -> None:
        self.costs = wide(costs)
        self.masks = torch.zeros(0, len(costs), dtype=torch.bool)

    def __call__(self, masks: Tensor) -> Tensor:
        self.masks = masks
        return torch.where(masks, self.costs, 0.0).sum(1)


def test_best_sampled_mask() -> None:
    s, ask = torch.tensor([0.4, 0.5, 0.6, 0.5, 0.0, 0.5]), Asked([9.0, 1.0, 2.0, math.nan, -50.0, 3.0])
    mask, loss = best_sampled_mask(s, 2, 30, ask, torch.Generator().manual_seed(0))
    assert mask.tolist() == [False, True, True, False, False, False] and float(loss) == 3
    drawn = sample_masks(s, 30, torch.Generator().manual_seed(0))
    expected = {tuple(resize_mask(m, s, 2).tolist()) for m in drawn}
    assert {tuple(m) for m in ask.masks.tolist()} == expected and len(ask.masks) == len(expected) < 30
    assert (ask.masks.sum(1) == 2).all()
    again, _ = best_sampled_mask(s, 2, 30, ask, torch.Generator().manual_seed(0))
    assert torch.equal(mask, again)


def test_a_settled_search_asks_once() -> None:
    s, ask = torch.tensor([1.0, 0.0, 1.0]), Asked([1.0, 1.0, 1.0])
    mask, loss = best_sampled_mask(s, 2, 20, ask, torch.Generator().manual_seed(0))
    assert mask.tolist() == [True, False, True] and float(loss) == 2 and len(ask.masks) == 1


def test_no_final_coreset_with_a_finite_loss() -> None:
    with pytest.raises(ValueError, match="None of the 1 masks .* has a finite loss"):
        best_sampled_mask(torch.tensor([1.0, 0.0]), 1, 3, Asked([math.inf, 0.0]), torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------------------
# A whole search


class RidgePool:
    """Ridge regression on part of a pool with wrong targets; the upper loss is on clean samples."""

    def __init__(self, num: int = 9, num_wrong: int = 3) -> None:
        generator = torch.Generator().manual_seed(5)
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        truth = normal(2)
        self.x, self.clean_x = normal(num, 2), normal(40, 2)
        self.y = self.x @ truth + 0.1 * normal(num)
        self.y[:num_wrong] = -self.y[:num_wrong] + normal(num_wrong)
        self.clean_y = self.clean_x @ truth

    def losses(self, masks: Tensor) -> Tensor:
        weighted = masks.double()[:, :, None] * self.x
        gram = weighted.mT @ self.x + 0.01 * torch.eye(2, dtype=torch.float64)
        theta = torch.linalg.solve(gram, weighted.mT @ self.y)
        return (theta @ self.clean_x.T - self.clean_y).square().mean(1)


def test_the_search_finds_the_best_of_all_subsets() -> None:
    pool, size, num_steps = RidgePool(), 3, 400
    subsets = torch.stack([m for m in all_masks(9) if int(m.sum()) == size])
    every = pool.losses(subsets)
    best = subsets[every.argmin()]
    assert float(every.sort().values[1] / every.min()) > 1.05  # no tie
    generator = torch.Generator().manual_seed(0)
    search = CoresetProbabilities(torch.full((9,), 0.5, dtype=torch.float64))
    for t in range(num_steps):
        masks = sample_masks(search.probabilities, 10, generator)
        gradient, dropped = policy_gradient(masks, pool.losses(masks).log(), search.probabilities)
        assert int(dropped) == 0
        rate = 0.05 * (1 + math.cos(math.pi * t / num_steps)) / 2
        search.step(gradient, rate, cubic_size(t, 9, size, start=num_steps // 6, end=6 * num_steps // 10))
    progress = search_progress(search.probabilities)
    assert progress["expected_size"] <= size + 1e-9
    assert torch.equal(top_mask(search.probabilities, size), best)
    mask, loss = best_sampled_mask(search.probabilities, size, 10, pool.losses, generator)
    assert torch.equal(mask, best) and float(loss) == pytest.approx(float(every.min()))


# ---------------------------------------------------------------------------------------------------------------------
# Straight-through masks, uniform masks


def relaxation_slope(s: float, temperature: float, num: int = 200_001) -> Tensor:
    """Slope of the relaxed mask by s at the midpoints of many equal pieces of (0, 1), by central differences."""
    u = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    step = 1e-5

    def relaxed(s: float) -> Tensor:
        return torch.sigmoid((math.log(s / (1 - s)) - torch.log(u / (1 - u))) / temperature)

    return (relaxed(s + step) - relaxed(s - step)) / (2 * step)


def test_straight_through_masks_are_bernoulli() -> None:
    s = wide([0.0, 0.1, 0.5, 0.9, 1.0])
    masks = straight_through_masks(s, 40_000, 0.5, torch.Generator().manual_seed(0))
    assert masks.unique().tolist() == [0, 1] and not masks.requires_grad
    error = 4 * (s * (1 - s) / 40_000).sqrt()
    assert ((masks.mean(0) - s).abs() <= error).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_straight_through_gradient_is_that_of_the_relaxation(temperature: float) -> None:
    """Through a loss with products of masks, against the mean over the uniform numbers by quadrature."""
    s = wide([0.2, 0.7]).requires_grad_()
    num = 100_000
    masks = straight_through_masks(s, num, temperature, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((3 * masks[:, 0] + 2 * masks[:, 0] * masks[:, 1]).mean(), s)
    slopes = [relaxation_slope(float(value), temperature) for value in s.detach()]
    # The other mask is drawn independently, with mean s: d/dm_0 = 3 + 2 m_1, d/dm_1 = 2 m_0.
    expected = torch.stack([(3 + 2 * 0.7) * slopes[0].mean(), 2 * 0.2 * slopes[1].mean()])
    spread = torch.stack([5 * slopes[0].square().mean().sqrt(), 2 * slopes[1].square().mean().sqrt()])
    assert ((gradient - expected).abs() <= 4 * spread / math.sqrt(num)).all()
    assert not torch.isclose(gradient[0], wide(4.4), rtol=0.01) or temperature < 1  # biased, as documented


def test_straight_through_gradient_of_a_single_draw() -> None:
    s = wide([0.3]).requires_grad_()
    mask = straight_through_masks(s, 1, 0.4, torch.Generator().manual_seed(5))
    u = float(torch.rand(1, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    (gradient,) = torch.autograd.grad(mask.sum(), s)
    step = 1e-6

    def relaxed(s: float) -> float:
        return 1 / (1 + math.exp((math.log(u / (1 - u)) - math.log(s / (1 - s))) / 0.4))

    assert float(mask.detach()) == (u < 0.3)
    assert float(gradient) == pytest.approx((relaxed(0.3 + step) - relaxed(0.3 - step)) / (2 * step), rel=1e-7)


def test_settled_probabilities_pass_no_gradient_through() -> None:
    s = torch.tensor([0.0, 1.0, 0.5], requires_grad=True)
    straight_through_masks(s, 3, 0.5, torch.Generator().manual_seed(0)).sum().backward()
    assert s.grad[:2].tolist() == [0, 0] and s.grad[2] > 0


def test_uniform_masks_draw_every_subset_alike() -> None:
    masks = uniform_masks(4, 2, 6_000, torch.Generator().manual_seed(0))
    assert masks.dtype == torch.bool and (masks.sum(1) == 2).all()
    subsets, counts = masks.unique(dim=0, return_counts=True)
    assert len(subsets) == 6
    assert ((counts - 1000).abs() < 4 * math.sqrt(6000 * 5 / 36)).all()


def test_cosine_decay() -> None:
    assert [cosine_decay(t, 6) for t in (0, 3, 6)] == pytest.approx([1, 0.5, 0])
    assert cosine_decay(2, 6) == pytest.approx(0.75)
