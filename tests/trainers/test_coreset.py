"""CoresetTrainer: what it finds against every subset, what it trains on against Trainer, and searches that are interrupted."""

import copy
import itertools
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from tiny import arguments, make_dataset, make_model, make_trainer, parameters_of
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, set_seed

from hf_bilevel import CoresetConfig, CoresetTrainer, SelectedSubset
from hf_bilevel.core.coreset import coreset_step
from hf_bilevel.core.kernel_ridge import KernelRidge
from hf_bilevel.data import derive_seed
from hf_bilevel.inner_training import BatchedEngine, SequentialEngine
from hf_bilevel.tangent_kernel import KernelEngine
from hf_bilevel.trainers import coreset as module

FAST = {"size": 12, "outer_steps": 4, "inner_steps": 2, "num_masks": 3, "num_final_masks": 2}


class Points(nn.Module):
    """A linear classifier in the form that Trainer takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.layer(x)
        outputs = {"logits": logits}
        return outputs if labels is None else {"loss": F.cross_entropy(logits, labels), **outputs}


def point_losses(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"])["logits"], batch["labels"], reduction="none")


def make_points(num: int, seed: int, wrong: float = 0.0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 2
    x = torch.randn(num, 2, generator=generator) + 3 * (2 * labels[:, None] - 1)
    is_wrong = torch.rand(num, generator=generator) < wrong
    given = torch.where(is_wrong, 1 - labels, labels)
    return Dataset.from_dict({"x": x.tolist(), "labels": given.tolist(), "wrong": is_wrong.tolist()})


def points_trainer(folder: Path, pool: Dataset, config: dict[str, Any], **kwargs: Any) -> CoresetTrainer:
    settings = {"learning_rate": 0.1, **kwargs.pop("arguments", {})}
    return CoresetTrainer(
        model=None if "model_init" in kwargs else kwargs.pop("model", None) or Points(),
        args=arguments(folder, **settings),
        train_dataset=pool,
        bilevel_config=CoresetConfig(**config),
        compute_sample_losses=point_losses,
        **kwargs,
    )


def build(folder: Path, settings: dict[str, Any] | None = None, name: str = "vit", **kwargs: Any) -> CoresetTrainer:
    settings = {**FAST, **(settings or {})}
    if settings.get("engine") == "kernel":
        settings = {"kernel_trainings": 2, **settings}
        settings.pop("num_upper_rows", None)
    extra = {"bilevel_config": CoresetConfig(**settings), **kwargs.pop("trainer_kwargs", {})}
    return make_trainer(CoresetTrainer, name, folder, trainer_kwargs=extra, **kwargs)


def same(one: SelectedSubset, two: SelectedSubset) -> bool:
    return torch.equal(one.ids, two.ids) and torch.equal(one.probabilities, two.probabilities)


# ---------------------------------------------------------------------------------------------------------------------
# What is found


def test_the_search_finds_one_of_the_best_of_all_subsets(tmp_path: Path) -> None:
    pool, target = make_points(10, seed=1, wrong=0.3), make_points(40, seed=2)
    assert 2 <= sum(pool["wrong"]) <= 5
    config = {"size": 3, "outer_steps": 60, "inner_steps": 5, "num_masks": 4, "upper_learning_rate": 0.1}
    trainer = points_trainer(tmp_path, pool, config, target_dataset=target)
    subset = trainer.search()
    # Every subset of three, trained by hand.
    x, labels = torch.tensor(pool["x"][:]), torch.tensor(pool["labels"][:])
    losses = {}
    for rows in itertools.combinations(range(10), 3):
        model = Points()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(x[list(rows)], labels[list(rows)])["loss"].backward()
            optimizer.step()
        with torch.no_grad():
            losses[rows] = float(model(torch.tensor(target["x"][:]), torch.tensor(target["labels"][:]))["loss"])
    found = losses[tuple(sorted(subset.ids.tolist()))]
    assert subset.facts["metrics"]["upper_loss"] == pytest.approx(found, rel=1e-5)
    assert sorted(losses.values()).index(found) < 6  # of 120
    assert not torch.tensor(pool["wrong"])[subset.ids].any()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_wrong_labels_are_left_out(engine: str, tmp_path: Path) -> None:
    pool, target = make_points(80, seed=3, wrong=0.3), make_points(40, seed=2)
    config = {"size": 0.25, "outer_steps": 120, "inner_steps": 5, "upper_learning_rate": 0.1, "engine": engine}
    subset = points_trainer(tmp_path, pool, config, target_dataset=target).search()
    wrong = torch.tensor(pool["wrong"])
    assert len(subset) == 20
    assert wrong.float().mean() > 0.2 and wrong[subset.ids].float().mean() < wrong.float().mean() / 2
    controls = subset.facts["controls"]["uniform"]["upper_loss"]
    assert subset.facts["metrics"]["upper_loss"] < 0.9 * controls


def test_the_kernel_leaves_wrong_labels_out(tmp_path: Path) -> None:
    pool, target = make_points(80, seed=3, wrong=0.3), make_points(40, seed=2)
    config = {"size": 0.25, "outer_steps": 60, "num_masks": 2, "engine": "kernel"}
    for initial_size in ("size", 0.5):
        trainer = points_trainer(tmp_path, pool, {**config, "initial_size": initial_size}, target_dataset=target)
        subset = trainer.search()
        assert len(subset) == 20 and not torch.tensor(pool["wrong"])[subset.ids].any()
        controls = subset.facts["controls"]["uniform"]["upper_loss"]
        assert subset.facts["metrics"]["upper_loss"] < 0.6 * controls


def test_the_pool_can_judge_beside_the_target(tmp_path: Path) -> None:
    pool, target = make_points(40, seed=3, wrong=0.2), make_points(6, seed=2)
    config = {"size": 8, "outer_steps": 20, "num_masks": 2, "engine": "kernel", "pool_share": 0.5}
    trainer = points_trainer(tmp_path, pool, config, target_dataset=target)
    subset = trainer.search()
    mask = torch.zeros(1, 40, dtype=torch.bool).index_fill(1, subset.ids, True)
    with trainer._engine() as engine:
        assert engine._problem.pool_share == 0.5
        found = float(engine.upper_losses(mask, [0]))
    assert subset.facts["metrics"]["upper_loss"] == pytest.approx(found, rel=1e-6)
    assert "the target dataset and, to 50 %, the pool" in trainer._method_section().about


@pytest.mark.parametrize(("given", "share"), [(0.5, 0.5), (1, 1.0), (0, 0.0)])
def test_without_a_target_the_rows_of_the_pool_are_judged_by_the_others(
    given: float, share: float, tmp_path: Path
) -> None:
    pool = make_points(12, seed=3, wrong=0.2)
    config = {"size": 4, "outer_steps": 4, "engine": "kernel", "kernel_trainings": 0, "pool_share": given}
    trainer = points_trainer(tmp_path, pool, config)
    mask = torch.zeros(12, dtype=torch.bool).index_fill(0, trainer.search().ids, True)
    with trainer._engine() as engine:
        kernel, found = engine._problem._kernel, float(engine.upper_losses(mask[None], [0]))
    targets = F.one_hot(torch.tensor(pool["labels"][:]), 2).double() - 0.5

    def distance(mask: torch.Tensor, rows: slice) -> float:
        problem = KernelRidge(kernel, targets, kernel[rows], targets[rows], 0.1)
        return float(problem.loss_and_differences(mask)[0])

    by_others = [distance(mask & (torch.arange(12) != i), slice(i, i + 1)) for i in range(12)]
    expected = (1 - share) * distance(mask, slice(None)) + share * sum(by_others) / 12
    assert found == pytest.approx(expected, rel=1e-6)
    assert (f"each row to {100 * share:.0f} % by what the others say" in trainer._method_section().about) == (
        share > 0
    )


def test_a_target_dataset_that_counts_for_nothing_is_refused(tmp_path: Path) -> None:
    config = {"size": 4, "engine": "kernel", "pool_share": 1.0}
    with pytest.raises(ValueError, match="With `pool_share=1` the target dataset counts for nothing"):
        points_trainer(tmp_path, make_points(12, seed=3), config, target_dataset=make_points(6, seed=2))


class Bent(Points):
    """One with a hidden layer, whose kernel depends on the weights, and with other weights every time."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layer = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))


