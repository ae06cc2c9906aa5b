"""Names of what a batch holds, by content: the same pictures, prompt and answer have the same name
in every row, dataset, slice and order.

Collators make them, in their workers. Both caches look up by them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, TypedDict

from PIL import Image

from vlmdpo.data.pairs import SIDES, text_of

NO_IMAGE = ""
NO_ANSWER = ""  # the key of a row of the loss without an answer, whose log-prob is 0


class ContentKeys(TypedDict):
    """What a batch's examples hold, for the host only.

    Attributes:
        image_keys: of each example that is processed; see `image_key`.
        answer_keys: of each row of TRL's loss, chosen ones first; see `answer_key`.
    """

    image_keys: list[str]
    answer_keys: list[str]


def image_key(images: Sequence[Image.Image]) -> str:
    """The name of these images together, in this order: a hash of mode, size and pixels.

    32 hexadecimal digits; "" for no image.
    """
    if not images:
        return NO_IMAGE
    digest = _digest()
    for image in images:
        # Pixels of a palette say nothing without it, and a transparent colour stands beside them.
        needs_more = image.palette is not None or "transparency" in image.info
        plain = image.convert("RGBA") if needs_more else image
        digest.update(f"{image.mode} {plain.mode} {plain.size};".encode())
        digest.update(plain.tobytes())
    return digest.hexdigest()


def answer_key(image_key: str, prompt: Any, answer: str) -> str:
    """The name of an answer to this prompt about these images, 32 hexadecimal digits.

    Args:
        prompt: messages, or text.
    """
    return _digest(json.dumps([image_key, prompt, answer], sort_keys=True)).hexdigest()


def content_keys(examples: Sequence[dict[str, Any]]) -> ContentKeys:
    """The keys of B examples {images, prompt, chosen, rejected}: B of images, 2B of answers."""
    images = [image_key(example.get("images") or []) for example in examples]
    answers = [
        answer_key(of_images, example["prompt"], _text(example[side]))
        for side in SIDES
        for of_images, example in zip(images, examples, strict=True)
    ]
    return {"image_keys": images, "answer_keys": answers}


def pair_keys(answer_keys: Sequence[str]) -> list[str]:
    """Keys of answers in their pairs, for log-probs that depend on the other answer too.

    Args:
        answer_keys: of chosen answers, then of as many rejected ones.
    """
    half = len(answer_keys) // 2
    others = [*answer_keys[half:], *answer_keys[:half]]
    return [
        _digest(f"{own}/{other}").hexdigest() if own != NO_ANSWER else NO_ANSWER
        for own, other in zip(answer_keys, others, strict=True)
    ]


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else text_of(answer[0])


def _digest(text: str = "") -> hashlib.blake2b:
    return hashlib.blake2b(text.encode(), digest_size=16)
