"""Unit losses: in float64, against the models' own losses and against a loop over rows and positions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.trainer_pt_utils import LabelSmoother

from hf_bilevel import large_vocabulary
from hf_bilevel import losses as losses_module
from hf_bilevel.losses import (
    LARGE_VOCABULARY,
    TOKEN_HEADS,
    UnitLosses,
    evaluating,
    find_head,
    forward_inputs,
    labelled_tokens,
    per_sample,
    unit_losses,
    unwrap,
    weighted_loss,
)

Batch = dict[str, Tensor]
SMALL_VOCABULARY = 23
LARGE = 30_500


def assert_same(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(autouse=True)
def keep_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' losses stay in float64: they call ``logits.float()``, which would round to 1e-7."""
    narrow = torch.Tensor.float

    def widen_only(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self.dtype == torch.float64 else narrow(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "float", widen_only)


# ---------------------------------------------------------------------------------------------------------------------
# Models and batches


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(cls: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """Draw every parameter, biases and norms too: what starts at 0 or 1 would not show whether it is used."""
    torch.manual_seed(0)
    model = cls(config).double().eval()
    state = generator()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=state, dtype=torch.float64))
    return model


def llama(vocabulary: int = SMALL_VOCABULARY, **kwargs: Any) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        **kwargs,
    )
    return build(LlamaForCausalLM, config)


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=SMALL_VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    return build(GPT2LMHeadModel, config)


def bert(cls: type[PreTrainedModel], vocabulary: int = SMALL_VOCABULARY, **kwargs: Any) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        **kwargs,
    )
    return build(cls, config)


def t5(vocabulary: int = SMALL_VOCABULARY) -> PreTrainedModel:
    config = T5Config(
        vocab_size=vocabulary, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return build(T5ForConditionalGeneration, config)


def qwen2_audio() -> PreTrainedModel:
    size = {"vocab_size": SMALL_VOCABULARY, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    text = {"model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 2, **size}
    audio = {"model_type": "qwen2_audio_encoder", "d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 2}
    config = Qwen2AudioConfig(
        audio_config={**audio, "encoder_ffn_dim": 16, "num_mel_bins": 4}, text_config=text, audio_token_index=1
    )
    return build(Qwen2AudioForConditionalGeneration, config)


def bart(
    vocabulary: int = SMALL_VOCABULARY, cls: type[PreTrainedModel] = BartForConditionalGeneration
) -> PreTrainedModel:
    config = BartConfig(
        vocab_size=vocabulary,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=512,
    )
    return build(cls, config)


def vit() -> PreTrainedModel:
    config = ViTConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=4,
    )
    return build(ViTForImageClassification, config)


def text_batch(
    vocabulary: int = SMALL_VOCABULARY, rows: int = 4, length: int = 7, classes: int | None = None
) -> Batch:
    """Rows with right padding, ignored labels in between, and a last row with ignored labels only."""
    state = generator(1)
    input_ids = torch.randint(3, vocabulary, (rows, length), generator=state)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -2:] = 0
    labels = (
        torch.randint(3, vocabulary, (rows, length), generator=state)
        if classes is None
        else (torch.randint(0, classes, (rows, length), generator=state))
    )
    labels[torch.rand(rows, length, generator=state) < 0.3] = -100
    labels[attention_mask == 0] = -100
    labels[0, :2] = 3 if classes is None else 0
    labels[-1] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def with_labels(labels: Any, dtype: torch.dtype = torch.int64) -> Batch:
    return {**text_batch(), "labels": torch.tensor(labels, dtype=dtype)}


def images() -> Batch:
    pixels = torch.randn(4, 1, 8, 8, generator=generator(1), dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 3, 1, 1])}


@dataclass(frozen=True)
class Case:
    """A model, a batch that it accepts, and its head."""

    build: Callable[[], PreTrainedModel]
    batch: Callable[[], Batch]
    head: str
    counts: tuple[int, ...] | None = None


def classification(counts: tuple[int, ...], labels: Any, dtype: torch.dtype = torch.int64, **kwargs: Any) -> Case:
    return Case(
        lambda: bert(BertForSequenceClassification, **kwargs),
        lambda: with_labels(labels, dtype),
        "sequence_classification",
        counts,
    )


float64 = torch.float64
three_by_four = [[0.5, -1.0, 2.0], [0.0, 0.25, 0.0], [1.0, 1.0, -3.0], [0.0, 2.0, 0.1]]
CASES = {
    "llama": Case(llama, text_batch, "causal_lm"),
    "gpt2": Case(gpt2, text_batch, "causal_lm"),
    "bert_mlm": Case(lambda: bert(BertForMaskedLM), text_batch, "masked_lm"),
    "t5": Case(t5, text_batch, "seq2seq_lm"),
    "bart": Case(bart, text_batch, "seq2seq_lm"),
    "qwen2_audio": Case(qwen2_audio, text_batch, "causal_lm"),  # named like an encoder-decoder, but it is none
    "token_classification": Case(
        lambda: bert(BertForTokenClassification, num_labels=5), lambda: text_batch(classes=5), "token_classification"
    ),
    "single_label": classification((1, 1, 0, 1), [0, 2, -100, 2], num_labels=3),
    "regression": classification((1, 1, 1, 1), [0.5, -1.0, 2.0, 0.0], float64, num_labels=1),
    "regression_in_a_column": classification((1, 1, 1, 1), [[0.5], [-1.0], [2.0], [0.0]], float64, num_labels=1),
    "regression_of_three": classification(
        (1, 1, 1, 1), three_by_four, float64, num_labels=3, problem_type="regression"
    ),
    "multi_label": classification(
        (1, 1, 1, 1), [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]], float64, num_labels=3
    ),
    "vit": Case(vit, images, "image_classification", (1, 1, 1, 1)),
}
TOKEN_CASES = [name for name, case in CASES.items() if case.head in TOKEN_HEADS]


