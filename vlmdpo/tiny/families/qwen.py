"""Qwen-VL."""

from __future__ import annotations

from typing import Any

import transformers as tf

from vlmdpo.models.processor_parts import without_video_processor
from vlmdpo.tiny.families.common import TEXT_SIZES, ConfigAndProcessor, text_sizes
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids


def _qwen_vision(version: str, text_width: int) -> dict[str, Any]:
    """The vision configuration of a Qwen-VL of this version."""
    vision: dict[str, Any] = {
        "depth": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_heads": 4,
        "initializer_range": 0.1,
    }
    if version == "2":
        vision |= {"embed_dim": 32, "hidden_size": text_width, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": text_width}
    if version == "2.5":
        vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
    if version.startswith("3"):
        vision |= {"num_position_embeddings": 64}
    if version in ("3", "3-moe"):
        vision |= {"deepstack_visual_indexes": [0, 1]}
    return vision


def text_of_version(version: str, head_dim: int) -> dict[str, Any]:
    """What a Qwen-VL of this version has in its text configuration, besides sizes."""
    half = head_dim // 2
    rope: dict[str, Any] = {
        "mrope_section": [half // 2, half // 4, half // 4],
        "rope_type": "default",
        "rope_theta": 1e6,
    }
    if version.startswith("3"):
        rope |= {"mrope_interleaved": True}
    text: dict[str, Any] = {"rope_parameters": rope, "rope_scaling": rope}
    if version.startswith("3.5"):
        rope |= {"partial_rotary_factor": 1.0}
        text |= {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        }
    if version.endswith("moe"):
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    if version == "3.5-moe":
        text |= {"shared_expert_intermediate_size": 16}
    return text


def qwen(
    text: dict[str, Any],
    vision: dict[str, Any],
    image_size: int,
    *,
    version: str,
    template: str = TEMPLATE,
) -> ConfigAndProcessor:
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tok = make_tokenizer(*names, image_token="<|image_pad|>", video_token="<|video_pad|>")
    start, end, image, video = token_ids(tok, *names)
    head_dim = text.get("head_dim", TEXT_SIZES["head_dim"])
    text = {**text_sizes(tok), **text_of_version(version, head_dim), **text}
    config_class, processor_class = {
        "2": (tf.Qwen2VLConfig, tf.Qwen2VLProcessor),
        "2.5": (tf.Qwen2_5_VLConfig, tf.Qwen2_5_VLProcessor),
        "3": (tf.Qwen3VLConfig, tf.Qwen3VLProcessor),
        "3-moe": (tf.Qwen3VLMoeConfig, tf.Qwen3VLProcessor),
        "3.5": (tf.Qwen3_5Config, tf.Qwen3VLProcessor),
        "3.5-moe": (tf.Qwen3_5MoeConfig, tf.Qwen3VLProcessor),
    }[version]
    config = config_class(
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
        text_config=text,
        vision_config={**_qwen_vision(version, text["hidden_size"]), **vision},
    )
    images = tf.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 16 * 16, "longest_edge": image_size**2},
        patch_size=config.vision_config.patch_size,
        merge_size=2,
    )
    template = template.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = without_video_processor(processor_class)(images, tok, chat_template=template)
    return config, processor
