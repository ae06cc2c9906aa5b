"""Answers to questions about images, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from vlmdpo.engine.sampling import GREEDY, Sampling
from vlmdpo.errors import ModelError
from vlmdpo.models.families import inserts_image_tokens
from vlmdpo.models.protocols import Processor, VisionLanguageModel
from vlmdpo.models.rendering import render_question, stop_token_ids

if TYPE_CHECKING:
    from transformers import BatchFeature
    from transformers.generation.streamers import BaseStreamer


def answer(
    model: VisionLanguageModel,
    processor: Processor,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """The model's greedy answers, stripped of special tokens, one for each image and question.

    Prompts are padded on the left; answers do not depend on the batch but for rounding.
    """
    inputs = model_inputs(model, processor, images, questions)
    return [texts[0] for texts in answers_to(model, processor, inputs, max_new_tokens)]


@torch.inference_mode()
def answers_to(
    model: VisionLanguageModel,
    processor: Processor,
    inputs: BatchFeature,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    streamer: BaseStreamer | None = None,
) -> list[list[str]]:
    """The answers to each row of `model_inputs`, stripped of special tokens.

    Draws come from torch's own generator, to be seeded by the caller.

    Args:
        streamer: gets the tokens as they come, of a single row.
    """
    sequences = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_token_ids(model, processor),
        streamer=streamer,
        **sampling.options(),
    )
    prompt_width = inputs["input_ids"].shape[1]
    texts = processor.batch_decode(sequences[:, prompt_width:], skip_special_tokens=True)
    texts = [text.strip() for text in texts]
    count = sampling.answers
    return [texts[start : start + count] for start in range(0, len(texts), count)]


@torch.inference_mode()
def answer_texts(
    model: VisionLanguageModel,
    processor: Processor,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    batch_size: int = 16,
) -> list[str]:
    """The model's greedy answers, stripped of special tokens, to prompts without an image.

    Raises BadRow for a prompt that the chat template refuses without an image, or with `<image>`,
    ModelError for a model that takes no prompt without an image.
    """
    if inserts_image_tokens(processor):  # and BOS and a line break with them
        raise ModelError(
            f"{type(processor).__name__} makes prompts of images only; what is asked without one "
            "needs another model"
        )
    rendered = [render_question(processor, prompt, images=0) for prompt in prompts]
    answers: list[str] = []
    for start in range(0, len(rendered), batch_size):
        # By the tokenizer: some processors refuse a text without an image.
        inputs = processor.tokenizer(
            rendered[start : start + batch_size],
            padding=True,
            padding_side="left",
            add_special_tokens=False,  # the chat template has added them
            return_token_type_ids=False,
            return_tensors="pt",
        ).to(model.device)
        texts = answers_to(model, processor, inputs, max_new_tokens)
        answers += [text for [text] in texts]
    return answers


def model_inputs(
    model: VisionLanguageModel,
    processor: Processor,
    images: Sequence[Image.Image],
    questions: Sequence[str],
) -> BatchFeature:
    """The model's inputs for one question about each image, on its device and in its data type.

    Prompts are padded on the left.
    """
    return processor(
        text=[render_question(processor, question) for question in questions],
        images=[[image] for image in images],
        padding=True,
        padding_side="left",
        add_special_tokens=False,  # the chat template has added them
        return_tensors="pt",
    ).to(model.device, model.dtype)


@torch.inference_mode()
def is_near_tie(
    model: VisionLanguageModel,
    processor: Processor,
    image: Image.Image,
    question: str,
    max_new_tokens: int,
) -> bool:
    """Whether somewhere in an answer the two best next tokens lie within rounding of each other.

    Then either is a correct greedy answer: which one comes depends on the order of the arithmetic.
    """
    inputs = model_inputs(model, processor, [image], [question])
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop_token_ids(model, processor),
        output_scores=True,
        return_dict_in_generate=True,
    )
    for scores_1V in output.scores:
        first, second = scores_1V[0].float().topk(2).values.tolist()
        if first - second <= 8 * torch.finfo(model.dtype).eps * max(1.0, abs(first)):
            return True
    return False