@lru_cache
def case(name: str) -> tuple[PreTrainedModel, Batch, str]:
    chosen = CASES[name]
    return chosen.build(), chosen.batch(), chosen.head


def brute_force_token_losses(
    head: str, logits: Tensor, batch: Batch, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Loop over rows and positions, from the definitions: a causal LM predicts the next label, the others their own."""
    labels = batch["labels"]
    losses, counts = torch.zeros(labels.shape, dtype=torch.float64), torch.zeros_like(labels)
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1]):
            target = position + 1 if head == "causal_lm" else position
            if target == labels.shape[1] or labels[row, target] == -100:
                continue
            surprisal = -logits[row, position].double().log_softmax(0)
            of_label = surprisal[labels[row, target]]
            losses[row, position] = (1 - label_smoothing) * of_label + label_smoothing * surprisal.mean()
            counts[row, position] = 1
    return losses, counts


# ---------------------------------------------------------------------------------------------------------------------
# Exactness


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("name", CASES)
def test_mean_is_the_loss_of_the_model(name: str) -> None:
    model, batch = CASES[name].build(), CASES[name].batch()  # fresh: models write `problem_type` into their config
    before = {key: value.clone() for key, value in batch.items()}
    units = unit_losses(model, batch, "sample")
    expected = model(**batch).loss
    assert expected.item() > 0.1 and units.losses[units.valid].std() > 1e-2  # else nothing is compared
    assert_same(units.mean(), expected)

    actual_gradients, expected_gradients = gradients(model, units.mean()), gradients(model, expected)
    assert max(gradient.abs().max() for gradient in expected_gradients) > 1e-3
    for actual, expected_gradient in zip(actual_gradients, expected_gradients, strict=True):
        assert_same(actual, expected_gradient)

    # Now that the model has written its `problem_type`, and without gradients.
    with torch.no_grad():
        again = unit_losses(model, batch, "sample")
    assert_same(again.losses, units.losses)
    assert torch.equal(again.counts, units.counts)
    assert batch.keys() == before.keys() and all(torch.equal(batch[key], before[key]) for key in batch)


@pytest.mark.parametrize("name", CASES)
def test_loss_of_a_sample_is_its_loss_alone(name: str) -> None:
    model, batch, _ = case(name)
    units = unit_losses(model, batch, "sample")
    num = len(batch["labels"])
    assert units.losses.shape == units.counts.shape == (num,)
    assert units.counts.dtype == torch.int64 and units.losses.dtype == torch.float64
    if CASES[name].counts is not None:
        assert tuple(units.counts.tolist()) == CASES[name].counts
    assert units.valid.sum() >= 3
    for row in range(num):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        if units.counts[row] == 0:
            assert units.losses[row] == 0
        else:
            assert_same(units.losses[row], model(**alone).loss)


@pytest.mark.parametrize("name", TOKEN_CASES)
def test_token_losses_match_the_loop(name: str) -> None:
    model, batch, head = case(name)
    tokens = unit_losses(model, batch, "token")
    losses, counts = brute_force_token_losses(head, model(**batch).logits, batch)
    assert 0 < counts.sum() < counts.numel()
    assert_same(tokens.losses, losses)
    assert torch.equal(tokens.counts, counts)
    assert torch.equal(labelled_tokens(head, batch), counts > 0)
    assert torch.equal(tokens.valid, counts > 0)
    assert_same(tokens.mean(), model(**batch).loss)


@pytest.mark.parametrize("name", TOKEN_CASES)
def test_samples_total_what_their_tokens_total(name: str) -> None:
    model, batch, _ = case(name)
    tokens, samples = unit_losses(model, batch, "token"), unit_losses(model, batch, "sample")
    assert_same(samples.losses * samples.counts, tokens.losses.sum(1))
    assert torch.equal(samples.counts, tokens.counts.sum(1))
    assert_same(samples.mean(), tokens.mean())
    assert_same(per_sample(tokens).losses, samples.losses)


@pytest.mark.parametrize("name", TOKEN_CASES)
def test_row_with_ignored_labels_only_is_empty(name: str) -> None:
    model, batch, _ = case(name)
    assert (batch["labels"][-1] == -100).all()
    samples = unit_losses(model, batch, "sample")
    assert samples.losses[-1] == 0 and samples.counts[-1] == 0 and not samples.valid[-1]
    without = {key: value[:-1] for key, value in batch.items()}
    assert_same(samples.mean(), unit_losses(model, without, "sample").mean())

    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    for granularity in ("sample", "token"):
        units = unit_losses(model, nothing, granularity)
        assert not units.losses.any() and not units.counts.any()
        assert units.mean() == 0 and all(not gradient.any() for gradient in gradients(model, units.mean()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sum_over_the_items_of_the_optimizer_step(name: str) -> None:
    """The Trainer divides by the labels of all micro-batches; so can a sum of unit losses."""
    model, batch, _ = case(name)
    units = unit_losses(model, batch, "sample")
    expected = model(**batch, num_items_in_batch=torch.tensor(41)).loss
    assert abs(expected - units.mean()) > 1e-2
    assert_same((units.losses * units.counts).sum() / 41, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Label smoothing, shifted labels, packed rows


@pytest.mark.parametrize("name", ["llama", "bert_mlm", "t5", "token_classification"])
def test_label_smoothing_of_tokens(name: str) -> None:
    model, batch, head = case(name)
    outputs = model(**batch)
    tokens = unit_losses(model, batch, "token", label_smoothing=0.2)
    assert_same(tokens.losses, brute_force_token_losses(head, outputs.logits, batch, label_smoothing=0.2)[0])
    assert abs(tokens.mean() - outputs.loss) > 1e-3
    # The label smoother sums in float32.
    smoothed = LabelSmoother(epsilon=0.2)(outputs, batch["labels"], shift_labels=head == "causal_lm")
    assert_same(tokens.mean(), smoothed, atol=1e-6)
    assert_same(unit_losses(model, batch, "sample", label_smoothing=0.2).mean(), tokens.mean())


@pytest.mark.parametrize("name", ["single_label", "vit"])
def test_label_smoothing_of_classification(name: str) -> None:
    model, batch, _ = case(name)
    outputs = model(**batch)
    samples = unit_losses(model, batch, "sample", label_smoothing=0.2)
    surprisal = -outputs.logits.detach().log_softmax(1)
    for row, label in enumerate(batch["labels"].tolist()):
        expected = 0.0 if label == -100 else 0.8 * surprisal[row, label] + 0.2 * surprisal[row].mean()
        assert samples.losses[row].item() == pytest.approx(float(expected), abs=1e-10)
    assert abs(samples.mean() - outputs.loss) > 1e-3
    assert_same(samples.mean(), LabelSmoother(epsilon=0.2)(outputs, batch["labels"]), atol=1e-6)


@pytest.mark.parametrize("name", ["regression", "regression_of_three", "multi_label"])
def test_label_smoothing_is_for_class_labels(name: str) -> None:
    model, batch, _ = case(name)
    smoothed = unit_losses(model, batch, "sample", label_smoothing=0.2)
    assert_same(smoothed.losses, unit_losses(model, batch, "sample").losses)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shifted_labels_in_the_batch(name: str) -> None:
    """Sequence parallelism ships labels that are already shifted, beside or instead of ``labels``."""
    model, batch, head = case(name)
    shifted = torch.full_like(batch["labels"], -100)
    shifted[:, :-1] = batch["labels"][:, 1:]
    shifted[0, -1] = 5  # the shard's last position predicts the first label of the next shard
    batch = {**batch, "shift_labels": shifted}
    tokens = unit_losses(model, batch, "token")
    assert tokens.counts[0, -1] == 1 and torch.equal(labelled_tokens(head, batch), shifted != -100)
    assert_same(tokens.mean(), model(**batch).loss)
    labels = batch.pop("labels")
    assert_same(unit_losses(model, batch, "token").losses, tokens.losses)
    not_shifted = unit_losses(model, {**batch, "shift_labels": labels}, "token")
    assert (not_shifted.losses - tokens.losses).abs().max() > 1e-2


def test_packed_rows() -> None:
    """Two sequences in one row, told apart by their positions, are attended to and scored like each alone."""
    model = llama(use_cache=False)  # as the Trainer sets it; with a cache transformers does not look for packed rows
    first, second = torch.tensor([[5, 9, 3, 7]]), torch.tensor([[8, 4, 11]])
    packed = {
        "input_ids": torch.cat([first, second], 1),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
        "labels": torch.cat([first, second.masked_fill(torch.arange(3) == 0, -100)], 1),
    }
    tokens = unit_losses(model, packed, "token")
    assert_same(tokens.mean(), model(**packed).loss)
    alone = [unit_losses(model, {"input_ids": ids, "labels": ids}, "token") for ids in (first, second)]
    assert_same(tokens.losses, torch.cat([units.losses for units in alone], 1))
    assert tokens.counts.tolist() == [[1, 1, 1, 0, 1, 1, 0]]
    plain = {key: value for key, value in packed.items() if key != "position_ids"}
    assert (unit_losses(model, plain, "token").losses - tokens.losses).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Wrappers, precision, cost


def lora(model: PreTrainedModel, **kwargs: Any) -> nn.Module:
    """Wrap with random adapters; they start at 0, where they would not show."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, task_type=TaskType.CAUSAL_LM, **kwargs)).double().eval()
    state, num = generator(2), 0
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=state, dtype=torch.float64))
                num += "lora" in name
    assert num > 0
    return wrapped


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_through_peft() -> None:
    plain, batch, _ = case("llama")
    model = lora(llama(), target_modules=["q_proj", "v_proj"])
    assert type(model).__name__ == "PeftModelForCausalLM" and type(unwrap(model)) is LlamaForCausalLM
    units = unit_losses(model, batch, "sample")
    assert_same(units.mean(), model(**batch).loss)
    assert abs(units.mean() - plain(**batch).loss) > 1e-3  # the adapters count
    gradient = torch.cat([g.flatten() for g in gradients(model, units.mean())])
    assert gradient.abs().max() > 1e-4
    assert_same(gradient, torch.cat([g.flatten() for g in gradients(model, model(**batch).loss)]))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["llama", "t5", "single_label"])
