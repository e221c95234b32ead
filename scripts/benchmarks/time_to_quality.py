"""How soon is each way of selecting as good as training on all data is at its end?

    pip install "hf_bilevel[bench]"
    python scripts/benchmarks/time_to_quality.py --output scripts/benchmarks/results/time_to_quality.json    # about 15 minutes
    python scripts/benchmarks/time_to_quality.py --smoke

The task is that of `noisy_labels.py`: half of the labels of 3,800 digits are wrong, and BLADE has the settings of that benchmark.
The test accuracy is looked at every few steps. With wrong labels the plain Trainer is at its best long before its end, so there are
two qualities to reach: that of its last weights, and the best that it ever shows, which a user could only stop at with the test set at
hand. An arm has reached a quality at the first of three looks in a row that show it.

Costs are forward-equivalents over those of the whole run on all data, counted as they happen: a row's forward pass counts 1, one
with a backward pass 3. The static reference and the reference phases are counted, looking is not. Seconds likewise.
"""

import argparse
import os
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from noisy_labels import BLADE, CANDIDATES, RATIO, STATIC_STEPS, accuracy_of, make_data, make_model
from report import mean_and_std, print_table, write_report
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import PrinterCallback, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

from hf_bilevel import BladeConfig, BladeTrainer

ARMS = ("all", "random", "loss", "static", "blade")
QUALITIES = ("last", "best")  # of the plain Trainer
LOOKS = 3  # in a row


class Meter:
    """Counts forward-equivalents of rows, in all models, and seconds, while it is running."""

    def __init__(self) -> None:
        self.passes, self.seconds, self._since = 0, 0.0, None

    def count(self, module: nn.Module, inputs: tuple, outputs: dict) -> None:
        if self._since is not None and isinstance(module, ResNetForImageClassification):
            logits = outputs["logits"]
            self.passes += (3 if logits.requires_grad else 1) * len(logits)

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._since
        self._since = None


class Curve(TrainerCallback):
    """Looks at the test accuracy every few steps, with the meter stopped."""

    def __init__(self, meter: Meter, rows: list[dict], every: int) -> None:
        self.meter, self.rows, self.every = meter, rows, every
        self.points: list[dict] = []

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.meter.stop()
            at = {"step": state.global_step, "passes": self.meter.passes, "seconds": self.meter.seconds}
            self.points.append({**at, "accuracy": accuracy_of(model, self.rows)})
            self.meter.start()


def run_arm(arm: str, seed: int, data: dict[str, list[dict]], steps: int, every: int, folder: str) -> list[dict]:
    """Train one arm and return its curve."""
    meter = Meter()

    def train(trainer_class: type[Trainer], rows: list[dict], batch_size: int, max_steps: int, **kwargs) -> Trainer:
        args = TrainingArguments(
            folder,
            max_steps=max_steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-3,
            lr_scheduler_type="linear" if rows is data["target"] else "constant",
            logging_steps=max_steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
        )
        torch.manual_seed(seed)
        trainer = trainer_class(model=make_model(), args=args, train_dataset=rows, **kwargs)
        trainer.remove_callback(PrinterCallback)
        meter.start()
        trainer.train()
        meter.stop()
        return trainer

    curve = Curve(meter, data["test"], every)
    handle = register_module_forward_hook(meter.count)  # of every module, for the references are made by the trainers
    rows, common = data["pool"], {"callbacks": [curve]}
    if arm == "all":
        train(Trainer, rows, CANDIDATES, steps, **common)
    elif arm == "static":
        reference = train(Trainer, data["target"], 64, min(STATIC_STEPS, steps)).model
        config = BladeConfig(selection_ratio=RATIO, reference="static")
        train(BladeTrainer, rows, CANDIDATES, steps, bilevel_config=config, reference_model=reference, **common)
    elif arm == "blade":
        config = BladeConfig(**{"selection_ratio": RATIO, **BLADE})
        config.first_reference_steps = min(config.first_reference_steps, steps)
        train(BladeTrainer, rows, CANDIDATES, steps, bilevel_config=config, target_dataset=data["target"], **common)
    else:
        config = BladeConfig(selection_ratio=RATIO, score=arm)
        train(BladeTrainer, rows, CANDIDATES, steps, bilevel_config=config, **common)
    handle.remove()
    return curve.points


