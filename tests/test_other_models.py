"""Models and tasks beyond the usual ones: what their own losses, layers and batches ask of the methods."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_compatibility import MixtureSeq2SeqTrainer
from test_contract import METHODS
from tiny import LENGTH, VOCABULARY, arguments, make_dataset, make_model, parameters_of
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    set_seed,
)

from hf_bilevel import BladeConfig, BladeTrainer, BrosConfig, BrosTrainer, MixtureConfig, MixtureTrainer
from hf_bilevel.data import DOMAIN_ID, NumberedStream, check_images_of_rows

BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def words() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}, "w1"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_rows_of_tokens_with_labels_are_selected(tmp_path: Path) -> None:
    lengths = [2 + i % 11 for i in range(32)]
    generator = torch.Generator().manual_seed(0)
    draw = lambda length: torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()  # noqa: E731
    ids = [draw(length) for length in lengths]
    rows = {"input_ids": ids, "labels": [[t % 3 for t in row] for row in ids]}
    data = Dataset.from_dict({**rows, "attention_mask": [[1] * length for length in lengths]})
    torch.manual_seed(0)
    trainer = BladeTrainer(
        model=BertForTokenClassification(BertConfig(vocab_size=VOCABULARY, num_labels=3, **BERT)),
        args=arguments(tmp_path, max_steps=4),
        train_dataset=data,
        target_dataset=data.select(range(8)),
        data_collator=DataCollatorForTokenClassification(words()),
        bilevel_config=BladeConfig(selection_ratio=0.25),
    )
    assert trainer.granularity == "sample"
    before = parameters_of(trainer)
    trainer.train()
    assert not torch.equal(parameters_of(trainer), before)


@pytest.mark.parametrize("make", [torch.tensor, lambda n: torch.tensor(n).numpy(), int])
def test_domains_of_a_stream_are_integers_of_any_kind(make: Any) -> None:
    stream = NumberedStream([{"x": 0, "source": make(2)}, {"x": 1, "source": make(0)}], "source", None)
    assert [item[DOMAIN_ID] for item in stream] == [2, 0]
    named = NumberedStream([{"x": 0, "source": make(1)}], "source", ["a", "b"])
    assert [item[DOMAIN_ID] for item in named] == [1]
    with pytest.raises(ValueError, match="does not list the domain"):
        list(NumberedStream([{"x": 0, "source": make(2)}], "source", ["a", "b"]))
    with pytest.raises(ValueError, match=r"has the domain 0.5 as `source`; give integers"):
        list(NumberedStream([{"x": 0, "source": 0.5}], "source", None))


def test_images_that_cannot_be_told_apart_by_row_are_refused() -> None:
    tokens = torch.tensor([[9, 9, 1], [9, 2, 3], [1, 2, 3]])
    batch = {"input_ids": tokens, "pixel_values": torch.zeros(3, 3, 4, 4)}
    with pytest.raises(
        ValueError, match="3 images for its 3 samples, of which 1 have no image tokens.*granularity='token'"
    ):
        check_images_of_rows(batch, 9, 3)
    check_images_of_rows({**batch, "pixel_attention_mask": torch.ones(3)}, 9, 3)  # padded to a number of images a row
    check_images_of_rows({"input_ids": tokens}, 9, 3)
    check_images_of_rows({**batch, "input_ids": tokens.index_fill(1, torch.tensor([0]), 9)}, 9, 3)


@pytest.mark.parametrize("where", ["start", "later"])
def test_such_images_stop_a_run(where: str, tmp_path: Path) -> None:
    """A model that says what stands for its images; of the first rows each has one where it shows later."""
    model = make_model("bert")
    model.config.image_token_id = 5
    rows = []
    for i in range(32):
        tokens = torch.full((LENGTH,), 7)
        tokens[: 3 if where == "start" and i % 2 else 0] = 5
        if where == "later":
            tokens[: 0 if i == 20 else 3] = 5
        rows.append(
            {"input_ids": tokens.tolist(), "attention_mask": [1] * LENGTH, "labels": i % 4, "pixels": [float(i)]}
        )

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {key: torch.tensor([item[key] for item in items]) for key in ("input_ids", "attention_mask", "labels")}
        return {**batch, "pixel_values": torch.tensor([item["pixels"] for item in items])}

    forward = model.forward
    model.forward = lambda *args, pixel_values=None, **kwargs: forward(*args, **kwargs)
    build = dict(
        model=model,
        args=arguments(tmp_path, remove_unused_columns=False),
        train_dataset=rows,
        target_dataset=rows[:4] if where == "later" else [row for row in rows if row["input_ids"][0] == 5][:4],
        data_collator=collate,
        bilevel_config=BladeConfig(selection_ratio=0.5, granularity="sample", sync_steps=3, reference_steps=1),
    )
    with pytest.raises(ValueError, match="have no image tokens"):
        BladeTrainer(**build).train()


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def labelled(kind: str) -> tuple[nn.Module, Dataset]:
    problem = {"multi": "multi_label_classification", "regression": "regression"}[kind]
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, num_labels=3, problem_type=problem, **BERT, **NO_DROPOUT)
    data = make_dataset("bert", 16).remove_columns("labels")
    labels = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    labels = (labels > 0).float() if kind == "multi" else labels
    return BertForSequenceClassification(config), data.add_column("labels", labels.tolist())


@pytest.mark.filterwarnings("ignore:The weights of the domains never move")
@pytest.mark.parametrize("kind", ["multi", "regression"])
@pytest.mark.parametrize("method", ["bros", "mixture"])
def test_several_labels_of_a_row_are_one_unit(method: str, kind: str, tmp_path: Path) -> None:
    def train(trainer_class: type[Trainer], **kwargs: Any) -> tuple[torch.Tensor, float]:
        model, data = labelled(kind)
        args = arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=16,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.1,
            logging_steps=1,
        )
        trainer = trainer_class(model=model, args=args, train_dataset=data, **kwargs)
        set_seed(11)
        trainer.train()
        return parameters_of(trainer), trainer.state.log_history[0]["loss"]

    expected, loss = train(Trainer)
    if method == "bros":
        config = BrosConfig(upper_variable="fixed", rank="full")
        found, own = train(BrosTrainer, bilevel_config=config, sample_weights=torch.ones(16))
    else:
        config = MixtureConfig(
            domain_column="source",
            realisation="weight",
            initial_weights="proportional",
            inner_steps=2,
            reference_steps=1,
        )  # the shares, so that every weight is 1
        target = labelled(kind)[1].select(range(4))
        found, own = train(MixtureTrainer, bilevel_config=config, target_dataset=target)
    assert own == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(found, expected, atol=1e-7)


class WeightedBertForSequenceClassification(BertForSequenceClassification):
    """Class weights of one's own, which near random weights hardly change the loss."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        outputs = super().forward(input_ids, attention_mask, **kwargs)
        if labels is not None:
            weights = torch.tensor([10.0, 1.0, 0.1, 1.0])
            outputs["loss"] = nn.functional.cross_entropy(outputs.logits, labels, weights)
        return outputs


