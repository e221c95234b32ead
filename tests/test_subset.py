"""A selection as an artefact: its columns, its files, what damage is noticed, and what the Hub makes of it."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, load_dataset
from hub_server import TOKEN, Hub, Repository, running_hub
from huggingface_hub import DatasetCard
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from PIL import Image

from hf_bilevel import SelectedSubset, load_selected_subset
from hf_bilevel import subset as subset_module
from hf_bilevel.cards import NOTES_BEGIN
from hf_bilevel.identity import rows_checksum
from hf_bilevel.subset import dataset_facts, ranking_facts

# How huggingface_hub 2.4 sends a file by LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

IDS = torch.tensor([4, 0, 3])
COLUMNS: dict[str, Any] = {
    "weights": torch.tensor([0.9, 0.1 + 0.2, 1 / 3]),
    "scores": torch.tensor([2.0, -1 / 3, float("nan")], dtype=torch.float64),
    "counts": torch.tensor([7, 0, 2**40]),
    "probabilities": torch.tensor([1.0, 0.5, 0.25]),
    "domain_ids": torch.tensor([1, 0, 1]),
}
NAMES = ["web", "books | more"]
FACTS = {
    "method": "bros",
    "seed": 3,
    "config": {"rank": 0.125, "modules": None},
    "ranking": ranking_facts("sample weight", torch.linspace(0, 1, 5), torch.tensor([True, False, False, True, True])),
    "domains": {"names": NAMES, "pool": [2, 3], "subset": [1, 2]},
    "metrics": {"eval_accuracy": 0.9},
}


def pool(num: int = 5) -> Dataset:
    return Dataset.from_dict({"text": [f"row {i}" for i in range(num)], "label": list(range(num))})


def whole(num: int = 3, **changes: Any) -> SelectedSubset:
    columns = {name: values[:num] for name, values in COLUMNS.items()}
    given = {**columns, "domain_names": NAMES, "fingerprint": pool()._fingerprint, "facts": FACTS, **changes}
    return SelectedSubset(IDS[:num], 5, **given)


def same(a: SelectedSubset, b: SelectedSubset) -> bool:
    for name in ("ids", *COLUMNS):
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None) or x is not None and not torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0)):
            return False
        if x is not None and x.dtype != y.dtype:
            return False
    names = ("num_pool", "domain_names", "fingerprint", "rows_checksum", "facts")
    return all(getattr(a, name) == getattr(b, name) for name in names)


def test_rows_come_in_the_order_of_the_ids() -> None:
    dataset = pool()
    subset = SelectedSubset(IDS, 5, fingerprint=dataset._fingerprint)
    assert len(subset) == 3
    assert subset.to_dataset(dataset)["text"][:] == ["row 4", "row 0", "row 3"]
    assert SelectedSubset(IDS, 5).to_dataset(pool())["label"][:] == [4, 0, 3]  # without a fingerprint
    assert len(SelectedSubset(IDS[:0], 5).to_dataset(dataset)) == 0


HALF = torch.tensor([0.5, 0.5])


@pytest.mark.parametrize(
    ("ids", "columns", "message"),
    [
        ([[0, 1]], {}, r"`ids` must be one row of different ids, got shape \(1, 2\)"),
        ([1, 2, 1], {}, r"`ids` must be one row of different ids, got shape \(3,\) with repetitions"),
        ([0.0, 1.0], {}, "`ids` must be of int64, got torch.float32"),
        ([0, 5], {}, "`ids` from 0 to 5 do not index a dataset of 5 rows"),
        ([3, -1], {}, "`ids` from -1 to 3 do not index a dataset of 5 rows"),
        ([0, 1], {"weights": HALF[:1]}, r"2 ids have `weights` of shape \(1,\)"),
        ([0, 1], {"scores": HALF[None]}, r"2 ids have `scores` of shape \(1, 2\)"),
        ([0, 1], {"counts": HALF}, "`counts` must be of int64, got torch.float32"),
        ([0, 1], {"probabilities": torch.tensor([0, 1])}, "`probabilities` must be of float, got torch.int64"),
        ([0, 1], {"domain_ids": torch.tensor([0, 1])}, "`domain_ids` and `domain_names` belong together"),
        ([0, 1], {"domain_names": ["a"]}, "`domain_ids` and `domain_names` belong together"),
        (
            [0, 1],
            {"domain_ids": torch.tensor([0, 2]), "domain_names": ["a", "b"]},
            "`domain_ids` from 0 to 2 do not index 2 `domain_names`",
        ),
        ([0], {"domain_ids": torch.tensor([0]), "domain_names": ["a", "a"]}, "`domain_names` must differ"),
    ],
)
def test_rejects(ids: Any, columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectedSubset(torch.tensor(ids), 5, **columns)


@pytest.mark.parametrize("ids", [[0, 1], np.array([0, 1])])
def test_ids_that_are_no_tensor(ids: Any) -> None:
    with pytest.raises(
        ValueError, match=f"`ids` must be a tensor of int64, got {type(ids).__name__}. Use `torch.tensor`"
    ):
        SelectedSubset(ids, 5)


def test_another_dataset_is_noticed() -> None:
    dataset = pool()
    subset = SelectedSubset(IDS, 5, fingerprint=dataset._fingerprint)
    with pytest.raises(ValueError, match="The subset was selected from 5 rows and this dataset has 6"):
        subset.to_dataset(pool(6))
    other = dataset.map(lambda row: {"label": -row["label"]})
    message = (
        f"the dataset with fingerprint {dataset._fingerprint} and this one has {other._fingerprint}: its rows may differ. "
        "Load and prepare it in the same way, or index it with `ids` yourself"
    )
    with pytest.raises(ValueError, match=message):
        subset.to_dataset(other)


def test_a_file_that_was_moved_is_the_same_dataset(tmp_path: Path) -> None:
    def load(name: str, labels: list[int]) -> Dataset:
        (tmp_path / name).write_text("".join(f'{{"label": {label}}}\n' for label in labels), encoding="utf-8")
        return load_dataset("json", data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / "cache"))

    dataset, moved, other = (
        load("a.json", [5, 6, 7, 8, 9]),
        load("b.json", [5, 6, 7, 8, 9]),
        load("c.json", [6, 5, 7, 8, 9]),
    )
    assert len({dataset._fingerprint, moved._fingerprint, other._fingerprint}) == 3
    SelectedSubset(IDS, 5, fingerprint=dataset._fingerprint, rows_checksum=rows_checksum(dataset)).save(tmp_path)
    subset = SelectedSubset.load(tmp_path)
    assert subset.to_dataset(moved)["label"][:] == [9, 5, 8]
    with pytest.raises(ValueError, match="and this one has .*: its rows or columns differ. Load and prepare"):
        subset.to_dataset(other)


def test_files_of_earlier_versions_have_no_checksum_of_rows(tmp_path: Path) -> None:
    whole().save(tmp_path)
    facts = json.loads((tmp_path / "subset.json").read_text(encoding="utf-8"))
    del facts["rows_checksum"]
    (tmp_path / "subset.json").write_text(json.dumps(facts), encoding="utf-8")
    assert same(SelectedSubset.load(tmp_path), whole())


# Files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [3, 0])
def test_round_trip(num: int, tmp_path: Path) -> None:
    subset = whole(num)
    subset.save(tmp_path / "a" / "folder")
    loaded = SelectedSubset.load(str(tmp_path / "a" / "folder"))
    assert loaded.ids.dtype == torch.int64 and same(loaded, subset)
    assert loaded.to_dataset(pool())["label"][:] == IDS[:num].tolist()
    bare = SelectedSubset(IDS, 5)
    bare.save(tmp_path / "a" / "folder")  # over an older one
    assert same(load_selected_subset(tmp_path / "a" / "folder"), bare)
    assert sorted(path.name for path in (tmp_path / "a" / "folder").iterdir()) == ["subset.json", "subset.parquet"]


def test_half_precision_is_saved_as_single(tmp_path: Path) -> None:
    weights = COLUMNS["weights"].bfloat16().requires_grad_()
    SelectedSubset(IDS, 5, weights=weights).save(tmp_path)
    assert torch.equal(SelectedSubset.load(tmp_path).weights, weights.detach().float())


def test_files_are_readable_without_this_package(tmp_path: Path) -> None:
    whole().save(tmp_path)
    table = pyarrow.parquet.read_table(tmp_path / "subset.parquet").to_pydict()
    assert table.pop("score")[:2] == [2.0, -1 / 3]
    assert table == {
        "id": [4, 0, 3],
        "weight": COLUMNS["weights"].tolist(),
        "count": [7, 0, 2**40],
        "probability": [1.0, 0.5, 0.25],
        "domain": [1, 0, 1],
    }
    facts = json.loads((tmp_path / "subset.json").read_text(encoding="utf-8"))
    assert len(facts.pop("sha256")) == 64
    assert facts == {
        "format_version": 1, "num_rows": 3, "num_pool": 5, "fingerprint": pool()._fingerprint, "rows_checksum": None,
        "domain_names": NAMES, "facts": FACTS,
    }  # fmt: skip
    rows = Dataset.from_parquet(str(tmp_path / "subset.parquet"))
    assert rows["id"][:] == [4, 0, 3] and rows.features["domain"].names == NAMES


@pytest.mark.parametrize("value", [torch.tensor(1.0), float("nan"), {1, 2}])
def test_facts_that_are_not_json_leave_the_older_files_alone(value: Any, tmp_path: Path) -> None:
    whole().save(tmp_path)
    with pytest.raises(ValueError, match="`facts` must hold what JSON can: dicts, lists, strings, finite numbers"):
        SelectedSubset(IDS, 5, facts={"metrics": {"loss": value}}).save(tmp_path)
    assert same(SelectedSubset.load(tmp_path), whole())


@pytest.mark.parametrize("num_replaced", [0, 1])
def test_a_crash_leaves_nothing_that_loads_as_something_else(
    num_replaced: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole().save(tmp_path)
    replace, done = os.replace, []

    def crashing(source: Any, target: Any) -> None:
        if len(done) == num_replaced:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", crashing)
    with pytest.raises(KeyboardInterrupt):
        SelectedSubset(IDS.flip(0), 5, weights=COLUMNS["weights"]).save(tmp_path)
    monkeypatch.undo()
    if num_replaced == 0:
        assert same(SelectedSubset.load(tmp_path), whole())
    else:
        with pytest.raises(ValueError, match="subset.parquet` is not the file that .*subset.json` was written with"):
            SelectedSubset.load(tmp_path)
    whole().save(tmp_path)
    assert same(SelectedSubset.load(tmp_path), whole())


def change_facts(folder: Path, **changes: Any) -> None:
    facts = json.loads((folder / "subset.json").read_text(encoding="utf-8"))
    (folder / "subset.json").write_text(json.dumps({**facts, **changes}), encoding="utf-8")


def change_rows(folder: Path, rows: dict[str, list[Any]]) -> None:
    from hashlib import sha256

    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "subset.parquet")
    change_facts(folder, sha256=sha256((folder / "subset.parquet").read_bytes()).hexdigest())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Any, str]] = {
    "no facts": (lambda folder: (folder / "subset.json").unlink(), "subset.json` is missing"),
    "no rows": (lambda folder: (folder / "subset.parquet").unlink(), "subset.parquet` is missing"),
    "no folder": (shutil.rmtree, "subset.json` is missing"),
    "cut facts": (lambda folder: os.truncate(folder / "subset.json", 100), "subset.json` cannot be read"),
    "cut rows": (lambda folder: os.truncate(folder / "subset.parquet", 100), "subset.parquet` is not the file"),
    "empty facts": (lambda folder: os.truncate(folder / "subset.json", 0), "subset.json` cannot be read"),
    "a bit": (lambda folder: flip_a_bit(folder / "subset.parquet"), "subset.parquet` is not the file"),
    "binary facts": (lambda folder: (folder / "subset.json").write_bytes(b"\x80\x04\x95"), "subset.json` cannot be"),
    "a list": (lambda folder: (folder / "subset.json").write_text("[1]"), "subset.json` cannot be read"),
    "nested": (lambda folder: (folder / "subset.json").write_text("[" * 10**5), "subset.json` cannot be read"),
    "the future": (lambda folder: change_facts(folder, format_version=2), "is of format 2, this version .* reads 1"),
    "a smaller pool": (lambda folder: change_facts(folder, num_pool=4), "`ids` from 0 to 4 do not index .* 4 rows"),
    "a word": (lambda folder: change_facts(folder, num_pool="5"), "subset.json` and .* do not make a selected subset"),
    "no ids": (lambda folder: change_rows(folder, {"weight": [0.5]}), "do not make a selected subset"),
    "ids twice": (lambda folder: change_rows(folder, {"id": [1, 1]}), "different ids"),
    "words as ids": (lambda folder: change_rows(folder, {"id": ["1"]}), "do not make a selected subset"),
    "holes": (lambda folder: change_rows(folder, {"id": [1, None]}), "do not make a selected subset"),
    "domain": (lambda folder: change_rows(folder, {"id": [1], "domain": [2]}), "`domain_ids` from 2 to 2"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(damage: str, tmp_path: Path) -> None:
    inflict, message = DAMAGES[damage]
    whole().save(tmp_path / "subset")
    inflict(tmp_path / "subset")
    with pytest.raises(ValueError, match=message):
        SelectedSubset.load(tmp_path / "subset")


# Facts -----------------------------------------------------------------------------------------------------------------


def test_ranking_facts_count_every_finite_row() -> None:
    values = torch.tensor([0.0, 1.0, 39.9, 40.0, float("nan"), float("inf")], requires_grad=True)
    facts = ranking_facts("score", values, torch.tensor([False, True, False, True, True, True]))
    assert facts["edges"] == [float(i) for i in range(41)]
    assert [i for i, num in enumerate(facts["kept"]) if num] == [1, 39] and sum(facts["kept"]) == 2
    assert [i for i, num in enumerate(facts["dropped"]) if num] == [0, 39] and sum(facts["dropped"]) == 2
    json.dumps(facts, allow_nan=False)
    assert sum(ranking_facts("score", torch.ones(3), torch.ones(3, dtype=torch.bool))["kept"]) == 3
    close = torch.tensor([0.1 + 0.2, 0.3], dtype=torch.float64)  # differ by rounding
    assert sum(ranking_facts("score", close, torch.ones(2, dtype=torch.bool))["kept"]) == 2
    assert sum(ranking_facts("score", torch.ones(0), torch.ones(0, dtype=torch.bool))["kept"]) == 0


def test_a_dataset_says_what_it_knows() -> None:
    dataset = pool()
    assert dataset_facts(dataset) == dataset_facts([{"text": "a"}]) == {}
    dataset.info.dataset_name, dataset.info.version = "digits", datasets.Version("1.2.0")
    assert dataset_facts(dataset) == {"name": "digits", "version": "1.2.0"}
    dataset.info.builder_name = dataset.info.dataset_name = "json"  # the loader of a local file
    assert dataset_facts(dataset) == {"version": "1.2.0"}


def test_rows_of_several_origins_have_none(hub: Hub) -> None:
    whole().push_to_hub("me/digits", pool=pool())
    loaded = datasets.load_dataset("me/digits", split="train")
    assert dataset_facts(loaded.map(lambda row: {"length": len(row["text"])}))["source"] == "me/digits"
    assert dataset_facts(loaded.add_column("score", [1, 2, 3]))["source"] == "me/digits"
    mixed = datasets.concatenate_datasets([loaded, Dataset.from_list([{"text": "mine", "label": 9}])])
    assert "source" not in dataset_facts(mixed) and "revision" not in dataset_facts(mixed)


@pytest.mark.parametrize("name", ["me/TwoWords", "me/two_words", "me/digits"])
def test_the_source_is_the_repository_as_it_is_written(hub: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of datasets has snake-case names; that of the Hub's client has the real one."""
    whole().push_to_hub(name, pool=pool())
    loaded = datasets.load_dataset(name, split="train")
    assert dataset_facts(loaded)["source"] == name
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "nowhere")
    assert dataset_facts(loaded).get("source") == (name if name == "me/digits" else None)


