"""`vlmdpo env`: what a bug report needs, and nothing secret: versions, GPUs, memory, the settings
that change what happens.
"""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.config import EnvConfig

_NEEDED = (
    "vlmdpo",
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "pillow",
    "numpy",
    "huggingface_hub",
)
_OPTIONAL = (
    "bitsandbytes",
    "deepspeed",
    "flash-attn",
    "gradio",
    "nltk",
    "spacy",
    "torchvision",
    "vllm",
)
_SETTINGS = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "NO_COLOR",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def run(config: EnvConfig) -> dict[str, Any]:
    """Look around; nothing is downloaded, and no model loaded."""
    import psutil
    import torch

    return {
        "versions": {name: _version(name) for name in _NEEDED},
        "optional": {name: found for name in _OPTIONAL if (found := _version(name)) is not None},
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpu": f"{os.cpu_count()} cores, {platform.machine()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB, "
        f"{psutil.virtual_memory().available / 2**30:.1f} GiB free",
        "disk": f"{ui.human_bytes(shutil.disk_usage(Path.cwd()).free)} free in the working folder",
        "cuda": torch.version.cuda,
        "gpus": [_gpu(torch, number) for number in range(torch.cuda.device_count())],
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu(torch: Any, number: int) -> str:
    facts = torch.cuda.get_device_properties(number)
    return f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB, compute capability {facts.major}.{facts.minor}"


def show(report: dict[str, Any]) -> None:
    """Print it as a Markdown list, to be pasted into an issue."""
    for name, found in report["versions"].items():
        ui.result(f"- {name}: {found or 'not installed'}")
    optional = ", ".join(f"{name} {found}" for name, found in report["optional"].items())
    ui.result(f"- optional packages: {optional or 'none'}")
    for name in ("python", "platform", "cpu", "memory", "disk"):
        ui.result(f"- {name}: {report[name]}")
    ui.result(f"- CUDA of PyTorch: {report['cuda'] or 'none (a CPU build)'}")
    ui.result(f"- GPUs: {'; '.join(report['gpus']) or 'none'}")
    ui.result(
        "- environment: "
        f"{', '.join(f'{name}={value}' for name, value in report['settings'].items()) or 'nothing set'}"
    )
