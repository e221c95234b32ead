"""A checkpoint is resumed from only if it is whole and belongs to the run; what fails leaves earlier ones as they were."""

import logging
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_contract import METHODS, build
from tiny import make_dataset, make_trainer, parameters_of
from transformers import Trainer, set_seed

from hf_bilevel import BladeConfig, BladeTrainer, MixtureConfig, MixtureTrainer
from hf_bilevel.trainers.checkpoints import write_state

LIMITS = resource.getrlimit(resource.RLIMIT_FSIZE)  # of the size of a file: beyond it writing fails as on a full disk
WITHOUT_CORESET = [method for method in METHODS if method != "coreset"]

pytestmark = pytest.mark.filterwarnings("ignore:The subspaces of")  # a few steps cannot cover anything


def make(folder: Path, method: str = "blade", **kwargs: Any) -> Trainer:
    trainer = build(method, "vit", folder, save_strategy="steps", save_steps=2, **kwargs)
    set_seed(11)
    return trainer


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "torn":
        path.write_bytes(content[: len(content) // 2])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    trainer = make(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return parameters_of(trainer)


@pytest.mark.parametrize("how", ["missing", "torn"])
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "bilevel_state.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_the_newest_whole_checkpoint_is_taken(
    name: str, how: str, whole: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path).train()
    spoil(tmp_path / "checkpoint-6" / name, how)
    with pytest.raises(ValueError, match=f"checkpoint-6/{name}` (is missing|cannot be read|is missing or torn)"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    resumed = make(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hf_bilevel"):
        resumed.train(resume_from_checkpoint=True)
    assert f"Skipping a checkpoint: `{tmp_path}/checkpoint-6/{name}`" in caplog.text
    assert torch.equal(parameters_of(resumed), whole)


def test_a_checkpoint_that_is_written_again_is_not_whole_meanwhile(tmp_path: Path) -> None:
    make(tmp_path).train()
    again = make(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    again._save_optimizer_and_scheduler = fail
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert (tmp_path / "checkpoint-6" / "bilevel_state.pt").exists(), "of the first run"
    assert make(tmp_path)._newest_whole_checkpoint() == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_over_takes_no_further_step(method: str, tmp_path: Path) -> None:
    """Killed after its last checkpoint, in the middle of an epoch: upstream would take one step more."""
    first = make(tmp_path, method, max_steps=6, logging_steps=1, lr_scheduler_type="constant")
    first.train()
    again = make(tmp_path, method, max_steps=6, logging_steps=1, lr_scheduler_type="constant")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6 and first.state.epoch % 1, "it does not end with an epoch"
    assert torch.equal(parameters_of(again), parameters_of(first))
    logged = [[entry for entry in t.state.log_history if "loss" in entry] for t in (first, again)]
    assert logged[0] == logged[1] and len(logged[0]) == 6


@pytest.mark.parametrize("method", METHODS)
def test_a_full_disk_is_said_and_earlier_checkpoints_stay(method: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, method)
    identity, steps = trainer._data_identity, []

    def fill() -> dict[str, Any]:  # called just before the state is written
        steps.append(trainer.state.global_step)
        if steps[-1] == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, LIMITS[1]))
        return identity()

    trainer._data_identity = fill
    try:
        with pytest.raises(OSError, match=r"checkpoint-4/bilevel_state.pt` could not be written .*make room"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, LIMITS)
    assert steps == [2, 4] and not list((tmp_path / "checkpoint-4").glob("bilevel_state.*"))
    resumed = make(tmp_path, method)
    assert resumed._newest_whole_checkpoint() == str(tmp_path / "checkpoint-2")
    resumed.train(resume_from_checkpoint=True)
    uninterrupted = make(tmp_path / "whole", method)
    uninterrupted.train()
    assert torch.equal(parameters_of(resumed), parameters_of(uninterrupted))


def test_a_place_that_cannot_be_written_leaves_earlier_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").write_text("a file, where a folder must go")
    with pytest.raises(OSError, match="checkpoint-4"):
        make(tmp_path).train()
    assert make(tmp_path)._newest_whole_checkpoint() == str(tmp_path / "checkpoint-2")


def test_a_state_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    write_state({"step": 1}, path)
    (tmp_path / "elsewhere").write_text("of somebody else")
    (tmp_path / "state.partial").symlink_to(tmp_path / "elsewhere")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, LIMITS[1]))
    try:
        with pytest.raises(OSError, match="Earlier checkpoints are untouched; make room"):
            write_state({"step": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, LIMITS)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["elsewhere", "state.pt"]
    assert (tmp_path / "elsewhere").read_text() == "of somebody else"


@pytest.mark.parametrize("method", WITHOUT_CORESET)
def test_a_pool_of_another_size_is_refused(method: str, tmp_path: Path) -> None:
    make(tmp_path, method).train()
    other = make(tmp_path, method, num_pool=56)
    with pytest.raises(ValueError, match="is of a run on 64 samples, and `train_dataset` has 56.*start a new run"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("method", WITHOUT_CORESET)
def test_other_data_of_the_same_size_is_said(method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, method).train()
    other = make(tmp_path, method, train_dataset=make_dataset("vit", 64, seed=5))
    other.target_dataset = make_dataset("vit", 12, seed=6)
    with caplog.at_level(logging.WARNING, logger="hf_bilevel"):
        other.train(resume_from_checkpoint=True)
    assert "`train_dataset` changed since the checkpoint: {'num': 64, 'fingerprint':" in caplog.text
    assert "`target_dataset` changed since the checkpoint: {'num': 10, 'fingerprint':" in caplog.text


def test_data_from_a_file_that_was_moved_is_no_other_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path).train()
    again = make(tmp_path)
    for name in ("train_dataset", "target_dataset"):
        dataset = getattr(again, name)
        before = dataset._fingerprint
        dataset._fingerprint = f"of another path than {before}"
    with caplog.at_level(logging.WARNING, logger="hf_bilevel"):
        again.train(resume_from_checkpoint=True)
    assert "changed since the checkpoint" not in caplog.text


@pytest.fixture
def other_versions(tmp_path: Path) -> Iterator[Path]:
    make(tmp_path).train()
    path = tmp_path / "checkpoint-4" / "bilevel_state.pt"
    state = torch.load(path, weights_only=True)
    state["versions"]["torch"] = "1.0"
    torch.save(state, path)
    yield tmp_path / "checkpoint-4"


def test_other_versions_are_said(other_versions: Path, caplog: pytest.LogCaptureFixture) -> None:
    resumed = make(other_versions.parent)
    with caplog.at_level(logging.WARNING, logger="hf_bilevel"):
        resumed.train(resume_from_checkpoint=str(other_versions))
    assert "Versions changed since the checkpoint" in caplog.text and "'torch': '1.0'" in caplog.text


def test_a_coreset_whose_first_checkpoint_is_torn_is_not_searched_again(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", "coreset")
    whole.train()
    make(tmp_path, "coreset").train()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").unlink()
    resumed = make(tmp_path, "coreset")
    resumed._losses_and_gradient = None  # what an outer step would call
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(parameters_of(resumed), parameters_of(whole))


@pytest.mark.parametrize(
    ("trainer_class", "config"),
    [
        (BladeTrainer, BladeConfig(selection_ratio=np.linspace(0.1, 0.5, 3)[2], penalty=np.float64(0.5))),
        (
            MixtureTrainer,
            MixtureConfig(domain_column="source", domain_names=list(np.unique(["web", "books", "code"]))),
        ),
    ],
)
def test_settings_of_numpy_do_not_spoil_checkpoints(trainer_class: type, config: Any, tmp_path: Path) -> None:
    data = {"target_dataset": make_dataset("vit", 8), "bilevel_config": config}
    make_trainer(trainer_class, "vit", tmp_path, save_strategy="steps", save_steps=2, trainer_kwargs=data).train()
    again = make_trainer(trainer_class, "vit", tmp_path, trainer_kwargs=data)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert type(getattr(config, "selection_ratio", 0.5)) is float
