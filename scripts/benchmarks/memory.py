"""Peak memory of scoring a batch with ``unit_losses``, over that of taking the model's logits.

    python scripts/benchmarks/memory.py --output scripts/benchmarks/results/memory.json    # about 5 minutes, 1 thread
    python scripts/benchmarks/memory.py --smoke

The model has the shape of SmolLM2-135M (vocabulary 49,152) and random weights; the batch is 8 x 1,024 tokens; gradients are
off. Arms: ``scoring``, the token losses by ``hf_bilevel.losses.unit_losses``; ``naive``, the cross-entropy of the float
logits of the whole batch, as transformers computes it; ``backbone``, the hidden states alone, which no way of scoring can
do without. Each arm runs in a process of its own. Its peak is counted from the idle process with the model loaded: resident
memory on a CPU (the high-water mark that Linux keeps), allocated memory on a GPU. The allocator is told to return
everything to the system at once, so every buffer is paged in anew and the seconds, scoring's most of all, are longer than
usual.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from report import mean_and_std, print_table, write_report
from transformers import LlamaConfig, LlamaForCausalLM

from hf_bilevel.losses import unit_losses

ARMS = ("scoring", "naive", "backbone")
# What is freed goes back to the system at once, so that resident memory is memory in use.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TARGET = 0.15
MIB = 2**20


def run_arm(arm: str, model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Token losses, or the hidden states."""
    if arm == "scoring":
        return unit_losses(model, batch, "token").losses
    if arm == "backbone":
        return model.model(input_ids=batch["input_ids"]).last_hidden_state
    logits = model(input_ids=batch["input_ids"]).logits.float()
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")


def resident_bytes(peak: bool) -> int:
    """Resident memory of this process now, or at its peak since the mark was last reset."""
    status = Path("/proc/self/status")
    if status.exists():
        name = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) * 1024
    import resource  # not on Windows

    # Without Linux's marks: how far the arm raises the peak of the whole process.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def measure(arm: str, device: str, layers: int, rows: int, length: int, seed: int) -> dict:
    """Run one arm once, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(
        **shape, num_hidden_layers=layers, vocab_size=49152, tie_word_embeddings=True, use_cache=False
    )
    model = LlamaForCausalLM(config).eval().to(device)
    tokens = torch.randint(config.vocab_size, (rows, length), device=device)
    batch = {"input_ids": tokens, "labels": tokens}
    run_arm(arm, model, {name: value[:1, :8] for name, value in batch.items()})  # libraries load at their first use
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated()
    else:
        with contextlib.suppress(OSError):  # where it is forbidden the peak of loading may count against an arm
            Path("/proc/self/clear_refs").write_text("5")
        idle = resident_bytes(peak=not Path("/proc/self/status").exists())
    start = time.perf_counter()
    result = run_arm(arm, model, batch)
    mean = float(result.double().mean())
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes(peak=True)
    return {
        "model": "smollm2",
        "arm": arm,
        "device": device,
        "seed": seed,
        "peak_mib": (peak - idle) / MIB,
        "idle_mib": idle / MIB,
        "seconds": seconds,
        "mean": mean,
    }


def measure_apart(*settings: object) -> dict:
    """Run ``measure`` in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps(settings)]
    done = subprocess.run(command, env={**os.environ, **ALLOCATOR}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> dict | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="2 layers and 2 x 512 tokens, without the backbone")
    parser.add_argument("--seeds", type=int, help="repetitions with other weights and data; 2, or 1 with --smoke")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a child process is to run
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measure(*json.loads(options.measure))))
        return None

    layers, rows, length = (2, 2, 512) if options.smoke else (30, 8, 1024)
    seeds = options.seeds or (1 if options.smoke else 2)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    arms = ARMS[:2] if options.smoke else ARMS  # importing takes most of a short run
    runs = itertools.product(range(seeds), devices, arms)
    results = [measure_apart(arm, device, layers, rows, length, seed) for seed, device, arm in runs]

    summary = {}
    for device in devices:
        end = "" if device == "cpu" else f"/{device}"
        own = {arm: [row for row in results if (row["arm"], row["device"]) == (arm, device)] for arm in arms}
        for ours, naive in zip(own["scoring"], own["naive"], strict=True):
            assert abs(ours["mean"] - naive["mean"]) < 1e-4 * naive["mean"], (ours, naive)  # the same losses
        values = {f"peak_mib/smollm2/{arm}": [row["peak_mib"] for row in own[arm]] for arm in arms}
        pairs = zip(own["scoring"], own["naive"], strict=True)
        values["scoring_over_naive"] = [ours["peak_mib"] / naive["peak_mib"] for ours, naive in pairs]
        for name, numbers in values.items():
            summary[name + end], summary[f"{name}{end}/std"] = mean_and_std(numbers)
    config = {
        **{"smoke": options.smoke, "seeds": seeds, "layers": layers, "rows": rows, "length": length},
        **{"vocabulary": 49152, "dtype": "float32", "threads": 1, "allocator": ALLOCATOR},
        "targets": {"scoring_over_naive": TARGET},
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that measured, for the record of the hardware
    report = write_report("memory", config, results, summary, options.output)
    torch.set_num_threads(threads)
    print_table(
        ["device", "arm", "seed", "peak MiB above idle", "idle MiB", "seconds"],
        [
            [*(r["device"], r["arm"], r["seed"]), *(f"{r[key]:.1f}" for key in ("peak_mib", "idle_mib", "seconds"))]
            for r in results
        ],
    )
    ratio = summary["scoring_over_naive"]
    print(f"scoring_over_naive {ratio:.3f}, target of the full run {TARGET}: {'met' if ratio <= TARGET else 'MISSED'}")
    return report


if __name__ == "__main__":
    main()
