"""The page of several trainings: `runs.html`, one file without scripts. All text is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlmdpo.report import html as pages

# Metric → how it is written; those of a table, and of the charts.
FIGURES = {"loss": "{:.4f}", "rewards/accuracies": "{:.3f}", "rewards/margins": "{:+.3f}"}
# Of AMBER: a figure's name → its heading.
SCORES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "delta_accuracy": "accuracy, tuned minus base",
    "chair": "CHAIR",
    "cover": "Cover",
    "hal": "Hal",
    "cog": "Cog",
}
_CHARTS = (
    ("Loss", "loss", "lines"),
    ("Loss on the test split", "loss", "test"),
    ("Reward accuracy", "rewards/accuracies", "lines"),
    ("Reward margin", "rewards/margins", "lines"),
    ("Reward accuracy on the test split", "rewards/accuracies", "test"),
    ("Gradient norm", "grad_norm", "lines"),
)
# A run's colour and dash are the same in every chart; dashes tell apart what colours repeat.
_COLOURS = ("#2563a8", "#b3261e", "#15703d", "#7547b3", "#b36b00", "#00797d", "#8a3b6b", "#5b6675")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_WIDTH, _HEIGHT, _LEFT, _BELOW = 420, 220, 52, 22  # of a chart, in units of its view box
_POINTS = 200  # of a curve
_SMOOTHING = 0.7


def page(title: str, runs: Sequence[Mapping[str, Any]], differing: Sequence[str]) -> str:
    """The page as HTML.

    Args:
        runs: each with `name`, `settings`, figures, and its logged `lines` and `test` lines.
        differing: the settings that are not the same in all of them.
    """
    charts = [_chart(*chart, runs) for chart in _CHARTS]
    same = {
        name: as_setting(value)
        for name, value in (runs[0]["settings"].items() if runs else ())
        if name not in differing and value not in (None, [], "")
    }
    scores = [name for name in SCORES if any((one["amber"] or {}).get(name) for one in runs)]
    return (
        pages.environment({"setting": as_setting, "figure": as_text})
        .get_template("runs.html")
        .render(
            title=title,
            runs=[{**one, **_look(number)} for number, one in enumerate(runs)],
            differing=differing,
            same=same,
            charts=[chart for chart in charts if chart["curves"]],
            figures=FIGURES,
            scores={name: SCORES[name] for name in scores},
            size=(_WIDTH, _HEIGHT),
        )
    )


def as_text(value: float | None, form: str) -> str:
    """A figure as a table writes it."""
    return "-" if value is None else form.format(value)


def as_setting(value: object) -> str:
    """A setting's value as a table writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)


def _look(number: int) -> dict[str, str]:
    dash = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    return {"colour": _COLOURS[number % len(_COLOURS)], "dash": dash}


def _chart(title: str, metric: str, kind: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A metric of all runs as paths of one drawing, with the labels of its axes."""
    curves = [(one["name"], _look(n), _points(one[kind], metric)) for n, one in enumerate(runs)]
    curves = [curve for curve in curves if curve[2]]
    values = sorted(value for _, _, points in curves for _, value in points)
    steps = [step for _, _, points in curves for step, _ in points]
    if not values:
        return {"title": title, "curves": []}
    # One outlier must not press all curves flat.
    low, high = values[len(values) // 100], values[-1 - len(values) // 100]
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def place(step: float, value: float) -> str:
        x = _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - 8)
        y = 8 + (high - min(max(value, low), high)) / (high - low) * (_HEIGHT - _BELOW - 8)
        return f"{x:.1f},{y:.1f}"

    return {
        "title": title,
        "curves": [
            {"name": name, **look, "points": " ".join(place(*point) for point in points)}
            for name, look, points in curves
        ],
        "levels": [
            {"y": place(first, level).split(",")[1], "text": f"{level:.3g}"}
            for level in (low + margin, (low + high) / 2, high - margin)
        ],
        "first": first,
        "last": last,
    }


def _points(lines: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[int, float]]:
    """(step, smoothed value) of a curve, evenly thinned."""
    points: list[tuple[int, float]] = []
    mean = weight = 0.0
    for line in lines:
        value = line.get(metric)
        if isinstance(value, (int, float)) and math.isfinite(value):
            # Corrected for its start, as Adam's moments are.
            mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
            weight = _SMOOTHING * weight + (1 - _SMOOTHING)
            points.append((line["step"], mean / weight))
    return [*pages.evenly(points[:-1], _POINTS), *points[-1:]]
