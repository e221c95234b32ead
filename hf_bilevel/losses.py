"""The loss of every sample or token of a batch, for the heads that Trainer users train."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto import modeling_auto

from hf_bilevel.large_vocabulary import IGNORE_INDEX, token_losses, weighted_token_losses

LARGE_VOCABULARY = 30_000
"""From this many classes on, the logits of a whole batch never exist at once."""

TOKEN_HEADS = ("causal_lm", "masked_lm", "seq2seq_lm", "token_classification")
LM_HEADS = ("causal_lm", "masked_lm", "seq2seq_lm")
CLASSIFICATION_HEADS = ("sequence_classification", "image_classification")

# Order matters: transformers lists BartForConditionalGeneration as a masked LM too, and XLM's head, which does not
# shift labels, as a causal LM too.
_HEAD_NAMES = {
    "seq2seq_lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked_lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "causal_lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "token_classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "sequence_classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image_classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
# Their own losses differ: labels that are not shifted, several predictions per position, several codebooks.
_NOT_OF_THEIR_KIND = frozenset(
    """BartForCausalLM BigBirdPegasusForCausalLM BlenderbotForCausalLM BlenderbotSmallForCausalLM CpmAntForCausalLM
    MBartForCausalLM MarianForCausalLM MusicgenForCausalLM MusicgenMelodyForCausalLM MvpForCausalLM PLBartForCausalLM
    PegasusForCausalLM ProphetNetForCausalLM ProphetNetForConditionalGeneration TrOCRForCausalLM WhisperForCausalLM
    XLNetLMHeadModel""".split()
)
_HEAD_OF_LOSS_TYPE = {
    "ForMaskedLM": "masked_lm",
    "ForTokenClassification": "token_classification",
    "ForSequenceClassification": "sequence_classification",
    "ForImageClassification": "image_classification",
    "ForAudioClassification": "image_classification",
    "ForVideoClassification": "image_classification",
}

SampleLossFunction = Callable[[nn.Module, Mapping[str, Any]], Tensor]
"""A user's own loss: (model, batch with labels) -> losses of shape ``(n,)``, differentiable."""


@dataclass(frozen=True)
class UnitLosses:
    """Losses of the units, samples or tokens, of one batch.

    Attributes:
        losses: Mean loss over the predictions of each unit, in nats (squared error for regression): ``(n,)`` for
            samples, ``(n, sequence)`` for tokens; float32 or wider; exactly 0 for units without predictions.
        counts: Number of predictions in each unit, int64, same shape: 0 or 1 for tokens and for classification, the
            number of labelled tokens for a sample of a language model. 0 marks an *empty* unit: it is never selected
            and never weighs in a mean.
    """

    losses: Tensor
    counts: Tensor

    @property
    def valid(self) -> Tensor:
        """Units with at least one prediction, bool, same shape."""
        return self.counts > 0

    def mean(self, keep: Tensor | None = None) -> Tensor:
        """Average over all predictions of the kept units; equals the model's own loss when all are kept.

        Args:
            keep: Bool mask of the shape of ``losses``; all units if None.

        Returns:
            Scalar; 0 where nothing is kept.
        """
        counts = self.counts if keep is None else self.counts * keep
        # where, not a product: an excluded unit may be infinite, and 0 * inf is nan.
        total = torch.where(counts > 0, self.losses * counts, 0.0).sum()
        return total / counts.sum().clamp(min=1)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model without data-parallel and PEFT wrappers: the one whose class names the head."""
    # Asked several times a step, and accelerate's function walks all modules, so only for what is wrapped.
    wrapped = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(model, "_orig_mod")
    if wrapped or type(model).__name__ == "DeepSpeedEngine":
        model = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def class_of(model: nn.Module) -> type[nn.Module]:
    """Return the class that a model was made of; FSDP2 gives a model that it shards a class of its own, with another name."""
    kind = type(model)
    return kind.__mro__[2] if issubclass(kind, FSDPModule) else kind


def find_head(model: nn.Module) -> str | None:
    """Name the head of a model, or None if its per-sample loss is not known here.

    Args:
        model: Any model; DDP and PEFT wrappers are looked through.

    Returns:
        One of ``causal_lm``, ``masked_lm``, ``seq2seq_lm``, ``token_classification``, ``sequence_classification``,
        ``image_classification``, or None: then a user's ``compute_sample_losses`` is needed. Regression and
        multi-label problems are classification heads with another ``problem_type``.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> find_head(ViTForImageClassification(config))
        'image_classification'
    """
    base = unwrap(model)
    name = class_of(base).__name__
    if name in _NOT_OF_THEIR_KIND:
        return None
    for head, names in _HEAD_NAMES.items():
        if name in names.values():
            # transformers lists speech models with a decoder alone, which shift labels, as seq2seq.
            return "causal_lm" if head == "seq2seq_lm" and not base.config.is_encoder_decoder else head
    # Not in an auto class: a user's own class that follows transformers' naming, or a vision-language model.
    loss_type = getattr(base, "loss_type", None)
    if LOSS_MAPPING.get(loss_type) is ForCausalLMLoss:
        return "seq2seq_lm" if getattr(base.config, "is_encoder_decoder", False) else "causal_lm"
    return _HEAD_OF_LOSS_TYPE.get(loss_type)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Score deterministically: no dropout, and every module's own training flag restored afterwards."""
    modules = [module for module in model.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def labelled_tokens(head: str, batch: Mapping[str, Any]) -> Tensor:
    """Mark the positions whose logits predict a label.

    Args:
        head: One of ``TOKEN_HEADS``.
        batch: A collated batch with ``labels`` of shape ``(n, sequence)``, or ``shift_labels`` for a causal LM.

    Returns:
        Bool mask ``(n, sequence)``, aligned with the logits: for a causal LM position t predicts label t + 1, so the
        last position never counts.
    """
    return _aligned_labels(head, batch) != IGNORE_INDEX


def forward_inputs(model: nn.Module, head: str, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the labels of a batch, so that the model computes logits and no loss of its own.

    Args:
        model: The model that will be called.
        head: Its head, from ``find_head``.
        batch: A collated batch.

    Returns:
        The arguments of the forward pass. For an encoder-decoder, whose decoder reads the labels, they contain
        ``decoder_input_ids``, or the labels where the model alone knows how to shift them. A model that would keep keys and
        values for generation, as one does that no Trainer has set up, is told not to.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "shift_labels")}
    if _keeps_cache(model):
        inputs.setdefault("use_cache", False)
    if head == "seq2seq_lm" and "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
        base = unwrap(model)
        if hasattr(base, "prepare_decoder_input_ids_from_labels"):
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        else:
            inputs["labels"] = batch["labels"]  # shifted inside the forward pass, which then computes a loss too
    return inputs