def test_through_ddp(name: str) -> None:
    inner, batch, head = CASES[name].build(), CASES[name].batch(), CASES[name].head
    model = DistributedDataParallel(inner)
    assert unwrap(model) is inner and find_head(model) == head
    units = unit_losses(model, batch, "sample")
    expected = gradients(inner, inner(**batch).loss)
    units.mean().backward()  # through DDP's own hooks
    for parameter, gradient in zip(inner.parameters(), expected, strict=True):
        assert_same(parameter.grad, gradient)
    assert max(gradient.abs().max() for gradient in expected) > 1e-3
    assert_same(units.mean(), inner(**batch).loss)


@pytest.mark.usefixtures("process_group")
def test_through_ddp_and_peft() -> None:
    inner = lora(llama(), target_modules=["q_proj"])
    model, batch = DistributedDataParallel(inner), text_batch()
    assert type(unwrap(model)) is LlamaForCausalLM and find_head(model) == "causal_lm"
    assert_same(unit_losses(model, batch, "token").mean(), inner(**batch).loss)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_logits_are_scored_in_float32(name: str) -> None:
    model, head = CASES[name].build().bfloat16(), CASES[name].head
    batch = {
        key: value.bfloat16()
        if key == "pixel_values"
        else value.to(torch.float32)
        if value.is_floating_point()
        else value
        for key, value in CASES[name].batch().items()
    }
    units = unit_losses(model, batch, "sample")
    assert units.losses.dtype == units.mean().dtype == torch.float32
    assert (units.losses != units.losses.bfloat16()).any()  # not a half-precision loss in a wider type
    logits = model(**forward_inputs(model, head, batch)).logits
    assert logits.dtype == torch.bfloat16
    if head in TOKEN_HEADS:
        expected = brute_force_token_losses(head, logits.double(), batch)[0]
        assert_same(unit_losses(model, batch, "token").losses.double(), expected, atol=1e-5)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_costs_one_forward_pass(name: str, gradient: bool) -> None:
    model, batch, head = case(name)
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(gradient):
        for granularity in ("sample", "token") if head in TOKEN_HEADS else ("sample",):
            calls.clear()
            units = unit_losses(model, batch, granularity)
            assert len(calls) == 1 and units.losses.requires_grad is gradient
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "bert_mlm", "t5", "vit"])
def test_tuples_as_outputs(name: str) -> None:
    model, batch, _ = case(name)
    as_tuple = {**batch, "return_dict": False}
    assert isinstance(model(**as_tuple), tuple)
    assert_same(unit_losses(model, as_tuple, "sample").losses, unit_losses(model, batch, "sample").losses)


