"""BladeTrainer against brute force: what is selected, what it is divided by, what it costs, and what it refuses."""

import copy
import logging
import math
import shutil
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny import LENGTH, VOCABULARY, arguments, make_dataset, make_model, make_rows, make_trainer, parameters_of
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    HfArgumentParser,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    ViTForImageClassification,
)

from hf_bilevel import BladeConfig, BladeMixin, BladeTrainer

STATIC = {"reference": "static", "selection_ratio": 0.5}


class Recorder(TrainerCallback):
    """Keep the weights before each optimizer step and the gradients that it uses."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class RecordingTrainer(BladeTrainer):
    """Keep the candidate batches of each optimizer step and what is made of them."""

    def _select(self, batches: Any, origins: Any, num_items: Any) -> Any:
        candidates = [dict(batch) for batch in batches]
        result = super()._select(batches, origins, num_items)
        self.__dict__.setdefault("steps", []).append((candidates, origins, result))
        return result


def train(
    name: str, folder: Path, settings: dict[str, Any], *, trainer_kwargs: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[RecordingTrainer, Recorder]:
    recorder = Recorder()
    extra = {
        "target_dataset": make_dataset(name, 10, seed=7),
        "bilevel_config": BladeConfig(**settings),
        "callbacks": [recorder],
        **(trainer_kwargs or {}),
    }
    model = kwargs.pop("model", None)
    model = make_model(name).double() if model is None else model
    trainer = make_trainer(
        RecordingTrainer, name, folder, model=model, max_grad_norm=0.0, optim="sgd", trainer_kwargs=extra, **kwargs
    )
    trainer.train()
    assert recorder.gradients and any(g.abs().max() > 0 for g in recorder.gradients[-1].values())
    return trainer, recorder


def other_model(name: str) -> torch.nn.Module:
    model = make_model(name).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def at(name: str, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = make_model(name).double().eval()
    model.load_state_dict(weights, strict=False)
    return model


def sample_loss(model: torch.nn.Module, row: dict[str, Any]) -> torch.Tensor:
    """The model's own loss on one row alone."""
    inputs = {key: torch.as_tensor(value)[None] for key, value in row.items() if key != "source"}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    return model(**inputs).loss


