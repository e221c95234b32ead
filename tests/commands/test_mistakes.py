"""What users get wrong, or meet, and would not notice: other labels, other files, what an earlier run left, settings given twice."""

import json
import logging
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PretrainedConfig

from commands.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer
from commands.test_errors import message_of
from commands.test_prepare import CHAT
from commands.test_run import places
from hf_bilevel import SelectedSubset, load_selected_subset
from hf_bilevel.commands import sources
from hf_bilevel.commands.chat import encode_chats
from hf_bilevel.commands.encode import HAS_LABELS, encode_batch, encode_texts
from hf_bilevel.commands.labels import label_names
from hf_bilevel.commands.run import run

CLASSIFY = ["--task", "sequence_classification"]
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_reference(folder: Path, names: list[str] | int) -> BertForSequenceClassification:
    torch.manual_seed(1)
    labels = {"num_labels": names} if isinstance(names, int) else {"id2label": dict(enumerate(names))}
    config = BertConfig(vocab_size=260, max_position_embeddings=96, pad_token_id=258, **SIZE, **labels)
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    byte_tokenizer(None).save_pretrained(folder)
    return model.eval()


def with_reference(tiny, data, common, reference: Path) -> list[str]:
    static = ["--reference", "static", "--reference_model", str(reference)]
    return ["--model", tiny["bert"], *CLASSIFY, *places(data), *common, *static]


def test_a_reference_is_read_by_the_names_of_its_labels(tiny, data, common, tmp_path: Path) -> None:
    own = ["good", "neither", "bad"]
    model = save_reference(tmp_path / "reference", own)
    trainer = run("blade", with_reference(tiny, data, common, tmp_path / "reference"))
    names = [trainer.reference_model.config.id2label[i] for i in range(3)]
    assert names == ["bad", "good", "neither"]
    rows = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    expected = model(**rows).logits[:, [own.index(name) for name in names]]
    assert torch.allclose(trainer.reference_model.eval()(**rows).logits, expected, atol=1e-6)


def test_a_reference_whose_labels_are_written_otherwise(tiny, data, common, tmp_path: Path) -> None:
    model = save_reference(tmp_path / "reference", ["Neither", "GOOD", "Bad"])
    trainer = run("blade", with_reference(tiny, data, common, tmp_path / "reference"))
    rows = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    assert torch.allclose(trainer.reference_model.eval()(**rows).logits, model(**rows).logits.flip(1), atol=1e-6)


def test_a_reference_that_is_ignored_is_not_loaded(tiny, data, common, tmp_path: Path, caplog) -> None:
    argv = with_reference(tiny, data, common, tmp_path / "nothing")
    argv[argv.index("static")] = "dynamic"
    assert run("blade", argv).reference_model is None
    assert "`reference_model` is ignored with `reference: dynamic`" in caplog.text


def test_a_reference_for_other_labels_is_refused(tiny, data, common, tmp_path: Path) -> None:
    save_reference(tmp_path / "other", ["joy", "anger", "fear"])
    message = message_of(["blade", *with_reference(tiny, data, common, tmp_path / "other")])
    assert "tells the labels joy, anger, fear apart, and `train_dataset` has bad, good, neither" in message
    save_reference(tmp_path / "two", 2)
    assert "tells the labels LABEL_0, LABEL_1 apart" in message_of(
        ["blade", *with_reference(tiny, data, common, tmp_path / "two")]
    )


def test_a_reference_that_names_no_labels_is_taken_and_that_is_said(
    tiny, data, common, tmp_path: Path, caplog
) -> None:
    save_reference(tmp_path / "reference", 3)
    run("blade", with_reference(tiny, data, common, tmp_path / "reference"))
    assert "has the labels LABEL_0, LABEL_1, LABEL_2; they are taken to be bad, good, neither" in caplog.text


