"""Which models are vision-language models that DPO can be done with, and why the others are not."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from vlmdpo.errors import MissingDependencyError, ModelError, install_command
from vlmdpo.models import registry

# The sizes that a configuration may have: far beyond any model, and far below what would keep this
# machine busy for hours before it is found out.
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "depth"), (0, 2_000)),
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim"), (1, 1_000_000)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), (1, 10_000)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (0, 100_000)),
    "vocab_size": (1, 10_000_000),
    "image_size": (1, 100_000),
}
# Models that are refused by name, and why.
_REFUSED = {
    "instructblip": "its Q-Former reads the question beside the picture, so that a picture's "
    "features are not those of the picture alone; try llava-1.5-7b, on the same language model",
}
# Models whose vision tower is another package's.
_NEEDED = {"gemma3n": "timm", "perception_lm": "timm"}
_MAX_DEPTH = 8  # of configurations within configurations
_OWN_CLASS = "AutoModelForImageTextToText"


def check_supported(config: PreTrainedConfig, model: str, *, trust_remote_code: bool) -> None:
    """Raise ModelError where a configuration is not that of a model that can be trained, and
    MissingDependencyError where its tower's package is not installed.

    Args:
        model: as `--model` names it.
    """
    code_of_its_own = getattr(config, "auto_map", None) or {}
    remote = trust_remote_code and _OWN_CLASS in code_of_its_own
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not remote:
        if _takes_images(config) or code_of_its_own:
            raise ModelError(
                f"--model: '{model}' is a {config.model_type} model, which has no image-text-to-"
                "text class in transformers; look for a version of it that has one, whose name "
                "often ends in -hf"
            )
        raise ModelError(
            f"--model: '{model}' is a {config.model_type} model, not a vision-language model; "
            f"try one of {', '.join(list(registry.ENTRIES)[1:5])} ..."
        )
    if config.model_type in _REFUSED:
        raise ModelError(
            f"--model: '{model}' is an {config.model_type} model, which vlmdpo does not train: "
            f"{_REFUSED[config.model_type]}"
        )
    package = _NEEDED.get(config.model_type)
    if package is not None and importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f"'{model}' is a {config.model_type} model, whose vision tower is {package}'s, which "
            f"is not installed: {install_command(extra='vision')}"
        )
    if _is_encoder_decoder(config):
        raise ModelError(
            f"--model: '{model}' is a {config.model_type} model, an encoder-decoder; vlmdpo trains "
            "decoders, whose prompt and answer are one row of tokens"
        )


def check_sizes(config: object, model: str) -> None:
    """Raise ModelError for a configuration, as its file holds it, whose sizes no model has."""
    for name, value in _numbers(config, _MAX_DEPTH):
        least, most = _SIZES[name.rpartition(".")[2]]
        if not least <= value <= most:
            raise ModelError(
                f"--model: the config.json of '{model}' says {name} {value:,}, which no model has "
                f"({least:,} to {most:,}); get it again"
            )


def _numbers(config: object, depth: int, within: str = "") -> Iterator[tuple[str, int]]:
    """The numbers of `_SIZES` in a configuration and those within it, by name."""
    for name, value in config.items() if isinstance(config, dict) and depth else ():
        if isinstance(value, dict):
            yield from _numbers(value, depth - 1, f"{within}{name}.")
        elif name in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            yield f"{within}{name}", value


def _takes_images(config: PreTrainedConfig) -> bool:
    """Whether a configuration holds that of a vision tower."""
    return any("vision" in name or "visual" in name for name in config.to_dict())


def _is_encoder_decoder(config: PreTrainedConfig) -> bool:
    """Whether the model, or the language model in it, is one (BLIP-2 on Flan-T5)."""
    text = getattr(config, "text_config", None)
    return bool(config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False))