def _keeps_cache(model: nn.Module) -> bool:
    base = unwrap(model)
    config = getattr(base, "config", None)
    configs = (config, getattr(config, "text_config", None))
    keeps = any(getattr(entry, "use_cache", False) for entry in configs)
    return keeps and "use_cache" in inspect.signature(base.forward).parameters


def token_losses_from_logits(
    head: str, logits: Tensor, batch: Mapping[str, Any], label_smoothing: float = 0.0
) -> UnitLosses:
    """Compute the loss of every token from the logits of a forward pass.

    Args:
        head: One of ``TOKEN_HEADS``.
        logits: Shape ``(n, sequence, classes)``, any floating dtype; the loss is computed in float32 or wider.
        batch: The batch the logits came from, with its labels.
        label_smoothing: As ``TrainingArguments.label_smoothing_factor``; in [0, 1).

    Returns:
        Token losses of shape ``(n, sequence)``, differentiable. Their mean is the loss that the model itself (or the
        Trainer's label smoother) reports for this batch.

    Raises:
        ValueError: If logits and labels have different lengths, as with virtual prompt tokens.
    """
    labels = _aligned_labels(head, batch).to(logits.device)
    if logits.shape[:2] != labels.shape:
        raise ValueError(_misaligned(logits, labels))
    losses = F.cross_entropy(
        _wide(logits).flatten(0, 1),
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
    )
    return UnitLosses(losses.view(labels.shape), (labels != IGNORE_INDEX).long())


def per_sample(tokens: UnitLosses) -> UnitLosses:
    """Average the token losses of each row; a row without labelled tokens is empty: loss 0, count 0."""
    counts = tokens.counts.sum(1)
    return UnitLosses((tokens.losses * tokens.counts).sum(1) / counts.clamp(min=1), counts)


def sample_losses_from_logits(model: nn.Module, logits: Tensor, batch: Mapping[str, Any]) -> UnitLosses:
    """Compute the loss of every sample from logits that are at hand.

    Args:
        model: A model with a known head, which made the logits.
        logits: As the model returns them.
        batch: The batch they were made from, with labels.

    Returns:
        Losses and counts, ``(n,)``.
    """
    head = find_head(model)
    if head in TOKEN_HEADS:
        return per_sample(token_losses_from_logits(head, logits, batch))
    return _classification_losses(unwrap(model).config, logits, batch["labels"], 0.0)


