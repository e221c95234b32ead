"""The mixins in front of TRL's SFTTrainer: the same selection as without it, TRL's own metrics, its own preparation."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import LENGTH, VOCABULARY, make_model, make_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainingArguments,
)

from hf_bilevel import (
    BladeConfig,
    BladeMixin,
    BladeTrainer,
    BrosConfig,
    BrosMixin,
    CoresetConfig,
    CoresetMixin,
    MixtureConfig,
    MixtureMixin,
)

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


class CoresetSFTTrainer(CoresetMixin, SFTTrainer):
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


def make_sft(
    cls: type, tokenizer: Any, tmp_path: Path, sft: dict | None = None, model: nn.Module | None = None, **kwargs: Any
) -> SFTTrainer:
    settings = {"max_length": LENGTH + 1, "packing": False, "padding_free": False, "bf16": False, "loss_type": "nll"}
    args = SFTConfig(str(tmp_path), **{**COMMON, **settings, **(sft or {})})
    model = make_model("llama") if model is None else model
    trainer = cls(model=model, args=args, processing_class=tokenizer, **kwargs)
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


# What SFTTrainer does that this package must follow, or refuse -------------------------------------------------------


def with_texts(**columns: list[str]) -> Dataset:
    return Dataset.from_dict(columns or {"text": TEXTS})


@pytest.mark.parametrize(
    ("setting", "target", "message"),
    [
        ({"shuffle_dataset": True}, with_texts(), "`shuffle_dataset=True` reorders the pool"),
        ({"eval_packing": True}, with_texts(), "`eval_packing=True` and `packing=False`"),
        (
            {},
            with_texts(text=TEXTS, prompt=TEXTS, completion=TEXTS),
            "has the columns .*'completion', 'prompt'.* which `train_",
        ),
    ],
)
def test_what_would_prepare_the_datasets_differently_is_refused(
    tokenizer, tmp_path: Path, setting: dict, target: Dataset, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_sft(BladeSFTTrainer, tokenizer, tmp_path, setting, train_dataset=with_texts(), target_dataset=target)


def test_a_formatting_function_that_does_not_fit_the_target_is_said(tokenizer, tmp_path: Path) -> None:
    data = {"train_dataset": with_texts(q=TEXTS), "target_dataset": with_texts(a=TEXTS)}
    with pytest.raises(ValueError, match="`formatting_func` does not find 'q' in `target_dataset`"):
        make_sft(BladeSFTTrainer, tokenizer, tmp_path, formatting_func=lambda row: row["q"], **data)


def test_a_shuffled_pool_is_nothing_to_a_trainer_that_is_off(tokenizer, tmp_path: Path) -> None:
    off = BladeConfig(selection_ratio=1)
    make_sft(
        BladeSFTTrainer, tokenizer, tmp_path, {"shuffle_dataset": True}, train_dataset=with_texts(), bilevel_config=off
    ).train()


def test_a_coreset_of_texts_is_saved_with_every_checkpoint(tokenizer, tmp_path: Path) -> None:
    """SFTTrainer writes a model card with each, while the trainer's dataset is the coreset."""
    setting = {"save_strategy": "steps", "save_steps": 2}
    config = CoresetConfig(size=8, outer_steps=3, inner_steps=2)

    def make() -> SFTTrainer:
        data = {"train_dataset": with_texts(), "bilevel_config": config}
        return make_sft(CoresetSFTTrainer, tokenizer, tmp_path, setting, **data)

    whole = make()
    whole.train()
    rest = make()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for ours, theirs in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Coreset" in card and "8 of 32" in card
    facts = json.loads((tmp_path / "checkpoint-2" / "bilevel_facts.json").read_text(encoding="utf-8"))
    assert facts["num_pool"] == 32


