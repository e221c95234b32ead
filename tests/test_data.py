"""Data: ids past any collator, rows against a loop, and the target loader against counting."""

import itertools
import pickle
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, get_worker_info
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    BatchFeature,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    default_data_collator,
)
from transformers.trainer_utils import RemoveColumnsCollator

from hf_bilevel.data import (
    DOMAIN_ID,
    SAMPLE_ID,
    CollatedRows,
    DataCollatorWithOrigin,
    EndlessLoader,
    NumberedDataset,
    NumberedStream,
    Origin,
    derive_seed,
    fetch,
    name_domains,
    pick_rows,
    pop_origin,
    private_randomness,
    read_domains,
    row_lengths,
    split_by_length,
    without_padding,
)


def plain(value: Any) -> Any:
    """Reduce to Python objects, with the types of containers and the dtypes of tensors beside them, for comparison."""
    if isinstance(value, Tensor):
        return ("tensor", value.dtype, value.tolist())
    if isinstance(value, np.ndarray):
        return ("array", value.dtype, value.tolist())
    if isinstance(value, (dict, BatchEncoding, BatchFeature)):
        return (type(value), {key: plain(entry) for key, entry in value.items()})
    if isinstance(value, (list, tuple)):
        return (type(value), [plain(entry) for entry in value])
    return value


# ---------------------------------------------------------------------------------------------------------------------
# NumberedDataset


