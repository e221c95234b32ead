"""Encode chats with the tokenizer's template, so that only what the assistant says is trained on."""

import os
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_bilevel.losses import IGNORE_INDEX


def check_template(tokenizer: PreTrainedTokenizerBase, column: str) -> None:
    """Refuse a tokenizer that cannot write chats.

    Args:
        tokenizer: The model's.
        column: Column of the chats.

    Raises:
        ValueError: If it has no chat template, or does not say where its tokens are.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"Column `{column}` holds chats, and the tokenizer of `{tokenizer.name_or_path}` has no chat template. Take an "
            "instruction-tuned model, save the tokenizer with a `chat_template`, or write the chats as plain text into a column "
            "and name it in `text_column`."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer of `{tokenizer.name_or_path}` does not say which characters its tokens stand for, so the assistant's "
            "tokens cannot be found. Use one with a fast version."
        )


def encode_chats(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, column: str, max_length: int
) -> dict[str, list]:
    """Encode chats; labels are the tokens of the assistant's turns, up to the token that ends a turn.

    A template that marks them itself (``{% generation %}``) is asked. Otherwise a turn is what the template adds when the turn
    is added to what comes before it.

    Args:
        batch: Columns.
        tokenizer: The model's, with a chat template.
        column: Column of the chats.
        max_length: Tokens of a chat, at most; the rest is cut off.

    Returns:
        ``input_ids`` and ``labels``, -100 outside of the assistant's turns.
    """
    rows = [_encode(messages, tokenizer, column, max_length) for messages in batch[column]]
    return {name: [row[name] for row in rows] for name in ("input_ids", "labels")}


def _encode(messages: Any, tokenizer: PreTrainedTokenizerBase, column: str, max_length: int) -> dict[str, list[int]]:
    is_list = isinstance(messages, list) and len(messages) > 0
    if not is_list or not all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in messages):
        raise ValueError(
            f"`messages_column: {column}` must hold lists of turns, each with `role` and `content`; a row holds {messages!r:.200}."
        )
    try:
        if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
            encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        else:
            ids, mask = _by_prefixes(messages, tokenizer)
    except (TemplateError, TypeError) as error:  # the latter where it joins what is no text
        raise ValueError(
            f"The chat template of `{tokenizer.name_or_path}` refuses a row: {error}: {messages!r:.200} "
            f"(`messages_column: {column}`)"
        ) from error
    labels = [token if counts else IGNORE_INDEX for token, counts in zip(ids, mask, strict=True)]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def _by_prefixes(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    def render(num: int, **options: Any) -> str:
        return tokenizer.apply_chat_template(messages[:num], tokenize=False, **options)

    text, spans = render(len(messages)), []
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        after = render(i + 1)
        # Templates do not write an empty chat, and may put a system prompt of their own before the first turn.
        opening = str(turn["content"] or "").strip()
        if i:
            before = render(i, add_generation_prompt=True)
        elif opening:  # whatever is the same with another answer comes before it
            other = {**turn, "content": "y" if opening.startswith("x") else "x"}
            before = os.path.commonprefix([after, tokenizer.apply_chat_template([other], tokenize=False)])
        else:
            before = ""
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"The chat template of `{tokenizer.name_or_path}` writes earlier turns differently once later ones follow, so the "
                "assistant's tokens cannot be told apart. Give the tokenizer a template that marks them with "
                "`{% generation %}...{% endgeneration %}`, or write the chats as plain text."
            )
        spans.append((len(before), len(after.rstrip())))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [
        any(low <= start and end <= high and start < end for low, high in spans)
        for start, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], mask
