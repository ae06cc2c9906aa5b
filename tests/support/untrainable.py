"""Small models of two families that TRL cannot train: their inputs by token are not extended."""

import transformers as tf

from vlmdpo.models.processor_parts import without_video_processor
from vlmdpo.tiny.families.common import VISION_SIZES, text_sizes
from vlmdpo.tiny.random_tokenizer import TEMPLATE, make_tokenizer, token_ids


def mllama(text, vision, image_size):
    """Llama 3.2 Vision: cross-attention, with a mask of images for each token."""
    tok = make_tokenizer("<image>", image_token="<image>")
    sizes = {
        **text_sizes(tok, model_type="mllama_text_model", cross_attention_layers=[1]),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        **text,
    }
    seen = {
        **{**VISION_SIZES, "attention_heads": 4, "num_global_layers": 1, "patch_size": 8},
        **{"image_size": image_size, "max_num_tiles": 2, "vision_output_dim": 64},
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        **vision,
    }
    image = token_ids(tok, "<image>")[0]
    config = tf.MllamaConfig(image_token_index=image, text_config=sizes, vision_config=seen)
    images = tf.MllamaImageProcessorPil(
        size={"height": image_size, "width": image_size}, max_image_tiles=2
    )
    template = TEMPLATE.replace("IMAGE", "<image>")
    return config, tf.MllamaProcessor(images, tok, chat_template=template)


def ernie(text, vision, image_size):
    """ERNIE 4.5 VL: experts of text and of images, with a type for each token."""
    names = ("image", "image_start", "image_end", "video", "video_start", "video_end")
    tokens = {f"{name}_token": f"<{name}>" for name in names}
    tok = make_tokenizer(*tokens.values(), **tokens)
    ids = dict(zip(tokens, token_ids(tok, *tokens.values()), strict=True))
    for name, number in ids.items():
        setattr(tok, f"{name}_id", number)
    config = tf.Ernie4_5_VLMoeConfig(
        **{f"{name}_id": number for name, number in ids.items()},
        text_config={
            **text_sizes(tok),
            **{"moe_intermediate_size": [16, 16], "moe_num_experts": 4, "moe_k": 2},
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            },
            **text,
        },
        vision_config={
            **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4},
            **{"patch_size": 8, "initializer_range": 0.1},
            **vision,
        },
    )
    images = tf.Ernie4_5_VLMoeImageProcessorPil(
        size={"shortest_edge": 16 * 16, "longest_edge": image_size**2}, patch_size=8, merge_size=2
    )
    template = TEMPLATE.replace("IMAGE", "<image_start><image><image_end>")
    processor = without_video_processor(tf.Ernie4_5_VLMoeProcessor)
    return config, processor(images, tok, chat_template=template)