class Squares(Dataset):
    """Items are dicts; without ``__getitems__``."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"x": index * index, "labels": index % 2}


def table() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"x": [0, 1, 4, 9, 16], "labels": [0, 1, 0, 1, 0]})


DICT_DATASETS: dict[str, Callable[[], Any]] = {
    "list": lambda: [dict(Squares()[i]) for i in range(5)],
    "torch": Squares,
    "subset": lambda: Subset(Squares(), range(5)),
    "arrow": table,
    "arrow_as_tensors": lambda: table().with_format("torch"),
    "arrow_with_transform": lambda: table().with_transform(
        lambda rows: {"x": [[x, x + 1] for x in rows["x"]], "labels": rows["labels"]}
    ),
    "arrow_with_indices": lambda: table().select([4, 3, 2, 1, 0]),
}


@pytest.mark.parametrize("domain_ids", [None, torch.tensor([2, 0, 1, 0, 2])])
@pytest.mark.parametrize("name", DICT_DATASETS)
def test_numbered_items_are_the_items_and_their_ids(name: str, domain_ids: Tensor | None) -> None:
    dataset = DICT_DATASETS[name]()
    numbered = NumberedDataset(dataset, domain_ids)
    assert len(numbered) == 5

    def expected(i: int) -> Any:
        ids = {SAMPLE_ID: i} if domain_ids is None else {SAMPLE_ID: i, DOMAIN_ID: int(domain_ids[i])}
        return plain({**dataset[i], **ids})

    assert [plain(numbered[i]) for i in range(5)] == [expected(i) for i in range(5)]
    order = [3, 0, 3, 4]
    assert [plain(item) for item in numbered.__getitems__(order)] == [expected(i) for i in order]
    # Samplers give tensors and NumPy integers too; ids are Python integers all the same.
    for index in (torch.tensor(3), np.int64(3)):
        assert type(numbered[index][SAMPLE_ID]) is int and plain(numbered[index]) == expected(3)
    assert SAMPLE_ID not in dataset[0]


def test_arrow_rows_are_read_in_one_call() -> None:
    calls = []

    def transform(rows: dict[str, list[int]]) -> dict[str, list[int]]:
        calls.append(rows["x"])
        return rows

    NumberedDataset(table().with_transform(transform)).__getitems__([2, 0, 4])
    assert calls == [[4, 0, 16]]


def test_items_that_are_not_dicts_go_through_a_loader() -> None:
    dataset = TensorDataset(torch.arange(6.0), torch.tensor([0, 1, 0, 1, 0, 1]))
    domain_ids = torch.tensor([1, 1, 0, 0, 2, 2])

    def collate(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        assert all(type(pair) is tuple for pair in pairs)
        return {"x": torch.stack([x for x, _ in pairs]), "labels": torch.stack([y for _, y in pairs])}

    loader = DataLoader(
        NumberedDataset(dataset, domain_ids),
        batch_size=4,
        sampler=[5, 0, 3, 1, 2, 4],
        collate_fn=DataCollatorWithOrigin(collate),
    )
    batches = list(loader)
    assert [batch["x"].tolist() for batch in batches] == [[5, 0, 3, 1], [2, 4]]
    origins = [pop_origin(batch) for batch in batches]
    assert [origin.sample_ids.tolist() for origin in origins] == [[5, 0, 3, 1], [2, 4]]
    assert [origin.domain_ids.tolist() for origin in origins] == [[2, 1, 0, 1], [0, 2]]
    assert [len(origin) for origin in origins] == [4, 2]
    assert [sorted(batch) for batch in batches] == [["labels", "x"]] * 2


# ---------------------------------------------------------------------------------------------------------------------
# NumberedStream


class CountingStream(IterableDataset):
    """Backed by a generator; as PyTorch asks, each worker yields its own share."""

    def __init__(self, num: int, tuples: bool = False) -> None:
        self.num = num
        self.tuples = tuples
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for i in range(first, self.num, step):
            value = 100 * self.epoch + i
            yield (value,) if self.tuples else {"x": value}


def collate_x(items: list[Any]) -> dict[str, Tensor]:
    return {"x": torch.tensor([item["x"] if isinstance(item, dict) else item[0] for item in items])}


def collect(stream: NumberedStream, num_workers: int) -> dict[int, int]:
    """Read a stream with a loader: id -> x, ids unique."""
    loader = DataLoader(stream, batch_size=3, num_workers=num_workers, collate_fn=DataCollatorWithOrigin(collate_x))
    pairs = []
    for batch in loader:
        origin = pop_origin(batch)
        assert origin.domain_ids is None and origin.sample_ids.dtype == torch.int64
        pairs += zip(origin.sample_ids.tolist(), batch["x"].tolist(), strict=True)
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("tuples", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_gives_each_item_its_own_id(num_workers: int, tuples: bool) -> None:
    # Workers share the stream item by item here, so the id is the position in it however many read.
    stream = NumberedStream(CountingStream(10, tuples), None, None)
    assert collect(stream, num_workers) == {i: i for i in range(10)}
    stream.set_epoch(2)
    assert collect(stream, num_workers) == {i: 200 + i for i in range(10)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_of_arrow_shards(num_workers: int) -> None:
    rows = datasets.Dataset.from_dict({"x": list(range(10, 22))}).to_iterable_dataset(num_shards=4)
    found = collect(NumberedStream(rows, None, None), num_workers)
    assert sorted(found.values()) == list(range(10, 22))
    if num_workers == 0:
        assert found == {i: 10 + i for i in range(12)}
    else:  # worker 0 has the even ids
        for worker in range(2):
            own = [x for i, x in sorted(found.items()) if i % 2 == worker]
            assert [i for i in sorted(found) if i % 2 == worker] == [2 * j + worker for j in range(6)]
            assert len({(x - 10) // 3 for x in own}) == 2  # whole shards


def test_epoch_is_passed_on_to_streams_that_shuffle() -> None:
    rows = datasets.Dataset.from_dict({"x": list(range(30))}).to_iterable_dataset().shuffle(seed=0, buffer_size=30)
    stream = NumberedStream(rows, None, None)
    first = collect(stream, 0)
    assert collect(stream, 0) == first
    stream.set_epoch(1)
    assert collect(stream, 0) != first and sorted(collect(stream, 0).values()) == list(range(30))
    NumberedStream(iter_only := [{"x": 1}], None, None).set_epoch(3)  # nothing to pass it to
    assert iter_only == [{"x": 1}]


def test_stream_with_domains() -> None:
    items = [{"x": i, "source": source} for i, source in enumerate(["web", "books", "web"])]
    named = list(NumberedStream(items, "source", ["books", "web"]))
    assert named == [
        {**item, SAMPLE_ID: i, DOMAIN_ID: d} for i, (item, d) in enumerate(zip(items, [1, 0, 1], strict=True))
    ]
    numbers = [{"x": 0, "source": 4}, {"x": 1, "source": np.int64(0)}]
    assert [item[DOMAIN_ID] for item in NumberedStream(numbers, "source", None)] == [4, 0]
    with pytest.raises(ValueError, match=r"`domain_names` \['books'\] does not list the domain 'web'"):
        list(NumberedStream(items, "source", ["books"]))


# ---------------------------------------------------------------------------------------------------------------------
# DataCollatorWithOrigin


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    words = {word: i for i, word in enumerate("[PAD] [UNK] [MASK] [EOS] the cat sat on a mat".split())}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    built = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", eos_token="[EOS]"
    )
    built.save_pretrained(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def assert_collates_alike(
    collator: Callable[[list[Any]], Any], items: list[Any], domain_ids: Tensor | None = None
) -> dict[str, Any]:
    """The wrapped collator gives what the bare one gives on the same items, and the ids."""
    order = [2, 0, 3]
    numbered = NumberedDataset(items, domain_ids).__getitems__(order)
    torch.manual_seed(0)
    expected = collator([items[i] for i in order])
    torch.manual_seed(0)
    before = plain(numbered)
    batch = DataCollatorWithOrigin(collator)(numbered)
    assert plain(numbered) == before and type(batch) is type(expected)
    origin = pop_origin(batch)
    assert origin.sample_ids.dtype == torch.int64 and origin.sample_ids.tolist() == order
    if domain_ids is None:
        assert origin.domain_ids is None
    else:
        assert origin.domain_ids.dtype == torch.int64 and torch.equal(origin.domain_ids, domain_ids[order])
    assert plain(batch) == plain(expected) and len(expected) > 0
    # Neither the items nor the batch handed to the model carry ids.
    assert not any(SAMPLE_ID in item for item in items if isinstance(item, dict))
    return expected


def test_default_collator_keeps_the_datasets_own_id_columns() -> None:
    items = [{"x": float(i), "label": i % 2, "sample_id": 100 + i, "domain_id": 7} for i in range(4)]
    batch = assert_collates_alike(default_data_collator, items, torch.tensor([3, 1, 0, 2]))
    assert batch["sample_id"].tolist() == [102, 100, 103] and batch["domain_id"].tolist() == [7, 7, 7]


@pytest.mark.parametrize("domain_ids", [None, torch.tensor([1, 0])])
def test_collator_sees_exactly_the_items(domain_ids: Tensor | None) -> None:
    items, seen = [{"x": 1, "id": 5}, {"y": [2]}], []  # keys may differ from item to item
    DataCollatorWithOrigin(lambda features: (seen.extend(features), {})[1])(
        NumberedDataset(items, domain_ids).__getitems__([1, 0])
    )
    assert seen == [{"y": [2]}, {"x": 1, "id": 5}]


def test_text_collators(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["the cat sat", "a mat", "the cat sat on a mat", "the"]
    encoded = [dict(tokenizer(text)) for text in texts]
    padded = assert_collates_alike(DataCollatorWithPadding(tokenizer), [{**e, "label": 1} for e in encoded])
    assert padded["input_ids"].shape == (3, 6) and (padded["input_ids"] == 0).any()

    assert_collates_alike(DataCollatorForLanguageModeling(tokenizer, mlm=False), encoded)
    masked = assert_collates_alike(DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5), encoded)
    assert (masked["labels"] != -100).any() and (masked["labels"] == -100).any()

    with_labels = [{**e, "labels": e["input_ids"][::-1]} for e in encoded]
    pairs = assert_collates_alike(DataCollatorForSeq2Seq(tokenizer), with_labels, torch.arange(4))
    assert (pairs["labels"] == -100).any()


def test_items_of_a_mapping_type_of_their_own_reach_the_collator_as_they_are(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoded = [tokenizer(text) for text in ("the cat", "a mat sat", "on", "the mat")]
    assert all(isinstance(item, BatchEncoding) and not isinstance(item, dict) for item in encoded)
    assert_collates_alike(DataCollatorWithPadding(tokenizer), encoded)


def test_vision_collator() -> None:
    def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = np.stack([np.asarray(item["image"], dtype=np.float32) / 255 for item in items])
        return {"pixel_values": torch.from_numpy(pixels), "labels": torch.tensor([item["label"] for item in items])}

    generator = np.random.default_rng(0)
    items = [{"image": generator.integers(0, 256, (4, 4, 3), dtype=np.uint8), "label": i} for i in range(4)]
    batch = assert_collates_alike(collate, items)
    assert batch["pixel_values"].shape == (3, 4, 4, 3)


def test_lambda_over_tuples() -> None:
    items = [(torch.full((2,), float(i)), i) for i in range(4)]
    assert_collates_alike(
        lambda pairs: {"x": torch.stack([x for x, _ in pairs]), "labels": torch.tensor([y for _, y in pairs])},
        items,
        torch.tensor([1, 1, 0, 0]),
    )


@pytest.mark.parametrize(
    ("collator", "kind"), [(list, "list"), (lambda items: torch.zeros(len(items)), "Tensor"), (tuple, "tuple")]
)
def test_batches_that_are_no_mapping_are_refused(collator: Callable[[list[Any]], Any], kind: str) -> None:
    features = NumberedDataset([{"x": 1}, {"x": 2}]).__getitems__([0, 1])
    with pytest.raises(
        TypeError, match=f"returned a {kind}, to which sample ids cannot be added; it must return a dict"
    ):
        DataCollatorWithOrigin(collator)(features)


def test_pop_origin_without_domains() -> None:
    batch = {"x": torch.zeros(2), SAMPLE_ID: torch.tensor([5, 3])}
    origin = pop_origin(batch)
    assert isinstance(origin, Origin) and origin.domain_ids is None
    assert origin.sample_ids.tolist() == [5, 3] and list(batch) == ["x"] and len(origin) == 2


# ---------------------------------------------------------------------------------------------------------------------
# pick_rows

ROWS = 4


def brute_force_pick(value: Any, indices: list[int]) -> Any:
    """Append row after row, entry by entry; no indexing with several rows at once."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0:
        picked = value[:0]
        for i in indices:
            rows = [picked, value[i : i + 1]]
            picked = torch.cat(rows) if isinstance(value, Tensor) else np.concatenate(rows)
        return picked
    if isinstance(value, (dict, BatchEncoding, BatchFeature)):
        picked = type(value)()
        for key in value:
            picked[key] = brute_force_pick(value[key], indices)
        return picked
    if isinstance(value, (list, tuple)):
        picked = []
        for i in indices if len(value) == ROWS else range(len(value)):
            picked.append(value[i] if len(value) == ROWS else brute_force_pick(value[i], indices))
        return type(value)(picked)
    return value