# The Hub ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with running_hub(monkeypatch, tmp_path / "cache") as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "tmp").glob("selected-subset-*"))


def test_rows_pushed_are_the_rows_loaded(hub: Hub, tmp_path: Path) -> None:
    subset = whole()
    commit = subset.push_to_hub("me/digits", pool=pool(), commit_message="Three of five")
    assert commit.commit_url.startswith(f"{hub.url}/datasets/me/digits/commit/")
    loaded = load_selected_subset("me/digits")
    assert same(loaded, subset)
    expected = subset.to_dataset(pool())
    assert loaded.to_dataset(pool())[:] == expected[:]
    rows = datasets.load_dataset("me/digits")
    assert list(rows) == ["train"]
    assert rows["train"][:] == expected[:] and rows["train"].features == expected.features
    selection = datasets.load_dataset("me/digits", "selection", split="train")
    assert selection["id"][:] == [4, 0, 3] and selection.features["domain"].names == NAMES
    known = {"name": "digits", "config": "rows", "source": "me/digits", "revision": commit.oid}
    assert dataset_facts(rows["train"]) == known
    assert left(tmp_path) == []
    assert hub.repositories["me/digits"].messages == ["Three of five"]  # one commit


def test_the_pushed_folder_opens_where_it_lies(hub: Hub, tmp_path: Path) -> None:
    subset, folder = whole(), tmp_path / "kept"
    subset.push_to_hub("me/digits", pool=pool(), folder=folder)
    (folder / "data" / "train-00000-of-00001.parquet.partial").write_text("of another run")
    assert datasets.load_dataset(str(folder), split="train")["text"][:] == ["row 4", "row 0", "row 3"]
    assert datasets.load_dataset(str(folder), "selection", split="train")["id"][:] == [4, 0, 3]
    assert same(load_selected_subset(folder), subset)
    files = {
        "README.md", "data/train-00000-of-00001.parquet", "domains.png", "ranking.png", "subset.json", "subset.parquet"
    }  # fmt: skip
    assert set(hub.files("me/digits")) == {".gitattributes", *files}
    for name in files:
        assert hub.files("me/digits")[name] == (folder / name).read_bytes()
    assert (folder / "ranking.png").read_bytes().startswith(b"\x89PNG")


