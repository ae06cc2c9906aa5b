"""The figures of an evaluation as rows: base, tuned, and the change, with their intervals.

The screen, the pages and the model card show the same rows. Reports of `vlmdpo eval-amber`, which
have keys of their own, are first brought into the form of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmdpo.benchmarks.base import ALL, PER_CENT, SHARE
from vlmdpo.benchmarks.yes_no import OURS

_LABELS = {
    **{"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1"},
    **{"yes_ratio": "said yes", "chair_s": "CHAIRs", "chair_i": "CHAIRi", "len": "words"},
    **{"chair": "CHAIR", "cover": "Cover", "hal": "Hal", "cog": "Cog"},
}
_FEWER_IS_BETTER = ("chair", "hal", "cog")  # of AMBER's
# The groups that hold the figures of another reading of the answers.
_READINGS = {
    OURS: "read by vlmdpo (an answer that does not begin with yes or no is wrong)",
    "evaluate_py": "read by the rule of POPE's evaluate.py",
    "repope_rule": "read by the rule of RePOPE's scorer",
}
BETTER, WORSE = "improvement", "decline"


@dataclass(frozen=True)
class Cell:
    """A number with its 95% interval, as texts; "-" where there is none."""

    value: str
    interval: str = "-"


@dataclass(frozen=True)
class Row:
    """One figure of one group.

    Attributes:
        figure: its label, with an arrow to where it should go.
        roles: by role, its value.
        change: of tuned against base; None where it was not compared.
        verdict: "improvement", "decline", "no difference shown", or "more" and "less" of what is
            neither good nor bad; "" where it was not compared.
    """

    group: str
    figure: str
    roles: Mapping[str, Cell]
    change: Cell | None
    verdict: str

    @property
    def is_significant(self) -> bool:
        """Whether tuning made a difference for better or worse."""
        return self.verdict in (BETTER, WORSE)


def rows(report: Mapping[str, Any]) -> list[Row]:
    """Every figure under the benchmark's own names, in the order of the report."""
    other = _readings(report)
    return [row for row in _all_rows(report) if row.group.partition("/")[0] not in other]


def other_readings(report: Mapping[str, Any]) -> dict[str, list[Row]]:
    """By what they are, the figures of other readings of the same answers, ours first."""
    found: dict[str, list[Row]] = {}
    other = _readings(report)
    for row in _all_rows(report):
        reading, _, group = row.group.partition("/")
        if reading in other:
            shown = replace(row, group=group)
            found.setdefault(_READINGS.get(reading, reading), []).append(shown)
    return found


def _readings(report: Mapping[str, Any]) -> set[str]:
    """The groups that hold groups. Others may have a stroke in their own names: "left/right"."""
    return {
        group
        for groups in report["scores"].values()
        for group, names in groups.items()
        if any(isinstance(value, Mapping) for value in names.values())
    }


def _all_rows(report: Mapping[str, Any]) -> Iterator[Row]:
    scores = report["scores"]
    about = report["figures"]
    intervals = {role: dict(_flat(report["intervals"].get(role, {}))) for role in scores}
    flat = {role: dict(_flat(groups)) for role, groups in scores.items()}
    changes = (report["comparison"] or {}).get("figures", {})
    for group, name in dict.fromkeys(key for keys in flat.values() for key in keys):
        unit = about[name]["unit"]
        change = changes.get(group, {}).get(name)
        yield Row(
            group,
            f"{_LABELS.get(name, name)}{_ARROWS[about[name]['more_is_better']]}",
            {
                role: Cell(
                    number(values.get((group, name)), unit),
                    span(intervals[role].get((group, name)), unit),
                )
                for role, values in flat.items()
            },
            change
            and Cell(
                number(change["delta"], unit, sign=True), span(change["ci95"], unit, sign=True)
            ),
            change["verdict"] if change else "",
        )


_ARROWS = {True: " ↑", False: " ↓", None: ""}


def _flat(groups: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[tuple[str, str], Any]]:
    """((group, figure), value) of every figure; nested groups are named "group/group"."""
    for group, names in groups.items():
        nested = {}
        for name, value in names.items():
            if isinstance(value, Mapping):
                nested[name] = value
            else:
                yield (f"{prefix}{group}", name), value
        if nested:
            yield from _flat(nested, f"{prefix}{group}/")


