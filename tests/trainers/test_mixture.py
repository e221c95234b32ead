"""MixtureTrainer against what it says it does: hypergradients by hand, shares, costs, evaluation, resuming, refusals."""

import copy
import json
import math
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from tiny import make_dataset, make_model, make_rows, make_trainer, parameters_of, wide_norms
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, set_seed

from hf_bilevel import MixtureConfig, MixtureMixin, MixtureTrainer
from hf_bilevel.core.mixture import DomainWeights, weight_learning_rate
from hf_bilevel.trainers.base import BilevelMixin

NAMES = ["books", "code", "web"]
DOMAINS = {"domain_column": "source"}
SHARES = {"books": 21 / 64, "code": 21 / 64, "web": 22 / 64}  # of the pool
FIXED = {"books": 0.25, "code": 0.125, "web": 0.625}


class RecordingTrainer(MixtureTrainer):
    """Keep what each optimizer step trains on, and what the domains were judged from."""

    def _begin_training(self) -> None:
        super()._begin_training()
        self.steps: list[dict[str, Any]] = []
        self.judged: list[dict[str, Any]] = []

    def _select(self, batches: Any, origins: Any, num_items: Any) -> Any:
        result = super()._select(batches, origins, num_items)  # may judge the steps before
        weights = self._domains.weights
        self.steps.append(
            {
                "batches": [dict(batch) for batch in batches],
                "ids": [origin.domain_ids for origin in origins],
                "multipliers": weights / self._shares if self._weights_losses() else torch.ones(len(weights)),
                "drawn": self._shares if self._weights_losses() else weights,
                "weights": weights,
                "rates": [group["lr"] for group in self.optimizer.param_groups],
                "model": copy.deepcopy(self.model),
                "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            }
        )
        return result

    def _update(self, step: int) -> None:
        position = self._target_loader.position
        model = copy.deepcopy(self.model)
        super()._update(step)
        self.judged.append(
            {
                "step": step,
                "probe": None if self._rows is None else self._probe(step),
                "position": position,
                "model": model,
                "hypergradient": torch.tensor(self._gaps, dtype=torch.float64),
            }
        )


def build(
    name: str,
    folder: Path,
    settings: dict[str, Any] | None = None,
    *,
    trainer_class: type[Trainer] = MixtureTrainer,
    trainer_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    config = MixtureConfig(**{**DOMAINS, **(settings or {})})
    extra = {"target_dataset": make_dataset(name, 10, seed=7), "bilevel_config": config, **(trainer_kwargs or {})}
    return make_trainer(trainer_class, name, folder, trainer_kwargs=extra, **kwargs)


def train(*args: Any, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
    trainer = build(*args, **kwargs)
    set_seed(11)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


def train_plain(name: str, folder: Path, **kwargs: Any) -> Trainer:
    trainer = make_trainer(Trainer, name, folder, **kwargs)
    set_seed(11)
    trainer.train()
    return trainer


def wide_model(name: str) -> nn.Module:
    return wide_norms(make_model(name)).double()


def by_domain(name: str, num: int = 64, seed: int = 0) -> dict[str, datasets.Dataset]:
    dataset = make_dataset(name, num, seed)
    return {name: dataset.filter(lambda row, own=name: row["source"] == own) for name in NAMES}


class Endless(IterableDataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.rows


def streams(name: str) -> dict[str, Endless]:
    rows = make_rows(name, 66)
    return {domain: Endless(rows[j::3]) for j, domain in enumerate(NAMES)}


# What is refused, and what is said -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mixture": "equal"}, "`mixture` must be one of learned, proportional, uniform"),
        ({"hypergradient": "exact"}, "`hypergradient` must be one of alignment, penalty, unrolled"),
        ({"update_rule": "adam"}, "`update_rule` must be one of mirror, projected"),
        ({"initial_weights": "random"}, "`initial_weights` must be one of"),
        ({"inner_steps": 0}, "`inner_steps` must be at least 1 or 'auto', got 0"),
        ({"reference_steps": "0"}, "`reference_steps` must be at least 1"),
        (
            {"inner_steps": 4, "reference_steps": 5},
            r"`reference_steps` \(5\) repeats the last of the `inner_steps` \(4\)",
        ),
        ({"weight_learning_rate": 0.0}, "`weight_learning_rate` must be positive and finite"),
        ({"weight_learning_rate": math.inf}, "`weight_learning_rate` must be positive and finite"),
        ({"penalty": 0.0}, "`penalty` must be positive and finite"),
        ({"penalty": math.nan}, "`penalty` must be positive and finite"),
        ({"smoothing": 1.5}, r"`smoothing` must be in \[0, 1\]"),
        ({"min_weight": -0.1}, "`min_weight` must be in"),
        ({"min_weight": 1.0}, "`min_weight` must be in"),
        ({"probe_batches": 0}, "`probe_batches` must be at least 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MixtureConfig(**settings)


def test_settings_of_a_wrong_type() -> None:
    with pytest.raises(TypeError, match="`inner_steps` must be int or 'auto', got 'many'"):
        MixtureConfig(inner_steps="many")
    assert MixtureConfig(inner_steps=5, reference_steps=5, weight_learning_rate="0.5").weight_learning_rate == 0.5


def one_domain(name: str) -> datasets.Dataset:
    return make_dataset(name, 8).remove_columns("source").add_column("source", ["web"] * 8)


class OwnLoss(MixtureTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


ROWS = make_rows("vit", 12)
STREAM = Endless([{**row, "source": i % 3} for i, row in enumerate(ROWS)])
NAMED_STREAM = Endless([{**row, "source": NAMES[i % 3]} for i, row in enumerate(ROWS)])
SGD = {"optim": "sgd", "max_grad_norm": 0.0}
UNROLLED = {"hypergradient": "unrolled"}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    # settings, arguments of the trainer, training arguments, what is said
    "no domains": ({"domain_column": None}, {}, {}, "needs to know the domains: set `domain_column`"),
    "one domain": ({}, {"train_dataset": one_domain("vit")}, {}, "one domain only in `train_dataset`, 'web'"),
    "an empty domain": (
        {"domain_names": [*NAMES, "maths"]},
        {},
        {},
        r"no sample of the domains \['maths'\]",
    ),
    "an empty dataset of a dict": (
        {"domain_column": None},
        {"train_dataset": {"a": ROWS, "b": []}},
        {},
        r"no sample of the domains \['b'\]",
    ),
    "weights that do not sum to 1": (
        {},
        {"mixture": {"web": 0.5, "books": 0.4, "code": 0.2}},
        {},
        "sum to 1.1 and must",
    ),
    "a negative weight": ({}, {"mixture": {"web": -0.5, "books": 1.5}}, {}, r"weight of 'web' .* must be a number in"),
    "a weight that is no number": ({}, {"mixture": {"web": "1"}}, {}, "weight of 'web' in `mixture` must be a number"),
    "a weight that is NaN": ({}, {"mixture": {"web": math.nan}}, {}, "must be a number in"),
    "unknown names": (
        {},
        {"mixture": {**FIXED, "maths": 0.0}},
        {},
        r"names the domains \['maths'\], and `train_dataset`",
    ),
    "missing names": ({}, {"mixture": {"web": 1}}, {}, r"no weight to the domains \['books', 'code'\].*write 0"),
    "a missing file": (
        {},
        {"mixture": "nowhere.json"},
        {},
        "a file written by `save_mixture`; reading 'nowhere.json'",
    ),
    "large min_weight": ({"min_weight": 0.34}, {}, {}, "`min_weight` is 0.34 for each of 3 domains.*above 0.3333"),
    "no target": ({}, {"target_dataset": None}, {}, "needs `target_dataset`"),
    "a stream to draw from": (
        {"domain_names": NAMES},
        {"train_dataset": NAMED_STREAM},
        {},
        "one stream, of which domains cannot be drawn",
    ),
    "a stream without names": (
        {"realisation": "weight"},
        {"train_dataset": STREAM},
        {},
        "Set `domain_names`",
    ),
    "streams in workers": (
        {"domain_column": None},
        {"train_dataset": streams("vit")},
        {"dataloader_num_workers": 2},
        "would not learn of new weights. Set `dataloader_num_workers=0`",
    ),
    "sizes of streams": (
        {"domain_column": None, "initial_weights": "proportional"},
        {"train_dataset": streams("vit")},
        {},
        "sizes of streams are not known",
    ),
    "a mixed dict": (
        {"domain_column": None},
        {"train_dataset": {"a": ROWS, "b": Endless(ROWS)}},
        {},
        "streams and datasets with a length",
    ),
    "unrolled AdamW": (UNROLLED, {}, {"max_grad_norm": 0.0}, "SGD without momentum only. Set `optim='sgd'`"),
    "unrolled momentum": (UNROLLED, {}, {**SGD, "optim_args": "momentum=0.9"}, "SGD without momentum only"),
    "unrolled clipping": (UNROLLED, {}, {"optim": "sgd"}, "clipping, and `max_grad_norm` is 1.0. Set it to 0"),
    "unrolled bf16": (UNROLLED, {}, {**SGD, "bf16": True}, "one process, in full precision"),
    "own compute_loss": (
        {"realisation": "weight"},
        {"trainer_class": OwnLoss},
        {},
        "`OwnLoss.compute_loss` would not be called. Use `realisation='draw'`",
    ),
    "own loss function": (
        {"realisation": "weight"},
        {"compute_loss_func": lambda *a, **k: None},
        {},
        "`compute_loss_func` would not be called",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_construction(case: str, tmp_path: Path) -> None:
    settings, given, arguments, match = REFUSED[case]
    given = dict(given)
    train_dataset, trainer_class = given.pop("train_dataset", None), given.pop("trainer_class", MixtureTrainer)
    with pytest.raises(ValueError, match=match):
        build(
            "vit",
            tmp_path,
            settings,
            train_dataset=train_dataset,
            trainer_class=trainer_class,
            trainer_kwargs=given,
            **arguments,
        )


def test_files_that_are_no_mixtures(tmp_path: Path) -> None:
    for content in ("{", "{}", "[1]", '{"mixture": {"web": 2}}'):
        (tmp_path / "mixture.json").write_text(content)
        with pytest.raises(ValueError, match="`mixture`"):
            build("vit", tmp_path, trainer_kwargs={"mixture": tmp_path / "mixture.json"})


def test_an_optimizer_that_a_twin_cannot_have(tmp_path: Path) -> None:
    model = make_model("vit")

    def given(momentum: float = 0.0) -> dict[str, Any]:
        return {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum), None)}

    with pytest.raises(ValueError, match="cannot take one that is given as `optimizers`"):
        build("vit", tmp_path, model=model, trainer_kwargs=given())
    with pytest.raises(ValueError, match="SGD without momentum only"):
        build("vit", tmp_path, UNROLLED, model=model, trainer_kwargs=given(0.9), max_grad_norm=0.0)
    for method in ("unrolled", "alignment"):
        settings = {"hypergradient": method, "inner_steps": 2}
        trainer = train("vit", tmp_path, settings, model=model, trainer_kwargs=given(), max_grad_norm=0.0, max_steps=3)
        assert set(trainer.domain_weights.values()) != {1 / 3}


class OwnOptimizer(MixtureTrainer):
    def create_optimizer(self) -> torch.optim.Optimizer:  # without the argument, as users of the Trainer write it
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


class OptimizerOfTheModel(MixtureTrainer):
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.of_the_model, lr=self.args.learning_rate)
        return self.optimizer


def test_an_optimizer_of_the_users_own_trains_the_twin(tmp_path: Path) -> None:
    usual = train("vit", tmp_path, {"inner_steps": 2}, optim="sgd")
    assert set(usual.mixture.values()) != {1 / 3}
    assert train("vit", tmp_path, {"inner_steps": 2}, trainer_class=OwnOptimizer).mixture == usual.mixture
    trainer = build("vit", tmp_path, {"inner_steps": 2}, trainer_class=OptimizerOfTheModel)
    trainer.of_the_model = list(trainer.model.parameters())
    with pytest.raises(
        ValueError, match="`OptimizerOfTheModel.create_optimizer` makes an optimizer of other parameters"
    ):
        trainer.train()


class Unknown(nn.Module):
    """A head that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model("vit")

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return self.inner(pixel_values=pixel_values, labels=labels)


def unknown_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["pixel_values"])["logits"], batch["labels"], reduction="none")


def test_a_head_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The loss of each sample of `Unknown` is not known"):
        build("vit", tmp_path, model=Unknown())
    given = {"compute_sample_losses": unknown_losses}
    trainer = train("vit", tmp_path, {"inner_steps": 1}, model=Unknown(), trainer_kwargs=given, max_steps=2)
    same = train("vit", tmp_path, {"inner_steps": 1}, max_steps=2)
    assert torch.equal(parameters_of(trainer), parameters_of(same))
    # Drawing by fixed weights needs no losses at all.
    train("vit", tmp_path, model=Unknown(), trainer_kwargs={"mixture": FIXED, "target_dataset": None}, max_steps=1)


IGNORED = [
    ({"penalty": 2.0, "inner_steps": 2}, {"mixture": FIXED}, {}, ["inner_steps", "penalty"]),
    ({"mixture": "uniform"}, {"mixture": FIXED}, {}, ["mixture"]),
    ({"mixture": "uniform", "smoothing": 0.5}, {}, {}, ["smoothing"]),
    ({"hypergradient": "alignment", "reference_steps": 2}, {}, {}, ["reference_steps"]),
    ({**UNROLLED, "probe_batches": 2, "penalty": 3.0}, {}, SGD, ["penalty", "probe_batches"]),
]


@pytest.mark.parametrize(("settings", "given", "arguments", "names"), IGNORED)
def test_ignored_settings_are_named(
    settings: dict[str, Any], given: dict[str, Any], arguments: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning) as caught:
        build("vit", tmp_path, settings, trainer_kwargs=given, **arguments)
    messages = [str(entry.message) for entry in caught]
    assert len(messages) == len(names)
    for name, message in zip(sorted(names), sorted(messages), strict=True):
        assert message.startswith(f"`{name}` is ignored with ")


def test_other_warnings(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="`train_sampling_strategy='group_by_length'` is ignored"):
        build("vit", tmp_path, train_sampling_strategy="group_by_length")
    with pytest.warns(UserWarning, match="`reference_model` is ignored by MixtureTrainer"):
        build("vit", tmp_path, {"hypergradient": "alignment"}, trainer_kwargs={"reference_model": make_model("vit")})
    target = make_dataset("vit", 8).remove_columns("source").add_column("source", ["web", "maths"] * 4)
    with pytest.warns(UserWarning, match=r"samples of \['maths'\], which `train_dataset` lacks"):
        build("vit", tmp_path, trainer_kwargs={"target_dataset": target})


def test_nothing_is_known_before_training(tmp_path: Path) -> None:
    trainer = build("vit", tmp_path)
    for ask in ("domain_weights", "mixture"):
        with pytest.raises(RuntimeError, match="no domain weights before training"):
            getattr(trainer, ask)
    with pytest.raises(RuntimeError, match="before training"):
        trainer.plot_domain_weights()


def test_steps_that_are_resolved(tmp_path: Path) -> None:
    for settings, expected in [
        ({}, (49, 4)),
        ({"hypergradient": "alignment"}, (1, 1)),
        ({"inner_steps": 30}, (30, 3)),
        ({"reference_steps": 60}, (60, 60)),
        ({"reference_steps": 7}, (49, 7)),
    ]:
        trainer = build("vit", tmp_path, settings)
        trainer.state.max_steps = 400
        assert (trainer.inner_steps, trainer.reference_steps) == expected


# Fixed weights, and what is drawn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("realisation", ["draw", "weight"])
def test_the_pools_own_shares_are_the_plain_trainer(realisation: str, tmp_path: Path) -> None:
    plain = train_plain("llama", tmp_path, gradient_accumulation_steps=2)
    given = {"mixture": SHARES, "target_dataset": None}
    trainer = train(
        "llama", tmp_path, {"realisation": realisation}, gradient_accumulation_steps=2, trainer_kwargs=given
    )
    assert torch.equal(parameters_of(trainer), parameters_of(plain))
    assert trainer.mixture == trainer.domain_weights == pytest.approx(SHARES)
    trainer.save_mixture(tmp_path / "mixture.json")
    assert json.loads((tmp_path / "mixture.json").read_text())["mixture"] == pytest.approx(SHARES)
    trainer.plot_domain_weights()
    other = train("llama", tmp_path, {"realisation": realisation}, trainer_kwargs={"mixture": FIXED})
    assert not torch.equal(parameters_of(other), parameters_of(plain)) and other.mixture == FIXED


def summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("name", "arguments", "given"),
    [
        ("llama", {"gradient_accumulation_steps": 3}, {}),
        ("bert", {}, {}),
        ("llama", {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.2}, {}),
        ("bert", {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.2}, {}),
        ("vit", {"gradient_accumulation_steps": 2}, {"compute_loss_func": summed_loss}),
    ],
)
def test_weighted_losses_with_weights_of_one_are_the_trainers(
    name: str, arguments: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    class Weighting(MixtureTrainer):
        def _is_off(self) -> bool:
            return False

        def _multipliers(self, origin: Any) -> Tensor:
            return super()._multipliers(origin) * factor

    def run(own: dict[str, Any]) -> Any:
        own = {**own, "mixture": SHARES}
        return train(name, tmp_path, settings, trainer_class=Weighting, trainer_kwargs=own, **arguments)

    arguments = {**arguments, "optim": "sgd", "learning_rate": 0.1, "logging_steps": 1, "num_pool": 64}
    settings, factor = {"realisation": "weight"}, 1.0
    plain = train_plain(name, tmp_path, trainer_kwargs=given, **arguments)
    own = {**given, "compute_sample_losses": unknown_losses} if given else {}
    weighted = run(own)
    torch.testing.assert_close(parameters_of(weighted), parameters_of(plain), rtol=0, atol=1e-6)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (weighted, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    factor = 0.5
    assert not torch.allclose(parameters_of(run(own)), parameters_of(plain), rtol=0, atol=1e-5)


def test_multipliers_are_weights_over_shares(tmp_path: Path) -> None:
    """A step of SGD with weighted losses, by hand."""
    trainer = train(
        "llama", tmp_path, {"realisation": "weight"}, trainer_class=RecordingTrainer, trainer_kwargs={"mixture": FIXED},
        optim="sgd", max_grad_norm=0.0, gradient_accumulation_steps=2, max_steps=1, model=wide_model("llama"),
    )  # fmt: skip
    (step,) = trainer.steps
    w = torch.tensor([FIXED[n] / SHARES[n] for n in NAMES], dtype=torch.float64)
    model = step["model"]
    training_loss(model, step, [w[ids] for ids in step["ids"]]).backward()
    for p, q in zip(model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(q.detach(), (p - 0.01 * p.grad).detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_draws_have_the_weights_as_shares_in_every_step(accumulation: int, tmp_path: Path) -> None:
    trainer = train(
        "vit", tmp_path, trainer_class=RecordingTrainer, trainer_kwargs={"mixture": FIXED, "target_dataset": None},
        gradient_accumulation_steps=accumulation, max_steps=12 // accumulation,
    )  # fmt: skip
    window = torch.tensor([FIXED[name] for name in NAMES]) * 8 * accumulation
    assert len(trainer.steps) == 12 // accumulation
    for step in trainer.steps:
        assert torch.bincount(torch.cat(step["ids"]), minlength=3).tolist() == window.tolist()
    seen = [tuple(batch["pixel_values"][:, 0, 0, 0].tolist()) for step in trainer.steps for batch in step["batches"]]
    assert len(set(seen)) == len(seen)  # another order in every epoch, of 8 batches


def test_uniform_is_equal_shares_and_learns_nothing(tmp_path: Path) -> None:
    trainer = train(
        "vit", tmp_path, {"mixture": "uniform"}, trainer_class=RecordingTrainer, per_device_train_batch_size=6,
        trainer_kwargs={"target_dataset": None},
    )  # fmt: skip
    assert all(torch.bincount(step["ids"][0]).tolist() == [2, 2, 2] for step in trainer.steps)
    assert set(trainer.mixture.values()) == {1 / 3} and trainer.judged == []


def test_a_dict_of_datasets_is_a_dataset_with_a_column(tmp_path: Path) -> None:
    parts = by_domain("vit")
    runs = []
    for pool, column in [(parts, None), (datasets.concatenate_datasets(list(parts.values())), "source")]:
        settings = {"domain_column": column, "inner_steps": 2, "reference_steps": 1}
        runs.append(train("vit", tmp_path, settings, train_dataset=pool))
    lists = {name: part.remove_columns("source").to_list() for name, part in parts.items()}
    runs.append(train("vit", tmp_path, {**settings, "domain_column": None}, train_dataset=lists))
    assert runs[0].domain_names == NAMES
    for other in runs[1:]:
        assert torch.equal(parameters_of(runs[0]), parameters_of(other)) and runs[0].mixture == other.mixture
    assert set(runs[0].mixture.values()) != {1 / 3}


def test_a_stream_is_weighted_by_the_shares_seen_so_far(tmp_path: Path) -> None:
    rows = [{**row, "source": NAMES[(i // 5) % 3]} for i, row in enumerate(make_rows("vit", 64))]
    settings = {"realisation": "weight", "domain_names": NAMES, "inner_steps": 2, "reference_steps": 1}
    trainer = train("vit", tmp_path, settings, train_dataset=Endless(rows), trainer_class=RecordingTrainer)
    counts = torch.zeros(3)
    for step in trainer.steps:
        counts += torch.bincount(step["ids"][0], minlength=3)
        torch.testing.assert_close(step["drawn"], (counts / counts.sum()).double())
    assert len(trainer.judged) == 2 and all(entry["hypergradient"].isfinite().all() for entry in trainer.judged)
    wrong = Endless([{**row, "source": i % 4} for i, row in enumerate(ROWS)])
    with pytest.raises(ValueError, match="does not list the domain 3, which item 3 of the stream has as `source`"):
        train("vit", tmp_path, settings, train_dataset=wrong)


# The hypergradients ----------------------------------------------------------------------------------------------------


def row_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed loss of every row, and its number of predictions."""
    inputs = {key: batch[key] for key in ("pixel_values", "input_ids", "attention_mask") if key in batch}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    logits = model(**inputs).logits
    if logits.ndim == 2:
        return F.cross_entropy(logits, batch["labels"], reduction="none"), torch.ones(len(logits))
    labels = batch["labels"][:, 1:]
    tokens = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return tokens.sum(1), (labels != -100).sum(1)


def training_loss(model: nn.Module, step: dict[str, Any], multipliers: list[Tensor]) -> Tensor:
    rows = [row_losses(model, batch) for batch in step["batches"]]
    num = sum(counts.sum() for _, counts in rows)
    if "pixel_values" in step["batches"][0] or type(model).__name__.startswith("Bert"):  # a mean of micro-batches
        return sum((m * s).mean() for m, (s, _) in zip(multipliers, rows, strict=True)) / len(rows)
    return sum((m * s).sum() for m, (s, _) in zip(multipliers, rows, strict=True)) / num


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    sums, counts = row_losses(model, batch)
    return sums.sum() / counts.sum()


def domain_losses(model: nn.Module, probe: list[tuple[dict[str, Tensor], Tensor]]) -> Tensor:
    rows = [(*row_losses(model, batch), ids) for batch, ids in probe]
    sums, counts, ids = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return torch.stack([sums[ids == j].sum() / counts[ids == j].sum() for j in range(3)])


def target_batch(trainer: RecordingTrainer, position: int) -> dict[str, Tensor]:
    return trainer._target_loader.batch_at(position)


def optimizer_by_hand(trainer: RecordingTrainer, model: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    decay = trainer.args.weight_decay
    return torch.optim.AdamW([{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}])


BUSY = {
    "gradient_accumulation_steps": 3,  # 64 rows: windows of 24, 24 and 16
    "weight_decay": 0.3,
    "max_grad_norm": 0.4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "max_steps": 9,
}


@pytest.mark.parametrize("realisation", ["draw", "weight"])
def test_penalty_by_hand(realisation: str, tmp_path: Path) -> None:
    settings = {"inner_steps": 4, "reference_steps": 3, "penalty": 0.5, "probe_batches": 2, "realisation": realisation}
    trainer = train("llama", tmp_path, settings, model=wide_model("llama"), trainer_class=RecordingTrainer, **BUSY)
    assert [entry["step"] for entry in trainer.judged] == [4, 8]
    for entry in trainer.judged:
        steps = trainer.steps[entry["step"] - 3 : entry["step"]]
        twin = copy.deepcopy(steps[0]["model"])
        optimizer = optimizer_by_hand(trainer, twin)
        optimizer.load_state_dict(steps[0]["optimizer"])
        for k, step in enumerate(steps):
            loss = training_loss(twin, step, [step["multipliers"][ids] for ids in step["ids"]])
            (loss + mean_loss(twin, target_batch(trainer, entry["position"] + k)) / 0.5).backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.4)
            for group, rate in zip(optimizer.param_groups, step["rates"], strict=True):
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            expected = 0.5 * (domain_losses(twin, entry["probe"]) - domain_losses(entry["model"], entry["probe"]))
        torch.testing.assert_close(entry["hypergradient"], expected, rtol=0, atol=1e-6)
        assert float(expected.abs().min()) > 1e-4
    rows = sum(len(ids) for _, ids in trainer.judged[0]["probe"])
    assert rows == 3 * 6  # ceil(2 * 8 / 3) of each domain


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"reference_steps": 3}),
        ("llama", {"reference_steps": 4, "realisation": "weight", "update_rule": "projected"}),
        ("bert", {"reference_steps": 4}),
        ("vit", {"reference_steps": 1}),
        ("vit", {"reference_steps": 2, "realisation": "weight"}),
    ],
)
def test_without_a_target_the_twin_is_the_model(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """So batches, multipliers, optimizer state, learning rates, clipping and decay are those of the model."""
    distances = []

    class Comparing(RecordingTrainer):
        def _twin_gaps(self, step: int) -> Tensor:
            gaps = super()._twin_gaps(step)
            pairs = zip(self.reference.module.parameters(), self.model.parameters(), strict=True)
            distances.append(max(float((a - b).detach().abs().max()) for a, b in pairs))
            assert self.model.training and not self.reference.module.training
            return gaps

    settings = {"inner_steps": 4, "penalty": 1e12, "weight_learning_rate": 2.0, **settings}
    trainer = train(name, tmp_path, settings, model=wide_model(name), trainer_class=Comparing, **BUSY, num_pool=60)
    assert len(distances) == 2 and max(distances) < 1e-8
    for entry in trainer.judged:
        assert float(entry["hypergradient"].abs().max()) / 1e12 < 1e-6
    moved = [
        (a - b).abs().max()
        for a, b in zip(trainer.model.parameters(), trainer.steps[0]["model"].parameters(), strict=True)
    ]
    assert max(moved) > 1e-3


@pytest.mark.parametrize("name", ["llama", "vit"])
@pytest.mark.parametrize("hypergradient", ["alignment", "penalty"])
def test_one_step_ahead_is_the_scalar_product_of_gradients(name: str, hypergradient: str, tmp_path: Path) -> None:
    """Exactly for alignment; a twin of one SGD step moves against the target gradient, so it gives the same direction."""
    settings: dict[str, Any] = {"hypergradient": hypergradient, "inner_steps": 1}
    if hypergradient == "penalty":
        settings |= {"reference_steps": 1, "penalty": 100.0}
    trainer = train(
        name, tmp_path, settings, model=wide_model(name), trainer_class=RecordingTrainer, optim="sgd", max_steps=3,
        learning_rate=0.02, max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    for i, entry in enumerate(trainer.judged):
        model, before = entry["model"].eval(), trainer.steps[i]["model"]
        start = model if hypergradient == "alignment" else before
        loss = mean_loss(start, target_batch(trainer, entry["position"]))
        target = torch.autograd.grad(loss, list(start.parameters()), allow_unused=True, materialize_grads=True)
        parameters, products = list(model.parameters()), []
        for loss in domain_losses(model, entry["probe"]):
            own = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            products.append(-sum((a * b).sum() for a, b in zip(own, target, strict=True)))
        expected = torch.stack(products)
        if hypergradient == "penalty":  # to first order in 1 / penalty
            torch.testing.assert_close(entry["hypergradient"], 0.02 * expected, rtol=0.03, atol=1e-4)
        else:
            torch.testing.assert_close(entry["hypergradient"], expected, rtol=1e-5, atol=1e-7)
        assert float(expected.abs().max()) > 1e-2


# The Trainer adds up the micro-batches' means of BERT's classifier; unrolled is the mean, as for all others.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "realisation", "accumulation"), [("llama", "draw", 2), ("llama", "weight", 2), ("bert", "draw", 1)]
)
def test_unrolled_against_finite_differences(name: str, realisation: str, accumulation: int, tmp_path: Path) -> None:
    settings = {**UNROLLED, "inner_steps": 3, "realisation": realisation, "weight_learning_rate": 0.3}
    arguments = {"gradient_accumulation_steps": accumulation, "weight_decay": 0.2, "max_steps": 7}
    arguments["learning_rate"] = 0.1
    trainer = train(
        name, tmp_path, settings, model=wide_model(name), trainer_class=RecordingTrainer, **SGD, **arguments
    )
    assert [entry["step"] for entry in trainer.judged] == [3, 6]
    for entry in trainer.judged:
        steps = trainer.steps[entry["step"] - 3 : entry["step"]]

        w, h = steps[0]["weights"], 1e-3

        def target_loss(weights: Tensor, entry: Any = entry, steps: Any = steps, w: Tensor = w) -> Tensor:
            model = copy.deepcopy(steps[0]["model"])
            for step in steps:
                ratio = weights / step["drawn"]
                loss = training_loss(model, step, [ratio[ids] for ids in step["ids"]])
                gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
                with torch.no_grad():
                    for p, g in zip(model.parameters(), gradients, strict=True):
                        decay = 0.2 if p.ndim > 1 else 0.0
                        p -= step["rates"][0] * ((0 if g is None else g) + decay * p)
            if weights is w:
                for p, q in zip(model.parameters(), entry["model"].parameters(), strict=True):
                    torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
            with torch.no_grad():
                return mean_loss(model, target_batch(trainer, entry["position"]))

        target_loss(w)  # this is the run, multiplier by multiplier
        slopes = [
            (target_loss(w + h * e) - target_loss(w - h * e)) / (2 * h) for e in torch.eye(3, dtype=torch.float64)
        ]
        torch.testing.assert_close(entry["hypergradient"], torch.stack(slopes), rtol=1e-4, atol=1e-6)
        assert float(torch.stack(slopes).abs().max()) > 1e-3


@pytest.mark.slow
def test_the_weights_take_the_steps_of_their_hypergradients(tmp_path: Path) -> None:
    for settings, rate in [
        ({}, weight_learning_rate(3, 3, "mirror")),
        ({"update_rule": "projected", "min_weight": 0.2}, weight_learning_rate(3, 3, "projected")),
        ({"weight_learning_rate": 0.2, "smoothing": 0.3, "initial_weights": "proportional"}, 0.2),
    ]:
        settings = {"inner_steps": 2, "reference_steps": 1, **settings}
        trainer = train("vit", tmp_path, settings, trainer_class=RecordingTrainer, max_steps=8, num_pool=16)
        first = [5 / 16, 5 / 16, 6 / 16] if "initial_weights" in settings else [1 / 3] * 3
        expected = DomainWeights(
            torch.tensor(first, dtype=torch.float64),
            settings.get("update_rule", "mirror"),
            settings.get("smoothing", 0.0),
            settings.get("min_weight", 0.0),
        )
        trajectory = [first]
        for entry in trainer.judged:
            expected.step(entry["hypergradient"], rate)
            trajectory.append(expected.weights.tolist())
        assert len(trainer.judged) == 3  # at 2, 4 and 6: after the last step it is too late
        assert list(trainer.domain_weights.values()) == expected.weights.tolist()
        assert list(trainer.mixture.values()) == expected.average.tolist()
        assert trainer._trajectory == list(zip([0, 2, 4, 6], trajectory, strict=True))
        logged = [entry for entry in trainer.state.log_history if "mixture/inner_steps" in entry]
        assert logged[-1]["mixture/hypergradient/web"] == trainer._gaps[2]
        assert logged[-1]["mixture/weight/books"] == trainer.domain_weights["books"]


@pytest.mark.slow
def test_what_the_target_is_like_gains_weight(tmp_path: Path) -> None:
    """One domain has the target's labels, the others wrong ones."""
    rows = make_rows("vit", 24)
    for row in rows:
        row["pixel_values"] = (torch.tensor(row["pixel_values"]) + 2 * row["labels"]).tolist()
    pool = {name: [{**row, "labels": (row["labels"] + shift) % 4} for row in rows] for shift, name in enumerate(NAMES)}
    for hypergradient, arguments in (("penalty", {}), ("alignment", {}), ("unrolled", SGD)):
        settings = {"domain_column": None, "hypergradient": hypergradient, "inner_steps": 4}
        if hypergradient == "penalty":
            settings["reference_steps"] = 2
        arguments = {"learning_rate": 0.1 if arguments else 3e-3, "logging_steps": 30, **arguments}
        trainer = train(
            "vit", tmp_path, settings, train_dataset=pool, trainer_kwargs={"target_dataset": rows}, max_steps=21, **arguments
        )  # fmt: skip
        assert max(trainer.mixture, key=trainer.mixture.get) == "books", hypergradient
        assert trainer.mixture["books"] > 0.4


@pytest.mark.parametrize("realisation", ["draw", "weight"])
def test_unrolling_with_a_weight_of_zero(realisation: str, tmp_path: Path) -> None:
    settings = {**UNROLLED, "inner_steps": 1, "realisation": realisation}
    settings |= {"update_rule": "projected", "weight_learning_rate": 20.0}
    trainer = train("vit", tmp_path, settings, trainer_class=RecordingTrainer, max_steps=6, **SGD)
    assert min(trainer._trajectory[1][1]) == 0.0
    assert all(entry["hypergradient"].isfinite().all() for entry in trainer.judged)
    assert len({tuple(entry["hypergradient"].tolist()) for entry in trainer.judged}) == 5


@pytest.mark.parametrize("realisation", ["draw", "weight"])
def test_unrolling_replays_the_steps_with_their_dropout(realisation: str, tmp_path: Path) -> None:
    class Comparing(MixtureTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            taken[self.state.global_step] = taken.get(self.state.global_step, 0.0) + float(loss)
            return loss

        def _replayed_loss(self, entry: dict[str, Any], weights: Tensor) -> Tensor:
            loss = super()._replayed_loss(entry, weights)
            again.append(float(loss.detach()))
            return loss

    taken: dict[int, float] = {}
    again: list[float] = []
    train(
        "llama", tmp_path, {**UNROLLED, "inner_steps": 2, "realisation": realisation}, trainer_class=Comparing,
        dropout=0.3, eval_strategy="steps", eval_steps=1, gradient_accumulation_steps=2, max_steps=5,
        trainer_kwargs={"eval_dataset": make_dataset("llama", 8, seed=5)}, learning_rate=0.1, **SGD,
    )  # fmt: skip
    assert again == pytest.approx([taken[step] for step in (1, 0, 3, 2)], abs=1e-5)


# Costs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "with_gradient", "without"),
    [
        ({"reference_steps": 2}, 2 * 2 + 2, 2 * 3),  # K steps on two micro-batches and a target batch; twice the probe
        ({"hypergradient": "alignment"}, 1, 2 * 3),  # a target batch; twice the probe
        (UNROLLED, 4 * 2 + 1, 0),  # every step again, and a target batch
    ],
)
def test_forward_passes_of_an_update(
    settings: dict[str, Any], with_gradient: int, without: int, tmp_path: Path
) -> None:
    arguments = SGD if settings is UNROLLED else {}
    settings = {"inner_steps": 4, **settings}
    if "hypergradient" not in settings or settings["hypergradient"] == "alignment":
        settings["probe_batches"] = 3  # 8 rows of each of three domains
    trainer = build("vit", tmp_path, settings, gradient_accumulation_steps=2, max_steps=8, **arguments)
    passes = {True: 0, False: 0}

    def count(*_: Any) -> None:
        passes[torch.is_grad_enabled()] += 1

    trainer.model.register_forward_hook(count)  # copied with the model
    trainer.train()
    assert passes == {True: 8 * 2 + with_gradient, False: without}


# Evaluation ------------------------------------------------------------------------------------------------------------


def test_evaluation_of_every_domain(tmp_path: Path) -> None:
    dataset = make_dataset("llama", 30, seed=5)
    target = make_dataset("llama", 10, seed=7)  # web, books, code, web, ...: 4, 3 and 3
    trainer = build("llama", tmp_path, trainer_kwargs={"eval_dataset": dataset, "target_dataset": target})
    metrics = trainer.evaluate()
    plain = make_trainer(Trainer, "llama", tmp_path, trainer_kwargs={"eval_dataset": dataset})
    assert metrics["eval_loss"] == plain.evaluate()["eval_loss"]
    batch = trainer.data_collator([{k: v for k, v in row.items() if k != "source"} for row in dataset])
    with torch.no_grad():
        sums, counts = row_losses(trainer.model.eval(), batch)
    expected = {}
    for name in NAMES:
        rows = torch.tensor([source == name for source in dataset["source"]])
        expected[name] = float(sums[rows].sum() / counts[rows].sum())
        assert metrics[f"eval_{name}_loss"] == pytest.approx(expected[name], abs=1e-5)
        assert metrics[f"eval_{name}_perplexity"] == pytest.approx(math.exp(expected[name]), rel=1e-5)
    weighted = 0.4 * expected["web"] + 0.3 * expected["books"] + 0.3 * expected["code"]
    assert metrics["eval_weighted_loss"] == pytest.approx(weighted, abs=1e-5)
    other = trainer.evaluate(dataset.filter(lambda row: row["source"] == "web"), metric_key_prefix="test")
    assert other["test_web_loss"] == pytest.approx(expected["web"], abs=1e-5)
    assert other["test_weighted_loss"] == other["test_web_loss"] and "test_books_loss" not in other
    assert "eval_web_loss" not in trainer.evaluate(dataset.remove_columns("source"))
    trainer.target_dataset = target.remove_columns("source")
    assert trainer.evaluate()["eval_weighted_loss"] == pytest.approx(sum(expected.values()) / 3, abs=1e-5)


@pytest.mark.filterwarnings("error:`target_dataset` has samples of")
@pytest.mark.parametrize("names", [None, ["web", "books", "code"]])
def test_numbers_of_domains_are_named_everywhere(names: list[str] | None, tmp_path: Path) -> None:
    """As classes, and as plain numbers with `domain_names`."""

    def numbered(rows: datasets.Dataset) -> datasets.Dataset:
        ids = [["web", "books", "code"].index(source) for source in rows["source"]]
        rows = rows.remove_columns("source").add_column("source", ids)
        return (
            rows.cast_column("source", datasets.ClassLabel(names=["web", "books", "code"])) if names is None else rows
        )

    evaluated, target = make_dataset("llama", 30, seed=5), make_dataset("llama", 10, seed=7)
    found = []
    for change, given in ((lambda rows: rows, None), (numbered, names)):
        settings = {"bilevel_config": MixtureConfig(domain_column="source", inner_steps=1, domain_names=given)}
        sets = {"eval_dataset": change(evaluated), "target_dataset": change(target)}
        pool = change(make_dataset("llama", 24))
        trainer = make_trainer(
            MixtureTrainer, "llama", tmp_path, train_dataset=pool, trainer_kwargs={**settings, **sets}
        )
        losses = {name: value for name, value in trainer.evaluate().items() if name.endswith("_loss")}
        found.append(losses)
    assert found[0] == pytest.approx(found[1]) and "eval_books_loss" in found[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_evaluation_of_a_dict_of_datasets(tmp_path: Path) -> None:
    parts = by_domain("llama", 30, seed=5)
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    results = []
    for arguments in ({}, workers):
        trainer = build("llama", tmp_path, trainer_kwargs={"eval_dataset": parts}, **arguments)
        results.append([trainer.evaluate() for _ in range(2)])
    metrics = results[0][0]
    whole = build("llama", tmp_path, trainer_kwargs={"eval_dataset": make_dataset("llama", 30, seed=5)}).evaluate()
    for name in NAMES:  # the Trainer's own losses, a mean over batches; by the domain column it is over tokens
        assert metrics[f"eval_{name}_loss"] == pytest.approx(whole[f"eval_{name}_loss"], abs=2e-3)
        assert metrics[f"eval_{name}_{name}_loss"] == pytest.approx(whole[f"eval_{name}_loss"], abs=1e-5)
        assert metrics[f"eval_{name}_perplexity"] == math.exp(metrics[f"eval_{name}_loss"])
    weighted = sum(share * metrics[f"eval_{name}_loss"] for name, share in zip(NAMES, (0.3, 0.3, 0.4), strict=True))
    assert metrics["eval_weighted_loss"] == pytest.approx(weighted)
    for other in (results[0][1], *results[1]):
        assert {k: v for k, v in other.items() if k.endswith("loss")} == {
            k: v for k, v in metrics.items() if k.endswith("loss")
        }
    assert trainer.eval_dataset is parts


def test_classification_has_no_perplexity_and_users_losses_are_evaluated(tmp_path: Path) -> None:
    given = {"eval_dataset": make_dataset("vit", 30, seed=5)}
    known = build("vit", tmp_path, trainer_kwargs=given).evaluate()
    assert not any("perplexity" in key for key in known)
    given["compute_sample_losses"] = lambda model, batch: 2 * unknown_losses(model, batch)
    own = build("vit", tmp_path, trainer_kwargs=given, model=Unknown()).evaluate()
    assert own["eval_web_loss"] == pytest.approx(2 * known["eval_web_loss"], rel=1e-5)
    assert own["eval_loss"] == known["eval_loss"]


@pytest.mark.parametrize("metric", ["eval_web_loss", "eval_weighted_loss"])
def test_a_domains_loss_chooses_the_best_model(metric: str, tmp_path: Path) -> None:
    trainer = train(
        "llama", tmp_path, {"inner_steps": 2, "reference_steps": 1}, eval_strategy="steps", eval_steps=2, save_steps=2,
        save_strategy="steps", load_best_model_at_end=True, metric_for_best_model=metric, greater_is_better=False,
        trainer_kwargs={"eval_dataset": make_dataset("llama", 12, seed=5)},
    )  # fmt: skip
    seen = [entry[metric] for entry in trainer.state.log_history if metric in entry]
    assert len(seen) == 3 and trainer.state.best_metric == min(seen)


# Results ---------------------------------------------------------------------------------------------------------------


def test_a_mixture_is_saved_and_used_by_another_trainer(tmp_path: Path) -> None:
    settings = {"inner_steps": 2, "reference_steps": 1}
    trainer = train("vit", tmp_path / "small", settings, save_strategy="steps", save_steps=6)
    path = tmp_path / "small" / "checkpoint-6" / "mixture.json"
    content = json.loads(path.read_text())
    assert content["mixture"] == trainer.mixture and content["last_weights"] == trainer.domain_weights
    assert [entry["step"] for entry in content["trajectory"]] == [0, 2, 4]
    assert content["trajectory"][-1]["weights"] == list(trainer.domain_weights.values())
    parts = by_domain("vit", 30)
    given = content["interleave_datasets"]
    datasets.interleave_datasets(
        [parts[name] for name in given["domains"]], probabilities=given["probabilities"], seed=0
    )
    large = train("bert", tmp_path / "large", trainer_kwargs={"mixture": path, "target_dataset": None}, max_steps=2)
    assert large.mixture == pytest.approx(trainer.mixture) and large.domain_weights == large.mixture
    assert not (tmp_path / "large" / "mixture.json").exists()
    large.save_model(str(tmp_path / "large"))
    assert not (tmp_path / "large" / "mixture.json").exists()  # it learned none
    facts = json.loads((tmp_path / "large" / "bilevel_facts.json").read_text())
    assert facts["mixture"] == large.mixture and "inner_steps" not in facts
    facts = trainer.bilevel_facts()
    assert facts["pool_shares"] == pytest.approx(SHARES)
    assert (facts["inner_steps"], facts["reference_steps"], facts["head"]) == (2, 1, "image_classification")


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trainer = train("vit", tmp_path, {"inner_steps": 2, "reference_steps": 1})
    (axes,) = trainer.plot_domain_weights().axes
    lines = [line for line in axes.lines if line.get_label().split()[0] in NAMES]
    assert len(lines) == 3
    for line in lines:
        name = line.get_label().split()[0]
        assert list(line.get_xdata()) == [0, 2, 4, 6]
        assert line.get_ydata()[-1] == line.get_ydata()[-2] == trainer.domain_weights[name]


def fixed(folder: Path, **trainer_kwargs: Any) -> MixtureTrainer:
    """Weights in quarters and eighths of a pool of 21 books, 21 code and 22 web."""
    return train(
        "vit", folder, max_steps=1, trainer_kwargs={"mixture": FIXED, "target_dataset": None, **trainer_kwargs}
    )


def test_a_subset_has_the_shares_of_the_mixture(tmp_path: Path) -> None:
    trainer = fixed(tmp_path)
    subset = trainer.selected_subset(size=24)  # the web has 15 of its 22
    assert subset.domain_names == NAMES and torch.bincount(subset.domain_ids).tolist() == [6, 3, 15]
    assert subset.ids.tolist() == sorted(set(subset.ids.tolist()))
    assert subset.domain_ids.tolist() == [[2, 0, 1][i % 3] for i in subset.ids.tolist()]
    expected = torch.tensor([6 / 21, 3 / 21, 15 / 22])[subset.domain_ids]
    torch.testing.assert_close(subset.probabilities, expected)
    assert subset.facts["domains"] == {"names": NAMES, "pool": [21, 21, 22], "subset": [6, 3, 15]}
    assert subset.facts["mixture"] == FIXED and subset.facts["selection"] == {"size": 24}
    assert "ranking" not in subset.facts  # nothing ranked the rows
    subset.save(tmp_path / "subset")
    half = trainer.selected_subset(fraction=0.5)
    assert len(half) == 32 and torch.bincount(half.domain_ids).tolist() == [8, 4, 20]
    assert set(subset.ids.tolist()) < set(half.ids.tolist())
    assert torch.equal(trainer.selected_subset(size=24).ids, subset.ids)
    trainer.args.seed = 4
    assert not torch.equal(trainer.selected_subset(size=24).ids, subset.ids)


def test_a_subset_of_joined_datasets(tmp_path: Path) -> None:
    parts = by_domain("vit")
    trainer = train(
        "vit", tmp_path, {"domain_column": None}, max_steps=1, train_dataset=parts,
        trainer_kwargs={"mixture": FIXED, "target_dataset": None},
    )  # fmt: skip
    subset = trainer.selected_subset(size=16)
    sources = subset.to_dataset(trainer.train_dataset)["source"][:]
    assert [sources.count(name) for name in NAMES] == [4, 2, 10]


def test_a_learned_mixture_rounds_to_the_rows_asked_for(tmp_path: Path) -> None:
    trainer = train("vit", tmp_path, {"inner_steps": 2, "reference_steps": 1})
    for size in (1, 7, 31):
        subset = trainer.selected_subset(size=size)
        counts = torch.bincount(subset.domain_ids, minlength=3)
        assert len(subset) == size
        assert (counts - size * torch.tensor(list(trainer.mixture.values()))).abs().max() < 1


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    trainer = fixed(tmp_path)
    message = (
        "more rows than a domain has, for 40 in all: 'web' has 22 of 25. Take at most 36, or repeat rows instead of "
        "selecting them: train with `mixture=`"
    )
    with pytest.raises(ValueError, match=message):
        trainer.selected_subset(size=40)
    assert len(trainer.selected_subset(size=36)) == 36
    with pytest.raises(ValueError, match="'web' has 22 of 23"):
        trainer.selected_subset(size=37)
    for kwargs in ({}, {"size": 3, "fraction": 0.5}):
        with pytest.raises(ValueError, match="Give one of `fraction` and `size`"):
            trainer.selected_subset(**kwargs)
    for size in (0, 65):
        with pytest.raises(ValueError, match=f"`size` must be from 1 to the 64 rows of `train_dataset`, got {size}"):
            trainer.selected_subset(size=size)
    with pytest.raises(ValueError, match=r"`fraction` must be in \(0, 1\], got 1.5"):
        trainer.selected_subset(fraction=1.5)
    with pytest.raises(RuntimeError, match="There are no domain weights before training"):
        build("vit", tmp_path).selected_subset(size=3)
    with pytest.raises(RuntimeError, match="There are no rows to draw: a stream has no numbers"):
        build("vit", tmp_path, {"mixture": "proportional"}).selected_subset(size=3)


# Resuming --------------------------------------------------------------------------------------------------------------

RESUMED: dict[str, tuple[dict[str, Any], int]] = {  # with the step to resume from; updates are at 4
    "penalty, K = T": ({"reference_steps": 2, "inner_steps": 2}, 2),
    "penalty": ({"reference_steps": 3}, 4),
    "penalty, weight": ({"reference_steps": 3, "realisation": "weight"}, 2),
    "alignment": ({"hypergradient": "alignment"}, 4),
    "alignment, weight": ({"hypergradient": "alignment", "inner_steps": 1, "realisation": "weight"}, 4),
    "unrolled": (UNROLLED, 2),
    "unrolled, weight": ({**UNROLLED, "realisation": "weight"}, 2),
    "fixed": ({"mixture": "uniform"}, 2),
    "streams": ({"reference_steps": 3, "domain_column": None}, 2),
    "streams, alignment": ({"hypergradient": "alignment", "domain_column": None}, 4),
    "a stream, weight": ({"reference_steps": 3, "realisation": "weight", "domain_names": NAMES}, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_resuming_is_not_visible(case: str, tmp_path: Path) -> None:
    settings, step = RESUMED[case]
    if settings.get("mixture") != "uniform":
        settings = {"inner_steps": 4, **settings}
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": step, "max_steps": 6, "dropout": 0.1}
    arguments |= {"gradient_accumulation_steps": 2, "num_pool": 40}  # epochs of 3 updates
    if case.startswith("unrolled"):
        arguments |= {**SGD, "learning_rate": 0.1}
    if case.startswith("streams"):
        arguments["train_dataset"] = streams("vit")
    if case == "a stream, weight":
        rows = [{**row, "source": NAMES[i % 3]} for i, row in enumerate(make_rows("vit", 50))]
        arguments["train_dataset"] = Endless(rows)
    whole = train("vit", tmp_path / "whole", settings, **arguments)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
    resumed = train("vit", tmp_path / "resumed", settings, resume_from_checkpoint=checkpoint, **arguments)
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    assert resumed.mixture == whole.mixture and resumed._trajectory == whole._trajectory
    last = [tmp_path / run / "checkpoint-6" / "bilevel_state.pt" for run in ("whole", "resumed")]
    assert repr(torch.load(last[0], weights_only=True)) == repr(torch.load(last[1], weights_only=True))
    if "mixture" not in settings:
        assert set(whole.mixture.values()) != {1 / 3}


@pytest.mark.parametrize("learned", [False, True])
def test_a_mixture_that_is_given_holds_when_resuming(
    learned: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 12,
        "trainer_class": RecordingTrainer,
    }
    before = {} if learned else {"trainer_kwargs": {"mixture": {"books": 0.5, "code": 0.5, "web": 0.0}}}
    train("vit", tmp_path / "whole", {"inner_steps": 2} if learned else {}, **before, **arguments)
    resumed = train(
        "vit", tmp_path / "resumed", {}, trainer_kwargs={"mixture": FIXED}, **arguments,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"),
    )  # fmt: skip
    drawn = torch.stack([torch.bincount(torch.cat(step["ids"]), minlength=3) for step in resumed.steps])
    assert resumed.mixture == FIXED and len(drawn) == 8
    # What a domain was owed under the old shares is settled; then the new ones are exact over steps.
    assert (drawn.sum(0) - 64 * torch.tensor([FIXED[name] for name in NAMES])).abs().max() <= 2
    assert "The mixture changed since the checkpoint" in caplog.text


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"mixture": "uniform"}, {}, "of a run with a fixed mixture; this one learns with `hypergradient='penalty'`"),
        (
            {"inner_steps": 2},
            {"hypergradient": "alignment"},
            "learned with `hypergradient='penalty'`; this one learns with `hyper",
        ),
    ],
)
def test_settings_that_a_state_does_not_fit(
    before: dict[str, Any], now: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 6}
    train("vit", tmp_path / "whole", before, **arguments)
    with pytest.raises(ValueError, match=message):
        train(
            "vit", tmp_path / "resumed", {"inner_steps": 2, **now}, **arguments,
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"),
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_resuming_with_workers_that_read_ahead(tmp_path: Path) -> None:
    settings = {"hypergradient": "alignment", "weight_learning_rate": 3.0}
    arguments = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "dataloader_num_workers": 2}
    whole = train("vit", tmp_path / "whole", settings, num_pool=40, **arguments)
    resumed = train(
        "vit", tmp_path / "resumed", settings, num_pool=40,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"), **arguments,
    )  # fmt: skip
    assert torch.equal(parameters_of(resumed), parameters_of(whole))


