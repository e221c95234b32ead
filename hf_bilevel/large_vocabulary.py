r"""Cross-entropy over a large vocabulary from hidden states and an output embedding, a chunk of the logits at a time.

With hidden states h, logits :math:`a = h W^\top + b`, label y and label smoothing :math:`\varepsilon` over V classes, the loss of a
token is :math:`\ell = -(1 - \varepsilon) \log p_y - \frac{\varepsilon}{V} \sum_v \log p_v` with :math:`p = \mathrm{softmax}(a)`, and

.. math:: \frac{\partial \ell}{\partial a} = p - (1 - \varepsilon)\, e_y - \frac{\varepsilon}{V}, \qquad
    \frac{\partial}{\partial h} \sum_i c_i \ell_i = D W, \qquad \frac{\partial}{\partial W} \sum_i c_i \ell_i = D^\top h,
    \qquad D_i = c_i\, \frac{\partial \ell_i}{\partial a_i}.

Where the coefficients c are known before, the gradients are made from a chunk's logits at once; where they follow from the losses, as
in a selection, the logits of the tokens that count are computed a second time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
"""Labels with this value are not predicted, as everywhere in transformers."""

CHUNK = 8 * 2**20
"""Logits of a large vocabulary that exist at a time. They and two copies inside the cross-entropy take 3 * 32 MiB."""

MIN_ROWS = 128
"""Rows of a chunk at least, though their logits be more: every chunk also passes over the whole gradient of the weights."""


def token_losses(layer: nn.Module, hidden: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy of every token.

    Args:
        layer: The output embedding, from hidden states to logits.
        hidden: Its inputs, ``(n, d)``.
        labels: Classes, ``(n,)``; ``IGNORE_INDEX`` for tokens without one.
        label_smoothing: In [0, 1).

    Returns:
        Losses, ``(n,)``, float32 or wider, 0 for tokens without a label; differentiable by hidden states and weights, also twice.

    Cost: the product with the output embedding, and in the backward pass that product again for the tokens whose loss has a
    gradient, beside the two of any linear layer. On a CPU nothing is computed for tokens without a label, or in the backward pass
    without a gradient; elsewhere all tokens are, since to count them would wait for the device. Memory: ``CHUNK`` logits, or those of
    ``MIN_ROWS`` tokens. The gradient of weights in half precision is added up in their dtype, chunk by chunk: of 50 chunks in bfloat16 it
    is right to 1 %.

    Example:
        >>> hidden, layer = torch.randn(3, 2), nn.Linear(2, 5)
        >>> losses = token_losses(layer, hidden, torch.tensor([4, IGNORE_INDEX, 0]))
        >>> bool(torch.allclose(losses[[0, 2]], F.cross_entropy(layer(hidden[[0, 2]]), torch.tensor([4, 0]), reduction="none")))
        True
        >>> losses[1].item()
        0.0
    """
    if not _is_plain(layer):
        return _checkpointed_losses(layer.forward, len(layer.weight), hidden, labels, label_smoothing)
    return _TokenLosses.apply(hidden, layer.weight, layer.bias, labels, label_smoothing)


