"""A selection as an artefact: which samples of a dataset to keep, with what weight, and where that came from."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

ROWS_NAME = "subset.parquet"
FACTS_NAME = "subset.json"


@dataclass
class SelectedSubset:
    """Samples of a dataset, by id.

    Args:
        ids: Rows of the dataset, ``(n,)``, int64, each at most once.
        weights: Weight of each, ``(n,)``, floating, or None.
        num_pool: Length of the dataset that the ids index.
        fingerprint: The dataset's fingerprint if it is a ``datasets.Dataset``, else None.
        facts: Where the selection came from, as JSON-compatible values.

    Raises:
        ValueError: If ids repeat or lie outside the dataset, or the weights have another length.

    Example:
        >>> pool = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
        >>> subset = SelectedSubset(torch.tensor([2, 0]), torch.tensor([0.9, 0.8]), 3, pool._fingerprint)
        >>> subset.to_dataset(pool)["text"][:]
        ['c', 'a']
    """

    ids: Tensor
    weights: Tensor | None
    num_pool: int
    fingerprint: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or len(self.ids.unique()) != len(self.ids):
            raise ValueError(
                f"`ids` must be one row of different ids, got shape {tuple(self.ids.shape)} with repetitions."
            )
        if len(self.ids) and not 0 <= int(self.ids.min()) <= int(self.ids.max()) < self.num_pool:
            raise ValueError(
                f"`ids` from {int(self.ids.min())} to {int(self.ids.max())} do not index a dataset of {self.num_pool} rows."
            )
        if self.weights is not None and self.weights.shape != self.ids.shape:
            raise ValueError(f"{len(self.ids)} ids have weights of shape {tuple(self.weights.shape)}.")

    def __len__(self) -> int:
        return len(self.ids)

    def to_dataset(self, pool: datasets.Dataset) -> datasets.Dataset:
        """Take the selected rows, in the order of ``ids``.

        Args:
            pool: The dataset that was selected from.

        Returns:
            Its selected rows.

        Raises:
            ValueError: If it is another dataset, by length or fingerprint.
        """
        if len(pool) != self.num_pool:
            raise ValueError(f"The subset was selected from {self.num_pool} rows and this dataset has {len(pool)}.")
        fingerprint = getattr(pool, "_fingerprint", None)
        if self.fingerprint is not None and fingerprint != self.fingerprint:
            raise ValueError(
                f"The subset was selected from the dataset with fingerprint {self.fingerprint} and this one has "
                f"{fingerprint}: its rows may differ. Load and prepare it in the same way, or index it with `ids` yourself."
            )
        return pool.select(self.ids.tolist())

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``subset.parquet`` (one row per sample) and ``subset.json``, readable without this package."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        columns = {"id": self.ids.tolist()} | ({} if self.weights is None else {"weight": self.weights.tolist()})
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / ROWS_NAME)
        facts = {"num_pool": self.num_pool, "fingerprint": self.fingerprint, "facts": self.facts}
        (folder / FACTS_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "SelectedSubset":
        """Read what ``save`` has written."""
        rows = pyarrow.parquet.read_table(Path(folder) / ROWS_NAME).to_pydict()
        facts = json.loads((Path(folder) / FACTS_NAME).read_text(encoding="utf-8"))
        weights = torch.tensor(rows["weight"]) if "weight" in rows else None
        return cls(torch.tensor(rows["id"], dtype=torch.int64), weights, **facts)
