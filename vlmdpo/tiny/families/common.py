"""Sizes of the small random models, and what all builders of a family share."""

from __future__ import annotations

from typing import Any

import transformers as tf

ConfigAndProcessor = tuple[tf.PreTrainedConfig, tf.ProcessorMixin]

TEXT_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}
VISION_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}


def _special_token_ids(tok: tf.PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "pad_token_id": tok.pad_token_id,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
    }


def text_sizes(tok: tf.PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """The small language model's sizes and token ids, for a text config."""
    return {**TEXT_SIZES, "vocab_size": len(tok), **_special_token_ids(tok), **more}
