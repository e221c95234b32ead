"""Train a small ViT on handwritten digits of which half have a wrong label, and learn which samples to trust.

    pip install "hf_bilevel[quickstart]" && python scripts/quickstart.py

Everything is real: scikit-learn's 1,797 scanned digits, a Vision Transformer, the Trainer. Five arms take the same number
of optimizer steps; the table compares their accuracy on test digits, the plot shows how many wrong labels BLADE still
selects as it trains. A few minutes on two CPU cores.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_bilevel import BladeConfig, BladeTrainer

NUM_TEST, NUM_TARGET = 400, 100
CANDIDATES, RATIO = 128, 0.25
ARMS = {
    "all": "Trainer on everything",
    "random": "random, same ratio",
    "static": "static reference (RHO-LOSS)",
    "blade": "BLADE",
    "clean": "Trainer on correct labels only",
}


def make_data(seed: int) -> tuple[Dataset, Dataset, Dataset]:
    """A pool with half of its labels wrong, a small clean target dataset, and a test set: disjoint."""
    digits = load_digits()
    random = np.random.default_rng(seed)
    images = ((digits.images - 4.9) / 6.0).astype("float32")[:, None]
    order = random.permutation(len(images))
    test, target, pool = np.split(order, [NUM_TEST, NUM_TEST + NUM_TARGET])
    labels = digits.target.astype("int64").copy()
    wrong = random.random(len(labels)) < 0.5
    labels[wrong] = (labels[wrong] + random.integers(1, 10, wrong.sum())) % 10

    def dataset(rows: np.ndarray, given: np.ndarray) -> Dataset:
        # `quality` is not used for training: as the domain, it only lets the log say what was selected.
        columns = {
            "pixel_values": images[rows],
            "labels": given[rows],
            "quality": np.where(wrong[rows], "wrong", "right"),
        }
        return Dataset.from_dict(columns).with_format(
            "torch", columns=["pixel_values", "labels"], output_all_columns=True
        )

    return dataset(pool, labels), dataset(target, digits.target), dataset(test, digits.target)


def make_model() -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,  # a width of 32 needs more than the 0.02 of ViT-Base
    )
    return ViTForImageClassification(config)


class Bar(TrainerCallback):
    """One progress bar for each arm."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = tqdm(total=state.max_steps, desc=f"{self.title:32}")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.2f}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()


def run_arm(arm: str, seed: int, steps: int, folder: str) -> dict:
    pool, target, test = make_data(seed)
    small_batch = int(CANDIDATES * RATIO)

    def train(
        title: str, train_dataset: Dataset, batch_size: int, max_steps: int, config: BladeConfig | None, **kwargs
    ):
        args = TrainingArguments(
            folder,
            max_steps=max_steps,
            per_device_train_batch_size=batch_size,
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            logging_steps=10,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
        )
        # Trainer seeds itself with `seed`, so `model_init` starts every arm from the same weights.
        common = {"model_init": make_model, "args": args, "train_dataset": train_dataset, "callbacks": [Bar(title)]}
        if config is None:
            trainer = Trainer(**common)
        else:
            trainer = BladeTrainer(**common, target_dataset=target, bilevel_config=config, **kwargs)
        trainer.remove_callback(PrinterCallback)  # the bar is enough
        trainer.train()
        return trainer

    title = ARMS[arm]
    if arm == "all":
        trainer = train(title, pool, CANDIDATES, steps, None)
    elif arm == "clean":
        right = pool.filter(lambda quality: quality == "right", input_columns="quality")
        trainer = train(title, right, small_batch, steps, None)
    else:
        settings = {"selection_ratio": RATIO, "domain_column": "quality"}
        reference = None
        if arm == "random":
            settings["score"] = "random"
        elif arm == "static":
            settings["reference"] = "static"
            reference = train("reference on the target dataset", target, 64, min(200, steps), None).model
        else:
            settings |= {
                "penalty": 0.0,
                "sync_steps": 50,
                "reference_steps": 15,
                "first_reference_steps": min(200, steps),
            }
        trainer = train(title, pool, CANDIDATES, steps, BladeConfig(**settings), reference_model=reference)
    accuracy = (trainer.predict(test).predictions.argmax(-1) == np.array(test["labels"])).mean()
    counts = {quality: pool["quality"].count(quality) for quality in ("wrong", "right")}
    curve = []
    for entry in trainer.state.log_history:
        wrong, right = (entry.get(f"blade/selected_fraction/{q}", np.nan) * counts[q] for q in ("wrong", "right"))
        if wrong == wrong:
            curve.append([entry["step"], wrong / (wrong + right)])
    return {"arm": arm, "seed": seed, "accuracy": float(accuracy), "wrong_share_over_time": curve}


