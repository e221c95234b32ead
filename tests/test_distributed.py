"""Two real processes with gloo. `accelerate launch --cpu --num_processes 2` would start one, so torchrun starts them."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny import make_dataset, make_model, make_trainer, wide_norms
from transformers import set_seed
from two_processes import CORESET_ON, GLOBAL_LEARNING_RATE, GLOBAL_RUNS, variables

from hf_bilevel import BrosConfig, BrosTrainer, CoresetConfig, CoresetTrainer, load_selected_subset

MIXTURE_CASES = ("mixture vit", "mixture llama", "mixture alignment")


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    script = Path(__file__).parent / "two_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=500, cwd=script.parent
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]
    for case in (
        "vit",
        "torn",
        "llama",
        "bert",
        "lora",
        "bros vit",
        "bros llama",
        "bros network",
        *MIXTURE_CASES,
        "coreset",
    ):
        assert f"{case}: passed" in output, output[-6000:]
    for case, expected in torch.load(tmp_path / "global.pt", weights_only=True).items():
        assert_one_process_is_the_same(case, expected, tmp_path)
    one = make_trainer(
        CoresetTrainer,
        "vit",
        tmp_path / "one process",
        model=make_model("vit", dropout=0.2),
        trainer_kwargs={
            "target_dataset": make_dataset("vit", 10, seed=7),
            "bilevel_config": CoresetConfig(**CORESET_ON),
        },
    ).search()
    two = load_selected_subset(tmp_path / "coreset" / "subset")
    assert torch.equal(one.ids, two.ids)
    torch.testing.assert_close(one.probabilities, two.probabilities, rtol=0, atol=1e-5)


def assert_one_process_is_the_same(case: str, expected: dict[str, torch.Tensor], folder: Path) -> None:
    """One process with the doubled batch; in float64, with sample weights in float32: to 1e-6 of the largest entry."""
    name, settings, kwargs = GLOBAL_RUNS[case]
    model = wide_norms(make_model(name)).double()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    trainer = make_trainer(
        BrosTrainer,
        name,
        folder / "one process",
        model=model,
        optim="sgd",
        learning_rate=GLOBAL_LEARNING_RATE,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        trainer_kwargs={
            "target_dataset": make_dataset(name, 10, seed=7),
            "bilevel_config": BrosConfig(**settings),
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
        tolerance = 1e-6 * float(expected[key].abs().max())
        torch.testing.assert_close(
            value, expected[key], rtol=0, atol=tolerance, msg=lambda text, k=key: f"{case}, {k}: {text}"
        )
