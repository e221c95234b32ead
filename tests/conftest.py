"""Offline, single-threaded, reproducible: set before anything imports transformers."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a stray download fails at once instead of being retried
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("hf_bilevel", derandomize=True, deadline=None, print_blob=False)
settings.register_profile("full", settings.get_profile("hf_bilevel"), derandomize=False, database=None)
settings.load_profile("hf_bilevel")


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> None:
    """Accelerate keeps the mixed precision of the first Accelerator of a process for all later ones."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def imports_are_no_garbage() -> None:
    """The Trainer collects garbage at every start, which looks through all that was imported: most of a short run."""
    gc.collect()
    gc.freeze()
