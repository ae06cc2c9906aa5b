"""What `vlmdpo make-pairs` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.data.left_out import in_words
from vlmdpo.report.make_pairs_page import SKIPPED


def show(report: dict[str, Any]) -> None:
    """Print what was made of what, what was left out, and the next command."""
    before = report["drawn_before"]
    ui.result(
        f"{ui.count(report['pairs'], 'pair')} from {ui.count(report['samples'], 'answer')} to "
        f"{ui.count(report['prompts'], 'prompt')}"
        + (f" ({before:,} of them answered before)" if before else "")
        + f": {report['path']}"
    )
    chosen, rejected = (report["mean_length"][side] for side in ("chosen", "rejected"))
    ui.result(f"  mean length: chosen {chosen:.1f}, rejected {rejected:.1f} tokens")
    ui.result(f"  judge: {_judge(report)}")
    if report["judge_agreement"] is not None:
        ui.result(
            f"  where both tell two answers apart, the judge orders "
            f"{100 * report['judge_agreement']:.0f}% of "
            f"{ui.count(report['judge_agreement_pairs'], 'pair')} as the truth does"
        )
    if report["judge_cost"]:
        cost = ", ".join(
            f"{name.replace('_', ' ')} {n:,}" for name, n in report["judge_cost"].items()
        )
        ui.result(f"  asked of the server in this run: {cost}")
    _show_skipped(report)
    show_left_out(report)
    ui.result(f"  report: {report['output_dir']}/report.html")
    ui.result(f"Next: vlmdpo prepare --model {report['model']} --dataset {report['path']}")


def show_left_out(report: dict[str, Any]) -> None:
    """Warn of images and lines of `--input` that could not be asked about."""
    if report["left_out"]:
        count = sum(found["count"] for found in report["left_out"].values())
        what = "question" if Path(report["input"]).is_file() else "image"
        ui.warn(f"{ui.count(count, what)} left out: {in_words(report['left_out'])}")


def _judge(report: dict[str, Any]) -> str:
    unread, verdicts = report["unread_verdicts"], report["verdicts"]
    by = f" by {report['judge_model']}" if report["judge_model"] else ""
    return (
        f"{report['judge']}{by}, {ui.count(verdicts, 'verdict')}"
        + (f", {unread:,} of them unread" if unread else "")
        + ("; the model judges itself" if report["self_judged"] else "")
    )


def _show_skipped(report: dict[str, Any]) -> None:
    for reason, count in report["skipped"].items():
        ui.result(f"  left out: {SKIPPED[reason]}: {count:,}")
    if report["replaced_for_length"]:
        replaced = ui.count(report["replaced_for_length"], "pair")
        ui.result(f"  {replaced} replaced by others of the same prompt, for their lengths")
