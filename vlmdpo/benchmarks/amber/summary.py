"""From responses to everything a report says: official figures, how sure they are, and base against
tuned. No models.

Official figures are AMBER's own, to the digit. All else stands beside them and never in their
place: intervals (bootstrap over pictures), how often a model said No, what always saying No would
score, and what cannot be read as an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmdpo.benchmarks.amber import generative as gen
from vlmdpo.benchmarks.amber.nouns import Extractor
from vlmdpo.benchmarks.amber.questions import Benchmark, Question
from vlmdpo.benchmarks.amber.scores import COVERS, score
from vlmdpo.benchmarks.stats import Bootstrap, Interval, compare
from vlmdpo.benchmarks.verdict import verdict

Responses = Sequence[tuple[int, str]]
FEWER_IS_BETTER = ("chair", "hal", "cog")
_EXAMPLES = 5
_SHOWN = 160  # characters of an unreadable answer


def summarize(
    benchmark: Benchmark,
    responses: Mapping[str, Responses],
    said: Mapping[str, Mapping[int, str]],
    extractor: Callable[[], Extractor],
) -> dict[str, Any]:
    """The figures of a report.

    Args:
        benchmark: what was asked; responses to anything else of the data are passed over.
        responses: by model ("base", "tuned"), (id, response) as AMBER's scorer takes them; ids may
            repeat.
        said: by model and id, the model's own words.
        extractor: makes what finds nouns; only called where there are descriptions.
    """
    questions = {question.id: question for question in benchmark.questions}
    descriptions = {description.id: description for description in benchmark.descriptions}
    answers = {who: [r for r in given if r[0] in questions] for who, given in responses.items()}
    texts = {who: [r for r in given if r[0] in descriptions] for who, given in responses.items()}
    report: dict[str, Any] = {
        "questions": {
            name: sum(q.dimension in dims for q in questions.values())
            for name, dims in COVERS.items()
        },
        "descriptions": len(descriptions),
        "scores": {who: score(questions, given) for who, given in answers.items()},
        "intervals": {who: _intervals(questions, given) for who, given in answers.items()},
        "models": {
            who: _facts(benchmark, answers[who], texts[who], said[who]) for who in responses
        },
        "always_no": score(questions, [(number, "No") for number in questions]),
        "comparison": None,
    }
    report["coverage"] = min(facts["coverage"] for facts in report["models"].values())
    report["unparsed"] = sum(facts["unparsed"] for facts in report["models"].values())
    if len(responses) == 2 and all(answers.values()):
        report["comparison"] = _comparison(
            questions, dict(answers["base"]), dict(answers["tuned"]), said
        )
    if any(texts.values()):
        _add_descriptions(report, benchmark, texts, extractor())
    return report


def _facts(
    benchmark: Benchmark, answers: Responses, texts: Responses, said: Mapping[int, str]
) -> dict[str, Any]:
    unread = [(number, response) for number, response in answers if response not in ("Yes", "No")]
    asked = [
        len(group)
        for group, given in ((benchmark.questions, answers), (benchmark.descriptions, texts))
        if given
    ]
    answered = len({number for number, _ in (*answers, *texts)})
    return {
        "coverage": answered / sum(asked) if asked else 0.0,
        "answered": len({number for number, _ in answers}),
        "described": len({number for number, _ in texts}),
        "unparsed": len(unread),
        "unparsed_but_begin_so": sum(verdict(response) is not None for _, response in unread),
        "unparsed_examples": [
            {"id": n, "said": said.get(n, response)[:_SHOWN]} for n, response in unread[:_EXAMPLES]
        ],
        "said_no": sum(response == "No" for _, response in answers) / len(answers)
        if answers
        else None,
    }


def _intervals(
    questions: Mapping[int, Question], answers: Responses
) -> dict[str, dict[str, Interval | None]]:
    """The 95% intervals of accuracy and F1, in per cent, for each name that has a response."""
    if not answers:
        return {}
    asked = [questions[number] for number, _ in answers]
    bootstrap = Bootstrap([question.image for question in asked])
    right = [
        response.lower() == q.truth and response in ("Yes", "No")
        for q, (_, response) in zip(asked, answers, strict=True)
    ]
    said_no = [response == "No" for _, response in answers]
    found = {}
    for name, dimensions in COVERS.items():
        of = [q.dimension in dimensions for q in asked]
        if not any(of):
            continue

        def within(values: Sequence[bool], of: Sequence[bool] = of) -> list[float]:
            return [float(value and inside) for value, inside in zip(values, of, strict=True)]

        no = [
            float(s) + float(q.truth == "no") if inside else 0.0
            for q, s, inside in zip(asked, said_no, of, strict=True)
        ]
        both = within([s and q.truth == "no" for q, s in zip(asked, said_no, strict=True)])
        found[name] = {
            "accuracy": bootstrap.interval(
                bootstrap.per_cent(within(right), within([True] * len(of)))
            ),
            "f1": bootstrap.interval(bootstrap.per_cent([2 * value for value in both], no)),
        }
    return found


def _comparison(
    questions: Mapping[int, Question],
    base: Mapping[int, str],
    tuned: Mapping[int, str],
    said: Mapping[str, Mapping[int, str]],
) -> dict[str, Any]:
    asked = [q for q in questions.values() if q.id in base and q.id in tuned]
    if not asked:
        return {}
    right = [[responses[q.id].lower() == q.truth for q in asked] for responses in (base, tuned)]

    def figures(of: Sequence[int]) -> dict[str, Any]:
        found = compare(
            [right[0][i] for i in of], [right[1][i] for i in of], [asked[i].image for i in of]
        )
        return {
            "delta_accuracy": found.delta_accuracy,
            "ci95": list(found.ci95),
            "mcnemar_p": found.mcnemar_p,
            "fixed": found.fixed,
            "broken": found.broken,
            "verdict": judge(found.ci95, more_is_better=True),
        }

    by_dimension = {
        name: [i for i, q in enumerate(asked) if q.dimension in dims]
        for name, dims in COVERS.items()
    }
    flips = [
        {
            "id": q.id,
            "image": q.image,
            "dimension": q.dimension,
            "question": q.text,
            "truth": q.truth,
            "base": said["base"].get(q.id, base[q.id]),
            "tuned": said["tuned"].get(q.id, tuned[q.id]),
            "fixed": after,
        }
        for q, before, after in zip(asked, *right, strict=True)
        if before != after
    ]
    return {
        **figures(range(len(asked))),
        "n": len(asked),
        "dimensions": {
            name: figures(of)
            for name, of in by_dimension.items()
            if of and name != "Discriminative"
        },
        "flips": flips,
    }


def judge(interval: Interval | None, *, more_is_better: bool) -> str:
    """What a difference may be called: nothing, where its interval holds zero."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "no difference shown"
    return "improvement" if (interval[0] > 0) == more_is_better else "decline"


