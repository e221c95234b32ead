"""Where samples come from: ids and domains past any collator, rows of a collated batch, the target loader."""

import math
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm.auto import tqdm
from transformers.trainer_utils import RemoveColumnsCollator

from hf_bilevel.losses import IGNORE_INDEX

# Not plain "sample_id": datasets have columns of that name, and theirs must reach their collator untouched.
SAMPLE_ID = "bilevel_sample_id"
DOMAIN_ID = "bilevel_domain_id"

MAX_UNNAMED = 100_000  # domains known by number alone; a larger number is no domain but a hash, a time or a row


@dataclass(frozen=True)
class Origin:
    """Where the rows of a batch come from.

    Attributes:
        sample_ids: Index of each row in the training dataset (or its position in a stream), int64, ``(n,)``.
        domain_ids: Index of each row's domain, int64, ``(n,)``, or None without domains.
    """

    sample_ids: Tensor
    domain_ids: Tensor | None

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True)
class _Numbered:
    """An item that is not a dict, with its ids beside it."""

    item: Any
    sample_id: int
    domain_id: int | None


def number_item(item: Any, sample_id: int, domain_id: int | None) -> Any:
    """Give an item its ids, for ``DataCollatorWithOrigin`` to take off again."""
    if not isinstance(item, dict):
        return _Numbered(item, sample_id, domain_id)
    ids = {SAMPLE_ID: sample_id} if domain_id is None else {SAMPLE_ID: sample_id, DOMAIN_ID: domain_id}
    return {**item, **ids}


