"""The report of make-pairs: `report.html`, one file without network access. All text is escaped."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from vlmdpo.data.images import open_bytes
from vlmdpo.data.reasons import BadRow
from vlmdpo.feedback.judges.base import Judgment
from vlmdpo.feedback.judges.truth import Truth
from vlmdpo.feedback.pictures import Picture
from vlmdpo.feedback.records import Records, judgments_in
from vlmdpo.feedback.select import Pair, Scored
from vlmdpo.report import html as pages

SHOWN = 16  # prompts
# Why a prompt or a pair was left out, as the screen and the page say it.
SKIPPED = {
    "all_answers_equal": "prompts whose answers are all equal",
    "answers_cut_or_empty": "prompts with fewer than two different answers that are complete",
    "unread_verdicts": "prompts with fewer than two answers whose verdicts can all be read",
    "no_difference_in_score": "prompts whose answers have too similar scores",
    "pairs_of_unlike_length": "pairs left out so that chosen and rejected are of like length",
}


def page(
    report: Mapping[str, Any],
    pictures: Sequence[Picture],
    scored: Mapping[str, Scored],
    pairs: Sequence[Pair],
    judged: Records,
    truth: Truth | None,
) -> str:
    """The page as HTML, with reduced images embedded.

    Args:
        report: what `make-pairs` returns.
        scored: the answers by the key of their prompt.
        judged: the judgments.
        truth: what is known about the images, if anything.
    """
    asked = [
        (picture, prompt, scored[key])
        for picture in pictures
        for prompt in picture.prompts
        if (key := picture.id_of(prompt)) in scored
    ]
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.key, []).append(pair)
    paired = [one for one in asked if one[2].key in by_prompt]
    shown = pages.evenly(paired, SHOWN - SHOWN // 4)
    shown += pages.evenly([one for one in asked if one[2].key not in by_prompt], SHOWN - len(shown))
    return (
        pages.environment()
        .get_template("make_pairs.html")
        .render(
            report=report,
            skipped=[(count, SKIPPED[reason]) for reason, count in report["skipped"].items()],
            plot=pages.uri(draw(scored, pairs), "png") if asked else "",
            shown=[
                {
                    "picture": _thumbnail(picture),
                    "name": picture.name,
                    "prompt": prompt,
                    "answers": _answers(
                        picture, prompt, one, by_prompt.get(one.key, []), judged, truth
                    ),
                }
                for picture, prompt, one in shown
            ],
        )
    )


def _thumbnail(picture: Picture) -> str:
    """The image as a data URI; "" where it can no longer be read."""
    try:
        image = open_bytes(picture.read())
    except BadRow:  # a folder that has changed since its images were asked about
        return ""
    image.draft("RGB", (2 * pages.SIDE_PX, 2 * pages.SIDE_PX))
    return pages.thumbnail(image)


def _answers(
    picture: Picture,
    prompt: str,
    one: Scored,
    pairs: Sequence[Pair],
    judged: Records,
    truth: Truth | None,
) -> list[dict[str, Any]]:
    """The different answers to a prompt, the best first."""
    judgments = judgments_in(judged.by_id[one.key])
    roles: dict[str, set[str]] = {}
    for pair in pairs:
        for role, number in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            roles.setdefault(one.samples[number].text, set()).add(role)
    rows: dict[str, dict[str, Any]] = {}
    for sample, score in zip(one.samples, one.scores, strict=True):
        if sample.text in rows:
            rows[sample.text]["times"] += 1
            continue
        found = judgments.get(sample.text, Judgment(unread="not judged"))
        known = truth.of(picture.name, prompt, sample.text) if truth is not None else None
        rows[sample.text] = {
            "text": sample.text,
            "times": 1,
            "tokens": sample.tokens,
            "cut": not sample.finished,
            "score": score,
            "roles": sorted(roles.get(sample.text, ())),
            "statements": found.statements,
            "unread": found.unread,
            "wrong": None if known is None or known.unread else known.denied,
        }
    return sorted(rows.values(), key=lambda row: (row["score"] is None, -(row["score"] or 0)))


def draw(scored: Mapping[str, Scored], pairs: Sequence[Pair]) -> bytes:
    """A PNG: the scores of all answers, and the lengths of chosen and rejected ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3))
    values = [score for one in scored.values() for score in one.scores if score is not None]
    left.hist(values, bins=_bins(values), histtype="step", linewidth=1.6)
    left.set_title("Scores of all answers", loc="left", fontsize=11)
    left.set_xlabel("score (0 is best)")
    left.set_ylabel("answers")
    lengths = {
        side: [scored[pair.key].samples[getattr(pair, side)].tokens for pair in pairs]
        for side in ("chosen", "rejected")
    }
    bins = _bins([tokens for side in lengths.values() for tokens in side])
    for side, tokens in lengths.items():
        right.hist(tokens, bins=bins, histtype="step", linewidth=1.6, label=side)
    right.set_title("Lengths of paired answers", loc="left", fontsize=11)
    right.set_xlabel("tokens")
    right.set_ylabel("answers")
    right.legend(fontsize=8)
    figure.subplots_adjust(left=0.08, right=0.99, top=0.9, bottom=0.17, wspace=0.2)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def _bins(values: Sequence[float]) -> Any:
    """Edges of histogram bins: whole numbers as far as they are not too many."""
    import numpy

    if not values:
        return 1
    low, high = min(values), max(values)
    if all(float(value).is_integer() for value in values) and high - low <= 40:
        return numpy.arange(low - 0.5, high + 1)
    return numpy.histogram_bin_edges(values, bins=40)