def _add_descriptions(
    report: dict[str, Any],
    benchmark: Benchmark,
    texts: Mapping[str, Responses],
    extractor: Extractor,
) -> None:
    """The generative figures of each model, their intervals, their difference, and whose
    hallucinations changed.
    """
    assert benchmark.vocabulary is not None
    by_id = {description.id: description for description in benchmark.descriptions}
    counted = {
        who: gen.count_all(by_id, given, benchmark.vocabulary, extractor)
        for who, given in texts.items()
        if given
    }
    for who, counts in counted.items():
        report["scores"][who]["Generative"] = {
            **gen.figures([c for _, c in counts]),
            "extractor": extractor.name,
        }
        bootstrap = Bootstrap([by_id[number].image for number, _ in counts])
        drawn = _drawn(bootstrap, [c for _, c in counts])
        report["intervals"][who]["Generative"] = {
            name: bootstrap.interval(values) for name, values in drawn.items()
        }
    if len(counted) == 2:
        report["generative_comparison"] = _described(
            by_id, dict(counted["base"]), dict(counted["tuned"]), texts
        )


def _drawn(bootstrap: Bootstrap, counts: Sequence[gen.Counts]) -> dict[str, Any]:
    """The bootstrap draws of each generative figure, in per cent."""
    parts: dict[str, tuple[list[int], list[int]]] = {
        "chair": ([len(c.hallucinated) for c in counts], [c.nouns for c in counts]),
        "cover": ([c.covered for c in counts], [c.truths for c in counts]),
        "hal": ([int(bool(c.hallucinated)) for c in counts], [1 for _ in counts]),
        "cog": ([c.named_hallu for c in counts], [c.hallus for c in counts]),
    }
    return {name: bootstrap.per_cent(part, whole) for name, (part, whole) in parts.items()}


def _described(
    by_id: Mapping[int, Any],
    base: Mapping[int, gen.Counts],
    tuned: Mapping[int, gen.Counts],
    texts: Mapping[str, Responses],
) -> dict[str, Any]:
    both = [number for number in base if number in tuned]
    if not both:
        return {}
    bootstrap = Bootstrap([by_id[number].image for number in both])
    counts = [[side[number] for number in both] for side in (base, tuned)]
    drawn = [_drawn(bootstrap, side) for side in counts]
    figures = [gen.figures(side) for side in counts]
    found: dict[str, Any] = {}
    for name in gen.FIGURES:
        interval = bootstrap.interval(drawn[1][name] - drawn[0][name])
        found[name] = {
            "delta": round(figures[1][name] - figures[0][name], 1),
            "ci95": interval,
            "verdict": judge(interval, more_is_better=name not in FEWER_IS_BETTER),
        }
    said = {who: dict(given) for who, given in texts.items()}
    changed = [
        {
            "id": number,
            "image": by_id[number].image,
            "truth": list(by_id[number].truth),
            **{who: said[who][number] for who in ("base", "tuned")},
            "base_hallucinated": list(base[number].hallucinated),
            "tuned_hallucinated": list(tuned[number].hallucinated),
            "fixed": len(tuned[number].hallucinated) < len(base[number].hallucinated),
        }
        for number in both
        if len(base[number].hallucinated) != len(tuned[number].hallucinated)
    ]
    return {"figures": found, "n": len(both), "flips": changed}
