"""What every method keeps for each row of the pool and each domain: memory, checkpoint and time, up to ten million rows.

    python scripts/benchmarks/scale.py --output scripts/benchmarks/results/scale.json    # about 3 minutes, 1 thread
    python scripts/benchmarks/scale.py --smoke

No model takes part: what a model costs does not depend on the size of the pool. Measured is what comes on top, in the units that a step
has: `tally` adds a batch of 256 rows to BladeTrainer's table of what was offered and selected; `weights` looks up the weights of 256
rows in BrosTrainer's table, differentiates them and moves the table; `search` draws two masks, moves CoresetTrainer's probabilities
and projects them; `projection` is the last part of that alone. `order` numbers the rows of a permutation of the pool, as the loader of
every epoch does, with or without us: to compare with. For domains, `mixture` moves the weights of MixtureTrainer and draws 256 rows.

Bytes are those of the tensors that are kept between steps, in one process; the checkpoint's are those of the file. All grow in
proportion to the rows, so a hundred million rows need ten times what ten million do.
"""

import argparse
import io
import time
from collections.abc import Callable
from typing import Any

import torch
from report import print_table, write_report
from torch import Tensor

from hf_bilevel.core.coreset import CoresetProbabilities, first_probabilities, sample_masks
from hf_bilevel.core.mixture import DomainWeights
from hf_bilevel.core.projections import projection_capped_simplex
from hf_bilevel.core.selection import SelectionTally
from hf_bilevel.core.single_loop import UpperStep
from hf_bilevel.core.weights import WeightTable
from hf_bilevel.mixing import MixtureDraws

BATCH = 256
STEPS = 64  # of a measurement: as many as a tally holds back

Part = tuple[Callable[[], Any], Callable[[], dict[str, Any]], list[Tensor]]  # a step, the state, what is kept


def tally(num: int) -> Part:
    kept = SelectionTally(num)
    one = torch.ones(BATCH, dtype=torch.int64)

    def step() -> None:
        kept.update(torch.randint(num, (BATCH,)), one, one, torch.rand(BATCH))

    return step, kept.state_dict, list(kept._own.values())


def weights(num: int) -> Part:
    table = WeightTable(num, "projected")
    upper = UpperStep([table.values.detach()], learning_rate=0.1, moving_average=0.1, normalised=True)

    def step() -> None:
        table(torch.randint(num, (BATCH,))).sum().backward()
        upper.step([table.values.grad])
        table.project()
        table.zero_grad()

    def state() -> dict[str, Any]:
        return {"upper": table.state_dict(), "step": upper.state_dict()}

    return step, state, [table.values, table.values.clone(), *upper.average]  # the second for the gradient


def search(num: int) -> Part:
    size = max(1, num // 10)
    probabilities = CoresetProbabilities(first_probabilities(num, size))
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        masks = sample_masks(probabilities.probabilities, 2, generator)
        probabilities.step((masks[0].float() - masks[1].float()) / 10, 0.05, size)

    return step, probabilities.state_dict, [probabilities.probabilities, probabilities._mean, probabilities._square]


def projection(num: int) -> Part:
    point = first_probabilities(num, max(1, num // 10)) + 0.05 * torch.randn(num)
    return lambda: projection_capped_simplex(point, max(1, num // 10)), dict, []


def order(num: int) -> Part:
    return lambda: torch.randperm(num).tolist(), dict, []


def mixture(num: int) -> Part:
    learned = DomainWeights(torch.full((num,), 1 / num, dtype=torch.float64), "mirror", floor=1e-6)
    draws = MixtureDraws(learned.weights, window=BATCH, seed=0)

    def step() -> None:
        learned.step(torch.randn(num, dtype=torch.float64), 0.1)
        draws.set_probabilities(learned.weights)
        for _ in draws.epoch(draws._number + 1, BATCH):
            pass

    def state() -> dict[str, Any]:
        return {"weights": learned.state_dict(), "draws": draws.state_dict()}

    kept = [learned.weights, learned.average, draws.probabilities, draws._owed, draws._taken, *draws._start]
    return step, state, kept


PARTS = {
    "tally": tally,
    "weights": weights,
    "search": search,
    "projection": projection,
    "order": order,
    "mixture": mixture,
}


def size_of(state: dict[str, Tensor]) -> int:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getbuffer().nbytes


def measure(name: str, num: int) -> dict:
    """Milliseconds of a step, the least of five measurements after a first step, and bytes."""
    torch.manual_seed(0)
    step, state, kept = PARTS[name](num)
    step()
    num_steps = STEPS if name in ("tally", "mixture") else 3
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(num_steps):
            step()
        seconds.append((time.perf_counter() - start) / num_steps)
    found = state()
    checkpoint = size_of(found) if found else 0
    return {
        "part": name,
        "size": num,
        "milliseconds": 1000 * min(seconds),
        "bytes": sum(tensor.nbytes for tensor in kept),
        "checkpoint_bytes": checkpoint,
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args(argv)
    rows_of_pool = (10**2, 10**3) if options.smoke else (10**5, 10**6, 10**7)
    domains = (4, 10) if options.smoke else (10, 100, 1000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [measure(name, num) for name in PARTS for num in (domains if name == "mixture" else rows_of_pool)]
    finally:
        torch.set_num_threads(threads)
    names = ("milliseconds", "bytes", "checkpoint_bytes")
    summary = {f"{name}/{row['part']}/{row['size']}": row[name] for row in rows for name in names}
    print_table(
        ["part", "size", "ms a step", "MB kept", "MB in a checkpoint"],
        [
            [row["part"], f"{row['size']:,}", f"{row['milliseconds']:.3f}"]
            + [f"{row[name] / 1e6:.1f}" for name in names[1:]]
            for row in rows
        ],
    )
    return write_report("scale", {"batch": BATCH, "threads": 1}, rows, summary, options.output)


if __name__ == "__main__":
    main()
