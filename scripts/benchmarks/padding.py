"""Rows of many lengths: what a step of sample selection costs with and without the padding that it can leave out.

    python scripts/benchmarks/padding.py --output scripts/benchmarks/results/padding.json    # about 5 minutes, 1 thread
    python scripts/benchmarks/padding.py --smoke

The Llama of `overhead.py` on rows whose lengths are spread as those of instructions are (log-normal, most of them a quarter of the
longest), padded to the longest row of a batch. `plain` is the plain Trainer on all candidates, `blade_sample` BladeTrainer as it comes:
candidates are scored in parts of like length, and the selected rows are trained on without the columns that only others need.
`all_padding` is the same with both switched off. As in `overhead.py` the arms take turns, and ratios are to the plain steps before and
after. `columns` are the positions that models were run on in a step, forward-equivalents, over those of `plain`.
"""

import argparse
import copy
import statistics
import tempfile
import warnings

import torch
from overhead import StepClock, build, train
from report import print_table, repeatable, write_report
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_bilevel import BladeConfig, BladeTrainer

RATIO = 0.25
SPREAD, LONGEST, SHORTEST = 0.7, 128, 8  # of the logarithm; tokens


class AllPadding(BladeTrainer):
    """BladeTrainer without either saving."""

    def _lengths(self, batches: list, sizes: list[int]) -> list[None]:
        return [None] * len(batches)


ARMS = {"plain": Trainer, "blade_sample": BladeTrainer, "all_padding": AllPadding}


def make_rows(num: int, seed: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = longest / 4 * (SPREAD * torch.randn(num, generator=generator)).exp()
    lengths = lengths.round().long().clamp(SHORTEST, longest).tolist()
    return [torch.randint(1, 512, (length,), generator=generator).tolist() for length in lengths]


def collate(rows: list[dict]) -> dict[str, Tensor]:
    width = 8 * -(-max(len(row["input_ids"]) for row in rows) // 8)
    tokens, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def make_trainer(arm: str, model: nn.Module, rows: list[dict], batch_size: int, steps: int, folder: str) -> Trainer:
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=batch_size,
        max_steps=1 + steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    reference = copy.deepcopy(model)
    ours = {
        "bilevel_config": BladeConfig(selection_ratio=RATIO, granularity="sample", reference="static"),
        "reference_model": reference,
    }
    kwargs = {} if arm == "plain" else ours
    trainer = ARMS[arm](model=copy.deepcopy(model), args=args, train_dataset=rows, data_collator=collate, **kwargs)
    trainer.remove_callback(PrinterCallback)
    return trainer


def count_columns(trainer: Trainer) -> float:
    """Forward-equivalents of one position, in a step but the first."""
    clock, total = StepClock(), 0

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal total
        if clock.ends:
            total += (3 if torch.is_grad_enabled() else 1) * kwargs["input_ids"].numel()

    models = [trainer.model, *([trainer.reference_model] if isinstance(trainer, BladeTrainer) else [])]
    hooks = [model.register_forward_pre_hook(count, with_kwargs=True) for model in models]
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    for hook in hooks:
        hook.remove()
    return total / (len(clock.ends) - 1)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model and one round")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args(argv)
    batch_size, steps, rounds, longest = (16, 2, 1, 32) if options.smoke else (32, 2, 3, LONGEST)
    warnings.filterwarnings("ignore", ".*pad_token_id")
    model, _ = build("llama", 1, 0, options.smoke)
    rows = [{"input_ids": row} for row in make_rows(batch_size * (1 + steps), 0, longest)]
    with repeatable():
        with tempfile.TemporaryDirectory() as folder:
            trainers = {arm: make_trainer(arm, model, rows, batch_size, steps, folder) for arm in ARMS}
            columns = {arm: count_columns(trainer) for arm, trainer in trainers.items()}  # warms up as well
            ratios: dict[str, list[float]] = {arm: [] for arm in ARMS}
            for i in range(rounds):
                before = statistics.fmean(train(trainers["plain"]))
                for arm in ARMS if i % 2 == 0 else reversed(ARMS):
                    seconds = statistics.fmean(train(trainers[arm]))
                    after = statistics.fmean(train(trainers["plain"]))
                    ratios[arm].append(seconds / ((before + after) / 2))
                    before = after
    found = [
        {
            "arm": arm,
            "ratio": statistics.median(ratios[arm]),
            "ratio_range": [min(ratios[arm]), max(ratios[arm])],
            "columns": columns[arm] / columns["plain"],
        }
        for arm in ARMS
    ]
    summary = {f"{kind}/{row['arm']}": row[kind] for row in found for kind in ("ratio", "columns")}
    print_table(
        ["arm", "ratio", "range", "columns"],
        [
            [row["arm"], f"{row['ratio']:.3f}", "{:.3f}-{:.3f}".format(*row["ratio_range"]), f"{row['columns']:.3f}"]
            for row in found
        ],
    )
    config = {
        "batch_size": batch_size,
        "selection_ratio": RATIO,
        "rounds": rounds,
        "spread": SPREAD,
        "longest": longest,
        "threads": 1,
    }
    return write_report("padding", config, found, summary, options.output)


if __name__ == "__main__":
    main()
