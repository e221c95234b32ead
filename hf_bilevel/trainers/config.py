"""Settings that all methods share, and how settings are read and checked."""

import dataclasses
import json
import math
import os
import reprlib
import types
import typing
from collections.abc import Container
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

MAX_NUMBER = 2**63  # what torch can count to


@dataclass
class BilevelConfig:
    """Settings that all methods share. Use the config of a method, such as ``BladeConfig``.

    Values are checked on construction: ``HfArgumentParser`` hands over whatever a YAML file holds.

    Args:
        target_batch_size: Rows per process of a batch of the target dataset; None for the training batch size.
        domain_column: Column of the training dataset that names each sample's domain, as names or as integers 0..D-1;
            None without domains.
        domain_names: Names of the domains in the order of their ids. Needed only for names in a streaming dataset.
        check_processes: For debugging: stop if weights or the method's state differ between processes after an optimizer step, or
            after an outer step of a search, and name what differs. Costs a hash of all of it in every step.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a value has another type than declared.
    """

    target_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per process of a target batch; the training batch size if not set."}
    )
    domain_column: str | None = field(
        default=None, metadata={"help": "Column of the training dataset that names each sample's domain."}
    )
    domain_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the domains, in the order of their ids; for streaming datasets."}
    )

    check_processes: bool = field(
        default=False,
        metadata={"help": "For debugging: after every step, stop if weights or state differ between processes."},
    )

    # Fields that are a number of a type or a word. They are declared strings, since HfArgumentParser reads `int | str`
    # from the command line as a string, and converted on construction; Python callers pass numbers.
    _numbers_or_words: ClassVar[dict[str, tuple[type, str]]] = {}
    # Fields that are one of a few words.
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __post_init__(self) -> None:
        for name, parts in self._numbers_or_words.items():
            setattr(self, name, _parse_number_or_word(name, getattr(self, name), *parts))
        check_types(self, without=self._numbers_or_words)
        for name, allowed in self._choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; got {shown(getattr(self, name))}.")
        if self.domain_names is not None and len(set(self.domain_names)) != len(self.domain_names):
            raise ValueError(f"`domain_names` must differ from each other, got {shown(self.domain_names)}.")
        if self.target_batch_size is not None and self.target_batch_size < 1:
            raise ValueError(f"`target_batch_size` must be at least 1, got {self.target_batch_size}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-compatible values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike) -> "BilevelConfig":
        """Read the settings that a checkpoint holds in ``bilevel_config.json``.

        Args:
            path: The file.

        Returns:
            The settings.

        Raises:
            ValueError: If the file cannot be read, holds no settings, or a setting that this class does not have.
        """
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"`{path}` cannot be read ({type(error).__name__}: {error}).") from error
        if not isinstance(settings, dict):
            raise ValueError(f"`{path}` must hold the settings of a {cls.__name__}, got {type(settings).__name__}.")
        if unknown := sorted(set(settings) - {entry.name for entry in fields(cls)}):
            raise ValueError(f"`{path}` holds {shown(unknown)}, which {cls.__name__} does not have.")
        return cls(**settings)


def check_types(settings: Any, without: Container[str] = ()) -> None:
    """Check the fields of a dataclass, whose values may come from anywhere, and make them Python's own.

    NumPy's numbers and strings are of Python's types too, and what is saved with them cannot be loaded safely.

    Args:
        settings: The dataclass; its fields are declared as a type, an optional one, or a list.
        without: Fields to leave out.

    Raises:
        TypeError: If a value has another type than declared.

    A whole number that is too large to be counted to is a ValueError.
    """
    hints = typing.get_type_hints(type(settings))
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if entry.name in without:
            continue
        if not _has_type(value, hints[entry.name]):
            raise TypeError(_wrong_type(entry.name, value, _type_name(hints[entry.name])))
        setattr(settings, entry.name, _builtin(value))
        if isinstance(value, int):
            _check_size(entry.name, value)


def _check_size(name: str, value: int | float) -> None:
    if MAX_NUMBER <= abs(value) < math.inf:
        raise ValueError(f"`{name}` must be smaller than 2**63, got {shown(value)}.")


def _has_type(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return isinstance(value, list) and all(_has_type(entry, item) for entry in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _builtin(value: Any) -> Any:
    if isinstance(value, list):
        return [_builtin(entry) for entry in value]
    if isinstance(value, str):
        return str.__str__(value)
    return float(value) if isinstance(value, float) else value


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def shown(value: Any) -> str:
    """Write a value of any type and size as a message can hold it.

    Args:
        value: Anything.

    Returns:
        Its beginning.

    Example:
        >>> shown(["web", 1]), shown(10**5000)
        ("['web', 1]", 'a value that cannot be written')
    """
    try:
        return _Shown().repr(value)
    except Exception:  # whole numbers of thousands of digits, and objects that cannot be written
        return "a value that cannot be written"


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 200
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 20


def _wrong_type(name: str, value: Any, expected: str) -> str:
    message = f"`{name}` must be {expected}, got {shown(value)} of type {type(value).__name__}."
    if isinstance(value, str):
        message += " In YAML write a number without quotes and with a dot before an exponent, as in 1.0e-4."
    return message


def _parse_number_or_word(name: str, value: Any, kind: type, word: str) -> Any:
    if isinstance(value, str) and value == word:
        return value
    expected = f"{kind.__name__} or {word!r}"
    number = value
    if isinstance(value, str):
        try:
            number = kind(value)
        except ValueError:
            raise TypeError(f"`{name}` must be {expected}, got {shown(value)}.") from None
    elif not _has_type(value, kind):
        raise TypeError(_wrong_type(name, value, expected))
    _check_size(name, number)
    number = kind(number)
    _check_size(name, number)  # once more: it may have been rounded up
    return number
