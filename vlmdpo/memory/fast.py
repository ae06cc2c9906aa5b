"""A step's memory from a closed formula, for `--fast`: no torch, at once, some per cent off. The
simulation is exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

# The largest difference from the simulation over all models of the registry, in per cent of the
# whole peak, at one picture of default size and answers of 250 tokens; `docs/memory.md` says how it
# was found.
ERROR_PER_CENT = 14


@cache
def architectures() -> dict[str, Any]:
    """The configuration values of the registry's models, by alias: {family, class, config}."""
    text = (
        resources.files("vlmdpo.models").joinpath("architectures.json").read_text(encoding="utf-8")
    )
    found: dict[str, Any] = json.loads(text)
    return found


def default_side(alias: str) -> int:
    """The longest image side that `prepare` keeps for this model, in pixels: half the limit where
    smaller ones stay so.
    """
    entry = architectures()[alias]
    side: int = entry["config"]["vision_config"].get(
        "image_size", 3584
    )  # Qwen's limit is an area, 3584 squared
    if entry["family"] in ("idefics3", "smolvlm"):
        return side  # its processor takes twice the tower's side, and half of that is kept
    return (
        side // 2 if entry["family"] == "idefics2" or entry["family"].startswith("qwen") else side
    )


def image_tokens(alias: str, image: tuple[int, int]) -> tuple[int, int]:
    """(tokens in the language model, patches in the vision tower) of one picture, in pixels,
    without image splitting.
    """
    entry = architectures()[alias]
    config = entry["config"]
    vision = config["vision_config"]
    patch, side = vision["patch_size"], vision.get("image_size", 0)
    if entry["family"] == "idefics2":
        scale = min(1.0, side / max(image))
        return config["perceiver_config"]["resampler_n_latents"], math.prod(
            int(edge * scale) // patch for edge in image
        )
    if entry["family"].startswith("qwen"):
        units = math.prod(max(1, round(edge / (2 * patch))) for edge in image)
        return units, 4 * units
    patches = (side // patch) ** 2
    if (
        entry["family"] == "llava_next"
    ):  # the picture whole, and cut into parts, less what pads them
        height, width = _best_cut(config["image_grid_pinpoints"], image)
        tiles = 1 + height * width // side**2
        scale = min(width / image[0], height / image[1])
        columns, rows = (round(edge * scale / patch) for edge in image)
        return patches + (columns + 1) * rows, tiles * (patches + 1)
    if entry["family"] in ("idefics3", "smolvlm"):
        return patches // config["scale_factor"] ** 2, patches
    return config.get("mm_tokens_per_image", patches), patches


def _best_cut(pinpoints: list[list[int]], image: tuple[int, int]) -> tuple[int, int]:
    """The resolution (height, width) that LLaVA-NeXT cuts a picture in: it keeps most of it, and
    wastes least of the rest.
    """

    def fit(resolution: list[int]) -> tuple[int, int]:
        height, width = resolution
        scale = min(width / image[0], height / image[1])
        kept = min(int(image[0] * scale) * int(image[1] * scale), image[0] * image[1])
        return kept, kept - height * width

    height, width = max(pinpoints, key=fit)
    return height, width


@dataclass(frozen=True)
class Sizes:
    """What a closed formula needs to know of an architecture: widths, depths, vocabulary."""

    hidden: int
    inner: int
    layers: int
    heads_width: int
    vocabulary: int
    vision_hidden: int
    vision_inner: int
    vision_layers: int
    wide_connector: (
        bool  # one as wide as a language layer, over every patch, that does not recompute
    )
    at_once: float

    @staticmethod
    def of(alias: str) -> Sizes:
        """Of one of the registry's models."""
        entry = architectures()[alias]
        config: Mapping[str, Mapping[str, Any]] = entry["config"]
        text, vision = config["text_config"], config["vision_config"]
        width = vision.get("embed_dim") or vision["hidden_size"]
        heads = text["num_attention_heads"]
        return Sizes(
            text["hidden_size"],
            text["intermediate_size"],
            text["num_hidden_layers"],
            heads * text.get("head_dim", text["hidden_size"] // heads),
            text["vocab_size"],
            width,
            vision.get("intermediate_size") or width * vision.get("mlp_ratio", 4),
            vision.get("depth") or vision["num_hidden_layers"],
            "perceiver_config" in config,
            _AT_ONCE_QWEN if entry["family"].startswith("qwen") else _AT_ONCE,
        )


# How many layers' worth of activations live at once while layers recompute, and of what is kept
# without: fitted to simulated steps of the registry's models.
_AT_ONCE, _AT_ONCE_QWEN, _CONNECTOR, _KEPT, _HEAD = 3, 1.6, 2, 0.9, 7
_HEAD_CHUNK = 32768  # words that TRL's head scores at a time


def activations(
    sizes: Sizes,
    tokens: int,
    answers: int,
    patches: int,
    width: int,
    *,
    checkpointing: bool,
    lora: bool,
) -> int:
    """A closed formula of a step's activations in bytes, for `--fast`; the simulation is the exact
    way.

    Args:
        tokens, answers, patches: of the whole batch: in the language model, those that are scored,
        in the vision tower.
        width: bytes of a number in the forward pass.
        checkpointing: only each layer's input is kept, and one layer is computed anew at a time.
        lora: adapters keep a float32 copy of each linear layer's input.
    """

    def layer(hidden: int, inner: int, heads: int) -> int:
        kept = (
            4 * hidden + 4 * heads + 3 * inner
        )  # norms, queries to values, attention's output, the gated inner width
        return kept * width + (4 * (4 * hidden + inner) if lora else 0)

    one = layer(sizes.hidden, sizes.inner, sizes.heads_width)
    text = one * tokens
    vision = layer(sizes.vision_hidden, sizes.vision_inner, sizes.vision_hidden) * patches
    head = _HEAD * 4 * answers * min(sizes.vocabulary, _HEAD_CHUNK)
    connector = _CONNECTOR * sizes.wide_connector * one * patches
    if not checkpointing:
        return (
            round(_KEPT * (text * sizes.layers + vision * sizes.vision_layers))
            + connector
            + head // 2
        )
    inputs = width * (
        tokens * sizes.hidden * sizes.layers + patches * sizes.vision_hidden * sizes.vision_layers
    )
    return inputs + max(round(sizes.at_once * text) + connector, head)
