"""A fork server for runs that get killed: the imports are paid once, and a run of a tiny model takes a second.

A run is killed with SIGKILL (all of its processes) at a random moment, started again in the same folder with
``resume_from_checkpoint=True``, killed again, and so on until one start gets to the end. What it ends with must be what an
uninterrupted run ends with, bit for bit: parameters, logged losses, and what the method has learned.

A moment is drawn from the whole run (``any``), or from the writing of a checkpoint, or from the training of a reference or the
search of a coreset (``inner``), or it is the one after the last checkpoint (``end``).
"""

import hashlib
import json
import mmap
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from test_contract import METHODS
from tiny import make_dataset, make_model, make_trainer
from transformers import Trainer, set_seed

MODELS = {"blade": "llama", "bros": "vit", "mixture": "vit", "coreset": "vit"}
STARTING, TRAINING, CHECKPOINT, INNER, ENDED = range(5)  # what a process says it is doing
MODES = {"checkpoint": CHECKPOINT, "inner": INNER}
PHASES = ("starting", "training", "checkpoint", "inner")
MAX_STEPS, SAVE_STEPS = 10, 2


def build(method: str, folder: Path, num_processes: int) -> Trainer:
    trainer_class, _, settings, _ = METHODS[method]
    name = MODELS[method]
    return make_trainer(
        trainer_class,
        name,
        folder,
        model=make_model(name, dropout=0.1),
        per_device_train_batch_size=8 // num_processes,
        max_steps=MAX_STEPS,
        logging_steps=1,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        ddp_backend="gloo" if num_processes > 1 else None,
        trainer_kwargs={
            "target_dataset": make_dataset(name, 10, seed=7),
            "bilevel_config": trainer_class.config_class(**settings),
        },
    )


def outcome(method: str, trainer: Trainer) -> dict[str, Any]:
    """Digests of what a run ends with."""
    found: dict[str, Any] = {"parameters": list(trainer.model.parameters())}
    if method == "blade":
        found["tally"] = list(trainer.sample_tally.state_dict().values())
    elif method == "bros":
        found["weights"] = list(trainer.sample_weights)
    elif method == "mixture":
        found["weights"] = [torch.tensor(list(trainer.domain_weights.values()), dtype=torch.float64)]
    else:
        found["subset"] = [trainer.selected_subset().ids, trainer.selected_subset().probabilities]
    digests = {key: digest(tensors) for key, tensors in found.items()}
    losses = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    return {**digests, "losses": losses}


def digest(tensors: list[torch.Tensor]) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return content.hexdigest()


