"""Ask a model all of AMBER: questions grouped by picture, descriptions in batches, answers kept as
they come.

Base and tuned model look at a picture one after the other, so that what they have in common is
computed once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlmdpo import ui
from vlmdpo.benchmarks.amber.questions import Benchmark, Description, Question
from vlmdpo.benchmarks.answers import Answers
from vlmdpo.benchmarks.verdict import settled
from vlmdpo.config import EvalAmberConfig
from vlmdpo.errors import DataError

if TYPE_CHECKING:
    from vlmdpo.engine.decode import PromptTreeDecoder

_WINDOW = 4  # batches of descriptions whose pictures are open at a time, to be batched by size


@dataclass
class Outcome:
    """How the asking went: the engine that did it, why not the one that was wanted, and pictures
    that could not be read.
    """

    engine: str
    reason: str = ""
    bad_pictures: dict[str, str] = field(default_factory=dict)


class Interview:
    """One run: a model, what it is asked, and where its answers go.

    Args:
        config: the settings.
        benchmark: what is asked, already cut to what is wanted. model, processor: on their device;
        the model with its adapter, where there is one. None for vLLM.
        whos: "base" and "tuned", as far as they are asked.
        answers: what is known already is not asked again.
        share: (this process, all of them).
        outcome: how it begins: the engine, and pictures that are known to be bad.
    """

    def __init__(
        self,
        config: EvalAmberConfig,
        benchmark: Benchmark,
        model: Any,
        processor: Any,
        whos: Sequence[str],
        answers: Answers,
        share: tuple[int, int],
        outcome: Outcome,
    ) -> None:
        self.config, self.benchmark, self.model, self.processor = (
            config,
            benchmark,
            model,
            processor,
        )
        self.whos, self.answers = whos, answers
        self.pictures = benchmark.pictures[share[0] :: share[1]]
        self.decided = None if config.strict else settled
        self.outcome = outcome

    def run(self) -> Outcome:
        """Ask all that is not answered yet. Raises DataError for a bad picture where the settings
        are strict.
        """
        mine = set(self.pictures)
        questions = [q for q in self.benchmark.questions if q.image in mine]
        descriptions = [d for d in self.benchmark.descriptions if d.image in mine]
        if self.config.engine == "vllm":
            self._through_vllm(questions, descriptions)
            return self.outcome
        self._questions(questions)
        self._descriptions(descriptions)
        return self.outcome

    def _left(self, who: str, asked: Sequence[Any]) -> list[Any]:
        known = self.answers.of(who)
        return [
            one
            for one in asked
            if one.id not in known and one.image not in self.outcome.bad_pictures
        ]

    def _picture(self, name: str) -> Image.Image | None:
        """The picture; None, and kept in mind, where it cannot be read and the settings allow that."""
        if name in self.outcome.bad_pictures:
            return None
        try:
            return self.benchmark.picture(name)
        except DataError as problem:
            if self.config.strict:
                raise
            self.outcome.bad_pictures[name] = str(problem)
            ui.warn(f"{problem}; its questions stay unanswered")
            return None

    @contextlib.contextmanager
    def _model(self, who: str) -> Iterator[Any]:
        """The model as base or as tuned one."""
        with (
            self.model.disable_adapter()
            if who == "base" and self.config.adapter
            else contextlib.nullcontext()
        ):
            yield self.model

    def _questions(self, questions: Sequence[Question]) -> None:
        groups: dict[str, list[Question]] = {}
        for question in questions:
            groups.setdefault(question.image, []).append(question)
        groups = {
            name: group
            for name, group in groups.items()
            if any(self._left(who, group) for who in self.whos)
        }
        if not groups:
            return
        total = sum(len(self._left(who, group)) for group in groups.values() for who in self.whos)
        decoder = self._checked_decoder(groups) if self.config.engine == "shared" else None
        with ui.progress("ask", total, unit="questions") as bar:
            for name, group in groups.items():
                counted = sum(len(self._left(who, group)) for who in self.whos)
                picture = self._picture(name)
                if picture is not None:
                    self._one_picture(decoder, picture, group)
                bar.advance(counted)

    def _one_picture(
        self, decoder: PromptTreeDecoder | None, picture: Image.Image, group: Sequence[Question]
    ) -> None:
        from vlmdpo.engine.generate import answer

        with decoder.open(picture) if decoder is not None else contextlib.nullcontext() as opened:
            for who in self.whos:
                left = self._left(who, group)
                if not left:
                    continue
                texts = [question.text for question in left]
                longest, at_once = self.config.max_new_tokens, self.config.batch_size
                with self._model(who) as model:
                    if opened is not None:
                        said = opened.answer(
                            texts, longest, batch_size=at_once, stop_when=self.decided
                        )
                    else:
                        said = []
                        for start in range(0, len(texts), at_once):
                            some = texts[start : start + at_once]
                            said += answer(
                                model, self.processor, [picture] * len(some), some, longest
                            )
                self.answers.put(who, zip((question.id for question in left), said, strict=True))

    def _checked_decoder(self, groups: dict[str, list[Question]]) -> PromptTreeDecoder | None:
        """What asks the shared way, once it has shown that it answers as the plain way does; None
        where it does not.
        """
        from vlmdpo.engine.decode import PromptTreeDecoder

        decoder = PromptTreeDecoder(
            self.model, self.processor, keep_features=not touches_vision(self.model)
        )
        if decoder.reason_not_shared:
            ui.say(
                "questions share the picture, but not their prompts' beginning: "
                f"{decoder.reason_not_shared}"
            )
            self.outcome.reason = f"prompts are not shared: {decoder.reason_not_shared}"
        wrong = self._disagreement(decoder, groups) if self.config.verify else ""
        if not wrong:
            return decoder
        self.outcome = Outcome("plain", wrong, self.outcome.bad_pictures)
        ui.warn(f"{wrong}; going on with the plain way")
        return None

    def _disagreement(self, decoder: PromptTreeDecoder, groups: dict[str, list[Question]]) -> str:
        """Where shared and plain answers differ on some questions of pictures from all over the
        set, or "".
        """
        from vlmdpo.engine.generate import answer, is_near_tie

        names = list(groups)
        picked = [names[i * len(names) // min(len(names), 4)] for i in range(min(len(names), 4))]
        left = self.config.verify
        longest = self.config.max_new_tokens
        for name in picked:
            picture = self._picture(name)
            if picture is None:
                continue
            group = groups[name]
            for who in self.whos:
                with self._model(who) as model, decoder.open(picture) as opened:
                    said = opened.answer(
                        [q.text for q in group],
                        longest,
                        batch_size=self.config.batch_size,
                        stop_when=self.decided,
                    )
                for question, shared in list(zip(group, said, strict=True))[
                    : max(1, left // len(picked) // len(self.whos))
                ]:
                    with self._model(who) as model:
                        [plain] = answer(model, self.processor, [picture], [question.text], longest)
                        same = (
                            plain.startswith(shared)
                            if self.decided and settled(shared)
                            else plain == shared
                        )
                        if same or is_near_tie(
                            model, self.processor, picture, question.text, longest
                        ):
                            continue
                    return f"question {question.id} is answered {shared!r} the shared way and {plain!r} the plain way"
        return ""

    def _descriptions(self, descriptions: Sequence[Description]) -> None:
        from vlmdpo.engine.generate import answer

        total = sum(len(self._left(who, descriptions)) for who in self.whos)
        if not total:
            return
        size = self.config.batch_size
        with ui.progress("describe", total, unit="descriptions") as bar:
            for start in range(0, len(descriptions), _WINDOW * size):
                window = [
                    d
                    for d in descriptions[start : start + _WINDOW * size]
                    if any(self._left(who, [d]) for who in self.whos)
                ]
                opened = [
                    (d, picture) for d in window if (picture := self._picture(d.image)) is not None
                ]
                opened.sort(
                    key=lambda one: one[1].size
                )  # pictures of one size have as many tokens: no padding
                for who in self.whos:
                    left = {d.id for d in self._left(who, window)}
                    todo = [one for one in opened if one[0].id in left]
                    for first in range(0, len(todo), size):
                        some, pictures = zip(*todo[first : first + size], strict=True)
                        texts = [d.text for d in some]
                        with self._model(who) as model:
                            said = answer(
                                model,
                                self.processor,
                                pictures,
                                texts,
                                self.config.max_description_tokens,
                            )
                        self.answers.put(who, zip((d.id for d in some), said, strict=True))
                        bar.advance(len(some))

    def _through_vllm(
        self, questions: Sequence[Question], descriptions: Sequence[Description]
    ) -> None:
        from vlmdpo.engine.vllm import VllmGenerator

        config = self.config
        origin: dict[str, Any] = {
            "revision": config.revision,
            "trust_remote_code": config.trust_remote_code,
        }
        generator = VllmGenerator(
            config.model, self.processor, config.adapter, dtype=config.dtype, **origin
        )
        whole = ((questions, config.max_new_tokens), (descriptions, config.max_description_tokens))
        for who in self.whos:
            for asked, longest in whole:
                left = self._left(who, asked)
                window = 8 * config.batch_size
                with ui.progress(f"ask {who}", len(left), unit="questions") as bar:
                    for start in range(0, len(left), window):
                        opened = [
                            (o, p)
                            for o in left[start : start + window]
                            if (p := self._picture(o.image)) is not None
                        ]
                        texts, pictures = [o.text for o, _ in opened], [p for _, p in opened]
                        said = generator.generate(pictures, texts, longest, tuned=who == "tuned")
                        self.answers.put(who, zip((o.id for o, _ in opened), said, strict=True))
                        bar.advance(min(window, len(left) - start))


def touches_vision(model: Any) -> bool:
    """Whether a model's adapter changes what image features are made of."""
    if not hasattr(model, "peft_config"):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    from vlmdpo.models.families import base_of

    backbone = base_of(model).base_model
    language = set(map(id, backbone.get_decoder().modules()))
    adapted = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return any(
        isinstance(module, adapted) and id(module) not in language for module in backbone.modules()
    )