@pytest.mark.parametrize("fresh", [False, True])
def test_the_kernel_is_taken_where_trainings_on_uniform_draws_end(
    fresh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, model = make_points(20, seed=3), Bent()
    config = {"size": 6, "outer_steps": 1, "engine": "kernel", "kernel_trainings": 2, "inner_steps": 3}
    config |= {"inner_learning_rate": 0.2, "inner_optimizer": "sgd"}
    trainer = points_trainer(tmp_path, pool, config, **({"model_init": Bent} if fresh else {"model": model}))
    masks, starts, ends, before = [], [], [], copy.deepcopy(trainer.model.state_dict())
    train_on = SequentialEngine.train_on

    def watched(engine: SequentialEngine, mask: torch.Tensor, seed: int) -> None:
        starts.append(copy.deepcopy(engine.model.state_dict()))
        train_on(engine, mask, seed)
        masks.append(mask)
        ends.append(copy.deepcopy(engine.model.state_dict()))

    monkeypatch.setattr(SequentialEngine, "train_on", watched)
    with trainer._engine() as engine:
        kernel = engine._problem._kernel
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)
    assert len(masks) == 2 and not torch.equal(*masks) and all(int(mask.sum()) == 6 for mask in masks)
    x, labels = torch.tensor(pool["x"][:]), torch.tensor(pool["labels"][:])
    if fresh:
        assert len({float(state["layer.0.bias"][0]) for state in (before, *starts)}) == 3
    for mask, start, end in zip(masks, starts if fresh else [before, before], ends, strict=True):
        by_hand = Bent()
        by_hand.load_state_dict(start)
        optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.2, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            by_hand(x[mask], labels[mask])["loss"].backward()
            optimizer.step()
        torch.testing.assert_close(end, by_hand.state_dict())
    at_ends = [partial(model.load_state_dict, end) for end in ends]
    generator = torch.Generator().manual_seed(derive_seed(trainer._seed, module._KERNEL))
    expected = KernelEngine(model, engine.pool, engine.upper, 0.1, generator, trainings=at_ends)
    torch.testing.assert_close(kernel, expected._problem._kernel)
    untrained = points_trainer(tmp_path, pool, {"size": 6, "engine": "kernel"}, model=trainer.model)
    with untrained._engine() as engine:
        assert not torch.allclose(kernel, engine._problem._kernel, atol=0.02)


