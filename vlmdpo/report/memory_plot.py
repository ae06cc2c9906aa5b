"""The memory of a step as stacked bars: the article's table beside what vlmdpo allocates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_GIB = 2**30


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: two bars in GiB, and the GPU's capacity as a line if one is given.

    Raises DataError.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from vlmdpo.errors import DataError

    bars = {
        "the article's table": [(c["name"], c["bytes"]) for c in report["components"]],
        "vlmdpo": [
            (c["name"], c["bytes"]) for c in report["allocated"]["components"] if c["bytes"]
        ],
    }
    if report["peak_bytes"] is not None:
        bars["vlmdpo"].append(
            ("Activations and buffers", report["peak_bytes"] - report["allocated"]["total_bytes"])
        )
    names = list(dict.fromkeys(name for parts in bars.values() for name, _ in parts))
    colours = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))
    figure, axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    labelled: set[str] = set()
    for place, parts in enumerate(bars.values()):
        left = 0.0
        for name, size in parts:
            axes.barh(
                place,
                size / _GIB,
                left=left,
                color=colours[name],
                label=None if name in labelled else name,
                height=0.6,
            )
            labelled.add(name)
            left += size / _GIB
        axes.text(left, place, f" {left:.1f} GiB", va="center")
    if report["verdict"]:
        gpu = report["gpu"]
        capacity = gpu["capacity_bytes"] / _GIB
        axes.axvline(capacity, color="black", linestyle="--")
        axes.text(
            capacity,
            0.5,
            f" {gpu['name']}: {report['verdict']}",
            va="center",
            ha="left",
            fontsize=9,
        )
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("GiB (2**30 bytes)")
    axes.set_title(f"{report['model']}, {report['dtype']}: memory of DPO", loc="left")
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    part = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part, dpi=130, format="png")
        part.rename(path)
    except OSError as problem:
        raise DataError(
            f"--plot: cannot write '{path}': {problem.strerror or problem}"
        ) from problem
    finally:
        pyplot.close(figure)
