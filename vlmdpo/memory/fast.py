"""A step's memory from a closed formula, for `--fast`: instant, without torch, some percent off.

The simulation (`training.simulate`) is the exact way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, NotRequired, TypedDict

from vlmdpo.models.image_limits import default_side_of_settings

# The largest difference from the simulation, as a percentage of the whole peak, with one image of
# default size and answers of 250 tokens: over all models of the registry at batch 2, over three at
# batch 8 with 1 to 8 pairs a prompt. See docs/memory.md.
MAX_ERROR_PERCENT = 17


ArchitectureEntry = TypedDict(
    "ArchitectureEntry",
    {"family": str, "class": str, "config": dict[str, Any], "formula": NotRequired[bool]},
)


def known_architectures() -> dict[str, ArchitectureEntry]:
    """The configurations of the registry's models that have a formula, by alias.

    Layers with a recurrent state and experts have none: see `counted_architectures`.
    """
    entries = counted_architectures().items()
    return {alias: entry for alias, entry in entries if entry.get("formula", True)}


@cache
def counted_architectures() -> dict[str, ArchitectureEntry]:
    """The configurations of all models of the registry whose parameters can be counted."""
    text = (
        resources.files("vlmdpo.models").joinpath("architectures.json").read_text(encoding="utf-8")
    )
    entries: dict[str, ArchitectureEntry] = json.loads(text)
    return entries


def image_settings(alias: str) -> dict[str, Any]:
    """The settings of this model's image processor that bound images, as published."""
    entry = known_architectures()[alias]
    family, config = entry["family"], entry["config"]
    if family.startswith("qwen"):  # an area
        side = 4096 if family.startswith("qwen3") else 3584
        return {"size": {"shortest_edge": 16 * 16, "longest_edge": side**2}, "merge_size": 2}
    side = config["vision_config"]["image_size"]
    if family in ("idefics3", "smolvlm"):
        return {
            "size": {"longest_edge": 4 * side},
            "max_image_size": {"longest_edge": side},
            "do_image_splitting": False,
        }
    if family == "idefics2":
        return {"size": {"shortest_edge": 378, "longest_edge": side}}
    if "image_grid_pinpoints" in config:
        return {"image_grid_pinpoints": config["image_grid_pinpoints"]}
    return {"size": {"height": side, "width": side}}


def default_image_side(alias: str) -> int:
    """The longest image side that `prepare` keeps for this model, in pixels."""
    side = default_side_of_settings(image_settings(alias))
    assert side is not None, f"{alias}: image_settings names no limit"
    return side


def image_tokens(alias: str, image: tuple[int, int]) -> tuple[int, int]:
    """(tokens in the language model, patches in the vision tower) of one image, without splitting.

    Args:
        image: (width, height) in pixels.
    """
    entry = known_architectures()[alias]
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
    if entry["family"] == "llava_next":  # the whole image, and tiles of it without their padding
        height, width = _best_resolution(config["image_grid_pinpoints"], image)
        tiles = 1 + height * width // side**2
        scale = min(width / image[0], height / image[1])
        columns, rows = (round(edge * scale / patch) for edge in image)
        return patches + (columns + 1) * rows, tiles * (patches + 1)
    if entry["family"] in ("idefics3", "smolvlm"):
        return patches // config["scale_factor"] ** 2, patches
    return config.get("mm_tokens_per_image", patches), patches


def _best_resolution(pinpoints: list[list[int]], image: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) that LLaVA-NeXT tiles an image at: it keeps the most and pads the least.

    The same rule as `select_best_resolution` in transformers.
    """

    def fit(resolution: list[int]) -> tuple[int, int]:
        height, width = resolution
        scale = min(width / image[0], height / image[1])
        kept = min(int(image[0] * scale) * int(image[1] * scale), image[0] * image[1])
        return kept, kept - height * width

    height, width = max(pinpoints, key=fit)
    return height, width


@dataclass(frozen=True)
class ModelShape:
    """Widths and depths of an architecture, as the formula needs them.

    Attributes:
        attention: width of all attention heads together.
        wide_connector: whether the connector is as wide as a language layer, sees every patch, and
            does not recompute.
        live_layers: how many layers' activations are alive at once while layers recompute.
    """

    hidden: int
    mlp: int
    layers: int
    attention: int
    vocabulary: int
    vision_hidden: int
    vision_mlp: int
    vision_layers: int
    wide_connector: bool
    live_layers: float

    @staticmethod
    def of_model(alias: str) -> ModelShape:
        """The shape of a model in the registry."""
        entry = known_architectures()[alias]
        config: Mapping[str, Mapping[str, Any]] = entry["config"]
        text, vision = config["text_config"], config["vision_config"]
        width = vision.get("embed_dim") or vision["hidden_size"]
        heads = text["num_attention_heads"]
        return ModelShape(
            text["hidden_size"],
            text["intermediate_size"],
            text["num_hidden_layers"],
            heads * text.get("head_dim", text["hidden_size"] // heads),
            text["vocab_size"],
            width,
            vision.get("intermediate_size") or width * vision.get("mlp_ratio", 4),
            vision.get("depth") or vision["num_hidden_layers"],
            "perceiver_config" in config,
            _LIVE_LAYERS_QWEN if entry["family"].startswith("qwen") else _LIVE_LAYERS,
        )


# Fitted to simulated steps of the registry's models.
_LIVE_LAYERS, _LIVE_LAYERS_QWEN = 3, 1.6  # with recomputation
_KEPT_SHARE = 0.9  # of the layers' activations, without recomputation
_CONNECTOR_FACTOR = 2
_HEAD_TOKENS, _HEAD_CHUNK = 4096, 32768  # tokens and entries that TRL's head scores at a time


def activation_bytes(
    shape: ModelShape,
    tokens: int,
    answer_tokens: int,
    patches: int,
    width: int,
    *,
    checkpointing: bool,
    lora: bool,
) -> int:
    """A step's activations in bytes, by a closed formula.

    Args:
        tokens: in the language model, of the whole batch.
        answer_tokens: of these, the ones that are scored.
        patches: in the vision tower, of the whole batch.
        width: bytes of a number in the forward pass.
        checkpointing: whether only each layer's input is kept, and layers recompute one by one.
        lora: whether adapters keep a float32 copy of each linear layer's input.
    """

    def per_token(hidden: int, mlp: int, attention: int) -> int:
        # Norms; queries, keys, values and attention's output; the gated MLP.
        kept = 4 * hidden + 4 * attention + 3 * mlp
        return kept * width + (4 * (4 * hidden + mlp) if lora else 0)

    language_token = per_token(shape.hidden, shape.mlp, shape.attention)
    language = language_token * tokens
    vision = per_token(shape.vision_hidden, shape.vision_mlp, shape.vision_hidden) * patches
    logits = width * min(answer_tokens, _HEAD_TOKENS) * min(shape.vocabulary, _HEAD_CHUNK)
    head = logits + 2 * 4 * answer_tokens * shape.hidden  # hidden states and their gradient
    connector = _CONNECTOR_FACTOR * shape.wide_connector * language_token * patches
    if not checkpointing:
        layers = language * shape.layers + vision * shape.vision_layers
        return round(_KEPT_SHARE * layers) + connector + head
    inputs = width * (
        tokens * shape.hidden * shape.layers + patches * shape.vision_hidden * shape.vision_layers
    )
    return inputs + max(round(shape.live_layers * language) + connector, head)
