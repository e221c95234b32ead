"""Settings that all methods share, and how settings are read and checked."""

import dataclasses
import json
import os
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar


@dataclass
class BilevelConfig:
    """Settings that all methods share. Use the config of a method, such as ``BladeConfig``.

    Values are checked on construction: ``HfArgumentParser`` hands over whatever a YAML file holds.

    Args:
        target_batch_size: Rows per process of a batch of the target dataset; None for the training batch size.
        domain_column: Column of the training dataset that names each sample's domain, as names or as integers 0..D-1;
            None without domains.
        domain_names: Names of the domains in the order of their ids. Needed only for names in a streaming dataset.

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

    # Fields that are a number of a type or a word. They are declared strings, since HfArgumentParser reads `int | str`
    # from the command line as a string, and converted on construction; Python callers pass numbers.
    _numbers_or_words: ClassVar[dict[str, tuple[type, str]]] = {}
    # Fields that are one of a few words.
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in self._numbers_or_words:
                setattr(
                    self, entry.name, _parse_number_or_word(entry.name, value, *self._numbers_or_words[entry.name])
                )
            elif not _has_type(value, hints[entry.name]):
                raise TypeError(_wrong_type(entry.name, value, _type_name(hints[entry.name])))
        for name, allowed in self._choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        if self.target_batch_size is not None and self.target_batch_size < 1:
            raise ValueError(f"`target_batch_size` must be at least 1, got {self.target_batch_size}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-compatible values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike) -> "BilevelConfig":
        """Read the settings that a checkpoint holds in ``bilevel_config.json``."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


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


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _wrong_type(name: str, value: Any, expected: str) -> str:
    message = f"`{name}` must be {expected}, got {value!r} of type {type(value).__name__}."
    if isinstance(value, str):
        message += " In YAML write a number without quotes and with a dot before an exponent, as in 1.0e-4."
    return message


def _parse_number_or_word(name: str, value: Any, kind: type, word: str) -> Any:
    if value == word:
        return value
    expected = f"{kind.__name__} or {word!r}"
    if isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            raise TypeError(f"`{name}` must be {expected}, got {value!r}.") from None
    if not _has_type(value, kind):
        raise TypeError(_wrong_type(name, value, expected))
    return kind(value)
