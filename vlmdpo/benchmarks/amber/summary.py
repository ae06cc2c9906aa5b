"""From responses to everything in a report: official figures, their intervals, base against tuned.

Official figures are AMBER's own, to the digit. Everything else is given beside them and never in
their place: bootstrap intervals over images, how often a model said No, the score of always saying
No, and answers that cannot be read. No models here.
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
_MAX_CHARACTERS = 160  # of an unreadable answer


def summarize(
    benchmark: Benchmark,
    responses: Mapping[str, Responses],
    answers: Mapping[str, Mapping[int, str]],
    extractor: Callable[[], Extractor],
) -> dict[str, Any]:
    """The figures of a report.

    Args:
        benchmark: what was asked; other responses are ignored.
        responses: by role ("base", "tuned"), (id, response) as AMBER's scorer takes them; an id may
            occur twice.
        answers: by role and id, the answers in the model's own words.
        extractor: makes the noun extractor; only called if there are descriptions.
    """
    questions = {question.id: question for question in benchmark.questions}
    descriptions = {description.id: description for description in benchmark.descriptions}
    verdicts = {role: [r for r in given if r[0] in questions] for role, given in responses.items()}
    texts = {role: [r for r in given if r[0] in descriptions] for role, given in responses.items()}
    report: dict[str, Any] = {
        "questions": {
            name: sum(q.dimension in dimensions for q in questions.values())
            for name, dimensions in COVERS.items()
        },
        "descriptions": len(descriptions),
        "scores": {role: score(questions, given) for role, given in verdicts.items()},
        "intervals": {role: _intervals(questions, given) for role, given in verdicts.items()},
        "models": {
            role: _facts(benchmark, verdicts[role], texts[role], answers[role])
            for role in responses
        },
        "always_no": score(questions, [(number, "No") for number in questions]),
        "comparison": None,
    }
    report["coverage"] = min(facts["coverage"] for facts in report["models"].values())
    report["unparsed"] = sum(facts["unparsed"] for facts in report["models"].values())
    if len(responses) == 2 and all(verdicts.values()):
        report["comparison"] = _comparison(
            questions, dict(verdicts["base"]), dict(verdicts["tuned"]), answers
        )
    if any(texts.values()):
        _add_descriptions(report, benchmark, texts, extractor())
    return report


def _facts(
    benchmark: Benchmark, verdicts: Responses, texts: Responses, answers: Mapping[int, str]
) -> dict[str, Any]:
    """One model's coverage, its unreadable answers, and how often it said No."""
    unread = [(number, response) for number, response in verdicts if response not in ("Yes", "No")]
    asked = [
        len(group)
        for group, given in ((benchmark.questions, verdicts), (benchmark.descriptions, texts))
        if given
    ]
    answered = len({number for number, _ in (*verdicts, *texts)})
    return {
        "coverage": answered / sum(asked) if asked else 0.0,
        "answered": len({number for number, _ in verdicts}),
        "described": len({number for number, _ in texts}),
        "words_a_description": (
            sum(len(response.split()) for _, response in texts) / len(texts) if texts else None
        ),
        "unparsed": len(unread),
        "unparsed_but_begin_so": sum(verdict(response) is not None for _, response in unread),
        "unparsed_examples": [
            {"id": n, "said": answers.get(n, response)[:_MAX_CHARACTERS]}
            for n, response in unread[:_EXAMPLES]
        ],
        "said_no": (
            sum(response == "No" for _, response in verdicts) / len(verdicts) if verdicts else None
        ),
    }


def _intervals(
    questions: Mapping[int, Question], answers: Responses
) -> dict[str, dict[str, Interval | None]]:
    """95% intervals of accuracy and F1, in per cent, for each name that has a response."""
    if not answers:
        return {}
    import numpy as np

    asked = [questions[number] for number, _ in answers]
    bootstrap = Bootstrap([question.image for question in asked])
    right = np.array(
        [_is_right(response, q) for q, (_, response) in zip(asked, answers, strict=True)]
    )
    said_no = np.array([response == "No" for _, response in answers])
    truly_no = np.array([q.truth == "no" for q in asked])
    intervals = {}
    for name, dimensions in COVERS.items():
        covered = np.array([q.dimension in dimensions for q in asked], dtype=float)
        if not covered.any():
            continue
        # F1 of the class "No" is 2 TP / (predicted No + true No).
        true_positives = 2 * covered * (said_no & truly_no)
        predicted_and_true = covered * (said_no.astype(float) + truly_no)
        intervals[name] = {
            "accuracy": bootstrap.interval(bootstrap.percentages(covered * right, covered)),
            "f1": bootstrap.interval(bootstrap.percentages(true_positives, predicted_and_true)),
        }
    return intervals


def _is_right(response: str, question: Question) -> bool:
    return response in ("Yes", "No") and response.lower() == question.truth


