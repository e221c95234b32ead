"""From a recipe to a trained model and the selected subset."""

import dataclasses
import logging
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from huggingface_hub import get_token
from huggingface_hub.utils import validate_repo_id
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

from hf_bilevel.commands.arguments import (
    BladeRunArguments,
    CoresetRunArguments,
    DataArguments,
    MixtureRunArguments,
    ModelArguments,
    RunArguments,
    SubsetRunArguments,
)
from hf_bilevel.commands.models import build_model, build_other_model, load_config_and_processor
from hf_bilevel.commands.plan import describe
from hf_bilevel.commands.prepare import PreparedData, prepare
from hf_bilevel.commands.recipe import parse
from hf_bilevel.commands.sources import AnyDataset, explain_split, load_datasets
from hf_bilevel.identity import rows_checksum
from hf_bilevel.subset import SelectedSubset, dataset_facts
from hf_bilevel.trainers.blade import BladeConfig, BladeMixin, BladeTrainer
from hf_bilevel.trainers.bros import BrosConfig, BrosMixin, BrosTrainer
from hf_bilevel.trainers.config import BilevelConfig
from hf_bilevel.trainers.coreset import CoresetConfig, CoresetMixin, CoresetTrainer
from hf_bilevel.trainers.mixture import MIXTURE_NAME, MixtureConfig, MixtureTrainer

SUBSET_FOLDER = "selected_subset"
EARLIER_FOLDER = "_of_an_earlier_run"
PACKAGE = Path(__file__).parents[1]

logger = logging.getLogger(__name__)


class Command(NamedTuple):
    """What a command trains with.

    Attributes:
        trainer: The trainer.
        config: Its config.
        arguments: What to do with the result.
        help: One line.
    """

    trainer: type[Trainer]
    config: type[BilevelConfig]
    arguments: type[RunArguments]
    help: str


COMMANDS = {
    "blade": Command(
        BladeTrainer,
        BladeConfig,
        BladeRunArguments,
        "train on the samples or tokens that the model can still learn from",
    ),
    "bros": Command(BrosTrainer, BrosConfig, SubsetRunArguments, "learn a weight for every sample, and train with it"),
    "mixture": Command(
        MixtureTrainer, MixtureConfig, MixtureRunArguments, "learn how much of each domain to train on"
    ),
    "coreset": Command(
        CoresetTrainer, CoresetConfig, CoresetRunArguments, "find a subset of a fixed size, and train on it"
    ),
}


def run(name: str, argv: list[str] | None = None) -> Trainer | None:
    """Do what a recipe says.

    Args:
        name: One of ``COMMANDS``.
        argv: ``RECIPE.yaml [--field value ...]``; that of the process if None.

    Returns:
        The trainer after training, None after a dry run.

    A setting, or a checkpoint, that is refused ends the process, with the reason (``SystemExit``).
    """
    command, prog = COMMANDS[name], f"hf-bilevel {name}"
    classes = (ModelArguments, DataArguments, command.arguments, TrainingArguments, command.config)
    model, data, job, args, config = parse(*classes, argv=argv, prog=prog)
    with _refusals_without_traceback(prog):
        args = _check_settings(model, data, job, args, config)
        set_seed(args.seed)
        model_config, processor = load_config_and_processor(model)
        with args.main_process_first(desc="loading and encoding the datasets"):
            pool, parts, rows = load_datasets(data, args.seed if args.data_seed is None else args.data_seed)
            domains = config.domain_column
            prepared = prepare(parts, rows, model.task, data, processor, model_config, domains)
        config = dataclasses.replace(config, domain_column=prepared.domain_column)
        if args.process_index == 0:
            _explain(data, prepared)
        if job.dry_run:
            if args.process_index == 0:
                empty = build_model(model, model_config, prepared.label_names, weights=False)
                print(describe(name, (model, data, job, args, config), prepared.parts, empty))
            return None
        trainer = _make_trainer(command, job, model, args, config, prepared, processor, model_config)
    with _refusals_without_traceback(prog, of_others=False):
        _train(trainer, args, getattr(job, "mixture_file", None))
    subset = None
    if prepared.rows is not None:
        subset = _save_subset(trainer, job, pool, prepared.rows, prog)
    elif trainer.is_world_process_zero():
        logger.warning(
            "No subset is saved: with `%s` no rows are told apart.", "streaming" if data.streaming else "pack"
        )
    if subset is None and trainer.is_world_process_zero():
        _put_aside([Path(args.output_dir) / SUBSET_FOLDER])
    if args.push_to_hub:
        trainer.push_to_hub()
    if subset is not None and job.push_subset:
        subset.push_to_hub(job.push_subset, pool=pool, token=args.hub_token)
    return trainer


