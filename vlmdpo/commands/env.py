"""`vlmdpo env`: what a bug report needs, without secrets: versions, GPUs, memory, settings."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from vlmdpo import __version__, ui
from vlmdpo.config import EnvConfig

_NEEDED = (
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
    """The report. Downloads nothing and loads no model."""
    import psutil
    import torch

    return {
        "versions": {"vlmdpo": __version__} | {name: _version(name) for name in _NEEDED},
        "install": _install(),
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


def _install() -> dict[str, Any]:
    """How the running package came here: "wheel", "editable" or "source tree"; where; its commit.

    Of a wheel the commit is known where pip built it from version control (PEP 610). A checkout is
    asked for its own, and "dirty" says whether tracked files differ from it.
    """
    package = Path(__file__).resolve().parent.parent
    for found in distributions(name="vlmdpo"):  # another installation may come first on the path
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            source = Path(url2pathname(urlsplit(origin["url"]).path)).resolve()
            if source == package.parent:
                return {"how": "editable", "where": str(source), **_commit(source)}
        elif (
            found.read_text("RECORD")
            and Path(str(found.locate_file("vlmdpo"))).resolve() == package
        ):
            commit = origin.get("vcs_info", {}).get("commit_id")
            return {"how": "wheel", "where": str(package), "commit": commit, "dirty": None}
    return {"how": "source tree", "where": str(package.parent), **_commit(package.parent)}


def _commit(source: Path) -> dict[str, Any]:
    """The commit of a checkout, or None outside of one, without git, or where git refuses it."""
    unknown = {"commit": None, "dirty": None}
    if not (source / ".git").exists():  # a repository further up is another project's
        return unknown
    git = ("git", "-C", str(source))
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:
        return unknown
    if head.returncode or status.returncode:
        return unknown
    return {"commit": head.stdout.strip(), "dirty": bool(status.stdout)}


def _gpu(torch: Any, number: int) -> str:
    facts = torch.cuda.get_device_properties(number)
    capability = f"compute capability {facts.major}.{facts.minor}"
    return f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB, {capability}"


def show(report: dict[str, Any]) -> None:
    """Print it as a Markdown list, to be pasted into an issue."""
    for name, found in report["versions"].items():
        ui.result(f"- {name}: {found or 'not installed'}")
    install = report["install"]
    commit = f", commit {install['commit']}" if install["commit"] else ", commit unknown"
    dirty = " (with uncommitted changes)" if install["dirty"] else ""
    ui.result(f"- installed: {install['how']}, {install['where']}{commit}{dirty}")
    optional = ", ".join(f"{name} {found}" for name, found in report["optional"].items())
    ui.result(f"- optional packages: {optional or 'none'}")
    for name in ("python", "platform", "cpu", "memory", "disk"):
        ui.result(f"- {name}: {report[name]}")
    ui.result(f"- CUDA of PyTorch: {report['cuda'] or 'none (a CPU build)'}")
    ui.result(f"- GPUs: {'; '.join(report['gpus']) or 'none'}")
    settings = ", ".join(f"{name}={value}" for name, value in report["settings"].items())
    ui.result(f"- environment: {settings or 'nothing set'}")
