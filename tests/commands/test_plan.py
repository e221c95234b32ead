"""The arithmetic of a dry run, against counts by hand, and against what training does."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_bilevel import tangent_kernel
from hf_bilevel.commands import run as run_module
from hf_bilevel.commands.main import main
from hf_bilevel.commands.run import run


def dry(method: str, tiny, data, common, capsys, *more: str, model: str = "base", kind: str = "{}.jsonl") -> str:
    places = []
    for part, name in (("train", "pool"), ("target", "target")):
        places += [f"--{part}_dataset", data[kind.format(name)]]
    main([method, "--model", tiny[model], *places, *common, *more, "--dry-run"])
    return capsys.readouterr().out


def cost(printed: str) -> tuple[float, float]:
    """Passes of the whole run, and how many times the plain Trainer's."""
    total, ratio = re.search(r"whole run: ([\d,]+), ([\d.]+) times", printed).groups()
    return float(total.replace(",", "")), float(ratio)


def mib(printed: str, name: str) -> float:
    return float(re.search(rf"^  {re.escape(name)}: ([\d,.]+)", printed, re.M).group(1))


def test_nothing_is_trained_or_written(tiny, data, common, capsys, tmp_path: Path, monkeypatch) -> None:
    real = run_module.build_model

    def without_weights(*args, weights: bool = True):
        assert not weights
        return real(*args, weights=weights)

    monkeypatch.setattr(run_module, "build_model", without_weights)
    monkeypatch.chdir(tmp_path)
    for spelling in ("--dry_run", "--dry-run"):
        assert (
            run("blade", ["--model", tiny["base"], "--train_dataset", data["pool.jsonl"], *common, spelling]) is None
        )
    assert list(tmp_path.iterdir()) == []
    assert "a dry run: nothing is trained and nothing is written" in capsys.readouterr().out


def test_settings_and_batches(tiny, data, common, capsys) -> None:
    more = [
        "--max_steps",
        "-1",
        "--num_train_epochs",
        "4",
        "--gradient_accumulation_steps",
        "2",
        "--hub_token",
        "hf_secret",
    ]
    printed = dry("blade", tiny, data, common, capsys, *more, "--granularity", "sample", "--selection_ratio", "0.25")
    settings = printed.split("Data:")[0]
    for line in (
        "selection_ratio: 0.25",
        "num_train_epochs: 4.0",
        "max_length: 64",
        "learning_rate: 0.001",
        "seed: 42",
    ):
        assert f"  {line}\n" in settings
    assert "weight_decay" not in settings and "sync_steps" not in settings, "they have their defaults"
    assert "hf_secret" not in printed
    assert "train: 40 rows" in printed and "target: 12 rows" in printed
    # 40 rows in batches of 8 are 5 batches, 3 steps of 2 batches (the last of 1), in 4 epochs 12.
    for line in (
        "candidates of a step: 8 per device × 2 accumulated × 1 processes = 16",
        "selected: 4 rows",
        "steps of an epoch: 3 (40 rows)",
        "steps of the run: 12",
        "reference: every 12 steps it is made anew and takes 12",
    ):
        assert f"  {line}\n" in printed


def test_the_number_of_steps_is_the_trainers(tiny, data, common, capsys) -> None:
    more = [
        "--max_steps",
        "-1",
        "--num_train_epochs",
        "1.5",
        "--gradient_accumulation_steps",
        "2",
        "--selection_ratio",
        "1",
    ]
    printed = dry("blade", tiny, data, common, capsys, *more)
    trainer = run("blade", ["--model", tiny["base"], "--train_dataset", data["pool.jsonl"], *common, *more])
    assert f"steps of the run: {trainer.state.global_step}\n" in printed


@pytest.mark.parametrize(
    ("method", "given", "ratio"),
    [
        ("blade", "--selection_ratio 1", 1),
        ("blade", "--score random", 1),
        ("blade", "--score loss --granularity sample --selection_ratio 0.5", (1 + 3 * 0.5) / 3),
        ("blade", "--score random --granularity sample --selection_ratio 0.5", (1 + 3 * 0.5) / 3),
        # One forward of the reference a step, and in 0.3 of the steps 3 on a target batch, 2 and 3 on a training batch; the first
        # of the ten phases selects nothing.
        (
            "blade",
            "--max_steps 1000 --sync_steps 100 --reference_steps 30 --penalty 1",
            (4 + 0.3 * (0.9 * (3 + 2 + 3) + 0.1 * (3 + 3))) / 3,
        ),
        ("blade", "--max_steps 1000 --sync_steps 100 --reference_steps 30", (4 + 0.3 * 3) / 3),
        (
            "blade",
            "--max_steps 10 --start_step 5 --sync_steps 5 --reference_steps 1",
            (3 + 0.5 + 0.1 * 3) / 3,
        ),
        ("bros", "", 3),
        ("bros", "--update_every 5 --max_steps 1000", 1 + 2 / 5),
        ("bros", "--estimator bi_probe --target_batch_size 4", (3 + 3 * 3 + 2 + 3 * 0.5) / 3),
        ("mixture", "--mixture uniform", 1),
        # 100 steps, an update after every 10 but the last: the last 2 again with a target batch, and 2 times 4 batches.
        ("mixture", "--max_steps 100 --inner_steps 10 --reference_steps 2", 1 + 9 * (2 * 6 + 8) / 300),
        ("mixture", "--max_steps 101 --hypergradient alignment", 1 + 100 * (3 + 8) / 303),
    ],
)
def test_cost(tiny, data, common, capsys, method: str, given: str, ratio: float) -> None:
    printed = dry(method, tiny, data, common, capsys, "--domain_column", "source", *given.split())
    total, found = cost(printed)
    steps = int(re.search(r"steps of the run: ([\d,]+)", printed).group(1).replace(",", ""))
    assert found == pytest.approx(ratio, abs=0.005)
    assert total == pytest.approx(ratio * 3 * 8 * steps, rel=1e-3)


