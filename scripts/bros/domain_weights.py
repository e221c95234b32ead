"""Data-mixture weights: how much should each domain of text count, for a target that is like some of them?

    pip install "hf_bilevel[quickstart]"
    accelerate launch scripts/bros/domain_weights.py scripts/recipes/bros_domain_weights.yaml [--target manual readme ...]

Six domains of text from the running Python's own installation (code, docstrings, readme, licence, stubs, manual), equally
many rows of each; a small Llama from scratch. The target dataset is a blend of the domains named in `target`. First pass:
model and domain weights learn together. Second pass: a fresh model with the learned weights fixed. Controls: the plain
Trainer on all rows, each domain counting the same, and on the rows of the target's own domains.
"""

import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts/

import torch
from installed_text import installed_text
from recipe import TaskArguments, parse, report
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_bilevel import BrosConfig, BrosTrainer


@dataclass
class DomainArguments(TaskArguments):
    target: list[str] = field(
        default_factory=lambda: ["docstrings", "manual"], metadata={"help": "Domains that the target dataset blends."}
    )
    num_pool: int = field(default=400, metadata={"help": "Rows of each domain in the pool."})
    num_target: int = field(default=128, metadata={"help": "Rows of the target dataset; twice as many are held out."})
    row_length: int = field(default=32, metadata={"help": "Tokens of a row."})
    vocabulary: int = field(default=1500, metadata={"help": "Tokens that the tokenizer is trained to have."})
    full_space_learning_rate: float = field(
        default=5e-3, metadata={"help": "Learning rate of all passes but the first, which is in subspaces."}
    )


def make_data(seed: int, task: DomainArguments) -> dict[str, list[dict]]:
    """Rows of tokens: the pool with its domains, target and held-out rows, all disjoint."""
    num_judged = -(-3 * task.num_target // len(task.target))  # of each target domain: one third target, two held out
    num_rows = task.num_pool + num_judged
    texts = installed_text(8 * num_rows * task.row_length, seed)
    if unknown := sorted(set(task.target) - set(texts)):
        raise ValueError(f"`target` names unknown domains {unknown}; allowed are {sorted(texts)}.")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts.values(), vocab_size=task.vocabulary, show_progress=False)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[dict]] = {"pool": [], "target": [], "held_out": []}
    for domain, text in texts.items():
        tokens = torch.tensor(tokenizer.encode(text).ids)
        rows = tokens[: len(tokens) // task.row_length * task.row_length].view(-1, task.row_length)
        rows = rows[torch.randperm(len(rows), generator=generator)][:num_rows]
        judged, pool = rows.split([num_judged, len(rows) - num_judged])
        parts["pool"] += [{"input_ids": row, "labels": row, "domain": domain} for row in pool]
        if domain in task.target:
            target, held_out = judged.split([num_judged // 3, num_judged - num_judged // 3])
            parts["target"] += [{"input_ids": row, "labels": row} for row in target]
            parts["held_out"] += [{"input_ids": row, "labels": row} for row in held_out]
    return parts


def run(seed: int, task: DomainArguments, args: TrainingArguments, config: BrosConfig) -> list[dict]:
    data = make_data(seed, task)
    full_space = replace(args, seed=seed, learning_rate=task.full_space_learning_rate)

    def make_model() -> LlamaForCausalLM:
        size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=task.vocabulary, max_position_embeddings=task.row_length, pad_token_id=None, **size)
        )

    def train(arm: str, rows: list[dict], args: TrainingArguments, **bros) -> tuple[Trainer, dict]:
        trainer = (BrosTrainer if bros else Trainer)(model_init=make_model, args=args, train_dataset=rows, **bros)
        trainer.train()
        loss = trainer.evaluate(data["held_out"])["eval_loss"]
        return trainer, {"arm": arm, "seed": seed, "target_perplexity": math.exp(loss)}

    first, first_row = train(
        "first pass", data["pool"], replace(args, seed=seed), target_dataset=data["target"], bilevel_config=config
    )
    first_row |= {f"weight_{domain}": weight for domain, weight in first.domain_weights.items()}
    second, second_row = train(
        "second pass",
        data["pool"],
        full_space,
        bilevel_config=BrosConfig(upper_variable="fixed", rank="full"),
        sample_weights=first.sample_weights,
    )
    second.save_model(str(Path(args.output_dir) / "second_pass"))
    own = [row for row in data["pool"] if row["domain"] in task.target]
    return [
        train("all domains alike", data["pool"], full_space)[1],
        first_row,
        second_row,
        train("target's domains", own, full_space)[1],
    ]


def main(argv: list[str] | None = None) -> dict:
    task, args, config = parse(DomainArguments, TrainingArguments, BrosConfig, argv=argv)
    if (config.upper_variable, config.domain_column) != ("domain", "domain"):
        raise SystemExit(
            "This script learns domain weights: set `upper_variable: domain` and `domain_column: domain`."
        )
    if task.smoke:
        task = replace(task, seeds=1, num_pool=24, num_target=12)
        args, config = replace(args, max_steps=6, per_device_train_batch_size=12), replace(config, target_batch_size=6)
    rows = [row for seed in range(args.seed, args.seed + task.seeds) for row in run(seed, task, args, config)]
    return report("bros_domain_weights", task, args, rows, bros=config)


if __name__ == "__main__":
    main()