leaves = st.one_of(
    st.sampled_from([torch.float32, torch.int64, torch.bool]).flatmap(
        lambda dtype: st.sampled_from([(ROWS,), (ROWS, 3), (ROWS, 2, 2), (ROWS, 0)]).map(
            lambda shape: torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
        )
    ),
    st.sampled_from([(ROWS,), (ROWS, 2)]).map(lambda shape: np.arange(np.prod(shape)).reshape(shape)),
    st.sampled_from([["a", "b", "c", "d"], (1, 2, 3, 4), [{"k": i} for i in range(ROWS)]]),
    st.sampled_from([None, 2.5, 7, True, "text", torch.tensor(3.0), np.float32(1.5), np.array(2)]),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3).map(tuple),
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from(["x", "y", "z"]), trees, min_size=1),
    st.lists(st.integers(0, ROWS - 1), max_size=6),
    st.sampled_from([dict, OrderedDict, BatchEncoding, BatchFeature]),
)
def test_pick_rows_matches_the_loop(entries: dict[str, Any], indices: list[int], kind: type) -> None:
    batch = kind(entries)
    before = plain(batch)
    assert plain(pick_rows(batch, indices, ROWS)) == plain(brute_force_pick(batch, indices))
    assert plain(batch) == before


def test_pick_rows_by_hand() -> None:
    batch = {
        "x": torch.arange(6).view(3, 2),
        "nested": {"y": np.array([1, 2, 3]), "pair": (torch.tensor([7, 8, 9]), torch.tensor(5))},
        "names": ["a", "b", "c"],
        "step": 4,
        "note": "abc",  # as long as the batch has rows
    }
    picked = pick_rows(batch, [2, 0], 3)
    assert plain(picked) == plain(
        {
            "x": torch.tensor([[4, 5], [0, 1]]),
            "nested": {"y": np.array([3, 1]), "pair": (torch.tensor([9, 7]), torch.tensor(5))},
            "names": ["c", "a"],
            "step": 4,
            "note": "abc",
        }
    )


