"""From sample weights to the coefficients of losses: the edges of the normalisation."""

import pytest
import torch

from hf_bilevel.core.weights import loss_coefficients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_derivative_by_finite_differences(dtype: torch.dtype) -> None:
    weights, counts = torch.tensor([0.2, 0.0, 0.7], dtype=torch.float64), torch.tensor([2, 1, 3])
    slopes = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)

    def total(values: torch.Tensor) -> torch.Tensor:
        return (loss_coefficients(values.to(dtype), counts, 6, normalise=True) * slopes).sum()

    leaf = weights.clone().requires_grad_()
    total(leaf).backward()
    if dtype == torch.float64:
        steps = 1e-6 * torch.eye(3, dtype=dtype)
        expected = torch.stack([(total(weights + step) - total(weights - step)) / 2e-6 for step in steps])
        assert torch.allclose(leaf.grad, expected, atol=1e-8)
    assert leaf.grad.abs().max() < 10


@pytest.mark.parametrize("num", [1, 4])
def test_weights_that_are_all_zero_have_a_derivative_of_ordinary_size(num: int) -> None:
    """Projected weights are zero for good: the hypergradient of such a batch must not end the run."""
    weights = torch.zeros(num, requires_grad=True)
    coefficients = loss_coefficients(weights, torch.ones(num), num, normalise=True)
    assert torch.equal(coefficients, torch.zeros(num))
    coefficients.sum().backward()
    assert torch.equal(weights.grad, torch.full((num,), 1 / num))
