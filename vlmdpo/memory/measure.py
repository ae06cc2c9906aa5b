"""The peak memory of a call, measured: by PyTorch's own counter on a CUDA device, by the tensors
alive elsewhere.

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


class Ledger:
    """Bytes of the storages that live now, and the most there were since `start`."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def start(self) -> None:
        """From now on `peak` is of what comes."""
        self.peak = self.now

    def pass_over(self, storage: torch.UntypedStorage) -> None:
        """A storage that is never counted."""
        self._seen[storage._cdata] = weakref.ref(storage)

    def count(self, storage: torch.UntypedStorage) -> None:
        """A storage that lives; counted once, until it is gone."""
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


class _Living(TorchDispatchMode):
    """Counts the storages made while it is open in a ledger; those of the given tensors are passed
    over.
    """

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.ledger = Ledger()
        for tensor in given:
            self.ledger.pass_over(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if type(leaf) is torch.Tensor:
                self.ledger.count(leaf.untyped_storage())
        return out


def peak_bytes(run: Callable[[], Any], given: Iterable[torch.Tensor], device: torch.device) -> int:
    """The most bytes of tensors that live at once during a call; those of before do not count.

    Args:
        run: what to measure.
        given: the tensors of before that the call uses, such as weights; a view of one would else
            count as new.
        device: where the tensors are. On "cuda" PyTorch's counter is read, which rounds each tensor
            up to 512 bytes.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _Living(given) as living:
        run()
    return living.ledger.peak
