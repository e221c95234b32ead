"""Learn how much of each domain to train on.

    accelerate launch scripts/train_mixture.py scripts/recipes/mixture_pretraining.yaml [--field value ...]

`--dry_run` says what it would cost, `--help` lists all fields. On one device `hf-bilevel mixture RECIPE.yaml` is the same.
"""

import sys

from hf_bilevel.commands.run import run


def main(argv: list[str] | None = None) -> None:
    run("mixture", sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
