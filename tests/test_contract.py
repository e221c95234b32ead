"""What every trainer of this package promises, on tiny models of the real architectures.

Off is the plain Trainer to the bit, on is not, resumed is uninterrupted, and whatever else a Trainer does stays as it is.
A new trainer joins ``METHODS`` and inherits every test.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from tiny import MODELS, make_dataset, make_model, make_trainer, parameters_of
from transformers import Trainer, TrainerCallback, set_seed

from hf_bilevel import BladeTrainer, BrosTrainer, CoresetTrainer, MixtureTrainer


class Method(NamedTuple):
    trainer_class: type[Trainer]
    off: dict[str, Any]  # settings that make it the plain Trainer
    on: dict[str, Any]
    stream: dict[str, Any] | None = {}  # more settings for streams; None if they are refused


METHODS = {
    "blade": Method(
        BladeTrainer,
        off={"selection_ratio": 1.0},
        on={"selection_ratio": 0.5, "sync_steps": 3, "reference_steps": 2, "penalty": 0.5},
    ),
    "bros": Method(
        BrosTrainer,
        off={"upper_variable": "fixed", "rank": "full"},
        on={"rank": 0.5, "refresh_steps": 2, "estimator": "bi_probe"},
        stream={"upper_variable": "network"},
    ),
    "mixture": Method(
        MixtureTrainer,
        off={"mixture": "proportional"},
        on={"domain_column": "source", "inner_steps": 3, "reference_steps": 2},
        stream={"realisation": "weight", "domain_names": ["books", "code", "web"]},
    ),
    "coreset": Method(
        CoresetTrainer,
        off={"size": "pool"},
        on={"size": 0.5, "outer_steps": 3, "inner_steps": 2, "num_masks": 2, "num_final_masks": 2},
        stream=None,
    ),
}


def build(method: str, name: str, folder: Path, *, on: bool = True, settings: dict[str, Any] | None = None, **kwargs):
    trainer_class, off_settings, on_settings, _ = METHODS[method]
    config = trainer_class.config_class(**{**(on_settings if on else off_settings), **(settings or {})})
    extra = {"target_dataset": make_dataset(name, 10, seed=7), "bilevel_config": config}
    extra.update(kwargs.pop("trainer_kwargs", {}))
    return make_trainer(trainer_class, name, folder, trainer_kwargs=extra, **kwargs)


def run(trainer: Trainer, **kwargs: Any) -> torch.Tensor:
    set_seed(11)  # Trainer seeds on construction; here two are built before either runs
    trainer.train(**kwargs)
    return parameters_of(trainer)


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def bilevel_state(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / "bilevel_state.pt", weights_only=True)


def assert_same(a: Any, b: Any, path: str = "state") -> None:
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


pytestmark = [
    pytest.mark.parametrize("method", METHODS),
    pytest.mark.parametrize(
        "name", [pytest.param(m, marks=[pytest.mark.slow] * m.startswith("bert")) for m in MODELS]
    ),
    pytest.mark.filterwarnings("ignore:The subspaces of"),  # a few steps cannot cover anything
    pytest.mark.filterwarnings("ignore:The weights of the domains never move"),
]

SITUATIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3, "max_steps": 4},  # 8 batches an epoch: the last window is short
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    "dropout": {"dropout": 0.1},
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.filterwarnings("ignore:Dropout of up to")
def test_off_is_the_plain_trainer(method: str, name: str, situation: str, tmp_path: Path) -> None:
    plain = make_trainer(Trainer, name, tmp_path, **SITUATIONS[situation])
    off = build(method, name, tmp_path, on=False, **SITUATIONS[situation])
    assert torch.equal(run(off), run(plain))
    assert losses_of(off) == losses_of(plain) != []


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.filterwarnings("ignore:Dropout of up to")
def test_on_changes_the_run_and_repeats_itself(method: str, name: str, situation: str, tmp_path: Path) -> None:
    plain = run(make_trainer(Trainer, name, tmp_path, **SITUATIONS[situation]))
    trainer = build(method, name, tmp_path, **SITUATIONS[situation])
    parameters = run(trainer)
    assert parameters.isfinite().all()
    assert not torch.equal(parameters, plain)
    assert torch.equal(parameters, run(build(method, name, tmp_path, **SITUATIONS[situation])))
    if situation == "plain":
        assert run(trainer).isfinite().all()  # a second train() starts over, unharmed


@pytest.mark.parametrize("step", [3, 5])  # T = 3: at a synchronisation, and between two, in the middle of an epoch
@pytest.mark.filterwarnings("ignore:Dropout of up to")
def test_resuming_is_not_visible(method: str, name: str, step: int, tmp_path: Path) -> None:
    settings = {
        "max_steps": 8,  # epochs of 4 updates
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "dropout": 0.1,
        "settings": {"domain_column": "source"},
    }
    whole = run(build(method, name, tmp_path / "whole", **settings))
    assert (tmp_path / "whole" / f"checkpoint-{step}" / "trainer_state.json").exists()
    resumed = build(method, name, tmp_path / "resumed", **settings)
    parameters = run(resumed, resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert torch.equal(parameters, whole)
    states = [bilevel_state(tmp_path / run_name / "checkpoint-8") for run_name in ("whole", "resumed")]
    assert_same(*states)


def test_streaming(method: str, name: str, tmp_path: Path) -> None:
    pool = make_dataset(name, 64)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    off = build(method, name, tmp_path, on=False, train_dataset=pool.to_iterable_dataset(), **settings)
    plain = make_trainer(Trainer, name, tmp_path, train_dataset=pool.to_iterable_dataset(), **settings)
    assert torch.equal(run(off), run(plain))
    if METHODS[method].stream is None:
        with pytest.raises(ValueError, match="`train_dataset` is a stream"):
            build(method, name, tmp_path, train_dataset=pool.to_iterable_dataset(), **settings)
        return
    stream = {"settings": METHODS[method].stream}
    whole = build(method, name, tmp_path / "whole", train_dataset=pool.to_iterable_dataset(), **stream, **settings)
    parameters = run(whole)
    assert not torch.equal(parameters, parameters_of(plain))
    again = build(method, name, tmp_path / "resumed", train_dataset=pool.to_iterable_dataset(), **stream, **settings)
    resumed = run(again, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(resumed, parameters)
    assert_same(*(bilevel_state(tmp_path / run_name / "checkpoint-6") for run_name in ("whole", "resumed")))


def test_a_stream_is_resumed_in_a_later_pass(method: str, name: str, tmp_path: Path) -> None:
    if METHODS[method].stream is None:
        pytest.skip("refused, see test_streaming")
    accumulation = 2 if name == "vit" else 1
    settings = {"max_steps": 13 // accumulation, "save_strategy": "steps", "save_steps": 1}
    settings |= {"gradient_accumulation_steps": accumulation, "settings": METHODS[method].stream}

    def stream() -> Any:
        rows = make_dataset(name, 40).to_iterable_dataset(num_shards=4)  # 5 batches a pass
        return rows.shuffle(seed=1, buffer_size=8)  # in another order in each

    whole = run(build(method, name, tmp_path / "whole", train_dataset=stream(), **settings))
    for step in (5, 6, 9, 11):
        resumed = build(method, name, tmp_path / "resumed", train_dataset=stream(), **settings)
        checkpoint = tmp_path / "whole" / f"checkpoint-{step // accumulation}"
        assert torch.equal(run(resumed, resume_from_checkpoint=str(checkpoint)), whole), step


def test_evaluation_is_untouched(method: str, name: str, tmp_path: Path) -> None:
    held_out = make_dataset(name, 20, seed=5)
    plain = make_trainer(Trainer, name, tmp_path)
    on = build(method, name, tmp_path)
    expected = plain.evaluate({"one": held_out, "two": held_out})
    got = on.evaluate({"one": held_out, "two": held_out})
    assert got["eval_one_loss"] == expected["eval_one_loss"] and got["eval_two_loss"] == expected["eval_two_loss"]
    assert (on.predict(held_out).predictions == plain.predict(held_out).predictions).all()
    run(on)
    in_training = on.evaluate(held_out)["eval_loss"]
    plain.model.load_state_dict(on.model.state_dict())
    assert plain.evaluate(held_out)["eval_loss"] == in_training


def test_best_model_metrics_and_callbacks(method: str, name: str, tmp_path: Path) -> None:
    seen: list[int] = []
    logged: set[str] = set()

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            seen.append(state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            logged.update(logs)

    trainer = build(
        method,
        name,
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="first",
        trainer_kwargs={
            "eval_dataset": make_dataset(name, 12, seed=5),
            "compute_metrics": lambda prediction: {"first": float(prediction.predictions.mean())},
            "callbacks": [Watch()],
        },
    )
    trainer.train()
    assert seen == [1, 2, 3, 4]
    assert trainer.state.best_metric is not None and trainer.state.best_model_checkpoint is not None
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    assert torch.equal(torch.cat([p.flatten() for p in best.parameters()]), parameters_of(trainer))
    assert any(key.startswith(f"{method}/") for key in logged)


def test_checkpoint_is_a_plain_model(method: str, name: str, tmp_path: Path) -> None:
    trainer = build(method, name, tmp_path)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    model, info = type(trainer.model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(torch.cat([p.flatten() for p in model.parameters()]), parameters_of(trainer))
    config = trainer.config_class.from_json_file(tmp_path / "saved" / "bilevel_config.json")
    assert config == trainer.bilevel_config
    facts = json.loads((tmp_path / "saved" / "bilevel_facts.json").read_text())
    assert facts["method"] == method and facts["num_target"] == 10 and facts["num_pool"] == 64


def test_restart_after_out_of_memory(method: str, name: str, tmp_path: Path) -> None:
    """``auto_find_batch_size`` enters the loop again with a smaller batch: nothing of the failed try may remain."""
    failed = []

    class FailsOnce(METHODS[method].trainer_class):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self._train_batch_size > 6:
                failed.append(self._train_batch_size)
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    trainer = make_trainer(
        FailsOnce,
        name,
        tmp_path,
        auto_find_batch_size=True,
        max_steps=3,
        trainer_kwargs={
            "target_dataset": make_dataset(name, 10, seed=7),
            "bilevel_config": FailsOnce.config_class(**METHODS[method].on),
        },
    )
    trainer.train()
    assert failed and trainer.state.global_step == 3
    if method == "blade":
        rows = trainer.sample_tally.state_dict()["offered"]
        assert int((rows > 0).sum()) == 3 * trainer._train_batch_size  # of the second try only


def test_hyperparameter_search(method: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    trainer = build(method, name, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2,
                    trainer_kwargs={"eval_dataset": make_dataset(name, 8, seed=5)})  # fmt: skip
    trainer.model_init = lambda trial=None: make_model(name)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        n_trials=2,
        direction="minimize",
    )
    assert best.objective > 0


@pytest.mark.filterwarnings("ignore:`train_sampling_strategy='group_by_length'` is ignored")
def test_workers_and_sampling_by_length(method: str, name: str, tmp_path: Path) -> None:
    settings = {"dataloader_num_workers": 2, "max_steps": 3}
    if name != "vit":
        settings["train_sampling_strategy"] = "group_by_length"
    pool = make_dataset(name, 64)
    pool = pool.add_column("length", [i % 7 + 1 for i in range(64)])
    kwargs = {"train_dataset": pool, **settings}
    off, plain = build(method, name, tmp_path, on=False, **kwargs), make_trainer(Trainer, name, tmp_path, **kwargs)
    assert torch.equal(run(off), run(plain))
    workers = run(build(method, name, tmp_path, **kwargs))
    alone = run(build(method, name, tmp_path, **{**kwargs, "dataloader_num_workers": 0}))
    assert torch.equal(workers, alone)


def test_push_to_hub(method: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the Hub is what Trainer would send, with the config and the facts beside."""
    uploads: list[Path] = []
    hub = SimpleNamespace(
        create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id),
        upload_folder=lambda folder_path, **kwargs: uploads.append(folder_path),
    )
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    trainer = build(method, name, tmp_path / "output", max_steps=2, hub_model_id="me/model")
    trainer.train()
    trainer.push_to_hub()
    names = {path.name for path in Path(uploads[0]).iterdir()}
    expected = {"model.safetensors", "config.json", "README.md", "bilevel_config.json", "bilevel_facts.json"}
    assert expected <= names and not any("state" in entry or "reference" in entry for entry in names)
