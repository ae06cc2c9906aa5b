"""Reducing a large picture to the limit takes nothing from what a model is given of it."""

import functools
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as FAMILIES,
)
from transformers.utils import is_torchvision_available

from vlmdpo.models.image_limits import (
    default_image_side,
    default_side_of_settings,
    image_side_limit,
)

# Reducing twice is not reducing once: so much of what the model is given may vary with the filter.
# A bound of half the right one changes at least this much, or the number of tiles or patches.
TOLERANCE = 0.13
LARGE_AREA, SMALLER_AREA = 2_000_000, 1_003_520  # pixels; less is processed faster
# Those that only torchvision's backend has; they are tested where it is installed.
NEED_TORCHVISION = {
    *("Cohere2VisionImageProcessor", "Gemma4UnifiedImageProcessor", "Inkling2ImageProcessor"),
    *("InklingImageProcessor", "Kimi_K25ImageProcessor", "Lfm2VlImageProcessor"),
    *("Llama4ImageProcessor", "MiniCPMOcrImageProcessor", "MiniMaxM3VLImageProcessor"),
    *("Molmo2ImageProcessor", "MuseGlimmerImageProcessor", "PI0ImageProcessor"),
    *("NemotronH_Omni_Reasoning_V3ImageProcessor", "PPFormulaNetImageProcessor"),
    *("PerceptionLMImageProcessor", "Step3p7ImageProcessor", "UnlimitedOcrImageProcessor"),
}
WITHOUT_PIL = {"Emu3ImageProcessor", "VideoLlavaImageProcessor"}  # in their names
NOT_COMPARED = {
    "LayoutLMv3ImageProcessorPil": "reads text in images with pytesseract",
    "Kimi_K25ImageProcessor": "rounds up, past its own limit: what it makes is reduced once more",
}
# Settings under which a class works in another way.
OTHER_SETTINGS = (
    ("AriaImageProcessorPil", {"split_image": True}),
    ("GotOcr2ImageProcessorPil", {"crop_to_patches": True}),  # InternVL, Aya Vision
    ("Idefics2ImageProcessorPil", {"do_image_splitting": True}),
    ("Idefics3ImageProcessorPil", {"do_image_splitting": False}),
    ("SmolVLMImageProcessorPil", {"do_image_splitting": False}),
    ("MiniCPMV4_6ImageProcessorPil", {"slice_mode": False}),
)
# Which tiles Ovis 2 chooses for other shapes depends on rounding, at equal resolution.
STRIPS = (
    ("AriaImageProcessorPil", {"split_image": True}),
    ("DeepseekOcr2ImageProcessorPil", {}),
    (
        "Gemma3ImageProcessorPil",
        PAN_AND_SCAN := {
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 64,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
    ),
    ("GotOcr2ImageProcessorPil", {"crop_to_patches": True}),
    ("Idefics3ImageProcessorPil", {}),
    ("LlavaNextImageProcessorPil", {}),
    ("LlavaOnevisionImageProcessorPil", {}),
    ("MiniCPMV4_6ImageProcessorPil", {}),
    ("MllamaImageProcessorPil", {}),
    ("Ovis2ImageProcessorPil", {"crop_to_patches": True}),
)


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
    rng, edge = np.random.default_rng(0), 1000
    total = np.zeros((edge, edge, 3), np.float32)
    for cell in (4, 8, 16, 32, 64, 128):
        cells = rng.integers(0, 256, (edge // cell, edge // cell, 3), dtype=np.uint8)
        large = Image.fromarray(cells).resize((edge, edge), Image.Resampling.BILINEAR)
        total += np.asarray(large, np.float32)
    block = (128 + 50 * (total - total.mean()) / total.std()).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.tile(block, (height // edge, width // edge, 1)))


def _reduced(picture, side):
    scale = side / max(picture.size) if side is not None else 1
    if scale >= 1:
        return picture
    size = [round(edge * scale) for edge in picture.size]
    return picture.resize(size, Image.Resampling.BICUBIC)


def _image_processor(name, settings):
    if name in NEED_TORCHVISION and not is_torchvision_available():
        pytest.skip("needs torchvision; NEED_TORCHVISION lists all that do")
    image_processor = getattr(transformers, name)(**settings)
    size = getattr(image_processor, "size", None)
    if size is not None and (dict(size).get("longest_edge") or 0) > LARGE_AREA:
        smallest = min(size["shortest_edge"], SMALLER_AREA // 4)
        image_processor.size = {"shortest_edge": smallest, "longest_edge": SMALLER_AREA}
    return image_processor


def _processor(image_processor):
    return SimpleNamespace(image_processor=image_processor)


def _numbers(value):
    """Every array that a processor made, flat."""
    if isinstance(value, Mapping):
        return [array for part in value.values() for array in _numbers(part)]
    if isinstance(value, (list, tuple)):
        return [array for part in value for array in _numbers(part)]
    if isinstance(value, torch.Tensor):
        value = value.float()  # numpy has no bfloat16
    return [np.asarray(value, np.float32)]


def _difference(image_processor, picture, side):
    """How much of the variation of what the model is given changes; None for other shapes."""
    smaller = _reduced(picture, side)
    if smaller is picture:
        return 0.0
    whole, reduced = (
        _numbers(image_processor.preprocess(images=[image])) for image in (picture, smaller)
    )
    if [array.shape for array in whole] != [array.shape for array in reduced]:
        return None
    largest = max(range(len(whole)), key=lambda i: whole[i].size)
    changed = np.sqrt(np.mean((whole[largest] - reduced[largest]) ** 2))
    return float(changed / whole[largest].std())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"), [*((name, {}) for name in _classes()), *OTHER_SETTINGS], ids=str
)
def test_reducing_to_the_limit_changes_no_more_than_resampling_does(name, settings):
    if name in NOT_COMPARED:
        pytest.skip(NOT_COMPARED[name])
    image_processor = _image_processor(name, settings)
    limit = image_side_limit(_processor(image_processor))
    # An area's side is that of a square.
    picture = _picture(4000, 4000 if limit.is_upper_bound else 2000)
    difference = _difference(image_processor, picture, limit.side)
    assert difference is not None, "another number of tiles or patches"
    assert difference < TOLERANCE


@pytest.mark.parametrize(("name", "settings"), STRIPS, ids=str)
def test_tiles_show_strips_in_full(name, settings):
    image_processor = _image_processor(name, settings)
    limit = image_side_limit(_processor(image_processor))
    assert not limit.is_upper_bound
    difference = _difference(image_processor, _picture(4000, 1000), limit.side)
    assert difference is not None, "another number of tiles"
    assert difference < TOLERANCE


def test_image_processors_that_need_torchvision_are_known():
    assert {
        name for name in _classes() if not name.endswith("Pil")
    } <= NEED_TORCHVISION | WITHOUT_PIL


class _Cutter:
    """A processor of one fixed size by its settings, which cuts larger images into tiles of it."""

    def __init__(self, most):
        self.size, self.most = {"height": 32, "width": 32}, most

    def preprocess(self, images):
        tiles = min(self.most, images[0].width // 32) ** 2
        return {"pixel_values": [np.zeros((tiles, 3, 32, 32), np.uint8)]}


@pytest.mark.parametrize(
    ("most", "limit"), [(1, (2 * 32, False)), (4, (2 * 128, False)), (10**6, (None, True))]
)
def test_tiles_that_no_setting_tells_of_are_found_by_trying(most, limit):
    assert image_side_limit(_processor(_Cutter(most))) == limit


def test_the_processors_own_settings_come_first():
    """InternVL's and Aya's processors turn tiles on, whatever their image processors say."""
    image_processor = transformers.GotOcr2ImageProcessorPil()
    processor = _processor(image_processor)
    assert default_image_side(processor) == 2 * 384
    processor.images_kwargs = {"crop_to_patches": True, "max_patches": None}
    assert default_image_side(processor) == 6 * 384
    old = _processor(image_processor)
    old.valid_processor_kwargs = SimpleNamespace(
        _defaults={"images_kwargs": {"crop_to_patches": True}}
    )
    assert default_image_side(old) == 6 * 384


def test_images_that_are_not_resized_have_no_limit():
    image_processor = transformers.SiglipImageProcessorPil(do_resize=False)
    assert default_image_side(_processor(image_processor)) is None


# Settings as published, and the line of docs/data.md that tells of them.
PUBLISHED = {
    "Idefics2": {"size": {"longest_edge": 980, "shortest_edge": 378}},
    "Pixtral": {"size": {"longest_edge": 1024}, "patch_size": {"height": 16, "width": 16}},
    "Qwen2-VL, Qwen2.5-VL": {"size": {"longest_edge": 12_845_056}, "merge_size": 2},
    "Qwen3-VL, Qwen3.5": {"size": {"longest_edge": 16_777_216}, "merge_size": 2},
    "LLaVA-1.5": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    "PaliGemma (224)": {"size": {"height": 224, "width": 224}},
    "Gemma 3": {"size": {"height": 896, "width": 896}},
    "Gemma 4": {"max_soft_tokens": 280, "pooling_kernel_size": 3, "patch_size": 16},
    "SmolVLM-256M": {
        "size": {"longest_edge": 2048},
        "max_image_size": {"longest_edge": 512},
        "do_image_splitting": False,
    },
    "LLaVA-NeXT": {
        "size": {"shortest_edge": 336},
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    "InternVL3": {
        "size": {"height": 448, "width": 448},
        "crop_to_patches": True,
        "max_patches": 12,
    },
    "Llama 4": {"size": {"height": 336, "width": 336}, "max_patches": 16},
}


def test_the_documentation_tells_the_bound_of_each_family():
    lines = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8").splitlines()
    told = dict(line.strip("| ").rsplit(" | ", 2)[::2] for line in lines if line.endswith(" px |"))
    computed = {
        family: f"{default_side_of_settings(settings):,} px"
        for family, settings in PUBLISHED.items()
    }
    assert told == computed
