"""What README and docs/ say is true: their Python runs, their commands and links exist, their messages are the library's.

A mark is an HTML comment on the line before a block. Python: ``needs the Hub`` (compiled only), ``needs trl`` (run with
``-m slow``). Commands: ``needs ...`` whatever keeps a test from running them; those without a mark are run as written, with ``-m slow``.
All commands are checked: scripts, recipes, files and extras exist, and the scripts know the options.
"""

import ast
import contextlib
import importlib.metadata
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import matplotlib
import pytest
from tiny import arguments, make_dataset, make_model

import hf_bilevel
from hf_bilevel.commands.main import main as hf_bilevel_command
from hf_bilevel.commands.run import COMMANDS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [README, *DOCS, ROOT / "scripts" / "README.md"]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "scripts" / "benchmarks" / "README.md"]

matplotlib.use("Agg")


def of(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    page: Path
    line: int
    section: str
    mark: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}, line {self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of some languages, indented ones too, each with the comment on the line before."""
    found, section, i = [], "", 0
    lines = page.read_text(encoding="utf-8").splitlines()
    while i < len(lines):
        line = lines[i].strip()
        if line.startswith("```"):
            indent, start = lines[i].index("```"), i + 1
            i = next(j for j in range(start, len(lines)) if lines[j].strip() == "```")
            before = lines[start - 2].strip() if start > 1 else ""
            mark = before if before.startswith("<!-- needs ") else ""
            if line[3:] in languages:
                text = "\n".join(entry[indent:] for entry in lines[start:i])
                found.append(Block(page, start + 1, section, mark, text))
        elif line.startswith("#"):
            section = line.lstrip("# ")
        i += 1
    return found


# Python ----------------------------------------------------------------------------------------------------------------

README_TRAINERS = {"How BROS works": "BrosTrainer", "How MixtureTrainer works": "MixtureTrainer"}


def given_in_readme(folder: Path) -> dict[str, Any]:
    """What the README's short examples take as given, anew for each of them."""
    pool = make_dataset("vit", 64)
    sources = {name: pool.select(range(i, 64, 3)) for i, name in enumerate(("web", "books", "code"))}
    return {
        **{name: getattr(hf_bilevel, name) for name in hf_bilevel.__all__},
        **{name: make_model("vit") for name in ("model", "fresh_model", "large_model")},
        **{name: arguments(folder / "output") for name in ("training_args", "args")},
        **{name: make_dataset("vit", 16, seed) for seed, name in enumerate(("clean", "held_out", "target"), 1)},
        **sources,
        "parts": sources,
        "pool": pool,
        "datasets": datasets,
        "__name__": "__main__",
    }


def run_python(page: Path, folder: Path, without: tuple[str, ...]) -> None:
    """Run the blocks of a page in their order, but those whose mark has one of some words."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    trainers: dict[str, Any] = {}
    for block in blocks(page, "python"):
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")  # an error names the line of the page
        if any(word in block.mark for word in without):
            continue
        if page == README:
            namespace = given_in_readme(folder)
            namespace["trainer"] = trainers.get(README_TRAINERS.get(block.section, ""))
        exec(code, namespace)
        trainers[type(namespace.get("trainer")).__name__] = namespace.get("trainer")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.filterwarnings(
    "ignore:The subspaces of", "ignore:The weights of the domains never move"
)  # README: few steps
@of([README, *DOCS])
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(page, tmp_path, without=("the Hub", "trl"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # TRL's own
@of([page for page in DOCS if any("trl" in block.mark for block in blocks(page, "python"))])
def test_python_runs_with_trl(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    run_python(page, tmp_path, without=("the Hub",))


def messages_of_the_library() -> list[str]:
    """Every string in its source, with … for what is filled in."""
    found = []
    for path in (ROOT / "hf_bilevel").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_quoted_messages_are_those_of_the_library() -> None:
    known, num = messages_of_the_library(), 0
    for page in DOCS:
        _, _, rest = page.read_text(encoding="utf-8").partition("## Common mistakes\n")
        for _, message in re.findall(r"^\| (`{2,3}) ?(.+?) ?\1[ |]", rest.partition("\n## ")[0], re.MULTILINE):
            assert any(message in entry for entry in known), f"{page.name}: the library does not say {message!r}"
            num += 1
    assert num > 30


def test_named_tests_exist() -> None:
    sources: dict[str, str] = {
        path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    }
    num = 0
    for page in DOCS:
        for file, name in re.findall(r"(test_\w+\.py)::(test_\w+)", page.read_text(encoding="utf-8")):
            assert f"\ndef {name}(" in sources.get(file, ""), f"{page.name}: there is no {file}::{name}"
            num += 1
    assert num > 30


# Commands --------------------------------------------------------------------------------------------------------------


def commands(block: Block) -> list[list[str]]:
    words = []
    for line in block.text.replace("\\\n", " ").splitlines():
        for command in line.removeprefix("$ ").split(" && "):
            if split := shlex.split(command, comments=True):
                words.append(split)
    return words


def commands_in_text(page: Path) -> list[list[str]]:
    """Commands between backticks that name a script or a recipe, as in tables."""
    spans = re.findall(r"(?<!`)`((?:accelerate launch|python|hf-bilevel) [^`]+)`", page.read_text(encoding="utf-8"))
    return [shlex.split(span) for span in spans if "scripts/" in span or span.startswith("hf-bilevel")]


def modules_of_scripts() -> dict[str, Any]:
    scripts = str(ROOT / "scripts")
    return {name: m for name, m in list(sys.modules.items()) if str(getattr(m, "__file__", None)).startswith(scripts)}


@cache
def options_of(script: str) -> set[str]:
    """The options that ``--help`` of a script, or of a command of ``hf-bilevel``, lists."""
    path, argv, before = list(sys.path), sys.argv, modules_of_scripts()
    for name in before:  # to be imported afresh: what was imported has changed the path, which a test has put back
        del sys.modules[name]
    help_text = io.StringIO()
    try:
        with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
            if script in COMMANDS:
                hf_bilevel_command([script, "--help"])
            else:
                sys.argv = [script, "--help"]
                sys.path.insert(0, str((ROOT / script).parent))
                runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.path[:], sys.argv = path, argv
        for name in modules_of_scripts():
            del sys.modules[name]  # other folders have modules of the same names
        sys.modules.update(before)
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_text.getvalue()))
    assert "--help" in options, f"`{script} --help` says {help_text.getvalue()!r}"
    return options


def check_options(script: str, words: list[str]) -> None:
    options = options_of(script)
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in options, f"`{script}` has no option `{word}`"
        assert (
            not word.startswith("scripts/") or (ROOT / word).exists() or words[words.index(word) - 1] == "--output"
        ), f"there is no `{word}`"
    takes_a_recipe = words and words[0].endswith(".yaml")
    assert not takes_a_recipe or words[0].startswith(("my_", "scripts/")), (
        f"`{words[0]}` is neither here nor the user's"
    )


def check_pip(words: list[str]) -> None:
    extras = set(importlib.metadata.metadata("hf_bilevel").get_all("Provides-Extra"))
    for flag, value in zip(words, words[1:], strict=False):
        assert flag not in ("-c", "-r") or (ROOT / value).exists(), f"there is no `{value}`"
    for word in words:
        if found := re.fullmatch(r"(?:\.|hf_bilevel)\[(.+)\]", word):
            assert set(found[1].split(",")) <= extras, f"`{word}` has extras that pyproject.toml lacks"


def check(words: list[str]) -> None:
    program, rest = Path(words[0]).name, words[1:]
    if program == "pip":
        check_pip(rest)
    elif program == "hf-bilevel":
        if rest != ["--help"]:
            assert rest[0] in COMMANDS, f"`hf-bilevel` has no command `{rest[0]}`"
            check_options(rest[0], rest[1:])
    elif program == "python" and rest[0] == "-m":
        assert rest[1] in ("venv", "pytest"), f"this test does not know `python -m {rest[1]}`"
        for word in rest[2:]:
            file, _, name = word.partition("::")
            assert not file.startswith("tests/") or (ROOT / file).exists(), f"there is no `{file}`"
            assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"there is no `{word}`"
    elif program == "python" or words[:2] == ["accelerate", "launch"]:
        at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        assert at is not None and (ROOT / words[at]).exists(), f"there is no script in `{shlex.join(words)}`"
        for flag, value in zip(words[:at], words[1:at], strict=False):
            assert flag != "--config_file" or (ROOT / value).exists(), f"there is no `{value}`"
        check_options(words[at], words[at + 1 :])
    else:
        raise AssertionError(f"this test does not know `{shlex.join(words)}`: teach it")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of what the scripts import
@of(PAGES)
def test_commands_exist_and_know_their_options(page: Path) -> None:
    for block in blocks(page, "bash", "shell", "console"):
        for words in commands(block):
            try:
                check(words)
            except AssertionError as error:
                raise AssertionError(f"{block.where}: {error}") from error
    for words in commands_in_text(page):
        check(words)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python scripts/nothing.py", "there is no script"),
        ("python scripts/quickstart.py --sedes 3", "has no option `--sedes`"),
        ("accelerate launch --config_file nowhere.yaml scripts/quickstart.py", "there is no `nowhere.yaml`"),
        ("hf-bilevel blad my_recipe.yaml", "has no command `blad`"),
        ("hf-bilevel blade scripts/recipes/blade.yaml", "there is no `scripts/recipes/blade.yaml`"),
        ("hf-bilevel blade my_recipe.yaml --selection_ration 0.5", "has no option `--selection_ration`"),
        ('pip install "hf_bilevel[evaluate]"', "has extras that pyproject.toml lacks"),
        ("python -m pytest tests/test_docs.py::test_nothing", "there is no `tests/test_docs.py::test_nothing`"),
        ("rm -rf output", "does not know `rm -rf output`"),
    ],
)
def test_wrong_commands_are_noticed(command: str, message: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        check(shlex.split(command))


@pytest.mark.slow
@of(PAGES)
def test_unmarked_commands_run(page: Path, tmp_path: Path) -> None:
    """In a folder of links, so that nothing is written into the checkout, with the commands of this environment."""
    for entry in ("hf_bilevel", "scripts", "tests", "README.md", "pyproject.toml", "constraints.txt"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    programs = tmp_path / "bin"
    programs.mkdir()
    console = programs / "hf-bilevel"  # as pip would write it
    console.write_text(f"#!{sys.executable}\nfrom hf_bilevel.commands.main import main\n\nmain()\n")
    console.chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    for block in blocks(page, "bash", "shell", "console"):
        if not block.mark:
            command = ["bash", "-euo", "pipefail", "-c", block.text]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"{block.where}: {done.stdout[-2000:]}{done.stderr[-4000:]}"


# Links -----------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@of(LINKED)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: {target.name} has no such heading"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in DOCS:
        assert page.name == "README.md" or f"]({page.name})" in index
    assert "](docs/README.md)" in README.read_text(encoding="utf-8")