def test_only_ids(hub: Hub, tmp_path: Path) -> None:
    """After rows, into the same folder and repository: nothing of the rows may be left in either commit's files."""
    folder = tmp_path / "kept"
    first = whole().push_to_hub("me/digits", pool=pool(), folder=folder)
    second = SelectedSubset(IDS, 5, facts={"method": "bros"})
    second.push_to_hub("me/digits", data="ids", folder=folder)
    assert set(hub.files("me/digits")) == {".gitattributes", "README.md", "subset.json", "subset.parquet"}
    for config in (None, "selection"):
        rows = datasets.load_dataset("me/digits", config, split="train")
        assert rows.column_names == ["id"] and rows["id"][:] == [4, 0, 3]
    assert same(load_selected_subset("me/digits"), second)
    assert same(load_selected_subset("me/digits", revision=first.oid), whole())
    assert b"row 4" not in b"".join(hub.files("me/digits").values())


def test_images_travel_with_their_content(hub: Hub, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"secret{i}.png") for i in range(3)]
    for i, path in enumerate(paths):
        Image.new("L", (4, 4), 50 * i).save(path)
    images = Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    SelectedSubset(torch.tensor([2, 1]), 3).push_to_hub("me/images", pool=images)
    for path in paths:
        os.unlink(path)
    rows = datasets.load_dataset("me/images", split="train")
    assert [row["image"].getpixel((0, 0)) for row in rows] == [100, 50]
    assert str(tmp_path).encode() not in hub.files("me/images")["data/train-00000-of-00001.parquet"]


