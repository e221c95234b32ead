"""Real text of clearly different domains from the Python environment that is running, so that nothing is downloaded."""

import ast
import random
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from pydoc_data.topics import topics

PATHS = sysconfig.get_paths()


def installed_text(num_characters: int, seed: int = 0) -> dict[str, str]:
    """Collect up to so many characters of each domain, from documents in a random order.

    The domains: ``code`` and ``docstrings`` of the standard library, ``readme`` and ``licence`` of the installed packages,
    ``stubs`` (their type stubs) and ``manual`` (the language reference that ``help()`` shows).
    """
    order = random.Random(seed)

    def shuffled(paths: Iterator[Path]) -> list[Path]:
        paths = sorted(paths)
        order.shuffle(paths)
        return paths

    modules = shuffled(Path(PATHS["stdlib"]).glob("*.py"))
    packages = Path(PATHS["purelib"])
    sources = {
        "code": (code for path in modules for code in _code(path)),
        "docstrings": (text for path in modules for text in _docstrings(path)),
        "readme": (package.metadata.get_payload() for package in distributions()),
        "licence": map(_read, shuffled(packages.glob("*.dist-info/**/LICEN*"))),
        "stubs": map(_read, shuffled(packages.rglob("*.pyi"))),
        "manual": iter(topics.values()),
    }
    texts = {}
    for domain, documents in sources.items():
        kept: dict[str, int] = {}  # an ordered set: many packages have the same licence
        while sum(kept.values()) < num_characters and (document := next(documents, None)) is not None:
            document = document.strip()[: num_characters // 10]
            if len(document) > 200:
                kept[document] = len(document)
        texts[domain] = "\n\n".join(kept)[:num_characters]
    return texts


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore") if path.is_file() else ""


def _code(path: Path) -> Iterator[str]:
    """Yield the functions and classes of a module without docstrings and comments."""
    tree = ast.parse(_read(path))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) and len(node.body) > 1:
            del node.body[0]
    yield from (ast.unparse(node) for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(_read(path))):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            yield ast.get_docstring(node) or ""
