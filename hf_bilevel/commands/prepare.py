"""Check the columns of the datasets, and turn their rows into what the model takes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import datasets
import numpy as np
from transformers import (
    BaseImageProcessor,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_bilevel.commands.arguments import DataArguments
from hf_bilevel.commands.chat import check_template, encode_chats
from hf_bilevel.commands.encode import (
    HAS_LABELS,
    collate_images,
    encode_batch,
    encode_images,
    encode_labelled_texts,
    encode_texts,
)
from hf_bilevel.commands.labels import label_ids, label_names
from hf_bilevel.commands.recipe import nearest
from hf_bilevel.commands.sources import AnyDataset

RESERVED = (  # columns of encoded rows
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "pixel_values",
    "labels",
    HAS_LABELS,
)

TAKEN_FOR_LABELS = ("label", "label_ids")  # by collators, in place of ``labels``

NUMBERED_FROM_PADDING = (  # models whose first position is the one behind the padding's id
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


@dataclass
class PreparedData:
    """What the trainer gets.

    Attributes:
        parts: ``train``, and ``target`` and ``eval`` if there are such datasets.
        rows: Row of the pool of every row of ``train``; None if there is none, for streams and packed texts.
        collator: Makes batches.
        label_names: Of a classification, in the order of their ids; None otherwise.
        domain_column: Name of the domains' column in the parts; None without domains.
        num_dropped: By part, rows that were left out since they have nothing to learn.
    """

    parts: dict[str, AnyDataset]
    rows: np.ndarray | None
    collator: Callable[[list[Any]], dict[str, Any]]
    label_names: list[str] | None = None
    domain_column: str | None = None
    num_dropped: dict[str, int] = field(default_factory=dict)


def prepare(
    parts: dict[str, AnyDataset],
    rows: np.ndarray | None,
    task: str,
    data: DataArguments,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    config: PretrainedConfig,
    domain_column: str | None = None,
) -> PreparedData:
    """Check the columns of the datasets, and encode their rows.

    Args:
        parts: ``train``, and ``target`` and ``eval`` if there are such datasets.
        rows: Row of the pool of every row of ``train``, or None.
        task: As in ``ModelArguments``.
        data: Names of columns, and lengths.
        processor: The model's tokenizer, for images its image processor.
        config: The model's config.
        domain_column: Column to keep; None without domains.

    Returns:
        The data for the trainer.

    Raises:
        ValueError: If a column is missing or holds something else, a label is unknown, or nothing is left to train on.
    """
    columns = {name: column_names(part, f"{name}_dataset") for name, part in parts.items()}
    wanted = _wanted_columns(task, data, columns["train"])
    for name in parts:
        _check_columns(f"{name}_dataset", columns[name], wanted)
    if domain_column is not None:
        _check_columns("train_dataset", columns["train"], {"domain_column": domain_column})
        _check_domain_column(parts["train"], domain_column, task)
    if data.pack and (task not in ("causal_lm", "masked_lm") or "messages_column" in wanted):
        raise ValueError("`pack` joins plain texts; a chat or a labelled row stays as it is. Drop `pack`.")
    if task in ("sequence_classification", "image_classification"):
        names = label_names(parts["train"], data.label_column, config)
        ids = {name: label_ids(part, f"{name}_dataset", data.label_column, names) for name, part in parts.items()}
    if task == "image_classification":
        parts = {name: _with_pixels(part, name, data, processor, config, ids[name]) for name, part in parts.items()}
        return PreparedData(parts, rows, collate_images, names, domain_column)
    _check_tokenizer(processor, task)
    max_length = min(data.max_length, _num_positions(processor, config) or data.max_length)
    options = {"tokenizer": processor, "column": next(iter(wanted.values())), "max_length": max_length}
    if "messages_column" in wanted:
        check_template(processor, options["column"])
        encoders = dict.fromkeys(parts, partial(encode_chats, **options))
    elif task == "sequence_classification":
        options["label_column"] = data.label_column
        encoders = {name: partial(encode_labelled_texts, **options, ids=ids[name]) for name in parts}
    else:
        options |= {"max_length": None if data.pack else max_length, "add_end": task == "causal_lm"}
        encoders = dict.fromkeys(parts, partial(encode_texts, **options))
    kept_as = f"domain_{domain_column}" if domain_column in TAKEN_FOR_LABELS else domain_column
    prepared = PreparedData({}, rows, _collator(task, processor), domain_column=kept_as)
    for name, part in parts.items():
        kept = {domain_column: kept_as} if domain_column in columns[name] else {}
        encode = partial(
            encode_batch, encode=encoders[name], kept=kept, packed_length=max_length if data.pack else None
        )
        encoded = part.map(encode, batched=True, remove_columns=columns[name])
        if (
            kept
            and kept_as != domain_column
            and isinstance(feature := (part.features or {}).get(domain_column), datasets.ClassLabel)
        ):
            encoded = encoded.cast_column(kept_as, feature)  # with the names of the domains
        if task == "masked_lm":
            encoded = encoded.remove_columns("labels")  # the collator masks, and makes labels of what it masks
        _add_rows_with_labels(prepared, name, encoded, data)
    if data.pack:
        prepared.rows = None
    if task == "sequence_classification":
        prepared.label_names = names
    return prepared


def column_names(dataset: AnyDataset, argument: str) -> list[str]:
    """Name the columns of a dataset; for a stream that does not know them, those of its first row.

    Args:
        dataset: A dataset.
        argument: Its name in messages.

    Returns:
        The names.

    Raises:
        ValueError: If it has no rows.
    """
    is_stream = isinstance(dataset, datasets.IterableDataset)
    first = next(iter(dataset), None) if is_stream and dataset.column_names is None else {}
    if first is None or not is_stream and len(dataset) == 0:
        raise ValueError(f"`{argument}` is empty.")
    return dataset.column_names or list(first)


def _wanted_columns(task: str, data: DataArguments, columns: list[str]) -> dict[str, str]:
    """Name the columns of the inputs and of the labels, by the fields that set them."""
    if task == "causal_lm" and (data.messages_column or not data.text_column and "messages" in columns):
        return {"messages_column": data.messages_column or "messages"}
    if task == "image_classification":
        wanted = {"image_column": data.image_column}
    else:
        wanted = {"text_column": data.text_column or "text"}
    return wanted | ({"label_column": data.label_column} if task.endswith("classification") else {})


def _check_columns(argument: str, columns: list[str], wanted: dict[str, str]) -> None:
    for name, column in wanted.items():
        if column not in columns:
            raise ValueError(
                f"`{argument}` has no column `{column}`; its columns are {', '.join(sorted(columns))}. Set `{name}` to one of "
                f"them.{nearest(column, columns, '')}"
            )


def _check_domain_column(pool: AnyDataset, column: str, task: str) -> None:
    if column in RESERVED and task != "image_classification":
        raise ValueError(f"`domain_column: {column}` has the name of a column that encoded rows have. Rename it.")
    feature = None if pool.features is None else pool.features[column]
    if feature is not None and not isinstance(feature, (datasets.Value, datasets.ClassLabel)):
        raise ValueError(f"`domain_column: {column}` must hold names or integers 0..D-1, and holds {feature!s:.200}.")


def _num_positions(tokenizer: PreTrainedTokenizerBase, config: Any) -> int | None:
    """Tell how many tokens the model takes: RoBERTa and those after it number them from behind the padding's id."""
    num = getattr(config, "max_position_embeddings", None)
    if num is None or config.model_type not in NUMBERED_FROM_PADDING:
        return num
    padding = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
    return num - padding - 1


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    if task == "masked_lm" and tokenizer.mask_token is None:
        raise ValueError(
            f"`task: masked_lm` needs a mask token, and the tokenizer of `{tokenizer.name_or_path}` has none. Use `causal_lm`, or "
            "a model like BERT."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of `{tokenizer.name_or_path}` has neither a padding token nor one that ends a text. Save it with a "
                "`pad_token`."
            )
        tokenizer.pad_token = tokenizer.eos_token


