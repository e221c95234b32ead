"""Bytes that a process gives to collectives, on two gloo processes: JSON, a line for each method.

torchrun --standalone --nproc_per_node 2 tests/traffic.py [METHOD ...]

A step that only trains, what a phase (of a reference or of weights), a log entry and a checkpoint add to one, and what is sent
before the first step are told apart. Models and pools of the tests are tiny, so what counts is bytes per parameter and per row.
"""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from tiny import make_dataset, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from hf_bilevel import (
    BladeConfig,
    BladeTrainer,
    BrosConfig,
    BrosTrainer,
    CoresetConfig,
    CoresetTrainer,
    MixtureConfig,
    MixtureTrainer,
)

NUM_POOL, STEPS, LOGGED, SAVED = 2048, 12, 6, 10
PHASE = 4  # steps between two reference phases, or updates of weights
# What a process sends in: the output of a gather is not counted, it is the inputs of all.
SENT = {"allreduce_": 0, "broadcast_": 0, "allgather_": 1, "_allgather_base_": 1}
METHODS: dict[str, tuple[type[Trainer], Any]] = {
    "plain": (Trainer, None),
    "plain_token": (Trainer, None),
    "blade": (BladeTrainer, BladeConfig(selection_ratio=0.5, sync_steps=PHASE, reference_steps=1, penalty=0.5)),
    "blade_token": (BladeTrainer, BladeConfig(selection_ratio=0.5, sync_steps=PHASE, reference_steps=1, penalty=0.5)),
    "bros": (BrosTrainer, BrosConfig(rank=4, refresh_steps=STEPS)),
    "bros_network": (BrosTrainer, BrosConfig(rank=4, refresh_steps=STEPS, upper_variable="network", start_step=0)),
    "bros_domain": (
        BrosTrainer,
        BrosConfig(rank=4, refresh_steps=STEPS, upper_variable="domain", domain_column="source"),
    ),
    "mixture": (MixtureTrainer, MixtureConfig(inner_steps=PHASE, reference_steps=1, domain_column="source")),
    "coreset": (CoresetTrainer, CoresetConfig(size=NUM_POOL // 2, outer_steps=STEPS, inner_steps=1, num_masks=4)),
}


class Traffic(TorchDispatchMode):
    """Adds up the bytes given to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and not func.__name__.startswith("barrier"):
            tensors = args[SENT[func.__name__.split(".")[0]]]
            self.bytes += sum(t.nbytes for t in (tensors if isinstance(tensors, (list, tuple)) else [tensors]))
        return func(*args, **(kwargs or {}))


class Marks(TrainerCallback):
    """What had been sent at the end of each step; logging and saving follow it, and count for the next."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic, self.sent = traffic, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.sent.append(self.traffic.bytes)

    def on_step_end(self, args, state, control, **kwargs):
        self.sent.append(self.traffic.bytes)


def measure(method: str, folder: Path) -> dict[str, float]:
    """Bytes by occasion, with the numbers of parameters and of rows that they depend on."""
    trainer_class, config = METHODS[method]
    name = "llama" if method.endswith("token") else "vit"
    extra = {} if config is None else {"target_dataset": make_dataset(name, 10, seed=7), "bilevel_config": config}
    trainer = make_trainer(
        trainer_class,
        name,
        folder,
        num_pool=NUM_POOL,
        ddp_backend="gloo",
        max_steps=STEPS,
        per_device_train_batch_size=4,
        logging_steps=LOGGED,
        save_strategy="steps",
        save_steps=SAVED,
        trainer_kwargs=extra,
    )
    traffic = Traffic()
    marks = Marks(traffic)
    trainer.add_callback(marks)
    with traffic:
        trainer.train()
    begin, *ends = marks.sent
    steps = [end - start for start, end in zip(marks.sent, ends, strict=False)]
    after = {LOGGED, SAVED, *range(0, STEPS, PHASE)}
    step = median(sent for k, sent in enumerate(steps) if k not in after)
    return {
        "before": begin,
        "step": step,
        "phase": steps[2 * PHASE] - step,
        "log": steps[LOGGED] - step,
        "checkpoint": steps[SAVED] - step,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "rows": NUM_POOL,
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for method in sys.argv[1:] or METHODS:
            found = measure(method, Path(folder) / method)
            if dist.get_rank() == 0:
                print(json.dumps({"method": method, **found}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