def reached(curve: list[dict], quality: float) -> dict | None:
    """The first of several looks in a row that show a quality."""
    for i in range(len(curve) - LOOKS + 1):
        if all(point["accuracy"] >= quality for point in curve[i : i + LOOKS]):
            return curve[i]
    return None


def summarise(rows: list[dict]) -> dict[str, float]:
    """Means over the seeds that reached a quality, and how many did."""
    curves = {(row["arm"], row["seed"]): row["curve"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    summary: dict[str, float] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        last = [curves[arm, seed][-1] for seed in seeds]
        summary[f"accuracy/{arm}"], summary[f"accuracy/{arm}/std"] = mean_and_std([p["accuracy"] for p in last])
        for kind in ("passes", "seconds"):
            shares = [p[kind] / curves["all", seed][-1][kind] for p, seed in zip(last, seeds, strict=True)]
            summary[f"whole_run/{kind}/{arm}"], summary[f"whole_run/{kind}/{arm}/std"] = mean_and_std(shares)
        for quality in QUALITIES:
            found = []
            for seed in seeds:
                plain = curves["all", seed]
                wanted = plain[-1]["accuracy"] if quality == "last" else max(p["accuracy"] for p in plain)
                if (point := reached(curves[arm, seed], wanted)) is not None:
                    shares = {kind: point[kind] / plain[-1][kind] for kind in ("step", "passes", "seconds")}
                    found.append(shares)
            summary[f"{quality}/reached/{arm}"] = len(found)
            for kind in ("step", "passes", "seconds") if found else ():
                key = f"{quality}/{kind}/{arm}"
                summary[key], summary[f"{key}/std"] = mean_and_std([shares[kind] for shares in found])
    return summary


def print_summary(summary: dict[str, float], num_seeds: int) -> None:
    def cell(key: str) -> str:
        return f"{summary[key]:.2f} ± {summary[f'{key}/std']:.2f}" if key in summary else "-"

    for quality in QUALITIES:
        print(f"\nUntil the {quality} accuracy of training on all data, in shares of that whole run")
        table = [
            [
                arm,
                *(cell(f"{quality}/{kind}/{arm}") for kind in ("step", "passes", "seconds")),
                f"{summary[f'{quality}/reached/{arm}']} of {num_seeds}",
                cell(f"whole_run/passes/{arm}"),
                cell(f"accuracy/{arm}"),
            ]
            for arm in ARMS
        ]
        names = ["arm", "steps", "forward-equivalents", "seconds", "reached", "whole run costs", "last accuracy"]
        print_table(names, table)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one seed and a few steps: does it run?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--every", type=int, default=10, help="steps between two looks at the test accuracy")
    parser.add_argument("--output", default=None)
    options = parser.parse_args(argv)
    if options.smoke:
        options.seeds, options.steps, options.every = 1, 6, 1
    config = {
        "task": "noisy_labels",
        "steps": options.steps,
        "seeds": options.seeds,
        "looked_every": options.every,
        "looks_in_a_row": LOOKS,
        "candidates": CANDIDATES,
        "selection_ratio": RATIO,
        "blade": BLADE,
        "static_reference_steps": STATIC_STEPS,
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            data = make_data(seed)
            for arm in ARMS:
                curve = run_arm(arm, seed, data, options.steps, options.every, folder)
                rows.append({"arm": arm, "seed": seed, "curve": curve})
                print(f"seed {seed}, {arm}: {curve[-1]}", flush=True)
    summary = summarise(rows)
    print_summary(summary, options.seeds)
    return write_report("time_to_quality", config, rows, summary, options.output)


if __name__ == "__main__":
    main()
