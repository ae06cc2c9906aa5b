"""One command in several processes, started through accelerate, that ends as if it had been one.

The command's own process becomes the parent: it writes the settings to a file, starts the
processes, hands signals on, and waits. They leave their report or their error in the parent's
folder, so that there is one result, one error line, and the exit code that one process would have
had.
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
from typing import Any

from vlmdpo import ui
from vlmdpo.config import EvalAmberConfig, InferConfig, TrainConfig, recipes
from vlmdpo.errors import (
    ConfigError,
    MissingDependencyError,
    PeerLost,
    ProcessError,
    VlmDpoError,
    install_command,
)

FOLDER = "VLMDPO_RUN_FOLDER"  # tells a process that it was started here, and where its parent looks
_REPORT = "report.json"
_PORT = 29500  # accelerate's own, on several machines
Config = TrainConfig | InferConfig | EvalAmberConfig


def wanted(config: Config) -> bool:
    """Whether this process should become the parent of others. Raises ConfigError where it is one
    of another number.
    """
    if isinstance(config, TrainConfig) and (config.dry_run or config.doctor):
        return False  # one process can tell
    launched = os.environ.get("WORLD_SIZE")
    if launched is None:
        return config.num_processes > 1
    if config.num_processes not in (1, int(launched)):
        raise ConfigError(
            f"--num-processes {config.num_processes}: the launcher has started {launched}; leave "
            "it out"
        )
    return False


def run(command: str, config: Config) -> dict[str, Any]:
    """Run the command in its processes, and return the report, which is the same on every machine.

    Raises:
        ConfigError, MissingDependencyError: processes that cannot be had here.
        ProcessError: one that died; or what it raised itself, with its exit code.
        Preempted, Interrupted: the processes were told to stop, and did.
    """
    import yaml

    _check(config)
    with tempfile.TemporaryDirectory(prefix="vlmdpo-run-") as name:
        folder = Path(name)
        settings = folder / "settings.yaml"
        settings.write_text(yaml.safe_dump(recipes.plain(config)), encoding="utf-8")
        chosen = folder / "accelerate.yaml"
        chosen.write_text(
            yaml.safe_dump(accelerate_config(config), sort_keys=False), encoding="utf-8"
        )
        arguments = [
            "--config_file",
            str(chosen),
            "--module",
            "vlmdpo",
            command,
            "--config",
            str(settings),
        ]
        with _environment(config, folder), _signals_handed_on():
            died = _launched(arguments)
        report = folder / _REPORT
        problem = _problem(
            folder, died, "--resume goes on" if command == "train" else "the same command goes on"
        )
        if problem is not None:
            raise problem
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found


def accelerate_config(config: Config) -> dict[str, Any]:
    """accelerate's configuration file for a run, as `accelerate launch --config_file` takes it.
    Precision is train's to set.
    """
    several = config.num_machines > 1
    made: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "mixed_precision": "no",
        "num_machines": config.num_machines,
        "num_processes": config.num_processes,
        "machine_rank": config.machine_rank,
        "main_process_ip": config.main_process_ip if several else None,
        "main_process_port": config.main_process_port or (_PORT if several else _free_port()),
        "rdzv_backend": "static",
        "same_network": True,
    }
    return made | strategy_config(
        config.strategy if isinstance(config, TrainConfig) else "ddp", config
    )


def strategy_config(strategy: str, config: Any = None) -> dict[str, Any]:
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
        stage = {
            "zero_stage": int(strategy[-1]),
            "gradient_clipping": 1.0,
            "zero3_init_flag": False,
        }
        if isinstance(config, TrainConfig):
            stage["gradient_accumulation_steps"] = config.gradient_accumulation_steps
        return {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {
                **stage,
                **({"zero3_save_16bit_model": True} if strategy == "zero3" else {}),
            },
        }
    return {}


def _check(config: Config) -> None:
    """Raises where the machine cannot run so many processes, or not in this way."""
    import torch

    from vlmdpo.models.load import pick_device

    here = config.num_processes // config.num_machines
    if pick_device(config.device).type == "cuda" and here > torch.cuda.device_count():
        raise ConfigError(
            f"--num-processes: {here} on this machine, which has {torch.cuda.device_count()} GPUs"
        )
    if isinstance(config, TrainConfig) and config.strategy.startswith("zero"):
        from importlib.util import find_spec

        if find_spec("deepspeed") is None:
            raise MissingDependencyError(
                f"--strategy {config.strategy} needs DeepSpeed: {install_command(extra='deepspeed')}"
            )


def _free_port() -> int:
    with socket.socket() as open_one:
        open_one.bind(("127.0.0.1", 0))
        return int(open_one.getsockname()[1])


@contextmanager
def _environment(config: Config, folder: Path) -> Iterator[None]:
    """What the processes inherit: the parent's folder, and threads that do not get in each other's
    way.
    """
    here = config.num_processes // config.num_machines
    threads = str(max(1, (os.cpu_count() or 1) // here))
    changes = {FOLDER: str(folder), "OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(
        {name: value for name, value in changes.items() if name == FOLDER or before[name] is None}
    )
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _launched(arguments: list[str]) -> dict[int, int]:
    """Start and await the processes; exit codes of those that failed, by rank.

    accelerate runs in a thread: there torch's launcher leaves signals to this module, which gives
    processes all the time that they need to save, where the launcher would kill them after 30
    seconds.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _hush("torch.distributed", "accelerate")  # their advice is to those who write launchers
    failed: dict[int, int] = {}
    raised: list[BaseException] = []

    def work() -> None:
        try:
            launch_command(launch_command_parser().parse_args(arguments))
        except ChildFailedError as problem:
            failed.update({rank: failure.exitcode for rank, failure in problem.failures.items()})
        except Exception as problem:  # noqa: BLE001 - raised again in the thread that waits
            raised.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # in short turns, so that signals are handled
    if raised:
        raise ProcessError(
            f"the processes cannot be started: {str(raised[0]).strip().splitlines()[0]}"
        ) from raised[0]
    return failed


