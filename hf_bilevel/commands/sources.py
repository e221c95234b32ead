"""Find datasets: on the Hub, in files and in folders; and take rows out of the pool for the others."""

import glob
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_bilevel.commands.arguments import DataArguments
from hf_bilevel.commands.recipe import nearest

FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

logger = logging.getLogger(__name__)

AnyDataset = datasets.Dataset | datasets.IterableDataset


def load(argument: str, given: str, split: str | None, streaming: bool = False) -> AnyDataset:
    """Load one split of a dataset.

    Args:
        argument: Name of the setting, ``train_dataset`` for instance, for messages.
        given: Its value: an id on the Hub, with ``:config`` or without, a file or a folder.
        split: The split; None for the only one, and for ``train`` of a training dataset.
        streaming: Load it as a stream.

    Returns:
        The dataset.

    Raises:
        ValueError: If it is not there, cannot be read, or has no such split.
    """
    loaded = _load_all(argument, given, streaming)
    names = list(loaded)
    field = argument.replace("_dataset", "_split")
    if split is None:
        if argument == "train_dataset" and "train" in names:
            return loaded["train"]
        if len(names) > 1:
            raise ValueError(f"`{argument}: {given}` has the splits {', '.join(names)}: name one in `{field}`.")
        return loaded[names[0]]
    if split in names:
        return loaded[split]
    if "[" in split and split.split("[")[0] in names and not streaming:
        whole = loaded[split.split("[")[0]]
        try:
            instruction = datasets.ReadInstruction.from_spec(split)
            (part,) = instruction.to_absolute({split.split("[")[0]: len(whole)})
        except (ValueError, AssertionError) as error:
            raise ValueError(
                f"`{field}: {split}` is not understood: {error}. Write one range, `train[:10%]` for instance; sums are not read."
            ) from error
        return whole.select(range(part.from_ or 0, len(whole) if part.to is None else part.to))
    raise ValueError(
        f"`{argument}: {given}` has no split `{split}`; it has {', '.join(names)}. Set `{field}` to one of them."
        f"{nearest(split, names, '')}"
    )


def _load_all(argument: str, given: str, streaming: bool) -> dict[str, Any]:
    path, config, options = Path(given).expanduser(), None, {}
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
            return {name: part.to_iterable_dataset() if streaming else part for name, part in loaded.items()}
        source = str(path)
        files = [file for file in path.rglob("*") if file.suffix in FILES and not file.name.startswith(".")]
        kinds = Counter(file.suffix for file in files)
        names_its_files = (path / "README.md").is_file()
        if len({FILES[suffix] for suffix in kinds}) > 1 and not names_its_files:
            found = ", ".join(f"{num} of {suffix}" for suffix, num in kinds.items())
            logger.warning(
                "`%s: %s` holds files of several kinds (%s), of which one alone is read.", argument, given, found
            )
    elif path.is_file() or path.suffix in FILES or given.startswith((".", "/", "~")):
        if not path.exists():
            beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise ValueError(
                f"`{argument}: {given}` is not there (looked in `{path.parent.resolve()}`).{nearest(path.name, beside, '')}"
            )
        if path.suffix not in FILES:
            raise ValueError(
                f"`{argument}: {given}` is a file of an unknown kind; known are {', '.join(FILES)}. Convert it, or give a folder."
            )
        source, options = FILES[path.suffix], {"data_files": glob.escape(str(path))}
    else:
        source, _, config = given.partition(":")
    try:
        return datasets.load_dataset(source, config or None, streaming=streaming, **options)
    except Exception as error:  # datasets, its HTTP client and its readers raise a dozen kinds
        what = "cannot be read" if path.exists() else "is no file or folder here, and cannot be loaded from the Hub"
        cause = error.__cause__ or error
        raise ValueError(f"`{argument}: {given}` {what} ({type(cause).__name__}: {cause}).") from error


def split_off(
    pool: AnyDataset, sizes: dict[str, int], seed: int
) -> tuple[AnyDataset, dict[str, Any], np.ndarray | None]:
    """Take rows out of the pool, at random; out of a stream the first ones.

    Args:
        pool: The pool.
        sizes: How many rows, by name.
        seed: Of the draw.

    Returns:
        What is left of the pool, the parts by name, and the rows of the pool that are left, None for a stream.

    Raises:
        ValueError: If nothing would be left.

    Example:
        >>> rest, parts, rows = split_off(datasets.Dataset.from_dict({"text": list("abcdef")}), {"target": 2}, seed=0)
        >>> len(rest), sorted(rest["text"][:] + parts["target"]["text"][:]) == list("abcdef"), rest["text"][0] == "abcdef"[rows[0]]
        (4, True, True)
    """
    total = sum(sizes.values())
    parts: dict[str, Any] = {}
    if isinstance(pool, datasets.IterableDataset):
        first = list(pool.take(total))
        if len(first) < total:
            raise ValueError(_too_small(sizes, len(first)))
        for name, size in sizes.items():
            parts[name] = datasets.Dataset.from_list(first[:size], features=pool.features)
            first = first[size:]
        return pool.skip(total), parts, None
    if total >= len(pool):
        raise ValueError(_too_small(sizes, len(pool)))
    order = np.random.default_rng(seed).permutation(len(pool))
    for name, size in sizes.items():
        parts[name] = pool.select(np.sort(order[:size]))
        order = order[size:]
    rows = np.sort(order)
    return pool.select(rows), parts, rows


def _too_small(sizes: dict[str, int], num: int) -> str:
    asked = " and ".join(f"`{name}_size={size}`" for name, size in sizes.items())
    return f"{asked} leaves nothing of `train_dataset`, which has {num} rows. Lower it, or give a dataset of its own."


def load_datasets(data: DataArguments, seed: int) -> tuple[AnyDataset, dict[str, Any], np.ndarray | None]:
    """Load the pool, the target dataset and the dataset to evaluate on.

    Args:
        data: Where they are.
        seed: Of the rows that are taken out of the pool.

    Returns:
        The pool as it was loaded; ``train``, ``target`` and ``eval`` (the last two if asked for); and the rows of the pool that
        ``train`` has, None for a stream.
    """
    pool = load("train_dataset", data.train_dataset, data.train_split, data.streaming)
    parts, rows = {"train": pool}, None if data.streaming else np.arange(len(pool))
    sizes = {name: size for name in ("target", "eval") if (size := getattr(data, f"{name}_size")) is not None}
    if sizes:
        parts["train"], taken, rows = split_off(pool, sizes, seed)
        parts |= taken
    for name in ("target", "eval"):
        if given := getattr(data, f"{name}_dataset"):
            parts[name] = load(f"{name}_dataset", given, getattr(data, f"{name}_split"))
    return pool, parts, rows


def explain_split(data: DataArguments) -> None:
    """Say what it means that the target dataset comes out of the pool."""
    if data.target_size is not None:
        logger.warning(
            "%d rows were taken out of `train_dataset` as the target dataset. They are from the same distribution, wrong labels "
            "and noise included, so what is learned is what helps on more of the same. Where clean or on-target rows can be "
            "had, even a few hundred, give them as `target_dataset`.",
            data.target_size,
        )
