"""CHAIR (Rohrbach et al., EMNLP 2018, arXiv 1809.02156) on images of COCO.

A mention of one of COCO's 80 objects is hallucinated if neither a box nor a reference caption of
the image has it. Each mention counts, repeated ones too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmdpo import ui
from vlmdpo.benchmarks.base import (
    ALL,
    Asked,
    Figure,
    Images,
    Published,
    Question,
    Ratio,
    Responses,
    Sheet,
)
from vlmdpo.benchmarks.chair import captions, coco, kept, mentions, pattern, truth, wordnet
from vlmdpo.benchmarks.chair.coco import Coco
from vlmdpo.benchmarks.chair.mentions import Caption, Scorer
from vlmdpo.benchmarks.image_folder import ImageFolder
from vlmdpo.config import EvalConfig
from vlmdpo.errors import ConfigError, DataError

_SCORERS = {"pattern": pattern.make, "wordnet": wordnet.make}


@dataclass(frozen=True)
class Chair:
    """Images to describe, and what is in them.

    Attributes:
        truths: by image id, the categories in it.
    """

    digest: str
    descriptions: tuple[Question, ...]
    scorer: Scorer
    truths: Mapping[int, frozenset[str]]
    images: Images
    notes: tuple[str, ...]
    name: str = "chair"
    main: tuple[str, str] = (ALL, "chair_i")
    baseline: str = ""
    questions: tuple[Question, ...] = ()
    # Every paper takes its own 500 images, so no row of figures can stand beside these.
    published: tuple[Published, ...] = ()

    @property
    def title(self) -> str:
        """With the scorer, whose figures are not the other's."""
        return f"CHAIR ({self.scorer.name})"

    @property
    def rule(self) -> str:
        """Whose rules find the objects."""
        return self.scorer.rule

    def is_settled(self, answer: str) -> bool:
        """Never: any further word may be an object."""
        return False

    def read(self, asked: Asked, answer: str) -> str:
        """The description as it is."""
        return answer

    def read_answers(self, path: Path) -> Responses:
        """(image id, caption) of a file, in order, with repetitions. Raises DataError."""
        return captions.read(path)

    def score(self, responses: Responses) -> Sequence[Sheet]:
        """One sheet: CHAIRs, CHAIRi, recall and length. An id that is there twice counts twice, its
        truth too.
        """
        return [self._sheet(responses)] if responses else []

    def _sheet(self, responses: Responses) -> Sheet:
        image_of = {asked.id: asked.image for asked in self.descriptions}
        found = [mentions.read(caption, self.scorer) for _, caption in responses]
        truths = [self.truths[int(number)] for number, _ in responses]
        invented = [_invented(one, truth) for one, truth in zip(found, truths, strict=True)]
        return Sheet(
            ids=[number for number, _ in responses],
            images=[image_of[number] for number, _ in responses],
            groups={ALL: _figures(found, truths, [len(words) for words in invented])},
            details={
                number: {
                    "mentioned": [category for _, category in one.mentions],
                    "hallucinated": [list(mention) for mention in words],
                    "truth": sorted(truth),
                }
                for (number, _), one, words, truth in zip(
                    responses, found, invented, truths, strict=True
                )
            },
        )


def _invented(caption: Caption, truth: frozenset[str]) -> list[tuple[str, str]]:
    """The mentions of what is not in the image."""
    return [mention for mention in caption.mentions if mention[1] not in truth]