# ---------------------------------------------------------------------------------------------------------------------
# UnitLosses


def test_mean_of_kept_units_by_hand() -> None:
    losses = torch.tensor([1.0, 4.0, 0.0, 2.0], requires_grad=True)
    units = UnitLosses(losses, torch.tensor([3, 1, 0, 2]))
    assert units.valid.tolist() == [True, True, False, True]
    assert units.mean().item() == pytest.approx((3 + 4 + 4) / 6)
    kept = units.mean(torch.tensor([True, False, True, True]))
    assert kept.item() == pytest.approx(7 / 5)
    torch.testing.assert_close(torch.autograd.grad(kept, losses)[0], torch.tensor([0.6, 0.0, 0.0, 0.4]))
    assert units.mean(torch.tensor([False, False, True, False])).item() == 0
    assert units.mean(torch.zeros(4, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_mean_does_not_see_units_that_are_not_kept(bad: float) -> None:
    losses = torch.tensor([1.0, bad, bad, 3.0], requires_grad=True)
    units = UnitLosses(losses, torch.tensor([1, 1, 0, 1]))
    kept = units.mean(torch.tensor([True, False, True, True]))
    assert kept.item() == 2
    assert torch.autograd.grad(kept, losses)[0].tolist() == [0.5, 0, 0, 0.5]
    assert not units.mean().isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# Heads and the user's own loss


class RenamedForCausalLM(LlamaForCausalLM):
    """In no auto class: known by the loss that transformers derives from its name."""


@pytest.mark.parametrize("name", CASES)
def test_find_head(name: str) -> None:
    model, _, head = case(name)
    assert find_head(model) == head


def test_find_head_of_other_models() -> None:
    assert find_head(RenamedForCausalLM(case("llama")[0].config)) == "causal_lm"
    assert find_head(lora(llama(), target_modules=["q_proj"])) == "causal_lm"
    assert find_head(BertModel(case("bert_mlm")[0].config)) is None
    assert find_head(BertForQuestionAnswering(case("bert_mlm")[0].config)) is None
    assert find_head(nn.Linear(2, 2)) is None


def test_heads_with_another_loss_than_their_kind_are_not_known() -> None:
    """BART's decoder alone is listed as a causal LM, and does not shift labels in its own loss."""
    model, batch = bart(cls=BartForCausalLM), text_batch()
    outputs = model(**batch)
    losses, counts = brute_force_token_losses("causal_lm", outputs.logits.detach(), batch)
    assert abs(losses.sum() / counts.sum() - outputs.loss) > 1e-3
    assert find_head(model) is None
    with pytest.raises(ValueError, match="The loss of each sample of `BartForCausalLM` is not known"):
        unit_losses(model, batch, "sample")


def test_unknown_head_is_refused() -> None:
    model = bert(BertForQuestionAnswering)
    message = (
        r"The loss of each sample of `BertForQuestionAnswering` is not known; known heads: causal_lm, .*"
        r"token_classification\. Pass `compute_sample_losses=`"
    )
    with pytest.raises(ValueError, match=message):
        unit_losses(model, text_batch(), "sample")


@pytest.mark.parametrize("name", ["vit", "single_label"])
def test_tokens_of_a_head_without_tokens_are_refused(name: str) -> None:
    model, batch, _ = case(name)
    message = (
        rf"`{type(model).__name__}` does not predict tokens, so it cannot be selected from at `granularity='token'`; "
        r"heads that can: causal_lm, masked_lm, seq2seq_lm, token_classification\. Use `granularity='sample'`"
    )
    with pytest.raises(ValueError, match=message):
        unit_losses(model, batch, "token")


def test_users_own_losses() -> None:
    model = bert(BertForQuestionAnswering)
    batch = {
        **text_batch(),
        "start_positions": torch.tensor([0, 1, 2, 3]),
        "end_positions": torch.tensor([1, 4, 2, 6]),
    }
    del batch["labels"]

    def span_losses(model: nn.Module, batch: Batch) -> Tensor:
        outputs = model(**batch)
        start = F.cross_entropy(outputs.start_logits, batch["start_positions"], reduction="none")
        return (start + F.cross_entropy(outputs.end_logits, batch["end_positions"], reduction="none")) / 2

    units = unit_losses(model, batch, "sample", compute_sample_losses=span_losses)
    assert units.counts.tolist() == [1, 1, 1, 1]
    assert_same(units.mean(), model(**batch).loss)
    assert max(gradient.abs().max() for gradient in gradients(model, units.mean())) > 1e-3


def test_users_own_losses_replace_those_of_the_head() -> None:
    model, batch, _ = case("llama")
    units = unit_losses(model, batch, "sample", compute_sample_losses=lambda *_: torch.arange(4.0))
    assert units.losses.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("granularity", "losses", "message"),
    [
        ("token", torch.zeros(4), r"cannot serve `granularity='token'`. Use `granularity='sample'`"),
        ("sample", torch.tensor(1.0), r"must return a tensor of shape \(n,\), got \(\)"),
        ("sample", torch.zeros(4, 7), r"must return a tensor of shape \(n,\), got \(4, 7\)"),
        ("sample", [0.0] * 4, r"must return a tensor of shape \(n,\), got list"),
    ],
)
def test_users_own_losses_are_checked(granularity: str, losses: Any, message: str) -> None:
    model, batch, _ = case("llama")
    with pytest.raises(ValueError, match=message):
        unit_losses(model, batch, granularity, compute_sample_losses=lambda *_: losses)


def test_decoder_inputs_are_derived_or_kept() -> None:
    model, batch, head = case("t5")
    inputs = forward_inputs(model, head, batch)
    assert "labels" not in inputs
    expected = torch.cat([torch.zeros(4, 1, dtype=torch.int64), batch["labels"][:, :-1].clamp(min=0)], 1)
    assert torch.equal(inputs["decoder_input_ids"], expected)
    given = {**batch, "decoder_input_ids": torch.full_like(batch["labels"], 4)}
    assert torch.equal(forward_inputs(model, head, given)["decoder_input_ids"], given["decoder_input_ids"])
    assert_same(unit_losses(model, given, "token").mean(), model(**given).loss)
    assert abs(unit_losses(model, given, "token").mean() - model(**batch).loss) > 1e-3


def test_decoder_that_derives_its_inputs_itself() -> None:
    """M2M100 and Blenderbot shift the labels inside their forward pass and offer no function for it."""
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "dropout": 0.0}
    size |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "attention_dropout": 0.0}
    for vocabulary in (SMALL_VOCABULARY, LARGE):
        model = M2M100ForConditionalGeneration(M2M100Config(vocab_size=vocabulary, **size)).double().eval()
        batch = text_batch()
        assert find_head(model) == "seq2seq_lm" and "labels" in forward_inputs(model, "seq2seq_lm", batch)
        with torch.no_grad():
            assert_same(unit_losses(model, batch, "token").mean(), model(**batch).loss)


