"""The scripts run, in this process, on few steps; the README shows what the committed results say."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    def load(name: str) -> ModuleType:
        folder = SCRIPTS / Path(name).parent
        monkeypatch.syspath_prepend(str(folder))
        sys.modules.pop(Path(name).name, None)
        return import_module(Path(name).name)

    return load


def test_readme_is_what_the_results_say(script) -> None:
    assert script("benchmarks/readme").main(["--check"]), "run scripts/benchmarks/readme.py"


def test_quickstart(script, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = script("quickstart").main(["--steps", "12", "--output", str(tmp_path / "quickstart")])
    assert set(report["summary"]) == {f"accuracy/{arm}" for arm in ("all", "random", "static", "blade", "clean")}
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "quickstart.json").read_text()) == json.loads(json.dumps(report))
    printed = capsys.readouterr().out
    assert "BLADE" in printed and "On your own data" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("noisy_labels", "gap_closed/blade"),
        ("overhead", "step_ratio/llama/blade_token"),
        ("memory", "scoring_over_naive"),
    ],
)
def test_benchmark_smoke(script, name: str, key: str, tmp_path: Path) -> None:
    output = tmp_path / f"{name}.json"
    report = script(f"benchmarks/{name}").main(["--smoke", "--output", str(output)])
    assert json.loads(output.read_text())["summary"] == report["summary"]
    assert key in report["summary"]
    assert {"benchmark", "date", "hardware", "versions", "config", "rows", "summary"} == set(report)
