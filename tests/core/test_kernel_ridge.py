"""Kernel ridge regression against a solution of its normal equations, and its differences against fitting again."""

import itertools

import pytest
import torch

from hf_bilevel.core.coreset import CoresetProbabilities, sample_masks, top_mask
from hf_bilevel.core.kernel_ridge import KernelRidge


def make_problem(num: int = 7, num_upper: int = 5, rank: int = 4, ridge: float = 0.3, pool_share: float = 0.0):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num, rank, generator=generator, dtype=torch.float64)
    upper = torch.randn(num_upper, rank, generator=generator, dtype=torch.float64)
    targets = torch.randn(num, 3, generator=generator, dtype=torch.float64)
    upper_targets = torch.randn(num_upper, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(num, generator=generator, dtype=torch.float64)
    problem = KernelRidge(
        features @ features.T, targets, upper @ features.T, upper_targets, ridge, pool_share, weights
    )

    def loss(mask: torch.Tensor) -> float:
        """Ridge regression on the features themselves, without any kernel."""
        x, y = features[mask], targets[mask]
        weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(rank, dtype=torch.float64), x.T @ y)
        return float((upper @ weights - upper_targets).square().sum(1).mean())

    return problem, loss


def all_masks(num: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=num)))


def test_every_mask_has_the_loss_of_ridge_regression_and_the_differences_of_fitting_again() -> None:
    problem, loss = make_problem()
    for mask in all_masks(7):
        found, differences = problem.loss_and_differences(mask)
        assert float(found) == pytest.approx(loss(mask), rel=1e-9)
        for i in range(7):
            without, with_it = mask.clone(), mask.clone()
            without[i], with_it[i] = False, True
            assert float(differences[i]) == pytest.approx(loss(with_it) - loss(without), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_a_pool_share_judges_every_sample_by_what_the_others_say(share: float) -> None:
    problem, of_upper = make_problem(pool_share=share)
    kernel, targets, weights = problem._kernel, problem._targets, problem._weights

    def loss(mask: torch.Tensor) -> float:
        distances = []
        for i in range(7):
            others = mask.clone()
            others[i] = False
            a = kernel[others][:, others] + 0.3 * torch.eye(int(others.sum()), dtype=torch.float64)
            said = kernel[i, others] @ torch.linalg.solve(a, targets[others])
            distances.append(weights[i] * (said - targets[i]).square().sum())
        return (1 - share) * of_upper(mask) + share * float(torch.stack(distances).mean())

    for mask in all_masks(7):
        found, differences = problem.loss_and_differences(mask)
        assert float(found) == pytest.approx(loss(mask), rel=1e-9)
        for i in range(7):
            without, with_it = mask.clone(), mask.clone()
            without[i], with_it[i] = False, True
            assert float(differences[i]) == pytest.approx(loss(with_it) - loss(without), rel=1e-8, abs=1e-10)


def test_the_mean_of_the_differences_is_the_gradient_of_the_expected_loss() -> None:
    problem, loss = make_problem(num=5)
    masks, losses = all_masks(5), torch.tensor([loss(mask) for mask in all_masks(5)], dtype=torch.float64)
    s = torch.tensor([0.1, 0.9, 0.5, 0.0, 1.0], dtype=torch.float64).requires_grad_()  # the ends included
    chances = torch.where(masks, s, 1 - s).prod(1)
    (expected,) = torch.autograd.grad(chances @ losses, s)
    differences = torch.stack([problem.loss_and_differences(mask)[1] for mask in masks])
    torch.testing.assert_close(chances.detach() @ differences, expected)


def test_a_sample_that_appears_twice_is_worth_less_the_second_time() -> None:
    kernel, targets = torch.ones(2, 2).double(), torch.ones(2, 1).double()
    problem = KernelRidge(kernel, targets, kernel, targets, ridge=0.5)
    first = problem.loss_and_differences(torch.tensor([False, False]))[1]
    second = problem.loss_and_differences(torch.tensor([True, False]))[1]
    assert first[1] < second[1] < 0
    assert float(first[1]) == pytest.approx((1 / 3) ** 2 - 1)


def test_searching_with_the_differences_finds_one_of_the_two_best_of_84_subsets() -> None:
    problem, loss = make_problem(num=9, rank=6)
    masks = all_masks(9)
    losses = sorted(loss(mask) for mask in masks[masks.sum(1) == 3])
    search = CoresetProbabilities(torch.full((9,), 1 / 3), shared_scale=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(150):
        drawn = sample_masks(search.probabilities, 2, generator)
        gradient = torch.stack([problem.loss_and_differences(mask)[1] for mask in drawn]).mean(0)
        search.step(gradient.float(), 0.1 * (1 - step / 150), 3)
    assert loss(top_mask(search.probabilities, 3)) <= losses[1] + 1e-12 and losses[1] < 0.6 * losses[42]


@pytest.mark.parametrize("wrong", ["kernel", "targets", "upper", "ridge", "pool_share"])
def test_shapes_and_ridge_are_checked(wrong: str) -> None:
    kernel, targets = torch.eye(3), torch.ones(3, 2)
    arguments = {"kernel": kernel, "targets": targets, "upper_kernel": kernel, "upper_targets": targets, "ridge": 0.1}
    changes = {
        "kernel": {"kernel": kernel[:2]},
        "targets": {"targets": targets[:2]},
        "upper": {"upper_targets": targets[:1]},
        "ridge": {"ridge": 0.0},
        "pool_share": {"pool_share": 1.5},
    }
    messages = {"ridge": "must be positive", "pool_share": r"must be in \[0, 1\]"}
    with pytest.raises(ValueError, match=messages.get(wrong, "need targets")):
        KernelRidge(**{**arguments, **changes[wrong]})