def test_another_batch_size_is_refused_when_resuming(tmp_path: Path) -> None:
    train("vit", tmp_path, {"inner_steps": 2, "reference_steps": 1}, save_strategy="steps", save_steps=3)
    with pytest.raises(ValueError, match="written with 8 rows in an optimizer step.*this run has 16"):
        train(
            "vit", tmp_path, {"inner_steps": 2, "reference_steps": 1}, gradient_accumulation_steps=2,
            resume_from_checkpoint=str(tmp_path / "checkpoint-3"),
        )  # fmt: skip


# Adapters and other trainers -------------------------------------------------------------------------------------------


def test_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    settings = {"inner_steps": 3, "reference_steps": 2}
    trainer = train("llama", tmp_path, settings, model=model, save_strategy="steps", save_steps=2)
    assert set(trainer.mixture.values()) != {1 / 3}
    assert list(trainer.model.peft_config) == ["default"]
    for checkpoint in tmp_path.glob("checkpoint-*"):
        assert not list(checkpoint.rglob("*reference*"))
        assert list(type(model).from_pretrained(make_model("llama"), checkpoint).peft_config) == ["default"]


def test_in_front_of_a_trainer_with_its_own_loss(tmp_path: Path) -> None:
    """Its loss is what the twin is trained with too."""

    class Doubling(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return factor * super().compute_loss(*args, **kwargs)

    class Both(MixtureMixin, Doubling):
        pass

    factor = 1.0
    settings = {"inner_steps": 2, "reference_steps": 2, "penalty": 1e12}
    runs = [train("vit", tmp_path, settings, trainer_class=c, **SGD) for c in (Both, MixtureTrainer)]
    assert torch.equal(parameters_of(runs[0]), parameters_of(runs[1]))
    factor = 5.0
    trainer = train("vit", tmp_path, settings, trainer_class=Both, **SGD)
    assert not torch.allclose(parameters_of(trainer), parameters_of(runs[0]), rtol=0, atol=1e-3)
    assert max(map(abs, trainer._gaps)) / 1e12 < 1e-6


def test_the_model_card_shows_the_mixture(tmp_path: Path) -> None:
    trainer = build("llama", tmp_path, {"inner_steps": 2})
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---") and "## Learned mixture" in card and "every 2 optimizer steps" in card
    for name, weight in trainer.mixture.items():
        assert f"| {name} | " in card and f"| {weight:.3f} |" in card
    assert "(mixture.png)" in card and (tmp_path / "mixture.png").stat().st_size > 5_000
    fixed = build("llama", tmp_path / "fixed", {"mixture": "uniform"})
    fixed.train()
    fixed.create_model_card()
    assert "Learned mixture" not in (tmp_path / "fixed" / "README.md").read_text(encoding="utf-8")


def test_a_fixed_mixture_is_drawn_where_learning_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: BilevelMixin) -> None:
        raise ValueError("not tested with FSDP")

    monkeypatch.setattr(BilevelMixin, "_check_bilevel_setup", refuse)
    fixed = {"web": 0.5, "books": 0.25, "code": 0.25}
    for settings, kwargs in (({}, {}), ({"realisation": "weight"}, {"mixture": fixed})):
        with pytest.raises(ValueError, match="not tested with FSDP"):
            build("llama", tmp_path, settings, trainer_kwargs=kwargs)
    build("llama", tmp_path, trainer_kwargs={"mixture": fixed, "target_dataset": None})


