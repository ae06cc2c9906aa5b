"""Examples from an evaluation: the questions whose answers changed between base and tuned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmdpo.benchmarks.answers import RUN
from vlmdpo.benchmarks.image_folder import ImageFolder
from vlmdpo.config.evaluate import LMMS
from vlmdpo.errors import DataError
from vlmdpo.models.adapter_files import WEIGHTS
from vlmdpo.report.html import evenly
from vlmdpo.web.examples import PER_SOURCE, Example

SCORES = "scores.json"
_DESCRIBE = (
    "Describe this image."  # AMBER's only prompt for descriptions, which its flips leave out
)


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
    if str(report.get("benchmark")).startswith(LMMS):
        raise DataError(
            f"{flag}: '{folder}' is of lmms-eval, which keeps no images to ask about; name an "
            "evaluation by another benchmark"
        )
    flips = _flips(report)
    if not flips:
        raise DataError(f"{flag}: {_why_none(report, folder)}")
    title = "eval-amber" if "is_amber" in report else report["title"]
    images = _images(report)
    examples = from_flips(evenly(flips, PER_SOURCE), image_folder, images, f"changed in {title}")
    if not examples:
        place = f" of {images}" if images else ""
        raise DataError(
            f"{flag}: none of the images{place} that '{folder}' is about can be read, such as "
            f"'{flips[0]['image']}'; were they moved?"
        )
    return examples


def from_flips(
    flips: Sequence[Mapping[str, Any]], folder: Path, images: ImageFolder | None, source: str
) -> list[Example]:
    """Questions about a benchmark's images, or the embedded set's. Missing images are left out."""
    from vlmdpo.tiny import evaluation

    examples = []
    for flip in flips:
        try:
            image = images.open(flip["image"]) if images else evaluation.draw_image(flip["image"])
        except (DataError, KeyError):  # images may have been moved since
            continue
        path = folder / f"changed-{sum(1 for _ in folder.glob('changed-*.png'))}.png"
        image.save(path)
        examples.append(Example(path, flip["question"], source))
    return examples


def _read(folder: Path, flag: str) -> dict[str, Any]:
    """The report in a folder. Raises DataError."""
    if not (folder / SCORES).is_file() and (
        inner := sorted(path.parent.name for path in folder.glob(f"*/{SCORES}"))
    ):
        raise DataError(
            f"{flag}: '{folder}' holds several evaluations; name one: {', '.join(inner)}"
        )
    try:
        report = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        _ = [(flip["image"], flip["question"]) for flip in _flips(report)]
        _ = report["title"] if "is_amber" not in report else None
        _ = report["settings"]["data"], report["settings"]["images"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise DataError(
            f"{flag}: '{folder}' was not written by vlmdpo eval or eval-amber: {problem}"
        ) from problem
    assert isinstance(report, dict)
    return report


def _flips(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    answers = (report["comparison"] or {}).get("flips", [])
    descriptions = (report.get("generative_comparison") or {}).get("flips", [])
    return [*answers, *({"question": _DESCRIBE, **flip} for flip in descriptions)]


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


def _images(report: Mapping[str, Any]) -> ImageFolder | None:
    """Where the images of an evaluation are; None for the embedded set, which is drawn."""
    data, images = report["settings"]["data"], report["settings"]["images"]
    benchmark = report.get("benchmark", "amber")
    if images:
        return ImageFolder(Path(images), benchmark)
    if benchmark == "amber":
        return ImageFolder(Path(data) / "image", "AMBER") if data else None
    # Questions of one's own lie beside their images; others have them in their data folder.
    return ImageFolder(Path(data) if data else Path(benchmark).parent, benchmark)
