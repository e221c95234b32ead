"""A selection as an artefact, and its picture."""

import builtins
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from hf_bilevel import SelectedSubset
from hf_bilevel.plots import weights_histogram

IDS, WEIGHTS = torch.tensor([4, 0, 3]), torch.tensor([0.9, 0.1 + 0.2, 1 / 3])


def pool(num: int = 5) -> Dataset:
    return Dataset.from_dict({"text": [f"row {i}" for i in range(num)], "label": list(range(num))})


def test_rows_come_in_the_order_of_the_ids() -> None:
    dataset = pool()
    subset = SelectedSubset(IDS, WEIGHTS, 5, dataset._fingerprint)
    assert len(subset) == 3
    assert subset.to_dataset(dataset)["text"][:] == ["row 4", "row 0", "row 3"]
    assert SelectedSubset(IDS, None, 5).to_dataset(pool())["label"][:] == [4, 0, 3]  # without a fingerprint
    assert len(SelectedSubset(IDS[:0], None, 5).to_dataset(dataset)) == 0


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        ([[0, 1]], None, r"`ids` must be one row of different ids, got shape \(1, 2\)"),
        ([1, 2, 1], None, r"`ids` must be one row of different ids, got shape \(3,\) with repetitions"),
        ([0, 5], None, "`ids` from 0 to 5 do not index a dataset of 5 rows"),
        ([3, -1], None, "`ids` from -1 to 3 do not index a dataset of 5 rows"),
        ([0, 1], [0.5], r"2 ids have weights of shape \(1,\)"),
        ([0, 1], [[0.5, 0.5]], r"2 ids have weights of shape \(1, 2\)"),
    ],
)
def test_rejects(ids: Any, weights: Any, message: str) -> None:
    weights = None if weights is None else torch.tensor(weights)
    with pytest.raises(ValueError, match=message):
        SelectedSubset(torch.tensor(ids), weights, 5)


def test_another_dataset_is_noticed() -> None:
    dataset = pool()
    subset = SelectedSubset(IDS, WEIGHTS, 5, dataset._fingerprint)
    with pytest.raises(ValueError, match="The subset was selected from 5 rows and this dataset has 6"):
        subset.to_dataset(pool(6))
    other = dataset.map(lambda row: {"label": -row["label"]})
    message = (
        f"the dataset with fingerprint {dataset._fingerprint} and this one has {other._fingerprint}: its rows may differ. "
        "Load and prepare it in the same way, or index it with `ids` yourself"
    )
    with pytest.raises(ValueError, match=message):
        subset.to_dataset(other)


@pytest.mark.parametrize("weights", [WEIGHTS, WEIGHTS.double(), None])
@pytest.mark.parametrize("num", [3, 0])
def test_round_trip(weights: Tensor | None, num: int, tmp_path: Path) -> None:
    facts = {"method": "bros", "seed": 3, "config": {"rank": 0.125, "modules": None}, "versions": {"torch": "2"}}
    weights = None if weights is None else weights[:num]
    subset = SelectedSubset(IDS[:num], weights, 5, pool()._fingerprint, facts)
    subset.save(tmp_path / "a" / "folder")
    loaded = SelectedSubset.load(str(tmp_path / "a" / "folder"))
    assert loaded.ids.dtype == torch.int64 and torch.equal(loaded.ids, subset.ids)
    assert (loaded.weights is None) == (weights is None)
    if weights is not None:
        assert torch.equal(loaded.weights.float(), weights.float())
    assert (loaded.num_pool, loaded.fingerprint, loaded.facts) == (5, subset.fingerprint, facts)
    assert loaded.to_dataset(pool())["label"][:] == IDS[:num].tolist()
    subset.save(tmp_path / "a" / "folder")  # over an older one


def test_files_are_readable_without_this_package(tmp_path: Path) -> None:
    SelectedSubset(IDS, WEIGHTS, 5).save(tmp_path)
    table = pyarrow.parquet.read_table(tmp_path / "subset.parquet").to_pydict()
    assert table == {"id": [4, 0, 3], "weight": pytest.approx(WEIGHTS.tolist(), rel=1e-6)}
    facts = json.loads((tmp_path / "subset.json").read_text(encoding="utf-8"))
    assert facts == {"num_pool": 5, "fingerprint": None, "facts": {}}
    assert Dataset.from_parquet(str(tmp_path / "subset.parquet"))["id"][:] == [4, 0, 3]


def test_a_damaged_folder_is_noticed(tmp_path: Path) -> None:
    SelectedSubset(IDS, WEIGHTS, 5).save(tmp_path)
    facts = json.loads((tmp_path / "subset.json").read_text(encoding="utf-8"))
    (tmp_path / "subset.json").write_text(json.dumps({**facts, "num_pool": 4}), encoding="utf-8")
    with pytest.raises(ValueError, match="`ids` from 0 to 4 do not index a dataset of 4 rows"):
        SelectedSubset.load(tmp_path)


# The histogram --------------------------------------------------------------------------------------------------------


def heights(figure: Any) -> list[list[float]]:
    return [[bar.get_height() for bar in container] for container in figure.axes[0].containers]


def test_histogram_counts_every_sample(tmp_path: Path) -> None:
    weights = torch.tensor([0.0, 0.01, 0.51, 0.51, 0.99, 1.0], requires_grad=True)
    figure = weights_histogram(weights)
    (bars,) = heights(figure)
    assert len(bars) == 40 and (bars[0], bars[20], bars[39]) == (2, 2, 2) and sum(bars) == 6
    assert figure.axes[0].get_xlabel() == "sample weight" and figure.axes[0].get_legend() is None
    figure.savefig(tmp_path / "weights.png")
    assert (tmp_path / "weights.png").stat().st_size > 1000


def test_histogram_of_two_groups_and_of_weights_above_one() -> None:
    figure = weights_histogram(torch.tensor([0.0, 0.5, 1.0, 4.0]), torch.tensor([True, True, False, False]))
    intact, corrupted = heights(figure)
    assert (sum(intact), sum(corrupted)) == (2, 2)
    assert corrupted[0] == 1 and corrupted[5] == 1 and intact[10] == 1 and intact[39] == 1  # bins of 0.1
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["intact", "corrupted"]


def test_histogram_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="Plots need matplotlib: `pip install matplotlib`"):
        weights_histogram(torch.ones(3))