@pytest.mark.parametrize("hypergradient", ["penalty", "alignment"])
def test_a_loss_that_is_not_finite_stops_the_run(hypergradient: str, tmp_path: Path) -> None:
    def broken(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        losses = sample_losses(model, batch)
        return losses if model.training or torch.is_grad_enabled() else losses * math.nan

    def sample_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="none")

    kwargs = {"compute_sample_losses": broken}
    trainer = build("vit", tmp_path, {"hypergradient": hypergradient, "inner_steps": 2}, trainer_kwargs=kwargs)
    with pytest.raises(FloatingPointError, match=r"the domains \['books', 'code', 'web'\].*Lower `learning_rate`"):
        trainer.train()


def test_a_run_too_short_for_an_update_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="never move: `inner_steps` is 6 and the run has 6 steps"):
        build("vit", tmp_path, {"inner_steps": 6}, max_steps=6).train()


def test_no_domain_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty dict. Give it two or more datasets"):
        build("vit", tmp_path, {"domain_column": None}, train_dataset={})


def test_a_joined_pool_that_was_changed_is_refused(tmp_path: Path) -> None:
    """TRL packs, filters and shuffles the pool while its trainer is built."""

    class PackingTrainer(Trainer):
        def __init__(self, *args: Any, train_dataset: datasets.Dataset, **kwargs: Any) -> None:
            super().__init__(*args, train_dataset=train_dataset.select(range(20)), **kwargs)

    class MixturePackingTrainer(MixtureMixin, PackingTrainer):
        pass

    parts = {name: make_dataset("vit", 16, seed=i).remove_columns("source") for i, name in enumerate(("a", "b"))}
    settings = {"target_dataset": make_dataset("vit", 8), "bilevel_config": MixtureConfig()}
    with pytest.raises(
        ValueError, match=r"joined from a dict of 32 rows, .*packed, dropped or shuffled some.*\(20 now\)"
    ):
        make_trainer(MixturePackingTrainer, "vit", tmp_path, train_dataset=parts, trainer_kwargs=settings)


