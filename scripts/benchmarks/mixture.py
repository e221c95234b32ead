"""Domain weights: does learning them beat fixed mixtures, and how many inner steps T should there be?

    pip install "hf_bilevel[bench]"
    python scripts/benchmarks/mixture.py --output scripts/benchmarks/results/mixture.json

Data: bytes of six domains of text from the running Python's own installation. Model: a small Llama from scratch. Held-out rows
of the target's domains judge; the target dataset is other rows of them.

Settings:
    restricted   600 rows of each domain in the pool, 100 of the target's (the manual): rows repeat.
    abundant     as many rows of each as a run can use without repeating.
    structured   restricted, and one more domain: the manual's own words in random order. It has the target's letters and words, so
                 that it helps at once, and nothing of its sentences, so that it stops to help.
    blended      restricted, with a target that is half manual and half readme.

Arms: `proportional` is the plain Trainer on all rows; `uniform` draws domains with equal probabilities, row by row; `stratified` holds
equal shares in every step; `target` trains on the pool's rows of the target's domains alone. `alignment` updates the weights at
every step; `penalty_T` every T steps, `auto` being MixtureTrainer's default. All learn from equal weights, and measure the domains'
losses on one training batch's worth of rows, so that the arms with many updates are affordable. `penalty_default` is
MixtureTrainer as it comes: T by the rule, and four times as many rows.

Two perplexities: after the same number of updates, and after the same number of forward-equivalents: what `penalty_auto`
costs in all its updates, which gives the fixed mixtures more updates and `alignment` fewer. The learning rate is constant, so
one run serves both.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import random
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts/

import torch
from installed_text import installed_text
from report import mean_and_std, print_table, write_report
from torch.utils.data import WeightedRandomSampler
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_bilevel import MixtureConfig, MixtureTrainer
from hf_bilevel.core.mixture import optimal_inner_steps

FIXED = ("uniform", "proportional", "stratified", "target")
LEARNED = ("alignment", "penalty_1", "penalty_5", "penalty_auto", "penalty_4auto", "penalty_default")
TARGETS = {"restricted": ["manual"], "abundant": ["manual"], "structured": ["manual"], "blended": ["manual", "readme"]}
ROW_LENGTH, BATCH = 64, 16
NUM_TARGET, NUM_HELD_OUT = 128, 256
PROBE_BATCHES = dict.fromkeys(LEARNED, 1) | {"penalty_default": MixtureConfig.probe_batches}


def make_data(setting: str, seed: int, steps: int) -> dict:
    """Rows of bytes: the pool with its domains, target and held-out rows; held-out text is nowhere else."""
    targets = TARGETS[setting]
    many = steps * BATCH
    generator = torch.Generator().manual_seed(seed)
    num_judged = (NUM_TARGET + NUM_HELD_OUT) // len(targets)
    wanted = many + num_judged if setting == "abundant" else 700 + num_judged
    texts = installed_text(wanted * ROW_LENGTH, seed)
    if setting == "structured":
        words = texts["manual"].split()
        random.Random(seed).shuffle(words)
        texts["shuffled manual"] = " ".join(words)[: 600 * ROW_LENGTH]
    data: dict = {"pool": [], "target": [], "held_out": []}
    for domain, text in texts.items():
        content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
        rows = content[: len(content) // ROW_LENGTH * ROW_LENGTH].view(-1, ROW_LENGTH)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        if domain in targets:
            judged, rows = rows.split([num_judged, len(rows) - num_judged])
            target, held_out = judged.split([NUM_TARGET // len(targets), NUM_HELD_OUT // len(targets)])
            data["target"] += [{"input_ids": row, "labels": row} for row in target]
            data["held_out"] += [{"input_ids": row, "labels": row} for row in held_out]
        if setting != "abundant":
            rows = rows[: 100 if domain in targets else 600]
        data["pool"] += [{"input_ids": row, "labels": row, "domain": domain} for row in rows]
    return data


def make_model() -> LlamaForCausalLM:
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=ROW_LENGTH, pad_token_id=None, **size))


class UniformTrainer(Trainer):
    """Draws each row's domain at random with equal probabilities."""

    def _get_train_sampler(self, train_dataset=None):
        domains = [row["domain"] for row in self.train_dataset]
        counts = {domain: domains.count(domain) for domain in set(domains)}
        generator = torch.Generator().manual_seed(self.args.seed)
        return WeightedRandomSampler([1 / counts[d] for d in domains], len(domains), generator=generator)


