"""BLADE: train on the samples or tokens on which the model does worst compared with a dynamic reference model."""

import math
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from hf_bilevel.cards import MethodSection
from hf_bilevel.core.selection import (
    SelectionTally,
    excess_loss,
    num_selected,
    synchronisation_schedule,
    top_units,
)
from hf_bilevel.data import (
    Origin,
    derive_seed,
    pick_rows,
    private_randomness,
    row_lengths,
    split_by_length,
    without_padding,
)
from hf_bilevel.losses import (
    IGNORE_INDEX,
    LM_HEADS,
    TOKEN_HEADS,
    UnitLosses,
    evaluating,
    find_head,
    forward_inputs,
    labelled_tokens,
    token_losses_from_logits,
    unsupported_head,
    unwrap,
)
from hf_bilevel.plots import distribution_over_steps, lines_over_steps
from hf_bilevel.subset import SelectedSubset
from hf_bilevel.trainers.config import BilevelConfig
from hf_bilevel.trainers.cost import TRAINING, Load
from hf_bilevel.trainers.reference import ReferenceMixin
from hf_bilevel.trainers.sharding import is_partitioned

_PAPER = (
    "Wang, Xiang, Xu et al., BLADE: Scalable Bi-level Adaptive Data Selection for LLM Training, "
    "[arXiv 2606.18650](https://arxiv.org/abs/2606.18650)."
)
_STATIC_PAPERS = (
    "a static reference, as in RHO-LOSS, [arXiv 2206.07137](https://arxiv.org/abs/2206.07137), and Rho-1, "
    "[arXiv 2404.07965](https://arxiv.org/abs/2404.07965)."
)

