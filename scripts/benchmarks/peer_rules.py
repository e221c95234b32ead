"""Rules of other libraries for choosing rows while training, as trainers: what BladeTrainer is compared with.

References:
    DataFlex (https://github.com/OpenDCAI/DataFlex) chooses rows of the pool by their losses, anew every so many steps. Its default
        draws the upper third five times as often as the rest; here only the upper rows are drawn.
    Wang, Wu, Song, Mittal, Jia, GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration, NeurIPS 2024: the
        candidates whose gradients point the way of the target's, by products with the activations ("ghost"), not by gradients of
        single rows. Here its first order: without the correction for what has been chosen already.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_bilevel.data import EndlessLoader, pick_rows
from hf_bilevel.losses import evaluating, unit_losses

NUM_SCORED_TOGETHER = 16  # rows of a forward pass over the pool


class IntervalTrainer(Trainer):
    """Every so many steps score the whole pool without gradients, then train on rows drawn from the highest losses.

    Args:
        ratio: Share of the pool to draw from, in (0, 1].
        interval: Optimizer steps between two choices.
        **kwargs: As for ``Trainer``.
    """

    def __init__(self, ratio: float, interval: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ratio, self.interval = ratio, interval
        self.num_times_chosen = torch.zeros(len(self.train_dataset), dtype=torch.int64)
        self._chosen_at = -1

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Draw other rows than the loader's."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.state.global_step % self.interval == 0 and self._chosen_at != self.state.global_step:
            num = max(1, round(self.ratio * len(self.train_dataset)))
            self._chosen, self._chosen_at = self._pool_losses().topk(num).indices.cpu(), self.state.global_step
            self._generator = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
        drawn = []
        for batch in batches:
            rows = self._chosen[torch.randint(len(self._chosen), (len(batch["labels"]),), generator=self._generator)]
            self.num_times_chosen += rows.bincount(minlength=len(self.train_dataset))
            drawn.append(self._collate(rows))
        return drawn, self._get_num_items_in_batch(drawn, device)

    def _collate(self, rows: Tensor) -> Mapping[str, Any]:
        self._set_signature_columns_if_needed()
        items = [self.train_dataset[int(i)] for i in rows]
        items = [{key: item[key] for key in item if key in self._signature_columns} for item in items]
        return self._prepare_inputs(self.data_collator(items))

    def _pool_losses(self) -> Tensor:
        with torch.no_grad(), evaluating(self.model):
            parts = torch.arange(len(self.train_dataset)).split(NUM_SCORED_TOGETHER)
            return torch.cat([unit_losses(self.model, self._collate(part), "sample").losses for part in parts])


class GradientProductTrainer(Trainer):
    """Of every candidate batch train on the rows whose gradients have the largest products with that of a target batch.

    Args:
        ratio: Share of the candidates to train on, in (0, 1].
        target_dataset: Rows to do well on.
        **kwargs: As for ``Trainer``.
    """

    def __init__(self, ratio: float, target_dataset: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ratio = ratio
        size = self.args.per_device_train_batch_size
        self._target = EndlessLoader(target_dataset, self.data_collator, size, seed=self.args.seed)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Keep some rows of each batch."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        picked = []
        for batch in batches:
            target = self._prepare_inputs(self._target.draw())
            products = gradient_products(self.model, self._prepare_inputs(batch), target)
            num = max(1, round(self.ratio * len(products)))
            picked.append(pick_rows(batch, products.topk(num).indices.sort().values.tolist(), len(products)))
        return picked, self._get_num_items_in_batch(picked, device)


def gradient_products(model: nn.Module, batch: Mapping[str, Any], target: Mapping[str, Any]) -> Tensor:
    r"""Multiply the gradient of every row's loss with the gradient of the target batch's mean loss.

    For a linear layer with weights W, inputs :math:`x_t` and gradients :math:`g_t` of its outputs the gradient of a row is
    :math:`\sum_t g_t x_t^T`, so its product with a matrix T is :math:`\sum_t g_t \cdot T x_t`: two passes for all rows together.

    Args:
        model: Of which only linear layers are trained; a known head.
        batch: Candidates, on the model's device.
        target: Target rows, likewise.

    Returns:
        ``(n,)``. The gradients of the parameters are as before.

    Raises:
        ValueError: If something else is trained too.

    Cost: a forward and backward pass of the candidates and one of the target rows.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module.weight.requires_grad]
    of_layers = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    if any(p.requires_grad and id(p) not in of_layers for p in model.parameters()):
        raise ValueError("Products of gradients are computed for linear layers; train these alone, as LoRA does.")
    with evaluating(model):
        weights = [p for layer in layers for p in layer.parameters(recurse=False)]
        gradients = torch.autograd.grad(unit_losses(model, target, "sample").losses.mean(), weights)
        of_weights = dict(zip(map(id, weights), gradients, strict=True))
        products = torch.zeros(len(batch["labels"]), device=gradients[0].device)
        with _products_of_layers(layers, of_weights, products):
            torch.autograd.grad(unit_losses(model, batch, "sample").losses.sum(), weights)
    return products


@contextmanager
def _products_of_layers(layers: list[nn.Linear], of_weights: dict[int, Tensor], products: Tensor) -> Iterator[None]:
    """Add to ``products``, during a backward pass, what every layer contributes."""

    def watch(layer: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        inputs = args[0].detach()

        def add(gradient: Tensor) -> None:
            moved = inputs @ of_weights[id(layer.weight)].T
            if layer.bias is not None:
                moved = moved + of_weights[id(layer.bias)]
            products.add_((moved * gradient).flatten(1).sum(1))

        output.register_hook(add)

    handles = [layer.register_forward_hook(watch) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