class NumberedDataset(Dataset):
    """A map-style dataset whose items carry their index, and their domain.

    Args:
        dataset: Any dataset with ``__len__`` and ``__getitem__``; items may be dicts or anything a collator takes.
        domain_ids: Domain of each item, int64, ``(len(dataset),)``, or None.
    """

    def __init__(self, dataset: Any, domain_ids: Tensor | None = None) -> None:
        self.dataset = dataset
        self.domain_ids = domain_ids

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on, for datasets whose augmentation depends on it."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def _domain_id(self, index: int) -> int | None:
        return None if self.domain_ids is None else int(self.domain_ids[index])

    def __getitem__(self, index: int) -> Any:
        index = int(index)
        return number_item(self.dataset[index], index, self._domain_id(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return several items, read in one call where the dataset can."""
        items = fetch(self.dataset, indices)
        return [number_item(item, int(i), self._domain_id(i)) for item, i in zip(items, indices, strict=True)]


class NumberedStream(IterableDataset):
    """A streaming dataset whose items carry their position in the stream.

    Item i of a stream has id i in every pass. With several loader workers, worker w of W gives its i-th item the id
    i * W + w, so ids stay unique.

    Args:
        dataset: Any iterable dataset.
        domain_column: Key of an item that holds its domain, or None.
        domain_names: Names of the domains; the column may hold their indices instead.
    """

    def __init__(self, dataset: Any, domain_column: str | None, domain_names: list[str] | None) -> None:
        self.dataset = dataset
        self.domain_column = domain_column
        self._index = None if domain_names is None else {name: i for i, name in enumerate(domain_names)}

    def __len__(self) -> int:
        return len(self.dataset)  # a TypeError where the stream has no length, as Trainer expects

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on, for streams that shuffle."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for i, item in enumerate(self.dataset):
            domain_id = None
            if self.domain_column is not None:
                if not isinstance(item, Mapping) or self.domain_column not in item:
                    raise ValueError(
                        f"Item {i} of the stream has no key `{self.domain_column}` to read its domain from."
                    )
                domain_id = self._find_domain(item[self.domain_column], i)
            yield number_item(item, first + i * step, domain_id)

    def _find_domain(self, domain: Any, i: int) -> int:
        try:
            number = operator.index(domain)  # of NumPy's and torch's integers too
        except TypeError:
            number = -1 if self._index is None or not isinstance(domain, str) else self._index.get(domain, -1)
        if 0 <= number < (MAX_UNNAMED if self._index is None else len(self._index)):
            return number
        if self._index is None:
            raise ValueError(
                f"Item {i} of the stream has the domain {domain!r:.200} as `{self.domain_column}`; give integers 0..D-1, D at "
                f"most {MAX_UNNAMED:,}, or names and `domain_names`."
            )
        raise ValueError(
            f"`domain_names` {sorted(self._index)} does not list the domain {domain!r:.200}, which item {i} of the stream has "
            f"as `{self.domain_column}`."
        )


class DataCollatorWithOrigin:
    """Carry sample and domain ids past a collator that knows nothing of them.

    Wraps any collator (default, padding, language modelling, seq2seq, vision, a lambda): takes the ids off the items,
    calls it with exactly the items it would have had, and adds ``int64`` tensors of shape ``(n,)`` to the batch. The rows of
    a batch are to be in the order of the items, or of the list of items as the collator leaves it.

    Args:
        collator: The collator to wrap; must return a mapping.

    Example:
        >>> from transformers import default_data_collator
        >>> items = NumberedDataset([{"x": 1.0, "labels": 0}, {"x": 2.0, "labels": 1}])
        >>> batch = DataCollatorWithOrigin(default_data_collator)([items[1], items[0]])
        >>> pop_origin(batch).sample_ids, sorted(batch)
        (tensor([1, 0]), ['labels', 'x'])
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        # The Trainer's own, which would hand on another list, is taken apart.
        self._remover = collator if isinstance(collator, RemoveColumnsCollator) else None
        self.collator = collator if self._remover is None else collator.data_collator

    def __call__(self, features: list[Any]) -> Any:  # noqa: D102
        sample_ids, domain_ids, items = [], [], []
        for feature in features:
            if isinstance(feature, _Numbered):
                sample_id, domain_id, item = feature.sample_id, feature.domain_id, feature.item
            else:
                item = dict(feature)
                sample_id, domain_id = item.pop(SAMPLE_ID), item.pop(DOMAIN_ID, None)
            sample_ids.append(sample_id)
            domain_ids.append(domain_id)
            items.append(item if self._remover is None else self._remover._remove_columns(item))
        given = list(map(id, items))
        batch = self.collator(items)
        left = list(map(id, items))
        if left != given and sorted(left) == sorted(given):  # the collator has sorted the list that it was given
            places: dict[int, list[int]] = {}
            for place, key in reversed(list(enumerate(given))):  # one object may be there several times
                places.setdefault(key, []).append(place)
            order = [places[key].pop() for key in left]
            sample_ids, domain_ids = [sample_ids[i] for i in order], [domain_ids[i] for i in order]
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"The data collator returned a {type(batch).__name__}, to which sample ids cannot be added; it must "
                "return a dict of model inputs, as Trainer's `model(**inputs)` needs."
            )
        batch[SAMPLE_ID] = torch.tensor(sample_ids, dtype=torch.int64)
        if domain_ids[0] is not None:
            batch[DOMAIN_ID] = torch.tensor(domain_ids, dtype=torch.int64)
        return batch


def pop_origin(batch: Any) -> Origin:
    """Take the ids out of a batch, so that the model does not see them."""
    domain_ids = batch.pop(DOMAIN_ID) if DOMAIN_ID in batch else None
    return Origin(batch.pop(SAMPLE_ID), domain_ids)


def pick_rows(batch: Mapping[str, Any], indices: list[int], num_rows: int) -> dict[str, Any]:
    """Keep some rows of a collated batch.

    Tensors and arrays are indexed along their first dimension, lists and tuples of one entry per row by position,
    mappings, named tuples and other sequences entry by entry; numbers, strings, None and zero-dimensional tensors stay as they are.

    Args:
        batch: A collated batch.
        indices: Rows to keep, in the order wanted.
        num_rows: Number of rows of the batch.

    Returns:
        A batch of the same type and structure with ``len(indices)`` rows.

    Padding-free batches, which hold several samples in a row, are refused with a ValueError.

    Example:
        >>> pick_rows({"x": torch.tensor([[1], [2], [3]]), "names": ["a", "b", "c"], "scale": 2.0}, [2, 0], 3)
        {'x': tensor([[3],
                [1]]), 'names': ['c', 'a'], 'scale': 2.0}
    """
    return _pick(batch, indices, num_rows, "batch")


def check_images_of_rows(batch: Any, image_token: int, num_rows: int) -> None:
    """Refuse a batch with as many images as rows of which a row has none: it is not known whose images are whose.

    Args:
        batch: A collated batch.
        image_token: What stands for a part of an image in ``input_ids``.
        num_rows: Number of rows of the batch.

    Raises:
        ValueError: If there is such a row.

    Cost: one host sync, for batches with ``pixel_values``.

    Example:
        >>> batch = {"input_ids": torch.tensor([[9, 9, 4], [3, 9, 4]]), "pixel_values": torch.zeros(2, 3, 8, 8)}
        >>> check_images_of_rows(batch, 9, 2)
        >>> check_images_of_rows(batch, 3, 2)
        Traceback (most recent call last):
        ValueError: A batch has 2 images for its 2 samples, of which 1 have no image tokens, so that others have several and rows...
    """
    pixels, tokens = batch.get("pixel_values"), batch.get("input_ids")
    if not isinstance(pixels, Tensor) or not isinstance(tokens, Tensor) or "pixel_attention_mask" in batch:
        return  # with that mask each row has its own images, padded to the largest number
    num_without = num_rows - int((tokens == image_token).any(1).sum())
    if len(pixels) == num_rows and num_without > 0:
        raise ValueError(
            f"A batch has {num_rows} images for its {num_rows} samples, of which {num_without} have no image tokens, so that others "
            "have several and rows cannot be selected with their images. Use `granularity='token'` of BladeTrainer, or samples of "
            "one image each."
        )


def _pick(value: Any, indices: list[int], num_rows: int, path: str) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim == 0:
            return value
        if len(value) != num_rows:
            raise ValueError(
                f"`{path}` has {len(value)} rows where the batch has {num_rows} samples, so rows cannot be selected. "
                "Padding-free and flattened batches hold several samples in a row: use a padding collator (for "
                "SFTTrainer `padding_free=False` and no packing). Images that a processor joins, of all samples, cannot be told apart "
                "by sample: use `granularity='token'` of BladeTrainer, which leaves rows whole."
            )
        return value[indices]
    if isinstance(value, Mapping):
        picked = {key: _pick(entry, indices, num_rows, f"{path}[{key!r}]") for key, entry in value.items()}
        return picked if type(value) is dict else type(value)(picked)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_pick(getattr(value, f), indices, num_rows, f"{path}.{f}") for f in value._fields))
    if isinstance(value, (list, tuple)):
        if len(value) == num_rows:
            return type(value)([value[i] for i in indices])
        return type(value)([_pick(entry, indices, num_rows, f"{path}[{i}]") for i, entry in enumerate(value)])
    return value