def token_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[tuple[int, int], torch.Tensor]:
    """{(row, position): loss}, one cross-entropy at a time."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    result = {}
    for i in range(len(batch["labels"])):
        for t in range(LENGTH - 1):
            label = int(batch["labels"][i, t + 1])
            if label != -100:
                result[i, t] = -F.log_softmax(logits[i, t], dim=0)[label]
    return result


# Exact answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_static_reference_is_the_rho_loss_formula(name: str, accumulation: int, tmp_path: Path) -> None:
    """RHO-LOSS: of each large batch, train on the rows with the largest loss minus irreducible loss."""
    reference = other_model(name)
    irreducible = copy.deepcopy(reference)
    trainer, recorder = train(
        name,
        tmp_path,
        {**STATIC, "granularity": "sample"},
        trainer_kwargs={"reference_model": reference},
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        num_pool=32 if accumulation == 1 else 20,  # 20: the last batch has 4 rows and the last window is short
    )
    rows = make_rows(name, 64)
    differed = False
    for (_, origins, (picked, _)), weights, gradient in zip(
        trainer.steps, recorder.weights, recorder.gradients, strict=True
    ):
        proxy = at(name, weights)
        chosen = []
        for origin, batch in zip(origins, picked, strict=True):
            scores = {
                i: (sample_loss(proxy, rows[i]) - sample_loss(irreducible, rows[i])).item()
                for i in origin.sample_ids.tolist()
            }
            best = sorted(scores, key=scores.get, reverse=True)[: math.ceil(len(scores) / 2)]
            assert batch["labels"].tolist() == [rows[i]["labels"] for i in origin.sample_ids.tolist() if i in best]
            losses = {i: sample_loss(proxy, rows[i]).item() for i in scores}
            differed |= set(best) != set(sorted(losses, key=losses.get, reverse=True)[: len(best)])
            chosen.append(best)
        if name == "vit":  # whose loss is divided by the items of the whole window; BERT's is a mean of its own
            proxy.zero_grad()
            total = sum(len(best) for best in chosen)
            sum(sample_loss(proxy, rows[i]) for best in chosen for i in best).div(total).backward()
            for key, parameter in proxy.named_parameters():
                torch.testing.assert_close(gradient[key], parameter.grad, rtol=0, atol=1e-10)
    assert differed, "the reference must change what is selected"


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("score", ["excess_loss", "loss"])
def test_token_selection_by_brute_force(score: str, accumulation: int, tmp_path: Path) -> None:
    """Rho-1: the loss is the sum over the selected tokens of all micro-batches, over their number."""
    reference = other_model("llama")
    kwargs = {"reference_model": copy.deepcopy(reference)} if score == "excess_loss" else {}
    trainer, recorder = train(
        "llama",
        tmp_path,
        {"reference": "static", "selection_ratio": 0.3, "score": score},
        trainer_kwargs=kwargs,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        num_pool=20,
    )
    for (candidates, _, (_, num_items)), weights, gradient in zip(
        trainer.steps, recorder.weights, recorder.gradients, strict=True
    ):
        proxy = at("llama", weights)
        total, planned = 0.0, 0
        for batch in candidates:
            losses = token_losses(proxy, batch)
            baseline = token_losses(reference, batch) if score == "excess_loss" else dict.fromkeys(losses, 0.0)
            num = math.ceil(0.3 * len(losses))
            kept = sorted(losses, key=lambda key: (losses[key] - baseline[key]).item(), reverse=True)[:num]
            assert len(kept) < len(losses)
            total, planned = total + sum(losses[key] for key in kept), planned + num
        assert int(num_items) == planned
        (total / planned).backward()
        for key, parameter in proxy.named_parameters():
            torch.testing.assert_close(gradient[key], parameter.grad, rtol=0, atol=1e-10)


def test_reference_phase_by_brute_force(tmp_path: Path) -> None:
    """Two synchronisations, written out: copy, select with the outgoing reference, step on upper + penalty * lower."""
    settings = {
        "selection_ratio": 0.5,
        "sync_steps": 2,
        "reference_steps": 3,
        "first_reference_steps": 4,
        "penalty": 0.7,
        "reference_learning_rate": 0.3,
        "target_batch_size": 5,
    }
    trainer = make_trainer(
        RecordingTrainer,
        "vit",
        tmp_path,
        model=make_model("vit").double(),
        optim="sgd",
        max_steps=4,
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=1,
        trainer_kwargs={"target_dataset": make_dataset("vit", 10, seed=7), "bilevel_config": BladeConfig(**settings)},
    )
    trainer.train()
    target = trainer._endless_loader(trainer.target_dataset, 5, 1)
    pool = trainer._endless_loader(trainer.train_dataset, 8, 2)
    reference: torch.nn.Module | None = None

    def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(
            model(pixel_values=batch["pixel_values"].double()).logits, batch["labels"], reduction="none"
        )

    for step, num_steps in ((0, 4), (2, 3)):
        proxy = make_model("vit").double().eval()
        if step:
            saved = type(proxy).from_pretrained(tmp_path / f"checkpoint-{step}", dtype=torch.float64)
            proxy.load_state_dict(saved.state_dict())
        outgoing, reference = reference, copy.deepcopy(proxy)
        for _ in range(num_steps):
            upper_batch, lower_batch = target.draw(), pool.draw()
            keep = torch.arange(8)
            if outgoing is not None:
                with torch.no_grad():
                    keep = (losses(proxy, lower_batch) - losses(outgoing, lower_batch)).topk(4).indices
            loss = losses(reference, upper_batch).mean() + 0.7 * losses(reference, lower_batch)[keep].mean()
            gradients = torch.autograd.grad(loss, list(reference.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                    parameter.sub_(0.3 * gradient)
        state = torch.load(tmp_path / f"checkpoint-{step + 1}" / "bilevel_state.pt", weights_only=True)
        expected = reference.state_dict()
        assert expected.keys() == state["shared"]["reference"]["weights"].keys()
        for key, value in state["shared"]["reference"]["weights"].items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-10)


def test_identical_scores_keep_the_first_rows(tmp_path: Path) -> None:
    """A frozen copy of the untrained model: all excess losses are 0 at the first step."""
    trainer, _ = train(
        "vit", tmp_path, STATIC, trainer_kwargs={"reference_model": make_model("vit").double()}, max_steps=1
    )
    ((candidates,), _, ((picked,), _)) = trainer.steps[0]
    assert torch.equal(picked["pixel_values"], candidates["pixel_values"][:4])


def test_controls_need_no_reference(tmp_path: Path) -> None:
    runs = {}
    for score in ("random", "loss"):
        for name in ("vit", "llama"):
            kwargs = {"target_dataset": None}
            trainer, _ = train(name, tmp_path, {"selection_ratio": 0.5, "score": score}, trainer_kwargs=kwargs)
            assert trainer.reference is None
            runs[score, name] = parameters_of(trainer)
    assert not torch.equal(runs["random", "vit"], runs["loss", "vit"])
    assert not torch.equal(runs["random", "llama"], runs["loss", "llama"])


def test_highest_loss_is_higher_than_random(tmp_path: Path) -> None:
    logs = {}
    for score in ("random", "loss"):
        trainer, _ = train("vit", tmp_path, {"selection_ratio": 0.25, "score": score}, logging_steps=1)
        logs[score] = trainer.state.log_history[0]
        assert logs[score]["blade/selected_fraction"] == 0.25
    assert logs["loss"]["loss"] > logs["random"]["loss"]


# Cost -----------------------------------------------------------------------------------------------------------------


class CountForwards(TrainerCallback):
    def __init__(self) -> None:
        self.counts = {"proxy": 0, "proxy_without_gradients": 0, "reference": 0}

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        def count_proxy(module: torch.nn.Module, inputs: Any) -> None:
            self.counts["proxy" if torch.is_grad_enabled() else "proxy_without_gradients"] += 1

        def count_reference(module: torch.nn.Module, inputs: Any) -> None:
            self.counts["reference"] += 1

        model.register_forward_pre_hook(count_proxy)
        if self.trainer.reference is not None:
            self.trainer.reference.module.register_forward_pre_hook(count_reference)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("llama", {**STATIC}, {"proxy": 6, "proxy_without_gradients": 0, "reference": 6}),
        (
            "llama",
            {"selection_ratio": 0.5, "score": "loss"},
            {"proxy": 6, "proxy_without_gradients": 0, "reference": 0},
        ),
        ("vit", {**STATIC}, {"proxy": 6, "proxy_without_gradients": 6, "reference": 6}),
        ("vit", {"selection_ratio": 1.0}, {"proxy": 6, "proxy_without_gradients": 0, "reference": 0}),
        # one synchronisation at step 0 (3 reference steps) and one at step 2 (3 more, each selected by two forwards)
        (
            "llama",
            {"selection_ratio": 0.5, "sync_steps": 2, "reference_steps": 3, "penalty": 1},
            {"proxy": 6, "proxy_without_gradients": 3, "reference": 6 + 3 * 2 + 3 * 3},
        ),
        (
            "llama",
            {"selection_ratio": 0.5, "sync_steps": 2, "reference_steps": 3},
            {"proxy": 6, "proxy_without_gradients": 0, "reference": 6 + 3 + 3},
        ),
    ],
)
def test_number_of_forward_passes(name: str, settings: dict, expected: dict[str, int], tmp_path: Path) -> None:
    """Three optimizer steps of two micro-batches each."""
    counter = CountForwards()
    static = settings.get("reference") == "static"
    trainer = make_trainer(
        BladeTrainer,
        name,
        tmp_path,
        gradient_accumulation_steps=2,
        max_steps=3,
        trainer_kwargs={
            "target_dataset": make_dataset(name, 10, seed=7),
            "bilevel_config": BladeConfig(**settings),
            "callbacks": [counter],
            **({"reference_model": make_model(name)} if static else {}),
        },
    )
    counter.trainer = trainer
    trainer.train()
    assert counter.counts == expected


def ragged_rows(name: str, num: int) -> Dataset:
    """Rows of 2 to 12 tokens, padded to 13, in random order."""
    rows = []
    for i, row in enumerate(make_rows(name, num)):
        used, padding = 2 + 7 * i % 11, [0] * (LENGTH + 1)
        tokens = [1 + token % 47 for token in row["input_ids"][:used]]
        tokens, mask = (tokens + padding)[: LENGTH + 1], ([1] * used + padding)[: LENGTH + 1]
        labels = row["labels"] if name == "bert" else (tokens[:used] + [-100] * (LENGTH + 1))[: LENGTH + 1]
        rows.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("reference", ["static", "dynamic"])
def test_rows_of_many_lengths_are_scored_without_their_padding(
    name: str, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows as with all of the padding, the same gradients, fewer columns."""
    settings = {"granularity": "sample", "selection_ratio": 0.25, "reference": reference, "penalty": 0.0}
    if reference == "dynamic":
        settings |= {"sync_steps": 2, "reference_steps": 2, "penalty": 1.0}

    def run(folder: str) -> tuple[RecordingTrainer, Recorder, Counter]:
        columns: Counter[str] = Counter()

        def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            what = "trained" if module.training else "scored"
            columns[what] += kwargs["input_ids"].numel()
            columns[f"{what} rows"] += len(kwargs["input_ids"])

        model = make_model(name).double()
        handle = model.register_forward_pre_hook(count, with_kwargs=True)
        extra = {"train_dataset": ragged_rows(name, 48), "reference_model": other_model(name)}
        if reference == "dynamic":
            del extra["reference_model"]
        trained = train(
            name,
            tmp_path / folder,
            settings,
            model=model,
            max_steps=3,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            train_dataset=extra.pop("train_dataset"),
            trainer_kwargs=extra,
        )
        handle.remove()
        return *trained, columns

    short, short_recorder, few = run("short")
    monkeypatch.setattr(BladeTrainer, "_lengths", lambda self, batches, sizes: [None] * len(batches))
    full, full_recorder, many = run("full")
    assert few["scored rows"] == many["scored rows"] and few["trained rows"] == many["trained rows"]
    assert few["trained"] < many["trained"] and few["scored"] < 0.9 * many["scored"]
    for (_, _, one), (_, _, two) in zip(short.steps, full.steps, strict=True):
        for cut, padded in zip(one[0], two[0], strict=True):
            width = cut["input_ids"].shape[1]
            assert torch.equal(cut["input_ids"], padded["input_ids"][:, :width])
            assert width == padded["attention_mask"].sum(1).max()
        assert one[1] == two[1]
    for one, two in zip(short_recorder.gradients, full_recorder.gradients, strict=True):
        assert all(torch.allclose(one[key], two[key], rtol=0, atol=1e-9) for key in two)


