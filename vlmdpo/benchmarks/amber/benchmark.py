"""AMBER on the seam: its data, and the figures that its own scorer gives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from vlmdpo.benchmarks import verdict as yes_or_no
from vlmdpo.benchmarks.amber import generative as gen
from vlmdpo.benchmarks.amber import nouns, published, questions
from vlmdpo.benchmarks.amber.questions import Description, Question, Vocabulary
from vlmdpo.benchmarks.amber.scores import COVERS, score
from vlmdpo.benchmarks.base import (
    PER_CENT,
    Asked,
    Figure,
    Images,
    Published,
    Ratio,
    Responses,
    Sheet,
)
from vlmdpo.benchmarks.image_folder import ImageFolder
from vlmdpo.config import EvalAmberConfig
from vlmdpo.errors import DataError

FEWER_IS_BETTER = ("chair", "hal", "cog")
_FIGURES = ("accuracy", "precision", "recall", "f1")


@dataclass(frozen=True)
class Amber:
    """AMBER's questions and descriptions, or other data of the same form.

    Attributes:
        vocabulary: None if the data lack the generative half.
        extractor: makes what finds the nouns in descriptions, once; raises
            MissingDependencyError.
        is_amber: whether this is all of AMBER's public data.
        other_ids: annotated, but of a half that was not read; response files may contain them.
        strict: whether an answer goes to AMBER's scorer as it is.
    """

    title: str
    questions: tuple[Question, ...]
    descriptions: tuple[Description, ...]
    vocabulary: Vocabulary | None
    images: Images
    extractor: Callable[[], nouns.Extractor]
    is_amber: bool
    digest: str
    other_ids: frozenset[int] = frozenset()
    strict: bool = False
    name: str = "amber"
    rule: str = "AMBER's own scorer"
    main: tuple[str, str] = ("Discriminative", "accuracy")
    baseline: str = "No"

    @property
    def notes(self) -> Sequence[str]:
        """What readers must know of the data."""
        return () if self.is_amber else ("these are not all of AMBER's questions",)

    @property
    def published(self) -> Sequence[Published]:
        """The article's table, beside all of AMBER's questions."""
        return published.rows() if self.is_amber else ()

    def is_settled(self, answer: str) -> bool:
        """Whether Yes or No is said, and cannot be taken back."""
        return not self.strict and yes_or_no.is_settled(answer)

    def read(self, asked: Asked, answer: str) -> str:
        """ "Yes" or "No" where a yes/no answer can be read; AMBER's scorer knows nothing else."""
        if self.strict or isinstance(asked, Description):
            return answer
        return yes_or_no.verdict(answer) or answer

    def read_answers(self, path: Path) -> Responses:
        """AMBER's own form: a JSON list of {id, response}."""
        return questions.read_responses(path)

    def score(self, responses: Responses) -> Sequence[Sheet]:
        """One sheet for Yes and No, one for descriptions."""
        given = cast("list[tuple[int, str]]", responses)
        asked = {question.id: question for question in self.questions}
        described = {one.id: one for one in self.descriptions}
        verdicts = [one for one in given if one[0] in asked]
        texts = [one for one in given if one[0] in described]
        return (
            *([_yes_no_sheet(asked, verdicts)] if verdicts else []),
            *([self._sheet_of(described, texts)] if texts else []),
        )

    def _sheet_of(
        self, described: Mapping[int, Description], texts: Sequence[tuple[int, str]]
    ) -> Sheet:
        assert self.vocabulary is not None
        counted = gen.count_all(described, texts, self.vocabulary, self.extractor())
        counts = [count for _, count in counted]
        values = gen.figures(counts)
        return Sheet(
            ids=[number for number, _ in counted],
            images=[described[number].image for number, _ in counted],
            groups={
                "Generative": {
                    name: Figure(
                        (ratio,),
                        more_is_better=name not in FEWER_IS_BETTER,
                        value=values[name],
                        unit=PER_CENT,
                    )
                    for name, ratio in _generative_ratios(counts).items()
                }
            },
            details={number: {"hallucinated": list(c.hallucinated)} for number, c in counted},
        )


