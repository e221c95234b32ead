"""Real processes with gloo. `accelerate launch --cpu --num_processes 2` would start one, so torchrun starts them."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from several_processes import (
    BROS_ON,
    CASES,
    CORESET_ON,
    DEEPSPEED_CASES,
    GLOBAL_LEARNING_RATE,
    GLOBAL_RUNS,
    KERNEL_ON,
    MIXTURE_ON,
    ON,
    SHARDED_CASES,
    TRAINERS,
    model_of_this_rank,
    variables,
)
from tiny import make_dataset, make_model, make_trainer, parameters_of, wide_norms
from transformers import set_seed

from hf_bilevel import (
    BladeConfig,
    BladeTrainer,
    BrosConfig,
    BrosTrainer,
    CoresetConfig,
    CoresetTrainer,
    MixtureConfig,
    MixtureTrainer,
    load_selected_subset,
)

CRASHES = {"PYTHONFAULTHANDLER": "1"}  # say where
SCRIPT = Path(__file__).parent / "several_processes.py"


def start(num_processes: int, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    settings = {"capture_output": True, "text": True, "timeout": 500, "cwd": SCRIPT.parent}
    return subprocess.run(
        [*command, str(SCRIPT), *arguments], env={**os.environ, **CRASHES, **environment}, **settings
    )


def assert_passed(result: "subprocess.CompletedProcess[str]", cases: Iterable[str]) -> None:
    output = result.stdout + result.stderr
    crash = output.find("Fatal Python error")  # where a process was that could not raise, long before the end
    shown = (output[crash : crash + 4000] if crash >= 0 else "") + output[-6000:]
    assert result.returncode == 0, shown
    for case in cases:
        assert f"{case}: passed" in output, shown


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    cases = (
        "vit",
        "llama",
        "bros vit",
        "bros network",
        "mixture vit",
        "mixture llama",
        "coreset",
        "uneven",
        "disagreement",
    )
    assert_passed(start(4, str(tmp_path), *cases), cases)


@pytest.mark.slow
def test_models_that_fsdp_shards(tmp_path: Path) -> None:
    assert_passed(start(2, str(tmp_path), *SHARDED_CASES), SHARDED_CASES)


@pytest.mark.slow
def test_models_that_deepspeed_runs(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="a package that is built for the machine; see CONTRIBUTING.md")
    assert_passed(start(2, str(tmp_path), *DEEPSPEED_CASES, DS_ACCELERATOR="cpu"), DEEPSPEED_CASES)


@pytest.mark.slow
def test_a_process_that_cannot_go_on_takes_the_others_with_it(tmp_path: Path) -> None:
    result = start(2, str(tmp_path), "one fails")
    assert result.returncode != 0
    assert "FloatingPointError: No candidate of a batch has a finite loss and a label at step 0" in result.stderr


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    assert_passed(start(2, str(tmp_path)), CASES)
    for case, expected in torch.load(tmp_path / "global.pt", weights_only=True).items():
        assert_one_process_is_the_same(case, expected, tmp_path)
    assert_other_numbers_of_processes(tmp_path)
    for case, settings in {"coreset": CORESET_ON, "coreset kernel": KERNEL_ON}.items():
        given = {"target_dataset": make_dataset("vit", 10, seed=7), "bilevel_config": CoresetConfig(**settings)}
        folder = tmp_path / "one process" / case
        one = make_trainer(CoresetTrainer, "vit", folder, trainer_kwargs={"model_init": model_of_this_rank, **given})
        two = load_selected_subset(tmp_path / case / "subset")
        one = one.search()
        assert torch.equal(one.ids, two.ids), case
        torch.testing.assert_close(one.probabilities, two.probabilities, rtol=0, atol=1e-5)


def assert_one_process_is_the_same(case: str, expected: dict[str, torch.Tensor], folder: Path) -> None:
    """One process with the doubled batch; in float64, with sample weights in float32: to 1e-6 of the largest entry."""
    name, config, kwargs = GLOBAL_RUNS[case]
    model = wide_norms(make_model(name)).double()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    trainer = make_trainer(
        TRAINERS[type(config)],
        name,
        folder / "one process",
        model=model,
        optim="sgd",
        learning_rate=GLOBAL_LEARNING_RATE,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        trainer_kwargs={
            "target_dataset": make_dataset(name, 10, seed=7),
            "bilevel_config": config,
            **kwargs,
        },
    )
    set_seed(11)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The subspaces of")
        trainer.train()
    got = variables(trainer)
    assert got.keys() == expected.keys() and (got["parameters"] - start).abs().max() > 1e-3
    for key, value in got.items():
        # Sums of a domain's losses are float32, too.
        tolerance = (1e-5 if case == "domains" else 1e-6) * float(expected[key].abs().max())
        torch.testing.assert_close(
            value, expected[key], rtol=0, atol=tolerance, msg=lambda text, k=key: f"{case}, {k}: {text}"
        )


def assert_other_numbers_of_processes(folder: Path) -> None:
    """What two processes wrote is resumed by one where no state belongs to a process, else refused, with the way out."""
    runs = {
        "vit": (BladeTrainer, BladeConfig(**ON)),
        "coreset": (CoresetTrainer, CoresetConfig(**CORESET_ON)),
        "bros vit": (BrosTrainer, BrosConfig(**BROS_ON, estimator="bi_probe")),
        "mixture vit": (MixtureTrainer, MixtureConfig(**MIXTURE_ON)),
    }
    for case, (trainer_class, config) in runs.items():
        trainer = make_trainer(
            trainer_class,
            "vit",
            folder / "one process",
            max_steps=6,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            trainer_kwargs={"target_dataset": make_dataset("vit", 10, seed=7), "bilevel_config": config},
        )
        checkpoint = str(folder / case / "on" / "checkpoint-4")
        if case in ("vit", "coreset"):
            trainer.train(resume_from_checkpoint=checkpoint)
            assert trainer.state.global_step == 6 and parameters_of(trainer).isfinite().all()
        else:
            with pytest.raises(ValueError, match="holds the state of 2 processes, this run has 1. Resume with 2"):
                trainer.train(resume_from_checkpoint=checkpoint)
