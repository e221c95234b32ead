"""Files from others: damaged and hostile ones are refused in bounded time, nothing is run, nothing is written elsewhere."""

import hashlib
import html
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from fuzzing import JSON, TEXTS, bounded, fuzz, message_of
from huggingface_hub import DatasetCard
from hypothesis import assume
from hypothesis import strategies as st
from tiny import make_trainer
from transformers import TrainingArguments

from hf_bilevel import BladeConfig, BladeTrainer, BrosConfig, CoresetConfig, MixtureConfig, SelectedSubset
from hf_bilevel.cards import MAX_VALUE, NOTES_BEGIN, MethodSection, dataset_card, escape_markdown, model_section
from hf_bilevel.commands.arguments import BladeRunArguments, DataArguments, ModelArguments
from hf_bilevel.commands.recipe import parse

FILES = ("subset.json", "subset.parquet")
IDS = [4, 0, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a subset."""
    path = tmp_path_factory.mktemp("whole")
    SelectedSubset(
        torch.tensor(IDS),
        5,
        weights=torch.tensor([0.5, 0.25, 0.1]),
        scores=torch.tensor([1.0, float("nan"), 2.0], dtype=torch.float64),
        counts=torch.tensor([1, 2, 3]),
        domain_ids=torch.tensor([0, 1, 0]),
        domain_names=["web", "books"],
        fingerprint="0123456789abcdef",
        facts={"method": "blade", "metrics": {"eval_loss": 0.5}, "config": {"selection_ratio": 0.5}},
    ).save(path)
    return {name: (path / name).read_bytes() for name in FILES}


def write(folder: Path, content: dict[str, bytes]) -> Path:
    shutil.rmtree(folder / "subset", ignore_errors=True)
    (folder / "subset").mkdir()
    for name, data in content.items():
        (folder / "subset" / name).write_bytes(data)
    return folder / "subset"


def signed(whole: dict[str, bytes], rows: bytes | None = None, **changes: Any) -> dict[str, bytes]:
    """Files whose checksum is right, as those of an attacker are."""
    rows = whole["subset.parquet"] if rows is None else rows
    facts = {**json.loads(whole["subset.json"]), "sha256": hashlib.sha256(rows).hexdigest(), **changes}
    return {"subset.json": json.dumps(facts).encode("utf-8", "surrogatepass"), "subset.parquet": rows}


def load_or_refuse(path: Path) -> SelectedSubset | None:
    with bounded(10):
        try:
            subset = SelectedSubset.load(path)
        except ValueError as error:
            assert str(path) in message_of(error)
            return None
    assert subset.ids.dtype == torch.int64 and subset.ids.ndim == 1
    assert all(0 <= i < subset.num_pool for i in subset.ids.tolist())
    assert len(subset.ids.unique()) == len(subset.ids)
    assert type(subset.facts) is dict and type(subset.num_pool) is int
    if subset.domain_names is not None:
        assert all(type(subset.domain_names[i]) is str for i in subset.domain_ids.tolist())
    if subset.num_pool == 5:
        rows = Dataset.from_dict({"x": list(range(5))})
        if subset.fingerprint is not None:
            with pytest.raises(ValueError, match="fingerprint"):
                subset.to_dataset(rows)
        else:
            assert subset.to_dataset(rows)["x"][:] == subset.ids.tolist()
    return subset


DAMAGE = st.one_of(
    st.tuples(st.just("flip"), st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=4)),
    st.tuples(st.just("cut"), st.integers(0)),
    st.tuples(st.just("insert"), st.tuples(st.integers(0), st.binary(max_size=20))),
    st.tuples(
        st.just("replace"), st.one_of(st.binary(max_size=40), JSON.map(lambda value: json.dumps(value).encode()))
    ),
    st.tuples(st.just("double"), st.none()),
)


def damaged(content: bytes, damage: tuple[str, Any]) -> bytes:
    kind, how = damage
    if kind == "flip":
        changed = bytearray(content)
        for place, mask in how:
            changed[place % len(content)] ^= mask
        return bytes(changed)
    if kind == "cut":
        return content[: how % len(content)]
    if kind == "insert":
        place = how[0] % len(content)
        return content[:place] + how[1] + content[place:]
    return how if kind == "replace" else content + content


@fuzz(40, 700, name=st.sampled_from(FILES), damage=DAMAGE)
def test_damaged_subsets(name: str, damage: tuple[str, Any], whole: dict[str, bytes], folder: Path) -> None:
    content = {**whole, name: damaged(whole[name], damage)}
    subset = load_or_refuse(write(folder, content))
    if name == "subset.parquet":
        assert (subset is None) == (content[name] != whole[name])  # by the checksum, whatever was changed
    elif subset is not None:
        assert subset.ids.tolist() == IDS


@fuzz(40, 900, damage=DAMAGE)
def test_damaged_rows_with_the_right_checksum(damage: tuple[str, Any], whole: dict[str, bytes], folder: Path) -> None:
    load_or_refuse(write(folder, signed(whole, damaged(whole["subset.parquet"], damage))))


PATHS = st.sampled_from(["../../outside", "/etc/passwd", "~/x", "\\\\host\\share", "a\0b", "file:///etc/passwd"])
VALUES = st.one_of(
    JSON,
    PATHS,
    st.sampled_from([float("nan"), float("inf"), 10**200, -1, 2**63, 5.0, True, ["a", "a"], [["a"]], "ab"]),
)


@fuzz(
    40,
    700,
    changes=st.dictionaries(
        st.sampled_from(
            [
                "format_version",
                "num_rows",
                "num_pool",
                "fingerprint",
                "rows_checksum",
                "domain_names",
                "facts",
                "sha256",
                "x",
            ]
        ),
        VALUES,
        min_size=1,
        max_size=3,
    ),
    dropped=st.none() | st.sampled_from(["num_pool", "facts", "sha256", "format_version"]),
)
def test_hostile_facts(changes: dict[str, Any], dropped: str | None, whole: dict[str, bytes], folder: Path) -> None:
    content = signed(whole, **changes)
    if dropped is not None:
        facts = json.loads(content["subset.json"])
        facts.pop(dropped, None)
        content["subset.json"] = json.dumps(facts).encode("utf-8", "surrogatepass")
    load_or_refuse(write(folder, content))


TYPES = [
    pyarrow.int8(), pyarrow.uint16(), pyarrow.int32(), pyarrow.int64(), pyarrow.uint64(), pyarrow.float16(), pyarrow.float32(),
    pyarrow.float64(), pyarrow.bool_(), pyarrow.string(), pyarrow.binary(), pyarrow.date32(), pyarrow.timestamp("us"),
    pyarrow.decimal128(5, 1), pyarrow.list_(pyarrow.int64()), pyarrow.dictionary(pyarrow.int32(), pyarrow.int64()),
    pyarrow.null(), pyarrow.struct([("a", pyarrow.int64())]),
]  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> pyarrow.Table:
    num, columns = draw(st.integers(0, 4)), {}
    names = draw(
        st.lists(st.sampled_from(["weight", "score", "count", "probability", "domain", "x", "../x"]), unique=True)
    )
    for name in [*(["id"] if draw(st.integers(0, 9)) else []), *names]:
        kind = draw(st.sampled_from(TYPES)) if draw(st.integers(0, 2)) else pyarrow.int64()
        values: list[Any] = draw(st.permutations(range(num)))
        if draw(st.integers(0, 5)) == 0:
            values = draw(st.lists(st.none() | st.integers(-2, 2**62), min_size=num, max_size=num))
        try:
            columns[name] = pyarrow.array(values).cast(kind)
        except pyarrow.ArrowException:
            columns[name] = pyarrow.nulls(num, kind)
    return pyarrow.table(columns)


@fuzz(30, 600, table=tables(), names=st.none() | st.just(["a", "b"]))
def test_hostile_rows(table: pyarrow.Table, names: Any, whole: dict[str, bytes], folder: Path) -> None:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    content = signed(whole, sink.getvalue().to_pybytes(), domain_names=names, fingerprint=None)
    subset = load_or_refuse(write(folder, content))
    if subset is not None:
        assert table["id"].to_pylist() == subset.ids.tolist()


SPECIAL: dict[str, Callable[[Path, Path], None]] = {
    "link outside": lambda path, outside: path.symlink_to(outside),
    "no target": lambda path, outside: path.symlink_to("/nowhere/at/all"),
    "loop": lambda path, outside: path.symlink_to(path),
    "folder": lambda path, outside: path.mkdir(),
    "pipe": lambda path, outside: os.mkfifo(path),
    "empty": lambda path, outside: path.touch(),
}


@fuzz(30, 150, name=st.sampled_from(FILES), kind=st.sampled_from(sorted(SPECIAL)))
def test_special_files(name: str, kind: str, whole: dict[str, bytes], folder: Path) -> None:
    path = write(folder, {other: data for other, data in whole.items() if other != name})
    (folder / "outside").write_bytes(b"root:x:0:0")
    SPECIAL[kind](path / name, folder / "outside")
    assert load_or_refuse(path) is None


@fuzz(
    4,
    40,
    links=st.sets(
        st.sampled_from([name + end for name in (*FILES, "README.md", "ranking.png") for end in ("", ".partial")]),
        min_size=1,
    ),
)
def test_nothing_is_written_through_links(
    links: set[str], folder: Path, monkeypatch_module: pytest.MonkeyPatch
) -> None:
    """A folder from others may hold links to files of ours where the subset will be written."""
    path = write(folder, {})
    outside = folder / "outside"
    outside.write_bytes(b"mine")
    for name in links:
        (path / name).symlink_to(outside)
    facts = {"ranking": {"ranked_by": "score", "edges": [0.0, 1.0, 2.0], "kept": [1, 1], "dropped": [1, 0]}}
    subset = SelectedSubset(torch.tensor([1]), 3, facts=facts)
    subset.push_to_hub("me/digits", data="ids", token="none", folder=path)
    assert outside.read_bytes() == b"mine"
    assert SelectedSubset.load(path).ids.tolist() == [1]


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    """Uploads stay here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_bilevel.subset._upload", lambda *args: None)
        patch.setattr("hf_bilevel.plots._new_figure", lambda *size: _no_matplotlib_twice(*size))
        yield patch


def _no_matplotlib_twice(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(1, 1))  # a small one is quick to write


@fuzz(
    30,
    500,
    facts=st.dictionaries(
        st.sampled_from(
            "method trainer selection search ranking dataset model seed versions config domains metrics controls".split()
        ),
        VALUES
        | st.dictionaries(st.sampled_from(["names", "pool", "subset", "edges", "kept", "a"]), VALUES, max_size=3),
        min_size=1,
        max_size=4,
    ),
)
def test_facts_that_make_no_card(facts: dict[str, Any], folder: Path, monkeypatch_module: pytest.MonkeyPatch) -> None:
    """A subset of others loads with any facts; uploading it again writes a card, or says what is wrong."""
    path = write(folder, {})
    try:
        SelectedSubset(torch.tensor([1]), 3, facts=facts).push_to_hub("me/a", data="ids", token="none", folder=path)
    except ValueError as error:
        assert "`facts`" in message_of(error)
        assert list(path.iterdir()) == []
    else:
        check_header((path / "README.md").read_text(encoding="utf-8"), "me/a", with_rows=False)


# Cards -----------------------------------------------------------------------------------------------------------------

HOSTILE = st.one_of(
    TEXTS,
    st.text(st.sampled_from("|`*_<>[]()!#-+=~\\&;:\"'{}%@/\n\r\t\x0b\x0c\x1c\x85\u2028\u2029\u202e\0 ab1"), max_size=25),
    st.sampled_from(
        [
            "---\ntags: [evil]\n---", "| a | b |\n|---|---|", "<script>alert(1)</script>", "<!-- ", "]]>", "![x](http://evil/x.png)",
            "[x](javascript:alert(1))", "```\nend\n```", "{{ 7 * 7 }}", "{% for x in y %}", "!!python/object/apply:os.system ['x']",
            "\n# Heading", "&#124;", "&lt;", "\\|", "a\n\n---\n\nb", "www.evil.example", "* * *", "\ud800", "1. one", "- item",
        ]
    ),
)  # fmt: skip
REPO_IDS = st.from_regex(r"[a-z0-9]{1,6}/[a-zA-Z0-9_.-]{1,12}", fullmatch=True) | st.sampled_from(
    ["me/true", "me/null", "me/1e5", "me/2024-01-01", "me/0x1f", "me/1.0", "me/yes", "me/12"]
)


def as_shown(value: str) -> str:
    """What a reader is to see of a text."""
    text = value if len(value) <= MAX_VALUE else value[: MAX_VALUE - 1] + "\u2026"
    return " ".join(text.split())


def read_back(cell: str) -> str:
    """What a reader sees of a cell; character references name what stands there, also what HTML would replace."""
    return re.sub(r"&#(\d+);", lambda match: chr(int(match[1])), cell)


def check_header(card: str, repo_id: str, with_rows: bool) -> None:
    _, header, _ = card.split("---\n", 2)
    parsed = yaml.safe_load(header)
    assert set(parsed) == {"size_categories", "pretty_name", "tags", "configs"}
    assert parsed["pretty_name"] == repo_id.split("/")[1]
    assert parsed["tags"] == ["hf_bilevel", "data-selection"]
    assert [config["config_name"] for config in parsed["configs"]] == ["rows"] * with_rows + ["selection"]
    assert DatasetCard(card).data.pretty_name == parsed["pretty_name"]


def tables_of(card: str) -> list[list[list[str]]]:
    """The tables of a card, as a Markdown reader takes them apart; every row must have the cells of its head."""
    found: list[list[list[str]]] = []
    lines = card.split("\n")
    for i, line in enumerate(lines):
        if not line.startswith("|"):
            continue
        assert line.endswith("|") and "\\" not in line
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        if not lines[i - 1].startswith("|"):
            found.append([])
        found[-1].append(cells)
        assert len(cells) == len(found[-1][0])
    return found


def assert_harmless(card: str, allowed: str) -> None:
    """No markup beside ours: ``allowed`` matches it."""
    body = re.sub(allowed, "", card.replace(NOTES_BEGIN, ""))
    assert not re.search(r"[<>\[\]*\\~`]", body), re.search(r".{0,40}[<>\[\]*\\~`].{0,40}", body)
    assert "\u2028" not in card and "\r" not in card and "\0" not in card


ALLOWED_IN_DATASET_CARD = r"```python\n(?:[^`]*)```|!\[[\w ,]+\]\(\w+\.png\)|^---\n(?:.*\n)*?---\n"


@fuzz(
    20,
    500,
    repo_id=REPO_IDS,
    names=st.lists(HOSTILE, min_size=1, max_size=3, unique=True),
    texts=st.lists(HOSTILE, min_size=9, max_size=9),
    with_rows=st.booleans(),
)
def test_dataset_cards_show_any_text(repo_id: str, names: list[str], texts: list[str], with_rows: bool) -> None:
    assume(not re.search(r"--|\.\.|\.git$|/[-.]|[-.]$", repo_id))
    method, source, model, key, metric, arm, version, ranked, fingerprint = texts
    facts = {
        "method": method,
        "trainer": method,
        "dataset": {"source": source, "revision": version},
        "model": model,
        "versions": {key: version},
        "config": {key: source},
        "ranking": {"ranked_by": ranked, "edges": [0, 1], "kept": [1], "dropped": [1]},
        "domains": {"names": names, "pool": [3] * len(names), "subset": [1] * len(names)},
        "metrics": {metric: 0.5},
        "controls": {arm: {metric: 0.25}},
    }
    pictures = {"ranking": "ranking.png", "domains": "domains.png"}
    card = dataset_card(
        repo_id,
        facts,
        num_kept=2,
        num_pool=9,
        fingerprint=fingerprint,
        columns=["id"],
        with_rows=with_rows,
        pictures=pictures,
    )
    check_header(card, repo_id, with_rows)
    assert_harmless(card, ALLOWED_IN_DATASET_CARD)
    selection, settings, domains, results = tables_of(card)
    shown = {label: read_back(text) for label, text in selection}
    assert shown["Method"] == as_shown(method) and shown["Model"] == as_shown(model)
    assert shown["Fingerprint of the pool"] == as_shown(fingerprint)
    assert [read_back(text) for text in settings[2]] == [
        as_shown(key) if len(key) <= MAX_VALUE else " ".join(key.split()),
        as_shown(source),
    ]
    assert sorted(read_back(row[0]) for row in domains[2:]) == sorted(map(as_shown, names))
    assert read_back(results[0][1]) == " ".join(metric.split()) and read_back(results[3][0]) == " ".join(arm.split())
    assert results[3][1] == "0.25"


ALLOWED_IN_SECTION = r"`BladeTrainer`|!\[[^\]]*\]\(\w+\.png\)"


@fuzz(20, 500, names=st.lists(HOSTILE, min_size=1, max_size=3), texts=st.lists(HOSTILE, min_size=8, max_size=8))
def test_sections_of_model_cards_show_any_text(names: list[str], texts: list[str]) -> None:
    pool, target, setting, value, metric, arm, command, version = texts
    method = MethodSection(
        "Title", ", as told.", "A paper.", "A limit.",
        statistics={setting: value}, columns=["domain", metric], rows=[[name, "0.5"] for name in names],
    )  # fmt: skip
    facts = {
        "trainer": "BladeTrainer",
        "num_pool": 10,
        "pool": {"source": pool, "fingerprint": version},
        "target": {"name": target},
        "versions": {"torch": version},
    }
    section = model_section(
        method,
        facts,
        settings={setting: (value, 1)},
        cost={"Device": value},
        pictures={"a.png": setting},
        results={arm: {metric: [0.5, 0.75]}, arm + "2": {metric: 1}},
        command=command,
    )
    assert section.startswith("## Title\n")
    head, _, rest = section.partition("### Reproduce\n\n")
    fence = re.match("`{3,}", rest)[0]
    block, _, limits = rest.removeprefix(f"{fence}bash\n").rpartition(f"\n{fence}\n")
    assert block == command.strip() and fence not in block
    assert_harmless(head + limits, ALLOWED_IN_SECTION)
    origin, settings, statistics, outcome, results, cost = tables_of(head)
    shown = {label: read_back(text) for label, text in origin}
    assert shown["Pool"] == as_shown(pool) if pool else "Pool" not in shown
    assert shown["Target dataset"] == as_shown(target)
    assert [read_back(text) for text in settings[2]] == [" ".join(setting.split()), as_shown(value), "1"]
    assert [read_back(row[0]) for row in outcome[2:]] == [" ".join(name.split()) for name in names]
    assert read_back(results[0][1]) == " ".join(metric.split()) and results[2][1] == "0.625 ± 0.1768"
    assert len(statistics) == 3 and len(cost) == 3


@fuzz(100, 1000, text=st.text() | HOSTILE)
def test_escaped_text_is_text(text: str) -> None:
    escaped = escape_markdown(text)
    assert not set(escaped) & set("|`*<>[]\\~!#{}\n\r\0\u2028") - {"#"} and "&" not in re.sub(r"&#\d+;", "", escaped)
    assert read_back(escaped) == " ".join(text.split())
    if text.isprintable():
        assert html.unescape(escaped) == " ".join(text.split())


# States of checkpoints -------------------------------------------------------------------------------------------------


class Planted:
    """Makes a file when it is unpickled by a reader that trusts it."""

    def __init__(self, marker: Path, how: str) -> None:
        self.marker, self.how = marker, how

    def __reduce__(self) -> tuple[Any, ...]:
        if self.how == "open":
            return open, (str(self.marker), "w")
        if self.how == "eval":
            return eval, (f"open({str(self.marker)!r}, 'w')",)
        if self.how == "system":
            return os.system, (f"touch {self.marker}",)
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> BladeTrainer:
    """A trainer with a checkpoint at step 2."""
    config = BladeConfig(score="loss", reference="none", selection_ratio=0.5, granularity="sample")
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "logging_strategy": "no"}
    built = make_trainer(
        BladeTrainer,
        "vit",
        tmp_path_factory.mktemp("run"),
        num_pool=16,
        trainer_kwargs={"bilevel_config": config},
        **settings,
    )
    built.train()
    return built


