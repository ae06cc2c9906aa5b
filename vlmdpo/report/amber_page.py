"""The reports of eval-amber: `report.html`, one file without network access, and `report.md`.

All text is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmdpo.benchmarks.amber.benchmark import Amber
from vlmdpo.benchmarks.amber.published import beside_article, why_not_beside_article
from vlmdpo.benchmarks.amber.scores import COVERS
from vlmdpo.benchmarks.base import Benchmark, Id
from vlmdpo.benchmarks.verdict import verdict
from vlmdpo.config import EvalAmberConfig
from vlmdpo.errors import DataError
from vlmdpo.report import html as pages

GALLERY = 24  # answers shown with their images; scores.json has all
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_FIGURES = (
    ("chair", "CHAIR", False),
    ("cover", "Cover", True),
    ("hal", "Hal", False),
    ("cog", "Cog", False),
)
_SIGNIFICANT = ("improvement", "decline")
_HEADLINE = {
    "improvement": "The tuned model answers better: the interval excludes zero.",
    "decline": "The tuned model answers worse: the interval excludes zero.",
    "no difference shown": "No difference is shown: the interval contains zero.",
}


def span(interval: Sequence[float] | None, *, sign: bool = False) -> str:
    """An interval as text, or a dash for None."""
    if interval is None:
        return "-"
    return " to ".join(f"{end:+.1f}" if sign else f"{end:.1f}" for end in interval)


def part_in_words(part: Mapping[str, int]) -> str:
    """What `--limit` left, as a sentence."""
    halves = (
        f"{part[name]:,} of {part[f'of_{name}']:,} {what}"
        for name, what in (("questions", "yes/no questions"), ("descriptions", "descriptions"))
        if part[f"of_{name}"]
    )
    return f"A part only: {' and '.join(halves)}, drawn by kind and truth (seed {part['seed']})."


def page(
    report: Mapping[str, Any], benchmark: Amber, answers: Mapping[str, Mapping[Id, str]]
) -> str:
    """The page as HTML, with reduced images embedded.

    Args:
        report: what `vlmdpo eval-amber` returns.
        benchmark: what was asked, and how to open its images.
        answers: by role and id, the answers in the model's own words.
    """
    thumbnail = _thumbnails(benchmark)
    return (
        pages.environment({"span": span})
        .get_template("amber.html")
        .render(
            **_context(report),
            setting_groups=pages.by_difference(report["settings"], EvalAmberConfig),
            gallery=[
                {**flip, "picture": thumbnail(flip["image"])}
                for flip in _gallery(report, benchmark, answers)
            ],
            descriptions=[
                {**one, "picture": thumbnail(one["image"])} for one in _changed_descriptions(report)
            ],
        )
    )


def markdown(report: Mapping[str, Any]) -> str:
    """The same figures as Markdown, without images."""
    jinja = pages.environment({"span": span, "cell": as_cell}, escape=False)
    return jinja.get_template("amber.md").render(**_context(report)).strip() + "\n"


def as_cell(value: Any) -> str:
    """Text that is safe in a Markdown table: without bars, tags, links, line breaks, and what
    moves a terminal's cursor.
    """
    text = _CONTROL.sub("\ufffd", " ".join(str(value).split()))
    for mark in "&\\|`*_<>[]":  # & first: it begins what the others become
        text = text.replace(mark, f"&#{ord(mark)};" if mark in "<>&" else f"\\{mark}")
    return text


def _context(report: Mapping[str, Any]) -> dict[str, Any]:
    """What both templates need."""
    scores = report["scores"]
    answered = [role for role in scores if "Discriminative" in scores[role]]
    described = [role for role in scores if "Generative" in scores[role]]
    comparison = report["comparison"] or None
    compared = report.get("generative_comparison", {})
    why_not_article = why_not_beside_article(report)
    return {
        "report": report,
        "headline": _HEADLINE[comparison["verdict"]] if comparison else "",
        "also": _descriptions_headline(compared.get("figures", {})),
        "comparison": comparison,
        "answered": answered,
        "names": [name for name in COVERS if any(name in scores[role] for role in answered)],
        "described": described,
        "figures": _FIGURES,
        "extractor": scores[described[0]]["Generative"]["extractor"] if described else "",
        "compared": compared.get("figures", {}),
        "part": part_in_words(report["part"]) if report["part"] else "",
        "article": beside_article(report) if answered and not why_not_article else [],
        "why_not_article": why_not_article if answered and report["is_amber"] else "",
        "settings": {
            name: value for name, value in report["settings"].items() if value not in (None, [], ())
        },
    }


def _descriptions_headline(figures: Mapping[str, Any]) -> str:
    """What the descriptions show, in a sentence; "" if they were not compared."""
    if not figures:
        return ""
    significant = [
        f"{label}: {figures[key]['verdict']}"
        for key, label, _ in _FIGURES
        if figures[key]["verdict"] in _SIGNIFICANT
    ]
    return f"Descriptions: {'; '.join(significant) or 'no difference shown in any figure'}."


def _gallery(
    report: Mapping[str, Any], benchmark: Amber, answers: Mapping[str, Mapping[Id, str]]
) -> list[dict[str, Any]]:
    """Answers that changed, good and bad in proportion; wrong answers if one model was asked."""
    if report["comparison"]:
        return pages.evenly(report["comparison"]["flips"], GALLERY)
    if len(report["scores"]) > 1:
        return []
    [role] = report["scores"]
    texts = answers[role]
    wrong = [
        {
            "id": q.id,
            "image": q.image,
            "dimension": q.dimension,
            "question": q.text,
            "truth": q.truth,
            role: texts[q.id],
        }
        for q in benchmark.questions
        if q.id in texts and (verdict(texts[q.id]) or "").lower() != q.truth
    ]
    return pages.evenly(wrong, GALLERY)


def _changed_descriptions(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return pages.evenly(report.get("generative_comparison", {}).get("flips", []), GALLERY // 2)


def _thumbnails(benchmark: Benchmark) -> Callable[[str], str | None]:
    """A function from an image's name to its data URI, reduced; None if it cannot be read."""
    made: dict[str, str | None] = {}

    def thumbnail(name: str) -> str | None:
        if name not in made:
            made[name] = _data_uri(benchmark, name)
        return made[name]

    return thumbnail


def _data_uri(benchmark: Benchmark, name: str) -> str | None:
    try:
        return pages.thumbnail(benchmark.images.open(name))
    except DataError:  # scoring a response file needs no images
        return None
