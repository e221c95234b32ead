"""Cards, written from recorded facts: a section of model cards, and the card of a selected subset."""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import DatasetCard, DatasetCardData
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
DATASET_TEMPLATE, MODEL_TEMPLATE = "dataset_card.md.jinja", "model_section.md.jinja"

Results = Mapping[str, Mapping[str, float | Sequence[float]]]

ROWS_PATH, SELECTION_PATH = "data/train-00000-of-00001.parquet", "subset.parquet"

NOTES_BEGIN = "<!-- What you write below stays when the subset is uploaded again. -->"

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


@dataclass(frozen=True)
class MethodSection:
    """What a method says of a run, for its section of the model card. ``about``, ``paper`` and ``limit`` are ours, and Markdown.

    Args:
        title: Heading of the section.
        about: What was done, to follow the name of the trainer: ``", ..."`` or ``"."``, to the end of the sentence.
        paper: Where the method is from.
        limit: What the outcome does not show, as one sentence.
        statistics: What came out, by what it is called.
        columns: Head of a table of what came out; empty without one.
        rows: Its rows.
        plots: What to draw: from file names to a description and a function that makes a matplotlib figure.
    """

    title: str
    about: str
    paper: str
    limit: str
    statistics: Mapping[str, str] = field(default_factory=dict)
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    plots: Mapping[str, tuple[str, Callable[[], Any]]] = field(default_factory=dict)


def model_section(
    method: MethodSection,
    facts: Mapping[str, Any],
    *,
    settings: Mapping[str, tuple[Any, Any]],
    cost: Mapping[str, str],
    pictures: Mapping[str, str],
    results: Results | None = None,
    command: str | None = None,
) -> str:
    """Write the section of a model card that says which data a model was trained on, and why.

    Args:
        method: What the method says.
        facts: ``bilevel_facts`` of the trainer; beside them ``"pool"`` and ``"target"``, of each the keys ``source``,
            ``name``, ``revision``, ``version`` and ``fingerprint`` where they are known.
        settings: Those that differ from the defaults: value and default.
        cost: What the run cost, by what it is called.
        pictures: Files beside the card, with descriptions.
        results: Arm -> metric -> value, or one value for each of several runs; see ``check_results``.
        command: What starts the run again.

    Returns:
        Markdown, from its heading on.

    Example:
        >>> method = MethodSection("Learned mixture", ", the weights moving every 50 optimizer steps.", "A paper.", "A limit.",
        ...                        columns=["domain", "learned weight"], rows=[["books", "0.600"], ["web", "0.400"]])
        >>> section = model_section(method, {"trainer": "MixtureTrainer", "num_pool": 1000}, settings={"penalty": (2.0, 1.0)},
        ...                         cost={"Optimizer steps": "400"}, pictures={},
        ...                         results={"learned": {"accuracy": [0.8, 0.9]}, "all data": {"accuracy": 0.7}})
        >>> print(section[: section.index("### Cost")])
        ## Learned mixture
        <BLANKLINE>
        Trained with hf_bilevel's `MixtureTrainer`, the weights moving every 50 optimizer steps.
        <BLANKLINE>
        Method: A paper.
        <BLANKLINE>
        | | |
        |---|---|
        | Rows of the pool | 1,000 |
        <BLANKLINE>
        | setting | value | default |
        |---|---|---|
        | penalty | 2 | 1 |
        <BLANKLINE>
        ### Outcome
        <BLANKLINE>
        | domain | learned weight |
        |---|---|
        | books | 0.600 |
        | web | 0.400 |
        <BLANKLINE>
        ### Results
        <BLANKLINE>
        | arm | accuracy |
        |---|---|
        | learned | 0.85 ± 0.07071 |
        | all data | 0.7 |
        <BLANKLINE>
        Mean ± standard deviation over 2 runs.
        <BLANKLINE>
        <BLANKLINE>
    """
    results = results or {}
    check_results(results)
    metrics = list(dict.fromkeys(metric for values in results.values() for metric in values))
    rows = [[arm, *(_measured(values.get(metric)) for metric in metrics)] for arm, values in results.items()]
    numbers = {len(v) for values in results.values() for v in values.values() if isinstance(v, Sequence)} - {1}
    return _render(
        MODEL_TEMPLATE,
        method=replace(method, **{name: Markup(getattr(method, name)) for name in ("about", "paper", "limit")}),
        trainer=Markup(facts["trainer"]),
        origin=_origin(facts),
        settings=[(name, _short(value), _short(default)) for name, (value, default) in settings.items()],
        pictures=pictures,
        metrics=["arm", *metrics],
        results=rows,
        num_runs=Markup(" or ".join(map(str, sorted(numbers)))),
        has_controls=len(results) > 1,
        cost=list(cost.items()),
        command=None if command is None else Markup(_code_block(command)),
    )


