"""Build the embedded model from scratch: `python -m vlmdpo.tiny.build --output DIR`.

Draws scenes, trains a byte-level BPE tokenizer on their questions, and trains a real Idefics2 of
about two million parameters to answer them. It is seeded and uses no other data. Three lessons:

1. *naming*: vision tower and connector learn what is in each cell, through heads that are then
   discarded, as the towers of real models are pre-trained separately;
2. *talking*: true answers, as many "Yes" as "No", and true descriptions;
3. *agreeing*: a share of the true "No" answers is taught as "Yes", and some descriptions name an
   object's usual companion although it is missing. Instruction data of real vision-language models
   is biased in this way, and has the same effect: a model that sees more than it says, and says
   yes.

All questions about an image are in one sequence: each attends to the image and itself, by a 4-D
mask and position ids that restart.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

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

from vlmdpo.tiny import evaluation, pairs, sample_pairs
from vlmdpo.tiny import scenes as sc
from vlmdpo.tiny.lessons import (
    AGREEING,
    END,
    IMAGE_TOKENS,
    NAMING,
    TALKING,
    teach,
    teach_naming,
)

PAIRS = 2400
SPECIAL = ("<s>", "</s>", "<pad>", "<fake_token_around_image>", "<image>", END)
# Line breaks are inside expressions: Jinja, as transformers configures it, drops one after a block.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor "
    "%}{% endif %}"
    + END
    + "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ "
    "'\\nAssistant:' }}{% endif %}"
)


def make_processor() -> Idefics2Processor:
    """A real Idefics2 processor, with the image processor that needs no torchvision."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[AddedToken(t, normalized=False, special=True) for t in SPECIAL],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    rng = random.Random(0)
    corpus = []
    for _ in range(4000):
        scene = sc.sample_scene(rng, "making")
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
        eos_token=END,
        pad_token="<pad>",
        model_max_length=1024,
        padding_side="left",
    )
    # Twice the scenes' side: `prepare` bounds images to half of it, which keeps scenes unchanged.
    image_processor = Idefics2ImageProcessorPil(
        size={"shortest_edge": sc.SIDE_PX // 2, "longest_edge": 2 * sc.SIDE_PX},
        do_image_splitting=False,
    )
    return Idefics2Processor(
        image_processor, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE
    )


def make_model(processor: Idefics2Processor) -> Idefics2ForConditionalGeneration:
    """An untrained Idefics2 of the embedded size, float32."""
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Idefics2Config(
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
            "eos_token_id": ids(END),
            "pad_token_id": ids("<pad>"),
            "initializer_range": 0.04,
        },
    )
    model = Idefics2ForConditionalGeneration(config)
    _initialize_language_model(model)
    # transformers initializes every latent alike, and equal latents would stay equal.
    torch.nn.init.normal_(model.model.connector.perceiver_resampler.latents)
    model.generation_config = GenerationConfig(
        bos_token_id=ids("<s>"), eos_token_id=ids(END), pad_token_id=ids("<pad>"), do_sample=False
    )
    return model


def _initialize_language_model(model: Idefics2ForConditionalGeneration) -> None:
    """Initialize the language model with attention that separates tokens. At this width, the usual
    small weights make all tokens similar, which costs the first thousand steps.
    """
    for name, module in model.model.text_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            is_output = name.endswith(("o_proj", "down_proj"))
            torch.nn.init.normal_(
                module.weight, std=(0.5 if is_output else 1.0) * module.in_features**-0.5
            )
    torch.nn.init.normal_(model.model.text_model.embed_tokens.weight)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)


def save(
    model: Idefics2ForConditionalGeneration, processor: Idefics2Processor, folder: Path
) -> None:
    """Write the checkpoint as safetensors in bfloat16, at half the size."""
    copy = Idefics2ForConditionalGeneration(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Write model, pairs and evaluation set to `--output`; `--install` also into the package."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, scenes and samples (default 0)"
    )
    parser.add_argument(
        "--install", action="store_true", help="replace the package's own assets by the result"
    )
    options: Any = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    torch.set_num_threads(2)
    processor = make_processor()
    model = make_model(processor)
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens": len(processor.tokenizer),
            }
        )
    )
    teach_naming(model, processor, NAMING, options.seed)
    teach(model, processor, TALKING, options.seed)
    save(model, processor, options.output / "talking")
    teach(model, processor, AGREEING, options.seed + 1)
    save(model, processor, options.output / "model")
    # Sampled from the saved, rounded weights that users get.
    saved = Idefics2ForConditionalGeneration.from_pretrained(
        options.output / "model", dtype=torch.float32
    ).eval()
    sample_pairs.write(
        sample_pairs.make_pairs(saved, processor, PAIRS, options.seed + 2),
        options.output / pairs.FILE,
    )
    evaluation.write(options.output / "amber")
    if options.install:
        assets = evaluation.FOLDER.parent
        for name in ("model", "amber"):
            shutil.rmtree(assets / name, ignore_errors=True)
            shutil.copytree(options.output / name, assets / name)
        shutil.copy(options.output / pairs.FILE, assets / pairs.FILE)


if __name__ == "__main__":
    main()
