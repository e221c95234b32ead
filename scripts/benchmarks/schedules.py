"""Token-level BLADE on a run of some length: how often must the reference be synchronised, and for how many steps trained?

    python scripts/benchmarks/schedules.py --output scripts/benchmarks/results/schedules.json    # about an hour, 1 thread
    python scripts/benchmarks/schedules.py --smoke

Data, model and learning rate are those of `mixture.py` in its setting `restricted`: bytes of six kinds of text, of which one, with few rows
in the pool, is the target; a small Llama from scratch; 1,600 steps. Held-out rows of the target judge. No domain is told to BLADE.

Arms: `all` is the plain Trainer on all tokens, `random` trains on a random share of the tokens, `auto` is BladeTrainer as it comes, the
others have T (`sync_steps`) and K (`reference_steps`) as named; all select 0.6 of the tokens with a penalty of 0. `cost` counts
forward-equivalents over those of `all`, references included: 4/3 for tokens, and K / T for a target batch as large as the training batch.
`log/ARM` is the logarithm of an arm's perplexity less that of `all`, paired by seed.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
from mixture import BATCH, ROW_LENGTH, Judge, make_args, make_data, make_model
from report import mean_and_std, print_table, write_report
from transformers import PrinterCallback, Trainer

from hf_bilevel import BladeConfig, BladeTrainer
from hf_bilevel.trainers.cost import Load

RATIO = 0.6
ARMS: dict[str, dict | None] = {
    "all": None,
    "random": {"score": "random"},
    "T=80, K=24": {"sync_steps": 80, "reference_steps": 24},
    "T=400, K=120": {"sync_steps": 400, "reference_steps": 120},
    "T=160, K=13": {"sync_steps": 160, "reference_steps": 13},
    "T=160, K=19": {"sync_steps": 160, "reference_steps": 19},
    "T=320, K=32": {"sync_steps": 320, "reference_steps": 32},
    "T=800, K=93": {"sync_steps": 800, "reference_steps": 93},
    "auto": {},
}


def run_arm(arm: str, seed: int, data: dict, steps: int, folder: str) -> dict:
    judge = Judge(data["held_out"], [steps // 4, steps // 2, steps])
    pool = [{name: row[name] for name in ("input_ids", "labels")} for row in data["pool"]]
    common = {
        "model_init": make_model,
        "args": make_args(folder, steps, seed),
        "train_dataset": pool,
        "callbacks": [judge],
    }
    if ARMS[arm] is None:
        trainer, cost = Trainer(**common), 1.0
    else:
        config = BladeConfig(selection_ratio=RATIO, **ARMS[arm])
        trainer = BladeTrainer(**common, target_dataset=data["target"], bilevel_config=config)
        load = Load(steps=steps, rows_per_step=BATCH, batch_size=BATCH, num_processes=1)
        cost = config.forward_passes(load, selects_tokens=True) / load.plain_passes
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    perplexities = {str(step): math.exp(loss) for step, loss in judge.losses.items()}
    return {
        "arm": arm,
        "seed": seed,
        "perplexity": perplexities[str(steps)],
        "perplexities": perplexities,
        "cost": cost,
    }


def summarise(rows: list[dict]) -> dict[str, float]:
    """Means and standard deviations over seeds."""
    plain = {row["seed"]: row["perplexity"] for row in rows if row["arm"] == "all"}
    summary = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        for step in own[0]["perplexities"]:
            key = f"perplexity/{arm}/{step}"
            summary[key], summary[f"{key}/std"] = mean_and_std([row["perplexities"][step] for row in own])
        summary[f"cost/{arm}"] = own[0]["cost"]
        ratios = [math.log(row["perplexity"] / plain[row["seed"]]) for row in own if row["seed"] in plain]
        if arm != "all" and ratios:
            summary[f"log/{arm}"], summary[f"log/{arm}/std"] = mean_and_std(ratios)
    return summary


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps of three arms")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--update", nargs="*", default=[], metavar="FILE", help="take over rows that FILE has")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args(argv)
    if options.smoke:
        options.seeds, options.steps, options.arms = 1, 8, ["all", "random", "auto"]
    rows = [row for file in options.update for row in json.loads(Path(file).read_text(encoding="utf-8"))["rows"]]
    done = {(row["arm"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            data = make_data("restricted", seed, options.steps)
            for arm in [arm for arm in options.arms if (arm, seed) not in done]:
                rows.append(run_arm(arm, seed, data, options.steps, folder))
                print(rows[-1], flush=True)
    rows.sort(key=lambda row: (list(ARMS).index(row["arm"]), row["seed"]))
    summary = summarise(rows)
    steps = list(rows[0]["perplexities"])
    print_table(
        ["arm", *(f"perplexity after {step}" for step in steps), "cost"],
        [
            [
                arm,
                *(
                    f"{summary[f'perplexity/{arm}/{s}']:.2f} ± {summary[f'perplexity/{arm}/{s}/std']:.2f}"
                    for s in steps
                ),
                f"{summary[f'cost/{arm}']:.2f}",
            ]
            for arm in dict.fromkeys(row["arm"] for row in rows)
        ],
    )
    config = {
        **{"steps": options.steps, "seeds": len({row["seed"] for row in rows}), "batch": BATCH},
        **{"row_length": ROW_LENGTH, "selection_ratio": RATIO, "arms": ARMS, "threads": torch.get_num_threads()},
        "model": "Llama, hidden 128, 2 layers, bytes",
    }
    return write_report("schedules", config, rows, summary, options.output)


if __name__ == "__main__":
    main()
