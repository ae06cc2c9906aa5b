"""Learning curves: the metrics of DPO over a run, in one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# (title, [(metric, label, colour)], (level, its label)), from left to right, top to bottom.
_PANELS: tuple[tuple[str, list[tuple[str, str, str]], tuple[float, str]], ...] = (
    ("Loss", [("loss", "loss", "tab:blue")], (0.6931, "ln 2: no preference yet")),
    ("Reward accuracy", [("rewards/accuracies", "accuracy", "tab:green")], (0.5, "chance")),
    (
        "Rewards",
        [("rewards/chosen", "chosen", "tab:green"), ("rewards/rejected", "rejected", "tab:red")],
        (0.0, "reference"),
    ),
    (
        "Reward margin (chosen − rejected)",
        [("rewards/margins", "margin", "tab:purple")],
        (0.0, "reference"),
    ),
)


def draw(
    lines: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]], title: str, path: Path
) -> None:
    """Write a PNG: loss, reward accuracy, rewards of both answers, and margin over steps.

    `lines` are the logged metrics, each with "step", "loss" and TRL's "rewards/..." keys;
    `evaluations` are those of the test split, or empty.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True)
    # By hand, because a layout engine would draw everything a second time to measure it.
    figure.subplots_adjust(left=0.07, right=0.985, top=0.9, bottom=0.075, wspace=0.17, hspace=0.14)
    for axes, (name, series, level) in zip(grid.flat, _PANELS, strict=True):
        _draw_panel(axes, name, series, level, lines, evaluations)
    for axes in grid[1]:
        axes.set_xlabel("optimizer step")
    grid[0][1].set_ylim(-0.02, 1.02)
    figure.suptitle(f"{title}   (faint: as logged, bold: smoothed)", fontsize=11, x=0.01, ha="left")
    part = path.with_name(f".{path.name}.partial")
    figure.savefig(part, dpi=130, format="png")
    pyplot.close(figure)
    part.rename(path)


def _draw_panel(
    axes: Any,
    title: str,
    series: Sequence[tuple[str, str, str]],
    level: tuple[float, str],
    lines: Sequence[dict[str, Any]],
    evaluations: Sequence[dict[str, Any]],
) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = [line["step"] for line in lines]
    marker = "o" if len(steps) == 1 else None
    axes.axhline(level[0], color="0.6", linewidth=1, linestyle="--", label=level[1])
    for key, label, colour in series:
        values = [line[key] for line in lines]
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
        smooth = _smooth(values)
        axes.plot(steps, smooth, color=colour, linewidth=2, label=label, marker=marker)
        if evaluations:
            axes.plot(
                [line["step"] for line in evaluations],
                [line[key] for line in evaluations],
                color=colour,
                linestyle=":",
                marker="o",
                markersize=4,
                label=f"{label}, test split",
            )
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _smooth(values: Sequence[float], weight: float = 0.7) -> list[float]:
    """Exponential moving average, corrected for its start as Adam's moments are."""
    smoothed, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**count))
    return smoothed
