"""Seconds of an optimizer step of every method over those of a step of ``transformers.Trainer``, within one run.

    python scripts/benchmarks/overhead.py --output scripts/benchmarks/results/overhead.json    # about 30 minutes, 1 thread
    python scripts/benchmarks/overhead.py --full_size --rounds 3 --output scripts/benchmarks/results/overhead_full_size.json  # as long
    python scripts/benchmarks/overhead.py --models llama --output FILE    # which keeps its rows of other models
    python scripts/benchmarks/overhead.py --models llama --add --output FILE    # and adds rounds to those it has of this one
    python scripts/benchmarks/overhead.py --smoke

The small models show what does not grow with the model; `--full_size` takes ViT-S on 64 patches and SmolLM2-135M instead, with
random weights and fewer arms, rows and steps. Each arm has a trainer of its own on a copy of one model and on the same random data. In every round each trainer makes one
short ``train()`` call, in alternating order, and a callback times its steps from the end of one to the end of the next, so
that fetching, scoring and selecting the next batch are included. The first step of a call is dropped: it holds the set-up,
and for BLADE the first reference phase. The plain Trainer trains before and after every arm, itself one of them: reported is the
median over rounds of an arm's time over the mean of these two, and how far those of the plain arm lie from 1 is the noise.

``limit`` is what counting forward passes predicts, a plain step being 3; the passes of the real runs are counted too, and
must agree. ``blade_token_amortised`` adds the reference phase as published, at K / T = 300 / 1,000 and with the penalty, and
``blade_token_auto`` as BladeConfig has it, at 0.08 and on target batches alone, from the measured costs of a reference step. ``bros`` is BrosTrainer as it comes, at a rank of an
eighth of a layer's inputs and with a fresh subspace at every step of so short a run, ``bros_rank48`` the same at rank 48;
``bros_large`` is ``bros`` with four times the rows, in a run of its own beside the plain Trainer: what BROS does to the weights
themselves costs as much whatever the batch. ``bros_every5`` moves the weights at every fifth step and is timed over five;
``masoba`` is in full space, by double backward.
``mixture`` is MixtureTrainer as it comes in a run of 400 steps (T = 49, K = 4), timed over the T steps of one update.
``sft`` is TRL's SFTTrainer on all candidates, which measures the accuracy and entropy of tokens besides, and ``blade_sft`` is
``blade_token`` as a mixin in front of it; both need TRL, and are left out without it. ``gradients`` selects the rows of ``blade_sample``
by products of their gradients with the target's, as GREATS does (`peer_rules.py`); of the model only linear layers of blocks are trained.
``interval`` scores the whole pool once in as many steps as a pass over it takes, and trains on as many rows as the plain Trainer, drawn
from the half with the highest losses, as DataFlex does (`peer_rules.py`).
"""

import argparse
import copy
import importlib.util
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peer_rules import NUM_SCORED_TOGETHER, GradientProductTrainer, IntervalTrainer
from report import mean_and_std, print_table, repeatable, write_report
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_bilevel import BladeConfig, BladeMixin, BladeTrainer, BrosConfig, BrosTrainer, MixtureConfig, MixtureTrainer
from hf_bilevel.core.selection import synchronisation_schedule

