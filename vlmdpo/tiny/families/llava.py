"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from typing import Any

import transformers as tf

from vlmdpo.models.processor_parts import without_video_processor
from vlmdpo.tiny.families.common import VISION_SIZES, ConfigAndProcessor, text_sizes
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids


def llava(
    text: dict[str, Any],
    vision: dict[str, Any],
    image_size: int,
    *,
    template: str = TEMPLATE,
    is_next: bool = False,
) -> ConfigAndProcessor:
    tok = make_tokenizer("<image>", image_token="<image>")
    shared: dict[str, Any] = {
        "image_token_id": token_ids(tok, "<image>")[0],
        "image_token_index": token_ids(tok, "<image>")[0],
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {**text_sizes(tok, model_type="llama"), **text},
        "vision_config": {
            **VISION_SIZES,
            "model_type": "clip_vision_model",
            "patch_size": 8,
            "image_size": image_size,
            "projection_dim": 32,
            **vision,
        },
    }
    patch = shared["vision_config"]["patch_size"]
    processor_options = {
        "patch_size": patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    template = template.replace("IMAGE", "<image>")
    sizes = {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }
    if not is_next:
        images = tf.CLIPImageProcessorPil(**sizes)
        return tf.LlavaConfig(**shared), tf.LlavaProcessor(
            images, tok, chat_template=template, **processor_options
        )
    pinpoints = [
        [image_size, 2 * image_size],
        [2 * image_size, image_size],
        [2 * image_size, 2 * image_size],
    ]
    images = tf.LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=pinpoints)
    config = tf.LlavaNextConfig(**shared, image_grid_pinpoints=pinpoints)
    return config, tf.LlavaNextProcessor(images, tok, chat_template=template, **processor_options)


def llava_onevision(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, *, template: str = TEMPLATE
) -> ConfigAndProcessor:
    """LLaVA-OneVision, which tiles pictures."""
    tok = make_tokenizer("<image>", "<video>", image_token="<image>", video_token="<video>")
    image, video = token_ids(tok, "<image>", "<video>")
    pinpoints = [[image_size, 2 * image_size], [2 * image_size, image_size]]
    vision = {
        **VISION_SIZES,
        "model_type": "siglip_vision_model",
        "patch_size": 8,
        "image_size": image_size,
        "vision_use_head": False,
        **vision,
    }
    config = tf.LlavaOnevisionConfig(
        image_token_id=image,
        video_token_id=video,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
        text_config={**text_sizes(tok, model_type="qwen2"), **text},
        vision_config=vision,
    )
    images = tf.LlavaOnevisionImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_grid_pinpoints=pinpoints
    )
    return config, without_video_processor(tf.LlavaOnevisionProcessor)(
        image_processor=images,
        tokenizer=tok,
        num_image_tokens=(image_size // vision["patch_size"]) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template.replace("IMAGE", "<image>"),
    )
