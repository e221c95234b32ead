"""What is refused: what was given, what is allowed, and the nearest name; before the model is loaded."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hf_bilevel.commands import run as run_module
from hf_bilevel.commands.main import main


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("The model was loaded before the settings were checked.")

    monkeypatch.setattr(run_module, "build_model", refuse)


def message_of(argv: list[str]) -> str:
    with pytest.raises(SystemExit) as error:
        main(argv)
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ("--task causal_ml", ["`task` must be one of causal_lm,", "got 'causal_ml'. Do you mean `causal_lm`?"]),
        ("--dtype float23", ["`dtype` must be one of auto,", "Do you mean `float32`?"]),
        ("--model {models}/lama", ["`model: {models}/lama` is not a folder. Do you mean `llama`?"]),
        ("--model nowhere/no-model", ["The config of `model: nowhere/no-model` cannot be loaded from the Hub"]),
        ("--model {models}/bert", ["is a bert and cannot be trained for `task: image_classification`"]),
        ("--train_dataset {data}/poool.jsonl", ["poool.jsonl` is not there (looked in", "Do you mean `pool.jsonl`?"]),
        ("--train_dataset ./data", ["`train_dataset: ./data` is not there"]),
        ("--train_dataset nowhere/no-data", ["is no file or folder here, and cannot be loaded from the Hub ("]),
        ("--train_dataset {models}/vit/config.yaml", ["is not there"]),
        ("--train_dataset {code}", ["is a file of an unknown kind; known are .json, .jsonl, .csv, .parquet, .txt."]),
        ("--train_dataset {broken}", ["broken.jsonl` cannot be read ("]),
        ("--train_split tran", ["has no split `tran`; it has train.", "Set `train_split`", "Do you mean `train`?"]),
        ("--eval_split train[:x]", ["`eval_split: train[:x]` is not understood"]),
        (
            "--text_column txt",
            ["`train_dataset` has no column `txt`; its columns are label, source, text. Set `text_column`"],
        ),
        ("--text_column txt", ["Do you mean `text`?"]),
        ("--messages_column chats", ["`train_dataset` has no column `chats`", "Set `messages_column`"]),
        (
            "--domain_column sorce",
            ["`train_dataset` has no column `sorce`", "`domain_column`", "Do you mean `source`?"],
        ),
        (
            "--target_dataset {data}/chats_target.jsonl",
            ["`target_dataset` has no column `text`; its columns are messages."],
        ),
        ("--target_size 3", ["`target_size` takes rows out of `train_dataset`, and `target_dataset` is given too."]),
        ("--eval_size 40", ["`eval_size=40` leaves nothing of `train_dataset`, which has 40 rows."]),
        (
            "--pack --push_subset me/kept",
            ["`push_subset` uploads rows of `train_dataset`, and with `pack` none are told apart."],
        ),
        ("--streaming --push_subset me/kept", ["and with `streaming` none are told apart."]),
        ("--max_length 1", ["`max_length` must be at least 2, got 1."]),
        ("--text_column text --messages_column a", ["are both set. Drop one"]),
        ("--selection_ratio 1.5", ["`selection_ratio` must be in (0, 1], got 1.5."]),
        ("--subset_fraction 0", ["`subset_fraction` must be in (0, 1], got 0.0."]),
        ("--selection_ration 0.5", ["`--selection_ration` is not a field. Do you mean `selection_ratio`?"]),
        ("--streaming --max_steps -1", ["A stream has no length that epochs could be counted by: set `max_steps`."]),
        ("--task masked_lm --model {models}/plain", ["needs a mask token"]),
        ("--task sequence_classification --label_column lable", ["has no column `lable`", "Do you mean `label`?"]),
        (
            "--task sequence_classification --label_column score",
            ["holds values of float; labels must be names or integers"],
        ),
        ("--task sequence_classification --label_column one", ["holds only ['same']"]),
        (
            "--task sequence_classification --pack",
            ["`pack` joins plain texts; a chat or a labelled row stays as it is."],
        ),
        ("--task sequence_classification --streaming", ["A stream cannot be searched for the names of its labels"]),
        ("--trl --task masked_lm", ["`trl` trains causal language models, and the task is `masked_lm`."]),
    ],
)
def test_refused_before_the_model_is_loaded(given, messages, no_model, tiny, data, common, tmp_path: Path) -> None:
    folders = {"models": Path(tiny["llama"]).parent, "data": Path(data["pool.jsonl"]).parent, "code": __file__}
    folders["broken"] = tmp_path / "broken.jsonl"
    folders["broken"].write_text("{no json")
    if "plain" in given:
        tokenizer = Path(tiny["base"])
        plain = folders["models"] / "plain"
        if not plain.exists():
            plain.mkdir()
            for file in tokenizer.iterdir():
                (plain / file.name).write_bytes(file.read_bytes())
            config = json.loads((plain / "tokenizer_config.json").read_text())
            config.pop("mask_token")
            (plain / "tokenizer_config.json").write_text(json.dumps(config))
            model = json.loads((plain / "config.json").read_text())
            bert = json.loads((folders["models"] / "bert" / "config.json").read_text())
            (plain / "config.json").write_text(json.dumps({**model, **bert}))
    if "score" in given or "one" in given.split():
        rows = [{"text": "a", "score": i / 2, "one": "same"} for i in range(4)]
        path = tmp_path / "scores.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        given += f" --train_dataset {path} --target_dataset {path}"
    argv = ["--model", tiny["base"], "--train_dataset", data["pool.jsonl"], *common]
    if "_size" not in given or "target_size" in given:
        argv += ["--target_dataset", data["target.jsonl"]]
    if "eval_split" in given:
        argv += ["--eval_dataset", data["held_out.jsonl"]]
    if "bert" in given:
        given += " --task image_classification"
    found = message_of(["blade", *argv, *given.format(**folders).split()])
    assert found.startswith("hf-bilevel blade: ")
    for message in messages:
        assert message.format(**folders) in found


def test_what_is_missing(no_model, tiny, data) -> None:
    assert "`model` is not set" in message_of(["bros"])
    assert "`train_dataset` is not set" in message_of(["bros", "--model", tiny["base"]])
    assert message_of(["coresets"]).endswith("`coresets` is not a command. Do you mean `coreset`?")


def test_a_typo_in_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: gpt2\ntrain_datset: data.jsonl\n")
    message = message_of(["mixture", str(recipe)])
    assert message.endswith("has an unknown field `train_datset`. Do you mean `train_dataset`?")


def test_chats_without_a_template(no_model, tiny, data, common) -> None:
    argv = ["--model", tiny["base"], "--train_dataset", data["chats_pool.jsonl"], "--target_size", "5", *common]
    message = message_of(["blade", *argv])
    assert f"Column `messages` holds chats, and the tokenizer of `{tiny['base']}` has no chat template." in message


def test_chats_that_are_none(no_model, tiny, common, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"from": "human", "value": "a"}]}\n' * 4)
    argv = ["--model", tiny["llama"], "--train_dataset", str(path), "--target_size", "1", *common]
    assert "must hold lists of turns, each with `role` and `content`" in message_of(["blade", *argv])


def test_chats_that_are_cut_before_the_answer(no_model, tiny, data, common) -> None:
    argv = ["--model", tiny["llama"], "--train_dataset", data["chats_pool.jsonl"], "--target_size", "5", *common]
    message = message_of(["blade", *argv, "--max_length", "8"])
    assert "`train_dataset` has 35 rows and no token to train on" in message and "`max_length=8`" in message


def test_a_label_that_the_pool_does_not_have(no_model, tiny, data, common, tmp_path: Path) -> None:
    path = tmp_path / "target.jsonl"
    path.write_text('{"text": "a", "label": "godo"}\n')
    argv = ["--model", tiny["bert"], "--task", "sequence_classification", "--train_dataset", data["pool.jsonl"]]
    message = message_of(["bros", *argv, "--target_dataset", str(path), *common])
    assert (
        "`target_dataset` has the label 'godo' in `label`; those of `train_dataset` are bad, good, neither." in message
    )
    assert "Do you mean `good`?" in message


def test_numbers_beside_labels_with_names(no_model, tiny, data, common, tmp_path: Path) -> None:
    path = tmp_path / "target.jsonl"
    path.write_text('{"text": "a", "label": 0}\n')
    argv = ["--model", tiny["bert"], "--task", "sequence_classification", "--train_dataset", data["pool.jsonl"]]
    message = message_of(["bros", *argv, "--target_dataset", str(path), *common])
    assert "`target_dataset` has the label 0 in `label`; those of `train_dataset` are bad, good, neither." in message


def test_labels_that_are_no_images(no_model, tiny, data, common) -> None:
    argv = ["--model", tiny["vit"], "--task", "image_classification", "--train_dataset", data["pool.jsonl"]]
    message = message_of(["bros", *argv, "--image_column", "text", "--target_size", "5", *common])
    assert "`image_column: text` of `train_dataset` holds string, not images." in message


def test_a_text_that_is_none(no_model, tiny, common, tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    argv = ["--model", tiny["base"], "--train_dataset", str(path), "--target_size", "1", *common]
    assert "`text_column: text` must hold text, and holds NoneType in a row." in message_of(["blade", *argv])


def test_several_splits(no_model, tiny, data, common) -> None:
    folder = Path(data["pool.jsonl"]).parent / "splits"
    for split in ("train", "test", "validation"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / "rows.jsonl").write_text('{"text": "abc"}\n' * 3)
    argv = ["--model", tiny["base"], "--train_dataset", str(folder), "--target_dataset", str(folder), *common]
    message = message_of(["blade", *argv])
    assert "has the splits train, validation, test: name one in `target_split`." in message


@pytest.mark.parametrize("package", ["peft", "trl"])
def test_a_package_that_is_not_installed(no_model, tiny, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )
    message = message_of(["blade", "--model", tiny["base"], "--train_dataset", "pool.jsonl", f"--{package}"])
    assert f"`{package}` needs the package {package}, which is not installed: `pip install {package}`" in message


def test_processes_that_would_train_for_themselves(no_model, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module.os, "environ", {**run_module.os.environ, "WORLD_SIZE": "2"})
    monkeypatch.setattr(run_module.TrainingArguments, "world_size", 1)
    message = message_of(["blade", "--model", tiny["base"], "--train_dataset", "pool.jsonl"])
    assert "2 processes were started, and each would train for itself" in message and "`--use_cpu`" in message


def test_what_the_trainer_refuses_is_said_without_a_traceback(tiny, data, common) -> None:
    argv = ["--model", tiny["base"], "--train_dataset", data["pool.jsonl"], *common]
    assert message_of(["blade", *argv]).startswith("hf-bilevel blade: BladeTrainer needs `target_dataset`")
    message = message_of(["mixture", *argv, "--target_dataset", data["target.jsonl"]])
    assert "MixtureTrainer needs to know the domains: set `domain_column`" in message


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        ("blade", "--reference static", "`reference: static` compares with a frozen model: set `reference_model`"),
        (
            "blade",
            "--reference static --reference_model {models}/vit",
            "`reference_model: .*vit` is a vit and cannot be trained for",
        ),
        ("coreset", "--search_model {models}/lama", "`search_model: .*lama` is not a folder. Do you mean `llama`"),
        ("coreset", "--search_model {other}", "`search_model: .*` reads other tokens than `model: .*same vocabulary"),
    ],
)
def test_another_model_that_does_not_fit(command, given, message, tiny, data, common, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny["base"], other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(other)
    places = ["--model", tiny["base"], "--train_dataset", data["pool.jsonl"], "--target_dataset", data["target.jsonl"]]
    models = str(Path(tiny["base"]).parent)
    argv = [command, *places, *common, *given.format(models=models, other=other).split()]
    argv += ["--size", "7"] if command == "coreset" else []
    assert re.search(message, message_of(argv))
