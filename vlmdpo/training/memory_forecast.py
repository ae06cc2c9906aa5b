"""The memory of a run, foreseen by `estimate-memory` in a process of its own while the run goes on."""

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


class MemoryForecast:
    """What `estimate-memory` says of a run on its own data, once it is done.

    A process of its own: a simulation sets accelerate's state, of which a process has one, to the
    CPU.

    Args:
        config: of the run.
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
            "num_gpus": config.num_processes,
        }
        settings["gpu"] = f"{capacity_bytes // 2**20}MiB" if capacity_bytes else None
        recipe = Path(self._folder.name) / "estimate.yaml"
        recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "vlmdpo",
            "estimate-memory",
            "--config",
            str(recipe),
            "--json",
        ]
        alone = {
            name: value
            for name, value in os.environ.items()
            if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")
        }
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**alone, "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # Ctrl-C is for the run
        )
        self._found: dict[str, Any] | None = None
        self._settled = False

    def wait(self) -> dict[str, Any]:
        """The estimate's report. Raises ModelError where there can be none."""
        told, talk = self._process.communicate()
        if self._process.returncode:
            lines = talk.partition("error: ")[2].split()
            raise ModelError(" ".join(lines) or "no reason given")
        found: dict[str, Any] = json.loads(told)
        return found

    def settle(self) -> None:
        """Wait until the peak is known, or known not to be; a run goes on without it, having said
        why.
        """
        if self._settled:
            return
        self._settled = True
        try:
            self._found = self.wait()
        except ModelError as problem:
            ui.warn(f"no peak memory foreseen: {problem}")

    @property
    def peak_bytes(self) -> int | None:
        """The peak foreseen; None as long as it is not known."""
        if self._process.poll() is not None:
            self.settle()
        return self._found["peak_bytes"] if self._found else None

    def close(self) -> None:
        """End the process, done or not."""
        self._process.kill()
        if not self._settled:
            self._process.communicate()
        self._folder.cleanup()


def plan(config: TrainConfig, data: Path, capacity_bytes: int, dtype: str) -> dict[str, Any]:
    """What `estimate-memory` says of this run on its own data, for a GPU of so many bytes. Raises
    ModelError.
    """
    foreseeing = MemoryForecast(config, data, dtype, capacity_bytes)
    try:
        return foreseeing.wait()
    except ModelError as problem:
        raise ModelError(
            f"--auto-batch-size: no batch can be foreseen ({problem}); leave it out, or see "
            "vlmdpo estimate-memory"
        ) from problem
    finally:
        foreseeing.close()
