"""The seam between vlmdpo and a benchmark: what a benchmark says of itself.

A new benchmark is one file with a frozen dataclass that satisfies `Benchmark` and a function
`load`, and one line in `registry.py`. Asking a model, keeping answers, intervals, base against
tuned, tables and pages follow from it. Nothing here knows a model.

Figures are quotients of sums over answers, so that one bootstrap over images serves all of them.

Shapes: n answers given, in the order of the responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from PIL import Image

if TYPE_CHECKING:
    import numpy.typing

    Numbers: TypeAlias = "numpy.typing.NDArray[Any]"

Id: TypeAlias = int | str
Responses: TypeAlias = "Sequence[tuple[Id, str]]"  # (id, answer); an id may occur twice
ALL = "all"  # the group of everything
SHARE, PER_CENT = "share", "percent"  # units of figures


class Asked(Protocol):
    """One thing asked about one image."""

    @property
    def id(self) -> Id:
        """Unique in the benchmark."""

    @property
    def image(self) -> str:
        """The name of the image, for `Benchmark.images`."""

    @property
    def text(self) -> str:
        """The prompt, as it is put to the model."""


@dataclass(frozen=True)
class Question:
    """A question with a known answer, or, of the truth "", something to describe.

    Attributes:
        truth: the right answer.
        group: what its figures are grouped by: a split, a kind of question.
    """

    id: Id
    image: str
    text: str
    truth: str = ""
    group: str = ALL


@dataclass(frozen=True)
class Ratio:
    """sum(part) / sum(whole), both (n,); undefined where sum(whole) is 0."""

    part: Numbers
    whole: Numbers


@dataclass(frozen=True)
class Figure:
    """One figure: the mean of quotients, which nearly always is one quotient.

    Attributes:
        ratios: none for a figure that gets no interval.
        more_is_better: None for a figure that is neither good nor bad, as a length.
        value: as the benchmark's own scorer rounds it; None: what the quotients give.
        unit: "share", of 1; "percent"; or what is counted, such as "words".
    """

    ratios: tuple[Ratio, ...]
    more_is_better: bool | None = True
    value: float | None = None
    unit: str = SHARE

    @property
    def scale(self) -> float:
        """What quotients are multiplied by."""
        return 100.0 if self.unit == PER_CENT else 1.0

    @property
    def number(self) -> float | None:
        """The figure; None where a quotient is undefined."""
        if self.value is not None or not self.ratios:
            return self.value
        quotients = []
        for ratio in self.ratios:
            whole = float(ratio.whole.sum())
            if not whole:
                return None
            quotients.append(float(ratio.part.sum()) / whole)
        return self.scale * sum(quotients) / len(quotients)


@dataclass(frozen=True)
class Sheet:
    """The scored answers of one model to one task.

    Attributes:
        ids, images: (n,) of each response, in order.
        groups: by group and name, the figures that carry the benchmark's name. A group may hold
            more groups: `ours` holds those of another reading.
        right: (n,) whether the answer is right; None where answers are not right or wrong.
        members: by group, (n,) whether a response belongs to it; for the groups in which base
            and tuned are compared answer by answer.
        is_repeat: (n,) whether the same question about the same image is there before, which tests
            of independent answers must not count again; None: none is.
        unread: ids of answers that are neither of the possible ones.
        details: per id, what pages show of an answer besides its text.
    """

    ids: Sequence[Id]
    images: Sequence[str]
    groups: Mapping[str, Mapping[str, Figure | Mapping[str, Figure]]]
    right: Numbers | None = None
    members: Mapping[str, Numbers] = field(default_factory=dict)
    is_repeat: Numbers | None = None
    unread: Sequence[Id] = ()
    details: Mapping[Id, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A row of published figures: of which model, the figures by name, from where."""

    model: str
    figures: Mapping[str, float]
    source: str


class Images(Protocol):
    """Where a benchmark's images come from. As text, the place, for messages."""

    def open(self, name: str) -> Image.Image:
        """The upright RGB image. Raises DataError."""

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of these names that are not there. Raises DataError if all are missing."""


class Benchmark(Protocol):
    """A set of questions about images, and how answers to them are scored.

    Implementations are frozen dataclasses: a part of the questions is the same benchmark with
    other `questions` and `descriptions`.

    Attributes:
        name: as in `--benchmark`.
        title: in tables and pages.
        digest: identifies the data; answers to other data are never mixed in.
        rule: whose rule reads the answers for the figures under the groups' own names.
        questions: short answers; those about one image are asked as one tree.
        descriptions: long answers.
        main: (group, figure) that stands for the benchmark where there is room for one.
        baseline: the answer whose figures, given to every question, stand beside a model's; ""
            where no answer makes sense.
        images: of what is asked.
        notes: what readers must know of the data: its defects, and what is not comparable.
        published: figures to stand beside those of a whole run.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def rule(self) -> str: ...
    @property
    def questions(self) -> Sequence[Asked]: ...
    @property
    def descriptions(self) -> Sequence[Asked]: ...
    @property
    def images(self) -> Images: ...
    @property
    def main(self) -> tuple[str, str]: ...
    @property
    def baseline(self) -> str: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def published(self) -> Sequence[Published]: ...

    def is_settled(self, answer: str) -> bool:
        """Whether nothing that may follow changes any figure, so that generation can stop."""

    def read(self, asked: Asked, answer: str) -> str:
        """What the benchmark's own scorer is given for an answer: the answer, or what it says."""

    def read_answers(self, path: Path) -> Responses:
        """The responses of a file in the benchmark's own form. Raises DataError."""

    def score(self, responses: Responses) -> Sequence[Sheet]:
        """The figures of these responses, whose ids are all of this benchmark: a sheet per task
        that has responses. Groups have different names in all of them.
        """


def image_names(benchmark: Benchmark) -> tuple[str, ...]:
    """The names of all images asked about, each once, in the order of the questions."""
    return tuple(dict.fromkeys(one.image for one in everything_asked(benchmark)))


def everything_asked(benchmark: Benchmark) -> tuple[Asked, ...]:
    """All questions, then all descriptions."""
    return (*benchmark.questions, *benchmark.descriptions)


def ids(benchmark: Benchmark) -> set[Id]:
    """The ids of everything asked."""
    return {one.id for one in everything_asked(benchmark)}