def test_virtual_tokens_are_refused() -> None:
    message = (
        r"The logits have \(4, 10\) positions and the `labels` \(4, 7\).*Virtual tokens .* not supported; LoRA is"
    )
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    for vocabulary in (SMALL_VOCABULARY, LARGE):
        model = get_peft_model(llama(vocabulary), config).double()
        for gradient in (True, False):
            with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match=message):
                unit_losses(model, text_batch(), "token")


def test_evaluating_restores_the_flag_of_each_module() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)))
    model[1].eval()
    model[1][1].train()
    before = [module.training for module in model.modules()]
    assert before == [True, True, False, False, True]
    x = torch.ones(3, 2)
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(x), model[1][1](x))
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == before


# ---------------------------------------------------------------------------------------------------------------------
# Large vocabularies


class LargestTensor(TorchDispatchMode):
    """Watch every operation below autograd, and remember the size of the largest result."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        return result


MOST = 8 * 2**20  # logits that may exist at a time, written out
ROWS, LENGTH = 2, 150


def large_batch() -> Batch:
    return text_batch(LARGE, ROWS, LENGTH)


def gemma(**kwargs: Any) -> PreTrainedModel:
    config = Gemma2Config(
        vocab_size=LARGE,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=512,
        attn_implementation="eager",
        **kwargs,
    )
    return build(Gemma2ForCausalLM, config)


def cohere(logit_scale: float) -> PreTrainedModel:
    config = CohereConfig(
        vocab_size=LARGE,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        logit_scale=logit_scale,
    )
    return build(CohereForCausalLM, config)


def bart_with_bias() -> PreTrainedModel:
    model = bart(LARGE)
    model.final_logits_bias.normal_(generator=generator(3))
    return model


LARGE_MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama(LARGE),
    "llama_tied": lambda: llama(LARGE, tie_word_embeddings=True),
    "bert_mlm": lambda: bert(BertForMaskedLM, LARGE),
    "t5": lambda: t5(LARGE),
    "bart": lambda: bart(LARGE),
    "lora_lm_head": lambda: lora(llama(LARGE), target_modules=["q_proj", "lm_head"]),
    "saved_lm_head": lambda: lora(llama(LARGE), target_modules=["q_proj"], modules_to_save=["lm_head"]),
}
POSTPROCESSING_MODELS: dict[str, Callable[[], nn.Module]] = {
    "gemma2": lambda: gemma(final_logit_softcapping=2.0),
    "cohere": lambda: cohere(logit_scale=0.25),
    "bart_with_bias": bart_with_bias,
}


@lru_cache
def large(name: str) -> nn.Module:
    model = (LARGE_MODELS | POSTPROCESSING_MODELS)[name]()
    with torch.no_grad():
        unit_losses(model, text_batch(LARGE, 2, 4), "token")  # finds out whether chunks can be scored
    return model


def whole(model: nn.Module, batch: Batch, granularity: str = "token", **kwargs: Any) -> UnitLosses:
    """With the logits of the whole batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses_module, "LARGE_VOCABULARY", LARGE + 1)
        return unit_losses(model, batch, granularity, **kwargs)


def test_large_vocabulary_is_one() -> None:
    assert LARGE >= LARGE_VOCABULARY > SMALL_VOCABULARY and ROWS * LENGTH * LARGE > MOST


