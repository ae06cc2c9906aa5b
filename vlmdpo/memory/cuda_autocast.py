"""CUDA's autocast rules on a CPU, where autocast leaves norms and sums in bfloat16.

Source: "CUDA Ops that can autocast to float32" in https://docs.pytorch.org/docs/stable/amp.html.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FLOAT32_FUNCTIONS = frozenset(
    (
        *("layer_norm", "rms_norm", "group_norm", "norm", "cosine_similarity", "logsumexp"),
        *("softmax", "log_softmax", "softplus", "cross_entropy", "nll_loss", "kl_div"),
        *("exp", "expm1", "log", "log1p", "pow", "reciprocal", "rsqrt", "__pow__", "__rpow__"),
        *("sum", "prod", "cumsum", "cumprod", "sinh", "cosh", "tan", "acos", "asin"),
    )
)
_HALF = (torch.bfloat16, torch.float16)


class CudaAutocastRules(TorchFunctionMode):
    """While open, functions that autocast runs in float32 on CUDA do so on the CPU too.

    Only where autocast is on.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _FLOAT32_FUNCTIONS and torch.is_autocast_enabled("cpu"):
            args = tuple(_in_float32(value) for value in args)
            kwargs = {key: _in_float32(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _in_float32(value: Any) -> Any:
    is_half = isinstance(value, torch.Tensor) and value.dtype in _HALF
    return value.float() if is_half else value
