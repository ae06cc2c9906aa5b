"""Greedy answers to questions about pictures, many at a time. Knows nothing of benchmarks or files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image


def render_prompt(processor: Any, question: str) -> str:
    """One user turn with one picture, rendered through the model's chat template, ready for the
    answer.
    """
    content = [{"type": "image"}, {"type": "text", "text": question}]
    rendered: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return rendered


@torch.inference_mode()
def answer(
    model: Any,
    processor: Any,
    pictures: Sequence[Image.Image],
    questions: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """The model's greedy answers, stripped of special tokens, one for each picture and question.

    Prompts are padded on the left; answers do not depend on the batch but for rounding.
    """
    inputs = model_inputs(model, processor, pictures, questions)
    made = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answers = processor.batch_decode(
        made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in answers]


def model_inputs(
    model: Any, processor: Any, pictures: Sequence[Image.Image], questions: Sequence[str]
) -> Any:
    """What the model is given for one question to each picture, padded on the left, on its device
    and in its type.
    """
    return processor(
        text=[render_prompt(processor, question) for question in questions],
        images=[[picture] for picture in pictures],
        padding=True,
        padding_side="left",
        add_special_tokens=False,  # the chat template has put them in
        return_tensors="pt",
    ).to(model.device, model.dtype)


@torch.inference_mode()
def is_near_tie(
    model: Any, processor: Any, picture: Image.Image, question: str, max_new_tokens: int
) -> bool:
    """Whether the model's two best next tokens lie, somewhere in its answer, within its data type's
    rounding.

    Then either is a right greedy answer: which one comes depends on the order of the arithmetic.
    """
    inputs = model_inputs(model, processor, [picture], [question])
    settings = {"do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    made = model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
    for scores in made.scores:
        first, second = scores[0].float().topk(2).values.tolist()
        if first - second <= 8 * torch.finfo(model.dtype).eps * max(1.0, abs(first)):
            return True
    return False