def weighted_token_losses(
    layer: nn.Module, hidden: Tensor, labels: Tensor, coefficients: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\sum_i c_i \ell_i` for coefficients that are known before the losses.

    Args:
        layer: The output embedding.
        hidden: Its inputs, ``(n, d)``.
        labels: ``(n,)``.
        coefficients: c, ``(n,)``, constants.
        label_smoothing: In [0, 1).

    Returns:
        The sum, a scalar, once differentiable by hidden states and weights; and the losses, ``(n,)``, detached.

    Cost: the three products of any linear layer, all in the forward pass, after which the gradient of the weights is kept for the
    backward pass; so one product less than ``token_losses``. Without gradients, in float16 and for layers that are more than their
    weight, as there. Memory: as there, and the gradients.

    Example:
        >>> hidden, layer = torch.randn(3, 2, requires_grad=True), nn.Linear(2, 5)
        >>> labels, coefficients = torch.tensor([4, 1, 0]), torch.tensor([0.5, 0.0, 2.0])
        >>> total, losses = weighted_token_losses(layer, hidden, labels, coefficients)
        >>> bool(torch.allclose(total, (losses * coefficients).sum()))
        True
        >>> torch.autograd.grad(total, hidden)[0][1]
        tensor([0., 0.])
    """
    coefficients = torch.where(labels == IGNORE_INDEX, 0.0, coefficients)
    # In float16 gradients can be made only when the loss scale has come, with the backward pass.
    if not _is_plain(layer) or not torch.is_grad_enabled() or _dtype_of_product(hidden) == torch.float16:
        losses = token_losses(layer, hidden, labels, label_smoothing)
        return (losses * coefficients).sum(), losses.detach()
    return _WeightedTokenLosses.apply(hidden, layer.weight, layer.bias, labels, coefficients, label_smoothing)


def _is_plain(layer: nn.Module) -> bool:
    """Say whether a layer is its weight and bias, and nothing else happens in it (adapters, quantisation, offloading)."""
    return type(layer) is nn.Linear and type(layer.weight) in (nn.Parameter, Tensor) and "forward" not in vars(layer)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.label_smoothing, ctx.dtype = label_smoothing, _dtype_of_product(hidden)
        ctx.autocast = torch.is_autocast_enabled(hidden.device.type)
        product = _Product(hidden, weight, bias, ctx.dtype)
        losses = product.zeros(len(labels))
        for rows in product.chunks(labels != IGNORE_INDEX):
            losses[rows] = _losses(product.log_probabilities(rows), labels[rows], label_smoothing)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more
            # Aliases: of tied weights the hidden states are a function too, which is not to be differentiated here.
            hidden, weight, bias = (None if t is None else t.view_as(t) for t in (hidden, weight, bias))
            inputs = [t for t, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False) if needed]
            layer = partial(F.linear, weight=weight, bias=bias)
            with torch.autocast(hidden.device.type, ctx.dtype, ctx.autocast):
                losses = _checkpointed_losses(layer, len(weight), hidden, labels, ctx.label_smoothing, draws=False)
            gradients = iter(torch.autograd.grad(losses, inputs, grad, create_graph=True))
            return *(next(gradients) if needed else None for needed in ctx.needs_input_grad[:3]), None, None
        grad = torch.where(labels == IGNORE_INDEX, 0.0, grad)
        product = _Product(hidden, weight, bias, ctx.dtype)
        gradients = _Gradients(product, hidden, weight, bias, ctx.needs_input_grad)
        for rows in product.chunks(grad != 0):
            gradients.add(rows, product.log_probabilities(rows), labels[rows], grad[rows], ctx.label_smoothing)
        return *gradients.found(), None, None


class _WeightedTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        coefficients: Tensor,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        product = _Product(hidden, weight, bias, _dtype_of_product(hidden))
        losses = product.zeros(len(labels))
        coefficients = coefficients.to(losses)
        gradients = _Gradients(product, hidden, weight, bias, ctx.needs_input_grad)
        for rows in product.chunks(labels != IGNORE_INDEX):
            log_probabilities = product.log_probabilities(rows)
            losses[rows] = _losses(log_probabilities, labels[rows], label_smoothing)
            gradients.add(rows, log_probabilities, labels[rows], coefficients[rows], label_smoothing)
        ctx.gradients = gradients.found()
        ctx.mark_non_differentiable(losses)
        return (losses * coefficients).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "This weighted sum of losses of a large vocabulary can be differentiated once, and not with `create_graph=True`: "
                "compute the losses with `unit_losses`."
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "This weighted sum of losses of a large vocabulary was differentiated before, and its gradients are given away, "
                "also with `retain_graph=True`: compute the losses with `unit_losses`."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if not (_may_wait_for(grad.device) and grad == 1):  # a pass over large tensors, most often for nothing
            gradients = tuple(None if g is None else g.mul_(grad) for g in gradients)
        return *gradients, None, None, None


class _Product:
    """The product of hidden states with an output embedding, in a dtype, some rows at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._hidden, self.weight = hidden, weight.to(dtype)
        self._bias = None if bias is None else bias.to(dtype)

    def chunks(self, needed: Tensor) -> list[Tensor | slice]:
        """Cut the rows into chunks: those that are needed; all of them on devices that would have to be waited for."""
        size = _rows_of_chunk(len(self.weight))
        if not _may_wait_for(needed.device):
            return [slice(start, start + size) for start in range(0, len(needed), size)]
        rows = needed.nonzero().flatten()
        return list(rows.split(size)) if len(rows) else []

    def zeros(self, num: int) -> Tensor:
        return torch.zeros(num, dtype=torch.promote_types(self.weight.dtype, torch.float32), device=self.weight.device)

    def inputs(self, rows: Tensor | slice) -> Tensor:
        return self._hidden[rows].to(self.weight.dtype)

    def log_probabilities(self, rows: Tensor | slice) -> Tensor:
        with torch.autocast(self._hidden.device.type, enabled=False):  # all is in its dtype already
            return torch.log_softmax(_wide(F.linear(self.inputs(rows), self.weight, self._bias)), 1)


class _Gradients:
    """Adds up the gradients of hidden states, weight and bias, chunk by chunk."""

    def __init__(
        self, product: _Product, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...]
    ) -> None:
        self._product, self._weight = product, weight
        of_hidden, self._needs_weight, of_bias, *_ = needed
        self._of_hidden = torch.zeros_like(hidden) if of_hidden else None
        self._of_weight: Tensor | None = None  # of its size, so not filled with zeros first
        self._of_bias = torch.zeros_like(bias) if bias is not None and of_bias else None

    def add(
        self,
        rows: Tensor | slice,
        log_probabilities: Tensor,
        labels: Tensor,
        coefficients: Tensor,
        label_smoothing: float,
    ) -> None:
        """Add those of some rows; writes over the log-probabilities."""
        if self._of_hidden is None and not self._needs_weight and self._of_bias is None:
            return
        slopes = log_probabilities.exp_()
        if label_smoothing:
            slopes.sub_(label_smoothing / slopes.shape[1])
        at_label = torch.full_like(labels, label_smoothing - 1, dtype=slopes.dtype)[:, None]
        slopes.scatter_add_(1, labels.clamp(min=0)[:, None], at_label)  # ignored labels have a coefficient of 0
        slopes = slopes.mul_(coefficients.to(slopes)[:, None]).to(self._product.weight.dtype)
        with torch.autocast(slopes.device.type, enabled=False):
            if self._of_bias is not None:
                self._of_bias += slopes.sum(0)
            if self._needs_weight and self._of_weight is None:
                self._of_weight = (slopes.T @ self._product.inputs(rows)).to(self._weight.dtype)
            elif self._needs_weight and self._of_weight.dtype == slopes.dtype:
                self._of_weight.addmm_(slopes.T, self._product.inputs(rows))
            elif self._needs_weight:
                self._of_weight += slopes.T @ self._product.inputs(rows)
            if self._of_hidden is not None:
                self._of_hidden[rows] = (slopes @ self._product.weight).to(self._of_hidden.dtype)

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self._needs_weight and self._of_weight is None:
            self._of_weight = torch.zeros_like(self._weight, memory_format=torch.contiguous_format)
        return self._of_hidden, self._of_weight, self._of_bias


def _checkpointed_losses(
    layer: Callable[[Tensor], Tensor],
    num_classes: int,
    hidden: Tensor,
    labels: Tensor,
    label_smoothing: float,
    draws: bool = True,
) -> Tensor:
    # Operations of PyTorch alone. `draws`: the layer may draw random numbers, as LoRA's dropout does, and must draw them again.
    def chunk_losses(hidden_rows: Tensor, label_rows: Tensor) -> Tensor:
        return F.cross_entropy(
            _wide(layer(hidden_rows)),
            label_rows,
            reduction="none",
            ignore_index=IGNORE_INDEX,
            label_smoothing=label_smoothing,
        )

    size = _rows_of_chunk(num_classes)
    if torch.is_grad_enabled():
        chunk_losses = partial(checkpoint, chunk_losses, use_reentrant=False, preserve_rng_state=draws)
    return torch.cat([chunk_losses(*chunk) for chunk in zip(hidden.split(size), labels.split(size), strict=True)])


def _losses(log_probabilities: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    losses = F.nll_loss(log_probabilities, labels, reduction="none", ignore_index=IGNORE_INDEX)
    if not label_smoothing:
        return losses
    smooth = torch.where(labels == IGNORE_INDEX, 0.0, -log_probabilities.mean(1))
    return (1 - label_smoothing) * losses + label_smoothing * smooth


def _may_wait_for(device: torch.device) -> bool:
    """Say whether a step may depend on values; on accelerators they would have to be waited for."""
    return device.type == "cpu"


def _rows_of_chunk(num_classes: int) -> int:
    return max(MIN_ROWS, CHUNK // num_classes)


def _dtype_of_product(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
