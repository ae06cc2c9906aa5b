"""What answers the questions of `vlmdpo infer`: transformers, or vLLM."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from PIL import Image

from vlmdpo.config import InferConfig
from vlmdpo.data.reasons import BadRow, foreign
from vlmdpo.engine.sampling import Sampling
from vlmdpo.models.configured import configured_model, configured_processor


class Engine(Protocol):
    """A model that answers questions about images."""

    def inputs(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Any:
        """What `answers` takes. Raises BadRow where the model's processor or chat template
        cannot take a question or its image.
        """
        ...

    def answers(
        self,
        inputs: Any,
        seed_of: Sequence[object],
        *,
        tuned: bool = True,
        show: Callable[[str], None] | None = None,
    ) -> list[list[str]]:
        """The answers to each question.

        Args:
            seed_of: what the draws depend on besides `--seed`.
            tuned: whether the adapter is on.
            show: called with each piece of a single answer as it comes, where the engine can.
        """
        ...


def sampling_of(config: InferConfig) -> Sampling:
    """How the options ask for answers to be chosen."""
    return Sampling(config.temperature, config.top_p, config.num_return_sequences, config.seed)


def load(config: InferConfig) -> Engine:
    """The engine that `--engine` names, loaded. Raises ModelError, MissingDependencyError."""
    return _Vllm(config) if config.engine == "vllm" else _Plain(config)


class _Plain:
    def __init__(self, config: InferConfig) -> None:
        self.config = config
        self.model: Any = configured_model(config, adapter=config.adapter)
        self.processor = configured_processor(config, adapter=config.adapter)

    def inputs(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Any:
        from vlmdpo.engine.generate import model_inputs

        with foreign(BadRow, "processor_refuses"):
            return model_inputs(self.model, self.processor, images, questions)

    def answers(
        self,
        inputs: Any,
        seed_of: Sequence[object],
        *,
        tuned: bool = True,
        show: Callable[[str], None] | None = None,
    ) -> list[list[str]]:
        import torch

        from vlmdpo.engine.generate import answers_to
        from vlmdpo.engine.streaming import TextStreamer

        sampling = sampling_of(self.config)
        if not sampling.is_greedy:
            torch.manual_seed(sampling.seed_of(seed_of))
        streamer = TextStreamer(self.processor, show) if show else None
        with contextlib.nullcontext() if tuned else self.model.disable_adapter():
            return answers_to(
                self.model, self.processor, inputs, self.config.max_new_tokens, sampling, streamer
            )


class _Vllm:
    def __init__(self, config: InferConfig) -> None:
        from vlmdpo.engine.vllm import generator_for

        self.config = config
        self.processor = configured_processor(config, adapter=config.adapter)
        self.generator = generator_for(config, self.processor)
        self.generator.start()

    def inputs(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Any:
        from vlmdpo.models.rendering import render_question

        with foreign(BadRow, "chat_template_refuses"):
            for question in questions:
                render_question(self.processor, question)
        return images, questions

    def answers(
        self,
        inputs: Any,
        seed_of: Sequence[object],
        *,
        tuned: bool = True,
        show: Callable[[str], None] | None = None,
    ) -> list[list[str]]:
        images, questions = inputs
        return self.generator.answers_to(
            images,
            questions,
            self.config.max_new_tokens,
            sampling_of(self.config),
            tuned=tuned and self.config.adapter is not None,
        )
