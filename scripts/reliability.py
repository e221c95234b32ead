"""Kill, soak and fuzz: what `docs/reliability.md` promises, counted.

    pip install "hf_bilevel[test]"
    python scripts/reliability.py                       # everything, about an hour on one core
    python scripts/reliability.py --parts kills --kills 4 --kills_of_two 2

Parts:
    kills   SIGKILL at random moments, checkpoints and inner phases among them; what resumes must end as if uninterrupted,
            bit for bit. `--kills` of each method in one process, `--kills_of_two` in two (tests/faults.py).
    soak    a long run of each method: resident memory and open files over the steps (tests/soak.py).
    fuzz    random configs, batches, datasets and files (tests/fuzz, profile "full").
    cells   how many cells of docs/compatibility.md are tested, refused and not tested, after running every test named there.
    traffic bytes that each method gives to collectives (tests/traffic.py).

A part that fails stops the script and leaves the file as it was. The results of parts that are not run are kept. The tables of
the page are written from the file.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))

from report import write_report  # noqa: E402

METHODS = {"blade": "BLADE", "bros": "BROS", "mixture": "Mixture", "coreset": "Coreset"}
PAGE = ROOT / "docs" / "reliability.md"
OCCASIONS = {
    "before": "before the first step",
    "step": "a step",
    "phase": "a phase adds",
    "log": "a log entry adds",
    "checkpoint": "a checkpoint adds",
}
PHASES = {
    "starting": "starting and loading",
    "training": "between and in steps",
    "checkpoint": "writing a checkpoint",
    "inner": "training a reference, or searching",
}
PARTS = ("kills", "soak", "fuzz", "cells", "traffic")
NAMED_TEST = re.compile(r"`(?P<file>test_\w+\.py)::(?P<test>test_\w+)`")


def call(command: list[str], **environment: str) -> str:
    """Run a command of the tests and return what it printed; if it fails, say what it said."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    result = subprocess.run(command, cwd=ROOT / "tests", env=variables, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(result.stdout + result.stderr)[-5000:]}")
    return result.stdout


def kills(options: argparse.Namespace) -> list[dict]:
    rows = []
    for method in METHODS:
        for num_processes, num in ((1, options.kills), (2, options.kills_of_two)):
            arguments = map(str, (method, num_processes, num, options.seed))
            found = json.loads(call([sys.executable, "faults.py", *arguments]).splitlines()[-1])
            rows.append({"part": "kills", "method": method, "processes": num_processes, **found})
            print(rows[-1], flush=True)
    return rows


def soak(options: argparse.Namespace) -> list[dict]:
    rows = []
    for method in METHODS:
        found = json.loads(call([sys.executable, "soak.py", method, str(options.steps)]).splitlines()[-1])
        rows.append({"part": "soak", "method": method, **found})
        print({key: value for key, value in rows[-1].items() if key != "megabytes"}, flush=True)
    return rows


def fuzz(options: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "fuzz.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-n",
            "0",
            "fuzz",
            "--hypothesis-profile",
            "full",
        ]
        print(call(command, HF_BILEVEL_FUZZ_REPORT=str(report)).splitlines()[-1])
        counts = json.loads(report.read_text())["tests"]
    return [{"part": "fuzz", "test": test, "cases": cases} for test, cases in counts.items()]


def cells(options: argparse.Namespace) -> list[dict]:
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    files = {path.name: path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    named = sorted({f"{files[found['file']]}::{found['test']}" for found in NAMED_TEST.finditer(page)})
    # Also the slow ones, which the project's own settings leave out.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "-m", "not gpu", *named]
    outcome = call(command).splitlines()[-1]
    print(outcome)
    cases = {kind: int(num) for num, kind in re.findall(r"(\d+) (passed|skipped)", outcome)}
    rows = []
    for line in page.splitlines():
        entries = [entry.strip() for entry in line.strip("|").split("|")]
        if line.startswith("| ") and len(entries) == 5 and entries[0]:
            for method, entry in zip(METHODS, entries[1:], strict=True):
                kind = next((kind for kind in ("refused", "not tested", "tested") if entry.startswith(kind)), "said")
                kind = "tested" if kind == "said" and ("::" in entry or entry.startswith("the same")) else kind
                rows.append({"part": "cells", "feature": entries[0], "method": method, "kind": kind})
    return [*rows, {"part": "cells", "kind": "tests", "num": len(named), **cases}]


def traffic(options: argparse.Namespace) -> list[dict]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "traffic.py"]
    found = [json.loads(line) for line in call(command).splitlines() if line.startswith('{"method"')]
    return [{"part": "traffic", **row} for row in found]


