"""BROS: learn a weight for every training sample, by single-loop bilevel optimisation in random subspaces."""

import math
import warnings
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_bilevel.cards import MethodSection
from hf_bilevel.core.single_loop import Auxiliary, UpperStep
from hf_bilevel.core.subspace import bi_probe, carry_over, coverage, one_sided, refresh_schedule, two_sided
from hf_bilevel.core.weights import WeightNetwork, WeightTable, loss_coefficients
from hf_bilevel.data import Origin, derive_seed, private_randomness
from hf_bilevel.derivatives import (
    RELATIVE_STEP,
    DoubleBackward,
    FiniteDifferences,
    LowerBlocks,
    gradient_at_weights,
    preserved_buffers,
)
from hf_bilevel.losses import find_head, unsupported_head
from hf_bilevel.plots import lines_over_steps, weights_histogram
from hf_bilevel.subset import SelectedSubset
from hf_bilevel.trainers.base import BilevelMixin
from hf_bilevel.trainers.config import BilevelConfig
from hf_bilevel.trainers.cost import TRAINING, Load
from hf_bilevel.trainers.reference_models import is_peft_model

MIN_COVERAGE = 10

NUM_GROWN, GROWTH = 3, 5.0  # logs in a row between which the auxiliary variable grows so much: it diverges

SATURATED = 0.02  # from 0 or 1: where a network's weights no longer move

UPPER_LEARNING_RATES = {"table": 0.3, "domain": 0.01, "network": 0.001}

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the weights, in the model card

_PAPER = (
    "Zhang, Kong, Zhang, Yuan, BROS: Bias-Corrected Randomized Subspaces for Memory-Efficient Single-Loop Bilevel "
    "Optimization, [arXiv 2605.10288](https://arxiv.org/abs/2605.10288)"
)
_FULL_SPACE_PAPER = (
    "Chen, Xiao, Balasubramanian, Optimal Algorithms for Stochastic Bilevel Optimization under Relaxed Smoothness Conditions "
    "(MA-SOBA), JMLR 25, 2024"
)

_NOTES = (
    "hypergradient_norm",
    "auxiliary_norm",
    "auxiliary_learning_rate",
    "target_loss",
    "weight_mean",
    "weight_std",
)
_KEPT = ("upper_variable", "rank", "modules", "rest")  # settings that a run is resumed with
_BASIS, _OTHER_BASIS, _SIGNS, _ROUNDING, _UPPER, _TARGET = range(6)  # tell seeds apart


class SampleWeights(NamedTuple):
    """Learned weights of samples.

    Attributes:
        ids: Sample ids, which are rows of the training dataset; ``(n,)``, int64.
        weights: Their weights; ``(n,)``, float32, not negative.
    """

    ids: Tensor
    weights: Tensor


