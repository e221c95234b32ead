"""Where the time of a step goes: PyTorch's profiler on every method, beside the limit by counting passes.

    python scripts/benchmarks/profile_steps.py --output scripts/benchmarks/results/profile_steps.json    # about 10 minutes, 1 thread
    python scripts/benchmarks/profile_steps.py --full_size --output scripts/benchmarks/results/profile_steps_full_size.json
    python scripts/benchmarks/profile_steps.py --smoke

Models, data and trainers are those of `overhead.py`, with `--full_size` ViT-S and SmolLM2-135M, of one step each; and as there the first
step of a `train()` call, with the set-up, is left out.
The time that operators take themselves is added up by kind and divided by the whole of the plain Trainer's, just before and after; so a
row's sum is what an arm costs in operators, and its excess over the limit is what is not arithmetic. The arms take turns in every round;
of each the round with the median sum counts. `mixture` is left out, whose steps are plain ones and reference steps
like these. Time outside of operators is not counted: the profiler itself slows it down. `overhead.py` measures whole steps.
"""

import argparse
import tempfile
import warnings
from collections import Counter

from overhead import (
    EQUIVALENTS,
    FULL_SIZE,
    FULL_SIZE_BATCH,
    MODELS,
    PHASES,
    TIMED_STEPS,
    TRL,
    build,
    count_forwards,
    make_trainer,
)
from report import print_table, repeatable, write_report
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback

KINDS = {  # by what an operator's name contains; the first that fits
    "attention": ("scaled_dot_product", "flash_attention"),
    "subspaces": ("linalg_qr", "householder", "geqrf", "orgqr"),
    "products": ("mm", "convolution", "conv2d", "linear"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "data movement": (
        "copy",
        "empty",
        "index",
        "cat",
        "stack",
        "clone",
        "to_copy",
        "fill",
        "zero",
        "gather",
        "embedding",
    ),
}
ELEMENTWISE, OPTIMIZER = "elementwise and norms", "optimizer"
COLUMNS = (*KINDS, ELEMENTWISE, OPTIMIZER)
LEFT_OUT = ("off", *PHASES, "mixture", "gradients", *TRL)  # plain steps, other arms' steps and other libraries'


def kind_of(event) -> str:
    """Sort an operator by its own name, or into the optimizer if that has called it."""
    parent = event
    while parent is not None:
        if parent.name.startswith("Optimizer.step"):
            return OPTIMIZER
        parent = parent.cpu_parent
    return next((kind for kind, parts in KINDS.items() if any(part in event.name for part in parts)), ELEMENTWISE)


class ProfilerAfterFirstStep(TrainerCallback):
    """Starts a profiler when the set-up and the first step are done, and stops it at the end."""

    def __init__(self) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            self.profiler.start()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.profiler.stop()


def profile_steps(trainer: Trainer) -> dict[str, float]:
    """Microseconds of operators of one step, by kind."""
    callback = ProfilerAfterFirstStep()
    trainer.add_callback(callback)
    trainer.train()
    trainer.remove_callback(callback)
    times: Counter[str] = Counter()
    for event in callback.profiler.events():
        times[kind_of(event)] += event.self_cpu_time_total
    return {kind: times[kind] / (trainer.args.max_steps - 1) for kind in COLUMNS}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny models")
    parser.add_argument("--full_size", action="store_true", help="ViT-S and SmolLM2-135M, instead of small models")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args(argv)
    arms_of = FULL_SIZE if options.full_size else MODELS
    batch_sizes = FULL_SIZE_BATCH if options.full_size else dict.fromkeys(MODELS, 8)
    steps, rounds = (2, 1) if options.smoke else (1, 1) if options.full_size else (5, 3)
    if options.smoke:
        batch_sizes = dict.fromkeys(arms_of, 4)
    warnings.filterwarnings("ignore", "The subspaces of")  # of so short a run cover little
    rows, summary, table = [], {}, []
    with repeatable():
        for name, batch_size in batch_sizes.items():
            model, data = build(name, batch_size * (1 + max(steps, *TIMED_STEPS.values())), 0, options.smoke)
            arms = ["plain", *(arm for arm in arms_of[name] if arm not in LEFT_OUT)]
            with tempfile.TemporaryDirectory() as folder:
                trainers = {arm: make_trainer(arm, model, data, batch_size, steps, f"{folder}/{arm}") for arm in arms}
                equivalents = {
                    arm: count_forwards(arm, trainer) for arm, trainer in trainers.items()
                }  # warms up as well
                shares: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
                # The first records of the profiler lie where tensors had been, which then get new memory from the system. So the
                # first round is not counted.
                for i in range(1 + rounds):
                    before = profile_steps(trainers["plain"])
                    for arm, trainer in trainers.items():
                        times, after = profile_steps(trainer), profile_steps(trainers["plain"])
                        plain = (sum(before.values()) + sum(after.values())) / 2
                        if i > 0:
                            shares[arm].append({kind: time / plain for kind, time in times.items()})
                        before = after
            for arm in arms:
                found = sorted(shares[arm], key=lambda share: sum(share.values()))[rounds // 2]
                total, limit = sum(found.values()), EQUIVALENTS[arm] / 3
                rows.append({"model": name, "arm": arm, "shares": found, "forward_equivalents": equivalents[arm]})
                summary |= {f"{kind}/{name}/{arm}": share for kind, share in found.items()}
                summary |= {f"operators/{name}/{arm}": total, f"limit/{name}/{arm}": limit}
                table.append([name, arm, *(f"{number:.2f}" for number in (*found.values(), total, limit))])
    print_table(["model", "arm", *COLUMNS, "sum", "limit"], table)
    config = {
        "smoke": options.smoke,
        "full_size": options.full_size,
        "batch_sizes": batch_sizes,
        "steps": steps,
        "rounds": rounds,
        "threads": 1,
    }
    return write_report("profile_steps", config, rows, summary, options.output)


if __name__ == "__main__":
    main()
