"""Pictures of what was learned, for READMEs and cards."""

from typing import Any

import numpy as np
from torch import Tensor


def weights_histogram(weights: Tensor, wrong: Tensor | None = None) -> Any:
    """Draw how many samples have which weight.

    Args:
        weights: Sample weights ``(n,)``.
        wrong: Bool ``(n,)``, the samples known to be corrupted, drawn in another colour; None if that is not known.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Plots need matplotlib: `pip install matplotlib`.") from None
    values = weights.detach().cpu().numpy()
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(min(0.0, values.min()), max(1.0, values.max()), 41)
    if wrong is None:
        axes.hist(values, edges, color="#4477aa")
    else:
        mask = wrong.cpu().numpy().astype(bool)
        groups = [values[~mask], values[mask]]
        axes.hist(groups, edges, stacked=True, color=["#4477aa", "#cc6677"], label=["intact", "corrupted"])
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

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Plots need matplotlib: `pip install matplotlib`.") from None
    values = np.asarray([*weights, weights[-1]])
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    order = np.argsort(-values[-1], kind="stable")
    for place, j in enumerate(order):
        named = place < 12
        colour = colormaps["tab20"](place) if named else "#bbbbbb"
        label = f"{names[j]}  {values[-1, j]:.2f}" if named else None
        axes.step([*steps, last_step], values[:, j], where="post", color=colour, label=label, lw=1.8 if named else 0.8)
    axes.axhline(1 / len(names), color="#999999", lw=0.8, ls=":")
    axes.set_xlim(0, max(last_step, 1))
    axes.set_ylim(0, None)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("domain weight")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
