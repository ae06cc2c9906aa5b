"""Real architectures at real size without weights: their configurations, counts on the meta device,
shallow copies.

For models in the registry nothing is downloaded: their sizes are in `models/architectures.json`,
and a processor of the same family with a small tokenizer (a token is a letter) makes batches of the
real shape. Other models bring their own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from vlmdpo.memory.fast import architectures
from vlmdpo.models import families, load, registry
from vlmdpo.tiny import random_models as small

_PART_NAMES = {
    "vision": "vision",
    "connector": "connector",
    "head": "embed/head",
    "language": "text",
}


@dataclass(frozen=True)
class Architecture:
    """A configuration at real size and a processor whose token ids it knows."""

    config: Any
    processor: Any


def public_config(alias: str) -> Any:
    """The transformers configuration of a registry entry, token ids aside."""
    entry = architectures()[alias]
    model_class = getattr(transformers, entry["class"])
    return model_class.config_class(**copy.deepcopy(entry["config"]))


def architecture(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Architecture:
    """What a model looks like, from the registry, or from its own files. Raises ModelError,
    MissingDependencyError.
    """
    known = registry.known(model)
    if known is not None and known.alias in architectures():
        return _stand_in(known.alias)
    return from_files(model, revision=revision, trust_remote_code=trust_remote_code)


def config_of(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration alone, which is all that counting needs. Raises ModelError."""
    known = registry.known(model)
    if known is not None and known.alias in architectures():
        return public_config(known.alias)
    return load.check_is_vlm(model, revision=revision, trust_remote_code=trust_remote_code)


def from_files(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Architecture:
    """Likewise, from a model's own files, whether the registry knows it or not."""
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    return Architecture(load.check_is_vlm(model, **origin), load.load_processor(model, **origin))


def _stand_in(alias: str) -> Architecture:
    """The registry entry's sizes in the small family's configuration, which fits the small
    processor's token ids.
    """
    facts = architectures()[alias]
    family, sizes = facts["family"], copy.deepcopy(facts["config"])
    text, vision = sizes.pop("text_config"), sizes.pop("vision_config")
    heads = text["num_attention_heads"]
    text.setdefault("head_dim", text["hidden_size"] // heads)
    text.setdefault("num_key_value_heads", heads)
    if family == "gemma3":  # every sixth layer sees all
        text["layer_types"] = [
            "full_attention" if (i + 1) % 6 == 0 else "sliding_attention"
            for i in range(text["num_hidden_layers"])
        ]
    names = ("scale_factor", "projection_dim", "mm_tokens_per_image")
    more: dict[str, Any] = {key: sizes[key] for key in names if key in sizes}
    if "perceiver_config" in sizes:
        perceiver = sizes.pop("perceiver_config")
        more |= {"latents": perceiver.pop("resampler_n_latents"), "perceiver": perceiver}
    side = vision.pop(
        "image_size", 3584
    )  # Qwen's processors limit the area, to 3584 pixels squared
    config, processor = small.FAMILIES[family](text, vision, side, **more)
    for key, value in sizes.items():
        setattr(config, key, value)
    if "image_grid_pinpoints" in sizes:
        processor.image_processor.image_grid_pinpoints = sizes["image_grid_pinpoints"]
    processor.chat_template = processor.chat_template or families.own_chat_template(processor)
    return Architecture(config, processor)


def on_meta(config: Any, *, lora_r: int | None = None) -> Any:
    """The model on the meta device, with an adapter on all linear layers where `lora_r` is given;
    takes no memory.
    """
    with torch.device("meta"), no_init_weights():
        model = transformers.AutoModelForImageTextToText.from_config(config)
        model.tie_weights()
        if lora_r is None:
            return model
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=lora_r, target_modules="all-linear"))


def counts(model: Any) -> dict[str, int]:
    """Parameters by the registry's part names, weights tied to each other once, adapters left out."""
    found = dict.fromkeys(registry.PARTS, 0)
    for part, name, parameter in families.parts(model):
        if "lora_" not in name:
            found[_PART_NAMES[part]] += parameter.numel()
    return found


def adapter_size(model: Any, lora_r: int, scope: str) -> int:
    """Parameters of an adapter on the linear layers in `--lora-scope`, of a model on the meta
    device.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    head = model.get_output_embeddings()
    wanted = (
        families.linear_layers(model, scope)
        if scope != "all"
        else [n for n, m in linear.items() if m is not head]
    )
    return sum(lora_r * (linear[name].in_features + linear[name].out_features) for name in wanted)


def linear_weights(model: Any) -> int:
    """Weights that 4-bit quantization takes: those of all linear layers but the head."""
    head = model.get_output_embeddings()
    return sum(
        m.weight.numel()
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and m is not head
    )


def layers_of(config: Any) -> tuple[int, int]:
    """(language layers, vision layers)."""
    text, vision = config.get_text_config(), config.vision_config
    return text.num_hidden_layers, getattr(vision, "depth", None) or vision.num_hidden_layers


def shallow(config: Any, text_layers: int, vision_layers: int) -> Any:
    """The same architecture with so many layers; what names single layers is kept to those that are
    left.
    """
    cut = copy.deepcopy(config)
    text, vision = cut.get_text_config(), cut.vision_config
    text.num_hidden_layers = text_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[-text_layers:]
    setattr(
        vision, "depth" if getattr(vision, "depth", None) else "num_hidden_layers", vision_layers
    )
    for name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        kept = getattr(vision, name, None)
        if kept:
            setattr(
                vision,
                name,
                list(range(vision_layers))[: len(kept)] if "deep" in name else [vision_layers - 1],
            )
    return cut