def sample_losses_from_log_probs(log_probs: Tensor, label_mask: Tensor) -> UnitLosses:
    """Compute the loss of every sample from the log-probabilities of its labels.

    Args:
        log_probs: ``(n, positions)``, in nats; 0 where nothing is predicted.
        label_mask: Which positions predict a label, of the same shape.

    Returns:
        Losses and counts, ``(n,)``.
    """
    return per_sample(UnitLosses(-_wide(log_probs), label_mask.long()))


def class_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Compute the logits of rows that have one label each.

    Args:
        model: A classifier.
        batch: A collated batch; its labels are not used.

    Returns:
        ``(n, classes)``, differentiable, in float32 or wider.

    Raises:
        ValueError: If the model returns something else.
    """
    outputs = model(**forward_inputs(model, "", batch))
    logits = outputs if isinstance(outputs, Tensor) else _logits(outputs)
    if logits.ndim != 2:
        raise ValueError(
            f"`{type(unwrap(model)).__name__}` returns logits of shape {tuple(logits.shape)}; those of a classifier have one row "
            "for each sample and one column for each class."
        )
    return _wide(logits)


def unit_losses(
    model: nn.Module,
    batch: Mapping[str, Any],
    granularity: str,
    *,
    label_smoothing: float = 0.0,
    compute_sample_losses: SampleLossFunction | None = None,
) -> UnitLosses:
    """Compute the loss of every sample or token of a batch: the one primitive of all methods.

    Exact: ``unit_losses(...).mean()`` equals the model's own loss on the batch, for every supported head, with label
    shift, ignored labels, label smoothing, packed rows, and through DDP and PEFT wrappers.

    With a vocabulary of at least ``LARGE_VOCABULARY`` the logits of the whole batch never exist: the hidden states before
    the output embedding are scored in chunks, and the backward pass computes the logits of a chunk again. Three exceptions:
    models that process the logits further (Gemma, Cohere, BART), models that FSDP2 shards, and the first call for a model if it
    is with gradients.

    Args:
        model: The model, in the mode (train or eval) in which it is to be evaluated.
        batch: A collated batch on the model's device, with labels.
        granularity: ``"sample"`` or ``"token"``.
        label_smoothing: As ``TrainingArguments.label_smoothing_factor``; in [0, 1).
        compute_sample_losses: A user's own loss; replaces the head's and allows any model, at sample level.

    Returns:
        Losses and counts, differentiable unless gradients are off.

    Raises:
        ValueError: If the head is not known, or has no tokens, or the user's function returns something else than one
            loss per sample.

    Cost: one forward pass; the backward pass of a large vocabulary repeats the output embedding, on a CPU for the tokens whose
    loss has a gradient alone.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> size = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
        >>> model = BertForSequenceClassification(BertConfig(**size)).eval()
        >>> batch = {"input_ids": torch.tensor([[1, 2], [3, 4], [5, 6]]), "labels": torch.tensor([0, 1, -100])}
        >>> units = unit_losses(model, batch, "sample")
        >>> units.counts
        tensor([1, 1, 0])
        >>> bool(torch.isclose(units.mean(), model(**batch).loss))
        True
    """
    if compute_sample_losses is not None:
        return _user_losses(model, batch, granularity, compute_sample_losses)
    head = find_head(model)
    if head is None or (granularity == "token" and head not in TOKEN_HEADS):
        raise ValueError(unsupported_head(model, granularity))
    inputs = forward_inputs(model, head, batch)
    if head not in TOKEN_HEADS:
        return _classification_losses(unwrap(model).config, _logits(model(**inputs)), batch["labels"], label_smoothing)
    predictions = _predictions(model, head, inputs)
    if isinstance(predictions, _HiddenStates):
        labels = predictions.labels(head, batch)
        with predictions.autocast:
            losses = token_losses(predictions.layer, predictions.hidden, labels.flatten(), label_smoothing)
        tokens = UnitLosses(losses.view(labels.shape), (labels != IGNORE_INDEX).long())
    else:
        tokens = token_losses_from_logits(head, predictions, batch, label_smoothing)
    return tokens if granularity == "token" else per_sample(tokens)


def weighted_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    granularity: str,
    coefficients: Callable[[Tensor], Tensor] | None = None,
    *,
    label_smoothing: float = 0.0,
    compute_sample_losses: SampleLossFunction | None = None,
) -> tuple[Tensor, UnitLosses]:
    """Compute a sum of units' losses with coefficients that do not depend on the losses.

    What ``unit_losses`` and a product would give; a large vocabulary costs less, since its gradients are made from logits that
    are there, and not from logits that are computed again.

    Args:
        model: As for ``unit_losses``.
        batch: As there.
        granularity: As there.
        coefficients: From the counts of the units to the coefficients of their losses, of the same shape; None for the mean over
            all predictions.
        label_smoothing: As there.
        compute_sample_losses: As there.

    Returns:
        The sum, a scalar, which can be differentiated once; and the losses and counts of the units, detached. Errors are those of
        ``unit_losses``.

    Cost: one forward pass, and the backward pass of plain training.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
        >>> model = LlamaForCausalLM(LlamaConfig(**size))
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3], [3, 4, 5]]), "labels": torch.tensor([[1, 2, 3], [3, 4, -100]])}
        >>> total, units = weighted_loss(model, batch, "sample", lambda counts: torch.tensor([1.0, 0.0]))
        >>> units.counts, bool(torch.isclose(total, units.losses[0]))
        (tensor([2, 1]), True)
    """
    head = None if compute_sample_losses is not None else find_head(model)
    predictions: Tensor | _HiddenStates | None = None
    if head in TOKEN_HEADS and _large_output_embedding(model, head) is not None:
        inputs = forward_inputs(model, head, batch)
        predictions = None if "labels" in inputs else _predictions(model, head, inputs)
    if isinstance(predictions, _HiddenStates):
        labels = predictions.labels(head, batch)
        counts = (labels != IGNORE_INDEX).long()
        of_samples = counts.sum(1)
        if coefficients is None:
            dtype = torch.promote_types(predictions.states.dtype, torch.float32)
            of_tokens = counts.to(dtype) / counts.sum().clamp(min=1)
        elif granularity == "token":
            of_tokens = coefficients(counts)
        else:
            of_tokens = (coefficients(of_samples) / of_samples.clamp(min=1))[:, None].expand(labels.shape)
        with predictions.autocast:
            total, losses = weighted_token_losses(
                predictions.layer, predictions.hidden, labels.flatten(), of_tokens.flatten(), label_smoothing
            )
        tokens = UnitLosses(losses.view(labels.shape), counts)
        return total, tokens if granularity == "token" else per_sample(tokens)
    if predictions is not None:
        tokens = token_losses_from_logits(head, predictions, batch, label_smoothing)
        units = tokens if granularity == "token" else per_sample(tokens)
    else:
        units = unit_losses(
            model,
            batch,
            granularity,
            label_smoothing=label_smoothing,
            compute_sample_losses=compute_sample_losses,
        )
    if coefficients is None:
        total = units.mean()
    else:
        total = (units.losses * coefficients(units.counts).to(units.losses)).sum()
    return total, UnitLosses(units.losses.detach(), units.counts)


def unsupported_head(model: nn.Module, granularity: str) -> str:
    """Say why a model has no losses of this granularity, and what to do."""
    name = class_of(unwrap(model)).__name__
    if granularity == "token":
        return (
            f"`{name}` does not predict tokens, so it cannot be selected from at `granularity='token'`; heads that can: "
            f"{', '.join(sorted(TOKEN_HEADS))}. Use `granularity='sample'`."
        )
    known = ", ".join(sorted(_HEAD_NAMES))
    return (
        f"The loss of each sample of `{name}` is not known; known heads: {known}. Pass `compute_sample_losses=`, a "
        "function (model, batch) -> losses of shape (n,)."
    )


def _aligned_labels(head: str, batch: Mapping[str, Any]) -> Tensor:
    """Labels at the position that predicts them, as transformers' own losses align them."""
    if head != "causal_lm":
        return batch["labels"]
    if "shift_labels" in batch:
        return batch["shift_labels"]
    return F.pad(batch["labels"], (0, 1), value=IGNORE_INDEX)[..., 1:]


