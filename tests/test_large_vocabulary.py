"""Cross-entropy in chunks of the logits: exact against PyTorch's own, and no more products than it says."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_bilevel import large_vocabulary
from hf_bilevel.large_vocabulary import IGNORE_INDEX, token_losses, weighted_token_losses

NUM, WIDTH, CLASSES = 23, 6, 11


@pytest.fixture(autouse=True, params=["counted", "all rows"])
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Chunks of five rows; with the rows that are needed alone, and, as on an accelerator, all rows."""
    monkeypatch.setattr(large_vocabulary, "CHUNK", 5 * CLASSES)
    monkeypatch.setattr(large_vocabulary, "MIN_ROWS", 1)
    monkeypatch.setattr(large_vocabulary, "_may_wait_for", lambda device: request.param == "counted")
    yield request.param


def problem(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """An output embedding, hidden states, labels of which some are ignored, and coefficients of which some are zero."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, CLASSES, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.mul_(4)
    labels = torch.randint(CLASSES, (NUM,))
    labels[[0, 7, 8, 9, 10, 11, 12, 22]] = IGNORE_INDEX
    coefficients = torch.rand(NUM, dtype=dtype) * (torch.rand(NUM) < 0.6)
    assert 3 < int((coefficients[labels != IGNORE_INDEX] > 0).sum()) < int((labels != IGNORE_INDEX).sum())
    return layer, torch.randn(NUM, WIDTH, dtype=dtype).requires_grad_(), labels, coefficients


def plain(layer: nn.Module, hidden: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    kwargs = {"reduction": "none", "ignore_index": IGNORE_INDEX, "label_smoothing": smoothing}
    return F.cross_entropy(layer(hidden).to(torch.promote_types(hidden.dtype, torch.float32)), labels, **kwargs)


def both(layer: nn.Module, hidden: Tensor, labels: Tensor, coefficients: Tensor, smoothing: float) -> dict[str, Any]:
    """Total and losses of either function."""
    losses = token_losses(layer, hidden, labels, smoothing)
    total, detached = weighted_token_losses(layer, hidden, labels, coefficients, smoothing)
    return {"token": ((losses * coefficients).sum(), losses), "weighted": (total, detached)}


def gradients(total: Tensor, layer: nn.Module, hidden: Tensor) -> list[Tensor]:
    variables = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(total, [v for v in variables if v.requires_grad]))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_gradients_are_those_of_cross_entropy(smoothing: float, bias: bool) -> None:
    layer, hidden, labels, coefficients = problem(bias)
    expected = plain(layer, hidden, labels, smoothing)
    wanted = gradients((expected * coefficients).sum(), layer, hidden)
    for total, losses in both(layer, hidden, labels, coefficients, smoothing).values():
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(total, (expected * coefficients).sum(), rtol=0, atol=1e-12)
        for got, gradient in zip(gradients(3 * total, layer, hidden), wanted, strict=True):
            assert gradient.abs().max() > 1e-2
            torch.testing.assert_close(got, 3 * gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", ["weight", "hidden", "both"])
def test_what_is_not_trained_gets_no_gradient(frozen: str) -> None:
    layer, hidden, labels, coefficients = problem()
    layer.requires_grad_(frozen == "hidden")
    hidden.requires_grad_(frozen == "weight")
    expected = plain(layer, hidden, labels, 0.1)
    wanted = [] if frozen == "both" else gradients((expected * coefficients).sum(), layer, hidden)
    for total, losses in both(layer, hidden, labels, coefficients, 0.1).values():
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
        assert total.requires_grad == (frozen != "both")
        for got, gradient in zip(gradients(total, layer, hidden) if wanted else [], wanted, strict=True):
            torch.testing.assert_close(got, gradient, rtol=0, atol=1e-12)


def test_without_gradients() -> None:
    layer, hidden, labels, coefficients = problem()
    expected = plain(layer, hidden, labels, 0.0).detach()
    with torch.no_grad():
        for total, losses in both(layer, hidden, labels, coefficients, 0.0).values():
            assert not total.requires_grad
            torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)


def test_no_labels_at_all() -> None:
    layer, hidden, labels, coefficients = problem()
    for total, losses in both(layer, hidden, labels.fill_(IGNORE_INDEX), coefficients, 0.2).values():
        assert not losses.any() and not total.any()
        assert not any(g.any() for g in gradients(total, layer, hidden))


def test_a_chunk_has_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_vocabulary, "MIN_ROWS", 9)
    layer, hidden, labels, coefficients = problem()
    sizes: list[int] = []
    log_softmax = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda x, dim: (sizes.append(len(x)), log_softmax(x, dim))[1])
    weighted_token_losses(layer, hidden, labels.fill_(1), coefficients)
    assert sizes == [9, 9, 5]


def test_differentiated_twice() -> None:
    layer, hidden, labels, _ = problem()

    def losses(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        copied = nn.Linear(WIDTH, CLASSES)
        copied._parameters.update(weight=weight, bias=bias)
        return token_losses(copied, hidden, labels, 0.1)

    inputs = (hidden, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(losses, inputs) and torch.autograd.gradgradcheck(losses, inputs)


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_differentiated_twice_under_autocast(states: torch.dtype) -> None:
    layer, hidden, labels, coefficients = problem(dtype=torch.float32)
    hidden = hidden.detach().to(states).requires_grad_()
    results = []
    for function in (plain, token_losses):
        with torch.autocast("cpu", torch.bfloat16):
            total = (function(layer, hidden, labels, 0.1) * coefficients).sum()
        first = torch.autograd.grad(total, [hidden, layer.weight], create_graph=True)
        results.append(torch.autograd.grad(sum(g.float().square().sum() for g in first), [hidden, layer.weight]))
    for wanted, got in zip(*results, strict=True):
        assert got.dtype == wanted.dtype and wanted.any()
        tolerance = 0.05 * float(wanted.abs().max())
        torch.testing.assert_close(got.float(), wanted.float(), rtol=0, atol=tolerance)


def test_a_weighted_sum_is_differentiated_once() -> None:
    layer, hidden, labels, coefficients = problem()
    total, losses = weighted_token_losses(layer, hidden, labels, coefficients)
    assert not losses.requires_grad
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(total, hidden, create_graph=True)
    torch.autograd.grad(total, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated before"):
        torch.autograd.grad(total, hidden)


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_autocast(states: torch.dtype) -> None:
    """As PyTorch's own under autocast: logits are rounded to bfloat16, all else happens in float32."""
    layer, hidden, labels, coefficients = problem(dtype=torch.float32)
    hidden = hidden.detach().to(states).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(layer, hidden, labels, 0.1)
        results = both(layer, hidden, labels, coefficients, 0.1)
    exact = plain(layer, hidden.float(), labels, 0.1)
    assert not torch.equal(exact, expected)
    wanted = gradients((expected * coefficients).sum(), layer, hidden)
    for total, losses in results.values():
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
        for got, gradient in zip(gradients(total, layer, hidden), wanted, strict=True):
            assert got.dtype == gradient.dtype
            scale = float(gradient.abs().max())
            torch.testing.assert_close(got.float(), gradient.float(), rtol=0, atol=0.02 * scale)


def test_small_coefficients_in_half_precision() -> None:
    """Smaller than float16 can hold: only the loss scale, which comes with the backward pass, would lift them."""
    layer, hidden, labels, coefficients = problem(dtype=torch.float32)
    wanted = gradients((plain(layer, hidden, labels, 0.0) * coefficients).sum(), layer, hidden)
    with torch.autocast("cpu", torch.float16):
        total, _ = weighted_token_losses(layer, hidden, labels, 1e-9 * coefficients)
    for got, gradient in zip(gradients(1e9 * total, layer, hidden), wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=0.01 * float(gradient.abs().max()))


def test_large_sums_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger than float16 can hold, but for the coefficients: those must come first."""
    monkeypatch.setattr(large_vocabulary, "MIN_ROWS", 1024)  # one chunk
    torch.manual_seed(0)
    num, layer = 1024, nn.Linear(2, CLASSES)
    hidden, labels = torch.full((num, 2), 100.0, requires_grad=True), torch.ones(num, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16):
        total, _ = weighted_token_losses(layer, hidden, labels, torch.full((num,), 1 / num))
    wanted = gradients(F.cross_entropy(layer(hidden), labels), layer, hidden)
    for got, gradient in zip(gradients(total, layer, hidden), wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=0.01 * float(gradient.abs().max()))


class Scaled(nn.Linear):
    """A layer that is more than its weight."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(F.dropout(inputs, 0.5))


def scaled(layer: nn.Linear) -> nn.Module:
    other = Scaled(WIDTH, CLASSES, dtype=layer.weight.dtype)
    other.load_state_dict(layer.state_dict())
    return other


def patched(layer: nn.Linear) -> nn.Module:
    layer = copy.deepcopy(layer)
    layer.forward = lambda inputs: torch.tanh(F.linear(inputs, layer.weight, layer.bias))
    return layer


@pytest.mark.parametrize("change", [scaled, patched])
def test_layers_that_are_more_than_a_product_are_called(change: Callable[[nn.Linear], nn.Module]) -> None:
    layer, hidden, labels, coefficients = problem()
    layer = change(layer)
    results = []
    for kind in ("plain", "token", "weighted"):
        torch.manual_seed(3)
        if kind == "plain":
            chunks = zip(hidden.split(5), labels.split(5), strict=True)
            losses = torch.cat([plain(layer, *chunk, 0.1) for chunk in chunks])
        elif kind == "token":
            losses = token_losses(layer, hidden, labels, 0.1)
        total = (losses * coefficients).sum()
        if kind == "weighted":
            total, losses = weighted_token_losses(layer, hidden, labels, coefficients, 0.1)
        results.append((losses.detach(), gradients(total, layer, hidden)))
    (expected, wanted), *others = results
    for losses, found in others:
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
        for got, gradient in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, gradient, rtol=0, atol=1e-12)


