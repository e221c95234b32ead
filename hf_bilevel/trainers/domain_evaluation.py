"""Losses and perplexities by domain, in the Trainer's own evaluation."""

import math
from collections.abc import Mapping
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from hf_bilevel.core.mixture import domain_means
from hf_bilevel.data import SAMPLE_ID, DataCollatorWithOrigin, NumberedDataset, name_domains, pop_origin, read_domains
from hf_bilevel.losses import (
    TOKEN_HEADS,
    UnitLosses,
    find_head,
    sample_losses_from_log_probs,
    sample_losses_from_logits,
    unit_losses,
)
from hf_bilevel.trainers.base import BilevelMixin


class DomainEvaluationMixin(BilevelMixin):
    """Evaluates every domain of a dataset by itself, in the pass that the Trainer makes anyway."""

    _totals: Tensor | None = None  # while a dataset is evaluated by domain: of its losses, and of units
    _kept_outputs: list[Any] | None = None  # while a step of it is

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as ``Trainer``, and every domain by itself.

        For a dataset with the domain column, and for a dict of datasets, each domain has ``eval_<domain>_loss`` and, for
        language models, ``eval_<domain>_perplexity``. Their mean with the shares of the target dataset (equal shares if it has
        no domain column) is ``eval_weighted_loss``. All of them can be ``metric_for_best_model``.

        Args:
            eval_dataset: As for ``Trainer``.
            ignore_keys: As for ``Trainer``.
            metric_key_prefix: As for ``Trainer``.

        Returns:
            The metrics.

        Cost: no pass more than the Trainer's, unless with ``compute_sample_losses`` or ``predict_with_generate``: one forward more.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if isinstance(given, Mapping) and not self._is_off():
            losses = {str(name): metrics.get(f"{metric_key_prefix}_{name}_loss") for name in given}
            added = self._domain_metrics({k: v for k, v in losses.items() if v is not None}, metric_key_prefix)
            if added:
                # Callbacks have heard of each dataset by itself, and early stopping may wait for what is known of all.
                new = {name: value for name, value in added.items() if name not in metrics}
                metrics |= added
                self.log(dict(added))
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, new)
        return metrics

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as ``Trainer``; the metrics of the domains are among those that it logs and callbacks hear of."""
        names = getattr(dataloader, "bilevel_domain_names", None)
        totals = None if names is None else torch.zeros(2, len(names), device=self.args.device)
        self._totals = totals
        try:
            settings = prediction_loss_only, ignore_keys, metric_key_prefix
            output = super().evaluation_loop(dataloader, description, *settings)
        finally:
            self._totals = None
        if totals is not None:
            sums, units = totals.double().cpu()
            means = zip(names, (sums / units).tolist(), strict=True)
            output.metrics.update(
                self._domain_metrics({name: loss for name, loss in means if loss == loss}, metric_key_prefix)
            )
        return output

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the evaluation loader; of a dataset with the domain column it carries the rows' domains."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(given, str):
            given = self.eval_dataset[given]
        column = self.bilevel_config.domain_column
        is_judged = find_head(self.model) is not None or self.compute_sample_losses is not None
        if not is_judged or not isinstance(given, datasets.Dataset) or column not in given.column_names:
            return super().get_eval_dataloader(eval_dataset)
        names = self.bilevel_config.domain_names
        if given.features[column] == datasets.Value("string"):
            names = None  # of domains that the pool may lack
        domain_ids, names = read_domains(given, column, names)
        prepared = self._remove_unused_columns(given, description="evaluation")
        numbered = NumberedDataset(prepared, domain_ids)
        own = self.data_collator, self.eval_dataset
        self.data_collator = DataCollatorWithOrigin(self.data_collator)
        if isinstance(eval_dataset, str):  # by name: the Trainer keeps the loader if its workers persist
            self.eval_dataset, numbered = {**self.eval_dataset, eval_dataset: numbered}, eval_dataset
        try:
            loader = super().get_eval_dataloader(numbered)
        finally:
            self.data_collator, self.eval_dataset = own
        loader.bilevel_domain_names = list(map(str, names))
        return loader

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Take the Trainer's evaluation step, and add up the losses by domain from the same outputs."""
        if SAMPLE_ID not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        origin = pop_origin(inputs)
        if self._totals is None:  # in a loop of the user's own
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self._kept_outputs = [] if self.compute_sample_losses is None else None
        try:
            found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            with torch.no_grad():
                units = self._losses_from_outputs(model, self._prepare_inputs(inputs))
        finally:
            self._kept_outputs = None
        rows = (units.losses, units.counts, origin.domain_ids.to(units.losses.device))
        # Not a sum of each process: the last batch may repeat rows to be full.
        losses, counts, domain_ids = self.accelerator.gather_for_metrics(rows)
        self._totals += torch.stack(domain_means(losses, counts, domain_ids, self._totals.shape[1])).to(self._totals)
        return found

    def _losses_from_outputs(self, model: nn.Module, inputs: dict[str, Any]) -> UnitLosses:
        """Read the samples' losses off what the model has just returned; beside generated tokens it returned nothing by way of a loss."""
        outputs = self._kept_outputs[0] if self._kept_outputs else None
        if isinstance(outputs, Mapping) and outputs.get("log_probs") is not None:  # TRL's, which never has all logits
            return sample_losses_from_log_probs(outputs["log_probs"], outputs["label_mask"])
        if isinstance(outputs, Mapping) and outputs.get("logits") is not None:
            return sample_losses_from_logits(self.model, outputs["logits"], inputs)
        if isinstance(outputs, tuple) and len(outputs) > 1:
            return sample_losses_from_logits(self.model, outputs[1], inputs)
        return unit_losses(model, inputs, "sample", compute_sample_losses=self.compute_sample_losses)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the Trainer's loss; an evaluation step keeps what the model returns, of which TRL hands on the loss alone."""
        kept = self._kept_outputs
        if kept is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hook = model.register_forward_hook(lambda _, __, outputs: kept.append(outputs))
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            hook.remove()

    def _domain_metrics(self, losses: dict[str, float], prefix: str) -> dict[str, float]:
        if not losses:
            return {}
        added = {f"{prefix}_{name}_loss": loss for name, loss in losses.items()}
        if find_head(self.model) in TOKEN_HEADS:
            added |= {f"{prefix}_{name}_perplexity": math.exp(min(loss, 700)) for name, loss in losses.items()}
        shares = self._target_shares(list(losses))
        added[f"{prefix}_weighted_loss"] = sum(shares[name] * loss for name, loss in losses.items())
        return added

    def _target_shares(self, names: list[str]) -> dict[str, float]:
        """Return the share of each domain in the target dataset; equal ones where it has none of them."""
        column, target = self.bilevel_config.domain_column, self.target_dataset
        counts = dict.fromkeys(names, 0)
        if column is not None and isinstance(target, datasets.Dataset) and column in target.column_names:
            for name in name_domains(target, column, self.bilevel_config.domain_names):
                if name in counts:
                    counts[name] += 1
        total = sum(counts.values())
        return {name: count / total if total else 1 / len(names) for name, count in counts.items()}