@pytest.mark.parametrize("bf16", [False, True])
def test_a_copy_of_a_model_that_sft_has_trained_is_a_reference(tokenizer, tmp_path: Path, bf16: bool) -> None:
    """SFTTrainer puts a forward on the model that a copy shares: it would run the model that is trained."""
    model = make_model("llama")
    make_sft(SFTTrainer, tokenizer, tmp_path, {"bf16": bf16}, model=model, train_dataset=with_texts()).train()
    reference = copy.deepcopy(model)
    trainer = make_sft(
        BladeSFTTrainer,
        tokenizer,
        tmp_path,
        {"bf16": bf16, "learning_rate": 0.1},
        model=model,
        train_dataset=with_texts(),
        reference_model=reference,
        bilevel_config=BladeConfig(selection_ratio=0.5, reference="static"),
    )
    trainer.train()
    fresh = make_model("llama")
    fresh.load_state_dict(reference.state_dict())
    batch = trainer.data_collator([trainer.train_dataset[0]])
    found, wanted, trained = (m.eval()(**batch).loss for m in (reference, fresh, model))
    assert torch.equal(found, wanted) and abs(float(found - trained)) > 0.01


def mixture_of_experts(coefficient: float) -> nn.Module:
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 16}
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, head_dim=8, pad_token_id=0, router_aux_loss_coef=coefficient, **layers, **experts
    )
    return Qwen3MoeForCausalLM(config)


def test_the_loss_of_a_router_is_trained_beside_the_selected_tokens(tokenizer, tmp_path: Path) -> None:
    def logged(selection_ratio: float) -> dict[str, float]:
        data = {"train_dataset": with_texts(), "target_dataset": with_texts()}
        config = BladeConfig(selection_ratio=selection_ratio, sync_steps=100, reference_steps=1)
        setting = {"max_steps": 1, "gradient_accumulation_steps": 1}
        trainer = make_sft(
            BladeSFTTrainer, tokenizer, tmp_path, setting, mixture_of_experts(10.0), bilevel_config=config, **data
        )
        trainer.train()
        return trainer.state.log_history[0]

    off, on = logged(1.0), logged(0.5)
    assert on["aux_loss"] == off["aux_loss"] and on["loss"] > 10 * on["aux_loss"] * 0.99
    assert on["loss"] - 10 * on["aux_loss"] != pytest.approx(off["loss"] - 10 * off["aux_loss"], abs=1e-3)


@pytest.mark.parametrize("coefficient", [0.0, 1e-3])
@pytest.mark.parametrize(
    ("cls", "config", "left_out_of"),
    [
        (BrosSFTTrainer, BrosConfig(rank=0.5), "the training"),
        (MixtureSFTTrainer, MixtureConfig(realisation="weight", domain_column="d", inner_steps=2), "the training"),
        (MixtureSFTTrainer, MixtureConfig(domain_column="d", inner_steps=2), "the training of the twin"),
        (CoresetSFTTrainer, CoresetConfig(size=8), "the trainings of the search"),
    ],
)
def test_a_loss_of_a_router_that_is_left_out_is_said(
    tokenizer, tmp_path: Path, cls: type, config: Any, left_out_of: str, coefficient: float
) -> None:
    """Also where it is too small to show in the loss of the first rows."""
    pool = with_texts(text=TEXTS, d=["a", "b"] * 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_sft(
            cls,
            tokenizer,
            tmp_path,
            {"bf16": True, "max_steps": 8},
            mixture_of_experts(coefficient),
            train_dataset=pool,
            target_dataset=with_texts(),
            bilevel_config=config,
        )
    said = [str(w.message) for w in caught if "router is of a batch" in str(w.message)]
    assert len(said) == (coefficient > 0)
    assert all(
        f"left out of {left_out_of}. Set `router_aux_loss_coef=0.0` in the `SFTConfig`" in text for text in said
    )


def test_domains_are_evaluated_in_the_pass_that_sft_makes(tokenizer, tmp_path: Path) -> None:
    pool = with_texts(text=TEXTS, d=["a", "b"] * 16)
    model = make_model("llama")
    trainer = make_sft(
        MixtureSFTTrainer,
        tokenizer,
        tmp_path,
        model=model,
        train_dataset=pool,
        target_dataset=pool,
        eval_dataset=pool,
        bilevel_config=MixtureConfig(domain_column="d", inner_steps=2),
    )
    calls: list[str] = []
    model.model.register_forward_hook(lambda *_: calls.append("backbone"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("logits"))
    metrics = trainer.evaluate()
    assert calls == ["backbone"] * len(trainer.get_eval_dataloader())
    for name, rows in (("a", range(0, 32, 2)), ("b", range(1, 32, 2))):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
        with torch.no_grad():
            assert metrics[f"eval_{name}_loss"] == pytest.approx(float(model(**batch).loss), rel=1e-5)