@dataclass
class BrosConfig(BilevelConfig):
    r"""Settings of BROS (arXiv 2605.10288).

    The *lower* variable y is the model's weights, trained on the weighted pool; the *upper* variable x gives the weights;
    the *auxiliary* variable z links them. Each optimizer step moves all three. With ``rank="full"`` it is MA-SOBA.

    ===========================  =======================  ==============  ===============================================
    paper                        argument                 published       our default and why
    ===========================  =======================  ==============  ===============================================
    r                            rank                     per experiment  0.125 of a layer's inputs: a rank of 48 for ViT-S
    a new P every step           refresh_steps            1               "auto": as long as the subspaces of a run cover
                                                                          the space 10 times; AdamW keeps its state
    bi-probe correction          estimator                bi_probe        one_sided: unbiased too, and less noisy
    :math:`\alpha`               upper_learning_rate      0.01            "auto": 0.3 of a logit for a typical visit of a
                                                                          sample, see ``normalise_hypergradient``
    :math:`1 - \theta`           1 - moving_average       0.9             0.9
    :math:`\gamma`               auxiliary_learning_rate  0.01            "auto": half of the inverse of the curvature seen
    1e-4 \|w\|² in g             damping                  1e-4            0.3 of the curvature seen: the Hessian of a
                                                                          network is indefinite; at 0.1 z grew in trials
    ===========================  =======================  ==============  ===============================================

    Args:
        upper_variable: ``"table"``: a logit for every sample; ``"network"``: a small network from a sample's loss to its
            weight (Meta-Weight-Net), also for streams; ``"domain"``: a logit for every domain; ``"fixed"``: nothing is learned,
            and samples are weighted by the ``sample_weights`` given to the trainer. Without them and with ``rank="full"`` the
            run is the plain Trainer's, bit for bit.
        weight_function: From logits to weights, for table and domain: ``"sigmoid"``, free of each other in (0, 1);
            ``"projected"``, no logits but the weights themselves, kept in [0, 1]; ``"softmax"``, with mean 1. A network's
            are sigmoid.
        normalise_weights: Divide the weights of a batch by their mean, so that the loss keeps its scale however small the
            weights are; not for batches of one row, whose weight would be 1. Either way the loss with all weights 1 is the Trainer's, with the exact mean over an accumulated
            batch also for models that take ``num_items_in_batch`` and ignore it (BERT's own heads).
        rank: Rank of the subspaces: a whole number, a fraction of each layer's input size, or ``"full"`` for no subspaces.
            The adapters of a PEFT model are trained in full space.
        modules: Names, or ends of names, of the layers to put into subspaces; None for all linear layers and convolutions
            but the output head and layers with tied weights. A linear layer whose ``weight`` the model reads without calling
            the layer must not be among them; the first step looks for such layers.
        rest: All other parameters: ``"full"``, trained in full space, or ``"frozen"``.
        refresh_steps: Optimizer steps that share a subspace, or "auto".
        estimator: Of the Hessian action: ``"one_sided"``, ``"bi_probe"`` (two more passes) or ``"two_sided"``.
        hessian_action: ``"finite_differences"``, or ``"double_backward"`` for comparison: exact, in full space, and several
            times the memory.
        update_every: Optimizer steps for each update of auxiliary and upper variable; the others are ordinary steps.
        start_step: Optimizer step of the first update, or "auto": 0, and a sixteenth of the run for a network, because
            losses say nothing about samples before the model has learned something. Keep it low: what the model has memorised
            with wrong labels no longer stands out.
        normalise_hypergradient: Divide the upper step by the root mean square of recent hypergradients, one number for all
            samples. Otherwise ``upper_learning_rate`` is the paper's, and must be of the size of the pool.
        upper_learning_rate: Learning rate of the upper variable, which follows the Trainer's schedule, or "auto": 0.3 for a
            table, of which a step moves the samples of one batch. A step moves all of the domains, and all of a network's
            few hundred parameters, which add up: 0.01 and 0.001 there.
        moving_average: Share of a new hypergradient in their moving average, in (0, 1]; 1 is SOBA.
        auxiliary_learning_rate: Learning rate of z in full space, or "auto"; in a subspace times r / m.
        damping: Damping of the linear system. With an "auto" learning rate relative to the curvature seen, else absolute.
        auxiliary_dtype: ``"float32"`` or ``"bfloat16"``, with stochastic rounding.
        auxiliary_device: ``"auto"`` (beside the model) or ``"cpu"``: where z is kept between uses.
        target_batch_size: See ``BilevelConfig``.
        domain_column: See ``BilevelConfig``.
        domain_names: See ``BilevelConfig``.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a value has another type than declared.

    Example:
        >>> BrosConfig(rank="48").rank, BrosConfig(rank=0.25).rank, BrosConfig(rank="full").rank
        (48, 0.25, 'full')
        >>> BrosConfig(rank=1.5)
        Traceback (most recent call last):
        ValueError: `rank` must be a whole number, a fraction in (0, 1), or 'full'; got 1.5.
    """

    upper_variable: str = field(
        default="table", metadata={"help": "What is learned: table, network, domain, or fixed for nothing."}
    )
    weight_function: str = field(
        default="sigmoid", metadata={"help": "Weights of table and domain: sigmoid, softmax or projected."}
    )
    normalise_weights: bool = field(
        default=True, metadata={"help": "Divide the weights of a batch by their mean, so that it counts in full."}
    )
    rank: str = field(
        default="0.125", metadata={"help": "Rank of the subspaces: a number, a fraction of a layer's inputs, or full."}
    )
    modules: list[str] | None = field(
        default=None, metadata={"help": "Ends of the names of the layers to project; all but heads if not set."}
    )
    rest: str = field(default="full", metadata={"help": "All other parameters: full (trained) or frozen."})
    refresh_steps: str = field(default="auto", metadata={"help": "Optimizer steps that share a subspace, or auto."})
    estimator: str = field(
        default="one_sided", metadata={"help": "Hessian-action estimator: one_sided, bi_probe or two_sided."}
    )
    hessian_action: str = field(
        default="finite_differences", metadata={"help": "finite_differences, or double_backward for comparison."}
    )
    update_every: int = field(default=1, metadata={"help": "Optimizer steps for each update of the weights."})
    start_step: str = field(
        default="auto", metadata={"help": "Optimizer step at which the weights begin to learn, or auto."}
    )
    normalise_hypergradient: bool = field(
        default=True, metadata={"help": "Scale steps of the upper variable by the size of recent hypergradients."}
    )
    upper_learning_rate: str = field(
        default="auto", metadata={"help": "Learning rate of the upper variable, or auto."}
    )
    moving_average: float = field(
        default=0.1, metadata={"help": "Share of a new hypergradient in their moving average, in (0, 1]."}
    )
    auxiliary_learning_rate: str = field(
        default="auto", metadata={"help": "Learning rate of the auxiliary variable, or auto."}
    )
    damping: float = field(
        default=0.3, metadata={"help": "Damping of the linear system; with an auto learning rate relative to it."}
    )
    auxiliary_dtype: str = field(
        default="float32", metadata={"help": "Dtype of the auxiliary variable: float32 or bfloat16."}
    )
    auxiliary_device: str = field(
        default="auto", metadata={"help": "Where the auxiliary variable is kept: auto (beside the model) or cpu."}
    )

    _numbers_or_words: ClassVar[dict[str, tuple[type, str]]] = {
        "rank": (float, "full"),
        "refresh_steps": (int, "auto"),
        "start_step": (int, "auto"),
        "upper_learning_rate": (float, "auto"),
        "auxiliary_learning_rate": (float, "auto"),
    }
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "upper_variable": ("domain", "fixed", "network", "table"),
        "weight_function": ("projected", "sigmoid", "softmax"),
        "rest": ("frozen", "full"),
        "estimator": ("bi_probe", "one_sided", "two_sided"),
        "hessian_action": ("double_backward", "finite_differences"),
        "auxiliary_dtype": ("bfloat16", "float32"),
        "auxiliary_device": ("auto", "cpu"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank != "full":
            if not 0 < self.rank < math.inf or self.rank >= 1 and self.rank != int(self.rank):
                raise ValueError(f"`rank` must be a whole number, a fraction in (0, 1), or 'full'; got {self.rank}.")
            if self.rank >= 1:
                self.rank = int(self.rank)
        if self.rank == 1 and self.estimator == "bi_probe":
            raise ValueError(
                "`estimator='bi_probe'` needs a `rank` of at least 2, got 1. Raise it, or use `estimator='one_sided'`."
            )
        for name in ("refresh_steps", "update_every"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.start_step != "auto" and self.start_step < 0:
            raise ValueError(f"`start_step` must not be negative, got {self.start_step}.")
        for name in ("upper_learning_rate", "auxiliary_learning_rate"):
            if getattr(self, name) != "auto" and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {getattr(self, name)}.")
        if not 0 < self.moving_average <= 1:
            raise ValueError(f"`moving_average` must be in (0, 1], got {self.moving_average}.")
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"`damping` must be finite and not negative, got {self.damping}.")
        if self.upper_variable == "domain" and self.domain_column is None:
            raise ValueError("`upper_variable='domain'` needs `domain_column`, the column that names the domains.")

    def first_update(self, max_steps: int) -> int:
        """Resolve ``start_step`` for a run of so many optimizer steps."""
        if self.start_step != "auto":
            return self.start_step
        return max_steps // 16 if self.upper_variable == "network" else 0

    def forward_passes(self, load: Load) -> float:
        """Count the forward passes of one row in a run, evaluation left out; a forward and backward pass counts 3."""
        if self.upper_variable == "fixed":
            return load.plain_passes
        updates = math.ceil(max(0, load.steps - self.first_update(load.steps)) / self.update_every)
        extra = {"one_sided": TRAINING, "two_sided": TRAINING + 2, "bi_probe": 3 * TRAINING + 2}[self.estimator]
        if self.hessian_action == "double_backward":
            extra = 2 * TRAINING  # what differentiating a forward and backward pass costs
        target = (self.target_batch_size or load.batch_size) * load.num_processes
        return load.plain_passes + updates * (extra * load.rows_per_step + TRAINING * target)


class BrosMixin(BilevelMixin):
    """BROS for ``Trainer`` and its subclasses; see ``BrosTrainer``.

    A subclass that overrides ``compute_loss`` is refused without ``compute_sample_losses``: the losses of single samples
    are needed, and are computed by the model's head.
    """

    method = "bros"
    config_class = BrosConfig
    _losses_are_for = "trained with"

    def __init__(self, *args: Any, sample_weights: SampleWeights | Tensor | None = None, **kwargs: Any) -> None:
        self._pending: deque[Origin] = deque()  # of the micro-batches of this step that are still to come
        self._given_weights = sample_weights
        self.blocks: LowerBlocks | None = None
        super().__init__(*args, **kwargs)

    # Setup ----------------------------------------------------------------------------------------------------------

    def _is_off(self) -> bool:
        return not self._learns() and self._given_weights is None and self.rank == "full"

    def _learns(self) -> bool:
        return self.bilevel_config.upper_variable != "fixed"

    @property
    def granularity(self) -> str:
        """Weights are per sample."""
        return "sample"

    @property
    def rank(self) -> str | int | float:
        """The rank of the subspaces; the adapters of a PEFT model are trained in full space."""
        return "full" if is_peft_model(self.model) else self.bilevel_config.rank

    @property
    def refresh_steps(self) -> int:
        """Optimizer steps that share a subspace, with "auto" resolved; known once training has begun."""
        if self.bilevel_config.refresh_steps != "auto":
            return self.bilevel_config.refresh_steps
        return min((refresh_schedule(self.state.max_steps, *shape) for shape in self._shapes()), default=1)

    def _shapes(self) -> list[tuple[int, int]]:
        """Size of the space and of the subspace of every projected block."""
        matrices = self.blocks.matrices()
        return [(matrices[i].shape[1], self.blocks.leaves[i].shape[1]) for i in self.blocks.projected]

    def _why_not_deepspeed(self) -> str | None:
        return (
            "a random subspace is one of a whole matrix, of which no process would have more than a part. Use one device or DDP, with "
            "gradient checkpointing to save memory."
        )

    _why_not_fsdp = _why_not_deepspeed

    def _check_bilevel_setup(self) -> None:
        if self._is_off():
            return  # the plain Trainer, wherever that runs
        super()._check_bilevel_setup()
        config, name = self.bilevel_config, type(self).__name__
        if self.compute_sample_losses is None:
            if find_head(self.model) is None:
                raise ValueError(unsupported_head(self.model, "sample"))
            if other := self._loss_of_its_own():
                raise ValueError(
                    f"{name} weights the losses of single samples, so {other} would not be called. Pass "
                    "`compute_sample_losses=`, (model, batch) -> losses of shape (n,), that computes the same loss."
                )
        if other := self._step_of_its_own():
            raise ValueError(
                f"{name} computes the gradients of a step itself, so `{other}.training_step` would not be called. Put what it does "
                "into a class in front of the mixin, or into a callback."
            )
        if self.accelerator.mixed_precision == "fp16":
            raise ValueError(f"{name} is not tested with fp16. Use `bf16=True`, or neither.")
        if self.args.torch_compile:
            warnings.warn(f"`torch_compile` is ignored by {name} in training steps.", stacklevel=4)
        self._check_double_backward()
        LowerBlocks(self.model, self.rank, config.modules, config.rest)  # raises for what cannot be projected
        if self.rank != "full" and (self.optimizer is not None or self.args.optim_target_modules is not None):
            raise ValueError(
                "In a subspace the optimizer steps on coordinates that the trainer makes, so it cannot be given, and "
                "`optim_target_modules` cannot be used. Choose it by `TrainingArguments.optim` or "
                "`optimizer_cls_and_kwargs`, or use `rank='full'`."
            )
        if self._is_stream and (config.upper_variable == "table" or self._given_weights is not None):
            raise ValueError(
                "`train_dataset` is a stream, whose samples have no number that a table of weights could be made for. Use "
                "`upper_variable='network'` or 'domain', or a map-style dataset."
            )
        self._check_normalised_weights()
        if self._given_weights is not None:
            self._check_given_weights()
        self._warn_about_ignored_settings()
        if self._learns():
            self._check_target_dataset()
        elif self.train_dataset is not None and not self._is_stream:
            self._check_labels(self.train_dataset, "train_dataset")
        self._check_losses(self.target_dataset if self._learns() else self.train_dataset)

    def _without_router_loss(self) -> str:
        return "the training"

    def _check_normalised_weights(self) -> None:
        weights = self._learns() or self._given_weights is not None
        if weights and self.bilevel_config.normalise_weights and self._candidate_batch_size == 1:
            raise ValueError(
                "`normalise_weights=True` divides the weights of a batch by their mean, and with `per_device_train_batch_size=1` what is "
                "left of each is 1: nothing would be learned. Raise the batch size (and lower `gradient_accumulation_steps`), or set "
                "`normalise_weights=False`."
            )

    def _check_double_backward(self) -> None:
        attention = getattr(self.model.config, "_attn_implementation", None) if hasattr(self.model, "config") else None
        double = self.bilevel_config.hessian_action == "double_backward"
        if self._learns() and double and attention not in (None, "eager", "sdpa"):
            raise ValueError(
                f"`hessian_action='double_backward'` differentiates twice, which attention by {attention!r} cannot. Load "
                "the model with `attn_implementation='sdpa'` (its math kernel is then chosen), or use "
                "`hessian_action='finite_differences'`."
            )
        checkpointing = self.args.activation_checkpointing_kwargs or {}
        if self.args.activation_checkpointing and checkpointing.get("use_reentrant"):
            raise ValueError(
                "Reentrant checkpointing works with `.backward()` only. Drop `use_reentrant=True` from "
                "`activation_checkpointing_kwargs`; the default works."
            )

    def _step_of_its_own(self) -> str | None:
        """Name a class behind the mixin whose steps would be left out; TRL's only say where activations are kept."""
        behind = type(self).__mro__[type(self).__mro__.index(BrosMixin) + 1 :]
        owner = next(parent for parent in behind if "training_step" in vars(parent))
        return None if owner is Trainer or owner.__module__.startswith("trl.") else owner.__name__

    def _check_given_weights(self) -> None:
        kind = self.bilevel_config.upper_variable
        if kind not in ("fixed", "table"):
            raise ValueError(
                f"`sample_weights` are given and `upper_variable={kind!r}` would learn others. Use `upper_variable='fixed'` to "
                "train with them, or 'table' to start from them."
            )
        if self.train_dataset is None:
            return
        ids, weights = self._ids_and_weights()
        if (
            ids.shape != weights.shape
            or len(ids)
            and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.train_dataset)
        ):
            raise ValueError(
                f"`sample_weights` has {len(weights)} weights for {len(ids)} ids and `train_dataset` {len(self.train_dataset)} "
                "rows. Pass the `sample_weights` of a trainer on the same dataset, or a tensor with one weight per row."
            )
        if not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError("`sample_weights` must be finite and not negative.")
        if self._learns() and self.bilevel_config.weight_function != "softmax" and bool((weights > 1).any()):
            raise ValueError(
                f"`sample_weights` to start from must not be above 1 with `weight_function="
                f"{self.bilevel_config.weight_function!r}`; the largest is {float(weights.max()):.4g}. Divide them by it."
            )

    def _ids_and_weights(self) -> tuple[Tensor, Tensor]:
        given = self._given_weights
        if isinstance(given, Tensor):
            return torch.arange(len(self.train_dataset)), given
        return given.ids, given.weights

    def _warn_about_ignored_settings(self) -> None:
        config, ignored = self.bilevel_config, {}
        if not self._learns():
            learning = ("weight_function", "estimator", "hessian_action", "update_every", "start_step", "damping")
            learning += ("upper_learning_rate", "normalise_hypergradient", "moving_average", "auxiliary_learning_rate")
            learning += ("auxiliary_dtype", "auxiliary_device", "target_batch_size")
            ignored |= dict.fromkeys(learning, "`upper_variable='fixed'`")
            if self._given_weights is None:
                ignored["normalise_weights"] = "weights that are all 1"
        if config.upper_variable == "network":
            ignored["weight_function"] = "`upper_variable='network'`"
        if self.rank == "full":
            reason = (
                "a PEFT model, whose adapters are trained in full space"
                if is_peft_model(self.model)
                else "`rank='full'`"
            )
            ignored |= dict.fromkeys(("rank", "modules", "refresh_steps"), reason)
        defaults = BrosConfig()
        for name, reason in ignored.items():
            if getattr(config, name) not in (getattr(defaults, name), "full"):
                warnings.warn(f"`{name}` is ignored with {reason}.", stacklevel=5)

    # The variables --------------------------------------------------------------------------------------------------

    def _begin_training(self) -> None:
        self._pending.clear()
        if self._is_off():
            return
        self._check_normalised_weights()  # the batches may have become smaller
        config, device = self.bilevel_config, self.args.device
        if self.blocks is None or self.blocks.model is not self.model:
            # Kept, as the optimizer that holds its leaves is, when the same model is trained again.
            self.blocks = LowerBlocks(self.model, self.rank, config.modules, config.rest)
        self.blocks.bases = [None] * len(self.blocks.parameters)
        self._sums = torch.zeros(len(_NOTES) + 1, dtype=torch.float64 if device.type != "mps" else torch.float32)
        self._sums = self._sums.to(device)
        self._broken = torch.zeros((), dtype=torch.bool, device=device)
        self._make_weights()
        if self._learns():
            size = config.target_batch_size or self._candidate_batch_size
            self._target_loader = self._endless_loader(self.target_dataset, size, _TARGET)
            self.auxiliary = Auxiliary(
                self.blocks.matrices(),
                dtype=getattr(torch, config.auxiliary_dtype),
                device=torch.device("cpu") if config.auxiliary_device == "cpu" else None,
                learning_rate=None if config.auxiliary_learning_rate == "auto" else config.auxiliary_learning_rate,
                damping=config.damping,
            )
            self.upper_step = UpperStep(
                [parameter.detach() for parameter in self.upper.parameters()],
                learning_rate=self.upper_learning_rate,
                moving_average=config.moving_average,
                normalised=config.normalise_hypergradient,
            )

    @property
    def upper_learning_rate(self) -> float:
        """The learning rate of the upper variable, with "auto" resolved."""
        given = self.bilevel_config.upper_learning_rate
        return UPPER_LEARNING_RATES[self.bilevel_config.upper_variable] if given == "auto" else given

    def _make_weights(self) -> None:
        """Make the upper variable, or the table of given weights."""
        config, device = self.bilevel_config, self.args.device
        num_pool = 0 if self._is_stream or self.train_dataset is None else len(self.train_dataset)
        self._last_norm, self._num_grown = 0.0, 0  # of the auxiliary variable, by log
        self.upper: nn.Module | None = None
        self._table: Tensor | None = None  # given weights, or the last ones that a network gave
        self._last_seen: Tensor | None = None  # with several processes: the steps of those
        with private_randomness(derive_seed(self._seed, _UPPER), device):
            if config.upper_variable == "table":
                self.upper = WeightTable(num_pool, config.weight_function)
                if self._given_weights is not None:
                    ids, weights = self._ids_and_weights()
                    start = self.upper.all_weights().index_put((ids.cpu(),), weights.float().cpu())
                    self.upper.set_weights(start)
                self.upper.to(device)
            elif config.upper_variable == "domain":
                self.upper = WeightTable(len(self.domain_names), config.weight_function).to(device)
            elif config.upper_variable == "network":
                self.upper, self._said_saturated = WeightNetwork().to(device), False
                self._table = torch.full((num_pool,), torch.nan, device=device)
                if self.args.world_size > 1:
                    self._last_seen = torch.full((num_pool,), -1, dtype=torch.int32, device=device)
            elif self._given_weights is not None:
                ids, weights = self._ids_and_weights()
                self._table = (
                    torch.ones(num_pool, dtype=torch.float32).index_put((ids.cpu(),), weights.float().cpu()).to(device)
                )

    # The optimizer --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the Trainer's optimizer, on coordinates where weights are in a subspace.

        Args:
            model: As for ``Trainer``.

        Returns:
            The optimizer.
        """
        if self._is_off() or self.optimizer is not None:
            return super().create_optimizer(model)
        if self.blocks is None:
            self._begin_training()
        blocks = self.blocks
        own = {id(leaf) for leaf in blocks.leaves}
        hidden = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        for parameter in hidden:
            parameter.requires_grad_(False)
        try:  # a user's own may take no argument, as the Trainer gives it none
            optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        finally:
            for parameter in hidden:
                parameter.requires_grad_(True)
        if blocks.projected:
            leaves = [blocks.leaves[i] for i in blocks.projected]
            optimizer.add_param_group({"params": leaves, "weight_decay": self.args.weight_decay})
            optimizer.register_step_post_hook(self._merge_step)
        return optimizer

    def _check_what_the_optimizer_steps_on(self) -> None:
        stepped = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        if any(id(self.blocks.leaves[i]) not in stepped for i in self.blocks.projected):
            raise ValueError(
                "The optimizer does not step on the coordinates in the subspaces, so the projected layers would never be "
                f"trained: `{type(self).__name__}` makes it without `BrosMixin.create_optimizer`. Call "
                "`super().create_optimizer()` and change its `param_groups`, or put the class that makes it behind the mixin, "
                "`class Mine(BrosMixin, YourTrainer)`."
            )

    def _merge_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        leaf = self.blocks.leaves[self.blocks.projected[0]]
        group = next(group for group in optimizer.param_groups if any(p is leaf for p in group["params"]))
        self.blocks.merge(float(group["lr"]) * group["weight_decay"])

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._is_off():
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self.blocks.leaves, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and not self._is_off():
            grad_norm = self.accelerator.clip_grad_norm_(self.blocks.leaves, float("inf"))
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    # A step ---------------------------------------------------------------------------------------------------------

    def _select(self, batches: list[Any], origins: list[Origin], num_items: Any) -> tuple[list[Any], Any]:
        """Train on all candidates; here a new optimizer step begins."""
        self._pending.clear()
        self._pending.extend(origins)
        self._totals: dict[str, list[Tensor]] = {}
        blocks, (period, place) = self.blocks, divmod(self.state.global_step, self.refresh_steps)
        if blocks.projected and (place == 0 or blocks.bases[blocks.projected[0]] is None):
            if blocks.bases[blocks.projected[0]] is None:
                self._check_what_the_optimizer_steps_on()
                self._warn_about_coverage()
            blocks.bases = blocks.draw(derive_seed(self._seed, _BASIS, period))
            if place == 0:
                for i in blocks.projected:
                    carry_over(self.optimizer.state.get(blocks.leaves[i]))
        return batches, num_items

    def _warn_about_coverage(self) -> None:
        steps, refresh = self.state.max_steps, self.refresh_steps
        lowest = min(coverage(steps, refresh, *shape) for shape in self._shapes())
        if lowest < MIN_COVERAGE - 1e-9:
            warnings.warn(
                f"The subspaces of {steps} steps, each kept for `refresh_steps={refresh}`, cover the space of a layer "
                f"{lowest:.1f} times; below {MIN_COVERAGE} the learned weights suffer. Lower `refresh_steps`, raise `rank` or "
                "train longer.",
                stacklevel=4,
            )

    def _updates(self) -> bool:
        since = self.state.global_step - self.bilevel_config.first_update(self.state.max_steps)
        return self._learns() and since >= 0 and since % self.bilevel_config.update_every == 0

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute the gradient of the weighted loss and, when due, move the auxiliary and the upper variable.

        Args:
            model: As for ``Trainer``; the model without its wrapper is run, and gradients are reduced by this class.
            inputs: As for ``Trainer``.
            num_items_in_batch: As for ``Trainer``.

        Returns:
            The weighted loss, detached.

        Cost: three forward and backward passes when an update is due (five and two forwards with the bi-probe, three and
        two forwards two-sided), else one.
        """
        if self._is_off():
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        weighting = _Weighting(self, self._prepare_inputs(inputs), self._pending.popleft(), num_items_in_batch)
        if self._updates():
            losses = self._bilevel_micro_step(weighting)
        else:
            losses, gradient = gradient_at_weights(self.blocks, weighting)
            self._add(gradient=gradient)
        if not self._pending:
            self._finish_step()
        return (losses * weighting.coefficients).sum()

    def _bilevel_micro_step(self, weighting: "_Weighting") -> Tensor:
        config, blocks, z = self.bilevel_config, self.blocks, self.auxiliary.blocks
        seed = derive_seed(self._seed, self.state.global_step)
        if config.hessian_action == "double_backward":
            retain = config.estimator != "one_sided"
            oracle: DoubleBackward | FiniteDifferences = DoubleBackward(blocks, weighting.separately, retain)
        else:
            dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else blocks.parameters[0].dtype
            norm = torch.nn.utils.get_total_norm([p.detach() for p in blocks.parameters])
            oracle = FiniteDifferences(blocks, weighting, RELATIVE_STEP[dtype], norm)
        if config.estimator == "bi_probe":
            generator = torch.Generator().manual_seed(derive_seed(seed, _SIGNS))
            hessian = bi_probe(oracle.hessian_action, z, blocks.bases, generator)
        elif config.estimator == "two_sided":
            other_bases = blocks.draw(derive_seed(seed, _OTHER_BASIS))
            hessian = two_sided(oracle.hessian_action, z, blocks.bases, other_bases)
        else:
            hessian = one_sided(oracle.hessian_action, z, blocks.bases)
        slopes, losses = oracle.slopes(z), oracle.losses
        self._add(gradient=oracle.gradient, hessian=hessian)
        del oracle  # and its graph, before the next evaluation
        # The hypergradient is minus the cross derivative along z; it accumulates in the gradients of the upper variable.
        (-(weighting.differentiable_coefficients() * slopes).sum()).backward()
        spread = weighting.weights.std(correction=0)
        self._note(self.current_gradient_accumulation_steps, weight_mean=weighting.weights.mean(), weight_std=spread)
        self._add(upper_gradient=self._upper_gradient())
        return losses

    def _upper_gradient(self) -> list[Tensor]:
        # Of the model as it trains, with dropout and statistics of the batch. In evaluation mode it would be the gradient of
        # another function than the one whose Hessian is inverted, and with batch normalisation a clearly worse one.
        batch = self._prepare_inputs(self._target_loader.draw())

        def compute() -> tuple[Tensor, Tensor]:
            with self.compute_loss_context_manager():
                loss, units = self._weighted_loss(self.model, batch)
            return loss / self.current_gradient_accumulation_steps, units.losses

        seed = derive_seed(self._seed, self._target_loader.position, self.args.process_index, _TARGET)
        with private_randomness(seed, self.args.device), preserved_buffers(self.model):
            losses, gradient = gradient_at_weights(self.blocks, compute)
        self._note(self.current_gradient_accumulation_steps, target_loss=losses.mean())
        return gradient

    def _add(self, **tensors: list[Tensor]) -> None:
        """Add up over the micro-batches of a step."""
        for name, values in tensors.items():
            if name in self._totals:
                torch._foreach_add_(self._totals[name], values)
            else:
                self._totals[name] = values

    def _finish_step(self) -> None:
        """At the last micro-batch, give the optimizer its gradient, and move the auxiliary and the upper variable."""
        for values in self._totals.values():
            self._average_over_ranks(values)
        for leaf, gradient in zip(self.blocks.leaves, self._totals.pop("gradient"), strict=True):
            leaf.grad = gradient
        if "hessian" not in self._totals:
            return
        hessian, upper_gradient = self._totals.pop("hessian"), self._totals.pop("upper_gradient")
        hypergradient = [parameter.grad for parameter in self.upper.parameters()]
        self._average_over_ranks(hypergradient)
        norm = torch.nn.utils.get_total_norm(hypergradient)
        self._broken |= ~(norm + torch.nn.utils.get_total_norm([*hessian, *upper_gradient])).isfinite()
        # Both use the other as it was before: what moves first does not matter.
        self.upper_step.step(hypergradient, schedule=self._schedule())
        if isinstance(self.upper, WeightTable):
            self.upper.project()
        self.upper.zero_grad()
        rounding = torch.Generator().manual_seed(derive_seed(self._seed, self.state.global_step, _ROUNDING))
        self.auxiliary.step(hessian, upper_gradient, self.blocks.bases, rounding)
        self._note(hypergradient_norm=norm, auxiliary_norm=self.auxiliary.norm())
        self._note(auxiliary_learning_rate=self.auxiliary.rate_and_damping()[0])
        self._sums[-1] += 1

    def _average_over_ranks(self, tensors: list[Tensor]) -> None:
        # The model is run without its DDP wrapper, so nothing has been reduced yet.
        if self.args.world_size > 1:
            for tensor in tensors:
                tensor.copy_(self.accelerator.reduce(tensor, "mean"))

    def _note(self, num: int = 1, **values: Tensor) -> None:
        """Add to what is logged; ``num`` is how often that happens in a step."""
        for name, value in values.items():
            self._sums[_NOTES.index(name)] += value.detach().to(self._sums) / num

    def _schedule(self) -> float:
        """Say where the Trainer's learning rate is on its schedule; the upper variable's follows."""
        # The highest rate is that of the optimizer, which may be a user's own; some schedules begin low and know another.
        group, scheduler = self.optimizer.param_groups[0], getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        begun_at = group.get("initial_lr", self.optimizer.defaults.get("lr", self.args.learning_rate))
        highest = max(begun_at, group.get("max_lr", 0.0), *getattr(scheduler, "max_lrs", [])[:1])
        return self._get_learning_rate() / highest if highest else 1.0

    # Results --------------------------------------------------------------------------------------------------------

    @property
    def sample_weights(self) -> SampleWeights:
        """The weights of all samples as they are now; for a network those that samples had when last seen.

        Raises:
            RuntimeError: Before training, and for streams, whose samples have no number.
        """
        if self.blocks is None or self._is_stream:
            raise RuntimeError("There are no sample weights before training, and for a stream there are none at all.")
        if self.bilevel_config.upper_variable == "table":
            weights = self.upper.all_weights()
        elif self.bilevel_config.upper_variable == "domain":
            weights = self.upper.all_weights().cpu()[self._domain_ids]
        elif self._table is None:
            weights = torch.ones(len(self.train_dataset))
        else:
            weights = self._table
        weights = weights.cpu()
        ids = weights.isfinite().nonzero().flatten()
        return SampleWeights(ids, weights[ids].clone())

    @property
    def domain_weights(self) -> dict[str, float]:
        """The weight of every domain, for ``upper_variable="domain"``.

        Raises:
            RuntimeError: For other upper variables, and before training.
        """
        if self.bilevel_config.upper_variable != "domain" or self.blocks is None:
            raise RuntimeError("Domain weights need `upper_variable='domain'` and a training.")
        return dict(zip(map(str, self.domain_names), self.upper.all_weights().tolist(), strict=True))

    def suspicious_samples(self, num: int | None = None) -> Tensor:
        """Rank samples by how little they help on the target dataset.

        Args:
            num: How many; None for all.

        Returns:
            Sample ids, the smallest weight first.
        """
        ids, weights = self.sample_weights
        return ids[weights.argsort(stable=True)][:num]

    def plot_sample_weights(self, wrong: Tensor | None = None) -> Any:
        """Draw the histogram of the sample weights.

        Args:
            wrong: Bool, one for each row of the training dataset: which are known to be corrupted. None if unknown.

        Returns:
            A matplotlib figure.
        """
        ids, weights = self.sample_weights
        return weights_histogram(weights, None if wrong is None else wrong.cpu()[ids])

    def selected_subset(self, *, fraction: float | None = None, min_weight: float | None = None) -> SelectedSubset:
        """Take the samples with the largest weights.

        Args:
            fraction: Share of the training dataset to keep, in (0, 1].
            min_weight: Or the smallest weight to keep.

        Returns:
            The subset, the largest weight first.

        Raises:
            ValueError: If not exactly one of the two is given, or the fraction is out of range or of more rows than have a
                weight.
        """
        if (fraction is None) == (min_weight is None):
            raise ValueError("Give one of `fraction` and `min_weight`.")
        ids, weights = self.sample_weights
        num = int((weights >= min_weight).sum()) if fraction is None else self._num_kept(fraction, len(ids))
        kept = weights.argsort(descending=True, stable=True)[:num]
        facts = {"selection": {"min_weight": min_weight} if fraction is None else {"fraction": fraction}}
        return self._subset_of_pool(ids[kept], facts, ("sample weight", ids, weights), weights=weights[kept])

    # State, logging, facts ------------------------------------------------------------------------------------------

    def _raise_if_broken(self) -> None:
        if bool(self._broken):
            raise FloatingPointError(
                f"A hypergradient was NaN or infinite before step {self.state.global_step}; it was left out, and the sample "
                f"weights are as they were. Norm of the auxiliary variable: {float(self.auxiliary.norm()):.3g}; largest "
                f"curvature seen: {float(self.auxiliary.curvature):.3g}; learning rate of the model: "
                f"{self._get_learning_rate():.3g}. If the norm or the curvature is huge, raise `damping` (now "
                f"{self.bilevel_config.damping}); if the training loss is not finite either, lower `learning_rate` or look "
                "for broken samples in both datasets."
            )

    def _merged_table(self) -> Tensor:
        """Give all ranks the weights that a network gave last on any of them, the mean of several in one step."""
        if self.args.world_size == 1:
            return self._table
        last = self._last_seen.clone()
        torch.distributed.all_reduce(last, torch.distributed.ReduceOp.MAX)
        mine = self._table.isfinite() & (self._last_seen == last)
        total = self.accelerator.reduce(torch.where(mine, self._table, 0.0))
        count = self.accelerator.reduce(mine.to(total.dtype))
        self._last_seen = last
        return torch.where(count > 0, total / count, torch.nan)

    def _shared_state(self) -> dict[str, Any]:
        if not self._learns():
            return {}
        self._raise_if_broken()
        if self.bilevel_config.upper_variable == "network":
            self._table = self._merged_table()
        return {
            "auxiliary": self.auxiliary.state_dict(),
            "upper": {name: value.cpu() for name, value in self.upper.state_dict().items()},
            "upper_step": self.upper_step.state_dict(),
            "table": None if self._table is None else self._table.cpu(),
            "last_seen": None if self._last_seen is None else self._last_seen.cpu(),
        }

    def _rank_state(self) -> dict[str, Any]:
        if not self._learns():
            return {}
        return {"sums": self._sums.cpu(), "target_position": self._target_loader.position}

    def _check_resumed(self, checkpoint: str, state: dict[str, Any]) -> None:
        now = self.bilevel_config.to_dict()
        changed = [name for name in _KEPT if state["config"].get(name) != now[name]]
        if changed:
            before, now = (
                ", ".join(f"{name}={source.get(name)!r}" for name in changed) for source in (state["config"], now)
            )
            raise ValueError(
                f"`{checkpoint}` is of a run with {before}, this one has {now}, which its state does not fit. Resume with the same "
                "settings, or start a new run from the checkpoint's weights, if need be with `sample_weights=`."
            )

    def _load_state(self, shared: dict[str, Any], rank: dict[str, Any]) -> None:
        if not self._learns():
            return
        self.auxiliary.load_state_dict(shared["auxiliary"])
        self.upper.load_state_dict(shared["upper"])
        self.upper_step.load_state_dict(shared["upper_step"])
        if self._table is not None:
            self._table.copy_(shared["table"])
        if self._last_seen is not None and shared.get("last_seen") is not None:
            self._last_seen.copy_(shared["last_seen"])
        self._sums.copy_(rank["sums"])
        self._target_loader.position = rank["target_position"]

    def _end_training(self, failed: bool) -> None:
        super()._end_training(failed)
        # Not when training failed: the other processes may not come here, and waiting for them would hang.
        if failed or not self._learns():
            return
        self._raise_if_broken()
        if self.bilevel_config.upper_variable == "network":
            self._table = self._merged_table()

    def _bilevel_metrics(self) -> dict[str, float]:
        if not self._learns():
            return {}
        self._raise_if_broken()
        *sums, num = self.accelerator.reduce(self._sums.clone()).tolist()
        self._sums.zero_()
        metrics = {f"bros/{name}": total / num for name, total in zip(_NOTES, sums, strict=True)} if num else {}
        if num:
            self._warn_if_diverging(metrics["bros/auxiliary_norm"])
        if self.bilevel_config.upper_variable == "domain":
            metrics |= {f"bros/weight/{name}": weight for name, weight in self.domain_weights.items()}
        if self.bilevel_config.upper_variable == "network" and num:
            self._warn_if_saturated(metrics["bros/weight_mean"], metrics["bros/weight_std"])
        return metrics

    def _warn_if_diverging(self, norm: float) -> None:
        before, self._last_norm = self._last_norm, norm
        self._num_grown = self._num_grown + 1 if 0 < GROWTH * before < norm else 0
        if self._num_grown == NUM_GROWN:
            warnings.warn(
                f"The auxiliary variable grows without end: its norm is {norm:.3g} by step {self.state.global_step}, more than "
                f"{GROWTH:.0f} times as much in each of the last {NUM_GROWN} logs. What is learned from it says nothing. Raise "
                "`damping`, or give `auxiliary_learning_rate` a smaller number.",
                stacklevel=5,
            )

    def _warn_if_saturated(self, mean: float, spread: float) -> None:
        if not self._said_saturated and not SATURATED < mean < 1 - SATURATED and spread < SATURATED:
            self._said_saturated = True
            warnings.warn(
                f"By step {self.state.global_step} the network gives nearly all samples the weight {mean:.2g}, from which it hardly "
                "comes back: it began to learn before the losses told samples apart. Raise `start_step`, or lower "
                "`upper_learning_rate`.",
                stacklevel=5,
            )

    def bilevel_facts(self) -> dict[str, Any]:
        """Collect the facts of the run, with the settings as they were resolved."""
        facts = super().bilevel_facts()
        facts["head"] = find_head(self.model)
        facts["rank"] = self.rank
        if self.blocks is not None:
            facts["num_projected_layers"] = len(self.blocks.projected)
            facts["refresh_steps"] = self.refresh_steps
            if self._learns():
                facts["upper_learning_rate"] = self.upper_learning_rate
        return facts

    def _forward_passes(self, load: Load) -> float:
        return self.bilevel_config.forward_passes(load)

    def _method_section(self) -> MethodSection | None:
        if self.blocks is None or self.state.global_step == 0:
            return None
        kind, full = self.bilevel_config.upper_variable, self.rank == "full"
        what = {"table": "a weight for every sample", "domain": "a weight for every domain"}.get(
            kind, "a network from a sample's loss to its weight"
        )
        if self._learns():
            about = (
                f", which learned {what} while the model was trained, by what lowers the loss on the target dataset."
            )
        elif self._given_weights is not None:
            about = ", with given weights of the samples, which stayed as they were."
        else:
            about = ", with all samples alike."
        if not full:
            shapes = self._shapes()
            about += (
                f" {len(shapes)} layers were trained in random subspaces (`rank={self.rank}`), drawn anew "
                f"{'at every step' if self.refresh_steps == 1 else f'every {self.refresh_steps} steps'}."
            )
        names = list(map(str, self.domain_names)) if kind == "domain" else []
        return MethodSection(
            title="Learned weights" if self._learns() else "Training with fixed weights",
            about=about,
            paper=f"{_FULL_SPACE_PAPER if full else _PAPER}.",
            limit="A small weight says that a sample did not help on the target dataset in this run; it may be wrong, rare or only "
            "hard, and samples that were drawn seldom are near the weight they started from.",
            statistics={} if self._is_stream else self._statistics(),
            columns=["domain", "weight"] if names else [],
            rows=[[name, f"{weight:.3f}"] for name, weight in self.domain_weights.items()] if names else [],
            plots=self._plots(),
        )

    def _statistics(self) -> dict[str, str]:
        """Say how the weights are spread."""
        ids, weights = self.sample_weights
        statistics = {"Rows with a weight": f"{len(ids):,} of {len(self.train_dataset):,}"}
        if len(ids):
            values = weights.double().sort().values
            places = [round(q * (len(values) - 1)) for q in QUANTILES]
            statistics |= {
                "Mean of the weights": f"{float(values.mean()):.3f}",
                "Their quantiles at " + ", ".join(f"{q:.0%}" for q in QUANTILES): ", ".join(
                    f"{float(values[place]):.3f}" for place in places
                ),
                "Rows with less than a tenth of the largest weight": f"{float((values < 0.1 * values[-1]).double().mean()):.1%}",
            }
        return statistics

    def _plots(self) -> dict[str, tuple[str, Any]]:
        """Choose what can be drawn."""
        plots: dict[str, tuple[str, Any]] = {}
        if not self._is_stream and self.bilevel_config.upper_variable != "domain" and len(self.sample_weights.ids):
            plots["bros_weights.png"] = ("Histogram of the sample weights", self.plot_sample_weights)
        prefix = "bros/weight/"
        lines = {key.removeprefix(prefix): line for key, line in self._logged(prefix).items()}
        if lines and max(len(steps) for steps, _ in lines.values()) > 1:
            description = "Weight of every domain over the optimizer steps"
            plots["bros_domains.png"] = (description, partial(lines_over_steps, lines, "domain weight"))
        return plots