RATIO = {"blade_token": 0.6, "blade_sample": 0.5}
SHARE = 300 / 1000  # published K / T
_sync_steps, _reference_steps = synchronisation_schedule(None, None, max_steps=5000)
AUTO_SHARE = _reference_steps / _sync_steps
PHASE_STEPS = 2  # reference steps of a measured reference phase
# As published, with the penalty, and as BladeConfig has it, on target batches alone; and what they are a part of.
PHASES = {"phase": "reference_phase_step", "phase_target": "reference_phase_step_on_target"}
AMORTISED = {"blade_token_amortised": ("phase", SHARE), "blade_token_auto": ("phase_target", AUTO_SHARE)}
BROS = ("bros", "bros_every5", "masoba")
LARGE = 4  # times the batch, of another run of BROS
TRL = ("sft", "blade_sft") if importlib.util.find_spec("trl") else ()
INNER_STEPS, REFERENCE_STEPS, NUM_DOMAINS = 49, 4, 4  # of MixtureTrainer, T and K by default for 400 steps
MODELS = {
    "vit": ("off", "blade_sample", *BROS, "mixture"),
    "llama": ("off", "blade_token", "blade_sample", *PHASES, *BROS, "mixture", "gradients", "interval", *TRL),
}
FULL_SIZE = {
    "vit_s": ("off", "blade_sample", "bros_rank48", "bros", "bros_every5"),
    "smollm2": ("blade_token", "blade_sample", "phase_target", "bros_rank48", "bros"),
}
BATCH = 8
FULL_SIZE_BATCH = {"vit_s": 16, "smollm2": 4}
TIMED_STEPS = {**dict.fromkeys(PHASES, 2), "bros_every5": 5, "mixture": INNER_STEPS}  # others: as many as the run says

# Forward passes of one step; a reference step trains on a target batch and on a training batch that both models score. BROS
# trains on a target batch once and on the training batch twice.
CALLS = {
    "plain": {"proxy train": 1},
    "off": {"proxy train": 1},
    "sft": {"proxy train": 1},
    "blade_token": {"proxy train": 1, "reference score": 1},
    "blade_sft": {"proxy train": 1, "reference score": 1},
    "blade_sample": {"proxy train": 1, "reference score": 1, "proxy score": 1},
    "phase": {"reference train": 2, "reference score": 1, "proxy score": 1},
    "phase_target": {"reference train": 1},
    "bros": {"proxy train": 3},
    "bros_rank48": {"proxy train": 3},
    "bros_every5": {"proxy train": 1 + 2 / 5},
    "masoba": {"proxy train": 2},
    "gradients": {"proxy train": 3},
    "interval": {"proxy train": 1, "proxy score": BATCH / NUM_SCORED_TOGETHER},
    "mixture": {
        "proxy train": 1,
        "reference train": 2 * REFERENCE_STEPS / INNER_STEPS,
        "proxy score": MixtureConfig.probe_batches / INNER_STEPS,
        "reference score": MixtureConfig.probe_batches / INNER_STEPS,
    },
}
# Differentiating a forward and backward pass, three forwards' worth, costs twice as much as making it.
DOUBLE_BACKWARD = {"masoba": 2 * 3}
EQUIVALENTS = {
    "plain": 3,
    "off": 3,
    "sft": 3,
    "blade_token": 3 + 1,
    "blade_sft": 3 + 1,
    "blade_sample": 2 + 3 * RATIO["blade_sample"],
    "phase": 6 + 2,
    "phase_target": 3,
    "bros": 3 * 3,
    "bros_rank48": 3 * 3,
    "bros_every5": 3 * (1 + 2 / 5),
    "masoba": 2 * 3 + DOUBLE_BACKWARD["masoba"],
    "gradients": 3 * (1 + 1 + RATIO["blade_sample"]),
    "interval": 3 + 1,
    "mixture": 3 + (6 * REFERENCE_STEPS + 2 * MixtureConfig.probe_batches) / INNER_STEPS,
}
EQUIVALENTS |= {
    name: EQUIVALENTS["blade_token"] + share * EQUIVALENTS[phase] for name, (phase, share) in AMORTISED.items()
}
TARGETS = {
    "step_ratio/vit/off": 1.02,
    "step_ratio/llama/off": 1.02,
    "step_ratio/llama/blade_token": 1.40,
    "step_ratio/llama/blade_token_auto": 1.45,
    "step_ratio/vit/blade_sample": 1.10 * EQUIVALENTS["blade_sample"] / 3,
    "step_ratio/llama/blade_sample": 1.10 * EQUIVALENTS["blade_sample"] / 3,
    "step_ratio/vit/bros": 3.2,
    "step_ratio/llama/bros": 3.2,
    "bros_over_masoba_step/vit": 0.75,
    "bros_over_masoba_step/llama": 0.75,
    "step_ratio/vit/bros_large": 2.6,
    "step_ratio/llama/bros_large": 2.6,
    "step_ratio/vit/mixture": 1.25,
    "step_ratio/llama/mixture": 1.25,
}
FULL_SIZE_TARGETS = {
    "step_ratio/vit_s/off": 1.01,
    "step_ratio/vit_s/blade_sample": 1.05 * EQUIVALENTS["blade_sample"] / 3,
    "step_ratio/vit_s/bros_rank48": 2.6,
    "step_ratio/vit_s/bros": 2.6,
    "step_ratio/vit_s/bros_every5": 1.4,
    "step_ratio/smollm2/blade_token": 1.36,
    "step_ratio/smollm2/blade_token_auto": 1.45,
    "step_ratio/smollm2/blade_sample": 1.05 * EQUIVALENTS["blade_sample"] / 3,
    "step_ratio/smollm2/bros_rank48": 2.6,
    "step_ratio/smollm2/bros": 2.6,
}


