"""Small models of every supported family, with random weights and real processors.

For tests, benchmarks and memory estimates: the architectures are transformers' own, only narrow and
shallow. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

from vlmdpo.models.protocols import Processor, VisionLanguageModel
from vlmdpo.tiny.families import gemma, idefics, internvl, llava, qwen
from vlmdpo.tiny.families.common import VISION_SIZES, ConfigAndProcessor, text_sizes

__all__ = ["FAMILIES", "RECURRENT", "VISION_SIZES", "ConfigAndProcessor", "make", "text_sizes"]

FAMILIES: dict[str, Callable[..., ConfigAndProcessor]] = {
    "idefics2": idefics.idefics2,
    "idefics3": idefics.idefics3,
    "smolvlm": lambda *a, **k: idefics.idefics3(*a, is_smolvlm=True, **k),
    "llava": llava.llava,
    "llava_next": lambda *a, **k: llava.llava(*a, is_next=True, **k),
    "paligemma": gemma.paligemma,
    "paligemma2": gemma.paligemma2,
    "gemma3": gemma.gemma3,
    "internvl": internvl.internvl,
    "qwen2_vl": lambda *a, **k: qwen.qwen(*a, version="2", **k),
    "qwen2_5_vl": lambda *a, **k: qwen.qwen(*a, version="2.5", **k),
    "qwen3_vl": lambda *a, **k: qwen.qwen(*a, version="3", **k),
    "qwen3_5": lambda *a, **k: qwen.qwen(*a, version="3.5", **k),
}
RECURRENT = ("qwen3_5",)  # families whose layers carry state from token to token


def make(
    family: str,
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    image_size: int = 32,
    seed: int = 0,
    **options: Any,
) -> tuple[VisionLanguageModel, Processor]:
    """A (model, processor) of one of FAMILIES, float32, random weights.

    Args:
        text, vision: settings of the two configurations that differ.
        image_size: the processor's limit for a side, in pixels.
        options: of the family's function above.
    """
    config, processor = FAMILIES[family](text or {}, vision or {}, image_size, **options)
    torch.manual_seed(seed)
    model = tf.AutoModelForImageTextToText.from_config(config)
    model.config.pad_token_id = processor.tokenizer.pad_token_id
    for name, parameter in model.named_parameters():
        # Gemma 3 initializes it to zero, so that the image would have no effect.
        if name.endswith("mm_input_projection_weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model, processor
