"""What the benchmarks share: counted FLOPs, interleaved timing, versions."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_OPS = torch.ops.aten
# torch counts the attention kernels of GPUs; these are the CPU's.
_CPU_ATTENTION = {
    _OPS._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, out_shape=None, **more: sdpa_flop_count(q, k, v),
    _OPS._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *rest, out_shape=None, **more: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def counted_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in one call."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, taken in turns A B C A B C, after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def versions(*names: str) -> str:
    """Python's and these packages' versions, for a report's head."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])
