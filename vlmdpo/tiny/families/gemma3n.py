"""Gemma 3n. Its vision tower is a convolutional network of timm."""

from __future__ import annotations

from typing import Any

import transformers as tf

from vlmdpo.tiny.families.common import ConfigAndProcessor, text_sizes
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids

_WIDTH = 32  # of the tower's last stage, which reduces each side of a picture by this factor too


def gemma3n(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, *, template: str = TEMPLATE
) -> ConfigAndProcessor:
    """A small ConvNeXt stands for MobileNet-V5; the language model has all of Gemma 3n's parts."""
    names = (
        *("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
        *("<audio_soft_token>", "<start_of_audio>", "<end_of_audio>"),
    )
    attributes = ("image_token", "boi_token", "eoi_token", "audio_token", "boa_token", "eoa_token")
    tok = make_tokenizer(*names, **dict(zip(attributes, names, strict=True)))
    image, boi, eoi, audio, boa, eoa = token_ids(tok, *names)
    side = max(2 * _WIDTH, image_size)
    soft_tokens = (side // _WIDTH) ** 2
    config = tf.Gemma3nConfig(
        image_token_id=image,
        boi_token_id=boi,
        eoi_token_id=eoi,
        audio_token_id=audio,
        boa_token_id=boa,
        eoa_token_id=eoa,
        vision_soft_tokens_per_image=soft_tokens,
        text_config={
            **text_sizes(tok),
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "sliding_window": 24,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": len(tok),
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "final_logit_softcapping": 30.0,
            **text,
        },
        vision_config={
            "architecture": "convnext_atto",
            "hidden_size": _WIDTH,
            "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, _WIDTH]},
            "vocab_size": 8,
            "vocab_offset": len(tok),
            **vision,
        },
        audio_config={
            "hidden_size": 32,
            "conf_num_attention_heads": 4,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": (8, 4),
            "vocab_size": 8,
            "vocab_offset": len(tok) + 8,
        },
    )
    images = tf.SiglipImageProcessorPil(size={"height": side, "width": side}, do_normalize=False)
    return config, tf.Gemma3nProcessor(
        tf.Gemma3nAudioFeatureExtractor(),
        images,
        tok,
        image_seq_length=soft_tokens,
        chat_template=template.replace("IMAGE", "<image_soft_token>"),
    )
