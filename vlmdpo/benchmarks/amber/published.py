"""Published figures, shown beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmdpo.benchmarks.base import Published

_SOURCE = (
    'the article "Preference Optimization for Vision Language Models with TRL" (2024); accuracy '
    "and F1 of all 14,216 yes/no questions"
)
# Accuracy and F1 on AMBER's discriminative task, from the article "Preference Optimization for
# Vision Language Models with TRL" (2024).
ARTICLE = (
    ("GPT-4o", 88.8, 91.6),
    ("Idefics2+DPO", 85.9, 89.4),
    ("Idefics2", 85.8, 89.1),
    ("GPT-4v", 83.4, 87.4),
    ("MiniGemini", 82.6, 87.6),
    ("LLaVA-NeXT", 81.4, 85.4),
    ("QWEN-VL", 81.9, 86.4),
    ("LURE", 73.5, 77.7),
    ("OPERA", 75.2, 78.3),
    ("Less-is-more", 72.4, 75.8),
    ("VCD", 71.8, 74.9),
)


def rows() -> tuple[Published, ...]:
    """The article's table."""
    return tuple(
        Published(model, {"Discriminative/accuracy": accuracy, "Discriminative/f1": f1}, _SOURCE)
        for model, accuracy, f1 in ARTICLE
    )


def why_not_beside_article(report: Mapping[str, Any]) -> str | None:
    """Why figures of AMBER's questions cannot stand beside the article's; None if they can.

    The article's figures are of all 14,216 questions, so ours must be too.
    """
    asked = report["questions"]["Discriminative"]
    answered = min(facts["answered"] for facts in report["models"].values())
    if report["is_amber"] and answered == asked:
        return None
    if report["is_amber"]:
        return f"only {answered:,} of {asked:,} questions were answered"
    return "these are not all of AMBER's questions"


def beside_article(report: Mapping[str, Any]) -> list[tuple[str, float, float, bool]]:
    """(name, accuracy, F1, whether it is ours), the article's rows and ours, best first."""
    ours = [
        (
            f"{report['model']} ({role}), here",
            table["Discriminative"]["accuracy"],
            table["Discriminative"]["f1"],
            True,
        )
        for role, table in report["scores"].items()
        if "Discriminative" in table
    ]
    return sorted([*ours, *((*row, False) for row in ARTICLE)], key=lambda row: -row[1])
