"""Which attention each part of a model computes with, by `--attn-implementation`.

A vision tower and a language model need not use the same one. Training runs the language model on
an attention of ours, on top of SDPA (`engine.packed_attention`), so "auto" leaves it at its own
default, which is SDPA where the model has it: a tuned model answers with what it was trained with.
"auto" gives FlashAttention to vision towers only.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from vlmdpo import ui
from vlmdpo.errors import MissingDependencyError, install_command
from vlmdpo.models.families import text_configs, unwrap_peft

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vlmdpo.models.protocols import Backbone, VisionLanguageModel

PACKED_PREFIX = "vlmdpo_packed_"  # of the names of our attention functions
_FLASH = {
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
}
# What a model passes to transformers' masking functions to let some tokens see those that follow
# them. There is no flag for it, and FlashAttention's mask function ignores it silently.
_MASK_OVERLAY = re.compile(r"\bblock_sequence_ids\b|\b(?:or|and|token_type_ids)_mask_function\b")


def check_attention_installed(attention: str) -> None:
    """Raise MissingDependencyError for a FlashAttention whose package is not installed."""
    if attention not in _FLASH or _FLASH[attention]():
        return
    if attention == "flash_attention_2":
        package, how = "flash-attn", install_command("flash-attn", "--no-build-isolation")
    else:
        package, how = "flash-attn-3", "build it from flash-attention's hopper folder"
    raise MissingDependencyError(
        f"--attn-implementation {attention} needs the {package} package and a GPU that it "
        f"supports: {how}; or use sdpa"
    )


def use_attention(
    model: PreTrainedModel, attention: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Switch each part of a model, loaded with its own default, to what was asked for.

    A part that cannot use it keeps its default, and one line says which and why.

    Args:
        attention: of `--attn-implementation`.
        device, dtype: what the model computes on and in.

    Raises MissingDependencyError.
    """
    if attention == "auto":
        wanted = "flash_attention_2"
        if device.type != "cuda" or dtype == torch.float32 or not _FLASH[wanted]():
            return
        parts = _vision_parts(model)
    else:
        check_attention_installed(attention)
        wanted, parts = attention, [*_vision_parts(model), _language_part(model)]
    not_here = _why_not_here(wanted, device, dtype)
    kept: dict[str, None] = {}
    for name, modules, configs in parts:
        reason = not_here or _why_not(model, name, modules, configs, wanted)
        if not reason:
            for config in configs:
                config._attn_implementation = wanted
        elif configs[-1]._attn_implementation != wanted:
            kept[f"the {name} keeps {configs[-1]._attn_implementation}, because {reason}"] = None
    if kept:
        say = ui.say if attention == "auto" else ui.warn
        say(f"--attn-implementation {attention}: {'; '.join(kept)}")


def describe_attention(model: VisionLanguageModel) -> str:
    """The attention in use, in words: "sdpa", or "sdpa (vision tower: flash_attention_2)"."""
    base = unwrap_peft(model)
    language = str(_language_part(base)[2][-1]._attn_implementation)
    language = language.removeprefix(PACKED_PREFIX)
    towers = {str(configs[-1]._attn_implementation) for _, _, configs in _vision_parts(base)}
    others = sorted(towers - {language})
    return f"{language} (vision tower: {', '.join(others)})" if others else language


_Part = tuple[str, list[PreTrainedModel], list["PreTrainedConfig"]]


def _language_part(model: PreTrainedModel) -> _Part:
    """Name, modules and configurations of the language model, with the classes around it.

    The outermost configuration comes first: setting its attention sets that of those inside.
    """
    configs = {id(model.config): model.config}
    configs |= {id(config): config for config in text_configs(model.base_model)}
    modules = [model, *_models_in(model.base_model.get_decoder())]
    return "language model", modules, list(configs.values())


def _vision_parts(model: PreTrainedModel) -> list[_Part]:
    """The same of each vision tower, and of each connector that is a model of its own."""
    language = {id(config) for config in _language_part(model)[2]}
    parts: dict[int, _Part] = {}
    decoder = set(map(id, model.base_model.get_decoder().modules()))
    for module in _models_in(model):
        config = module.config
        if id(module) not in decoder and id(config) not in language:
            parts.setdefault(id(config), ("vision tower", [], [config]))[1].append(module)
    return list(parts.values())


def _models_in(module: torch.nn.Module) -> list[PreTrainedModel]:
    return [inner for inner in module.modules() if isinstance(inner, PreTrainedModel)]


def _why_not_here(attention: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why an attention cannot run on this device and in this data type, or ""."""
    if not attention.startswith("flash_attention"):
        return ""
    # A model that processes will share is loaded on the CPU, and computes on their GPUs.
    if device.type != "cuda" and not torch.cuda.is_available():
        return f"FlashAttention needs a GPU, and this run is on {device.type}"
    if dtype == torch.float32:
        return "FlashAttention computes in half precision only; see --dtype"
    return ""


def _why_not(
    model: PreTrainedModel,
    name: str,
    modules: list[PreTrainedModel],
    configs: list[PreTrainedConfig],
    attention: str,
) -> str:
    """Why a part cannot use an attention, or ""."""
    for module in modules:
        try:
            # As at loading, when it does not look where the weights are.
            module.get_correct_attn_implementation(attention, is_init_check=True)
        except (ValueError, ImportError):
            return f"{type(module).__name__} does not support it"
    if name != "language model" or not attention.startswith("flash_attention"):
        return ""
    if _is_soft_capped(configs):
        return "its attention logits are soft-capped"
    if any(overlays_mask(type(module).__module__) for module in modules):
        return "its prompt or image tokens see those that follow them"
    return ""


def _is_soft_capped(configs: list[PreTrainedConfig]) -> bool:
    """Whether attention logits are soft-capped, as Gemma 2's are: SDPA cannot do that."""
    return any(getattr(config, "attn_logit_softcapping", None) for config in configs)


@functools.cache
def overlays_mask(module: str) -> bool:
    """Whether a module of models asks for other masks than causal and sliding ones."""
    return bool(_MASK_OVERLAY.search(inspect.getsource(sys.modules[module])))


def default_attention(backbone: Backbone) -> str:
    """What the language model uses where nothing is asked for: sdpa if it can, else eager."""
    supported = {
        module.get_correct_attn_implementation(None, is_init_check=True)
        for module in _models_in(backbone.get_decoder())
    }
    return "eager" if "eager" in supported or _is_soft_capped(text_configs(backbone)) else "sdpa"
