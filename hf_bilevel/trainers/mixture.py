"""Learn domain weights in one run, with as many steps between two updates as the budget asks for."""

import copy
import json
import logging
import math
import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Sampler
from transformers import Trainer

from hf_bilevel.cards import MethodSection
from hf_bilevel.core.mixture import (
    DomainWeights,
    adjoint_step,
    apportion,
    domain_means,
    optimal_inner_steps,
    weight_learning_rate,
)
from hf_bilevel.core.weights import loss_coefficients
from hf_bilevel.data import (
    Origin,
    derive_seed,
    fetch,
    name_domains,
    plain_copy,
    private_randomness,
)
from hf_bilevel.derivatives import (
    RELATIVE_STEP,
    FiniteDifferences,
    LowerBlocks,
    gradient_at_weights,
    preserved_buffers,
    random_state,
    restore_random_state,
)
from hf_bilevel.losses import evaluating, find_head, unsupported_head, unwrap
from hf_bilevel.mixing import MixtureDraws, MixtureSampler, MixtureStream, NumberedMixtureStream, stratified_rows
from hf_bilevel.plots import domain_weights_over_time
from hf_bilevel.subset import SelectedSubset
from hf_bilevel.trainers.config import BilevelConfig
from hf_bilevel.trainers.cost import TRAINING, Load
from hf_bilevel.trainers.domain_evaluation import DomainEvaluationMixin
from hf_bilevel.trainers.reference import ReferenceMixin
from hf_bilevel.trainers.reference_models import has_forward_of_its_own
from hf_bilevel.trainers.sharding import gathered, spread_state

MIXTURE_NAME = "mixture.json"

_PAPERS = {
    "penalty": (
        "finite inner steps, Das, Patel, Razaviyayn, Mirrokni, [arXiv 2602.19510](https://arxiv.org/abs/2602.19510), with the "
        "penalised hypergradient of TANDEM, [arXiv 2606.04401](https://arxiv.org/abs/2606.04401)."
    ),
    "alignment": "gradient alignment, Fan, Pagliardini, Jaggi, DoGE, [arXiv 2310.15393](https://arxiv.org/abs/2310.15393).",
    "unrolled": (
        "unrolled finite inner steps, Das, Patel, Razaviyayn, Mirrokni, [arXiv 2602.19510](https://arxiv.org/abs/2602.19510)."
    ),
}

logger = logging.getLogger(__name__)

_UPDATE, _DRAWS, _PROBE, _TARGET, _SUBSET = range(10, 15)  # tell seeds apart


