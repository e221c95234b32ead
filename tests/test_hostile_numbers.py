"""Broken and degenerate numbers: an error that says where to look, or a run that is none the worse for them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_contract import METHODS, build
from tiny import make_rows, make_trainer, parameters_of
from transformers import Trainer, TrainerCallback, set_seed

from hf_bilevel import BrosConfig, BrosTrainer

pytestmark = pytest.mark.filterwarnings("ignore:The subspaces of")  # a few steps cannot cover anything

STEPS = 9  # more than an epoch, so that every row is drawn


def rows(num: int, seed: int = 0, bad: Any = (), value: float = float("nan")) -> Dataset:
    made = make_rows("vit", num, seed)
    for i in bad:
        made[i]["pixel_values"][0][0][0] = value
    return Dataset.from_list(made).add_column("source", [["web", "books", "code"][i % 3] for i in range(num)])


def trained(method: str, folder: Path, pool: Dataset, target: Dataset, **kwargs: Any) -> Trainer:
    trainer = build(
        method, "vit", folder, train_dataset=pool, max_steps=STEPS, trainer_kwargs={"target_dataset": target}, **kwargs
    )
    set_seed(11)
    trainer.train()
    return trainer


def train(method: str, folder: Path, pool: Dataset, target: Dataset, **kwargs: Any) -> torch.Tensor:
    return parameters_of(trained(method, folder, pool, target, **kwargs))


@pytest.mark.parametrize("method", METHODS)
def test_one_target_sample_is_enough(method: str, tmp_path: Path) -> None:
    one, other = (trained(method, tmp_path / str(seed), rows(64), rows(1, seed=seed)) for seed in (7, 8))
    assert parameters_of(one).isfinite().all()
    if method == "mixture":  # slightly other shares may draw the same rows
        assert one.domain_weights != other.domain_weights
    elif method != "coreset":  # so short a search may find the same coreset
        assert not torch.equal(parameters_of(one), parameters_of(other))


@pytest.mark.filterwarnings("ignore:`target_dataset` has samples of")
@pytest.mark.parametrize("method", METHODS)
def test_copies_of_one_sample(method: str, tmp_path: Path) -> None:
    copies = Dataset.from_list([make_rows("vit", 1)[0]] * 64).add_column("source", ["web", "books"] * 32)
    assert train(method, tmp_path, copies, rows(10, seed=7)).isfinite().all()


@pytest.mark.parametrize(
    "method, error, message",
    [
        ("blade", FloatingPointError, "loss of the reference model is nan .* check the target dataset"),
        ("bros", FloatingPointError, "hypergradient was NaN or infinite .* look for broken samples in both datasets"),
        ("mixture", FloatingPointError, "is NaN or infinite.*look for broken samples in these domains and in"),
        ("coreset", ValueError, "finite loss .*look for NaN and infinite values in the pool and the target dataset"),
    ],
)
def test_a_broken_target_sample_is_an_error(method: str, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        train(method, tmp_path, rows(64), rows(10, seed=7, bad=[3]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["blade", "coreset"])
def test_a_broken_sample_of_the_pool_is_not_chosen(method: str, value: float, tmp_path: Path) -> None:
    assert train(method, tmp_path, rows(64, bad=[5], value=value), rows(10, seed=7)).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_coreset_with_a_broken_sample_is_an_error(value: float, tmp_path: Path) -> None:
    """The most probable samples are taken without a look at others, so all that is left is to say it."""
    bad = [3, 5, 9, 12]
    with pytest.raises(FloatingPointError, match="Look for NaN and infinite values in the pool, .*`num_final_masks`"):
        train("coreset", tmp_path, rows(64, bad=bad, value=value), rows(10, seed=7), settings={"num_final_masks": 0})


@pytest.mark.parametrize("method", ["bros", "mixture"])
def test_a_broken_sample_that_is_trained_on_is_an_error(method: str, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="NaN or infinite.*look for broken samples"):
        train(
            method,
            tmp_path,
            rows(64, bad=[5]),
            rows(10, seed=7),
            settings={"inner_steps": 1, "reference_steps": 1} if method == "mixture" else {},
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_of_broken_samples_is_an_error(method: str, tmp_path: Path) -> None:
    with pytest.raises((FloatingPointError, ValueError), match="finite|infinite|is nan"):
        train(method, tmp_path, rows(64, bad=range(64)), rows(10, seed=7))


def test_a_batch_without_a_sound_candidate_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="No candidate of a batch has a finite loss .* Check the data"):
        train("blade", tmp_path, rows(64, bad=range(64)), rows(10, seed=7), settings={"penalty": 0.0})


class Spike(TrainerCallback):
    """Weights that are thrown far off for one step: the losses of model, pool and target stay finite and are huge."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            self.kept = {name: p.detach().clone() for name, p in model.named_parameters()}
            with torch.no_grad():
                model.classifier.weight.mul_(self.factor)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step + 1:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(self.kept[name])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_spike_of_the_loss_passes(method: str, tmp_path: Path) -> None:
    """What the method has learned afterwards is finite, and the run goes on as one that was not hit."""
    losses = {}
    for factor in (1.0, 1e4):
        trainer = build(
            method,
            "vit",
            tmp_path,
            max_steps=24,
            logging_steps=1,
            learning_rate=1e-3,
            trainer_kwargs={"callbacks": [Spike(6, factor)]},
            settings={"bros": {"upper_learning_rate": 0.3}, "mixture": {"weight_learning_rate": 0.1}}.get(method, {}),
        )
        set_seed(11)
        trainer.train()
        assert parameters_of(trainer).isfinite().all()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(math.isfinite(value) for entry in entries for value in entry.values())
        losses[factor] = [entry["loss"] for entry in entries]
        if method == "bros":
            weights = trainer.sample_weights.weights
            assert weights.isfinite().all() and (weights > 0.01).all() and (weights < 0.99).all()
        elif method == "mixture":
            assert all(0.1 < weight < 0.7 for weight in trainer.domain_weights.values())
    assert losses[1e4][6] > 10 * losses[1.0][6], "the spike must be one"
    assert sum(losses[1e4][-6:]) < 1.2 * sum(losses[1.0][-6:])