def checkpoint_of(trainer: BladeTrainer) -> Path:
    return Path(trainer.args.output_dir) / "checkpoint-2"


@pytest.fixture(scope="module")
def state(trainer: BladeTrainer) -> bytes:
    return (checkpoint_of(trainer) / "bilevel_state.pt").read_bytes()


def read_or_refuse(trainer: BladeTrainer, content: bytes, original: bytes) -> dict[str, Any] | None:
    PartialState(cpu=True)  # reset between tests
    path = checkpoint_of(trainer) / "bilevel_state.pt"
    path.unlink(missing_ok=True)  # a new file: an older one may still be mapped
    path.write_bytes(content)
    try:
        with bounded(10):
            return trainer._read_state(checkpoint_of(trainer))
    except ValueError as error:
        assert str(path) in message_of(error)
        return None
    finally:
        path.unlink()
        path.write_bytes(original)


@fuzz(50, 500, damage=DAMAGE)
def test_damaged_states(damage: tuple[str, Any], trainer: BladeTrainer, state: bytes) -> None:
    found = read_or_refuse(trainer, damaged(state, damage), state)
    assert found is None or found["method"] == "blade"


@fuzz(
    40,
    400,
    how=st.sampled_from(["open", "eval", "system", "touch"]),
    where=st.sampled_from(["alone", "method", "shared", "ranks", "key", "unread"]),
    form=st.sampled_from(["torch", "torch, old format", "pickle", "rewritten zip"]),
    protocol=st.integers(0, 5),
)
def test_code_in_states_is_never_run(
    how: str, where: str, form: str, protocol: int, trainer: BladeTrainer, state: bytes, folder: Path
) -> None:
    marker = folder / "marker"
    planted: Any = Planted(marker, how)
    content = {"method": "blade", "config": {}, "shared": {}, "ranks": [{}]}
    if where == "alone":
        content = planted
    elif where == "key":
        content = {**content, "x": [(planted,)]}
    else:
        content[where] = planted if where != "shared" else {"a": [planted]}
    path = folder / "planted.pt"
    if form.startswith("torch"):
        torch.save(content, path, pickle_protocol=max(2, protocol), _use_new_zipfile_serialization=form == "torch")
    elif form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol))
    else:
        checkpoint = checkpoint_of(trainer) / "bilevel_state.pt"
        with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(path, "w") as new:
            for info in old.infolist():
                is_pickle = info.filename.endswith("data.pkl")
                new.writestr(info, pickle.dumps(content, max(2, protocol)) if is_pickle else old.read(info))
    assert not marker.exists()
    assert read_or_refuse(trainer, path.read_bytes(), state) is None
    assert not marker.exists()