def _hush(*families: str) -> None:
    """Silence loggers, their descendants too: torch's launcher sets levels on its own, which
    outrank their family's.

    Among what it says there: on several machines its agents await each other at the end through a
    store that the first one keeps. Where that one is gone first, all work is done and the exit code
    is 0, but a traceback would be printed.
    """
    import torch.distributed.run  # noqa: F401 - makes the loggers, which are silenced only once they are there

    for name in (*families, *logging.root.manager.loggerDict):
        if any(name == family or name.startswith(f"{family}.") for family in families):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def _signals_handed_on() -> Iterator[None]:
    """Ctrl-C and SIGTERM reach the processes, which are not in the terminal's group; this one waits
    for how they end.
    """
    import psutil

    def hand_on(number: int, frame: Any) -> None:
        for child in psutil.Process().children():
            child.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _problem(folder: Path, died: dict[int, int], go_on: str) -> VlmDpoError | None:
    """Why the run ended, where it did not end well: the first cause, not what it did to the other
    processes.
    """
    told = sorted(
        (json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("error-*.json")),
        key=lambda e: e["at"],
    )
    causes = [error for error in told if error["kind"] != PeerLost.__name__]
    # The launcher ends the others by SIGTERM.
    killed = {rank: -code for rank, code in died.items() if code < 0 and -code != signal.SIGTERM}
    broken = {rank: code for rank, code in died.items() if code > 0 and code != PeerLost.exit_code}
    if causes:
        return _again(causes[0])
    if broken:
        rank, code = next(iter(broken.items()))
        return ProcessError(f"process {rank} ended with exit code {code}; what it said is above")
    if killed:
        rank, number = next(iter(killed.items()))
        name = signal.Signals(number).name
        why = ", as one is that runs out of memory" if number == signal.SIGKILL else ""
        return ProcessError(
            f"process {rank} was killed ({name}{why}); the others were stopped; {go_on}"
        )
    if told:
        return _again(told[0])
    return ProcessError(f"the processes ended with exit codes {died}") if died else None


def _again(error: dict[str, Any]) -> VlmDpoError:
    """The error that a process left behind, as itself again."""
    kinds: dict[str, Callable[[str], VlmDpoError]] = {
        kind.__name__: kind for kind in _kinds(VlmDpoError)
    }
    return kinds[error["kind"]](error["message"])


def _kinds(kind: type[VlmDpoError]) -> Iterator[type[VlmDpoError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


# In the processes themselves.


def is_child() -> bool:
    """Whether this process was started by `run` of another one."""
    return FOLDER in os.environ and "WORLD_SIZE" in os.environ


def deliver(report: dict[str, Any]) -> None:
    """Hand the report to the parent; the first process of each machine does."""
    if os.environ["LOCAL_RANK"] == "0":
        _write(Path(os.environ[FOLDER]) / _REPORT, report)


def tell(problem: VlmDpoError) -> None:
    """Hand an error to the parent, which says it once for all processes."""
    error = {"kind": type(problem).__name__, "message": str(problem), "at": time.time()}
    _write(Path(os.environ[FOLDER]) / f"error-{os.environ['RANK']}.json", error)


def begin() -> None:
    """Only the first process speaks; and a parent that dies is a SIGTERM to this process, which
    saves and ends.
    """
    if os.environ["RANK"] != "0":
        ui.mute()
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_suffix(".partial")
    part.write_text(json.dumps(content, default=str), encoding="utf-8")
    part.replace(path)
