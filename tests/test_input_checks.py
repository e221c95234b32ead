"""Data that no method can train on: refused at construction, with what to do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from test_contract import METHODS, build
from tiny import make_dataset
from transformers import default_data_collator


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["train_dataset", "target_dataset"])
def test_several_splits_are_refused(method: str, name: str, tmp_path: Path) -> None:
    splits = DatasetDict({"train": make_dataset("llama", 8), "test": make_dataset("llama", 8)})
    given = {"train_dataset": splits} if name == "train_dataset" else {"trainer_kwargs": {"target_dataset": splits}}
    if (method, name) == ("mixture", "train_dataset"):
        given["trainer_kwargs"] = {"target_dataset": make_dataset("llama", 8).remove_columns("source")}
        settings = {"domain_column": None}
        trainer = build(method, "llama", tmp_path, settings=settings, **given)  # they are domains there
        assert trainer.domain_names == ["train", "test"]
        return
    with pytest.raises(ValueError, match=rf"`{name}` holds several datasets, \['train', 'test'\]. Pass one of them"):
        build(method, "llama", tmp_path, **given)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_pool_is_said(method: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        build(method, "llama", tmp_path, train_dataset=make_dataset("llama", 8).select([]))


@pytest.mark.parametrize("method", METHODS)
def test_a_target_dataset_of_another_kind_of_numbers_is_said(method: str, tmp_path: Path) -> None:
    renamed = make_dataset("llama", 8).rename_column("labels", "label")  # of which the default collator makes floats
    with pytest.raises(
        ValueError,
        match=r"makes `labels` of dtype torch.float32 of `target_dataset` and of dtype torch.int64 of `train_dataset`.*"
        "Give the columns of both the same names and types",
    ):
        build(
            method,
            "llama",
            tmp_path,
            trainer_kwargs={"target_dataset": renamed, "data_collator": default_data_collator},
        )


@pytest.mark.parametrize("method", METHODS)
def test_batches_that_are_no_dicts_are_said(method: str, tmp_path: Path) -> None:
    def keep(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return rows

    with pytest.raises(ValueError, match="The collator makes a list of samples of `(target|train)_dataset`"):
        build(method, "llama", tmp_path, trainer_kwargs={"data_collator": keep})
