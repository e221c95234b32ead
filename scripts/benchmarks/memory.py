"""Peak memory: of a training step of BROS over AdamW and MA-SOBA, and of scoring over taking the model's logits.

    python scripts/benchmarks/memory.py --output scripts/benchmarks/results/memory.json    # about 30 minutes, 1 thread
    python scripts/benchmarks/memory.py --parts training --models vit_s --update --output FILE.json
    python scripts/benchmarks/memory.py --smoke

Each arm runs in a process of its own. Its peak is counted from the idle process with the model loaded: resident memory on a
CPU (the high-water mark that Linux keeps), allocated memory on a GPU. The allocator is told to return everything to the
system at once, so every buffer is paged in anew and the seconds are longer than usual, those of the arms that make many
buffers most of all.

``training``: one ``train()`` call of three optimizer steps, without logging and saving, random weights and data, float32.
Arms: ``adamw``, the plain Trainer; ``masoba``, ``BrosTrainer`` in full space by double backward; ``bros_one_sided`` and
``bros_bi_probe`` at rank 48; ``bros_rankR`` and ``bros_full``, one-sided at other ranks and in full space, by finite
differences. ``/checkpointed`` is gradient checkpointing. Seconds are the median of the steps after the first, and depend on
what else the machine does; ``overhead.py`` compares times.

``scoring``: the shape of SmolLM2-135M (vocabulary 49,152), 8 x 1,024 tokens, no gradients. Arms: ``scoring``, the token
losses by ``hf_bilevel.losses.unit_losses``; ``naive``, the cross-entropy of the float logits of the whole batch, as
transformers computes it; ``backbone``, the hidden states alone, which no way of scoring can do without.
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from overhead import StepClock
from report import mean_and_std, print_table, write_report
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_bilevel import BrosConfig, BrosTrainer
from hf_bilevel.losses import unit_losses

SCORING_ARMS = ("scoring", "naive", "backbone")
TRAINING_ARMS = ("adamw", "masoba", "bros_one_sided")
OTHER_ARMS = ("bros_bi_probe", "bros_bfloat16", "bros_rank4", "bros_rank16", "bros_rank192", "bros_full")
VITS = {"vit_s": (384, 12, 6), "vit_b": (768, 12, 12), "vit_l": (1024, 24, 16)}  # width, layers, heads
BATCH_SIZES = {"vit_s": 64, "vit_b": 8, "vit_l": 4, "smollm2": 4}
LENGTH = 256  # tokens of a row of text
STEPS = 3
TRAINING = {
    "vit_s": TRAINING_ARMS + OTHER_ARMS,
    "smollm2": TRAINING_ARMS + OTHER_ARMS[:2],
    "vit_s/checkpointed": TRAINING_ARMS,
    "smollm2/checkpointed": TRAINING_ARMS,
    "vit_b": TRAINING_ARMS,
    "vit_l": TRAINING_ARMS,
}
SMOKE_ARMS = ("adamw", "bros_one_sided")  # importing takes most of a short run
# What is freed goes back to the system at once, so that resident memory is memory in use.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TARGETS = {
    "scoring_over_naive": 0.15,
    "bros_over_masoba/vit_s": 0.36,
    "bros_over_masoba/smollm2": 0.36,
    "bros_over_adamw/vit_s": 0.80,
}
TARGETS |= {f"bros_over_adamw/{model}": 1.0 for model in TRAINING if model != "vit_s"}
MIB = 2**20


def resident_bytes(peak: bool) -> int:
    """Resident memory of this process now, or at its peak since the mark was last reset."""
    status = Path("/proc/self/status")
    if status.exists():
        name = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) * 1024
    import resource  # not on Windows

    # Without Linux's marks: how far the arm raises the peak of the whole process.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device: str) -> int:
    """Forget earlier peaks; return the memory in use."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):  # where it is forbidden the peak of loading may count against an arm
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes(peak=not Path("/proc/self/status").exists())


def peak_bytes(device: str) -> int:
    """Peak memory since the mark was reset."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes(peak=True)


def smollm2(layers: int) -> LlamaForCausalLM:
    """A model of SmolLM2-135M's shape, which has 30 layers, with random weights."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(
        LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=49152, tie_word_embeddings=True, use_cache=False)
    )


def build(name: str, small: bool) -> nn.Module:
    """Make the model of a training arm."""
    if name == "smollm2":
        return smollm2(2 if small else 30)
    width, layers, heads = VITS[name]
    shape = {"hidden_size": width, "num_hidden_layers": 2 if small else layers, "num_attention_heads": heads}
    return ViTForImageClassification(
        ViTConfig(**shape, intermediate_size=4 * width, image_size=32, patch_size=4, num_labels=100)
    )