@pytest.mark.parametrize("name", LARGE_MODELS)
def test_large_vocabulary_is_scored_in_chunks(name: str) -> None:
    model, batch = large(name), large_batch()
    with LargestTensor() as materialised:
        expected = whole(model, batch)
    assert materialised.numel >= ROWS * LENGTH * LARGE  # else the next assertions on sizes are vacuous
    with LargestTensor() as without_gradients, torch.no_grad():
        tokens = unit_losses(model, batch, "token")
    with LargestTensor() as with_gradients:
        trained = unit_losses(model, batch, "token")
        actual_gradients = gradients(model, trained.mean())
    assert LARGE <= without_gradients.numel <= MOST
    assert LARGE <= with_gradients.numel <= MOST

    assert expected.losses.requires_grad and trained.losses.requires_grad and not tokens.losses.requires_grad
    assert expected.losses[expected.valid].std() > 1e-2
    assert_same(trained.losses, expected.losses)
    assert_same(tokens.losses, expected.losses.detach())
    assert torch.equal(tokens.counts, expected.counts) and torch.equal(trained.counts, expected.counts)
    expected_gradients = gradients(model, expected.mean())
    assert max(gradient.abs().max() for gradient in expected_gradients) > 1e-3
    for actual, expected_gradient in zip(actual_gradients, expected_gradients, strict=True):
        assert_same(actual, expected_gradient)
    with torch.no_grad():
        assert_same(unit_losses(model, batch, "sample").losses, per_sample(expected).losses.detach())
        assert_same(tokens.mean(), model(**batch).loss)


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_large_vocabulary_can_be_differentiated_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_vocabulary, "CHUNK", 16 * LARGE)
    monkeypatch.setattr(large_vocabulary, "MIN_ROWS", 1)
    model, batch = large(name), text_batch(LARGE, ROWS, 20)
    results = []
    for compute in (whole, unit_losses):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            losses = compute(model, batch, "sample", label_smoothing=0.1).losses
            parameters = list(model.parameters())
            first = torch.autograd.grad(losses.square().sum(), parameters, create_graph=True)
            along = sum((g * p.detach().cos()).sum() for g, p in zip(first, parameters, strict=True))
            second = torch.autograd.grad(along, parameters, retain_graph=True)
            again = torch.autograd.grad(along, parameters)
        assert all(torch.equal(a, b) for a, b in zip(second, again, strict=True))
        results.append(second)
    assert max(action.abs().max() for action in results[0]) > 1e-3
    for expected, actual in zip(*results, strict=True):
        assert_same(actual, expected)


def test_large_vocabulary_repeats_dropout_of_the_output_embedding() -> None:
    """Of adapters: a chunk that is computed again must draw the same mask."""
    model = lora(llama(LARGE), target_modules=["lm_head"], lora_dropout=0.5).train()
    batch = large_batch()
    with torch.no_grad():
        unit_losses(model, batch, "token")
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.manual_seed(4)
    losses = unit_losses(model, batch, "sample").losses
    state = torch.get_rng_state()
    actual = torch.autograd.grad(losses.sum(), adapters)
    assert torch.equal(torch.get_rng_state(), state)
    step, slope = 1e-5, sum(float((g * g).sum()) for g in actual)
    assert slope > 1e-3
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, gradient in zip(adapters, actual, strict=True):
                parameter.add_(gradient, alpha=sign * step)
            torch.manual_seed(4)
            moved.append(float(unit_losses(model, batch, "sample").losses.sum()))
            for parameter, gradient in zip(adapters, actual, strict=True):
                parameter.sub_(gradient, alpha=sign * step)
    assert abs((moved[0] - moved[1]) / (2 * step) - slope) < 1e-5 * slope


def test_large_vocabulary_computes_only_the_output_embedding_again() -> None:
    model, batch = llama(LARGE), large_batch()
    with torch.no_grad():
        unit_losses(model, batch, "token")
    layers, rows, forward = [], [], model.lm_head.forward
    model.model.layers[0].register_forward_pre_hook(lambda *_: layers.append(1))

    def counted(hidden: Tensor) -> Tensor:
        rows.append(hidden.shape[:-1].numel())
        return forward(hidden)

    model.lm_head.forward = counted
    losses = unit_losses(model, batch, "sample").losses
    per_chunk = MOST // LARGE
    chunks = [per_chunk, ROWS * LENGTH - per_chunk]
    assert len(layers) == 1 and rows == [ROWS, *chunks]  # first the first position of every row
    losses.sum().backward()
    assert len(layers) == 1 and sorted(rows[3:]) == sorted(chunks)
    assert vars(model.lm_head)["forward"] is counted


def test_parts_of_the_output_embeddings_are_all_in_play() -> None:
    """The premises of the cases above: a bias, shared weights, adapters that matter."""
    decoder = large("bert_mlm").get_output_embeddings()
    assert decoder.bias.abs().max() > 0.1
    assert large("t5").lm_head.weight is large("t5").shared.weight
    assert large("llama_tied").lm_head.weight is large("llama_tied").model.embed_tokens.weight
    batch = large_batch()
    with torch.no_grad():
        for name in ("lora_lm_head", "saved_lm_head"):
            model = large(name)
            with model.disable_adapter():
                plain = unit_losses(model, batch, "token").mean()
            assert abs(plain - unit_losses(model, batch, "token").mean()) > 1e-2


@pytest.mark.parametrize("name", ["llama", "bert_mlm"])
def test_large_vocabulary_with_label_smoothing(name: str) -> None:
    model, batch = large(name), large_batch()
    expected = whole(model, batch, label_smoothing=0.2).mean()
    actual = unit_losses(model, batch, "token", label_smoothing=0.2).mean()
    assert_same(actual, expected)
    for of_actual, of_expected in zip(gradients(model, actual), gradients(model, expected), strict=True):
        assert_same(of_actual, of_expected)


def test_large_vocabulary_with_shifted_labels() -> None:
    model, batch = large("llama"), large_batch()
    batch["shift_labels"] = batch.pop("labels")
    expected = whole(model, batch)
    with torch.no_grad():
        tokens = unit_losses(model, batch, "token")
    assert_same(tokens.losses, expected.losses.detach())
    assert torch.equal(tokens.counts, expected.counts)


def test_large_vocabulary_in_half_precision() -> None:
    model = llama(LARGE).bfloat16()
    batch = large_batch()
    expected = whole(model, batch).losses.detach()
    with torch.no_grad():
        losses = unit_losses(model, batch, "token").losses
    assert losses.dtype == expected.dtype == torch.float32
    assert_same(losses, expected, atol=1e-2)
    assert (losses != losses.bfloat16()).any()