def _misaligned(scored: Tensor, labels: Tensor) -> str:
    return (
        f"The logits have {tuple(scored.shape[:2])} positions and the `labels` {tuple(labels.shape)}, so losses cannot "
        "be assigned to tokens. Virtual tokens (prompt or prefix tuning, images put in front by the model) are not supported; LoRA is. "
        "Pass `compute_sample_losses=`, (model, batch) -> losses of shape (n,), for a loss of each sample."
    )


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logits(outputs: Any) -> Tensor:
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]


def _classification_losses(config: Any, logits: Tensor, labels: Tensor, label_smoothing: float) -> UnitLosses:
    """Mirror transformers' choice of the loss by ``problem_type``, per row."""
    problem = getattr(config, "problem_type", None)
    if problem is None:
        if config.num_labels == 1:
            problem = "regression"
        else:
            problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    logits = _wide(logits)
    if problem == "single_label_classification":
        labels = labels.view(-1)
        losses = F.cross_entropy(
            logits, labels, reduction="none", ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing
        )
        return UnitLosses(losses, (labels != IGNORE_INDEX).long())
    labels = labels.to(logits.dtype).reshape(logits.shape)
    elementwise = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    losses = elementwise(logits, labels, reduction="none").flatten(1).mean(1)
    return UnitLosses(losses, torch.ones_like(losses, dtype=torch.int64))


