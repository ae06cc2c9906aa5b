"""The two long stages of `make-pairs`: answers are drawn, and judged. Both go on after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from PIL import Image

from vlmdpo import ui
from vlmdpo.data.images import decode, upright_rgb
from vlmdpo.data.left_out import LeftOut
from vlmdpo.data.reasons import BadRow, shown
from vlmdpo.engine.sampling import Sampling
from vlmdpo.errors import DataError
from vlmdpo.feedback.answerers import Answerer
from vlmdpo.feedback.judges.base import Judge, Judgment, Task
from vlmdpo.feedback.pictures import Picture, digest_of
from vlmdpo.feedback.records import Records, as_entry, judgments_in, samples_in

_ENOUGH_VERDICTS = 50  # from as many on, a share of unread verdicts says something
T = TypeVar("T")


@dataclass(frozen=True)
class Open:
    """A picture that is decoded, and its prompts that are not done."""

    picture: Picture
    prompts: tuple[str, ...]
    data: bytes
    image: Image.Image


def draw(
    pictures: Sequence[Picture],
    answerer: Answerer,
    sampling: Sampling,
    max_new_tokens: int,
    records: Records,
    left_out: LeftOut,
) -> None:
    """Draw the answers to all prompts that have none, and record them.

    Args:
        left_out: gets what the model cannot be asked.
    """
    unasked = _undone(pictures, records)
    total = sum(len(prompts) for _, prompts in unasked) * sampling.count
    with records, ui.progress("draw answers", total, unit="answers") as bar:
        for chunk in _chunks(unasked, answerer.at_once):
            opened = _opened(chunk, left_out)
            drawn = _of_possible(
                opened,
                lambda part: answerer.sample(
                    [(one.image, one.prompts) for one in part], sampling, max_new_tokens
                ),
                left_out,
            )
            for one, of_prompts in drawn:
                for prompt, samples in zip(one.prompts, of_prompts, strict=True):
                    about = {"id": one.picture.id_of(prompt), "image": one.picture.name}
                    about |= {"image_digest": digest_of(one.data), "prompt": prompt}
                    records.add({**about, "samples": [asdict(sample) for sample in samples]})
            bar.advance(sum(len(prompts) for _, prompts in chunk) * sampling.count)


def judge(
    pictures: Sequence[Picture],
    drawn: Records,
    judge: Judge,
    records: Records,
    left_out: LeftOut,
    *,
    max_unread: float,
) -> None:
    """Judge all answers that are not judged, each text of a prompt once, and record it.

    Raises DataError where more than a share of `max_unread` of the verdicts cannot be read.
    """
    unjudged = [
        (picture, tuple(p for p in prompts if picture.id_of(p) in drawn.by_id))
        for picture, prompts in _undone(pictures, records)
    ]
    unjudged = [(picture, prompts) for picture, prompts in unjudged if prompts]
    unread = Unread(max_unread)
    for entry in records.by_id.values():
        unread.count(judgments_in(entry).values())
    total = sum(
        len(_distinct(drawn, picture, prompt))
        for picture, prompts in unjudged
        for prompt in prompts
    )
    with records, ui.progress(f"judge by {judge.name}", total, unit="answers") as bar:
        for chunk in _chunks(unjudged, judge.at_once):
            judged = _of_possible(
                _opened(chunk, left_out, drawn),
                lambda part: judge.judge([_task(one, drawn) for one in part]),
                left_out,
            )
            for one, of_prompts in judged:
                asked = _task(one, drawn).asked
                for (prompt, answers), judgments in zip(asked, of_prompts, strict=True):
                    about = {"id": one.picture.id_of(prompt), "answers": list(answers)}
                    records.add({**about, "judgments": [as_entry(found) for found in judgments]})
                    unread.count(judgments)
                    bar.advance(len(answers))


def _undone(pictures: Iterable[Picture], records: Records) -> list[tuple[Picture, tuple[str, ...]]]:
    """Each picture with its prompts that have no record, where there are any."""
    undone = (
        (one, tuple(p for p in one.prompts if one.id_of(p) not in records.by_id))
        for one in pictures
    )
    return [(picture, prompts) for picture, prompts in undone if prompts]


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _opened(
    chunk: Iterable[tuple[Picture, tuple[str, ...]]],
    left_out: LeftOut,
    drawn: Records | None = None,
) -> list[Open]:
    """Pictures that can be read and, if answers to them are drawn, have not changed since."""
    opened = []
    for picture, prompts in chunk:
        try:
            if drawn is None:
                data = picture.read()
            else:
                entry = drawn.by_id[picture.id_of(prompts[0])]
                data = picture.read_again(entry["image_digest"])
            opened.append(Open(picture, prompts, data, upright_rgb(decode(data))))
        except BadRow as problem:
            left_out.add(f"image {shown(picture.name)}", problem)
    return opened


def _of_possible(
    opened: Sequence[Open], run: Callable[[Sequence[Open]], list[T]], left_out: LeftOut
) -> list[tuple[Open, T]]:
    """What `run` gives for each picture, or for each of its prompts where it refuses one of them;
    what it refuses is left out.
    """
    if not opened:
        return []
    try:
        return list(zip(opened, run(opened), strict=True))
    except BadRow as problem:
        alone = [replace(one, prompts=(prompt,)) for one in opened for prompt in one.prompts]
        parts = opened if len(opened) > 1 else alone
        if len(parts) > 1:  # at least one of them; which, each tells alone
            return [found for one in parts for found in _of_possible([one], run, left_out)]
        prompt = shown(opened[0].prompts[0])
        left_out.add(f"image {shown(opened[0].picture.name)}, {prompt}", problem)
        return []


def _distinct(drawn: Records, picture: Picture, prompt: str) -> tuple[str, ...]:
    """The different answers to a prompt."""
    samples = samples_in(drawn.by_id[picture.id_of(prompt)])
    return tuple(dict.fromkeys(sample.text for sample in samples))


def _task(one: Open, drawn: Records) -> Task:
    asked = tuple((prompt, _distinct(drawn, one.picture, prompt)) for prompt in one.prompts)
    return Task(one.picture.name, one.data, one.image, asked)


class Unread:
    """Counts verdicts, and stops where too many cannot be read."""

    def __init__(self, max_share: float) -> None:
        self._max_share, self._verdicts, self._unread = max_share, 0, 0

    def count(self, judgments: Iterable[Judgment]) -> None:
        for one in judgments:
            self._verdicts += one.verdicts
            self._unread += one.unread_verdicts
        share = self._unread / max(1, self._verdicts)
        if self._verdicts >= _ENOUGH_VERDICTS and share > self._max_share:
            raise DataError(
                f"{self._unread:,} of {ui.count(self._verdicts, 'verdict')} of the judge can be "
                "read neither as yes nor as no; choose another --judge or --judge-model, or allow "
                "it with --max-unread (what is judged is kept)"
            )
