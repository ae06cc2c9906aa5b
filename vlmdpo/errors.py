"""The errors that a user can cause, each with its exit code.

A message says where, what, and what to do next, in one or two lines. Any other exception is a bug
in vlmdpo: it keeps its traceback, and the exit code is 1.
"""

from __future__ import annotations

import difflib
import errno
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar


class VlmDpoError(Exception):
    """An error that the user can fix. `exit_code` is the exit status of the process."""

    exit_code: ClassVar[int] = 1


class ConfigError(VlmDpoError):
    """An option or recipe key that is unknown, out of range, or at odds with another."""

    exit_code = 2


class DataError(VlmDpoError):
    """A dataset, image, answer file or output folder that cannot be used."""

    exit_code = 3


class ModelError(VlmDpoError):
    """A model, processor or adapter that cannot be found or loaded, or has the wrong kind."""

    exit_code = 4


class MemoryBudgetError(VlmDpoError):
    """What was asked for does not fit into memory, of the GPU or of the machine."""

    exit_code = 5


class MissingDependencyError(VlmDpoError):
    """An optional package is missing; the message has the command that installs it."""

    exit_code = 6


class ProcessError(VlmDpoError):
    """One of the run's processes died, or cannot be started."""

    exit_code = 7


class PeerLost(ProcessError):
    """Another process died, which this one noticed; not the cause."""


class EndpointError(VlmDpoError):
    """A server that vlmdpo was told to ask cannot be reached, or refuses."""

    exit_code = 8


class Preempted(VlmDpoError):
    """SIGTERM: finished work is kept, and a scheduler may requeue the command (EX_TEMPFAIL)."""

    exit_code = 75


class Interrupted(VlmDpoError):
    """Ctrl-C: finished work is kept, and the message says how to continue."""

    exit_code = 130


# torch.OutOfMemoryError ("CUDA out of memory. Tried to allocate ..."), what the driver, cuBLAS and
# cuDNN say ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling ..."), and the
# machine's memory ("DefaultCPUAllocator: can't allocate memory: ...").
_OUT_OF_MEMORY = re.compile(
    r"out of memory|_STATUS_ALLOC_FAILED|can(?:'t|not) allocate memory", re.IGNORECASE
)


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    if isinstance(problem, MemoryError):
        return True
    if isinstance(problem, OSError):
        return problem.errno == errno.ENOMEM
    return isinstance(problem, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(problem)))


def out_of_memory_reason(problem: BaseException) -> str:
    """What ran out, and how much was asked for, in the words of who noticed; without advice."""
    lines = str(problem).strip().splitlines() or ["the machine's memory is full"]
    # PyTorch says in sentences what failed, the size, what is free, and then how to set variables.
    sentences = re.split(r"(?<=[.])\s+(?=[A-Z])", lines[0])
    return " ".join(sentences[:3]).rstrip(".")


def nearest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for a misspelled name, or "" if no name is close."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def install_command(*packages: str, extra: str = "") -> str:
    """The pip command that installs packages, and the requirements of an extra of vlmdpo.

    vlmdpo is on no package index, so an extra is given as its requirements in the installed
    metadata: `pip install 'gradio>=6.0'`. Without metadata, vlmdpo runs from a source tree, and the
    command installs that tree with the extra.
    """
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    wanted = list(packages)
    if extra:
        try:
            listed = [Requirement(line) for line in requires("vlmdpo") or ()]
        except PackageNotFoundError:
            listed = []
        of_extra = [
            found for found in listed if found.marker and found.marker.evaluate({"extra": extra})
        ]
        for found in of_extra:
            found.marker = None
        source_tree = Path(__file__).resolve().parent.parent
        wanted += [str(found) for found in of_extra] or [f"{source_tree}[{extra}]"]
    return shlex.join(("pip", "install", *wanted))
