"""Batches of any nesting and dtype, items and columns of any kind: what a loop would pick, or a refusal that says where."""

import io
import math
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from fuzzing import ANYTHING, TEXTS, can_be_written, fuzz, message_of
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor
from transformers import BatchEncoding, BatchFeature, default_data_collator

from hf_bilevel.data import (
    DOMAIN_ID,
    SAMPLE_ID,
    CollatedRows,
    DataCollatorWithOrigin,
    EndlessLoader,
    NumberedDataset,
    NumberedStream,
    pick_rows,
    plain_copy,
    pop_origin,
    read_domains,
)

Pair = namedtuple("Pair", ["first", "second"])

TORCH_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


def can_be_picked_from(dtype: torch.dtype) -> bool:
    """Say whether this version of torch indexes such tensors at all."""
    try:
        return len(torch.zeros(1, dtype=dtype)[torch.tensor([0])]) == 1
    except NotImplementedError:
        return False


TORCH_DTYPES = [dtype for dtype in TORCH_DTYPES if can_be_picked_from(dtype)]
KEYS = st.text(max_size=4)
NUMPY_DTYPES = ["bool", "u1", "i2", "i8", ">i4", "u8", "f2", "f4", ">f8", "c8", "U3", "S2", "O", "M8[D]"]


def plain(value: Any) -> Any:
    """Reduce to Python objects, with types and dtypes beside them."""
    if isinstance(value, Tensor):
        return ("tensor", value.dtype, tuple(value.shape), plain(value.to(torch.complex128).tolist()))
    if isinstance(value, np.ndarray):
        return ("array", value.dtype, value.shape, plain(value.tolist()))
    if isinstance(value, Mapping):
        return (type(value), {key: plain(entry) for key, entry in value.items()})
    if isinstance(value, (list, tuple)):
        return (type(value), [plain(entry) for entry in value])
    return "nan" if isinstance(value, float) and math.isnan(value) else value


@st.composite
def tensors(draw: st.DrawFn, num: int) -> Tensor:
    shape = (num, *draw(st.lists(st.integers(0, 3), max_size=2)))
    values = torch.arange(math.prod(shape)).reshape(shape)
    made = (values + draw(st.integers(0, 3))).to(draw(st.sampled_from(TORCH_DTYPES)))
    return made.transpose(0, -1).contiguous().transpose(0, -1) if draw(st.booleans()) else made


@st.composite
def arrays(draw: st.DrawFn, num: int) -> np.ndarray:
    shape = (num, *draw(st.lists(st.integers(0, 3), max_size=2)))
    made = np.arange(math.prod(shape)).reshape(shape).astype(draw(st.sampled_from(NUMPY_DTYPES)))
    return made[:, ::-1] if made.ndim > 1 and draw(st.booleans()) else made


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXTS,
    st.binary(max_size=3),
    st.sampled_from([torch.tensor(2.5), np.array(3), np.float32(1.5), np.int64(7), np.str_("a"), np.bool_(True)]),
)


@st.composite
def values_of(draw: st.DrawFn, num: int, depth: int = 2) -> Any:
    """An entry of a batch: usually of ``num`` rows, sometimes of another number, which is not to be picked from."""
    kinds = ["tensor", "array", "rows", "scalar", *(["mapping", "pair", "sequence"] if depth else [])]
    kind = draw(st.sampled_from(kinds))
    rows = draw(st.sampled_from([num] * 12 + [num + 1]))
    if kind == "tensor":
        return draw(tensors(rows))
    if kind == "array":
        return draw(arrays(rows))
    if kind == "rows":
        return draw(st.sampled_from([list, tuple]))(draw(st.lists(SCALARS, min_size=num, max_size=num)))
    if kind == "scalar":
        return draw(SCALARS)
    if kind == "mapping":
        made = draw(st.dictionaries(KEYS, values_of(num, depth - 1), max_size=3))
        return draw(st.sampled_from([dict, OrderedDict, UserDict, BatchFeature]))(made)
    if kind == "pair":
        return Pair(draw(values_of(num, depth - 1)), draw(values_of(num, depth - 1)))
    entries = draw(st.lists(values_of(num, depth - 1), max_size=3).filter(lambda entries: len(entries) != num))
    return draw(st.sampled_from([list, tuple]))(entries)


BATCHES = st.integers(0, 5).flatmap(
    lambda num: st.tuples(
        st.just(num),
        st.dictionaries(KEYS, values_of(num), max_size=4),
        st.sampled_from([dict, OrderedDict, UserDict, BatchEncoding, BatchFeature]),
        st.lists(st.integers(0, num - 1), max_size=6) if num else st.just([]),
    )
)


class MisfitError(Exception):
    pass