def make_data(name: str, num_rows: int) -> list[dict]:
    """Random images of 64 patches, or rows of tokens."""
    if name == "smollm2":
        return [{"input_ids": row, "labels": row} for row in torch.randint(49152, (num_rows, LENGTH))]
    return [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 100} for i in range(num_rows)]


def bros_config(arm: str, model: nn.Module) -> BrosConfig:
    """Settings of an arm of ``BrosTrainer``."""
    if arm == "masoba":
        return BrosConfig(rank="full", hessian_action="double_backward")
    if arm == "bros_full":
        return BrosConfig(rank="full")
    if arm.startswith("bros_rank"):
        rank = int(arm.removeprefix("bros_rank"))
        # A patch has 48 numbers, so its embedding cannot have a larger rank.
        wide = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "." in n] if rank > 48 else None
        return BrosConfig(rank=str(rank), modules=wide)
    if arm == "bros_bfloat16":
        return BrosConfig(rank="48", auxiliary_dtype="bfloat16")
    return BrosConfig(rank="48", estimator=arm.removeprefix("bros_"))


def train(arm: str, model: nn.Module, data: list[dict], batch_size: int, device: str, checkpointed: bool) -> dict:
    """One ``train()`` call over the data."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=batch_size,
            max_steps=len(data) // batch_size,
            optim="adamw_torch",
            learning_rate=1e-4,
            activation_checkpointing=checkpointed,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
        )
        ours = {} if arm == "adamw" else {"target_dataset": data, "bilevel_config": bros_config(arm, model)}
        trainer = (Trainer if arm == "adamw" else BrosTrainer)(model=model, args=args, train_dataset=data, **ours)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        loss = trainer.train().training_loss
    assert 0 < loss < 100, loss
    return {"seconds": statistics.median(clock.seconds()), "loss": loss}


def measure_training(arm: str, model: str, device: str, small: bool, seed: int) -> dict:
    """Run one arm once, in this process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The subspaces of")  # of so short a run cover little
    torch.manual_seed(seed)
    name, _, checkpointed = model.partition("/")
    batch_size = 4 if small else BATCH_SIZES[name]
    data = make_data(name, STEPS * batch_size)
    if not small:  # libraries load at their first use
        warm_up = "adamw" if arm == "adamw" else "masoba"
        train(warm_up, build("vit_s", True), make_data("vit_s", 4), 2, device, False)
    module = build(name, small).to(device)
    idle = reset_peak(device)
    measured = train(arm, module, data, batch_size, device, bool(checkpointed))
    return {
        **{"part": "training", "model": model, "arm": arm, "device": device, "seed": seed},
        **{"peak_mib": (peak_bytes(device) - idle) / MIB, "idle_mib": idle / MIB, **measured},
        **{"batch_size": batch_size, "parameters": module.num_parameters()},
    }