class RepeatingSampler:
    """The same rows again and again, several times in a batch."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


@pytest.mark.parametrize("method", METHODS)
def test_ids_that_repeat_in_a_batch(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [0, 0, 0, 1, 1, 2, 3, 4] * 6
    trainer_class = METHODS[method].trainer_class
    monkeypatch.setattr(trainer_class, "_get_train_sampler", lambda self, dataset=None: RepeatingSampler(drawn))
    settings = {"domain_column": "source", "size": 5} if method == "coreset" else {}
    trainer = build(method, "vit", tmp_path, train_dataset=rows(10), settings=settings)
    set_seed(11)
    trainer.train()
    assert parameters_of(trainer).isfinite().all()
    if method == "blade":
        offered = trainer.sample_tally.state_dict()["offered"][:5].long().tolist()
        assert offered == [18, 12, 6, 6, 6], "6 steps of one batch each"
    if method == "bros":
        weights = trainer.sample_weights.weights
        assert (weights[:5] != weights[9]).all() and (weights[5:] == weights[9]).all(), "only rows that were drawn"


def test_weights_of_zero_everywhere(tmp_path: Path) -> None:
    """A batch in which nothing counts has no gradient, and no division by zero."""
    extra = {"bilevel_config": BrosConfig(upper_variable="fixed", rank="full"), "sample_weights": torch.zeros(64)}
    model = make_trainer(BrosTrainer, "vit", tmp_path, trainer_kwargs=extra)
    before = parameters_of(model)
    model.train()
    assert torch.equal(parameters_of(model), before)
