"""Tiny random models with tokenizers, and small datasets, as files."""

import json
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from commands.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = "the model reads what it is given and says what comes next when nothing else is known to it".split()


@pytest.fixture(scope="session", autouse=True)
def caches_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of models: ``llama``, ``base`` (the same without a chat template), ``wide``, ``bert`` and ``vit``."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    vocabulary = {"vocab_size": 260, "max_position_embeddings": 96, "pad_token_id": 258}
    llama = LlamaForCausalLM(LlamaConfig(**vocabulary, eos_token_id=257, **SIZE))
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for name, model, template in (
        ("llama", llama, CHAT_TEMPLATE),
        ("base", llama, None),
        ("wide", LlamaForCausalLM(LlamaConfig(**vocabulary, **{**SIZE, "hidden_size": 128})), None),
        ("bert", BertForMaskedLM(BertConfig(**vocabulary, **SIZE, **drop)), None),
    ):
        model.save_pretrained(folder / name)
        byte_tokenizer(template).save_pretrained(folder / name)
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZE)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "vit")
    return {path.name: str(path) for path in folder.iterdir()}


def sentence(order: random.Random) -> str:
    return " ".join(order.choice(WORDS) for _ in range(order.randint(4, 9)))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files and folders: ``pool``, ``target`` and ``held_out`` of each kind."""
    folder, order = tmp_path_factory.mktemp("data"), random.Random(0)
    for part, num in (("pool", 40), ("target", 12), ("held_out", 12)):
        texts = [
            {"text": sentence(order), "source": ["web", "books"][i % 2], "label": ["good", "bad", "neither"][i % 3]}
            for i in range(num)
        ]
        lines = [json.dumps(row) for row in texts]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
        datasets.Dataset.from_list(texts).to_csv(folder / f"{part}.csv")
        datasets.Dataset.from_list(texts).to_parquet(folder / f"{part}.parquet")
        (folder / f"{part}.txt").write_text("\n".join(row["text"] for row in texts))
        chats = [
            [
                {"role": "user", "content": "ask " + sentence(order)[:12]},
                {"role": "assistant", "content": "say " + sentence(order)[:12]},
            ]
            for _ in range(num)
        ]
        (folder / f"chats_{part}.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
        for i in range(num):
            path = folder / f"images_{part}" / ["cat", "dog"][i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (10, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture
def common(tmp_path: Path) -> list[str]:
    """What every run here has in common."""
    return (
        f"--output_dir {tmp_path / 'output'} --use_cpu --disable_tqdm true --max_steps 2 --per_device_train_batch_size 8 "
        "--gradient_accumulation_steps 1 --logging_steps 1 --save_strategy no --learning_rate 1e-3 --warmup_steps 0 "
        "--eval_strategy no --report_to none --bf16 false --max_length 64"
    ).split()