@contextmanager
def _refusals_without_traceback(prog: str, of_others: bool = True) -> Iterator[None]:
    """Show the user what was refused and why, without fifty lines of where; while training only what this package refuses."""
    try:
        yield
    except ValueError as error:
        *_, raised_in = traceback.extract_tb(error.__traceback__)
        if not of_others and not Path(raised_in.filename).is_relative_to(PACKAGE):
            raise
        raise SystemExit(f"{prog}: {error}") from error


def _check_settings(
    model: ModelArguments, data: DataArguments, job: RunArguments, args: TrainingArguments, config: BilevelConfig
) -> TrainingArguments:
    """Refuse what cannot work before anything is loaded, and set what follows from the rest."""
    num_started = int(os.environ.get("WORLD_SIZE", 1))
    if num_started > args.world_size:
        raise ValueError(
            f"{num_started} processes were started, and each would train for itself, since there are no devices for them. On CPUs "
            "add `--use_cpu`."
        )
    if data.streaming and isinstance(config, CoresetConfig):
        raise ValueError(
            "No coreset can be chosen of a stream: drop `streaming`, or choose among the rows of a part of it."
        )
    if data.streaming and args.max_steps <= 0:
        raise ValueError("A stream has no length that epochs could be counted by: set `max_steps`.")
    if job.push_subset and (data.streaming or data.pack):
        raise ValueError(
            f"`push_subset` uploads rows of `train_dataset`, and with `{'streaming' if data.streaming else 'pack'}` none are told "
            "apart. Drop one of them."
        )
    if job.push_subset:
        validate_repo_id(job.push_subset)
        if "/" not in job.push_subset:
            raise ValueError(
                f"`push_subset: {job.push_subset}` must be `namespace/name`, your user name or an organisation first."
            )
        if args.process_index == 0 and (args.hub_token or get_token()) is None and not job.dry_run:
            raise ValueError(
                "There is no token for `push_subset`. Run `hf auth login`, or set the environment variable HF_TOKEN."
            )
    if getattr(config, "reference", None) == "static" and job.reference_model is None:
        raise ValueError(
            "`reference: static` compares with a frozen model: set `reference_model` to its id or folder, or use "
            "`reference: dynamic`."
        )
    if model.task == "image_classification":
        args.remove_unused_columns = False  # pixels are made of images when a row is read
    if getattr(job, "trl", False):
        from hf_bilevel.commands.sft import sft_arguments

        if model.task != "causal_lm":
            raise ValueError(f"`trl` trains causal language models, and the task is `{model.task}`. Drop `trl`.")
        args = sft_arguments(args)
    return args


def _explain(data: DataArguments, prepared: PreparedData) -> None:
    explain_split(data)
    for name, num in prepared.num_dropped.items():
        if num:
            logger.warning(
                "%d rows of `%s_dataset` were left out: they have no token to train on within `max_length=%d`.",
                num,
                name,
                data.max_length,
            )


def _make_trainer(
    command: Command,
    job: RunArguments,
    model: ModelArguments,
    args: TrainingArguments,
    config: BilevelConfig,
    prepared: PreparedData,
    processor: Any,
    model_config: Any,
) -> Trainer:
    trainer_class = command.trainer
    if getattr(job, "trl", False):
        from hf_bilevel.commands.sft import BladeSFTTrainer as trainer_class
    if getattr(model_config, "pad_token_id", None) is None and hasattr(processor, "pad_token_id"):
        model_config.pad_token_id = processor.pad_token_id  # a classifier looks for the last token before it
    if getattr(job, "reference_model", None) is not None and config.reference != "static":
        logger.warning("`reference_model` is ignored with `reference: %s`.", config.reference)
        job = dataclasses.replace(job, reference_model=None)
    others = {
        name: build_other_model(name, getattr(job, name), model, processor, prepared.label_names)
        for name in ("reference_model", "search_model")
        if getattr(job, name, None) is not None
    }
    if getattr(job, "mixture_file", None) is not None:
        others["mixture"] = str(Path(job.mixture_file).expanduser())
    return trainer_class(
        model=build_model(model, model_config, prepared.label_names),
        args=args,
        train_dataset=prepared.parts["train"],
        target_dataset=prepared.parts.get("target"),
        eval_dataset=prepared.parts.get("eval"),
        data_collator=prepared.collator,
        processing_class=processor,
        compute_metrics=None if prepared.label_names is None else _accuracy,
        bilevel_config=config,
        **others,
    )


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