def test_labels_of_a_model_come_in_the_order_of_their_ids() -> None:
    names = [f"class {chr(97 + i)}" for i in range(12)]
    listed = {i: names[i] for i in sorted(range(12), key=str)}  # 0, 1, 10, 11, 2 as in some files
    pool = datasets.Dataset.from_dict({"label": names})
    assert label_names(pool, "label", PretrainedConfig(id2label=listed)) == names


def test_a_file_name_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "pool[1].csv").write_text("text\nright\n")
    (tmp_path / "pool1.csv").write_text("text\nwrong\n")
    assert sources.load("train_dataset", str(tmp_path / "pool[1].csv"), None)["text"][:] == ["right"]
    (tmp_path / "my pool [2] *.csv").write_text("text\nspaces\n")
    assert sources.load("train_dataset", str(tmp_path / "my pool [2] *.csv"), None)["text"][:] == ["spaces"]


def test_a_folder_of_several_kinds_is_said(tmp_path: Path, caplog) -> None:
    (tmp_path / "a.csv").write_text("text\none\n")
    sources.load("train_dataset", str(tmp_path), None)
    assert not caplog.records
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "two"}))
    sources.load("train_dataset", str(tmp_path), None)
    assert "holds files of several kinds (" in caplog.text and "of which one alone is read" in caplog.text


def test_a_sum_of_splits_is_not_read(data) -> None:
    with pytest.raises(ValueError, match="`train_split: .*` is not understood.*sums are not read"):
        sources.load("train_dataset", data["pool.jsonl"], "train[:10%]+train[50%:]")


def test_a_subset_of_an_earlier_run_is_put_aside(tiny, data, common, tmp_path: Path, caplog) -> None:
    argv = ["--model", tiny["base"], *places(data), *common]
    run("blade", argv)
    folder = tmp_path / "output" / "selected_subset"
    earlier = (folder / "subset.json").read_text()
    run("blade", [*argv, "--selection_ratio", "1"])
    aside = tmp_path / "output" / "_of_an_earlier_run" / "selected_subset"
    assert not folder.exists() and (aside / "subset.json").read_text() == earlier
    assert "is of an earlier run; it is" in caplog.text
    caplog.clear()
    run("blade", [*argv, "--pack", "true"])
    assert "No subset is saved: with `pack` no rows are told apart." in caplog.text
    assert not folder.exists() and aside.exists()


