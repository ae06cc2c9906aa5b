"""Ovis2."""

from __future__ import annotations

from typing import Any

import transformers as tf

from vlmdpo.tiny.families.common import VISION_SIZES, ConfigAndProcessor, text_sizes
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids


def ovis2(
    text: dict[str, Any],
    vision: dict[str, Any],
    image_size: int,
    *,
    template: str = TEMPLATE,
    tiles: int = 1,
) -> ConfigAndProcessor:
    """Ovis2: image features are distributions over a vocabulary of their own."""
    indicators = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    tok = make_tokenizer("<image>", "<IMG_ATOM>", *indicators, image_token="<image>")
    stride = 2
    text = {**text_sizes(tok, model_type="qwen2"), **text}
    vision = {
        **VISION_SIZES,
        "patch_size": 8,
        "image_size": image_size,
        "hidden_stride": stride,
        "vocab_size": 48,
        "num_visual_indicator_tokens": len(indicators),
        **vision,
    }
    config = tf.Ovis2Config(
        image_token_id=token_ids(tok, "<IMG_ATOM>")[0],
        visual_indicator_token_ids=token_ids(tok, *indicators),
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        tie_word_embeddings=True,
        text_config=text,
        vision_config=vision,
    )
    images = tf.Ovis2ImageProcessorPil(
        size={"height": image_size, "width": image_size},
        crop_to_patches=tiles > 1,
        max_patches=tiles,
    )
    return config, tf.Ovis2Processor(
        images,
        tok,
        image_seq_length=(image_size // vision["patch_size"] // stride) ** 2,
        chat_template=template.replace("IMAGE", "<image>"),
    )
