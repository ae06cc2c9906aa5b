"""What a person sees of a training run: live progress, a metrics file, and a stop that keeps a checkpoint."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from vlmdpo import ui

METRICS = "metrics.jsonl"
_COMPARED_AT = 3  # optimizer steps after which memory has been at its highest


class Watch(TrainerCallback):
    """Shows progress, appends to the metrics file, and turns Ctrl-C into a checkpoint and a clean stop.

    After training, `interrupted` tells whether Ctrl-C ended it and `lines` holds every logged line. With a foreseen peak,
    the measured one is set beside it after the first steps, on a GPU.
    """

    def __init__(self, metrics_file: Path, *, foreseen_peak_bytes: int | None = None) -> None:
        self.foreseen_peak_bytes = foreseen_peak_bytes
        self.metrics_file = metrics_file
        self.interrupted = False
        self.lines: list[dict[str, Any]] = []
        self._bar: ui.Bar | None = None
        self._open = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # After a resume, lines past the checkpoint belong to steps that will be done again.
        self.lines = [line for line in _read_lines(self.metrics_file) if line["step"] <= state.global_step]
        if not state.is_world_process_zero:
            return
        self.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        self._bar = self._open.enter_context(ui.progress("train", state.max_steps))
        self._bar.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.advance()
        if state.global_step == _COMPARED_AT and self.foreseen_peak_bytes:
            ui.say(compared(self.foreseen_peak_bytes, torch.cuda.max_memory_allocated()))
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary at the end, which `train` returns anyway
            return
        line = {"step": state.global_step, **logs}
        self.lines.append(line)
        if not state.is_world_process_zero:
            return
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._bar is not None:
            accuracy, margin = logs.get("rewards/accuracies", 0.0), logs.get("rewards/margins", 0.0)
            self._bar.advance(0, f"loss {logs['loss']:.3f} acc {accuracy:.2f} margin {margin:+.2f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()

    @contextlib.contextmanager
    def catching_ctrl_c(self) -> Iterator[None]:
        """The first Ctrl-C ends the step and saves; a second one stops at once. The bar closes either way."""

        def stop(signum: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            ui.warn("stopping after this step, keeping a checkpoint; press Ctrl-C again to stop at once")

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self._open.close()


def compared(foreseen_bytes: int, measured_bytes: int) -> str:
    """Foreseen beside measured peak, in words."""
    off = 100 * (foreseen_bytes / measured_bytes - 1)
    return f"peak memory: {foreseen_bytes / 2**30:.2f} GiB foreseen, {measured_bytes / 2**30:.2f} GiB measured ({off:+.1f}%)"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
