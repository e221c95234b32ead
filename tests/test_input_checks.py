"""Data that no method can train on: refused at construction, with what to do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_contract import METHODS, build


@pytest.mark.parametrize("method, settings", [*((m, {}) for m in METHODS), ("blade", {"granularity": "sample"})])
def test_padding_free_batches_are_refused(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    def flatten(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        joined = {key: sum((row[key] for row in rows), []) for key in ("input_ids", "labels")}
        return {key: torch.tensor(value)[None] for key, value in joined.items()}

    with pytest.raises(
        ValueError, match="Padding-free and flattened batches hold several samples.* a padding collator"
    ):
        build(method, "llama", tmp_path, settings=settings, trainer_kwargs={"data_collator": flatten})


@pytest.mark.parametrize("method", METHODS)
def test_a_target_dataset_that_was_not_tokenised_is_said(method: str, tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": ["one", "two"]})
    with pytest.raises(
        ValueError,
        match=r"does not find 'input_ids' in `target_dataset`. It has \['text'\].*Prepare it as `train_dataset` is prepared",
    ):
        build(method, "llama", tmp_path, trainer_kwargs={"target_dataset": texts, "data_collator": needs_tokens})


def needs_tokens(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([row["input_ids"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
