"""Pictures: what they count, which domains they name, and that no name is taken for a formula."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_bilevel.plots import (
    can_be_drawn,
    distribution_over_steps,
    domain_shares,
    domain_weights_over_time,
    kept_against_dropped,
    lines_over_steps,
    montage,
    weights_histogram,
)


def heights(figure: Any) -> list[list[float]]:
    return [[bar.get_height() for bar in container] for container in figure.axes[0].containers]


def test_histogram_counts_every_sample(tmp_path: Path) -> None:
    weights = torch.tensor([0.0, 0.01, 0.51, 0.51, 0.99, 1.0], requires_grad=True)
    figure = weights_histogram(weights)
    (bars,) = heights(figure)
    assert len(bars) == 40 and (bars[0], bars[20], bars[39]) == (2, 2, 2) and sum(bars) == 6
    assert figure.axes[0].get_xlabel() == "sample weight" and figure.axes[0].get_legend() is None
    figure.savefig(tmp_path / "weights.png")
    assert (tmp_path / "weights.png").stat().st_size > 1000


def test_histogram_of_two_groups_and_of_weights_above_one() -> None:
    figure = weights_histogram(torch.tensor([0.0, 0.5, 1.0, 4.0]), torch.tensor([True, True, False, False]))
    intact, corrupted = heights(figure)
    assert (sum(intact), sum(corrupted)) == (2, 2)
    assert corrupted[0] == 1 and corrupted[5] == 1 and intact[10] == 1 and intact[39] == 1  # bins of 0.1
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["intact", "corrupted"]


def test_kept_lies_under_dropped(tmp_path: Path) -> None:
    figure = kept_against_dropped("a $score$_1", [0.0, 0.5, 2.0], [1, 1200], [3, 4])
    axes = figure.axes[0]
    assert heights(figure) == [[1, 1200], [3, 4]]
    kept, dropped = axes.containers
    assert [(bar.get_x(), bar.get_width(), bar.get_y()) for bar in kept] == [(0.0, 0.5, 0), (0.5, 1.5, 0)]
    assert [bar.get_y() for bar in dropped] == [1, 1200]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["kept: 1,201 rows", "dropped: 7 rows"]
    figure.savefig(tmp_path / "a.png")  # as a formula the label would be an error here
    assert axes.get_xlabel() == "a $score$_1"


def test_shares_of_domains(tmp_path: Path) -> None:
    figure = domain_shares(["web", "books\n$\\frac$" + "x" * 40], [30, 10], [1, 3])
    axes = figure.axes[0]
    subset, pool = ([bar.get_width() for bar in container] for container in axes.containers)
    assert subset == [25.0, 75.0] and pool == [75.0, 25.0]  # from below: the largest of the subset is on top
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert (
        names[0] == "web" and names[1].startswith("books $\\frac$xxx") and len(names[1]) == 28 and names[1][-1] == "…"
    )
    figure.savefig(tmp_path / "a.png")
    assert axes.get_ylabel() == ""


def test_only_the_largest_domains_are_drawn() -> None:
    counts = list(range(1, 31))
    axes = domain_shares([f"d{i}" for i in range(30)], counts, [0] * 29 + [7]).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(names) == sorted(f"d{i}" for i in range(10, 30)) and names[-1] == "d29"
    assert axes.get_ylabel() == "20 of 30 domains"


def test_an_empty_subset_is_drawn() -> None:
    (subset, _) = domain_shares(["a"], [3], [0]).axes[0].containers
    assert [bar.get_width() for bar in subset] == [0]


def test_plots_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    calls = [
        lambda: weights_histogram(torch.ones(3)),
        lambda: domain_weights_over_time([0], [[0.5, 0.5]], ["a", "b"], 1),
        lambda: kept_against_dropped("score", [0, 1], [1], [1]),
        lambda: domain_shares(["a"], [1], [1]),
    ]
    for call in calls:
        with pytest.raises(ImportError, match="Plots need matplotlib: `pip install matplotlib`"):
            call()


def test_lines_are_named_from_the_largest_end_on(tmp_path: Path) -> None:
    lines = {f"$\\frac${i}": ([10, 20], [0.0, float(i)]) for i in range(13)}
    figure = lines_over_steps(lines, "loss")
    axes = figure.axes[0]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [f"$\\frac${i}" for i in range(12, 0, -1)]
    assert [line.get_ydata()[-1] for line in axes.get_lines()] == list(range(12, -1, -1))
    figure.savefig(tmp_path / "a.png")  # as formulas the names would be errors here
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss")


def test_names_of_domains_are_no_formulas_over_time(tmp_path: Path) -> None:
    domain_weights_over_time([0, 5], [[0.5, 0.5], [0.1, 0.9]], ["$\\frac$", "b"], 10).savefig(tmp_path / "a.png")


def test_distribution_has_bands_and_a_median(tmp_path: Path) -> None:
    quantiles = {0.05: [0, 1], 0.25: [1, 2], 0.5: [2, 4], 0.75: [3, 6], 0.95: [9, 9]}
    figure = distribution_over_steps([10, 20], quantiles, "excess loss")
    axes = figure.axes[0]
    assert list(axes.lines[0].get_ydata()) == [2, 4] and axes.get_ylabel() == "excess loss"
    outer, inner = (band.get_paths()[0].vertices for band in axes.collections)
    assert (outer[:, 1].min(), outer[:, 1].max()) == (0, 9) and (inner[:, 1].min(), inner[:, 1].max()) == (1, 6)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["5% to 95%", "25% to 75%", "median"]
    figure.savefig(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("shape", "drawn"),
    [
        *(
            ((1, 1, 3), True),
            ((3, 1, 1), True),
            ((1, 8, 8), True),
            ((8, 8, 1), True),
            ((1, 1), True),
            ((8, 1, 3), True),
        ),
        *(((5, 8, 8), False), ((8, 8, 2), False), ((0, 8), False), ((8,), False), ((2, 3, 8, 8), False)),
    ],
)
def test_what_montage_can_draw(shape: tuple[int, ...], drawn: bool, tmp_path: Path) -> None:
    image = np.zeros(shape)
    assert can_be_drawn(image) == drawn
    if drawn:
        montage([image]).savefig(tmp_path / "a.png")


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (8, 8, 3), (8, 8)])
def test_montage_shows_every_image_in_its_own_range(shape: tuple[int, ...], tmp_path: Path) -> None:
    images = [torch.full(shape, 5.0).numpy(), torch.arange(float(torch.tensor(shape).prod())).view(shape).numpy()] * 4
    figure = montage(images)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(shown) == 8 and all(image.shape[:2] == (8, 8) for image in shown)
    assert shown[0].max() == 0 and (shown[1].min(), shown[1].max()) == (0, 1)
    figure.savefig(tmp_path / "a.png")
