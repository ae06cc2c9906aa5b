"""Which adapter of a PEFT model computes, switched for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from vlmdpo.models.protocols import Module

# TRL's name for the frozen copy of an adapter that training goes on from.
REFERENCE = "ref"


@contextlib.contextmanager
def use_adapter(model: Module, adapter_name: str | None) -> Iterator[None]:
    """Inside, the model's forward passes have this adapter; None for none.

    PEFT's own ways also set `requires_grad` of every adapter weight to False and back. FSDP2 cannot
    take that between two forward passes: a unit that is still unsharded is switched back on in its
    full weights only, and its sharded weights lose a part of their gradients.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = adapter_name is None
        if adapter_name is not None:
            layer._active_adapter = [adapter_name]
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def reference_adapter(model: Module) -> str | None:
    """The adapter of the reference: the copy of the one that training goes on from, or none."""
    return REFERENCE if REFERENCE in getattr(model, "peft_config", {}) else None
