"""How the task scripts read their settings, and how they report.

    accelerate launch scripts/bros/NAME.py scripts/recipes/bros_NAME.yaml [--field value ...]

A recipe is a flat YAML file with fields of the script's own arguments, of ``TrainingArguments`` and of the method's
config. The command line wins over it, and a name that nobody knows is an error.
"""

import difflib
import os
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import yaml
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import HfArgumentParser, TrainingArguments

from hf_bilevel import BrosTrainer

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from report import mean_and_std, print_table, write_report


@dataclass
class TaskArguments:
    """What every task script takes beside ``TrainingArguments`` and the config of its method."""

    seeds: int = field(default=1, metadata={"help": "Repetitions, with the seeds `seed`, `seed` + 1, ..."})
    report: str | None = field(default=None, metadata={"help": "JSON file for what was measured."})
    smoke: bool = field(default=False, metadata={"help": "A few steps on little data, in seconds: does it run?"})


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SystemExit(f"{self.prog}: {message}")  # without the usage, a hundred lines long


def parse(*classes: type, argv: list[str] | None = None) -> tuple[Any, ...]:
    """Read one instance of each class from a recipe and the command line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(classes, usage="%(prog)s RECIPE.yaml [--field value ...]", allow_abbrev=False)
    names = [entry.name for cls in classes for entry in fields(cls) if entry.init]
    if argv and not argv[0].startswith("-"):
        recipe = argv.pop(0)
        try:
            values = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"cannot read the recipe {recipe}: {error}")
        if not isinstance(values, dict):
            parser.error(f"the recipe {recipe} must hold lines `field: value`, got {type(values).__name__}.")
        for name in values:
            if name not in names:
                parser.error(f"the recipe {recipe} has an unknown field `{name}`.{_nearest(name, names)}")
        parser.set_defaults(**values)  # argparse converts what is a string, as on the command line
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = _nearest(unknown[0].lstrip("-").split("=")[0].replace("-", "_"), names) if unknown[0][0] == "-" else ""
        parser.error(f"`{unknown[0]}` is not a field.{hint or ' Write `--field value`, after the recipe.'}")
    values, parsed = vars(namespace), []
    for cls in classes:
        own = [entry.name for entry in fields(cls) if entry.init and entry.name in values]
        parsed.append(cls(**{name: values.pop(name) for name in own}))
    return tuple(parsed)


def _nearest(name: str, names: list[str]) -> str:
    found = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f" Do you mean `{found[0]}`?" if found else " `--help` lists all."


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