def build(model_name: str, num_rows: int, seed: int, smoke: bool) -> tuple[nn.Module, list[dict]]:
    """Random weights and random data: the time of a step does not depend on either."""
    torch.manual_seed(seed)
    full_size = model_name in FULL_SIZE
    if model_name in ("vit", "vit_s"):  # ViT-S on 64 patches, or at half its width
        layers, width = (2, 64) if smoke else (12, 384 if full_size else 192)
        shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
        config = ViTConfig(**shape, intermediate_size=4 * width, image_size=32, patch_size=4, num_labels=100)
        data = [
            {"pixel_values": torch.randn(3, 32, 32), "labels": i % 100, "domain": i % NUM_DOMAINS}
            for i in range(num_rows)
        ]
        return ViTForImageClassification(config), data
    if full_size and not smoke:
        layers, width, vocabulary, length = 30, 576, 49152, 256
        shape = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    else:
        layers, width, vocabulary, length = (2, 64, 512, 64) if smoke else (4, 256, 8192, 128)
        shape = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 8 * width // 3}
    config = LlamaConfig(**shape, vocab_size=vocabulary, use_cache=False)
    tokens = torch.randint(vocabulary, (num_rows, length))
    rows = [{"input_ids": row, "labels": row, "domain": i % NUM_DOMAINS} for i, row in enumerate(tokens)]
    return LlamaForCausalLM(config), rows


