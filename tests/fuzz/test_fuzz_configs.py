"""Configs made of anything: a config that can be written and read again, or a refusal that names the field."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from fuzzing import ANYTHING, JSON, NUMBERS, TEXTS, fuzz, message_of
from hypothesis import strategies as st

from hf_bilevel import BladeConfig, BrosConfig, CoresetConfig, MixtureConfig
from hf_bilevel.commands.arguments import BladeRunArguments, DataArguments, ModelArguments
from hf_bilevel.commands.recipe import parse
from hf_bilevel.trainers.config import BilevelConfig

CONFIGS = [BladeConfig, BrosConfig, CoresetConfig, MixtureConfig]
NAMES = {cls: [field.name for field in dataclasses.fields(cls)] for cls in CONFIGS}
WORDS = sorted(
    {word for cls in CONFIGS for words in cls._choices.values() for word in words} | {"auto", "full", "pool", "size"}
)

SENSIBLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(0, 5),
    st.sampled_from([0.1, 0.5, 1.0, 2.0, 1.5]),
    st.sampled_from(WORDS),
    st.sampled_from(["0.5", "3", "1e-4"]),
    st.lists(st.sampled_from("abc"), max_size=3),
)


def default_of(cls: type, name: str) -> Any:
    (field,) = (field for field in dataclasses.fields(cls) if field.name == name)
    return field.default


@st.composite
def settings_of(draw: st.DrawFn, names: list[str], values: st.SearchStrategy, at_most: int) -> dict[str, Any]:
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=at_most, unique=True))
    return {name: draw(values) for name in chosen}


def one_or_more(values: st.SearchStrategy, at_most: int) -> st.SearchStrategy:
    return st.sampled_from(CONFIGS).flatmap(
        lambda cls: st.tuples(st.just(cls), settings_of(NAMES[cls], values, at_most))
    )


def assert_valid(config: BilevelConfig) -> None:
    values = config.to_dict()
    text = json.dumps(values, allow_nan=False)  # all numbers are finite
    assert type(config)(**values) == config
    assert type(config)(**json.loads(text)) == config
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in values.values())


def check(cls: type[BilevelConfig], given: dict[str, Any]) -> None:
    try:
        config = cls(**given)
    except (TypeError, ValueError) as error:
        message = message_of(error)
        assert any(f"`{name}`" in message or f"`{name}=" in message for name in given), message
    else:
        assert_valid(config)


@fuzz(100, 1500, case=one_or_more(ANYTHING, 1))
def test_any_value_of_any_field(case: tuple[type[BilevelConfig], dict[str, Any]]) -> None:
    check(*case)


@fuzz(50, 1000, case=one_or_more(NUMBERS, 3))
def test_any_numbers(case: tuple[type[BilevelConfig], dict[str, Any]]) -> None:
    check(*case)


@fuzz(60, 1500, case=one_or_more(SENSIBLE | TEXTS, 4))
def test_combinations(case: tuple[type[BilevelConfig], dict[str, Any]]) -> None:
    check(*case)


@st.composite
def choices_and_numbers(draw: st.DrawFn) -> tuple[type[BilevelConfig], dict[str, Any]]:
    """Values of the right kind for each field, so that most configs are valid and combinations are reached."""
    cls = draw(st.sampled_from(CONFIGS))
    given = {}
    for name in draw(st.lists(st.sampled_from(NAMES[cls]), min_size=1, max_size=8, unique=True)):
        default = default_of(cls, name)
        if name in cls._choices:
            given[name] = draw(st.sampled_from(cls._choices[name]))
        elif name in cls._numbers_or_words:
            given[name] = draw(st.sampled_from([cls._numbers_or_words[name][1], 1, 2, 5, "3", 0.25, "0.5"]))
        elif isinstance(default, bool):
            given[name] = draw(st.booleans())
        elif isinstance(default, int):
            given[name] = draw(st.integers(0, 5))
        elif isinstance(default, float):
            given[name] = draw(st.sampled_from([0, 1, 0.1, 0.5, 0.99]))
        else:
            given[name] = draw(st.sampled_from([None, 3, 0.1, "source", ["a", "b"]]))
    return cls, given


@fuzz(60, 1000, case=choices_and_numbers())
def test_combinations_of_the_right_types(case: tuple[type[BilevelConfig], dict[str, Any]]) -> None:
    check(*case)


@fuzz(
    40,
    500,
    cls=st.sampled_from([*CONFIGS, ModelArguments, DataArguments, BladeRunArguments]),
    data=st.data(),
)
def test_command_line(cls: type, data: st.DataObject) -> None:
    """Strings, as HfArgumentParser hands them over: the same, as SystemExit."""
    names = [field.name for field in dataclasses.fields(cls)]
    texts = st.sampled_from([*WORDS, "0.5", "3", "-1", "true", "a"]) | TEXTS
    given = data.draw(settings_of(names, texts, 3))
    required = {ModelArguments: "model", DataArguments: "train_dataset"}.get(cls)
    argv = [f"--{name}={value}" for name, value in given.items()]
    if required is not None and required not in given:
        argv.append(f"--{required}=x")
    try:
        (parsed,) = parse(cls, argv=argv, prog="fuzz")
    except SystemExit as error:
        message = message_of(error)
        assert message.startswith("fuzz: ") and any(name in message for name in given), message
    else:
        if isinstance(parsed, BilevelConfig):
            assert_valid(parsed)
        assert type(parsed)(**dataclasses.asdict(parsed)) == parsed


@fuzz(
    40,
    500,
    cls=st.sampled_from([ModelArguments, DataArguments, BladeRunArguments]),
    data=st.data(),
)
def test_arguments_of_the_commands(cls: type, data: st.DataObject) -> None:
    given = data.draw(settings_of([field.name for field in dataclasses.fields(cls)], ANYTHING, 2))
    required = {ModelArguments: "model", DataArguments: "train_dataset"}.get(cls)
    try:
        made = cls(**{**({} if required is None else {required: "x"}), **given})
    except (TypeError, ValueError) as error:
        message = message_of(error)
        assert any(f"`{name}`" in message or f"`{name}=" in message for name in given), message
    else:
        assert dataclasses.replace(made) == made


@fuzz(
    40,
    500,
    cls=st.sampled_from(CONFIGS),
    content=st.one_of(
        JSON.map(json.dumps),
        st.dictionaries(st.sampled_from(["penalty", "rank", "size", "seed"]), JSON, max_size=3).map(json.dumps),
        TEXTS,
        st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\ufeff{}"]),
    ),
)
def test_json_files(cls: type[BilevelConfig], content: str, tmp_path_factory: Any) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "bilevel_config.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    try:
        config = cls.from_json_file(path)
    except (TypeError, ValueError) as error:
        message = message_of(error)
        assert str(path) in message or any(f"`{name}`" in message for name in NAMES[cls]), message
    else:
        assert_valid(config)