def score(arm: str, model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Token losses, or the hidden states."""
    if arm == "scoring":
        return unit_losses(model, batch, "token").losses
    if arm == "backbone":
        return model.model(input_ids=batch["input_ids"]).last_hidden_state
    logits = model(input_ids=batch["input_ids"]).logits.float()
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")


@torch.no_grad()
def measure_scoring(arm: str, model: str, device: str, small: bool, seed: int) -> dict:
    """Run one arm once, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    layers, rows, length = (2, 2, 512) if small else (30, 8, 1024)
    module = smollm2(layers).eval().to(device)
    tokens = torch.randint(49152, (rows, length), device=device)
    batch = {"input_ids": tokens, "labels": tokens}
    score(arm, module, {name: value[:1, :8] for name, value in batch.items()})  # libraries load at their first use
    idle = reset_peak(device)
    start = time.perf_counter()
    mean = float(score(arm, module, batch).double().mean())
    seconds = time.perf_counter() - start
    return {
        **{"part": "scoring", "model": model, "arm": arm, "device": device, "seed": seed},
        **{"peak_mib": (peak_bytes(device) - idle) / MIB, "idle_mib": idle / MIB, "seconds": seconds, "mean": mean},
        **{"batch_size": rows, "parameters": module.num_parameters()},
    }


PARTS = {"scoring": measure_scoring, "training": measure_training}


def measure_apart(part: str, *settings: object) -> dict:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps([part, *settings])]
    done = subprocess.run(command, env={**os.environ, **ALLOCATOR}, stdout=subprocess.PIPE, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    print(f"{row['model']} {row['arm']}: {row['peak_mib']:.0f} MiB, {row['seconds']:.2f} s", flush=True)
    return {**row, "date": datetime.date.today().isoformat()}


def name_of(row: dict) -> tuple[str | int, ...]:
    """What tells a measurement from all others."""
    return tuple(row[name] for name in ("part", "model", "arm", "device", "seed"))


def summarise(rows: list[dict]) -> dict[str, float]:
    """Means over seeds; ratios are of the same seed."""
    own: dict[tuple[str, ...], dict[int, dict]] = {}
    for row in rows:
        end = "" if row["device"] == "cpu" else f"/{row['device']}"
        own.setdefault((row["part"], row["model"], row["arm"], end), {})[row["seed"]] = row
    values = {}
    for (part, model, arm, end), ours in own.items():
        values[f"peak_mib/{model}/{arm}{end}"] = [row["peak_mib"] for row in ours.values()]
        ratios = {
            "scoring": [("naive", "scoring_over_naive")],
            "bros_one_sided": [("masoba", f"bros_over_masoba/{model}"), ("adamw", f"bros_over_adamw/{model}")],
        }
        for against, name in ratios.get(arm, []):
            others = own.get((part, model, against, end), {})
            both = [(ours[seed], others[seed]) for seed in sorted(ours.keys() & others.keys())]
            if both:
                values[name + end] = [a["peak_mib"] / b["peak_mib"] for a, b in both]
            if arm == "scoring":
                assert all(abs(a["mean"] - b["mean"]) < 1e-4 * b["mean"] for a, b in both), both  # the same losses
    summary = {}
    for name, numbers in values.items():
        summary[name], summary[f"{name}/std"] = mean_and_std(numbers)
    return summary


def main(argv: list[str] | None = None) -> dict | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="2 layers, small batches, few arms")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions with other weights and data")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="what to measure; may be empty")
    parser.add_argument("--models", nargs="+", choices=TRAINING, help="of the training part; all if not given")
    parser.add_argument("--arms", nargs="+", help="of the training part; all if not given")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument(
        "--update",
        nargs="*",
        metavar="FILE",
        help="keep the rows of these files, or of the output, that are not measured",
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a child process is to run
    options = parser.parse_args(argv)
    if options.measure:
        part, *settings = json.loads(options.measure)
        print(json.dumps(PARTS[part](*settings)))
        return None

    runs = []
    if "scoring" in options.parts:
        runs += [("scoring", arm, "smollm2") for arm in (SCORING_ARMS[:2] if options.smoke else SCORING_ARMS)]
    if "training" in options.parts:
        for model in options.models or (["vit_s"] if options.smoke else TRAINING):
            arms = options.arms or (SMOKE_ARMS if options.smoke else TRAINING[model])
            runs += [("training", arm, model) for arm in arms]
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = [
        measure_apart(*run, device, options.smoke, seed)
        for seed in range(options.seeds)
        for device in devices
        for run in runs
    ]
    for file in [] if options.update is None else options.update or [options.output]:
        measured = {name_of(row) for row in rows}
        old = json.loads(Path(file).read_text(encoding="utf-8"))
        rows = [row for row in old["rows"] if name_of(row) not in measured] + rows
    order = [("scoring", "smollm2"), *(("training", model) for model in TRAINING)]
    rows.sort(key=lambda row: (order.index((row["part"], row["model"])), row["device"], row["seed"]))
    summary = summarise(rows)
    config = {
        **{"smoke": options.smoke, "steps": STEPS, "length": LENGTH},
        **{"vocabulary": 49152, "dtype": "float32", "threads": 1, "allocator": ALLOCATOR, "targets": TARGETS},
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that measured, for the record of the hardware
    report = write_report("memory", config, rows, summary, options.output)
    torch.set_num_threads(threads)
    print_table(
        ["part", "model", "device", "arm", "seed", "peak MiB above idle", "idle MiB", "seconds"],
        [
            [
                *(r[key] for key in ("part", "model", "device", "arm", "seed")),
                *(f"{r[key]:.2f}" for key in ("peak_mib", "idle_mib", "seconds")),
            ]
            for r in rows
        ],
    )
    for name, target in TARGETS.items():
        if name in summary:
            met = "met" if summary[name] <= target else "MISSED"
            print(f"{name} {summary[name]:.3f}, target of the full run {target}: {met}")
    return report


if __name__ == "__main__":
    main()
