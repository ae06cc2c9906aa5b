"""Llama 4. Its image processor needs torchvision."""

from __future__ import annotations

from typing import Any

import transformers as tf

from vlmdpo.tiny.families.common import VISION_SIZES, ConfigAndProcessor, text_sizes
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids


def llama4(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, *, template: str = TEMPLATE
) -> ConfigAndProcessor:
    """Llama 4: experts in every layer, and local attention in chunks."""
    names = ("<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>")
    tiles = ("<|tile_x_separator|>", "<|tile_y_separator|>")
    tok = make_tokenizer(*names, *tiles, image_token="<|image|>")
    start, end, _, patch_token = token_ids(tok, *names)
    vision = {
        **VISION_SIZES,
        "patch_size": 8,
        "image_size": image_size,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
        **vision,
    }
    vision["intermediate_size"] = 4 * vision["hidden_size"]  # what its pixel shuffle makes
    config = tf.Llama4Config(
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=patch_token,
        tie_word_embeddings=False,
        text_config={
            **text_sizes(tok),
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 24,
            "no_rope_layers": [1, 0],
            **text,
        },
        vision_config=vision,
    )
    images = tf.Llama4ImageProcessor(
        size={"height": image_size, "width": image_size}, max_patches=1
    )
    return config, tf.Llama4Processor(
        images,
        tok,
        patch_size=vision["patch_size"],
        pixel_shuffle_ratio=vision["pixel_shuffle_ratio"],
        chat_template=template.replace("IMAGE", "<|image|>"),
    )
