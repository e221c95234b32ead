"""Write how many cases were tried, by test, to the file that ``HF_BILEVEL_FUZZ_REPORT`` names."""

import json
import os
from pathlib import Path

import pytest
from fuzzing import CASES


def pytest_sessionfinish(session: pytest.Session) -> None:
    name = os.environ.get("HF_BILEVEL_FUZZ_REPORT")
    if name and CASES:
        path = Path(name)
        if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # each process has counted its own
            path = path.with_suffix(f".{worker}{path.suffix}")
        path.write_text(json.dumps({"total": CASES.total(), "tests": dict(sorted(CASES.items()))}, indent=2) + "\n")
