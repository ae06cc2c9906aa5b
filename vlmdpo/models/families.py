"""What differs between model families, and nothing else: today, how far their processors let an image grow."""

from __future__ import annotations

import math
from typing import Any


def image_side_limit(processor: Any) -> tuple[int | None, bool]:
    """The longest image side, in pixels, that a processor passes on, and whether smaller images stay smaller.

    The limit has another name in every family. Idefics2/3 and SmolVLM: `longest_edge`, and smaller images stay as
    they are, so bounding them saves work. Qwen2-VL and its successors: `longest_edge` is an *area* in pixels, likewise
    an upper bound. CLIP (LLaVA) and SigLIP (PaliGemma, Gemma 3): one fixed size that every image is scaled to.
    (None, True) where the processor names no limit.
    """
    image_processor = processor.image_processor
    size = dict(getattr(image_processor, "size", None) or {})
    longest = size.get("longest_edge")
    if longest and "Qwen" in type(image_processor).__name__:
        return math.isqrt(int(longest)), True
    if longest:
        return int(longest), True
    if size.get("height") and size.get("width"):
        return max(int(size["height"]), int(size["width"])), False
    if size.get("shortest_edge"):
        return int(size["shortest_edge"]), False
    return None, True


def default_image_side(processor: Any) -> int | None:
    """The bound that `prepare` puts on images: half the limit, as in the article, where smaller images stay smaller.

    Where every image is scaled to one size anyway, halving it would only blur: there the bound is the size itself.
    """
    limit, upper_bound = image_side_limit(processor)
    if limit is None:
        return None
    return max(1, limit // 2) if upper_bound else limit
