"""With `torch_compile` and without: what a compiled model gains, with and without selection.

    python scripts/benchmarks/compiled.py --output scripts/benchmarks/results/compiled.json    # about 10 minutes, 1 thread
    python scripts/benchmarks/compiled.py --smoke

Models, data and trainers are those of `overhead.py`, every arm twice: as there, and with `TrainingArguments(torch_compile=True)`, which
compiles the model; the reference of BLADE is a copy that is not compiled. The arms take turns, and ratios are to the steps of the plain
Trainer, not compiled, before and after. Compiling itself, in the first calls, is left out. `recompilations` counts what PyTorch compiled
during the timed steps: selection has fixed shapes, so it must be 0.
"""

import argparse
import statistics
import tempfile
import warnings

from overhead import build, make_trainer, train
from report import print_table, repeatable, write_report
from torch._dynamo.utils import counters

ARMS = {"llama": ("plain", "blade_token", "blade_sample"), "vit": ("plain", "blade_sample")}


def name_of(arm: str, compiled: bool) -> str:
    return f"{arm}_compiled" if compiled else arm


def measure(model_name: str, batch_size: int, steps: int, rounds: int, smoke: bool) -> list[dict]:
    """Run all arms of a model in alternation; one row for each."""
    model, data = build(model_name, batch_size * (1 + steps), 0, smoke)
    kinds = [(arm, compiled) for arm in ARMS[model_name] for compiled in (False, True)]
    ratios: dict[str, list[float]] = {name_of(*kind): [] for kind in kinds}
    recompilations = dict.fromkeys(ratios, 0)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for arm, compiled in kinds:
            name = name_of(arm, compiled)
            trainers[name] = make_trainer(arm, model, data, batch_size, steps, f"{folder}/{name}", compiled)
            for _ in range(2):  # compiles
                train(trainers[name])
        for i in range(rounds):
            before = statistics.median(train(trainers["plain"]))
            for name in trainers if i % 2 == 0 else reversed(trainers):
                graphs = counters["stats"]["unique_graphs"]
                seconds = statistics.median(train(trainers[name]))
                recompilations[name] += counters["stats"]["unique_graphs"] - graphs
                after = statistics.median(train(trainers["plain"]))
                ratios[name].append(seconds / ((before + after) / 2))
                before = after
    return [
        {
            "model": model_name,
            "arm": name,
            "ratio": statistics.median(found),
            "ratio_range": [min(found), max(found)],
            "recompilations": recompilations[name],
        }
        for name, found in ratios.items()
    ]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny models and one round")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args(argv)
    batch_size, steps, rounds = (4, 2, 1) if options.smoke else (8, 4, 5)
    warnings.filterwarnings("ignore", ".*")  # of the compiler, about the machine
    with repeatable():
        rows = [row for name in ARMS for row in measure(name, batch_size, steps, rounds, options.smoke)]
    kinds = ("ratio", "recompilations")
    summary = {f"{kind}/{row['model']}/{row['arm']}": row[kind] for row in rows for kind in kinds}
    print_table(
        ["model", "arm", "ratio", "range", "recompilations"],
        [
            [
                *(row["model"], row["arm"], f"{row['ratio']:.3f}"),
                *("{:.3f}-{:.3f}".format(*row["ratio_range"]), row["recompilations"]),
            ]
            for row in rows
        ],
    )
    return write_report(
        "compiled", {"batch_size": batch_size, "rounds": rounds, "threads": 1}, rows, summary, options.output
    )


if __name__ == "__main__":
    main()