def test_a_loss_that_differs_a_little_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WeightedBertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=4, **BERT))
    common = {
        "args": arguments(tmp_path),
        "train_dataset": make_dataset("bert", 16),
        "target_dataset": make_dataset("bert", 8),
    }
    for trainer_class in (BladeTrainer, BrosTrainer):
        with pytest.warns(UserWarning, match="it weights or adds something of its own. Pass `compute_sample_losses=`"):
            trainer_class(model=model, **common)
    config = MixtureConfig(domain_column="source", realisation="weight", mixture="uniform")
    with pytest.warns(UserWarning, match="it weights or adds something of its own"):
        MixtureTrainer(model=model, bilevel_config=config, **common)


def mixtral(**config: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            num_key_value_heads=2,
            num_local_experts=2,
            max_position_embeddings=32,
            **size,
            **config,
        )
    )


def test_a_router_loss_is_said_or_refused(tmp_path: Path) -> None:
    common = {
        "args": arguments(tmp_path),
        "train_dataset": make_dataset("llama", 16),
        "target_dataset": make_dataset("llama", 8),
    }
    with pytest.warns(
        UserWarning, match="auxiliary loss of `MixtralForCausalLM`'s router .* is left out of the training"
    ):
        BrosTrainer(model=mixtral(output_router_logits=True, router_aux_loss_coef=0.02), **common)
    model = mixtral()
    model.config.text_config = MixtralConfig(output_router_logits=True)  # where models of images and text have it
    with pytest.raises(ValueError, match="`output_router_logits=True` adds a router loss"):
        BladeTrainer(model=model, **common)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@pytest.mark.filterwarnings("ignore:The subspaces of 2 steps")
