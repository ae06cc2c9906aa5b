"""How large an image a model can use: the default of `--max-image-side`.

Every family of image processors names its limit in its own way. It is recognised here by the
settings themselves, never by a class, so that a new family which works like an older one needs
nothing. Standard library only, as `estimate-memory --fast` asks for registry models too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from vlmdpo.models.protocols import ImageProcessor, Processor

# Where width and height are scaled apart, or the longer side is cropped, the *shorter* side must
# stay as long as the model's. Photographs are at most this much longer than wide.
_LONGEST_PHOTO = 2
# Tiles are made for documents too, and show strips of this shape in full.
_LONGEST_STRIP = 4
_NO_SIDE = 20_000  # a `longest_edge` above this counts pixels of an area
_LARGE = 16_384  # a side above every limit, to ask processors about
_PROBED_UP_TO = 2_048

# (switch that must be on, setting with the largest number of tiles, setting with a tile's side).
# No switch: where the number is set, images are tiled.
_TILINGS: tuple[tuple[str | None, str, str], ...] = (
    ("crop_to_patches", "max_patches", "tile_size"),  # DeepSeek-OCR
    ("crop_to_patches", "max_patches", "size"),  # InternVL, Aya, Cohere 2, Ovis 2, GOT-OCR 2
    ("do_image_splitting", "max_tiles", "tile_size"),  # LFM2-VL
    ("do_pan_and_scan", "pan_and_scan_max_num_crops", "size"),  # Gemma 3
    (None, "max_image_tiles", "size"),  # Llama 3.2 Vision
    ("vision_input_type", "max_num_tiles", "tile_size"),  # Perception LM
    (None, "max_crops", "size"),  # Molmo 2
    (None, "dynamic_hd", "size"),  # Phi-4
    (None, "max_patches", "size"),  # Llama 4
)
# (switch, setting with the list of arrangements, as (height, width) in pixels)
_ARRANGEMENTS = (
    (None, "image_grid_pinpoints"),  # LLaVA-NeXT
    ("split_image", "split_resolutions"),  # Aria
)
_OFF = (None, False, "vanilla")  # the last is Perception LM's word for one tile

Settings = Callable[[str], Any]  # the value of a setting, None where there is none


class ImageLimit(NamedTuple):
    """The largest image of which a model is given all that its processor can pass on.

    Attributes:
        side: length of the longer side in pixels; of a square where the limit is an area. None
            where nothing is limited.
        is_upper_bound: whether smaller images stay smaller, so that bounding them saves work.
    """

    side: int | None
    is_upper_bound: bool


def default_image_side(processor: Processor) -> int | None:
    """The bound, in pixels, that `prepare` puts on an image's longer side; None for no bound."""
    return _default(image_side_limit(processor))


def default_side_of_settings(settings: Mapping[str, Any]) -> int | None:
    """The same for an image processor with these settings, which are all that matter."""
    return _default(_limit(settings.get))


