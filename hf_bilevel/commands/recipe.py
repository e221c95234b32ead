"""Read settings from a recipe, a flat YAML file, and from the command line, which wins over it."""

import difflib
import sys
import typing
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

MAX_MESSAGE, MAX_DEPTH = 3000, 20
POSITIVE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


class _Loader(yaml.SafeLoader):
    """Reads neither aliases nor deep nesting: a few lines of them can stand for more than fits into memory."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        problem = "aliases (`*name`) are not read" if self.check_event(yaml.AliasEvent) else None
        if self._depth >= MAX_DEPTH:
            problem = f"more than {MAX_DEPTH} levels are not read"
        if problem is not None:
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"`{twice[0]}` is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _cut(message: str) -> str:
    """Leave out the end of a message with a value in it that is pages long."""
    return message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "..."


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SystemExit(f"{self.prog}: {_cut(message)}")  # without the usage, a hundred lines long


def parse(*classes: type, argv: list[str] | None = None, prog: str | None = None) -> tuple[Any, ...]:
    """Read one instance of each class from a recipe and the command line.

    Args:
        *classes: Dataclasses whose fields have different names.
        argv: ``RECIPE.yaml [--field value ...]``, without the recipe ``[--field value ...]``; that of the process if None.
        prog: How the program is called, for messages; the name of the process if None.

    Returns:
        An instance of each class.

    Raises:
        SystemExit: If a name is not known, with the nearest that is; if a value cannot be read or is refused by its class.

    Example:
        >>> from hf_bilevel import BladeConfig
        >>> (config,) = parse(BladeConfig, argv=["--selection-ratio", "0.3"])
        >>> config.selection_ratio
        0.3
        >>> parse(BladeConfig, argv=["--selection_ration", "0.3"], prog="blade")
        Traceback (most recent call last):
        SystemExit: blade: `--selection_ration` is not a field. Do you mean `selection_ratio`?
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(classes, prog=prog, usage="%(prog)s RECIPE.yaml [--field value ...]", allow_abbrev=False)
    names = [entry.name for cls in classes for entry in fields(cls) if entry.init]
    if argv and not argv[0].startswith("-"):
        recipe = argv.pop(0)
        try:
            values = yaml.load(Path(recipe).read_text(encoding="utf-8"), _Loader)
        except Exception as error:  # beside its own, yaml raises what its conversions raise
            parser.error(f"cannot read the recipe {recipe} ({type(error).__name__}): {error}")
        if not isinstance(values, dict):
            parser.error(f"the recipe {recipe} must hold lines `field: value`, got {type(values).__name__}.")
        for name in values:
            if name not in names:
                parser.error(f"the recipe {recipe} has an unknown field `{str(name):.200}`.{nearest(name, names)}")
        for name in [name for name, value in values.items() if value is False and name.endswith("_strategy")]:
            values[name] = "no"  # what YAML reads as False
        parser.set_defaults(**values)  # argparse converts what is a string, as on the command line
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = nearest(unknown[0].lstrip("-").split("=")[0].replace("-", "_"), names) if unknown[0][0] == "-" else ""
        parser.error(f"`{unknown[0]}` is not a field.{hint or ' Write `--field value`, after the recipe.'}")
    values, parsed = vars(namespace), []
    for cls in classes:
        own = [entry.name for entry in fields(cls) if entry.init and entry.name in values]
        try:
            given = {name: values.pop(name) for name in own}
            if issubclass(cls, TrainingArguments):
                _check_numbers(cls, given)
            parsed.append(cls(**given))
        except (TypeError, ValueError) as error:
            raise SystemExit(f"{parser.prog}: {_cut(str(error))}") from error
    return tuple(parsed)


def _check_numbers(cls: type, given: dict[str, Any]) -> None:
    """Refuse numbers of the wrong kind, which a recipe can hold and `TrainingArguments` takes as they are."""
    hints = typing.get_type_hints(cls)
    for name, value in given.items():
        kinds = set(typing.get_args(hints[name])) or {hints[name]}
        wanted = kinds & {int, float}
        if not wanted or value is None or isinstance(value, str):
            continue
        is_number = isinstance(value, (int, float)) and (not isinstance(value, bool) or bool in kinds)
        if not is_number or float not in kinds and isinstance(value, float):
            raise TypeError(f"`{name}` must be {' or '.join(sorted(k.__name__ for k in wanted))}, got {value!r:.200}.")
        if name in POSITIVE and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def nearest(name: Any, names: Iterable[str], otherwise: str = " `--help` lists all.") -> str:
    """Say which of a few names was probably meant.

    Args:
        name: What was given.
        names: What is known.
        otherwise: What to say if nothing is near.

    Returns:
        A sentence with a space before it.

    Example:
        >>> nearest("txt", ["text", "label"])
        ' Do you mean `text`?'
    """
    found = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f" Do you mean `{found[0]}`?" if found else otherwise
