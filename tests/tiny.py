"""Tiny random models of the real architectures, data for them, and one way to train: milliseconds a step, no download."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 48
LENGTH = 12

# model -> granularity that "auto" gives
MODELS = {"vit": "sample", "llama": "token", "bert": "sample", "bert_mlm": "token"}


def make_model(name: str, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if name == "vit":
        return ViTForImageClassification(
            ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=4, **size, **drop)
        )
    if name == "llama":
        config = LlamaConfig(
            vocab_size=VOCABULARY, max_position_embeddings=32, pad_token_id=0, attention_dropout=dropout, **size
        )
        return LlamaForCausalLM(config)
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=4, **size, **drop)
    return BertForMaskedLM(config) if name == "bert_mlm" else BertForSequenceClassification(config)


def wide_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Exchange Llama's norms, which compute in float32 whatever the weights are, by torch's, which do not."""
    for module in list(model.modules()):
        for key, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=child.weight.dtype)
                setattr(module, key, norm)
    return model


def make_rows(name: str, num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of unequal difficulty; those of language models have padding and different numbers of labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(num):
        if name == "vit":
            rows.append({"pixel_values": torch.randn(1, 8, 8, generator=generator).tolist(), "labels": i % 4})
            continue
        tokens = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        used = int(torch.randint(5, LENGTH + 1, (1,), generator=generator))
        mask = (torch.arange(LENGTH) < used).long()
        labels = torch.where(mask > 0, tokens, -100)
        if name == "bert_mlm":
            labels = torch.where(torch.rand(LENGTH, generator=generator) < 0.5, labels, -100)
            labels[0] = tokens[0]
        row = {"input_ids": (tokens * mask).tolist(), "attention_mask": mask.tolist()}
        rows.append({**row, "labels": i % 4 if name == "bert" else labels.tolist()})
    return rows


def make_dataset(name: str, num: int, seed: int = 0) -> Dataset:
    dataset = Dataset.from_list(make_rows(name, num, seed))
    return dataset.add_column("source", [["web", "books", "code"][i % 3] for i in range(num)])


def arguments(output_dir: Path, **kwargs: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(str(output_dir), **{**defaults, **kwargs})


def make_trainer(
    trainer_class: type[Trainer],
    name: str,
    output_dir: Path,
    *,
    model: torch.nn.Module | None = None,
    dropout: float = 0.0,
    train_dataset: Any = None,
    num_pool: int = 64,
    trainer_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Trainer:
    """Build a trainer on a fresh model; ``kwargs`` are training arguments."""
    torch.manual_seed(0)
    makes_its_own = "model_init" in (trainer_kwargs or {})
    return trainer_class(
        model=make_model(name, dropout) if model is None and not makes_its_own else model,
        args=arguments(output_dir, **kwargs),
        train_dataset=make_dataset(name, num_pool) if train_dataset is None else train_dataset,
        **(trainer_kwargs or {}),
    )


def parameters_of(trainer: Trainer) -> torch.Tensor:
    parameters = (p.detach() for p in trainer.model.parameters())
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in parameters)
    return torch.cat([p.flatten().float() for p in whole])
