"""Runs that are killed at random moments end as if nothing had happened; see faults.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_contract import METHODS

CASES = [("blade", 1, 2), *(pytest.param(m, n, 16 // n, marks=pytest.mark.slow) for m in METHODS for n in (1, 2))]


@pytest.mark.parametrize("method, num_processes, num_kills", CASES)
def test_killed_runs_resume_to_the_same_end(method: str, num_processes: int, num_kills: int) -> None:
    """In a process of its own: one that has run autograd or opened threads must not fork."""
    script = Path(__file__).parent / "faults.py"
    command = [sys.executable, str(script), method, str(num_processes), str(num_kills), "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=script.parent)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["kills"] == num_kills and report["runs"] >= 1
