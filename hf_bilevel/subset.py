"""A selection as an artefact: which samples of a dataset to keep, with what weight, and where that came from."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from datasets.features.features import require_storage_embed
from datasets.naming import camelcase_to_snakecase
from datasets.table import ConcatenationTable, MemoryMappedTable, embed_table_storage
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from hf_bilevel.cards import ROWS_PATH, SELECTION_PATH, dataset_card, keep_what_was_added
from hf_bilevel.identity import is_dataset_of
from hf_bilevel.plots import domain_shares, kept_against_dropped

FACTS_NAME = "subset.json"
CARD_NAME = "README.md"
PICTURES = {"ranking": "ranking.png", "domains": "domains.png"}

FORMAT_VERSION = 1

# Attribute -> (name in the file, type in the file)
_COLUMNS = {
    "ids": ("id", "int64"),
    "weights": ("weight", "float"),
    "scores": ("score", "float"),
    "counts": ("count", "int64"),
    "probabilities": ("probability", "float"),
    "domain_ids": ("domain", "int64"),
}


@dataclass
class SelectedSubset:
    """Samples of a dataset, by id, with what is known of each and of how they were selected.

    Args:
        ids: Rows of the dataset, ``(n,)``, int64, each at most once.
        num_pool: Length of the dataset that the ids index.
        weights: Weight of each in the loss, ``(n,)``, floating, or None.
        scores: Score of each, ``(n,)``, floating, higher is selected first, or None.
        counts: How often each was trained on, ``(n,)``, int64, or None.
        probabilities: Probability of each to be in the subset, ``(n,)``, floating, or None.
        domain_ids: Domain of each, ``(n,)``, int64, or None.
        domain_names: Names of the domains, by their ids; None without domains.
        fingerprint: The dataset's fingerprint if it is a ``datasets.Dataset``, else None.
        rows_checksum: ``hf_bilevel.identity.rows_checksum`` of the dataset, by which it is known where its fingerprint has changed,
            as that of a file does that was moved; None to go by the fingerprint alone.
        facts: Where the selection came from, as JSON-compatible values; a trainer's ``selected_subset`` fills them in. Add
            what only you know, for the card: ``facts["metrics"]``, a dict of numbers, and ``facts["controls"]``, a dict of such
            dicts, for instance ``{"random": {"accuracy": 0.71}}``.

    Raises:
        ValueError: If ids repeat or lie outside the dataset, or a column has another length, type or range.

    Example:
        >>> pool = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
        >>> subset = SelectedSubset(
        ...     torch.tensor([2, 0]), num_pool=3, weights=torch.tensor([0.9, 0.8]), fingerprint=pool._fingerprint
        ... )
        >>> subset.to_dataset(pool)["text"][:]
        ['c', 'a']
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     subset.save(folder)
        ...     load_selected_subset(folder).weights
        tensor([0.9000, 0.8000])
    """

    ids: Tensor
    num_pool: int
    _: KW_ONLY
    weights: Tensor | None = None
    scores: Tensor | None = None
    counts: Tensor | None = None
    probabilities: Tensor | None = None
    domain_ids: Tensor | None = None
    domain_names: list[str] | None = None
    fingerprint: str | None = None
    rows_checksum: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = self.domain_names
        if not isinstance(self.num_pool, int) or isinstance(self.num_pool, bool) or self.num_pool < 0:
            raise ValueError(f"`num_pool` must be the length of a dataset, got {self.num_pool!r:.200}.")
        if not (names is None or isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"`domain_names` must be a list of strings or None, got {names!r:.200}.")
        for name in ("fingerprint", "rows_checksum"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ValueError(f"`{name}` must be a string or None, got {value!r:.200}.")
        if not isinstance(self.facts, dict):
            raise ValueError(f"`facts` must be a dict, got {self.facts!r:.200}.")
        for name, values in self._columns().items():
            kind = _COLUMNS[name][1]
            if not isinstance(values, Tensor):
                raise ValueError(
                    f"`{name}` must be a tensor of {kind}, got {type(values).__name__}. Use `torch.tensor`."
                )
            if values.dtype != torch.int64 if kind == "int64" else not values.is_floating_point():
                raise ValueError(f"`{name}` must be of {kind}, got {values.dtype}.")
        if self.ids.ndim != 1 or len(self.ids.unique()) != len(self.ids):
            raise ValueError(
                f"`ids` must be one row of different ids, got shape {tuple(self.ids.shape)} with repetitions."
            )
        if len(self.ids) and not 0 <= int(self.ids.min()) <= int(self.ids.max()) < self.num_pool:
            raise ValueError(
                f"`ids` from {int(self.ids.min())} to {int(self.ids.max())} do not index a dataset of {self.num_pool} rows."
            )
        for name, values in self._columns().items():
            if values.shape != self.ids.shape:
                raise ValueError(f"{len(self.ids)} ids have `{name}` of shape {tuple(values.shape)}.")
        if (self.domain_ids is None) != (self.domain_names is None):
            raise ValueError("`domain_ids` and `domain_names` belong together: give both or none.")
        if self.domain_names is not None and len(set(self.domain_names)) != len(self.domain_names):
            raise ValueError(f"`domain_names` must differ from each other, got {self.domain_names}.")
        if self.domain_ids is not None and len(self.ids):
            lowest, highest, num = int(self.domain_ids.min()), int(self.domain_ids.max()), len(self.domain_names)
            if not 0 <= lowest <= highest < num:
                raise ValueError(f"`domain_ids` from {lowest} to {highest} do not index {num} `domain_names`.")

    def __len__(self) -> int:
        return len(self.ids)

    def _columns(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _COLUMNS if getattr(self, name) is not None}

    def to_dataset(self, pool: datasets.Dataset) -> datasets.Dataset:
        """Take the selected rows, in the order of ``ids``.

        Args:
            pool: The dataset that was selected from.

        Returns:
            Its selected rows.

        Raises:
            ValueError: If it is another dataset, by its length, or by its fingerprint and its rows as far as
                ``rows_checksum`` compares them. The fingerprint alone depends on the file's path as it was given and on its time.
            TypeError: If it is a stream, or no ``datasets.Dataset``.
        """
        if isinstance(pool, datasets.IterableDataset):
            raise TypeError("Rows cannot be taken out of a stream by their ids: load the dataset without `streaming`.")
        if not isinstance(pool, datasets.Dataset):
            raise TypeError(
                f"`pool` must be a `datasets.Dataset`, got {type(pool).__name__}. Of a dict of them pass the one that was selected from; of "
                "any other dataset take the rows by their numbers, `torch.utils.data.Subset(pool, subset.ids.tolist())`."
            )
        if len(pool) != self.num_pool:
            raise ValueError(
                f"The subset was selected from {self.num_pool} rows and this dataset has {len(pool)}. Where the trainer has left rows out "
                "or joined them while it prepared the dataset, as TRL's may, the ids are places in `trainer.train_dataset`."
            )
        if self.fingerprint is not None and not is_dataset_of(pool, self.fingerprint, self.rows_checksum):
            compared = "its rows may differ" if self.rows_checksum is None else "its rows or columns differ"
            raise ValueError(
                f"The subset was selected from the dataset with fingerprint {self.fingerprint} and this one has "
                f"{getattr(pool, '_fingerprint', None)}: {compared}. Load and prepare it in the same way, or index it with `ids` "
                "yourself."
            )
        return pool.select(self.ids.tolist())

    # Files ----------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``subset.parquet`` (one row per sample) and ``subset.json``, readable without this package.

        Each file is replaced as a whole, and the second names the first by its checksum, so that what a crash leaves is
        loaded as it was before or refused.

        Args:
            folder: Where to write; made if it is not there.

        Raises:
            ValueError: If the facts are not JSON-compatible.
        """
        facts = {
            "format_version": FORMAT_VERSION,
            "num_rows": len(self),
            "num_pool": self.num_pool,
            "fingerprint": self.fingerprint,
            "rows_checksum": self.rows_checksum,
            "domain_names": self.domain_names,
            "facts": self.facts,
        }
        try:
            json.dumps(facts, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`facts` must hold what JSON can: dicts, lists, strings, finite numbers, true, false and null ({error}). "
                "Convert the rest, tensors with `tolist()` for instance."
            ) from error
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with _replacing(folder / SELECTION_PATH) as path:
            pyarrow.parquet.write_table(self._table(), path)
            facts["sha256"] = _checksum(path)
        with _replacing(folder / FACTS_NAME) as path:
            path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def _table(self) -> pyarrow.Table:
        arrays, features = {}, {}
        for name, values in self._columns().items():
            column, kind = _COLUMNS[name]
            values = values.detach().cpu()
            if kind == "float" and values.dtype != torch.float64:
                values = values.float()
            arrays[column] = values.numpy()
            features[column] = datasets.Value(str(values.dtype).removeprefix("torch."))
        if self.domain_names is not None:
            features["domain"] = datasets.ClassLabel(names=list(map(str, self.domain_names)))
        # The schema tells `datasets` the names of the domains, and is plain numbers to everything else.
        return pyarrow.table(arrays, schema=datasets.Features(features).arrow_schema)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "SelectedSubset":
        """Read what ``save`` has written.

        Args:
            folder: Where it is.

        Returns:
            The subset.

        Raises:
            ValueError: If a file is missing, damaged, or not the one that belongs to the other.
        """
        folder = Path(folder).expanduser()
        path, rows_path = folder / FACTS_NAME, folder / SELECTION_PATH
        for file in (path, rows_path):
            if not file.is_file():
                raise ValueError(
                    f"`{file}` is missing: there is no selected subset, or it was not written to its end."
                )
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            found = facts["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"`{path}` cannot be read ({type(error).__name__}: {error}): it is damaged.") from error
        if found != FORMAT_VERSION:
            raise ValueError(
                f"`{path}` is of format {found!r:.100}, this version of hf_bilevel reads {FORMAT_VERSION}. Update hf_bilevel."
            )
        if _checksum(rows_path) != facts.get("sha256"):
            raise ValueError(
                f"`{rows_path}` is not the file that `{path}` was written with: one of them is damaged, was changed, or was "
                "not written to its end. Save or download the subset again."
            )
        try:
            there = pyarrow.parquet.read_schema(rows_path).names
            table = pyarrow.parquet.read_table(rows_path, columns=[c for c, _ in _COLUMNS.values() if c in there])
            columns = {
                name: torch.from_numpy(table[column].to_numpy().copy())
                for name, (column, _) in _COLUMNS.items()
                if column in there
            }
            keys = ("num_pool", "domain_names", "fingerprint", "facts")
            checksum = facts.get("rows_checksum")  # earlier versions wrote none
            return cls(**columns, rows_checksum=checksum, **{key: facts[key] for key in keys})
        except Exception as error:  # pyarrow and torch raise a dozen kinds for a damaged file
            raise ValueError(f"`{path}` and `{rows_path}` do not make a selected subset: {error}") from error

    # The Hub --------------------------------------------------------------------------------------------------------

    def push_to_hub(
        self,
        repo_id: str,
        *,
        data: str = "rows",
        pool: datasets.Dataset | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        folder: str | os.PathLike | None = None,
        commit_message: str = "Upload a selected subset",
    ) -> CommitInfo:
        """Upload the subset as a dataset, with a card written from its facts.

        ``datasets.load_dataset(repo_id)`` then gives the selected rows, exactly as they are in the pool, in the order of
        ``ids``, and ``datasets.load_dataset(repo_id, "selection")`` their numbers with weights, scores and the like;
        ``load_selected_subset(repo_id)`` gives this object back.

        All of it is written to a local folder first and uploaded in one commit, so the repository is as it was before or
        complete. Files of an earlier subset that this one lacks are removed by the same commit. What the owner has added to the
        card stays: a licence or a gate in its header, and notes at its end.

        Args:
            repo_id: ``namespace/name`` of a dataset repository; made if it is not there.
            data: ``"rows"`` uploads the selected rows, ``"ids"`` only their numbers, for a pool that may not be passed on.
            pool: The dataset that was selected from, for ``data="rows"``.
            private: Whether a new repository is private: yes unless False. One that is there stays what it is, and it is an error
                to ask for something else.
            revision: Branch, made if it is not there; None for the main one.
            token: Token with write access; the one of ``hf auth login`` or ``HF_TOKEN`` if None. It is not stored.
            folder: Where to write before the upload, and to keep it. If None a temporary folder, kept only if the upload fails.
            commit_message: Of the commit.

        Returns:
            The commit, with ``commit_url`` and ``oid``, which pins this version as a ``revision``.

        Raises:
            ValueError: If ``data`` and ``pool`` do not fit, ``repo_id`` is not the name of a repository, or nothing is selected.
            LocalTokenNotFoundError: If there is no token.
            RuntimeError: If the files cannot be written, or the upload fails. The message then says where everything lies and how
                to try again.
        """
        if data not in ("ids", "rows"):
            raise ValueError(f"`data` must be one of ids, rows; got {data!r}.")
        if data == "rows" and not isinstance(pool, datasets.Dataset):
            raise ValueError(
                f"`data='rows'` uploads the selected rows and needs `pool`, the `datasets.Dataset` that was selected from; got "
                f"{type(pool).__name__}. Pass it, or use `data='ids'`."
            )
        if token is None and huggingface_hub.get_token() is None:
            raise LocalTokenNotFoundError(
                "There is no token to upload with. Run `hf auth login`, set the environment variable HF_TOKEN, or pass `token=`; "
                "tokens with write access are made at https://huggingface.co/settings/tokens. Nothing was written."
            )
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise ValueError(
                f"`repo_id` must be `namespace/name`, your user name or an organisation first; got {repo_id!r}."
            )
        if len(self) == 0:
            raise ValueError(
                "Nothing is selected, and a dataset without rows cannot be loaded from the Hub. Select some."
            )
        rows = self.to_dataset(pool) if data == "rows" else None
        card, figures = self._describe(repo_id, with_rows=rows is not None)
        written = (
            Path(tempfile.mkdtemp(prefix="selected-subset-") if folder is None else folder).expanduser().resolve()
        )
        try:
            paths = self._write_repository(written, card, figures, rows)
        except BaseException as error:
            if folder is None:
                shutil.rmtree(written, ignore_errors=True)
            if not isinstance(error, (OSError, pyarrow.ArrowException)):
                raise
            raise RuntimeError(
                f"The subset could not be written to `{written}` ({type(error).__name__}: {error}), and nothing was uploaded. Make sure "
                "that there is room, and that the files of the pool's rows are there; `folder=` writes to another place."
            ) from error
        try:
            commit = _upload(written, paths, repo_id, private, revision, token, commit_message)
        except Exception as error:  # the client raises its own errors, those of its HTTP library, and built-in ones
            given = {"data": data, "private": private, "revision": revision, "folder": str(written)}
            arguments = [f"{key}={value!r}" for key, value in given.items() if value is not None]
            arguments += ["pool=pool"] if data == "rows" else []
            causes = [error] if error.__cause__ is None else [error, error.__cause__]  # the client's may not say why
            reason = "; ".join(f"{type(cause).__name__}: {cause}" for cause in causes)
            raise RuntimeError(
                f"The upload to `{repo_id}` failed ({reason}). The subset is whole in `{written}`, card "
                f"and all. To try again: `SelectedSubset.load({str(written)!r}).push_to_hub({repo_id!r}, {', '.join(arguments)})`."
            ) from error
        if folder is None:
            shutil.rmtree(written)
        return commit

    def _describe(self, repo_id: str, with_rows: bool) -> tuple[str, dict[str, Any]]:
        """Write the card, and draw its pictures, by their names."""
        figures = {}
        try:
            for name, draw in (("ranking", kept_against_dropped), ("domains", domain_shares)):
                if self.facts.get(name):
                    try:
                        figures[name] = draw(**self.facts[name])
                    except ImportError:  # without matplotlib the card does with its tables
                        continue
            card = dataset_card(
                repo_id,
                self.facts,
                num_kept=len(self),
                num_pool=self.num_pool,
                fingerprint=self.fingerprint,
                columns=[_COLUMNS[name][0] for name in self._columns()],
                with_rows=with_rows,
                pictures={name: PICTURES[name] for name in figures},
            )
        except Exception as error:  # whatever a value of another type leads to
            raise ValueError(
                f"`facts` hold what no card can be written from ({type(error).__name__}: {error!s:.200}). `facts['metrics']` must "
                "be a dict of numbers, `facts['controls']` a dict of such dicts, and the rest as a trainer fills it in."
            ) from error
        return card, figures

    def _write_repository(
        self, folder: Path, card: str, figures: dict[str, Any], rows: datasets.Dataset | None
    ) -> list[str]:
        """Write everything to upload and return the paths inside the folder."""
        self.save(folder)
        for name, figure in figures.items():
            with _replacing(folder / PICTURES[name]) as path:
                figure.savefig(path, dpi=150, format="png")
        if rows is not None:
            _write_rows(rows, folder / ROWS_PATH)
        with _replacing(folder / CARD_NAME) as path:
            path.write_text(card, encoding="utf-8")
        pictures = [PICTURES[name] for name in figures]
        return [FACTS_NAME, SELECTION_PATH, CARD_NAME, *pictures, *([] if rows is None else [ROWS_PATH])]


def load_selected_subset(
    repo_id: str | os.PathLike, revision: str | None = None, token: str | None = None
) -> SelectedSubset:
    """Load a subset that ``push_to_hub`` has uploaded, or ``save`` has written.

    Only numbers are downloaded, and nothing that is downloaded is executed. ``subset.to_dataset(pool)`` takes the rows, and checks
    that the pool is the one that was selected from.

    Args:
        repo_id: Name of a dataset repository, or a local folder.
        revision: Branch, tag or commit; None for the newest on the main branch.
        token: For private repositories; the one of ``hf auth login`` or ``HF_TOKEN`` if None.

    Returns:
        The subset.
    """
    local = Path(repo_id).expanduser()
    if local.is_dir() or str(repo_id).startswith((".", "/", "~")) or str(repo_id).count("/") > 1:
        return SelectedSubset.load(local)
    patterns = [FACTS_NAME, SELECTION_PATH]
    return SelectedSubset.load(
        huggingface_hub.snapshot_download(
            str(repo_id), repo_type="dataset", revision=revision, token=token, allow_patterns=patterns
        )
    )


def dataset_facts(dataset: Any) -> dict[str, str]:
    """Say what a dataset knows of where it comes from.

    Args:
        dataset: Any; only a ``datasets.Dataset`` knows something.

    Returns:
        Those of ``name``, ``config``, ``version``, and of one from the Hub ``source`` and ``revision`` (its commit), that are known.

    Example:
        >>> dataset_facts(datasets.Dataset.from_dict({"text": ["a"]}))
        {}
    """
    if not isinstance(dataset, datasets.Dataset):
        return {}
    info = dataset.info
    version = None if info.version is None or str(info.version) == "0.0.0" else str(info.version)
    is_loader = info.dataset_name == info.builder_name  # of local files: "json", "csv"
    facts = {"name": None if is_loader else info.dataset_name, "config": info.config_name, "version": version}
    # The cache names the repository and the commit of what was loaded from the Hub; nothing else in a dataset does.
    pattern = re.compile(r"(?:([^/\\]+)___)?([^/\\]+)[/\\][^/\\]+[/\\][^/\\]+[/\\]([0-9a-f]{40})[/\\][^/\\]+")
    matches = [pattern.search(file["filename"]) for file in dataset.cache_files]
    origins = {match and match.groups() for match in matches}
    if len(origins) == 1 and None not in origins and _is_all_of_files(dataset.data):
        namespace, name, facts["revision"] = origins.pop()
        facts["source"] = _name_on_hub(namespace, name, facts["revision"])
    return {key: value for key, value in facts.items() if value is not None}


def _is_all_of_files(table: Any) -> bool:
    """Say whether all rows are those of files, none made in memory and joined to them."""
    if isinstance(table, ConcatenationTable):
        return all(any(isinstance(block, MemoryMappedTable) for block in blocks) for blocks in table.blocks)
    return isinstance(table, MemoryMappedTable)


def _name_on_hub(namespace: str | None, name: str, revision: str) -> str | None:
    """Find how a repository is written whose name the cache of ``datasets`` has in snake case; None if it cannot be known."""
    prefix = "datasets--" if namespace is None else f"datasets--{namespace}--"
    for folder in sorted(Path(huggingface_hub.constants.HF_HUB_CACHE).glob(f"{prefix}*/snapshots/{revision}")):
        given = folder.parents[1].name.removeprefix(prefix)
        if camelcase_to_snakecase(given) == name:
            name = given
            break
    else:
        if "_" in name:
            return None
    return name if namespace is None else f"{namespace}/{name}"


def ranking_facts(ranked_by: str, values: Tensor, kept: Tensor) -> dict[str, Any]:
    """Count the rows that were kept and dropped, by what ranked them.

    Args:
        ranked_by: Its name.
        values: Of the rows that have one, ``(m,)``.
        kept: Which of them were kept, bool, ``(m,)``.

    Returns:
        A histogram with 40 bins: ``ranked_by``, ``edges``, ``kept`` and ``dropped``; values that are not finite are left out.

    Example:
        >>> facts = ranking_facts("score", torch.tensor([0.0, 1.0, 4.0]), torch.tensor([False, False, True]))
        >>> facts["edges"][-1], facts["kept"][-1], sum(facts["dropped"])
        (4.0, 1, 2)
    """
    values, kept = values.detach().double().cpu().numpy(), kept.cpu().numpy()
    finite = np.isfinite(values)
    try:
        edges = np.histogram_bin_edges(values[finite], bins=40)
    except ValueError:  # values that differ by rounding only
        middle = values[finite].mean()
        margin = max(1e-6, 1e-6 * abs(middle))
        edges = np.histogram_bin_edges(values[finite], bins=40, range=(middle - margin, middle + margin))
    counts = {
        name: np.histogram(values[finite & mask], edges)[0].tolist()
        for name, mask in (("kept", kept), ("dropped", ~kept))
    }
    return {"ranked_by": ranked_by, "edges": edges.tolist(), **counts}


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Write beside a file, and put the whole in its place."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # what a crash left, or a link to somewhere else
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_rows(rows: datasets.Dataset, path: Path) -> None:
    """Write rows as Parquet, with the content of images and the like that they only name."""
    path.parent.mkdir(exist_ok=True)
    with _replacing(path) as partial, pyarrow.parquet.ParquetWriter(partial, rows.features.arrow_schema) as writer:
        size = 50 if any(map(require_storage_embed, rows.features.values())) else 1000
        for table in rows.with_format("arrow").iter(batch_size=size):
            for part in _embedded(table):
                writer.write_table(part)


def _embedded(table: pyarrow.Table) -> list[pyarrow.Table]:
    """Take the content of files into a table, or into parts of it where that is more than an array can hold (2 GiB)."""
    try:
        return [embed_table_storage(table)]
    except (TypeError, pyarrow.ArrowInvalid):
        if len(table) == 1:
            raise
        half = len(table) // 2
        return _embedded(table.slice(0, half)) + _embedded(table.slice(half))


def _upload(
    folder: Path,
    paths: list[str],
    repo_id: str,
    private: bool | None,
    revision: str | None,
    token: str | None,
    commit_message: str,
) -> CommitInfo:
    """Upload files of a folder in one commit, and remove what an earlier subset left."""
    api, kind = HfApi(token=token, library_name="hf_bilevel"), "dataset"
    api.create_repo(repo_id, repo_type=kind, private=private is not False, exist_ok=True)
    is_private = api.repo_info(repo_id, repo_type=kind).private
    if private is not None and private != is_private:
        raise ValueError(
            f"`{repo_id}` exists and is {'private' if is_private else 'public'}, which `private={private}` does not change. "
            "Change it in the settings of the repository, leave `private` out, or choose another name"
        )
    if revision is not None:
        api.create_branch(repo_id, repo_type=kind, branch=revision, exist_ok=True)
    there = set(api.list_repo_files(repo_id, repo_type=kind, revision=revision))
    others = sorted(there - {".gitattributes", CARD_NAME})
    if others and FACTS_NAME not in there:
        raise ValueError(
            f"`{repo_id}` holds something else, {others[0]!r} for instance, whose card would be replaced. Choose another name"
        )
    if CARD_NAME in there:
        earlier = api.hf_hub_download(repo_id, CARD_NAME, repo_type=kind, revision=revision)
        card = (folder / CARD_NAME).read_text(encoding="utf-8")
        kept = keep_what_was_added(card, Path(earlier).read_text(encoding="utf-8"), is_ours=FACTS_NAME in there)
        (folder / CARD_NAME).write_text(kept, encoding="utf-8")
    stale = there & {ROWS_PATH, *PICTURES.values()} - set(paths)
    operations = [CommitOperationAdd(path, folder / path) for path in paths]
    operations += [CommitOperationDelete(path) for path in sorted(stale)]
    return api.create_commit(repo_id, operations, commit_message=commit_message, repo_type=kind, revision=revision)