def test_cost_of_a_coreset(tiny, data, common, capsys) -> None:
    search = "--size 10 --outer_steps 3 --num_masks 2 --inner_steps 4 --num_final_masks 2 --num_upper_rows 5"
    more = ["--task", "sequence_classification", *search.split()]
    total, _ = cost(dry("coreset", tiny, data, common, capsys, *more, model="bert"))
    # Trainings of 4 steps on 10 rows, judged on 5 of the 12 rows of the target dataset, at the end on all of them: 2 masks beside
    # 10 uniform draws.
    assert total == 3 * 2 * (4 * 3 * 10 + 5) + (2 + 10) * (4 * 3 * 10 + 12) + 2 * 3 * 8


def test_cost_of_a_coreset_by_the_tangent_kernel(tiny, data, common, capsys) -> None:
    more = ["--task", "sequence_classification", "--size", "10", "--engine", "kernel", "--kernel_trainings"]
    # Gradients of three combinations of the logits of the 40 rows of the pool and 12 of the target dataset.
    total, _ = cost(dry("coreset", tiny, data, common, capsys, *more, "0", model="bert"))
    assert total == 3 * 3 * (40 + 12) + 2 * 3 * 8
    # Of two combinations after each of two trainings of 7 steps on 10 rows.
    total, _ = cost(dry("coreset", tiny, data, common, capsys, *more, "2", "--inner_steps", "7", model="bert"))
    assert total == 2 * 7 * 3 * 10 + 4 * 3 * (40 + 12) + 2 * 3 * 8


def test_a_kernel_of_many_parameters_takes_more_passes(tiny, data, common, capsys, monkeypatch) -> None:
    size = sum(
        p.numel() for p in AutoModelForSequenceClassification.from_pretrained(tiny["bert"], num_labels=3).parameters()
    )
    monkeypatch.setattr(tangent_kernel, "BLOCK_NUMBERS", 15 * size)  # 40 rows in blocks of 15, 15 and 10
    more = ["--task", "sequence_classification", "--size", "10", "--engine", "kernel"]
    printed = dry("coreset", tiny, data, common, capsys, *more, model="bert")
    total, _ = cost(printed)
    assert total == 3 * 3 * (40 + 25 + 10 + 3 * 12) + 2 * 3 * 8
    assert mib(printed, "gradients of two blocks of rows, while the kernel is made") == pytest.approx(
        2 * 15 * 4 * size / 2**20, abs=0.06
    )
    assert mib(printed, "matrices of pool by pool") == pytest.approx(2 * 8 * 40**2 / 2**20, abs=0.06)


def test_a_mixture_that_is_given_is_not_learned(tiny, data, common, capsys, tmp_path: Path) -> None:
    (tmp_path / "mixture.json").write_text('{"mixture": {"web": 0.5, "books": 0.5}}')
    more = ["--domain_column", "source", "--mixture_file", str(tmp_path / "mixture.json")]
    printed = dry("mixture", tiny, data, common, capsys, *more)
    assert "1.00 times the plain Trainer" in printed and "reference" not in printed


def test_memory(tiny, data, common, capsys) -> None:
    wide = ["--model", tiny["wide"]]
    trainer_less = dry("blade", tiny, data, common, capsys, *wide)
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny["wide"]).parameters()) * 4 / 2**20
    expected = {
        "weights": 1,
        "gradients": 1,
        "optimizer": 2,
        "reference, a copy": 1,
        "its optimizer, while it is trained": 2,
        "sum": 7,
    }
    for name, times in expected.items():
        assert mib(trainer_less, name) == pytest.approx(times * size, abs=0.06), name
    assert "not counted: activations" in trainer_less
    adapter = dry("blade", tiny, data, common, capsys, *wide, "--peft", "--dtype", "bfloat16")
    assert size / 2 < mib(adapter, "weights") < 0.8 * size
    assert mib(adapter, "gradients") == mib(adapter, "reference, a second adapter") < 0.3 * size
    bros = dry("bros", tiny, data, common, capsys, *wide, "--rank", "8", "--optim", "sgd")
    assert mib(bros, "auxiliary variable") == pytest.approx(size, abs=0.06) and mib(bros, "optimizer") == 0
    assert mib(bros, "gradients, of the loss and along the auxiliary variable") < 2 * size
    assert "optimizer: not known" in dry("bros", tiny, data, common, capsys, *wide, "--optim", "adafactor")


def test_a_rank_that_is_too_large_is_refused(tiny, data, common, capsys) -> None:
    with pytest.raises(SystemExit, match="hf-bilevel bros: `rank=500` is larger than the input size"):
        dry("bros", tiny, data, common, capsys, "--rank", "500")


def test_image_classification(tiny, data, common, capsys) -> None:
    printed = dry("bros", tiny, data, common, capsys, "--task", "image_classification", model="vit", kind="images_{}")
    assert "train: 40 rows" in printed and torch.get_default_device().type == "cpu"
