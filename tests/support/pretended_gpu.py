"""A pretended CUDA device: tensors that say `cuda:0` and hold numbers in main memory.

Inside `PretendedGpu` everything that a forward pass does on a GPU happens, at the size of a test:
operations that mix devices raise an error, as there; CUDA's autocast decides on data types; and
each time the host waits for the device is counted, by the line that made it wait. There is no
backward pass, because autograd asks the real driver for streams.
"""

import contextlib
import ctypes
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import filelock
import torch
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

import vlmdpo

CUDA = torch.device("cuda:0")
_OWN_CODE = f"{Path(vlmdpo.__file__).parent}/"
_SITE_PACKAGES = f"{Path(torch.__file__).parent.parent}/"
# PyTorch asks a device guard for the current device around every operation.
_DEVICE_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar registrar(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""
# Operations whose result the host must see: a number, or the size of a tensor.
_WAITING = {
    **dict.fromkeys(("_local_scalar_dense", "equal"), "a number is read"),
    **dict.fromkeys(
        ("nonzero", "masked_select", "bincount", "repeat_interleave"), "a size is read"
    ),
    **dict.fromkeys(("_unique", "_unique2", "unique_dim", "unique_consecutive"), "a size is read"),
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class MixedDevices(RuntimeError):
    """One operation on tensors of both devices."""


@dataclass(frozen=True, order=True)
class Wait:
    """A place where the host waits for the device.

    Attributes:
        line: "package/file.py:line function" of the innermost code outside of PyTorch.
        caller: the innermost line of vlmdpo, which may be the same.
        reason: what it waits for.
    """

    line: str
    caller: str
    reason: str

    @property
    def is_ours(self):
        """Whether vlmdpo's own code waits, and not a library that it calls."""
        return self.line == self.caller


def why_not():
    """Why no device can be pretended here; None where one can."""
    if torch.cuda.is_available():
        return "there is a GPU, whose device guard must not be replaced"
    return None if _compiler() else "there is no C++ compiler for the device guard"


def _compiler():
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def load_device_guard(folder):
    """Compile the device guard into `folder`, once for all test processes, and load it."""
    library = Path(folder) / f"device_guard-{torch.__version__}.so"
    with filelock.FileLock(f"{library}.lock"):
        if not library.is_file():
            source, partial = library.with_suffix(".cpp"), library.with_suffix(".partial")
            source.write_text(_DEVICE_GUARD)
            options = ["-shared", "-fPIC", "-std=c++20", "-o", partial, source, "-lc10"]
            options += [f"-I{path}" for path in cpp_extension.include_paths()]
            options += [f"-L{path}" for path in cpp_extension.library_paths()]
            subprocess.run([_compiler(), *options], check=True)
            partial.rename(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class GpuTensor(torch.Tensor):
    """Says `cuda:0` and holds its numbers in `inner`, a CPU tensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CUDA,
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on a pretended GPU outside of PretendedGpu")

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy ({_stack()[0]})")

    __array__ = numpy

    def __repr__(self):
        return f"GpuTensor({tuple(self.shape)}, {self.dtype})"


def _stack():
    """(innermost line outside of PyTorch, innermost line of vlmdpo or "")."""
    frame, line = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        is_torch = file.startswith((f"{_SITE_PACKAGES}torch/", "<")) or file == __file__
        if not is_torch:
            name = file.removeprefix(_OWN_CODE).removeprefix(_SITE_PACKAGES)
            here = f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
            line = line or here
            if file.startswith(_OWN_CODE):
                return line, here
        frame = frame.f_back
    return line, ""


class PretendedGpu(TorchDispatchMode):
    """Inside, `cuda` is a device. Load the device guard first.

    Attributes:
        waits: how often the host has waited, by `Wait`.
    """

    def __init__(self):
        super().__init__()
        self.waits = Counter()
        self.flash_calls = []  # (shape of the queries, of the keys, options) of flash attention
        self._patches = contextlib.ExitStack()

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # nothing is compiled here, and the guard against it costs time

    def __enter__(self):
        patch = self._patches.enter_context
        for name, value in {
            "is_available": True,
            "device_count": 1,
            "current_device": 0,
            "is_bf16_supported": True,
            "get_device_capability": (9, 0),
            "get_device_name": "pretended GPU",
            "set_device": None,
            "_lazy_init": None,
        }.items():
            patch(mock.patch.object(torch.cuda, name, lambda *a, value=value, **k: value))
        patch(mock.patch.object(torch.Tensor, "pin_memory", _pinned))
        patch(mock.patch.object(torch, "tensor", _with_numbers_read(torch.tensor)))
        # `Module.to` then makes new parameters, where it would change the device of old ones.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        # Else `torch.tensor(..., device="cuda")` would ask the driver for memory.
        torch._C._set_only_lift_cpu_tensors(True)
        self._patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        return super().__enter__()

    def __exit__(self, *problem):
        super().__exit__(*problem)
        self._patches.close()

    def place(self, module):
        """Move a module to the device, with tied parameters tied."""
        moved = {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and not isinstance(parameter, GpuTensor):
                    moved.setdefault(
                        parameter,
                        torch.nn.Parameter(GpuTensor(parameter.data), parameter.requires_grad),
                    )
                    part._parameters[name] = moved[parameter]
            for name, buffer in part._buffers.items():
                if buffer is not None and not isinstance(buffer, GpuTensor):
                    part._buffers[name] = GpuTensor(buffer)
        return module

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2]
        tensors = list(_tensors((args, kwargs)))
        is_on_gpu = [isinstance(tensor, GpuTensor) for tensor in tensors]
        device = kwargs.get("device")
        device = torch.device(device) if device is not None else None
        if name == "_fused_sdp_choice" and any(is_on_gpu):
            return 0  # attention by plain operations, which a CPU has too
        if name == "_scaled_dot_product_flash_attention" and any(is_on_gpu):
            self.flash_calls.append((tuple(args[0].shape), tuple(args[1].shape), kwargs))
            return (_lower_right_attention(*args[:3], kwargs["scale"]),)
        if not any(is_on_gpu) and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        if any(is_on_gpu):
            self._check_devices(func, name, args, tensors)
            self._count_waits(name, args, kwargs, device)
        elif tensors:
            self._count_copy_to_device(tensors[0], kwargs)
        result = self._run(func, args, kwargs, device)
        to_cpu = device is not None and device.type == "cpu"
        if func._schema.is_mutable:
            return _mutated(func, args, kwargs)
        return result if to_cpu else _map(_wrap, result)

    @staticmethod
    def _run(func, args, kwargs, device):
        """The operation on the CPU tensors behind its arguments."""
        if device is not None:
            kwargs["device"] = torch.device("cpu")
            if func is torch.ops.aten._to_copy.default and kwargs.pop("non_blocking", False):
                pass  # the CPU's own copy is never asynchronous
        kwargs.pop("pin_memory", None)
        return func(*_map(_unwrap, args), **_map(_unwrap, kwargs))

    @staticmethod
    def _check_devices(func, name, args, tensors):
        """Raise MixedDevices where CUDA would: numbers of no dimension may be on any device."""
        if name in ("copy_", "_to_copy"):
            return
        if name in _INDEXING:  # the indices may be on the CPU
            values = args[2:3] if len(args) > 2 else ()
            tensors = [args[0], *(v for v in values if isinstance(v, torch.Tensor))]
            if not isinstance(args[0], GpuTensor):
                raise MixedDevices(f"{func}: CPU tensor indexed by CUDA tensor at {_stack()[0]}")
        wrong = [
            tuple(tensor.shape)
            for tensor in tensors
            if not isinstance(tensor, GpuTensor) and tensor.dim() and tensor.device.type == "cpu"
        ]
        if wrong:
            raise MixedDevices(f"{func}: CUDA tensors with CPU tensors {wrong} at {_stack()[0]}")

    def _count_waits(self, name, args, kwargs, device):
        if name in _WAITING and kwargs.get("output_size") is None:
            self._count(_WAITING[name])
        if name in _INDEXING:
            indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self._count("a size is read")
            if not all(isinstance(index, GpuTensor) for index in indices):
                self._count("copy to the device")
        if name == "_to_copy" and device is not None and device.type == "cpu":
            self._count("copy to the host")
        if name == "copy_" and not isinstance(args[0], GpuTensor):
            self._count("copy to the host")
        if name == "copy_" and not isinstance(args[1], GpuTensor):
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            self._count_copy_to_device(args[1], {"non_blocking": not blocking})

    def _count_copy_to_device(self, source, kwargs):
        """Only what is copied out of pinned memory, and not waited for, does not hold the host."""
        is_pinned = getattr(source, "is_pretended_pinned", False)
        if not (kwargs.get("non_blocking") and is_pinned):
            self._count("copy to the device")

    def _count(self, reason):
        self.waits[Wait(*_stack(), reason)] += 1


def _lower_right_attention(query, key, value, scale):
    """What flash attention computes, causal with its last query at the last key."""
    q, k = query.shape[2], key.shape[2]
    hidden = torch.ones(q, k, device=query.device, dtype=torch.bool).triu(k - q + 1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
    return scores.float().softmax(-1).to(query.dtype) @ value


def _with_numbers_read(make):
    """`torch.tensor`, which reads the tensors in a list of them, beside the dispatcher."""

    def numbers(data):
        if isinstance(data, (list, tuple)):
            return [numbers(value) for value in data]
        return data.item() if isinstance(data, GpuTensor) else data

    return lambda data, *args, **kwargs: make(numbers(data), *args, **kwargs)


def _pinned(tensor, *args):
    """In place of `Tensor.pin_memory`."""
    copy = tensor.detach().clone()
    copy.is_pretended_pinned = True
    return copy


def _tensors(value):
    """The tensors in nested tuples, lists and dictionaries. PyTorch's own pytrees take longer."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _map(change, value):
    """A nested value with each tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_map(change, part) for part in value])
    if isinstance(value, dict):
        return {name: _map(change, part) for name, part in value.items()}
    return value


def _unwrap(value):
    return value.inner if isinstance(value, GpuTensor) else value


def _wrap(value):
    return value if isinstance(value, GpuTensor) else GpuTensor(value)


def _mutated(func, args, kwargs):
    """The arguments that an operation has written to, which it returns."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    written = [
        given[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    count = len(func._schema.returns)
    for tensor in _tensors(written):
        if isinstance(tensor, GpuTensor):
            assert tensor.shape == tensor.inner.shape, f"{func} changes a shape in place"
    return tuple(written) if count > 1 else written[0] if count else None
