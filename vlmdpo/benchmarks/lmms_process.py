"""lmms-eval's command line, run in a process of its own: the tasks it has, and one model's answers.

It is a process because lmms-eval loads the model itself, in its own way, and gives the memory back
when it ends.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

from vlmdpo.benchmarks.lmms import results_file
from vlmdpo.errors import (
    ConfigError,
    DataError,
    MemoryBudgetError,
    MissingDependencyError,
    ModelError,
    Preempted,
    VlmDpoError,
    install_command,
    is_out_of_memory,
    nearest,
)

PACKAGE = "lmms_eval"
LIST_COMMAND = "python -m lmms_eval --tasks list"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LOG_LINE = re.compile(r"^\S+ \S+ \| (?:ERROR|CRITICAL) +\| \S+ - ")
_END_S = 10  # for lmms-eval to end by itself


def installed_version() -> str:
    """lmms-eval's version. Raises MissingDependencyError where it is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise MissingDependencyError(
            f"--benchmark lmms:TASK needs lmms-eval: {install_command(extra='lmms')}"
        )
    try:
        return version("lmms-eval")
    except PackageNotFoundError:  # run from its source tree
        return "unknown"


def check_tasks(tasks: Sequence[str], arguments: Sequence[str] = ()) -> None:
    """Raise ConfigError for a task that lmms-eval does not have, before any model is loaded.

    Args:
        tasks: names, patterns with "*", or files of tasks.
        arguments: more of its command line, as `--include_path`.

    Raises DataError if lmms-eval cannot be started.
    """
    if Path(",".join(tasks)).is_dir():  # it would look for tasks in there, and find none
        raise ConfigError(
            f"--benchmark: lmms-eval takes '{','.join(tasks)}' for the folder of that name here; "
            "start in another folder"
        )
    found = subprocess.run(
        [sys.executable, "-m", PACKAGE, *arguments, "--tasks", "list"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    output = _COLOURS.sub("", found.stdout)
    known = re.findall(r"^ *- (\S+)$", output.partition("Available Tasks:")[2], re.MULTILINE)
    if not known:
        raise DataError(f"lmms-eval lists no tasks: {_reason(output)}")
    for task in tasks:
        if task not in known and "*" not in task and not Path(task).is_file():
            raise ConfigError(
                f"--benchmark: lmms-eval has no task '{task}'.{nearest(task, known)} List them: "
                f"{LIST_COMMAND}"
            )


def answer(arguments: Sequence[str], folder: Path, log: Path) -> None:
    """Run lmms-eval, which writes its results and samples to `folder` and all it prints to `log`.

    Raises:
        DataError: the log cannot be written.
        ModelError, MemoryBudgetError: it left no results; with its own last words.
        Preempted: SIGTERM, after lmms-eval was stopped.
    """
    command = [sys.executable, "-m", PACKAGE, *arguments, "--output_path", str(folder)]
    try:
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
            with _stopped_at_the_end(process):
                process.wait()
    except OSError as problem:
        raise DataError(f"cannot write '{log}': {problem.strerror or problem}") from problem
    # It exits with 0 after an error, too.
    if process.returncode or results_file(folder) is None:
        raise _failure(process.returncode, log)


def _failure(exit_code: int, log: Path) -> VlmDpoError:
    reason = _reason(log.read_text(encoding="utf-8", errors="replace"))
    if is_out_of_memory(RuntimeError(reason)):
        return MemoryBudgetError(
            f"lmms-eval ran out of memory: {reason}; see '{log}', and try a smaller --batch_size "
            "in --lmms-args"
        )
    return ModelError(f"lmms-eval left no results (exit code {exit_code}): {reason}; see '{log}'")


@contextlib.contextmanager
def _stopped_at_the_end(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """However this block is left, lmms-eval is not left running; SIGTERM leaves it as Preempted."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted("SIGTERM: finished models are kept; repeat the command to continue")

    is_main = threading.current_thread() is threading.main_thread()  # only it may set handlers
    before = signal.signal(signal.SIGTERM, stop) if is_main else None
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _reason(output: str) -> str:
    """The last error in lmms-eval's output, else its last line."""
    lines = [line.strip() for line in _COLOURS.sub("", output).splitlines() if line.strip()]
    logged = [_LOG_LINE.sub("", line) for line in lines if _LOG_LINE.search(line)]
    raised = [line for line in lines if re.match(r"[\w.]*(?:Error|Exception)\b.*: ", line)]
    return (raised or logged or lines or ["it printed nothing"])[-1].rstrip(".")
