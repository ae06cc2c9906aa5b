"""Helpers of the benchmarks: counted FLOPs, interleaved timing, versions."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

_OPS = torch.ops.aten


def _scores(query: Any, key: Any, causal: bool) -> int:
    """How many scores attention computes: kernels skip what a causal square never sees. A mask they
    apply to all of them.
    """
    batch, heads, queries, _ = query
    keys = (key[2] + 1) / 2 if causal and queries == key[2] else key[2]
    return int(batch * heads * queries * keys)


def _attention_flops(
    query: Any, key: Any, value: Any, dropout: float = 0.0, causal: Any = False, *_: Any, **__: Any
) -> int:
    """Both products of attention; heads of keys may be shared."""
    return 2 * _scores(query, key, causal is True) * (query[3] + value[3])


def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *others: Any, **__: Any
) -> int:
    """Scores again, and four products for the gradients of scores, queries, keys and values."""
    causal = len(others) > 3 and others[3] is True  # after output, log-sum-exp and dropout
    return 2 * _scores(query, key, causal) * (3 * query[3] + 2 * value[3])


def _addmm_flops(bias: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _in_full(formula: Callable[..., int], tensors: int) -> Callable[..., int]:
    """Whether causal or not: a GPU's kernels take their other arguments in another order."""
    return lambda *args, **_: formula(*args[:tensors])


# torch's own formulas lack the CPU's attention, heads that share keys, and products that write to
# another data type.
_KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention")
_FORMULAS = {
    _OPS._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _OPS._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    **{
        getattr(_OPS, f"_scaled_dot_product_{name}"): _in_full(_attention_flops, 3)
        for name in _KERNELS
    },
    **{
        getattr(_OPS, f"_scaled_dot_product_{name}_backward"): _in_full(
            _attention_backward_flops, 4
        )
        for name in _KERNELS
    },
    _OPS.addmm: _addmm_flops,
}


def counted_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in one call."""
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        run()
    return counter.get_total_flops()


_PARTS = {
    "matrix products": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::addmm_",
        "aten::convolution",
    ),
    "attention": ("aten::_scaled_dot_product",),
}


def by_part(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds that one call spends in matrix products, attention and the rest.

    Each operator's own time counts, without that of the operators it calls.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    seconds = dict.fromkeys([*_PARTS, "the rest"], 0.0)
    for event in profiled.key_averages():
        part = next(
            (
                part
                for part, names in _PARTS.items()
                if event.key in names or event.key.startswith(names[-1])
            ),
            "the rest",
        )
        seconds[part] += event.self_cpu_time_total / 1e6
    return seconds


def interleaved(
    runs: dict[str, Callable[[], Any]],
    repeats: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    budget_s: float = math.inf,
) -> list[dict[str, float]]:
    """Seconds of each call in each round, in turns (A B C A B C), after one unmeasured round.

    No round begins after `budget_s` seconds, except the first measured one.
    """
    rounds: list[dict[str, float]] = []
    began = clock()
    for _ in range(repeats + 1):
        if len(rounds) > 1 and clock() - began > budget_s:
            break
        seconds = {}
        for name, run in runs.items():
            started = clock()
            run()
            seconds[name] = clock() - started
        rounds.append(seconds)
    return rounds[1:]


@dataclass(frozen=True)
class Timed:
    """Interleaved rounds by both clocks, and how busy the machine was with others.

    Attributes:
        wall, cpu: seconds of each call in each round; `cpu` sums over this process's threads.
        others: the share of the machine's cores that other processes took meanwhile; None where
            the system does not say.
    """

    wall: list[dict[str, float]]
    cpu: list[dict[str, float]]
    others: float | None


def timed(runs: dict[str, Callable[[], Any]], repeats: int, budget_s: float = math.inf) -> Timed:
    """Time calls as `interleaved` does, by wall clock and by CPU time."""
    wall: list[dict[str, float]] = []
    cpu: list[dict[str, float]] = []
    before, began = _busy_seconds(), (time.perf_counter(), time.process_time())
    for _ in range(repeats + 1):
        if len(wall) > 1 and time.perf_counter() - began[0] > budget_s:
            break
        wall.append({})
        cpu.append({})
        for name, run in runs.items():
            started = time.perf_counter(), time.process_time()
            run()
            wall[-1][name] = time.perf_counter() - started[0]
            cpu[-1][name] = time.process_time() - started[1]
    others = None
    if before is not None and (after := _busy_seconds()) is not None:
        own = time.process_time() - began[1]
        cores = (os.cpu_count() or 1) * (time.perf_counter() - began[0])
        others = max(0.0, after - before - own) / cores
    return Timed(wall[1:], cpu[1:], others)


def _busy_seconds() -> float | None:
    """Seconds that all cores have been busy since the system started; None outside Linux."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, *_ = map(int, first[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each name's median over the rounds."""
    return {name: statistics.median(values[name] for values in rounds) for name in rounds[0]}


def versions(*names: str) -> str:
    """The versions of Python and these packages, for the head of a report."""
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    )
