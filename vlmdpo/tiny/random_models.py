"""Small models of every supported family, with random weights and real processors.

For tests, benchmarks and memory estimates: the architectures are transformers' own, only narrow and
shallow. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

from vlmdpo.models.families import without_video_processor
from vlmdpo.models.protocols import Processor, VisionLanguageModel
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids

ConfigAndProcessor = tuple[tf.PreTrainedConfig, tf.ProcessorMixin]

_TEXT_SIZES = {
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
    return {**_TEXT_SIZES, "vocab_size": len(tok), **_special_token_ids(tok), **more}


def _idefics2(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, **more: Any
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
    template = TEMPLATE.replace("IMAGE", "<image>").replace("eos_token", "'<end_of_utterance>'")
    return config, tf.Idefics2Processor(images, tok, image_seq_len=latents, chat_template=template)


def _idefics3(
    text: dict[str, Any],
    vision: dict[str, Any],
    image_size: int,
    *,
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
    template = TEMPLATE.replace("IMAGE", "<image>")
    return config, tf.Idefics3Processor(
        images, tokenizer=tok, image_seq_len=tokens, chat_template=template
    )


def _llava(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, *, is_next: bool = False
) -> ConfigAndProcessor:
    tok = make_tokenizer("<image>", image_token="<image>")
    shared: dict[str, Any] = {
        "image_token_id": token_ids(tok, "<image>")[0],
        "image_token_index": token_ids(tok, "<image>")[0],
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {**text_sizes(tok, model_type="llama"), **text},
        "vision_config": {
            **VISION_SIZES,
            "model_type": "clip_vision_model",
            "patch_size": 8,
            "image_size": image_size,
            "projection_dim": 32,
            **vision,
        },
    }
    patch = shared["vision_config"]["patch_size"]
    processor_options = {
        "patch_size": patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    template = TEMPLATE.replace("IMAGE", "<image>")
    sizes = {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }
    if not is_next:
        images = tf.CLIPImageProcessorPil(**sizes)
        return tf.LlavaConfig(**shared), tf.LlavaProcessor(
            images, tok, chat_template=template, **processor_options
        )
    pinpoints = [
        [image_size, 2 * image_size],
        [2 * image_size, image_size],
        [2 * image_size, 2 * image_size],
    ]
    images = tf.LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=pinpoints)
    config = tf.LlavaNextConfig(**shared, image_grid_pinpoints=pinpoints)
    return config, tf.LlavaNextProcessor(images, tok, chat_template=template, **processor_options)


def _paligemma(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, *, projection_dim: int = 32
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
    return config, tf.PaliGemmaProcessor(images, tok)


def _paligemma2(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, **more: Any
) -> ConfigAndProcessor:
    """PaliGemma on Gemma 2: every other layer has a sliding window, and logits are capped."""
    layers = {
        "sliding_window": 24,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return _paligemma({"model_type": "gemma2", **layers, **text}, vision, image_size, **more)


def _internvl(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, *, tiles: int = 1
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
    template = TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\\n")
    return config, without_video_processor(tf.InternVLProcessor)(
        images, tok, image_seq_length=tokens, chat_template=template
    )


def _gemma3(
    text: dict[str, Any],
    vision: dict[str, Any],
    image_size: int,
    *,
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
    template = TEMPLATE.replace("IMAGE", "<start>")
    return config, tf.Gemma3Processor(images, tok, image_seq_length=tokens, chat_template=template)


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
    if version == "3":
        vision |= {"deepstack_visual_indexes": [0, 1]}
    return vision


def _qwen_text(version: str, head_dim: int) -> dict[str, Any]:
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
    if version == "3.5":
        rope |= {"partial_rotary_factor": 1.0}
        text |= {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        }
    return text


def _qwen(
    text: dict[str, Any], vision: dict[str, Any], image_size: int, *, version: str
) -> ConfigAndProcessor:
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tok = make_tokenizer(*names, image_token="<|image_pad|>", video_token="<|video_pad|>")
    start, end, image, video = token_ids(tok, *names)
    head_dim = text.get("head_dim", _TEXT_SIZES["head_dim"])
    text = {**text_sizes(tok), **_qwen_text(version, head_dim), **text}
    config_class, processor_class = {
        "2": (tf.Qwen2VLConfig, tf.Qwen2VLProcessor),
        "2.5": (tf.Qwen2_5_VLConfig, tf.Qwen2_5_VLProcessor),
        "3": (tf.Qwen3VLConfig, tf.Qwen3VLProcessor),
        "3.5": (tf.Qwen3_5Config, tf.Qwen3VLProcessor),
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
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = without_video_processor(processor_class)(images, tok, chat_template=template)
    return config, processor


FAMILIES: dict[str, Callable[..., ConfigAndProcessor]] = {
    "idefics2": _idefics2,
    "idefics3": _idefics3,
    "smolvlm": lambda *a, **k: _idefics3(*a, is_smolvlm=True, **k),
    "llava": _llava,
    "llava_next": lambda *a, **k: _llava(*a, is_next=True, **k),
    "paligemma": _paligemma,
    "paligemma2": _paligemma2,
    "gemma3": _gemma3,
    "internvl": _internvl,
    "qwen2_vl": lambda *a, **k: _qwen(*a, version="2", **k),
    "qwen2_5_vl": lambda *a, **k: _qwen(*a, version="2.5", **k),
    "qwen3_vl": lambda *a, **k: _qwen(*a, version="3", **k),
    "qwen3_5": lambda *a, **k: _qwen(*a, version="3.5", **k),
}
RECURRENT = ("qwen3_5",)  # families whose layers carry state from token to token


def make(
    family: str,
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    image_size: int = 32,
    seed: int = 0,
    **options: Any,
) -> tuple[VisionLanguageModel, Processor]:
    """A (model, processor) of one of FAMILIES, float32, random weights.

    Args:
        text, vision: settings of the two configurations that differ.
        image_size: the processor's limit for a side, in pixels.
        options: of the family's function above.
    """
    config, processor = FAMILIES[family](text or {}, vision or {}, image_size, **options)
    torch.manual_seed(seed)
    model = tf.AutoModelForImageTextToText.from_config(config)
    model.config.pad_token_id = processor.tokenizer.pad_token_id
    for name, parameter in model.named_parameters():
        # Gemma 3 initializes it to zero, so that the image would have no effect.
        if name.endswith("mm_input_projection_weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model, processor
