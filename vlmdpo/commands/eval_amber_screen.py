"""What `vlmdpo eval-amber` prints."""

from __future__ import annotations

from typing import Any

from vlmdpo import ui
from vlmdpo.benchmarks.amber.published import beside_article, why_not_beside_article
from vlmdpo.benchmarks.amber.scores import COVERS
from vlmdpo.report.amber_page import part_in_words, span
from vlmdpo.report.html import evenly

PAGE = "report.html"
_GENERATIVE = (("chair", "CHAIR ↓"), ("cover", "Cover ↑"), ("hal", "Hal ↓"), ("cog", "Cog ↓"))


def show(report: dict[str, Any]) -> None:
    """Print the scores by dimension, base beside tuned, with their uncertainty."""
    _show_questions(report)
    _show_descriptions(report)
    if report["comparison"]:
        show_comparison(report["comparison"])
    if report["coverage"] < 1:
        ui.warn(
            f"answers cover {100 * report['coverage']:.1f}% of what was asked; the figures are of "
            "those"
        )
    if report["part"]:
        ui.result(part_in_words(report["part"]))
    if report["is_amber"] and any("Discriminative" in table for table in report["scores"].values()):
        _show_article(report)
    if report["bad_pictures"]:
        ui.result(
            f"{ui.count(len(report['bad_pictures']), 'image')} could not be read; coverage "
            f"{100 * report['coverage']:.1f}%"
        )
    if report["bad_questions"]:
        ui.result(
            f"{ui.count(len(report['bad_questions']), 'question')} could not be asked; coverage "
            f"{100 * report['coverage']:.1f}%"
        )
    if "output_dir" in report:
        ui.result(f"Answers, scores and report: {report['output_dir']}/{PAGE}")


def _show_questions(report: dict[str, Any]) -> None:
    scores = {role: table for role, table in report["scores"].items() if "Discriminative" in table}
    if not scores:
        return
    head = ["", "n"] + [cell for role in scores for cell in (f"{role} acc", "prec", "recall", "F1")]
    names = [name for name in COVERS if any(name in table for table in scores.values())]
    rows = [
        [name, f"{report['questions'][name]:,}"]
        + [cell for role in scores for cell in _percentages(scores[role].get(name))]
        for name in names
    ]
    note = 'Per cent; the positive class is "No".'
    ui.table(
        f"{report['data']}, discriminative ({report['model']})", head, rows, strong=[0], note=note
    )
    for role in scores:
        _show_facts(role, report["models"][role], report["questions"]["Discriminative"])
    always = report["always_no"]["Discriminative"]
    ui.result(f"for comparison, always No: accuracy {always['accuracy']}, F1 {always['f1']}")


def _show_facts(role: str, facts: dict[str, Any], asked: int) -> None:
    unread = ""
    if facts["unparsed"]:
        examples = ", ".join(repr(one["said"][:40]) for one in facts["unparsed_examples"][:2])
        count = facts["unparsed"]
        unread = (
            f"; {count:,} answers are neither Yes nor No and count as wrong, such as {examples}"
            if count > 1
            else f"; 1 answer is neither Yes nor No and counts as wrong: {examples}"
        )
    ui.result(
        f"{role}: said No to {100 * facts['said_no']:.1f}% of the questions, "
        f"answered {100 * facts['answered'] / asked:.1f}% of them{unread}"
    )
    if facts["unparsed_but_begin_so"]:
        ui.result(
            f"{facts['unparsed_but_begin_so']} of these begin with Yes or No; AMBER's own scorer "
            "counts only the exact words"
        )


def _percentages(figures: dict[str, float] | None) -> list[str]:
    """Accuracy, precision, recall and F1 as cells; dashes if there are none."""
    return [
        f"{figures[name]:.1f}" if figures else "-"
        for name in ("accuracy", "precision", "recall", "f1")
    ]


def _show_descriptions(report: dict[str, Any]) -> None:
    described = {
        role: table["Generative"]
        for role, table in report["scores"].items()
        if "Generative" in table
    }
    if not described:
        return
    extractor = next(iter(described.values()))["extractor"]
    compared = report.get("generative_comparison", {}).get("figures", {})
    rows = []
    for name, label in _GENERATIVE:
        row = [label]
        for role, figures in described.items():
            row += [f"{figures[name]:.1f}", span(report["intervals"][role]["Generative"][name])]
        if name in compared:
            row += [
                f"{compared[name]['delta']:+.1f}",
                span(compared[name]["ci95"], sign=True),
                compared[name]["verdict"],
            ]
        rows.append(row)
    head = (
        [""]
        + [cell for role in described for cell in (role, "95%")]
        + (["change", "95%", ""] if compared else [])
    )
    note = (
        f"Per cent, of {_described(report)} descriptions; nouns found by the {extractor} extractor."
    )
    if extractor == "lexicon":
        note += " Not comparable with published figures: those need --extractor official."
    title = f"{report['data']}, generative, {extractor} extractor ({report['model']})"
    ui.table(title, head, rows, note=note, text=(0, len(head) - 1) if compared else (0,))


def _described(report: dict[str, Any]) -> str:
    """How many descriptions the figures are of, as in "62 of 1,004"."""
    asked = report["descriptions"]
    counts = {facts["described"] for facts in report["models"].values()}
    return f"{asked:,}" if counts == {asked} else f"{min(counts):,} of {asked:,}"


def show_comparison(comparison: dict[str, Any]) -> None:
    """Print the difference, its interval, and what it may be called."""
    low, high = comparison["ci95"]
    meaning = {
        "no difference shown": "the interval contains zero: no difference shown",
        "improvement": "the interval excludes zero: an improvement",
        "decline": "the interval excludes zero: a decline",
    }[comparison["verdict"]]
    ui.result(
        f"tuned − base: {comparison['delta_accuracy']:+.1f} points of accuracy, 95% interval "
        f"{low:+.1f} to {high:+.1f} ({meaning}); "
        f"exact McNemar p = {comparison['mcnemar_p']:.2g} "
        f"({ui.count(comparison['fixed'], 'answer')} fixed, "
        f"{comparison['broken']} broken)"
    )
    by_dimension = ", ".join(
        f"{name} {d['fixed']}/{d['broken']}" for name, d in comparison["dimensions"].items()
    )
    ui.result(f"fixed/broken by dimension: {by_dimension}")


def show_flips(comparison: dict[str, Any], count: int) -> None:
    """Print `count` of the answers that changed, evenly spaced, for better or worse."""
    flips = comparison["flips"]
    rows = [
        [f["question"], f["image"], f["truth"], f["base"], f["tuned"]] for f in evenly(flips, count)
    ]
    changed = ui.count(len(flips), "answer")
    title = f"{len(rows)} of {changed} that changed, evenly spaced, for better or worse"
    ui.table(title, ["Question", "Image", "Truth", "Base", "Tuned"], rows)


def _show_article(report: dict[str, Any]) -> None:
    if reason := why_not_beside_article(report):
        ui.result(f"Not beside the article's table: {reason}")
        return
    lines = beside_article(report)
    strong = [number for number, line in enumerate(lines) if line[-1]]
    rows = [[name, f"{accuracy:.1f}", f"{f1:.1f}"] for name, accuracy, f1, _ in lines]
    ui.table("Beside the article's table", ["Model", "Accuracy", "F1"], rows, strong=strong)
