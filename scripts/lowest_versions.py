"""Run the tests on the lowest versions that pyproject.toml allows, in a new environment.

    python scripts/lowest_versions.py FOLDER                    # Python 3.11 or newer, a network and some GB: old builds of torch are large
    python scripts/lowest_versions.py FOLDER --only transformers accelerate
    python scripts/lowest_versions.py FOLDER --newest           # and on the newest

`--only` lowers these packages alone and takes the others as constraints.txt pins them. What follows `--` goes to pytest.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]


def lowest(extras: list[str]) -> dict[str, str]:
    """Read the lower bounds of the package and of some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = project["dependencies"] + [entry for extra in extras for entry in project["optional-dependencies"][extra]]
    found = dict(re.match(r"([\w.-]+)>=([\w.]+)", entry).groups() for entry in needed)
    # A bound such as 2.8 names the release 2.8.0; pip reads `==2.8` as that.
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the environment; made if it is not there")
    parser.add_argument("--only", nargs="*", default=None, metavar="PACKAGE")
    parser.add_argument("--newest", action="store_true", help="as new as is allowed, torch as in constraints.txt")
    parser.add_argument("pytest", nargs="*", metavar="-- ARGUMENT", help="of pytest")
    options = parser.parse_args(argv)

    bounds = lowest(["test"])
    unknown = sorted(set(options.only or ()) - set(bounds))
    if unknown:
        parser.error(
            f"no lower bound of {', '.join(unknown)} in pyproject.toml; there are those of {', '.join(bounds)}"
        )
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if options.newest:
        pins = [line for line in pins if line.startswith("torch==")]
    else:
        lowered = {name: bounds[name] for name in (bounds if options.only is None else options.only)}
        # What others need of a package that is lowered is theirs to say, so all other pins go unless only some are lowered.
        kept = [] if options.only is None else [line for line in pins if re.split("[=<>!~ ]", line)[0] not in lowered]
        pins = [*kept, *(f"{name}=={version}" for name, version in lowered.items())]
    options.folder.mkdir(parents=True, exist_ok=True)
    constraints = options.folder / "versions.txt"
    constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")

    python = options.folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(options.folder)], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, "-e", f"{ROOT}[test]"], check=True)
    names = "torch transformers accelerate datasets peft trl huggingface_hub numpy".split()
    subprocess.run(
        [python, "-c", f"from importlib.metadata import version\nfor n in {names}: print(n, version(n))"], check=True
    )
    return subprocess.run([python, "-m", "pytest", *options.pytest], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