@dataclass
class MixtureConfig(BilevelConfig):
    r"""Settings of MixtureTrainer (arXiv 2602.19510, and TANDEM, arXiv 2606.04401, for the penalised hypergradient).

    ==============  ====================  ==============================  ==============================================
    paper           argument              published                       our default and why
    ==============  ====================  ==============================  ==============================================
    T               inner_steps           :math:`\sqrt{N \log N}`         "auto": that, with N the steps of the run
    K               reference_steps       5 (TANDEM)                      "auto": T / 10, which keeps the overhead near 20 %
    :math:`\lambda` penalty               not published                   1
    :math:`\alpha`  weight_learning_rate  per experiment                  "auto": by mirror descent theory for N / T updates
    ==============  ====================  ==============================  ==============================================

    Args:
        mixture: ``"learned"``, or a control: ``"uniform"``, the same share for every domain, in every optimizer step, or
            ``"proportional"``, the plain Trainer, bit for bit. A trainer that is given a ``mixture`` keeps that.
        hypergradient: ``"penalty"``: a twin of the model takes K steps on the same training batches and, besides, on the
            target dataset; a domain whose loss is lower for the twin deserves more weight. ``"alignment"``: scalar product
            of the target gradient with each domain's, which looks one step ahead (as DoGE). ``"unrolled"``: exact, through
            all T steps, for plain SGD on small models.
        realisation: ``"draw"``: domains are drawn by their weights, with exact shares in every optimizer step;
            ``"weight"``: the stream is left alone, and the losses of domain j are multiplied by its weight over its share.
        inner_steps: T, optimizer steps between two updates of the weights, or "auto" (1 for alignment).
        reference_steps: K, the last of these T steps, which the twin repeats, or "auto".
        penalty: :math:`\lambda`: the twin minimises the training loss plus the target loss over :math:`\lambda`. The larger,
            the closer to the derivative.
        update_rule: ``"mirror"`` (exponentiated gradient) or ``"projected"``.
        weight_learning_rate: Learning rate of the weights, for hypergradients scaled to norm 1, or "auto".
        smoothing: Share of the uniform mixture that is mixed in after every update, in [0, 1].
        min_weight: Smallest weight of a domain, in [0, 1 / number of domains].
        initial_weights: ``"uniform"`` or ``"proportional"`` (to the domains' sizes).
        probe_batches: Training batches' worth of rows on which the domains' losses are measured at an update, spread evenly
            over the domains.
        reference_dtype: ``"float32"``, ``"bfloat16"`` or ``"auto"`` (the model's): dtype of the twin while it is not trained.
        reference_device: ``"auto"`` (beside the model) or ``"cpu"``: where the twin waits between uses.
        target_batch_size: See ``BilevelConfig``.
        domain_column: See ``BilevelConfig``; not needed for a dict of datasets.
        domain_names: See ``BilevelConfig``.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a value has another type than declared.

    Example:
        >>> MixtureConfig(domain_column="source", inner_steps="50").inner_steps
        50
        >>> MixtureConfig(realisation="sample")
        Traceback (most recent call last):
        ValueError: `realisation` must be one of draw, weight; got 'sample'.
    """

    mixture: str = field(default="learned", metadata={"help": "learned, or a fixed control: uniform or proportional."})
    hypergradient: str = field(
        default="penalty", metadata={"help": "How weights are judged: penalty, alignment or unrolled."}
    )
    realisation: str = field(
        default="draw", metadata={"help": "draw: samples by domain weights; weight: multiply losses instead."}
    )
    inner_steps: str = field(
        default="auto", metadata={"help": "Optimizer steps between updates of the weights (T), or auto."}
    )
    reference_steps: str = field(
        default="auto", metadata={"help": "Steps of the twin before an update (K), or auto for T / 10."}
    )
    penalty: float = field(default=1.0, metadata={"help": "Training loss over target loss in the twin's objective."})
    update_rule: str = field(default="mirror", metadata={"help": "Step of the weights: mirror or projected."})
    weight_learning_rate: str = field(
        default="auto", metadata={"help": "Learning rate of the weights for hypergradients of norm 1, or auto."}
    )
    smoothing: float = field(default=0.0, metadata={"help": "Share of the uniform mixture mixed in at updates."})
    min_weight: float = field(default=0.0, metadata={"help": "Smallest weight of a domain."})
    initial_weights: str = field(default="uniform", metadata={"help": "First weights: uniform or proportional."})
    probe_batches: int = field(
        default=4, metadata={"help": "Training batches' worth of rows to measure the domains' losses on."}
    )
    reference_dtype: str = field(
        default="auto", metadata={"help": "Dtype of a copied twin at rest: auto, float32 or bfloat16."}
    )
    reference_device: str = field(
        default="auto", metadata={"help": "Where a copied twin waits between uses: auto or cpu."}
    )

    _numbers_or_words: ClassVar[dict[str, tuple[type, str]]] = {
        "inner_steps": (int, "auto"),
        "reference_steps": (int, "auto"),
        "weight_learning_rate": (float, "auto"),
    }
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "mixture": ("learned", "proportional", "uniform"),
        "hypergradient": ("alignment", "penalty", "unrolled"),
        "realisation": ("draw", "weight"),
        "update_rule": ("mirror", "projected"),
        "initial_weights": ("proportional", "uniform"),
        "reference_dtype": ("auto", "bfloat16", "float32"),
        "reference_device": ("auto", "cpu"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("inner_steps", "reference_steps"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 or 'auto', got {getattr(self, name)}.")
        if "auto" not in (self.inner_steps, self.reference_steps) and self.reference_steps > self.inner_steps:
            raise ValueError(
                f"`reference_steps` ({self.reference_steps}) repeats the last of the `inner_steps` ({self.inner_steps}), so it "
                "must not be larger."
            )
        if self.weight_learning_rate != "auto" and not 0 < self.weight_learning_rate < math.inf:
            raise ValueError(f"`weight_learning_rate` must be positive and finite, got {self.weight_learning_rate}.")
        if not 0 < self.penalty < math.inf:
            raise ValueError(f"`penalty` must be positive and finite, got {self.penalty}.")
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"`smoothing` must be in [0, 1], got {self.smoothing}.")
        if not 0 <= self.min_weight < 1:
            raise ValueError(f"`min_weight` must be in [0, 1 / number of domains], got {self.min_weight}.")
        if self.probe_batches < 1:
            raise ValueError(f"`probe_batches` must be at least 1, got {self.probe_batches}.")

    def schedule(self, max_steps: int) -> tuple[int, int]:
        """Resolve T and K for a run of so many optimizer steps."""
        inner, repeated = self.inner_steps, self.reference_steps
        if inner == "auto" and self.hypergradient == "alignment":
            inner = 1
        elif inner == "auto":
            inner = max(optimal_inner_steps(max(1, max_steps)), 1 if repeated == "auto" else repeated)
        return inner, max(1, inner // 10) if repeated == "auto" else repeated

    def forward_passes(self, load: Load) -> float:
        """Count the forward passes of one row in a run, evaluation left out; a forward and backward pass counts 3."""
        rows, steps, plain = load.rows_per_step, load.steps, load.plain_passes
        if self.mixture != "learned":
            return plain
        if self.hypergradient == "unrolled":
            return plain + steps * 2 * TRAINING * rows  # a Hessian action for every step
        target = TRAINING * (self.target_batch_size or load.batch_size) * load.num_processes
        probe = 2 * self.probe_batches * load.batch_size * load.num_processes
        inner, repeated = self.schedule(steps)
        if self.hypergradient == "alignment":
            return plain + (steps - 1) // inner * (target + probe)
        return plain + (steps - 1) // inner * (repeated * (TRAINING * rows + target) + probe)


class MixtureMixin(DomainEvaluationMixin, ReferenceMixin):
    """Learned domain weights for ``Trainer`` and its subclasses; see ``MixtureTrainer``.

    With ``realisation="draw"`` the training loss is whatever the class behind this one computes. ``"weight"`` weights the losses
    of single samples, so a subclass that overrides ``compute_loss`` is refused without ``compute_sample_losses``.
    """

    method = "mixture"
    config_class = MixtureConfig
    _losses_are_for = "weighted by"

    def __init__(
        self,
        *args: Any,
        train_dataset: Any = None,
        mixture: Mapping[str, float] | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        self._given_optimizer = (kwargs.get("optimizers") or (None, None))[0]
        self._pending: deque[Origin] = deque()  # of the micro-batches of this step that are still to come
        self._given_mixture = None if mixture is None else _read_mixture(mixture)
        self._joined: tuple[Tensor | None, list[str]] | None = None
        self._shares: Tensor | None = None  # of the domains in the pool, (M,), float64
        self._equals_pool = False
        self._draws: MixtureDraws | None = None
        self._domains: DomainWeights | None = None
        self._trajectory: list[tuple[int, list[float]]] = []  # steps at which the weights changed, weights
        self._twin: dict[str, Any] | None = None  # what the twin will repeat
        self._tape: list[dict[str, Any]] = []  # what is unrolled
        if isinstance(train_dataset, Mapping):
            train_dataset, self._joined = _join(train_dataset)
        super().__init__(*args, train_dataset=train_dataset, **kwargs)

    # Setup ----------------------------------------------------------------------------------------------------------

    def _is_off(self) -> bool:
        return self._given_mixture is None and self.bilevel_config.mixture == "proportional" or self._equals_pool

    def _learns(self) -> bool:
        return self._given_mixture is None and self.bilevel_config.mixture == "learned"

    def _weights_losses(self) -> bool:
        return self.bilevel_config.realisation == "weight"

    @property
    def granularity(self) -> str:
        """Domains are sets of samples."""
        return "sample"

    @property
    def inner_steps(self) -> int:
        """T with "auto" resolved; known once training has begun."""
        return self.bilevel_config.schedule(self.state.max_steps)[0]

    @property
    def reference_steps(self) -> int:
        """K with "auto" resolved; known once training has begun."""
        return self.bilevel_config.schedule(self.state.max_steps)[1]

    def _why_not_deepspeed(self) -> str | None:
        return "its weights are judged by a twin of the model and of its optimizer, of which an engine gives no copy. Use FSDP2."

    def _check_bilevel_setup(self) -> None:
        if self._is_off():
            return  # the plain Trainer, wherever that runs
        if self._learns() or self._weights_losses():
            super()._check_bilevel_setup()  # else only the sampler is not the Trainer's, which runs anywhere
        config, name = self.bilevel_config, type(self).__name__
        if config.domain_column is None and self._joined is None and self.train_dataset is not None:
            raise ValueError(
                f"{name} needs to know the domains: set `domain_column`, the column of `train_dataset` that names each sample's "
                "domain, or pass `train_dataset` as a dict from domain names to datasets."
            )
        mixed = isinstance(self.train_dataset, MixtureStream)
        if self._is_stream and not mixed and not self._weights_losses():
            raise ValueError(
                "`train_dataset` is one stream, of which domains cannot be drawn. Pass a dict from domain names to streams, or "
                "use `realisation='weight'`."
            )
        if self._is_stream and not mixed and config.domain_names is None:
            raise ValueError("A stream cannot be searched for its domains. Set `domain_names`.")
        if mixed and self.args.dataloader_num_workers > 0:
            raise ValueError(
                "A dict of streams is drawn from in the main process: the workers' copies would not learn of new weights. Set "
                "`dataloader_num_workers=0`."
            )
        if self._weights_losses() or self._learns():
            self._check_head()
        if self._learns():
            self._check_learning()
        elif self._weights_losses():
            self._check_losses(self.train_dataset)
        self._warn_about_ignored_settings()

    def _check_head(self) -> None:
        if self.compute_sample_losses is not None:
            return
        if find_head(self.model) is None:
            raise ValueError(unsupported_head(self.model, "sample"))
        if self._weights_losses() and (other := self._loss_of_its_own()):
            raise ValueError(
                f"`realisation='weight'` weights the losses of single samples, so {other} would not be called. Use "
                "`realisation='draw'`, or pass `compute_sample_losses=`, (model, batch) -> losses of shape (n,)."
            )

    def _check_learning(self) -> None:
        config = self.bilevel_config
        if self.is_fsdp_enabled and config.hypergradient != "penalty":
            raise ValueError(
                f'`hypergradient={config.hypergradient!r}` takes gradients that FSDP does not bring together. Use "penalty", or DDP.'
            )
        self._check_target_dataset()
        if config.hypergradient == "penalty":
            self._check_reference("dynamic")
            if has_forward_of_its_own(unwrap(self.model)):
                self._check_loss_of_twin()
            if self._given_optimizer is not None:
                raise ValueError(
                    "`hypergradient='penalty'` builds an optimizer for the twin as the Trainer builds its own, so it cannot "
                    "take one that is given as `optimizers`. Name it in `optim`, pass `optimizer_cls_and_kwargs`, or override "
                    "`create_optimizer`."
                )
        elif self.reference_model is not None:
            warnings.warn(f"`reference_model` is ignored by {type(self).__name__}.", stacklevel=5)
        if config.hypergradient == "alignment" and self.accelerator.mixed_precision == "fp16":
            raise ValueError(
                "`hypergradient='alignment'` is not tested with fp16, in which small gradients vanish. Use `bf16=True`."
            )
        if config.hypergradient == "alignment":
            LowerBlocks(self.model, "full", None, "full")  # raises for weights that it cannot step along
        if config.hypergradient == "unrolled":
            self._check_unrolled()
        self._check_losses(self.target_dataset)

    def _without_router_loss(self) -> str | None:
        if self._weights_losses():
            return "the training"
        has_other_twin = self.bilevel_config.hypergradient == "penalty" and has_forward_of_its_own(unwrap(self.model))
        return "the training of the twin" if self._learns() and has_other_twin else None

    def _check_loss_of_twin(self) -> None:
        """Refuse losses that the twin, which has no such forward, could not repeat."""
        others = {
            f"`loss_type={getattr(self.args, 'loss_type', None)!r}`": getattr(self.args, "loss_type", "nll") != "nll",
            "`compute_loss_func`": self.compute_loss_func is not None,
            "`label_smoothing_factor`": self.label_smoother is not None,
        }
        for given, is_given in others.items():
            if is_given:
                raise ValueError(
                    f"{given} is computed from a forward that belongs to the trained model alone, and the twin of "
                    "`hypergradient='penalty'` would train with another loss. Use `hypergradient='alignment'`, or the loss of "
                    "the model's head."
                )

    def _check_unrolled(self) -> None:
        given = self._given_optimizer
        plain = self.args.optim == "sgd" if given is None else type(given) is torch.optim.SGD
        momentum = given is not None and any(group.get("momentum") for group in given.param_groups)
        if not plain or momentum or self.args.optim_args and "momentum" in self.args.optim_args:
            raise ValueError(
                "`hypergradient='unrolled'` differentiates through the optimizer's steps, which it can for SGD without momentum "
                f"only. Set `optim='sgd'` (now {self.args.optim!r}), or use `hypergradient='penalty'`."
            )
        if self.args.max_grad_norm:
            raise ValueError(
                f"`hypergradient='unrolled'` does not differentiate through clipping, and `max_grad_norm` is "
                f"{self.args.max_grad_norm}. Set it to 0, or use `hypergradient='penalty'`."
            )
        if self.args.world_size > 1 or self.accelerator.mixed_precision != "no" or self.args.activation_checkpointing:
            raise ValueError(
                "`hypergradient='unrolled'` runs in one process, in full precision and without activation checkpointing. Use "
                "`hypergradient='penalty'`."
            )

    def _warn_about_ignored_settings(self) -> None:
        config, defaults = self.bilevel_config, MixtureConfig()
        ignored: dict[str, str] = {}
        learning = ("hypergradient", "inner_steps", "update_rule", "weight_learning_rate", "smoothing", "min_weight")
        learning += ("initial_weights", "probe_batches")
        twin = ("reference_steps", "penalty", "reference_dtype", "reference_device")
        if self._given_mixture is not None:
            ignored |= dict.fromkeys((*learning, *twin, "mixture"), "a given `mixture`")
        elif not self._learns():
            ignored |= dict.fromkeys((*learning, *twin), f"`mixture={config.mixture!r}`")
        elif config.hypergradient != "penalty":
            ignored |= dict.fromkeys(twin, f"`hypergradient={config.hypergradient!r}`")
            if config.hypergradient == "unrolled":
                ignored["probe_batches"] = "`hypergradient='unrolled'`"
        for name, reason in ignored.items():
            if getattr(config, name) != getattr(defaults, name):
                warnings.warn(f"`{name}` is ignored with {reason}.", stacklevel=6)
        if not self._weights_losses() and self.args.train_sampling_strategy != "random":
            warnings.warn(
                f"`train_sampling_strategy={self.args.train_sampling_strategy!r}` is ignored with `realisation='draw'`.",
                stacklevel=6,
            )

    def _prepare_pool(self) -> None:
        self._equals_pool = False
        super()._prepare_pool()
        self._shares = None
        if self.train_dataset is None or self.domain_names is None or self._is_off():
            return
        names, num = self.domain_names, len(self.domain_names)
        if num < 2:
            raise ValueError(
                f"There is one domain only in `train_dataset`, {names[0]!r}, so there is nothing to mix. Use Trainer."
            )
        if self.bilevel_config.min_weight * num > 1:
            raise ValueError(
                f"`min_weight` is {self.bilevel_config.min_weight} for each of {num} domains, which sums to more than 1. It must "
                f"not be above {1 / num:.4g}."
            )
        if isinstance(self.train_dataset, MixtureStream):
            self._shares = torch.full((num,), 1 / num, dtype=torch.float64)
            if self._learns() and self.bilevel_config.initial_weights == "proportional":
                raise ValueError("The sizes of streams are not known. Use `initial_weights='uniform'`.")
        elif not self._is_stream:
            counts = torch.bincount(self._domain_ids, minlength=num)
            if empty := [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]:
                more = f" and {len(empty) - 10} others" if len(empty) > 10 else ""
                raise ValueError(
                    f"`train_dataset` has no sample of the domains {empty[:10]}{more}. Take them out of `domain_names`, or of the "
                    "dict of datasets; domains that are numbers must be 0, 1, 2 and so on, others, such as "
                    "years, strings."
                )
            self._shares = counts.double() / counts.sum()
        fixed = self._fixed_weights()
        self._equals_pool = (
            fixed is not None and not self._is_stream and bool(torch.isclose(fixed, self._shares, atol=1e-9).all())
        )
        if self._equals_pool:
            self._trajectory = [(0, self._shares.tolist())]
        self._rows = (
            [(self._domain_ids == j).nonzero().flatten() for j in range(num)] if self._domain_ids is not None else None
        )
        self._say_which_target_domains_are_missing()

    def _say_which_target_domains_are_missing(self) -> None:
        column, target = self.bilevel_config.domain_column, self.target_dataset
        if (
            not self._learns()
            or column is None
            or not isinstance(target, datasets.Dataset)
            or column not in target.column_names
        ):
            return
        there = set(name_domains(target, column, self.bilevel_config.domain_names))
        missing = sorted(there - set(map(str, self.domain_names)))
        if missing:
            warnings.warn(
                f"`target_dataset` has samples of {missing}, which `train_dataset` lacks: the weights will favour the domains that "
                "help there.",
                stacklevel=5,
            )

    def _find_domains(self) -> tuple[Tensor | None, list[str] | None]:
        if self._joined is None:
            return super()._find_domains()
        domain_ids, names = self._joined
        if domain_ids is not None and (
            len(domain_ids) != len(self.train_dataset) or getattr(self.args, "shuffle_dataset", False)
        ):
            raise ValueError(
                f"`train_dataset` was joined from a dict of {len(domain_ids)} rows, and the trainer has packed, dropped or "
                f"shuffled some while preparing it ({len(self.train_dataset)} now): their domains are lost. Prepare each domain "
                "beforehand, or pass one dataset with a `domain_column` that survives (for SFTTrainer no `packing`)."
            )
        return self._joined

    def _fixed_weights(self) -> Tensor | None:
        """Return weights that are not learned, ``(M,)``, or None."""
        names = list(map(str, self.domain_names))
        if self._given_mixture is None:
            if self._learns():
                return None
            return torch.full((len(names),), 1 / len(names), dtype=torch.float64)
        given = self._given_mixture
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"`mixture` names the domains {unknown}, and `train_dataset` has {names}.")
        if absent := sorted(set(names) - set(given)):
            raise ValueError(
                f"`mixture` gives no weight to the domains {absent} of `train_dataset`; write 0 to leave one out."
            )
        return torch.tensor([given[name] for name in names], dtype=torch.float64)

    # The run --------------------------------------------------------------------------------------------------------

    def _begin_training(self) -> None:
        self._pending.clear()
        if self._is_off():
            return
        config, num = self.bilevel_config, len(self.domain_names)
        weights = self._fixed_weights()
        if weights is None:
            uniform = torch.full((num,), 1 / num, dtype=torch.float64)
            weights = uniform if config.initial_weights == "uniform" or self._shares is None else self._shares
        self._domains = DomainWeights(weights, config.update_rule, config.smoothing, config.min_weight)
        self._trajectory = [(0, weights.tolist())]
        self._gaps: list[float] | None = None  # the last hypergradient
        self._seen_step = -1
        self._counted = torch.zeros(num, dtype=torch.float64)  # samples of a stream, by domain
        window = self._candidate_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        drawn = self._shares if self._weights_losses() else weights
        if isinstance(self.train_dataset, MixtureStream) or not self._weights_losses():
            self._draws = MixtureDraws(drawn, window, derive_seed(self._seed, _DRAWS))
        if isinstance(self.train_dataset, MixtureStream):
            self.train_dataset.draws = self._draws
        self._twin, self._tape = None, []
        if self._learns():
            self._begin_reference("dynamic" if config.hypergradient == "penalty" else "none")
            if self._target_loader is None:
                size = config.target_batch_size or self._candidate_batch_size
                self._target_loader = self._endless_loader(self.target_dataset, size, _TARGET)

    def _end_training(self, failed: bool) -> None:
        super()._end_training(failed)
        self._tape, self._twin = [], None

    def get_train_dataloader(self) -> DataLoader:
        """Return the training loader; with ``realisation="draw"`` it draws by the mixture."""
        if not self._is_off() and self._domains is None and self.train_dataset is not None:
            self._begin_training()
        loader = super().get_train_dataloader()
        self._num_batches = None if self._is_stream else len(loader)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self._is_off() or self._weights_losses():
            return super()._get_train_sampler(train_dataset)
        return MixtureSampler(self._draws, self._domain_ids, self._epoch)

    def _epoch(self) -> int:
        steps = max(1, math.ceil(self._num_batches / self.args.gradient_accumulation_steps))
        return self.state.global_step // steps

    def _numbered_stream(self, stream: Any) -> IterableDataset:
        return NumberedMixtureStream(stream) if isinstance(stream, MixtureStream) else super()._numbered_stream(stream)

    def _select(self, batches: list[Any], origins: list[Origin], num_items: Any) -> tuple[list[Any], Any]:
        """Train on all candidates; here a new optimizer step begins."""
        step, config = self.state.global_step, self.bilevel_config
        self._pending.clear()
        self._pending.extend(origins)
        if self._is_stream and self._weights_losses() and not isinstance(self.train_dataset, MixtureStream):
            self._count(origins)
        if not self._learns() or self._seen_step == step:
            return batches, num_items
        self._seen_step = step
        inner_steps = self.inner_steps
        if step == 0 and inner_steps >= self.state.max_steps:
            warnings.warn(
                f"The weights of the domains never move: `inner_steps` is {inner_steps} and the run has "
                f"{self.state.max_steps} steps. Lower `inner_steps`, or train longer.",
                stacklevel=3,
            )
        if step > 0 and step % inner_steps == 0:
            self._update(step)
        if config.hypergradient == "unrolled":
            self._tape.append({"weights": [p.detach().clone() for p in self._trained()], "batches": []})
        elif config.hypergradient == "penalty":
            if (step + self.reference_steps) % inner_steps == 0:
                self._begin_twin()
            if self._twin is not None:
                self._record_for_twin(batches, origins, num_items)
        if self._is_stream:
            self._recent.extend(
                {"batch": plain_copy(b), "domain_ids": o.domain_ids} for b, o in zip(batches, origins, strict=True)
            )
        return batches, num_items

    def _count(self, origins: list[Origin]) -> None:
        num = len(self.domain_names)
        ids = torch.cat([origin.domain_ids.to(self.args.device) for origin in origins])
        self._counted += self.accelerator.reduce(torch.bincount(ids, minlength=num)).cpu()
        self._shares = self._counted / self._counted.sum()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _update(self, step: int) -> None:
        """Judge the domains and move their weights; one host sync."""
        judge = {"penalty": self._twin_gaps, "alignment": self._alignment, "unrolled": self._unrolled}
        self._share_statistics(self.model)
        seed = derive_seed(self._seed, step, self.args.process_index, _UPDATE)
        with private_randomness(seed, self.args.device):
            hypergradient = judge[self.bilevel_config.hypergradient](step)
        self._gaps = hypergradient.tolist()
        num_updates = (self.state.max_steps - 1) // self.inner_steps
        rate = self.bilevel_config.weight_learning_rate
        if rate == "auto":
            rate = weight_learning_rate(len(hypergradient), num_updates, self.bilevel_config.update_rule)
        self._domains.step(hypergradient, rate)
        self._trajectory.append((step, self._domains.weights.tolist()))
        if not self._weights_losses():
            self._draws.set_probabilities(self._domains.weights)

    # Hypergradients -------------------------------------------------------------------------------------------------

    def _begin_twin(self) -> None:
        """Let the reference start where the model is now, optimizer included."""
        self.reference.synchronise()
        self._twin = {"optimizer": copy.deepcopy(self.optimizer.state_dict()), "steps": []}

    def _record_for_twin(self, batches: list[Any], origins: list[Origin], num_items: Any) -> None:
        multipliers = [self._multipliers(origin) if self._weights_losses() else None for origin in origins]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        entry = {"batches": batches, "multipliers": multipliers, "num_items": num_items, "rates": rates}
        self._twin["steps"].append(entry)

    def _reference_optimizer(self, reference: nn.Module) -> torch.optim.Optimizer:
        optimizer = self._fresh_optimizer(reference)
        # Of the optimizer itself: a loaded state is shared with what it was loaded from.
        optimizer.load_state_dict(spread_state(copy.deepcopy(self._twin["optimizer"]), optimizer))
        return optimizer

    def _twin_gaps(self, step: int) -> Tensor:
        """Train the twin on what the model was trained on and on the target dataset, and compare the domains' losses.

        Args:
            step: The current optimizer step.

        Returns:
            The hypergradient, ``(M,)``, float64, on the CPU.

        Cost: K forward and backward passes on training batches and K on target batches; two forward passes on the probe.
        """
        if self._twin is None:  # resumed with another T
            return torch.zeros(len(self.domain_names), dtype=torch.float64)
        steps, penalty = self._twin["steps"], self.bilevel_config.penalty
        probe = self._probe(step)
        before = self._domain_losses(self.model, probe)

        def objective(reference: nn.Module, k: int) -> Iterator[Tensor]:
            for batch, multipliers in zip(steps[k]["batches"], steps[k]["multipliers"], strict=True):
                yield self._repeated_loss(reference, batch, multipliers, steps[k])
            with preserved_buffers(reference):  # till after its backward: what they move does not shrink with 1 / λ
                yield self._mean_loss(reference, self._draw_target_batch()) / penalty

        def use_recorded_rates(optimizer: torch.optim.Optimizer, k: int) -> None:
            for group, rate in zip(optimizer.param_groups, steps[k]["rates"], strict=True):
                group["lr"] = rate

        self._train_reference(len(steps), objective, use_recorded_rates)
        with self.reference.active() as reference:
            after = self._domain_losses(reference, probe)
        self._twin = None
        return penalty * self._known(after - before)

    def _repeated_loss(
        self, model: nn.Module, batch: Any, multipliers: Tensor | None, entry: dict[str, Any]
    ) -> Tensor:
        """Compute what ``training_step`` has differentiated for a batch, on another model."""
        inputs, num_items = dict(self._prepare_inputs(batch)), entry["num_items"]
        num_batches = len(entry["batches"])
        if multipliers is None and not has_forward_of_its_own(unwrap(self.model)):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items)
        else:
            if multipliers is None:  # the trainer's loss may need that forward, which the twin does not have
                multipliers = torch.ones(len(inputs["labels"]))
            loss = self._multiplied_loss(model, inputs, multipliers, num_items, num_batches)
        return loss if self._loss_is_of_whole_step(num_items) else loss / num_batches

    def _loss_is_of_whole_step(self, num_items: Any) -> bool:
        """Say, as ``Trainer.training_step`` does, whether micro-batches' losses are added up, not averaged."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return self.model_accepts_loss_kwargs and num_items is not None or self.compute_loss_func is not None

    def _probe(self, step: int) -> list[tuple[Any, Tensor]]:
        """Draw rows of every domain, the same for any number of processes, and take this one's share of them.

        Returns:
            Batches with the rows' domains.
        """
        if self._rows is None:
            return [(entry["batch"], entry["domain_ids"]) for entry in self._recent]
        size = self._candidate_batch_size
        num = self.bilevel_config.probe_batches * size * self.args.world_size
        seed = derive_seed(self._seed, step, 0, _PROBE)
        rows = stratified_rows(self._rows, max(1, math.ceil(num / len(self._rows))), seed)
        rows = rows[self.args.process_index :: self.args.world_size]
        dataset, collator = self._collator_for(self.train_dataset)
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [(collator(fetch(dataset, chunk)), self._domain_ids[torch.tensor(chunk)]) for chunk in chunks]

    def _domain_losses(self, model: nn.Module, probe: list[tuple[Any, Tensor]]) -> Tensor:
        """Measure the mean loss of every domain's units, over all processes; ``(M,)``, NaN where there are none."""
        totals = torch.zeros(2, len(self.domain_names), device=self.args.device)
        missing = self._passes_of_others(len(probe))
        with self._scoring(), evaluating(model):
            for batch, domain_ids in probe:
                units = self._losses(model, self._prepare_inputs(batch))
                totals += self._by_domain(units.losses, units.counts, domain_ids)
            for _ in range(missing):
                self._losses(model, self._prepare_inputs(probe[0][0]))
        return self._quotient(totals)

    def _passes_of_others(self, num_passes: int) -> int:
        """Count the forward passes that another process makes beyond this one's; all make them where FSDP shards the model."""
        if not self.is_fsdp_enabled:
            return 0
        return int(self.accelerator.gather(torch.tensor([num_passes], device=self.args.device)).max()) - num_passes

    def _by_domain(self, values: Tensor, counts: Tensor, domain_ids: Tensor) -> Tensor:
        num = len(self.domain_names)
        return torch.stack(domain_means(values, counts, domain_ids.to(values.device), num)).to(self.args.device)

    def _quotient(self, totals: Tensor) -> Tensor:
        sums, units = self.accelerator.reduce(totals).double().cpu()
        if not sums.isfinite().all():
            broken = [str(name) for name, value in zip(self.domain_names, sums, strict=True) if not value.isfinite()]
            raise FloatingPointError(
                f"Before step {self.state.global_step} the loss on rows of the domains {broken}, of the model or of its twin, is "
                "NaN or infinite. Lower `learning_rate`, or look for broken samples in these domains and in `target_dataset`."
            )
        return sums / units

    @staticmethod
    def _known(hypergradient: Tensor) -> Tensor:
        """Let domains of which nothing was measured stay as they are."""
        known = ~hypergradient.isnan()
        return torch.where(known, hypergradient, hypergradient[known].mean())

    def _alignment(self, step: int) -> Tensor:
        """Multiply the target gradient with every domain's gradient.

        Args:
            step: The current optimizer step.

        Returns:
            Minus the scalar products, ``(M,)``, float64, on the CPU.

        Cost: one forward and backward pass on a target batch, two forward passes on the probe.
        """
        blocks = LowerBlocks(self.model, "full", None, "full")
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else blocks.parameters[0].dtype
        norm = torch.nn.utils.get_total_norm([p.detach() for p in blocks.parameters])
        batch = self._prepare_inputs(self._target_loader.draw())

        def target() -> tuple[Tensor, Tensor]:
            with self.accelerator.autocast():
                loss, units = self._weighted_loss(self.model, batch)
            return loss, units.losses

        totals = torch.zeros(2, len(self.domain_names), device=self.args.device)
        with evaluating(self.model):
            _, gradient = gradient_at_weights(blocks, target)
            if self.args.world_size > 1:
                gradient = [self.accelerator.reduce(part, "mean") for part in gradient]
            for probe, domain_ids in self._probe(step):
                inputs = self._prepare_inputs(probe)
                counts: list[Tensor] = []

                def domain_losses(inputs: Any = inputs, counts: list[Tensor] = counts) -> tuple[Tensor, Tensor]:
                    with self.accelerator.autocast():
                        loss, units = self._weighted_loss(self.model, inputs)
                    counts.append(units.counts)
                    return loss, units.losses

                slopes = FiniteDifferences(blocks, domain_losses, RELATIVE_STEP[dtype], norm).slopes(gradient)
                totals += self._by_domain(slopes, counts[0], domain_ids)
        return self._known(-self._quotient(totals))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Take the Trainer's step, and remember it where it is to be differentiated."""
        if self._tape:
            parameters = self._trained()
            state = random_state(parameters[0].device)
            rates = {id(p): (g["lr"], g["weight_decay"]) for g in self.optimizer.param_groups for p in g["params"]}
            self._tape[-1]["rates"] = [rates.get(id(p), (0.0, 0.0)) for p in parameters]
            origin, drawn = self._pending[0], self._domains.weights if not self._weights_losses() else self._shares
            self._tape[-1]["batches"].append((inputs, origin.domain_ids, num_items_in_batch, drawn.clone(), state))
            if not self._weights_losses():
                self._pending.popleft()
        return super().training_step(model, inputs, num_items_in_batch)

    def _unrolled(self, step: int) -> Tensor:
        """Differentiate a target batch's loss through the last T steps.

        Args:
            step: The current optimizer step.

        Returns:
            The hypergradient, ``(M,)``, float64, on the CPU.

        Cost: one forward and backward pass on a target batch, one double backward for each of the T steps; memory for T
        copies of the weights.
        """
        parameters = self._trained()
        now = [p.detach().clone() for p in parameters]
        weights = self._domains.weights.to(parameters[0], copy=True).requires_grad_()
        hypergradient = torch.zeros_like(weights)
        try:
            with preserved_buffers(self.model), sdpa_kernel(SDPBackend.MATH):
                self.model.train()  # an evaluation may lie between
                loss = self._mean_loss(self.model, self._draw_target_batch())
                adjoint = list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
                for entry in reversed(self._tape):
                    with torch.no_grad():
                        for p, value in zip(parameters, entry["weights"], strict=True):
                            p.copy_(value)
                    rates, decays = zip(*entry["rates"], strict=True)
                    loss = self._replayed_loss(entry, weights)
                    loss = loss + sum(0.5 * d * p.square().sum() for p, d in zip(parameters, decays, strict=True))
                    adjoint, part = adjoint_step(loss, parameters, weights, adjoint, rates)
                    hypergradient += part
        finally:
            with torch.no_grad():
                for p, value in zip(parameters, now, strict=True):
                    p.copy_(value)
        self._tape = []
        if not self._weights_losses():  # nothing was drawn of a domain without weight
            hypergradient = hypergradient.where(weights.detach() > 0, torch.nan)
        return self._known(hypergradient.double().cpu())

    def _replayed_loss(self, entry: dict[str, Any], weights: Tensor) -> Tensor:
        """Compute the loss of a step again, as a function of the domain weights."""
        total = weights.new_zeros(())
        for inputs, domain_ids, num_items, drawn, state in entry["batches"]:
            restore_random_state(state)
            units = self._losses(self.model, self._prepare_inputs(inputs))
            if not self._counts_labels(inputs, num_items):
                num_items = units.counts.sum() * len(entry["batches"])
            ids = domain_ids.to(weights.device)
            multipliers = weights[ids] / drawn.to(weights)[ids]
            total = (
                total + (units.losses * loss_coefficients(multipliers, units.counts, num_items, normalise=False)).sum()
            )
        return total

    # The loss -------------------------------------------------------------------------------------------------------

    def _multipliers(self, origin: Origin) -> Tensor:
        return (self._domains.weights / self._shares).nan_to_num(1.0)[origin.domain_ids.cpu()]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the Trainer's loss, each sample's times its domain's weight over its share with ``"weight"``."""
        if not (model.training and self._pending and self._weights_losses()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        multipliers = self._multipliers(self._pending.popleft())
        num_batches = self.current_gradient_accumulation_steps
        loss = self._multiplied_loss(model, inputs, multipliers, num_items_in_batch, num_batches)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _multiplied_loss(
        self, model: nn.Module, inputs: dict[str, Any], multipliers: Tensor, num_items: Any, num_batches: int
    ) -> Tensor:
        of_whole_step, scale = self._loss_is_of_whole_step(num_items), 1
        counted = self._counts_labels(inputs, num_items)
        if of_whole_step and counted and self.args.average_tokens_across_devices:
            scale = self.accelerator.num_processes
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)

        def coefficients(counts: Tensor) -> Tensor:
            if not of_whole_step:
                total = counts.sum().clamp(min=1)  # a mean, which the Trainer divides
            elif not counted:
                total = counts.sum().clamp(min=1) * num_batches  # its units are not the labels that were counted
            else:
                total = num_items
            return loss_coefficients(multipliers.to(counts.device, dtype), counts, total, normalise=False)

        return self._weighted_loss(model, inputs, coefficients)[0] * scale

    # Results --------------------------------------------------------------------------------------------------------

    @property
    def domain_weights(self) -> dict[str, float]:
        """The weight of every domain as it is now; an error before training."""
        return self._named(self._begun().weights)

    @property
    def mixture(self) -> dict[str, float]:
        """What to train with: the weights' average over the updates, later ones counting more; the weights if fixed."""
        return self._named(self._begun().average)

    def _begun(self) -> DomainWeights:
        if self._is_off() and self._shares is not None:
            return DomainWeights(self._shares, "mirror")
        if self._domains is None:
            raise RuntimeError("There are no domain weights before training.")
        return self._domains

    def _named(self, weights: Tensor) -> dict[str, float]:
        return dict(zip(map(str, self.domain_names), weights.tolist(), strict=True))

    def save_mixture(self, path: str | os.PathLike) -> None:
        """Write the mixture as JSON, for another trainer's ``mixture``, or for ``datasets.interleave_datasets``.

        Args:
            path: File to write.
        """
        mixture = self.mixture
        content = {
            "mixture": mixture,
            "interleave_datasets": {"domains": list(mixture), "probabilities": list(mixture.values())},
            "last_weights": self.domain_weights,
            "trajectory": [{"step": step, "weights": weights} for step, weights in self._trajectory],
        }
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def selected_subset(self, *, fraction: float | None = None, size: int | None = None) -> SelectedSubset:
        """Draw rows whose domains have the shares of ``mixture``, at random inside a domain and none twice.

        The shares are exact up to one row; the draw depends on the seed of the run. A larger subset holds the smaller ones as far
        as the rounding of the shares allows.

        Args:
            fraction: Share of the training dataset to draw, in (0, 1].
            size: Or the number of rows.

        Returns:
            The subset, in the order of the training dataset; for a dict of datasets that of ``train_dataset`` of this trainer,
            which has them one after the other. Probabilities: how probable it was that a row of this domain is drawn.

        Raises:
            RuntimeError: Before training, and for streams, whose samples have no number.
            ValueError: If not exactly one of the two is given, it is out of range, or a domain has too few rows.
        """
        if (fraction is None) == (size is None):
            raise ValueError("Give one of `fraction` and `size`.")
        if self._is_stream or self._shares is None:
            raise RuntimeError(
                "There are no rows to draw: a stream has no numbers, and `mixture='proportional'` reads no domains."
            )
        mixture, num_pool = self.mixture, len(self.train_dataset)
        num = size if fraction is None else self._num_kept(fraction, num_pool)
        if not 1 <= num <= num_pool:
            raise ValueError(f"`size` must be from 1 to the {num_pool} rows of `train_dataset`, got {num}.")
        weights = torch.tensor(list(mixture.values()), dtype=torch.float64)
        sizes = torch.tensor([len(rows) for rows in self._rows])
        counts = apportion(num * weights, num)
        if bool((counts > sizes).any()):
            bound = min(num - 1, int(((sizes + 1) / weights).min()))
            largest = next(n for n in range(bound, -1, -1) if bool((apportion(n * weights, n) <= sizes).all()))
            short = [
                f"{name!r} has {have} of {need}"
                for name, have, need in zip(mixture, sizes.tolist(), counts.tolist(), strict=True)
                if have < need
            ]
            raise ValueError(
                f"The mixture asks for more rows than a domain has, for {num} in all: {', '.join(short)}. Take at most {largest}, or "
                "repeat rows instead of selecting them: train with `mixture=` set to this one, or use "
                "`datasets.interleave_datasets` with its probabilities."
            )
        ids = [
            row
            for j, (rows, count) in enumerate(zip(self._rows, counts.tolist(), strict=True))
            for row in stratified_rows([rows], count, derive_seed(self._seed, _SUBSET, j))
        ]
        ids = torch.tensor(ids, dtype=torch.int64).sort().values
        facts = {"selection": {"size": size} if fraction is None else {"fraction": fraction}, "mixture": mixture}
        return self._subset_of_pool(ids, facts, probabilities=(counts / sizes)[self._domain_ids[ids]])

    def plot_domain_weights(self) -> Any:
        """Draw the weights over the steps of the run.

        Returns:
            A matplotlib figure.
        """
        self._begun()
        steps = [step for step, _ in self._trajectory]
        weights = [weights for _, weights in self._trajectory]
        return domain_weights_over_time(steps, weights, list(map(str, self.domain_names)), self.state.max_steps)

    # State, logging, facts ------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save and self._learns() and self._domains is not None:
            self.save_mixture(Path(self.args.output_dir if output_dir is None else output_dir) / MIXTURE_NAME)

    def _state_of_all_processes(self) -> dict[str, Any]:
        state = super()._state_of_all_processes()
        if isinstance(self.train_dataset, MixtureStream):
            state[self.method].pop("draws", None)  # the first process alone reads streams, for all of them
        return state

    def _shared_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "domains": self._domains.state_dict(),
            "trajectory": [[step, list(weights)] for step, weights in self._trajectory],
            "gaps": self._gaps,
            "seen_step": self._seen_step,
            "counted": self._counted.clone(),
            "draws": None if self._draws is None else self._draws.state_dict(),
        }
        if self._learns():
            state["target_position"] = self._target_loader.position
            state["reference"] = {} if self.reference is None else self._reference_state()
            state["twin_optimizer"] = (
                None if self._twin is None else gathered(self._twin["optimizer"], self._keeps_state)
            )
            state["tape"] = [gathered({"weights": e["weights"], "rates": e["rates"]}) for e in self._tape]
        return state

    def _rank_state(self) -> dict[str, Any]:
        if not self._learns():
            return {}
        state: dict[str, Any] = {"recent": [plain_copy(entry) for entry in self._recent]}
        if self._twin is not None:
            state["twin_steps"] = [gathered(plain_copy(entry)) for entry in self._twin["steps"]]
        state["tape"] = [gathered([_plain_tape(batch) for batch in entry["batches"]]) for entry in self._tape]
        return state

    def _check_resumed(self, checkpoint: str, state: dict[str, Any]) -> None:
        if not self._learns():
            return
        before, now = state["config"]["hypergradient"], self.bilevel_config.hypergradient
        if "target_position" not in state["shared"] or before != now:
            learned = (
                f"learned with `hypergradient={before!r}`"
                if "target_position" in state["shared"]
                else "with a fixed mixture"
            )
            raise ValueError(
                f"`{checkpoint}` is of a run {learned}; this one learns with `hypergradient={now!r}`, of which it has no state. Resume "
                "with the same settings, or start a new run from the checkpoint's weights."
            )

    def _load_state(self, shared: dict[str, Any], rank: dict[str, Any]) -> None:
        self._domains.load_state_dict(shared["domains"])
        self._trajectory = [(step, list(weights)) for step, weights in shared["trajectory"]]
        self._gaps, self._seen_step = shared["gaps"], shared["seen_step"]
        self._counted.copy_(shared["counted"])
        if self._draws is not None and shared["draws"] is not None:
            self._draws.load_state_dict(shared["draws"], replay=not self.args.ignore_data_skip)
        if not self._learns():
            self._keep_fixed_weights()
            return
        self._target_loader.position = shared["target_position"]
        self._load_reference_state(shared["reference"], rank)
        if shared["twin_optimizer"] is not None and self.bilevel_config.hypergradient == "penalty":
            self._twin = {"optimizer": shared["twin_optimizer"], "steps": list(rank["twin_steps"])}
        self._tape = [
            {**entry, "batches": [_tape_from(batch) for batch in batches]}
            for entry, batches in zip(shared["tape"], rank.get("tape", []), strict=True)
        ]

    def _keep_fixed_weights(self) -> None:
        """Go on with the mixture that this run was given, where the checkpoint has another."""
        fixed, before = self._fixed_weights(), self._domains.weights
        if torch.allclose(fixed, before, rtol=0, atol=1e-9):
            return
        logger.warning(
            "The mixture changed since the checkpoint: %s, now %s.", self._named(before), self._named(fixed)
        )
        config = self.bilevel_config
        self._domains = DomainWeights(fixed, config.update_rule, config.smoothing, config.min_weight)
        self._trajectory.append((self.state.global_step, fixed.tolist()))
        if self._draws is not None and not self._weights_losses():
            self._draws.set_probabilities(fixed)

    def _bilevel_metrics(self) -> dict[str, float]:
        names = list(map(str, self.domain_names))
        metrics = {f"mixture/weight/{name}": weight for name, weight in self.domain_weights.items()}
        if self._learns():
            metrics["mixture/inner_steps"] = self.inner_steps
            if self._gaps is not None:
                metrics |= {f"mixture/hypergradient/{name}": g for name, g in zip(names, self._gaps, strict=True)}
        return metrics

    def bilevel_facts(self) -> dict[str, Any]:
        """Collect the facts of the run, with the settings as they were resolved."""
        facts = super().bilevel_facts()
        facts["head"] = find_head(self.model)
        if self._shares is not None:
            facts["pool_shares"] = self._named(self._shares)
        if self._domains is not None and not self._is_off():
            facts["mixture"] = self.mixture
            if self._learns():
                facts["inner_steps"] = self.inner_steps
                if self.bilevel_config.hypergradient == "penalty":
                    facts["reference_steps"] = self.reference_steps
        return facts

    def _forward_passes(self, load: Load) -> float:
        return self.bilevel_config.forward_passes(load) if self._learns() else load.plain_passes

    def _method_section(self) -> MethodSection | None:
        if self._domains is None:
            return None
        learns = self._learns()
        column = "learned weight" if learns else "weight"
        shares = {} if self._shares is None or self._is_stream else self._named(self._shares)
        mixture = sorted(self.mixture.items(), key=lambda pair: -pair[1])
        rows = [[name, f"{shares[name]:.3f}" if name in shares else "", f"{weight:.3f}"] for name, weight in mixture]
        about = f", the weights moving every {self.inner_steps} optimizer steps." if learns else ", the weights fixed."
        picture = ("Weight of every domain over the optimizer steps", self.plot_domain_weights)
        return MethodSection(
            title="Learned mixture" if learns else "Fixed mixture",
            about=about,
            paper=_PAPERS[self.bilevel_config.hypergradient]
            if learns
            else "none, nothing was learned about the domains.",
            limit="The weights are those of one run: domains that help the target alike share it by chance, and other sizes of the "
            "model or of the domains have other best weights.",
            columns=["domain", "share of the pool", column],
            rows=rows,
            plots={"mixture.png": picture} if learns else {},
        )


