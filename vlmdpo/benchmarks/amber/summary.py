"""The report of `vlmdpo eval-amber`: what any benchmark's report has, under AMBER's own keys.

Official figures are AMBER's own, to the digit. Everything else is given beside them and never in
their place: bootstrap intervals over images, how often a model said No, the score of always saying
No, and answers that cannot be read. No models here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmdpo.benchmarks import summary
from vlmdpo.benchmarks.amber.benchmark import Amber
from vlmdpo.benchmarks.amber.questions import Description, Question
from vlmdpo.benchmarks.amber.scores import COVERS, score
from vlmdpo.benchmarks.base import Id, Responses, Sheet
from vlmdpo.benchmarks.verdict import verdict

_EXAMPLES = 5
_MAX_CHARACTERS = 160  # of an unreadable answer
_MAIN = "Discriminative"


def summarize(
    benchmark: Amber,
    responses: Mapping[str, Responses],
    answers: Mapping[str, Mapping[Id, str]],
) -> dict[str, Any]:
    """The figures of a report.

    Args:
        benchmark: what was asked; other responses are ignored.
        responses: by role ("base", "tuned"), (id, response) as AMBER's scorer takes them; an id may
            occur twice.
        answers: by role and id, the answers in the model's own words.
    """
    questions = {question.id: question for question in benchmark.questions}
    described = {one.id for one in benchmark.descriptions}
    verdicts = {role: [r for r in given if r[0] in questions] for role, given in responses.items()}
    texts = {role: [r for r in given if r[0] in described] for role, given in responses.items()}
    sheets = {role: benchmark.score([*verdicts[role], *texts[role]]) for role in responses}
    models = {
        role: _facts(benchmark, verdicts[role], texts[role], answers[role]) for role in responses
    }
    report: dict[str, Any] = {
        "questions": {
            name: sum(q.dimension in dimensions for q in questions.values())
            for name, dimensions in COVERS.items()
        },
        "descriptions": len(benchmark.descriptions),
        "scores": {role: _scores(benchmark, some) for role, some in sheets.items()},
        "intervals": {role: summary.intervals(some) for role, some in sheets.items()},
        "models": models,
        "always_no": score(questions, [(number, "No") for number in questions]),
        "comparison": None,
        "coverage": min(facts["coverage"] for facts in models.values()),
        "unparsed": sum(facts["unparsed"] for facts in models.values()),
    }
    if any(texts.values()) and benchmark.extractor().facts:
        report["extractor_model"] = dict(benchmark.extractor().facts)
    if len(responses) == 2 and all(verdicts.values()):
        report["comparison"] = _comparison(benchmark, verdicts, answers)
    if len(responses) == 2 and all(texts.values()):
        report["generative_comparison"] = _compare_descriptions(benchmark, texts)
    return report


def _scores(benchmark: Amber, sheets: Sequence[Sheet]) -> dict[str, Any]:
    """AMBER's figures; with those of descriptions, what found their nouns."""
    found = summary.scores(sheets)
    if "Generative" in found:
        found["Generative"]["extractor"] = benchmark.extractor().name
    return found


def _facts(
    benchmark: Amber, verdicts: Responses, texts: Responses, answers: Mapping[Id, str]
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


def _comparison(
    benchmark: Amber,
    verdicts: Mapping[str, Responses],
    answers: Mapping[str, Mapping[Id, str]],
) -> dict[str, Any]:
    """Tuned against base on the questions that both answered, whole and by dimension."""
    base, tuned = summary.paired(
        benchmark, *(_in_order(benchmark, verdicts[role]) for role in ("base", "tuned"))
    )
    if not base:
        return {}
    questions: dict[Id, Question] = {question.id: question for question in benchmark.questions}
    changes = summary.answer_changes(base[0], tuned[0])
    last = {role: dict(given) for role, given in verdicts.items()}
    words = {role: {**last[role], **answers[role]} for role in last}
    return {
        **changes[_MAIN],
        "n": len(base[0].ids),
        "dimensions": {name: changes[name] for name in COVERS if name in changes and name != _MAIN},
        "flips": [
            {
                "id": flip["id"],
                "image": flip["image"],
                "dimension": questions[flip["id"]].dimension,
                **{key: flip[key] for key in ("question", "truth", "base", "tuned", "fixed")},
            }
            for flip in summary.flipped(base[0], tuned[0], questions, words)
        ],
    }


def _in_order(benchmark: Amber, given: Responses) -> Responses:
    """The last response to each question, in the order of the questions."""
    last = dict(given)
    return [(one.id, last[one.id]) for one in benchmark.questions if one.id in last]


def _compare_descriptions(benchmark: Amber, texts: Mapping[str, Responses]) -> dict[str, Any]:
    """Tuned against base on the descriptions of both, and those whose hallucinations changed."""
    base, tuned = summary.paired(benchmark, texts["base"], texts["tuned"])
    if not base:
        return {}
    described: dict[Id, Description] = {one.id: one for one in benchmark.descriptions}
    changes = summary.figure_changes(base[0], tuned[0])["Generative"]
    text_of = {role: dict(given) for role, given in texts.items()}
    return {
        "figures": {
            # AMBER's figures have one decimal, and so has their difference.
            name: {**change, "delta": round(change["delta"], 1)}
            for name, change in changes.items()
        },
        "n": len(base[0].ids),
        "flips": [
            {
                "id": flip["id"],
                "image": flip["image"],
                "truth": list(described[flip["id"]].truth),
                **{
                    key: flip[key]
                    for key in ("base", "tuned", "base_hallucinated", "tuned_hallucinated", "fixed")
                },
            }
            for flip in summary.flipped(base[0], tuned[0], described, text_of)
        ],
    }
