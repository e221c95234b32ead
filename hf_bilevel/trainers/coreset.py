"""Find the subset of a fixed size that trains the best model, then train on it."""

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from accelerate.utils import broadcast, gather
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

from hf_bilevel.cards import MethodSection
from hf_bilevel.core.coreset import (
    CoresetProbabilities,
    best_sampled_mask,
    first_probabilities,
    policy_gradient,
    sample_masks,
    search_progress,
    search_schedule,
    top_mask,
    uniform_masks,
    with_zeros_in_random_order,
)
from hf_bilevel.core.selection import num_selected
from hf_bilevel.data import CollatedRows, derive_seed, private_randomness
from hf_bilevel.identity import is_dataset_of, rows_checksum
from hf_bilevel.inner_training import (
    OPTIMIZERS,
    BatchedEngine,
    InnerProblem,
    InnerTraining,
    SequentialEngine,
    stacking_pays,
)
from hf_bilevel.losses import UnitLosses, find_head, unit_losses, unsupported_head
from hf_bilevel.plots import can_be_drawn, domain_shares, kept_against_dropped, montage, upper_losses_over_search
from hf_bilevel.subset import SelectedSubset
from hf_bilevel.tangent_kernel import KernelEngine
from hf_bilevel.trainers.agreement import check_agreement
from hf_bilevel.trainers.base import BilevelMixin
from hf_bilevel.trainers.checkpoints import write_state
from hf_bilevel.trainers.config import BilevelConfig
from hf_bilevel.trainers.reference_models import restore_forwards
from hf_bilevel.trainers.sharding import is_partitioned, is_sharded

SEARCH_FOLDER = "_coreset_search"  # with a name that the Trainer does not upload
MAX_IMAGES = 60  # in the card's picture
STATE_NAME = "state.pt"
INITIALISATION_NAME = "initialisation.pt"

NUM_UNIFORM = 10  # uniform draws that the coreset is measured beside

MAX_LOST_STEPS = 10  # outer steps in a row of which nothing is left, before the search gives up

# Tell seeds apart.
_POOL, _TARGET, _MASKS, _ROWS, _TRAINING, _FINAL, _UNIFORM, _KERNEL, _KERNEL_ROWS, _REST = range(20, 30)

Engine = SequentialEngine | BatchedEngine | KernelEngine

logger = logging.getLogger(__name__)


