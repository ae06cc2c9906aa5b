"""vLLM's answers to a few questions, compared with those of the plain engine.

vLLM has its own code for every model and every processor. The plain model is asked first, and gone
before vLLM starts: the two would not fit a GPU together.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlmdpo import ui
from vlmdpo.benchmarks.base import Asked
from vlmdpo.config import EvalAmberConfig
from vlmdpo.errors import ModelError
from vlmdpo.models.configured import configured_model

if TYPE_CHECKING:
    from vlmdpo.engine.vllm import VllmGenerator
    from vlmdpo.models.protocols import Processor


@dataclass(frozen=True)
class PlainAnswer:
    """What the plain engine answers to one question.

    Attributes:
        role: "base" or "tuned".
        is_near_tie: whether rounding alone may lead to another answer.
    """

    role: str
    question: Asked
    image: Image.Image
    answer: str
    is_near_tie: bool


def plain_answers(
    config: EvalAmberConfig,
    processor: Processor,
    roles: Sequence[str],
    samples: Sequence[tuple[Asked, Image.Image]],
) -> list[PlainAnswer]:
    """The answers of the plain engine, whose model is loaded here and freed again."""
    if not samples:
        return []
    from vlmdpo.engine.generate import answer, is_near_tie

    tokens = config.max_new_tokens
    model: Any = configured_model(config, adapter=config.adapter)
    found = []
    for role in roles:
        is_base = role == "base" and config.adapter is not None
        with model.disable_adapter() if is_base else contextlib.nullcontext():
            for question, image in samples:
                [text] = answer(model, processor, [image], [question.text], tokens)
                tie = is_near_tie(model, processor, image, question.text, tokens)
                found.append(PlainAnswer(role, question, image, text, tie))
    del model
    _free_memory()
    return found


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(generator: VllmGenerator, expected: Sequence[PlainAnswer], max_new_tokens: int) -> None:
    """Raise ModelError where vLLM answers otherwise than the plain engine, beyond rounding."""
    for role in dict.fromkeys(one.role for one in expected):
        asked = [one for one in expected if one.role == role]
        answers = generator.generate(
            [one.image for one in asked],
            [one.question.text for one in asked],
            max_new_tokens,
            tuned=role == "tuned",
        )
        for one, text in zip(asked, answers, strict=True):
            if text != one.answer and not one.is_near_tie:
                raise ModelError(
                    f"question {one.question.id} is answered {text!r} by vLLM and {one.answer!r} "
                    f"by the plain engine ({role}); use --engine shared, or --verify 0 to take "
                    "vLLM's answers as they are"
                )
    if expected:
        ui.say(f"vLLM and the plain engine agree on {ui.count(len(expected), 'answer')}")
