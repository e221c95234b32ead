"""Learn a weight for every sample of a pool and train with it, with BROS.

    accelerate launch scripts/train_bros.py scripts/recipes/bros_vit.yaml [--field value ...]

`--dry_run` says what it would cost, `--help` lists all fields. On one device `hf-bilevel bros RECIPE.yaml` is the same.
"""

import sys

from hf_bilevel.commands.run import run


def main(argv: list[str] | None = None) -> None:
    run("bros", sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
