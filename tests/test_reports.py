"""What a method logs arrives at the trackers that `report_to` names, below `output_dir` and nowhere else."""

import json
import sqlite3
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_contract import METHODS, build

CURVES = {
    "blade": {"blade/excess_loss_mean", "blade/excess_loss_q50", "blade/selected_fraction", "blade/reference_loss"},
    "bros": {"bros/hypergradient_norm", "bros/target_loss", "bros/weight_mean", "bros/weight_std"},
    "mixture": {"mixture/weight/books", "mixture/weight/web", "mixture/hypergradient/code"},
    "coreset": {"coreset/upper_loss", "coreset/expected_size", "coreset/settled", "coreset/final_upper_loss"},
}

pytestmark = pytest.mark.filterwarnings("ignore:The subspaces of")  # a few steps cannot cover anything


@pytest.mark.parametrize("method", METHODS)
def test_tensorboard(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    build(method, "vit", tmp_path / "output", report_to="tensorboard").train()
    events = list((tmp_path / "output" / "runs").rglob("events.*"))
    assert len(events) == 1 and not any((tmp_path / "elsewhere").iterdir())
    written = EventAccumulator(str(events[0].parent))
    written.Reload()
    scalars = set(written.Tags()["scalars"])
    assert {f"train/{name}" for name in CURVES[method]} | {"train/loss"} <= scalars
    for name in CURVES[method] - {"coreset/final_upper_loss", "mixture/hypergradient/code", "blade/reference_loss"}:
        assert len(written.Scalars(f"train/{name}")) > 1, f"{name} is no curve"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_trackio(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    folder = Path(trackio.utils.TRACKIO_DIR)
    build(method, "vit", tmp_path / "output", report_to="trackio", project=f"of-{method}", run_name=method).train()
    with sqlite3.connect(folder / f"of-{method}.db") as database:
        logged = [json.loads(text) for (text,) in database.execute("select metrics from metrics")]
    assert {f"train/{name}" for name in CURVES[method]} <= set().union(*logged)
