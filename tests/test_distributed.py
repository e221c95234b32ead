"""Two real processes with gloo. `accelerate launch --cpu --num_processes 2` would start one, so torchrun starts them."""

import subprocess
import sys
from pathlib import Path


def test_two_processes(tmp_path: Path) -> None:
    script = Path(__file__).parent / "two_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=500, cwd=script.parent
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]
    for case in ("vit", "llama", "bert", "lora"):
        assert f"{case}: passed" in output, output[-6000:]