STATES = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {},
        optional={
            "method": st.just("blade") | JSON | st.just(torch.zeros(2)),
            "ranks": st.just([{}]) | st.just([]) | JSON | st.just(torch.zeros(2, 2)),
            "shared": JSON,
            "config": JSON,
        },
    ),
)


@fuzz(60, 500, shrink=False, content=STATES)
def test_states_of_other_types(content: Any, trainer: BladeTrainer, state: bytes, folder: Path) -> None:
    path = folder / "other.pt"
    torch.save(content, path)
    found = read_or_refuse(trainer, path.read_bytes(), state)
    if found is not None:
        assert found["method"] == "blade" and isinstance(found["shared"], dict) and isinstance(found["config"], dict)
        assert isinstance(found["ranks"], list) and len(found["ranks"]) <= 1


# Recipes ---------------------------------------------------------------------------------------------------------------

RECIPES = st.one_of(
    st.dictionaries(
        st.sampled_from(["model", "train_dataset", "max_length", "selection_ratio", "domain_names", "trl", "rank", "x"]) | TEXTS,
        JSON,
        max_size=5,
    ).map(lambda values: yaml.safe_dump(values, allow_unicode=True)),
    JSON.map(lambda value: yaml.safe_dump(value, allow_unicode=True)),
    st.text(st.sampled_from("abc:-&*!|>%@`'\"[]{},#? \n\t01.<=~"), max_size=40),
    st.builds(
        "{}: {}\n".format,
        st.sampled_from(["selection_ratio", "domain_names", "model", "max_length"]),
        st.sampled_from(
            ["!!int abc", "!!float x", "!!bool maybe", "!!timestamp foo", "2001-99-99", "!!binary '%'", "1" * 5000, "&a [*a]", "*a",
             "!!set {a, b}", "!!omap [a: 1]", "!!str 5", "? a", "<<: {a: 1}", "1:30:00", "0x1F", ".inf", "=", "!unknown x"]
        ),
    ),
)  # fmt: skip