def test_a_compiled_model_keeps_its_width(tmp_path: Path) -> None:
    trainer = make_trainer(
        BladeTrainer,
        "bert",
        tmp_path,
        trainer_kwargs={
            "target_dataset": make_dataset("bert", 10, seed=7),
            "bilevel_config": BladeConfig(selection_ratio=0.5),
        },
    )
    batch = {"attention_mask": torch.tensor([[1, 0], [1, 1]])}
    assert trainer._lengths([batch], [2])[0].tolist() == [1, 2]
    trainer.args.torch_compile = True
    assert trainer._lengths([batch], [2]) == [None]


def test_a_loss_of_ones_own_sees_the_whole_batch(tmp_path: Path) -> None:
    """It may compare its rows with each other."""
    seen = []

    def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(batch["input_ids"].shape)
        return F.cross_entropy(model(**batch).logits, batch["labels"], reduction="none")

    rows = ragged_rows("bert", 32)
    trainer = make_trainer(
        BladeTrainer,
        "bert",
        tmp_path,
        train_dataset=rows,
        per_device_train_batch_size=16,
        max_steps=1,
        trainer_kwargs={
            "bilevel_config": BladeConfig(selection_ratio=0.5, score="loss"),
            "compute_sample_losses": losses,
        },
    )
    seen.clear()
    trainer.train()
    assert [shape[0] for shape in seen if shape[0] != 8] == [16]


# Statistics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_statistics_count_what_was_trained_on(name: str, tmp_path: Path) -> None:
    trainer, _ = train(
        name, tmp_path, {"selection_ratio": 0.5, "reference_steps": 1, "domain_column": "source"}, num_pool=32
    )
    samples, domains = trainer.sample_tally.state_dict(), trainer.domain_tally.state_dict()
    offered = torch.zeros(32, dtype=torch.float64)
    for candidates, origins, _ in trainer.steps:
        for batch, origin in zip(candidates, origins, strict=True):
            units = batch["labels"][:, 1:].ne(-100).sum(1) if name == "llama" else torch.ones(len(origin))
            offered.index_add_(0, origin.sample_ids, units.double())
            names = [trainer.domain_names[i] for i in origin.domain_ids.tolist()]
            assert names == [["web", "books", "code"][i % 3] for i in origin.sample_ids.tolist()]
    assert torch.equal(samples["offered"], offered)
    assert 0 < samples["selected"].sum() < offered.sum() and (samples["selected"] <= offered).all()
    assert samples["selected"].sum() == domains["selected"].sum()
    assert trainer.domain_names == ["books", "code", "web"]
    logged = [entry for entry in trainer.state.log_history if "blade/selected_fraction/web" in entry]
    assert len(logged) == 3
    total = sum(entry["blade/selected_fraction"] for entry in logged) / 3
    assert total == pytest.approx(float(samples["selected"].sum() / offered.sum()), rel=0.05)


# Non-finite losses ----------------------------------------------------------------------------------------------------


def broken_pool(name: str) -> Dataset:
    """Every fourth row has a loss that is not finite (ViT)."""
    rows = make_rows(name, 32)
    for i in range(0, 32, 4):
        rows[i]["pixel_values"] = (torch.tensor(rows[i]["pixel_values"]) * float("nan")).tolist()
    return Dataset.from_list(rows)


@pytest.mark.parametrize("score", ["excess_loss", "loss", "random"])
def test_non_finite_samples_are_never_trained_on(score: str, tmp_path: Path) -> None:
    settings = {"selection_ratio": 0.75, "score": score}
    if score == "excess_loss":
        settings |= {"reference_steps": 1, "penalty": 0}
    trainer, _ = train("vit", tmp_path, settings, train_dataset=broken_pool("vit"), logging_steps=1)
    assert parameters_of(trainer).isfinite().all()
    selected = trainer.sample_tally.state_dict()["selected"]
    assert selected[::4].sum() == 0 and selected.sum() > 0
    offered = sum(int((o.sample_ids % 4 == 0).sum()) for _, origins, _ in trainer.steps for o in origins)
    assert sum(entry.get("blade/num_excluded", 0) for entry in trainer.state.log_history) == offered > 0


def test_non_finite_samples_can_be_an_error(tmp_path: Path) -> None:
    settings = {"selection_ratio": 0.25, "on_non_finite": "error", "score": "loss"}  # enough finite ones are left
    with pytest.raises(FloatingPointError, match="NaN or infinite at step 0.*on_non_finite='exclude'"):
        train("vit", tmp_path, settings, train_dataset=broken_pool("vit"))


class InfiniteLoss(torch.nn.Module):
    """Makes every prediction of token 3 impossible: logits of -inf."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        fill = torch.zeros(VOCABULARY, dtype=logits.dtype)
        fill[3] = -math.inf
        return logits + fill


@pytest.mark.parametrize("on_non_finite", ["exclude", "error"])
def test_infinite_token_losses(on_non_finite: str, tmp_path: Path) -> None:
    model = make_model("llama").double()
    model.lm_head = torch.nn.Sequential(model.lm_head, InfiniteLoss())
    settings = {"selection_ratio": 0.99, "score": "loss", "on_non_finite": on_non_finite}
    if on_non_finite == "error":
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            train("llama", tmp_path, settings, model=model)
        return
    trainer, recorder = train("llama", tmp_path, settings, model=model, logging_steps=1)
    assert all(g.isfinite().all() for gradient in recorder.gradients for g in gradient.values())
    assert sum(entry.get("blade/num_excluded", 0) for entry in trainer.state.log_history) > 0


# PEFT -----------------------------------------------------------------------------------------------------------------


def lora(name: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    peft = pytest.importorskip("peft")
    targets = {"llama": ["q_proj", "v_proj"], "vit": ["q_proj", "v_proj"], "bert": ["query", "value"]}[name]
    torch.manual_seed(1)
    model = peft.get_peft_model(make_model(name).to(dtype), peft.LoraConfig(r=4, target_modules=targets, **kwargs))
    with torch.no_grad():  # B starts at 0, where both adapters would agree for the wrong reason
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    return model


PEFT_SETTINGS = {"selection_ratio": 0.5, "sync_steps": 3, "reference_steps": 2, "penalty": 0.5}


def peft_trainer(name: str, folder: Path, **kwargs: Any) -> BladeTrainer:
    return make_trainer(
        BladeTrainer,
        name,
        folder,
        model=kwargs.pop("model", None) or lora(name),
        save_strategy="steps",
        save_steps=2,
        max_steps=6,
        trainer_kwargs={
            "target_dataset": make_dataset(name, 10, seed=7),
            "bilevel_config": BladeConfig(**{**PEFT_SETTINGS, **kwargs.pop("settings", {})}),
        },
        **kwargs,
    )


@pytest.mark.parametrize("name", ["llama", "vit", "bert"])
def test_peft_reference_is_an_adapter_that_leaves_no_trace(name: str, tmp_path: Path) -> None:
    whole = peft_trainer(name, tmp_path / "whole")
    before = {key: p.detach().clone() for key, p in whole.model.named_parameters()}
    num_parameters = sum(p.numel() for p in whole.model.parameters())
    whole.train()
    after = dict(whole.model.named_parameters())
    assert before.keys() == after.keys() and num_parameters == sum(p.numel() for p in after.values())
    assert whole.model.active_adapter == "default" and list(whole.model.peft_config) == ["default"]
    for key, parameter in after.items():
        assert parameter.requires_grad == ("lora_" in key)
        assert torch.equal(parameter, before[key]) != ("lora_" in key), key
    for checkpoint in (tmp_path / "whole").glob("checkpoint-*"):
        assert not list(checkpoint.rglob("*reference*"))
        loaded = type(whole.model).from_pretrained(make_model(name), checkpoint)
        assert list(loaded.peft_config) == ["default"]
    resumed = peft_trainer(name, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(parameters_of(resumed), parameters_of(whole))


def test_peft_reference_is_what_a_copy_would_be(tmp_path: Path) -> None:
    """The same run with the adapter's reference and with a copy of the whole model gives the same weights."""

    class CopyTrainer(BladeTrainer):
        def _begin_training(self) -> None:
            super()._begin_training()
            from hf_bilevel.trainers.reference_models import ReferenceCopy, copy_of

            self.reference.remove()
            self.reference = ReferenceCopy(self.model, copy_of(self.model), None, self.args.device, parked=False)

    runs = []
    for trainer_class in (BladeTrainer, CopyTrainer):
        trainer = make_trainer(
            trainer_class,
            "llama",
            tmp_path,
            model=lora("llama", torch.float64),
            trainer_kwargs={
                "target_dataset": make_dataset("llama", 10, seed=7),
                "bilevel_config": BladeConfig(**PEFT_SETTINGS),
            },
        )
        trainer.train()
        runs.append(parameters_of(trainer))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-7)