def _yes_no_sheet(asked: Mapping[int, Question], verdicts: Sequence[tuple[int, str]]) -> Sheet:
    import numpy as np

    answered = [asked[number] for number, _ in verdicts]
    said = [response for _, response in verdicts]
    # Only exact "Yes" and "No" count, as in AMBER's scorer.
    right = np.array(
        [r in ("Yes", "No") and r.lower() == q.truth for q, r in zip(answered, said, strict=True)]
    )
    said_no = np.array([response == "No" for response in said])
    truly_no = np.array([question.truth == "no" for question in answered])
    official = score(asked, verdicts)
    groups: dict[str, dict[str, Figure]] = {}
    members: dict[str, Any] = {}
    for name, figures in official.items():
        covered = np.array([q.dimension in COVERS[name] for q in answered], dtype=float)
        ratios = {
            "accuracy": Ratio(covered * right, covered),
            # F1 of the class "No" is 2 TP / (predicted No + true No).
            "f1": Ratio(
                2 * covered * (said_no & truly_no), covered * (said_no.astype(float) + truly_no)
            ),
        }
        groups[name] = {
            figure: Figure(
                (ratios[figure],) if figure in ratios else (),
                value=figures[figure],
                unit=PER_CENT,
            )
            for figure in _FIGURES
        }
        members[name] = covered.astype(bool)
    return Sheet(
        ids=[number for number, _ in verdicts],
        images=[question.image for question in answered],
        groups=groups,
        right=right,
        members=members,
        unread=[number for number, response in verdicts if response not in ("Yes", "No")],
    )


def _generative_ratios(counts: Sequence[gen.Counts]) -> dict[str, Ratio]:
    import numpy as np

    parts: dict[str, tuple[list[int], list[int]]] = {
        "chair": ([len(c.hallucinated) for c in counts], [c.nouns for c in counts]),
        "cover": ([c.covered for c in counts], [c.truths for c in counts]),
        "hal": ([int(bool(c.hallucinated)) for c in counts], [1 for _ in counts]),
        "cog": ([c.named_hallu for c in counts], [c.hallus for c in counts]),
    }
    return {name: Ratio(np.array(part), np.array(whole)) for name, (part, whole) in parts.items()}


def load(config: EvalAmberConfig) -> Amber:
    """The data that a config names. Raises DataError."""
    assert config.data is not None
    whole = read(
        config.data,
        config.images,
        generative=config.task != "discriminative",
        extractor=config.extractor,
        strict=config.strict,
    )
    if config.task == "generative" and not whole.descriptions:
        raise DataError(
            f"'{config.data}' has no query/query_generative.json; use --task discriminative"
        )
    return whole


def read(
    folder: Path,
    images: Path | None = None,
    *,
    generative: bool = True,
    extractor: str = "lexicon",
    strict: bool = False,
) -> Amber:
    """AMBER's data folder, with its generative half if it has one and it is wanted.

    Args:
        folder: AMBER's data.
        images: the folder of its images; `folder`/image if None.
        generative: whether descriptions are wanted.
        extractor: how nouns are found in them; see `nouns`.
        strict: whether answers go to AMBER's scorer as they are.

    Raises DataError.
    """
    data = questions.read(folder, generative=generative)
    return Amber(
        title="AMBER" if data.is_amber else folder.resolve().name,
        questions=data.questions,
        descriptions=data.descriptions,
        vocabulary=data.vocabulary,
        images=ImageFolder(images or folder / "image", "AMBER"),
        extractor=_maker(extractor, data.vocabulary),
        is_amber=data.is_amber,
        digest=data.digest,
        other_ids=data.other_ids,
        strict=strict,
    )


def _maker(name: str, vocabulary: Vocabulary | None) -> Callable[[], nouns.Extractor]:
    """A function that makes the extractor at its first call, and finds the nouns of a text once:
    a model's descriptions are scored by themselves and beside the other model's.
    """

    @functools.cache
    def make() -> nouns.Extractor:
        assert vocabulary is not None
        made = nouns.make(name, vocabulary.words)
        return dataclasses.replace(made, nouns=functools.cache(made.nouns))

    return make