class Judge(TrainerCallback):
    """Measures the held-out loss after given steps."""

    def __init__(self, rows: list[dict], steps: list[int]) -> None:
        self.batch = torch.stack([row["input_ids"] for row in rows])
        self.steps = set(steps)
        self.losses: dict[int, float] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step in self.steps:
            model.eval()
            with torch.no_grad():
                rows = self.batch.to(model.device)
                self.losses[state.global_step] = float(model(input_ids=rows, labels=rows).loss)
            model.train()


def cost_of(arm: str, steps: int) -> float:
    """Forward-equivalents of an arm over those of plain training, by the passes that MixtureTrainer documents."""
    if arm in FIXED:
        return 1.0
    inner = 1 if arm == "alignment" else inner_steps_of(arm, steps)
    updates = (steps - 1) // inner
    probe = 2 * PROBE_BATCHES[arm]
    each = 3 + probe if arm == "alignment" else 6 * max(1, inner // 10) + probe
    return 1 + updates * each / (3 * steps)


def inner_steps_of(arm: str, steps: int) -> int:
    auto = optimal_inner_steps(steps)
    chosen = {"penalty_1": 1, "penalty_5": 5, "penalty_4auto": min(4 * auto, steps // 2)}
    return chosen.get(arm, auto)


def make_args(folder: str, max_steps: int, seed: int) -> TrainingArguments:
    return TrainingArguments(
        folder,
        max_steps=max_steps,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        weight_decay=0.1,
        logging_steps=max_steps,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )


def run_arm(arm: str, setting: str, seed: int, data: dict, steps: int, folder: str, settings: dict) -> dict:
    cost = cost_of(arm, steps)
    same_cost = max(1, round(steps * cost_of("penalty_auto", steps) / cost))
    max_steps = max(steps, same_cost) if arm in FIXED else steps
    judge = Judge(data["held_out"], [steps, same_cost])
    args = make_args(folder, max_steps, seed)
    pool = data["pool"]
    if arm == "target":
        pool = [row for row in pool if row["domain"] in TARGETS[setting]]
    common = {"model_init": make_model, "args": args, "train_dataset": pool, "callbacks": [judge]}
    if arm in ("proportional", "target"):
        trainer = Trainer(**common)
    elif arm == "uniform":
        trainer = UniformTrainer(**common)
    elif arm == "stratified":
        trainer = MixtureTrainer(**common, bilevel_config=MixtureConfig(mixture="uniform", domain_column="domain"))
    else:
        how = {"hypergradient": "alignment"}
        if arm != "alignment":
            how = {"hypergradient": "penalty", "inner_steps": inner_steps_of(arm, steps)}
        config = MixtureConfig(domain_column="domain", probe_batches=PROBE_BATCHES[arm], **how, **settings)
        trainer = MixtureTrainer(**common, target_dataset=data["target"], bilevel_config=config)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    row = {
        "setting": setting,
        "arm": arm,
        "seed": seed,
        "perplexity": math.exp(judge.losses[steps]),
        "perplexity_same_cost": math.exp(judge.losses[same_cost]) if same_cost in judge.losses else None,
        "cost": cost,
    }
    if arm in LEARNED:
        row["weights"] = trainer.domain_weights
        row["mixture"] = trainer.mixture
    return row


def summarise(rows: list[dict]) -> dict[str, float]:
    summary = {}
    for kind in ("perplexity", "perplexity_same_cost", "cost"):
        for setting, arm in dict.fromkeys((row["setting"], row["arm"]) for row in rows):
            own = [row[kind] for row in rows if (row["setting"], row["arm"]) == (setting, arm)]
            if None not in own:
                key = f"{kind}/{setting}/{arm}"
                summary[key], summary[f"{key}/std"] = mean_and_std(own)
    learned = [row for row in rows if "mixture" in row]
    for setting, arm in dict.fromkeys((row["setting"], row["arm"]) for row in learned):
        own = [row["mixture"] for row in learned if (row["setting"], row["arm"]) == (setting, arm)]
        for domain in own[0]:
            key = f"weight/{setting}/{arm}/{domain}"
            summary[key], summary[f"{key}/std"] = mean_and_std([mixture[domain] for mixture in own])
    # Arms of one seed share data and initial weights, so their differences are less noisy than the arms are.
    values = {(row["setting"], row["arm"], row["seed"]): row["perplexity"] for row in rows}
    for setting, arm in dict.fromkeys((row["setting"], row["arm"]) for row in rows):
        pairs = [
            math.log(values[setting, "penalty_auto", seed] / values[setting, arm, seed])
            for s, a, seed in values
            if (s, a) == (setting, arm) and (setting, "penalty_auto", seed) in values
        ]
        if arm != "penalty_auto" and pairs:
            key = f"log_ratio/{setting}/penalty_auto_over_{arm}"
            summary[key], summary[f"{key}/std"] = mean_and_std(pairs)
    return summary


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one seed and a few steps: does it run?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--settings", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--arms", nargs="+", default=[*FIXED, *LEARNED], choices=[*FIXED, *LEARNED])
    parser.add_argument("--config", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of MixtureConfig")
    parser.add_argument("--output", default=None)
    parser.add_argument("--update", nargs="*", default=[], metavar="FILE", help="take over rows that FILE has")
    options = parser.parse_args(argv)
    if options.smoke:
        options.seeds, options.steps = 1, 20
        options.settings, options.arms = ["blended"], ["uniform", "stratified", "alignment", "penalty_5"]
    settings = dict(pair.split("=", 1) for pair in options.config)
    rows = [row for file in options.update for row in json.loads(Path(file).read_text(encoding="utf-8"))["rows"]]
    done = {(row["setting"], row["arm"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for setting in options.settings:
                data = make_data(setting, seed, options.steps)
                for arm in options.arms:
                    if (setting, arm, seed) in done:
                        continue
                    rows.append(run_arm(arm, setting, seed, data, options.steps, folder, settings))
                    shown = {
                        k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items() if k != "weights"
                    }
                    print(shown, flush=True)
    rows.sort(key=lambda row: (list(TARGETS).index(row["setting"]), [*FIXED, *LEARNED].index(row["arm"]), row["seed"]))
    summary = summarise(rows)
    table = []
    for setting, arm in dict.fromkeys((row["setting"], row["arm"]) for row in rows):
        cells = []
        for kind in ("perplexity", "perplexity_same_cost", "cost"):
            key = f"{kind}/{setting}/{arm}"
            cells.append(f"{summary[key]:.3f} ± {summary[f'{key}/std']:.3f}" if key in summary else "")
        table.append([setting, arm, *cells])
    print_table(["setting", "arm", "perplexity", "at the same cost", "cost"], table)
    config = {
        "steps": options.steps,
        "batch": BATCH,
        "row_length": ROW_LENGTH,
        "num_target": NUM_TARGET,
        "num_held_out": NUM_HELD_OUT,
        "probe_batches": PROBE_BATCHES,
        "inner_steps": {arm: inner_steps_of(arm, options.steps) for arm in LEARNED if arm != "alignment"},
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "mixture_config": settings,
        "model": "Llama, hidden 128, 2 layers, bytes",
    }
    return write_report("mixture", config, rows, summary, options.output)


if __name__ == "__main__":
    main()
