"""What `vlmdpo prepare` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.data import store
from vlmdpo.data.pairs import SIDES

REPORT = "report.html"
_WARN_DROPPED_SHARE = 0.05


def show(report: dict[str, Any]) -> None:
    """Print the summary and an example row."""
    show_summary(report)
    _show_example(report)


def show_summary(report: dict[str, Any]) -> None:
    """Print the result, what was dropped or changed and why, and token counts."""
    done = "Found prepared" if report["reused"] else "Prepared"
    ui.result(
        f"{done}: {report['rows_out']:,} of {ui.count(report['rows_in'], 'pair')} of "
        f"{report['dataset']} in {report['path']}"
    )
    ui.result(f"  {distinct_line(report['rows_out'], report['distinct'])}")
    _show_sources(report)
    if len(report["splits"]) > 1:
        ui.result(
            "  "
            + ", ".join(f"{split} {rows:,}" for split, rows in report["splits"].items())
            + "; no image is in both splits"
        )
    side = (
        f"at most {report['max_image_side']} px per side"
        if report["max_image_side"]
        else "not bounded"
    )
    page = Path(report["path"]) / REPORT
    ui.result(
        f"  images {side}, {ui.human_bytes(report['bytes'])} on disk"
        + (f"; report: {page}" if page.is_file() else "")
    )
    if report["dropped"]:
        rows = [
            [reason, f"{count:,}", report["dropped_examples"][reason][0]]
            for reason, count in report["dropped"].items()
        ]
        ui.table(
            "Dropped rows",
            ["Reason", "Rows", "First one"],
            rows,
            note="Rows are counted from 0, lines of a file from 1.",
            text=(0, 2),
        )
    if report["changed"]:
        changed = ", ".join(f"{name} {count:,}" for name, count in report["changed"].items())
        ui.result(f"  corrected or noted, by number of rows: {changed}")
    _show_lengths(report)
    dropped = sum(report["dropped"].values())
    if dropped > _WARN_DROPPED_SHARE * report["rows_in"]:
        worst = max(report["dropped"], key=lambda reason: report["dropped"][reason])
        ui.warn(
            f"{100 * dropped / report['rows_in']:.0f}% of the rows were dropped, most for "
            f"{worst}; find out why before training"
        )


def distinct_line(pairs: int, distinct: Mapping[str, Any]) -> str:
    """How many different images and prompts there are, and pairs for each prompt."""
    per_prompt = distinct["pairs_per_prompt"]
    return (
        f"{ui.count(pairs, 'pair')}: {ui.count(distinct['images'], 'image')}, "
        f"{ui.count(distinct['prompts'], 'prompt')}, "
        f"{per_prompt:.1f} pairs a prompt"
    )


def _show_sources(report: dict[str, Any]) -> None:
    """Where the rows of a mixture come from."""
    if len(report["sources"]) < 2:
        return
    rows = [
        [
            *(source["dataset"], f"{source['rows_in']:,}", f"{source['usable']:,}"),
            *(f"{source['mix']:g}", f"{source['rows_out']:,}"),
        ]
        for source in report["sources"]
    ]
    ui.table("Sources", ["Dataset", "Rows", "Usable", "Mix", "Pairs"], rows, text=(0,))


def _show_lengths(report: dict[str, Any]) -> None:
    labels = {
        "prompt_tokens": "prompt",
        "image_tokens": "of which images",
        "chosen_tokens": "chosen",
        "rejected_tokens": "rejected",
        "longest_tokens": "longer sequence",
    }
    rows = [
        [
            label,
            *(
                f"{report['lengths'][name][figure]:,.0f}"
                for figure in ("min", "median", "p95", "max")
            ),
        ]
        for name, label in labels.items()
    ]
    ui.table(
        f"Tokens per row, by the processor of {report['model']}",
        ["", "Min", "Median", "95%", "Max"],
        rows,
    )


def _show_example(report: dict[str, Any]) -> None:
    example = report["example"]
    sizes = ", ".join(example["images"]) or "none"
    ui.result(
        f"\nRow {example['row']} (source row {example['source_row']}) as {report['model']} reads "
        f"it, image {sizes}:"
    )
    if ui.can_draw_images():
        for image in store.load(Path(report["path"]))[example["row"]]["images"]:
            ui.image(image)
    ui.tokens(
        "prompt",
        [example["prompt"]],
        f"{ui.count(example['tokens']['prompt'], 'token')}, none in the loss",
        counted=False,
    )
    for side in SIDES:
        ui.tokens(
            side,
            example["loss_tokens"][side],
            f"{ui.count(example['tokens'][side], 'token')}, all in the loss",
            counted=True,
        )