def test_rows_are_taken_in_parts_that_fit(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array holds 2 GiB, which a thousand photographs are more than."""
    embed, sizes = subset_module.embed_table_storage, []

    def embed_few(table: pyarrow.Table) -> pyarrow.Table:
        sizes.append(len(table))
        if len(table) > 4:
            raise TypeError("Expected Array, got <class 'pyarrow.lib.ChunkedArray'>")
        return embed(table)

    monkeypatch.setattr(subset_module, "embed_table_storage", embed_few)
    Image.new("L", (4, 4)).save(tmp_path / "image.png")
    for feature, largest in ((datasets.Image(), 50), (datasets.Value("string"), 70)):
        rows = Dataset.from_dict({"image": [str(tmp_path / "image.png")] * 70, "i": list(range(70))})
        SelectedSubset(torch.arange(70), 70).push_to_hub("me/images", pool=rows.cast_column("image", feature))
        assert max(sizes) == largest
        assert datasets.load_dataset("me/images", split="train")["i"][:] == list(range(70))
        sizes.clear()


def test_what_cannot_be_written_leaves_nothing_behind(hub: Hub, tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "image.png")
    images = Dataset.from_dict({"image": [str(tmp_path / "image.png")] * 3}).cast_column("image", datasets.Image())
    (tmp_path / "image.png").unlink()
    message = r"could not be written to `.*` \(FileNotFoundError: .*image.png.*, and nothing was uploaded"
    with pytest.raises(RuntimeError, match=message):
        SelectedSubset(IDS[1:2], 3).push_to_hub("me/images", pool=images)
    assert left(tmp_path) == []
    with pytest.raises(RuntimeError, match=message):
        SelectedSubset(IDS[1:2], 3).push_to_hub("me/images", pool=images, folder=tmp_path / "kept")
    assert not list((tmp_path / "kept").rglob("*.partial"))
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"\(FileExistsError: .*file"):
        SelectedSubset(IDS[1:2], 3).push_to_hub("me/images", data="ids", folder=tmp_path / "file")
    assert "me/images" not in hub.repositories


def test_a_folder_in_the_home_directory(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    SelectedSubset(IDS, 5).push_to_hub("me/digits", data="ids", folder="~/kept")
    assert same(load_selected_subset(tmp_path / "kept"), SelectedSubset(IDS, 5))


def test_what_was_added_to_the_card_stays(hub: Hub) -> None:
    def card() -> str:
        return hub.files("me/digits")["README.md"].decode()

    whole().push_to_hub("me/digits", pool=pool())
    first = card()
    assert first.endswith(f"{NOTES_BEGIN}\n")
    whole().push_to_hub("me/digits", pool=pool())
    assert card() == first
    notes = "\n## Who may use it\n\nAll who ask.\n"
    edited = first.replace("---\n", "---\nlicense: cc-by-4.0\nextra_gated_prompt: Who are you?\n", 1) + notes
    edited = edited.replace("- data-selection\n", "- data-selection\n- mine\n")
    hub.repositories["me/digits"].commit("main", {**hub.files("me/digits"), "README.md": edited.encode()})
    SelectedSubset(IDS, 5).push_to_hub("me/digits", data="ids")
    header = DatasetCard(card()).data
    assert header.license == "cc-by-4.0" and header.extra_gated_prompt == "Who are you?"
    assert header.tags == ["hf_bilevel", "data-selection", "mine"]
    assert [config["config_name"] for config in header.configs] == ["selection"]
    assert card().endswith(NOTES_BEGIN + "\n" + notes) and "## Domains" not in card()


@pytest.mark.parametrize("given", ["# Mine\n\nIt is mine.\n", "---\nlicense: mit\n---\n# Mine\n\nIt is mine.\n"])
def test_a_card_that_was_there_before_becomes_notes(given: str, hub: Hub) -> None:
    hub.repositories["me/digits"] = Repository(private=True)
    hub.repositories["me/digits"].commit("main", {"README.md": given.encode()})
    for _ in range(2):
        SelectedSubset(IDS, 5).push_to_hub("me/digits", data="ids")
        card = hub.files("me/digits")["README.md"].decode()
        assert card.endswith(f"{NOTES_BEGIN}\n\n# Mine\n\nIt is mine.\n") and card.count("# Mine") == 1
        assert DatasetCard(card).data.license == ("mit" if "mit" in given else None)


def test_the_pool_is_checked_before_anything_is_written(hub: Hub, tmp_path: Path) -> None:
    subset = whole()
    with pytest.raises(ValueError, match="`data='rows'` uploads .* needs `pool`.*got NoneType. .* `data='ids'`"):
        subset.push_to_hub("me/digits")
    with pytest.raises(ValueError, match="got list"):
        subset.push_to_hub("me/digits", pool=[{"text": "a"}] * 5)
    with pytest.raises(ValueError, match="Nothing is selected"):
        SelectedSubset(IDS[:0], 5).push_to_hub("me/digits", data="ids")
    with pytest.raises(ValueError, match="`data` must be one of ids, rows; got 'all'"):
        subset.push_to_hub("me/digits", data="all")
    with pytest.raises(ValueError, match="its rows may differ"):
        subset.push_to_hub("me/digits", pool=pool().map(lambda row: {"label": 0}))
    with pytest.raises(ValueError, match="`repo_id` must be `namespace/name`, .* got 'digits'"):
        subset.push_to_hub("digits", data="ids")
    with pytest.raises(ValueError, match="[Rr]epo id"):
        subset.push_to_hub("me/my digits", data="ids")
    assert hub.requests == [] and left(tmp_path) == []


@pytest.mark.parametrize(("private", "expected"), [(None, True), (True, True), (False, False)])
def test_private_unless_told_otherwise(private: bool | None, expected: bool, hub: Hub) -> None:
    SelectedSubset(IDS, 5).push_to_hub("me/digits", data="ids", private=private)
    assert hub.repositories["me/digits"].private is expected


def test_what_is_there_is_neither_exposed_nor_replaced(hub: Hub) -> None:
    subset = SelectedSubset(IDS, 5)
    for is_private, word in ((False, "public"), (True, "private")):
        hub.repositories["me/digits"] = Repository(private=is_private)
        message = f"`me/digits` exists and is {word}, which `private={not is_private}` does not change"
        with pytest.raises(RuntimeError, match=message):
            subset.push_to_hub("me/digits", data="ids", private=not is_private)
        assert len(hub.repositories["me/digits"].commits) == 1
        subset.push_to_hub("me/digits", data="ids")
        assert hub.repositories["me/digits"].private is is_private
    other = hub.repositories["me/other"] = Repository(private=False)
    other.commit("main", {"README.md": b"# Mine", "data/train-00000-of-00001.parquet": b"mine"})
    with pytest.raises(RuntimeError, match="`me/other` holds something else, 'data/train-00000-of-00001.parquet'"):
        subset.push_to_hub("me/other", data="ids")
    assert hub.files("me/other")["README.md"] == b"# Mine"


def test_a_branch(hub: Hub) -> None:
    subset = SelectedSubset(IDS, 5)
    for ids in (IDS, IDS.flip(0)):  # made, and there already
        SelectedSubset(ids, 5).push_to_hub("me/digits", data="ids", revision="v1")
        assert load_selected_subset("me/digits", revision="v1").ids.tolist() == ids.tolist()
    assert set(hub.files("me/digits")) == {".gitattributes"}
    with pytest.raises(ValueError, match="subset.json` is missing: there is no selected subset"):
        load_selected_subset("me/digits")
    assert len(subset) == 3


FAILURES = {
    "create": ("POST", "/api/repos/create", 403),
    "look": ("GET", "/api/datasets/me/digits", 500),
    "preupload": ("POST", "/api/datasets/me/digits/preupload/main", 500),
    "send, cut": ("PUT", "/lfs/", "reset"),
    "send": ("PUT", "/lfs/", 403),
    "commit": ("POST", "/api/datasets/me/digits/commit/main", 500),
    "commit, cut": ("POST", "/api/datasets/me/digits/commit/main", "reset"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_upload_leaves_all_of_it_here_and_says_how_to_go_on(failure: str, hub: Hub, tmp_path: Path) -> None:
    method, where, how = FAILURES[failure]
    given = "kept" if "cut" in failure else None
    hub.fail = lambda m, path: how if m == method and path.startswith(where) else None
    subset, dataset = whole(facts={"method": "bros"}), pool()
    with pytest.raises(RuntimeError) as caught:
        subset.push_to_hub("me/digits", pool=dataset, private=False, folder=given and tmp_path / given)
    message = str(caught.value)
    folder = Path(re.search("The subset is whole in `(.*?)`", message)[1])
    assert folder == (tmp_path / "tmp" / left(tmp_path)[0] if given is None else tmp_path / "kept").resolve()
    assert same(SelectedSubset.load(folder), subset)
    assert datasets.load_dataset(str(folder), split="train")[:] == subset.to_dataset(dataset)[:]
    assert "me/digits" not in hub.repositories or set(hub.files("me/digits")) == {".gitattributes"}
    assert message.startswith("The upload to `me/digits` failed (") and (how == "reset" or f"{how}" in message)
    assert TOKEN not in message
    hub.fail = lambda m, path: None
    eval(re.search("To try again: `(.*)`", message)[1], {"SelectedSubset": SelectedSubset, "pool": dataset})
    assert same(load_selected_subset("me/digits"), subset) and not hub.repositories["me/digits"].private
    assert datasets.load_dataset("me/digits", split="train")[:] == subset.to_dataset(dataset)[:]


def test_without_a_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    message = (
        "There is no token to upload with. Run `hf auth login`, set .* HF_TOKEN, or pass `token=`.*Nothing was written"
    )
    with pytest.raises(LocalTokenNotFoundError, match=message):
        whole().push_to_hub("me/digits", pool=pool(), folder=tmp_path / "kept")
    assert hub.requests == [] and left(tmp_path) == [] and not (tmp_path / "kept").exists()
    whole().push_to_hub("me/digits", pool=pool(), token=TOKEN)
    with pytest.raises(RepositoryNotFoundError):
        load_selected_subset("me/digits")
    assert same(load_selected_subset("me/digits", token=TOKEN), whole())


def test_the_token_is_written_nowhere(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    subset = whole()
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets", "hf_bilevel", "")]
    for logger in loggers:
        caplog.set_level(logging.DEBUG, logger.name or None)
        logger.addHandler(caplog.handler)
    try:
        subset.push_to_hub("me/digits", pool=pool(), token=TOKEN, folder=tmp_path / "kept")
        load_selected_subset("me/digits", token=TOKEN)
        hub.fail = lambda method, path: 403 if path.startswith("/lfs/") else None
        with pytest.raises(RuntimeError):
            subset.push_to_hub("me/other", pool=pool(), token=TOKEN)
    finally:
        for logger in loggers[:-1]:
            logger.removeHandler(caplog.handler)
    assert any(authorized for _, _, authorized in hub.requests) and caplog.text
    assert TOKEN not in caplog.text and TOKEN not in "".join(capfd.readouterr())
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 12
    assert not any(TOKEN.encode() in content for content in (*written, *hub.files("me/digits").values()))


def test_without_matplotlib_the_card_has_no_pictures(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> None:
        raise ImportError("Plots need matplotlib")

    for name in ("kept_against_dropped", "domain_shares"):
        monkeypatch.setattr(f"hf_bilevel.subset.{name}", missing)
    whole().push_to_hub("me/digits", data="ids")
    assert set(hub.files("me/digits")) == {".gitattributes", "README.md", "subset.json", "subset.parquet"}
    assert b".png" not in hub.files("me/digits")["README.md"]