def picked_by_a_loop(value: Any, indices: list[int], num: int) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim and len(value) != num:
            raise MisfitError
        if not value.ndim:
            return value
        rows = [value[i] for i in indices]
        if isinstance(value, Tensor):
            return torch.stack(rows) if rows else value[:0]
        made = np.empty((len(rows), *value.shape[1:]), dtype=value.dtype)
        for i, row in enumerate(rows):
            made[i] = row
        return made
    if isinstance(value, Pair):
        return Pair(picked_by_a_loop(value.first, indices, num), picked_by_a_loop(value.second, indices, num))
    if isinstance(value, Mapping):
        return type(value)({key: picked_by_a_loop(entry, indices, num) for key, entry in value.items()})
    if isinstance(value, (list, tuple)):
        if len(value) == num:
            return type(value)(value[i] for i in indices)
        return type(value)(picked_by_a_loop(entry, indices, num) for entry in value)
    return value


@fuzz(50, 1200, case=BATCHES)
def test_picked_rows_are_those_that_a_loop_picks(case: tuple[int, dict, type, list[int]]) -> None:
    num, entries, kind, indices = case
    batch = kind(entries)
    before = plain(batch)
    try:
        expected = picked_by_a_loop(batch, indices, num)
    except MisfitError:
        with pytest.raises(ValueError, match=f"has {num + 1} rows where the batch has {num} samples") as error:
            pick_rows(batch, indices, num)
        assert message_of(error.value).startswith("`batch")
    else:
        assert plain(pick_rows(batch, indices, num)) == plain(expected)
    assert plain(batch) == before


@fuzz(30, 600, case=BATCHES)
def test_copies_of_batches_are_read_back_safely(case: tuple[int, dict, type, list[int]]) -> None:
    """What a checkpoint holds of batches can be loaded without trusting the file."""
    _, entries, kind, _ = case
    batch = kind(entries)
    written = str(plain(batch))
    assume(not any(kind in written for kind in ("datetime", "b''", 'b""')))  # dates; torch.load refuses empty bytes
    file = io.BytesIO()
    copied = plain_copy(batch)
    torch.save(copied, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert plain(loaded) == plain(copied)
    assert type(loaded) is dict and list(loaded) == list(batch)
    for key, value in batch.items():
        if isinstance(value, Tensor):
            assert plain(loaded[key]) == plain(value)
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            assert loaded[key].tolist() == value.tolist() and loaded[key].shape == value.shape


ITEMS = st.lists(
    st.one_of(
        st.dictionaries(TEXTS, SCALARS, max_size=3),
        st.tuples(SCALARS, SCALARS),
        st.dictionaries(st.sampled_from(["x", "labels", "sample_id", "domain_id"]), st.integers(), max_size=4),
        st.dictionaries(TEXTS, SCALARS, max_size=2).map(UserDict),
        SCALARS,
    ),
    min_size=1,
    max_size=5,
)
NO_MAPPING = st.sampled_from([None, [], (1,), torch.zeros(2), "x", 3, {1}])


@fuzz(60, 1000, items=ITEMS, with_domains=st.booleans(), returned=st.none() | NO_MAPPING, data=st.data())
def test_ids_go_past_any_collator(items: list[Any], with_domains: bool, returned: Any, data: st.DataObject) -> None:
    domains = torch.arange(len(items)).flip(0) if with_domains else None
    order = data.draw(st.lists(st.integers(0, len(items) - 1), min_size=1, max_size=6))
    kind = data.draw(st.sampled_from([dict, OrderedDict, UserDict, BatchEncoding]))
    seen = []

    def collate(rows: list[Any]) -> Any:
        seen.append([plain(row) for row in rows])
        return kind({"x": len(rows)}) if returned is None else returned

    wrapped = DataCollatorWithOrigin(collate)
    numbered = NumberedDataset(items, domains)
    rows = numbered.__getitems__(order) if data.draw(st.booleans()) else [numbered[i] for i in order]
    if returned is not None:
        with pytest.raises(TypeError, match="must return a dict of model inputs"):
            wrapped(rows)
        return
    batch = wrapped(rows)
    assert seen == [[plain(items[i]) for i in order]]
    assert type(batch) is kind and batch[SAMPLE_ID].dtype == torch.int64
    origin = pop_origin(batch)
    assert origin.sample_ids.tolist() == order and plain(batch) == plain(kind({"x": len(order)}))
    assert (origin.domain_ids is None) == (domains is None)
    if domains is not None:
        assert origin.domain_ids.tolist() == [len(items) - 1 - i for i in order]


@fuzz(
    60,
    500,
    lengths=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=6),
    extra=st.sampled_from([None, "int", "float", "pixels"]),
    data=st.data(),
)
def test_rows_collated_once_are_rows_collated_alone(
    lengths: list[tuple[int, int]], extra: str | None, data: st.DataObject
) -> None:
    """Rows with padding on both sides lose what is padding on the right in all of them."""
    items, width = [], 7
    for i, (left, num) in enumerate(lengths):
        mask = [0] * left + [1] * num + [0] * (width - left - num)
        item = {"input_ids": [10 * i + j for j in range(width)], "attention_mask": mask, "labels": i}
        if extra is not None:
            item[extra] = {"int": i, "float": i / 2, "pixels": [[float(i)] * 2] * 3}[extra]
        items.append(item)
    rows = CollatedRows(items, default_data_collator, torch.device("cpu"), seed=0)
    taken = data.draw(st.lists(st.integers(0, len(items) - 1), min_size=1, max_size=4))
    batch = rows.take(torch.tensor(taken))
    last = max(sum(lengths[i]) for i in taken)
    cut = [{k: v[:last] if k in ("input_ids", "attention_mask") else v for k, v in items[i].items()} for i in taken]
    assert plain(batch) == plain(default_data_collator(cut)) and len(rows) == len(items)


