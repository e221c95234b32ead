"""Pictures of what was learned, for READMEs and cards. All of them need matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

KEPT, DROPPED = "#4477aa", "#cc6677"

MAX_DOMAINS, MAX_NAME = 20, 28


def _new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Plots need matplotlib: `pip install matplotlib`.") from None
    return Figure(figsize=(width, height), layout="constrained")


def weights_histogram(weights: Tensor, wrong: Tensor | None = None) -> Any:
    """Draw how many samples have which weight.

    Args:
        weights: Sample weights ``(n,)``.
        wrong: Bool ``(n,)``, the samples known to be corrupted, drawn in another colour; None if that is not known.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.
    """
    values = weights.detach().cpu().numpy()
    figure = _new_figure(6, 3.2)
    axes = figure.subplots()
    edges = np.linspace(min(0.0, values.min()), max(1.0, values.max()), 41)
    if wrong is None:
        axes.hist(values, edges, color=KEPT)
    else:
        mask = wrong.cpu().numpy().astype(bool)
        groups = [values[~mask], values[mask]]
        axes.hist(groups, edges, stacked=True, color=[KEPT, DROPPED], label=["intact", "corrupted"])
        axes.legend(frameon=False)
    axes.set_xlabel("sample weight")
    axes.set_ylabel("samples")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def domain_weights_over_time(steps: list[int], weights: list[list[float]], names: list[str], last_step: int) -> Any:
    """Draw the weight of every domain over the steps of a run.

    Args:
        steps: Steps at which the weights changed, ascending; they hold until the next.
        weights: The weights since each of these steps.
        names: Names of the domains; the twelve that end largest are named in the picture.
        last_step: Where the run ends.

    Returns:
        A matplotlib figure.
    """
    figure = _new_figure(7, 3.4)
    from matplotlib import colormaps

    values = np.asarray([*weights, weights[-1]])
    axes = figure.subplots()
    order = np.argsort(-values[-1], kind="stable")
    for place, j in enumerate(order):
        named = place < 12
        colour = colormaps["tab20"](place) if named else "#bbbbbb"
        label = f"{_short(names[j])}  {values[-1, j]:.2f}" if named else None
        axes.step([*steps, last_step], values[:, j], where="post", color=colour, label=label, lw=1.8 if named else 0.8)
    axes.axhline(1 / len(names), color="#999999", lw=0.8, ls=":")
    axes.set_xlim(0, max(last_step, 1))
    axes.set_ylim(0, None)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("domain weight")
    _name_lines(axes)
    return figure


def lines_over_steps(lines: Mapping[str, tuple[Sequence[int], Sequence[float]]], label: str) -> Any:
    """Draw values over the optimizer steps of a run.

    Args:
        lines: Steps and values of every line, by its name; the twelve that end largest are named in the picture.
        label: What the values are.

    Returns:
        A matplotlib figure.
    """
    figure = _new_figure(7, 3.4)
    from matplotlib import colormaps

    axes = figure.subplots()
    order = sorted(lines, key=lambda name: -lines[name][1][-1])
    for place, name in enumerate(order):
        named = place < 12
        colour = colormaps["tab10" if len(order) <= 10 else "tab20"](place) if named else "#bbbbbb"
        text = _short(name) if named else None
        axes.plot(*lines[name], color=colour, label=text, lw=1.8 if named else 0.8)
    axes.set_xlim(0, None)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    _name_lines(axes)
    return figure


def distribution_over_steps(steps: Sequence[int], quantiles: Mapping[float, Sequence[float]], label: str) -> Any:
    """Draw how the distribution of a value moves over the optimizer steps of a run.

    Args:
        steps: Ascending.
        quantiles: For each probability the quantile at every step; symmetric pairs are drawn as bands, 0.5 as a line.
        label: What the value is.

    Returns:
        A matplotlib figure.
    """
    figure = _new_figure(7, 3.4)
    axes = figure.subplots()
    for low in sorted(p for p in quantiles if p < 0.5):
        text = f"{low:.0%} to {1 - low:.0%}"
        axes.fill_between(
            steps, quantiles[low], quantiles[round(1 - low, 10)], color=KEPT, alpha=0.25, lw=0, label=text
        )
    axes.plot(steps, quantiles[0.5], color=KEPT, lw=1.8, label="median")
    axes.axhline(0, color="#999999", lw=0.8, ls=":")
    axes.set_xlim(steps[0], steps[-1])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    _name_lines(axes)
    return figure


def can_be_drawn(image: np.ndarray) -> bool:
    """Say whether ``montage`` can draw an image: grey, or of three colours, and not empty."""
    is_coloured = image.ndim == 3 and (image.shape[0] in (1, 3) or image.shape[2] in (1, 3))
    return image.size > 0 and (image.ndim == 2 or is_coloured)


def montage(images: Sequence[np.ndarray]) -> Any:
    """Draw images side by side, each scaled to its own range.

    Args:
        images: ``(channels, height, width)`` or ``(height, width, channels)`` with 1 or 3 channels, or ``(height, width)``.

    Returns:
        A matplotlib figure.
    """
    columns = min(len(images), max(5, round(len(images) ** 0.5 * 1.5)))
    num_rows = -(-len(images) // columns)
    figure = _new_figure(7, 7 * num_rows / columns)
    grid = figure.subplots(num_rows, columns, squeeze=False, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image in zip(grid.flat, images, strict=False):
        values = np.asarray(image, dtype=float)
        if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3):
            values = values.transpose(1, 2, 0)
        span = values.max() - values.min()
        values = (values - values.min()) / (span if span > 0 else 1)
        axes.imshow(
            values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values, cmap="gray", vmin=0, vmax=1
        )
    return figure


def _name_lines(axes: Any) -> None:
    """Put the names of lines to the right of them, none taken for a formula."""
    legend = axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.spines[["top", "right"]].set_visible(False)


def upper_losses_over_search(losses: Sequence[float], uniform_mean: float | None, found: float | None) -> Any:
    """Draw how a search of a coreset went.

    Args:
        losses: Mean upper loss of the masks of every outer step; NaN where there was none.
        uniform_mean: Mean upper loss of uniform draws of the same size, or None.
        found: Upper loss of the coreset, or None.

    Returns:
        A matplotlib figure.
    """
    figure = _new_figure(6, 3.2)
    axes = figure.subplots()
    values = np.asarray(losses, dtype=float)
    steps = np.arange(1, len(values) + 1)
    window = max(1, len(values) // 25)
    axes.plot(steps, values, color=KEPT, lw=0.6, alpha=0.4)
    smooth = [
        np.nanmean(part) if np.isfinite(part).any() else np.nan
        for part in np.array_split(values, -(-len(values) // window))
    ]
    axes.plot(
        (np.arange(len(smooth)) + 0.5) * len(values) / len(smooth),
        smooth,
        color=KEPT,
        lw=1.8,
        label="masks of a step, mean",
    )
    if uniform_mean is not None:
        axes.axhline(uniform_mean, color=DROPPED, lw=1.2, ls="--", label="uniform draws, mean")
    if found is not None:
        axes.axhline(found, color="#228833", lw=1.2, label="coreset")
    axes.set_xlabel("outer step")
    axes.set_ylabel("upper loss")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def kept_against_dropped(ranked_by: str, edges: Sequence[float], kept: Sequence[int], dropped: Sequence[int]) -> Any:
    """Draw how many rows of the pool were kept and how many dropped, by what ranked them.

    Args:
        ranked_by: Name of what ranked them, for the axis.
        edges: Of the bins, ascending, one more than there are bins.
        kept: Rows in each bin that were kept.
        dropped: Rows in each bin that were not.

    Returns:
        A matplotlib figure.
    """
    figure = _new_figure(6, 3.2)
    axes = figure.subplots()
    left, width = np.asarray(edges[:-1]), np.diff(edges)
    for counts, bottom, colour, name in ((kept, None, KEPT, "kept"), (dropped, kept, DROPPED, "dropped")):
        label = f"{name}: {sum(counts):,} rows"
        axes.bar(left, counts, width, bottom=bottom, align="edge", color=colour, label=label)
    axes.set_xlabel(ranked_by, parse_math=False)
    axes.set_ylabel("rows of the pool")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def domain_shares(names: Sequence[str], pool: Sequence[int], subset: Sequence[int]) -> Any:
    """Draw the share of every domain in the pool and in the subset.

    Args:
        names: Of the domains; the twenty with the largest share in either are drawn.
        pool: Rows of each in the pool.
        subset: Rows of each in the subset.

    Returns:
        A matplotlib figure.
    """
    shares = np.stack([np.asarray(counts) / max(1, sum(counts)) for counts in (subset, pool)])
    order = np.argsort(-shares.max(0), kind="stable")[:MAX_DOMAINS]
    order = order[np.argsort(shares[0, order], kind="stable")]  # bars are drawn from below
    figure = _new_figure(6, 1.2 + 0.32 * len(order))
    axes = figure.subplots()
    places = np.arange(len(order))
    for values, offset, colour, label in ((shares[0], 0.2, KEPT, "subset"), (shares[1], -0.2, "#bbbbbb", "pool")):
        bars = axes.barh(places + offset, 100 * values[order], 0.4, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axes.set_yticks(places, [_short(names[j]) for j in order], parse_math=False)
    axes.set_xlabel("share of the rows (%)")
    if len(order) < len(names):
        axes.set_ylabel(f"{len(order)} of {len(names)} domains")
    axes.set_xlim(0, 112 * shares.max())
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