def run(method: str, folder: Path, status: mmap.mmap, rank: int, num_processes: int) -> None:
    """Start or resume, in a process of its own, and write the outcome when it is over."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    trainer = watched(build(method, folder, num_processes), status, rank)
    set_seed(11)
    try:
        trainer.train(resume_from_checkpoint=True)
    except ValueError as error:
        if "No checkpoint in" not in str(error) and "no search to resume" not in str(error):
            raise
        trainer = watched(build(method, folder, num_processes), status, rank)
        set_seed(11)
        trainer.train()
    if num_processes > 1:
        dist.barrier()
    if rank == 0:
        (folder / "outcome.json").write_text(json.dumps(outcome(method, trainer)))
    if num_processes > 1:
        dist.destroy_process_group()


def watched(trainer: Trainer, status: mmap.mmap, rank: int) -> Trainer:
    """Let a trainer say what it is doing."""

    def say(name: str, phase: int) -> None:
        call = getattr(trainer, name, None)
        if call is None:
            return

        def calling(*args: Any, **kwargs: Any) -> Any:
            before, status[rank] = status[rank], phase
            try:
                return call(*args, **kwargs)
            finally:
                status[rank] = before

        setattr(trainer, name, calling)

    say("_inner_training_loop", TRAINING)
    say("_save_checkpoint", CHECKPOINT)
    say("_train_reference", INNER)
    say("search", INNER)
    return trainer


@dataclass
class Start:
    """The processes of one start of a run."""

    method: str
    folder: Path
    num_processes: int = 1
    pids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.status = mmap.mmap(-1, self.num_processes)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self.num_processes):
            pid = os.fork()
            if pid == 0:
                self._be(rank, port)
            self.pids.append(pid)
        self.begun = time.monotonic()

    def _be(self, rank: int, port: int) -> None:
        code = 1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            log = os.open(self.folder.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if self.num_processes > 1:
                names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
                values = (rank, rank, self.num_processes, self.num_processes, "127.0.0.1", port)
                os.environ.update(zip(names, map(str, values), strict=True))
            run(self.method, self.folder, self.status, rank, self.num_processes)
            self.status[rank] = ENDED
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def is_over(self) -> bool:
        """Say whether the last checkpoint is there."""
        return (self.folder / f"checkpoint-{MAX_STEPS}" / "trainer_state.json").exists()

    def wait_for(self, mode: str, seconds: float) -> bool:
        """Wait until the first process is where the mode says; False if it ends, or the time is over, before."""
        while time.monotonic() - self.begun < seconds:
            if self.is_over() if mode == "end" else self.status[0] == MODES[mode]:
                return True
            if self.status[0] == ENDED:
                return False
            time.sleep(0.0005)
        return False

    def wait(self, seconds: float = 120.0) -> bool:
        """Wait for the end; False if a process failed or hangs."""
        codes = {}
        while len(codes) < self.num_processes and time.monotonic() - self.begun < seconds:
            for pid in [pid for pid in self.pids if pid not in codes]:
                done, code = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = code
            if any(codes.values()):
                break
            time.sleep(0.002)
        self.pids = [pid for pid in self.pids if pid not in codes]
        for pid in self.pids:  # which wait for one that failed, or for ever
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return len(codes) == self.num_processes and not any(codes.values())

    def kill(self) -> int:
        """Kill what still runs, and say what its first process was doing."""
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)  # all at one moment: none shall notice that another is gone
        phase = self.status[0]
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        self.pids = []
        assert all(code in (0, -signal.SIGKILL) for code in codes), f"{self.method} failed by itself:\n{self.log()}"
        return phase

    def log(self) -> str:
        files = sorted(self.folder.parent.glob(f"{self.folder.name}.*.log"))
        return "\n".join(file.read_text(errors="replace")[-3000:] for file in files)


def finish(start: Start) -> dict[str, Any]:
    """Wait for a start that nobody kills."""
    if not start.wait():
        raise AssertionError(f"{start.method}, {start.num_processes} processes, failed or hangs:\n{start.log()}")
    return json.loads((start.folder / "outcome.json").read_text())


def kill_and_resume(method: str, num_processes: int, num_kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill runs of a method until so many kills have been survived.

    Returns:
        Kills by phase, and the number of interrupted runs that got to their end, all of them with the uninterrupted outcome.

    Raises:
        AssertionError: If a resumed run fails, hangs or ends with something else.
    """
    draw = random.Random(seed)
    whole = Start(method, folder / "whole", num_processes)
    expected = finish(whole)
    duration = time.monotonic() - whole.begun
    kills: Counter[str] = Counter()
    runs = 0
    while kills.total() < num_kills:
        runs += 1
        place, before = folder / f"run-{runs}", kills.total()
        while True:
            start = Start(method, place, num_processes)
            mode = draw.choice(("any", "inner", *MODES, "end"))
            if mode == "end" and not start.is_over():
                start.wait_for(mode, duration)
            elif mode in MODES and start.wait_for(mode, draw.random() * duration):
                for _ in range(draw.randrange(3)):  # not always the first of a start
                    time.sleep(draw.random() * duration / MAX_STEPS)
                    start.wait_for(mode, duration)
                time.sleep(draw.random() * 0.04)
            else:
                time.sleep(max(0.0, draw.random() * duration - (time.monotonic() - start.begun)))
            enough = kills.total() >= num_kills or kills.total() - before >= 8  # let every run get to an end
            if enough or start.status[0] == ENDED:
                found = finish(start)
                break
            if (phase := start.kill()) != ENDED:
                kills[PHASES[phase]] += 1
        different = [key for key in expected if found[key] != expected[key]]
        losses = [pair for pair in zip_longest(expected["losses"], found["losses"]) if pair[0] != pair[1]]
        where = f"{method}, {num_processes} processes, run {runs} ({dict(kills)})"
        assert not different, f"{where}: {different} differ; losses, expected and found: {losses}"
    return {"kills": kills.total(), "during": dict(sorted(kills.items())), "runs": runs}


def main() -> None:
    """Kill runs of one method: METHOD PROCESSES KILLS SEED."""
    method, num_processes, num_kills, seed = sys.argv[1], *map(int, sys.argv[2:5])
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(kill_and_resume(method, num_processes, num_kills, seed, Path(folder))))


if __name__ == "__main__":
    main()