class CollatedRows:
    """All rows of a map-style dataset, collated once and kept on a device, from which any can be taken.

    For datasets whose rows are read many hundred times. Whatever is random in items or collator (augmentation, masking) is
    drawn once.

    Args:
        dataset: A dataset with ``__len__`` and ``__getitem__``, not empty.
        collator: From a list of items to a mapping.
        device: Where to keep the rows.
        seed: Of items and collator.

    Raises:
        ValueError: If the collator returns batches whose entries are not one per row (padding-free collators).

    Example:
        >>> from transformers import default_data_collator
        >>> items = [{"input_ids": [1, 0], "attention_mask": [1, 0]}, {"input_ids": [2, 3], "attention_mask": [1, 1]}]
        >>> rows = CollatedRows(items, default_data_collator, torch.device("cpu"), seed=0)
        >>> rows.take(torch.tensor([0, 0]))["input_ids"], rows.take(torch.tensor([1]))["input_ids"]
        (tensor([[1],
                [1]]), tensor([[2, 3]]))
    """

    def __init__(self, dataset: Any, collator: Callable[[list[Any]], Any], device: torch.device, seed: int) -> None:
        self._num = len(dataset)
        with private_randomness(seed):
            batch = collator(fetch(dataset, range(self._num)))
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"The data collator returned a {type(batch).__name__}; it must return a dict of model inputs."
            )
        pick_rows(batch, [0], self._num)
        lengths = row_lengths(batch, self._num)
        self._lengths = None if lengths is None else lengths.cpu()
        self.batch = send_to_device(batch, device)

    def __len__(self) -> int:
        return self._num

    def take(self, indices: Tensor) -> Any:
        """Take rows, as they would be collated alone: columns on the right that are padding in all of them are left out.

        Args:
            indices: On the CPU, ``(k,)``, k at least 1; rows may repeat.

        Returns:
            A batch of k rows.
        """
        batch = pick_rows(self.batch, indices.tolist(), self._num)
        return batch if self._lengths is None else without_padding(batch, self._lengths[indices])


