"""GLM-4.1V and GLM-4.6V."""

from __future__ import annotations

from typing import Any

import transformers as tf

from vlmdpo.models.processor_parts import without_video_processor
from vlmdpo.tiny.families.common import TEXT_SIZES, ConfigAndProcessor, text_sizes
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids


def glm4v(
    text: dict[str, Any],
    vision: dict[str, Any],
    image_size: int,
    *,
    template: str = TEMPLATE,
    is_46: bool = False,
) -> ConfigAndProcessor:
    """GLM-4.1V, or GLM-4.6V, whose language model and vision tower are the same."""
    names = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>")
    video = ("<|begin_of_video|>", "<|end_of_video|>")
    tok = make_tokenizer(*names, *video, image_token="<|image|>", video_token="<|video|>")
    ids = token_ids(tok, *names, *video)
    half = text.get("head_dim", TEXT_SIZES["head_dim"]) // 2
    # As in the published models: half of each head turns, by time, height and width.
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [half // 4, half // 4, half // 2 - 2 * (half // 4)],
    }
    text = {**text_sizes(tok), "rope_parameters": rope, **text}
    config = (tf.Glm46VConfig if is_46 else tf.Glm4vConfig)(
        image_start_token_id=ids[0],
        image_end_token_id=ids[1],
        image_token_id=ids[2],
        video_token_id=ids[3],
        video_start_token_id=ids[4],
        video_end_token_id=ids[5],
        tie_word_embeddings=False,
        text_config=text,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 8,
            "image_size": 32,
            "out_hidden_size": text["hidden_size"],
            "initializer_range": 0.1,
            **vision,
        },
    )
    images = (tf.Glm46VImageProcessorPil if is_46 else tf.Glm4vImageProcessorPil)(
        size={"shortest_edge": 2 * 16 * 16, "longest_edge": 2 * image_size**2},
        patch_size=config.vision_config.patch_size,
        merge_size=2,
    )
    shown = "<|begin_of_image|><|image|><|end_of_image|>"
    processor = without_video_processor(tf.Glm46VProcessor if is_46 else tf.Glm4vProcessor)
    return config, processor(
        image_processor=images, tokenizer=tok, chat_template=template.replace("IMAGE", shown)
    )
