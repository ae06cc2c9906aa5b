"""PaliGemma, PaliGemma 2, Gemma 3."""

from __future__ import annotations

from typing import Any

import transformers as tf

from vlmdpo.tiny.families.common import VISION_SIZES, ConfigAndProcessor, text_sizes
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids


def paligemma(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, *, projection_dim: int = 32
) -> ConfigAndProcessor:
    tok = make_tokenizer("<image>", image_token="<image>")
    tokens = (image_size // vision.get("patch_size", 8)) ** 2
    config = tf.PaliGemmaConfig(
        image_token_index=token_ids(tok, "<image>")[0],
        image_token_id=token_ids(tok, "<image>")[0],
        projection_dim=projection_dim,
        text_config={**text_sizes(tok, model_type="gemma"), **text},
        vision_config={
            **VISION_SIZES,
            "model_type": "siglip_vision_model",
            "patch_size": 8,
            "image_size": image_size,
            **vision,
        },
    )
    images = tf.SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    images.image_seq_length = tokens
    return config, tf.PaliGemmaProcessor(images, tok)


def paligemma2(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, **more: Any
) -> ConfigAndProcessor:
    """PaliGemma on Gemma 2: every other layer has a sliding window, and logits are capped."""
    layers = {
        "sliding_window": 24,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return paligemma({"model_type": "gemma2", **layers, **text}, vision, image_size, **more)


def gemma3(
    text: dict[str, Any],
    vision: dict[str, Any],
    image_size: int,
    *,
    mm_tokens_per_image: int | None = None,
) -> ConfigAndProcessor:
    tok = make_tokenizer(
        "<image>", "<start>", "<end>", image_token="<image>", boi_token="<start>", eoi_token="<end>"
    )
    tokens = mm_tokens_per_image or (image_size // 16) ** 2
    config = tf.Gemma3Config(
        image_token_id=token_ids(tok, "<image>")[0],
        image_token_index=token_ids(tok, "<image>")[0],
        boi_token_index=token_ids(tok, "<start>")[0],
        eoi_token_index=token_ids(tok, "<end>")[0],
        mm_tokens_per_image=tokens,
        text_config={
            **text_sizes(tok, sliding_window=24, query_pre_attn_scalar=8),
            "layer_types": ["sliding_attention", "full_attention"],
            **text,
        },
        vision_config={
            **VISION_SIZES,
            "model_type": "siglip_vision_model",
            "patch_size": 8,
            "image_size": image_size,
            **vision,
        },
    )
    images = tf.Gemma3ImageProcessorPil(size={"height": image_size, "width": image_size})
    template = TEMPLATE.replace("IMAGE", "<start>")
    return config, tf.Gemma3Processor(images, tok, image_seq_length=tokens, chat_template=template)
