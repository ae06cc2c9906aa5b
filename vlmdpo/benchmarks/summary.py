"""From the sheets of one or two models to a report: figures, their intervals, base against tuned.

What a benchmark's own scorer would say stands under the benchmark's own names. Everything else is
given beside it and never in its place. No models here, and nothing of any one benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from vlmdpo.benchmarks.base import (
    Asked,
    Benchmark,
    Figure,
    Id,
    Responses,
    Sheet,
    everything_asked,
)
from vlmdpo.benchmarks.stats import Bootstrap, Interval, compare

if TYPE_CHECKING:
    from vlmdpo.benchmarks.base import Numbers

Some = TypeVar("Some", bound=Asked)
Figures = Mapping[str, "Figure | Mapping[str, Figure]"]
_EXAMPLES = 5
_MAX_CHARACTERS = 160  # of an unreadable answer
_WORDS = 4  # words in a row that count as a repetition if they stood before


def summarize(
    benchmark: Benchmark,
    responses: Mapping[str, Responses],
    answers: Mapping[str, Mapping[Id, str]],
) -> dict[str, Any]:
    """The figures of a report.

    Args:
        benchmark: what was asked; other responses are ignored.
        responses: by role ("base", "tuned"), (id, response) as the benchmark's scorer takes them.
        answers: by role and id, the answers in the model's own words.
    """
    asked = {one.id: one for one in everything_asked(benchmark)}
    given = {role: [r for r in some if r[0] in asked] for role, some in responses.items()}
    sheets = {role: benchmark.score(some) for role, some in given.items()}
    models = {role: _facts(benchmark, given[role], sheets[role]) for role in given}
    report: dict[str, Any] = {
        "questions": len(benchmark.questions),
        "descriptions": len(benchmark.descriptions),
        "scores": {role: scores(some) for role, some in sheets.items()},
        "intervals": {role: intervals(some) for role, some in sheets.items()},
        "models": models,
        "coverage": min(facts["coverage"] for facts in models.values()),
        "unread": sum(facts["unread"] for facts in models.values()),
        "comparison": None,
        "baseline": _baseline(benchmark),
        "figures": about_figures([sheet for some in sheets.values() for sheet in some]),
        "notes": list(benchmark.notes),
        "published": [
            {"model": row.model, "figures": dict(row.figures), "source": row.source}
            for row in benchmark.published
        ],
    }
    if len(given) == 2 and all(given.values()):
        report["comparison"] = _comparison(benchmark, asked, given, answers)
    return report


def _baseline(benchmark: Benchmark) -> dict[str, Any] | None:
    """The figures of giving the benchmark's baseline answer to every question."""
    if not benchmark.baseline or not benchmark.questions:
        return None
    same = [(question.id, benchmark.baseline) for question in benchmark.questions]
    return {"answer": benchmark.baseline, "scores": scores(benchmark.score(same))}


def scores(sheets: Sequence[Sheet]) -> dict[str, Any]:
    """By group and name, the figures of a model."""
    return _mapped(sheets, lambda figure, _: figure.number)


def intervals(sheets: Sequence[Sheet]) -> dict[str, Any]:
    """By group and name, the 95% interval of each figure that has one."""
    return _mapped(
        sheets,
        lambda figure, bootstrap: bootstrap.interval(draws(figure, bootstrap)),
        only_ratios=True,
    )


def about_figures(sheets: Sequence[Sheet]) -> dict[str, Any]:
    """By name, the unit of a figure, and whether more of it is better (None: neither)."""
    return {
        name: {"unit": figure.unit, "more_is_better": figure.more_is_better}
        for sheet in sheets
        for _, name, figure in _flat(sheet.groups)
    }


def draws(figure: Figure, bootstrap: Bootstrap) -> Any:
    """(draws,) of a figure; NaN where it is undefined."""
    drawn = [bootstrap.quotients(ratio.part, ratio.whole, figure.scale) for ratio in figure.ratios]
    return sum(drawn[1:], drawn[0]) / len(drawn)