def _read_mixture(given: Mapping[str, float] | str | os.PathLike) -> dict[str, float]:
    """Read a mixture from a mapping or a file, and check that it is one."""
    if not isinstance(given, Mapping):
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))["mixture"]
            if not isinstance(given, dict):
                raise TypeError("it holds no mapping")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"`mixture` must be a mapping from domain names to weights, or a file written by `save_mixture`; reading {given!r} "
                f"failed ({type(error).__name__}: {error})."
            ) from error
    weights = {}
    for name, weight in given.items():
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 <= weight <= 1:
            raise ValueError(f"The weight of {name!r} in `mixture` must be a number in [0, 1], got {weight!r}.")
        weights[str(name)] = float(weight)
    if len(weights) < len(given):
        raise ValueError(f"`mixture` names a domain twice, once as a string: {', '.join(map(repr, given))}.")
    total = sum(weights.values())
    if not math.isclose(total, 1.0, abs_tol=1e-4):
        raise ValueError(f"The weights in `mixture` sum to {total:.6g} and must sum to 1: divide them by it.")
    return {name: weight / total for name, weight in weights.items()}


def _join(given: Mapping[str, Any]) -> tuple[Any, tuple[Tensor | None, list[str]]]:
    """Make one dataset of a dict of datasets, and say which rows are whose."""
    if not given:
        raise ValueError(
            "`train_dataset` is an empty dict. Give it two or more datasets, by the names of their domains."
        )
    names, parts = list(map(str, given)), list(given.values())
    streams = [isinstance(part, (IterableDataset, datasets.IterableDataset)) for part in parts]
    if any(streams):
        if not all(streams):
            raise ValueError(
                "`train_dataset` holds streams and datasets with a length; make all of them one or the other."
            )
        return MixtureStream(parts, names), (None, names)
    ids = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
    if parts and all(isinstance(part, datasets.Dataset) for part in parts):
        return datasets.concatenate_datasets(parts), (ids, names)
    return ConcatDataset(parts), (ids, names)


