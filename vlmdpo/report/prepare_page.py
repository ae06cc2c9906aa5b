"""The report of prepare: `report.html`, one file without network access, and a histogram.

All text is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmdpo.data.images import open_bytes
from vlmdpo.data.pairs import SIDES
from vlmdpo.data.sources import as_stored
from vlmdpo.report import html as pages

SAMPLES = 24  # pairs shown
_USUAL, _FAR = 99, 2  # per cent of the values, and how many times their range an axis may span


def draw_lengths(columns: Mapping[str, Any], path: Path) -> None:
    """Write a PNG with histograms of tokens: answers, prompt, and the longer whole sequence.

    Args:
        columns: arrays of `store.COUNTS`, one entry per row.
    """
    import matplotlib
    import numpy

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3))
    answers = {side: columns[f"{side}_tokens"] for side in SIDES}
    longer = columns["prompt_tokens"] + numpy.maximum(*answers.values())
    sequences = {
        "prompt, images included": columns["prompt_tokens"],
        "prompt and longer answer": longer,
    }
    for axes, title, shown in ((left, "Answers", answers), (right, "Sequences", sequences)):
        everything = numpy.concatenate(list(shown.values()))
        top, longest = _top(everything), int(everything.max())
        edges = numpy.histogram_bin_edges(numpy.minimum(everything, top), bins=40)
        for label, tokens in shown.items():
            axes.hist(
                numpy.minimum(tokens, top), bins=edges, histtype="step", linewidth=1.6, label=label
            )
        more = f" (the last bin: up to {longest:,})" if longest > top else ""
        axes.set_title(title + more, loc="left", fontsize=11)
        axes.legend(fontsize=8)
        axes.set_xlabel("tokens")
        axes.set_ylabel("rows")
    # By hand: a layout engine takes longer than everything else here.
    figure.subplots_adjust(left=0.08, right=0.99, top=0.9, bottom=0.17, wspace=0.2)
    # Without the version of matplotlib, so that equal data gives equal bytes.
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})
    pyplot.close(figure)


def _top(values: Any) -> float:
    """Where a histogram ends: the largest value, unless a few values lie far beyond the others and
    would crush them into the first bin.
    """
    import numpy

    usual, most = numpy.percentile(values, (_USUAL, 100))
    low = values.min()
    return float(most if most - low <= _FAR * max(usual - low, 1) else usual)


def page(manifest: Mapping[str, Any], dataset: Any, lengths: Path, sides: Mapping[int, int]) -> str:
    """The page as HTML, with reduced images embedded.

    Args:
        manifest: what `prepare` found.
        dataset: the prepared training rows.
        lengths: the histogram of `draw_lengths`.
        sides: {longer side in pixels: number of images}.
    """
    count = len(dataset)
    rows = sorted({i * count // min(SAMPLES, count) for i in range(min(SAMPLES, count))})
    template = pages.environment().get_template("prepare.html")
    return template.render(
        manifest=manifest,
        lengths=pages.uri(lengths.read_bytes(), "png"),
        sizes=_sizes(sides),
        samples=[
            {"number": row, **_sample(one)}
            for row, one in zip(rows, as_stored(dataset.select(rows)), strict=True)
        ],
    )


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    turns = [
        (turn["role"], " ".join(part["text"] or "[image]" for part in turn["content"]))
        for turn in row["prompt"]
    ]
    answers = {side: row[side][0]["content"][0]["text"] for side in SIDES}
    copied = ("source_row", "prompt_tokens", "chosen_tokens", "rejected_tokens", "image_tokens")
    return {
        "pictures": [_thumbnail(stored) for stored in row["images"]],
        "turns": turns,
        **answers,
    } | {name: row[name] for name in copied}


def _thumbnail(stored: Mapping[str, Any]) -> str:
    image = open_bytes(stored["bytes"])
    # Lets a JPEG be decoded at a size not much larger than needed.
    image.draft("RGB", (2 * pages.SIDE_PX, 2 * pages.SIDE_PX))
    return pages.thumbnail(image)


def _sizes(sides: Mapping[int, int]) -> list[dict[str, Any]]:
    """A histogram of longer sides with eight bins."""
    if not sides:
        return []
    import numpy

    low, high = min(sides), max(sides)
    top = int(_top(numpy.repeat(list(sides), list(sides.values()))))
    step = max(1, -(-(top - low + 1) // 8))
    last = (top - low) // step
    counts: dict[int, int] = {}
    for side, images in sides.items():
        at = min((side - low) // step, last)
        counts[at] = counts.get(at, 0) + images
    most = max(counts.values())
    return [
        {
            "label": _range(low + at * step, high if at == last else low + (at + 1) * step - 1),
            "count": count,
            "share": 100 * count / most,
        }
        for at, count in sorted(counts.items())
    ]


def _range(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low}-{high}"
