"""Tensors without storage: a training step runs for real but for its floating-point numbers, and
its bytes are counted.

Integers and truth values (token ids, masks, positions) stay real, since shapes depend on them; so
do small constants and pixels. All else is fake: shapes, data types and lifetimes without memory.
Knows nothing of models or trainers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vlmdpo.memory.measure import Ledger

_OPS = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_UNFILLED = (_OPS.empty.memory_format, _OPS.empty_strided.default)
_SMALL = 4096  # numbers in a constant that stays real
_SOME_NUMBER = 0.5  # what reading a fake number gives: only metrics are read


class Shadow(TorchDispatchMode):
    """While open, floating-point work is fake and everything's bytes are counted in `ledger`.

    With `small=0` constants are fake whatever their size: for making models, whose every parameter
    must be.
    """

    def __init__(
        self,
        *,
        small: int = _SMALL,
        ledger: Ledger | None = None,
        fake: FakeTensorMode | None = None,
    ) -> None:
        super().__init__()
        self.fake = fake or FakeTensorMode(allow_non_fake_inputs=True)
        self.small, self.ledger = small, ledger

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and to keep it from being so costs a third of the time."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # asked three times for every operation
            return args[0].fake_device
        out = self._run(func, args, kwargs or {})
        if self.ledger is not None:
            for tensor in _tensors(out):
                self.ledger.count(tensor.untyped_storage())
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [
            *_tensors(args),
            *(value for value in kwargs.values() if isinstance(value, torch.Tensor)),
        ]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func is _OPS._local_scalar_dense.default:
                return _read(args[0])
            args = _with_counted_indices(func, args)
            with self.fake:
                return func(*args, **kwargs)
        if tensors or not self._is_fake_constant(func, args, kwargs):
            return func(*args, **kwargs)
        with self.fake:
            return func(*args, **kwargs)

    def _is_fake_constant(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether what is made of no tensor holds floating-point numbers, and many of them or none
        yet.
        """
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        sizes = args[0] if args and isinstance(args[0], (list, tuple, torch.Size)) else ()
        count = 1
        for size in sizes:
            count *= int(size)
        return dtype.is_floating_point and bool(args) and (count > self.small or func in _UNFILLED)


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of an operator's arguments or results: they lie in tuples and lists at most."""
    if isinstance(value, torch.Tensor):
        return [value]
    return (
        [tensor for part in value for tensor in _tensors(part)]
        if isinstance(value, (tuple, list))
        else []
    )


def _read(fake: torch.Tensor) -> Any:
    if fake.dtype is torch.bool:
        return True
    return _SOME_NUMBER if fake.dtype.is_floating_point else 1


def _with_counted_indices(func: Any, args: Any) -> Any:
    """Real masks as the places they name, since a fake operation cannot count them."""
    if func not in (
        _OPS.index.Tensor,
        _OPS.index_put.default,
        _OPS.index_put_.default,
        _OPS._index_put_impl_.default,
    ):
        return args
    indices: list[Any] = []
    for index in args[1]:
        if (
            isinstance(index, torch.Tensor)
            and index.dtype is torch.bool
            and not isinstance(index, FakeTensor)
        ):
            indices += list(index.nonzero(as_tuple=True))
        else:
            indices.append(index)
    return (args[0], indices, *args[2:])


@contextlib.contextmanager
def not_traced() -> Iterator[None]:
    """Inside, transformers does not take fake tensors for a traced model: it would keep masks that
    a run leaves out.
    """
    with mock.patch("transformers.utils.import_utils.is_fake_tensor", return_value=False):
        yield
