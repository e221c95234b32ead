"""How the task scripts read their settings, and how they report.

    accelerate launch scripts/bros/NAME.py scripts/recipes/bros_NAME.yaml [--field value ...]

A recipe is a flat YAML file with fields of the script's own arguments, of ``TrainingArguments`` and of the method's
config. The command line wins over it, and a name that nobody knows is an error.
"""

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import TrainingArguments

from hf_bilevel import BrosTrainer
from hf_bilevel.commands.recipe import parse

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from report import mean_and_std, print_table, write_report

__all__ = ["TaskArguments", "judge_weights", "parse", "report"]


@dataclass
class TaskArguments:
    """What every task script takes beside ``TrainingArguments`` and the config of its method."""

    seeds: int = field(default=1, metadata={"help": "Repetitions, with the seeds `seed`, `seed` + 1, ..."})
    report: str | None = field(default=None, metadata={"help": "JSON file for what was measured."})
    smoke: bool = field(default=False, metadata={"help": "A few steps on little data, in seconds: does it run?"})


def report(
    benchmark: str, task: TaskArguments, args: TrainingArguments | None, rows: list[dict], **configs: Any
) -> dict:
    """Print a table with a line for each arm, mean ± standard deviation over seeds, and write the JSON report.

    The summary has the keys ``METRIC/ARM`` and ``METRIC/ARM/std``. Values that are no numbers stay in the rows.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    metrics = list(dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, float)))
    summary, table = {}, []
    for arm in arms:
        line = [arm]
        for metric in metrics:
            found = [row[metric] for row in rows if row["arm"] == arm and metric in row]
            line.append("")
            if found:
                mean, std = mean_and_std(found)
                summary |= {f"{metric}/{arm}": mean, f"{metric}/{arm}/std": std}
                line[-1] = f"{mean:.3f}" + (f" ± {std:.3f}" if len(found) > 1 else "")
        table.append(line)
    main_process = args is None or args.process_index == 0
    if main_process:
        print()
        print_table(["", *metrics], table)
    config = {"task": asdict(task), **{name: asdict(value) for name, value in configs.items()}}
    if args is not None:
        config["training"] = {
            name: value for name, value in args.to_sanitized_dict().items() if not name.startswith(("hub", "push"))
        }
    return write_report(benchmark, config, rows, summary, task.report if main_process else None)


def judge_weights(trainer: BrosTrainer, wrong: Tensor, plot: Path) -> dict[str, float]:
    """Compare learned sample weights with what is known to be corrupted, and draw their histogram."""
    ids, weights = trainer.sample_weights
    known = wrong[ids]
    if trainer.is_world_process_zero():
        plot.parent.mkdir(parents=True, exist_ok=True)
        trainer.plot_sample_weights(wrong).savefig(plot)
    if not 0 < known.sum() < len(known):
        return {}  # nothing to tell apart
    return {
        "auroc": float(roc_auc_score(~known, weights)),
        "weight_wrong": float(weights[known].mean()),
        "weight_right": float(weights[~known].mean()),
    }