def _figures(
    found: Sequence[Caption], truths: Sequence[frozenset[str]], num_invented: Sequence[int]
) -> dict[str, Figure]:
    """The figures of n captions."""
    import numpy as np

    named = [
        len({category for _, category in one.mentions} & truth)
        for one, truth in zip(found, truths, strict=True)
    ]
    ones = [1] * len(found)

    def quotient(part: Sequence[int], whole: Sequence[int]) -> tuple[Ratio]:
        return (Ratio(np.asarray(part, dtype=int), np.asarray(whole, dtype=int)),)

    mentioned = [len(one.mentions) for one in found]
    with_invented = [int(number > 0) for number in num_invented]
    return {
        "chair_s": Figure(quotient(with_invented, ones), more_is_better=False),
        "chair_i": Figure(quotient(num_invented, mentioned), more_is_better=False),
        "recall": Figure(quotient(named, [len(truth) for truth in truths])),
        "len": Figure(quotient([one.words for one in found], ones), None, unit="words"),
    }


def load(config: EvalConfig) -> Chair:
    """CHAIR over the images that are to be described, or over those of `--answers`.

    Raises ConfigError, DataError, MissingDependencyError.
    """
    assert config.data is not None, "EvalConfig requires it"
    _check_choice(config)
    files = coco.find(config.data)
    scorer = _SCORERS[config.scorer]()
    digest = files.digest()
    known = truth.read_coco(files, digest, scorer)
    ids = _ids(config, known)
    descriptions = tuple(
        Question(i, known.names.get(i, str(i)), "" if config.answers else config.prompt)
        for i in ids
    )
    return Chair(
        kept.key({"coco": digest, "prompt": config.prompt}),
        descriptions,
        scorer,
        truth.truths(ids, files, digest, known, scorer),
        ImageFolder(config.images or config.data, "COCO"),
        _notes(config, known, ids),
    )


def _check_choice(config: EvalConfig) -> None:
    """Raise ConfigError where what chooses the images would have no effect."""
    default = {field.name: field.default for field in dataclasses.fields(config)}
    given = [name for name in ("ids", "sample", "seed") if getattr(config, name) != default[name]]
    if config.answers is not None and given:
        raise ConfigError(
            f"--{given[0]} is for asking a model; --answers scores every caption of its file"
        )
    if config.ids is not None and given != ["ids"]:
        raise ConfigError(f"--{given[1]} draws images, but --ids names them; give one of the two")


def _ids(config: EvalConfig, known: Coco) -> list[int]:
    """The ids of the images, each once."""
    if config.answers is not None:
        return [int(i) for i in dict.fromkeys(i for i, _ in captions.read(config.answers))]
    if config.ids is None:
        id_of = {name: i for i, name in known.names.items()}
        return [id_of[name] for name in captions.draw(known.val, config.sample, config.seed)]
    ids = captions.read_ids(config.ids)
    unknown = [i for i in ids if i not in known.names]
    if unknown:
        raise DataError(
            f"--ids: '{config.ids}' lists {ui.count(len(unknown), 'id')} of no image in COCO's "
            f"train2014 or val2014, such as {unknown[0]}"
        )
    return ids


def _notes(config: EvalConfig, known: Coco, ids: Sequence[int]) -> tuple[str, ...]:
    """What readers must know. Raises DataError for answers about none of COCO's images."""
    notes = [f"objects are found by the scorer {config.scorer}, whose figures are not the other's"]
    if config.answers is not None:
        unknown = [i for i in ids if i not in known.names]
        if len(unknown) == len(ids):
            raise DataError(
                f"--answers: no id in '{config.answers}' is of an image in COCO's train2014 or "
                f"val2014 (such as {unknown[0]}): are these answers to another benchmark?"
            )
        if unknown:
            notes.append(
                f"{ui.count(len(unknown), 'image id')} in '{config.answers}' "
                f"{'is' if len(unknown) == 1 else 'are'} in none of COCO's files (such as "
                f"{unknown[0]}); every object mentioned there counts as hallucinated, as in the "
                "published scorers"
            )
    elif config.ids is None:
        few = f", which are all of this folder's {len(ids):,}" if len(ids) < config.sample else ""
        notes.append(
            f"the images are {len(ids):,} of val2014, drawn with seed {config.seed}{few}; papers "
            "draw others, so their figures are of other images"
        )
    return tuple(notes)