def test_a_joined_pool_that_a_trainer_shuffles_is_refused(tmp_path: Path) -> None:
    """With as many rows as before: only the setting tells that the domains are no longer theirs."""
    parts = {name: make_dataset("vit", 16, seed=i).remove_columns("source") for i, name in enumerate(("a", "b"))}
    args = make_trainer(Trainer, "vit", tmp_path).args
    args.shuffle_dataset = True  # as SFTConfig has it
    with pytest.raises(ValueError, match=r"joined from a dict of 32 rows, .*shuffled some.*\(32 now\)"):
        MixtureTrainer(
            model=make_model("vit"),
            args=args,
            train_dataset=parts,
            target_dataset=make_dataset("vit", 8),
            bilevel_config=MixtureConfig(),
        )


@pytest.mark.parametrize(
    "given, trainer_kwargs",
    [
        ("`loss_type='dft'`", {}),
        ("`compute_loss_func`", {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: None}),
        ("`label_smoothing_factor`", {}),
    ],
)
def test_a_loss_that_the_twin_cannot_repeat_is_refused(given: str, trainer_kwargs: dict, tmp_path: Path) -> None:
    smoothing = {"label_smoothing_factor": 0.1} if "smoothing" in given else {}
    args = make_trainer(Trainer, "vit", tmp_path, **smoothing).args
    args.loss_type = "dft" if "dft" in given else "nll"  # as SFTConfig has it
    model = make_model("vit")
    settings = {
        **{"args": args, "train_dataset": make_dataset("vit", 16), "target_dataset": make_dataset("vit", 8)},
        **{"bilevel_config": MixtureConfig(domain_column="source"), **trainer_kwargs},
    }
    MixtureTrainer(model=model, **settings)  # the twin has the forward of any model
    model.forward = types.MethodType(_closure_over(model, model.forward), model)
    with pytest.raises(ValueError, match=f"{re.escape(given)} is computed from a forward that belongs to the trained"):
        MixtureTrainer(model=model, **settings)


