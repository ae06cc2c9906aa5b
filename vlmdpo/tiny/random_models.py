"""Small models of every supported family, with random weights and real processors.

For tests, benchmarks and memory estimates: the architectures are transformers' own, only narrow and
shallow. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as tf

from vlmdpo.models.protocols import Processor, VisionLanguageModel
from vlmdpo.tiny.families import (
    aya,
    convolutional,
    deepseek,
    gemma,
    gemma3n,
    glm,
    idefics,
    internvl,
    llama,
    llava,
    mistral,
    ovis,
    qwen,
)
from vlmdpo.tiny.families.common import VISION_SIZES, ConfigAndProcessor, text_sizes

__all__ = [
    "FAMILIES",
    "NEED_TIMM",
    "NEED_TORCHVISION",
    "RECURRENT",
    "VISION_SIZES",
    "ConfigAndProcessor",
    "available",
    "make",
    "text_sizes",
]

FAMILIES: dict[str, Callable[..., ConfigAndProcessor]] = {
    "idefics2": idefics.idefics2,
    "idefics3": idefics.idefics3,
    "smolvlm": partial(idefics.idefics3, is_smolvlm=True),
    "llava": llava.llava,
    "llava_next": partial(llava.llava, is_next=True),
    "llava_onevision": llava.llava_onevision,
    "paligemma": gemma.paligemma,
    "paligemma2": gemma.paligemma2,
    "gemma3": gemma.gemma3,
    "gemma3n": gemma3n.gemma3n,
    "gemma4": gemma.gemma4,
    "gemma4_moe": partial(gemma.gemma4, is_moe=True),
    "internvl": internvl.internvl,
    "qwen2_vl": partial(qwen.qwen, version="2"),
    "qwen2_5_vl": partial(qwen.qwen, version="2.5"),
    "qwen3_vl": partial(qwen.qwen, version="3"),
    "qwen3_vl_moe": partial(qwen.qwen, version="3-moe"),
    "qwen3_5": partial(qwen.qwen, version="3.5"),
    "qwen3_5_moe": partial(qwen.qwen, version="3.5-moe"),
    "glm4v": glm.glm4v,
    "glm46v": partial(glm.glm4v, is_46=True),
    "aya_vision": aya.aya_vision,
    "ovis2": ovis.ovis2,
    "deepseek_vl": deepseek.deepseek_vl,
    "minicpm_v": convolutional.minicpm_v,
    "pixtral": partial(mistral.mistral3, is_pixtral=True),
    "mistral3": mistral.mistral3,
    "lfm2_vl": convolutional.lfm2_vl,
    "kimi_k25": deepseek.kimi_k25,
    "llama4": llama.llama4,
}
# Families whose processors exist only with torchvision.
NEED_TORCHVISION = ("pixtral", "mistral3", "lfm2_vl", "kimi_k25", "llama4")
NEED_TIMM = ("gemma3n",)  # for their tower; timm needs torchvision
RECURRENT = (
    "qwen3_5",
    "qwen3_5_moe",
    "minicpm_v",
    "lfm2_vl",
)  # families whose layers carry state from token to token


def available() -> list[str]:
    """The families that can be made here: without torchvision or timm, those that need none."""
    missing: tuple[str, ...] = ()
    if importlib.util.find_spec("timm") is None:
        missing += NEED_TIMM
    if importlib.util.find_spec("torchvision") is None:
        gemma4 = () if _loads_gemma4() else ("gemma4", "gemma4_moe")
        missing += (*NEED_TORCHVISION, *gemma4)
    return [name for name in FAMILIES if name not in missing]


def _loads_gemma4() -> bool:
    """Whether Gemma 4's processor loads: in older versions of transformers it needs torchvision."""
    try:
        return hasattr(tf, "Gemma4Processor")
    except ImportError:
        return False


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