def parse_or_refuse(text: str, folder: Path, *classes: type) -> tuple[Any, ...] | None:
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(text.encode("utf-8", "surrogatepass"))
    before = sorted(path.name for path in folder.iterdir())
    try:
        with bounded(15):
            return parse(*classes, argv=[str(recipe)], prog="fuzz")
    except SystemExit as error:
        assert message_of(error).startswith("fuzz: ")
        return None
    finally:
        assert sorted(path.name for path in folder.iterdir()) == before


@fuzz(40, 1200, text=RECIPES, config=st.sampled_from([BladeConfig, BrosConfig, CoresetConfig, MixtureConfig]))
def test_recipes(text: str, config: type, folder: Path) -> None:
    found = parse_or_refuse(text, folder, ModelArguments, DataArguments, BladeRunArguments, config)
    if found is not None:
        assert type(found[0].model) is str and type(found[1].max_length) is int
        assert config(**found[3].to_dict()) == found[3]


@fuzz(4, 100, depth=st.integers(2_000, 100_000), level=st.sampled_from(["[", "{a: ", "- ", "? ", "a: [", "!!set {"]))
def test_deep_recipes(depth: int, level: str, folder: Path) -> None:
    assert parse_or_refuse(level * depth, folder, BladeConfig) is None


@fuzz(
    20,
    200,
    levels=st.integers(1, 30),
    width=st.integers(2, 12),
    merge=st.booleans(),
    name=st.sampled_from(["domain_names", "x", "selection_ratio"]),
)
def test_bombs(levels: int, width: int, merge: bool, name: str, folder: Path) -> None:
    """Aliases of aliases, as a value and as keys to merge, that stand for up to 12 ** 30 entries."""
    first, inner = ("{k: v, l: w}", "{{<<: [{}]}}") if merge else ("[x, x]", "[{}]")
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} " + inner.format(", ".join([f"*a{i - 1}"] * width)) for i in range(1, levels)]
    assert parse_or_refuse("\n".join([*lines, f"{name}: *a{levels - 1}"]), folder, BladeConfig) is None


