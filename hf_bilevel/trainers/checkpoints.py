"""Checkpoints that hold a method's state beside the optimizer's, and are resumed from only when they are whole."""

import json
import logging
import os
import platform
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.constants import FSDP_MODEL_NAME
from accelerate.utils.constants import OPTIMIZER_NAME as FSDP_OPTIMIZER_NAME
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from hf_bilevel.identity import is_dataset_of, rows_checksum
from hf_bilevel.trainers.config import BilevelConfig

STATE_NAME = "bilevel_state.pt"

logger = logging.getLogger(__name__)


class CheckpointMixin:
    """Saving, finding and resuming checkpoints; a part of ``BilevelMixin``.

    A checkpoint is whole if all its files are: ``trainer_state.json``, which is written last, the method's state, which is
    written beside and then moved into place, and those of optimizer, scheduler and random numbers. Upstream resumes without a
    missing optimizer or random state, and without ``trainer_state.json`` from step 0, in each case with the trained weights
    and without a word.
    """

    method: ClassVar[str]
    bilevel_config: BilevelConfig
    accelerator: Accelerator
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _resumed_state: dict[str, Any] | None = None  # while training begins

    # What a method defines ------------------------------------------------------------------------------------------

    def _is_off(self) -> bool:
        """Say whether the settings make this the plain Trainer; then nothing below touches the run."""
        raise NotImplementedError

    def _shared_state(self) -> dict[str, Any]:
        """Collect the state that all processes have alike; every process calls it, in step."""
        return {}

    def _rank_state(self) -> dict[str, Any]:
        """Collect the state of this process."""
        return {}

    def _load_state(self, shared: dict[str, Any], rank: dict[str, Any]) -> None:
        """Take up what ``_shared_state`` and ``_rank_state`` collected."""

    @property
    def _keeps_state(self) -> bool:
        """Say whether this process wants what all collect together: to write it, or to compare it."""
        return self.args.should_save or self.bilevel_config.check_processes

    # Finding --------------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, as ``Trainer.train``.

        Args:
            resume_from_checkpoint: A checkpoint's path, or True for the newest one in ``output_dir`` that is whole.
            trial: As for ``Trainer``.
            ignore_keys_for_eval: As for ``Trainer``.

        Returns:
            The Trainer's output.

        If no checkpoint is whole, or the given one is not or does not belong to this run, nothing is changed and a
        ``ValueError`` says why.
        """
        if resume_from_checkpoint is True and not self._is_off():
            resume_from_checkpoint = self._newest_whole_checkpoint()
        if resume_from_checkpoint and not self._is_off():
            self._resumed_state = self._together(lambda: self._read_state(resume_from_checkpoint))
        try:
            return super().train(
                resume_from_checkpoint=resume_from_checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
            )
        finally:
            self._resumed_state = None

    def _newest_whole_checkpoint(self) -> str:
        """Find the newest checkpoint that is whole on all processes, or say what is wrong with each."""
        whole, reasons = self._whole_checkpoints()
        if whole:
            return str(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{whole[0]}")
        found = " ".join(reasons) if reasons else "There is none."
        raise ValueError(f"No checkpoint in `{self.args.output_dir}` can be resumed from. {found}")

    def _whole_checkpoints(self) -> tuple[list[int], list[str]]:
        """Find the steps of checkpoints that are whole on all processes, the newest first, and why others are not."""
        names = (path.name for path in Path(self.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir())
        steps = [int(step) for step in (name.rsplit("-", 1)[1] for name in names) if step.isdigit()]
        whole, reasons = [], []
        for step in sorted(steps, reverse=True):
            checkpoint = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            try:
                self._read_state(checkpoint)
                whole.append(step)
            except ValueError as error:
                reasons.append(str(error))
                logger.warning("Skipping a checkpoint: %s", error)
        if self.args.world_size > 1:
            on_each = gather_object([whole])
            whole = [step for step in whole if all(step in found for found in on_each)]
        return whole, reasons

    def _together(self, read: Callable[[], Any]) -> Any:
        """Read on all processes; if one of them cannot, none goes on, or the others would wait for it for ever."""
        found, problem = None, None
        try:
            found = read()
        except ValueError as error:
            problem = str(error)
        problems = gather_object([problem]) if self.args.world_size > 1 else [problem]
        for text in problems:
            if text is not None:
                raise ValueError(text)
        return found

    def _read_state(self, checkpoint: str | os.PathLike) -> dict[str, Any]:
        """Read and check the method's state of a checkpoint, before anything is changed by it."""
        checkpoint = Path(checkpoint)
        if not checkpoint.is_dir():
            raise ValueError(f"`{checkpoint}` is not a checkpoint folder.")
        path, trainer_state = checkpoint / STATE_NAME, checkpoint / TRAINER_STATE_NAME
        try:
            json.loads(trainer_state.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"`{trainer_state}` is missing: the checkpoint was not written to its end.") from None
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"`{trainer_state}` cannot be read ({error}).") from error
        if not path.is_file():
            raise ValueError(
                f"`{path}` is missing, so the run cannot be continued as it was. The checkpoint was written with "
                f"`save_only_model=True` or by another trainer; resume from a full checkpoint of {type(self).__name__}, "
                "or start a new run from its weights."
            )
        try:
            # mmap: a reference model's weights stay on the disk until they are copied into place.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            method, ranks = state["method"], state["ranks"]
            kinds = {"method": str, "ranks": list, "shared": dict, "config": dict}
            if not all(isinstance(state[name], kind) for name, kind in kinds.items()):
                raise TypeError("it does not hold what a checkpoint does")
        except Exception as error:  # torch.load raises a dozen kinds for a damaged file
            raise ValueError(
                f"`{path}` cannot be read ({type(error).__name__}: {error}). Nothing was changed; resume from another "
                "checkpoint."
            ) from error
        if method != self.method:
            raise ValueError(f"`{path}` was written by the method {method!r}, not by {self.method!r}.")
        if any(ranks) and len(ranks) != self.args.world_size:
            raise ValueError(
                f"`{path}` holds the state of {len(ranks)} processes, this run has {self.args.world_size}. Resume with "
                f"{len(ranks)} processes."
            )
        files = self._optimizer_files(checkpoint)
        if len(ranks) == self.args.world_size:  # with another number the random numbers are others in any case
            files.append("rng_state.pth" if len(ranks) == 1 else f"rng_state_{self.args.process_index}.pth")
        for name in files:
            if not zipfile.is_zipfile(
                checkpoint / name
            ):  # as torch.save writes; the index of a zip file is at its end
                raise ValueError(
                    f"`{checkpoint / name}` is missing or torn: the checkpoint was not written to its end."
                )
        return state

    def _optimizer_files(self, checkpoint: Path) -> list[str]:
        """Name the files of optimizer and scheduler, and of a model in parts, and refuse folders of parts that are not whole."""
        if self.is_deepspeed_enabled:
            return self._files_of_engine(checkpoint)
        if not self.is_fsdp_enabled:
            return [OPTIMIZER_NAME, SCHEDULER_NAME]
        if self.accelerator.state.fsdp_plugin.state_dict_type.name == "FULL_STATE_DICT":
            return [SCHEDULER_NAME, f"{FSDP_MODEL_NAME}.bin", f"{FSDP_OPTIMIZER_NAME}.bin"]
        for name in (f"{FSDP_MODEL_NAME}_0", f"{FSDP_OPTIMIZER_NAME}_0"):
            if not (checkpoint / name / ".metadata").is_file():  # which is written when all parts are
                raise ValueError(
                    f"`{checkpoint / name}` is missing or torn: the checkpoint was not written to its end."
                )
        return [SCHEDULER_NAME]

    def _files_of_engine(self, checkpoint: Path) -> list[str]:
        """Name the files that DeepSpeed has written for its engine."""
        latest = checkpoint / "latest"
        if not latest.is_file():
            raise ValueError(f"`{latest}` is missing: the checkpoint was not written to its end.")
        folder = checkpoint / latest.read_text(encoding="utf-8").strip()
        rank = f"zero_pp_rank_{self.args.process_index}_"
        parts = [path for path in folder.glob("*_states.pt") if rank in path.name or "zero_pp_rank" not in path.name]
        if not any(path.name.endswith("optim_states.pt") for path in parts):
            raise ValueError(f"`{folder}` lacks the optimizer state of process {self.args.process_index}.")
        # The scheduler is in the engine where DeepSpeed's own is used.
        scheduler = [SCHEDULER_NAME] if (checkpoint / SCHEDULER_NAME).exists() else []
        return [*scheduler, *(str(path.relative_to(checkpoint)) for path in sorted(parts))]

    # Writing --------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save and not self._is_off():
            # What a run left there that was killed must not look whole before it is.
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._is_off():
            return
        shared, rank = self._shared_state(), self._rank_state()
        ranks = gather_object([rank]) if self.args.world_size > 1 else [rank]
        if self.args.should_save:
            state = {
                **{"method": self.method, "config": self.bilevel_config.to_dict(), "versions": versions()},
                **{"data": self._data_identity(), "stream_position": self._stream_position()},
                **{"shared": shared, "ranks": ranks},
            }
            write_state(state, Path(output_dir) / STATE_NAME)

    def _stream_position(self) -> tuple[int, int] | None:
        """Say how many passes over a stream are done, and how many batches of the next; another ``max_steps`` does not change it."""
        if has_length(self.train_dataset):
            return None
        passes, share = divmod(self.state.epoch or 0.0, 1)
        return int(passes), round(share * self.state.max_steps * self.args.gradient_accumulation_steps)

    def _data_identity(self) -> dict[str, dict[str, Any]]:
        """Say what tells one pool, or target dataset, from another; streams have nothing of the kind."""
        data = {"train_dataset": self.train_dataset, "target_dataset": self.target_dataset}
        return {
            name: {
                "num": len(dataset),
                "fingerprint": getattr(dataset, "_fingerprint", None),
                "rows_checksum": rows_checksum(dataset),
            }
            for name, dataset in data.items()
            if has_length(dataset) and not isinstance(dataset, datasets.IterableDataset)
        }

    # Resuming -------------------------------------------------------------------------------------------------------

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        is_off, state = self._is_off(), None
        if checkpoint is not None and (not is_off or (Path(checkpoint) / STATE_NAME).is_file()):
            state = self._resumed_state if self._resumed_state is not None else self._read_state(checkpoint)
            self._check_resumed(checkpoint, state)
        super()._load_optimizer_and_scheduler(checkpoint)
        if state is None or is_off:
            return
        self._check_data(checkpoint, state.get("data", {}))
        self._say_what_changed(state["config"])
        if (before := state.get("versions", versions())) != versions():
            logger.warning("Versions changed since the checkpoint: %s, now %s.", before, versions())
        ranks = state["ranks"]
        self._load_state(state["shared"], ranks[self.args.process_index] if any(ranks) else {})

    def _init_training_state(
        self, max_steps: int, num_update_steps: int, num_epochs: int, *args: Any
    ) -> tuple[int, int]:
        # A run that was killed after its last checkpoint is over. Where ``max_steps`` ends within an epoch, transformers 5.23
        # would take one step more.
        begins_at = super()._init_training_state(max_steps, num_update_steps, num_epochs, *args)
        if self.state.global_step and not self._is_off() and not has_length(self.train_dataset):
            # A stream: upstream counts one epoch of ``max_steps``, and would skip more batches than a pass has.
            passes, in_pass = (self._resumed_state or {}).get("stream_position") or self._stream_position()
            begins_at = passes, 0 if self.args.ignore_data_skip else in_pass
        is_over = self.state.global_step >= self.state.max_steps and not self._is_off()
        return (num_epochs, 0) if is_over else begins_at

    def _check_data(self, checkpoint: str, before: dict[str, dict[str, Any]]) -> None:
        now = self._data_identity()
        for name in [name for name in before if name in now]:
            if before[name]["num"] == now[name]["num"] and is_dataset_of(
                getattr(self, name), before[name]["fingerprint"], before[name].get("rows_checksum")
            ):
                continue
            if name == "train_dataset" and before[name]["num"] != now[name]["num"]:
                raise ValueError(
                    f"`{checkpoint}` is of a run on {before[name]['num']} samples, and `train_dataset` has {now[name]['num']}: what "
                    "was learned about a sample would be taken for another's. Prepare the pool in the same way, or start a new "
                    "run from the checkpoint's weights."
                )
            kept = " What was learned of single samples is kept by their places: they must be in the same order."
            more = kept if name == "train_dataset" else ""
            logger.warning("`%s` changed since the checkpoint: %s, now %s.%s", name, before[name], now[name], more)

    def _check_resumed(self, checkpoint: str, state: dict[str, Any]) -> None:
        """Refuse the state of a run that this one cannot continue, before anything is loaded."""

    def _say_what_changed(self, config_before: dict[str, Any]) -> None:
        config = self.bilevel_config.to_dict()
        changed = [key for key, value in config.items() if config_before.get(key) != value]
        if changed:
            before, now = ({key: source.get(key) for key in changed} for source in (config_before, config))
            logger.warning("The bilevel settings changed since the checkpoint: %s, now %s.", before, now)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._keys_were_renamed = False
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._reload_if_renamed(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._keys_were_renamed = False
        super()._load_best_model()
        self._reload_if_renamed(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        self._keys_were_renamed = bool(load_result.missing_keys) and bool(load_result.unexpected_keys)
        if not self._keys_were_renamed:
            super()._issue_warnings_after_load(load_result)

    def _reload_if_renamed(self, checkpoint: str) -> None:
        """Load a checkpoint whose keys differ from the model's, which upstream skips with a warning.

        In transformers 5.23 ``save_pretrained`` writes some models (ViT) under their older names, which
        ``from_pretrained`` translates and ``Trainer`` does not: it would resume from fresh weights.
        """
        if self._keys_were_renamed:
            weights = type(self.model).from_pretrained(checkpoint, dtype=self.model.dtype).state_dict()
            self.model.load_state_dict(weights)


def write_state(state: dict[str, Any], path: Path) -> None:
    """Write a file of tensors that is there whole or not at all, however the process ends.

    Args:
        state: What ``torch.load(weights_only=True)`` reads.
        path: Where to; an older file there stays until the new one is written.

    Raises:
        OSError: If it cannot be written, for instance on a full disk; an older file is untouched.
    """
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)  # what a killed run left, or a link to somewhere else
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save has errors of its own for a full disk
        partial.unlink(missing_ok=True)
        raise OSError(
            f"`{path}` could not be written ({error}). Earlier checkpoints are untouched; make room, and resume."
        ) from error


def versions() -> dict[str, str]:
    """Name the versions of Python and of the packages that a run depends on."""
    found = {"python": platform.python_version()}
    for name in ("hf_bilevel", "transformers", "datasets", "accelerate", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # used from a folder; no reason to lose a checkpoint
            found[name] = "not installed"
    return found