def test_the_twin_trains_with_a_forward_that_belongs_to_the_model(tmp_path: Path) -> None:
    """As SFTTrainer does: its forward runs the trained model itself, and its loss asks for what that alone returns."""

    class OwnForwardTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = outputs["own_loss"]
            return (loss, outputs) if return_outputs else loss

    class MixtureOwnForwardTrainer(MixtureMixin, OwnForwardTrainer):
        pass

    found = []
    for trainer_class, owned in ((MixtureTrainer, False), (MixtureOwnForwardTrainer, True)):
        model = make_model("vit")
        if owned:
            model.forward = types.MethodType(_closure_over(model, model.forward), model)
        config = MixtureConfig(domain_column="source", inner_steps=3, reference_steps=2)
        settings = {"target_dataset": make_dataset("vit", 8, seed=7), "bilevel_config": config}
        trainer = make_trainer(
            trainer_class, "vit", tmp_path / str(owned), model=model, max_steps=6, trainer_kwargs=settings
        )
        set_seed(11)
        trainer.train()
        found.append(torch.tensor(list(trainer.domain_weights.values())))
    assert found[0].std() > 1e-4
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def _closure_over(model: nn.Module, forward: Any) -> Any:
    def own(self: nn.Module, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        assert self is model
        outputs = forward(pixel_values=pixel_values, labels=labels)
        if labels is not None:
            outputs["own_loss"] = outputs["loss"]
        return outputs

    return own
