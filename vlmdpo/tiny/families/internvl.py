"""InternVL."""

from __future__ import annotations

from typing import Any

import transformers as tf

from vlmdpo.models.processor_parts import without_video_processor
from vlmdpo.tiny.families.common import VISION_SIZES, ConfigAndProcessor, text_sizes
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids


def internvl(
    text: dict[str, Any],
    vision: dict[str, Any],
    image_size: int,
    *,
    template: str = TEMPLATE,
    tiles: int = 1,
) -> ConfigAndProcessor:
    names = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    attributes = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    tok = make_tokenizer(*names, **dict(zip(attributes, names, strict=True)))
    tok.start_image_token, tok.end_image_token, tok.context_image_token, tok.video_token = names
    start, end, context, video = token_ids(tok, *names)
    tok.start_image_token_id, tok.end_image_token_id = start, end
    tok.context_image_token_id, tok.video_token_id = context, video
    patch = vision.get("patch_size", 8)
    tokens = (image_size // patch // 2) ** 2
    config = tf.InternVLConfig(
        image_token_id=context,
        image_seq_length=tokens,
        tie_word_embeddings=False,
        text_config={**text_sizes(tok, model_type="qwen2"), **text},
        vision_config={
            **VISION_SIZES,
            "patch_size": [patch, patch],
            "image_size": [image_size, image_size],
            **vision,
        },
    )
    images = tf.GotOcr2ImageProcessorPil(
        size={"height": image_size, "width": image_size},
        crop_to_patches=tiles > 1,
        min_patches=1,
        max_patches=tiles,
    )
    template = template.replace("IMAGE", "<IMG_CONTEXT>\\n")
    return config, without_video_processor(tf.InternVLProcessor)(
        images, tok, image_seq_length=tokens, chat_template=template
    )