def _default(limit: ImageLimit) -> int | None:
    """Half the limit where smaller images stay smaller, as the article does for Idefics2.

    Where every image is scaled to one size, or cut into tiles, halving would only blur.
    """
    if limit.side is None or not limit.is_upper_bound:
        return limit.side
    return max(1, limit.side // 2)


def image_side_limit(processor: Processor) -> ImageLimit:
    """The limit of a processor, by its settings.

    A claim of one fixed size is tried on blank images: a processor that makes more of larger ones
    cuts them in a way that is not known here, and its limit is found by doubling.
    """
    image_processor, settings = processor.image_processor, _settings(processor)
    patches = _patches_of_large_image(image_processor, settings)
    if patches is not None:
        side = math.isqrt(patches) * settings("patch_size")
        return ImageLimit(side if side < _LARGE else None, True)
    limit = _limit(settings)
    fixed = None if _is_known(settings) else _edges(settings("size"))
    if fixed is None or settings("do_resize") is False:
        return limit
    side = min(fixed)
    while _makes_more_of_larger(image_processor, side):
        side *= 2
        if side > _PROBED_UP_TO:
            return ImageLimit(None, True)
    return limit if side == min(fixed) else ImageLimit(_LONGEST_PHOTO * side, False)


def _settings(processor: Processor) -> Settings:
    """An image processor's settings, with the values that its processor calls it with on top."""
    owner: Any = processor
    values = getattr(owner, "images_kwargs", None)
    if values is None:  # before transformers 5.20
        kinds = getattr(getattr(owner, "valid_processor_kwargs", None), "_defaults", {})
        values = kinds.get("images_kwargs")
    given = {name: value for name, value in dict(values or {}).items() if value is not None}
    return lambda name: given.get(name, getattr(owner.image_processor, name, None))


def _limit(settings: Settings) -> ImageLimit:
    """The limit by settings alone."""
    if settings("do_resize") is False:
        return ImageLimit(None, True)
    tiled = _tiled_side(settings)
    if tiled is not None:
        return ImageLimit(tiled, False)
    area = _largest_area(settings)
    if area is not None:
        return ImageLimit(math.isqrt(area), True)
    filled = _filled_area(settings)
    if filled is not None:
        return ImageLimit(math.isqrt(filled * _LONGEST_STRIP), False)
    return _side(settings)


def _is_known(settings: Settings) -> bool:
    """Whether the settings tell of more than one fixed size."""
    return any(
        find(settings) is not None for find in (_tiled_side, _largest_area, _filled_area, _longest)
    )


def _tiled_side(settings: Settings) -> int | None:
    """The longest side of tiles put together; None where images are not tiled."""
    for switch, name in _ARRANGEMENTS:
        if settings(name) and (switch is None or settings(switch) not in _OFF):
            return max(int(edge) for size in settings(name) for edge in size)
    for switch, count, tile in _TILINGS:
        edges, tiles = _edges(settings(tile)), settings(count)
        # Llama 4's has no switch: where there is one and it is off, the number means nothing.
        switched_off = settings(switch or "crop_to_patches")
        is_on = switched_off not in _OFF if switch else switched_off is None
        if edges and tiles and is_on:
            return max(edges) * _longest_row(int(tiles))
    return None


def _longest_row(tiles: int) -> int:
    """The most tiles that stand in a row, over all arrangements of up to so many tiles."""
    return max(min(tiles // rows, rows * _LONGEST_STRIP) for rows in range(1, tiles + 1))


def _patches_of_large_image(image_processor: ImageProcessor, settings: Settings) -> int | None:
    """How many patches a processor that limits the area makes of a very large square.

    None where it has no such limit, or does not tell. Some count an image's area twice, as two
    frames: asking is safer than reading the number.
    """
    count = getattr(image_processor, "get_number_of_image_patches", None)
    if count is None or not settings("merge_size") or not isinstance(settings("patch_size"), int):
        return None
    if settings("do_resize") is False:
        return None
    patches = count(_LARGE, _LARGE, {})  # HunYuan-VL's are rows and columns
    return int(patches) if isinstance(patches, int) else math.prod(map(int, patches))


def _largest_area(settings: Settings) -> int | None:
    """The area, in pixels, that larger images are reduced to; smaller ones stay smaller."""
    size = _as_dict(settings("size"))
    patch = _edges(settings("patch_size"))
    if settings("max_image_tokens") and settings("tile_size") and settings("downsample_factor"):
        unit = settings("encoder_patch_size") * settings("downsample_factor")  # LFM2-VL
        return int(settings("max_image_tokens")) * unit**2
    if settings("max_num_patches") and settings("min_num_patches") and patch:
        return int(settings("max_num_patches")) * math.prod(patch)
    longest = size.get("longest_edge")
    if longest and (settings("merge_size") or longest > _NO_SIDE):
        return int(longest)
    pixels = size.get("max_pixels") or settings("max_pixels")
    return int(pixels) if pixels else None


def _filled_area(settings: Settings) -> int | None:
    """The area, in pixels, that every image is scaled to, whatever its shape."""
    patch = _edges(settings("patch_size"))
    if settings("scale_resolution"):  # MiniCPM-V: slices of any shape
        slices = settings("max_slice_nums") if settings("slice_mode") else 1
        return int(slices or 1) * int(settings("scale_resolution")) ** 2
    if not patch or _edges(settings("size")):
        return None
    tokens, pooled = settings("max_soft_tokens"), settings("pooling_kernel_size") or 1
    if tokens:  # Gemma 4
        return int(tokens) * pooled**2 * math.prod(patch)
    patches = settings("max_patches") or settings("max_num_patches")  # Pix2Struct, SigLIP 2
    return int(patches) * math.prod(patch) if patches else None


def _longest(settings: Settings) -> ImageLimit | None:
    """A limit on the longer side alone, which keeps the image's shape."""
    most = settings("max_image_size")
    if isinstance(most, int):
        return ImageLimit(most, False)
    longest = _as_dict(settings("size")).get("longest_edge")
    if longest and most:  # Idefics3, SmolVLM: all are scaled to `longest`, then to one tile
        if settings("do_image_splitting") is False:
            return ImageLimit(_LONGEST_PHOTO * max(_edges(most) or (longest,)), False)
        return ImageLimit(int(longest), False)
    if longest and settings("do_image_splitting"):  # Idefics2: quarters of that size
        return ImageLimit(2 * int(longest), True)
    return ImageLimit(int(longest), True) if longest else None


def _side(settings: Settings) -> ImageLimit:
    """The limit of processors that scale every image to one size, or bound its longer side."""
    limit = _longest(settings)
    if limit is not None:
        return limit
    size = _as_dict(settings("size"))
    if size.get("max_height") and size.get("max_width"):
        return ImageLimit(max(int(size["max_height"]), int(size["max_width"])), False)
    edges = _edges(size)
    if edges is None:
        return ImageLimit(None, True)
    # DeepSeek-VL hybrid has a second tower, for the same image in more detail.
    edges = max(edges, _edges(settings("high_res_size")) or edges)
    return ImageLimit(max(*edges, _LONGEST_PHOTO * min(edges)), False)


def _makes_more_of_larger(image_processor: ImageProcessor, side: int) -> bool:
    """Whether a square of twice this side becomes more numbers than one of this side."""
    from PIL import Image

    small, large = (
        _shapes(image_processor.preprocess(images=[Image.new("RGB", (edge, edge))]))
        for edge in (side, 2 * side)
    )
    return small != large


def _shapes(value: Any) -> Any:
    """The shapes of everything that a processor returned."""
    if isinstance(value, Mapping):
        return {name: _shapes(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shapes(part) for part in value]
    return tuple(getattr(value, "shape", ()))


def _as_dict(size: Any) -> dict[str, Any]:
    """A size as transformers' processors hold it: a dictionary, `SizeDict`, number or None."""
    if size is None or isinstance(size, (int, list, tuple)):
        return {}
    return {name: value for name, value in dict(size).items() if value is not None}


def _edges(size: Any) -> tuple[int, int] | None:
    """(height, width) of a size that names both, or one for both."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)):
        return (int(size[0]), int(size[-1])) if size else None
    named = _as_dict(size)
    one = named.get("shortest_edge") or named.get("longest_edge")
    height, width = named.get("height", one), named.get("width", one)
    return (int(height), int(width)) if height and width else None
