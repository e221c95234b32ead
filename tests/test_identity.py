"""Which dataset this is: what a checksum of rows sees, and what it must not see."""

import datetime
import io
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value, concatenate_datasets
from PIL import Image as PillowImage

from hf_bilevel import identity
from hf_bilevel.identity import is_dataset_of, rows_checksum


def png(shade: int) -> bytes:
    content = io.BytesIO()
    PillowImage.new("L", (4, 4), shade).save(content, "png")
    return content.getvalue()


# Each column with a change of one value in it.
COLUMNS: dict[str, tuple[list[Any], Any]] = {
    "text": (["one", "two", None, ""], "tow"),
    "bytes": ([b"one", b"two", None, b""], b"tow"),
    "integer": ([1, 2, None, 4], 3),
    "number": ([1.0, -0.5, None, float("inf")], 0.5),
    "truth": ([True, False, None, True], True),
    "list": ([[1, 2], [3], None, []], [3, 0]),
    "lists of lists": ([[[1], [2, 3]], [[]], None, []], [[], []]),
    "texts": ([["a", "bc"], ["d"], None, []], ["e"]),
    "dict": ([{"a": 1, "b": "x"}, {"a": 2, "b": None}, None, {"a": 4, "b": "y"}], {"a": 2, "b": ""}),
    "chat": ([[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}], [], []], []),
    "day": ([datetime.date(2024, 1, day) for day in (1, 2, 3, 4)], datetime.date(2024, 1, 9)),
    "time": ([datetime.datetime(2024, 1, day, 12) for day in (1, 2, 3, 4)], datetime.datetime(2024, 1, 2, 13)),
    "price": ([Decimal("1.10"), Decimal("2.00"), None, Decimal("0.05")], Decimal("2.01")),
    "nothing": ([None] * 4, None),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_changed_value_is_seen_and_another_layout_is_not(name: str) -> None:
    values, other = COLUMNS[name]
    dataset = Dataset.from_dict({"a": values, "b": [0, 1, 2, 3]})
    checksum = rows_checksum(dataset)
    assert checksum is not None and len(checksum) == 64
    table = pyarrow.concat_tables([dataset.data.table.slice(0, 1), dataset.data.table.slice(1, 3)])
    assert rows_checksum(Dataset(table)) == checksum, "in chunks"
    longer = concatenate_datasets([dataset.select([3]), dataset, dataset.select([0])])
    assert rows_checksum(longer.select(range(1, 5))) == checksum, "a slice"
    assert rows_checksum(longer.select([1, 2, 3, 4]).with_format("torch")) == checksum, "chosen rows, formatted"
    assert rows_checksum(dataset.select_columns(["b", "a"])) == checksum, "columns in another order"
    assert rows_checksum(dataset.select([0, 2, 1, 3])) != checksum, "rows in another order"
    assert rows_checksum(dataset.rename_column("a", "c")) != checksum
    assert rows_checksum(dataset.select(range(3))) != checksum
    if other is not None:
        changed = [values[0], other, *values[2:]]
        assert rows_checksum(Dataset.from_dict({"a": changed, "b": [0, 1, 2, 3]})) != checksum


def test_arrays_of_fixed_shape_are_compared() -> None:
    features = Features({"a": datasets.Array2D((2, 3), "float32"), "b": List(Value("float32"), length=2)})
    make: Callable[[float], Dataset] = lambda last: Dataset.from_dict(  # noqa: E731
        {"a": np.full((5, 2, 3), last), "b": np.full((5, 2), 1.0)}, features=features
    )
    assert rows_checksum(make(1.0)) == rows_checksum(make(1.0)) != rows_checksum(make(2.0))


def test_names_of_labels_are_no_content() -> None:
    dataset = Dataset.from_dict({"label": [0, 1]})
    assert rows_checksum(dataset.cast_column("label", ClassLabel(names=["a", "b"]))) == rows_checksum(dataset)


def test_images_by_what_is_stored(tmp_path: Path) -> None:
    def images(folder: str, shades: list[int]) -> Dataset:
        (tmp_path / folder).mkdir()
        paths = [tmp_path / folder / f"{i}.png" for i in range(len(shades))]
        for path, shade in zip(paths, shades, strict=True):
            path.write_bytes(png(shade))
        return Dataset.from_dict({"image": list(map(str, paths))}).cast_column("image", Image())

    one, moved = images("one", [1, 2]), images("moved", [1, 2])
    assert rows_checksum(one) == rows_checksum(moved) is not None
    for path in (tmp_path / "one").iterdir():
        path.unlink()  # nothing is opened
    assert rows_checksum(one.select([0, 1])) == rows_checksum(moved)
    stored = [Dataset.from_dict({"image": [{"bytes": png(s), "path": p}]}).cast_column("image", Image())
              for s, p in ((1, "/a/x.png"), (1, None), (2, None))]  # fmt: skip
    assert rows_checksum(stored[0]) == rows_checksum(stored[1]) != rows_checksum(stored[2])


def test_of_a_long_dataset_a_thousand_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = list(range(12_345))
    dataset = Dataset.from_dict({"a": numbers})
    read: list[int] = []
    take = Dataset.__getitem__

    def counted(self: Dataset, key: Any) -> Any:
        read.extend(key)
        return take(self, key)

    monkeypatch.setattr(Dataset, "__getitem__", counted)
    checksum = rows_checksum(dataset)
    assert rows_checksum(dataset) == checksum
    assert len(read) == 1000 and len(set(read)) == 1000 and {0, 12_344} <= set(read)
    assert max(b - a for a, b in zip(read, read[1:], strict=False)) == 13
    assert rows_checksum(Dataset.from_dict({"a": numbers})) == checksum
    assert rows_checksum(Dataset.from_dict({"a": numbers[1:] + [0]})) != checksum


def test_what_has_no_rows_to_compare() -> None:
    empty = Dataset.from_dict({"a": []})
    assert rows_checksum(empty) is not None
    assert rows_checksum([{"a": 1}]) is None and rows_checksum(None) is None
    assert rows_checksum(Dataset.from_dict({"a": [1]}).to_iterable_dataset()) is None


def test_either_says_that_it_is_the_dataset() -> None:
    dataset, other = Dataset.from_dict({"a": [1, 2]}), Dataset.from_dict({"a": [2, 1]})
    fingerprint, checksum = dataset._fingerprint, rows_checksum(dataset)
    assert is_dataset_of(dataset, fingerprint, None) and is_dataset_of(dataset, "another", checksum)
    assert not is_dataset_of(dataset, "another", None) and not is_dataset_of(other, fingerprint, checksum)
    assert is_dataset_of([1, 2], None, None) and not is_dataset_of([1, 2], "another", checksum)


@pytest.mark.parametrize("path", ["a", ["a"]])
@pytest.mark.parametrize("content", [7, "text", None])
def test_columns_of_paths_that_are_no_images(path: Any, content: Any) -> None:
    rows = [{"file": {"path": path, "bytes": content}}, {"file": {"path": path, "bytes": content}}]
    other = [rows[0], {"file": {"path": ["b"] if isinstance(path, list) else "b", "bytes": content}}]
    assert rows_checksum(Dataset.from_list(rows)) != rows_checksum(Dataset.from_list(other))


def test_a_column_of_an_unknown_kind_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise pyarrow.ArrowNotImplementedError("a kind of the future")

    monkeypatch.setattr(identity, "_update", unknown)
    dataset = Dataset.from_dict({"a": [1, 2]})
    assert rows_checksum(dataset) is None and not is_dataset_of(dataset, "another", None)