def plot(results: list[dict], path: Path) -> None:
    """Left: test accuracy of the arms. Right: wrong labels among the selected samples, over time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(1, 1.3))
    colors = {"all": "#9aa0a6", "random": "#c5a572", "static": "#6fa8dc", "blade": "#d1495b", "clean": "#7bae7f"}
    names = {
        "all": "all data",
        "random": "random",
        "static": "static\nreference",
        "blade": "BLADE",
        "clean": "clean only",
    }
    for i, arm in enumerate(ARMS):
        accuracies = [100 * r["accuracy"] for r in results if r["arm"] == arm]
        mean, spread = np.mean(accuracies), np.std(accuracies, ddof=1) if len(accuracies) > 1 else None
        left.bar(i, mean, yerr=spread, color=colors[arm], capsize=3)
        left.annotate(f"{mean:.1f}", (i, 3), ha="center", color="white", fontweight="bold")
        curves = [r["wrong_share_over_time"] for r in results if r["arm"] == arm and r["wrong_share_over_time"]]
        if curves:
            steps = [step for step, _ in curves[0]]
            shares = 100 * np.mean([[share for _, share in curve] for curve in curves], axis=0)
            right.plot(steps, shares, color=colors[arm], label=names[arm].replace("\n", " "), linewidth=2)
    left.set_xticks(range(len(ARMS)), [names[arm] for arm in ARMS], fontsize=8)
    left.set_ylabel("test accuracy, %")
    right.set(xlabel="optimizer step", ylabel="wrong labels among the selected, %", ylim=(0, 60))
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    num_seeds = len({r["seed"] for r in results})
    figure.suptitle(f"Handwritten digits, half of the training labels wrong ({num_seeds} seed{'s' * (num_seeds > 1)})")
    figure.savefig(path, dpi=130)


YOUR_OWN_DATA = """
On your own data: keep your model, datasets, collator and TrainingArguments, and change the class.

    from hf_bilevel import BladeConfig, BladeTrainer

    trainer = BladeTrainer(
        model=model, args=training_args, train_dataset=pool, eval_dataset=held_out,
        target_dataset=clean,                              # a few hundred samples that show what good means
        bilevel_config=BladeConfig(selection_ratio=0.25),  # of per_device_train_batch_size candidates
    )
    trainer.train()

Always compare with all data and with BladeConfig(score="random"), as this table does.
"""


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="number of repetitions")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each arm")
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="path of the .png and the .json")
    options = parser.parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            results += [run_arm(arm, seed, options.steps, folder) for arm in ARMS]
    accuracy = {arm: [r["accuracy"] for r in results if r["arm"] == arm] for arm in ARMS}
    low, high = np.mean(accuracy["all"]), np.mean(accuracy["clean"])
    print(f"\n{'':34}test accuracy   gap closed   wrong labels selected, last quarter")
    for arm, title in ARMS.items():
        mean = np.mean(accuracy[arm])
        shares = [share for r in results if r["arm"] == arm for step, share in r["wrong_share_over_time"]
                  if step > 0.75 * options.steps]  # fmt: skip
        selected = f"{np.mean(shares):.0%}" if shares else ""
        spread = f" ± {np.std(accuracy[arm], ddof=1):.3f}" if options.seeds > 1 else ""
        print(f"{title:34}{mean:.3f}{spread:12}{(mean - low) / (high - low):7.0%}        {selected}")
    png, file = options.output.with_suffix(".png"), options.output.with_suffix(".json")
    png.parent.mkdir(parents=True, exist_ok=True)
    plot(results, png)
    summary = {f"accuracy/{arm}": float(np.mean(values)) for arm, values in accuracy.items()}
    report = {"quickstart": vars(options) | {"output": str(options.output)}, "summary": summary, "results": results}
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nWrote {png} and {file}\n{YOUR_OWN_DATA}")
    return report


if __name__ == "__main__":
    main()