def test_pick_rows_keeps_gradients_and_memory_apart() -> None:
    x = torch.arange(3.0, requires_grad=True)
    picked = pick_rows({"x": x}, [1, 1], 3)["x"]
    assert torch.autograd.grad(picked.sum(), x)[0].tolist() == [0, 2, 0]
    y = torch.arange(3.0)
    pick_rows({"y": y}, [0, 1, 2], 3)["y"].fill_(9)
    assert y.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("batch", "path", "length"),
    [
        ({"input_ids": torch.zeros(1, 12), "position_ids": torch.zeros(1, 12)}, r"batch\['input_ids'\]", 1),
        ({"x": torch.zeros(3), "inner": {"flat": np.zeros(7)}}, r"batch\['inner'\]\['flat'\]", 7),
        ({"x": torch.zeros(3), "pair": (torch.zeros(3), torch.zeros(4))}, r"batch\['pair'\]\[1\]", 4),
    ],
)
def test_padding_free_batches_are_refused(batch: dict[str, Any], path: str, length: int) -> None:
    message = (
        rf"`{path}` has {length} rows where the batch has 3 samples, so rows cannot be selected\. Padding-free .*"
    )
    with pytest.raises(ValueError, match=message + r"`padding_free=False` and no packing\)"):
        pick_rows(batch, [0], 3)


