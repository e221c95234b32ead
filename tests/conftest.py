"""Offline, single-threaded, reproducible: set before anything imports transformers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a stray download fails at once instead of being retried
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("hf_bilevel", derandomize=True, deadline=None, print_blob=False)
settings.load_profile("hf_bilevel")
