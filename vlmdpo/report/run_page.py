"""The page of a training: `run.html`, one file without network access. All text is escaped.

Its script draws the curves from data in the page. Only this script's hash is allowed to run.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from vlmdpo.config import TrainConfig
from vlmdpo.report import html as pages
from vlmdpo.report.diagnosis import Finding

# (title, [(metric, label, colour)], (level, its label)); a chart without its metrics is left out.
CHARTS: tuple[tuple[str, list[tuple[str, str, str]], tuple[float, str] | None], ...] = (
    ("Loss", [("loss", "loss", "blue")], (math.log(2), "ln 2: no preference yet")),
    ("Reward accuracy", [("rewards/accuracies", "accuracy", "green")], (0.5, "chance")),
    (
        "Rewards",
        [("rewards/chosen", "chosen", "green"), ("rewards/rejected", "rejected", "red")],
        (0.0, "reference"),
    ),
    (
        "Reward margin (chosen − rejected)",
        [("rewards/margins", "margin", "violet")],
        (0.0, "reference"),
    ),
    (
        "Log-probs of answers",
        [("logps/chosen", "chosen", "green"), ("logps/rejected", "rejected", "red")],
        None,
    ),
    ("Learning rate", [("learning_rate", "learning rate", "blue")], None),
    ("Gradient norm", [("grad_norm", "gradient norm", "violet")], None),
)
_SCRIPT = "run.js"


def page(
    *,
    title: str,
    steps: tuple[int, int],
    lines: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    pictures: Mapping[int, Sequence[str]],
    settings: Mapping[str, Any],
    findings: Sequence[Finding],
    facts: Sequence[str] = (),
) -> str:
    """The page as HTML.

    Args:
        steps: (done, total).
        lines, evaluations: logged metrics, each with "step"; those of the test split by the same
            names.
        samples: records of `samples.jsonl`.
        pictures: by row, the data URIs of its images.
        settings: the run's settings.
        facts: sentences on its data and on what it computes.
    """
    script = files("vlmdpo.report").joinpath("templates", _SCRIPT).read_text(encoding="utf-8")
    return (
        pages.environment()
        .get_template("run.html")
        .render(
            title=title,
            done=steps[0],
            total=steps[1],
            last=lines[-1] if lines else None,
            evaluated=evaluations[-1] if evaluations else None,
            findings=findings,
            facts=facts,
            samples=_by_row(samples, pictures),
            settings=pages.by_difference(settings, TrainConfig),
            data=_data(lines, evaluations),
            script=script,
            hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def image_uris(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[str]]:
    """{row number: its images as data URIs} of decoded rows of the prepared dataset."""
    return {row["row"]: [pages.thumbnail(image) for image in row["images"] or []] for row in rows}


def _data(
    lines: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The charts with their points, for the script."""
    charts = []
    for title, series, level in CHARTS:
        curves = [
            {
                "label": label + more,
                "colour": colour,
                "dotted": bool(more),
                "points": _points(logged, name),
            }
            for name, label, colour in series
            for logged, more in ((lines, ""), (evaluations, ", test split"))
        ]
        curves = [curve for curve in curves if curve["points"]]
        if curves:
            # The learning rate has no noise to smooth away.
            exact = [name for name, _, _ in series] == ["learning_rate"]
            charts.append({"title": title, "curves": curves, "level": level, "exact": exact})
    return charts


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [
        (line["step"], line[name])
        for line in lines
        if isinstance(line.get(name), (int, float)) and math.isfinite(line[name])
    ]


def _by_row(
    samples: Sequence[Mapping[str, Any]], pictures: Mapping[int, Sequence[str]]
) -> list[dict[str, Any]]:
    """Each row with its answers by step; unchanged answers are marked."""
    rows: dict[int, dict[str, Any]] = {}
    for record in samples:
        row = rows.setdefault(
            record["row"], {**record, "pictures": pictures.get(record["row"], ()), "answers": []}
        )
        before = row["answers"][-1]["answer"] if row["answers"] else None
        row["answers"].append(
            {"step": record["step"], "answer": record["answer"], "same": record["answer"] == before}
        )
    return list(rows.values())
