"""Every command trains, on every kind of data, and writes what it should."""

import json
import random
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_bilevel import BladeTrainer, SelectedSubset, load_selected_subset
from hf_bilevel.commands.main import main
from hf_bilevel.commands.run import run


def places(data: dict[str, str], kind: str = "{}.jsonl", parts: str = "train target eval") -> list[str]:
    names = {"train": "pool", "target": "target", "eval": "held_out"}
    return [word for part in parts.split() for word in (f"--{part}_dataset", data[kind.format(names[part])])]


def loaded(path: str) -> datasets.Dataset:
    return datasets.load_dataset("json", data_files=path)["train"]


def test_help_names_all_commands(capsys: pytest.CaptureFixture) -> None:
    main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in ("blade", "bros", "mixture", "coreset"))


def test_the_console_command_is_declared() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nhf-bilevel = "{main.__module__}:{main.__name__}"\n' in project


def test_blade_on_texts(tiny, data, common) -> None:
    trainer = run("blade", ["--model", tiny["base"], *places(data), *common, "--subset_fraction", "0.25"])
    assert type(trainer) is BladeTrainer and trainer.granularity == "token" and trainer.state.global_step == 2
    output = Path(trainer.args.output_dir)
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tiny["base"], output))
    assert set(before) == set(after) and any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(output).eos_token == "<|im_end|>"
    assert json.loads((output / "eval_results.json").read_text())["eval_loss"] > 0
    assert (output / "train_results.json").exists() and (output / "trainer_state.json").exists()
    # Texts end with the token that says so, and the subset is in rows of the file, of which 16 were seen.
    row = trainer.train_dataset[0]
    assert row["input_ids"] == row["labels"] and row["input_ids"][-1] == trainer.processing_class.eos_token_id
    subset, pool = SelectedSubset.load(output / "selected_subset"), loaded(data["pool.jsonl"])
    assert subset.num_pool == 40 and len(subset) == 4
    assert subset.to_dataset(pool)["text"][0] == pool[int(subset.ids[0])]["text"]
    offered = trainer.sample_tally.state_dict()["offered"].nonzero().flatten()
    assert set(subset.ids.tolist()) <= set(offered.tolist())


def test_rows_taken_out_for_the_target_are_in_no_subset(tiny, data, common, caplog) -> None:
    sizes = ["--target_size", "10", "--eval_size", "5", "--subset_fraction", "1"]
    trainer = run(
        "blade", ["--model", tiny["base"], *places(data, parts="train"), *sizes, *common, "--max_steps", "4"]
    )
    assert "from the same distribution" in caplog.text
    assert (len(trainer.train_dataset), len(trainer.target_dataset), len(trainer.eval_dataset)) == (25, 10, 5)
    pool = loaded(data["pool.jsonl"])
    subset = SelectedSubset.load(Path(trainer.args.output_dir) / "selected_subset")
    decode = trainer.processing_class.decode
    kept = set(subset.to_dataset(pool)["text"])
    others = {
        decode(row["input_ids"], skip_special_tokens=True)
        for part in (trainer.target_dataset, trainer.eval_dataset)
        for row in part
    }
    trained = {decode(row["input_ids"], skip_special_tokens=True) for row in trainer.train_dataset}
    assert len(kept) == 25 and kept == trained and len(others) == 15 and not kept & others
    assert subset.num_pool == 40


