"""The memory of a run, estimated by `estimate-memory` in a process beside it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from vlmdpo import ui
from vlmdpo.config import PER_CALL, EstimateMemoryConfig, TrainConfig
from vlmdpo.errors import ModelError

# What a launcher sets for its workers: accelerate, torchrun, DeepSpeed, and `distributed.launch`.
_LAUNCHER_PREFIXES = (
    *("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "DEEPSPEED_", "TORCHELASTIC_", "MASTER_"),
    *("WORLD_SIZE", "RANK", "LOCAL_", "GROUP_", "ROLE_", "CROSS_", "VLMDPO_RUN_FOLDER"),
)


def _environment_without_launcher() -> dict[str, str]:
    """This process's environment as if nothing had launched it, so that a child runs alone."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_PREFIXES)
    }


class MemoryForecast:
    """What `estimate-memory` reports of a run on its own data, once it is done.

    In a process of its own, because a simulation sets accelerate's state, of which a process has
    one, to the CPU.

    Args:
        config: the run's options.
        data: its prepared folder.
        dtype: of the base weights, by name.
        capacity_bytes: of the GPU, for a verdict and a plan; None for the peak alone.
    """

    def __init__(
        self, config: TrainConfig, data: Path, dtype: str, capacity_bytes: int | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        shared = {f.name for f in dataclasses.fields(EstimateMemoryConfig)} & {
            f.name for f in dataclasses.fields(TrainConfig)
        }
        settings: dict[str, Any] = {name: getattr(config, name) for name in shared - set(PER_CALL)}
        settings |= {
            "dtype": dtype,
            "dataset": str(data.absolute()),
            "adapter": None if config.adapter is None else str(config.adapter.absolute()),
            "num_gpus": config.num_processes,
            "pairs_per_prompt": 1 if config.group_by_image is False else None,
        }
        settings["gpu"] = f"{capacity_bytes // 2**20}MiB" if capacity_bytes else None
        recipe = Path(self._folder.name) / "estimate.yaml"
        recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
        command = [sys.executable, "-m", "vlmdpo", "estimate-memory"]
        command += ["--config", str(recipe), "--json"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**_environment_without_launcher(), "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # Ctrl-C is meant for the run
        )
        self._report: dict[str, Any] | None = None
        self._is_done = False

    def wait(self) -> dict[str, Any]:
        """The report of `estimate-memory`. Raises ModelError if it failed."""
        stdout, stderr = self._process.communicate()
        if self._process.returncode:
            words = stderr.partition("error: ")[2].split()
            raise ModelError(" ".join(words) or "no reason given")
        report: dict[str, Any] = json.loads(stdout)
        return report

    def wait_or_warn(self) -> None:
        """Wait for the estimate; if it failed, warn, since the run does not depend on it."""
        if self._is_done:
            return
        self._is_done = True
        try:
            self._report = self.wait()
        except ModelError as problem:
            ui.warn(f"no estimate of the peak memory: {problem}")

    @property
    def peak_bytes(self) -> int | None:
        """The estimated peak; None while it is not known, or if the estimate failed."""
        if self._process.poll() is not None:
            self.wait_or_warn()
        return self._report["peak_bytes"] if self._report else None

    def close(self) -> None:
        """Stop the process, whether it is done or not."""
        self._process.kill()
        if not self._is_done:
            self._process.communicate()
        self._folder.cleanup()


def plan_batch(config: TrainConfig, data: Path, capacity_bytes: int, dtype: str) -> dict[str, Any]:
    """The report of `estimate-memory` for this run on its own data and a GPU of this capacity.

    Raises ModelError.
    """
    forecast = MemoryForecast(config, data, dtype, capacity_bytes)
    try:
        return forecast.wait()
    except ModelError as problem:
        raise ModelError(
            f"--auto-batch-size: cannot estimate a batch size ({problem}); leave the option out, "
            "or see vlmdpo estimate-memory"
        ) from problem
    finally:
        forecast.close()
