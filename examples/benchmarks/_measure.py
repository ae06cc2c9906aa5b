"""What the benchmarks share: counted FLOPs, the peak of living tensors, interleaved timing, versions."""

from __future__ import annotations

import gc
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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


class _Living(TorchDispatchMode):
    """Bytes of the storages made while it is open and still alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and type(leaf) is torch.Tensor:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_bytes(run: Callable[[], Any], given: list[torch.Tensor]) -> int:
    """The most bytes of tensors that live at once during a call; tensors of before (weights) do not count.

    `given` are those tensors: without them a view of one would count as new.
    """
    gc.collect()
    living = _Living()
    for tensor in given:
        storage = tensor.untyped_storage()
        living._seen[storage._cdata] = weakref.ref(storage)
    with living:
        run()
    return living.peak


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