def _user_losses(
    model: nn.Module, batch: Mapping[str, Any], granularity: str, compute_sample_losses: SampleLossFunction
) -> UnitLosses:
    if granularity != "sample":
        raise ValueError(
            f"`compute_sample_losses` gives one loss per sample, so it cannot serve `granularity={granularity!r}`. Use "
            "`granularity='sample'`."
        )
    losses = compute_sample_losses(model, batch)
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"`compute_sample_losses` must return a tensor of shape (n,), got {shape}.")
    return UnitLosses(losses, torch.ones_like(losses, dtype=torch.int64))


def _large_output_embedding(model: nn.Module, head: str) -> nn.Module | None:
    """The layer from hidden states to logits, if it is large and what it computes are the logits themselves."""
    base = unwrap(model)
    if head not in LM_HEADS or getattr(base, "_bilevel_scores_logits", None) is True:
        return None
    if isinstance(base, FSDPModule):
        return None  # the weights are there only while FSDP2 runs the layer
    layer = base.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    return layer if weight is not None and weight.shape[0] >= LARGE_VOCABULARY else None


@dataclass(frozen=True)
class _HiddenStates:
    """What the output embedding of a large vocabulary is applied to."""

    layer: nn.Module
    states: Tensor  # (n, sequence, d)
    autocast: torch.autocast

    @property
    def hidden(self) -> Tensor:
        return self.states.flatten(0, 1)

    def labels(self, head: str, batch: Mapping[str, Any]) -> Tensor:
        labels = _aligned_labels(head, batch)
        if self.states.shape[:2] != labels.shape:
            raise ValueError(_misaligned(self.states, labels))
        return labels


def _predictions(model: nn.Module, head: str, inputs: dict[str, Any]) -> Tensor | _HiddenStates:
    """Run a model with tokens: its logits, or what they are computed from where the vocabulary is large."""
    output_embedding = None if "labels" in inputs else _large_output_embedding(model, head)
    if output_embedding is None:
        return _logits(model(**inputs))
    # The model runs with an output embedding that records its input and answers for the first position only. PyTorch's
    # linear_cross_entropy is not used: its chunked path prepares gradients in the forward pass, for a mean alone (measured on a
    # CPU, 1,024 tokens, 49,152 classes: 10 s against 1.5 s) and rounds the losses of bfloat16 inputs to bfloat16.
    base = unwrap(model)
    # The first call finds out whether the chunks are the model's logits. If it has gradients they are all computed at once:
    # a second run would draw other dropout masks and move running statistics again.
    whole = torch.is_grad_enabled() and not hasattr(base, "_bilevel_scores_logits")
    recorded: list[tuple[Tensor, Tensor, torch.autocast]] = []
    forward, patched = output_embedding.forward, vars(output_embedding).get("forward")

    def record(hidden: Tensor) -> Tensor:
        # Accelerate's autocast ends with the model's forward pass, so it is entered again below.
        kind = hidden.device.type
        autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        logits = forward(hidden if whole else hidden[:, :1])
        recorded.append((hidden, logits[:, :1], autocast))
        return logits

    output_embedding.forward = record
    try:
        logits = _logits(model(**inputs))
    finally:
        if patched is None:
            del output_embedding.forward  # uncovers the method of the class
        else:
            output_embedding.forward = patched
    # Once per model: some models apply this layer in their own way, or scale or cap the logits after it (Gemma, Cohere,
    # Granite). To the last bit: near 0, where a model trained from scratch starts, a cap is almost the identity; at 0 itself,
    # where a layer initialised with zeros is, nothing can be told yet.
    if not hasattr(base, "_bilevel_scores_logits") and (len(recorded) != 1 or bool(recorded[0][1].any())):
        base._bilevel_scores_logits = len(recorded) != 1 or not torch.equal(
            logits[:, :1], recorded[0][1].to(logits.dtype)
        )
    if whole:
        return logits
    if getattr(base, "_bilevel_scores_logits", True) or len(recorded) != 1:
        return _logits(model(**inputs))
    ((hidden, _, autocast),) = recorded
    return _HiddenStates(output_embedding, hidden, autocast)