def join(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("name", ["llama", "bert_mlm", "t5"])
def test_large_vocabulary_in_mixed_precision(name: str) -> None:
    """Accelerate puts autocast around the forward pass alone, and what reaches the output embedding may be bfloat16."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, batch = accelerator.prepare_model(LARGE_MODELS[name]().to(torch.float32)), large_batch()
    with torch.no_grad():
        tokens = unit_losses(model, batch, "token")
        expected = whole(model, batch)
    assert tokens.losses.dtype == expected.losses.dtype == torch.float32
    # The same bfloat16 logits: the losses are mostly equal, which those of float32 logits would not be.
    assert (tokens.losses == expected.losses)[expected.valid].double().mean() > 0.9
    assert_same(tokens.losses, expected.losses, atol=0.1)
    assert not torch.is_autocast_enabled("cpu")

    trained, expected = unit_losses(model, batch, "token"), whole(model, batch)
    assert (trained.losses == expected.losses)[expected.valid].double().mean() > 0.9
    actual, by_all_logits = (join(gradients(model, units.mean())) for units in (trained, expected))
    assert actual.dtype == torch.float32 and actual.isfinite().all()
    # In bfloat16 sums over chunks are rounded more often than one sum.
    assert (actual - by_all_logits).norm() < 0.02 * by_all_logits.norm()
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.usefixtures("process_group")
def test_large_vocabulary_through_ddp() -> None:
    inner, batch = large("llama"), large_batch()
    model = DistributedDataParallel(inner)
    with LargestTensor() as sizes, torch.no_grad():
        tokens = unit_losses(model, batch, "token")
    assert sizes.numel <= MOST
    with torch.no_grad():
        assert_same(tokens.mean(), inner(**batch).loss)
    try:
        with LargestTensor() as sizes:
            unit_losses(model, batch, "token").mean().backward()
        assert sizes.numel <= MOST
        for actual, expected in zip(inner.parameters(), gradients(inner, whole(inner, batch).mean()), strict=True):
            assert_same(actual.grad, expected)
    finally:
        inner.zero_grad()


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("name", LARGE_MODELS)
def test_large_vocabulary_costs_one_forward_pass(name: str, gradient: bool) -> None:
    model, batch, calls = LARGE_MODELS[name](), text_batch(LARGE), []  # a fresh model: nothing is known of its head
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(gradient):
        for expected in (1, 2):
            unit_losses(model, batch, "token")
            assert len(calls) == expected


@pytest.mark.parametrize("name", POSTPROCESSING_MODELS)
def test_logits_that_are_processed_further_are_exact(name: str) -> None:
    """Caps, scales and biases after the output embedding are the model's own; only its forward pass knows them."""
    model, batch = POSTPROCESSING_MODELS[name](), text_batch(LARGE, 2, 20)
    with torch.no_grad():
        outputs = model(**batch)
        bare = F.linear(_hidden(model, batch), model.get_output_embeddings().weight)
    assert (bare - outputs.logits).abs().max() > 1e-2  # something does happen after the output embedding
    expected = whole(model, batch).losses.detach()
    for gradient in (False, True, False):
        model = POSTPROCESSING_MODELS[name]()
        for _ in range(2):  # found out in the first call, remembered in the second
            with torch.set_grad_enabled(gradient):
                tokens = unit_losses(model, batch, "token")
            assert_same(tokens.losses, expected)
            assert_same(tokens.mean(), outputs.loss)


def _hidden(model: nn.Module, batch: Batch) -> Tensor:
    inputs: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(**batch)
    handle.remove()
    return inputs[0]


@pytest.mark.parametrize(("gradient", "expected"), [(False, (2, 3, 4)), (True, (1, 2, 3))])
def test_logits_that_are_processed_further_cost_one_forward_pass_more_once(gradient: bool, expected: tuple) -> None:
    """Without gradients; with them not even that, since a second pass would draw other dropout masks."""
    model, batch, calls = gemma(final_logit_softcapping=2.0), text_batch(LARGE, 2, 20), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(gradient):
        for num in expected:
            unit_losses(model, batch, "token")
            assert len(calls) == num


def weights_for(counts: Tensor) -> Tensor:
    """One for each unit, some of them zero."""
    weights = torch.rand(counts.shape, generator=generator(5), dtype=torch.float64)
    return weights * (weights > 0.3) * (counts > 0)


@pytest.mark.parametrize("name", [*CASES, *LARGE_MODELS, *POSTPROCESSING_MODELS])
def test_weighted_loss_is_the_sum_of_weighted_losses(name: str) -> None:
    """Of the mean and of any coefficients, at both granularities, without another pass, and again after the first call."""
    known = name in CASES
    model, batch = (CASES[name].build(), CASES[name].batch()) if known else (large(name), text_batch(LARGE, ROWS, 40))
    for granularity in ("sample", "token") if find_head(model) in TOKEN_HEADS else ("sample",):
        expected = (unit_losses if known else whole)(model, batch, granularity, label_smoothing=0.1)
        total = (expected.losses * weights_for(expected.counts)).sum()
        for coefficients, wanted in ((weights_for, total), (None, expected.mean())):
            calls: list[int] = []
            handle = model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            with LargestTensor() as watched:
                actual, units = weighted_loss(model, batch, granularity, coefficients, label_smoothing=0.1)
                actual_gradients = gradients(model, actual)
            handle.remove()
            assert len(calls) == 1 and not units.losses.requires_grad and actual.ndim == 0
            assert name not in LARGE_MODELS or watched.numel <= MOST
            assert_same(actual, wanted)
            assert_same(units.losses, expected.losses.detach())
            assert torch.equal(units.counts, expected.counts)
            for got, gradient in zip(actual_gradients, gradients_of(model, wanted), strict=True):
                assert_same(got, gradient)


def gradients_of(model: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kwargs = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    return list(torch.autograd.grad(loss, parameters, **kwargs))


@pytest.mark.parametrize("name", LARGE_MODELS)
def test_weighted_loss_of_a_model_that_is_new(name: str) -> None:
    """The first call with gradients has all logits at once; it must give the same."""
    batch, results = text_batch(LARGE, ROWS, 20), []
    model = LARGE_MODELS[name]()
    for _ in range(2):
        total, units = weighted_loss(model, batch, "sample", weights_for)
        results.append((total.detach(), units.losses, gradients(model, total)))
    (first, first_losses, first_gradients), (second, second_losses, second_gradients) = results
    assert_same(first, second)
    assert_same(first_losses, second_losses)
    for one, other in zip(first_gradients, second_gradients, strict=True):
        assert_same(one, other)


def test_weighted_loss_of_the_users_own_losses() -> None:
    model, batch = CASES["llama"].build(), CASES["llama"].batch()

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        return model(input_ids=batch["input_ids"]).logits.square().mean((1, 2))

    coefficients = torch.arange(len(batch["labels"]), dtype=torch.float64)
    total, units = weighted_loss(model, batch, "sample", lambda counts: coefficients, compute_sample_losses=losses)
    assert_same(total, (losses(model, batch) * coefficients).sum())
    assert_same(units.losses, losses(model, batch).detach())
    with pytest.raises(ValueError, match="one loss per sample"):
        weighted_loss(model, batch, "token", compute_sample_losses=losses)


def test_weighted_loss_in_mixed_precision() -> None:
    model, batch = LARGE_MODELS["llama"]().to(torch.float32), text_batch(LARGE, ROWS, 20)
    with torch.no_grad():
        unit_losses(model, batch, "token")
    results = []
    for compute in ("units", "weighted"):
        with torch.autocast("cpu", torch.bfloat16):
            if compute == "units":
                units = unit_losses(model, batch, "sample")
                total = (units.losses * weights_for(units.counts).to(torch.float32)).sum()
            else:
                total, _ = weighted_loss(model, batch, "sample", weights_for)
        results.append((total, gradients(model, total)))
    (expected, wanted), (actual, found) = results
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    assert max(gradient.abs().max() for gradient in wanted) > 1e-3
    for got, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=0.02 * max(1e-6, float(gradient.abs().max())))


class OwnHeadForCausalLM(LlamaForCausalLM):
    """Reads the weights of its output embedding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor]:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return (F.linear(hidden, self.lm_head.weight),)


def test_output_embedding_that_is_not_called() -> None:
    called, batch = llama(LARGE), text_batch(LARGE, 2, 20)
    expected = whole(called, batch).losses.detach()
    for gradient in (True, False):
        model, calls = OwnHeadForCausalLM(called.config).double(), []
        model.load_state_dict(called.state_dict())
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with torch.set_grad_enabled(gradient):
            for num in (1, 2, 3) if gradient else (2, 3, 4):
                assert_same(unit_losses(model, batch, "token").losses.detach(), expected)
                assert len(calls) == num


@pytest.mark.parametrize("start", [1e-3, 0.0])
@pytest.mark.parametrize("gradient", [False, True])
def test_cap_is_noticed_where_it_hardly_bends_the_logits(start: float, gradient: bool) -> None:
    """A model trained from scratch starts with logits near 0, where the cap is almost the identity, or at 0; later it is not."""
    model, batch = gemma(final_logit_softcapping=2.0), text_batch(LARGE, 2, 20)
    embedding = model.get_output_embeddings().weight
    trained = embedding.detach().clone()
    with torch.no_grad():
        embedding.mul_(start)
        bare = F.linear(_hidden(model, batch), embedding)
        torch.testing.assert_close(model(**batch).logits, bare, rtol=1e-5, atol=1e-8)  # the same, to allclose
        with torch.set_grad_enabled(gradient):
            unit_losses(model, batch, "token")
        embedding.copy_(trained)
        expected = model(**batch).loss
        assert abs(expected - token_mean_without_cap(model, batch)) > 1e-2
        assert_same(unit_losses(model, batch, "token").mean(), expected)


def token_mean_without_cap(model: nn.Module, batch: Batch) -> Tensor:
    logits = F.linear(_hidden(model, batch), model.get_output_embeddings().weight)
    losses, counts = brute_force_token_losses("causal_lm", logits, batch)
    return losses.sum() / counts.sum()


class Interrupted(Exception):
    pass


def test_output_embedding_is_restored() -> None:
    model, batch = llama(LARGE), text_batch(LARGE)
    layer = model.get_output_embeddings()
    with torch.no_grad():
        before = model(**batch).logits
        unit_losses(model, batch, "token")
        assert "forward" not in vars(layer)

        def interrupt(*_: Any) -> None:
            assert "forward" in vars(layer)  # it is interrupted while patched
            raise Interrupted

        handle = layer.register_forward_hook(interrupt)
        with pytest.raises(Interrupted):
            unit_losses(model, batch, "token")
        handle.remove()
        assert "forward" not in vars(layer)
        assert_same(model(**batch).logits, before)


def test_forward_of_the_instance_is_used_and_restored() -> None:
    """Accelerate's hooks and autocast put their own ``forward`` on the instance."""
    model, batch = llama(LARGE), text_batch(LARGE)
    layer = model.get_output_embeddings()
    plain = unit_losses(model, batch, "token").losses.detach()
    original = layer.forward

    def doubled(hidden: Tensor) -> Tensor:
        return 2 * original(hidden)

    layer.forward = doubled
    expected = unit_losses(model, batch, "token").losses.detach()
    assert (expected - plain).abs().max() > 1e-2
    with torch.no_grad():
        assert_same(unit_losses(model, batch, "token").losses, expected)
        assert vars(layer)["forward"] is doubled
        handle = layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            unit_losses(model, batch, "token")
        handle.remove()
        assert vars(layer)["forward"] is doubled
