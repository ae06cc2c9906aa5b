"""What the benchmarks share: counted FLOPs, interleaved timing, versions."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_OPS = torch.ops.aten


def _computed(q: Sequence[int], k: Sequence[int], causal: bool) -> float:
    """The share of the scores that attention computes: without mask it skips what lies after the diagonal."""
    return (k[-2] + 1) / (2 * k[-2]) if causal and q[-2] == k[-2] else 1.0


def _forward(q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, **more: Any) -> float:
    return sdpa_flop_count(q, k, v) * _computed(q, k, causal)


def _backward(grad: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, dropout: float, causal: bool, **more: Any) -> float:
    return sdpa_backward_flop_count(grad, q, k, v) * _computed(q, k, causal)


# torch counts the attention kernels of GPUs; these are the CPU's.
_CPU_ATTENTION = {
    _OPS._scaled_dot_product_flash_attention_for_cpu: _forward,
    _OPS._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


def counted_flops(run: Callable[[], Any]) -> float:
    """Floating-point operations of matrix products, convolutions and attention in one call."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> list[dict[str, float]]:
    """Seconds of each call in each round, taken in turns A B C A B C, after one unmeasured round."""
    rounds = []
    for _ in range(repeats + 1):
        seconds = {}
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - started
        rounds.append(seconds)
    return rounds[1:]


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each name's median over the rounds."""
    return {name: statistics.median(values[name] for values in rounds) for name in rounds[0]}


def versions(*names: str) -> str:
    """Python's and these packages' versions, for a report's head."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])
