"""Tensors without storage, to run a step without its floating-point numbers and count its bytes.

Integers and booleans (token ids, masks, positions) stay real, since shapes depend on them; so do
small constants and pixels. All else is fake: shapes, data types and lifetimes without memory. Knows
nothing of models or trainers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vlmdpo.memory.measure import AllocationLedger

_OPS = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_UNFILLED = (_OPS.empty.memory_format, _OPS.empty_strided.default)
# The product that experts run as; older PyTorch has none.
_GROUPED_PRODUCT = _OPS._grouped_mm.default if hasattr(_OPS, "_grouped_mm") else object()
_INDEXING = (
    *(_OPS.index.Tensor, _OPS.index_put.default),
    *(_OPS.index_put_.default, _OPS._index_put_impl_.default),
)
_SMALL_CONSTANT = 4096  # numbers in a constant that stays real
_FAKE_FLOAT = 0.5  # what reading a fake number gives: only metrics are read


class SimulationMode(TorchDispatchMode):
    """While open, floating-point work is fake, and the bytes of all tensors are counted.

    Args:
        small_constant: constants with more numbers are fake. 0 makes all of them fake, for building
            models, whose every parameter must be.
        ledger: where bytes are counted; None for nowhere.
        fake_mode: to continue with the fake tensors of an earlier one.
    """

    def __init__(
        self,
        *,
        small_constant: int = _SMALL_CONSTANT,
        ledger: AllocationLedger | None = None,
        fake_mode: FakeTensorMode | None = None,
    ) -> None:
        super().__init__()
        self.fake_mode = fake_mode or FakeTensorMode(allow_non_fake_inputs=True)
        self.small_constant, self.ledger = small_constant, ledger

    # Nothing is compiled here, and PyTorch's guard against it costs a third of the time.
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    # Every operation of the step passes here: it runs fake or real, and its results are counted.
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # asked three times for every operation
            return args[0].fake_device
        out = self._run(func, args, kwargs or {})
        if self.ledger is not None:
            for tensor in _tensors(out):
                self.ledger.add(tensor.untyped_storage())
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [
            *_tensors(args),
            *(value for value in kwargs.values() if isinstance(value, torch.Tensor)),
        ]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func is _OPS._local_scalar_dense.default:
                return _read_scalar(args[0])
            args = _with_index_positions(func, args)
            with self.fake_mode:
                if func is _GROUPED_PRODUCT:
                    return _empty_grouped_product(*args[:3])
                return func(*args, **kwargs)
        if tensors or not self._is_fake_constant(func, args, kwargs):
            return func(*args, **kwargs)
        with self.fake_mode:
            return func(*args, **kwargs)

    def _is_fake_constant(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a tensor made from no other holds floating-point numbers: many, or none yet."""
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        sizes = args[0] if args and isinstance(args[0], (list, tuple, torch.Size)) else ()
        count = 1
        for size in sizes:
            count *= int(size)
        is_large = count > self.small_constant or func in _UNFILLED
        return dtype.is_floating_point and bool(args) and is_large


def _tensors(value: object) -> list[torch.Tensor]:
    """The tensors of an operator's arguments or results, which lie in tuples and lists at most."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _read_scalar(fake: torch.Tensor) -> bool | int | float:
    if fake.dtype is torch.bool:
        return True
    return _FAKE_FLOAT if fake.dtype.is_floating_point else 1


def _with_index_positions(func: Any, args: Any) -> Any:
    """Replace real masks by the positions they select, which a fake operation cannot count."""
    if func not in _INDEXING:
        return args
    indices: list[torch.Tensor | None] = []
    for index in args[1]:
        is_mask = isinstance(index, torch.Tensor) and index.dtype is torch.bool
        if is_mask and not isinstance(index, FakeTensor):
            indices += list(index.nonzero(as_tuple=True))
        else:
            indices.append(index)
    return (args[0], indices, *args[2:])


def _empty_grouped_product(
    left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor | None
) -> torch.Tensor:
    """What `torch._grouped_mm` returns, the product that experts run as, without its values.

    PyTorch's own rule for fake tensors knows bfloat16 only, though the product is made of float32
    as well. Where both are matrices, the rows of each of the groups that `ends` tells are summed,
    as in a weight's gradient.
    """
    shape = [left.shape[-2], right.shape[-1]]
    if left.dim() == right.dim():
        assert ends is not None or left.dim() == 3
        shape.insert(0, ends.shape[0] if ends is not None else left.shape[0])
    return left.new_empty(shape)


@contextlib.contextmanager
def hide_fake_tensors() -> Iterator[None]:
    """Inside, transformers does not mistake fake tensors for tracing.

    If it did, it would keep attention masks that a real run leaves out.
    """
    with mock.patch("transformers.utils.import_utils.is_fake_tensor", return_value=False):
        yield


@contextlib.contextmanager
def without_tracebacks() -> Iterator[None]:
    """Inside, PyTorch does not log the traceback of an operation that fails on fake tensors."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")

    def is_of_another_kind(record: logging.LogRecord) -> bool:
        return "failed while attempting to run meta" not in str(record.msg)

    logger.addFilter(is_of_another_kind)
    try:
        yield
    finally:
        logger.removeFilter(is_of_another_kind)