class StepClock(TrainerCallback):
    """Seconds between the ends of consecutive steps: a whole step, with fetching and selecting its batch."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


def make_trainer(
    arm: str, model: nn.Module, data: list[dict], batch_size: int, steps: int, folder: str, compiled: bool = False
) -> Trainer:
    """Build the trainer of one arm; each of its ``train()`` calls makes 1 + ``steps`` steps, or as ``TIMED_STEPS`` says."""
    # Beyond the run, so that only the dropped first step has a reference phase: the smallest there is.
    no_phase = {"sync_steps": 10**6, "reference_steps": 1, "penalty": 0, "target_batch_size": 1}
    configs = {
        "off": BladeConfig(selection_ratio=1),
        "blade_token": BladeConfig(selection_ratio=RATIO["blade_token"], granularity="token", **no_phase),
        "blade_sample": BladeConfig(selection_ratio=RATIO["blade_sample"], granularity="sample", **no_phase),
        # As published otherwise; steps 0 and 2 synchronise, so the second of two timed steps does and the first does not.
        "phase": BladeConfig(sync_steps=2, reference_steps=PHASE_STEPS, first_reference_steps=1, penalty=1.0),
        "phase_target": BladeConfig(sync_steps=2, reference_steps=PHASE_STEPS, first_reference_steps=1),
        "bros": BrosConfig(),
        "bros_rank48": BrosConfig(rank="48"),
        "bros_every5": BrosConfig(update_every=5),
        "masoba": BrosConfig(rank="full", hessian_action="double_backward"),
        "mixture": MixtureConfig(domain_column="domain", inner_steps=INNER_STEPS, reference_steps=REFERENCE_STEPS),
    }
    arguments = {
        "output_dir": folder,
        "per_device_train_batch_size": batch_size,
        "max_steps": 1 + TIMED_STEPS.get(arm, steps),
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if arm in TRL:
        trainer = make_sft_trainer(
            copy.deepcopy(model), data, arguments, configs["blade_token"] if arm != "sft" else None
        )
        trainer.remove_callback(PrinterCallback)
        return trainer
    args = TrainingArguments(**arguments, torch_compile=compiled)
    if arm == "gradients":
        trained = copy.deepcopy(model).requires_grad_(False)
        for module in trained.base_model.modules():
            if isinstance(module, nn.Linear):
                module.requires_grad_()
        trainer = GradientProductTrainer(RATIO["blade_sample"], data, model=trained, args=args, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        return trainer
    if arm == "interval":
        pool = data[: batch_size * steps]
        trainer = IntervalTrainer(
            RATIO["blade_sample"], steps, model=copy.deepcopy(model), args=args, train_dataset=pool
        )
        trainer.remove_callback(PrinterCallback)
        return trainer
    ours = {} if arm == "plain" else {"target_dataset": data, "bilevel_config": configs[arm]}
    trainer_class = BladeTrainer
    if arm in ("plain", "mixture", "bros_rank48", *BROS):
        trainer_class = {"plain": Trainer, "mixture": MixtureTrainer}.get(arm, BrosTrainer)
    trainer = trainer_class(model=copy.deepcopy(model), args=args, train_dataset=data, **ours)
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_sft_trainer(model: nn.Module, data: list[dict], arguments: dict, config: BladeConfig | None) -> Trainer:
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()  # of the preparation

    class BladeSFTTrainer(BladeMixin, SFTTrainer):
        pass

    tokenizer = Tokenizer(
        models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, "<unk>")
    )  # the rows are encoded already
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    rows = Dataset.from_list(
        [{"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()} for row in data]
    )
    args = SFTConfig(**arguments, packing=False, padding_free=False, bf16=False, activation_checkpointing=False)
    trainer_class, ours = SFTTrainer, {}
    if config is not None:
        trainer_class, ours = BladeSFTTrainer, {"target_dataset": rows, "bilevel_config": config}
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    return trainer_class(model=model, args=args, train_dataset=rows, processing_class=words, **ours)


def train(trainer: Trainer) -> list[float]:
    """Seconds of every step of one ``train()`` call but the first."""
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return clock.seconds()


def count_forwards(arm: str, trainer: Trainer) -> float:
    """Count the forward passes of real steps, check them against ``CALLS``, return forward-equivalents of one step."""
    clock, calls, rows = StepClock(), Counter(), Counter()

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if clock.ends:  # past the first step
            who = "proxy" if module is trainer.model else "reference"
            what = "train" if torch.is_grad_enabled() else "score"
            calls[f"{who} {what}"] += 1
            rows[what] += len(kwargs[module.main_input_name])

    hook = trainer.model.register_forward_pre_hook(count, with_kwargs=True)  # the reference, a copy, takes it along
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    hook.remove()
    steps = len(clock.ends) - 1
    if arm in PHASES:  # two token-level steps beside the reference steps
        for name, number in CALLS["blade_token"].items():
            calls[name] -= steps * number
        rows.subtract({what: steps * trainer.args.per_device_train_batch_size for what in ("train", "score")})
        steps = PHASE_STEPS
    per_step = {name: number / steps for name, number in calls.items() if number}
    assert per_step == CALLS[arm], (arm, per_step, CALLS[arm])
    equivalents = (3 * rows["train"] + rows["score"]) / (steps * trainer.args.per_device_train_batch_size)
    equivalents += DOUBLE_BACKWARD.get(arm, 0)
    assert abs(equivalents - EQUIVALENTS[arm]) < 1e-9, (arm, equivalents, EQUIVALENTS[arm])
    return equivalents


def measure(
    model_name: str, arms: tuple[str, ...], seed: int, batch_size: int, steps: int, rounds: int, smoke: bool
) -> list[dict]:
    """Run arms of a model in alternation, the plain Trainer among them; one row for each."""
    num_steps = max(TIMED_STEPS.get(arm, steps) for arm in arms)
    model, data = build(model_name, batch_size * (1 + num_steps), seed, smoke)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    ratios: dict[str, list[float]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {arm: make_trainer(arm, model, data, batch_size, steps, folder) for arm in arms}
        equivalents = {arm: count_forwards(arm, trainer) for arm, trainer in trainers.items()}  # warms up as well
        for i in range(rounds):
            before = statistics.median(train(trainers["plain"]))
            for arm in arms if i % 2 == 0 else reversed(arms):  # a drift of the machine hits all arms alike
                times = train(trainers[arm])
                if (
                    arm in PHASES
                ):  # what a step that synchronises takes more than the one before it, per reference step
                    seconds[arm].append((times[1] - times[0]) / PHASE_STEPS)
                else:  # one step of bros_every5 and of interval, and a few of mixture, are not like the others
                    mean = statistics.fmean if arm in ("bros_every5", "mixture", "interval") else statistics.median
                    seconds[arm].append(mean(times))
                after = statistics.median(train(trainers["plain"]))
                ratios[arm].append(seconds[arm][-1] / ((before + after) / 2))
                before = after
    for name, (phase, share) in AMORTISED.items():
        if phase in arms:
            pairs = zip(ratios["blade_token"], ratios[phase], strict=True)
            ratios[name] = [step + share * of_phase for step, of_phase in pairs]
            equivalents[name] = equivalents["blade_token"] + share * equivalents[phase]
    return [
        {
            "model": model_name,
            "arm": PHASES.get(arm, arm),
            "seed": seed,
            "batch_size": batch_size,
            "parameters": model.num_parameters(),
            "seconds": statistics.median(seconds[arm]) if arm in seconds else None,
            "forward_equivalents": equivalents[arm],
            "limit": equivalents[arm] / 3,
            "ratio": statistics.median(ratios[arm]),
            "ratio_range": [min(ratios[arm]), max(ratios[arm])],
            "ratios": ratios[arm],
        }
        for arm in ratios
    ]


def with_earlier_rounds(rows: list[dict], earlier: list[dict]) -> list[dict]:
    """Put the rounds of an earlier run in front of those of the same model, arm and seed; seconds are those of the last run."""
    known = {(row["model"], row["arm"], row["seed"]): row["ratios"] for row in earlier}
    together = []
    for row in rows:
        ratios = known.get((row["model"], row["arm"], row["seed"]), []) + row["ratios"]
        spread = {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)], "ratios": ratios}
        together.append(row | spread)
    return together


def summarise(rows: list[dict]) -> dict[str, float]:
    """Medians over all rounds of all seeds, with the standard deviation of a round."""
    summary = {}
    arms = dict.fromkeys((row["model"], row["arm"]) for row in rows)
    for model, arm in [key for key in arms if not key[1].startswith("plain")]:
        own = [row for row in rows if (row["model"], row["arm"]) == (model, arm)]
        ratios = [ratio for row in own for ratio in row["ratios"]]
        name = f"{arm}/{model}" if arm in PHASES.values() else f"step_ratio/{model}/{arm}"
        summary[name] = statistics.median(ratios)
        summary[f"{name}/std"] = mean_and_std(ratios)[1]
        if arm in PHASES.values():
            summary[f"limit/{name}"] = own[0]["limit"]
        else:
            summary[f"limit/{model}/{arm}"] = own[0]["limit"]
            summary[f"forward_equivalents/{model}/{arm}"] = own[0]["forward_equivalents"]
    for model in [model for model, arm in arms if arm == "masoba"]:
        bros, masoba = (
            [ratio for row in rows if (row["model"], row["arm"]) == (model, arm) for ratio in row["ratios"]]
            for arm in ("bros", "masoba")
        )
        over = [a / b for a, b in zip(bros, masoba, strict=True)]  # of the same round: the plain step cancels
        summary[f"bros_over_masoba_step/{model}"] = statistics.median(over)
        summary[f"bros_over_masoba_step/{model}/std"] = mean_and_std(over)[1]
    return summary


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny models and two rounds")
    parser.add_argument("--full_size", action="store_true", help="ViT-S and SmolLM2-135M, instead of small models")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions with other weights and data")
    parser.add_argument("--rounds", type=int, help="alternations of the arms for each seed; 10, or 2 with --smoke")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *FULL_SIZE], help="all of this size by default")
    parser.add_argument("--output", help="JSON file to write; one there keeps its rows of other models")
    parser.add_argument("--add", action="store_true", help="keep the rounds that the file has of these models, too")
    options = parser.parse_args(argv)
    arms_of = FULL_SIZE if options.full_size else MODELS
    names = options.models or list(arms_of)
    if not set(names) <= set(arms_of):
        size = "with" if options.full_size else "without"
        parser.error(f"--models {' '.join(names)}: {size} --full_size choose of {', '.join(arms_of)}.")
    rounds = options.rounds or (2 if options.smoke else 10)
    steps = 2 if options.smoke else 1 if options.full_size else 4
    batch_sizes = FULL_SIZE_BATCH if options.full_size else dict.fromkeys(MODELS, BATCH)
    if options.smoke:
        batch_sizes = dict.fromkeys(batch_sizes, 4)
    warnings.filterwarnings("ignore", "The subspaces of")  # of so short a run cover little
    with repeatable():
        rows, earlier, targets = [], [], FULL_SIZE_TARGETS if options.full_size else TARGETS
        if options.output is not None and Path(options.output).exists():
            before = json.loads(Path(options.output).read_text(encoding="utf-8"))
            rows = [row for row in before["rows"] if row["model"] not in names]
            earlier = [row for row in before["rows"] if row["model"] in names] if options.add else []
        for seed in range(options.seeds):
            for name in names:
                arms = arms_of[name]
                settings = steps, rounds, options.smoke
                rows += with_earlier_rounds(
                    measure(name, ("plain", *arms), seed, batch_sizes[name], *settings), earlier
                )
                if not options.full_size:
                    large = measure(name, ("plain", "bros"), seed, LARGE * batch_sizes[name], *settings)
                    rows += with_earlier_rounds([row | {"arm": f"{row['arm']}_large"} for row in large], earlier)
        rounds_of = {row["model"]: len(row["ratios"]) for row in rows}
        config = {
            **{"smoke": options.smoke, "full_size": options.full_size, "seeds": options.seeds, "rounds": rounds_of},
            **{"timed_steps": steps, "batch_sizes": batch_sizes, "selection_ratio": RATIO, "threads": 1},
            "reference_steps_per_step": {"published": SHARE, "auto": AUTO_SHARE},
            "targets": targets,
            "notes": [
                "The plain arm trains on all candidates, also where blade_sample trains on the selected half.",
                "std and ratio_range are over rounds.",
                "A reference step of the phase: penalty 1, target batch as large as the candidate batch.",
                f"bros_large: {LARGE} times the rows, in a run of its own; plain_large is the noise of that run.",
                "BROS: rank 0.125, one-sided, a fresh subspace at every step, target batch as large as the training batch.",
            ],
        }
        summary = summarise(rows)
        report = write_report("overhead", config, rows, summary, options.output)
    print_table(
        ["model", "arm", "seconds", "ratio", "range", "limit"],
        [
            [
                *(row["model"], row["arm"], f"{row['seconds']:.4f}" if row["seconds"] else ""),
                *(f"{row['ratio']:.3f}", "{:.3f}-{:.3f}".format(*row["ratio_range"]), f"{row['limit']:.3f}"),
            ]
            for row in rows
        ],
    )
    for name, target in targets.items():
        if name not in summary:  # of a model that is neither run nor in the file
            continue
        print(
            f"{name} {summary[name]:.3f}, target of the full run {target:.3f}: {'met' if summary[name] <= target else 'MISSED'}"
        )
    return report


if __name__ == "__main__":
    main()