# ---------------------------------------------------------------------------------------------------------------------
# Padding


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), st.sampled_from([18, 20, 32])
)
def test_padding_on_the_right_is_left_out_and_nothing_else(spans: list[tuple[int, int]], width: int) -> None:
    """Rows attend from one column to another, or to none; the first row has a label further to the right."""
    mask = torch.zeros(len(spans), width, dtype=torch.int64)
    for row, (start, length) in zip(mask, spans, strict=True):
        row[start : start + length] = 1
    tokens = torch.arange(mask.numel()).view(mask.shape) + 1
    labels = torch.where(mask > 0, tokens, -100)
    labels[0, 12] = 7
    batch = {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels, "weight": torch.ones(len(spans))}
    lengths = row_lengths(batch, len(spans))
    for length, row in zip(lengths.tolist(), ((mask > 0) | (labels != -100)).tolist(), strict=True):
        assert length == (width - row[::-1].index(True) if any(row) else width)
    cut = without_padding(batch, lengths)
    kept = cut["input_ids"].shape[1]
    multiple = {18: 1, 20: 1, 24: 8, 32: 32}[width]
    assert kept == multiple * -(-int(lengths.max()) // multiple)
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(cut[key], batch[key][:, :kept])
    assert cut["weight"] is batch["weight"] and cut["attention_mask"].sum() == mask.sum()


TOKENS = {"input_ids": torch.tensor([[5, 6, 0], [7, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}


@pytest.mark.parametrize(
    "batch",
    [
        {"pixel_values": torch.zeros(2, 3, 4, 4)},
        {**TOKENS, "attention_mask": torch.ones(2, 1, 3, 3)},
        {**TOKENS, "attention_mask": torch.ones(1, 3)},  # several samples in a row
        {**TOKENS, "decoder_input_ids": torch.ones(2, 5)},
        {**TOKENS, "positive_input_ids": torch.ones(2, 3)},  # another text, as wide by chance
        {**TOKENS, "teacher_logits": torch.ones(2, 3)},  # of three classes
    ],
)
def test_columns_of_something_else_are_not_left_out(batch: dict[str, Tensor]) -> None:
    assert row_lengths(batch, 2) is None


def test_padding_on_the_left_stays() -> None:
    """The first token of a row is predicted from what is before it, and positions are counted from there."""
    batch = {"input_ids": torch.tensor([[0, 0, 6], [0, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1], [0, 1, 1]])}
    assert row_lengths(batch, 2).tolist() == [3, 3]


def test_long_labels_of_an_encoder_decoder_stay_whole() -> None:
    """Source and target are padded to the same width, and the target is longer."""
    rows = [{"input_ids": [5, 0, 0], "attention_mask": [1, 0, 0], "labels": [7, 8, -100]}] * 2
    taken = CollatedRows(rows, default_data_collator, torch.device("cpu"), seed=0).take(torch.tensor([1]))
    assert taken["labels"].tolist() == [[7, 8]] and taken["input_ids"].tolist() == [[5, 0]]


def test_as_many_labels_as_tokens_are_not_padding() -> None:
    """Multi-label classification with three classes and three tokens."""
    batch = {**TOKENS, "labels": torch.ones(2, 3)}
    cut = without_padding(batch, row_lengths(batch, 2))
    assert cut["input_ids"].shape == (2, 2) and cut["labels"].shape == (2, 3)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=70), st.integers(1, 9))
def test_rows_are_split_by_length(lengths: list[int], min_rows: int) -> None:
    parts = split_by_length(torch.tensor(lengths), min_rows=min_rows)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(lengths)))
    assert all(len(part) >= min_rows for part in parts) or len(parts) == 1
    columns = [max(lengths[i] for i in part.tolist()) for part in parts]
    assert columns == sorted(columns)
    needed = sum(len(part) * column for part, column in zip(parts, columns, strict=True))
    assert needed <= 0.9 * len(lengths) * max(lengths) or len(parts) == 1