def number(value: float | None, unit: str, *, sign: bool = False) -> str:
    """A figure as text, shares in per cent."""
    if value is None:
        return "-"
    shown = 100 * value if unit == SHARE else value
    digits = 1 if unit in (SHARE, PER_CENT, "words") else 3
    if sign and shown and abs(shown) < 0.05:  # "+0.0" would hide on which side of zero it is
        digits = 3
    return f"{shown:+.{digits}f}" if sign else f"{shown:.{digits}f}"


def span(interval: Sequence[float] | None, unit: str, *, sign: bool = False) -> str:
    """An interval as text, shares in per cent."""
    if interval is None:
        return "-"
    return " to ".join(number(end, unit, sign=sign) for end in interval)


def baseline_in_words(report: Mapping[str, Any]) -> str:
    """What always giving the same answer would score, of the main group; "" without a baseline."""
    baseline = report.get("baseline")
    if not baseline:
        return ""
    figures = baseline["scores"][report["main"][0]]
    shown = (
        f"{_LABELS.get(name, name)} {number(figures[name], report['figures'][name]['unit'])}"
        for name in ("accuracy", "f1")
        if name in figures
    )
    return f"always {baseline['answer']}: {', '.join(shown)}"


def changes_in_words(report: Mapping[str, Any], verdict: str) -> list[str]:
    """The changes of this verdict, each as a phrase: "all, accuracy: +1.2 (+0.4 to +2.0)"."""
    return [
        f"{row.group + ', ' if row.group != ALL else ''}{row.figure.rstrip(' ↑↓')}: "
        f"{row.change.value} ({row.change.interval})"
        for row in rows(report)
        if row.verdict == verdict and row.change is not None
    ]


def published_in_words(report: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """A published row's figures in the units of the table beside it: "random F1 87.3"."""
    found = []
    for place, value in row["figures"].items():
        group, _, name = place.rpartition("/")
        shown = number(value, report["figures"][name]["unit"])
        found.append(f"{group} {_LABELS.get(name, name)} {shown}".strip())
    return ", ".join(found)


def in_common_form(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report of `vlmdpo eval` as it is; one of `vlmdpo eval-amber` in the same form."""
    if "figures" in report:
        return dict(report)
    comparison = report["comparison"] or {}
    described = report.get("generative_comparison") or {}
    by_group = {"Discriminative": comparison, **comparison.get("dimensions", {})}
    changes: dict[str, Any] = {
        group: {
            "accuracy": {
                "delta": change["delta_accuracy"],
                "ci95": change["ci95"],
                "verdict": change["verdict"],
            }
        }
        for group, change in by_group.items()
        if change
    }
    if described:
        changes["Generative"] = described["figures"]
    return {
        **report,
        "benchmark": "amber",
        "title": report["data"],
        "rule": "AMBER's own scorer" + _extractor(report),
        "questions": report["questions"]["Discriminative"],
        "unread": report["unparsed"],
        "scores": {
            role: {
                group: {name: value for name, value in names.items() if name != "extractor"}
                for group, names in groups.items()
            }
            for role, groups in report["scores"].items()
        },
        "figures": {
            name: {"unit": PER_CENT, "more_is_better": name not in _FEWER_IS_BETTER}
            for name in ("accuracy", "precision", "recall", "f1", "chair", "cover", "hal", "cog")
        },
        "models": {
            role: {"unread": facts["unparsed"], "words": facts["words_a_description"], **facts}
            for role, facts in report["models"].items()
        },
        "comparison": {
            **comparison,
            "figures": changes,
            "flips": [
                *({"group": flip["dimension"], **flip} for flip in comparison.get("flips", [])),
                *({"group": "Generative", "question": "", **f} for f in described.get("flips", [])),
            ],
        }
        if changes
        else None,
        "notes": [],
        "published": [],
    }


def _extractor(report: Mapping[str, Any]) -> str:
    """Of the figures of descriptions, what found their nouns."""
    found = {
        groups["Generative"]["extractor"]
        for groups in report["scores"].values()
        if "Generative" in groups
    }
    return "".join(f"; nouns found by the {name} extractor" for name in sorted(found))
