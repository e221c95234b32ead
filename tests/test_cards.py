"""Cards of selected subsets: what they say, that the Hub takes their header, and that text from facts stays text."""

import html
import re
from pathlib import Path
from typing import Any

import pytest
from hostile_text import EVIL
from hub_server import running_hub, validate_card
from huggingface_hub import DatasetCard
from hypothesis import given
from hypothesis import strategies as st

from hf_bilevel.cards import NOTES_BEGIN, dataset_card, escape_markdown

FACTS: dict[str, Any] = {
    "method": "bros",
    "trainer": "BrosTrainer",
    "config": {"rank": 0.125, "modules": None, "domain_names": ["web", "books"]},
    "seed": 3,
    "global_step": 400,
    "num_target": 200,
    "model": "me/model",
    "dataset": {"source": "me/pool", "revision": "0123abc"},
    "selection": {"fraction": 0.3},
    "search": {"num_outer_steps": 50, "entropy": 0.25},
    "versions": {"python": "3.11", "torch": "2.13"},
    "ranking": {"ranked_by": "sample weight", "edges": [0.0, 0.5, 1.0], "kept": [0, 300], "dropped": [600, 50]},
    "domains": {"names": ["web", "books"], "pool": [750, 250], "subset": [30, 270]},
    "metrics": {"eval_accuracy": 0.91234567, "eval_loss": 0.5},
    "controls": {"random": {"eval_accuracy": 0.8}, "all": {"eval_accuracy": 0.85, "f1": 0.7}},
}
WHOLE: dict[str, Any] = {
    "num_kept": 300,
    "num_pool": 1000,
    "fingerprint": "f00d",
    "columns": ["id", "weight"],
    "with_rows": True,
    "pictures": {"ranking": "ranking.png", "domains": "domains.png"},
}


def table_after(card: str, title: str) -> list[list[str]]:
    lines = card.split(title + "\n", 1)[1].lstrip("\n").split("\n")
    rows = [line for i, line in enumerate(lines) if all(other.startswith("|") for other in lines[: i + 1])]
    return [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows]


def test_the_card_says_what_the_facts_say() -> None:
    card = dataset_card("me/digits", FACTS, **WHOLE)
    assert (
        "300 of the 1,000 rows of a pool, selected by hf_bilevel with the method bros. The rows are in here." in card
    )
    about = dict(table_after(card, "## How it was selected"))
    assert about == {
        "": "", "---": "---", "Method": "bros", "Trainer": "BrosTrainer", "Rows kept": "300 of 1,000 (30.0%)",
        "Asked for": "fraction 0.3", "Search": "num_outer_steps 50, entropy 0.25", "Ranked by": "sample weight", "Rows without a rank": "50", "Pool": "me/pool",
        "Revision of the pool": "0123abc", "Fingerprint of the pool": "f00d", "Rows of the target dataset": "200",
        "Model": "me/model", "Seed": "3", "Optimizer steps": "400", "Versions": "python 3.11, torch 2.13",
    }  # fmt: skip
    config = dict(table_after(card, "](ranking.png)"))
    assert config == {
        "setting": "value",
        "---": "---",
        "rank": "0.125",
        "modules": "null",
        "domain_names": "web, books",
    }
    assert table_after(card, "## Domains")[2:] == [
        ["books", "250", "25.0%", "270", "90.0%"],
        ["web", "750", "75.0%", "30", "10.0%"],
    ]
    assert table_after(card, "## Results") == [
        ["", "eval_accuracy", "eval_loss", "f1"],
        ["---"] * 4,
        ["this run", "0.9123", "0.5", ""],
        ["random", "0.8", "", ""],
        ["all", "0.85", "", "0.7"],
    ]
    assert card.count("](ranking.png)") == card.count("](domains.png)") == 1
    assert 'rows = datasets.load_dataset("me/digits", split="train")' in card
    assert 'load_dataset("me/digits", "selection", split="train")  # id, weight\n' in card
    assert "No controls are recorded" not in card and card.endswith(f"in its order.\n\n{NOTES_BEGIN}\n")


