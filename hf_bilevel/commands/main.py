"""The console command ``hf-bilevel``."""

import sys

from hf_bilevel.commands.recipe import nearest
from hf_bilevel.commands.run import COMMANDS, run


def main(argv: list[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: ``COMMAND RECIPE.yaml [--field value ...]``; that of the process if None.

    Raises:
        SystemExit: If there is no such command, or one of its settings is refused.

    Example:
        >>> main(["blad"])
        Traceback (most recent call last):
        SystemExit: hf-bilevel: `blad` is not a command. Do you mean `blade`?
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("Usage: hf-bilevel COMMAND RECIPE.yaml [--field value ...]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<8} {command.help}")
        print("\n`hf-bilevel COMMAND --help` lists all fields, `--dry_run` says what a run would cost.")
        print("On several devices: `accelerate launch scripts/train_blade.py RECIPE.yaml`, and the like.")
    elif argv[0] in COMMANDS:
        run(argv[0], argv[1:])
    else:
        raise SystemExit(f"hf-bilevel: `{argv[0]}` is not a command.{nearest(argv[0], COMMANDS)}")