def test_blade_on_chats_with_an_adapter(tiny, data, common) -> None:
    argv = ["--model", tiny["llama"], *places(data, "chats_{}.jsonl"), *common, "--peft", "--lora_rank", "2"]
    trainer = run("blade", [*argv, "--activation_checkpointing"])
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    config = json.loads((Path(trainer.args.output_dir) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (2, 4, "CAUSAL_LM")
    labels = torch.tensor(trainer.train_dataset[0]["labels"])
    assert (labels == -100).any() and (labels != -100).any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # TRL's own
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_blade_with_trl(tiny, data, common, granularity: str) -> None:
    argv = ["--model", tiny["llama"], *places(data, "chats_{}.jsonl"), *common, "--trl", "--selection_ratio", "0.5"]
    trainer = run("blade", argv if granularity == "token" else [*argv, "--granularity", "sample"])
    assert [cls.__name__ for cls in type(trainer).__mro__][:2] == ["BladeSFTTrainer", "BladeMixin"]
    assert trainer.granularity == granularity and trainer.args.max_length is None and not trainer.padding_free
    log = trainer.state.log_history[0]
    assert "mean_token_accuracy" in log
    # TRL's patched forward runs the model that it was made for: a reference that is copied with it would be the model itself.
    assert log["blade/excess_loss_mean"] != 0
    row = trainer.train_dataset[0]
    assert -100 in row["labels"] and len(row["labels"]) == len(row["input_ids"])
    subset = SelectedSubset.load(Path(trainer.args.output_dir) / "selected_subset")
    assert "messages" in subset.to_dataset(loaded(data["chats_pool.jsonl"])).column_names


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # TRL's own
def test_blade_with_trl_on_packed_rows(tiny, data, common) -> None:
    argv = ["--model", tiny["base"], *places(data, "{}.txt"), *common, "--trl", "--pack"]
    trainer = run("blade", argv)
    assert trainer.granularity == "token" and trainer.state.global_step >= 2
    *full, _ = map(len, trainer.train_dataset["input_ids"])
    assert set(full) == {64}, "rows as packed, none cut or joined by TRL"


def test_blade_on_masked_texts(tiny, data, common) -> None:
    argv = ["--model", tiny["bert"], "--task", "masked_lm", *places(data, "{}.txt"), *common]
    trainer = run("blade", argv)
    assert type(trainer.model).__name__ == "BertForMaskedLM" and trainer.granularity == "token"
    assert "labels" not in trainer.train_dataset.column_names


@pytest.mark.filterwarnings("ignore:The subspaces of")  # too few steps to learn anything
def test_bros_on_images(tiny, data, common) -> None:
    argv = ["--model", tiny["vit"], "--task", "image_classification", *places(data, "images_{}"), *common]
    trainer = run("bros", [*argv, "--rank", "4", "--max_steps", "3", "--subset_fraction", "0.5"])
    config = AutoConfig.from_pretrained(trainer.args.output_dir)
    assert config.id2label == {0: "cat", 1: "dog"} and config.label2id == {"cat": 0, "dog": 1}
    assert trainer.state.log_history[-1]["eval_accuracy"] in [i / 12 for i in range(13)]
    item = trainer.train_dataset[0]
    assert item["pixel_values"].shape == (3, 8, 8) and item["labels"] == 0
    subset = SelectedSubset.load(Path(trainer.args.output_dir) / "selected_subset")
    pool = datasets.load_dataset(data["images_pool"])["train"]
    assert len(subset) == 20 and subset.weights is not None and subset.to_dataset(pool)[0]["image"].size == (10, 10)


def test_bros_on_texts_with_an_adapter(tiny, data, common) -> None:
    trainer = run("bros", ["--model", tiny["base"], *places(data, "{}.parquet"), *common, "--peft"])
    assert trainer.rank == "full" and len(trainer.sample_weights.ids) == 40


def test_mixture_on_packed_domains(tiny, data, common) -> None:
    argv = ["--model", tiny["base"], *places(data), *common, "--domain_column", "source", "--pack", "--max_steps", "3"]
    trainer = run("mixture", [*argv, "--inner_steps", "1"])
    mixture = json.loads((Path(trainer.args.output_dir) / "mixture.json").read_text())["mixture"]
    assert set(mixture) == {"books", "web"} and sum(mixture.values()) == pytest.approx(1) and mixture["web"] != 0.5
    lengths = [len(row) for row in trainer.train_dataset["input_ids"]]
    assert max(lengths) == 64 and sum(length < 64 for length in lengths) <= 2, "one shorter row for each domain"
    assert "eval_books_perplexity" in trainer.state.log_history[-1]
    assert not (Path(trainer.args.output_dir) / "selected_subset").exists(), "packed rows are no rows of the pool"


@pytest.mark.filterwarnings("ignore:The subspaces of")
@pytest.mark.parametrize(
    "command, argv",
    [("bros", "--rank 4"), ("coreset", "--size 3 --outer_steps 2 --inner_steps 2 --num_masks 2 --num_final_masks 1")],
)
def test_other_methods_on_packed_rows(command: str, argv: str, tiny, data, common) -> None:
    trainer = run(command, ["--model", tiny["base"], *places(data), *common, "--pack", *argv.split()])
    lengths = [len(row) for row in trainer.train_dataset["input_ids"]]
    assert max(lengths) == 64 and sum(length < 64 for length in lengths) <= 1
    assert not (Path(trainer.args.output_dir) / "selected_subset").exists(), "packed rows are no rows of the pool"


def test_mixture_saves_rows_by_domain(tiny, data, common) -> None:
    argv = ["--model", tiny["base"], *places(data, "{}.csv"), *common, "--domain_column", "source", "--max_steps", "3"]
    trainer = run("mixture", [*argv, "--inner_steps", "1", "--subset_fraction", "0.5"])
    subset = SelectedSubset.load(Path(trainer.args.output_dir) / "selected_subset")
    assert len(subset) == 20 and subset.domain_names == ["books", "web"]
    assert [subset.domain_names[i] for i in subset.domain_ids] == [
        ["web", "books"][i % 2] for i in subset.ids.tolist()
    ]


def test_blade_with_a_static_reference(tiny, data, common, tmp_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny["base"])
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.5)
    reference.save_pretrained(tmp_path / "reference")
    AutoTokenizer.from_pretrained(tiny["base"]).save_pretrained(tmp_path / "reference")
    argv = ["--model", tiny["base"], *places(data), *common, "--peft", "--reference", "static"]
    trainer = run("blade", [*argv, "--reference_model", str(tmp_path / "reference")])
    assert torch.equal(trainer.reference_model.lm_head.weight, reference.lm_head.weight)
    assert not hasattr(trainer.reference_model, "peft_config")
    assert trainer.state.log_history[0]["blade/excess_loss_mean"] != 0


def test_coreset_searched_with_another_model(tiny, data, common) -> None:
    argv = ["--model", tiny["base"], *places(data), *common, "--search_model", tiny["wide"]]
    search = "--size 7 --outer_steps 2 --inner_steps 2 --num_masks 2 --num_final_masks 1".split()
    trainer = run("coreset", [*argv, *search])
    assert (trainer.search_model.config.hidden_size, trainer.model.config.hidden_size) == (128, 16)
    assert len(trainer.selected_subset().ids) == 7


def test_coreset_of_labelled_texts(tiny, data, common) -> None:
    argv = ["--model", tiny["bert"], "--task", "sequence_classification", *places(data, "{}.csv"), *common]
    search = "--size 7 --outer_steps 2 --inner_steps 2 --num_masks 2 --num_final_masks 1".split()
    trainer = run("coreset", [*argv, *search])
    assert AutoConfig.from_pretrained(trainer.args.output_dir).id2label == {0: "bad", 1: "good", 2: "neither"}
    subset = SelectedSubset.load(Path(trainer.args.output_dir) / "selected_subset")
    assert len(subset) == 7 and subset.num_pool == 40 and subset.probabilities is not None
    labels = [trainer.train_dataset[i]["labels"] for i in range(3)]
    assert labels == [1, 0, 2], "good, bad, neither"
    assert "eval_accuracy" in trainer.state.log_history[-1]


def test_a_causal_model_classifies(tiny, data, common) -> None:
    argv = ["--model", tiny["base"], "--task", "sequence_classification", *places(data), *common]
    trainer = run("blade", [*argv, "--selection_ratio", "0.5"])
    assert trainer.model.config.pad_token_id == 258 and trainer.granularity == "sample"


def test_streams(tiny, data, common) -> None:
    argv = ["--model", tiny["base"], *places(data, parts="train"), "--target_size", "6", "--streaming", *common]
    trainer = run("blade", argv)
    assert len(trainer.target_dataset) == 6 and trainer.state.global_step == 2
    first = trainer.processing_class.decode(next(iter(trainer.train_dataset))["input_ids"], skip_special_tokens=True)
    assert first == loaded(data["pool.jsonl"])[6]["text"]
    assert not (Path(trainer.args.output_dir) / "selected_subset").exists()


def test_a_run_is_resumed(tiny, data, common) -> None:
    argv = ["--model", tiny["base"], *places(data), *common, "--save_strategy", "steps", "--save_steps", "1"]
    run("blade", argv)
    trainer = run("blade", [*argv, "--max_steps", "3", "--resume_from_checkpoint", "true"])
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
    assert trainer.state.global_step == 3 and trainer.state.max_steps == 3


def test_a_checkpoint_that_cannot_be_resumed_is_refused_without_a_traceback(tiny, data, common) -> None:
    argv = ["--model", tiny["base"], *places(data), *common, "--resume_from_checkpoint", "true"]
    with pytest.raises(SystemExit, match="^hf-bilevel blade: No checkpoint in .* can be resumed from. There is none."):
        run("blade", argv)


def test_what_breaks_elsewhere_keeps_its_traceback(tiny, data, common, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, *args: object, **kwargs: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(ValueError, match="a defect"):
        run("blade", ["--model", tiny["base"], *places(data), *common])


def test_the_subset_of_a_file_that_was_moved(tiny, data, common, tmp_path: Path) -> None:
    trainer = run("blade", ["--model", tiny["base"], *places(data), *common])
    subset = load_selected_subset(Path(trainer.args.output_dir) / "selected_subset")
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(Path(data["pool.jsonl"]).read_bytes())
    pool = datasets.load_dataset("json", data_files=str(copy), split="train", cache_dir=str(tmp_path / "cache"))
    assert pool._fingerprint != subset.fingerprint and len(subset.to_dataset(pool)) == len(subset)


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list:
    done = []
    upload = lambda subset, repo_id, pool, token: done.append((repo_id, subset.to_dataset(pool)))  # noqa: E731
    monkeypatch.setattr(SelectedSubset, "push_to_hub", upload)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    return done


def test_the_subset_is_uploaded_as_it_was_before_encoding(tiny, data, common, uploads) -> None:
    run("blade", ["--model", tiny["base"], *places(data), *common, "--push_subset", "me/kept"])
    ((repo_id, rows),) = uploads
    assert repo_id == "me/kept" and len(rows) == 8 and set(rows.column_names) == {"text", "source", "label"}


def test_no_subset_to_upload_is_an_error_after_saving(tiny, data, common, uploads, tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match="the model is saved, and there is no subset to upload: There is no selection"
    ):
        run(
            "blade",
            ["--model", tiny["base"], *places(data), *common, "--selection_ratio", "1", "--push_subset", "a/b"],
        )
    assert (tmp_path / "output" / "model.safetensors").exists() and not uploads


def test_labels_are_matched_by_name(tiny, data, common, tmp_path: Path) -> None:
    """A target file may name its labels in another order, and a folder of images may lack a class."""
    order = random.Random(0)
    rows = [{"text": "w" * order.randint(4, 9), "label": label} for label in ("neither", "good", "good", "bad")]
    path = tmp_path / "target.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    argv = ["--model", tiny["bert"], "--task", "sequence_classification", *places(data, parts="train"), *common]
    trainer = run("blade", [*argv, "--target_dataset", str(path), "--selection_ratio", "0.5"])
    assert trainer.target_dataset["labels"][:] == [2, 1, 1, 0]
