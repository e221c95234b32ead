"""Labels of a classification: names from the data, ids for the model."""

import re
from typing import Any

import datasets
import pyarrow
from transformers import PretrainedConfig

from hf_bilevel.commands.recipe import nearest
from hf_bilevel.commands.sources import AnyDataset


def label_names(dataset: AnyDataset, column: str, config: PretrainedConfig) -> list[str]:
    """Find the names of the labels, in the order of their ids.

    Args:
        dataset: The pool.
        column: Column of the labels: of ``ClassLabel``, names, or integers.
        config: The model's config; if it has the same names, its order is kept, and with it the meaning of its head.

    Returns:
        The names.

    Raises:
        ValueError: If the column holds something else, or a stream does not know its names.

    Example:
        >>> pool = datasets.Dataset.from_dict({"label": ["good", "bad", "good"]})
        >>> label_names(pool, "label", PretrainedConfig())
        ['bad', 'good']
    """
    names = _declared(dataset, column)
    if names is None and isinstance(dataset, datasets.IterableDataset):
        raise ValueError(
            f"A stream cannot be searched for the names of its labels, and column `{column}` does not declare them as a "
            "`ClassLabel`. Drop `streaming`."
        )
    if names is None:
        values = _different(dataset, column)
        kinds = sorted({type(value).__name__ for value in values})
        if kinds not in (["str"], ["int"], ["bool"]):
            raise ValueError(
                f"`label_column: {column}` holds values of {', '.join(kinds)}; labels must be names or integers, one in every row."
            )
        names = list(map(str, sorted(values)))
    if len(names) < 2:
        raise ValueError(f"`label_column: {column}` holds only {names}; a classification needs at least two labels.")
    known = [name for _, name in sorted(config.id2label.items())]  # files may list 10 before 2
    return known if sorted(known) == sorted(names) else names


def label_ids(dataset: AnyDataset, argument: str, column: str, names: list[str]) -> dict[Any, int]:
    """Map what a dataset holds as labels to ids, by name: another file may number its labels in another order.

    Args:
        dataset: A dataset.
        argument: Its name in messages.
        column: Column of the labels.
        names: The names in the order of their ids.

    Returns:
        Id of every value.

    Raises:
        ValueError: If the dataset has a label that is not among the names, or a row without one.

    Example:
        >>> target = datasets.Dataset.from_dict({"label": ["good", "good"]})
        >>> label_ids(target, "target_dataset", "label", ["bad", "good"])
        {'bad': 0, 'good': 1}
    """
    index = {name: i for i, name in enumerate(names)}
    own = _declared(dataset, column)
    if own is not None:
        ids = {value: index.get(name) for value, name in enumerate(own)}
    elif dataset.features is not None and str(getattr(dataset.features[column], "dtype", "")).endswith("string"):
        ids = dict(index)
    else:
        numbers = {"False": 0, "True": 1} | {name: int(name) for name in index if re.fullmatch("-?[0-9]+", name)}
        ids = {numbers[name]: i for name, i in index.items() if name in numbers}
    if isinstance(dataset, datasets.Dataset):
        for value in _different(dataset, column):
            if ids.get(value) is None:
                label = own[value] if own is not None and value in range(len(own)) else value
                raise ValueError(
                    f"`{argument}` has the label {label!r} in `{column}`; those of `train_dataset` are {', '.join(names)}. Leave "
                    f"such rows out, or correct them.{nearest(label, names, '')}"
                )
    return ids


def _different(dataset: datasets.Dataset, column: str) -> list[Any]:
    try:
        return dataset.unique(column)
    except pyarrow.ArrowNotImplementedError:
        raise ValueError(
            f"`label_column: {column}` holds {dataset.features[column]}; labels must be names or integers, one in every row."
        ) from None


def _declared(dataset: AnyDataset, column: str) -> list[str] | None:
    feature = None if dataset.features is None else dataset.features[column]
    return feature.names if isinstance(feature, datasets.ClassLabel) else None
