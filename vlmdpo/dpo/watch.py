"""What a person sees of a training run: live progress, a metrics file, and stops that keep a checkpoint."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import TrainerCallback

from vlmdpo import ui
from vlmdpo.errors import Preempted

METRICS = "metrics.jsonl"
_COMPARED_AT = 3  # optimizer steps after which memory has been at its highest


class Watch(TrainerCallback):
    """Shows progress, appends to the metrics file, and turns Ctrl-C and SIGTERM into a checkpoint and a clean stop.

    After training, `stopped_by` tells which of them ended it, and `lines` holds every logged line. With a foreseen peak,
    the measured one is set beside it after the first steps, on a GPU.

    A stop does not wait for the end of an optimizer step, whose accumulation may take minutes: weights are still those of
    the step before, and random numbers are put back to where they were then, so that a resumed run repeats the step.
    """

    def __init__(self, metrics_file: Path, *, foreseen_peak_bytes: int | None = None) -> None:
        self.foreseen_peak_bytes = foreseen_peak_bytes
        self.metrics_file = metrics_file
        self.stopped_by: signal.Signals | None = None
        self.save_now: Callable[[], None] | None = None  # the trainer's, once there is one
        self._chance: Callable[[], None] | None = None
        self.lines: list[dict[str, Any]] = []
        self._bar: ui.Bar | None = None
        self._open = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # After a resume, lines past the checkpoint belong to steps that will be done again.
        self.lines = [line for line in _read_lines(self.metrics_file) if line["step"] <= state.global_step]
        if not state.is_world_process_zero:
            return
        part = self.metrics_file.with_suffix(".partial")
        part.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        part.replace(self.metrics_file)
        self._bar = self._open.enter_context(ui.progress("train", state.max_steps))
        self._bar.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.advance()
        if state.global_step == _COMPARED_AT and self.foreseen_peak_bytes:
            ui.say(compared(self.foreseen_peak_bytes, torch.cuda.max_memory_allocated()))
        self._chance = _chance()
        if self._stopping(args):
            control.should_save = control.should_training_stop = True

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._stopping(args):
            return
        control.should_training_stop = True
        if self._chance is not None and self.save_now is not None:  # else no step was done since the last checkpoint
            self._chance()
            self.save_now()

    def _stopping(self, args: Any) -> bool:
        """Whether any process was told to stop: all of them must stop at the same place."""
        if args.world_size == 1:
            return self.stopped_by is not None
        told = torch.tensor(int(self.stopped_by or 0), device=args.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        self.stopped_by = signal.Signals(int(told)) if told else None
        return self.stopped_by is not None

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
    def catching_signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM saves and ends; a second Ctrl-C stops at once. The bar closes either way."""

        def stop(number: int, frame: Any) -> None:
            if self.stopped_by == number == signal.SIGINT:
                raise KeyboardInterrupt
            if self.stopped_by is None:
                again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
                ui.warn(f"{signal.Signals(number).name}: keeping a checkpoint{again}")
            self.stopped_by = signal.Signals(number)

        with contextlib.ExitStack() as handlers:
            for number in (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ():
                handlers.callback(signal.signal, number, signal.signal(number, stop))
            try:
                yield
            finally:
                self._open.close()


@contextlib.contextmanager
def sigterm_before_training() -> Iterator[None]:
    """Inside, SIGTERM ends the program at once, as preempted: there is nothing to save yet, and later nothing left to do."""

    def stop(number: int, frame: Any) -> None:
        raise Preempted("SIGTERM outside training; what checkpoints there are stay, and --resume goes on from them")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _chance() -> Callable[[], None]:
    """Puts every random number generator back to where it is now."""
    python, arrays, torch_cpu = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def back() -> None:
        random.setstate(python)
        numpy.random.set_state(arrays)
        torch.random.set_rng_state(torch_cpu)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)

    return back


def compared(foreseen_bytes: int, measured_bytes: int) -> str:
    """Foreseen beside measured peak, in words."""
    off = 100 * (foreseen_bytes / measured_bytes - 1)
    return f"peak memory: {foreseen_bytes / 2**30:.2f} GiB foreseen, {measured_bytes / 2**30:.2f} GiB measured ({off:+.1f}%)"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole, newline, _ = path.read_text(encoding="utf-8").rpartition("\n")  # a last line without end was cut by a kill
    return [json.loads(line) for line in whole.splitlines()] if newline else []