def summarise(rows: list[dict]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for row in rows:
        if row["part"] == "kills":
            for key, num in (("kills", row["kills"]), ("runs", row["runs"])):
                name = f"{key}/{row['method']}/{row['processes']}"
                summary[name] = summary.get(name, 0) + num
            for phase, num in row["during"].items():
                summary[f"kills_during/{phase}"] = summary.get(f"kills_during/{phase}", 0) + num
            summary["kills"] = summary.get("kills", 0) + row["kills"]
        elif row["part"] == "soak":
            summary[f"soak_growth_in_megabytes/{row['method']}"] = row["growth_in_megabytes"]
            summary["soak_steps"] = summary.get("soak_steps", 0) + row["steps"]
        elif row["part"] == "fuzz":
            summary["fuzz_cases"] = summary.get("fuzz_cases", 0) + row["cases"]
        elif row["part"] == "traffic":
            for occasion in OCCASIONS:
                summary[f"traffic/{row['method']}/{occasion}"] = row[occasion]
        elif row["kind"] == "tests":
            summary["cells/tests_run"] = row["num"]
        else:
            summary[f"cells/{row['kind']}"] = summary.get(f"cells/{row['kind']}", 0) + 1
    return summary


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def kills_table(rows: list[dict], summary: dict[str, float]) -> str:
    lines = []
    for method, name in METHODS.items():
        one, two = (
            f"{summary.get(f'kills/{method}/{n}', 0)} in {summary.get(f'runs/{method}/{n}', 0)} runs" for n in (1, 2)
        )
        lines.append([name, one, two])
    during = ", ".join(f"{summary.get(f'kills_during/{phase}', 0)} while {words}" for phase, words in PHASES.items())
    head = table(["", "kills survived, one process", "two processes"], lines)
    return f"{head}\n\n{summary['kills']} kills: {during}. No run ended with another bit than the uninterrupted one."


def soak_table(rows: list[dict], summary: dict[str, float]) -> str:
    lines = [
        [
            METHODS[row["method"]],
            f"{row['steps']:,}",
            f"{row['megabytes'][-1]:,.0f}",
            f"{row['growth_in_megabytes']:+.2f}",
            f"{row['open_files'][0]} to {row['open_files'][1]}",
        ]
        for row in rows
        if row["part"] == "soak"
    ]
    return table(["", "steps", "resident memory, MiB", "last quarter less second, MiB", "open files"], lines)


def fuzz_table(rows: list[dict], summary: dict[str, float]) -> str:
    lines = [[f"`{row['test']}`", f"{row['cases']:,}"] for row in rows if row["part"] == "fuzz"]
    return table(["test", "cases"], [*lines, ["all", f"{summary['fuzz_cases']:,}"]])


def cells_table(rows: list[dict], summary: dict[str, float]) -> str:
    kinds = ("tested", "refused", "not tested")
    counts = {
        method: [sum(1 for row in rows if (row.get("method"), row.get("kind")) == (method, kind)) for kind in kinds]
        for method in METHODS
    }
    cells = table(["", *kinds], [[METHODS[method], *values] for method, values in counts.items()])
    num = summary.get("cells/tests_run")
    (tests,) = (row for row in rows if row.get("kind") == "tests")
    ran = [f"{tests[kind]} cases {kind}" for kind in ("passed", "skipped") if kind in tests]
    outcome = ", ".join([*ran, "none failed"])
    return (
        f"{cells}\n\n{num} tests were named in these cells when they were counted and run: {outcome}. What needs an accelerator is left "
        "out, and what needs a package that is not there is skipped."
    )


def traffic_table(rows: list[dict], summary: dict[str, float]) -> str:
    lines = [
        [f"`{row['method']}`", *(f"{row[occasion]:,.0f}" for occasion in ("parameters", *OCCASIONS))]
        for row in rows
        if row["part"] == "traffic"
    ]
    return table(["", "parameters", *OCCASIONS.values()], lines)


RUN = {"kills": kills, "soak": soak, "fuzz": fuzz, "cells": cells, "traffic": traffic}
TABLES = {"kills": kills_table, "soak": soak_table, "fuzz": fuzz_table, "cells": cells_table, "traffic": traffic_table}


def render(report: dict) -> str:
    text = PAGE.read_text(encoding="utf-8")
    for part, write in TABLES.items():
        if any(row["part"] == part for row in report["rows"]):
            content = write(report["rows"], report["summary"])
            pattern = rf"(<!-- {part}: [^\n]*-->\n).*?(<!-- /{part} -->)"
            text, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.DOTALL)
            if count != 1:
                raise SystemExit(f"{PAGE} has {count} places for the table {part}, expected one.")
    return text


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--kills", type=int, default=40, help="of each method in one process")
    parser.add_argument("--kills_of_two", type=int, default=12, help="of each method in two processes")
    parser.add_argument("--steps", type=int, default=1000, help="of a soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(ROOT / "docs" / "reliability.json"))
    options = parser.parse_args(argv)
    output = Path(options.output)
    before = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"rows": [], "config": {}}
    rows, config = before["rows"], before["config"]
    for part in options.parts:
        found = RUN[part](options)
        rows = [row for row in rows if row["part"] != part] + found
        config |= {"kills": {"seed": options.seed}} if part == "kills" else {}
        rows.sort(key=lambda row: PARTS.index(row["part"]))
        report = write_report("reliability", config, rows, summarise(rows), options.output)
    if output.resolve() == (PAGE.parent / "reliability.json").resolve():
        PAGE.write_text(render(report), encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