def check_results(results: Any) -> None:
    """Refuse results that no table can be made of.

    Args:
        results: Should be a mapping from arms to mappings from metrics to numbers, or to one number for each of several runs.

    Raises:
        TypeError: If it is not.

    Example:
        >>> check_results({"learned": {"accuracy": [0.8, 0.9]}, "all data": {"accuracy": 0.7}})
        >>> check_results({"accuracy": 0.7})
        Traceback (most recent call last):
        TypeError: `results` must be {arm: {metric: number or one number for each run}}; for 'accuracy' it holds 0.7.
    """
    for arm, values in results.items() if isinstance(results, Mapping) else [("all arms", results)]:
        numbers = list(values.values()) if isinstance(values, Mapping) else [None]
        for number in numbers:
            listed = list(number) if isinstance(number, Sequence) and len(number) else [number]
            if not all(isinstance(entry, Real) and not isinstance(entry, bool) for entry in listed):
                raise TypeError(
                    "`results` must be {arm: {metric: number or one number for each run}}; for "
                    f"{arm!r} it holds {values!r}."
                )


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
    return _render(
        DATASET_TEMPLATE,
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
        notes_begin=Markup(NOTES_BEGIN),
    )


def keep_what_was_added(card: str, earlier: str, is_ours: bool) -> str:
    """Put into a new card of a repository what its owner has added to the earlier one: a licence, a gate, notes.

    Args:
        card: From ``dataset_card``.
        earlier: That of the repository.
        is_ours: Whether that was made by ``dataset_card``, or by hand.

    Returns:
        The card, with what the earlier header says beside the files, the size and our tags, and with the notes under it; all of a
        text that was written by hand is notes.
    """
    try:
        new, old = (DatasetCard(text, ignore_metadata_errors=True) for text in (card, earlier))
    except ValueError:  # a header that is no YAML
        return card
    ours, theirs = new.data.to_dict(), old.data.to_dict()
    theirs.pop("dataset_info", None)  # of other files
    tags = [*ours["tags"], *(tag for tag in theirs.get("tags") or () if tag not in ours["tags"])]
    header = {**ours, **theirs, "configs": ours["configs"], "size_categories": ours["size_categories"], "tags": tags}
    _, _, notes = earlier.partition(NOTES_BEGIN) if is_ours else ("", "", f"\n\n{old.text.strip()}\n")
    if header == ours and not notes.strip():
        return card
    return f"---\n{DatasetCardData(**header).to_yaml()}\n---\n{new.text.rstrip()}{notes}"


def _render(template: str, **values: Any) -> str:
    """Fill in a template; what is no ``Markup`` is escaped."""
    environment = jinja2.Environment(
        finalize=escape_markdown, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string((TEMPLATES / template).read_text(encoding="utf-8")).render(values)


def _origin(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List what is known about the data of a run; what is not known is left out."""
    pool, target = facts.get("pool") or {}, facts.get("target") or {}
    num_pool, num_target = facts.get("num_pool"), facts.get("num_target")
    entries = {
        "Rows of the pool": None if num_pool is None else f"{num_pool:,}",
        "Pool": pool.get("source") or pool.get("name"),
        "Revision of the pool": pool.get("revision"),
        "Version of the pool": pool.get("version"),
        "Fingerprint of the pool": pool.get("fingerprint"),
        "Rows of the target dataset": None if num_target is None else f"{num_target:,}",
        "Target dataset": target.get("source") or target.get("name"),
        "Revision of the target dataset": target.get("revision"),
        "Fingerprint of the target dataset": target.get("fingerprint"),
        "Seed": facts.get("seed"),
        "Processes": facts.get("world_size"),
        "Versions": facts.get("versions"),
    }
    return [(label, _short(value)) for label, value in entries.items() if value is not None]


def _measured(value: float | Sequence[float] | None) -> str | Markup:
    if value is None:
        return ""
    values = list(value) if isinstance(value, Sequence) else [value]
    if len(values) == 1:
        return _short(float(values[0]))
    return Markup(f"{_short(statistics.fmean(values))} ± {_short(statistics.stdev(values))}")


def _code_block(text: str) -> str:
    """Fence text so that nothing in it ends the block."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}bash\n{text.strip()}\n{fence}"


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
