"""Load the model, its config and its tokenizer or image processor."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_bilevel.commands.arguments import ModelArguments
from hf_bilevel.commands.recipe import nearest

AUTO_CLASSES: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}
logger = logging.getLogger(__name__)

HEADS = ("classifier", "score")  # attributes of classification models that are new, and trained in full


def load_config_and_processor(
    model: ModelArguments,
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase | BaseImageProcessor]:
    """Load what is needed before the weights.

    Args:
        model: Which model.

    Returns:
        Its config, and its tokenizer, for images its image processor.

    Raises:
        ValueError: If there is no such model, or one of its files is missing.
    """
    path = Path(model.model).expanduser()
    if model.model.startswith((".", "/", "~")) and not path.is_dir():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"`model: {model.model}` is not a folder.{nearest(path.name, beside, '')}")
    config = _load(AutoConfig, "config", model)
    if type(config) not in AUTO_CLASSES[model.task]._model_mapping and not hasattr(config, "auto_map"):
        fitting = [name for name, auto in AUTO_CLASSES.items() if type(config) in auto._model_mapping]
        raise ValueError(
            f"`model: {model.model}` is a {config.model_type} and cannot be trained for `task: {model.task}`; it can for "
            f"{', '.join(fitting) or 'none of the tasks'}."
        )
    if model.task == "image_classification":
        return config, _load(AutoImageProcessor, "image processor", model)
    return config, _load(AutoTokenizer, "tokenizer", model)


def _load(auto: Any, what: str, model: ModelArguments) -> Any:
    try:
        return auto.from_pretrained(_source(model), trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        where = "its folder" if Path(_source(model)).is_dir() else "the Hub, and there is no such folder"
        raise ValueError(
            f"The {what} of `model: {model.model}` cannot be loaded from {where}: {str(error).strip().splitlines()[0]}"
        ) from error


def build_model(
    model: ModelArguments, config: PretrainedConfig, label_names: list[str] | None, weights: bool = True
) -> PreTrainedModel:
    """Load the model, with a head for the labels and with an adapter if asked for.

    Args:
        model: Which model.
        config: Its config; the labels are written into it.
        label_names: Of a classification.
        weights: False for a model without any memory, on the device ``meta``.

    Returns:
        The model.
    """
    if label_names is not None:
        config.id2label = dict(enumerate(label_names))  # sets the number of labels, too
        config.label2id = {name: i for i, name in enumerate(label_names)}
    auto = AUTO_CLASSES[model.task]
    options = {"trust_remote_code": model.trust_remote_code, "attn_implementation": model.attn_implementation}
    options = {name: value for name, value in options.items() if value}
    if weights:
        options |= {"dtype": model.dtype, "config": config, "ignore_mismatched_sizes": label_names is not None}
        loaded = auto.from_pretrained(_source(model), **options)
        return _with_adapter(loaded, model) if model.peft else loaded
    dtype = config.dtype or torch.float32 if model.dtype == "auto" else getattr(torch, model.dtype)
    with torch.device("meta"):
        empty = auto.from_config(config, dtype=dtype, **options)
        return _with_adapter(empty, model) if model.peft else empty


def build_other_model(
    name: str, source: str, model: ModelArguments, processor: Any, label_names: list[str] | None
) -> PreTrainedModel:
    """Load a model that reads the same rows as the one that is trained, without an adapter.

    Args:
        name: The setting that names it, for messages.
        source: Id on the Hub or local folder.
        model: The model that is trained: task, dtype and attention are taken from it.
        processor: Its tokenizer or image processor.
        label_names: Of a classification.

    Returns:
        The model.

    Raises:
        ValueError: If it cannot be loaded, reads other tokens or images, or is a reference for other labels.

    The head of a reference is put into the order of the labels.
    """
    other = dataclasses.replace(model, model=source, peft=False)
    try:
        config, own_processor = load_config_and_processor(other)
    except ValueError as error:
        raise ValueError(str(error).replace("`model: ", f"`{name}: ")) from error
    if isinstance(processor, PreTrainedTokenizerBase):
        same = own_processor.get_vocab() == processor.get_vocab()
    else:
        same = getattr(own_processor, "size", None) == getattr(processor, "size", None)
    if not same:
        what = "tokens" if isinstance(processor, PreTrainedTokenizerBase) else "images"
        raise ValueError(
            f"`{name}: {source}` reads other {what} than `model: {model.model}`, and both see the same rows. Take a model with the "
            f"same {'vocabulary' if what == 'tokens' else 'size of images'}."
        )
    if getattr(config, "pad_token_id", None) is None and hasattr(processor, "pad_token_id"):
        config.pad_token_id = processor.pad_token_id
    if label_names is None or name != "reference_model":  # whose head is not trained any more
        return build_model(other, config, label_names)
    own = [label for _, label in sorted(config.id2label.items())]
    fold = str.casefold if len({label.casefold() for label in label_names}) == len(label_names) else str
    here, there = ([fold(label) for label in labels] for labels in (label_names, own))
    are_named = own != [f"LABEL_{i}" for i in range(len(own))] and label_names != [str(i) for i in range(len(own))]
    if len(own) != len(label_names) or are_named and sorted(there) != sorted(here):
        raise ValueError(
            f"`{name}: {source}` tells the labels {', '.join(own)} apart, and `train_dataset` has {', '.join(label_names)}. A frozen "
            "reference must know these: train it on them, or use `reference: dynamic`."
        )
    if not are_named:
        logger.warning(
            "`%s: %s` has the labels %s; they are taken to be %s.",
            name,
            source,
            ", ".join(own),
            ", ".join(label_names),
        )
    built = build_model(other, config, label_names)
    if are_named and there != here:
        _reorder_head(built, f"`{name}: {source}`", [there.index(label) for label in here])
    return built


def _reorder_head(model: PreTrainedModel, what: str, order: list[int]) -> None:
    """Let the rows of a classifier's last layer follow the labels, which have been given other numbers."""
    body = set(model.base_model.modules())
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m not in body and m.out_features == len(order)]
    if len(heads) != 1:
        raise ValueError(
            f"{what} numbers the labels in another order than `train_dataset`, and its last layer is not found. Save it with the "
            "labels in the alphabetical order of their names."
        )
    with torch.no_grad():
        for parameter in heads[0].parameters():
            parameter.copy_(parameter[order].clone())


def _source(model: ModelArguments) -> str:
    path = Path(model.model).expanduser()
    return str(path) if path.is_dir() else model.model


def _with_adapter(model: PreTrainedModel, given: ModelArguments) -> Any:
    from peft import LoraConfig, get_peft_model

    heads = [name for name, _ in model.named_children() if name in HEADS]
    config = LoraConfig(
        task_type={"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}.get(given.task),
        r=given.lora_rank,
        lora_alpha=2 * given.lora_rank if given.lora_alpha is None else given.lora_alpha,
        target_modules=given.lora_targets or "all-linear",
        modules_to_save=heads or None,
        exclude_modules=heads or None,
    )
    adapted = get_peft_model(model, config)
    adapted.enable_input_require_grads()  # else nothing is differentiated with gradient checkpointing
    return adapted
