"""Evaluate language models side by side with lm-eval: every metric, and how much each model differs from the first.

    pip install "hf_bilevel[eval]"
    python scripts/evaluate_lm.py --models BASE TRAINED --tasks arc_easy hellaswag --output FILE.json
    python scripts/evaluate_lm.py --models BASE --peft ADAPTER --data FOLDER --tasks held_out_perplexity cloze

Differences are paired: all models get the same documents, so the error of a difference comes from the differences on
the documents. Perplexities are compared by their logarithms. ``lm_eval_tasks/make_data.py`` writes the local tasks.
"""

import difflib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_bilevel.commands.recipe import parse

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from report import print_table, write_report

PROG = "evaluate_lm.py"
MAX_PARTS = 100  # documents are left out in so many parts, see `jackknife`

# lm-eval's aggregations that are a function of sum(top) / sum(bottom), with the derivative of that function at its value.
SLOPES = {
    "mean": lambda value: 1.0,
    "perplexity": lambda value: -value,
    "weighted_perplexity": lambda value: -value,
    "bits_per_byte": lambda value: -1 / math.log(2),
}
COMPARED_BY_LOGARITHM = ("perplexity", "weighted_perplexity")


@dataclass
class EvaluateArguments:
    """What to evaluate on what."""

    models: list[str] = field(default_factory=list, metadata={"help": "Ids or folders; the first is the base."})
    peft: list[str] = field(default_factory=list, metadata={"help": "Adapters, each evaluated on the base."})
    names: list[str] = field(
        default_factory=list,
        metadata={"help": "What to call the models and then the adapters; the last parts of their paths if not set."},
    )
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "Tasks, groups or tags of lm-eval, or local ones."}
    )
    data: str | None = field(
        default=None, metadata={"help": "Folder with local tasks, see lm_eval_tasks/make_data.py."}
    )
    limit: int | None = field(default=None, metadata={"help": "Documents of each task; all if not set."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Examples in the prompt; the task's if not set."})
    batch_size: int = field(default=8, metadata={"help": "Requests at a time."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; an accelerator if there is one."})
    output: str | None = field(default=None, metadata={"help": "JSON file for what was measured."})

    def __post_init__(self) -> None:
        if not self.models or not self.tasks:
            raise ValueError("Give at least one of `--models` and one of `--tasks`.")
        if self.data is not None and not any(Path(self.data).glob("*.yaml")):
            raise ValueError(f"`{self.data}` has no tasks. Write some with scripts/lm_eval_tasks/make_data.py.")
        paths = [*self.models, *self.peft]
        self.names = self.names or [Path(path).name for path in paths]
        if len(set(self.names)) != len(paths) or len(self.names) != len(paths):
            raise ValueError(
                f"The names {', '.join(self.names)} must be different, one for each of {len(paths)} models and adapters. "
                "Set `--names`."
            )
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("The models are compared by one process. Start it with `python`.")


class Estimate(NamedTuple):
    """A metric of a task: its value, and how far each document moves it; the squares of that add up to its variance."""

    value: float
    moves: np.ndarray
    num_documents: int
    by_logarithm: bool
    higher_is_better: bool | None

    @property
    def error(self) -> float:
        return float(np.linalg.norm(self.moves))


def estimate(values: list, aggregation: Callable[[list], float], higher_is_better: bool | None) -> Estimate:
    """Aggregate what lm-eval says of every document, None where it says nothing."""
    given = [value for value in values if value is not None]
    value, num = float(aggregation(given)), len(given)
    name = aggregation.__name__
    if num < 2:
        moves = np.array([math.nan])
    elif name in SLOPES:
        pairs = [(0, 0) if v is None else v if isinstance(v, tuple) else (v, 1) for v in values]
        top, bottom = np.array(pairs, dtype=float).T
        moves = SLOPES[name](value) * (top - top.sum() / bottom.sum() * bottom) / bottom.sum()
        moves *= math.sqrt(num / (num - 1))
    else:
        moves = jackknife(values, aggregation)
    return Estimate(value, moves, num, name in COMPARED_BY_LOGARITHM, higher_is_better)


def jackknife(values: list, aggregation: Callable[[list], float]) -> np.ndarray:
    """How far parts of the documents move any aggregation, by leaving out one part after the other.

    A part is a document, or several where there are more than ``MAX_PARTS``. For a mean of single documents this is exact.
    """
    parts = np.array_split(np.arange(len(values)), min(len(values), MAX_PARTS))
    without = []
    for part in parts:
        kept = [values[i] for i in np.setdiff1d(np.arange(len(values)), part)]
        without.append(aggregation([value for value in kept if value is not None]))
    return math.sqrt((len(parts) - 1) / len(parts)) * (np.mean(without) - np.array(without, dtype=float))


def average(estimates: list[Estimate], by_size: bool) -> Estimate:
    """Average over the tasks of a group, as lm-eval does."""
    weights = np.array([e.num_documents if by_size else 1 for e in estimates], dtype=float)
    weights /= weights.sum()
    return Estimate(
        value=float(sum(weight * e.value for weight, e in zip(weights, estimates, strict=True))),
        moves=np.concatenate([weight * e.moves for weight, e in zip(weights, estimates, strict=True)]),
        num_documents=sum(e.num_documents for e in estimates),
        by_logarithm=any(e.by_logarithm for e in estimates),
        higher_is_better=estimates[0].higher_is_better,
    )


def difference(base: Estimate, other: Estimate) -> tuple[float, float]:
    """Other minus base, or the same of their logarithms, and its standard error, paired by document."""
    if base.by_logarithm:
        moves = other.moves / other.value - base.moves / base.value
        return math.log(other.value / base.value), float(np.linalg.norm(moves))
    return other.value - base.value, float(np.linalg.norm(other.moves - base.moves))


def load_tasks(options: EvaluateArguments) -> tuple[Any, dict]:
    """Load tasks by name; those of lm-eval, 14,000 files, are only looked through if one of them is wanted."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=options.data, include_defaults=False)
    if not set(options.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=options.data)
    for name in options.tasks:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            names = " or ".join(f"`{other}`" for other in near)
            hint = f" Do you mean {names}?" if near else " `lm_eval ls tasks` lists all."
            local = "" if options.data else " Local tasks need `--data`, see scripts/lm_eval_tasks/make_data.py."
            raise SystemExit(f"{PROG}: `{name}` is not a task.{hint}{local}")
    return manager, manager.load(options.tasks)


def evaluate(lm: Any, manager: Any, loaded: dict, options: EvaluateArguments) -> dict[tuple[str, str], Estimate]:
    """Estimate every metric of every task, then of the groups."""
    from lm_eval import simple_evaluate
    from lm_eval.api.metrics import mean, weighted_perplexity

    tasks = loaded["tasks"]
    samples = simple_evaluate(
        lm,
        tasks=list(tasks.values()),
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        bootstrap_iters=0,  # standard errors are computed here
    )["samples"]
    estimates = {}
    for name, task in tasks.items():
        aggregations, better = dict(task.aggregation()), dict(task.higher_is_better())
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            add_token_perplexity(lm, samples[name])
            aggregations["token_perplexity"], better["token_perplexity"] = weighted_perplexity, False
        for filtered_by in dict.fromkeys(sample["filter"] for sample in samples[name]):
            rows = [sample for sample in samples[name] if sample["filter"] == filtered_by]
            for metric in dict.fromkeys(metric for row in rows for metric in row["metrics"]):
                key = metric if filtered_by == "none" else f"{metric},{filtered_by}"
                values = [row.get(metric) for row in rows]
                estimates[name, key] = estimate(values, aggregations.get(metric, mean), better.get(metric))
    return estimates | average_groups(loaded.get("groups", {}), estimates)


def add_token_perplexity(lm: Any, samples: list[dict]) -> None:
    for sample in samples:
        num_tokens = len(lm.tok_encode(sample["arguments"][0][0]))
        sample["token_perplexity"] = (sample["filtered_resps"][0], num_tokens)
        sample["metrics"].append("token_perplexity")


def average_groups(groups: dict, estimates: dict[tuple[str, str], Estimate]) -> dict[tuple[str, str], Estimate]:
    averages = {}
    for name, group in groups.items():
        members = [task.task_name for task in group.get_all_tasks()]
        for entry in group.aggregate_metric_list or []:
            keys = [key for task, key in estimates if task in members and key.split(",")[0] == entry.metric]
            for key in dict.fromkeys(keys):
                found = [estimates[task, key] for task in members if (task, key) in estimates]
                averages[name, key] = average(found, entry.weight_by_size)
    return averages


def compare(estimates: dict[str, dict[tuple[str, str], Estimate]]) -> list[dict]:
    """One row for every metric of every task and model; numbers that cannot be told are None."""
    base, *_ = estimates.values()
    rows = []
    for task, metric in base:
        for arm, found in estimates.items():
            ours = found[task, metric]
            change, error = (math.nan, math.nan) if found is base else difference(base[task, metric], ours)
            row = {"arm": arm, "task": task, "metric": metric, "num_documents": ours.num_documents}
            row |= {"value": ours.value, "stderr": ours.error, "difference": change, "difference_stderr": error}
            row |= {"scale": "log" if ours.by_logarithm else "linear", "higher_is_better": ours.higher_is_better}
            rows.append({name: None if value != value else value for name, value in row.items()})
    return rows


def summarize(rows: list[dict]) -> dict[str, float]:
    numbers = {}
    for row in rows:
        ending = f"{row['task']}/{row['arm']}"
        for name, value in ((row["metric"], "value"), (f"{row['metric']}_difference", "difference")):
            numbers[f"{name}/{ending}"] = row[value]
            numbers[f"{name}/{ending}/stderr"] = row["stderr" if value == "value" else "difference_stderr"]
    return {name: number for name, number in numbers.items() if number is not None}


def print_comparison(rows: list[dict], names: list[str]) -> None:
    def cell(value: float | None, error: float | None, scale: str = "linear") -> str:
        number = "?" if value is None else f"{value:.4g}"
        return f"{number} ± {'?' if error is None else f'{error:.3g}'}{' log' if scale == 'log' else ''}"

    lines = []
    for start in range(0, len(rows), len(names)):
        first, *others = rows[start : start + len(names)]
        arrow = {True: " ↑", False: " ↓", None: ""}[first["higher_is_better"]]
        values = [cell(row["value"], row["stderr"]) for row in (first, *others)]
        differences = [cell(row["difference"], row["difference_stderr"], row["scale"]) for row in others]
        lines.append([first["task"], first["metric"] + arrow, *values, *differences])
    print()
    print_table(["task", "metric", *names, *(f"{name} - {names[0]}" for name in names[1:])], lines)
    print("± standard error; that of a difference is paired by document, and `log` compares logarithms.")


def main(argv: list[str] | None = None) -> dict:
    (options,) = parse(EvaluateArguments, argv=argv, prog=PROG)
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise SystemExit(f'{PROG} needs lm-eval: {error}. Run `pip install "hf_bilevel[eval]"`.') from error
    manager, loaded = load_tasks(options)
    pairs = [(model, None) for model in options.models] + [(options.models[0], adapter) for adapter in options.peft]
    estimates = {}
    for name, (model, adapter) in zip(options.names, pairs, strict=True):
        lm = HFLM(pretrained=model, peft=adapter, batch_size=options.batch_size, device=options.device)
        estimates[name] = evaluate(lm, manager, loaded, options)
        del lm  # before the next one is loaded
    rows = compare(estimates)
    print_comparison(rows, options.names)
    config = asdict(options) | {"lm_eval": version("lm_eval")}
    return write_report("evaluate_lm", config, rows, summarize(rows), options.output)


if __name__ == "__main__":
    main()
