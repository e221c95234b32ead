"""Every recipe of the commands runs, on a tiny model and tiny data; the launch configurations can be read, and one is run."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig

from hf_bilevel import SelectedSubset
from hf_bilevel.commands.run import COMMANDS, run

ROOT = Path(__file__).parents[2]
SCRIPTS = {"train_blade": "blade", "train_bros": "bros", "train_mixture": "mixture", "select_coreset": "coreset"}

# Recipe -> model, files, and what is smaller than as it comes
SMALLER = {
    "blade_continued_pretraining": ("base", "{}.jsonl", ""),
    "blade_sft": ("llama", "chats_{}.jsonl", "--lora_rank 2"),
    "blade_sft_trl": ("llama", "chats_{}.jsonl", ""),
    "bros_vit": ("vit", "images_{}", "--dataloader_num_workers 0"),
    "bros_llm_lora": ("base", "{}.jsonl", "--lora_rank 2"),
    "mixture_pretraining": ("base", "{}.jsonl", "--max_steps 3 --inner_steps 1"),
    "coreset_text_classification": (
        "bert",
        "{}.csv",
        "--size 8 --outer_steps 2 --inner_steps 2 --num_final_masks 1 --inner_batch_size 4 --num_upper_rows 8",
    ),
}


def method_of(recipe: Path) -> str:
    *_, script, name = recipe.read_text(encoding="utf-8").splitlines()[0].split()
    assert name == f"scripts/recipes/{recipe.name}"
    return SCRIPTS.get(Path(script).stem, "")


def test_all_recipes_are_run_here() -> None:
    assert {path.stem for path in ROOT.glob("scripts/recipes/*.yaml") if method_of(path)} == set(SMALLER)


@pytest.mark.filterwarnings("ignore:The subspaces of")  # too few steps to learn anything
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # TRL's own
@pytest.mark.parametrize("name", SMALLER)
def test_recipe(name: str, tiny, data, common) -> None:
    recipe = ROOT / "scripts" / "recipes" / f"{name}.yaml"
    model, kind, smaller = SMALLER[name]
    parts = {"train": "pool", "target": "target", "eval": "held_out"}
    places = [word for part, which in parts.items() for word in (f"--{part}_dataset", data[kind.format(which)])]
    trainer = run(method_of(recipe), [str(recipe), "--model", tiny[model], *places, *common, *smaller.split()])
    output = Path(trainer.args.output_dir)
    assert trainer.state.global_step >= 2 and (output / "trainer_state.json").exists()
    given = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    config = {field: value for field, value in given.items() if hasattr(trainer.bilevel_config, field)}
    overridden = {word.removeprefix("--") for word in [*common, *smaller.split()]}
    assert config and all(
        getattr(trainer.bilevel_config, field) == value for field, value in config.items() if field not in overridden
    )
    facts = json.loads((output / "bilevel_facts.json").read_text())
    assert facts["method"] == method_of(recipe)
    assert (output / "selected_subset").exists() == (not given.get("pack", False))
    if not given.get("pack", False):
        subset = SelectedSubset.load(output / "selected_subset")
        assert 0 < len(subset) <= 40 == subset.num_pool
    assert json.loads((output / "eval_results.json").read_text())["eval_loss"] > 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_what_the_console_command_runs(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "scripts" / f"{script}.py"
    spec = importlib.util.spec_from_file_location(script, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked = []
    monkeypatch.setattr(module, "run", lambda name, argv: asked.append((name, argv)))
    module.main(["recipe.yaml", "--seed", "1"])
    assert asked == [(SCRIPTS[script], ["recipe.yaml", "--seed", "1"])] and SCRIPTS[script] in COMMANDS
    named = re.findall(r"scripts/\S+", path.read_text(encoding="utf-8"))
    assert len(named) == 2 and all((ROOT / name).exists() for name in named)


KINDS = {
    "single": "NO",
    "ddp": "MULTI_GPU",
    "fsdp2": "FSDP",
    "deepspeed_zero2": "DEEPSPEED",
    "deepspeed_zero3": "DEEPSPEED",
    "cpu_two_processes": "MULTI_GPU",
}


def test_launch_configurations() -> None:
    folder = ROOT / "scripts" / "accelerate_configs"
    assert {path.stem for path in folder.iterdir()} == set(KINDS)
    for name, kind in KINDS.items():
        config = ClusterConfig.from_yaml_file(str(folder / f"{name}.yaml"))  # refuses unknown keys
        assert config.distributed_type.value == kind
        assert (config.num_processes > 1) == (name != "single") and config.use_cpu == (name == "cpu_two_processes")
        assert f"--config_file scripts/accelerate_configs/{name}.yaml" in (folder / f"{name}.yaml").read_text()
    assert ClusterConfig.from_yaml_file(str(folder / "fsdp2.yaml")).fsdp_config["fsdp_version"] == 2
    for stage in (2, 3):
        config = ClusterConfig.from_yaml_file(str(folder / f"deepspeed_zero{stage}.yaml"))
        assert config.deepspeed_config["zero_stage"] == stage


def launch(*argv: str) -> subprocess.CompletedProcess:
    config = ROOT / "scripts" / "accelerate_configs" / "cpu_two_processes.yaml"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--main_process_port",
        "0",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *argv], capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_two_processes_are_two(tiny, data, common, tmp_path: Path) -> None:
    argv = ["--model", tiny["base"], "--train_dataset", data["pool.jsonl"], "--target_dataset", data["target.jsonl"]]
    cache = str(tmp_path / "cache")
    os.environ["HF_DATASETS_CACHE"] = cache
    try:
        done = launch(str(ROOT / "scripts" / "train_blade.py"), *argv, *common)
        assert done.returncode == 0, done.stderr
        without = launch(
            str(ROOT / "scripts" / "train_blade.py"), *argv, *[word for word in common if word != "--use_cpu"]
        )
    finally:
        del os.environ["HF_DATASETS_CACHE"]
    facts = json.loads((tmp_path / "output" / "bilevel_facts.json").read_text())
    assert facts["world_size"] == 2
    subset = SelectedSubset.load(tmp_path / "output" / "selected_subset")
    assert len(subset) == 16, "half of the 32 rows that both have seen"
    assert without.returncode != 0
    assert "2 processes were started, and each would train for itself" in without.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, argv",
    [
        ("train_bros", "--rank 4"),
        ("train_mixture", "--domain_column source --inner_steps 1"),
        ("select_coreset", "--size 8 --outer_steps 2 --inner_steps 2 --num_masks 2 --num_final_masks 1"),
    ],
)
def test_other_methods_on_two_processes(
    script: str, argv: str, tiny, data, common, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    places = ["--model", tiny["base"], "--train_dataset", data["pool.jsonl"], "--target_dataset", data["target.jsonl"]]
    done = launch(str(ROOT / "scripts" / f"{script}.py"), *places, *common, *argv.split())
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "output" / "bilevel_facts.json").read_text())["world_size"] == 2
