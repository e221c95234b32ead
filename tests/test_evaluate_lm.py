"""scripts/evaluate_lm.py on the real lm-eval, against numbers worked out from the models' own token losses."""

import importlib.util
import json
import math
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from commands.byte_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SCRIPTS = Path(__file__).parents[1] / "scripts"
END = 257  # the tokenizer's end token, before the first token of a text
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `eval`")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # lm-eval's own


def load(path: str) -> ModuleType:
    folder = str((SCRIPTS / path).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return import_module(Path(path).name)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def weighted_perplexity(pairs: list[tuple[float, int]]) -> float:
    return math.exp(-sum(a for a, _ in pairs) / sum(b for _, b in pairs))


def second_moment_over_mean(values: list[float]) -> float:
    return mean([value**2 for value in values]) / mean(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random models, an adapter of the first, and tasks of two domains."""
    folder = tmp_path_factory.mktemp("evaluate")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for seed, name in enumerate(("base", "trained")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=260,
            max_position_embeddings=128,
            eos_token_id=END,
            pad_token_id=258,
            initializer_range=0.2,
            **size,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        byte_tokenizer(None).save_pretrained(folder / name)
    order = np.random.default_rng(0)
    for domain in ("one", "two"):
        words = ["".join(order.choice(list("abcdefgh[]{}\n"), order.integers(2, 7))) for _ in range(300)]
        (folder / f"{domain}.txt").write_text(" ".join(words))
    make_data(folder, folder / "data", "--num_rows", "9")
    return folder


def make_data(folder: Path, output: Path, *options: str) -> None:
    files = [str(folder / f"{domain}.txt") for domain in ("one", "two")]
    argv = ["--folder", str(output), "--text_files", *files, "--row_length", "90", *options]
    load("lm_eval_tasks/make_data").main(argv)


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(folder: Path, *argv: str) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        return load("evaluate_lm").main([*argv, "--data", str(folder / "data"), "--device", "cpu"])


@pytest.fixture(scope="module")
def report(folder: Path) -> dict:
    models = [str(folder / "base"), str(folder / "trained")]
    tasks = ["held_out_perplexity", "cloze"]
    return run(folder, "--models", *models, "--tasks", *tasks, "--output", str(folder / "report.json"))


def row_of(report: dict, arm: str, task: str, metric: str) -> dict:
    (row,) = [row for row in report["rows"] if (row["arm"], row["task"], row["metric"]) == (arm, task, metric)]
    return row


def token_log_likelihoods(folder: Path, arm: str, text: str, before: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder / arm).double()
    tokens = torch.tensor([*before, *byte_tokenizer(None)(text).input_ids])
    with torch.no_grad():
        logits = model(tokens[None, :-1]).logits[0]
    return logits.log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]


def text_log_likelihoods(folder: Path, arm: str, domain: str) -> np.ndarray:
    rows = read(folder / "data" / f"held_out_perplexity_{domain}.jsonl")
    return np.array([token_log_likelihoods(folder, arm, row["text"], [END]).sum().item() for row in rows])


def answers(folder: Path, arm: str, domain: str) -> np.ndarray:
    """Whether the most likely choice, by log-likelihood per character, is the right one."""
    right = []
    for row in read(folder / "data" / f"cloze_{domain}.jsonl"):
        texts = [row["context"] + choice for choice in row["choices"]]
        start = len(row["context"]) - 1  # a token is a character here, and the first one is not predicted
        scores = [token_log_likelihoods(folder, arm, text, [])[start:].mean().item() for text in texts]
        right.append(float(np.argmax(scores) == row["label"]))
    return np.array(right)


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.parametrize("metric", ["word_perplexity", "byte_perplexity", "token_perplexity", "bits_per_byte"])
@pytest.mark.parametrize("domain", ["one", "two"])
def test_held_out_perplexity_is_that_of_the_token_losses(folder: Path, report: dict, domain: str, metric: str) -> None:
    texts = [row["text"] for row in read(folder / "data" / f"held_out_perplexity_{domain}.jsonl")]
    sizes = np.array([len(re.split(r"\s+", text) if metric == "word_perplexity" else text) for text in texts])
    base, trained = (text_log_likelihoods(folder, arm, domain) for arm in ("base", "trained"))
    log_perplexity = -trained.sum() / sizes.sum()
    change = -(trained - base)
    log_difference = change.sum() / sizes.sum()
    num = len(texts)
    residuals = (change - log_difference * sizes) / sizes.mean()
    error = residuals.std(ddof=1) / math.sqrt(num)
    row = row_of(report, "trained", f"held_out_perplexity_{domain}", metric)
    expected = log_perplexity / math.log(2) if metric == "bits_per_byte" else math.exp(log_perplexity)
    scale = math.log(2) if metric == "bits_per_byte" else 1
    assert row["value"] == pytest.approx(expected, rel=1e-4)
    assert row["difference"] == pytest.approx(log_difference / scale, rel=1e-4)
    assert row["difference_stderr"] == pytest.approx(error / scale, rel=1e-4)
    assert row["scale"] == ("linear" if metric == "bits_per_byte" else "log")
    assert (row["num_documents"], row["higher_is_better"]) == (num, False)


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.parametrize("domain", ["one", "two"])
def test_cloze_takes_the_most_likely_choice(folder: Path, report: dict, domain: str) -> None:
    base, trained = (answers(folder, arm, domain) for arm in ("base", "trained"))
    assert (base != trained).any(), "nothing would be compared"
    row = row_of(report, "trained", f"cloze_{domain}", "acc_norm")
    assert row["value"] == pytest.approx(trained.mean())
    assert row["stderr"] == pytest.approx(trained.std(ddof=1) / math.sqrt(len(trained)))
    assert row["difference"] == pytest.approx((trained - base).mean())
    assert row["difference_stderr"] == pytest.approx((trained - base).std(ddof=1) / math.sqrt(len(trained)))


@needs_lm_eval
@pytest.mark.slow
def test_groups_average_the_domains(report: dict) -> None:
    for task, metric in (("cloze", "acc_norm"), ("held_out_perplexity", "bits_per_byte")):
        row = row_of(report, "trained", task, metric)
        parts = [row_of(report, "trained", f"{task}_{domain}", metric) for domain in ("one", "two")]
        for name in ("value", "difference"):
            assert row[name] == pytest.approx(mean([part[name] for part in parts]))
        for name in ("stderr", "difference_stderr"):
            assert row[name] == pytest.approx(math.hypot(*(part[name] for part in parts)) / 2)
        assert row["num_documents"] == sum(part["num_documents"] for part in parts)


@needs_lm_eval
@pytest.mark.slow
def test_the_report_is_that_of_the_benchmarks(folder: Path, report: dict) -> None:
    assert {"benchmark", "date", "hardware", "versions", "config", "rows", "summary"} == set(report)
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report, allow_nan=False))
    row = row_of(report, "trained", "cloze", "acc_norm")
    assert report["summary"]["acc_norm/cloze/trained"] == row["value"]
    assert report["summary"]["acc_norm_difference/cloze/trained/stderr"] == row["difference_stderr"]
    assert row_of(report, "base", "cloze", "acc_norm")["difference"] is None
    assert "acc_norm_difference/cloze/base" not in report["summary"]


@needs_lm_eval
@pytest.mark.slow
def test_a_model_and_itself_and_an_adapter(folder: Path, capsys: pytest.CaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
    base = str(folder / "base")
    argv = ["--models", base, base, "--peft", str(folder / "adapter"), "--names", "base", "again", "tuned"]
    report = run(folder, *argv, "--tasks", "held_out_perplexity_one", "cloze_two", "--limit", "5")
    differences = {arm: [] for arm in ("base", "again", "tuned")}
    for row in report["rows"]:
        assert row["num_documents"] == 5
        differences[row["arm"]].append((row["difference"], row["difference_stderr"]))
    assert set(differences["base"]) == {(None, None)}
    assert set(differences["again"]) == {(0.0, 0.0)}
    assert all(error > 0 for _, error in differences["tuned"][:4])
    header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("task"))
    assert re.split(r"\s{2,}", header.strip()) == [
        "task", "metric", "base", "again", "tuned", "again - base", "tuned - base"
    ]  # fmt: skip


@needs_lm_eval
@pytest.mark.slow
def test_an_unknown_task_is_an_error_that_names_the_nearest(folder: Path) -> None:
    with pytest.raises(SystemExit, match="`helaswag` is not a task. Do you mean .*`hellaswag`"):
        run(folder, "--models", str(folder / "base"), "--tasks", "cloze", "helaswag")
    with pytest.raises(
        SystemExit, match="`held_out_perplexity_tow` is not a task. Do you mean `held_out_perplexity_two`"
    ):
        run(folder, "--models", str(folder / "base"), "--tasks", "held_out_perplexity_tow")


def test_without_lm_eval_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match=r'evaluate_lm.py needs lm-eval: .* Run `pip install "hf_bilevel\[eval\]"`.'):
        run(folder, "--models", "model", "--tasks", "cloze")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "cloze"], "Give at least one of `--models` and one of `--tasks`."),
        (["--models", "a/last", "b/last", "--tasks", "cloze"], "The names last, last must be different, one for each"),
        (["--models", "a", "b", "--names", "a", "--tasks", "cloze"], "must be different, one for each of 2 models"),
        (["--models", "a", "--tasks", "cloze", "--data", "nowhere"], "`nowhere` has no tasks. Write some with"),
        (["--models", "a", "--task", "cloze"], "`--task` is not a field. Do you mean `tasks`?"),
    ],
)
def test_wrong_settings_are_errors(argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as error:
        load("evaluate_lm").main(argv)
    assert message in str(error.value)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="The models are compared by one process"):
        load("evaluate_lm").main(["--models", "a", "--tasks", "cloze"])


def test_errors_of_means_and_of_other_aggregations() -> None:
    module, order = load("evaluate_lm"), np.random.default_rng(0)
    values = order.random(40).tolist()
    moves = module.estimate(values, mean, True).moves
    assert np.linalg.norm(moves) == pytest.approx(np.std(values, ddof=1) / math.sqrt(40))
    np.testing.assert_allclose(module.jackknife(values, mean), moves, atol=1e-15)
    draws = order.random((4000, 300))
    spread = np.std(
        [second_moment_over_mean(list(draw)) for draw in draws]
    )  # what the jackknife estimates from one draw
    estimates = [module.estimate(list(draw), second_moment_over_mean, None).error for draw in draws[:20]]
    assert np.mean(estimates) == pytest.approx(spread, rel=0.05)


def test_documents_without_a_value_do_not_count_and_pairs_hold() -> None:
    module = load("evaluate_lm")
    full, gap = [1.0, 0.0, 1.0, 1.0], [1.0, None, 0.0, 1.0]
    ours = module.estimate(gap, mean, True)
    assert (ours.value, ours.num_documents, len(ours.moves)) == (pytest.approx(2 / 3), 3, 4)
    assert ours.error == pytest.approx(np.std([1, 0, 1], ddof=1) / math.sqrt(3))
    change, error = module.difference(module.estimate(full, mean, True), ours)
    assert change == pytest.approx(2 / 3 - 3 / 4) and error > 0


def test_one_document_has_no_error() -> None:
    module = load("evaluate_lm")
    one = {("task", "perplexity"): module.estimate([(-3.0, 2)], weighted_perplexity, False)}
    rows = module.compare({"base": one, "trained": dict(one)})
    assert [row["stderr"] for row in rows] == [row["difference_stderr"] for row in rows] == [None, None]
    assert rows[1]["difference"] == 0.0
    assert "perplexity/task/base/stderr" not in module.summarize(rows)


def test_local_data_is_the_same_again_and_leaves_out_what_was_trained_on(folder: Path, tmp_path: Path) -> None:
    make_data(folder, tmp_path / "again", "--num_rows", "9")
    for file in (folder / "data").glob("*.jsonl"):
        assert (tmp_path / "again" / file.name).read_text() == file.read_text()
    make_data(folder, tmp_path / "rest", "--skip_characters", "700")
    text = (folder / "one.txt").read_text()
    rows = [row["text"] for row in read(tmp_path / "rest" / "held_out_perplexity_one.jsonl")]
    assert rows and all(45 <= len(row) <= 90 and row in text[700:] for row in rows)
    for row, question in zip(rows, read(tmp_path / "rest" / "cloze_one.jsonl"), strict=True):
        assert question["context"] + question["choices"][question["label"]] == row
        assert len(set(question["choices"])) == 4
        others = [choice for i, choice in enumerate(question["choices"]) if i != question["label"]]
        assert all(any(other != row and other.endswith(choice) for other in rows) for choice in others)


def test_too_little_text_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match="`one` has 0 rows of up to 90 characters after the first 100000, which are too few"
    ):
        make_data(folder, tmp_path, "--skip_characters", "100000")
