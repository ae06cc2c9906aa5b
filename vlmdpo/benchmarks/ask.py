"""Ask a model all of a benchmark: questions grouped by image, descriptions in batches.

Base and tuned look at an image one after the other, so that what they share is computed once. The
same question about the same image is asked once, however often a benchmark has it. Answers are kept
as they come. Nothing here knows which benchmark it is, or a score.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from vlmdpo import ui
from vlmdpo.benchmarks.answers import AnswerStore
from vlmdpo.benchmarks.base import Asked, Benchmark, Id, image_names
from vlmdpo.config import EvalAmberConfig
from vlmdpo.data.reasons import BadImage, BadRow, foreign
from vlmdpo.errors import DataError

if TYPE_CHECKING:
    from vlmdpo.engine.decode import PromptTreeDecoder

_OPEN_BATCHES = 4  # batches of descriptions whose images are open at a time, to be sorted by size
_VLLM_BATCHES = 8  # batches handed to vLLM at a time
_VERIFIED_IMAGES = 4  # images whose questions are first asked through both engines

Some = TypeVar("Some", bound=Asked)


@dataclass
class Outcome:
    """How the asking went: the engine used, why not the one asked for, and what cannot be asked:
    images by name, questions by id, each with the reason.
    """

    engine: str
    reason: str = ""
    bad_pictures: dict[str, str] = field(default_factory=dict)
    bad_questions: dict[Id, str] = field(default_factory=dict)


class Asking:
    """One run: a model, what it is asked, and where its answers go.

    Args:
        config: the settings.
        benchmark: what is asked, already limited to what is wanted.
        model, processor: on their device; the model with its adapter, if it has one. None for vLLM.
        roles: "base" and "tuned", or one of them.
        answers: what it holds already is not asked again.
        share: (index of this process, number of processes).
        outcome: the engine to start with, and images known to be unreadable.
    """

    def __init__(
        self,
        config: EvalAmberConfig,
        benchmark: Benchmark,
        model: Any,
        processor: Any,
        roles: Sequence[str],
        answers: AnswerStore,
        share: tuple[int, int],
        outcome: Outcome,
    ) -> None:
        self.config, self.benchmark = config, benchmark
        self.model, self.processor = model, processor
        self.roles, self.answers = roles, answers
        self.image_names = image_names(benchmark)[share[0] :: share[1]]
        self.stop_when = None if config.strict else benchmark.is_settled
        self.outcome = outcome

    def run(self) -> Outcome:
        """Ask all that is unanswered. Raises DataError for an unreadable image with `strict`."""
        own_images = set(self.image_names)
        questions = [q for q in self.benchmark.questions if q.image in own_images]
        descriptions = [d for d in self.benchmark.descriptions if d.image in own_images]
        self._check_texts([*questions, *descriptions])
        questions = [q for q in questions if q.id not in self.outcome.bad_questions]
        if self.config.engine == "vllm":
            self._ask_vllm(questions, descriptions)
        else:
            self._ask_questions(questions)
            self._ask_descriptions(descriptions)
        return self.outcome

    def _unanswered(self, role: str, asked: Sequence[Some]) -> list[Some]:
        answered, bad = self.answers.of(role), self.outcome
        return [
            one
            for one in asked
            if not (
                one.id in answered or one.image in bad.bad_pictures or one.id in bad.bad_questions
            )
        ]

    def _check_texts(self, asked: Sequence[Asked]) -> None:
        """Remember the questions that the model's prompts cannot hold. Raises DataError with
        `strict`.
        """
        from vlmdpo.models.rendering import render_question

        refused: dict[str, str | None] = {}
        for one in asked:
            if one.text not in refused:
                refused[one.text] = None
                try:
                    with foreign(BadRow, "chat_template_refuses"):
                        render_question(self.processor, one.text)
                except BadRow as problem:
                    refused[one.text] = str(problem)
            reason = refused[one.text]
            if reason is not None:
                self._leave_out(self.outcome.bad_questions, one.id, f"question {one.id}", reason)

    def _leave_out(self, bad: dict[Any, str], key: object, name: str, reason: str) -> None:
        """Remember what cannot be asked. Raises DataError with `strict`."""
        if self.config.strict:
            raise DataError(f"{name} cannot be asked: {reason}")
        bad[key] = reason
        ui.warn(f"{name} cannot be asked: {reason}; it stays unanswered")

    def _refuses(self, image: Image.Image, asked: Asked) -> bool:
        """Whether the processor cannot take an image, which is then remembered as unreadable."""
        from vlmdpo.models.rendering import render_question

        try:
            with foreign(BadImage, "processor_refuses"):
                self.processor(
                    text=[render_question(self.processor, asked.text)],
                    images=[[image]],
                    return_tensors="pt",
                )
        except BadImage as problem:
            name = f"image '{asked.image}'"
            self._leave_out(self.outcome.bad_pictures, asked.image, name, str(problem))
            return True
        return False

    def _open_image(self, name: str) -> Image.Image | None:
        """The image; None, and remembered, if it cannot be read and `strict` is off."""
        if name in self.outcome.bad_pictures:
            return None
        try:
            return self.benchmark.images.open(name)
        except DataError as problem:
            if self.config.strict:
                raise
            self.outcome.bad_pictures[name] = str(problem)
            ui.warn(f"{problem}; its questions stay unanswered")
            return None

    @contextlib.contextmanager
    def _model_as(self, role: str) -> Iterator[Any]:
        """The model, with its adapter switched off for the role "base"."""
        is_base = role == "base" and self.config.adapter
        with self.model.disable_adapter() if is_base else contextlib.nullcontext():
            yield self.model

    def _ask_questions(self, questions: Sequence[Asked]) -> None:
        groups: dict[str, list[Asked]] = {}
        for question in questions:
            groups.setdefault(question.image, []).append(question)
        counts = {
            name: sum(len(self._unanswered(role, group)) for role in self.roles)
            for name, group in groups.items()
        }
        groups = {name: group for name, group in groups.items() if counts[name]}
        if not groups:
            return
        decoder = self._verified_decoder(groups) if self.config.engine == "shared" else None
        with ui.progress("ask", sum(counts.values()), unit="questions") as bar:
            for name, group in groups.items():
                image = self._open_image(name)
                if image is not None:
                    try:
                        self._ask_about(image, group, decoder)
                    except Exception:  # unless the processor refuses it, which is said and counted
                        if not self._refuses(image, group[0]):
                            raise
                bar.advance(counts[name])

    def _ask_about(
        self, image: Image.Image, group: Sequence[Asked], decoder: PromptTreeDecoder | None
    ) -> None:
        """Ask base and tuned the group's unanswered questions about one image."""
        with decoder.open(image) if decoder is not None else contextlib.nullcontext() as opened:
            for role in self.roles:
                unanswered = self._unanswered(role, group)
                if not unanswered:
                    continue
                texts = list(dict.fromkeys(question.text for question in unanswered))
                with self._model_as(role) as model:
                    if opened is not None:
                        answers = self._answer_opened(opened, texts)
                    else:
                        answers = self._answer_plainly(model, image, texts)
                answer_to = dict(zip(texts, answers, strict=True))
                self.answers.put(role, ((q.id, answer_to[q.text]) for q in unanswered))

    def _answer_opened(self, opened: Any, texts: Sequence[str]) -> list[str]:
        answers: list[str] = opened.answer(
            texts,
            self.config.max_new_tokens,
            batch_size=self.config.batch_size,
            stop_when=self.stop_when,
        )
        return answers

    def _answer_plainly(self, model: Any, image: Image.Image, texts: Sequence[str]) -> list[str]:
        from vlmdpo.engine.generate import answer

        answers: list[str] = []
        size = self.config.batch_size
        for start in range(0, len(texts), size):
            batch = texts[start : start + size]
            images = [image] * len(batch)
            answers += answer(model, self.processor, images, batch, self.config.max_new_tokens)
        return answers

    def _verified_decoder(self, groups: dict[str, list[Asked]]) -> PromptTreeDecoder | None:
        """The decoder that shares image and prompt; None if its answers differ from plain ones."""
        from vlmdpo.engine.decode import PromptTreeDecoder

        decoder = PromptTreeDecoder(
            self.model, self.processor, keep_features=not adapts_vision(self.model)
        )
        if decoder.reason_not_shared:
            ui.say(
                "questions share the image, but not the beginning of their prompts: "
                f"{decoder.reason_not_shared}"
            )
            self.outcome.reason = f"prompts are not shared: {decoder.reason_not_shared}"
        disagreement = self._disagreement(decoder, groups) if self.config.verify else ""
        if not disagreement:
            return decoder
        self.outcome.engine, self.outcome.reason = "plain", disagreement
        ui.warn(f"{disagreement}; continuing with the plain engine")
        return None

    def _disagreement(self, decoder: PromptTreeDecoder, groups: dict[str, list[Asked]]) -> str:
        """The first difference between shared and plain answers, or "". Asks `--verify` questions
        about images from all over the set.
        """
        names = list(groups)
        count = min(len(names), _VERIFIED_IMAGES)
        picked = [names[i * len(names) // count] for i in range(count)]
        per_image = max(1, self.config.verify // count // len(self.roles))
        for name in picked:
            image = self._open_image(name)
            if image is None or self._refuses(image, groups[name][0]):
                continue
            for role in self.roles:
                with self._model_as(role) as model, decoder.open(image) as opened:
                    # The whole group, as it will be asked; only some are compared.
                    answers = self._answer_opened(opened, [q.text for q in groups[name]])
                pairs = list(zip(groups[name], answers, strict=True))[:per_image]
                for question, shared in pairs:
                    with self._model_as(role) as model:
                        plain = self._differing_answer(model, image, question, shared)
                    if plain is not None:
                        return (
                            f"question {question.id} is answered {shared!r} by the shared engine "
                            f"and {plain!r} by the plain one"
                        )
        return ""

    def _differing_answer(
        self, model: Any, image: Image.Image, question: Asked, shared: str
    ) -> str | None:
        """The plain answer if it differs from the shared one by more than rounding, else None."""
        from vlmdpo.engine.generate import answer, is_near_tie

        tokens = self.config.max_new_tokens
        [plain] = answer(model, self.processor, [image], [question.text], tokens)
        was_cut = self.stop_when is not None and self.stop_when(shared)
        is_same = plain.startswith(shared) if was_cut else plain == shared
        if is_same or is_near_tie(model, self.processor, image, question.text, tokens):
            return None
        return plain

    def _ask_descriptions(self, descriptions: Sequence[Asked]) -> None:
        total = sum(len(self._unanswered(role, descriptions)) for role in self.roles)
        if not total:
            return
        window = _OPEN_BATCHES * self.config.batch_size
        with ui.progress("describe", total, unit="descriptions") as bar:
            for start in range(0, len(descriptions), window):
                some = descriptions[start : start + window]
                todo = [d for d in some if any(self._unanswered(r, [d]) for r in self.roles)]
                opened = [
                    (d, image) for d in todo if (image := self._open_image(d.image)) is not None
                ]
                # Images of one size have equally many tokens, so their batch needs no padding.
                opened.sort(key=lambda pair: pair[1].size)
                for role in self.roles:
                    ids = {d.id for d in self._unanswered(role, todo)}
                    self._describe(role, [pair for pair in opened if pair[0].id in ids], bar)

    def _describe(
        self, role: str, opened: Sequence[tuple[Asked, Image.Image]], bar: ui.Bar
    ) -> None:
        from vlmdpo.engine.generate import answer

        size, tokens = self.config.batch_size, self.config.max_description_tokens
        for start in range(0, len(opened), size):
            batch, images = zip(*opened[start : start + size], strict=True)
            texts = [d.text for d in batch]
            try:
                with self._model_as(role) as model:
                    answers = answer(model, self.processor, images, texts, tokens)
            except Exception:  # unless one of them is refused, which is said and counted
                kept = [
                    one for one in opened[start : start + size] if not self._refuses(one[1], one[0])
                ]
                if len(kept) == len(batch):
                    raise
                self._describe(role, kept, bar)
                continue
            self.answers.put(role, zip((d.id for d in batch), answers, strict=True))
            bar.advance(len(batch))

    def _ask_vllm(self, questions: Sequence[Asked], descriptions: Sequence[Asked]) -> None:
        from vlmdpo.benchmarks import vllm_check
        from vlmdpo.engine.vllm import generator_for

        config = self.config
        generator = generator_for(config, self.processor)
        samples = vllm_check.plain_answers(
            config, self.processor, self.roles, self._sample(questions)
        )
        generator.start()
        vllm_check.compare(generator, samples, config.max_new_tokens)
        for role in self.roles:
            self._generate(generator, role, questions, config.max_new_tokens)
            self._generate(generator, role, descriptions, config.max_description_tokens)

    def _sample(self, questions: Sequence[Asked]) -> list[tuple[Asked, Image.Image]]:
        """The `--verify` questions to compare engines with, from all over the unanswered ones."""
        unanswered = [q for q in questions if any(self._unanswered(r, [q]) for r in self.roles)]
        count = min(len(unanswered), -(-self.config.verify // len(self.roles)))
        picked = [unanswered[i * len(unanswered) // count] for i in range(count)]
        return [(q, image) for q in picked if (image := self._open_image(q.image)) is not None]

    def _generate(
        self, generator: Any, role: str, asked: Sequence[Asked], max_new_tokens: int
    ) -> None:
        same: dict[tuple[str, str], list[Asked]] = {}  # asked once
        for one in self._unanswered(role, asked):
            same.setdefault((one.image, one.text), []).append(one)
        groups = list(same.values())
        window = _VLLM_BATCHES * self.config.batch_size
        with ui.progress(f"ask {role}", sum(map(len, groups)), unit="questions") as bar:
            for start in range(0, len(groups), window):
                some = groups[start : start + window]
                opened = [
                    (group, image)
                    for group in some
                    if (image := self._open_image(group[0].image)) is not None
                ]
                texts, images = [group[0].text for group, _ in opened], [i for _, i in opened]
                answers = generator.generate(images, texts, max_new_tokens, tuned=role == "tuned")
                for (group, _), text in zip(opened, answers, strict=True):
                    self.answers.put(role, [(one.id, text) for one in group])
                bar.advance(sum(map(len, some)))


def adapts_vision(model: Any) -> bool:
    """Whether a model's adapter changes how image features are made."""
    if not hasattr(model, "peft_config"):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    from vlmdpo.models.families import unwrap_peft

    backbone = unwrap_peft(model).base_model
    language = set(map(id, backbone.get_decoder().modules()))
    adapted = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return any(
        isinstance(module, adapted) and id(module) not in language for module in backbone.modules()
    )
