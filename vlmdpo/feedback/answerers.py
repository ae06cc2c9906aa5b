"""A model as sampling and judging see it: answers about several images at a time.

`TreeAnswerer` computes each image, and what its prompts share, once; `VllmAnswerer` leaves that to
vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from PIL import Image

from vlmdpo.benchmarks.verdict import is_settled
from vlmdpo.data.reasons import BadRow, foreign
from vlmdpo.engine.sampling import Sample, Sampling

if TYPE_CHECKING:
    from vlmdpo.engine.decode import OpenedImage
    from vlmdpo.engine.vllm import VllmGenerator
    from vlmdpo.models.protocols import Processor, VisionLanguageModel

Asked = tuple[Image.Image, Sequence[str]]  # an image, and questions about it
_VLLM_IMAGES = 64  # handed to vLLM at a time, which batches them by itself
T = TypeVar("T")


class Reply(NamedTuple):
    """An answer to a yes/no question, and the log-odds of yes against no as its beginning."""

    text: str
    log_odds: float | None = None


class Answerer(Protocol):
    """Answers questions about images.

    Attributes:
        at_once: how many images it is best given together.
    """

    at_once: int

    def sample(
        self, asked: Sequence[Asked], sampling: Sampling, max_new_tokens: int
    ) -> list[list[list[Sample]]]:
        """Drawn answers to each question about each image. Raises BadRow for what it cannot ask."""
        ...

    def ask(
        self, asked: Sequence[Asked], max_new_tokens: int, *, with_log_odds: bool = False
    ) -> list[list[Reply]]:
        """The greedy answer to each question, which ends once it has said yes or no.

        Args:
            with_log_odds: whether replies have the log-odds of yes against no.

        Raises BadRow.
        """
        ...

    def complete(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        """The greedy answer to each text, without an image. Raises BadRow."""
        ...


class TreeAnswerer:
    """All questions about an image, and all answers drawn, are one tree.

    Args:
        model: with its adapter, if it has one.
        batch_size: answers per forward pass.
    """

    at_once = 1

    def __init__(
        self, model: VisionLanguageModel, processor: Processor, *, batch_size: int
    ) -> None:
        from vlmdpo.engine.decode import PromptTreeDecoder

        self.model, self.processor, self._batch_size = model, processor, batch_size
        self._decoder = PromptTreeDecoder(model, processor, keep_features=True)

    def sample(
        self, asked: Sequence[Asked], sampling: Sampling, max_new_tokens: int
    ) -> list[list[list[Sample]]]:
        """See `Answerer`."""
        return self._of_each(
            asked,
            lambda opened, questions: opened.sample(
                questions, sampling, max_new_tokens, batch_size=self._batch_size
            ),
        )

    def ask(
        self, asked: Sequence[Asked], max_new_tokens: int, *, with_log_odds: bool = False
    ) -> list[list[Reply]]:
        """See `Answerer`."""
        size = self._batch_size

        def replies(opened: OpenedImage, questions: Sequence[str]) -> list[Reply]:
            texts = opened.answer(questions, max_new_tokens, batch_size=size, stop_when=is_settled)
            if not with_log_odds:
                return list(map(Reply, texts))
            return list(map(Reply, texts, opened.log_odds(questions, batch_size=size)))

        return self._of_each(asked, replies)

    def complete(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        """See `Answerer`."""
        from vlmdpo.engine.generate import answer_texts

        return answer_texts(self.model, self.processor, texts, max_new_tokens)

    def _check_length(self, tokens: int) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and tokens >= limit:
            raise BadRow(
                "over_length", f"the prompt has {tokens:,} tokens, and the model reads {limit:,}"
            )

    def _of_each(
        self, asked: Sequence[Asked], answers: Callable[[OpenedImage, Sequence[str]], list[T]]
    ) -> list[list[T]]:
        """What `answers` gives for the questions about each image, which is opened for it."""
        results: list[list[T]] = []
        for image, questions in asked:
            if not questions:
                results.append([])
                continue
            with self._decoder.open(image) as opened:
                with foreign(BadRow, "processor_refuses"):
                    longest = opened.process(questions)
                self._check_length(longest)
                results.append(answers(opened, questions))
        return results


class VllmAnswerer:
    """vLLM batches what it is given, and shares beginnings by itself.

    Args:
        generator: started.
        tuned: whether its adapter is on.
    """

    at_once = _VLLM_IMAGES

    def __init__(self, generator: VllmGenerator, *, tuned: bool) -> None:
        self._generator, self._tuned = generator, tuned

    def sample(
        self, asked: Sequence[Asked], sampling: Sampling, max_new_tokens: int
    ) -> list[list[list[Sample]]]:
        """See `Answerer`."""
        images, questions = self._flat(asked)
        drawn = self._generator.sample(
            images, questions, max_new_tokens, sampling, tuned=self._tuned
        )
        return _by_image(drawn, asked)

    def ask(
        self, asked: Sequence[Asked], max_new_tokens: int, *, with_log_odds: bool = False
    ) -> list[list[Reply]]:
        """See `Answerer`; vLLM goes on to the end of each answer, and gives no log-odds:
        `MakePairsConfig` refuses to ask for them.
        """
        assert not with_log_odds
        images, questions = self._flat(asked)
        texts = self._generator.generate(images, questions, max_new_tokens, tuned=self._tuned)
        return _by_image(list(map(Reply, texts)), asked)

    def complete(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        """See `Answerer`."""
        return self._generator.complete(texts, max_new_tokens, tuned=self._tuned)

    def _flat(self, asked: Sequence[Asked]) -> tuple[list[Image.Image], list[str]]:
        """One entry per question, of which the prompts can be made. Raises BadRow."""
        from vlmdpo.models.rendering import render_question

        flat = [(image, question) for image, questions in asked for question in questions]
        with foreign(BadRow, "chat_template_refuses"):
            for _, question in flat:
                render_question(self._generator.processor, question)
        return [image for image, _ in flat], [question for _, question in flat]


def _by_image(results: Sequence[T], asked: Sequence[Asked]) -> list[list[T]]:
    remaining = iter(results)
    return [list(islice(remaining, len(questions))) for _, questions in asked]
