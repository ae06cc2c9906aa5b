"""Run one command in several processes, through accelerate, as if it were one process.

The command's own process becomes the parent: it writes the settings to a file, starts the workers,
forwards signals, and waits. Workers leave their report or their error in the parent's folder, so
there is one result, one error line, and the exit code that a single process would have had.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypedDict

from vlmdpo import ui
from vlmdpo.config import EvalAmberConfig, InferConfig, ProcessOptions, TrainConfig, recipes
from vlmdpo.errors import (
    ConfigError,
    Interrupted,
    MissingDependencyError,
    PeerLost,
    Preempted,
    ProcessError,
    VlmDpoError,
    install_command,
)

# Set for workers: the parent's folder. Its presence marks a process as started here.
RUN_FOLDER = "VLMDPO_RUN_FOLDER"
_REPORT = "report.json"
_PORT = 29500  # accelerate's own default for several machines
LaunchableConfig = TrainConfig | InferConfig | EvalAmberConfig


class WorkerError(TypedDict):
    """An error that a worker left for its parent."""

    kind: str  # the name of a subclass of VlmDpoError
    message: str
    at: float  # seconds since the epoch


def is_launcher(config: LaunchableConfig) -> bool:
    """Whether this process should start workers rather than do the work itself.

    Raises ConfigError if `--num-processes` contradicts an outer launcher.
    """
    if isinstance(config, TrainConfig) and (config.dry_run or config.doctor):
        return False  # one process is enough
    launched = os.environ.get("WORLD_SIZE")
    if launched is None:
        return config.num_processes > 1
    if config.num_processes not in (1, int(launched)):
        raise ConfigError(
            f"--num-processes {config.num_processes}: the launcher has started {launched}; leave "
            "the option out"
        )
    return False


def run(command: str, config: LaunchableConfig) -> dict[str, Any]:
    """Run the command in its workers, and return the report, which is the same on every machine.

    Raises:
        ConfigError, MissingDependencyError: this machine cannot run the workers.
        ProcessError: a worker died; or the error that a worker raised, with its exit code.
        Preempted, Interrupted: the workers received a signal and stopped.
    """
    import yaml

    _check_resources(config)
    with tempfile.TemporaryDirectory(prefix="vlmdpo-run-") as name:
        folder = Path(name)
        settings = folder / "settings.yaml"
        settings.write_text(yaml.safe_dump(recipes.plain(config)), encoding="utf-8")
        launcher_config = folder / "accelerate.yaml"
        launcher_config.write_text(
            yaml.safe_dump(accelerate_config(config), sort_keys=False), encoding="utf-8"
        )
        arguments = ["--config_file", str(launcher_config), "--module", "vlmdpo", command]
        arguments += ["--config", str(settings)]
        with _worker_environment(config, folder), _forward_signals():
            exit_codes = _run_workers(arguments)
        how_to_continue = (
            "continue with --resume" if command == "train" else "repeat the command to continue"
        )
        error = _run_error(folder, exit_codes, how_to_continue)
        if error is not None:
            raise error
        report: dict[str, Any] = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        return report


def accelerate_config(config: LaunchableConfig) -> dict[str, Any]:
    """accelerate's configuration of a run, as `accelerate launch --config_file` reads it.

    Without mixed precision, which `train` sets itself.
    """
    several_machines = config.num_machines > 1
    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "mixed_precision": "no",
        "num_machines": config.num_machines,
        "num_processes": config.num_processes,
        "machine_rank": config.machine_rank,
        "main_process_ip": config.main_process_ip if several_machines else None,
        "main_process_port": config.main_process_port
        or (_PORT if several_machines else _free_port()),
        "rdzv_backend": "static",
        "same_network": True,
    }
    if not isinstance(config, TrainConfig):
        return settings
    return settings | strategy_config(config.strategy, config.gradient_accumulation_steps)


def strategy_config(
    strategy: str, gradient_accumulation_steps: int | None = None
) -> dict[str, Any]:
    """The part of accelerate's configuration that says how processes share a model."""
    if strategy == "fsdp2":
        return {
            "distributed_type": "FSDP",
            "fsdp_config": {
                "fsdp_version": 2,
                "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "fsdp_reshard_after_forward": True,
                "fsdp_state_dict_type": "FULL_STATE_DICT",
            },
        }
    if strategy in ("zero2", "zero3"):
        deepspeed: dict[str, Any] = {
            "zero_stage": int(strategy[-1]),
            "gradient_clipping": 1.0,
            "zero3_init_flag": False,
        }
        if gradient_accumulation_steps is not None:
            deepspeed["gradient_accumulation_steps"] = gradient_accumulation_steps
        if strategy == "zero3":
            deepspeed["zero3_save_16bit_model"] = True
        return {"distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed}
    return {}


def _check_resources(config: LaunchableConfig) -> None:
    """Raise if this machine lacks the GPUs or the package that the run needs."""
    import torch

    from vlmdpo.models.devices import pick_device

    workers = _local_workers(config)
    if pick_device(config.device).type == "cuda" and workers > torch.cuda.device_count():
        raise ConfigError(
            f"--num-processes: {workers} on this machine, which has {torch.cuda.device_count()} "
            "GPUs"
        )
    if isinstance(config, TrainConfig) and config.strategy.startswith("zero"):
        from importlib.util import find_spec

        if find_spec("deepspeed") is None:
            raise MissingDependencyError(
                f"--strategy {config.strategy} needs DeepSpeed: "
                f"{install_command(extra='deepspeed')}"
            )


def _local_workers(options: ProcessOptions) -> int:
    return options.num_processes // options.num_machines


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _worker_environment(options: ProcessOptions, folder: Path) -> Iterator[None]:
    """Inside, what workers inherit: the parent's folder, and a fair share of the CPU's cores."""
    threads = str(max(1, (os.cpu_count() or 1) // _local_workers(options)))
    changes = {RUN_FOLDER: str(folder), "OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    before = {name: os.environ.get(name) for name in changes}
    for name, value in changes.items():
        if name == RUN_FOLDER or before[name] is None:
            os.environ[name] = value
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


def _run_workers(arguments: list[str]) -> dict[int, int]:
    """Start the workers and wait for them; returns the exit codes of those that failed, by rank.

    accelerate runs in a thread: there torch's launcher leaves signals to this module, which gives
    workers all the time that they need to save. Otherwise it would kill them after 30 seconds.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _silence_loggers("torch.distributed", "accelerate")  # their advice is for authors of launchers
    exit_codes: dict[int, int] = {}
    raised: list[BaseException] = []

    def work() -> None:
        try:
            launch_command(launch_command_parser().parse_args(arguments))
        except ChildFailedError as problem:
            exit_codes.update(
                {rank: failure.exitcode for rank, failure in problem.failures.items()}
            )
        except Exception as problem:  # noqa: BLE001 - raised again in the thread that waits
            raised.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # in short turns, so that signals are handled
    if raised:
        reason = str(raised[0]).strip().splitlines()[0]
        raise ProcessError(f"cannot start the processes: {reason}") from raised[0]
    return exit_codes


def _silence_loggers(*families: str) -> None:
    """Silence loggers and their descendants, whose levels torch's launcher sets one by one.

    Some of what they would print: with several machines the agents wait for each other at the end
    through a store that the first machine holds. If that one leaves first, the work is done and the
    exit code is 0, but a traceback is printed.
    """
    import torch.distributed.run  # noqa: F401 - creates the loggers, which must exist by now

    for name in (*families, *logging.root.manager.loggerDict):
        if any(name == family or name.startswith(f"{family}.") for family in families):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def _forward_signals() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM are sent to the workers; this process waits for how they end.

    Workers are not in the terminal's process group, so they get no signal by themselves.
    """
    import psutil

    def forward(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children():
            child.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_error(
    folder: Path, exit_codes: dict[int, int], how_to_continue: str
) -> VlmDpoError | None:
    """Why the run failed, or None: the first cause, not what it did to the other workers."""
    errors: list[WorkerError] = sorted(
        (json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("error-*.json")),
        key=lambda error: error["at"],
    )
    # The launcher ends the other workers by SIGTERM, so that is never the cause, nor that one of
    # them saved its work at that.
    killed = {
        rank: -code for rank, code in exit_codes.items() if code < 0 and -code != signal.SIGTERM
    }
    effects = (PeerLost, Preempted) if killed else (PeerLost,)
    causes = [error for error in errors if error["kind"] not in {e.__name__ for e in effects}]
    failed = {
        rank: code
        for rank, code in exit_codes.items()
        if code > 0 and code not in {e.exit_code for e in effects}
    }
    if causes:
        return _rebuild_error(causes[0])
    if Interrupted.exit_code in failed.values():
        raise KeyboardInterrupt  # as without workers, so that Ctrl-C says the same
    if failed:
        rank, code = next(iter(failed.items()))
        return ProcessError(f"process {rank} ended with exit code {code}; its output is above")
    if killed:
        rank, number = next(iter(killed.items()))
        name = signal.Signals(number).name
        hint = ", probably out of memory" if number == signal.SIGKILL else ""
        return ProcessError(
            f"process {rank} was killed ({name}{hint}); the others were stopped; {how_to_continue}"
        )
    if errors:
        return _rebuild_error(errors[0])
    return ProcessError(f"the processes ended with exit codes {exit_codes}") if exit_codes else None


def _rebuild_error(error: WorkerError) -> VlmDpoError:
    """The error that a worker left behind, as an exception of its own class."""
    classes: dict[str, Callable[[str], VlmDpoError]] = {
        cls.__name__: cls for cls in _error_classes(VlmDpoError)
    }
    return classes[error["kind"]](error["message"])


def _error_classes(cls: type[VlmDpoError]) -> Iterator[type[VlmDpoError]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _error_classes(subclass)


# Called in the workers.


def is_worker() -> bool:
    """Whether this process was started by `run` in another one."""
    return RUN_FOLDER in os.environ and "WORLD_SIZE" in os.environ


def send_report(report: dict[str, Any]) -> None:
    """Leave the report for the parent, if this is the first worker of its machine."""
    if os.environ["LOCAL_RANK"] == "0":
        _write(Path(os.environ[RUN_FOLDER]) / _REPORT, report)


def send_error(problem: VlmDpoError) -> None:
    """Leave an error for the parent, which prints one for all workers."""
    error: WorkerError = {
        "kind": type(problem).__name__,
        "message": str(problem),
        "at": time.time(),
    }
    _write(Path(os.environ[RUN_FOLDER]) / f"error-{os.environ['RANK']}.json", dict(error))


def start_worker() -> None:
    """Mute all workers but the first, and stop this one by SIGTERM, saved, if its parent dies."""
    if os.environ["RANK"] != "0":
        ui.mute()
    parent = os.getppid()

    def watch_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch_parent, daemon=True).start()


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, default=str), encoding="utf-8")
    partial.replace(path)
