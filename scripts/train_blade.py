"""Train on the samples or tokens of a pool that the model can still learn from, with BLADE.

    accelerate launch scripts/train_blade.py scripts/recipes/blade_sft.yaml [--field value ...]

`--dry_run` says what it would cost, `--help` lists all fields. On one device `hf-bilevel blade RECIPE.yaml` is the same.
"""

import sys

from hf_bilevel.commands.run import run


def main(argv: list[str] | None = None) -> None:
    run("blade", sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