@fuzz(
    60,
    500,
    num=st.integers(1, 9),
    batch_size=st.integers(1, 7),
    ranks=st.integers(1, 3),
    seed=st.integers(-(2**70), 2**70),
    position=st.integers(0, 2**20),
)
def test_every_pass_of_the_target_loader_has_every_row_once(
    num: int, batch_size: int, ranks: int, seed: int, position: int
) -> None:
    loaders = [EndlessLoader(list(range(num)), list, batch_size, seed, rank, ranks) for rank in range(ranks)]
    size = batch_size * ranks
    first = position - position % num  # the start of a pass: size * first is a multiple of num
    drawn = [row for p in range(first, first + num) for loader in loaders for row in loader.batch_at(p)]
    assert len(drawn) == size * num
    for start in range(0, len(drawn), num):
        assert sorted(drawn[start : start + num]) == list(range(num))
    assert loaders[0].batch_at(position) == loaders[0].batch_at(position)


DOMAINS = st.one_of(
    st.lists(st.integers(0, 6), min_size=1, max_size=6),
    st.lists(st.sampled_from(["web", "books", "", "caf\u00e9"]), min_size=1, max_size=6),
    st.lists(st.integers() | st.sampled_from([2**40, 2**63, 10**30, -1]), min_size=1, max_size=3),
    st.lists(ANYTHING.filter(can_be_written), min_size=1, max_size=3),
)
DOMAIN_NAMES = st.none() | st.lists(st.sampled_from(["web", "books", "", "a", "caf\u00e9"]), max_size=5, unique=True)


@fuzz(40, 800, values=DOMAINS, names=DOMAIN_NAMES, as_table=st.booleans())
def test_domains_of_a_column(values: list[Any], names: list[str] | None, as_table: bool) -> None:
    dataset: Any = [{"source": value} for value in values]
    if as_table:
        try:
            dataset = datasets.Dataset.from_dict({"source": values})
        except Exception:  # no column of a table
            assume(False)
        values = dataset["source"][:]
    try:
        ids, found = read_domains(dataset, "source", names)
    except ValueError as error:
        assert "`source`" in message_of(error)
        # Names that are known are never refused, nor numbers of domains that there are.
        known = names is None or all(value in names for value in values if isinstance(value, str))
        assert not (known and all(isinstance(value, str) for value in values))
        in_range = all(type(value) is int and 0 <= value < (7 if names is None else len(names)) for value in values)
        assert not in_range
    else:
        assert ids.dtype == torch.int64 and len(ids) == len(values)
        assert names is None or found == names
        for i, value in zip(ids.tolist(), values, strict=True):
            assert 0 <= i < len(found)
            assert found[i] == value if isinstance(value, str) else int(value) == i


@fuzz(60, 800, values=DOMAINS, names=DOMAIN_NAMES)
def test_domains_of_a_stream(values: list[Any], names: list[str] | None) -> None:
    stream = NumberedStream([{"source": value, "x": i} for i, value in enumerate(values)], "source", names)
    try:
        items = list(stream)
    except ValueError as error:
        assert "`source`" in message_of(error)
        assert not all(type(value) is int and 0 <= value < (7 if names is None else len(names)) for value in values)
    else:
        assert [item[SAMPLE_ID] for item in items] == list(range(len(values)))
        for item, value in zip(items, values, strict=True):
            i = item[DOMAIN_ID]
            assert type(i) is int and (names is None or i < len(names))
            assert names[i] == value if isinstance(value, str) else int(value) == i