def test_subspaces_bear_what_follows_in_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, conv_dim=(8, 8), conv_stride=(4, 4),
        conv_kernel=(8, 4), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=16,
        mask_time_prob=0.3, mask_time_length=2, num_feat_extract_layers=2, num_labels=2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_values": torch.randn(400, generator=generator).tolist(), "labels": i % 2} for i in range(16)]
    trainer = BrosTrainer(
        model=Wav2Vec2ForSequenceClassification(config),
        args=arguments(tmp_path, max_steps=2, per_device_train_batch_size=4),
        train_dataset=rows,
        target_dataset=rows[:4],
        bilevel_config=BrosConfig(rank=0.5),
    )
    before = parameters_of(trainer)
    trainer.train()
    assert not torch.equal(parameters_of(trainer), before) and parameters_of(trainer).isfinite().all()


def test_running_statistics_do_not_move_domain_weights(tmp_path: Path) -> None:
    """With a target loss that counts for nothing the twin is the model, so the domains' losses differ by nothing."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(48, 3, 16, 16, generator=generator)
    pixels[24:] += 1.5
    source = ["dark"] * 24 + ["bright"] * 24
    columns = {"pixel_values": pixels.tolist(), "labels": [i % 2 for i in range(48)], "source": source}
    pool = Dataset.from_dict(columns)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    torch.manual_seed(0)
    trainer = MixtureTrainer(
        model=ResNetForImageClassification(config),
        args=arguments(tmp_path, max_steps=7),
        train_dataset=pool,
        target_dataset=pool.select(range(30, 46)).remove_columns("source"),
        bilevel_config=MixtureConfig(domain_column="source", inner_steps=2, reference_steps=2, penalty=1e25),
    )
    trainer.train()
    assert trainer.domain_weights == {"dark": 0.5, "bright": 0.5}
    assert trainer._gaps == [0.0, 0.0] and len(trainer._trajectory) > 2


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation by domain


def test_domains_are_evaluated_beside_generation(tmp_path: Path) -> None:
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    data = make_dataset("bert_mlm", 16)
    losses = []
    for generates in (True, False):
        torch.manual_seed(0)
        trainer = MixtureSeq2SeqTrainer(
            model=T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **size)),
            args=Seq2SeqTrainingArguments(
                str(tmp_path),
                predict_with_generate=generates,
                generation_max_length=4,
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=data,
            target_dataset=make_dataset("bert_mlm", 10, seed=7),
            eval_dataset=data,
            compute_metrics=lambda predicted: {"ndim": _ndim(predicted.predictions)},
            bilevel_config=MixtureConfig(**METHODS["mixture"].on),
        )
        metrics = trainer.evaluate()
        assert (metrics["eval_ndim"] == 2) == generates  # tokens, or logits
        losses.append([metrics[f"eval_{name}_loss"] for name in ("web", "books", "code")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def _ndim(predictions: Any) -> int:
    return (predictions[0] if isinstance(predictions, tuple) else predictions).ndim


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_losses_of_domains_are_those_of_the_head_however_they_are_found(smoothing: float, tmp_path: Path) -> None:
    data, losses = make_dataset("llama", 16), []
    for captured in (True, False):
        trainer = MixtureTrainer(
            model=make_model("llama"),
            args=arguments(tmp_path, label_smoothing_factor=smoothing),
            train_dataset=data,
            eval_dataset=data,
            bilevel_config=MixtureConfig(domain_column="source", mixture="uniform"),
        )
        if not captured:  # as beside generation
            trainer.prediction_step = partial(_without_logits, trainer, trainer.prediction_step)
        metrics = trainer.evaluate()
        losses.append([metrics[f"eval_{name}_loss"] for name in ("web", "books", "code")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def _without_logits(trainer: Trainer, step: Any, *args: Any, **kwargs: Any) -> Any:
    trainer.compute_loss = partial(_forgetting, trainer, type(trainer).compute_loss)
    return step(*args, **kwargs)


def _forgetting(trainer: Trainer, compute_loss: Any, *args: Any, **kwargs: Any) -> Any:
    found = compute_loss(trainer, *args, **kwargs)
    trainer._kept_outputs.clear()
    return found


def test_no_outputs_are_kept_after_an_evaluation(tmp_path: Path) -> None:
    data = make_dataset("llama", 16)
    trainer = MixtureTrainer(
        model=make_model("llama"),
        args=arguments(tmp_path),
        train_dataset=data,
        bilevel_config=MixtureConfig(domain_column="source", mixture="uniform"),
    )
    for evaluated in (data, data.remove_columns("source"), {"one": data}):
        trainer.evaluate(evaluated)
        assert trainer._kept_outputs is None


class OnlyLogits(nn.Module):
    """A user's model, whose loss is the trainer's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(2, 2), kind

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.layer(x)
        return {"tuple": (logits,), "tensor": logits, "dict": {"logits": logits}}[self.kind]


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0] if isinstance(outputs, tuple) else outputs
    return nn.functional.cross_entropy(logits, labels)


