"""A long run of a tiny model: do memory and open files stay as they are?

python tests/soak.py METHOD STEPS
"""

import gc
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
from test_contract import METHODS
from tiny import make_dataset, make_model, make_trainer
from transformers import TrainerCallback

MODELS = {"blade": "llama", "bros": "vit", "mixture": "vit", "coreset": "vit"}
POINTS = 20


class Gauge(TrainerCallback):
    """Notes resident memory and open files at equal distances."""

    def __init__(self, every: int) -> None:
        self.every, self.process = every, psutil.Process(os.getpid())
        self.megabytes: list[float] = []
        self.files: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            gc.collect()
            self.megabytes.append(round(self.process.memory_info().rss / 2**20, 2))
            self.files.append(self.process.num_fds())


def soak(method: str, num_steps: int, folder: Path) -> dict[str, Any]:
    """Train for many steps, with checkpoints, evaluations and logs on the way.

    Returns:
        Steps, megabytes and open files at ``POINTS`` points; growth is the median of the last quarter less that of the second,
        when everything has been allocated.
    """
    trainer_class, _, settings, _ = METHODS[method]
    gauge = Gauge(max(1, num_steps // POINTS))
    trainer = make_trainer(
        trainer_class,
        MODELS[method],
        folder,
        model=make_model(MODELS[method], dropout=0.1),
        max_steps=num_steps,
        logging_steps=max(1, num_steps // 10),
        save_strategy="steps",
        save_steps=max(1, num_steps // 10),
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=max(1, num_steps // 10),
        trainer_kwargs={
            "target_dataset": make_dataset(MODELS[method], 10, seed=7),
            "eval_dataset": make_dataset(MODELS[method], 16, seed=8),
            "bilevel_config": trainer_class.config_class(**settings),
            "callbacks": [gauge],
        },
    )
    trainer.train()
    quarter = len(gauge.megabytes) // 4
    early, late = (
        torch.tensor(part).median() for part in (gauge.megabytes[quarter : 2 * quarter], gauge.megabytes[-quarter:])
    )
    return {
        "steps": num_steps,
        "megabytes": gauge.megabytes,
        "growth_in_megabytes": round(float(late - early), 2),
        "open_files": [min(gauge.files[quarter:]), max(gauge.files[quarter:])],
    }


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(soak(sys.argv[1], int(sys.argv[2]), Path(folder))))


if __name__ == "__main__":
    main()
