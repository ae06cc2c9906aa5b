"""Reducing a large picture to the limit takes nothing from what a model is given of it."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as FAMILIES,
)

from vlmdpo.models.image_limits import default_image_side, image_side_limit

SIDE = 4000
# Reducing twice is not reducing once: this much of what is left varies, whatever the filter.
TOLERANCE = 0.25


def _classes():
    """The image processors of all families that take images and write text, by class."""
    return sorted(
        {
            by_backend.get("pil") or by_backend["torchvision"]
            for family, by_backend in IMAGE_PROCESSOR_MAPPING_NAMES.items()
            if family in FAMILIES
        }
    )


@functools.cache
def _picture(width, height):
    """Noise at every scale, so that each reduced size still has detail."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3), np.float32)
    for cell in (4, 8, 16, 32, 64, 128):
        cells = rng.integers(0, 256, (height // cell + 1, width // cell + 1, 3), dtype=np.uint8)
        large = Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR)
        total += np.asarray(large, np.float32)
    total = (total - total.mean()) / total.std()
    return Image.fromarray((128 + 50 * total).clip(0, 255).astype(np.uint8))


def _reduced(picture, side):
    copy = picture.copy()
    if side is not None:
        copy.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=None)
    return copy


def _numbers(value):
    """Every array that a processor made, flat."""
    if hasattr(value, "keys"):
        return [array for name in value.keys() for array in _numbers(value[name])]
    if isinstance(value, (list, tuple)):
        return [array for part in value for array in _numbers(part)]
    return [np.asarray(value, np.float32)]


def _difference(image_processor, picture, side):
    """How much of the variation of what the model is given changes; None for other shapes."""
    whole, reduced = (
        _numbers(image_processor.preprocess(images=[image]))
        for image in (picture, _reduced(picture, side))
    )
    if [array.shape for array in whole] != [array.shape for array in reduced]:
        return None
    largest = max(range(len(whole)), key=lambda i: whole[i].size)
    changed = np.sqrt(np.mean((whole[largest] - reduced[largest]) ** 2))
    return float(changed / whole[largest].std())
