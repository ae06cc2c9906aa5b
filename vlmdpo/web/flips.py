"""Examples from an evaluation: the questions whose answers changed between base and tuned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmdpo.benchmarks.answers import RUN
from vlmdpo.benchmarks.base import Images
from vlmdpo.config.evaluate import LMMS
from vlmdpo.errors import DataError
from vlmdpo.models.adapter_files import WEIGHTS
from vlmdpo.report import evaluations
from vlmdpo.report.evaluations import SCORES
from vlmdpo.report.html import evenly
from vlmdpo.web.examples import PER_SOURCE, Example

_DESCRIBE = "Describe this image."  # AMBER's only prompt for descriptions; its flips leave it out


def from_evaluation(folder: Path, adapter: Path, image_folder: Path, flag: str) -> list[Example]:
    """What changed, in a folder that `eval` wrote for one benchmark, or `eval-amber`.

    Args:
        adapter: the one that is compared.
        image_folder: where the examples' images are written.
        flag: the option that names `folder`, in messages.

    Raises DataError for a folder of something else or of another adapter, and where nothing
    changed that can be shown.
    """
    report = _read(folder, flag)
    _check_adapter(folder, report, adapter, flag)
    if report["benchmark"].startswith(LMMS):
        raise DataError(
            f"{flag}: '{folder}' is of lmms-eval, which keeps no images to ask about; name an "
            "evaluation by another benchmark"
        )
    flips = _flips(report)
    if not flips:
        raise DataError(f"{flag}: {_why_none(report, folder)}")
    title = "eval-amber" if report["benchmark"] == "amber" else report["title"]
    images = evaluations.images_of(report)
    examples = from_flips(evenly(flips, PER_SOURCE), image_folder, images, f"changed in {title}")
    if not examples:
        raise DataError(
            f"{flag}: of {images}, none of the images that '{folder}' is about can be read, such "
            f"as '{flips[0]['image']}'; were they moved?"
        )
    return examples


def from_flips(
    flips: Sequence[Mapping[str, Any]], folder: Path, images: Images, source: str
) -> list[Example]:
    """Questions about these images. Missing images are left out."""
    examples = []
    for flip in flips:
        try:
            image = images.open(flip["image"])
        except (DataError, KeyError):  # images may have been moved since
            continue
        path = folder / f"changed-{sum(1 for _ in folder.glob('changed-*.png'))}.png"
        image.save(path)
        examples.append(Example(path, flip["question"] or _DESCRIBE, source))
    return examples


def _read(folder: Path, flag: str) -> dict[str, Any]:
    """The report in a folder, in the form that all benchmarks have. Raises DataError."""
    inner = sorted(path.parent.name for path in folder.glob(f"*/{SCORES}"))
    if inner and not (folder / SCORES).is_file():
        raise DataError(
            f"{flag}: '{folder}' holds several evaluations; name one: {', '.join(inner)}"
        )
    try:
        report = evaluations.read(folder)
        _ = report["benchmark"], report["title"], evaluations.images_of(report)
        _ = [(flip["image"], flip["question"]) for flip in _flips(report)]
    except DataError as problem:
        raise DataError(f"{flag}: {problem}") from problem
    except (KeyError, TypeError, AttributeError) as problem:
        raise DataError(
            f"{flag}: '{folder}' is damaged ({type(problem).__name__}: {problem}); evaluate again"
        ) from problem
    return report


def _flips(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list((report["comparison"] or {}).get("flips", []))


def _why_none(report: Mapping[str, Any], folder: Path) -> str:
    if len(report["scores"]) < 2:
        return (
            f"'{folder}' has the scores of one model, so no answer changed; evaluate base and "
            "tuned, with --adapter"
        )
    return f"'{folder}': no answer changed between base and tuned for better or worse"


def _check_adapter(folder: Path, report: Mapping[str, Any], adapter: Path, flag: str) -> None:
    """Raise DataError for an evaluation of another adapter, by its weights."""
    from vlmdpo.models.digest import file_digest

    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
        evaluated = run.get("adapter_digest")
    except (OSError, ValueError, AttributeError) as problem:
        raise DataError(
            f"{flag}: '{folder}' was not written by vlmdpo eval or eval-amber: {problem}"
        ) from problem
    if evaluated is None or not (adapter / WEIGHTS).is_file():
        return  # without --adapter nothing changed; an adapter that is missing is said elsewhere
    if file_digest(adapter / WEIGHTS)[:16] != evaluated:
        raise DataError(
            f"{flag}: '{folder}' is an evaluation of another adapter ({report.get('adapter')}), or "
            f"of this one before it was trained again; evaluate '{adapter}'"
        )
