"""The embedded model's processor and architecture: a real Idefics2, only narrow and shallow."""

from __future__ import annotations

import random

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    PreTrainedTokenizerFast,
)

from vlmdpo.tiny import scenes as sc

IMAGE_TOKENS = 16
END_OF_TURN = "<end_of_utterance>"
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<fake_token_around_image>", "<image>", END_OF_TURN)
# Line breaks stand inside expressions: Jinja, as transformers sets it up, drops one that follows a
# block.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor "
    "%}{% endif %}"
    + END_OF_TURN
    + "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ "
    "'\\nAssistant:' }}{% endif %}"
)


def make_processor() -> Idefics2Processor:
    """An Idefics2 processor: PIL images (no torchvision), byte-level BPE, and a chat template.

    The tokenizer is trained on the scenes' questions.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    rng = random.Random(0)
    corpus = []
    for _ in range(4000):
        scene = sc.sample_scene(rng, "train")
        corpus += [f" {q.text}" for group in sc.questions(scene, rng).values() for q in group]
        corpus += [
            " " + sc.describe(sc.truth_claims(scene)),
            "User: " + sc.DESCRIBE,
            "\nAssistant: Yes",
            "Assistant: No",
        ]
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token=END_OF_TURN,
        pad_token="<pad>",
        model_max_length=1024,
        padding_side="left",
    )
    # The longest edge is twice the scenes' side, so that scenes pass untouched when `prepare`
    # bounds images to half of it.
    image_processor = Idefics2ImageProcessorPil(
        size={"shortest_edge": sc.SIDE_PX // 2, "longest_edge": 2 * sc.SIDE_PX},
        do_image_splitting=False,
    )
    return Idefics2Processor(
        image_processor, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE
    )


def _model_config(processor: Idefics2Processor) -> Idefics2Config:
    ids = processor.tokenizer.convert_tokens_to_ids
    return Idefics2Config(
        image_token_id=ids("<image>"),
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "patch_size": sc.SIDE_PX // 3,  # a patch is a cell of the scenes' grid
            "image_size": 2 * sc.SIDE_PX,
            "initializer_range": 0.04,
        },
        perceiver_config={
            "hidden_size": 128,
            "resampler_n_latents": IMAGE_TOKENS,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 32,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
        },
        text_config={
            "model_type": "mistral",
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "sliding_window": None,
            "bos_token_id": ids("<s>"),
            "eos_token_id": ids(END_OF_TURN),
            "pad_token_id": ids("<pad>"),
            "initializer_range": 0.04,
        },
    )


def make_model(processor: Idefics2Processor) -> Idefics2ForConditionalGeneration:
    """An untrained Idefics2 of the embedded size, float32."""
    ids = processor.tokenizer.convert_tokens_to_ids
    model = Idefics2ForConditionalGeneration(_model_config(processor))
    _initialize_language_model(model)
    # transformers initializes all latents to the same value, and with equal gradients they would
    # stay equal.
    torch.nn.init.normal_(model.model.connector.perceiver_resampler.latents)
    model.generation_config = GenerationConfig(
        bos_token_id=ids("<s>"),
        eos_token_id=ids(END_OF_TURN),
        pad_token_id=ids("<pad>"),
        do_sample=False,
    )
    return model


def _initialize_language_model(model: Idefics2ForConditionalGeneration) -> None:
    """Initialize the language model with weights larger than usual.

    At this width the usual small weights make attention uniform over tokens, and the first thousand
    steps go into leaving that state.
    """
    for name, module in model.model.text_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            writes_residual = name.endswith(("o_proj", "down_proj"))
            torch.nn.init.normal_(
                module.weight, std=(0.5 if writes_residual else 1.0) * module.in_features**-0.5
            )
    torch.nn.init.normal_(model.model.text_model.embed_tokens.weight)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