def _plain_tape(batch: tuple) -> list[Any]:
    inputs, domain_ids, num_items, drawn, (_, cpu_state, device_state) = batch
    return [plain_copy(inputs), domain_ids, num_items, drawn, cpu_state, device_state]


def _tape_from(batch: list[Any]) -> tuple:
    inputs, domain_ids, num_items, drawn, cpu_state, device_state = batch
    return inputs, domain_ids, num_items, drawn, (torch.device("cpu"), cpu_state, device_state)


class MixtureTrainer(MixtureMixin, Trainer):
    """Learn how much of each domain to train on, judged by a small target dataset, in one run.

    Use it when the pool consists of domains of different use for the target, and data are limited: with domains that are repeated
    for many epochs, weights matter. With abundant data the literature finds no gain over equal shares. Compare with
    ``MixtureConfig(mixture="uniform")`` and with the plain Trainer.

    Change ``Trainer`` to ``MixtureTrainer``, pass ``target_dataset``, and say which domain a sample is of: by ``domain_column``, or by
    passing ``train_dataset`` as a dict from names to datasets (or streams, with ``max_steps``).

    Every T steps the weights take one step. With the default hypergradient a twin of the model, optimizer state included, repeats
    the last K of these steps on the same batches with the target loss added; both are then compared on rows of every domain.

    To learn on a small model and train a large one: ``small.save_mixture("mixture.json")``, then
    ``MixtureTrainer(model=large, mixture="mixture.json", ...)``.

    Cost of T steps, in forward passes of the model (a step is 3): 6 K with target batches as large as training batches, and twice
    ``probe_batches`` for the comparison; the defaults make that near 20 % of 3 T. Memory: a copy of the weights and, during the last
    K steps, of the optimizer's state. Alignment costs 3 and twice ``probe_batches`` for each update, without a copy.

    Logged: ``mixture/weight/<domain>``, ``mixture/hypergradient/<domain>`` (negative: helps), ``mixture/inner_steps``.

    Args:
        *args: ``model`` and ``args``, as for ``Trainer``; better passed by name.
        train_dataset: As for ``Trainer``, with a domain column; or a dict from domain names to datasets.
        mixture: Fixed weights: a mapping from domain names to weights that sum to 1, or the path of a file written by
            ``save_mixture``. Nothing is learned then, and no target dataset is needed.
        target_dataset: Map-style dataset that shows what good means, with the columns of ``train_dataset``.
        bilevel_config: A ``MixtureConfig``.
        compute_sample_losses: Loss of each sample for models whose head is not known.
        **kwargs: Everything else that ``Trainer`` takes.

    References:
        Das, Patel, Razaviyayn, Mirrokni, arXiv 2602.19510 (finite inner steps). TANDEM, arXiv 2606.04401 (the penalised
        hypergradient). Fan, Pagliardini, Jaggi, DoGE, arXiv 2310.15393 (alignment).

    Example:
        >>> import torch
        >>> from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=8, patch_size=4, num_channels=1, num_labels=2)
        >>> def images(num):
        ...     return [{"pixel_values": torch.randn(1, 8, 8), "labels": i % 2} for i in range(num)]
        >>> trainer = MixtureTrainer(
        ...     model=ViTForImageClassification(config),
        ...     args=TrainingArguments("output", per_device_train_batch_size=8, max_steps=20, save_strategy="no",
        ...                            use_cpu=True, disable_tqdm=True),
        ...     train_dataset={"photos": images(32), "drawings": images(16)},
        ...     target_dataset=images(8),
        ... )
        >>> output = trainer.train()  # doctest: +ELLIPSIS
        {...}
        >>> sorted(trainer.mixture), round(sum(trainer.mixture.values()), 6)
        (['drawings', 'photos'], 1.0)
    """