class _Weighting:
    """Runs the model on a training batch and weights its samples: what the derivatives call for losses."""

    def __init__(self, trainer: BrosMixin, batch: Any, origin: Origin, num_items: Any) -> None:
        self._trainer = trainer
        self._batch = batch
        self._origin = origin
        self._num_items = num_items
        self._differentiable: Tensor | None = None

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return the loss that is trained, and the samples' losses, detached."""
        trainer = self._trainer
        if self._differentiable is None and trainer.bilevel_config.upper_variable == "network":
            losses, coefficients = self.separately()  # the weights come from the losses
            return (losses * coefficients).sum(), losses.detach()
        with trainer.compute_loss_context_manager():
            loss, units = trainer._weighted_loss(trainer.model, self._batch, self._weigh)
        return loss, units.losses

    def separately(self) -> tuple[Tensor, Tensor]:
        """Return the samples' losses, differentiable, and their coefficients."""
        trainer = self._trainer
        with trainer.compute_loss_context_manager():
            units = trainer._losses(trainer.model, self._batch)
        return units.losses, self._weigh(units.counts, units.losses)

    def _weigh(self, counts: Tensor, losses: Tensor | None = None) -> Tensor:
        if self._differentiable is None:  # the weights of the first evaluation serve all of them
            self._trainer._check_num_rows(len(counts), len(self._origin))
            self._counts = counts
            self._differentiable = self._find_weights(counts.device, losses)
            self.weights = self._differentiable.detach()
            self.coefficients = self.differentiable_coefficients().detach()
        return self.coefficients

    def _find_weights(self, device: torch.device, losses: Tensor | None) -> Tensor:
        trainer = self._trainer
        kind, ids = trainer.bilevel_config.upper_variable, self._origin.sample_ids.to(device)
        if kind == "table":
            return trainer.upper(ids)
        if kind == "domain":
            return trainer.upper(self._origin.domain_ids.to(device))
        if kind == "network":
            weights = trainer.upper(losses)
            if not trainer._is_stream:
                trainer._table[ids] = weights.detach()
                if trainer._last_seen is not None:
                    trainer._last_seen[ids] = trainer.state.global_step
            return weights
        if trainer._table is None:
            dtype = torch.promote_types(trainer.blocks.parameters[0].dtype, torch.float32)
            return torch.ones(len(ids), dtype=dtype, device=device)
        return trainer._table[ids]

    def differentiable_coefficients(self) -> Tensor:
        """Coefficients of the sample losses in the loss that is trained, by the upper variable."""
        trainer, num_items = self._trainer, self._num_items
        if not trainer._counts_labels(self._batch, num_items):
            num_items = self._counts.sum() * trainer.current_gradient_accumulation_steps
        elif trainer.args.average_tokens_across_devices:
            num_items = num_items / trainer.accelerator.num_processes
        normalise = trainer.bilevel_config.normalise_weights
        return loss_coefficients(self._differentiable, self._counts, num_items, normalise)


