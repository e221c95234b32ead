"""Rows of text and chats become what they should, token by token."""

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    EsmConfig,
    LlamaConfig,
    LongformerConfig,
    MPNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from commands.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer
from hf_bilevel.commands.arguments import DataArguments
from hf_bilevel.commands.chat import encode_chats
from hf_bilevel.commands.prepare import prepare
from hf_bilevel.commands.sources import load

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED], ids=["by prefixes", "as the template marks"])
def test_only_the_assistant_is_trained_on(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    encoded = encode_chats({"messages": [CHAT, CHAT[1:3]]}, tokenizer, "messages", max_length=1000)
    for chat, ids, labels, said in zip(
        [CHAT, CHAT[1:3]],
        encoded["input_ids"],
        encoded["labels"],
        ["two<|im_end|>four<|im_end|>", "two<|im_end|>"],
        strict=True,
    ):
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(chat, tokenize=False)
        assert tokenizer.decode([label for label in labels if label != -100]) == said
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_an_assistant_that_speaks_first() -> None:
    tokenizer = byte_tokenizer("<|im_start|>system\nbe kind<|im_end|>\n" + CHAT_TEMPLATE)
    (labels,) = encode_chats({"messages": [CHAT[2:]]}, tokenizer, "messages", max_length=1000)["labels"]
    assert tokenizer.decode([label for label in labels if label != -100]) == "two<|im_end|>four<|im_end|>"


def test_a_long_chat_is_cut() -> None:
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    (ids,) = encode_chats({"messages": [CHAT]}, tokenizer, "messages", max_length=20)["input_ids"]
    whole = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert ids == whole[:20] and len(whole) > 20


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    forgetful = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] if loop.last else '...' }}{% endfor %}"
    with pytest.raises(ValueError, match="writes earlier turns differently once later ones follow"):
        encode_chats({"messages": [CHAT]}, byte_tokenizer(forgetful), "messages", max_length=100)


def test_a_template_that_refuses_a_role() -> None:
    strict = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="refuses a row: no system"):
        encode_chats({"messages": [CHAT]}, byte_tokenizer(strict), "messages", max_length=100)


def prepared(rows: list[dict], domain_column: str | None = None, task: str = "causal_lm", config=None, **settings):
    part = datasets.Dataset.from_list(rows)
    data = DataArguments(train_dataset="pool.jsonl", **settings)
    config = LlamaConfig(max_position_embeddings=16) if config is None else config
    numbers = np.arange(len(part)) + 100
    return prepare({"train": part}, numbers, task, data, byte_tokenizer(CHAT_TEMPLATE), config, domain_column)


def test_texts_end_and_are_cut_at_what_the_model_can_read() -> None:
    data = prepared([{"text": "abc"}, {"text": "a" * 30}, {"text": ""}, {"text": "b"}])
    end = byte_tokenizer(None).eos_token_id
    rows = data.parts["train"]["input_ids"][:]
    assert [len(row) for row in rows] == [4, 16, 2], "the positions of the model end at 16"
    assert [row[-1] == end for row in rows] == [True, False, True]
    # In the empty text there is nothing to learn: it is left out, and the others keep their numbers.
    assert data.num_dropped == {"train": 1} and data.rows.tolist() == [100, 101, 103]


@pytest.mark.parametrize("config_class", [RobertaConfig, XLMRobertaConfig, MPNetConfig, LongformerConfig, EsmConfig])
def test_positions_behind_the_paddings_id(config_class) -> None:
    size = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 260,
    }
    config = config_class(max_position_embeddings=32, pad_token_id=1, **size)
    row = prepared([{"text": "a" * 40}], config=config).parts["train"]["input_ids"][0]
    assert len(row) == 30
    model = AutoModel.from_config(config)
    model(input_ids=torch.tensor([row]))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.tensor([[*row, 97]]))


def test_texts_are_packed_within_their_domain() -> None:
    rows = [{"text": letter * 5, "source": source} for letter, source in zip("abcdef", ["x", "y"] * 3, strict=True)]
    data = prepared(rows, "source", pack=True, max_length=8)
    decode = byte_tokenizer(None).decode
    packed = [(decode(row["input_ids"]), row["source"]) for row in data.parts["train"]]
    assert all(row["input_ids"] == row["labels"] for row in data.parts["train"])
    assert data.rows is None
    for source, letters in (("x", "ace"), ("y", "bdf")):
        texts = [text for text, where in packed if where == source]
        assert "".join(texts) == "".join(letter * 5 + "<|im_end|>" for letter in letters)


def test_batches_are_padded_and_padding_is_no_label() -> None:
    data = prepared([{"text": "abc"}, {"text": "a"}])
    batch = data.collator([{**row} for row in data.parts["train"]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert (
        batch["labels"][1, 2:].tolist() == [-100, -100]
        and batch["labels"][0].tolist() == batch["input_ids"][0].tolist()
    )


def test_files_and_splits(data, tmp_path) -> None:
    texts = load("train_dataset", data["pool.jsonl"], None)["text"][:]
    for kind in ("csv", "parquet", "txt"):
        assert load("train_dataset", data[f"pool.{kind}"], None)["text"][:] == texts
    assert load("eval_dataset", data["pool.jsonl"], "train[10:20]")["text"][:] == texts[10:20]
    whole = load("train_dataset", data["pool.jsonl"], None)
    whole.save_to_disk(tmp_path / "saved")
    assert load("train_dataset", str(tmp_path / "saved"), None)["text"][:] == texts
    images = load("train_dataset", data["images_pool"], None)
    assert images.features["label"].names == ["cat", "dog"] and len(images) == 40
    assert next(iter(load("train_dataset", data["pool.jsonl"], None, streaming=True)))["text"] == texts[0]
