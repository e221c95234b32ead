"""Datasets with columns of any kind: trained on as the plain Trainer does, or refused with the column's name."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from commands.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer
from fuzzing import bounded, can_be_written, fuzz, message_of
from hypothesis import assume
from hypothesis import strategies as st
from PIL import Image
from tiny import LENGTH, make_rows, make_trainer
from transformers import BertConfig, LlamaConfig, Trainer, ViTConfig, ViTImageProcessor

from hf_bilevel import BladeTrainer, BrosTrainer, CoresetTrainer, MixtureTrainer
from hf_bilevel.commands.arguments import TASKS, DataArguments
from hf_bilevel.commands.prepare import PreparedData, prepare
from hf_bilevel.commands.sources import split_off


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield


# Preparation by the commands -------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["a", "good", "bad", "", "  ", "caf\u00e9", "\u00b2", "-5", "--5", "1", "True", "a b c" * 40, "\0", "<pad>"]
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "", None]), "content": WORDS | st.none()}
)
COLUMNS = {
    "text": st.lists(WORDS, min_size=8, max_size=8),
    "label": st.lists(st.sampled_from(["good", "bad"]), min_size=8, max_size=8),
    "source": st.lists(st.sampled_from(["web", "books"]), min_size=8, max_size=8),
    "messages": st.lists(st.lists(TURN, max_size=3), min_size=8, max_size=8),
}
CELLS = [
    WORDS,
    st.none() | WORDS,
    st.integers(-2, 3),
    st.none() | st.integers(0, 2),
    st.booleans(),
    st.floats(),
    st.lists(st.integers(0, 5), max_size=3),
    st.none() | st.lists(WORDS, max_size=2),
    st.lists(TURN, max_size=3),
    st.fixed_dictionaries({"role": WORDS}),
    st.lists(st.fixed_dictionaries({"from": WORDS, "value": WORDS}), max_size=2),
    st.binary(max_size=3),
    st.none(),
    st.dates(),
]


@st.composite
def tables(draw: st.DrawFn) -> datasets.Dataset:
    """Eight rows; some columns are missing, hold something else, or have another name."""
    num, columns = draw(st.sampled_from([8] * 8 + [1, 0])), {}
    for name, sensible in COLUMNS.items():
        fate = draw(st.sampled_from(["sensible"] * 5 + ["missing", "other", "other", "renamed"]))
        if name == "messages" and draw(st.booleans()):
            continue
        values = st.lists(draw(st.sampled_from(CELLS)), min_size=8, max_size=8) if fate == "other" else sensible
        if fate != "missing":
            key = draw(st.sampled_from(["labels", "input_ids", "_has_labels"])) if fate == "renamed" else name
            columns[key] = draw(values)[:num]
    try:
        table = datasets.Dataset.from_dict(columns)
        if "label" in columns and draw(st.integers(0, 3)) == 0:
            table = table.class_encode_column("label")
    except Exception:  # no table can hold it
        assume(False)
    return table


CONFIGS = {
    "causal_lm": LlamaConfig(max_position_embeddings=24),
    "masked_lm": BertConfig(max_position_embeddings=24),
    "sequence_classification": BertConfig(max_position_embeddings=24),
    "image_classification": ViTConfig(image_size=8),
}


def read_all(prepared: PreparedData, domain_column: str | None) -> None:
    """Read and collate every row of what was prepared, as training would."""
    for name, part in prepared.parts.items():
        rows = list(part)
        assert rows, name
        if name == "train" and domain_column is not None:
            assert all(domain_column in row for row in rows)
        for row in rows:
            row.pop(domain_column, None)
        batch = prepared.collator(rows)
        assert len(batch["labels"]) == len(rows)
        assert batch["labels"].dtype == torch.int64
        if "input_ids" in batch:
            assert batch["input_ids"].shape[0] == len(rows)
            assert int(batch["input_ids"].min()) >= 0 and int(batch["input_ids"].max()) < 260


def prepare_or_refuse(
    parts: dict[str, Any], task: str, data: DataArguments, processor: Any, domain_column: str | None
) -> PreparedData | None:
    rows = np.arange(len(parts["train"])) if isinstance(parts["train"], datasets.Dataset) else None
    try:
        with bounded(20, gigabytes=4):
            prepared = prepare(parts, rows, task, data, processor, CONFIGS[task], domain_column)
            read_all(prepared, domain_column)
    except ValueError as error:
        message = message_of(error)
        names = [f"`{name}_dataset`" for name in ("train", "target")]
        names += [
            f"`{key}" for key in ("text_column", "label_column", "messages_column", "image_column", "domain_column")
        ]
        assert any(name in message for name in [*names, "Column `", "column `", "`pack`"]), message
        return None
    if prepared.rows is not None:
        assert len(prepared.rows) == len(prepared.parts["train"])
    return prepared


@fuzz(
    12,
    300,
    train=tables(),
    target=st.none() | tables(),
    task=st.sampled_from(TASKS[:3]),
    pack=st.sampled_from([False, False, True]),
    streaming=st.sampled_from([False, False, False, True]),
    domain_column=st.sampled_from([None, None, "source", "label", "labels", "nowhere"]),
    max_length=st.sampled_from([2, 5, 100]),
    column=st.sampled_from([None, None, "text", "source", "txt"]),
)
@pytest.mark.filterwarnings("ignore")
def test_tables_are_prepared_or_refused(
    train: datasets.Dataset,
    target: datasets.Dataset | None,
    task: str,
    pack: bool,
    streaming: bool,
    domain_column: str | None,
    max_length: int,
    column: str | None,
) -> None:
    data = DataArguments(train_dataset="x", pack=pack, max_length=max_length, text_column=column)
    parts = {
        "train": train.to_iterable_dataset() if streaming and len(train) else train,
        **({} if target is None else {"target": target}),
    }
    prepare_or_refuse(parts, task, data, byte_tokenizer(CHAT_TEMPLATE), domain_column)


JOINING = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"


@fuzz(
    20,
    300,
    chats=st.lists(st.lists(TURN, max_size=4) | st.none(), min_size=1, max_size=4),
    template=st.sampled_from([CHAT_TEMPLATE, JOINING, "{{ raise_exception('no') }}", None]),
)
def test_chats_are_encoded_or_refused(chats: list[Any], template: str | None) -> None:
    train = datasets.Dataset.from_dict({"messages": chats})
    data = DataArguments(train_dataset="x", max_length=50)
    prepare_or_refuse({"train": train}, "causal_lm", data, byte_tokenizer(template), None)


@fuzz(
    10,
    120,
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)) | st.none(), min_size=2, max_size=4),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "1"]),
    labels=st.lists(st.sampled_from(["cat", "dog"]), min_size=4, max_size=4),
)
def test_images_are_encoded_or_refused(sizes: list[tuple[int, int] | None], mode: str, labels: list[str]) -> None:
    images = [None if size is None else Image.new(mode, size) for size in sizes]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    train = datasets.Dataset.from_dict({"image": images, "label": labels[: len(images)]}, features=features)
    data = DataArguments(train_dataset="x")
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    prepared = prepare_or_refuse({"train": train}, "image_classification", data, processor, None)
    assert (prepared is None) == (None in images or len(set(labels[: len(images)])) < 2)


@fuzz(
    20,
    300,
    num=st.integers(0, 9),
    sizes=st.dictionaries(st.sampled_from(["target", "eval"]), st.integers(1, 2**62) | st.integers(1, 5), min_size=1),
    streaming=st.booleans(),
)
def test_rows_taken_out_of_the_pool(num: int, sizes: dict[str, int], streaming: bool) -> None:
    assume(num > 0 or not streaming)
    pool = datasets.Dataset.from_dict({"x": list(range(num))})
    try:
        with bounded(10):
            rest, parts, rows = split_off(pool.to_iterable_dataset() if streaming else pool, sizes, seed=0)
    except ValueError as error:
        assert all(f"`{name}_size={size}`" in message_of(error) for name, size in sizes.items())
        assert sum(sizes.values()) >= num
    else:
        taken = [x for part in parts.values() for x in part["x"][:]]
        assert sorted([row["x"] for row in rest] + taken) == list(range(num))
        assert {name: len(part) for name, part in parts.items()} == sizes
        assert rows is None or rows.tolist() == [row["x"] for row in rest]


# The trainers ----------------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
    "blade": (BladeTrainer, {"selection_ratio": 0.5, "sync_steps": 1, "reference_steps": 1}),
    "bros": (BrosTrainer, {"rank": 0.5, "refresh_steps": 1}),
    "mixture": (MixtureTrainer, {"domain_column": "source", "inner_steps": 1, "reference_steps": 1}),
    "coreset": (CoresetTrainer, {"size": 0.5, "outer_steps": 1, "inner_steps": 1, "num_masks": 2}),
}

BAD = {
    "labels": [None, "a", 99, -1, -100, 0.5, [0, 1], True, 2**40],
    "input_ids": [
        None,
        "a",
        [],
        [1, 2],
        [99] * LENGTH,
        [-1] * LENGTH,
        [None] * LENGTH,
        [0.5] * LENGTH,
        [[1]] * LENGTH,
        3,
    ],
    "attention_mask": [None, [1, 1], [2] * LENGTH, "a"],
    "source": [None, 7, "", [1], 2**40],
    "extra": [None, "a", 1, [1, 2]],
}


@st.composite
def spoiled(draw: st.DrawFn, name: str) -> tuple[list[dict[str, Any]], str, bool]:
    """Rows of which some lack a column, or hold something else in it; its name, and whether it is there in some rows only."""
    rows = [{**row, "source": ["web", "books"][i % 2]} for i, row in enumerate(make_rows(name, 12))]
    column = draw(st.sampled_from(sorted(BAD)))
    places = draw(st.sampled_from([[0], [11], [3, 7], list(range(12))]))
    value = draw(st.sampled_from(["missing", *BAD[column]]))
    for i in places:
        rows[i].pop(column, None)
        if value != "missing":
            rows[i][column] = value
    return rows, column, value == "missing" and len(places) < len(rows)


def outcome(
    trainer_class: type[Trainer], name: str, folder: Path, train: Any, target: Any, settings: dict[str, Any]
) -> tuple[str, BaseException | None]:
    """What comes of construction and two steps: when it failed, and how."""
    AcceleratorState._reset_state(reset_partial_state=True)
    kwargs: dict[str, Any] = {}
    if trainer_class is not Trainer:
        kwargs = {"target_dataset": target, "bilevel_config": trainer_class.config_class(**settings)}
    when = "construction"
    try:
        with bounded(60, gigabytes=8):
            trainer = make_trainer(
                trainer_class, name, folder, train_dataset=train, trainer_kwargs=kwargs, max_steps=2, logging_steps=2,
                per_device_train_batch_size=12,
            )  # fmt: skip
            when = "training"
            trainer.train()
    except Exception as error:
        return when, error
    return "trained", None


def raised_in_package(error: BaseException) -> bool:
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return "hf_bilevel" in frame.tb_frame.f_code.co_filename


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@fuzz(
    6,
    160,
    method=st.sampled_from(sorted(METHODS)),
    case=st.sampled_from(["bert", "llama"]).flatmap(lambda name: st.tuples(st.just(name), spoiled(name))),
    of_target=st.booleans(),
    as_table=st.booleans(),
)
@pytest.mark.filterwarnings("ignore")
def test_spoiled_rows_are_refused_or_trained_on(
    method: str,
    case: tuple[str, tuple[list[dict[str, Any]], str, bool]],
    of_target: bool,
    as_table: bool,
    folder: Path,
) -> None:
    """What the plain Trainer trains on is trained on, or refused by us with a reason; what it cannot is not trained on."""
    name, (rows, column, in_some) = case
    sound = [{**row, "source": ["web", "books"][i % 2]} for i, row in enumerate(make_rows(name, 12, seed=1))]
    assume(can_be_written(rows))
    spoiled_rows: Any = rows
    if as_table:
        try:
            spoiled_rows, sound = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(sound)
        except Exception:  # no table can hold it
            assume(False)
    trainer_class, settings = METHODS[method]
    train, target = (sound, spoiled_rows) if of_target else (spoiled_rows, sound)
    when, error = outcome(trainer_class, name, folder, train, target, settings)
    _, plain_error = outcome(Trainer, name, folder, spoiled_rows, None, {})
    if error is None:
        # The target dataset's domains are not read, and a search sees only some rows. A batch has the keys of its first row.
        assert plain_error is None or column == "source" or method == "coreset" or in_some, plain_error
    elif raised_in_package(error):
        assert isinstance(error, (ValueError, TypeError)), repr(error)
        message = message_of(error)
        assert any(f"`{word}`" in message for word in (column, "train_dataset", "target_dataset", "labels")), message
    else:
        # Upstream's own refusal. A mask of ones is not looked at by models, whatever its length, but where they are stacked.
        stacked = method == "coreset" and column == "attention_mask"
        assert plain_error is not None or in_some or stacked, (when, repr(error))
