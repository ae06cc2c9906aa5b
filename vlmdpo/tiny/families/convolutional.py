"""Families whose language models are in part not attention: LFM2-VL and MiniCPM-V."""

from __future__ import annotations

from typing import Any

import transformers as tf

from vlmdpo.models.processor_parts import without_video_processor
from vlmdpo.tiny.families.common import TEXT_SIZES, VISION_SIZES, ConfigAndProcessor, text_sizes
from vlmdpo.tiny.families.qwen import text_of_version
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids


def lfm2_vl(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, *, template: str = TEMPLATE
) -> ConfigAndProcessor:
    """LFM2-VL, with short convolutions. Its image processor needs torchvision."""
    names = ("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
    attributes = ("image_token", "image_start_token", "image_end_token", "image_thumbnail_token")
    tok = make_tokenizer(*names, **dict(zip(attributes, names, strict=True)))
    vision = {
        **VISION_SIZES,
        "model_type": "siglip2_vision_model",
        "patch_size": 8,
        "num_patches": 16,
        "vision_use_head": False,
        **vision,
    }
    config = tf.Lfm2VlConfig(
        image_token_id=token_ids(tok, "<image>")[0],
        projector_hidden_size=32,
        downsample_factor=2,
        text_config={
            **text_sizes(tok, model_type="lfm2"),
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention"],
            **text,
        },
        vision_config=vision,
    )
    patch = vision["patch_size"]
    images = tf.Lfm2VlImageProcessor(
        downsample_factor=2,
        do_image_splitting=False,
        encoder_patch_size=patch,
        tile_size=image_size,
        min_image_tokens=1,
        max_image_tokens=(image_size // patch // 2) ** 2,
        max_num_patches=(image_size // patch) ** 2,
        return_row_col_info=True,
    )
    return config, tf.Lfm2VlProcessor(
        images, tok, chat_template=template.replace("IMAGE", "<image>")
    )


def minicpm_v(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, *, template: str = TEMPLATE
) -> ConfigAndProcessor:
    """MiniCPM-V 4.6, whose language model is a Qwen 3.5, with linear attention."""
    named = {
        "image_token": "<|image_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
        "video_token": "<|video_pad|>",
    }
    tok = make_tokenizer(*named.values(), **named)
    head_dim = text.get("head_dim", TEXT_SIZES["head_dim"])
    config = tf.MiniCPMV4_6Config(
        image_token_id=token_ids(tok, "<|image_pad|>")[0],
        video_token_id=token_ids(tok, "<|video_pad|>")[0],
        insert_layer_id=0,
        image_size=image_size,
        tie_word_embeddings=False,
        text_config={
            **text_sizes(tok, model_type="qwen3_5_text"),
            **text_of_version("3.5", head_dim),
            **text,
        },
        vision_config={**VISION_SIZES, "patch_size": 8, "image_size": image_size, **vision},
    )
    images = tf.MiniCPMV4_6ImageProcessorPil(
        scale_resolution=image_size,
        patch_size=config.vision_config.patch_size,
        slice_mode=False,
    )
    return config, without_video_processor(tf.MiniCPMV4_6Processor)(
        image_processor=images,
        tokenizer=tok,
        chat_template=template.replace("IMAGE", named["image_token"]),
    )