def test_a_field_that_a_recipe_has_twice(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("learning_rate: 1e-4\nmax_steps: 3\nlearning_rate: 5e-1\n")
    assert "`learning_rate` is there twice" in message_of(["blade", str(tmp_path / "r.yaml")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("per_device_train_batch_size: 8.5", "`per_device_train_batch_size` must be int, got 8.5"),
        ("max_steps: 2.7", "`max_steps` must be int, got 2.7"),
        ("max_steps: true", "`max_steps` must be int, got True"),
        ("seed: 1.5", "`seed` must be int, got 1.5"),
        ("learning_rate: [1, 2]", r"`learning_rate` must be float, got [1, 2]"),
        ("gradient_accumulation_steps: 0", "`gradient_accumulation_steps` must be at least 1, got 0"),
    ],
)
def test_numbers_of_the_training_arguments(line: str, message: str, tmp_path: Path, data, tiny) -> None:
    needed = (
        f"model: {tiny['base']}\ntrain_dataset: {data['pool.jsonl']}\noutput_dir: {tmp_path / 'o'}\nuse_cpu: true\n"
    )
    (tmp_path / "r.yaml").write_text(needed + line + "\n")
    assert message in message_of(["blade", str(tmp_path / "r.yaml")])


def test_numbers_as_labels_take_the_order_of_a_reference(tiny, data, common, tmp_path: Path, caplog) -> None:
    save_reference(tmp_path / "reference", ["no", "maybe", "yes"])
    for part, num in (("pool", 24), ("target", 9)):
        rows = [{"text": "a few words " * (1 + i % 3), "label": i % 3} for i in range(num)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--train_dataset", str(tmp_path / "pool.jsonl"), "--target_dataset", str(tmp_path / "target.jsonl")]
    static = ["--reference", "static", "--reference_model", str(tmp_path / "reference")]
    run("blade", ["--model", tiny["bert"], *CLASSIFY, *given, *common, *static])
    assert "has the labels no, maybe, yes; they are taken to be 0, 1, 2" in caplog.text


def test_what_an_upload_needs_is_asked_for_before_the_training(
    tiny, data, common, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hf_bilevel.commands.run.get_token", lambda: None)
    argv = ["blade", "--model", tiny["base"], *places(data), *common, "--push_subset"]
    assert "`push_subset: mine` must be `namespace/name`" in message_of([*argv, "mine"])
    assert "There is no token for `push_subset`. Run `hf auth login`" in message_of([*argv, "me/mine"])
    assert "me/--mine" in message_of([*argv, "me/--mine"]) and not (tmp_path / "output").exists()


@pytest.mark.parametrize("greeting", ["kind", "e", "assistant", "x", "hello"])
def test_a_greeting_that_the_system_prompt_holds_too(greeting: str) -> None:
    tokenizer = byte_tokenizer("<|im_start|>system\nbe kind and say hello<|im_end|>\n" + CHAT_TEMPLATE)
    chat = [{"role": "assistant", "content": greeting}, *CHAT[2:]]
    (labels,) = encode_chats({"messages": [chat]}, tokenizer, "messages", max_length=1000)["labels"]
    said = tokenizer.decode([label for label in labels if label != -100])
    assert said == f"{greeting}<|im_end|>two<|im_end|>four<|im_end|>"


def test_empty_texts_are_left_out_where_tokens_are_masked() -> None:
    tokenizer = byte_tokenizer(None)
    ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (tokenizer.eos_token, tokenizer.pad_token)]
    around = TemplateProcessing(single=f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = around
    encode = partial(encode_texts, tokenizer=tokenizer, column="text", max_length=9, add_end=False)
    encoded = encode_batch({"text": ["abc", "", "d"]}, encode, kept={})
    assert [len(ids) for ids in encoded["input_ids"]] == [5, 2, 3]
    assert encoded[HAS_LABELS] == [True, False, True]


def test_a_home_folder_and_a_folder_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    SelectedSubset(torch.tensor([1]), num_pool=2).save("~/kept")
    assert (tmp_path / "kept" / "subset.json").is_file()
    assert SelectedSubset.load("~/kept").ids.tolist() == load_selected_subset("~/kept").ids.tolist() == [1]
    for missing in ("./nothing", str(tmp_path / "nothing"), "a/b/c"):
        with pytest.raises(ValueError, match="is missing: there is no selected subset"):
            load_selected_subset(missing)


def test_a_stream_is_no_pool_to_take_rows_of() -> None:
    stream = datasets.Dataset.from_dict({"x": [1, 2]}).to_iterable_dataset()
    with pytest.raises(TypeError, match="Rows cannot be taken out of a stream by their ids"):
        SelectedSubset(torch.tensor([1]), num_pool=2).to_dataset(stream)


def test_domains_that_are_years_are_said(tiny, data, common, tmp_path: Path) -> None:
    rows = [{"text": "some words", "year": 2019 + i % 3} for i in range(12)]
    (tmp_path / "years.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["mixture", "--model", tiny["base"], "--train_dataset", str(tmp_path / "years.jsonl"), *common]
    message = message_of([*argv, "--target_size", "2", "--domain_column", "year", "--inner_steps", "1"])
    assert "and 2009 others. Take them out" in message and "others, such as years, strings" in message
    assert len(message) < 600


@pytest.fixture(autouse=True)
def warnings_of_ours(caplog) -> None:
    caplog.set_level(logging.WARNING)


def test_a_mixture_of_an_earlier_run_is_trained_with(tiny, data, common, tmp_path: Path) -> None:
    argv = ["--model", tiny["base"], *places(data), *common, "--domain_column", "source"]
    learned = run("mixture", [*argv, "--inner_steps", "1", "--reference_steps", "1"]).mixture
    written = tmp_path / "output" / "mixture.json"
    assert json.loads(written.read_text())["mixture"] == learned and learned["web"] != 0.5
    again = run("mixture", [*argv, "--mixture_file", str(written), "--output_dir", str(tmp_path / "again")])
    assert again.domain_weights == pytest.approx(learned) and len(again._trajectory) == 1
    run("mixture", [*argv, "--mixture_file", str(written)])  # into the folder of the file
    assert written.exists()
    message = message_of(["mixture", *argv, "--mixture_file", str(tmp_path / "none.json")])
    assert "`mixture` must be a mapping from domain names to weights, or a file written by `save_mixture`" in message


def test_results_of_an_earlier_run_do_not_lie_beside_the_model(tiny, data, common, tmp_path: Path) -> None:
    """They would be read, and uploaded, as those of the model there."""
    argv = ["--model", tiny["base"], *common, "--domain_column", "source"]
    output, aside = tmp_path / "output", tmp_path / "output" / "_of_an_earlier_run"
    run("mixture", [*argv, *places(data), "--inner_steps", "1", "--reference_steps", "1"])
    earlier = {
        name: (output / name).read_bytes() for name in ("mixture.json", "eval_results.json", "all_results.json")
    }
    run("mixture", [*argv, *places(data, parts="train target"), "--mixture", "uniform"])
    assert {name: (aside / name).read_bytes() for name in earlier} == earlier
    assert not (output / "mixture.json").exists() and not (output / "eval_results.json").exists()
    results = json.loads((output / "all_results.json").read_text())
    assert "train_loss" in results and "eval_loss" not in results


def test_a_run_that_goes_on_keeps_its_results(tiny, data, common, tmp_path: Path) -> None:
    argv = ["--model", tiny["base"], *places(data), *common, "--save_strategy", "steps", "--save_steps", "1"]
    run("blade", argv)
    run("blade", [*argv, "--max_steps", "3", "--resume_from_checkpoint", "true"])
    assert not (tmp_path / "output" / "_of_an_earlier_run").exists()


@pytest.mark.parametrize("classes", [None, ["neither", "bad", "good"]])
@pytest.mark.parametrize("task", ["sequence_classification", "causal_lm"])
def test_labels_can_be_the_domains(task: str, classes: list | None, tiny, data, common, tmp_path: Path) -> None:
    """Collators would take a column `label` for the labels, whatever stands in it."""
    model = tiny["bert" if task == "sequence_classification" else "base"]
    argv = ["--model", model, "--task", task, *common, "--selection_ratio", "0.5", "--granularity", "sample"]
    for part in ("pool", "target", "held_out"):
        rows = datasets.load_dataset("json", data_files=data[f"{part}.jsonl"])["train"]
        if classes is not None:
            rows = rows.cast_column("label", datasets.ClassLabel(names=classes))
        rows.to_parquet(tmp_path / f"{part}.parquet")
    there = {f"{part}.parquet": str(tmp_path / f"{part}.parquet") for part in ("pool", "target", "held_out")}
    argv += places(there, "{}.parquet")
    plain, trainer = run("blade", argv), run("blade", [*argv, "--domain_column", "label"])
    assert sorted(map(str, trainer.domain_names)) == ["bad", "good", "neither"]
    for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    subset, pool = trainer.selected_subset(fraction=0.1), datasets.load_dataset("json", data_files=data["pool.jsonl"])
    domains = [subset.domain_names[i] for i in subset.domain_ids.tolist()]
    assert domains == pool["train"].select(subset.ids.tolist())["label"][:]


def test_a_token_for_the_hub_may_be_given(tiny, data, common, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(SelectedSubset, "push_to_hub", lambda subset, repo_id, pool, token: given.append(token))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    argv = ["--model", tiny["base"], *places(data), *common, "--push_subset", "me/kept"]
    run("blade", [*argv, "--hub_token", "hf_of_nobody"])
    assert given == ["hf_of_nobody"]
