"""What every method shares: config, target dataset, ids past the collator, state beside the optimizer's, logging."""

import copy
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments

from hf_bilevel.cards import MethodSection, Results, check_results, model_section
from hf_bilevel.core.selection import num_selected
from hf_bilevel.data import (
    SAMPLE_ID,
    DataCollatorWithOrigin,
    EndlessLoader,
    NumberedDataset,
    NumberedStream,
    Origin,
    check_images_of_rows,
    derive_seed,
    fetch,
    number_item,
    pick_rows,
    pop_origin,
    private_randomness,
    read_domains,
)
from hf_bilevel.identity import rows_checksum
from hf_bilevel.losses import (
    IGNORE_INDEX,
    TOKEN_HEADS,
    SampleLossFunction,
    UnitLosses,
    class_of,
    evaluating,
    find_head,
    unit_losses,
    unwrap,
    weighted_loss,
)
from hf_bilevel.subset import SelectedSubset, dataset_facts, ranking_facts
from hf_bilevel.trainers.agreement import AgreementCallback
from hf_bilevel.trainers.checkpoints import CheckpointMixin, versions
from hf_bilevel.trainers.config import BilevelConfig
from hf_bilevel.trainers.cost import Load
from hf_bilevel.trainers.sharding import is_partitioned, is_sharded

CONFIG_NAME = "bilevel_config.json"
FACTS_NAME = "bilevel_facts.json"

NUM_CHECKED_ROWS = 1000
NUM_TRIED_ROWS = 5

logger = logging.getLogger(__name__)