def test_peft_off_checkpointing_and_best_model(tmp_path: Path) -> None:
    plain = make_trainer(Trainer, "llama", tmp_path, model=lora("llama"), save_strategy="steps", save_steps=2)
    plain.train()
    off = peft_trainer("llama", tmp_path, settings={"selection_ratio": 1.0})
    off.train()
    assert torch.equal(parameters_of(off), parameters_of(plain))
    on = peft_trainer("llama", tmp_path)
    on.train()
    checkpointed = peft_trainer(
        "llama", tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False}
    )
    checkpointed.train()
    torch.testing.assert_close(parameters_of(checkpointed), parameters_of(on), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora("vit", modules_to_save=["classifier"]), r"trains more than LoRA matrices \(\['classifier'\]\)"),
        (lambda: _two_adapters(), "must have one active adapter"),
        (lambda: _prompt_tuned(), "supported for LoRA, got PROMPT_TUNING"),
        (lambda: lora("llama", bias="lora_only"), "does not add beside one with `bias='lora_only'`"),
    ],
)
def test_peft_refusals(make: Any, message: str, tmp_path: Path) -> None:
    model = make()
    name = "vit" if hasattr(model.base_model, "model") and "ViT" in type(model.get_base_model()).__name__ else "llama"
    with pytest.raises(ValueError, match=message):
        peft_trainer(name, tmp_path, model=model)


def _two_adapters() -> Any:
    model = lora("llama")
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def _prompt_tuned() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        make_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )


# Other heads and own losses -------------------------------------------------------------------------------------------


def test_seq2seq_and_token_classification(tmp_path: Path) -> None:
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **size))
    bert = BertForTokenClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=VOCABULARY,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    for model in (t5, bert):
        trainer = make_trainer(
            BladeTrainer,
            "bert_mlm",
            tmp_path,
            model=model,
            trainer_kwargs={
                "target_dataset": make_dataset("bert_mlm", 10, seed=7),
                "bilevel_config": BladeConfig(granularity="token", selection_ratio=0.5, reference_steps=1),
            },
        )
        trainer.train()
        assert parameters_of(trainer).isfinite().all()
        tables = trainer.sample_tally.state_dict()
        assert 0.5 <= float(tables["selected"].sum() / tables["offered"].sum()) < 0.55


