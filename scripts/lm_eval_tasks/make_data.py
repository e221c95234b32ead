"""Write held-out text as tasks of lm-eval that need no network: perplexity and cloze, for every domain and on average.

    python scripts/lm_eval_tasks/make_data.py --folder DATA [--text_files legal.txt medical.txt] [--skip_characters N]
    python scripts/evaluate_lm.py --models BASE TRAINED --data DATA --tasks held_out_perplexity cloze

Without files the domains are those of ``installed_text.py``. A script that trained on the first N characters of
``installed_text(M, S)`` has not seen what ``--num_characters M --seed S --skip_characters N`` writes. The folder works with
lm-eval's own command too (``lm_eval run --include_path DATA``); it is bound to its place, so make it again rather than move it.
"""

import json
import random
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from hf_bilevel.commands.recipe import parse

sys.path.insert(0, str(Path(__file__).parents[1]))
from installed_text import installed_text

TEMPLATES = Path(__file__).parent
NUM_CHOICES = 4


@dataclass
class DataArguments:
    """What to write where."""

    folder: str = field(metadata={"help": "Where to write."})
    text_files: list[str] | None = field(
        default=None, metadata={"help": "Text files, one for each domain, which is named after its file."}
    )
    num_characters: int = field(default=400_000, metadata={"help": "Characters to read of each domain."})
    skip_characters: int = field(default=0, metadata={"help": "Leave out so many of them, at the beginning."})
    num_rows: int = field(default=100, metadata={"help": "Rows of each domain, drawn at random."})
    row_length: int = field(default=1000, metadata={"help": "Characters of the longest row."})
    seed: int = field(default=0, metadata={"help": "Of what is drawn."})


def make_data(data: DataArguments) -> None:
    """Write every task as NAME.yaml beside its documents, NAME.jsonl."""
    if data.text_files is None:
        texts = installed_text(data.num_characters, data.seed)
    else:
        texts = {Path(file).stem: Path(file).read_text(encoding="utf-8") for file in data.text_files}
    documents = {}
    for domain, text in texts.items():
        rows = cut(text[data.skip_characters : data.num_characters], data.row_length)
        order = random.Random(f"{data.seed} {domain}")
        order.shuffle(rows)
        rows = rows[: data.num_rows]
        questions = cloze(rows, order)
        if not questions:
            raise SystemExit(
                f"`{domain}` has {len(rows)} rows of up to {data.row_length} characters after the first {data.skip_characters}, "
                f"which are too few for questions with {NUM_CHOICES} different answers. Give more text, or set another "
                "`--num_characters`, `--skip_characters` or `--row_length`."
            )
        documents["held_out_perplexity", domain] = [{"text": row} for row in rows]
        documents["cloze", domain] = questions
    folder = Path(data.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {"version": 1.0, "skip_characters": data.skip_characters, "seed": data.seed}
    for (kind, domain), rows in documents.items():
        file = folder / f"{kind}_{domain}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        task = {"task": file.stem, "dataset_kwargs": {"data_files": {"test": str(file)}}, "metadata": provenance}
        write_task(folder, file.stem, kind, task)
    for kind in ("held_out_perplexity", "cloze"):
        write_task(folder, kind, f"{kind}_group", {"group": kind, "task": [f"{kind}_{domain}" for domain in texts]})
    print(f"Wrote {len(documents)} tasks of {len(texts)} domains into {folder}: {', '.join(texts)}")


def write_task(folder: Path, name: str, template: str, settings: dict) -> None:
    common = yaml.safe_load((TEMPLATES / f"{template}.yaml").read_text(encoding="utf-8"))
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings | common, sort_keys=False), encoding="utf-8")


def cut(text: str, row_length: int) -> list[str]:
    """Cut text at white space into rows of half to all of a length."""
    rows = re.findall(rf"\S.{{{row_length // 2},{row_length - 1}}}(?=\s)", text, flags=re.DOTALL)
    return [row.strip() for row in rows]


def cloze(rows: list[str], order: random.Random) -> list[dict]:
    """Ask of every row which of four endings is its own; the others are of other rows."""
    parts = []
    for row in rows:
        start = re.match(r".*\S(?=\s)", row[: 3 * len(row) // 4], flags=re.DOTALL)  # up to the last white space
        if start is not None:
            parts.append((start[0], row[start.end() :]))
    endings = sorted({ending for _, ending in parts})
    if len(endings) < NUM_CHOICES:
        return []
    questions = []
    for context, ending in parts:
        choices = order.sample([other for other in endings if other != ending], NUM_CHOICES - 1)
        label = order.randrange(NUM_CHOICES)
        choices.insert(label, ending)
        questions.append({"context": context, "choices": choices, "label": label})
    return questions


def main(argv: list[str] | None = None) -> None:
    (data,) = parse(DataArguments, argv=argv, prog="make_data.py")
    make_data(data)


if __name__ == "__main__":
    main()