class BilevelMixin(CheckpointMixin):
    """Base of all methods: put one of its subclasses in front of ``Trainer`` or a subclass of it.

    The mixins use only seams that ``Trainer`` documents or calls by name and never copy its loop, so everything else
    (evaluation, callbacks, checkpoints, the Hub) stays the Trainer's.

    Args:
        model: As for ``Trainer``.
        args: As for ``Trainer``.
        target_dataset: Map-style dataset that shows what good means, with the columns of ``train_dataset``.
        bilevel_config: The method's config; its defaults if None.
        compute_sample_losses: Loss of each sample, (model, batch with labels) -> ``(n,)``, for models whose head is not
            known, or trained with ``compute_loss_func``.
        **kwargs: Everything else that ``Trainer`` (or the class behind this one) takes.
    """

    method: ClassVar[str]
    config_class: ClassVar[type[BilevelConfig]]
    _losses_are_for: ClassVar[str] = "ranked by"
    _user_dataset: Any = None  # while the training loader is made

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        target_dataset: Any = None,
        bilevel_config: BilevelConfig | None = None,
        compute_sample_losses: SampleLossFunction | None = None,
        **kwargs: Any,
    ) -> None:
        if bilevel_config is not None and not isinstance(bilevel_config, self.config_class):
            raise TypeError(
                f"`bilevel_config` must be a {self.config_class.__name__}, got {type(bilevel_config).__name__}."
            )
        self.bilevel_config = self.config_class() if bilevel_config is None else bilevel_config
        self.target_dataset = target_dataset
        self.compute_sample_losses = compute_sample_losses
        if self._is_sft and not self._is_off():
            self._check_preparation(args, kwargs.get("train_dataset"))
        is_prepared_by_trl = self._is_sft and not self._is_off() and isinstance(target_dataset, datasets.Dataset)
        if is_prepared_by_trl and len(target_dataset):  # of an empty one the checks below say more
            self._init_sft(model, args, **kwargs)
        else:
            super().__init__(model=model, args=args, **kwargs)
        self._pools = kwargs.get("train_dataset"), self.train_dataset  # as given, as prepared
        self._candidate_batch_size = self._of_this_process(self.args.per_device_train_batch_size)
        if self.bilevel_config.check_processes:
            self.add_callback(AgreementCallback(self._state_of_all_processes))
        self._prepare_pool()

    # TRL ------------------------------------------------------------------------------------------------------------

    @property
    def _is_of_trl(self) -> bool:
        return any(_is_of_trl(parent) for parent in type(self).__mro__)

    @property
    def _is_sft(self) -> bool:
        return any(parent.__name__ == "SFTTrainer" and _is_of_trl(parent) for parent in type(self).__mro__)

    def _check_preparation(self, args: Any, pool: Any) -> None:
        """Refuse what SFTTrainer would do to the datasets and this trainer could not follow."""
        if getattr(args, "shuffle_dataset", False) and isinstance(pool, datasets.Dataset):
            raise ValueError(
                "`shuffle_dataset=True` reorders the pool while SFTTrainer prepares it, and sample ids would name other rows than "
                "those of the dataset that you gave. Leave it out: every epoch draws the rows in a new order anyway."
            )
        eval_packing, packing = getattr(args, "eval_packing", None), getattr(args, "packing", False)
        if eval_packing is not None and eval_packing != packing and self.target_dataset is not None:
            raise ValueError(
                f"`eval_packing={eval_packing}` and `packing={packing}`: SFTTrainer prepares the target dataset as it does those to "
                "evaluate on, so that its rows would not be like the pool's. Leave `eval_packing` out."
            )

    def _init_sft(self, model: Any, args: Any, eval_dataset: Any = None, **kwargs: Any) -> None:
        """Let ``SFTTrainer`` prepare the target dataset as it prepares those to evaluate on: by adding it to them."""
        if eval_dataset is None and getattr(args, "eval_strategy", "no") != "no":
            return super().__init__(model=model, args=args, **kwargs)  # raises for want of something to evaluate on
        self._check_columns_for_sft(args, kwargs.get("train_dataset"), kwargs.get("formatting_func"))
        several, name = isinstance(eval_dataset, dict), "target_dataset"
        prepared = eval_dataset if several else {"eval": eval_dataset} if eval_dataset is not None else {}
        while name in prepared:
            name += "_"
        super().__init__(model=model, args=args, eval_dataset={**prepared, name: self.target_dataset}, **kwargs)
        self.target_dataset = self.eval_dataset.pop(name)
        if not several:
            self.eval_dataset = self.eval_dataset.get("eval")

    def _check_columns_for_sft(self, args: Any, pool: Any, formatting_func: Callable | None) -> None:
        """Refuse a target dataset that SFTTrainer could not tokenise as it does the pool."""
        read = {getattr(args, "dataset_text_field", "text"), "messages", "conversations", "prompt", "completion"}
        columns = self.target_dataset.column_names
        of_pool = set(getattr(pool, "column_names", None) or ())
        missing, added = (read & of_pool) - set(columns), (read & set(columns)) - of_pool
        if "input_ids" in columns:
            return
        if missing:
            raise ValueError(
                f"`target_dataset` has the columns {columns} and lacks {sorted(missing)}, which SFTTrainer reads from "
                "`train_dataset`. Give both the same columns, or a target dataset that is tokenised already (`input_ids`)."
            )
        if formatting_func is not None:
            try:
                formatting_func(self.target_dataset[0])
            except KeyError as error:
                raise ValueError(
                    f"`formatting_func` does not find {error} in `target_dataset`, which has the columns {columns}. Give it those of "
                    "`train_dataset`, or a target dataset that is tokenised already (`input_ids`)."
                ) from error
        elif added and read & of_pool:
            raise ValueError(
                f"`target_dataset` has the columns {sorted(added)}, which `train_dataset` lacks and SFTTrainer would read in place of "
                f"{sorted(read & of_pool)}. Remove them (`target_dataset.remove_columns({sorted(added)})`)."
            )

    def _pool_as_given(self) -> Any:
        """The pool whose rows the ids count: TRL may have tokenised it, row by row."""
        given, prepared = self._pools
        row_by_row = self._is_sft and not self._is_stream and not getattr(self.args, "packing", False)
        same = row_by_row and self.train_dataset is prepared and len(given) == len(prepared)
        return given if same else self.train_dataset

    def _loss_of_its_own(self) -> str | None:
        """Name what would compute another loss than the model's head does, if anything would."""
        if self.compute_loss_func is not None:
            return "`compute_loss_func`"
        methods = [parent for parent in type(self).__mro__ if "compute_loss" in vars(parent)]
        owner = next(parent for parent in methods if not parent.__module__.startswith("hf_bilevel."))
        heads = owner is Trainer or self._is_sft and _is_of_trl(owner) and self.args.loss_type == "nll"
        return None if heads else f"`{owner.__name__}.compute_loss`"

    # What a method defines ------------------------------------------------------------------------------------------

    @property
    def granularity(self) -> str:
        """``"token"`` or ``"sample"``: the units whose losses are compared."""
        raise NotImplementedError

    def _check_bilevel_setup(self) -> None:
        """Refuse what cannot work, before training starts."""
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} does not run under torch.nn.DataParallel ({self.args.n_gpu} devices in one "
                "process). Start one process per device with `accelerate launch` or `torchrun`, or set "
                "CUDA_VISIBLE_DEVICES to one device."
            )
        if self.is_model_parallel:
            raise ValueError(
                f"{type(self).__name__} does not run a model that `device_map` spreads over several devices. Load it on one "
                "device, with LoRA or gradient checkpointing to save memory."
            )
        if self.is_deepspeed_enabled and (why := self._why_not_deepspeed()):
            raise ValueError(f"{type(self).__name__} does not run so with DeepSpeed: {why}")
        if self.is_fsdp_enabled and (why := self._why_not_fsdp()):
            raise ValueError(f"{type(self).__name__} does not run with FSDP: {why}")
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(f'{type(self).__name__} runs with FSDP2 only. Set `fsdp_config={{"version": 2}}`.')

    def _why_not_deepspeed(self) -> str | None:
        """Say why a model that DeepSpeed runs cannot be trained with these settings, and what to do; None if it can."""
        return None

    def _why_not_fsdp(self) -> str | None:
        """Say the same of a model that FSDP shards."""
        return None

    def _begin_training(self) -> None:
        """Reset the method's state; called at every start of the training loop, restarts included."""

    def _end_training(self, failed: bool) -> None:
        """Release what only training needs; called also when training ``failed``."""

    def _select(self, batches: list[Any], origins: list[Origin], num_items: Any) -> tuple[list[Any], Any]:
        """Turn the candidate batches of one optimizer step into what is trained on."""
        return batches, num_items

    def _bilevel_metrics(self) -> dict[str, float]:
        """Return what to log since the last call; called on all ranks."""
        return {}

    def _share_statistics(self, model: torch.nn.Module) -> None:
        """Give all processes the running statistics of the first, as DDP does before every forward pass of its own."""
        if self.args.world_size == 1 or self.is_fsdp_enabled:
            return
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._NormBase):
                for statistic in module.buffers(recurse=False):
                    torch.distributed.broadcast(statistic, 0)

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """Score without gradients, in the run's mixed precision."""
        with torch.no_grad(), self.accelerator.autocast():
            yield

    def _losses(self, model: nn.Module, batch: Mapping[str, Any]) -> UnitLosses:
        """Compute the losses of a batch's units as the Trainer computes its own."""
        return unit_losses(model, batch, self.granularity, **self._loss_settings())

    def _weighted_loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        coefficients: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, UnitLosses]:
        """Compute their sum with coefficients that follow from the units' counts, or their mean; and the losses, detached."""
        return weighted_loss(model, batch, self.granularity, coefficients, **self._loss_settings())

    def _mean_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        return self._weighted_loss(model, batch)[0]

    def _loss_settings(self) -> dict[str, Any]:
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        return {"label_smoothing": smoothing, "compute_sample_losses": self.compute_sample_losses}

    # Ids ------------------------------------------------------------------------------------------------------------

    @property
    def _is_stream(self) -> bool:
        return isinstance(self.train_dataset, (torch.utils.data.IterableDataset, datasets.IterableDataset))

    def _prepare_pool(self) -> None:
        """Check the setup and read the domains; again at the start of training if the dataset was replaced."""
        for name, dataset in {"train_dataset": self.train_dataset, "target_dataset": self.target_dataset}.items():
            if isinstance(dataset, Mapping):
                raise ValueError(
                    f"`{name}` holds several datasets, {list(dataset)[:5]}. Pass one of them, for instance the first."
                )
        # Items are read, and a user's augmentation must not draw from the global generators for it.
        with private_randomness(derive_seed(self._seed), self.args.device):
            self._check_bilevel_setup()
            self._domain_ids, self.domain_names = self._find_domains()
            if self.train_dataset is not None and not self._is_stream and not self._is_off():
                self._check_order_of_rows()
        self._prepared_pool = self.train_dataset

    def _find_domains(self) -> tuple[torch.Tensor | None, list[str] | None]:
        config = self.bilevel_config
        if config.domain_column is None or self.train_dataset is None or self._is_off():
            return None, config.domain_names
        if self._is_stream:
            first = next(iter(self.train_dataset))
            domain = first.get(config.domain_column) if isinstance(first, Mapping) else None
            if domain is None or (isinstance(domain, str) and config.domain_names is None):
                raise ValueError(
                    f"`train_dataset` is a stream whose first item has {domain!r} as `{config.domain_column}`. Give every "
                    "item a domain, as an integer 0..D-1, or as a name together with `domain_names`, since a stream "
                    "cannot be searched for its names."
                )
            return None, config.domain_names
        return read_domains(self.train_dataset, config.domain_column, config.domain_names)

    def get_train_dataloader(self) -> DataLoader:
        """Return the training loader, with sample and domain ids carried past the collator."""
        if self._is_off() or self.train_dataset is None:
            return super().get_train_dataloader()
        dataset, collator = self.train_dataset, self.data_collator
        if isinstance(dataset, datasets.Dataset):
            columns_kept = self._remove_unused_columns(dataset, description="training")
            self.train_dataset = NumberedDataset(columns_kept, self._domain_ids)
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
            if self._is_stream:
                self.train_dataset = self._numbered_stream(dataset)
            else:
                self.train_dataset = NumberedDataset(dataset, self._domain_ids)
        # Swapped for this call only: evaluation and the parent's own checks must see the user's objects.
        own_collator, self._user_dataset = self.data_collator, dataset
        self.data_collator = DataCollatorWithOrigin(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator, self._user_dataset = dataset, own_collator, None

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Callable | None = None, **kwargs: Any
    ) -> DataLoader:
        if self._user_dataset is not None and sampler_fn is not None:
            sampler_fn = partial(self._sampler_of_the_pool, sampler_fn)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, **kwargs)

    def _sampler_of_the_pool(self, sampler_fn: Callable, _: Any) -> Sampler | None:
        """Make a sampler while all see the user's dataset, with all its columns: samplers read them."""
        numbered, self.train_dataset = self.train_dataset, self._user_dataset
        try:
            return sampler_fn(self.train_dataset)
        finally:
            self.train_dataset = numbered

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if isinstance(train_dataset, NumberedDataset):  # of a loader of the user's own
            train_dataset = self._user_dataset
        return super()._get_train_sampler(train_dataset)

    def _numbered_stream(self, stream: Any) -> torch.utils.data.IterableDataset:
        return NumberedStream(stream, self.bilevel_config.domain_column, self.bilevel_config.domain_names)

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        if isinstance(data_collator, DataCollatorWithOrigin):
            return data_collator  # get_train_dataloader has removed the columns inside of it
        return super()._get_collator_with_removed_columns(data_collator, description=description)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Fetch the candidate batches of one optimizer step and select from them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._is_off() or not batches:
            return batches, num_items
        if SAMPLE_ID not in batches[0]:
            raise ValueError(
                "The training batches carry no sample ids: a `get_train_dataloader` of your own made the loader. Have it "
                "call `super().get_train_dataloader()`, or change the sampler or the collator instead."
            )
        origins = [pop_origin(batch) for batch in batches]
        return self._select(batches, origins, num_items)

    # The target dataset ---------------------------------------------------------------------------------------------

    @property
    def _seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _collator_for(self, dataset: Any) -> tuple[Any, Callable]:
        """Prepare a map-style dataset as the Trainer prepares its own: unused columns removed."""
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset), self._collator_beside()
        return dataset, self._get_collator_with_removed_columns(self._collator_beside())

    def _collator_beside(self) -> Callable:
        """Return the collator for other uses than the training loader: a copy if it has a generator, which workers would get too."""
        seed = getattr(self.data_collator, "seed", None)
        return self.data_collator if seed is None else copy.deepcopy(self.data_collator)

    def _endless_loader(self, dataset: Any, batch_size: int, stream: int) -> EndlessLoader:
        """Build a seeded loader of its own over a map-style dataset; ``stream`` tells loaders apart."""
        dataset, collator = self._collator_for(dataset)
        return EndlessLoader(
            dataset,
            collator,
            batch_size,
            seed=derive_seed(self._seed, stream),
            rank=self.args.process_index,
            num_ranks=self.args.world_size,
        )

    def _check_target_dataset(self) -> None:
        """Refuse a target dataset that cannot be trained on like the pool."""
        if self.train_dataset is None:
            return  # a trainer that only evaluates; checked again if it comes to train
        target, name = self.target_dataset, type(self).__name__
        if target is None:
            raise ValueError(
                f"{name} needs `target_dataset`, a small set of samples that show what the model should be good at. "
                "Pass one, for instance 100 to 1,000 clean samples that are not in `train_dataset` or in the test set."
            )
        if isinstance(target, (torch.utils.data.IterableDataset, datasets.IterableDataset)):
            raise ValueError(
                "`target_dataset` is a stream; it is read many times, so it must have a length. Take it into memory, for "
                "instance `datasets.Dataset.from_list(list(stream.take(1000)))`."
            )
        if len(target) == 0:
            raise ValueError("`target_dataset` is empty. Pass at least one sample; a few hundred are usual.")
        if not self._is_stream and len(self.train_dataset) == 0:
            raise ValueError("`train_dataset` is empty.")
        first = next(iter(self.train_dataset)) if self._is_stream else self.train_dataset[0]
        pool_inputs = self._model_inputs(first)
        try:
            target_inputs = self._model_inputs(target[0])
        except KeyError as error:
            has = f" It has {sorted(target[0])}." if isinstance(target[0], Mapping) else ""
            raise ValueError(
                f"The data collator does not find {error} in `target_dataset`.{has} Prepare it as `train_dataset` is prepared; for a "
                "`datasets.Dataset` of texts TRL's SFTTrainer does so by itself."
            ) from error
        if pool_inputs.keys() != target_inputs.keys():
            raise ValueError(
                f"`target_dataset` has the model inputs {sorted(target_inputs)} and `train_dataset` has "
                f"{sorted(pool_inputs)}; they must be the same. Missing in `target_dataset`: "
                f"{sorted(pool_inputs.keys() - target_inputs.keys())}; only there: "
                f"{sorted(target_inputs.keys() - pool_inputs.keys())}. Prepare both with the same function."
            )
        for name, of_pool in pool_inputs.items():
            of_target = target_inputs[name]
            tensors = isinstance(of_pool, torch.Tensor) and isinstance(of_target, torch.Tensor)
            if tensors and of_pool.is_floating_point() != of_target.is_floating_point():
                raise ValueError(
                    f"The collator makes `{name}` of dtype {of_target.dtype} of `target_dataset` and of dtype {of_pool.dtype} of "
                    "`train_dataset`; both must be integers, or neither. Give the columns of both the same names and types: "
                    "Trainer's default collator makes floating-point numbers of a list called `label`, integers of `labels`."
                )
        self._check_labels(target, "target_dataset")
        if not self._is_stream:
            self._check_labels(self.train_dataset, "train_dataset")

    def _model_inputs(self, item: Any) -> Mapping[str, Any]:
        """Collate an item; nothing if that is not a mapping."""
        batch = self._get_collator_with_removed_columns(self._collator_beside())([item])
        return batch if isinstance(batch, Mapping) else {}

    def _check_labels(self, dataset: Any, name: str) -> None:
        """Look for one label that counts: nearly always in the first rows, else in 1,000 rows spread over all."""
        if len(dataset) == 0:
            raise ValueError(f"`{name}` is empty.")
        prepared, collator = self._collator_for(dataset)
        rows = range(0, len(prepared), max(1, len(prepared) // NUM_CHECKED_ROWS))
        for start in range(0, len(rows), 8):
            chunk = rows[start : start + 8]
            with private_randomness(derive_seed(self._seed, start)):
                batch = collator(fetch(prepared, chunk))
            if start == 0 and self._selects_rows():
                pick_rows(batch, [0], len(chunk))  # raises for padding-free collators
                self._check_images(batch, len(chunk))
            labels = batch.get("labels") if isinstance(batch, Mapping) else None
            if isinstance(labels, torch.Tensor) and labels.ndim and len(labels) != len(chunk):
                raise ValueError(
                    f"The collator makes {len(labels)} rows of labels of {len(chunk)} samples of `{name}`. Padding-free and "
                    "flattened batches hold several samples in a row, whose losses cannot be told apart: use a padding collator "
                    "(for SFTTrainer `padding_free=False` and no packing)."
                )
            if labels is None and self.compute_sample_losses is None:
                if not isinstance(batch, Mapping):
                    raise ValueError(
                        f"The collator makes a {type(batch).__name__} of samples of `{name}`, whose losses cannot be read. Make a dict "
                        "with `labels`, or pass `compute_sample_losses=`, (model, batch) -> losses of shape (n,)."
                    )
                raise ValueError(
                    f"`{name}` gives batches without `labels`; they hold {sorted(batch)}. Add a column `labels`, or for "
                    "language models the collator `DataCollatorForLanguageModeling(tokenizer, mlm=False)`."
                )
            if not isinstance(labels, torch.Tensor) or bool((labels != IGNORE_INDEX).any()):
                return
        raise ValueError(
            f"All labels of `{name}` are {IGNORE_INDEX} in {len(rows)} rows spread over it, so nothing is predicted and "
            "there is nothing to learn from. Check the preparation of the labels, a completion-only mask or a truncation "
            "that cuts off the answers for instance."
        )

    def _adds_router_loss(self) -> bool:
        """Say whether training adds the loss that keeps the experts of a mixture busy, which is of a batch and of no sample."""
        if self._is_sft:
            return bool(getattr(self, "aux_loss_enabled", False))
        config = getattr(unwrap(self.model), "config", None)
        configs = (config, getattr(config, "text_config", None))
        return any(getattr(entry, "output_router_logits", False) for entry in configs)

    def _without_router_loss(self) -> str | None:
        """Name what this method trains without it; None if it is in all that is trained."""
        return None

    def _how_to_drop_router_loss(self) -> str:
        return (
            "`router_aux_loss_coef=0.0` in the `SFTConfig`"
            if self._is_sft
            else "`output_router_logits = False` in the model's configuration"
        )

    def _check_losses(self, dataset: Any) -> None:
        """Warn if the losses that samples are judged by are not the loss that the model reports for them."""
        if self._adds_router_loss():
            if left_out_of := self._without_router_loss():
                warnings.warn(
                    f"The auxiliary loss of `{class_of(unwrap(self.model)).__name__}`'s router is of a batch, not of its samples, and is left "
                    f"out of {left_out_of}. Set {self._how_to_drop_router_loss()} to train without it throughout.",
                    stacklevel=5,
                )
            return
        own_loss = (
            self.label_smoother is None and self.compute_loss_func is None and self.compute_sample_losses is None
        )
        if dataset is None or dataset is self.train_dataset and self._is_stream or not own_loss:
            return
        if is_sharded(self.model) or is_partitioned(self.model):
            return  # not in step on all processes, and for ZeRO-3 not by an engine
        if self.is_fsdp_enabled and not self.is_world_process_zero():
            return  # which may get its weights from the first process only when FSDP shards the model
        prepared, collator = self._collator_for(dataset)
        with private_randomness(derive_seed(self._seed), self.args.device), self._scoring(), evaluating(self.model):
            batch = collator(fetch(prepared, range(min(4, len(prepared)))))
            # Not the arguments' device: with `bf16_full_eval` the model moves there only when training starts.
            batch = send_to_device(batch, next(self.model.parameters()).device)
            outputs = self.model(**batch)
            own = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
            judged_by = self._mean_loss(self.model, batch)
        rough = self.accelerator.mixed_precision != "no" or next(self.model.parameters()).dtype != torch.float32
        rough = rough or _multiplies_roughly()
        tolerances = {"rtol": 1e-2, "atol": 1e-3} if rough else {"rtol": 2e-4, "atol": 1e-5}
        agree = torch.isclose(own.float(), judged_by.float(), **tolerances)
        if bool(own.isfinite()) and not agree:  # rows without labels have no loss of their own
            warnings.warn(
                f"`{type(self.model).__name__}` reports a loss of {float(own):.4g} on its first samples and would be "
                f"{self._losses_are_for} a loss of {float(judged_by):.4g}: it weights or adds something of its own. Pass "
                "`compute_sample_losses=`, (model, batch) -> losses of shape (n,), to say what counts.",
                stacklevel=5,
            )

    def _counts_labels(self, inputs: Mapping[str, Any], num_items: Any) -> bool:
        """Say whether the Trainer's number of items is that of the units that losses are of; it counts labels, also several of a row."""
        if num_items is None or not self.model_accepts_loss_kwargs or self.compute_sample_losses is not None:
            return False
        labels = inputs.get("labels")
        return find_head(self.model) in TOKEN_HEADS or labels is None or labels.numel() == len(labels)

    def _check_images(self, batch: Any, num_rows: int) -> None:
        """Refuse a batch whose images cannot be told apart by row."""
        config = getattr(self.model, "config", None)
        token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        if isinstance(token, int) and isinstance(batch, Mapping):
            check_images_of_rows(batch, token, num_rows)

    def _check_num_rows(self, num_losses: int, num_rows: int) -> None:
        """Refuse a batch whose losses are not those of the samples that were fetched for it."""
        if num_losses != num_rows:
            raise ValueError(
                f"A batch of {num_rows} samples gave {num_losses} losses. Padding-free batches hold several samples in a row: use a "
                "padding collator. A collator that leaves samples out must not: filter the dataset before."
            )

    def _check_order_of_rows(self) -> None:
        """Refuse a collator that sorts: which row of a batch is which sample would not be known."""
        dataset, collator = self._collator_for(self.train_dataset)
        items = fetch(dataset, range(min(NUM_TRIED_ROWS, len(dataset))))
        with_ids = DataCollatorWithOrigin(collator)

        def collated(*rows: int) -> tuple[list[int], dict[str, torch.Tensor]]:
            with private_randomness(derive_seed(self._seed), self.args.device):
                batch = with_ids([number_item(items[i], i, None) for i in rows])
            ids = pop_origin(batch).sample_ids.tolist()
            return ids, {k: v for k, v in batch.items() if torch.is_tensor(v) and v.ndim and len(v) == len(rows)}

        def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
            return all(torch.equal(value, b[key]) for key, value in a.items())

        for i in range(1, len(items)):
            try:
                (ids, batch), (_, first), (_, other) = collated(0, i), collated(0), collated(i)
                reversed_ids, reverse = collated(i, 0)
                sorts = (
                    batch and ids == reversed_ids[::-1] == [0, i] and same(batch, reverse) and not same(first, other)
                )
            except Exception:  # a collator that cannot do this says so in training
                return
            if sorts:
                raise ValueError(
                    "The data collator returns rows in an order of its own (it gives the same batch for two samples and for the same "
                    "two the other way round), so it cannot be known which row is which sample. Have it keep the order, or sort the list "
                    "that it is given in place (`features.sort(...)`)."
                )

    def _selects_rows(self) -> bool:
        """Say whether rows of collated batches will be picked."""
        return False

    # The training loop's seams --------------------------------------------------------------------------------------

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        # Entered again by `auto_find_batch_size` and by each trial of a hyperparameter search.
        self._candidate_batch_size = self._of_this_process(self.args.per_device_train_batch_size)
        if self.args.auto_find_batch_size and batch_size is not None:
            self._candidate_batch_size = self._of_this_process(batch_size)
        try:
            if self.train_dataset is not self._prepared_pool:
                self._prepare_pool()
            self._let_model_be_wrapped()
            self._begin_training()
            output = super()._inner_training_loop(batch_size, *args, **kwargs)
        except BaseException:
            self._end_training(failed=True)
            raise
        self._end_training(failed=False)
        return output

    def _of_this_process(self, batch_size: int) -> int:
        """Say how many rows of a batch come to one process."""
        splits = self.accelerator.dataloader_config.split_batches
        return max(1, batch_size // self.args.world_size) if splits else batch_size

    def _let_model_be_wrapped(self) -> None:
        """Have Accelerate wrap the model for training, which it leaves bare where an evaluation has prepared it before.

        Each process would then train a model of its own.
        """
        plain_ddp = self.args.world_size > 1 and not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        if plain_ddp and self.model_wrapped is self.model and not self._is_off():
            for module in self.model.modules():
                vars(module).pop("_is_accelerate_prepared", None)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the method's metrics beside the training loss."""
        if self.is_in_train and "loss" in logs and not self._is_off():
            logs.update(self._bilevel_metrics())
        super().log(logs, *args, **kwargs)

    def _state_of_all_processes(self) -> dict[str, Any]:
        """Collect what must be the same on all processes between two optimizer steps."""
        return {
            # Of a model that is sharded each process has another part.
            "model": {} if self.is_fsdp_enabled else dict(self.model.named_parameters()),
            self.method: {} if self._is_off() else self._shared_state(),
        }

    # Facts ----------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            for name, content in ((CONFIG_NAME, self.bilevel_config.to_dict()), (FACTS_NAME, self.bilevel_facts())):
                (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def bilevel_facts(self) -> dict[str, Any]:
        """Collect what a reader needs to judge or repeat the run, as JSON-compatible values, for the model card."""
        return {
            "method": self.method,
            "trainer": type(self).__name__,
            "config": self.bilevel_config.to_dict(),
            "seed": self._seed,
            "global_step": self.state.global_step,
            "max_steps": self.state.max_steps,
            "world_size": self.args.world_size,
            "candidate_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "num_pool": None if self._is_stream or self.train_dataset is None else len(self.train_dataset),
            "num_target": None if self.target_dataset is None else len(self.target_dataset),
            "domain_names": self.domain_names,
            "versions": versions(),
        }

    def create_model_card(
        self, *args: Any, results: Results | None = None, command: str | None = None, **kwargs: Any
    ) -> None:
        """Write the Trainer's model card and, from the facts of the run, a section about the method and what came out.

        The section has the data, the settings that differ from the defaults, the outcome with pictures (where matplotlib is
        installed; they lie beside the card), results, cost and limits. With the method off, and before there is an outcome, the
        card is the Trainer's alone. ``push_to_hub`` passes ``results`` and ``command`` on.

        Args:
            *args: As for ``Trainer``.
            results: What an evaluation of this run and of its controls measured: arm -> metric -> value, or a list with one value
                for each of several runs, shown as mean ± standard deviation.
            command: What starts the run again, to be shown.
            **kwargs: As for ``Trainer``.
        """
        check_results(results or {})
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero() or self._is_off():
            return
        method = self._method_section()
        if method is None:
            return
        folder, pictures = Path(self.args.output_dir), {}
        for file, (description, draw) in method.plots.items():
            try:
                draw().savefig(folder / file, dpi=120)
            except ImportError:  # without matplotlib the card does with its tables
                continue
            except Exception as error:  # a picture is not worth a run's checkpoint or upload
                logger.warning("The model card does without `%s`, which cannot be drawn: %s", file, error)
                continue
            pictures[file] = description
        given, defaults = self.bilevel_config.to_dict(), self.config_class().to_dict()
        section = model_section(
            method,
            {**self.bilevel_facts(), **self._data_facts()},
            settings={name: (value, defaults[name]) for name, value in given.items() if value != defaults[name]},
            cost=self._cost(),
            pictures=pictures,
            results=results,
            command=command,
        )
        card = folder / "README.md"
        card.write_text(card.read_text(encoding="utf-8").rstrip() + "\n\n" + section, encoding="utf-8")

    def _method_section(self) -> MethodSection | None:
        """Say what the method did, for the model card; None before there is an outcome."""
        raise NotImplementedError

    def _data_facts(self) -> dict[str, Any]:
        """Say where the pool and the target dataset come from, as far as they know."""
        data = {"pool": self._pool_as_given(), "target": self.target_dataset}
        return {
            name: {**dataset_facts(dataset), "fingerprint": getattr(dataset, "_fingerprint", None)}
            for name, dataset in data.items()
        }

    def _cost(self) -> dict[str, str]:
        """Say what the run cost, for the model card; what is not known is left out."""
        step, cost = self.state.global_step, {}
        if step:
            rows = self._candidate_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            load = Load(rows, step, self._candidate_batch_size, self.args.world_size)
            cost = {"Optimizer steps": f"{step:,}", "Rows of a step, before any selection": f"{rows:,}"}
            passes = self._forward_passes(load) if step == self.state.max_steps else None
            if passes is not None:
                cost["Forward passes of one row, by the settings (forward and backward count 3)"] = f"{passes:,.0f}"
                cost["The same over the plain Trainer's for as many steps"] = f"{passes / load.plain_passes:.2f}"
        runtimes = [entry["train_runtime"] for entry in self.state.log_history if "train_runtime" in entry]
        if runtimes:
            cost["Training, evaluations in it included"] = f"{runtimes[-1]:,.1f} s"
        cost["Device"] = torch.cuda.get_device_name() if self.args.device.type == "cuda" else self.args.device.type
        return cost

    def _forward_passes(self, load: Load) -> float | None:
        """Count the forward passes of a whole run; None where that is not known."""
        return None

    def _logged(self, *names: str) -> dict[str, tuple[list[int], list[float]]]:
        """Collect the steps and values of metrics that were logged, by metric."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for entry in self.state.log_history:
            for name, value in entry.items():
                if name.startswith(names) and math.isfinite(value):
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(entry["step"])
                    values.append(value)
        return found

    def _num_kept(self, fraction: float, num_ranked: int) -> int:
        """Turn a fraction of the pool into a number of rows, of which ``num_ranked`` can be told apart."""
        if not 0 < fraction <= 1:
            raise ValueError(f"`fraction` must be in (0, 1], got {fraction}.")
        num_pool = len(self.train_dataset)
        num = num_selected(fraction, num_pool)
        if num > num_ranked:
            raise ValueError(
                f"`fraction={fraction}` of {num_pool} rows is {num}, and the run has seen only {num_ranked} of them. Lower "
                f"`fraction` to at most {math.floor(1000 * num_ranked / num_pool) / 1000}, or train for more steps."
            )
        return num

    def _subset_of_pool(
        self,
        ids: torch.Tensor,
        facts: dict[str, Any],
        ranking: tuple[str, torch.Tensor, torch.Tensor] | None = None,
        **columns: torch.Tensor,
    ) -> SelectedSubset:
        """Make an artefact of rows of the pool, with what is needed to judge or repeat the selection.

        Args:
            ids: The rows, on the CPU, in the order wanted.
            facts: What the method adds to ``bilevel_facts``.
            ranking: What ranked the pool: its name, the rows that it ranked, and their values.
            **columns: As for ``SelectedSubset``.

        Returns:
            The subset, with domains where they are known.
        """
        pool, num_pool = self._pool_as_given(), len(self.train_dataset)
        facts = {
            **self.bilevel_facts(),
            "model": self._model_name(),
            "dataset": dataset_facts(pool),
            "metrics": self._last_metrics(),
            **facts,
        }
        if ranking is not None:
            name, ranked, values = ranking
            facts["ranking"] = ranking_facts(name, values, torch.isin(ranked, ids))
        names = None
        if self._domain_ids is not None:
            names, columns["domain_ids"] = list(map(str, self.domain_names)), self._domain_ids[ids]
            counts = (torch.bincount(part, minlength=len(names)) for part in (self._domain_ids, columns["domain_ids"]))
            facts["domains"] = dict(
                zip(("names", "pool", "subset"), [names, *(c.tolist() for c in counts)], strict=True)
            )
        columns |= {"fingerprint": getattr(pool, "_fingerprint", None), "rows_checksum": rows_checksum(pool)}
        return SelectedSubset(ids, num_pool, domain_names=names, facts=facts, **columns)

    def _model_name(self) -> str:
        """Name the model as a reader elsewhere can: a local folder by its own name only, one without a name by its class."""
        name = getattr(getattr(self.model, "config", None), "_name_or_path", "") or class_of(self.model).__name__
        if cached := re.search(r"models--(.+?)[/\\]snapshots[/\\]", name):  # what a download from the Hub returns
            return cached[1].replace("--", "/")
        is_local = (
            Path(name).is_absolute() or Path(name).exists() or name.startswith((".", "~")) or name.count("/") > 1
        )
        return Path(name).name if is_local else name

    def _last_metrics(self) -> dict[str, float]:
        """Collect the last value of everything that evaluations measured, without timings."""
        return {
            key: value
            for entry in self.state.log_history
            for key, value in entry.items()
            if key.startswith("eval_") and not key.endswith(("_runtime", "_per_second"))
            if isinstance(value, (int, float)) and math.isfinite(value)
        }


def _is_of_trl(parent: type) -> bool:
    return parent.__module__.startswith("trl.")


def _multiplies_roughly() -> bool:
    """Say whether float32 matrices are multiplied in a lower precision, TF32 for instance."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by PyTorch's newer settings, which the older one refuses to read
        return True