def test_own_loss(tmp_path: Path) -> None:
    """A user's loss: the trainer trains with ``compute_loss_func`` and ranks with ``compute_sample_losses``."""

    def compute_sample_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.multi_margin_loss(model(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="none")

    def compute_loss_func(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return F.multi_margin_loss(outputs.logits, labels, reduction="sum") / num_items_in_batch

    trainer = make_trainer(
        BladeTrainer,
        "vit",
        tmp_path,
        trainer_kwargs={
            "target_dataset": make_dataset("vit", 10, seed=7),
            "bilevel_config": BladeConfig(selection_ratio=0.5, reference_steps=1),
            "compute_loss_func": compute_loss_func,
            "compute_sample_losses": compute_sample_losses,
        },
    )
    trainer.train()
    assert parameters_of(trainer).isfinite().all()


def test_label_smoothing_at_sample_level(tmp_path: Path) -> None:
    settings = {"selection_ratio": 0.5, "reference_steps": 1}
    runs = [parameters_of(train("vit", tmp_path, settings, label_smoothing_factor=s)[0]) for s in (0.0, 0.2)]
    assert runs[1].isfinite().all() and not torch.equal(*runs)


def test_reference_dtype_and_device(tmp_path: Path) -> None:
    """Parking changes nothing; another dtype changes scores, not the training of the reference."""
    runs, dtypes = {}, {}
    for key, settings in {
        "plain": {},
        "parked": {"reference_device": "cpu"},
        "bfloat16": {"reference_dtype": "bfloat16"},
    }.items():
        trainer = make_trainer(
            BladeTrainer,
            "llama",
            tmp_path,
            trainer_kwargs={
                "target_dataset": make_dataset("llama", 10, seed=7),
                "bilevel_config": BladeConfig(**PEFT_SETTINGS, **settings),
            },
        )
        seen: list[tuple[bool, torch.dtype]] = []
        losses = trainer._losses

        def record(model: torch.nn.Module, batch: Any, losses: Any = losses, seen: list = seen) -> Any:
            if model is not trainer.model:  # noqa: B023
                seen.append((model.training, next(model.parameters()).dtype))
            return losses(model, batch)

        trainer._losses = record
        trainer.train()
        runs[key] = parameters_of(trainer)
        dtypes[key] = seen
    assert torch.equal(runs["plain"], runs["parked"])
    assert runs["bfloat16"].isfinite().all()
    assert set(dtypes["plain"]) == {(True, torch.float32), (False, torch.float32)}
    assert set(dtypes["bfloat16"]) == {(True, torch.float32), (False, torch.bfloat16)}  # trained wide, scored narrow


def test_warmup_is_the_plain_trainer(tmp_path: Path) -> None:
    plain = make_trainer(Trainer, "vit", tmp_path, max_steps=3)
    plain.train()
    settings = {"selection_ratio": 0.5, "start_step": 3, "reference_steps": 1}
    warm = make_trainer(
        BladeTrainer,
        "vit",
        tmp_path,
        max_steps=3,
        trainer_kwargs={"target_dataset": make_dataset("vit", 10, seed=7), "bilevel_config": BladeConfig(**settings)},
    )
    warm.train()
    assert torch.equal(parameters_of(warm), parameters_of(plain))


# State ----------------------------------------------------------------------------------------------------------------


def saved_run(folder: Path, **kwargs: Any) -> BladeTrainer:
    trainer = make_trainer(
        BladeTrainer,
        "vit",
        folder,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        trainer_kwargs={
            "target_dataset": make_dataset("vit", 10, seed=7),
            "bilevel_config": BladeConfig(selection_ratio=0.5, sync_steps=3, reference_steps=2, penalty=0.5),
        },
        **kwargs,
    )
    return trainer


@pytest.mark.parametrize("part", ["reference", "target_position", "pool_position", "synced_at"])
def test_every_part_of_the_state_matters(part: str, tmp_path: Path) -> None:
    """If a part were not saved, or not used, the test of resuming would not notice its loss."""
    whole = saved_run(tmp_path)
    whole.train()
    checkpoint = tmp_path / "checkpoint-4"
    state = torch.load(checkpoint / "bilevel_state.pt", weights_only=True)
    if part == "reference":
        for value in state["shared"]["reference"]["weights"].values():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    elif part == "synced_at":
        state["shared"][part] = -1
    else:
        state["shared"]["reference"][part] += 3
    torch.save(state, checkpoint / "bilevel_state.pt")
    resumed = saved_run(tmp_path / "other")
    if part in ("target_position", "pool_position"):  # used at the next synchronisation, at step 6
        resumed.args.max_steps = whole.args.max_steps = 8
        whole = saved_run(tmp_path / "again")
        whole.args.max_steps = 8
        whole.train()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert not torch.equal(parameters_of(resumed), parameters_of(whole))


def test_resuming_without_or_with_a_damaged_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = saved_run(tmp_path)
    whole.train()
    missing, damaged = tmp_path / "checkpoint-6", tmp_path / "checkpoint-4"
    (missing / "bilevel_state.pt").unlink()
    content = (damaged / "bilevel_state.pt").read_bytes()
    (damaged / "bilevel_state.pt").write_bytes(content[: len(content) // 2])
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    fresh = saved_run(tmp_path)
    before = parameters_of(fresh)
    with pytest.raises(ValueError, match=r"checkpoint-6/bilevel_state.pt` is missing.*save_only_model=True"):
        fresh.train(resume_from_checkpoint=str(missing))
    with pytest.raises(ValueError, match=r"checkpoint-4/bilevel_state.pt` cannot be read.*Nothing was changed"):
        fresh.train(resume_from_checkpoint=str(damaged))
    assert torch.equal(parameters_of(fresh), before)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    with caplog.at_level(logging.WARNING, logger="hf_bilevel"):
        fresh.train(resume_from_checkpoint=True)  # from checkpoint-2, the newest whole one
    assert "checkpoint-6/bilevel_state.pt` is missing" in caplog.text and "checkpoint-4" in caplog.text
    assert torch.equal(parameters_of(fresh), parameters_of(whole))

    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="trainer_state.json` is missing: the checkpoint was not written to its end"):
        saved_run(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for number in (2, 4, 6):
        shutil.rmtree(tmp_path / f"checkpoint-{number}")
    with pytest.raises(ValueError, match="No checkpoint in .* can be resumed from. There is none."):
        saved_run(tmp_path).train(resume_from_checkpoint=True)


def test_static_reference_must_be_the_same_on_resume(tmp_path: Path) -> None:
    def make(reference: torch.nn.Module) -> BladeTrainer:
        return make_trainer(
            BladeTrainer,
            "vit",
            tmp_path,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            trainer_kwargs={"bilevel_config": BladeConfig(**STATIC), "reference_model": reference},
        )

    reference = other_model("vit").float()
    make(copy.deepcopy(reference)).train()
    make(copy.deepcopy(reference)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="`reference_model` has other weights than the one of the checkpoint"):
        make(make_model("vit")).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# Ordinary uses that went wrong once -----------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adding_the_reference_leaves_the_base_alone(init: str, tmp_path: Path) -> None:
    """These initialisations subtract from the base weights, which the second adapter shares."""
    model = lora("llama", init_lora_weights=init)
    base = {key: p.detach().clone() for key, p in model.named_parameters() if "base_layer" in key}
    peft_trainer("llama", tmp_path, model=model).train()
    assert base and all(torch.equal(p, base[key]) for key, p in model.named_parameters() if key in base)


def test_restart_after_out_of_memory_in_the_reference_phase(tmp_path: Path) -> None:
    rows = []

    class Trainer(BladeTrainer):
        def _mean_loss(self, model: torch.nn.Module, batch: Any) -> Any:
            if model.training:
                rows.append(len(batch["labels"]))
                if rows[-1] > 4:
                    raise RuntimeError("CUDA out of memory.")
            return super()._mean_loss(model, batch)

    settings = {"selection_ratio": 0.5, "reference_steps": 1, "target_batch_size": 6}
    kwargs = {"target_dataset": make_dataset("vit", 10), "bilevel_config": BladeConfig(**settings)}
    trainer = make_trainer(Trainer, "vit", tmp_path, auto_find_batch_size=True, max_steps=2, trainer_kwargs=kwargs)
    trainer.train()
    assert max(rows) > 4 and rows[-1] <= 4 and trainer.state.global_step == 2


def collate_to_encoding(rows: list[dict[str, Any]]) -> BatchEncoding:
    return BatchEncoding({key: torch.tensor([row[key] for row in rows]) for key in rows[0]})


def test_stream_of_batch_encodings_resumes(tmp_path: Path) -> None:
    def make(folder: str) -> BladeTrainer:
        return make_trainer(
            BladeTrainer,
            "llama",
            tmp_path / folder,
            train_dataset=make_dataset("llama", 64).remove_columns("source").to_iterable_dataset(),
            save_strategy="steps",
            save_steps=2,
            trainer_kwargs={
                "target_dataset": make_dataset("llama", 10, seed=7),
                "bilevel_config": BladeConfig(selection_ratio=0.5, sync_steps=3, reference_steps=2),
                "data_collator": collate_to_encoding,
            },
        )

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(parameters_of(resumed), parameters_of(whole))


class RandomlyAugmented(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {
            "pixel_values": torch.tensor(row["pixel_values"]) + torch.randn(1),
            "labels": row["labels"],
            "source": ["web", "code"][index % 2],
        }


@pytest.mark.parametrize("settings", [{"selection_ratio": 1.0}, {"selection_ratio": 0.5, "start_step": 99}])
def test_reading_the_data_leaves_the_global_generators_alone(settings: dict, tmp_path: Path) -> None:
    pool = RandomlyAugmented(make_rows("vit", 32))
    runs = []
    for trainer_class, kwargs in (
        (Trainer, {}),
        (
            BladeTrainer,
            {
                "target_dataset": RandomlyAugmented(make_rows("vit", 8)),
                "bilevel_config": BladeConfig(domain_column="source", **settings),
            },
        ),
    ):
        trainer = make_trainer(trainer_class, "vit", tmp_path, train_dataset=pool, trainer_kwargs=kwargs)
        trainer.train()
        runs.append(parameters_of(trainer))
    assert torch.equal(*runs)


def test_logs_after_resuming_are_those_of_the_whole_run(tmp_path: Path) -> None:
    def make(folder: str) -> BladeTrainer:
        return make_trainer(
            BladeTrainer,
            "vit",
            tmp_path / folder,
            save_strategy="steps",
            save_steps=3,
            logging_steps=2,
            trainer_kwargs={
                "target_dataset": make_dataset("vit", 10, seed=7),
                "bilevel_config": BladeConfig(
                    selection_ratio=0.5, sync_steps=2, reference_steps=2, domain_column="source"
                ),
            },
        )

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    own = [
        [{k: v for k, v in entry.items() if k.startswith("blade/")} for entry in trainer.state.log_history]
        for trainer in (whole, resumed)
    ]
    assert own[0] == own[1] and any("blade/selected_fraction/web" in entry for entry in own[0])


def test_pool_replaced_after_construction(tmp_path: Path) -> None:
    kwargs = {"target_dataset": make_dataset("vit", 10), "bilevel_config": BladeConfig(domain_column="source")}
    trainer = make_trainer(BladeTrainer, "vit", tmp_path, num_pool=16, trainer_kwargs=kwargs)
    trainer.train_dataset = make_dataset("vit", 90)
    trainer.train()
    assert len(trainer.sample_tally) == 90
    trainer.train_dataset = make_dataset("vit", 90).remove_columns("labels")
    with pytest.raises(ValueError, match="`train_dataset` gives batches without `labels`|same. Missing in"):
        trainer.train()


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_a_subset_of_what_was_selected_most(name: str, tmp_path: Path) -> None:
    settings = {"selection_ratio": 0.5, "reference_steps": 1, "domain_column": "source"}
    trainer, _ = train(name, tmp_path, settings, num_pool=40, max_steps=12)  # visits of two epochs and a bit
    tables = {key: table.tolist() for key, table in trainer.sample_tally.state_dict().items()}
    seen = [i for i in range(40) if tables["offered"][i]]
    share = {i: tables["selected"][i] / tables["offered"][i] for i in seen}
    mean = {i: tables["score_sum"][i] / tables["offered"][i] for i in seen}
    expected = sorted(seen, key=lambda i: (-share[i], -mean[i]))[:12]
    assert 1 < len({share[i] for i in seen}) and len({mean[i] for i in seen}) == len(seen)
    subset = trainer.selected_subset(fraction=0.3)
    assert subset.ids.tolist() == expected and subset.num_pool == 40
    assert subset.scores.tolist() == [share[i] for i in expected]
    assert subset.counts.tolist() == [int(tables["selected"][i]) for i in expected]
    assert subset.counts.dtype == torch.int64 and subset.counts.max() > 1
    assert [subset.domain_names[j] for j in subset.domain_ids] == [["web", "books", "code"][i % 3] for i in expected]
    assert subset.facts["method"] == "blade" and subset.facts["domains"]["pool"] == [13, 13, 14]
    assert sum(subset.facts["ranking"]["kept"]) == 12 and sum(subset.facts["ranking"]["dropped"]) == len(seen) - 12
    assert len(subset.to_dataset(trainer.train_dataset)) == 12
    subset.save(tmp_path / "subset")


def test_no_subset_where_nothing_was_selected(tmp_path: Path) -> None:
    kwargs = {"target_dataset": make_dataset("vit", 8), "bilevel_config": BladeConfig(selection_ratio=0.5)}
    trainer = make_trainer(BladeTrainer, "vit", tmp_path, trainer_kwargs=kwargs)
    with pytest.raises(RuntimeError, match="There is no selection before training and with `selection_ratio=1`"):
        trainer.selected_subset(fraction=0.5)
    off = make_trainer(
        BladeTrainer, "vit", tmp_path, trainer_kwargs={"bilevel_config": BladeConfig(selection_ratio=1.0)}, max_steps=1
    )
    off.train()
    with pytest.raises(RuntimeError, match="There is no selection before training and with `selection_ratio=1`"):
        off.selected_subset(fraction=0.5)
    stream = make_dataset("vit", 64).to_iterable_dataset()
    streamed, _ = train(
        "vit", tmp_path, {"selection_ratio": 0.5, "reference_steps": 1}, train_dataset=stream, max_steps=1
    )
    with pytest.raises(RuntimeError, match="for a stream there are no rows"):
        streamed.selected_subset(fraction=0.1)
    trainer, _ = train("vit", tmp_path, {"selection_ratio": 0.5, "reference_steps": 1}, max_steps=2)
    with pytest.raises(
        ValueError, match="`fraction=0.3` of 64 rows is 20, and .* seen only 16 .* at most 0.25, or train"
    ):
        trainer.selected_subset(fraction=0.3)
    for fraction in (0, 1.1):
        with pytest.raises(ValueError, match=rf"`fraction` must be in \(0, 1\], got {fraction}"):
            trainer.selected_subset(fraction=fraction)


def test_evaluation_alone_needs_no_target(tmp_path: Path) -> None:
    trainer = BladeTrainer(model=make_model("vit"), args=arguments(tmp_path))
    assert trainer.evaluate(make_dataset("vit", 8))["eval_loss"] > 0


class OwnLoaderTrainer(BladeTrainer):
    def get_train_dataloader(self) -> Any:
        return self.accelerator.prepare(torch.utils.data.DataLoader(self.train_dataset, batch_size=8))


def test_own_loader_is_refused(tmp_path: Path) -> None:
    pool = make_dataset("vit", 32).remove_columns("source").with_format("torch")
    kwargs = {"target_dataset": make_dataset("vit", 4)}
    with pytest.raises(ValueError, match="carry no sample ids.*super\\(\\).get_train_dataloader"):
        make_trainer(OwnLoaderTrainer, "vit", tmp_path, train_dataset=pool, trainer_kwargs=kwargs).train()


# Bad input ------------------------------------------------------------------------------------------------------------


def refused(name: str, folder: Path, message: str, settings: dict[str, Any] | None = None, **kwargs: Any) -> None:
    trainer_kwargs = {"target_dataset": make_dataset(name, 10), **kwargs.pop("trainer_kwargs", {})}
    with pytest.raises(ValueError, match=message):
        make_trainer(
            BladeTrainer,
            name,
            folder,
            trainer_kwargs={"bilevel_config": BladeConfig(**(settings or {})), **trainer_kwargs},
            **kwargs,
        )


def test_target_dataset_is_checked(tmp_path: Path) -> None:
    refused("vit", tmp_path, "BladeTrainer needs `target_dataset`", trainer_kwargs={"target_dataset": None})
    refused("vit", tmp_path, "`target_dataset` is empty", trainer_kwargs={"target_dataset": []})
    stream = make_dataset("vit", 4).to_iterable_dataset()
    refused("vit", tmp_path, "`target_dataset` is a stream", trainer_kwargs={"target_dataset": stream})
    renamed = make_dataset("vit", 4).rename_column("pixel_values", "pixels")
    refused(
        "vit",
        tmp_path,
        r"Missing in `target_dataset`: \['pixel_values'\]; only there: \[\]",
        trainer_kwargs={"target_dataset": renamed},
    )
    silent = make_dataset("llama", 20).map(lambda row: {"labels": [-100] * LENGTH})
    refused("llama", tmp_path, "All labels of `target_dataset` are -100", trainer_kwargs={"target_dataset": silent})
    refused("llama", tmp_path, "All labels of `train_dataset` are -100", train_dataset=silent)


def test_settings_are_checked_against_model_and_batch(tmp_path: Path) -> None:
    refused(
        "vit",
        tmp_path,
        "`selection_ratio=0.9` of a candidate batch of `per_device_train_batch_size=8` selects all of it. Raise "
        "`per_device_train_batch_size` to at least 10 or lower",
        {"selection_ratio": 0.9},
    )
    refused("vit", tmp_path, "does not predict tokens.*Use `granularity='sample'`", {"granularity": "token"})
    refused("vit", tmp_path, "`reference='static'` needs a `reference_model`", STATIC)
    refused("llama", tmp_path, "`label_smoothing_factor` replaces the model's loss", label_smoothing_factor=0.1)
    refused(
        "vit",
        tmp_path,
        "Pass `compute_sample_losses=` too",
        trainer_kwargs={"compute_loss_func": lambda *args, **kwargs: None},
    )
    refused("vit", tmp_path, "`train_dataset` has no column `kind`.*'source'", {"domain_column": "kind"})
    model = make_model("vit")
    refused(
        "vit",
        tmp_path,
        "shares its weights with `model`",
        STATIC,
        model=model,
        trainer_kwargs={"reference_model": model},
    )
    with pytest.raises(TypeError, match="`reference_model` must be a model, .*got 'me/reference'"):
        make_trainer(
            BladeTrainer,
            "vit",
            tmp_path,
            trainer_kwargs={"reference_model": "me/reference", "bilevel_config": BladeConfig(**STATIC)},
        )
    question_answering = BertForQuestionAnswering(
        BertConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    refused(
        "bert", tmp_path, "`BertForQuestionAnswering` is not known; known heads: causal_lm", model=question_answering
    )


class WeightedViTForImageClassification(ViTForImageClassification):
    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        outputs = super().forward(pixel_values=pixel_values, labels=labels)
        if labels is not None:
            outputs["loss"] = 2 * outputs["loss"]
        return outputs


def test_a_loss_of_the_models_own_is_noticed(tmp_path: Path) -> None:
    model = WeightedViTForImageClassification(make_model("vit").config)
    settings = {"target_dataset": make_dataset("vit", 8), "bilevel_config": BladeConfig()}
    with pytest.warns(
        UserWarning, match="`WeightedViTForImageClassification` reports a loss of .* and would be ranked by a loss of"
    ):
        make_trainer(BladeTrainer, "vit", tmp_path, model=model, trainer_kwargs=settings)


def test_warnings_about_ignored_settings(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Ignored with `score='loss'`: `penalty`, `reference_model`"):
        make_trainer(
            BladeTrainer,
            "vit",
            tmp_path,
            trainer_kwargs={
                "bilevel_config": BladeConfig(score="loss", penalty=0.5),
                "reference_model": make_model("vit"),
            },
        )
    with pytest.warns(UserWarning, match="Dropout of up to 0.1 is on"):
        make_trainer(
            BladeTrainer, "llama", tmp_path, dropout=0.1, trainer_kwargs={"target_dataset": make_dataset("llama", 4)}
        )
    noisy = {"neftune_noise_alpha": 5.0, "trainer_kwargs": {"target_dataset": make_dataset("llama", 4)}}
    with pytest.warns(UserWarning, match="`neftune_noise_alpha` is on"):
        make_trainer(BladeTrainer, "llama", tmp_path, **noisy)


@pytest.mark.parametrize("takes", ["outputs", "super", "logits"])
def test_a_loss_that_selection_cannot_reach_is_refused(tmp_path: Path, takes: str) -> None:
    class OwnTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if takes == "super":
                return 2 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            outputs = model(**inputs)
            logits = outputs["logits"][:, :-1].flatten(0, 1)
            own = F.cross_entropy(logits, inputs["labels"][:, 1:].flatten())
            loss = outputs["loss"] + 0.1 * logits.square().mean() if takes == "outputs" else own
            return (loss, outputs) if return_outputs else loss

    class OwnBladeTrainer(BladeMixin, OwnTrainer):
        pass

    settings = {
        "bilevel_config": BladeConfig(selection_ratio=0.5),
        "target_dataset": make_dataset("llama", 4),
    }
    trainer = make_trainer(OwnBladeTrainer, "llama", tmp_path, trainer_kwargs=settings)
    if takes == "logits":
        with pytest.raises(
            RuntimeError, match="computes its loss from the logits, so that all tokens would be trained"
        ):
            trainer.train()
    else:
        trainer.train()


class TwiceInStep(Trainer):
    """Regularised dropout: two passes of a batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        one, two = (super(TwiceInStep, self).compute_loss(model, inputs, True, num_items_in_batch) for _ in range(2))
        self.__dict__.setdefault("pairs", []).append((one[0].detach(), two[0].detach()))
        return ((one[0] + two[0]) / 2, one[1]) if return_outputs else (one[0] + two[0]) / 2


class TwoSteps(Trainer):
    """Sharpness-aware: two steps on a batch."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        steps = [super(TwoSteps, self).training_step(model, inputs, num_items_in_batch) for _ in range(2)]
        self.__dict__.setdefault("pairs", []).append(steps)
        return steps[0]


@pytest.mark.parametrize("kind", [TwiceInStep, TwoSteps])
def test_a_batch_that_is_passed_twice_has_the_same_tokens_both_times(kind: type[Trainer], tmp_path: Path) -> None:
    trainer_class = type("InFront", (kind, BladeTrainer), {})
    settings = {"bilevel_config": BladeConfig(selection_ratio=0.5), "target_dataset": make_dataset("llama", 4)}
    trainer = make_trainer(trainer_class, "llama", tmp_path, trainer_kwargs=settings)
    trainer.train()
    assert len(trainer.pairs) > 4
    for one, two in trainer.pairs:
        assert torch.equal(one, two)
    offered = trainer.sample_tally.state_dict()["offered"]
    once = make_trainer(BladeTrainer, "llama", tmp_path, trainer_kwargs=settings)
    once.train()
    assert torch.equal(offered, once.sample_tally.state_dict()["offered"])  # counted once


def test_a_step_on_a_batch_that_nothing_was_selected_of_is_refused(tmp_path: Path) -> None:
    class Copies(BladeTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            for _ in range(2):
                loss = super().training_step(model, dict(inputs), num_items_in_batch)
            return loss

    settings = {"bilevel_config": BladeConfig(selection_ratio=0.5), "target_dataset": make_dataset("llama", 4)}
    trainer = make_trainer(Copies, "llama", tmp_path, gradient_accumulation_steps=1, trainer_kwargs=settings)
    with pytest.raises(RuntimeError, match="called more often than the step has micro-batches"):
        trainer.train()


def test_a_look_at_the_loss_in_between_changes_nothing(tmp_path: Path) -> None:
    class Probe(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
            batch = self.trainer.data_collator([self.trainer.target_dataset[0]])
            batch.pop("source", None)
            self.trainer.compute_loss(model, {k: v for k, v in batch.items() if torch.is_tensor(v)})

    def run(probes: bool) -> tuple[torch.Tensor, list[float]]:
        target = make_dataset("llama", 4).remove_columns("source")
        settings = {"bilevel_config": BladeConfig(selection_ratio=0.5), "target_dataset": target}
        trainer = make_trainer(BladeTrainer, "llama", tmp_path, trainer_kwargs=settings)
        if probes:
            probe = Probe()
            probe.trainer = trainer
            trainer.add_callback(probe)
        trainer.train()
        return parameters_of(trainer), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert torch.equal(run(True)[0], run(False)[0])
    assert run(True)[1] == run(False)[1]


def unlabelled(rows: list[dict[str, Any]], without: set[int]) -> Dataset:
    none = {"labels": [-100] * LENGTH}
    return Dataset.from_list([{**row, **(none if i in without else {})} for i, row in enumerate(rows)])


def test_rows_without_labels_do_not_end_a_run(tmp_path: Path) -> None:
    """The last batch of an epoch may be of these alone."""
    settings = {
        "bilevel_config": BladeConfig(selection_ratio=0.5, granularity="sample"),
        "target_dataset": make_dataset("llama", 4),
    }
    trainer = make_trainer(
        BladeTrainer,
        "llama",
        tmp_path,
        train_dataset=unlabelled(make_rows("llama", 33), {32}),
        train_sampling_strategy="sequential",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        max_steps=6,
        trainer_kwargs=settings,
    )
    trainer.train()
    assert trainer.state.global_step == 6 and parameters_of(trainer).isfinite().all()
    assert int(trainer.sample_tally.state_dict()["selected"][32]) == 0


def test_rows_without_labels_end_a_run_where_their_loss_is_no_number(tmp_path: Path) -> None:
    rows = [{**row, **({"labels": -100} if i % 32 < 8 else {})} for i, row in enumerate(make_rows("vit", 32))]
    settings = {"bilevel_config": BladeConfig(selection_ratio=0.5), "target_dataset": make_dataset("vit", 4)}
    trainer = make_trainer(
        BladeTrainer,
        "vit",
        tmp_path,
        train_dataset=Dataset.from_list(rows[8:] + rows[:8]),
        train_sampling_strategy="sequential",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        max_steps=6,
        trainer_kwargs=settings,
    )
    with pytest.raises(FloatingPointError, match="No candidate of a batch has a finite loss and a label at step 3"):
        trainer.train()


def test_a_reference_learns_nothing_from_rows_without_labels(tmp_path: Path) -> None:
    config = BladeConfig(
        selection_ratio=0.5,
        granularity="sample",
        penalty=1.0,
        sync_steps=2,
        reference_steps=4,
        first_reference_steps=1,
    )
    trainer = make_trainer(
        BladeTrainer,
        "llama",
        tmp_path,
        train_dataset=unlabelled(make_rows("llama", 64), set(range(0, 64, 2)) | set(range(40))),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        max_steps=6,
        trainer_kwargs={"bilevel_config": config, "target_dataset": make_dataset("llama", 4)},
    )
    trainer.train()
    assert parameters_of(trainer).isfinite().all()


def test_a_reference_keeps_no_cache(tmp_path: Path) -> None:
    reference = make_model("llama")
    assert reference.config.use_cache
    caches: list[Any] = []
    reference.register_forward_hook(lambda module, args, outputs: caches.append(outputs.past_key_values))
    settings = {"bilevel_config": BladeConfig(**STATIC), "reference_model": reference}
    make_trainer(BladeTrainer, "llama", tmp_path, trainer_kwargs=settings).train()
    assert caches and not any(caches)
    assert reference.config.use_cache


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"selection_ratio": 0}, ValueError, r"`selection_ratio` must be in \(0, 1\], got 0"),
        ({"selection_ratio": 1.01}, ValueError, r"must be in \(0, 1\], got 1.01"),
        ({"selection_ratio": float("nan")}, ValueError, "must be in"),
        (
            {"selection_ratio": "0.5"},
            TypeError,
            "must be float, got '0.5' of type str. In YAML write a number without",
        ),
        ({"selection_ratio": True}, TypeError, "must be float, got True of type bool"),
        ({"granularity": "word"}, ValueError, "`granularity` must be one of auto, sample, token; got 'word'"),
        ({"score": "entropy"}, ValueError, "`score` must be one of excess_loss, loss, random"),
        ({"reference": "none"}, ValueError, "`reference='none'` has none"),
        ({"sync_steps": "often"}, TypeError, "`sync_steps` must be int or 'auto', got 'often'"),
        ({"sync_steps": 0}, ValueError, "`sync_steps` must be at least 1 or 'auto', got 0"),
        ({"sync_steps": 1.5}, TypeError, "`sync_steps` must be int or 'auto', got 1.5 of type float"),
        ({"penalty": -1}, ValueError, "`penalty` must be finite and not negative, got -1"),
        ({"penalty": [1]}, TypeError, r"`penalty` must be float, got \[1\] of type list"),
        ({"start_step": -1}, ValueError, "`start_step` must not be negative"),
        ({"reference_learning_rate": 0.0}, ValueError, "`reference_learning_rate` must be positive"),
        ({"target_batch_size": 0}, ValueError, "`target_batch_size` must be at least 1"),
        ({"domain_names": "web"}, TypeError, "`domain_names` must be"),
    ],
)
def test_config_is_checked_on_construction(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BladeConfig(**settings)


def test_config_from_command_line_and_yaml(tmp_path: Path) -> None:
    parser = HfArgumentParser(BladeConfig)
    command = "--selection_ratio 0.3 --sync_steps 50 --penalty 0.1 --granularity sample --domain_names web books"
    (config,) = parser.parse_args_into_dataclasses(command.split())
    assert (config.selection_ratio, config.sync_steps, config.penalty) == (0.3, 50, 0.1)
    assert config.domain_names == ["web", "books"]
    (config,) = parser.parse_args_into_dataclasses(["--sync_steps", "auto"])
    assert config == BladeConfig()
    path = tmp_path / "config.yaml"
    path.write_text("selection_ratio: 0.25\nsync_steps: auto\npenalty: 0\n")
    (config,) = parser.parse_yaml_file(path)
    assert config == BladeConfig(selection_ratio=0.25, penalty=0.0)
    path.write_text("selection_ratio: 0.25\nreference_learning_rate: 1e-4\n")  # YAML reads 1e-4 as a string
    with pytest.raises(TypeError, match="`reference_learning_rate` must be .*got '1e-4' of type str.*1.0e-4"):
        parser.parse_yaml_file(path)
    with pytest.raises(TypeError, match="`bilevel_config` must be a BladeConfig, got dict"):
        BladeTrainer(model=make_model("vit"), args=arguments(tmp_path), bilevel_config={"selection_ratio": 0.5})


# Other trainers -------------------------------------------------------------------------------------------------------


class OwnTrainer(Trainer):
    """A user's trainer that adds to the loss of one forward."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = loss + 1e-3 * outputs["logits"].square().mean()
        return (loss, outputs) if return_outputs else loss


class TwiceTrainer(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        model(**inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class BladeOwnTrainer(BladeMixin, OwnTrainer):
    pass


class BladeTwiceTrainer(BladeMixin, TwiceTrainer):
    pass


def test_own_compute_loss(tmp_path: Path) -> None:
    settings = {"bilevel_config": BladeConfig(selection_ratio=0.5, score="loss")}
    runs = []
    for trainer_class in (BladeTrainer, BladeOwnTrainer):
        trainer = make_trainer(trainer_class, "llama", tmp_path, trainer_kwargs=settings)
        trainer.train()
        runs.append(parameters_of(trainer))
    assert not torch.equal(*runs)
    with pytest.raises(RuntimeError, match=r"called `model\(\*\*inputs\)` 2 times; token selection needs exactly one"):
        make_trainer(BladeTwiceTrainer, "llama", tmp_path, trainer_kwargs=settings).train()


@pytest.mark.parametrize("kind", ["closure", "bound", "bound closure", "closure under autocast"])
def test_a_reference_runs_its_own_weights_whatever_forward_the_model_was_given(kind: str) -> None:
    """TRL exchanges `forward` by a closure over the model, accelerate's autocast wraps what it finds."""
    from hf_bilevel.trainers.reference_models import ReferenceCopy, copy_of

    model = make_model("llama").eval()
    forward = type(model).forward
    if kind == "bound":
        model.forward = types.MethodType(lambda self, *args, **kwargs: forward(self, *args, **kwargs), model)
    elif kind == "bound closure":
        original = model.forward
        model.forward = types.MethodType(lambda self, *args, **kwargs: original(*args, **kwargs), model)
    else:
        model.forward = lambda *args, **kwargs: forward(model, *args, **kwargs)
    if kind == "closure under autocast":
        patched = model.forward
        model._original_forward, model.forward = patched, lambda *args, **kwargs: patched(*args, **kwargs)
    given = model.forward
    reference = ReferenceCopy(model, copy_of(model), None, torch.device("cpu"), parked=False)
    assert model.forward is given
    tokens = torch.arange(1, 7)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        for parameter in model.parameters():
            parameter.add_(0.1)
        with reference.active() as module:
            assert torch.equal(module(input_ids=tokens).logits, before)
        assert not torch.equal(model(input_ids=tokens).logits, before)
    with reference.active(training=True) as module:
        module(input_ids=tokens, labels=tokens).loss.backward()
        assert all(p.grad is not None for p in module.parameters()) and all(p.grad is None for p in model.parameters())
