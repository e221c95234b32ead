"""How every benchmark writes what it measured: one JSON file and a table."""

import ctypes
import datetime
import json
import os
import platform
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("hf_bilevel", "torch", "transformers", "accelerate", "datasets")


def hardware() -> dict[str, str | int]:
    """Name what the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "accelerator": accelerator}


def write_report(
    benchmark: str, config: dict, rows: list[dict], summary: dict[str, float], output: str | None
) -> dict:
    """Write {"benchmark", "date", "hardware", "versions", "config", "rows", "summary"} and return it."""
    report = {
        "benchmark": benchmark,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "config": config,
        "rows": rows,
        "summary": summary,
    }
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"Wrote {output}")
    return report


@contextmanager
def repeatable() -> Iterator[None]:
    """Take one thread, so that other work takes another core, and keep what is freed, as the allocators of accelerators do.

    glibc gives memory back to the system and has it zeroed anew, in some trainers in every step and in others never, by chance
    of what lies at the top of its heap: up to a fifth of a step.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4  # of malloc.h
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)  # from the heap, whatever the size
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print aligned columns."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)))
