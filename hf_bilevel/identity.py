"""Whether a dataset is the one that ids were counted in: by its fingerprint, or by what its rows hold."""

import hashlib
from pathlib import PurePath
from typing import Any
from weakref import WeakKeyDictionary

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

NUM_COMPARED = 1000
_ROWS_READ_TOGETHER = 10  # Arrow joins no more than 2 GB of text

_known: WeakKeyDictionary[datasets.Dataset, str] = WeakKeyDictionary()


def rows_checksum(dataset: Any) -> str | None:
    """Summarise a dataset's length, columns and up to 1,000 rows, evenly spaced, first and last among them.

    A fingerprint of ``datasets`` depends on the path and the time of the file that was loaded, and on every preparation since.
    This depends on content alone, so that it knows a file that was moved, copied or touched, on another machine too. The order
    of the columns does not count. Images and the like are compared as they are stored, not decoded; one that is stored as a path
    by its file's name. A change of single rows between those that are compared is not noticed; another order of the rows is.

    Args:
        dataset: Any; only a ``datasets.Dataset`` has rows that can be compared.

    Returns:
        SHA-256 in 64 hexadecimal digits, or None for other datasets, streams, and columns of a kind that cannot be compared. At most
        1,000 rows are read, once for each dataset object.

    Example:
        >>> pool = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
        >>> copy = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}, {"text": "c"}])
        >>> rows_checksum(pool) == rows_checksum(copy), rows_checksum(pool) == rows_checksum(copy.select([0, 2, 1]))
        (True, False)
    """
    if not isinstance(dataset, datasets.Dataset):
        return None
    if dataset not in _known:
        try:
            _known[dataset] = _checksum(dataset)
        except (
            pyarrow.ArrowException,
            TypeError,
            ValueError,
        ):  # a column of a kind that is not known here must not end a run
            return None
    return _known[dataset]


def is_dataset_of(dataset: Any, fingerprint: str | None, checksum: str | None) -> bool:
    """Say whether a dataset is the one with this fingerprint, or at least holds the rows of this checksum.

    Args:
        dataset: Any.
        fingerprint: Of the dataset that is looked for; None if it has none.
        checksum: Of its rows, see ``rows_checksum``; None if it is not known.

    Returns:
        Whether either is the same.
    """
    same = getattr(dataset, "_fingerprint", None) == fingerprint
    return same or checksum is not None and rows_checksum(dataset) == checksum


def _checksum(dataset: datasets.Dataset) -> str:
    digest = hashlib.sha256(f"{len(dataset)} {sorted(dataset.column_names)}".encode())
    ids = np.linspace(0, len(dataset) - 1, min(NUM_COMPARED, len(dataset))).round().astype(np.int64)
    stored = dataset.with_format("arrow")
    for start in range(0, len(ids), _ROWS_READ_TOGETHER):
        rows = stored[ids[start : start + _ROWS_READ_TOGETHER].tolist()]
        for name in sorted(rows.column_names):
            _update(digest, pyarrow.concat_arrays([_as_stored(chunk) for chunk in rows[name].chunks]))
    return digest.hexdigest()


def _as_stored(array: pyarrow.Array) -> pyarrow.Array:
    return array.storage if isinstance(array, pyarrow.ExtensionArray) else array


def _stores_files(kind: pyarrow.StructType) -> bool:
    """Say whether a column is stored as images and sounds are."""
    fields = {field.name: str(field.type).removeprefix("large_") for field in kind}
    return fields in ({"bytes": "binary", "path": "string"}, {"bytes": "null", "path": "string"})


def _update(digest: Any, array: pyarrow.Array) -> None:
    """Add the values of an Arrow array, the same for the same values however they lie in memory."""
    array, types = _as_stored(array), pyarrow.types
    digest.update(array.is_valid().to_numpy(zero_copy_only=False).tobytes())
    if types.is_struct(array.type) and _stores_files(array.type):
        for file in filter(None, array.to_pylist()):
            content = PurePath(file["path"] or "").name.encode() if file["bytes"] is None else file["bytes"]
            digest.update(len(content).to_bytes(8) + content)
    elif types.is_struct(array.type):
        parts = dict(zip([field.name for field in array.type], array.flatten(), strict=True))
        for name in sorted(parts):
            digest.update(name.encode())
            _update(digest, parts[name])
    elif types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        lengths = pyarrow.compute.list_value_length(array.drop_null())
        digest.update(lengths.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
        _update(digest, array.flatten())
    elif types.is_string(array.type) or types.is_large_string(array.type):
        for text in array.drop_null().to_pylist():
            content = text.encode(errors="surrogatepass")
            digest.update(len(content).to_bytes(8) + content)
    else:
        values = array.drop_null().to_numpy(zero_copy_only=False)
        digest.update(repr(values.tolist()).encode() if values.dtype == object else values.tobytes())