class BrosTrainer(BrosMixin, Trainer):
    """Learn how much each training sample should count, judged by a small target dataset (BROS).

    Use it when the pool has wrong labels, corrupted or unbalanced samples, and to find them: ``suspicious_samples()``. It
    needs visits: a sample's weight moves only when the sample is drawn, so give a table at least ten epochs.
    ``upper_variable="network"`` shares what it learns over all samples and finds wrong labels faster and better; it sees
    nothing of a sample but its loss. ``upper_variable="domain"`` needs the fewest. Do not expect a gain on a pool that is clean
    and on target.

    Change ``Trainer`` to ``BrosTrainer`` and pass ``target_dataset``. The model is trained in random subspaces: optimizer
    state, gradients and, for linear layers, stored activations shrink with ``rank``, and the auxiliary variable, one tensor
    for each weight, is added. Learning rates are those of AdamW; a subspace is slower to train in than the full space.

    A second pass, a plain training on the pool with the learned weights fixed, is what to publish::

        second = BrosTrainer(model=fresh_model, args=args, train_dataset=pool,
                             bilevel_config=BrosConfig(upper_variable="fixed", rank="full"),
                             sample_weights=trainer.sample_weights)

    Cost of a step: three forward and backward passes, two on the training batch and one on a target batch, with respect to
    coordinates only; with ``update_every=k``, 1 + 2/k on average.

    Logged: ``bros/hypergradient_norm``, ``bros/auxiliary_norm``, ``bros/auxiliary_learning_rate``, ``bros/target_loss``,
    ``bros/weight_mean`` and ``bros/weight_std`` over the training batches, ``bros/weight/<domain>``.

    Args:
        *args: ``model`` and ``args``, as for ``Trainer``; better passed by name.
        target_dataset: Map-style dataset that shows what good means, with the columns of ``train_dataset``.
        bilevel_config: A ``BrosConfig``.
        sample_weights: Another trainer's ``sample_weights``, or a tensor with one weight for each row of ``train_dataset``. With
            ``upper_variable="fixed"`` the weights of the training; samples that it does not name have the weight 1. With "table"
            the weights to start from: a fresh model can go on where one that remembers wrong labels has little to say.
        compute_sample_losses: Loss of each sample for models whose head is not known, or trained with another loss.
        **kwargs: Everything else that ``Trainer`` takes.

    Attributes:
        blocks: The lower variable.
        auxiliary: z.
        upper: The module from ids, domains or losses to weights.

    References:
        Zhang, Kong, Zhang, Yuan, BROS: Bias-Corrected Randomized Subspaces for Memory-Efficient Single-Loop Bilevel
        Optimization, arXiv 2605.10288. Chen, Xiao, Balasubramanian, Optimal Algorithms for Stochastic Bilevel Optimization
        under Relaxed Smoothness Conditions (MA-SOBA), JMLR 25, 2024.

    Example:
        >>> import torch
        >>> from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=8, patch_size=4, num_channels=1, num_labels=2)
        >>> def images(num):
        ...     return [{"pixel_values": torch.randn(1, 8, 8), "labels": i % 2} for i in range(num)]
        >>> trainer = BrosTrainer(
        ...     model=ViTForImageClassification(config),
        ...     args=TrainingArguments("output", per_device_train_batch_size=8, max_steps=20, save_strategy="no",
        ...                            use_cpu=True, disable_tqdm=True),
        ...     train_dataset=images(32),
        ...     target_dataset=images(8),
        ...     bilevel_config=BrosConfig(rank=0.5),
        ... )
        >>> output = trainer.train()  # doctest: +ELLIPSIS
        {...}
        >>> ids, weights = trainer.sample_weights
        >>> len(ids), bool((weights != 0.5).all())
        (32, True)
    """