@dataclass
class CoresetConfig(BilevelConfig):
    r"""Settings of CoresetTrainer (Zhou, Pi, Zhang, Lin, Zhang, ICML 2022).

    ===============  =======================  ========================  ==================================================
    paper            argument                 published                 our default and why
    ===============  =======================  ========================  ==================================================
    K                size                     100 to 4,000              a tenth of the pool
    T                outer_steps              500 to 2,000              500
    masks a step     num_masks                1 (5 in the code)         5, the baseline needs at least 2
    :math:`\eta`     upper_learning_rate      2.5 (0.05 to 0.1 there)   0.05, with Adam and cosine decay
    epochs           inner_steps              100 (300 there)           100, each on all rows of the mask
    drawn m          num_final_masks          1                         0: the K most probable samples
    inner rate       inner_learning_rate      0.1, SGD (5e-3, Adam)     that of the ``TrainingArguments``, with Adam
    ===============  =======================  ========================  ==================================================

    Args:
        size: Samples of the coreset: a whole number, or a fraction of the pool in (0, 1). ``"pool"`` is the plain Trainer, bit
            for bit.
        outer_steps: Updates of the probabilities.
        num_masks: Masks trained on for each update, at least 2; spread over the processes.
        upper_learning_rate: Learning rate of the probabilities.
        initial_size: Expected size at the start, a number or a fraction of the pool in (0, 1), or ``"size"`` to start at
            ``size``. A larger one is lowered to ``size`` by a cubic schedule between 16 % and 60 % of the outer steps.
        inner_steps: Optimizer steps of an inner training.
        inner_batch_size: Rows of such a step; None for all rows of the mask.
        inner_learning_rate: Their learning rate; None for that of the ``TrainingArguments``.
        inner_optimizer: ``"adam"``, or ``"sgd"`` with a momentum of 0.9.
        num_upper_rows: Rows of the pool (or target dataset) on which the masks of one update are compared, drawn anew for each;
            None for all.
        num_final_masks: 0 takes the most probable samples. Otherwise so many masks of exactly ``size`` samples are drawn at the
            end, trained on and compared, and the best becomes the coreset: as published, and in our trials no better, since the
            best of many noisy losses is lucky, too.
        engine: ``"batched"`` trains on all masks at once, as one model with stacked parameters, ``"sequential"`` on one after
            the other; ``"auto"`` is batched for small models that allow it (see ``hf_bilevel.inner_training.stacking_pays``).
            ``"kernel"`` trains on no mask: the inner problem is kernel ridge regression with the model's tangent kernel, whose
            upper losses take milliseconds and have exact gradients, so that a search of a few hundred steps takes seconds and
            settles. For classifiers and pools up to some 10,000; start from ``initial_size=0.5``, see ``CoresetTrainer``.
        kernel_trainings: With ``engine="kernel"``: trainings on uniform draws of ``size`` samples, by the ``inner_*`` settings, from
            weights of their own if the trainer got a ``model_init``. The kernel is the mean of those where they end, with the
            features that a model learns from so many samples. 0 takes it at the initial weights. 3 helped a convolutional network
            from random weights (measured); in trials not where labels are wrong, which are learned by heart, or classes rare.
        ridge: Of the regression of ``engine="kernel"``, where the kernel is about 1 between a sample and itself.
        pool_share: With ``engine="kernel"``: how much of the upper loss is that on the pool's rows, in [0, 1], each judged by what
            the *other* rows of the coreset say of it, so that no row is kept for its own sake alone. The rest is the loss on the
            target dataset, or without one that on the pool as usual. Beside a target dataset the pool's rows are weighted so that
            the classes count about as there. 0.5 helped beside a small target dataset where some labels of the pool were wrong, and
            without one together with ``kernel_trainings`` (measured). Leave it at 0 where the target dataset stands for something
            else than the pool. A mask takes up to twice as long.
        search_save_steps: Outer steps between two checkpoints of the search.
        target_batch_size: Rows of one forward pass of the upper loss; None for 256.
        domain_column: See ``BilevelConfig``; only recorded.
        domain_names: See ``BilevelConfig``.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a value has another type than declared.

    Example:
        >>> CoresetConfig(size="100").size, CoresetConfig(size=0.05).size
        (100, 0.05)
        >>> CoresetConfig(num_masks=1)
        Traceback (most recent call last):
        ValueError: `num_masks` must be at least 2, got 1: the baseline of a mask is the mean loss of the others.
    """

    size: str = field(default="0.1", metadata={"help": "Samples of the coreset, a number or a fraction, or pool."})
    outer_steps: int = field(default=500, metadata={"help": "Updates of the probabilities."})
    num_masks: int = field(default=5, metadata={"help": "Masks trained on for each update, at least 2."})
    upper_learning_rate: float = field(default=0.05, metadata={"help": "Learning rate of the probabilities."})
    initial_size: str = field(
        default="size", metadata={"help": "Expected size at the start, a number or a fraction, or size."}
    )
    inner_steps: int = field(default=100, metadata={"help": "Optimizer steps of an inner training."})
    inner_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of an inner step; all rows of the mask if not set."}
    )
    inner_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of inner trainings; that of the training if not set."}
    )
    inner_optimizer: str = field(default="adam", metadata={"help": "Optimizer of inner trainings: adam or sgd."})
    num_upper_rows: int | None = field(
        default=None, metadata={"help": "Rows on which the masks of an update are compared; all if not set."}
    )
    num_final_masks: int = field(
        default=0, metadata={"help": "Masks drawn at the end, of which the best is taken; 0 for the most probable."}
    )
    engine: str = field(
        default="auto", metadata={"help": "How masks are trained on: auto, batched, sequential or kernel."}
    )
    kernel_trainings: int = field(
        default=0,
        metadata={"help": "Trainings at whose ends engine=kernel takes the kernel; 0 for the initial weights."},
    )
    ridge: float = field(default=0.1, metadata={"help": "Ridge of the regression with engine=kernel."})
    pool_share: float = field(
        default=0.0,
        metadata={"help": "With engine=kernel: share of the pool, each row judged by the others, in the upper loss."},
    )
    search_save_steps: int = field(default=50, metadata={"help": "Outer steps between checkpoints of the search."})

    _numbers_or_words: ClassVar[dict[str, tuple[type, str]]] = {
        "size": (float, "pool"),
        "initial_size": (float, "size"),
    }
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "inner_optimizer": tuple(sorted(OPTIMIZERS)),
        "engine": ("auto", "batched", "sequential", "kernel"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, word in (("size", "pool"), ("initial_size", "size")):
            value = getattr(self, name)
            if value == word:
                continue
            if not 0 < value < math.inf or value >= 1 and value != int(value):
                raise ValueError(f"`{name}` must be a whole number, a fraction in (0, 1), or {word!r}; got {value}.")
            if value >= 1:
                setattr(self, name, int(value))
        if self.num_masks < 2:
            raise ValueError(
                f"`num_masks` must be at least 2, got {self.num_masks}: the baseline of a mask is the mean loss of the others."
            )
        for name in ("outer_steps", "inner_steps", "search_save_steps", "inner_batch_size", "num_upper_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("num_final_masks", "kernel_trainings"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        for name in ("upper_learning_rate", "inner_learning_rate", "ridge"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {value}.")
        if not 0 <= self.pool_share <= 1:
            raise ValueError(f"`pool_share` must be in [0, 1], got {self.pool_share}.")


class CoresetMixin(BilevelMixin):
    """Search of a coreset, and training on it, for ``Trainer`` and its subclasses; see ``CoresetTrainer``."""

    method = "coreset"
    config_class = CoresetConfig
    _losses_are_for = "judged by"

    def __init__(
        self,
        *args: Any,
        search_model: nn.Module | None = None,
        required_ids: Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        self.search_model = search_model
        self.required_ids = required_ids
        self._subset: SelectedSubset | None = None
        self._searched_losses: list[float] = []
        self._search_seconds: float | None = None
        self._whole_pool: Any = None  # while its coreset is trained on
        self._shows_images = False  # in the model card
        super().__init__(*args, **kwargs)

    # Setup ----------------------------------------------------------------------------------------------------------

    @property
    def granularity(self) -> str:
        """``"sample"``: masks keep or drop samples."""
        return "sample"

    def _is_off(self) -> bool:
        return self.bilevel_config.size == "pool"

    def _in_rows(self, size: str | int | float) -> int:
        return num_selected(size, len(self.train_dataset)) if isinstance(size, float) else size

    def _searched_model(self) -> nn.Module:
        return self.model if self.search_model is None else self.search_model

    def _why_not_deepspeed(self) -> str | None:
        if is_partitioned(self._searched_model()):
            return "the model that the search trains was loaded in parts for ZeRO-3. Pass one that is whole as `search_model`."
        return None

    def _check_bilevel_setup(self) -> None:
        if self._is_off():
            if self.required_ids is not None:
                warnings.warn("`required_ids` is ignored with `size='pool'`, which keeps every sample.", stacklevel=4)
            return
        super()._check_bilevel_setup()
        if self.search_model is not None:
            restore_forwards(self.search_model)
        if self.compute_sample_losses is None:
            for model in {id(m): m for m in (self.model, self._searched_model())}.values():
                if find_head(model) is None:
                    raise ValueError(unsupported_head(model, "sample"))
        if self.train_dataset is None:
            return
        if self._is_stream:
            raise ValueError(
                "`train_dataset` is a stream, of which no coreset can be chosen: every sample needs a probability of its own. "
                "Take it into memory, for instance `datasets.Dataset.from_list(list(stream.take(100_000)))`."
            )
        num = len(self.train_dataset)
        for name in ("size", "initial_size"):
            value = getattr(self.bilevel_config, name)
            if isinstance(value, int) and value >= num + (name == "initial_size"):
                raise ValueError(
                    f"`{name}={value}` must be smaller than `train_dataset`, which has {num} samples. Lower it, give a fraction "
                    "such as 0.1, or use the plain Trainer with `size='pool'`."
                )
        if self.bilevel_config.initial_size != "size" and self._in_rows(
            self.bilevel_config.initial_size
        ) < self._in_rows(self.bilevel_config.size):
            raise ValueError(
                f"`initial_size={self.bilevel_config.initial_size}` is smaller than `size={self.bilevel_config.size}`; the size "
                "is lowered during the search, not raised."
            )
        self._free_ids = self._find_free_ids()
        self._check_labels(self.train_dataset, "train_dataset")
        if self.target_dataset is not None:
            self._check_target_dataset()
            if self.bilevel_config.engine == "kernel" and self.bilevel_config.pool_share == 1:
                raise ValueError(
                    "With `pool_share=1` the target dataset counts for nothing. Lower it, or pass no `target_dataset`."
                )
        self._check_losses(self.train_dataset)
        self._warn_about_ignored_settings()
        if self.compute_loss_func is not None and self.compute_sample_losses is None:
            warnings.warn(
                "`compute_loss_func` is not used by the search, which trains and judges by the loss of the model's head. Pass "
                "`compute_sample_losses=`, (model, batch) -> losses of shape (n,), for it to see the same loss.",
                stacklevel=5,
            )

    def _without_router_loss(self) -> str:
        return "the trainings of the search"

    def _find_free_ids(self) -> Tensor:
        """List the samples that the search decides about: all that are not required."""
        num = len(self.train_dataset)
        free = torch.ones(num, dtype=torch.bool)
        if self.required_ids is None:
            return free.nonzero().flatten()
        size, given = self._in_rows(self.bilevel_config.size), self.required_ids
        given = given.cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
        if given.ndim != 1 or given.size and given.dtype.kind not in "iu":
            raise TypeError(
                "`required_ids` must be a list of row numbers of `train_dataset`, got "
                f"{type(self.required_ids).__name__} of shape {given.shape} and dtype {given.dtype}."
            )
        required = torch.from_numpy(given.astype(np.int64))
        outside = required[(required < 0) | (required >= num)]
        if len(outside):
            raise ValueError(
                f"`required_ids` holds {int(outside[0])}, and `train_dataset` has the rows 0 to {num - 1}. Ids are places in it as it "
                "was given to the trainer."
            )
        free[required] = False
        num_required = num - int(free.sum())
        if num_required >= size:
            raise ValueError(
                f"`required_ids` names {num_required} rows and `size` counts them, so that with `size={self.bilevel_config.size}` "
                f"({size} rows) nothing is left to choose. Raise `size`, or require fewer."
            )
        return free.nonzero().flatten()

    def _warn_about_ignored_settings(self) -> None:
        config = self.bilevel_config
        with_kernel = config.engine == "kernel"
        unused = {}
        if not with_kernel:
            unused["only `engine='kernel'` fits a regression"] = {"kernel_trainings", "ridge", "pool_share"}
        else:
            unused["`engine='kernel'` compares masks on all upper rows"] = {"num_upper_rows"}
            if config.kernel_trainings == 0:
                trains = {"inner_steps", "inner_batch_size", "inner_learning_rate", "inner_optimizer"}
                unused["nothing is trained with `kernel_trainings=0`"] = trains
        for why, names in unused.items():
            ignored = [f.name for f in fields(config) if f.name in names and getattr(config, f.name) != f.default]
            if ignored:
                warnings.warn(f"Ignored, since {why}: {', '.join(f'`{name}`' for name in ignored)}.", stacklevel=6)

    def _selects_rows(self) -> bool:
        return True

    def _prepare_pool(self) -> None:
        if self._whole_pool is not None:
            self._prepared_pool = self.train_dataset
            return
        super()._prepare_pool()
        self._subset = None  # of another pool, or none yet

    # The search -----------------------------------------------------------------------------------------------------

    def search(self, resume_from_checkpoint: bool | str | os.PathLike | None = None) -> SelectedSubset:
        """Search the coreset, without training on it. The model is as before afterwards.

        Args:
            resume_from_checkpoint: True, or a folder that an interrupted search wrote (``output_dir/_coreset_search``), to
                continue it as if it had not been interrupted.

        Returns:
            The coreset, the most probable samples first, with the probabilities that the search ended with.

        Raises:
            ValueError: If there is nothing to resume from, or it belongs to another pool.

        Inner trainings that diverge are left out and counted; ten outer steps in a row of which fewer than two are left, and a
        coreset whose own diverges, raise a ``FloatingPointError``.
        """
        if self._is_off():
            raise ValueError("`size='pool'` keeps every sample; set `size` to search a coreset.")
        if self.train_dataset is None:
            raise ValueError("`search` needs `train_dataset`, the pool to choose from.")
        if is_sharded(self._searched_model()) or is_partitioned(self._searched_model()):
            raise ValueError(
                "The model that the search trains is in parts, since an earlier `train()` or since it was loaded. Search before "
                "training, or with a model that is whole as `search_model`."
            )
        if self.train_dataset is not self._prepared_pool:
            self._prepare_pool()
        started = time.monotonic()
        self._free_ids = self._find_free_ids()
        num_required = len(self.train_dataset) - len(self._free_ids)
        size = initial_size = self._in_rows(self.bilevel_config.size) - num_required
        if self.bilevel_config.initial_size != "size":
            initial_size = self._in_rows(self.bilevel_config.initial_size) - num_required
        start = first_probabilities(len(self._free_ids), initial_size)
        probabilities = CoresetProbabilities(start, shared_scale=self.bilevel_config.engine == "kernel")
        progress = _Search(probabilities, num_required)
        folder = Path(self.args.output_dir) / SEARCH_FOLDER
        self._place_event_files()
        if resume_from_checkpoint:
            self._load_search(progress, folder if resume_from_checkpoint is True else Path(resume_from_checkpoint))
        self._synchronise_model()
        with self._engine() as engine:
            if not resume_from_checkpoint and self._saves_search:
                self._save_initialisation(folder)
            self._run(progress, engine, initial_size, size, folder)
            mask, losses = self._round(progress, engine, size)
        self._subset = self._make_subset(progress, mask, losses)
        self._searched_losses, self._search_seconds = progress.objectives, time.monotonic() - started
        return self._subset

    def _place_event_files(self) -> None:
        """Let TensorBoard's callback write where it would once training has begun; a search logs before that."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = os.path.join(self.args.output_dir, default_logdir())

    def _run(self, progress: "_Search", engine: Engine, initial_size: int, size: int, folder: Path) -> None:
        config = self.bilevel_config
        bar = tqdm(
            total=config.outer_steps,
            initial=progress.step,
            desc="Searching a coreset",
            disable=self.args.disable_tqdm or not self.is_local_process_zero(),
        )
        with bar, self._counting_outer_steps(progress):
            while progress.step < config.outer_steps and not self._is_over(progress, size):
                step = progress.step
                masks = self._masks(progress.search.probabilities, config.num_masks, _MASKS, step)
                losses, gradient = self._losses_and_gradient(engine, masks, progress)
                schedule = search_schedule(step, config.outer_steps, config.upper_learning_rate, initial_size, size)
                progress.search.step(gradient, *schedule)
                progress.add(losses)
                if config.check_processes and self.args.world_size > 1:
                    check_agreement(progress.state_dict(), f"after outer step {progress.step} of the search")
                if progress.num_lost_in_a_row == MAX_LOST_STEPS:
                    raise FloatingPointError(
                        f"The inner trainings of {MAX_LOST_STEPS} outer steps in a row, {config.num_masks} each, did not leave two "
                        f"finite upper losses to compare. Lower `inner_learning_rate` (now {self._inner_learning_rate}), or look "
                        "for broken samples."
                    )
                bar.update()
                bar.set_postfix(progress.short_facts())
                if progress.step % self._log_steps == 0 or progress.step == config.outer_steps:
                    self.state.global_step = progress.step
                    self.log(progress.metrics())
                if self._saves_search and progress.step % config.search_save_steps == 0:
                    self._save_search(progress, folder)
        if self._saves_search:
            self._save_search(progress, folder)

    def _is_over(self, progress: "_Search", size: int) -> bool:
        """Say whether nothing can change any more: a policy gradient is 0 where probabilities are 0 or 1, a difference is not."""
        return self.bilevel_config.engine != "kernel" and progress.is_settled(size)

    def _losses_and_gradient(self, engine: Engine, masks: Tensor, progress: "_Search") -> tuple[Tensor, Tensor]:
        probabilities = progress.search.probabilities
        if isinstance(engine, KernelEngine):
            masks = self._of_whole_pool(masks)
            found = self._on_all_processes(
                len(masks), 1 + masks.shape[1], partial(_losses_beside_differences, engine, masks)
            )
            return found[:, 0], found[:, 1 + self._free_ids].mean(0).to(probabilities)
        losses = self._upper_losses(engine, masks, progress.step, self._upper_rows(engine, progress.step))
        return losses, policy_gradient(masks, losses, probabilities)[0]

    def _masks(self, probabilities: Tensor, num: int, *seed: int) -> Tensor:
        return sample_masks(probabilities, num, torch.Generator().manual_seed(derive_seed(self._seed, *seed)))

    def _required(self) -> Tensor:
        """List the required samples, in the order of the pool."""
        required = torch.ones(len(self.train_dataset), dtype=torch.bool)
        required[self._free_ids] = False
        return required.nonzero().flatten()

    def _of_whole_pool(self, masks: Tensor) -> Tensor:
        """Give masks of the free samples the required ones, ``(num, n)``."""
        whole = torch.ones(len(masks), len(self.train_dataset), dtype=torch.bool)
        whole[:, self._free_ids] = masks
        return whole

    def _upper_rows(self, engine: Engine, step: int) -> Tensor | None:
        wanted = self.bilevel_config.num_upper_rows
        if wanted is None or wanted >= len(engine.upper):
            return None
        generator = torch.Generator().manual_seed(derive_seed(self._seed, _ROWS, step))
        return torch.randperm(len(engine.upper), generator=generator)[:wanted]

    def _upper_losses(self, engine: Engine, masks: Tensor, step: int, upper_rows: Tensor | None = None) -> Tensor:
        """Train on the masks and measure what comes out."""
        masks = self._of_whole_pool(masks)

        def losses(mine: list[int]) -> Tensor:
            seeds = [derive_seed(self._seed, _TRAINING, step, c) for c in mine]
            return engine.upper_losses(masks[mine], seeds, upper_rows)[:, None]

        return self._on_all_processes(len(masks), 1, losses)[:, 0]

    def _on_all_processes(self, num: int, width: int, numbers: Callable[[list[int]], Tensor]) -> Tensor:
        """Ask for numbers of every mask, each process for its share of them, and gather those of all."""
        rank, num_ranks = self.args.process_index, self.args.world_size
        mine = list(range(rank, num, num_ranks))
        found = torch.full((math.ceil(num / num_ranks), width), torch.nan, dtype=torch.float64)
        if mine:
            found[: len(mine)] = numbers(mine)
        if num_ranks == 1:
            return found
        gathered = gather(found.to(self.args.device)).cpu().view(num_ranks, -1, width)
        return gathered.transpose(0, 1).flatten(0, 1)[:num]

    def _round(self, progress: "_Search", engine: Engine, size: int) -> tuple[Tensor, dict[str, float]]:
        """Choose the coreset, and measure it beside uniform draws of its size."""
        probabilities, num = progress.search.probabilities, self.bilevel_config.num_final_masks
        num_wanted = int((probabilities > 0).sum())
        if num_wanted < size:
            warnings.warn(
                f"The search settled on {num_wanted} samples, {size - num_wanted} fewer than asked for: any more would raise the upper loss, "
                "so the rest is drawn at random. Lower `size` by as many.",
                stacklevel=5,
            )
            generator = torch.Generator().manual_seed(derive_seed(self._seed, _REST))
            probabilities = with_zeros_in_random_order(probabilities, generator)
        outer_steps = self.bilevel_config.outer_steps
        if num == 0:
            mask = top_mask(probabilities, size)
            loss = self._upper_losses(engine, mask[None], outer_steps)[0]
            if not loss.isfinite():
                raise FloatingPointError(
                    f"The coreset of the {size} most probable samples has the upper loss {float(loss)}: its inner training diverged, "
                    "or one of its samples is broken. Look for NaN and infinite values in the pool, lower `inner_learning_rate` "
                    f"(now {self._inner_learning_rate}), or set `num_final_masks`, of which one with a finite loss is taken."
                )
        else:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, _FINAL))
            upper_losses = partial(self._upper_losses, engine, step=outer_steps)
            mask, loss = best_sampled_mask(probabilities, size, num, upper_losses, generator)
        generator = torch.Generator().manual_seed(derive_seed(self._seed, _UNIFORM))
        uniform = uniform_masks(len(probabilities), size, NUM_UNIFORM, generator)
        uniform_losses = self._upper_losses(engine, uniform, outer_steps + 1)
        outcome = {
            "final_upper_loss": float(loss),
            "uniform_upper_loss_mean": float(uniform_losses.mean()),
            "uniform_upper_loss_min": float(uniform_losses.nan_to_num(torch.inf).min()),
        }
        outcome = {name: value for name, value in outcome.items() if math.isfinite(value)}
        self.log({f"coreset/{name}": value for name, value in outcome.items()})
        return mask, outcome

    @property
    def _inner_learning_rate(self) -> float:
        rate = self.bilevel_config.inner_learning_rate
        return self.args.learning_rate if rate is None else rate

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        config, model = self.bilevel_config, self._searched_model()
        model.to(self.args.device)
        rows = {}
        for name, dataset, seed in (("pool", self.train_dataset, _POOL), ("upper", self.target_dataset, _TARGET)):
            if dataset is not None:
                prepared, collator = self._collator_for(dataset)
                rows[name] = CollatedRows(prepared, collator, self.args.device, derive_seed(self._seed, seed))
                self._check_images(rows[name].batch, len(rows[name]))
        upper = rows.get("upper", rows["pool"])
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon

        def losses(model: nn.Module, batch: Any) -> UnitLosses:
            return unit_losses(
                model, batch, "sample", label_smoothing=smoothing, compute_sample_losses=self.compute_sample_losses
            )

        problem = InnerProblem(
            model=model,
            losses=losses,
            pool=rows["pool"],
            training=InnerTraining(
                config.inner_steps, config.inner_batch_size, self._inner_learning_rate, config.inner_optimizer
            ),
            upper=upper,
            upper_batch_size=config.target_batch_size or 256,
            autocast=self.accelerator.autocast if self.accelerator.mixed_precision == "bf16" else nullcontext,
        )
        with private_randomness(derive_seed(self._seed), self.args.device):
            if config.engine == "kernel":
                yield self._kernel_engine(problem)
                return
            engine = self._choose_engine(problem)
            with engine.restored():
                yield engine

    def _kernel_engine(self, problem: InnerProblem) -> KernelEngine:
        config = self.bilevel_config
        generator = torch.Generator().manual_seed(derive_seed(self._seed, _KERNEL))
        shown = not self.args.disable_tqdm and self.is_local_process_zero()
        kernel = partial(
            KernelEngine, problem.model, problem.pool, problem.upper, config.ridge, generator, config.pool_share, shown
        )
        if config.kernel_trainings == 0:
            return kernel()
        generator = torch.Generator().manual_seed(derive_seed(self._seed, _KERNEL_ROWS))
        size = self._in_rows(config.size) - len(problem.pool) + len(self._free_ids)
        masks = self._of_whole_pool(uniform_masks(len(self._free_ids), size, config.kernel_trainings, generator))
        inner = SequentialEngine(problem)

        def train_on(number: int) -> None:
            seed = derive_seed(self._seed, _KERNEL, number)
            if self.model_init is None or self.search_model is not None:
                inner.train_on(masks[number], seed)
            else:
                with private_randomness(derive_seed(seed), self.args.device):
                    fresh = self.call_model_init().to(self.args.device)
                for parameter, own in zip(fresh.parameters(), problem.model.parameters(), strict=True):
                    parameter.requires_grad_(own.requires_grad)  # it may have been frozen since
                SequentialEngine(replace(problem, model=fresh)).train_on(masks[number], seed)
                problem.model.load_state_dict(fresh.state_dict())
            self._synchronise_model()
            if not all(parameter.isfinite().all() for parameter in problem.model.parameters()):
                raise FloatingPointError(
                    "A training on a uniform draw, at whose end the kernel was to be taken, diverged. Lower `inner_learning_rate` "
                    f"(now {self._inner_learning_rate}), look for broken samples, or take the kernel at the initial weights with "
                    "`kernel_trainings=0`."
                )

        frozen = [(p, p.detach().clone()) for p in problem.model.parameters() if not p.requires_grad]
        try:
            with inner.restored():
                return kernel([partial(train_on, number) for number in range(config.kernel_trainings)])
        finally:
            for parameter, value in frozen:  # a fresh model has its own of these too
                parameter.data.copy_(value)

    def _choose_engine(self, problem: InnerProblem) -> Engine:
        kind = self.bilevel_config.engine
        if kind == "sequential" or kind == "auto" and not stacking_pays(problem.model, self.args.device):
            return SequentialEngine(problem)
        try:
            return BatchedEngine(problem)
        except ValueError as error:
            if kind == "batched":
                raise
            logger.info("Searching with the sequential engine: %s", error)
            return SequentialEngine(problem)

    def _synchronise_model(self) -> None:
        """Give all processes the weights of the first: nothing has wrapped the model yet."""
        if self.args.world_size > 1:
            model = self._searched_model().to(self.args.device)
            with torch.no_grad():
                for tensor in [*model.parameters(), *model.buffers()]:
                    tensor.copy_(broadcast(tensor.detach().clone()))

    @contextmanager
    def _counting_outer_steps(self, progress: "_Search") -> Iterator[None]:
        """Let what is logged carry the outer step, and leave the Trainer's count as it was."""
        before = self.state.global_step
        try:
            yield
        finally:
            self.state.global_step = before

    @property
    def _log_steps(self) -> int:
        steps = self.args.logging_steps
        return max(1, math.ceil(steps * self.bilevel_config.outer_steps) if steps < 1 else int(steps))

    # Checkpoints of the search --------------------------------------------------------------------------------------

    @property
    def _saves_search(self) -> bool:
        return self.args.save_strategy != "no"

    def _save_initialisation(self, folder: Path) -> None:
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STATE_NAME).unlink(missing_ok=True)  # of an earlier search
            write_state(self._searched_model().state_dict(), folder / INITIALISATION_NAME)

    def _save_search(self, progress: "_Search", folder: Path) -> None:
        if self.args.should_save:
            state = {
                "config": self.bilevel_config.to_dict(),
                "num_pool": len(self.train_dataset),
                "fingerprint": getattr(self.train_dataset, "_fingerprint", None),
                "rows_checksum": rows_checksum(self.train_dataset),
                "seed": self._seed,
                "required_ids": self._required(),
                "search": progress.state_dict(),
            }
            write_state(state, folder / STATE_NAME)

    def _load_search(self, progress: "_Search", folder: Path) -> None:
        path = folder / STATE_NAME
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            weights = torch.load(folder / INITIALISATION_NAME, map_location="cpu", weights_only=True, mmap=True)
            num_pool, fingerprint, seed = state["num_pool"], state["fingerprint"], state["seed"]
            required = state.get("required_ids", torch.empty(0, dtype=torch.int64))
            config, search = state["config"], state["search"]
        except FileNotFoundError as error:
            raise ValueError(f"There is no search to resume in `{folder}`: {error.filename} is missing.") from None
        except Exception as error:  # torch.load raises a dozen kinds for a damaged file
            raise ValueError(f"`{folder}` cannot be read ({type(error).__name__}: {error}). Start anew.") from error
        mine = (len(self.train_dataset), getattr(self.train_dataset, "_fingerprint", None), self._seed)
        is_mine = is_dataset_of(self.train_dataset, fingerprint, state.get("rows_checksum"))
        if (num_pool, seed) != (mine[0], mine[2]) or not is_mine:
            raise ValueError(
                f"`{path}` is of a search in a pool of {num_pool} samples with the fingerprint {fingerprint} and the seed {seed}; "
                f"here they are {mine[0]}, {mine[1]} and {mine[2]}. Prepare the pool in the same way, or search anew."
            )
        if not torch.equal(required, self._required()):
            raise ValueError(
                f"`{path}` is of a search with {len(required)} required samples, and here `required_ids` names "
                f"{len(self._required())}, or others. Give the same ones, or search anew."
            )
        self._say_what_changed(config)
        self._searched_model().load_state_dict(weights)
        progress.load_state_dict(search)

    # Training on what was found -------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Search the coreset unless it is there already, then train on it as ``Trainer.train``.

        Args:
            resume_from_checkpoint: A checkpoint's path, whose coreset is taken; or True for the newest whole one in
                ``output_dir``, and if there is none, for the search that was interrupted there.
            trial: As for ``Trainer``.
            ignore_keys_for_eval: As for ``Trainer``.

        Returns:
            The Trainer's output.
        """
        if self._is_off():
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self.train_dataset is not self._prepared_pool:
            self._prepare_pool()
        if resume_from_checkpoint is True and not self._whole_checkpoints()[0]:
            self.search(resume_from_checkpoint=True)
            resume_from_checkpoint = None
        elif resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = self._newest_whole_checkpoint()
            self._subset = self._subset_of_checkpoint(resume_from_checkpoint)
        elif self._subset is None:
            self.search()
        pool, domain_ids, ids = self.train_dataset, self._domain_ids, self._subset.ids.sort().values
        self._whole_pool = pool
        self.train_dataset = self._prepared_pool = _rows_of(pool, ids)
        self._domain_ids = None if domain_ids is None else domain_ids[ids]
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.train_dataset = self._prepared_pool = pool
            self._domain_ids, self._whole_pool = domain_ids, None

    def selected_subset(self) -> SelectedSubset:
        """Return the coreset.

        Returns:
            The subset, the most probable samples first.

        Raises:
            ValueError: If none has been searched yet.
        """
        if self._subset is None:
            raise ValueError("There is no coreset yet: call `search()` or `train()` first.")
        return self._subset

    def plot_search(self) -> Any:
        """Draw the upper losses over the search, beside those of uniform draws and of the coreset.

        Returns:
            A matplotlib figure; ``figure.savefig(path)`` writes it.

        Raises:
            ValueError: If nothing has been searched by this trainer.
        """
        if not self._searched_losses:
            raise ValueError("This trainer has not searched: call `search()` or `train()` first.")
        facts = self.selected_subset().facts
        uniform = facts["controls"].get("uniform", {}).get("upper_loss")
        return upper_losses_over_search(self._searched_losses, uniform, facts["metrics"].get("upper_loss"))

    # State, facts ---------------------------------------------------------------------------------------------------

    def _shared_state(self) -> dict[str, Any]:
        return {"subset": vars(self._subset)}

    def _subset_of_checkpoint(self, checkpoint: str) -> SelectedSubset:
        subset = SelectedSubset(**self._read_state(checkpoint)["shared"]["subset"])
        pool, num_pool = self._pool_as_given(), len(self.train_dataset)
        if subset.num_pool != num_pool or not is_dataset_of(pool, subset.fingerprint, subset.rows_checksum):
            raise ValueError(
                f"The coreset of `{checkpoint}` is of a pool of {subset.num_pool} samples with the fingerprint "
                f"{subset.fingerprint}; `train_dataset` has {num_pool} and {getattr(pool, '_fingerprint', None)}. Prepare the pool "
                "in the same way, or search anew."
            )
        if not torch.isin(self._required(), subset.ids).all():
            raise ValueError(
                f"The coreset of `{checkpoint}` lacks samples that `required_ids` names: it is of a search without them. Give the same "
                "ones, or search anew."
            )
        return subset

    def _make_subset(self, progress: "_Search", mask: Tensor, losses: dict[str, float]) -> SelectedSubset:
        mask = self._of_whole_pool(mask[None])[0]
        probabilities = torch.ones(len(mask))  # the required samples have 1
        probabilities[self._free_ids] = progress.search.probabilities
        ids = mask.nonzero().flatten()
        ids = ids[probabilities[ids].argsort(descending=True, stable=True)]
        names = {"metrics": "final_upper_loss", "controls": "uniform_upper_loss_mean"}
        found = {key: {"upper_loss": losses[name]} for key, name in names.items() if name in losses}
        facts = {
            "search": progress.facts(),
            "metrics": found.get("metrics", {}),
            "controls": {"uniform": found["controls"]} if "controls" in found else {},
        }
        ranking = ("probability", torch.arange(len(mask)), probabilities)
        return self._subset_of_pool(ids, facts, ranking, probabilities=probabilities[ids])

    def bilevel_facts(self) -> dict[str, Any]:
        """Add the search to the facts of all methods."""
        facts = super().bilevel_facts()
        facts["inner_learning_rate"] = self._inner_learning_rate
        facts["search_model"] = None if self.search_model is None else type(self.search_model).__name__
        if self._subset is not None:
            facts |= {name: self._subset.facts[name] for name in ("num_pool", "search", "metrics", "controls")}
        return facts

    def _data_facts(self) -> dict[str, Any]:
        """Name the pool that was searched, also while its coreset is trained on."""
        facts = super()._data_facts()
        facts["pool"] = {**self._subset.facts["dataset"], "fingerprint": self._subset.fingerprint}
        return facts

    def _cost(self) -> dict[str, str]:
        """Say what the training cost, and the search before it if this trainer made it."""
        searched = {} if self._search_seconds is None else {"Search": f"{self._search_seconds:,.1f} s"}
        return {**searched, **super()._cost()}

    def create_model_card(self, *args: Any, images: bool = False, **kwargs: Any) -> None:
        """Write the model card of all methods.

        Args:
            *args: As for all methods.
            images: Show samples of the coreset, if they are images. They are then uploaded with the card, as
                ``push_to_hub(images=True)`` does.
            **kwargs: As for all methods.
        """
        self._shows_images = images
        super().create_model_card(*args, **kwargs)

    def _method_section(self) -> MethodSection | None:
        if self._subset is None:
            return None
        facts, size, num_pool = self._subset.facts, len(self._subset), self._subset.num_pool
        config = self.bilevel_config
        with_kernel = config.engine == "kernel"
        judge = "the pool" if self.target_dataset is None else "the target dataset"
        if with_kernel and config.pool_share > 0:
            share = f"{100 * config.pool_share:.4g} %"
            others = f", each row to {share} by what the others say of it,"
            judge += others if self.target_dataset is None else f" and, to {share}, the pool"
        fitted = "kernel ridge regression with the model's tangent kernel" if with_kernel else "training"
        search, uniform = facts["search"], facts["controls"].get("uniform", {}).get("upper_loss")
        required = search.get("num_required", 0)
        loss = "mean squared distance to one-hot labels" if with_kernel else "in nats"
        found = {
            f"Loss on {judge} after {fitted} ({loss})": facts["metrics"].get("upper_loss"),
            f"The same of uniform draws of the same size, mean of {NUM_UNIFORM}": uniform,
        }
        statistics = {
            "Size": f"{size:,} of {num_pool:,} ({size / num_pool:.1%})",
            **({"Of which were required from the start": f"{required:,}"} if required else {}),
            **{label: f"{value:.4g}" for label, value in found.items() if value is not None},
            "Outer steps of the search": f"{search['num_outer_steps']:,}",
            "Probabilities within 0.01 of 0 or 1 at its end": f"{search['settled']:.1%}",
        }
        if not with_kernel:
            statistics["Inner trainings that diverged"] = f"{search['num_diverged']:,}"
        plots: dict[str, tuple[str, Callable[[], Any]]] = {}
        if self._searched_losses:
            plots["coreset_search.png"] = (
                "Upper loss over the search, of uniform draws and of the coreset",
                self.plot_search,
            )
        plots["coreset_ranking.png"] = (
            "Rows kept and dropped, by probability",
            partial(kept_against_dropped, **facts["ranking"]),
        )
        if "domains" in facts:
            plots["coreset_domains.png"] = (
                "Share of every domain in the pool and in the coreset",
                partial(domain_shares, **facts["domains"]),
            )
        if images := self._chosen_images():
            shown = f"The {len(images)} most probable samples" if len(images) < size else "All samples of the coreset"
            plots["coreset_images.png"] = (shown, partial(montage, images))
        return MethodSection(
            title="Coreset",
            about=f": it searched the {size:,} rows of the pool on which {fitted} reaches the lowest loss on {judge}, and trained the "
            "model on these alone.",
            paper="Zhou, Pi, Zhang, Lin, Zhang, Probabilistic Bilevel Coreset Selection, ICML 2022.",
            limit="The loss beside that of uniform draws is what the search minimised, on the rows that it was minimised on; only "
            "results on other rows show that the coreset trains a better model.",
            statistics=statistics,
            plots=plots,
        )

    def _chosen_images(self) -> list[Any]:
        """Collect images of the coreset, the most probable first; none unless they were asked for, and the pool's rows hold some."""
        if not self._shows_images:
            return []
        pool = (
            self.train_dataset if self._whole_pool is None else self._whole_pool
        )  # TRL writes a card with every checkpoint
        rows = [pool[int(i)] for i in self._subset.ids[:MAX_IMAGES]]
        for key in ("pixel_values", "image"):
            if all(isinstance(row, Mapping) and key in row for row in rows):
                images = [np.asarray(row[key]) for row in rows]
                return images if all(map(can_be_drawn, images)) else []
        return []


def _losses_beside_differences(engine: KernelEngine, masks: Tensor, mine: list[int]) -> Tensor:
    losses, differences = engine.losses_and_differences(masks[mine])
    return torch.cat([losses[:, None], differences], dim=1)


class _Search:
    """What a search knows: probabilities, the step it is at, and what has happened."""

    def __init__(self, search: CoresetProbabilities, num_required: int) -> None:
        self.search = search
        self.num_required = num_required  # samples in every mask, beside those that have probabilities
        self.step = 0
        self.num_diverged = 0
        self.num_lost_in_a_row = 0
        self.objectives: list[float] = []  # mean upper loss of the masks of each step

    def add(self, losses: Tensor) -> None:
        """Record the upper losses of a step."""
        finite = losses[losses.isfinite()]
        self.step += 1
        self.num_diverged += len(losses) - len(finite)
        self.num_lost_in_a_row = self.num_lost_in_a_row + 1 if len(finite) < 2 else 0
        self.objectives.append(float(finite.mean()) if len(finite) else math.nan)

    def is_settled(self, size: int) -> bool:
        """Say whether nothing can change any more: every probability is 0 or 1, and they are few enough."""
        s = self.search.probabilities
        return bool(((s == 0) | (s == 1)).all()) and float(s.sum()) <= size

    def metrics(self) -> dict[str, float]:
        facts = self.facts()
        return {
            "coreset/upper_loss": self.objectives[-1],
            "coreset/expected_size": facts["expected_size"],
            "coreset/entropy": facts["entropy"],
            "coreset/settled": facts["settled"],
            "coreset/num_diverged": self.num_diverged,
        }

    def short_facts(self) -> dict[str, str]:
        facts = self.facts()
        return {
            "loss": f"{self.objectives[-1]:.4g}",
            "size": f"{facts['expected_size']:.0f}",
            "settled": f"{facts['settled']:.0%}",
        }

    def facts(self) -> dict[str, Any]:
        """Say how the search went, as JSON-compatible values."""
        progress = search_progress(self.search.probabilities)
        return {
            "num_outer_steps": self.step,
            "num_diverged": self.num_diverged,
            "num_required": self.num_required,
            **progress,
            "expected_size": self.num_required + progress["expected_size"],
        }

    def state_dict(self) -> dict[str, Any]:
        names = ("step", "num_diverged", "num_lost_in_a_row", "objectives")
        return {"search": self.search.state_dict(), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.search.load_state_dict(state["search"])
        self.step, self.num_diverged = state["step"], state["num_diverged"]
        self.num_lost_in_a_row, self.objectives = state["num_lost_in_a_row"], state["objectives"]


def _rows_of(pool: Any, ids: Tensor) -> Any:
    if isinstance(pool, datasets.Dataset):
        return pool.select(ids.tolist())
    return Subset(pool, ids.tolist())


class CoresetTrainer(CoresetMixin, Trainer):
    r"""Find the subset of a fixed size that trains the best model, then train on it (probabilistic bilevel coreset selection).

    Use it when a small part of the pool shall stand for all of it (to label, store, replay or publish), or when labels are
    wrong or classes rare and ``target_dataset`` shows what good means. It is a search: it pays where a model trains on
    the coreset in seconds. For large models search with a small one, ``search_model``. Do not use it to save training time
    once: the search trains ``outer_steps * num_masks`` models.

    .. math:: \min_s E_{m \sim s}\, [f(\theta^*(m))], \qquad 0 \le s_i \le 1, \quad \sum_i s_i \le K

    Every sample i has a probability :math:`s_i`. Each outer step draws a few masks, trains a model on the rows of each from one
    stored initialisation, and moves the probabilities by how the upper losses f of these models compare. f is the loss on
    ``target_dataset``, or on the whole pool without one. ``search()`` does that alone and returns a ``SelectedSubset``;
    ``train()`` does it once, and trains the model on the coreset with your ``TrainingArguments``, whose epochs are then epochs
    of the coreset.

    With ``engine="kernel"`` no model is trained on a mask: it is linear in the gradients of the model and fitted by ridge
    regression, in closed form (``hf_bilevel.tangent_kernel``). The gradients are those at the initial weights, or at the ends of a
    few trainings on uniform draws (``kernel_trainings``). The upper loss is then the mean squared distance to one-hot labels, and its
    gradient, exact but for the masks drawn, comes from what every single sample of the pool changes, those with probability 0
    included. For classifiers; with a frozen encoder it is the regression on its features. Start it from ``initial_size=0.5``, and compare (``scripts/benchmarks/coreset.py``, arm
    ``pbcs_at_size``): the regression prefers what is best from the start, a network may not. With 200 steps and 2 masks that
    is the engine of choice wherever a linear model is a fair picture of the network; otherwise train.

    The pool is collated once and kept on the device; augmentation and random masking are drawn once for the search, and anew
    for the training. Losses are those of the model's head, not of a ``compute_loss`` of your own. Inner trainings run in
    float32, or in bfloat16 autocast with ``bf16``.

    Cost of an outer step: C trainings of ``inner_steps`` forward and backward passes of about K rows, and C forward passes of the
    upper rows; at the end one training, or ``num_final_masks``, and ten of uniform draws to compare with. With the kernel
    ``kernel_trainings`` of these trainings and three forward and backward passes of the pool and upper rows once, (b + 1) / 2 times
    as many where the gradients of the pool (4 bytes for each row and trained parameter) fill b blocks of 1 GiB; then
    :math:`O(n k^2)` for each mask of k of n rows. Memory beside the pool: the initialisation, gradients and optimizer state; with the batched engine C times that of a training.
    Processes share the masks, with one gather of C numbers a step.

    Logged, with the outer step as step: ``coreset/upper_loss``, the mean over the masks in nats (squared distance with the kernel); ``coreset/expected_size``;
    ``coreset/entropy`` in nats; ``coreset/settled``, the share of probabilities within 0.01 of 0 or 1; ``coreset/num_diverged``,
    inner trainings left out so far. At the end ``coreset/final_upper_loss`` beside ``coreset/uniform_upper_loss_mean`` and
    ``_min`` of ten uniform draws.

    Args:
        *args: ``model`` and ``args``, as for ``Trainer``; better passed by name.
        target_dataset: Map-style dataset of the upper loss, with the columns of ``train_dataset``; the pool if None.
        bilevel_config: A ``CoresetConfig``.
        search_model: Model that is trained in the search instead of ``model``, for instance a smaller one with the same inputs.
        required_ids: Rows of ``train_dataset`` that are in the coreset whatever the search finds, and in every mask of it: a replay
            memory, or what has labels already. ``size`` counts them, and the search decides about the others.
        compute_sample_losses: Loss of each sample for models whose head is not known.
        **kwargs: Everything else that ``Trainer`` takes.

    References:
        Zhou, Pi, Zhang, Lin, Zhang, Probabilistic Bilevel Coreset Selection, ICML 2022.

    Example:
        >>> from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=8, patch_size=4, num_channels=1, num_labels=2)
        >>> pool = [{"pixel_values": torch.randn(1, 8, 8), "labels": i % 2} for i in range(40)]
        >>> trainer = CoresetTrainer(
        ...     model=ViTForImageClassification(config),
        ...     args=TrainingArguments("output", per_device_train_batch_size=8, num_train_epochs=2, save_strategy="no",
        ...                            use_cpu=True, disable_tqdm=True, report_to="none"),
        ...     train_dataset=pool,
        ...     bilevel_config=CoresetConfig(size=10, outer_steps=2, inner_steps=2),
        ... )
        >>> output = trainer.train()  # doctest: +ELLIPSIS
        {...}
        >>> len(trainer.selected_subset()), output.global_step
        (10, 4)
    """