def test_frozen_layers_stay_as_they_are_beside_fresh_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"size": 6, "outer_steps": 1, "engine": "kernel", "kernel_trainings": 2, "inner_steps": 3}
    trainer = points_trainer(tmp_path, make_points(20, seed=3), config, model_init=Bent)
    trainer.model.layer[0].requires_grad_(False)  # not by `model_init`
    before, moved, train_on = copy.deepcopy(trainer.model.state_dict()), [], SequentialEngine.train_on

    def watched(engine: SequentialEngine, mask: torch.Tensor, seed: int) -> None:
        start = copy.deepcopy(engine.model.state_dict())
        train_on(engine, mask, seed)
        moved.append(
            [name for name, value in engine.model.state_dict().items() if not torch.equal(value, start[name])]
        )

    monkeypatch.setattr(SequentialEngine, "train_on", watched)
    trainer.search()
    assert moved == [["layer.2.weight", "layer.2.bias"]] * 2
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)


def test_trainings_for_the_kernel_that_diverge_say_so(tmp_path: Path) -> None:
    config = {"size": 6, "engine": "kernel", "kernel_trainings": 1, "inner_learning_rate": 1e38, "inner_steps": 30}
    config["inner_optimizer"] = "sgd"
    trainer = points_trainer(tmp_path, make_points(20, seed=3), config, model=Bent())
    before = parameters_of(trainer)
    with pytest.raises(FloatingPointError, match="diverged. Lower `inner_learning_rate`.*`kernel_trainings=0`"):
        trainer.search()
    assert torch.equal(parameters_of(trainer), before)