class Products(TorchDispatchMode):
    """Count multiplications of matrix products, in those of hidden states, width and classes."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            one, two = args[-2:]
            self.total += one.shape[0] * one.shape[1] * two.shape[1]
        return func(*args, **(kwargs or {}))


def test_number_of_products(small_chunks: str) -> None:
    """Rows that do not count are left out where they may be counted."""
    layer, hidden, labels, coefficients = problem()
    labelled = int((labels != IGNORE_INDEX).sum()) if small_chunks == "counted" else NUM
    weighted = int(((labels != IGNORE_INDEX) & (coefficients > 0)).sum()) if small_chunks == "counted" else NUM
    each = WIDTH * CLASSES
    with Products() as products:
        losses = token_losses(layer, hidden, labels)
    assert products.total == labelled * each
    with Products() as products:
        (losses * coefficients).sum().backward()
    assert products.total == 3 * weighted * each
    with Products() as products:
        total, _ = weighted_token_losses(layer, hidden, labels, coefficients)
    assert products.total == 3 * labelled * each
    with Products() as products:
        total.backward()
    assert products.total == 0
    with Products() as products, torch.no_grad():
        weighted_token_losses(layer, hidden, labels, coefficients)
    assert products.total == labelled * each


def test_a_loss_that_is_not_finite_and_not_selected_harms_nothing(small_chunks: str) -> None:
    layer, hidden, labels, _ = problem()
    if small_chunks == "counted":
        with torch.no_grad():
            hidden[1] = torch.inf
        losses = token_losses(layer, hidden, labels)
        assert losses.isnan().tolist() == [i == 1 for i in range(NUM)]
        torch.where(torch.arange(NUM) == 1, 0.0, losses).sum().backward()
        assert layer.weight.grad.isfinite().all() and hidden.grad.isfinite().all()
