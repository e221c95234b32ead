"""Where the time of a step goes: PyTorch's profiler on every method, beside the limit by counting passes.

    python scripts/benchmarks/profile_steps.py --output scripts/benchmarks/results/profile_steps.json    # about 5 minutes, 1 thread
    python scripts/benchmarks/profile_steps.py --smoke

Models, data and trainers are those of `overhead.py`. The time that operators take themselves is added up by kind and divided by the
whole of the plain Trainer's in the same run; so a row's sum is what an arm costs in operators, and its excess over the limit is
what is not arithmetic. `mixture` is left out, whose steps are plain ones and reference steps like these. Time outside of operators is not counted: the profiler itself slows it down. `overhead.py` measures whole steps.
"""

import argparse
import tempfile
import warnings
from collections import Counter

import torch
from overhead import EQUIVALENTS, MODELS, TIMED_STEPS, build, count_forwards, make_trainer
from report import print_table, write_report
from torch.profiler import ProfilerActivity, profile

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


def kind_of(event) -> str:
    """Sort an operator by its own name, or into the optimizer if that has called it."""
    parent = event
    while parent is not None:
        if parent.name.startswith("Optimizer.step"):
            return OPTIMIZER
        parent = parent.cpu_parent
    return next((kind for kind, parts in KINDS.items() if any(part in event.name for part in parts)), ELEMENTWISE)


def profile_arm(arm: str, model: torch.nn.Module, data: list[dict], batch_size: int, steps: int, folder: str) -> dict:
    """Microseconds of operators of one step by kind, and its forward-equivalents."""
    trainer = make_trainer(arm, model, data, batch_size, steps, folder)
    equivalents = count_forwards(arm, trainer)  # warms up as well
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        trainer.train()
    times: Counter[str] = Counter()
    for event in profiler.events():
        times[kind_of(event)] += event.self_cpu_time_total
    taken = 1 + TIMED_STEPS.get(arm, steps)
    return {"microseconds": {kind: times[kind] / taken for kind in COLUMNS}, "forward_equivalents": equivalents}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny models")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args(argv)
    batch_size, steps = (4, 2) if options.smoke else (8, 5)
    warnings.filterwarnings("ignore", "The subspaces of")  # of so short a run cover little
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, summary, table = [], {}, []
    try:
        for name in MODELS:
            model, data = build(name, batch_size * (1 + max(steps, *TIMED_STEPS.values())), 0, options.smoke)
            arms = ["plain", *(arm for arm in MODELS[name] if arm not in ("off", "phase", "mixture"))]
            with tempfile.TemporaryDirectory() as folder:
                profile_arm("plain", model, data, batch_size, steps, folder)  # the first of a process is slower
                found = {arm: profile_arm(arm, model, data, batch_size, steps, folder) for arm in arms}
            plain = sum(found["plain"]["microseconds"].values())
            for arm, row in found.items():
                rows.append({"model": name, "arm": arm, **row})
                shares = {kind: time / plain for kind, time in row["microseconds"].items()}
                summary |= {f"{kind}/{name}/{arm}": share for kind, share in shares.items()}
                summary[f"operators/{name}/{arm}"] = sum(shares.values())
                summary[f"limit/{name}/{arm}"] = EQUIVALENTS[arm] / 3
                numbers = [*shares.values(), sum(shares.values()), EQUIVALENTS[arm] / 3]
                table.append([name, arm, *(f"{number:.2f}" for number in numbers)])
    finally:
        torch.set_num_threads(threads)
    print_table(["model", "arm", *COLUMNS, "sum", "limit"], table)
    config = {"smoke": options.smoke, "batch_size": batch_size, "steps": steps, "threads": 1}
    return write_report("profile_steps", config, rows, summary, options.output)


if __name__ == "__main__":
    main()
