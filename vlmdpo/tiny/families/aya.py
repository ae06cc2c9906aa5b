"""Aya Vision."""

from __future__ import annotations

from typing import Any

import transformers as tf

from vlmdpo.tiny.families.common import VISION_SIZES, ConfigAndProcessor, text_sizes
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids


def aya_vision(
    text: dict[str, Any],
    vision: dict[str, Any],
    image_size: int,
    *,
    template: str = TEMPLATE,
    tiles: int = 1,
) -> ConfigAndProcessor:
    """Aya Vision: a Cohere 2, every fourth layer of which has no window and no positions."""
    patch_token = "<|IMG_PATCH|>"
    names = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", patch_token, "TILE_GLOBAL")
    tok = make_tokenizer(*names, *(f"TILE_{i}" for i in range(1, tiles + 1)), image_token="<image>")
    vision = {
        **VISION_SIZES,
        "model_type": "siglip_vision_model",
        "patch_size": 8,
        "image_size": image_size,
        "vision_use_head": False,
        **vision,
    }
    config = tf.AyaVisionConfig(
        image_token_index=token_ids(tok, patch_token)[0],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        downsample_factor=2,
        tie_word_embeddings=True,
        text_config={
            **text_sizes(tok, model_type="cohere2", sliding_window=24, logit_scale=1.0),
            "layer_types": ["sliding_attention", "full_attention"],
            **text,
        },
        vision_config=vision,
    )
    images = tf.GotOcr2ImageProcessorPil(
        size={"height": image_size, "width": image_size},
        crop_to_patches=tiles > 1,
        min_patches=1,
        max_patches=tiles,
    )
    return config, tf.AyaVisionProcessor(
        images,
        tok,
        patch_size=2 * vision["patch_size"],  # in pixels, of what its connector makes one token of
        img_size=image_size,
        chat_template=template.replace("IMAGE", "<image>"),
    )
