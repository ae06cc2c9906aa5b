"""Idefics2, Idefics3, SmolVLM."""

from __future__ import annotations

from typing import Any

import transformers as tf

from vlmdpo.tiny.families.common import VISION_SIZES, ConfigAndProcessor, text_sizes
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids


def idefics2(
    text: dict[str, Any],
    vision: dict[str, Any],
    image_size: int,
    *,
    template: str = TEMPLATE,
    **more: Any,
) -> ConfigAndProcessor:
    tok = make_tokenizer(
        "<fake_token_around_image>",
        "<image>",
        "<end_of_utterance>",
        image_token="<image>",
        image_boundary_token="<fake_token_around_image>",
    )
    latents = more.get("latents", 4)
    text_config = {**text_sizes(tok, model_type="mistral", sliding_window=None), **text}
    heads = {"resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 2}
    perceiver = {
        "resampler_n_latents": latents,
        "resampler_depth": 2,
        **heads,
        **more.get("perceiver", {}),
    }
    config = tf.Idefics2Config(
        image_token_id=token_ids(tok, "<image>")[0],
        tie_word_embeddings=False,
        text_config=text_config,
        vision_config={**VISION_SIZES, "patch_size": 8, "image_size": image_size, **vision},
        perceiver_config={**perceiver, "hidden_size": text_config["hidden_size"]},
    )
    size = {"shortest_edge": 8, "longest_edge": image_size}
    images = tf.Idefics2ImageProcessorPil(size=size, do_image_splitting=False)
    template = template.replace("IMAGE", "<image>").replace("eos_token", "'<end_of_utterance>'")
    return config, tf.Idefics2Processor(images, tok, image_seq_len=latents, chat_template=template)


def idefics3(
    text: dict[str, Any],
    vision: dict[str, Any],
    image_size: int,
    *,
    template: str = TEMPLATE,
    is_smolvlm: bool = False,
    scale_factor: int = 2,
) -> ConfigAndProcessor:
    rows = [f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)]
    tok = make_tokenizer(
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
        "<end_of_utterance>",
        *rows,
        image_token="<image>",
    )
    # SmolVLM's own processor needs num2words, for videos; Idefics3's makes the same of images.
    config = (tf.SmolVLMConfig if is_smolvlm else tf.Idefics3Config)(
        image_token_id=token_ids(tok, "<image>")[0],
        tie_word_embeddings=False,
        scale_factor=scale_factor,
        text_config={**text_sizes(tok, model_type="llama"), **text},
        vision_config={**VISION_SIZES, "patch_size": 8, "image_size": image_size, **vision},
    )
    sizes: dict[str, Any] = {
        "size": {"longest_edge": 2 * image_size},
        "max_image_size": {"longest_edge": image_size},
    }
    images = tf.Idefics3ImageProcessorPil(**sizes, do_image_splitting=False)
    tokens = (image_size // vision.get("patch_size", 8) // scale_factor) ** 2
    template = template.replace("IMAGE", "<image>")
    return config, tf.Idefics3Processor(
        images, tokenizer=tok, image_seq_len=tokens, chat_template=template
    )