@fuzz(
    30,
    200,
    function=st.sampled_from(
        ["os.system", "subprocess.check_output", "builtins.eval", "builtins.open", "pathlib.Path.touch"]
    ),
    tag=st.sampled_from(["object/apply", "object/new", "object", "name", "module"]),
    name=st.sampled_from(["selection_ratio", "model", "x"]),
)
def test_code_in_recipes_is_never_run(function: str, tag: str, name: str, folder: Path) -> None:
    marker = folder / "marker"
    line = f"{name}: !!python/{tag}:{function} ['touch {marker}']\n"
    assert parse_or_refuse(line, folder, BladeConfig) is None
    assert parse_or_refuse(f"? !!python/{tag}:{function} ['{marker}', 'w']\n: 1\n", folder, BladeConfig) is None
    assert not marker.exists()


@fuzz(
    15,
    100,
    output=st.sampled_from(["../../x", "/nowhere/x", "x/../../y", "~/x", "a", "\\\\host\\x"]),
    name=st.sampled_from(
        ["learning_rate", "eval_strategy", "optim", "seed", "per_device_train_batch_size", "report_to"]
    ),
    value=JSON,
)
def test_training_arguments_in_recipes(
    output: str, name: str, value: Any, folder: Path, monkeypatch_folder: Path
) -> None:
    """Reading a recipe makes no folder, wherever it says that results are to go."""
    text = yaml.safe_dump({"output_dir": output, name: value, "use_cpu": True}, allow_unicode=True)
    before = sorted(map(str, monkeypatch_folder.rglob("*")))
    parse_or_refuse(text, folder, TrainingArguments, BladeConfig)
    assert sorted(map(str, monkeypatch_folder.rglob("*"))) == before


@pytest.fixture(scope="module")
def monkeypatch_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("HOME", str(path))
        yield path
