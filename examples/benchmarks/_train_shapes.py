"""The shapes that `train_step.py` measures: small models in the proportions of real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from vlmdpo.config import TrainConfig
from vlmdpo.data.pairs import Message, message
from vlmdpo.data.store import pair_features
from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.tiny import random_models
from vlmdpo.training import activation_checkpointing
from vlmdpo.training.arguments import dpo_config, lora_config
from vlmdpo.training.make_trainer import make_trainer
from vlmdpo.training.trainer import PairTrainer

Rows = tuple[tuple[int, int, int], ...]
ONE_PAIR: Rows = ((0, 0, 1),)
TWO_PAIRS: Rows = ((0, 0, 1), (0, 2, 3))  # as RLAIF-V has
FIVE_PAIRS: Rows = ((0, 0, 1), (0, 0, 2), (0, 1, 3), (0, 2, 3), (0, 0, 3))  # as VLFeedback has
QUESTIONS: Rows = ((0, 0, 1), (1, 2, 3), (2, 4, 5))
_OWN_LETTERS = 8  # of a question, behind what all prompts about an image begin with


@dataclass(frozen=True)
class Shape:
    """One family at one size: the toy model, the image in pixels, token counts, and the targets.

    Attributes:
        groups: for each image its rows, (question, chosen, rejected) as numbers: equal ones are the
            same text.
        real_vision_share: the real model's vision and connector FLOPs over its language model's, by
            the tokens of a stock row.
        wanted: required ratios over 1 and 3 epochs; None: only 95% of the counted ones.
        wanted_peak: the largest allowed share of stock TRL's peak memory.
    """

    name: str
    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    image_size: int
    image: tuple[int, int]
    prompt: int
    real_vision_share: Callable[[float], float]
    wanted: tuple[float, float] | None
    wanted_at_equal_memory: float | None = None
    wanted_peak: float = 1.0
    answers: tuple[int, int] = (80, 80)
    more: dict[str, Any] = field(default_factory=dict)
    groups: tuple[Rows, ...] = (ONE_PAIR, ONE_PAIR)
    at_equal_memory: bool = True

    @property
    def pairs(self) -> int:
        return sum(map(len, self.groups))


def _share(
    patches: int, tower: float, layers: int, width: int, lm: float, extra: float = 0.0
) -> Callable[[float], float]:
    """Vision over language FLOPs of one row, by its tokens.

    2 × parameters × tokens, and 4 × tokens² × width × layers for attention.
    """
    vision = 2 * tower * patches + 4 * patches**2 * width * layers + extra
    return lambda tokens: vision / (2 * lm * tokens + 4 * tokens**2 * 4096 * 32)


_CPU = torch.device("cpu")
_LM = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.05,
}
_GQA = {**_LM, "num_key_value_heads": 1}
# Wider and less deep: otherwise attention would take a far larger share at 600 tokens than it does
# at 4,096 dimensions.
_WIDE = {
    **_LM,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


def _tower(width: int, layers: int, inner: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": 2,
    }


IDEFICS2 = Shape(
    name="Idefics2-8B, 640×480",
    family="idefics2",
    text={
        **_GQA,
        "num_hidden_layers": 16,
    },  # deep, so that the connector's share is as small as in the real model
    vision=_tower(72, 3, 200),
    image_size=368,
    image=(368, 272),
    prompt=94,
    real_vision_share=_share(1530, 0.413e9, 27, 1152, 6.98e9, extra=2 * 0.092e9 * 1530 + 1.1e11),
    wanted=(2.1, 2.4),
    wanted_at_equal_memory=3.0,
    more={"latents": 64, "perceiver": {"resampler_head_dim": 32}},
    groups=(ONE_PAIR,) * 8,
)
LLAVA = Shape(
    name="LLaVA-1.5-7B, 600-token prompt",
    family="llava",
    text=_WIDE,
    vision=_tower(112, 3, 256),
    image_size=192,
    image=(192, 192),
    prompt=600,
    real_vision_share=_share(577, 0.303e9, 24, 1024, 6.48e9),
    wanted=(1.75, 2.1),
    wanted_at_equal_memory=2.5,
    wanted_peak=0.65,
)
QWEN = Shape(
    name="Qwen2.5-VL-7B, 1 megapixel",
    family="qwen2_5_vl",
    text=_GQA,
    vision={
        "hidden_size": 80,
        "depth": 3,
        "intermediate_size": 384,
        "num_heads": 2,
        "fullatt_block_indexes": [2],
    },
    image_size=576,
    image=(576, 576),
    prompt=1330,
    real_vision_share=_share(5180, 0.632e9, 4, 1280, 6.53e9, extra=2 * 0.045e9 * 1295),
    wanted=(2.2, 2.6),
    wanted_at_equal_memory=3.0,
    groups=(ONE_PAIR,),
)
MIXED = (20, 250)
SHAPES = (
    IDEFICS2,
    LLAVA,
    QWEN,
    replace(
        IDEFICS2,
        name="Idefics2-8B, answers of 20–250",
        answers=MIXED,
        wanted=(2.0, 2.4),
        wanted_at_equal_memory=None,
    ),
    replace(
        LLAVA,
        name="LLaVA-1.5-7B, answers of 20–250",
        answers=MIXED,
        wanted=None,
        wanted_at_equal_memory=None,
        wanted_peak=1.0,
        groups=(ONE_PAIR,) * 4,
    ),
    *(
        replace(
            shape,
            name=f"{shape.name.split(',')[0]}, {what}",
            groups=groups,
            wanted=wanted,
            wanted_at_equal_memory=None,
            at_equal_memory=False,
            wanted_peak=peak,
        )
        for shape, what, groups, wanted, peak in (
            (LLAVA, "two pairs a prompt", (TWO_PAIRS,), (2.7, 0), 1.0),
            # Several images a step, as above: 414 tokens are too few to keep two cores busy.
            (IDEFICS2, "two pairs a prompt", (TWO_PAIRS,) * 4, (3.6, 0), 1.0),
            (QWEN, "two pairs a prompt", (TWO_PAIRS,), (4.0, 0), 1.0),
            (LLAVA, "four answers in five pairs", (FIVE_PAIRS,), (6.0, 0), 0.35),
            (IDEFICS2, "four answers in five pairs", (FIVE_PAIRS,) * 3, (8.0, 0), 1.0),
            (QWEN, "four answers in five pairs", (FIVE_PAIRS,), (9.0, 0), 1.0),
            (LLAVA, "three questions an image", (QUESTIONS,), (0, 0), 1.0),
            (IDEFICS2, "three questions an image", (QUESTIONS,) * 3, (0, 0), 1.0),
            (QWEN, "three questions an image", (QUESTIONS,), (0, 0), 1.0),
        )
    ),
)
QUICK = tuple(
    shape
    for shape in SHAPES
    if shape.name in ("LLaVA-1.5-7B, 600-token prompt", "LLaVA-1.5-7B, four answers in five pairs")
    or shape.name == "Idefics2-8B, two pairs a prompt"
)


def rows_of(shape: Shape, prompt_letters: int) -> Dataset:
    """Random images and letters; a letter is a token."""
    rng = np.random.default_rng(0)
    shortest, longest = shape.answers

    def letters(count: int) -> str:
        return "".join(rng.choice(list("abcdefgh"), size=count))

    def answer() -> list[Message]:
        # The chat template closes an answer with two more tokens.
        return [message("assistant", letters(int(rng.integers(shortest, longest + 1)) - 2))]

    rows = []
    for group in shape.groups:
        pixels = rng.integers(0, 255, (shape.image[1], shape.image[0], 3), dtype=np.uint8)
        own = min(_OWN_LETTERS, prompt_letters)
        common = letters(prompt_letters - own)
        questions = {number: letters(own) for number, _, _ in group}
        answers = {number: answer() for _, *pair in group for number in pair}
        rows += [
            {
                "images": [Image.fromarray(pixels)],
                "prompt": [message("user", common + questions[question], 1)],
                "chosen": answers[chosen],
                "rejected": answers[rejected],
            }
            for question, chosen, rejected in group
        ]
    return Dataset.from_list(rows, features=pair_features())


def trainer_of(
    shape: Shape, rows: Dataset, engine: str, folder: Path, *, cached: bool = False
) -> PairTrainer:
    """Stock TRL's trainer or ours on the same toy model, with an adapter that is not zero."""
    model, processor = random_models.make(
        shape.family,
        text=shape.text,
        vision=shape.vision,
        image_size=shape.image_size,
        **shape.more,
    )
    settings = TrainConfig(
        engine=engine, lora_scope="language", per_device_train_batch_size=shape.pairs, device="cpu"
    )
    args = dpo_config(settings, folder, torch.device("cpu"))
    cache = ReferenceCache(folder, f"{engine}-{shape.pairs}") if cached else None
    trainer = make_trainer(
        engine=engine,
        model=model,
        reference_model=None,
        processor=processor,
        train_dataset=rows,
        args=args,
        lora_config=lora_config(settings, model),
        reference_cache=cache,
    )
    activation_checkpointing.enable(trainer.model)
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    trainer.model.train()
    return trainer