def row_lengths(batch: Any, num_rows: int) -> Tensor | None:
    """Find how many columns of a batch that is padded on the right each row needs, to attend to or for a label.

    Args:
        batch: A collated batch.
        num_rows: Rows of the batch.

    Returns:
        int64, ``(num_rows,)``, on the batch's device; a row that uses no column has the whole width. None where columns cannot be
        left out safely: without an ``attention_mask`` of a row for each sample, for an encoder-decoder with columns of its own
        (``decoder_...``), and with tensors as wide as the mask of which it is not known that they are the same tokens.

    Example:
        >>> row_lengths({"attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]])}, 2)
        tensor([2, 3])
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != num_rows:
        return None
    others = [key for key, entry in batch.items() if _is_as_wide(entry, mask.shape) and not _is_of_tokens(key, entry)]
    if any(key != "labels" for key in others) or any(str(key).startswith("decoder_") for key in batch):
        return None
    used = mask.bool()
    for key in ("labels", "shift_labels"):
        if _is_as_wide(batch.get(key), mask.shape) and _is_of_tokens(key, batch[key]):
            used = used | (batch[key] != IGNORE_INDEX)
    used = used | ~used.any(1, keepdim=True)
    return mask.shape[1] - used.flip(1).int().argmax(1)


def without_padding(batch: Any, lengths: Tensor) -> Any:
    """Leave out the columns on the right that no row of a batch needs, as a collator that pads to the longest row would.

    A multiple of 8, 16, 32 or 64 stays one, as ``pad_to_multiple_of`` makes it for the sake of speed.

    Args:
        batch: A collated batch with an ``attention_mask``.
        lengths: Of its rows, from ``row_lengths``, on the CPU.

    Returns:
        A batch of the same type.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> without_padding(batch, torch.tensor([2]))["input_ids"]
        tensor([[5, 6]])
    """
    shape = batch["attention_mask"].shape
    multiple = min(64, shape[1] & -shape[1])  # the largest power of two that the width is a multiple of
    multiple = multiple if multiple >= 8 else 1
    width = multiple * math.ceil(int(lengths.max()) / multiple)
    if width == shape[1]:
        return batch
    return type(batch)(
        {
            key: entry[:, :width].contiguous() if _is_as_wide(entry, shape) and _is_of_tokens(key, entry) else entry
            for key, entry in batch.items()
        }
    )


# Whatever has a column for each token of `attention_mask`. Another sequence of the same width has its own.
_OF_TOKENS = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "labels",
    "shift_labels",
    "completion_mask",
    "assistant_masks",
    "special_tokens_mask",
    "global_attention_mask",
    "bbox",
}


def _is_as_wide(entry: Any, shape: torch.Size) -> bool:
    return isinstance(entry, Tensor) and entry.shape[:2] == shape


def _is_of_tokens(key: Any, entry: Tensor) -> bool:
    # Several labels of a row can be as many as its tokens.
    return key in _OF_TOKENS and not (key == "labels" and entry.is_floating_point())


def split_by_length(lengths: Tensor, min_rows: int = 8, min_saving: float = 0.1) -> list[Tensor]:
    """Group rows of like length, where padding each group to its own longest row saves much of a forward pass.

    The rows are sorted and cut into equal parts, again and again into twice as many while that saves a tenth.

    Args:
        lengths: Columns that each row needs, int64, ``(n,)``, on the CPU.
        min_rows: Rows of a part; smaller ones keep a device waiting.
        min_saving: Share of the remaining columns that a cut must save.

    Returns:
        Row numbers of each part, which together are all rows; one part, in order, if nothing is saved.

    Example:
        >>> split_by_length(torch.tensor([9, 2, 9, 1]), min_rows=2)
        [tensor([3, 1]), tensor([0, 2])]
    """
    order = lengths.argsort(stable=True)
    parts, columns = [torch.arange(len(lengths))], len(lengths) * int(lengths.max())
    while len(lengths) // (2 * len(parts)) >= min_rows:
        finer = list(order.tensor_split(2 * len(parts)))
        needed = sum(len(part) * int(lengths[part[-1]]) for part in finer)
        if needed > (1 - min_saving) * columns:
            break
        parts, columns = finer, needed
    return parts


def plain_copy(value: Any) -> Any:
    """Copy a batch to the CPU as dicts, lists and tensors only, which ``torch.load`` reads back safely."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":  # text, objects
            return plain_copy(value.tolist())
        return torch.tensor(value.astype(value.dtype.newbyteorder("="), order="C"))
    if isinstance(value, Mapping):
        return {key: plain_copy(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_copy(entry) for entry in value]
    return value


def fetch(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """Read items of a map-style dataset, in one call where it can."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(list(indices))
    return [dataset[i] for i in indices]


def read_domains(dataset: Any, column: str, domain_names: list[str] | None = None) -> tuple[Tensor, list[str]]:
    """Read the domain of every item of a map-style dataset.

    Args:
        dataset: A dataset whose items (or, for ``datasets.Dataset``, whose table) have the column.
        column: Name of the column; it holds names, a ``ClassLabel``'s among them, or integers.
        domain_names: Names in the order wanted; sorted names of what occurs if None. For integers, names of 0..D-1.

    Returns:
        Domain ids, int64, ``(len(dataset),)``, and the names of the domains.

    Raises:
        ValueError: If the column is missing, holds something else, or a domain not in ``domain_names``.

    Example:
        >>> read_domains([{"source": "web"}, {"source": "books"}, {"source": "web"}], "source")
        (tensor([1, 0, 1]), ['books', 'web'])
    """
    if hasattr(dataset, "column_names"):
        if column not in dataset.column_names:
            raise ValueError(
                f"`train_dataset` has no column `{column}` to read domains from; its columns are "
                f"{sorted(dataset.column_names)}. Set `domain_column` to one of them."
            )
        values = _names_of_classes(dataset, column, domain_names)
    else:
        items = (dataset[i] for i in tqdm(range(len(dataset)), desc="Reading domains", leave=False))
        values = []
        for item in items:
            if not isinstance(item, Mapping) or column not in item:
                keys = sorted(item) if isinstance(item, Mapping) else type(item).__name__
                raise ValueError(f"An item of `train_dataset` has no key `{column}` to read its domain from: {keys}.")
            values.append(item[column])
    if all(isinstance(value, str) for value in values):
        names = sorted(set(values)) if domain_names is None else domain_names
        index = {name: i for i, name in enumerate(names)}
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"Column `{column}` holds domains that `domain_names` {names} does not list: {unknown}.")
        return torch.tensor([index[value] for value in values], dtype=torch.int64), names
    try:
        ids = torch.tensor([operator.index(value) for value in values], dtype=torch.int64)  # int() would truncate
    except TypeError:
        kinds = sorted({type(value).__name__ for value in values})
        raise ValueError(f"Column `{column}` must hold names or integers 0..D-1, got values of {kinds}.") from None
    except (OverflowError, RuntimeError, ValueError):  # of torch, by how far it is too large
        raise ValueError(f"Column `{column}` must hold names or integers 0..D-1, got one beyond 64 bits.") from None
    if int(ids.min()) < 0:
        raise ValueError(f"Column `{column}` must hold names or integers 0..D-1, got {int(ids.min())}.")
    if domain_names is None and int(ids.max()) >= MAX_UNNAMED:
        raise ValueError(
            f"Column `{column}` must hold names or integers 0..D-1, D at most {MAX_UNNAMED:,}, got {int(ids.max())}. Make them "
            "strings to have as many domains as there are different values."
        )
    names = [str(i) for i in range(int(ids.max()) + 1)] if domain_names is None else domain_names
    if int(ids.max()) >= len(names):
        raise ValueError(
            f"Column `{column}` holds domain {int(ids.max())}, `domain_names` has only {len(names)}: {names}."
        )
    return ids, names


def name_domains(dataset: datasets.Dataset, column: str, domain_names: list[str] | None = None) -> list[str]:
    """Name the domain of every row as ``read_domains`` names those of the pool, also where the pool lacks it.

    Args:
        dataset: A dataset with the column.
        column: Its name; it holds names or integers.
        domain_names: As for ``read_domains``.

    Returns:
        The name of each row's domain.

    Example:
        >>> name_domains(datasets.Dataset.from_dict({"source": [1, 0, 2]}), "source", ["web", "books"])
        ['books', 'web', '2']
    """
    names = domain_names or []
    return [
        names[value] if isinstance(value, int) and 0 <= value < len(names) else str(value)
        for value in _names_of_classes(dataset, column, domain_names)
    ]


def _names_of_classes(dataset: Any, column: str, domain_names: list[str] | None) -> list[Any]:
    """Read a column, a ``ClassLabel`` as names, unless it is numbers of other names."""
    values = list(dataset.with_format(None)[column])
    feature = dataset.features[column]
    if not isinstance(feature, datasets.ClassLabel) or feature.names is None:
        return values
    if domain_names is not None and set(feature.names).isdisjoint(domain_names):
        return values
    return [feature.names[v] if isinstance(v, int) and 0 <= v < len(feature.names) else v for v in values]


def derive_seed(*parts: int) -> int:
    """Mix integers into a seed below 2**32, the same on every platform.

    Args:
        *parts: Integers of any size and sign; their order and their number matter.

    Returns:
        The seed.

    Example:
        >>> derive_seed(0, 1) != derive_seed(1, 0)
        True
    """
    # The number of parts too: SeedSequence pads with zeros, so (1,) and (1, 0) would give one seed.
    return int(np.random.SeedSequence([len(parts), *(part % 2**32 for part in parts)]).generate_state(1)[0])


@contextmanager
def private_randomness(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run random code on a seed of its own and leave no trace in the global generators.

    Forks Python's, NumPy's and torch's state, the latter on the CPU and on ``device``. The Trainer restores the global
    state *after* it has fetched the first batches of a resumed run, so what happens there must not depend on it.

    Args:
        seed: Below 2**32, for instance from ``derive_seed``.
        device: An accelerator whose generator is used inside, or None.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    accelerator = device is not None and device.type not in ("cpu", "meta")
    devices = [device.index or 0] if accelerator else []
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type if accelerator else "cuda"):
            random.seed(seed)
            np.random.seed(seed)
            # Not torch.manual_seed: it seeds every accelerator, also those that are not forked here.
            torch.default_generator.manual_seed(seed)
            for index in devices:
                module = torch.get_device_module(device)
                with module.device(index) if hasattr(module, "device") else nullcontext():  # MPS has but one
                    module.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@lru_cache(maxsize=8)
def _permutation(num: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num, generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))


class EndlessLoader:
    """An endless, seeded stream of batches of a map-style dataset, beside the Trainer's own loader.

    Batch p is a pure function of (seed, p, rank), its collator's randomness included, so the whole state is the number
    of batches drawn, resuming is exact, and a batch can be drawn again. Every pass is a new permutation; over all ranks
    each pass holds every sample once; batches are always full, running on into the next pass.

    Args:
        dataset: A dataset with ``__len__`` and ``__getitem__``, not empty.
        collator: From a list of items to a batch.
        batch_size: Rows per rank, positive.
        seed: Of permutations and collator.
        rank: This process.
        num_ranks: Number of processes.

    Example:
        >>> loader = EndlessLoader([10, 11, 12], list, batch_size=2, seed=0)
        >>> seen = [loader.draw(), loader.draw(), loader.draw()]
        >>> sorted(sum(seen, []))
        [10, 10, 11, 11, 12, 12]
        >>> loader.position, loader.batch_at(0) == seen[0]
        (3, True)
    """

    def __init__(
        self,
        dataset: Any,
        collator: Callable[[list[Any]], Any],
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.dataset = dataset
        self.collator = collator
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.position = 0

    def batch_at(self, position: int) -> Any:
        """Return batch ``position``, on the CPU."""
        num = len(self.dataset)
        first = (position * self.num_ranks + self.rank) * self.batch_size
        indices = [
            int(_permutation(num, self.seed, flat // num)[flat % num])
            for flat in range(first, first + self.batch_size)
        ]
        with private_randomness(derive_seed(self.seed, position, self.rank)):
            return self.collator(fetch(self.dataset, indices))

    def draw(self) -> Any:
        """Return the next batch."""
        self.position += 1
        return self.batch_at(self.position - 1)
