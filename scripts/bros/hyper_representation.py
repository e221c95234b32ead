"""Hyper-representation: learn a backbone such that a head, trained on a few labelled samples, does well on others.

    pip install "hf_bilevel[quickstart]"
    python scripts/bros/hyper_representation.py scripts/recipes/bros_hyper_representation.yaml [--rank 16 ...]

scikit-learn's digits. Upper variable: the backbone (one hidden layer, shared), by the loss on the target split. Lower
variable: the head, two layers, by the regularised loss on the training split. ``SingleLoop`` moves both and the auxiliary
variable, without a Trainer: in full space (MA-SOBA) and with random subspaces of the head's layers (BROS). Controls: the
same head on a random backbone, and backbone and head trained jointly on the training split, or on both splits. At the end
every arm's head goes through the same training from its start on the frozen backbone.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts/

import torch
from recipe import TaskArguments, parse, report
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_bilevel.core.single_loop import Auxiliary, SingleLoop


@dataclass
class RepresentationArguments(TaskArguments):
    seed: int = field(default=0, metadata={"help": "The first seed: of splits, weights, batches and subspaces."})
    num_train: int = field(default=100, metadata={"help": "Samples of the training split, for the head."})
    num_target: int = field(default=600, metadata={"help": "Samples of the target split, for the backbone."})
    features: int = field(default=64, metadata={"help": "Width of the backbone and of the head's hidden layer."})
    rank: int = field(default=16, metadata={"help": "Rank of the subspaces of the head's layers."})
    steps: int = field(default=1000, metadata={"help": "Steps of the single loop, and of joint training."})
    batch_size: int = field(default=100, metadata={"help": "Samples of a training and of a target batch."})
    upper_learning_rate: float = field(default=0.1, metadata={"help": "Learning rate of the backbone."})
    lower_learning_rate: float = field(default=0.1, metadata={"help": "Learning rate of the head."})
    moving_average: float = field(default=0.1, metadata={"help": "Share of a new hypergradient in their average."})
    damping: float = field(default=1.0, metadata={"help": "Damping of the linear system, relative to the curvature."})
    weight_decay: float = field(default=1e-3, metadata={"help": "Half the squared norm of the head counts this much."})


def make_data(seed: int, task: RepresentationArguments) -> dict[str, tuple[Tensor, Tensor]]:
    digits = load_digits()
    images = torch.tensor((digits.data - 4.9) / 6.0, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    sizes = [task.num_train, task.num_target, len(images) - task.num_train - task.num_target]
    return {
        name: (images[rows], labels[rows])
        for name, rows in zip(("train", "target", "test"), order.split(sizes), strict=True)
    }


def make_layers(sizes: list[int], generator: torch.Generator) -> list[Tensor]:
    """Weights (out, in) with the bias as the last column."""
    weights = [torch.randn(n, m + 1, generator=generator) / m**0.5 for m, n in zip(sizes, sizes[1:], strict=False)]
    return [weight.requires_grad_() for weight in weights]


def apply(layers: list[Tensor], x: Tensor) -> Tensor:
    for i, weight in enumerate(layers):
        x = x @ weight[:, :-1].T + weight[:, -1]
        x = x.tanh() if i < len(layers) - 1 else x
    return x


def run(seed: int, task: RepresentationArguments) -> list[dict]:
    data = make_data(seed, task)
    data["both"] = tuple(torch.cat(pair) for pair in zip(data["train"], data["target"], strict=True))
    generator = torch.Generator().manual_seed(seed)
    first_backbone = make_layers([64, task.features], generator)
    first_head = make_layers([task.features, task.features, 10], generator)

    def start(layers: list[Tensor]) -> list[Tensor]:
        return [layer.detach().clone().requires_grad_() for layer in layers]

    def loss(split: str, regularised: bool = False) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
        images, labels = data[split]
        rows = torch.randint(len(images), (task.batch_size,), generator=generator)

        def compute(backbone: list[Tensor], head: list[Tensor]) -> Tensor:
            value = cross_entropy(apply(head, apply(backbone, images[rows]).tanh()), labels[rows])
            penalty = 0.5 * task.weight_decay * sum(layer.square().sum() for layer in head)
            return value + penalty if regularised else value

        return compute

    def descend(backbone: list[Tensor], head: list[Tensor], moved: list[Tensor], split: str) -> None:
        optimizer = torch.optim.SGD(moved, lr=task.lower_learning_rate)
        for _ in range(task.steps):
            optimizer.zero_grad()
            loss(split, regularised=True)(backbone, head).backward()
            optimizer.step()

    def judge(arm: str, backbone: list[Tensor], split: str = "train") -> dict:
        """Train a fresh head on the frozen backbone and measure it."""
        backbone, head = [layer.detach() for layer in backbone], start(first_head)
        descend(backbone, head, head, split)
        row = {"arm": arm, "seed": seed}
        for part in ("target", "test"):
            images, labels = data[part]
            with torch.no_grad():
                logits = apply(head, apply(backbone, images).tanh())
            row[f"{part}_accuracy"] = float((logits.argmax(-1) == labels).float().mean())
        return row

    rows = [judge("random backbone", first_backbone)]
    for arm, split in (("joint, training split", "train"), ("joint, both splits", "both")):
        backbone, head = start(first_backbone), start(first_head)
        descend(backbone, head, backbone + head, split)
        rows.append(judge(arm, backbone, split))
    for arm, rank in (("single loop, full space", None), (f"single loop, rank {task.rank}", task.rank)):
        backbone, head = start(first_backbone), start(first_head)
        loop = SingleLoop(
            backbone,
            head,
            upper_learning_rate=task.upper_learning_rate,
            lower_learning_rate=task.lower_learning_rate * (1 if rank is None else rank / (task.features + 1)),
            auxiliary=Auxiliary(head, damping=task.damping),
            moving_average=task.moving_average,
            rank=rank,
            generator=generator,
        )
        for _ in range(task.steps):
            loop.step(loss("train", regularised=True), loss("target"))
        rows.append(judge(arm, backbone))
    return rows


def main(argv: list[str] | None = None) -> dict:
    (task,) = parse(RepresentationArguments, argv=argv)
    if task.smoke:
        task.seeds, task.steps = 1, 30
    rows = [row for seed in range(task.seed, task.seed + task.seeds) for row in run(seed, task)]
    return report("bros_hyper_representation", task, None, rows)


if __name__ == "__main__":
    main()
