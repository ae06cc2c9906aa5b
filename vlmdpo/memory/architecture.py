"""Architectures at real size without weights: configurations, parameter counts, shallow copies.

For models in the registry nothing is downloaded: their sizes are in `models/architectures.json`,
and a processor of the same family with a small tokenizer (a token is a letter) makes batches of the
real shape. Other models bring their own files.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.initialization import no_init_weights

from vlmdpo.memory.fast import counted_architectures, image_settings, known_architectures
from vlmdpo.models import families, load, registry
from vlmdpo.tiny import random_models as small

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from vlmdpo.models.protocols import Processor

# Part names of `families.parameters_by_part` → of the registry.
_REGISTRY_PARTS = {
    "vision": "vision",
    "connector": "connector",
    "head": "embed/head",
    "language": "text",
}


@dataclass(frozen=True)
class Architecture:
    """A configuration at real size and a processor whose token ids it knows."""

    config: PreTrainedConfig
    processor: Processor


def public_config(alias: str) -> PreTrainedConfig:
    """The transformers configuration of a registry entry, without its token ids."""
    entry = counted_architectures()[alias]
    model_class = getattr(transformers, entry["class"])
    return model_class.config_class(**copy.deepcopy(entry["config"]))


def load_architecture(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Architecture:
    """A model's architecture, from the registry or else from its own files.

    Raises ModelError, MissingDependencyError.
    """
    known = registry.find(model)
    if known is not None and known.alias in known_architectures():
        return _from_registry(known.alias)
    return load_architecture_from_files(
        model, revision=revision, trust_remote_code=trust_remote_code
    )


def load_config(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The configuration alone, which is enough for counting. Raises ModelError."""
    known = registry.find(model)
    if known is not None and known.alias in counted_architectures():
        return public_config(known.alias)
    return load.check_is_vlm(model, revision=revision, trust_remote_code=trust_remote_code)


def load_architecture_from_files(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Architecture:
    """A model's architecture from its own files, even if the registry knows it.

    Raises ModelError, MissingDependencyError.
    """
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    return Architecture(load.check_is_vlm(model, **origin), load.load_processor(model, **origin))


def _from_registry(alias: str) -> Architecture:
    """The registry entry's sizes, with token ids and processor of the family's tiny model."""
    facts = known_architectures()[alias]
    family, sizes = facts["family"], copy.deepcopy(facts["config"])
    text, vision = sizes.pop("text_config"), sizes.pop("vision_config")
    heads = text["num_attention_heads"]
    text.setdefault("head_dim", text["hidden_size"] // heads)
    text.setdefault("num_key_value_heads", heads)
    if family == "gemma3":  # every sixth layer has full attention
        text["layer_types"] = [
            "full_attention" if (i + 1) % 6 == 0 else "sliding_attention"
            for i in range(text["num_hidden_layers"])
        ]
    names = ("scale_factor", "projection_dim", "mm_tokens_per_image")
    more: dict[str, Any] = {key: sizes[key] for key in names if key in sizes}
    if "perceiver_config" in sizes:
        perceiver = sizes.pop("perceiver_config")
        more |= {"latents": perceiver.pop("resampler_n_latents"), "perceiver": perceiver}
    bounds = image_settings(alias)
    side = vision.pop("image_size", None) or math.isqrt(bounds["size"]["longest_edge"])
    config, processor = small.FAMILIES[family](text, vision, side, **more)
    for key, value in sizes.items():
        setattr(config, key, value)
    if "size" not in bounds or "longest_edge" in bounds["size"]:
        for name, value in bounds.items():
            setattr(processor.image_processor, name, value)
    processor.chat_template = processor.chat_template or families.fallback_chat_template(processor)
    return Architecture(config, processor)


def build_on_meta(config: PreTrainedConfig, *, lora_r: int | None = None) -> PreTrainedModel:
    """The model on the meta device, which takes no memory.

    Args:
        lora_r: rank of an adapter on all linear layers; None for no adapter.
    """
    with torch.device("meta"), no_init_weights():
        model = transformers.AutoModelForImageTextToText.from_config(config)
        model.tie_weights()
        if lora_r is None:
            return model
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=lora_r, target_modules="all-linear"))


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters by the registry's part names, tied weights once, without adapters."""
    counts = dict.fromkeys(registry.PARTS, 0)
    for part, name, parameter in families.parameters_by_part(model):
        if "lora_" not in name:
            counts[_REGISTRY_PARTS[part]] += parameter.numel()
    return counts


def count_adapter_parameters(model: PreTrainedModel, lora_r: int, scope: str) -> int:
    """Parameters of an adapter on the linear layers within `--lora-scope`."""
    modules: dict[str, Any] = dict(model.named_modules())
    layers = [modules[name] for name in families.linear_layers(model, scope)]
    return sum(lora_r * (layer.in_features + layer.out_features) for layer in layers)


def count_quantized_weights(model: PreTrainedModel) -> int:
    """Weights that 4-bit quantization covers: of all linear layers except the head."""
    head = model.get_output_embeddings()
    return sum(
        m.weight.numel()
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and m is not head
    )


def count_layers(config: PreTrainedConfig) -> tuple[int, int]:
    """(language layers, vision layers); 0 of a tower that is not made of equal ones."""
    text, vision = config.get_text_config(), config.vision_config
    return text.num_hidden_layers, getattr(vision, _depth_setting(vision) or "", 0)


def _depth_setting(vision: PreTrainedConfig) -> str | None:
    """The setting with a tower's number of layers; timm's towers have none."""
    names = ("depth", "num_hidden_layers")
    return next((name for name in names if getattr(vision, name, None)), None)


def make_shallow(
    config: PreTrainedConfig, text_layers: int, vision_layers: int
) -> PreTrainedConfig:
    """The same architecture with fewer layers; settings that name layers name remaining ones.

    A tower that is not made of equal layers stays whole. Layers that share another's keys and
    values get their own here (under one per cent of the weights), so that any few of them are a
    model.
    """
    cut = copy.deepcopy(config)
    text, vision = cut.get_text_config(), cut.vision_config
    for name in ("layer_types", "intermediate_size", "activation_sparsity_pattern"):
        if isinstance(of_layers := getattr(text, name, None), (list, tuple)):
            setattr(text, name, of_layers[-text_layers:])
    text.num_hidden_layers = text_layers
    if hasattr(text, shared := "num_kv_shared_layers"):
        setattr(text, shared, 0)
    if depth := _depth_setting(vision):
        setattr(vision, depth, vision_layers)
    for name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        kept = getattr(vision, name, None)
        if kept:
            setattr(
                vision,
                name,
                list(range(vision_layers))[: len(kept)] if "deep" in name else [vision_layers - 1],
            )
    return cut