def _mapped(sheets: Sequence[Sheet], compute: Any, *, only_ratios: bool = False) -> dict[str, Any]:
    """The nesting of the sheets' groups with something computed of each figure."""

    def within(group: Figures, bootstrap: Bootstrap) -> dict[str, Any]:
        return {
            name: (
                compute(figure, bootstrap)
                if isinstance(figure, Figure)
                else within(figure, bootstrap)
            )
            for name, figure in group.items()
            if not (only_ratios and isinstance(figure, Figure) and not figure.ratios)
        }

    return {
        name: within(group, bootstrap)
        for sheet in sheets
        if len(sheet.ids)
        for bootstrap in [Bootstrap(sheet.images)]
        for name, group in sheet.groups.items()
    }


def _facts(benchmark: Benchmark, given: Responses, sheets: Sequence[Sheet]) -> dict[str, Any]:
    """One model's coverage, its unreadable answers, and how long and repetitive its answers are."""
    questions = {one.id for one in benchmark.questions}
    answered = {number for number, _ in given}
    text_of = dict(given)
    unread = [number for sheet in sheets for number in sheet.unread]
    # A model that was given one task only is not blamed for the other.
    tasks = [{one.id for one in some} for some in (benchmark.questions, benchmark.descriptions)]
    asked = sum(len(ids) for ids in tasks if ids & answered)
    return {
        "coverage": len(answered) / asked if asked else 0.0,
        "answered": len(answered & questions),
        "described": len(answered - questions),
        "unread": len(unread),
        "unread_examples": [
            {"id": number, "answer": text_of[number][:_MAX_CHARACTERS]}
            for number in unread[:_EXAMPLES]
        ],
        "words": mean([len(text.split()) for _, text in given]),
        "repetition": mean([repetition(text) for _, text in given]),
    }


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean; None of nothing."""
    return sum(values) / len(values) if values else None


def repetition(text: str) -> float:
    """The share of a text's runs of four words that have stood before in it; 0 for a short one."""
    words = text.lower().split()
    runs = [tuple(words[i : i + _WORDS]) for i in range(len(words) - _WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _comparison(
    benchmark: Benchmark,
    asked: Mapping[Id, Asked],
    given: Mapping[str, Responses],
    answers: Mapping[str, Mapping[Id, str]],
) -> dict[str, Any] | None:
    """Tuned against base on what both answered; None if that is nothing."""
    base, tuned = paired(benchmark, given["base"], given["tuned"])
    if not base:
        return None
    compared: dict[str, Any] = {"n": sum(len(sheet.ids) for sheet in base)}
    flips: list[dict[str, Any]] = []
    for before, after in zip(base, tuned, strict=True):
        if before.right is not None:
            compared |= _of_main_group(benchmark, before, after)
        flips += flipped(before, after, asked, answers)
    return {
        **compared,
        "figures": {
            group: names
            for before, after in zip(base, tuned, strict=True)
            for group, names in figure_changes(before, after).items()
        },
        "flips": flips,
    }


def paired(
    benchmark: Benchmark, base: Responses, tuned: Responses
) -> tuple[Sequence[Sheet], Sequence[Sheet]]:
    """The sheets of what both models answered, aligned; of an id answered twice, the last."""
    before, after = dict(base), dict(tuned)
    both = [number for number in before if number in after]
    if not both:
        return (), ()
    return (
        benchmark.score([(number, before[number]) for number in both]),
        benchmark.score([(number, after[number]) for number in both]),
    )


def _of_main_group(benchmark: Benchmark, before: Sheet, after: Sheet) -> dict[str, Any]:
    """The comparison answer by answer, of the main group and of every other."""
    main = benchmark.main[0]
    by_group = answer_changes(before, after)
    return {
        **by_group[main],
        "groups": {name: changes for name, changes in by_group.items() if name != main},
    }


def answer_changes(before: Sheet, after: Sheet) -> dict[str, dict[str, Any]]:
    """By group, the change of accuracy, its interval, McNemar's test, and answers fixed and broken.

    A question that a benchmark asks twice about an image counts each time in the accuracy and its
    interval, but once in the test and the numbers of answers.
    """
    import numpy as np

    assert before.right is not None
    assert after.right is not None
    changes = {}
    for name, member in before.members.items():
        where = np.flatnonzero(member).tolist()
        if not where:
            continue
        once = [i for i in where if before.is_repeat is None or not before.is_repeat[i]]
        result, test = (
            compare(before.right[some], after.right[some], [before.images[i] for i in some])
            for some in (where, once)
        )
        changes[name] = {
            "delta_accuracy": result.delta_accuracy,
            "ci95": list(result.ci95),
            "mcnemar_p": test.mcnemar_p,
            "fixed": test.fixed,
            "broken": test.broken,
            "verdict": judge(result.ci95, more_is_better=True),
        }
    return changes


def judge(interval: Interval | None, *, more_is_better: bool | None) -> str:
    """What a difference may be called: nothing if its interval contains zero."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "no difference shown"
    if more_is_better is None:
        return "more" if interval[0] > 0 else "less"
    return "improvement" if (interval[0] > 0) == more_is_better else "decline"


def figure_changes(before: Sheet, after: Sheet) -> dict[str, Any]:
    """By group and name, the change of each figure, its paired interval, and what it may be called.
    Nested groups are named "group/group".
    """
    bootstrap = Bootstrap(before.images)
    changes: dict[str, dict[str, Any]] = {}
    for (group, name, old), (_, _, new) in zip(
        _flat(before.groups), _flat(after.groups), strict=True
    ):
        if not old.ratios or not new.ratios:
            continue
        interval = bootstrap.interval(draws(new, bootstrap) - draws(old, bootstrap))
        delta = None if old.number is None or new.number is None else new.number - old.number
        changes.setdefault(group, {})[name] = {
            "delta": delta,
            "ci95": interval,
            "verdict": judge(interval, more_is_better=old.more_is_better),
        }
    return changes


def _flat(groups: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Figure]]:
    """(group, name, figure) of every figure."""
    for group, names in groups.items():
        for name, figure in names.items():
            if isinstance(figure, Figure):
                yield f"{prefix}{group}", name, figure
        nested = {name: inner for name, inner in names.items() if not isinstance(inner, Figure)}
        yield from _flat(nested, f"{prefix}{group}/")


def flipped(
    before: Sheet,
    after: Sheet,
    asked: Mapping[Id, Some],
    answers: Mapping[str, Mapping[Id, str]],
) -> list[dict[str, Any]]:
    """The answers that changed for better or worse, each once: from wrong to right or back, or, of
    descriptions, to more or fewer hallucinations.
    """
    repeats: Numbers | Sequence[bool] = (
        before.is_repeat if before.is_repeat is not None else [False] * len(before.ids)
    )
    flips = []
    for i, number in enumerate(before.ids):
        fixed = _is_fixed(before, after, i)
        if fixed is None or repeats[i]:
            continue
        one = asked[number]
        flips.append(
            {
                "id": number,
                "image": one.image,
                "group": getattr(one, "group", ""),
                "question": one.text,
                "truth": getattr(one, "truth", ""),
                "base": answers["base"].get(number, ""),
                "tuned": answers["tuned"].get(number, ""),
                "fixed": fixed,
                **{
                    f"{role}_{name}": value
                    for role, sheet in (("base", before), ("tuned", after))
                    for name, value in sheet.details.get(number, {}).items()
                },
            }
        )
    return flips


def _is_fixed(before: Sheet, after: Sheet, i: int) -> bool | None:
    """Whether the i-th answer changed for the better; None if it did not change."""
    if before.right is not None and after.right is not None:
        old, new = bool(before.right[i]), bool(after.right[i])
    else:
        number = before.ids[i]
        counts = [
            len(sheet.details.get(number, {}).get("hallucinated", ())) for sheet in (before, after)
        ]
        # Fewer is better.
        old, new = counts[0] <= counts[1], counts[1] <= counts[0]
    return None if old == new else new
