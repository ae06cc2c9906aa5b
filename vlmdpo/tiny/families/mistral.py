"""Mistral 3 and Pixtral. Their processor needs torchvision."""

from __future__ import annotations

from typing import Any

import transformers as tf

from vlmdpo.tiny.families.common import VISION_SIZES, ConfigAndProcessor, text_sizes
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids


def mistral3(
    text: dict[str, Any],
    vision: dict[str, Any],
    image_size: int,
    *,
    template: str = TEMPLATE,
    is_pixtral: bool = False,
) -> ConfigAndProcessor:
    """Mistral 3, or Pixtral, which is a LLaVA whose tower takes pictures of any shape."""
    names = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    attributes = ("image_token", "image_break_token", "image_end_token")
    tok = make_tokenizer(*names, **dict(zip(attributes, names, strict=True)))
    image = token_ids(tok, "[IMG]")[0]
    merge = 1 if is_pixtral else 2
    shared: dict[str, Any] = {
        "image_token_index": image,
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
        "text_config": {**text_sizes(tok, model_type="mistral", sliding_window=None), **text},
        "vision_config": {
            **VISION_SIZES,
            "model_type": "pixtral",
            "head_dim": 8,
            "patch_size": 8 // merge,
            "image_size": image_size,
            **vision,
        },
    }
    patch = shared["vision_config"]["patch_size"]
    config = (
        tf.LlavaConfig(**shared, vision_feature_select_strategy="full")
        if is_pixtral
        else tf.Mistral3Config(**shared, spatial_merge_size=merge)
    )
    images = tf.PixtralImageProcessorPil(
        size={"longest_edge": image_size}, patch_size={"height": patch, "width": patch}
    )
    return config, tf.PixtralProcessor(
        images,
        tok,
        patch_size=patch,
        spatial_merge_size=merge,
        chat_template=template.replace("IMAGE", "[IMG]"),
    )
