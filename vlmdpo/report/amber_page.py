"""What people look at after eval-amber: `report.html`, one file without network, and `report.md`.
Every text is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmdpo.benchmarks.amber.published import beside_article
from vlmdpo.benchmarks.amber.questions import Benchmark
from vlmdpo.benchmarks.amber.scores import COVERS
from vlmdpo.benchmarks.verdict import verdict
from vlmdpo.errors import DataError
from vlmdpo.report import html as pages

GALLERY = 24  # answers that are shown with their pictures; scores.json has all
_FIGURES = (
    ("chair", "CHAIR", False),
    ("cover", "Cover", True),
    ("hal", "Hal", False),
    ("cog", "Cog", False),
)
_CLEAR = ("improvement", "decline")
_HEADLINE = {
    "improvement": "The tuned model answers better, and the interval is clear of zero.",
    "decline": "The tuned model answers worse, and the interval is clear of zero.",
    "no difference shown": "No difference is shown: the interval holds zero.",
}


def span(interval: Sequence[float] | None, *, sign: bool = False) -> str:
    """An interval as text, or a dash where there is none."""
    if interval is None:
        return "-"
    return " to ".join(f"{end:+.1f}" if sign else f"{end:.1f}" for end in interval)


def page(
    report: Mapping[str, Any], benchmark: Benchmark, said: Mapping[str, Mapping[int, str]]
) -> str:
    """The page as one HTML text; pictures are embedded, reduced.

    Args:
        report: what `vlmdpo eval-amber` returns.
        benchmark: what was asked, and what opens its pictures.
        said: by model and id, the model's own words.
    """
    thumbnail = _thumbnails(benchmark)
    return (
        pages.environment({"span": span})
        .get_template("amber.html")
        .render(
            **_told(report),
            gallery=[
                {**flip, "picture": thumbnail(flip["image"])}
                for flip in _gallery(report, benchmark, said)
            ],
            descriptions=[
                {**one, "picture": thumbnail(one["image"])} for one in _changed_descriptions(report)
            ],
        )
    )


def markdown(report: Mapping[str, Any]) -> str:
    """The same figures as Markdown, without pictures."""
    jinja = pages.environment({"span": span, "cell": as_cell}, escape=False)
    return jinja.get_template("amber.md").render(**_told(report)).strip() + "\n"


def as_cell(value: Any) -> str:
    """Text that breaks neither a Markdown table nor out of it: no bars, tags, links or line breaks."""
    text = " ".join(str(value).split())
    for mark in "\\|`*_<>[]&":
        text = text.replace(mark, f"&#{ord(mark)};" if mark in "<>&" else f"\\{mark}")
    return text


def _told(report: Mapping[str, Any]) -> dict[str, Any]:
    """What both forms tell, ready to print."""
    scores = report["scores"]
    answered = [who for who in scores if "Discriminative" in scores[who]]
    described = [who for who in scores if "Generative" in scores[who]]
    comparison = report["comparison"] or None
    compared = report.get("generative_comparison", {})
    return {
        "report": report,
        "headline": _HEADLINE[comparison["verdict"]] if comparison else "",
        "also": _of_descriptions(compared.get("figures", {})),
        "comparison": comparison,
        "answered": answered,
        "names": [name for name in COVERS if any(name in scores[who] for who in answered)],
        "described": described,
        "figures": _FIGURES,
        "extractor": scores[described[0]]["Generative"]["extractor"] if described else "",
        "compared": compared.get("figures", {}),
        "article": beside_article(report) if report["is_amber"] and answered else [],
        "settings": {
            name: value for name, value in report["settings"].items() if value not in (None, [], ())
        },
    }


def _of_descriptions(figures: Mapping[str, Any]) -> str:
    """What is shown of the descriptions, in a sentence; "" where they were not compared."""
    if not figures:
        return ""
    shown = [
        f"{label}: {figures[key]['verdict']}"
        for key, label, _ in _FIGURES
        if figures[key]["verdict"] in _CLEAR
    ]
    return f"Descriptions: {'; '.join(shown) or 'no difference shown in any figure'}."


def _gallery(
    report: Mapping[str, Any], benchmark: Benchmark, said: Mapping[str, Mapping[int, str]]
) -> list[dict[str, Any]]:
    """Answers that changed, for better and worse in the proportion they stand in; of a single
    model, wrong answers.
    """
    if report["comparison"]:
        return pages.evenly(report["comparison"]["flips"], GALLERY)
    if len(report["scores"]) > 1:
        return []
    [who] = report["scores"]
    words = said[who]
    wrong = [
        {
            "id": q.id,
            "image": q.image,
            "dimension": q.dimension,
            "question": q.text,
            "truth": q.truth,
            who: words[q.id],
        }
        for q in benchmark.questions
        if q.id in words and (verdict(words[q.id]) or "").lower() != q.truth
    ]
    return pages.evenly(wrong, GALLERY)


def _changed_descriptions(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return pages.evenly(report.get("generative_comparison", {}).get("flips", []), GALLERY // 2)


def _thumbnails(benchmark: Benchmark) -> Callable[[str], str | None]:
    """What makes a picture's data URI, reduced; None for one that cannot be read, which the page
    then says.
    """
    made: dict[str, str | None] = {}

    def thumbnail(name: str) -> str | None:
        if name not in made:
            made[name] = _data_uri(benchmark, name)
        return made[name]

    return thumbnail


def _data_uri(benchmark: Benchmark, name: str) -> str | None:
    try:
        return pages.thumbnail(benchmark.picture(name))
    except DataError:  # scoring a response file needs no pictures
        return None
