"""DeepSeek-VL, and Kimi K2.5, whose language model is DeepSeek's."""

from __future__ import annotations

from typing import Any

import transformers as tf

from vlmdpo.models.processor_parts import without_video_processor
from vlmdpo.tiny.families.common import VISION_SIZES, ConfigAndProcessor, text_sizes
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids


def deepseek_vl(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, *, template: str = TEMPLATE
) -> ConfigAndProcessor:
    """DeepSeek-VL."""
    tok = make_tokenizer("<image_placeholder>", image_token="<image_placeholder>")
    vision = {
        **VISION_SIZES,
        "model_type": "siglip_vision_model",
        "patch_size": 8,
        "image_size": image_size,
        "vision_use_head": False,
        **vision,
    }
    config = tf.DeepseekVLConfig(
        image_token_id=token_ids(tok, "<image_placeholder>")[0],
        tie_word_embeddings=False,
        text_config={**text_sizes(tok, model_type="llama"), **text},
        vision_config=vision,
    )
    images = tf.DeepseekVLImageProcessorPil(size={"height": image_size, "width": image_size})
    return config, tf.DeepseekVLProcessor(
        images,
        tok,
        num_image_tokens=(image_size // vision["patch_size"]) ** 2,
        chat_template=template.replace("IMAGE", "<image_placeholder>"),
    )


def kimi_k25(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, *, template: str = TEMPLATE
) -> ConfigAndProcessor:
    """Kimi K2.5. Its image processor needs torchvision."""
    names = ("<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>")
    video = "<|kimi_k25_video_placeholder|>"
    tok = make_tokenizer(*names, video, image_token="<|media_pad|>", video_token=video)
    start, _, end, image, video_id = token_ids(tok, *names, video)
    experts = {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
    }
    config = tf.Kimi_K25Config(
        image_token_id=image,
        video_token_id=video_id,
        vision_start_token_id=start,
        vision_end_token_id=end,
        projection_hidden_size=32,
        tie_word_embeddings=False,
        text_config={**text_sizes(tok, model_type="deepseek_v3"), **experts, **text},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 8,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            **vision,
        },
    )
    images = tf.Kimi_K25ImageProcessor(
        size={"max_height": image_size, "max_width": image_size},
        max_patches=64,
        patch_size=config.vision_config.patch_size,
        merge_size=2,
    )
    shown = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
    return config, without_video_processor(tf.Kimi_K25Processor)(
        image_processor=images, tokenizer=tok, chat_template=template.replace("IMAGE", shown)
    )
