"""POPE: is there a ... in the image? And RePOPE, the same questions with corrected labels.

POPE: Li et al. 2023, arXiv 2305.10355, github.com/AoiDragon/POPE. RePOPE: Neuhaus & Hein 2025,
arXiv 2504.15707, github.com/YanNeu/RePOPE; its repository states no licence, so its label files
are the user's own. Each has a scorer of its own, which reads answers by a rule of its own; their
figures stand under the splits' names, and ours, to which an unread answer is a wrong one, beside
them under "ours".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmdpo.benchmarks import pope_files, yes_no
from vlmdpo.benchmarks.base import ALL, Asked, Images, Published, Question, Responses, Sheet
from vlmdpo.benchmarks.image_folder import ImageFolder
from vlmdpo.config import EvalConfig

_LLAVA = (
    "Liu et al. 2023 (arXiv 2310.03744), with LLaVA's own copy of the questions (2,910 of random) "
    "and its request for a single word or phrase"
)
_PUBLISHED = (
    Published(
        "LLaVA-1.5-7B",
        {"random/f1": 0.873, "popular/f1": 0.861, "adversarial/f1": 0.842},
        _LLAVA,
    ),
    Published(
        "LLaVA-1.5-13B",
        {"random/f1": 0.871, "popular/f1": 0.862, "adversarial/f1": 0.845},
        _LLAVA,
    ),
)
_NOTES = {
    "pope": "by RePOPE's authors, 9.3% of the labels that say yes are wrong and 13.8% ambiguous; "
    "of those that say no, 0.3% to 2.6% are wrong and 1.3% to 7.3% ambiguous",
    "repope": "RePOPE leaves out ambiguous questions: its splits are smaller than POPE's, and have "
    "more questions whose answer is no",
}
_SHARED = (
    "the splits have the same images and the same questions whose answer is yes; a question that "
    "is in several splits is asked once, and intervals draw images"
)


def evaluate_py(answer: str) -> str:
    """What POPE's evaluate.py takes an answer for: "no" if the piece before the first full stop,
    without commas and split at spaces, holds exactly "No", "no" or "not"; else "yes".
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def repope_rule(answer: str) -> str | None:
    """What RePOPE's scorer takes an answer for: whatever holds "yes", else whatever holds "no"
    ("not" and "know" too), else nothing.
    """
    return next((word for word in ("yes", "no") if word in answer.lower()), None)


_RULES = {"pope": "POPE's evaluate.py", "repope": "RePOPE's scorer"}


@dataclass(frozen=True)
class Pope:
    """Some splits of POPE or RePOPE. Ids are "split/question_id".

    Attributes:
        suffix: added to each question.
        all_ids: the question ids of each split, with those that RePOPE leaves out.
    """

    name: str
    digest: str
    questions: tuple[Question, ...]
    images: Images
    notes: tuple[str, ...]
    all_ids: Mapping[str, Sequence[int]]
    published: tuple[Published, ...] = ()
    suffix: str = ""
    descriptions: tuple[Question, ...] = ()
    baseline: str = "yes"

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits asked."""
        return tuple(dict.fromkeys(question.group for question in self.questions))

    @property
    def title(self) -> str:
        """With the split where it is one."""
        name = {"pope": "POPE", "repope": "RePOPE"}[self.name]
        return f"{name}, {self.splits[0]}" if len(self.splits) == 1 else name

    @property
    def rule(self) -> str:
        """Whose rule reads the answers."""
        return _RULES[self.name]

    @property
    def main(self) -> tuple[str, str]:
        """The mean over the splits, or the one split."""
        return (self.splits[0] if len(self.splits) == 1 else ALL), "accuracy"

    def is_settled(self, answer: str) -> bool:
        """Never: both scorers look at what follows Yes and No too."""
        return False

    def read(self, asked: Asked, answer: str) -> str:
        """The answer as it is."""
        return answer

    def read_answers(self, path: Path) -> Responses:
        """POPE's form: one JSON object a line with `answer`, in the order of the questions or with
        `question_id`.
        """
        [split] = self.splits
        return pope_files.read_answers(path, split, self.questions, self.all_ids[split])

    def score(self, responses: Responses) -> Sequence[Sheet]:
        """One sheet. Of several answers to a question, POPE's scorer takes the one in its place,
        the first, and has all of them in the ratio of yes; RePOPE's takes the last.
        """
        import numpy as np

        is_pope = self.name == "pope"
        rule, other = (evaluate_py, repope_rule) if is_pope else (repope_rule, evaluate_py)
        asked = {question.id: question for question in self.questions}
        answered = [(asked[number], text) for number, text in responses]
        counted = yes_no.first([number for number, _ in responses], last=not is_pope)
        last = yes_no.first([number for number, _ in responses], last=True)
        official = yes_no.by_group(answered, rule, counted, yes_ratio_of_all=is_pope)
        ours = yes_no.by_group(answered, yes_no.read_ours, counted, counts_unread=True)
        splits = np.array([question.group for question, _ in answered])
        members = {split: counted & (splits == split) for split in official if split != ALL}
        return [
            Sheet(
                ids=[number for number, _ in responses],
                images=[question.image for question, _ in answered],
                groups={
                    **official,
                    yes_no.OURS: ours,
                    other.__name__: yes_no.by_group(answered, other, last),
                },
                right=np.array([rule(text) == question.truth for question, text in answered]),
                members={**members, **({ALL: counted} if ALL in official else {})},
                is_repeat=~yes_no.first([(q.image, q.text) for q, _ in answered]),
                unread=[q.id for q, text in answered if yes_no.read_ours(text) is None],
                details={q.id: {"read": rule(text) or "neither"} for q, text in answered},
            )
        ]


def load(config: EvalConfig) -> Pope:
    """The splits that a config names. Raises DataError."""
    assert config.data is not None
    found = pope_files.read(config.data, config.kind, config.split)
    suffix = f" {config.suffix}" if config.suffix else ""
    questions = [dataclasses.replace(q, text=q.text + suffix) for q in found.questions]
    is_published = found.is_published and config.kind == "pope" and not suffix
    changed = ("a suffix is added to each question: not the published protocol",) if suffix else ()
    return Pope(
        name=config.kind,
        digest=found.digest,
        questions=tuple(questions),
        images=ImageFolder(config.images or config.data, "COCO val2014"),
        notes=(*found.notes, _NOTES[config.kind], _SHARED, *changed),
        all_ids=found.all_ids,
        published=_PUBLISHED if is_published else (),
        suffix=suffix,
    )
