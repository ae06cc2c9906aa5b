"""The evaluations of one model: a folder per benchmark, and one page over all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from vlmdpo.benchmarks.answers import write_text
from vlmdpo.benchmarks.base import Images
from vlmdpo.benchmarks.image_folder import DrawnImages, ImageFolder
from vlmdpo.config import EvalConfig
from vlmdpo.errors import DataError
from vlmdpo.report import figure_rows
from vlmdpo.report import html as pages
from vlmdpo.report.amber_page import as_cell

SCORES, PAGE, MARKDOWN = "scores.json", "report.html", "report.md"
# What reading raises on a file that is not a report.
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RecursionError, TemplateError)
_GALLERY = 12  # changed answers of a benchmark that are shown; scores.json has all


def read_all(
    folder: Path,
    include: Sequence[Path],
    model: tuple[str, str | None],
    replaced: Path | None = None,
) -> list[dict[str, Any]]:
    """The reports of the benchmarks in a folder, and of other folders, in the common form.

    Args:
        folder: of one model's evaluations; may be absent.
        include: folders with a scores.json of their own.
        model: (model, adapter) that all of them must be of.
        replaced: a folder that is left out, because a new evaluation will take its place.

    Raises DataError for a damaged report, and for one of another model.
    """
    found = sorted(path.parent for path in folder.glob(f"*/{SCORES}"))
    reports = []
    for one in (*(path for path in found if path != replaced), *include):
        report = read(one)
        theirs = (report["model"], report["adapter"])
        if not _is_same(theirs, model):
            raise DataError(
                f"'{one}' holds results of {_named(theirs)}, not of {_named(model)}; a page shows "
                "one model: choose another --output-dir"
                + (", or leave out --include" if one in include else "")
            )
        reports.append(report)
    return reports


def read(folder: Path) -> dict[str, Any]:
    """The report in a folder of `vlmdpo eval` or `vlmdpo eval-amber`, in the common form.

    Raises DataError.
    """
    path = folder / SCORES
    try:
        report = figure_rows.in_common_form(json.loads(path.read_text(encoding="utf-8")))
        _check(report)
        return report
    except OSError as problem:
        raise DataError(
            f"'{folder}' holds no results of vlmdpo eval: cannot read '{path}': "
            f"{problem.strerror or problem}"
        ) from problem
    except _DAMAGED as problem:
        raise DataError(
            f"'{path}' is damaged, or not of vlmdpo eval ({type(problem).__name__}: {problem}); "
            "remove it, or evaluate again with --overwrite"
        ) from problem


def _check(report: Mapping[str, Any]) -> None:
    """Fail, in any way, on a report that no page could be made of."""
    markdown([report])
    images_of(report)
    pages.by_difference(report["settings"], EvalConfig)
    for flip in (report["comparison"] or {}).get("flips", []):
        flip["image"], flip["id"], flip["fixed"], flip["base"], flip["tuned"]


def _is_same(one: tuple[str, str | None], other: tuple[str, str | None]) -> bool:
    """Whether two evaluations are of one model: the adapter may be named by another path."""
    adapters = [Path(adapter).resolve() if adapter else None for _, adapter in (one, other)]
    return one[0] == other[0] and adapters[0] == adapters[1]


def _named(model: tuple[str, str | None]) -> str:
    return f"'{model[0]}'" + (f" with '{model[1]}'" if model[1] else " without an adapter")


def write_pages(folder: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """report.html and report.md over some reports of one model. Raises DataError."""
    write_text(folder / PAGE, page(reports))
    write_text(folder / MARKDOWN, markdown(reports))


def page(reports: Sequence[Mapping[str, Any]]) -> str:
    """The page as HTML, with reduced images embedded; all text is escaped."""
    return (
        pages.environment()
        .get_template("evaluation.html")
        .render(
            **_context(reports),
            details=[
                {
                    "settings": pages.by_difference(report["settings"], EvalConfig),
                    "flips": _with_pictures(report),
                }
                for report in reports
            ],
        )
    )


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """The same figures as Markdown, without images."""
    jinja = pages.environment({"cell": as_cell}, escape=False)
    return jinja.get_template("evaluation.md").render(**_context(reports)).strip() + "\n"


def _context(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What both templates need."""
    first = reports[0]
    shown: list[dict[str, Any]] = [
        {
            "report": report,
            "rows": figure_rows.rows(report),
            "readings": figure_rows.other_readings(report),
            "roles": list(report["scores"]),
            "baseline": figure_rows.baseline_in_words(report),
            "published": [
                (row, figure_rows.published_in_words(report, row)) for row in report["published"]
            ],
            "part": part_in_words(report["part"]) if report["part"] else "",
            "flips": len((report["comparison"] or {}).get("flips", [])),
        }
        for report in reports
    ]
    return {
        "model": first["model"],
        "adapter": first["adapter"],
        "shown": shown,
        "compared": any(report["comparison"] for report in reports),
        "better": _changes(reports, figure_rows.BETTER),
        "worse": _changes(reports, figure_rows.WORSE),
        "unchanged": sum(
            row.verdict == "no difference shown" for one in shown for row in one["rows"]
        ),
    }


def _changes(reports: Sequence[Mapping[str, Any]], verdict: str) -> list[str]:
    return [
        f"{report['title']}: {change}"
        for report in reports
        for change in figure_rows.changes_in_words(report, verdict)
    ]


def part_in_words(part: Mapping[str, int]) -> str:
    """What `--limit` left, as a sentence."""
    halves = (
        f"{part[name]:,} of {part[f'of_{name}']:,} {name}"
        for name in ("questions", "descriptions")
        if part[f"of_{name}"]
    )
    # lmms-eval takes the first ones.
    how = f"drawn by group and answer (seed {part['seed']})" if "seed" in part else "the first ones"
    return f"A part only: {' and '.join(halves)}, {how}."


def _with_pictures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Changed answers, good and bad in proportion, each with its image."""
    flips = pages.evenly((report["comparison"] or {}).get("flips", []), _GALLERY)
    if not flips:
        return []
    thumbnail = _thumbnails(images_of(report))
    return [{**flip, "picture": thumbnail(flip["image"])} for flip in flips]


def image_folder(images: Images) -> str | None:
    """A folder of images by its full path, so that a report finds it from anywhere; None for images
    that are drawn.
    """
    return str(images.path.absolute()) if isinstance(images, ImageFolder) else None


def images_of(report: Mapping[str, Any]) -> Images:
    """Where the images of an evaluation lie, or lay."""
    settings = report["settings"]
    if report.get("image_folder"):
        return ImageFolder(Path(report["image_folder"]), report["title"])
    if settings.get("images"):
        return ImageFolder(Path(settings["images"]), report["title"])
    if report["benchmark"] == "amber" and not settings["data"]:
        from vlmdpo.tiny import evaluation

        return DrawnImages(evaluation.draw_image)
    if report["benchmark"] == "amber":
        return ImageFolder(Path(settings["data"]) / "image", report["title"])
    root = Path(settings["data"] or Path(report["benchmark"]).parent)
    return ImageFolder(root, report["title"])


def _thumbnails(images: Images) -> Callable[[str], str | None]:
    """A function from an image's name to its data URI, reduced; None if it cannot be read."""
    made: dict[str, str | None] = {}

    def thumbnail(name: str) -> str | None:
        if name not in made:
            try:
                made[name] = pages.thumbnail(images.open(name))
            except DataError:  # images may have been moved since
                made[name] = None
        return made[name]

    return thumbnail