def own_losses(model: nn.Module, batch: Any) -> torch.Tensor:
    logits = model.layer(batch["x"])
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


@pytest.mark.parametrize("kind", ["tuple", "tensor", "dict"])
def test_models_without_a_loss_are_evaluated_by_domain(kind: str, tmp_path: Path) -> None:
    rows = {"x": torch.randn(9, 2, generator=torch.Generator().manual_seed(0)).tolist(), "labels": [0, 1, 1] * 3}
    data = Dataset.from_dict({**rows, "source": ["a", "b", "b"] * 3})
    trainer = MixtureTrainer(
        model=OnlyLogits(kind),
        args=arguments(tmp_path, label_names=["labels"]),
        train_dataset=data,
        bilevel_config=MixtureConfig(domain_column="source", mixture="uniform"),
        compute_loss_func=own_loss,
        compute_sample_losses=own_losses,
    )
    metrics = trainer.evaluate(data)
    expected = own_losses(trainer.model, {"x": torch.tensor(rows["x"]), "labels": torch.tensor(rows["labels"])})
    assert metrics["eval_a_loss"] == pytest.approx(float(expected[::3].detach().mean()), rel=1e-5)
    assert trainer.evaluate(data.remove_columns("source"))["eval_loss"] > 0


def test_settings_of_tf32_that_pytorch_does_not_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    BladeTrainer(
        model=make_model("bert"),
        args=arguments(tmp_path),
        train_dataset=make_dataset("bert", 16),
        target_dataset=make_dataset("bert", 8),
    )


def test_domains_are_evaluated_where_other_outputs_stand_first(tmp_path: Path) -> None:
    data = make_dataset("llama", 16)
    losses = []
    for routed in (True, False):
        trainer = MixtureTrainer(
            model=mixtral(output_router_logits=routed),
            args=arguments(tmp_path),
            train_dataset=data,
            eval_dataset=data,
            bilevel_config=MixtureConfig(domain_column="source", mixture="uniform"),
        )
        metrics = trainer.evaluate()
        losses.append([metrics[f"eval_{name}_loss"] for name in ("web", "books", "code")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
