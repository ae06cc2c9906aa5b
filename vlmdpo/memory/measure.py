"""The peak memory of a call: by PyTorch's own counter on CUDA, elsewhere by the live tensors.

Knows nothing of models: it runs what it is given and looks at storages.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationLedger:
    """Bytes of the storages that are alive now, and the most there were since `reset_peak`."""

    def __init__(self) -> None:
        self.current_bytes = self.peak_bytes = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def reset_peak(self) -> None:
        """From now on `peak_bytes` is of what follows."""
        self.peak_bytes = self.current_bytes

    def ignore(self, storage: torch.UntypedStorage) -> None:
        """Never count this storage."""
        self._seen[storage._cdata] = weakref.ref(storage)

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a live storage once, until it is freed."""
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()

        def freed(_: object) -> None:
            self._seen.pop(key, None)
            self.current_bytes -= size

        self._seen[key] = weakref.ref(storage, freed)
        self.current_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)


class _LiveTensorMode(TorchDispatchMode):
    """While open, counts the storages that operations make; those of `given` are ignored."""

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.ledger = AllocationLedger()
        for tensor in given:
            self.ledger.ignore(tensor.untyped_storage())

    # Without CUDA nothing counts bytes, so every operation's results are looked at.
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if type(leaf) is torch.Tensor:
                self.ledger.add(leaf.untyped_storage())
        return out


def measure_peak_bytes(
    run: Callable[[], object], given: Iterable[torch.Tensor], device: torch.device
) -> int:
    """The most bytes of tensors alive at once during a call, without those from before it.

    Args:
        run: what to measure.
        given: tensors from before that the call uses, such as weights; a view of one would
            otherwise count as new.
        device: where the tensors are. On "cuda" PyTorch's counter is read, which rounds each
            tensor up to 512 bytes.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensorMode(given) as live:
        run()
    return live.ledger.peak_bytes
