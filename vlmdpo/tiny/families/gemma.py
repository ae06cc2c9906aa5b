"""PaliGemma, PaliGemma 2, Gemma 3, Gemma 4."""

from __future__ import annotations

from typing import Any

import transformers as tf

from vlmdpo.models.processor_parts import without_video_processor
from vlmdpo.tiny.families.common import VISION_SIZES, ConfigAndProcessor, text_sizes
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids


def paligemma(
    text: dict[str, Any],
    vision: dict[str, Any],
    image_size: int,
    *,
    template: str | None = None,
    projection_dim: int = 32,
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
    template = template and template.replace("IMAGE", "<image>")
    return config, tf.PaliGemmaProcessor(images, tok, chat_template=template)


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
    template: str = TEMPLATE,
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
    template = template.replace("IMAGE", "<start>")
    return config, tf.Gemma3Processor(images, tok, image_seq_length=tokens, chat_template=template)


def gemma4(
    text: dict[str, Any],
    vision: dict[str, Any],
    image_size: int,
    *,
    template: str = TEMPLATE,
    is_moe: bool = False,
) -> ConfigAndProcessor:
    """Gemma 4: small ones have embeddings for every layer and hear, the MoE has neither.

    All see a picture's tokens in both directions, and share keys and values between layers.
    """
    names = ("<|image|>", "<|image>", "<image|>", "<|audio|>", "<|audio>", "<audio|>", "<|video|>")
    attributes = ("image_token", "boi_token", "eoi_token", "audio_token", "boa_token", "eoa_token")
    tok = make_tokenizer(*names, **dict(zip(attributes, names, strict=False)))
    image, boi, eoi, audio, boa, eoa, video = token_ids(tok, *names)
    layers: dict[str, Any] = {
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 16,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0 if is_moe else 8,
        "vocab_size_per_layer_input": len(tok),
    }
    if is_moe:
        layers |= {
            "use_bidirectional_attention": "vision",
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        }
    else:
        layers |= {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
        }
    patch, pool = vision.get("patch_size", 8), vision.get("pooling_kernel_size", 2)
    config = tf.Gemma4Config(
        image_token_id=image,
        boi_token_id=boi,
        eoi_token_id=eoi,
        audio_token_id=audio,
        boa_token_id=boa,
        eoa_token_index=eoa,
        video_token_id=video,
        text_config={**text_sizes(tok), **layers, **text},
        vision_config={
            **VISION_SIZES,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "patch_size": patch,
            "pooling_kernel_size": pool,
            "position_embedding_size": 128,
            "use_clipped_linears": not is_moe,
            **vision,
        },
        audio_config=None if is_moe else _GEMMA4_AUDIO,
    )
    images = tf.Gemma4ImageProcessorPil(
        patch_size=patch, pooling_kernel_size=pool, max_soft_tokens=70
    )
    processor = without_video_processor(tf.Gemma4Processor)
    return config, processor(
        feature_extractor=tf.Gemma4AudioFeatureExtractor(),
        image_processor=images,
        tokenizer=tok,
        video_processor=None,  # its constructor wants one
        image_seq_length=70,
        chat_template=template.replace("IMAGE", "<|image|>"),
    )


_GEMMA4_AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "subsampling_conv_channels": [8, 4],
    "output_proj_dims": 32,
}
