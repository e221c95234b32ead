"""CoresetTrainer with `required_ids`: samples that are in the coreset whatever the search finds."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_coreset import RESUMABLE, build, interrupted, make_points, points_trainer, same
from tiny import make_dataset

from hf_bilevel.core.kernel_ridge import KernelRidge
from hf_bilevel.inner_training import SequentialEngine
from hf_bilevel.tangent_kernel import KernelEngine

REQUIRED = [20, 3, 7]
KERNEL = {"engine": "kernel", "num_masks": 2}


def mask_of(ids: torch.Tensor, num: int) -> torch.Tensor:
    return torch.zeros(num, dtype=torch.bool).index_fill(0, ids, True)


@pytest.mark.parametrize("engine", ["sequential", "kernel"])
def test_the_rest_is_one_of_the_best_beside_what_is_required(engine: str, tmp_path: Path) -> None:
    pool, required = make_points(10, seed=3, wrong=0.3), [4, 1]
    config = {"size": 4, "outer_steps": 60, "num_masks": 4, "upper_learning_rate": 0.1, "engine": engine}
    if engine == "sequential":
        config["inner_steps"] = 5
    trainer = points_trainer(tmp_path, pool, config, target_dataset=make_points(30, seed=2), required_ids=required)
    found = trainer.search()
    pairs = list(itertools.combinations(sorted(set(range(10)) - set(required)), 2))
    with trainer._engine() as trained:
        masks = torch.stack([mask_of(torch.tensor([*required, *pair]), 10) for pair in pairs])
        losses = trained.upper_losses(masks, [0] * len(masks))
    of_found = losses[pairs.index(tuple(sorted(set(found.ids.tolist()) - set(required))))]
    assert found.facts["metrics"]["upper_loss"] == pytest.approx(float(of_found), rel=1e-5)
    assert of_found - losses.min() < 0.2 * (losses.mean() - losses.min())


def test_differences_are_those_beside_what_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_points(8, seed=3)
    config = {**KERNEL, "size": 4, "outer_steps": 1, "upper_learning_rate": 0.1}
    trainer = points_trainer(tmp_path, pool, config, required_ids=[6, 2])
    masks = torch.tensor([[True, False, False, True, False, False], [False, True, False, False, False, True]])
    monkeypatch.setattr(trainer, "_masks", lambda *args: masks)
    gradients: list[torch.Tensor] = []
    monkeypatch.setattr(
        "hf_bilevel.trainers.coreset.CoresetProbabilities.step",
        lambda self, gradient, *rest: gradients.append(gradient),
    )
    trainer.search()
    with trainer._engine() as engine:
        kernel = engine._problem._kernel
    targets = F.one_hot(torch.tensor(pool["labels"][:]), 2).double() - 0.5
    problem = KernelRidge(kernel, targets, kernel, targets, 0.1)
    free, expected = [0, 1, 3, 4, 5, 7], torch.zeros(6, dtype=torch.float64)
    for mask in masks:
        whole = mask_of(torch.tensor([2, 6]), 8)
        whole[free] = mask
        for place, sample in enumerate(free):
            with_it, without = whole.clone(), whole.clone()
            with_it[sample], without[sample] = True, False
            difference = problem.loss_and_differences(with_it)[0] - problem.loss_and_differences(without)[0]
            expected[place] += difference / 2
    assert torch.allclose(gradients[0].double(), expected, rtol=1e-5)


@pytest.mark.parametrize(("engine", "seen_by"), [("sequential", SequentialEngine), ("kernel", KernelEngine)])
@pytest.mark.parametrize("num_final_masks", [0, 2])
def test_every_mask_holds_them(
    engine: str, seen_by: type, num_final_masks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    for name in ("upper_losses",) if engine == "sequential" else ("upper_losses", "losses_and_differences"):
        own = getattr(seen_by, name)

        def spy(self: Any, masks: torch.Tensor, *args: Any, own: Any = own) -> Any:
            seen.append(masks)
            return own(self, masks, *args)

        monkeypatch.setattr(seen_by, name, spy)
    trained_on: list[torch.Tensor] = []
    train_on = SequentialEngine.train_on
    monkeypatch.setattr(
        SequentialEngine, "train_on", lambda self, mask, seed: trained_on.append(mask) or train_on(self, mask, seed)
    )
    settings = {"engine": engine, "num_final_masks": num_final_masks, "initial_size": 0.5}
    trainer = build(tmp_path, settings, logging_steps=1, trainer_kwargs={"required_ids": REQUIRED})
    subset = trainer.search()
    masks = torch.cat(seen)
    assert len(masks) >= 4 * 3 + 1 + 10 and masks[:, REQUIRED].all()
    assert len({tuple(mask.tolist()) for mask in masks}) > 10
    assert (masks[-10:].sum(1) == 12).all()  # the uniform draws beside which the coreset is measured
    if engine == "kernel":
        assert len(trained_on) == 2 and all(mask[REQUIRED].all() and mask.sum() == 12 for mask in trained_on)
    assert subset.ids[:3].tolist() == sorted(REQUIRED) and (subset.probabilities[:3] == 1).all()
    assert len(subset) == len(set(subset.ids.tolist())) == 12
    search = subset.facts["search"]
    assert search["num_required"] == 3 and search["expected_size"] <= 12 + 1e-3
    logged = [logs["coreset/expected_size"] for logs in trainer.state.log_history if "coreset/expected_size" in logs]
    assert len(logged) == 4 and 31 <= logged[0] <= 32.01 and logged[-1] == search["expected_size"]
    assert trainer._method_section().statistics["Of which were required from the start"] == "3"
    trainer.train()
    assert trainer.selected_subset() is subset


@pytest.mark.parametrize("engine", ["sequential", "kernel"])
def test_requiring_nothing_changes_nothing(engine: str, tmp_path: Path) -> None:
    none, empty = (
        build(tmp_path, {"engine": engine}, trainer_kwargs={"required_ids": required}).search()
        for required in (None, [])
    )
    assert same(none, empty) and none.facts["search"] == empty.facts["search"]
    three = build(tmp_path, {"engine": engine}, trainer_kwargs={"required_ids": REQUIRED}).search()
    assert not same(none, three)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_ids_of_any_kind_and_twice(kind: Any, tmp_path: Path) -> None:
    expected = build(tmp_path, trainer_kwargs={"required_ids": REQUIRED}).search()
    assert same(build(tmp_path, trainer_kwargs={"required_ids": kind([*REQUIRED, 7])}).search(), expected)


@pytest.mark.parametrize("engine", ["sequential", "kernel"])
def test_an_interrupted_search_goes_on_with_the_same(engine: str, tmp_path: Path) -> None:
    settings, required = {**RESUMABLE, "engine": engine}, {"required_ids": REQUIRED}
    expected = build(tmp_path / "whole", settings, trainer_kwargs=required).search()
    interrupted(tmp_path / "part", settings, trainer_kwargs=required)
    resumed = build(tmp_path / "part", settings, trainer_kwargs=required).search(resume_from_checkpoint=True)
    assert same(resumed, expected) and resumed.facts["search"] == expected.facts["search"]
    other = build(tmp_path / "part", settings, trainer_kwargs={"required_ids": [1]})
    with pytest.raises(ValueError, match="with 3 required samples, and here `required_ids` names 1, or others"):
        other.search(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("required", "error", "message"),
    [
        ([3, 64], ValueError, "`required_ids` holds 64, and `train_dataset` has the rows 0 to 63"),
        ([-1], ValueError, "`required_ids` holds -1"),
        (
            range(12),
            ValueError,
            r"names 12 rows and `size` counts them, so that with `size=12` \(12 rows\) nothing is left",
        ),
        (
            [0.5],
            TypeError,
            r"must be a list of row numbers of `train_dataset`, got list of shape \(1,\) and dtype float64",
        ),
        ([True, False], TypeError, "dtype bool"),
        ([[1], [2]], TypeError, r"shape \(2, 1\)"),
        (3, TypeError, r"got int of shape \(\)"),
        (["3"], TypeError, "must be a list of row numbers of `train_dataset`, got list"),
    ],
)
def test_ids_that_cannot_be_required(required: Any, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        build(tmp_path, trainer_kwargs={"required_ids": required})


def test_the_size_may_be_a_share_of_the_pool(tmp_path: Path) -> None:
    subset = build(tmp_path, {"size": 0.125}, trainer_kwargs={"required_ids": REQUIRED}).search()
    assert len(subset) == 8 and set(REQUIRED) <= set(subset.ids.tolist())
    with pytest.raises(ValueError, match=r"with `size=0.04` \(3 rows\) nothing is left to choose"):
        build(tmp_path, {"size": 0.04}, trainer_kwargs={"required_ids": REQUIRED})


def test_a_pool_that_is_exchanged_is_checked_again(tmp_path: Path) -> None:
    trainer = build(tmp_path, trainer_kwargs={"required_ids": [40]})
    trainer.train_dataset = make_dataset("vit", 30)
    with pytest.raises(ValueError, match="`required_ids` holds 40, and `train_dataset` has the rows 0 to 29"):
        trainer.search()


def test_without_a_search_they_are_ignored_and_that_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="`required_ids` is ignored with `size='pool'`"):
        build(tmp_path, {"size": "pool"}, trainer_kwargs={"required_ids": REQUIRED})


def test_a_coreset_that_lacks_them_is_not_trained_on(tmp_path: Path) -> None:
    before = build(tmp_path, save_strategy="steps", save_steps=2, trainer_kwargs={"required_ids": REQUIRED})
    before.train()
    again = build(tmp_path, save_strategy="steps", save_steps=2, trainer_kwargs={"required_ids": REQUIRED[:2]})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    dropped = min(set(range(64)) - set(before.selected_subset().ids.tolist()))
    other = build(tmp_path, save_strategy="steps", save_steps=2, trainer_kwargs={"required_ids": [dropped]})
    with pytest.raises(ValueError, match="lacks samples that `required_ids` names"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_search_of_before_is_resumed(tmp_path: Path) -> None:
    settings = {**RESUMABLE, "engine": "kernel"}
    expected = build(tmp_path / "whole", settings).search()
    interrupted(tmp_path / "part", settings)
    path = tmp_path / "part" / "_coreset_search" / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["required_ids"]
    torch.save(state, path)
    assert same(build(tmp_path / "part", settings).search(resume_from_checkpoint=True), expected)