def test_what_is_not_known_is_left_out() -> None:
    bare = {**WHOLE, "with_rows": False, "pictures": {}, "fingerprint": None}
    card = dataset_card("digits", {}, **bare)
    assert table_after(card, "## How it was selected")[2:] == [["Rows kept", "300 of 1,000 (30.0%)"]]
    for absent in ("None", "null", "## Domains", "## Results", ".png", "data/train", "setting", "rows = datasets"):
        assert absent not in card
    assert "Their numbers are in here, the rows are not." in card
    assert "nothing here shows that it is better than as many rows at random" in card


@pytest.mark.parametrize(
    ("num", "size"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (9999, "1K<n<10K"),
        (10_000, "10K<n<100K"),
        (10**7, "10M<n<100M"),
    ],
)
def test_size_category(num: int, size: str) -> None:
    card = DatasetCard(dataset_card("me/x", FACTS, **{**WHOLE, "num_kept": num, "num_pool": 10**8}))
    assert card.data.size_categories == [size]


@pytest.mark.parametrize("with_rows", [True, False])
def test_the_header_is_one_that_the_hub_accepts(
    with_rows: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = dataset_card("me/2024", FACTS, **{**WHOLE, "with_rows": with_rows})
    card = DatasetCard(text)  # huggingface_hub's own parser
    assert validate_card(text) == [] and str(card) == text
    names = [config["config_name"] for config in card.data.configs]
    assert names == (["rows", "selection"] if with_rows else ["selection"])
    assert [config.get("default", False) for config in card.data.configs] == [True, False][: len(names)]
    assert card.data.pretty_name == "2024"  # text, although YAML would take it for a number
    with running_hub(monkeypatch, tmp_path):
        card.validate()  # through the client's request to the Hub
        with pytest.raises(ValueError, match="size 'huge'"):
            DatasetCard(text.replace("n<1K", "huge")).validate()


@pytest.mark.parametrize("repo_id", ["a/b/c", "me/a b", "me/x\n---", "me/`x`", "-x", 'me/x")\nimport os'])
def test_names_that_are_no_repository_are_refused(repo_id: str) -> None:
    with pytest.raises(ValueError, match="[Rr]epo id"):
        dataset_card(repo_id, FACTS, **WHOLE)


# Text that is not ours -------------------------------------------------------------------------------------------------


@given(st.text())
def test_escaped_text_is_read_as_it_was_and_marks_up_nothing(text: str) -> None:
    escaped = escape_markdown(text)
    assert not set(re.sub(r"&#\d+;", "", escaped)) & set('|`<>&[]{}*#~!\\$:@"\n\r')
    assert not re.search(r"(?<!\w)_|_(?!\w)", escaped)
    entities = re.sub(r"&#(\d+);", lambda match: chr(int(match[1])), escaped)
    assert entities == " ".join(text.split())


def replaced(value: Any, text: str) -> Any:
    """The facts with every string, keys included, set to ``text``; keys get a number so that they stay different."""
    if isinstance(value, dict):
        return {
            key if known(key) else f"{text}{i}": replaced(entry, text) for i, (key, entry) in enumerate(value.items())
        }
    if isinstance(value, list):
        return [replaced(entry, text) for entry in value]
    return text if isinstance(value, str) else value


def known(key: str) -> bool:
    return key in FACTS or key in {*FACTS["ranking"], *FACTS["domains"], *FACTS["dataset"]}


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_in_the_facts_is_taken_for_markup(evil: str) -> None:
    plain = dataset_card("me/x", replaced(FACTS, "AAA"), **{**WHOLE, "fingerprint": "AAA"})
    card = dataset_card("me/x", replaced(FACTS, evil), **{**WHOLE, "fingerprint": evil})
    assert plain.count("AAA") > 20
    assert card.replace(escape_markdown(evil), "AAA").splitlines() == plain.splitlines()
    assert validate_card(card) == []


def test_long_values_are_cut() -> None:
    facts = {"config": {"names": [f"name {i}" for i in range(1000)]}}
    cell = dict(table_after(dataset_card("me/x", facts, **{**WHOLE, "pictures": {}}), "| setting | value |"))["names"]
    assert cell.startswith("name 0, name 1,") and len(html.unescape(cell)) == 200 and html.unescape(cell)[-1] == "…"
