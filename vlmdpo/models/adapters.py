"""Adapters of a PEFT model, switched off for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer

from vlmdpo.models.protocols import Module


@contextlib.contextmanager
def adapters_off(model: Module, adapter_name: None = None) -> Iterator[None]:
    """Inside, the model's forward passes leave out its adapters.

    PEFT's own way also sets `requires_grad` of every adapter weight to False and back. FSDP2 cannot
    take that between two forward passes: a unit that is still unsharded is switched back on in its
    full weights only, and its sharded weights lose a part of their gradients.

    Args:
        adapter_name: None, and only there because TRL's `use_adapter` has it.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