NUM_SCORED_TOGETHER = 8
"""Batches scored by one model before the other takes its turn: an adapter or a parked copy is swapped in once for them."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the scores, in the log


@dataclass
class BladeConfig(BilevelConfig):
    r"""Settings of BLADE (arXiv 2606.18650).

    The *proxy* :math:`u` is the model being trained. The *reference* :math:`w` is synchronised with it every T steps
    and takes K steps on :math:`L_{val}(w) + \lambda L_{train}(\alpha, w)`; in between it is frozen. Of every candidate
    batch (``per_device_train_batch_size`` rows) the units with the largest :math:`\ell(u) - \ell(w)` are trained on.

    ============================  ==================  ====================  =========================================
    paper                         argument            published             our default and why
    ============================  ==================  ====================  =========================================
    :math:`\gamma`                selection_ratio     0.6                   0.6
    T                             sync_steps          1,000 of 5,000        "auto": 5 in a run, 40 to 1,000 steps
                                                                            apart; one if it is shorter
    K                             reference_steps     300                   "auto": 0.08 T, at least 20: a quarter of the
                                                                            cost, no worse for as long a T (measured)
    :math:`\lambda`               penalty             1                     0: on pools that are noisy or off target 1
                                                                            did worse, and costs more (measured)
    ============================  ==================  ====================  =========================================

    Args:
        selection_ratio: Selected / candidates, in (0, 1]. 1 turns selection off: the run is the plain Trainer's, bit for
            bit.
        granularity: ``"token"``: select tokens of every sequence by masking them in the loss, so the context stays
            whole; ``"sample"``: select rows of the candidate batch; ``"auto"``: tokens for language models, samples
            otherwise.
        reference: ``"dynamic"``: BLADE; ``"static"``: the ``reference_model`` given to the trainer, frozen for ever
            (RHO-LOSS for samples, Rho-1 for tokens); ``"none"``: for scores that need none.
        score: ``"excess_loss"``, or a control: ``"loss"`` (highest loss first) or ``"random"``, which need no reference
            and ignore it.
        sync_steps: T, optimizer steps between synchronisations, or "auto".
        reference_steps: K, steps of the reference after each synchronisation, or "auto".
        first_reference_steps: Steps after the first synchronisation, or "auto" for K. A model trained from scratch knows
            nothing when it is first copied, so its first reference may need more.
        penalty: :math:`\lambda`, weight of the selected training data in the reference's objective, not negative. The paper's 1
            did worse than 0 in all that was measured here, on pools that are noisy or off target, with 32 target rows too.
        reference_learning_rate: Learning rate of the reference, constant; None for ``TrainingArguments.learning_rate``.
        reference_dtype: ``"float32"``, ``"bfloat16"`` or ``"auto"`` (the model's): dtype of a copied reference while it
            scores.
        reference_device: ``"auto"`` (beside the model) or ``"cpu"``: where a copied reference waits between uses.
        start_step: Optimizer step of the first selection; before it, all candidates are trained on.
        on_non_finite: What to do with candidates whose loss is NaN or infinite: ``"exclude"`` them from selection and
            log how many (``blade/num_excluded``), or raise an ``"error"``, which costs one host sync a step at token
            level. An excluded token adds nothing to the loss and leaves the planned denominator as it is. Where a
            sequence's activations, not only a loss, are not finite, its gradient is not either, as in the plain
            Trainer: use ``"error"`` or sample level for such data.
        target_batch_size: See ``BilevelConfig``.
        domain_column: See ``BilevelConfig``.
        domain_names: See ``BilevelConfig``.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a value has another type than declared.

    Example:
        >>> BladeConfig(selection_ratio=0.3, granularity="sample", penalty=0.1).penalty
        0.1
        >>> BladeConfig(selection_ratio=1.5)
        Traceback (most recent call last):
        ValueError: `selection_ratio` must be in (0, 1], got 1.5.
    """

    selection_ratio: float = field(
        default=0.6, metadata={"help": "Selected / candidates, in (0, 1]; 1 turns selection off."}
    )
    granularity: str = field(default="auto", metadata={"help": "What is selected: auto, token or sample."})
    reference: str = field(default="dynamic", metadata={"help": "Reference model: dynamic, static or none."})
    score: str = field(default="excess_loss", metadata={"help": "What ranks candidates: excess_loss, loss or random."})
    sync_steps: str = field(
        default="auto", metadata={"help": "Optimizer steps between synchronisations (T), or auto."}
    )
    reference_steps: str = field(
        default="auto", metadata={"help": "Steps of the reference model after a synchronisation (K), or auto."}
    )
    first_reference_steps: str = field(
        default="auto", metadata={"help": "Steps after the first synchronisation, or auto for K."}
    )
    penalty: float = field(
        default=0.0, metadata={"help": "Weight of the selected training data in the reference's objective."}
    )
    reference_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the reference model; the trainer's if not set."}
    )
    reference_dtype: str = field(
        default="auto", metadata={"help": "Dtype of a copied reference model: auto, float32 or bfloat16."}
    )
    reference_device: str = field(
        default="auto", metadata={"help": "Where a copied reference model waits between uses: auto or cpu."}
    )
    start_step: int = field(default=0, metadata={"help": "Optimizer step of the first selection."})
    on_non_finite: str = field(
        default="exclude", metadata={"help": "Candidates with a NaN or infinite loss: exclude or error."}
    )

    _numbers_or_words: ClassVar[dict[str, tuple[type, str]]] = {
        "sync_steps": (int, "auto"),
        "reference_steps": (int, "auto"),
        "first_reference_steps": (int, "auto"),
    }
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "granularity": ("auto", "sample", "token"),
        "reference": ("dynamic", "none", "static"),
        "score": ("excess_loss", "loss", "random"),
        "reference_dtype": ("auto", "bfloat16", "float32"),
        "reference_device": ("auto", "cpu"),
        "on_non_finite": ("error", "exclude"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.selection_ratio <= 1:
            raise ValueError(f"`selection_ratio` must be in (0, 1], got {self.selection_ratio}.")
        for name in ("sync_steps", "reference_steps", "first_reference_steps"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 or 'auto', got {getattr(self, name)}.")
        if not 0 <= self.penalty < math.inf:
            raise ValueError(f"`penalty` must be finite and not negative, got {self.penalty}.")
        if self.reference_learning_rate is not None and not 0 < self.reference_learning_rate < math.inf:
            raise ValueError(
                f"`reference_learning_rate` must be positive and finite, got {self.reference_learning_rate}."
            )
        if self.start_step < 0:
            raise ValueError(f"`start_step` must not be negative, got {self.start_step}.")
        if self.score == "excess_loss" and self.reference == "none":
            raise ValueError(
                "`score='excess_loss'` compares with a reference model, and `reference='none'` has none. Use "
                "`score='loss'` to select the highest losses, or `reference='dynamic'`."
            )

    def schedule(self, max_steps: int) -> tuple[int, int, int]:
        """Resolve T, K, and K of the first synchronisation, for a run of so many optimizer steps."""
        given = (None if value == "auto" else value for value in (self.sync_steps, self.reference_steps))
        sync_steps, reference_steps = synchronisation_schedule(*given, max_steps=max(1, max_steps))
        first = self.first_reference_steps
        return sync_steps, reference_steps, reference_steps if first == "auto" else first

    def forward_passes(self, load: Load, selects_tokens: bool) -> float:
        """Count the forward passes of one row in a run, evaluation left out; a forward and backward pass counts 3."""
        rows, steps, size = load.rows_per_step, load.steps, load.batch_size
        if self.selection_ratio == 1:
            return load.plain_passes
        selecting = max(0, steps - self.start_step)
        share = 1.0 if selects_tokens else num_selected(self.selection_ratio, size) / size
        if selects_tokens:
            scoring = int(self.score == "excess_loss")  # the model's own losses come from the training pass
        else:
            scoring = {"excess_loss": 2, "loss": 1, "random": 1}[self.score]  # not finite losses are never drawn
        total = TRAINING * rows * (steps - selecting) + (scoring + TRAINING * share) * rows * selecting
        if (self.score, self.reference) == ("excess_loss", "dynamic") and selecting:
            sync_steps, reference_steps, first = self.schedule(steps)
            later = (math.ceil(selecting / sync_steps) - 1) * reference_steps
            target = TRAINING * (self.target_batch_size or size)
            lower = 0 if self.penalty == 0 else size
            per_process = first * (target + TRAINING * lower) + later * (target + (2 + TRAINING * share) * lower)
            total += per_process * load.num_processes
        return total


class BladeMixin(ReferenceMixin):
    """BLADE for ``Trainer`` and its subclasses; see ``BladeTrainer``.

    A subclass that overrides ``compute_loss`` can be mixed with if it calls ``model(**inputs)`` once and takes the loss
    from the outputs or from ``super().compute_loss``; at token level both are checked at every step.
    """

    method = "blade"
    config_class = BladeConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._plans: list[_Plan] = []  # what compute_loss needs for each micro-batch of a step
        self._plan: _Plan | None = None  # during a training_step
        self._last_scores: Tensor | None = None  # of the last candidates on this process, for the log
        self.sample_tally: SelectionTally | None = None
        super().__init__(*args, **kwargs)

    # Setup ----------------------------------------------------------------------------------------------------------

    def _is_off(self) -> bool:
        return self.bilevel_config.selection_ratio == 1

    @property
    def _reference_kind(self) -> str:
        return self.bilevel_config.reference if self.bilevel_config.score == "excess_loss" else "none"

    @property
    def granularity(self) -> str:
        """``"token"`` or ``"sample"``, with "auto" resolved for the model."""
        if self.bilevel_config.granularity != "auto":
            return self.bilevel_config.granularity
        return "token" if self._head in LM_HEADS and self.compute_sample_losses is None else "sample"

    def _selects_rows(self) -> bool:
        return not self._is_off() and self.granularity == "sample"

    def _why_not_deepspeed(self) -> str | None:
        if self._reference_kind == "dynamic":
            return (
                "a dynamic reference is trained beside the model, by an engine of its own. Use FSDP2, which shards both, or "
                "`reference='static'`."
            )
        if (
            self._reference_kind == "static"
            and self.reference_model is not None
            and is_partitioned(self.reference_model)
        ):
            return (
                "`reference_model` was loaded in parts for ZeRO-3, which only an engine can run. Load it before the "
                "`TrainingArguments` are made."
            )
        return None

    def _check_bilevel_setup(self) -> None:
        self._head = find_head(self.model)
        if self._is_off():
            return  # the plain Trainer, wherever that runs
        super()._check_bilevel_setup()
        if self.compute_sample_losses is None:
            if self._head is None or (self.granularity == "token" and self._head not in TOKEN_HEADS):
                raise ValueError(unsupported_head(self.model, self.granularity))
        elif self.granularity == "token":
            raise ValueError(
                "`compute_sample_losses` gives one loss per sample and cannot serve `granularity='token'`. Use "
                "`granularity='sample'`."
            )
        if self.granularity == "token":
            self._check_token_setup()
        else:
            self._check_sample_setup()
        self._warn_about_ignored_settings()
        self._check_reference(self._reference_kind)
        if self._reference_kind != "dynamic" and self.train_dataset is not None and not self._is_stream:
            self._check_labels(self.train_dataset, "train_dataset")
        self._check_losses(self.target_dataset if self._reference_kind == "dynamic" else self.train_dataset)

    def _warn_about_ignored_settings(self) -> None:
        config, kind, unused = self.bilevel_config, self._reference_kind, []
        if kind != "dynamic":
            unused += ["sync_steps", "reference_steps", "first_reference_steps", "penalty", "reference_learning_rate"]
            unused += ["target_batch_size"]
        if kind == "none":
            unused += ["reference_dtype", "reference_device"]
        defaults = BladeConfig()
        ignored = [name for name in unused if getattr(config, name) != getattr(defaults, name)]
        if self.reference_model is not None and kind == "none":
            ignored.append("reference_model")
        if ignored:
            why = f"`score={config.score!r}`" if kind == "none" else f"`reference={config.reference!r}`"
            warnings.warn(f"Ignored with {why}: {', '.join(f'`{name}`' for name in ignored)}.", stacklevel=5)

    def _check_token_setup(self) -> None:
        if self._is_of_trl and not self._is_sft:
            raise ValueError(
                "Of TRL's trainers only `SFTTrainer` has a loss over tokens that can be selected: one over pairs or rollouts has none of "
                "its own for a sample or a token. Train with TRL alone, or select beforehand and pass it `selected_subset`."
            )
        if self._is_sft and not self.model_accepts_loss_kwargs:
            raise ValueError(
                f"`{type(unwrap(self.model)).__name__}` is not told how many tokens a step has, and TRL then divides by all instead "
                "of by those selected. Use `granularity='sample'`, or `BladeTrainer`."
            )
        if self.label_smoother is not None or self.compute_loss_func is not None:
            given = "label_smoothing_factor" if self.label_smoother is not None else "compute_loss_func"
            raise ValueError(
                f"`{given}` replaces the model's loss, so its tokens cannot be selected. Drop it, or use "
                "`granularity='sample'`."
            )
        if self._adds_router_loss() and not self._is_sft:  # which adds it to whatever tokens are selected
            raise ValueError(
                "`output_router_logits=True` adds a router loss inside the model's own loss, which token selection "
                f"replaces. Set {self._how_to_drop_router_loss()}, or use `granularity='sample'`."
            )
        dropout = [m.p for m in self.model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
        dropout += [getattr(self.model.config, "attention_dropout", 0.0) or 0.0]
        noise = {
            f"Dropout of up to {max(dropout)}": max(dropout),
            "`neftune_noise_alpha`": self.args.neftune_noise_alpha,
        }
        for name in [name for name, strength in noise.items() if strength and self._reference_kind != "none"]:
            warnings.warn(
                f"{name} is on. At token level the proxy's losses come from the training forward, with its noise, and the "
                "reference's without, which biases the excess loss. Set it to 0, as is usual for language models, or use "
                "`granularity='sample'`.",
                stacklevel=5,
            )

    def _check_sample_setup(self) -> None:
        ratio, candidates = self.bilevel_config.selection_ratio, self._candidate_batch_size
        if num_selected(ratio, candidates) == candidates:
            needed = next(n for n in range(1, 1_000_001) if num_selected(ratio, n) < n)
            raise ValueError(
                f"`selection_ratio={ratio}` of a candidate batch of `per_device_train_batch_size={candidates}` selects "
                f"all of it. Raise `per_device_train_batch_size` to at least {needed} or lower `selection_ratio`."
            )
        if self.compute_loss_func is not None and self.compute_sample_losses is None:
            raise ValueError(
                "The model is trained with `compute_loss_func`, so samples ranked by the model's own loss would be ranked "
                "by another one. Pass `compute_sample_losses=` too: (model, batch) -> losses of shape (n,)."
            )

    def _begin_training(self) -> None:
        device = self.args.device
        self._plans.clear()
        self._synced_at = -1
        if self._is_off():
            return
        if self.granularity == "sample":
            self._check_sample_setup()  # again: `auto_find_batch_size` may have left too few candidates
        with private_randomness(derive_seed(self._seed), device):
            self._begin_reference(self._reference_kind)
        num_pool = 0 if self._is_stream or self.train_dataset is None else len(self.train_dataset)
        self.sample_tally = SelectionTally(num_pool)
        self.domain_tally = SelectionTally(len(self.domain_names or ()))
        # offered, selected, sum of scores, of selected scores, excluded: since the last log
        self._sums = torch.zeros(5, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        self._reference_losses: list[Tensor] = []  # of each synchronisation since the last log
        self._logged_domains: dict[int, tuple[float, float]] = {}

    # Selection ------------------------------------------------------------------------------------------------------

    def _select(self, batches: list[Any], origins: list[Origin], num_items: Any) -> tuple[list[Any], Any]:
        step, rank = self.state.global_step, self.args.process_index
        self._plans.clear()
        if self.bilevel_config.penalty > 0:
            self._remember(batches)
        if step < self.bilevel_config.start_step:
            return batches, num_items
        self._share_statistics(self.model)
        if self._reference_kind == "dynamic":
            self._synchronise_if_due(step)
        with private_randomness(derive_seed(self._seed, step, rank), self.args.device), self._scoring():
            prepared = [self._prepare_inputs(batch) for batch in batches]
            if self.granularity == "sample":
                for batch, origin in zip(prepared, origins, strict=True):
                    self._check_images(batch, len(origin))
                picked = self._pick_samples(batches, prepared, origins)
                return picked, self._get_num_items_in_batch(picked, self.args.device)
            self._plan_tokens(batches, prepared, origins)
        planned = [self._planned_labels(batch) for batch in prepared]
        return batches, self._get_num_items_in_batch(planned, self.args.device)

    def _score(
        self, batches: list[Any], score: str, lengths: list[Tensor | None] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Score the units of candidate batches; one forward of each model a row.

        Args:
            batches: Candidates, on the model's device.
            score: As in ``BladeConfig``.
            lengths: Of the rows, from ``_lengths``: rows of many lengths are then scored in parts of like length.

        Returns:
            Of each batch the scores of its units, and which of them are valid.
        """
        parts = [
            self._parts(batch, of_rows)
            for batch, of_rows in zip(batches, lengths or [None] * len(batches), strict=True)
        ]
        # All batches pass through the proxy first: a reference that is an adapter replaces it while active.
        with evaluating(self.model):
            units = [self._losses_of_parts(self.model, entry) for entry in parts]
        if score == "random":
            # Still one forward of the proxy: a loss that is not finite must not be drawn either.
            draws = [torch.rand(u.losses.shape).to(u.losses.device) for u in units]
            scores = [torch.where(u.losses.isfinite(), draw, u.losses) for u, draw in zip(units, draws, strict=True)]
        elif score == "loss":
            scores = [u.losses for u in units]
        else:
            with self.reference.active() as reference:
                references = [self._losses_of_parts(reference, entry) for entry in parts]
            scores = [excess_loss(u.losses, r.losses) for u, r in zip(units, references, strict=True)]
        return [(scored, u.valid) for scored, u in zip(scores, units, strict=True)]

    def _lengths(self, batches: list[Any], sizes: list[int]) -> list[Tensor | None]:
        """Find how many columns each row of padded batches needs; one host sync, and none without attention masks.

        Returns:
            Of each batch ``row_lengths``, on the CPU; or None where a model is compiled for one width, and where all processes
            have to call it equally often.
        """
        if self.args.torch_compile or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return [None] * len(batches)
        found = [row_lengths(batch, size) for batch, size in zip(batches, sizes, strict=True)]
        if any(lengths is None for lengths in found):
            return [None] * len(batches)
        return list(torch.cat(found).cpu().split(sizes))

    def _parts(self, batch: Any, lengths: Tensor | None) -> list[tuple[Tensor, Any]]:
        """Cut a batch into (row numbers, rows) of like length; not for a loss of the user's, which may compare the rows."""
        if lengths is None:
            return [(torch.empty(0), batch)]
        groups = split_by_length(lengths) if self.compute_sample_losses is None else [torch.arange(len(lengths))]
        if len(groups) == 1:
            return [(groups[0], without_padding(batch, lengths))]
        rows = (pick_rows(batch, group.tolist(), len(lengths)) for group in groups)
        return [(group, without_padding(part, lengths[group])) for group, part in zip(groups, rows, strict=True)]

    def _losses_of_parts(self, model: nn.Module, parts: list[tuple[Tensor, Any]]) -> UnitLosses:
        """Compute the losses of all rows of a batch, in their order."""
        units = [self._losses(model, part) for _, part in parts]
        if len(units) == 1:
            return units[0]
        order = torch.cat([rows for rows, _ in parts]).argsort().to(units[0].losses.device)
        return UnitLosses(torch.cat([u.losses for u in units])[order], torch.cat([u.counts for u in units])[order])

    def _pick_samples(self, batches: list[Any], prepared: list[Any], origins: list[Origin]) -> list[Any]:
        ratio, sizes = self.bilevel_config.selection_ratio, [len(origin) for origin in origins]
        lengths = self._lengths(prepared, sizes)
        keeps, excluded_before = [], self._sums[4:].clone()
        scored = self._score(prepared, self.bilevel_config.score, lengths)
        for (scores, valid), origin in zip(scored, origins, strict=True):
            self._check_num_rows(len(scores), len(origin))
            keep = top_units(scores, valid, num_selected(ratio, len(origin)))
            self._record(origin, valid.long(), keep.long(), scores, scores, valid, keep)
            keeps.append(keep)
        # A host sync: which rows to pick, and whether a loss was not finite.
        *kept, excluded = torch.cat([*keeps, self._sums[4:] > excluded_before]).cpu().split([*sizes, 1])
        if bool(excluded) and self.bilevel_config.on_non_finite == "error":
            raise FloatingPointError(self._non_finite_message())
        rows = [keep.nonzero().flatten() for keep in kept]
        if not all(map(len, rows)):
            are_broken = any(bool(valid.any()) for (_, valid), few in zip(scored, rows, strict=True) if not len(few))
            if are_broken or not self._divides_by_labels_of_the_step:
                raise FloatingPointError(
                    f"No candidate of a batch has a finite loss and a label at step {self.state.global_step}, so there is "
                    "nothing to train on. Check the data and lower the learning rate."
                )
            # Rows without labels, such as the last ones of an epoch: one of them is trained on, which adds nothing.
            rows = [few if len(few) else torch.tensor([0]) for few in rows]
        return [self._picked(*entry) for entry in zip(batches, rows, sizes, lengths, strict=True)]

    @property
    def _divides_by_labels_of_the_step(self) -> bool:
        """Say whether a batch without labels has a loss of 0; a mean of its own would be 0 / 0."""
        own = self.compute_loss_func is None and self.label_smoother is None and self.compute_sample_losses is None
        return own and self._head in LM_HEADS and self.model_accepts_loss_kwargs

    @staticmethod
    def _picked(batch: Any, rows: Tensor, size: int, lengths: Tensor | None) -> Any:
        """Take the selected rows, without the columns that only others need."""
        picked = pick_rows(batch, rows.tolist(), size)
        return picked if lengths is None else without_padding(picked, lengths[rows])

    def _non_finite_message(self) -> str:
        return (
            f"The loss of a candidate is NaN or infinite at step {self.state.global_step}. Look for broken samples, lower "
            "the learning rate, or set `on_non_finite='exclude'` to leave such candidates out."
        )

    def _record(
        self,
        origin: Origin,
        offered: Tensor,
        selected: Tensor,
        score_rows: Tensor,
        scores: Tensor,
        valid: Tensor,
        keep: Tensor,
    ) -> None:
        """Add a candidate batch to the tallies and to what is logged; everything stays on the device.

        ``offered``, ``selected`` and ``score_rows`` are per row; the others per unit.
        """
        finite = valid & scores.isfinite()
        self._last_scores = torch.where(finite, scores.detach(), torch.nan)
        score_rows = score_rows.nan_to_num(0.0, 0.0, 0.0)
        kept_scores = torch.where(keep, scores, 0.0).sum()
        all_scores = torch.where(finite, scores, 0.0).sum()
        sums = (valid.sum(), keep.sum(), all_scores, kept_scores, (valid & ~scores.isfinite()).sum())
        self._sums += torch.stack([value.to(self._sums) for value in sums])
        device = offered.device
        self.sample_tally.update(origin.sample_ids.to(device), offered, selected, score_rows)
        if origin.domain_ids is not None:
            self.domain_tally.update(origin.domain_ids.to(device), offered, selected, score_rows)

    # Token level ----------------------------------------------------------------------------------------------------

    def _plan_tokens(self, batches: list[Any], prepared: list[Any], origins: list[Origin]) -> None:
        """Compute what the training forward needs to choose tokens: the reference's losses, or random scores."""
        if self.bilevel_config.score == "excess_loss":
            with self.reference.active() as reference:
                scores = [self._losses(reference, batch).losses for batch in prepared]
        elif self.bilevel_config.score == "random":
            scores = [torch.rand(batch["labels"].shape).to(batch["labels"].device) for batch in prepared]
        else:
            scores = [None] * len(prepared)
        self._plans.extend(_Plan(*entry) for entry in zip(batches, origins, scores, strict=True))

    def _planned_labels(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Labels with as many valid entries as will be selected, for the Trainer's own counting."""
        valid = labelled_tokens(self._head, batch)
        planned = num_selected(self.bilevel_config.selection_ratio, valid.sum())
        # One entry more in front, so that the count is the same whether or not the Trainer drops the first label.
        positions = torch.arange(valid.numel() + 1, device=valid.device)
        return {"labels": torch.where((positions > 0) & (positions <= planned), 0, IGNORE_INDEX)}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Take the Trainer's step on a micro-batch, or another one on the same."""
        self._plan = self._plan_of(inputs)
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._plan = None

    def _plan_of(self, inputs: dict[str, Any]) -> "_Plan | None":
        """Find what was planned for a micro-batch: the very one, or one that somebody has made of the next."""
        plans = [plan for plan in self._plans if plan.batch is inputs] or [
            plan for plan in self._plans if not plan.used
        ]
        if self._plans and not plans:
            raise RuntimeError(
                "`training_step` was called more often than the step has micro-batches, with a batch of its own, for which no tokens are "
                "selected. Pass the batch as it came, or use `granularity='sample'`, which selects before `training_step`."
            )
        return plans[0] if plans else None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the Trainer's loss, over the selected tokens at token level."""
        if self._plan is None or not model.training:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        selecting = _SelectingModel(self, model, self._plan)
        result = super().compute_loss(
            selecting, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if selecting.num_calls != 1:
            raise RuntimeError(
                f"`compute_loss` of a class behind BladeMixin called `model(**inputs)` {selecting.num_calls} times; token "
                "selection needs exactly one call. Use `granularity='sample'`, which selects before `compute_loss`."
            )
        if not _is_made_from(result[0] if return_outputs else result, selecting.selected):
            raise RuntimeError(
                "`compute_loss` of a class behind BladeMixin computes its loss from the logits, so that all tokens would be trained on. "
                "Have it take `outputs.loss`, in which those that are selected count, or use `granularity='sample'`, which selects "
                "before `compute_loss`."
            )
        return result

    def _select_tokens(self, units: UnitLosses, plan: "_Plan") -> tuple[Tensor, Tensor]:
        """Choose by the token losses of the training forward: which tokens to keep, and how many were planned."""
        config = self.bilevel_config
        self._check_num_rows(len(units.losses), len(plan.origin))
        proxy_losses = units.losses.detach()
        if config.score == "excess_loss":
            scores = excess_loss(proxy_losses, plan.scores)
        elif config.score == "loss":
            scores = proxy_losses
        else:
            scores = torch.where(proxy_losses.isfinite(), plan.scores, proxy_losses)
        planned = num_selected(config.selection_ratio, units.counts.sum())
        keep = top_units(scores, units.valid, planned)
        if config.on_non_finite == "error" and bool((units.valid & ~scores.isfinite()).any()):
            raise FloatingPointError(self._non_finite_message())
        if not plan.used:  # else it is the same rows once more
            plan.used = True
            score_rows = torch.where(units.valid & scores.isfinite(), scores, 0.0).sum(1)
            self._record(plan.origin, units.counts.sum(1), keep.sum(1), score_rows, scores, units.valid, keep)
        return keep, planned

    # The reference phase --------------------------------------------------------------------------------------------

    @property
    def _schedule(self) -> tuple[int, int, int]:
        """T, K, and K of the first synchronisation."""
        return self.bilevel_config.schedule(self.state.max_steps)

    def _synchronise_if_due(self, step: int) -> None:
        sync_steps, reference_steps, first_reference_steps = self._schedule
        due = (step - self.bilevel_config.start_step) % sync_steps == 0
        if (due or self._synced_at < 0) and self._synced_at != step:
            first = self._synced_at < 0
            self._synchronise(step, first_reference_steps if first else reference_steps, first)
            self._synced_at = step

    def _synchronise(self, step: int, num_steps: int, first: bool) -> None:
        """Copy the proxy into the reference and train it for ``num_steps`` on its penalised objective.

        The selection of the reference's own training batches is made by the proxy and the *outgoing* reference. Both
        are frozen during this phase, so it is made before the weights are overwritten and no third model is needed.

        Args:
            step: The current optimizer step, which seeds the phase.
            num_steps: K.
            first: Whether there is no outgoing reference yet; then every candidate is selected.

        Raises:
            FloatingPointError: If the reference's loss ends NaN or infinite.
        """
        with private_randomness(derive_seed(self._seed, step, self.args.process_index, 1), self.args.device):
            selections = None
            if self.bilevel_config.penalty > 0 and not first:
                selections = self._lower_selections(step, num_steps)
            self.reference.synchronise()

            def penalised_loss(reference: nn.Module, k: int) -> Iterator[Tensor]:
                yield self._mean_loss(reference, self._draw_target_batch())
                if self.bilevel_config.penalty > 0:
                    selection = None if selections is None else selections[k]
                    yield self.bilevel_config.penalty * self._lower_loss(
                        reference, self._pool_batch(step, k), selection
                    )

            self._reference_losses.append(self._train_reference(num_steps, penalised_loss))
        last = float(self._reference_losses[-1][-1])  # one host sync for each synchronisation
        if not math.isfinite(last):
            raise FloatingPointError(
                f"The loss of the reference model is {last} after the synchronisation at step {step}. Lower "
                f"`reference_learning_rate` (now {self._reference_learning_rate}) or check the target dataset."
            )

    def _lower_selections(self, step: int, num_steps: int) -> list[Tensor]:
        """Select from the reference's training batches, by the proxy and the outgoing reference."""
        selections = []
        for start in range(0, num_steps, NUM_SCORED_TOGETHER):
            batches = [self._pool_batch(step, k) for k in range(start, min(start + NUM_SCORED_TOGETHER, num_steps))]
            with self._scoring():
                scored = self._score(batches, "excess_loss")
            for scores, valid in scored:
                num = num_selected(self.bilevel_config.selection_ratio, valid.sum())
                selections.append(top_units(scores, valid, num))
        return selections

    def _lower_loss(self, reference: nn.Module, batch: Any, selection: Tensor | None) -> Tensor:
        if selection is not None and self.granularity == "sample":
            rows = selection.nonzero().flatten().tolist()
            if rows:
                return self._mean_loss(reference, pick_rows(batch, rows, len(selection)))
            picked = pick_rows(
                batch, [0], len(selection)
            )  # none has a label: nothing is learned, by a pass as of the others
            return self._weighted_loss(
                reference, picked, lambda counts: torch.zeros_like(counts, dtype=torch.float32)
            )[0]
        units = self._losses(reference, batch)
        finite = units.losses.detach().isfinite()
        return units.mean(finite if selection is None else selection & finite)

    # Results --------------------------------------------------------------------------------------------------------

    def selected_subset(self, *, fraction: float) -> SelectedSubset:
        """Take the samples that were selected most often when they were candidates, those with the higher scores first.

        Args:
            fraction: Share of the training dataset to keep, in (0, 1]; of no more rows than were candidates in the run.

        Returns:
            The subset, the most selected first. Scores: the share of a sample's units, over all visits, that was selected; among
            equals the mean score decides. Counts: units trained on, tokens at token level.

        Raises:
            RuntimeError: Before training, with ``selection_ratio=1``, and for streams, whose samples have no number.
        """
        if self.sample_tally is None or self._is_stream:
            raise RuntimeError(
                "There is no selection before training and with `selection_ratio=1`, and for a stream there are no rows."
            )
        tables = self.sample_tally.state_dict()
        ranked = tables["offered"].nonzero().flatten()
        offered, counts, totals = (tables[name][ranked] for name in ("offered", "selected", "score_sum"))
        shares = counts / offered
        order = (totals / offered).argsort(descending=True, stable=True)
        order = order[shares[order].argsort(descending=True, stable=True)]
        kept = order[: self._num_kept(fraction, len(ranked))]
        return self._subset_of_pool(
            ranked[kept],
            {"selection": {"fraction": fraction}},
            ("share of a sample's units that was selected", ranked, shares),
            scores=shares[kept],
            counts=counts[kept].long(),
        )

    # State, logging, facts ------------------------------------------------------------------------------------------

    def _end_training(self, failed: bool) -> None:
        super()._end_training(failed)
        self._plans.clear()
        # Not when training failed: the other processes may not come here, and waiting for them would hang.
        if not self._is_off() and not failed:
            self._merge(self.sample_tally)
            self._merge(self.domain_tally)

    def _merge(self, tally: SelectionTally) -> None:
        """Give all ranks the sum of all ranks' counts."""
        tally.flush()
        if self.args.world_size > 1:
            length = torch.tensor([len(tally)], device=self.args.device)
            tally.grow(int(self.accelerator.gather(length).max()))
            tally.merge(lambda table: self.accelerator.reduce(table.to(self.args.device)).cpu())

    def _shared_state(self) -> dict[str, Any]:
        self._merge(self.sample_tally)
        self._merge(self.domain_tally)
        state = {"samples": self.sample_tally.state_dict(), "domains": self.domain_tally.state_dict()}
        state["reference"] = self._reference_state()
        state["synced_at"] = self._synced_at
        # What the next log entry will be made of.
        state["sums"] = self.accelerator.reduce(self._sums.clone()).cpu()
        state["reference_losses"] = [losses.cpu() for losses in self._reference_losses]
        state["logged_domains"] = dict(self._logged_domains)
        return state

    def _load_state(self, shared: dict[str, Any], rank: dict[str, Any]) -> None:
        for tally, name in ((self.sample_tally, "samples"), (self.domain_tally, "domains")):
            tally.load_state_dict(shared[name], merged=self.args.world_size > 1)
        self._synced_at = shared["synced_at"]
        if self.is_world_process_zero():  # they are added up over all processes again
            self._sums.copy_(shared["sums"])
        self._reference_losses = [losses.to(self.args.device) for losses in shared["reference_losses"]]
        self._logged_domains = dict(shared["logged_domains"])
        self._load_reference_state(shared["reference"], rank)

    def _bilevel_metrics(self) -> dict[str, float]:
        offered, selected, scores, kept_scores, excluded = self.accelerator.reduce(self._sums.clone()).tolist()
        self._sums.zero_()
        metrics = {}
        if offered:
            name = "excess_loss" if self.bilevel_config.score == "excess_loss" else "score"
            finite = max(1.0, offered - excluded)
            metrics[f"blade/{name}_mean"] = scores / finite
            metrics[f"blade/{name}_selected_mean"] = kept_scores / max(1.0, selected)
            metrics["blade/selected_fraction"] = selected / offered
            metrics["blade/num_excluded"] = excluded
            found = torch.full((len(QUANTILES),), math.nan, device=self._sums.device)
            if self._last_scores is not None:
                probabilities = torch.tensor(QUANTILES, device=self._last_scores.device)
                found = self._last_scores.float().flatten().nanquantile(probabilities)
                self._last_scores = None
            found = (
                self.accelerator.gather(found[None]).nanmean(0).tolist()
            )  # the same everywhere, as all that is logged
            metrics |= {
                f"blade/{name}_q{round(100 * p):02}": v for p, v in zip(QUANTILES, found, strict=True) if v == v
            }
        if self._reference_losses:
            metrics["blade/reference_loss"] = float(torch.cat(self._reference_losses).mean())
            self._reference_losses = []
        if self.bilevel_config.domain_column is not None:
            self._merge(self.domain_tally)
            counts = self.domain_tally.state_dict()
            for i in range(len(self.domain_tally)):
                before = self._logged_domains.get(i, (0.0, 0.0))
                now = (float(counts["selected"][i]), float(counts["offered"][i]))
                if now[1] > before[1]:
                    name = self.domain_names[i] if self.domain_names else i
                    metrics[f"blade/selected_fraction/{name}"] = (now[0] - before[0]) / (now[1] - before[1])
                self._logged_domains[i] = now
        return metrics

    def bilevel_facts(self) -> dict[str, Any]:
        """Collect the facts of the run, with the settings as they were resolved."""
        facts = super().bilevel_facts()
        facts["granularity"] = self.granularity
        facts["head"] = self._head
        facts["reference_kind"] = "none" if self._is_off() else self._reference_kind
        if facts["reference_kind"] == "dynamic":
            facts["sync_steps"], facts["reference_steps"], facts["first_reference_steps"] = self._schedule
            facts["penalty"] = self.bilevel_config.penalty
        return facts

    def _forward_passes(self, load: Load) -> float:
        return self.bilevel_config.forward_passes(load, self.granularity == "token")

    def _method_section(self) -> MethodSection | None:
        config, kind = self.bilevel_config, self._reference_kind
        if self.sample_tally is None or not bool(self.sample_tally.state_dict()["offered"].any()):
            return None
        share, unit = f"{100 * config.selection_ratio:.4g} %", f"{self.granularity}s"
        if kind == "dynamic":
            sync_steps, reference_steps, first = self._schedule
            about = (
                f": of every batch of candidates it trained on the {share} of the {unit} on which the model did worst compared "
                f"with a reference model. Every {sync_steps} optimizer steps the reference became a copy of the model and took "
                f"{reference_steps} steps ({first} the first time) on the target dataset"
            )
            about += f" and, weighted {config.penalty:.4g}, on the selected {unit}." if config.penalty else "."
            paper = _PAPER
        elif kind == "static":
            about = f": of every batch of candidates it trained on the {share} of the {unit} on which the model did worst compared with a fixed reference model."
            paper = _STATIC_PAPERS
        else:
            rule = "at random" if config.score == "random" else "with the highest loss"
            about = f": of every batch of candidates it trained on {share} of the {unit}, chosen {rule}."
            paper = "none, this is a control."
        columns, rows = self._domain_rows()
        return MethodSection(
            title="Data selection",
            about=about,
            paper=paper,
            limit=f"What was selected is what this model, as it trained, could still learn from; it is no verdict on the {unit} themselves.",
            statistics=self._statistics(),
            columns=columns,
            rows=rows,
            plots=self._plots(),
        )

    def _statistics(self) -> dict[str, str]:
        """Say how much was selected, and of how many samples."""
        tables = self.sample_tally.state_dict()
        seen = tables["offered"] > 0
        offered, selected = tables["offered"][seen], tables["selected"][seen]
        num, unit = len(offered), "tokens" if self.granularity == "token" else "samples"
        of_pool = "" if self._is_stream else f" of {len(self.train_dataset):,}"
        statistics = {
            f"Share of the candidate {unit} that was selected": f"{float(selected.sum() / offered.sum()):.1%}",
            "Rows that were candidates": f"{num:,}{of_pool}",
            "Of them never selected": f"{int((selected == 0).sum()):,} ({float((selected == 0).double().mean()):.1%})",
            "Of them selected whenever they were candidates": f"{int((selected == offered).sum()):,} "
            f"({float((selected == offered).double().mean()):.1%})",
        }
        if self.state.epoch is not None and not self._is_stream:
            statistics["Passes over the pool"] = f"{self.state.epoch:.1f}"
        return statistics

    def _domain_rows(self) -> tuple[list[str], list[list[str]]]:
        """Compare the domains' shares of the candidates and of what was selected."""
        offered, selected = (self.domain_tally.state_dict()[name] for name in ("offered", "selected"))
        if not bool(offered.any()):
            return [], []
        names = self.domain_names or list(range(len(offered)))
        rows = [
            [str(name), f"{o / offered.sum():.1%}", f"{s / max(1, selected.sum()):.1%}", f"{s / max(1, o):.1%}"]
            for name, o, s in zip(names, offered.tolist(), selected.tolist(), strict=True)
        ]
        return ["domain", "share of the candidates", "share of the selected", "selected of its candidates"], rows

    def _plots(self) -> dict[str, tuple[str, Any]]:
        """Choose what was logged often enough to be drawn."""
        name = "excess loss" if self.bilevel_config.score == "excess_loss" else "score"
        start = f"blade/{name.replace(' ', '_')}"
        scores = self._logged(f"{start}_mean", f"{start}_selected_mean")
        scores = {
            label: scores[f"{start}{end}"]
            for label, end in (("selected", "_selected_mean"), ("all candidates", "_mean"))
            if f"{start}{end}" in scores
        }
        prefix = "blade/selected_fraction/"
        shares = {key.removeprefix(prefix): line for key, line in self._logged(prefix).items()}
        plots = {}
        for file, description, lines, label in (
            (
                "blade_scores.png",
                f"Mean {name} of the candidates and of the selected over the optimizer steps",
                scores,
                f"mean {name}",
            ),
            (
                "blade_domains.png",
                "Selected share of every domain's candidates over the optimizer steps",
                shares,
                "selected share of candidates",
            ),
        ):
            if lines and max(len(steps) for steps, _ in lines.values()) > 1:
                plots[file] = (description, partial(lines_over_steps, lines, label))
        quantiles = {p: self._logged(f"{start}_q{round(100 * p):02}") for p in QUANTILES}
        lines = {p: line for p, found in quantiles.items() for line in found.values()}
        if len(lines) == len(QUANTILES) and len(lines[0.5][0]) > 1:
            plots["blade_distribution.png"] = (
                f"Distribution of the {name} of the candidates over the optimizer steps",
                partial(distribution_over_steps, lines[0.5][0], {p: line[1] for p, line in lines.items()}, name),
            )
        return plots


@dataclass
class _Plan:
    """What is known of a micro-batch before the forward pass that tokens are selected in."""

    batch: Any
    origin: Origin
    scores: Tensor | None  # losses of the reference, or random ones
    used: bool = False


class _SelectingModel:
    """Stands in for the model in ``compute_loss``: one forward without labels, the loss over the selected tokens."""

    def __init__(self, trainer: BladeMixin, model: nn.Module, plan: _Plan) -> None:
        self._trainer = trainer
        self._model = model
        self._plan = plan
        self.num_calls = 0
        self.selected: Tensor | None = None  # what the loss must be made from

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        self.num_calls += 1
        if inputs.get("fused_lm_head"):
            return self._log_probs_of_selected(inputs)
        num_items = inputs.pop("num_items_in_batch", None)
        head = self._trainer._head
        outputs = self._model(**forward_inputs(self._model, head, inputs))
        if not isinstance(outputs, dict):
            raise ValueError(
                "Token selection needs a model that returns a `ModelOutput`, and this one returns a tuple. Set "
                "`model.config.return_dict = True`."
            )
        units = token_losses_from_logits(head, outputs["logits"], inputs)
        keep, planned = self._trainer._select_tokens(units, self._plan)
        total = torch.where(keep, units.losses, 0.0).sum()
        outputs["loss"] = self.selected = total / (planned.clamp(min=1) if num_items is None else num_items)
        return outputs

    def _log_probs_of_selected(self, inputs: dict[str, Any]) -> Any:
        """Answer TRL, which sums log-probabilities itself: 0 for tokens that are not selected, its metrics left alone."""
        outputs = self._model(**inputs)
        width = outputs.log_probs.shape[1]
        units = UnitLosses(-outputs.log_probs, outputs.label_mask.long())
        if "shift_labels" not in inputs:  # the last position, which predicts nothing, is missing
            units = UnitLosses(F.pad(units.losses, (0, 1)), F.pad(units.counts, (0, 1)))
        keep, _ = self._trainer._select_tokens(units, self._plan)
        outputs.log_probs = self.selected = torch.where(keep[:, :width], outputs.log_probs, 0.0)
        return outputs


def _is_made_from(result: Any, part: Tensor) -> bool:
    """Say whether a tensor's gradients flow through another; both usually lie a few operations apart."""
    if not isinstance(result, Tensor) or result.grad_fn is None or part.grad_fn is None:
        return True  # backward says what is wrong
    seen, waiting = {result.grad_fn}, deque([result.grad_fn])
    while waiting:
        node = waiting.popleft()
        if node is part.grad_fn:
            return True
        found = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= found
        waiting.extend(found)
    return False


class BladeTrainer(BladeMixin, Trainer):
    """Train on what the model can still learn from the pool, judged by a small target dataset (BLADE).

    Use it when the pool is noisy, mixed or off target and ``target_dataset`` shows what good means. Do not expect a gain
    when the pool is clean and on target: compare with all data and with ``BladeConfig(score="random")``.

    Change ``Trainer`` to ``BladeTrainer``, pass ``target_dataset``, and let ``per_device_train_batch_size`` be the
    candidate batch. Everything else is as with ``Trainer``.

    Cost of a step, in forward passes of the model (a forward and backward is 3): token level, 1 more, of the reference;
    sample level, 2 on all candidates and 3 on the selected rows. Every T steps the reference takes K steps on a target
    batch and, with ``penalty > 0``, on the selected part of a training batch (and scores it, 2 more forwards). Memory:
    one more copy of the weights for full fine-tuning, with one set of optimizer states during the reference phase; one
    more adapter for PEFT models. The reference trains on ``target_batch_size`` rows and, apart from the first
    synchronisation, on the selected part of a candidate batch, one after the other: where the candidate batch is much
    larger than what is trained on, set ``target_batch_size``; ``penalty=0`` leaves the candidate batch out altogether.

    Logged: ``blade/excess_loss_mean`` over the candidates and ``blade/excess_loss_selected_mean``, in nats;
    ``blade/selected_fraction`` and ``blade/selected_fraction/<domain>``; ``blade/num_excluded`` since the last log;
    ``blade/reference_loss`` after a synchronisation.

    Args:
        *args: ``model`` and ``args``, as for ``Trainer``; better passed by name.
        target_dataset: Map-style dataset that shows what good means, with the columns of ``train_dataset``. Needed for a
            dynamic reference.
        bilevel_config: A ``BladeConfig``.
        reference_model: A frozen model to compare with, for ``reference="static"``.
        compute_sample_losses: Loss of each sample for models whose head is not known; sample level only.
        **kwargs: Everything else that ``Trainer`` takes.

    Attributes:
        sample_tally: How often each sample's units were offered and selected, by ``sample_id``.
        domain_tally: The same by domain.

    References:
        Wang, Xiang, Xu et al., BLADE: Scalable Bi-level Adaptive Data Selection for LLM Training, arXiv 2606.18650.

    Example:
        >>> import torch
        >>> from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=8, patch_size=4, num_channels=1, num_labels=2)
        >>> def images(num):
        ...     return [{"pixel_values": torch.randn(1, 8, 8), "labels": i % 2} for i in range(num)]
        >>> trainer = BladeTrainer(
        ...     model=ViTForImageClassification(config),
        ...     args=TrainingArguments("output", per_device_train_batch_size=8, max_steps=2, save_strategy="no",
        ...                            use_cpu=True, disable_tqdm=True),
        ...     train_dataset=images(32),
        ...     target_dataset=images(8),
        ...     bilevel_config=BladeConfig(selection_ratio=0.25, reference_steps=1),
        ... )
        >>> output = trainer.train()  # doctest: +ELLIPSIS
        {...}
        >>> int(trainer.sample_tally.state_dict()["selected"].sum())
        4
    """