def _collator(task: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], dict[str, Any]]:
    if task == "causal_lm":
        return DataCollatorForSeq2Seq(tokenizer)
    return DataCollatorForLanguageModeling(tokenizer) if task == "masked_lm" else DataCollatorWithPadding(tokenizer)


def _add_rows_with_labels(prepared: PreparedData, name: str, encoded: AnyDataset, data: DataArguments) -> None:
    """Leave out rows in which nothing is learned, empty texts and chats that are cut before the assistant speaks."""
    if isinstance(encoded, datasets.IterableDataset):
        prepared.parts[name] = encoded.filter(lambda row: row[HAS_LABELS]).remove_columns(HAS_LABELS)
        return
    keep = np.flatnonzero(encoded[HAS_LABELS][:])
    prepared.num_dropped[name] = len(encoded) - len(keep)
    if len(keep) == 0:
        raise ValueError(
            f"`{name}_dataset` has {len(encoded)} rows and no token to train on: texts are empty, or no turn of an assistant "
            f"begins within `max_length={data.max_length}` tokens."
        )
    encoded = encoded.remove_columns(HAS_LABELS)
    prepared.parts[name] = encoded.select(keep) if prepared.num_dropped[name] else encoded
    if name == "train" and prepared.rows is not None and not data.pack:
        prepared.rows = prepared.rows[keep]


def _with_pixels(
    part: AnyDataset,
    name: str,
    data: DataArguments,
    processor: BaseImageProcessor,
    config: PretrainedConfig,
    ids: dict[Any, int],
) -> AnyDataset:
    feature = None if part.features is None else part.features[data.image_column]
    if feature is not None and not isinstance(feature, datasets.Image):
        raise ValueError(
            f"`image_column: {data.image_column}` of `{name}_dataset` holds {getattr(feature, 'dtype', feature)}, not images. Give "
            "a folder with a subfolder of images for each class, or a dataset with a column of images."
        )
    encode = partial(
        encode_images,
        processor=processor,
        image_column=data.image_column,
        label_column=data.label_column,
        ids=ids,
        mode="L" if getattr(config, "num_channels", 3) == 1 else "RGB",
    )
    if isinstance(part, datasets.IterableDataset):
        return part.map(encode, batched=True, batch_size=32, remove_columns=[data.image_column, data.label_column])
    return part.with_transform(encode)
