"""What `vlmdpo eval` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmdpo import ui
from vlmdpo.benchmarks.base import SHARE
from vlmdpo.commands import eval_amber_screen
from vlmdpo.report import figure_rows
from vlmdpo.report.evaluations import part_in_words
from vlmdpo.report.figure_rows import Row


def show(report: dict[str, Any]) -> None:
    """Print the figures, base beside tuned, with their uncertainty."""
    if report["benchmark"] == "amber":
        eval_amber_screen.show(report)
    else:
        _show_figures(report)
    if "page" in report:
        ui.result(f"All evaluations of this model: {report['page']}")


def _show_figures(report: dict[str, Any]) -> None:
    title = f"{report['title']} ({report['model']})"
    has_shares = any(about["unit"] == SHARE for about in report["figures"].values())
    note = f"{'Shares in per cent. ' if has_shares else ''}Answers read by: {report['rule']}."
    _table(title, figure_rows.rows(report), report, note)
    for reading, rows in list(figure_rows.other_readings(report).items())[:1]:
        _table(f"{report['title']}, {reading}", _main_rows(rows), report, "All are in the report.")
    if baseline := figure_rows.baseline_in_words(report):
        ui.result(f"for comparison, {baseline}")
    _show_comparison(report["comparison"])
    for role, facts in report["models"].items():
        _show_facts(role, facts)
    if report["part"]:
        ui.result(part_in_words(report["part"]))
    for row in report["published"]:
        figures = figure_rows.published_in_words(report, row)
        ui.result(f"Published: {row['model']}: {figures} ({row['source']})")
    for note in report["notes"]:
        ui.result(f"Note: {note}.")
    if report["coverage"] < 1:
        ui.warn(
            f"answers cover {100 * report['coverage']:.1f}% of what was asked; the figures are of "
            "those"
        )
    for what, name in (("image", "bad_pictures"), ("question", "bad_questions")):
        if report[name]:
            ui.result(f"{ui.count(len(report[name]), what)} could not be used")
    if "output_dir" in report:
        ui.result(f"Answers, scores and report: {report['output_dir']}/report.html")


def _main_rows(rows: Sequence[Row]) -> list[Row]:
    """Accuracy and F1: the screen need not have all twice."""
    return [row for row in rows if row.figure.startswith(("accuracy", "F1"))]


def _table(title: str, rows: Sequence[Row], report: dict[str, Any], note: str) -> None:
    roles = list(report["scores"])
    is_compared = any(row.change for row in rows)
    head = ["", ""] + [cell for role in roles for cell in (role, "95%")]
    head += ["change", "95%", ""] if is_compared else []
    lines = []
    group = None
    for row in rows:
        line = ["" if row.group == group else row.group, row.figure]
        group = row.group
        for role in roles:
            line += [row.roles[role].value, row.roles[role].interval]
        if is_compared:
            line += [row.change.value, row.change.interval] if row.change else ["", ""]
            line.append(row.verdict)
        lines.append(line)
    text = (0, 1, len(head) - 1) if is_compared else (0, 1)
    ui.table(title, head, lines, note=note, text=text)


def _show_comparison(comparison: dict[str, Any] | None) -> None:
    if not comparison or comparison.get("delta_accuracy") is None:
        return
    low, high = comparison["ci95"]
    ui.result(
        f"tuned − base: {comparison['delta_accuracy']:+.1f} points of accuracy, 95% interval "
        f"{low:+.1f} to {high:+.1f} ({comparison['verdict']}); exact McNemar p = "
        f"{comparison['mcnemar_p']:.2g} ({ui.count(comparison['fixed'], 'answer')} fixed, "
        f"{comparison['broken']} broken)"
    )


def _show_facts(role: str, facts: dict[str, Any]) -> None:
    """How long and repetitive answers are, and those that cannot be read."""
    if facts["words"] is None:  # lmms-eval need not log answers
        return
    said = (
        f"{role}: {facts['words']:.1f} words an answer, repetition {100 * facts['repetition']:.1f}%"
    )
    if facts["unread"]:
        examples = ", ".join(repr(one["answer"][:40]) for one in facts["unread_examples"][:2])
        said += f"; {ui.count(facts['unread'], 'answer')} cannot be read, such as {examples}"
    ui.result(said)