def _comparison(
    questions: Mapping[int, Question],
    base: Mapping[int, str],
    tuned: Mapping[int, str],
    answers: Mapping[str, Mapping[int, str]],
) -> dict[str, Any]:
    """Tuned against base on the questions that both answered, whole and by dimension."""
    asked = [q for q in questions.values() if q.id in base and q.id in tuned]
    if not asked:
        return {}
    base_right = [base[q.id].lower() == q.truth for q in asked]
    tuned_right = [tuned[q.id].lower() == q.truth for q in asked]

    def figures(indices: Sequence[int]) -> dict[str, Any]:
        result = compare(
            [base_right[i] for i in indices],
            [tuned_right[i] for i in indices],
            [asked[i].image for i in indices],
        )
        return {
            "delta_accuracy": result.delta_accuracy,
            "ci95": list(result.ci95),
            "mcnemar_p": result.mcnemar_p,
            "fixed": result.fixed,
            "broken": result.broken,
            "verdict": judge(result.ci95, more_is_better=True),
        }

    by_dimension = {
        name: [i for i, q in enumerate(asked) if q.dimension in dimensions]
        for name, dimensions in COVERS.items()
        if name != "Discriminative"
    }
    flips = [
        {
            "id": q.id,
            "image": q.image,
            "dimension": q.dimension,
            "question": q.text,
            "truth": q.truth,
            "base": answers["base"].get(q.id, base[q.id]),
            "tuned": answers["tuned"].get(q.id, tuned[q.id]),
            "fixed": after,
        }
        for q, before, after in zip(asked, base_right, tuned_right, strict=True)
        if before != after
    ]
    return {
        **figures(range(len(asked))),
        "n": len(asked),
        "dimensions": {name: figures(indices) for name, indices in by_dimension.items() if indices},
        "flips": flips,
    }


def judge(interval: Interval | None, *, more_is_better: bool) -> str:
    """What a difference may be called: nothing if its interval contains zero."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "no difference shown"
    return "improvement" if (interval[0] > 0) == more_is_better else "decline"


def _add_descriptions(
    report: dict[str, Any],
    benchmark: Benchmark,
    texts: Mapping[str, Responses],
    extractor: Extractor,
) -> None:
    """Add the generative figures: their intervals, their difference, and what changed."""
    assert benchmark.vocabulary is not None
    by_id = {description.id: description for description in benchmark.descriptions}
    counted = {
        role: gen.count_all(by_id, given, benchmark.vocabulary, extractor)
        for role, given in texts.items()
        if given
    }
    for role, counts in counted.items():
        report["scores"][role]["Generative"] = {
            **gen.figures([c for _, c in counts]),
            "extractor": extractor.name,
        }
        bootstrap = Bootstrap([by_id[number].image for number, _ in counts])
        drawn = _drawn_figures(bootstrap, [c for _, c in counts])
        report["intervals"][role]["Generative"] = {
            name: bootstrap.interval(values) for name, values in drawn.items()
        }
    if len(counted) == 2:
        report["generative_comparison"] = _compare_descriptions(
            by_id, dict(counted["base"]), dict(counted["tuned"]), texts
        )


def _drawn_figures(bootstrap: Bootstrap, counts: Sequence[gen.Counts]) -> dict[str, Any]:
    """(draws,) of each generative figure, in per cent."""
    parts: dict[str, tuple[list[int], list[int]]] = {
        "chair": ([len(c.hallucinated) for c in counts], [c.nouns for c in counts]),
        "cover": ([c.covered for c in counts], [c.truths for c in counts]),
        "hal": ([int(bool(c.hallucinated)) for c in counts], [1 for _ in counts]),
        "cog": ([c.named_hallu for c in counts], [c.hallus for c in counts]),
    }
    return {name: bootstrap.percentages(part, whole) for name, (part, whole) in parts.items()}


def _compare_descriptions(
    by_id: Mapping[int, Any],
    base: Mapping[int, gen.Counts],
    tuned: Mapping[int, gen.Counts],
    texts: Mapping[str, Responses],
) -> dict[str, Any]:
    """Tuned against base on the descriptions of both, and those whose hallucinations changed."""
    both = [number for number in base if number in tuned]
    if not both:
        return {}
    bootstrap = Bootstrap([by_id[number].image for number in both])
    counts = [[side[number] for number in both] for side in (base, tuned)]
    drawn = [_drawn_figures(bootstrap, side) for side in counts]
    figures = [gen.figures(side) for side in counts]
    differences: dict[str, Any] = {}
    for name in gen.FIGURES:
        interval = bootstrap.interval(drawn[1][name] - drawn[0][name])
        differences[name] = {
            "delta": round(figures[1][name] - figures[0][name], 1),
            "ci95": interval,
            "verdict": judge(interval, more_is_better=name not in FEWER_IS_BETTER),
        }
    text_of = {role: dict(given) for role, given in texts.items()}
    changed = [
        {
            "id": number,
            "image": by_id[number].image,
            "truth": list(by_id[number].truth),
            **{role: text_of[role][number] for role in ("base", "tuned")},
            "base_hallucinated": list(base[number].hallucinated),
            "tuned_hallucinated": list(tuned[number].hallucinated),
            "fixed": len(tuned[number].hallucinated) < len(base[number].hallucinated),
        }
        for number in both
        if len(base[number].hallucinated) != len(tuned[number].hallucinated)
    ]
    return {"figures": differences, "n": len(both), "flips": changed}