# ---------------------------------------------------------------------------------------------------------------------
# read_domains


def columns(values: list[Any]) -> list[Any]:
    """The same column as a list of dicts, a torch dataset and two arrow tables."""

    class Rows(Dataset):
        def __len__(self) -> int:
            return len(values)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"source": values[index], "x": 0}

    arrow = datasets.Dataset.from_dict({"source": values, "x": [0] * len(values)})
    return [[{"source": v, "x": 0} for v in values], Rows(), arrow, arrow.with_format("torch", columns=["x"])]


def test_domains_are_sorted_names() -> None:
    for dataset in columns(["web", "books", "web", "code"]):
        ids, names = read_domains(dataset, "source")
        assert ids.dtype == torch.int64 and ids.tolist() == [2, 0, 2, 1] and names == ["books", "code", "web"]
        ids, names = read_domains(dataset, "source", ["web", "unused", "code", "books"])
        assert ids.tolist() == [0, 3, 0, 2] and names == ["web", "unused", "code", "books"]


def test_domains_as_integers() -> None:
    for dataset in columns([2, 0, 2]):
        ids, names = read_domains(dataset, "source")
        assert ids.dtype == torch.int64 and ids.tolist() == [2, 0, 2] and names == ["0", "1", "2"]
        ids, names = read_domains(dataset, "source", ["a", "b", "c", "d"])
        assert ids.tolist() == [2, 0, 2] and names == ["a", "b", "c", "d"]
    others = [{"source": value} for value in (np.int64(1), torch.tensor(0), True)]
    assert read_domains(others, "source")[0].tolist() == [1, 0, 1]


def test_domains_as_classes() -> None:
    """Their names, of those that occur; or names that are given for their numbers."""
    rows = datasets.Dataset.from_dict({"source": ["web", "books", "web"]})
    rows = rows.cast_column("source", datasets.ClassLabel(names=["none", "web", "books"]))
    assert rows[0]["source"] == 1
    ids, names = read_domains(rows, "source")
    assert (ids.tolist(), names) == ([1, 0, 1], ["books", "web"])
    ids, names = read_domains(rows, "source", ["web", "books", "code"])
    assert (ids.tolist(), names) == ([0, 1, 0], ["web", "books", "code"])
    ids, names = read_domains(rows, "source", ["a", "b", "c"])
    assert (ids.tolist(), names) == ([1, 2, 1], ["a", "b", "c"])
    assert name_domains(rows, "source") == ["web", "books", "web"]
    assert name_domains(rows, "source", ["a", "b", "c"]) == ["b", "c", "b"]


def test_domains_past_a_transform() -> None:
    """A transform may drop the column; the table still has it."""
    dataset = datasets.Dataset.from_dict({"source": ["b", "a"], "x": [0, 1]}).with_transform(
        lambda rows: {"x": rows["x"]}
    )
    assert "source" not in dataset[0]
    assert read_domains(dataset, "source")[0].tolist() == [1, 0]
    selected = datasets.Dataset.from_dict({"source": ["b", "a", "c"]}).select([2, 0])
    ids, names = read_domains(selected, "source")
    assert ids.tolist() == [1, 0] and names == ["b", "c"]


