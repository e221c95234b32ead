"""Encode rows of text and images as the models take them."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from hf_bilevel.losses import IGNORE_INDEX

HAS_LABELS = "_has_labels"


def encode_texts(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, column: str, max_length: int | None, add_end: bool
) -> dict[str, list]:
    """Encode plain texts; every token is a label.

    Args:
        batch: Columns.
        tokenizer: The model's.
        column: Column of the texts.
        max_length: Tokens of a text, at most; None for all.
        add_end: Add the token that ends a text, for causal models.

    Returns:
        ``input_ids`` and ``labels``.
    """
    end = [tokenizer.eos_token_id] if add_end and tokenizer.eos_token_id is not None else []
    # Its own special tokens must survive where it is cut, for models that are not causal.
    options = {} if max_length is None or add_end else {"truncation": True, "max_length": max_length}
    rows = tokenizer(_texts(batch, column), return_attention_mask=False, verbose=False, **options)["input_ids"]
    rows = [(ids if ids[-1:] == end else ids + end)[:max_length] for ids in rows]
    # Special tokens are not masked, so nothing is learned from a text of these alone.
    none = set() if add_end else set(tokenizer.all_special_ids)
    return {"input_ids": rows, "labels": [[IGNORE_INDEX if token in none else token for token in ids] for ids in rows]}


def encode_labelled_texts(
    batch: dict[str, list],
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    max_length: int,
    label_column: str,
    ids: dict[Any, int],
) -> dict[str, list]:
    """Encode texts and their labels.

    Args:
        batch: Columns.
        tokenizer: The model's.
        column: Column of the texts.
        max_length: Tokens of a text, at most.
        label_column: Column of the labels.
        ids: Id of every label.

    Returns:
        What the tokenizer makes of the texts, and ``labels``. A row without a text, or with a label that is not known, is a ValueError.
    """
    encoded = tokenizer(_texts(batch, column), truncation=True, max_length=max_length)
    return {**encoded, "labels": _label_ids(batch, label_column, ids)}


def _label_ids(batch: dict[str, list], column: str, ids: dict[Any, int]) -> list[int]:
    for label in batch[column]:
        if ids.get(label) is None:  # of a stream, which could not be looked through before
            raise ValueError(f"`label_column: {column}` holds {label!r:.200} in a row, and known are {list(ids)}.")
    return [ids[label] for label in batch[column]]


def _texts(batch: dict[str, list], column: str) -> list[str]:
    for text in batch[column]:
        if not isinstance(text, str):
            raise ValueError(
                f"`text_column: {column}` must hold text, and holds {type(text).__name__} in a row. Leave such rows out."
            )
    return batch[column]


def encode_batch(
    batch: dict[str, list],
    encode: Callable[[dict[str, list]], dict[str, list]],
    kept: dict[str, str],
    packed_length: int | None = None,
) -> dict[str, list]:
    """Encode rows, keep some columns, and mark rows with something to learn.

    Args:
        batch: Columns.
        encode: From columns to what the model takes.
        kept: Columns to keep, and what they are called then.
        packed_length: Join the rows, of each value of the kept columns for itself, and cut them into rows of so many tokens; what
            is left becomes a shorter row. None to leave them.

    Returns:
        Columns.

    Example:
        >>> batch = {"ids": [[1, 2], [3], [4, 5, 6]], "source": ["web", "web", "code"]}
        >>> kept = {"source": "source"}
        >>> encode_batch(batch, lambda b: {"input_ids": b["ids"], "labels": b["ids"]}, kept, packed_length=2)["input_ids"]
        [[1, 2], [3], [4, 5], [6]]
    """
    encoded, columns = encode(batch), {name: batch[column] for column, name in kept.items()}
    if packed_length is not None:
        groups: dict[tuple, list[int]] = {}
        for i, ids in enumerate(encoded["input_ids"]):
            groups.setdefault(tuple(values[i] for values in columns.values()), []).extend(ids)
        chunks = [
            (key, ids[start : start + packed_length])
            for key, ids in groups.items()
            for start in range(0, len(ids), packed_length)
        ]
        rows = [ids for _, ids in chunks]
        encoded = {"input_ids": rows, "labels": rows}
        columns = {column: [key[j] for key, _ in chunks] for j, column in enumerate(columns)}
    # The first token of a language model's row is predicted from nothing.
    marks = [isinstance(row, int) or any(label != IGNORE_INDEX for label in row[1:]) for row in encoded["labels"]]
    return {**encoded, **columns, HAS_LABELS: marks}


def encode_images(
    batch: dict[str, list],
    processor: BaseImageProcessor,
    image_column: str,
    label_column: str,
    ids: dict[Any, int],
    mode: str,
) -> dict[str, list]:
    """Make pixels of images, when they are read.

    Args:
        batch: Columns; without images it is left as it is.
        processor: The model's.
        image_column: Column of the images.
        label_column: Column of the labels.
        ids: Id of every label.
        mode: Of the images, ``"RGB"`` or ``"L"``.

    Returns:
        The columns without images and labels, ``pixel_values`` and ``labels``.

    Raises:
        ValueError: If a row has no image, or its label is not known.
    """
    if image_column not in batch:
        return batch
    encoded = {name: values for name, values in batch.items() if name not in (image_column, label_column)}
    if None in batch[image_column]:
        raise ValueError(f"`image_column: {image_column}` holds no image in a row. Leave such rows out.")
    images = [image.convert(mode) for image in batch[image_column]]
    encoded["pixel_values"] = list(processor(images, return_tensors="pt")["pixel_values"])
    encoded["labels"] = _label_ids(batch, label_column, ids)
    return encoded


def collate_images(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack pixels and labels, and leave everything else out.

    Args:
        items: Encoded rows.

    Returns:
        ``pixel_values`` and ``labels``.
    """
    return {
        "pixel_values": torch.stack([torch.as_tensor(item["pixel_values"]) for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }
