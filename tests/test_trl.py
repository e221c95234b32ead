"""The mixins in front of TRL's SFTTrainer: the same selection as without it, TRL's own metrics, its own preparation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import LENGTH, VOCABULARY, make_model, make_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainingArguments

from hf_bilevel import BladeConfig, BladeMixin, BladeTrainer, BrosConfig, BrosMixin, MixtureConfig, MixtureMixin

pytest.importorskip("trl")
from trl import SFTConfig, SFTTrainer

pytestmark = pytest.mark.filterwarnings(  # TRL's own
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

WORDS = [f"w{i}" for i in range(VOCABULARY - 3)]
TEXTS = [" ".join(WORDS[(7 * i + k * (1 + i % 3)) % len(WORDS)] for k in range(4 + i % 5)) for i in range(32)]


class BladeSFTTrainer(BladeMixin, SFTTrainer):
    pass


class BrosSFTTrainer(BrosMixin, SFTTrainer):
    pass


class MixtureSFTTrainer(MixtureMixin, SFTTrainer):
    pass


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<eos>", "?", *WORDS])}, "?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="<pad>", eos_token="<eos>")


def encoded(num: int, seed: int = 0) -> Dataset:
    """Rows of different lengths, of which a part is not trained on, without padding."""
    rows = []
    for row in make_rows("llama", num, seed):
        used = sum(row["attention_mask"])
        labels = [-100, -100, *row["labels"][2:used]]
        rows.append({"input_ids": row["input_ids"][:used], "labels": labels})
    return Dataset.from_list(rows)


COMMON = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "remove_unused_columns": True,
}


def make_sft(cls: type, tokenizer: Any, tmp_path: Path, sft: dict | None = None, **kwargs: Any) -> SFTTrainer:
    settings = {"max_length": LENGTH + 1, "packing": False, "padding_free": False, "bf16": False, "loss_type": "nll"}
    args = SFTConfig(str(tmp_path), **{**COMMON, **settings, **(sft or {})})
    trainer = cls(model=make_model("llama"), args=args, processing_class=tokenizer, **kwargs)
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.mark.parametrize("score", ["excess_loss", "loss", "random"])
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_the_model_is_that_of_blade_without_trl(tokenizer, tmp_path: Path, granularity: str, score: str) -> None:
    """TRL computes the same sums from log-probabilities of its own, so the numbers differ by rounding only.

    By SGD: Adam divides small gradients by their own size, rounding included.
    """
    settings = {"optim": "sgd", "learning_rate": 0.1}
    config = BladeConfig(
        selection_ratio=0.5, granularity=granularity, score=score, sync_steps=2, reference_steps=2, penalty=0.5
    )
    data = {"train_dataset": encoded(24), "target_dataset": encoded(8, seed=1), "bilevel_config": config}
    if score != "excess_loss":
        data["bilevel_config"] = BladeConfig(selection_ratio=0.5, granularity=granularity, score=score)
    sft = make_sft(BladeSFTTrainer, tokenizer, tmp_path, settings, **data)
    plain = BladeTrainer(
        model=make_model("llama"),
        args=TrainingArguments(str(tmp_path), **{**COMMON, **settings}),
        data_collator=sft.data_collator,
        **data,
    )
    plain.remove_callback(PrinterCallback)
    sft.train()
    plain.train()
    for ours, theirs in zip(sft.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for key in ("selected", "offered"):
        found, wanted = (trainer.sample_tally.state_dict()[key] for trainer in (sft, plain))
        assert torch.equal(found, wanted) and found.sum() > 0
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (sft, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    start = make_model("llama").parameters()
    assert any((ours - before).abs().max() > 1e-3 for ours, before in zip(sft.model.parameters(), start, strict=True))


def test_metrics_of_trl_are_over_all_tokens(tokenizer, tmp_path: Path) -> None:
    """Of the first step, before the weights differ."""
    pool = encoded(24)
    plain = make_sft(SFTTrainer, tokenizer, tmp_path, {"max_steps": 1}, train_dataset=pool)
    ours = make_sft(
        BladeSFTTrainer,
        tokenizer,
        tmp_path,
        {"max_steps": 1},
        train_dataset=pool,
        target_dataset=encoded(8, seed=1),
        bilevel_config=BladeConfig(selection_ratio=0.25, score="loss"),
    )
    assert ours.granularity == "token"
    plain.train()
    ours.train()
    logs = [trainer.state.log_history[0] for trainer in (plain, ours)]
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)
    assert logs[1]["loss"] > logs[0]["loss"] + 0.05, "of the tokens with the highest loss"
    assert logs[1]["blade/selected_fraction"] == pytest.approx(0.25, abs=0.05)


def test_dft_weights_the_selected_tokens_alone(tokenizer, tmp_path: Path) -> None:
    """By brute force: the tokens with the highest loss, each loss times its own probability."""
    pool = encoded(4)
    trainer = make_sft(
        BladeSFTTrainer,
        tokenizer,
        tmp_path,
        {"loss_type": "dft", "gradient_accumulation_steps": 1, "max_steps": 1},
        train_dataset=pool,
        target_dataset=encoded(4, seed=1),
        bilevel_config=BladeConfig(selection_ratio=0.5, score="loss"),
    )
    model = make_model("llama")
    batch = trainer.data_collator([{key: row[key] for key in ("input_ids", "labels")} for row in pool])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
    kept = log_probs.sort().values[: -(-len(log_probs) // 2)]
    trainer.train()
    wanted = float(-(kept * kept.exp()).mean())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("evaluates_on", ["nothing", "one", "several"])
def test_sft_prepares_the_target_dataset_too(tokenizer, tmp_path: Path, evaluates_on: str) -> None:
    texts, held_out = Dataset.from_dict({"text": TEXTS}), Dataset.from_dict({"text": TEXTS[:8]})
    evaluation = {"nothing": None, "one": held_out, "several": {"a": held_out, "b": held_out}}[evaluates_on]
    trainer = make_sft(
        BladeSFTTrainer,
        tokenizer,
        tmp_path,
        train_dataset=texts,
        target_dataset=Dataset.from_dict({"text": TEXTS[8:16]}),
        eval_dataset=evaluation,
        bilevel_config=BladeConfig(selection_ratio=0.5),
    )
    alone = make_sft(SFTTrainer, tokenizer, tmp_path, train_dataset=texts, eval_dataset=evaluation)
    assert trainer.target_dataset["input_ids"][:] == trainer.train_dataset["input_ids"][8:16]
    assert type(trainer.eval_dataset) is type(alone.eval_dataset)
    trainer.train()
    if evaluation is not None:
        found, wanted = trainer.evaluate(), alone.evaluate()
        assert {key for key in found if key.endswith("_loss")} == {key for key in wanted if key.endswith("_loss")}
    subset = trainer.selected_subset(fraction=0.25)
    assert subset.to_dataset(texts)["text"][:] == [TEXTS[i] for i in subset.ids.tolist()]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": []}, "`target_dataset` is empty"),
        ({"txt": ["w1 w2"]}, r"has the columns \['txt'\] and lacks \['text'\], which SFTTrainer reads"),
    ],
)
def test_a_target_dataset_that_sft_cannot_prepare_is_said(
    tokenizer, tmp_path: Path, columns: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_sft(
            BladeSFTTrainer,
            tokenizer,
            tmp_path,
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            target_dataset=Dataset.from_dict(columns),
        )


def test_an_evaluation_set_may_have_the_name_of_the_target(tokenizer, tmp_path: Path) -> None:
    texts, other = Dataset.from_dict({"text": TEXTS}), Dataset.from_dict({"text": TEXTS[:3]})
    trainer = make_sft(
        BladeSFTTrainer,
        tokenizer,
        tmp_path,
        train_dataset=texts,
        target_dataset=Dataset.from_dict({"text": TEXTS[8:16]}),
        eval_dataset={"target_dataset": other},
    )
    assert {name: len(rows) for name, rows in trainer.eval_dataset.items()} == {"target_dataset": 3}
    assert len(trainer.target_dataset) == 8


def test_evaluation_without_something_to_evaluate_on_is_still_an_error(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_dataset"):
        make_sft(
            BladeSFTTrainer,
            tokenizer,
            tmp_path,
            {"eval_strategy": "steps"},
            train_dataset=encoded(8),
            target_dataset=encoded(8),
        )


def test_tokens_of_other_trainers_of_trl_are_refused(tmp_path: Path) -> None:
    class OtherTrainer(BladeTrainer):
        __module__ = "trl.trainer.other"

    with pytest.raises(ValueError, match="Of TRL's trainers only `SFTTrainer` has a loss over tokens"):
        OtherTrainer(
            model=make_model("llama"),
            args=TrainingArguments(str(tmp_path), use_cpu=True),
            train_dataset=encoded(8),
            target_dataset=encoded(8),
        )


@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("setting", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_rows_of_several_samples_are_refused(tokenizer, tmp_path: Path, granularity: str, setting: dict) -> None:
    with pytest.raises(ValueError, match=r"several\s+samples in a row"):
        make_sft(
            BladeSFTTrainer,
            tokenizer,
            tmp_path,
            setting,
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            target_dataset=Dataset.from_dict({"text": TEXTS[:8]}),
            bilevel_config=BladeConfig(selection_ratio=0.5, granularity=granularity),
        )


@pytest.mark.filterwarnings("ignore:The subspaces of")  # too few steps to learn anything
def test_bros_takes_the_loss_of_the_head(tokenizer, tmp_path: Path) -> None:
    data = {
        "train_dataset": Dataset.from_dict({"text": TEXTS}),
        "target_dataset": Dataset.from_dict({"text": TEXTS[:8]}),
    }
    trainer = make_sft(BrosSFTTrainer, tokenizer, tmp_path, bilevel_config=BrosConfig(rank=0.5), **data)
    trainer.train()
    assert len(trainer.sample_weights.ids) == 32 and trainer.sample_weights.weights.std() > 0
    with pytest.raises(ValueError, match=r"so `SFTTrainer\.compute_loss` would not be called"):
        make_sft(BrosSFTTrainer, tokenizer, tmp_path, {"loss_type": "dft"}, bilevel_config=BrosConfig(), **data)


def test_a_mixture_weights_losses(tokenizer, tmp_path: Path) -> None:
    parts = {"a": Dataset.from_dict({"text": TEXTS[:16]}), "b": Dataset.from_dict({"text": TEXTS[16:]})}
    data = {"train_dataset": parts, "target_dataset": Dataset.from_dict({"text": TEXTS[:8]})}
    config = MixtureConfig(realisation="weight", inner_steps=2, reference_steps=2)
    trainer = make_sft(MixtureSFTTrainer, tokenizer, tmp_path, bilevel_config=config, **data)
    trainer.train()
    assert sum(trainer.mixture.values()) == pytest.approx(1) and trainer.mixture["a"] != 0.5
    with pytest.raises(ValueError, match=r"so `SFTTrainer\.compute_loss` would not be called"):
        make_sft(MixtureSFTTrainer, tokenizer, tmp_path, {"loss_type": "dft"}, bilevel_config=config, **data)