def test_missing_domain_column_is_refused() -> None:
    generic, torch_rows, arrow, _ = columns(["web"])
    with pytest.raises(
        ValueError, match=r"no column `domain`.* its columns are \['source', 'x'\]\. Set `domain_column`"
    ):
        read_domains(arrow, "domain")
    for dataset in (generic, torch_rows):
        with pytest.raises(ValueError, match=r"has no key `domain` to read its domain from: \['source', 'x'\]"):
            read_domains(dataset, "domain")
    with pytest.raises(ValueError, match="has no key `domain` to read its domain from: tuple"):
        read_domains([(1, 2)], "domain")


@pytest.mark.parametrize(
    ("values", "domain_names", "message"),
    [
        (["web", "books"], ["web"], r"holds domains that `domain_names` \['web'\] does not list: \['books'\]"),
        ([0, 2], ["a", "b"], r"Column `source` holds domain 2, `domain_names` has only 2: \['a', 'b'\]"),
        ([0, -1], None, r"must hold names or integers 0\.\.D-1, got -1"),
        ([0.0, 1.5], None, r"must hold names or integers 0\.\.D-1, got values of \['float'\]"),
        ([1, None], None, r"must hold names or integers 0\.\.D-1, got values of \['NoneType', 'int'\]"),
        ([[1], [2]], None, r"must hold names or integers 0\.\.D-1, got values of \['list'\]"),
    ],
)
def test_domains_that_are_refused(values: list[Any], domain_names: list[str] | None, message: str) -> None:
    for dataset in columns(values):
        with pytest.raises(ValueError, match=message):
            read_domains(dataset, "source", domain_names)


def test_names_mixed_with_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got values of \['int', 'str'\]"):
        read_domains([{"source": 0}, {"source": "1"}], "source")


# ---------------------------------------------------------------------------------------------------------------------
# Seeds and private randomness


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=4))
def test_derived_seed_is_a_function_below_two_to_the_32(parts: list[int]) -> None:
    seed = derive_seed(*parts)
    assert type(seed) is int and 0 <= seed < 2**32 and derive_seed(*parts) == seed


def test_derived_seeds_differ() -> None:
    seeds = Counter(derive_seed(*parts) for parts in itertools.product(range(-3, 20), repeat=3))
    assert max(seeds.values()) == 1
    # The number of parts counts too: batch 3 of rank 0 must not share its seed with the permutation of pass 3.
    nested = [derive_seed(*parts) for n in range(1, 5) for parts in itertools.product((0, 1, 7), repeat=n)]
    assert len(set(nested)) == len(nested)


def global_states() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state().tolist()


def draws() -> tuple[Any, ...]:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_private_randomness_leaves_no_trace() -> None:
    draws()
    before = global_states()
    with private_randomness(7):
        first = draws()
        inside = global_states()
    assert all(inside[i] != before[i] for i in (0, 1, 3))  # all three generators were in use
    assert global_states() == before
    with pytest.raises(RuntimeError, match="inside"), private_randomness(7):
        draws()
        raise RuntimeError("inside")
    assert global_states() == before

    draws()  # wherever the global state is
    with private_randomness(7):
        assert draws() == first
    with private_randomness(8):
        others = draws()
    assert all(a != b for a, b in zip(first, others, strict=True))


def test_private_randomness_can_be_nested() -> None:
    with private_randomness(1):
        expected = draws(), draws()
    with private_randomness(1):
        first = draws()
        with private_randomness(2):
            draws()
        assert (first, draws()) == expected


def test_private_randomness_seeds_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.manual_seed`` seeds every accelerator: dropout would be drawn anew after each target batch."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(0)
    assert seeded  # the premise
    seeded.clear()
    with private_randomness(7), private_randomness(8, torch.device("cpu")):
        draws()
    assert not seeded