def test_the_kernel_takes_one_step_by_hand(tmp_path: Path) -> None:
    pool, target = make_points(20, seed=3, wrong=0.3), make_points(10, seed=2)
    config = {"size": 6, "outer_steps": 1, "num_masks": 3, "engine": "kernel", "ridge": 0.3}
    trainer = points_trainer(tmp_path, pool, config, target_dataset=target)
    drawn = []
    masks = trainer._masks
    trainer._masks = lambda *args: drawn.append(masks(*args)) or drawn[-1]
    subset = trainer.search()
    with trainer._engine() as engine:
        _, differences = engine.losses_and_differences(drawn[0])
    mean = differences.mean(0).float()
    stepped = coreset_step(torch.full((20,), 0.3), mean / mean.std(correction=0), 0.05, 6)
    torch.testing.assert_close(subset.probabilities, stepped[subset.ids], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_upper_loss_is_on_the_pool_or_on_the_target(tmp_path: Path) -> None:
    # The pool alone cannot know that half of its labels are turned round: the target can.
    pool, target = make_points(60, seed=3, wrong=0.5), make_points(40, seed=2)
    config = {"size": 10, "outer_steps": 30, "inner_steps": 5, "upper_learning_rate": 0.1}
    wrong = torch.tensor(pool["wrong"])
    shares = {}
    for name, dataset in (("pool", None), ("target", target)):
        subset = points_trainer(tmp_path, pool, config, target_dataset=dataset).search()
        shares[name] = float(wrong[subset.ids].float().mean())
    assert shares["target"] < 0.15 < shares["pool"]


@pytest.mark.parametrize("final", [0, 3])
def test_the_coreset_has_exactly_its_size(final: int, tmp_path: Path) -> None:
    trainer = build(tmp_path, {"size": 0.11, "num_final_masks": final})
    subset = trainer.search()
    assert len(subset) == math.ceil(0.11 * 64) == 8 and len(subset.ids.unique()) == 8
    assert subset.num_pool == 64 and subset.fingerprint == trainer.train_dataset._fingerprint
    assert (subset.probabilities.diff() <= 0).all()


def test_annealing_lowers_the_expected_size(tmp_path: Path) -> None:
    sizes = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if "coreset/expected_size" in logs:
                sizes.append((state.global_step, logs["coreset/expected_size"]))

    settings = {"size": 6, "initial_size": 0.5, "outer_steps": 25, "num_final_masks": 0, "inner_steps": 1}
    trainer = build(tmp_path, settings, logging_steps=1, trainer_kwargs={"callbacks": [Watch()]})
    trainer.search()
    assert [step for step, _ in sizes] == list(range(1, 26))
    assert [size for step, size in sizes if step < 4] == pytest.approx([32] * 3, abs=1e-3)
    assert all(size == pytest.approx(6, abs=1e-3) for step, size in sizes if step >= 15)
    between = [size for step, size in sizes if 4 < step < 15]
    assert all(6 < size < 32 for size in between) and between == sorted(between, reverse=True)


def test_a_smaller_model_may_search_for_a_larger_one(tmp_path: Path) -> None:
    small = make_model("vit")
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(0.5)
    before = torch.cat([p.detach().flatten() for p in small.parameters()])
    trainer = build(tmp_path / "one", trainer_kwargs={"search_model": small})
    own = build(tmp_path / "two")
    start = parameters_of(trainer)
    subset = trainer.search()
    assert torch.equal(parameters_of(trainer), start)
    assert torch.equal(torch.cat([p.detach().flatten() for p in small.parameters()]), before)
    assert not same(subset, own.search())
    assert same(subset, build(tmp_path / "three", model=small).search())
    assert subset.facts["search_model"] == "ViTForImageClassification"


# ---------------------------------------------------------------------------------------------------------------------
# A search leaves no trace but the coreset


@pytest.mark.parametrize("engine", ["sequential", "batched", "kernel"])
def test_the_search_leaves_everything_as_it_was(engine: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, {"engine": engine}, dropout=0.2)
    pool = trainer.train_dataset
    trainer.model.eval()
    before = parameters_of(trainer)
    set_seed(5)
    expected = torch.rand(3)
    set_seed(5)
    trainer.search()
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(parameters_of(trainer), before)
    assert trainer.train_dataset is pool and trainer.state.global_step == 0
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert not any(m.training for m in trainer.model.modules())


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_training_is_that_of_trainer_on_the_coreset(name: str, tmp_path: Path) -> None:
    trainer = build(tmp_path / "one", name=name, dropout=0.1)
    subset = trainer.search()
    set_seed(11)
    trainer.train()
    rows = trainer.train_dataset.select(subset.ids.sort().values.tolist())
    assert len(trainer.train_dataset) == 64 and trainer.state.max_steps == 6
    plain = make_trainer(Trainer, name, tmp_path / "two", dropout=0.1, train_dataset=rows)
    set_seed(11)
    plain.train()
    assert torch.equal(parameters_of(trainer), parameters_of(plain))


def test_epochs_are_those_of_the_coreset(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=-1, num_train_epochs=3)
    trainer.train()
    assert trainer.state.max_steps == 3 * math.ceil(12 / 8)


def test_a_pool_that_is_no_hugging_face_dataset(tmp_path: Path) -> None:
    rows = make_dataset("vit", 64).remove_columns("source")
    trainer = build(tmp_path / "one", train_dataset=list(rows))
    hub = build(tmp_path / "two", train_dataset=rows)
    for one in (trainer, hub):
        set_seed(11)
        one.train()
    assert same(trainer.selected_subset(), hub.selected_subset())
    assert torch.equal(parameters_of(trainer), parameters_of(hub))


def test_domains_are_recorded_and_do_not_disturb_the_training(tmp_path: Path) -> None:
    trainer = build(tmp_path / "one", {"domain_column": "source"})
    plain = build(tmp_path / "two")
    for one in (trainer, plain):
        set_seed(11)
        one.train()
    assert torch.equal(parameters_of(trainer), parameters_of(plain))
    subset = trainer.selected_subset()
    assert subset.domain_names == ["books", "code", "web"]
    names = [subset.domain_names[i] for i in subset.domain_ids]
    assert names == [trainer.train_dataset[int(i)]["source"] for i in subset.ids]
    assert sum(subset.facts["domains"]["subset"]) == 12


def test_one_search_serves_all_trainings_on_a_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    search = CoresetTrainer.search
    monkeypatch.setattr(CoresetTrainer, "search", lambda self, **kw: searches.append(0) or search(self, **kw))
    trainer = build(tmp_path)
    trainer.train()
    first = trainer.selected_subset()
    trainer.train()
    assert len(searches) == 1 and trainer.selected_subset() is first
    trainer.train_dataset = make_dataset("vit", 30, seed=9)
    trainer.train()
    assert len(searches) == 2 and trainer.selected_subset().num_pool == 30


@pytest.mark.slow
def test_adapters_are_searched_and_trained(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer = build(tmp_path, name="llama", model=model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    subsets = [trainer.search()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    trainer.bilevel_config.engine = "batched"
    subsets.append(trainer.search())
    assert torch.equal(*[subset.ids.sort().values for subset in subsets])
    trainer.train()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all("lora_" in key for key in changed)


def test_bfloat16_autocast_reaches_the_inner_trainings(tmp_path: Path) -> None:
    losses = [build(tmp_path, bf16=bf16).search().facts["metrics"]["upper_loss"] for bf16 in (False, True)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


def test_label_smoothing_reaches_the_inner_trainings(tmp_path: Path) -> None:
    losses = [
        build(tmp_path, label_smoothing_factor=value).search().facts["metrics"]["upper_loss"] for value in (0.0, 0.3)
    ]
    assert losses[0] != losses[1]


# ---------------------------------------------------------------------------------------------------------------------
# Costs, logs


def test_passes_are_those_of_the_docstring(tmp_path: Path) -> None:
    trainer = build(tmp_path, {"engine": "sequential", "target_batch_size": 16})
    counts = {"train": 0, "score": 0}
    trainer.model.register_forward_hook(
        lambda *_: counts.update({k: counts[k] + 1 for k in [("score", "train")[torch.is_grad_enabled()]]})
    )
    trainer.search()
    trainings = 4 * 3 + 2 + 10  # outer steps, final masks, uniform draws
    assert counts == {"train": trainings * 2, "score": trainings * 64 // 16}


def test_upper_rows_are_drawn_anew_for_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    upper_losses = SequentialEngine.upper_losses

    def watch(self, masks, seeds, upper_rows=None):
        rows.append(upper_rows)
        return upper_losses(self, masks, seeds, upper_rows)

    monkeypatch.setattr(SequentialEngine, "upper_losses", watch)
    build(tmp_path, {"num_upper_rows": 5, "engine": "sequential"}).search()
    assert [len(r) for r in rows[:4]] == [5] * 4 and len({tuple(r.tolist()) for r in rows[:4]}) == 4
    assert all(len(r.unique()) == 5 for r in rows[:4])
    assert rows[4:] == [None, None]  # the coreset is chosen on all rows


def test_what_is_logged(tmp_path: Path) -> None:
    logs = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            received.append((state.global_step, dict(logs)))

    received = logs
    trainer = build(tmp_path, {"outer_steps": 5}, logging_steps=2, trainer_kwargs={"callbacks": [Watch()]})
    trainer.search()
    assert [step for step, _ in logs] == [2, 4, 5, 0]
    names = ("upper_loss", "expected_size", "entropy", "settled", "num_diverged")
    assert all(set(entry) >= {f"coreset/{name}" for name in names} for _, entry in logs[:3])
    ends = ("final_upper_loss", "uniform_upper_loss_mean", "uniform_upper_loss_min")
    assert set(logs[3][1]) >= {f"coreset/{name}" for name in ends}
    size = trainer.selected_subset().facts["search"]["expected_size"]
    assert logs[2][1]["coreset/expected_size"] == size <= 12 + 1e-3, "how close to 12 depends on the draws"


def test_the_progress_bar_says_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    build(tmp_path, disable_tqdm=False).search()
    shown = capsys.readouterr().err
    assert "Searching a coreset: 100%" in shown and "4/4" in shown
    assert "loss=" in shown and "size=12" in shown and "settled=" in shown


def test_the_search_is_drawn(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    with pytest.raises(ValueError, match="has not searched"):
        trainer.plot_search()
    facts = trainer.search().facts
    (axes,) = trainer.plot_search().axes
    curve, _, uniform, found = axes.get_lines()
    assert len(curve.get_ydata()) == 4
    assert set(uniform.get_ydata()) == {facts["controls"]["uniform"]["upper_loss"]}
    assert set(found.get_ydata()) == {facts["metrics"]["upper_loss"]}


def test_a_settled_search_ends_early(tmp_path: Path) -> None:
    pool = make_points(12, seed=3, wrong=0.4)
    config = {"size": 2, "outer_steps": 400, "inner_steps": 2, "upper_learning_rate": 2.0, "num_final_masks": 1}
    subset = points_trainer(tmp_path, pool, config, target_dataset=make_points(20, seed=2)).search()
    assert subset.facts["search"]["num_outer_steps"] < 400 and subset.facts["search"]["settled"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Engines


def test_the_batched_engine_finds_the_same(tmp_path: Path) -> None:
    one, two = (build(tmp_path / e, {"engine": e, "outer_steps": 8}).search() for e in ("sequential", "batched"))
    assert torch.equal(one.ids, two.ids)
    torch.testing.assert_close(one.probabilities, two.probabilities, rtol=0, atol=1e-3)


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=4
    )
    return ResNetForImageClassification(config)


def test_batch_statistics_need_the_sequential_engine(tmp_path: Path) -> None:
    trainer = build(tmp_path, {"engine": "batched"}, model=resnet())
    with pytest.raises(ValueError, match="batch statistics .*engine='sequential'"):
        trainer.search()
    trainer = build(tmp_path, {"engine": "auto"}, model=resnet())
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.search()
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "kernel", "num_upper_rows": 4}, "compares masks on all upper rows: `num_upper_rows`"),
        (
            {"engine": "kernel", "kernel_trainings": 0, "inner_steps": 3, "inner_optimizer": "sgd"},
            "nothing is trained with `kernel_trainings=0`: `inner_steps`, `inner_optimizer`",
        ),
        (
            {"ridge": 0.5, "kernel_trainings": 1},
            "only `engine='kernel'` fits a regression: `kernel_trainings`, `ridge`",
        ),
    ],
)
def test_settings_of_another_engine_are_warned_about(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=message):
        points_trainer(tmp_path, make_points(20, seed=3), {"size": 5, **settings})


def test_the_kernel_is_for_classifiers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Use another engine|one row for each sample"):
        build(tmp_path, {"engine": "kernel"}, name="llama").search()


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


class Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "coreset/entropy" in logs and state.global_step == self.step:
            raise KeyboardInterrupt


RESUMABLE = {"outer_steps": 6, "search_save_steps": 2}


def interrupted(
    folder: Path, settings: dict[str, Any], trainer_kwargs: dict[str, Any] | None = None, **kwargs: Any
) -> None:
    trainer = build(
        folder,
        settings,
        save_strategy="steps",
        logging_steps=1,
        trainer_kwargs={"callbacks": [Interrupt(5)], **(trainer_kwargs or {})},
        **kwargs,
    )
    before = parameters_of(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.search()
    assert torch.equal(parameters_of(trainer), before) and trainer.state.global_step == 0


@pytest.mark.parametrize("engine", ["sequential", "batched", "kernel"])
def test_a_resumed_search_is_the_uninterrupted_one(engine: str, tmp_path: Path) -> None:
    settings = {**RESUMABLE, "engine": engine, "inner_batch_size": 4, "num_upper_rows": 20}
    whole = build(tmp_path / "whole", settings, dropout=0.2)
    expected = whole.search()
    interrupted(tmp_path / "part", settings, dropout=0.2)
    other = make_model("vit", dropout=0.2)
    with torch.no_grad():
        other.classifier.weight.add_(1.0)  # a head drawn anew by another process
    again = build(tmp_path / "part", settings, model=other)
    steps, take_step = [], again._losses_and_gradient
    again._losses_and_gradient = lambda *args: steps.append(args[2].step) or take_step(*args)
    resumed = again.search(resume_from_checkpoint=True)
    assert steps == [4, 5]  # saved at 4, interrupted after 5
    assert same(resumed, expected) and resumed.facts["search"] == expected.facts["search"]
    assert torch.equal(parameters_of(again), parameters_of(whole))
    assert not torch.equal(expected.probabilities, torch.full((12,), 12 / 64))
    trainers = [whole, again]
    for trainer in trainers:
        set_seed(11)
        trainer.train()
    assert torch.equal(parameters_of(again), parameters_of(whole))


def test_train_resumes_the_search_where_there_is_no_checkpoint_yet(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", RESUMABLE)
    interrupted(tmp_path / "part", RESUMABLE)
    again = build(tmp_path / "part", RESUMABLE, save_strategy="steps", save_steps=3)
    set_seed(11)
    whole.train()
    set_seed(11)
    again.train(resume_from_checkpoint=True)
    assert same(again.selected_subset(), whole.selected_subset())
    assert torch.equal(parameters_of(again), parameters_of(whole))


@pytest.mark.parametrize("newest", [True, False])
def test_a_resumed_training_keeps_its_coreset(newest: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(tmp_path, save_strategy="steps", save_steps=2)
    set_seed(11)
    whole.train()
    monkeypatch.setattr(CoresetTrainer, "search", lambda self: pytest.fail("searched again"))
    again = build(tmp_path, save_strategy="steps", save_steps=2)
    checkpoint = True if newest else str(tmp_path / "checkpoint-2")
    set_seed(11)
    again.train(resume_from_checkpoint=checkpoint)
    assert same(again.selected_subset(), whole.selected_subset())
    assert again.selected_subset().facts == whole.selected_subset().facts
    assert torch.equal(parameters_of(again), parameters_of(whole))


def test_a_search_of_another_pool_is_not_resumed(tmp_path: Path) -> None:
    interrupted(tmp_path, RESUMABLE)
    with pytest.raises(ValueError, match="a pool of 64 samples .* here they are 30"):
        build(tmp_path, RESUMABLE, train_dataset=make_dataset("vit", 30)).search(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="fingerprint"):
        build(tmp_path, RESUMABLE, train_dataset=make_dataset("vit", 64, seed=4)).search(resume_from_checkpoint=True)


def test_a_pool_from_a_file_that_was_moved_is_resumed(tmp_path: Path) -> None:
    moved = make_dataset("vit", 64)
    moved._fingerprint = "of another path"
    interrupted(tmp_path, RESUMABLE)
    build(tmp_path, RESUMABLE, train_dataset=moved).search(resume_from_checkpoint=True)
    build(tmp_path, save_strategy="steps", save_steps=2).train()
    build(tmp_path, train_dataset=moved).train(str(tmp_path / "checkpoint-2"))


def test_a_coreset_of_another_pool_is_not_trained_on(tmp_path: Path) -> None:
    build(tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="is of a pool of 64 samples"):
        build(tmp_path, train_dataset=make_dataset("vit", 30)).train(str(tmp_path / "checkpoint-2"))


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no search to resume in .*state.pt is missing"):
        build(tmp_path, RESUMABLE).search(resume_from_checkpoint=True)
    interrupted(tmp_path, RESUMABLE)
    path = tmp_path / module.SEARCH_FOLDER / module.STATE_NAME
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="cannot be read"):
        build(tmp_path, RESUMABLE).search(resume_from_checkpoint=True)


def test_changed_settings_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(tmp_path, RESUMABLE)
    build(tmp_path, {**RESUMABLE, "upper_learning_rate": 0.2}).search(resume_from_checkpoint=True)
    assert "{'upper_learning_rate': 0.05}, now {'upper_learning_rate': 0.2}" in caplog.text


@pytest.mark.parametrize("images", [False, True])
def test_an_upload_holds_neither_the_searched_model_nor_images_that_nobody_asked_for(
    images: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[dict[str, Any]] = []
    hub = SimpleNamespace(
        create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id),
        upload_folder=lambda **kwargs: uploads.append(kwargs),
    )
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    settings = {"save_strategy": "steps", "save_steps": 2, "hub_model_id": "me/model"}
    trainer = build(tmp_path, RESUMABLE, trainer_kwargs={"search_model": make_model("vit")}, **settings)
    trainer.train()
    assert (tmp_path / module.SEARCH_FOLDER / module.INITIALISATION_NAME).exists()
    trainer.push_to_hub(**({"images": True} if images else {}))
    paths = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    uploaded = set(filter_repo_objects(paths, ignore_patterns=uploads[-1]["ignore_patterns"]))
    pictures = {"coreset_ranking.png", "coreset_search.png", *(["coreset_images.png"] if images else [])}
    settings_and_facts = {"bilevel_config.json", "bilevel_facts.json", "config.json", "training_args.bin"}
    assert uploaded == {"README.md", "model.safetensors", *pictures, *settings_and_facts}
    assert ("coreset_images.png" in (tmp_path / "README.md").read_text(encoding="utf-8")) == images


def test_images_that_cannot_be_drawn_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path)
    trainer.search()
    monkeypatch.setattr(module, "can_be_drawn", lambda image: False)
    trainer.create_model_card(images=True)
    assert not (tmp_path / "coreset_images.png").exists()
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "_chosen_images", lambda: [torch.zeros(5, 8, 8).numpy()])
    trainer.create_model_card(images=True)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "coreset_images.png" not in card and "coreset_ranking.png" in card


def test_nothing_is_written_without_a_save_strategy(tmp_path: Path) -> None:
    build(tmp_path).search()
    assert not (tmp_path / module.SEARCH_FOLDER).exists()


def test_a_new_search_forgets_the_old_state(tmp_path: Path) -> None:
    interrupted(tmp_path, RESUMABLE)
    trainer = build(tmp_path, {**RESUMABLE, "search_save_steps": 100}, save_strategy="steps", logging_steps=1)
    trainer.add_callback(Interrupt(1))
    with pytest.raises(KeyboardInterrupt):
        trainer.search()
    with pytest.raises(ValueError, match="no search to resume"):
        build(tmp_path, RESUMABLE).search(resume_from_checkpoint=True)


# ---------------------------------------------------------------------------------------------------------------------
# Trainings that diverge


def test_diverged_trainings_are_dropped_and_counted(tmp_path: Path) -> None:
    pool = make_points(20, seed=1)
    x = torch.tensor(pool["x"][:])
    x[4] = torch.inf  # whoever trains on it is lost
    pool = Dataset.from_dict({"x": x.tolist(), "labels": pool["labels"][:]})
    config = {"size": 5, "outer_steps": 40, "inner_steps": 3, "num_masks": 6, "inner_optimizer": "sgd"}
    target = make_points(30, seed=2)
    subset = points_trainer(tmp_path, pool, config, target_dataset=target).search()
    assert 0 < subset.facts["search"]["num_diverged"] < 240
    assert 4 not in subset.ids.tolist() and math.isfinite(subset.facts["metrics"]["upper_loss"])
    assert subset.probabilities.isfinite().all()


def test_a_search_whose_trainings_all_diverge_ends(tmp_path: Path) -> None:
    config = {"size": 5, "outer_steps": 400, "inner_steps": 9, "inner_optimizer": "sgd", "inner_learning_rate": 1e38}
    trainer = points_trainer(tmp_path, make_points(20, seed=1), config)
    with pytest.raises(FloatingPointError, match=r"Lower `inner_learning_rate` \(now 1e\+38\)"):
        trainer.search()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "`size` must be a whole number"),
        ({"size": 1.5}, "`size` must be a whole number"),
        ({"size": "half"}, "`size` must be float or 'pool'"),
        ({"initial_size": -1}, "`initial_size` must be"),
        ({"num_masks": 1}, "`num_masks` must be at least 2"),
        ({"outer_steps": 0}, "`outer_steps` must be at least 1"),
        ({"inner_batch_size": 0}, "`inner_batch_size` must be at least 1"),
        ({"num_upper_rows": 0}, "`num_upper_rows` must be at least 1"),
        ({"num_final_masks": -1}, "`num_final_masks` must not be negative"),
        ({"pool_share": 1.1}, r"`pool_share` must be in \[0, 1\], got 1.1"),
        ({"kernel_trainings": -1}, "`kernel_trainings` must not be negative, got -1"),
        ({"upper_learning_rate": 0.0}, "`upper_learning_rate` must be positive"),
        ({"inner_learning_rate": math.inf}, "`inner_learning_rate` must be positive and finite"),
        ({"inner_optimizer": "adamw"}, "`inner_optimizer` must be one of adam, sgd"),
        ({"engine": "vmap"}, "`engine` must be one of auto, batched, sequential"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        CoresetConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "kwargs", "message"),
    [
        ({"size": 65}, {}, "`size=65` must be smaller than `train_dataset`, which has 64 samples"),
        ({"size": 64}, {}, "`size=64` must be smaller than .* use the plain Trainer with `size='pool'`"),
        ({"initial_size": 100}, {}, "`initial_size=100` must be smaller than"),
        ({"size": 20, "initial_size": 10}, {}, "`initial_size=10` is smaller than `size=20`"),
        ({}, {"trainer_kwargs": {"search_model": nn.Linear(2, 2)}}, "loss of each sample of `Linear` is not known"),
        ({}, {"trainer_kwargs": {"target_dataset": Dataset.from_dict({"labels": []})}}, "`target_dataset` is empty"),
    ],
)
def test_setups_that_cannot_work(
    settings: dict[str, Any], kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, settings, **kwargs)


def test_there_is_no_coreset_before_the_search(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call `search\(\)` or `train\(\)` first"):
        build(tmp_path).selected_subset()
    with pytest.raises(ValueError, match="`size='pool'` keeps every sample"):
        build(tmp_path, {"size": "pool"}).search()


def test_a_loss_of_ones_own_that_the_search_does_not_see_is_said(tmp_path: Path) -> None:
    def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return F.cross_entropy(outputs["logits"], labels)

    with pytest.warns(UserWarning, match="`compute_loss_func` is not used by the search"):
        build(tmp_path, trainer_kwargs={"compute_loss_func": own_loss})


@pytest.mark.slow
def test_the_engine_is_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for kind in (SequentialEngine, BatchedEngine):
        upper_losses = kind.upper_losses
        monkeypatch.setattr(
            kind, "upper_losses", lambda self, *a, f=upper_losses, **kw: seen.append(type(self)) or f(self, *a, **kw)
        )
    for engine, expected in (("sequential", SequentialEngine), ("batched", BatchedEngine)):
        seen.clear()
        build(tmp_path, {"engine": engine}).search()
        assert set(seen) == {expected}
