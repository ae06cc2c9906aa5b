"""Answers through `generate`, each in a padded row of its own: for models whose prompts cannot
share their prefix. The image is still encoded once.

Shapes: K answers, one a row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from vlmdpo.engine import packed_attention
from vlmdpo.engine.leaves import Leaf
from vlmdpo.engine.next_token import ChosenTokens, TokenChooser
from vlmdpo.models import families
from vlmdpo.models.protocols import VisionLanguageModel

# Generation settings that change greedy answers beyond a repetition penalty, each with the values
# that change nothing.
_NEUTRAL_SETTINGS: dict[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
}


def reason_not_shared(model: VisionLanguageModel) -> str:
    """Why prompts about an image cannot share their prefix, or ""."""
    base = families.unwrap_peft(model)
    try:
        packed_attention.check_shareable(model)
    except packed_attention.CannotShare as problem:
        return str(problem)
    if families.has_bidirectional_prompt(base.base_model):
        return "its prompts are read in both directions"
    for name, neutral_values in _NEUTRAL_SETTINGS.items():
        if getattr(base.generation_config, name, None) not in neutral_values:
            return f"its generation config sets {name}"
    return ""


def generate_rows(
    model: VisionLanguageModel,
    leaves: Sequence[Leaf],
    pixel_inputs: Mapping[str, Tensor | list[object]],
    max_new_tokens: int,
    chooser: TokenChooser,
    *,
    pad_token: int,
    end_tokens: Collection[int],
    stop_when: Callable[[Sequence[int]], bool] | None,
) -> None:
    """Complete all answers, each up to its end token.

    Args:
        pixel_inputs: the inputs of the one image that all prompts are about.
        stop_when: an answer ends as soon as this holds for its token ids.
    """
    prompts = [leaf.prompt for leaf in leaves]
    width = max(len(prompt.ids) for prompt in prompts)

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor(
            [[fill] * (width - len(row)) + list(row) for row in rows], device=model.device
        )

    ids = [prompt.ids for prompt in prompts]
    types = {
        name: padded([prompt.types[name][0].tolist() for prompt in prompts], 0)
        for name in prompts[0].types
    }
    pixels = {
        name: torch.cat([value] * len(prompts))
        if isinstance(value, Tensor)
        else value * len(prompts)
        for name, value in pixel_inputs.items()
    }
    options: dict[str, Any] = {"do_sample": False}
    if not chooser.is_plain_greedy:
        options["logits_processor"] = LogitsProcessorList([ChosenTokens(chooser, leaves)])
        options["num_beams"] = 1  # its scores are those of one row, not of a search
    sequences = model.generate(
        input_ids=padded(ids, pad_token),
        attention_mask=padded([[1] * len(row) for row in ids], 0),
        **types,
        **pixels,
        **options,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_tokens),
        stopping_criteria=StoppingCriteriaList(
            [_StopEachRow(stop_when, width)] if stop_when else []
        ),
    )
    for leaf, row in zip(leaves, sequences[:, width:].tolist(), strict=True):
        ends = [number for number, token in enumerate(row) if token in end_tokens]
        leaf.answer_ids = row[: ends[0] + 1] if ends else row


class _StopEachRow(StoppingCriteria):
    """Ends each row of a `generate` call as soon as `stop_when` holds for its answer."""

    def __init__(self, stop_when: Callable[[Sequence[int]], bool], prompt_width: int) -> None:
        self.stop_when, self.prompt_width = stop_when, prompt_width

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        answers = input_ids[:, self.prompt_width :].tolist()
        return torch.tensor([self.stop_when(ids) for ids in answers], device=input_ids.device)
