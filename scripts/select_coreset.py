"""Find the subset of a fixed size that trains the best model, and train on it.

    accelerate launch scripts/select_coreset.py scripts/recipes/coreset_text_classification.yaml [--field value ...]

`--dry_run` says what it would cost, `--help` lists all fields. On one device `hf-bilevel coreset RECIPE.yaml` is the same.
"""

import sys

from hf_bilevel.commands.run import run


def main(argv: list[str] | None = None) -> None:
    run("coreset", sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