@pytest.mark.gpu
@pytest.mark.parametrize("inside", [False, True])
def test_private_randomness_on_an_accelerator(inside: bool) -> None:
    device = torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())
    module = torch.get_device_module(device)
    before = module.get_rng_state(device)
    values = []
    for _ in range(2):
        with private_randomness(7, device if inside else None):
            if inside:
                values.append(torch.rand(3, device=device).tolist())
        assert torch.equal(module.get_rng_state(device), before)
    assert not inside or values[0] == values[1]


# ---------------------------------------------------------------------------------------------------------------------
# EndlessLoader


@given(st.integers(1, 12), st.integers(1, 5), st.sampled_from([1, 2, 3]), st.integers(0, 3))
def test_each_pass_holds_each_sample_once(num: int, batch_size: int, num_ranks: int, seed: int) -> None:
    loaders = [EndlessLoader(range(num), list, batch_size, seed, rank, num_ranks) for rank in range(num_ranks)]
    drawn: list[int] = []
    for _ in range(-(-4 * num // (batch_size * num_ranks))):
        for loader in loaders:
            batch = loader.draw()
            assert len(batch) == batch_size  # always full, also when the dataset is smaller
            drawn += batch
    passes = [drawn[first : first + num] for first in range(0, 4 * num, num)]
    assert all(sorted(one) == list(range(num)) for one in passes)


def test_passes_and_seeds_are_permuted_differently() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return EndlessLoader(range(50), list, 50, seed).batch_at(epoch)

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(one) for one in orders}) == 9 and list(range(50)) not in orders
    assert [order(seed, epoch) for seed in range(3) for epoch in range(3)] == orders


def noisy(items: list[int]) -> tuple[list[int], tuple[Any, ...]]:
    return items, draws()


@pytest.mark.parametrize("rank", [0, 1])
def test_batch_is_a_function_of_its_position(rank: int) -> None:
    """Also with a collator that draws random numbers, such as one that masks tokens."""
    loader = EndlessLoader(range(7), noisy, batch_size=3, seed=4, rank=rank, num_ranks=2)
    expected = [loader.draw() for _ in range(8)]
    assert loader.position == 8
    assert len({noise for _, noise in expected}) == 8  # each batch has its own randomness
    random.seed(99)
    torch.manual_seed(99)
    before = global_states()
    again = EndlessLoader(range(7), noisy, batch_size=3, seed=4, rank=rank, num_ranks=2)
    for position in (5, 0, 7, 5, 2):
        assert again.batch_at(position) == expected[position]
    assert again.position == 0 and global_states() == before
    # Resumed: the position is the whole state.
    again.position = 3
    assert [again.draw() for _ in range(5)] == expected[3:]
    other = EndlessLoader(range(7), noisy, batch_size=3, seed=4, rank=1 - rank, num_ranks=2)
    assert all(other.batch_at(p)[1] != expected[p][1] for p in range(8))


def test_masking_of_a_batch_is_repeatable(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = [dict(tokenizer(text)) for text in ("the cat sat on a mat", "a mat sat", "the mat on the cat")]
    loader = EndlessLoader(encoded, DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5), 2, seed=0)
    first = [plain(loader.batch_at(p)) for p in range(4)]
    assert [plain(loader.batch_at(p)) for p in range(4)] == first
    assert len({str(batch) for batch in first}) == 4


def test_loader_reads_arrow_rows_in_one_call() -> None:
    assert plain(fetch(table(), [3, 1])) == plain([{"x": 9, "labels": 1}, {"x": 1, "labels": 1}])
    assert fetch([5, 6, 7], [2, 0]) == [7, 5]
    calls = []

    def transform(rows: dict[str, list[int]]) -> dict[str, list[int]]:
        calls.append(len(rows["x"]))
        return rows

    EndlessLoader(table().with_transform(transform), list, batch_size=4, seed=0).draw()
    assert calls == [4]


@pytest.mark.parametrize("collator", [default_data_collator, RemoveColumnsCollator(default_data_collator, ["x"])])
def test_the_collator_can_be_sent_to_a_worker(collator: Any) -> None:
    collate = pickle.loads(pickle.dumps(DataCollatorWithOrigin(collator)))
    numbered = NumberedDataset([{"x": 1.0}, {"x": 2.0}])
    assert pop_origin(collate([numbered[1], numbered[0]])).sample_ids.tolist() == [1, 0]
