"""CUDA's autocast rules on a CPU, where autocast leaves norms and softmax in bfloat16.

Source: "CUDA Ops that can autocast to float32" in https://docs.pytorch.org/docs/stable/amp.html. Of
that list, these are the functions that vision-language models call on bfloat16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any
from unittest import mock

import torch

_HALF = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def cuda_autocast_rules() -> Iterator[None]:
    """Inside, these functions compute in float32 wherever the CPU's autocast is on."""
    # Replaced one by one: a `TorchFunctionMode` would not see layers that recompute, because
    # PyTorch runs the whole backward pass outside of it.
    with contextlib.ExitStack() as replaced:
        for name in ("layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax"):
            function = getattr(torch.nn.functional, name)
            replaced.enter_context(
                mock.patch.object(torch.nn.functional, name, _in_float32(function))
            )
        yield


def _in_float32(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(function)
    def autocast(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(_float32(value) for value in args)
            kwargs = {key: _float32(value) for key, value in kwargs.items()}
        return function(*args, **kwargs)

    return autocast


def _float32(value: Any) -> Any:
    is_half = isinstance(value, torch.Tensor) and value.dtype in _HALF
    return value.float() if is_half else value
