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