def _train(trainer: Trainer, args: TrainingArguments, mixture_file: str | None) -> None:
    resume = args.resume_from_checkpoint
    resume = str(resume).lower() == "true" or resume  # "true" is how a command line says True
    before = {} if resume else _results_of_a_run(Path(args.output_dir), mixture_file)
    result = trainer.train(resume_from_checkpoint=resume if resume else None)
    if trainer.is_world_process_zero():
        _put_aside([path for path, time in before.items() if path.exists() and path.stat().st_mtime_ns == time])
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_state()


def _save_subset(
    trainer: Trainer, job: RunArguments, pool: datasets.Dataset, rows: np.ndarray, prog: str
) -> SelectedSubset | None:
    """Save the selected subset, in rows of the pool as it was loaded, and return it on the first process."""
    try:
        if isinstance(trainer, CoresetMixin):
            subset = trainer.selected_subset()
        else:
            fraction = job.subset_fraction * _num_seen(trainer) / len(trainer.train_dataset)
            subset = trainer.selected_subset(fraction=fraction)
    except (RuntimeError, ValueError) as error:  # switched off, or a domain has too few rows
        if job.push_subset:
            raise SystemExit(f"{prog}: the model is saved, and there is no subset to upload: {error}") from error
        logger.warning("No subset is saved: %s", error)
        return None
    if not trainer.is_world_process_zero():
        return None
    subset = in_rows_of(pool, subset, rows)
    subset.save(Path(trainer.args.output_dir) / SUBSET_FOLDER)
    return subset


def _results_of_a_run(folder: Path, mixture_file: str | None) -> dict[Path, int]:
    """List what a run leaves beside its model and checkpoints, and when it did: metrics, a mixture, the pictures of a card."""
    patterns = [MIXTURE_NAME, "*_results.json", *(f"{method}_*.png" for method in COMMANDS)]
    found = {path.resolve(): path.stat().st_mtime_ns for pattern in patterns for path in sorted(folder.glob(pattern))}
    if mixture_file is not None:  # which this run is trained with
        found.pop(Path(mixture_file).expanduser().resolve(), None)
    return found


def _put_aside(paths: list[Path]) -> None:
    """Move what an earlier run left: beside this run's model it would be taken for what that was trained on, or came to.

    Into a folder with a name that the Trainer does not upload.
    """
    for path in paths:
        if path.exists():
            aside = path.with_name(EARLIER_FOLDER) / path.name
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
            path.rename(aside)
            logger.warning("`%s` is of an earlier run; it is `%s` now.", path, aside)


def _num_seen(trainer: Trainer) -> int:
    """Count the rows that the run can say something of."""
    if isinstance(trainer, BladeMixin) and trainer.sample_tally is not None:
        return int((trainer.sample_tally.state_dict()["offered"] > 0).sum())
    return len(trainer.sample_weights.ids) if isinstance(trainer, BrosMixin) else len(trainer.train_dataset)


def in_rows_of(pool: AnyDataset, subset: SelectedSubset, rows: np.ndarray) -> SelectedSubset:
    """Renumber a subset of some rows of a pool by the rows of the pool.

    Args:
        pool: The pool as it was loaded.
        subset: A subset of ``pool.select(rows)``, encoded or not.
        rows: Rows of the pool.

    Returns:
        The subset, of which ``to_dataset(pool)`` and ``push_to_hub(pool=pool)`` take the rows as they were before encoding.

    Example:
        >>> pool = datasets.Dataset.from_dict({"text": list("abc")})
        >>> subset = SelectedSubset(torch.tensor([1]), num_pool=2)
        >>> in_rows_of(pool, subset, np.array([0, 2])).to_dataset(pool)["text"][:]
        ['c']
    """
    return dataclasses.replace(
        subset,
        ids=torch.from_numpy(rows)[subset.ids],
        num_pool=len(pool),
        fingerprint=pool._fingerprint,
        rows_checksum=rows_checksum(pool),
        facts={**subset.facts, "dataset": dataset_facts(pool)},
    )
