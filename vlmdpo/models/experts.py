"""Mixtures of experts: what routes tokens to them, and their weights, which are no layers.

An adapter on a router would change which expert reads a token, and PEFT's layers cannot stand in
for one that returns more than a tensor.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable

from torch import nn

from vlmdpo.models.protocols import VisionLanguageModel

_ROUTER = re.compile(r"router|topk|gating", re.IGNORECASE)
_ROUTER_NAMES = ("gate", "router", "wg")
_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def router_layers(model: VisionLanguageModel) -> list[str]:
    """Names of the linear layers that route tokens to experts, which adapters leave alone.

    Those that return more than a tensor (Llama 4), those inside a router (Gemma 4), and those with
    a router's name and an output for each expert.
    """
    modules = dict(model.named_modules())
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    experts = {getattr(text, name, None) for name in _NUMBERS_OF_EXPERTS} - {None}
    return [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and (
            returns_several(type(module))
            or any(_ROUTER.search(type(modules[parent]).__name__) for parent in _parents(name))
            or (name.rsplit(".", 1)[-1] in _ROUTER_NAMES and module.out_features in experts)
        )
    ]


def _parents(name: str) -> Iterable[str]:
    """The names of a module's direct parent and of the one around it."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(max(1, len(parts) - 2), len(parts)))


def returns_several(layer_class: type[nn.Module]) -> bool:
    """Whether a layer's forward returns a tuple, by its code: running it would need its numbers."""
    if layer_class.forward is nn.Linear.forward:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(layer_class.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    return any(
        isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)
        for node in ast.walk(tree)
    )


def expert_parameters(model: VisionLanguageModel) -> dict[str, nn.Parameter]:
    """The weights of experts that are parameters of their own, not linear layers, by name."""
    return {
        f"{name}.{own}" if name else own: parameter
        for name, module in model.named_modules()
        if "experts" in type(module).__name__.lower()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }
