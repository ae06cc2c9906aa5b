"""Which device a process computes on. Without transformers: a launcher's own process asks too."""

from __future__ import annotations

import os

import torch

from vlmdpo.errors import ModelError


def pick_device(device: str) -> torch.device:
    """The device that `--device` names. Raises ModelError where there is none such.

    "auto" and "cuda" are a GPU of this process's own where a launcher started several. No GPU is
    initialized: that takes some hundred megabytes on it, and a process of many must not take them
    on the first.
    """
    if device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        picked = torch.device("cuda" if device == "auto" else device)
        if picked.type != "cuda":
            torch.empty(0, device=picked)
            return picked
    except (RuntimeError, AssertionError) as problem:
        raise _no_such_device(device, str(problem).splitlines()[0]) from problem
    if not torch.cuda.is_available():
        has_cuda = torch.backends.cuda.is_built()
        raise _no_such_device(
            device, "no GPU is visible" if has_cuda else "PyTorch was installed without CUDA"
        )
    gpus = torch.cuda.device_count()
    if picked.index is not None and picked.index >= gpus:
        raise _no_such_device(device, f"visible GPUs are numbered from 0 to {gpus - 1}")
    if "LOCAL_RANK" not in os.environ:
        return picked
    # As accelerate does it: launchers may also show each process one GPU only.
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus)
    if picked.index not in (None, own.index):
        raise _no_such_device(
            device, "each process of this run has a GPU of its own; use --device cuda"
        )
    return own


def _no_such_device(device: str, reason: str) -> ModelError:
    return ModelError(f"--device: '{device}' is not available here: {reason}")
