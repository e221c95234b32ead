"""Run the tests on the lowest versions that pyproject.toml allows, in a new environment.

    python scripts/lowest_versions.py FOLDER        # a network and some GB: old builds of torch are large

What follows `--` goes to pytest.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lowest() -> list[str]:
    """Pin the package's dependencies, and those of its tests, to their lower bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["test"]
    return ["{}=={}".format(*re.match(r"([\w.-]+)>=([\w.]+)", entry).groups()) for entry in needed]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the environment; made if it is not there")
    parser.add_argument("pytest", nargs="*", metavar="-- ARGUMENT", help="of pytest")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    constraints = options.folder / "versions.txt"
    constraints.write_text("\n".join(lowest()) + "\n", encoding="utf-8")
    python = options.folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(options.folder)], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, "-e", f"{ROOT}[test]"], check=True)
    return subprocess.run([python, "-m", "pytest", *options.pytest], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
