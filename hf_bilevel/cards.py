"""Cards, written from recorded facts: a section of model cards, and the card of a selected subset."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import DatasetCardData
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

TEMPLATE = Path(__file__).parent / "templates" / "dataset_card.md.jinja"

ROWS_PATH, SELECTION_PATH = "data/train-00000-of-00001.parquet", "subset.parquet"

MAX_VALUE = 200

_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


def escape_markdown(value: Any) -> str:
    r"""Write text that is not ours so that a Markdown table, a heading or a sentence shows it and nothing else happens.

    Everything but letters, digits, spaces and harmless punctuation becomes a character reference, which Markdown never
    reads as markup; line breaks become spaces.

    Args:
        value: What to write; ``markupsafe.Markup`` is trusted and comes back as it is.

    Returns:
        The text.

    Example:
        >>> escape_markdown("a|b <i> `c`\n---")
        'a&#124;b &#60;i&#62; &#96;c&#96; ---'
        >>> escape_markdown("per_device")
        'per_device'
    """
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split())
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])|[^\w .,/+=%()'-]", lambda match: f"&#{ord(match[0])};", text)


def mixture_section(
    shares: Mapping[str, float], mixture: Mapping[str, float], inner_steps: int, picture: str | None
) -> str:
    """Write what was learned about the domains.

    Args:
        shares: Share of every domain in the pool; empty where it is not known (streams).
        mixture: Learned weight of every domain.
        inner_steps: Optimizer steps between two updates of the weights.
        picture: File name of the picture of the weights over time, beside the card; None without one.

    Returns:
        Markdown.

    Example:
        >>> print(mixture_section({"web": 0.9, "books": 0.1}, {"web": 0.4, "books": 0.6}, 50, None))
        ## Learned mixture
        <BLANKLINE>
        Learned by hf_bilevel's `MixtureTrainer`, the weights moving every 50 optimizer steps.
        <BLANKLINE>
        | domain | share of the pool | learned weight |
        |---|---|---|
        | books | 0.100 | 0.600 |
        | web | 0.900 | 0.400 |
        <BLANKLINE>
    """
    lines = [
        "## Learned mixture",
        "",
        f"Learned by hf_bilevel's `MixtureTrainer`, the weights moving every {inner_steps} optimizer steps.",
        "",
        "| domain | share of the pool | learned weight |",
        "|---|---|---|",
    ]
    for name, weight in sorted(mixture.items(), key=lambda pair: -pair[1]):
        share = f"{shares[name]:.3f}" if name in shares else ""
        lines.append(f"| {escape_markdown(name)} | {share} | {weight:.3f} |")
    if picture is not None:
        lines += ["", f"![Weight of every domain over the optimizer steps]({picture})"]
    return "\n".join([*lines, ""])


def dataset_card(
    repo_id: str,
    facts: Mapping[str, Any],
    *,
    num_kept: int,
    num_pool: int,
    fingerprint: str | None,
    columns: Sequence[str],
    with_rows: bool,
    pictures: Mapping[str, str],
) -> str:
    """Write the card of a selected subset, with the header by which ``datasets.load_dataset`` finds the files.

    Args:
        repo_id: Where on the Hub it will be; refused by ``huggingface_hub`` if that cannot be.
        facts: Where the selection came from; see ``SelectedSubset``.
        num_kept: Rows selected.
        num_pool: Rows of the pool.
        fingerprint: Of the pool, or None.
        columns: Of the selection.
        with_rows: Whether the rows themselves are uploaded, as ``data/train-00000-of-00001.parquet``.
        pictures: File names of the pictures beside the card: ``"ranking"``, ``"domains"``.

    Returns:
        Markdown with a YAML header.

    Example:
        >>> card = dataset_card("me/digits-selected", {"method": "bros", "seed": 3}, num_kept=300, num_pool=1000,
        ...                     fingerprint=None, columns=["id", "weight"], with_rows=False, pictures={})
        >>> print(card[: card.index("## Load")])
        ---
        size_categories:
        - n<1K
        pretty_name: digits-selected
        tags:
        - hf_bilevel
        - data-selection
        configs:
        - config_name: selection
          data_files:
          - split: train
            path: subset.parquet
          default: true
        ---
        <BLANKLINE>
        # digits-selected
        <BLANKLINE>
        300 of the 1,000 rows of a pool, selected by hf_bilevel with the method bros. Their numbers are in here, the rows are not.
        <BLANKLINE>
        <BLANKLINE>
    """
    validate_repo_id(repo_id)
    name = repo_id.split("/")[-1]
    files = {"rows": ROWS_PATH} if with_rows else {}
    files["selection"] = SELECTION_PATH
    configs = [{"config_name": key, "data_files": [{"split": "train", "path": path}]} for key, path in files.items()]
    configs[0]["default"] = True
    header = DatasetCardData(
        pretty_name=name,
        size_categories=[_SIZES[min(max(0, len(str(num_kept)) - 3), len(_SIZES) - 1)]],
        tags=["hf_bilevel", "data-selection"],
        configs=configs,
    )
    metrics, results = _results(facts.get("metrics") or {}, facts.get("controls") or {})
    environment = jinja2.Environment(
        finalize=escape_markdown, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        header=Markup(header.to_yaml()),
        name=Markup(name),
        repo_id=Markup(repo_id),
        num_kept=f"{num_kept:,}",
        num_pool=f"{num_pool:,}",
        method=facts.get("method"),
        with_rows=with_rows,
        columns=Markup(", ".join(columns)),
        selection=_selection(facts, num_kept, num_pool, fingerprint),
        config=[(key, _short(value)) for key, value in (facts.get("config") or {}).items()],
        domains=_domains(**facts["domains"]) if facts.get("domains") else [],
        metrics=metrics,
        results=results,
        has_controls=bool(facts.get("controls")),
        pictures=pictures,
    )


def _selection(
    facts: Mapping[str, Any], num_kept: int, num_pool: int, fingerprint: str | None
) -> list[tuple[str, str]]:
    """List what is known about the selection; what is not known is left out."""
    pool, ranking = facts.get("dataset") or {}, facts.get("ranking") or {}
    num_unranked = num_pool - sum(ranking["kept"]) - sum(ranking["dropped"]) if ranking else 0
    entries = {
        "Method": facts.get("method"),
        "Trainer": facts.get("trainer"),
        "Rows kept": f"{num_kept:,} of {num_pool:,} ({num_kept / max(1, num_pool):.1%})",
        "Asked for": facts.get("selection"),
        "Search": facts.get("search"),
        "Ranked by": ranking.get("ranked_by"),
        "Rows without a rank": num_unranked or None,
        "Pool": pool.get("source") or pool.get("name"),
        "Revision of the pool": pool.get("revision"),
        "Version of the pool": pool.get("version"),
        "Fingerprint of the pool": fingerprint,
        "Rows of the target dataset": facts.get("num_target"),
        "Model": facts.get("model"),
        "Seed": facts.get("seed"),
        "Optimizer steps": facts.get("global_step"),
        "Processes": facts.get("world_size"),
        "Rows of a batch of candidates": facts.get("candidate_batch_size"),
        "Versions": facts.get("versions"),
    }
    return [(label, _short(value)) for label, value in entries.items() if value is not None]


def _domains(names: Sequence[str], pool: Sequence[int], subset: Sequence[int]) -> list[list[str]]:
    rows = sorted(zip(names, pool, subset, strict=True), key=lambda row: -row[2])
    totals = [max(1, sum(counts)) for counts in (pool, subset)]
    return [
        [_short(name), f"{before:,}", f"{before / totals[0]:.1%}", f"{after:,}", f"{after / totals[1]:.1%}"]
        for name, before, after in rows
    ]


def _results(
    metrics: Mapping[str, float], controls: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Arrange the metrics of the run and of its controls as a table: its columns and its rows."""
    arms = ({"this run": metrics} if metrics else {}) | dict(controls)
    names = list(dict.fromkeys(name for arm in arms.values() for name in arm))
    return names, [(arm, [_short(values.get(name, "")) for name in names]) for arm, values in arms.items()]


def _short(value: Any) -> str:
    """Write a value as a reader would, and not at any length."""
    if isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, Mapping):
        text = ", ".join(f"{key} {_short(entry)}" for key, entry in value.items())
    elif isinstance(value, (list, tuple)):
        text = ", ".join(map(_short, value))
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "…"
