"""What a person sees of a training run: live progress, a metrics file, and clean stops."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy
import psutil
import torch
from transformers import TrainerCallback

from vlmdpo import ui
from vlmdpo.report.metrics import GO_ON_WITHOUT, as_evaluation, read_lines, write_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from transformers import TrainerControl, TrainerState, TrainingArguments

_STEPS_TO_PEAK = 3  # optimizer steps after which memory has been at its highest
_SPEED_WINDOW = 20  # optimizer steps that the speed is averaged over


class PeakForecast(Protocol):
    """An estimate of the peak memory, which may still be running."""

    @property
    def peak_bytes(self) -> int | None: ...

    def wait_or_warn(self) -> None: ...


class TrainingMonitor(TrainerCallback):
    """Shows progress, writes the metrics file, and turns Ctrl-C and SIGTERM into clean stops.

    A stop does not wait for the end of an optimizer step, whose accumulation may take minutes.
    Weights are still those of the step before, and random number generators are restored to their
    state at its end, so that a resumed run repeats the step.

    Args:
        metrics_file: where each logged line is appended, as JSON.
        forecast: an estimate of the peak memory, compared with the measured one on a GPU.

    Attributes:
        stopped_by: the signal that ended training.
        lines: the logged lines of training.
        evaluations: the logged lines of the test split, their names without "eval_".
        save_now: writes a checkpoint; the trainer's, once there is one.
        began_at: the optimizer step from which this process went on; 0 of a new run.
        has_begun: whether training has, after all of a checkpoint was read.
        on_begin: called once it has.
        write_page: called after each checkpoint, and however training ends.
    """

    def __init__(self, metrics_file: Path, *, forecast: PeakForecast | None = None) -> None:
        self.forecast = forecast
        self.metrics_file = metrics_file
        self.write_page: Callable[[], None] | None = None
        self.has_begun = False
        self.began_at = 0
        self.on_begin: Callable[[], None] | None = None
        self.stopped_by: signal.Signals | None = None
        self.save_now: Callable[[], None] | None = None
        self._restore_random_state: Callable[[], None] | None = None
        self.lines: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self._dashboard: ui.Dashboard | None = None
        self._step_times: deque[tuple[float, int]] = deque(maxlen=_SPEED_WINDOW + 1)
        self._peak_compared = False
        self._open = contextlib.ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.has_begun, self.began_at = True, state.global_step
        if self.on_begin is not None:
            self.on_begin()
        # After a resume, lines past the checkpoint belong to steps that are repeated.
        before = read_lines(self.metrics_file, GO_ON_WITHOUT)
        kept = [line for line in before if line["step"] <= state.global_step]
        self.lines = [line for line in kept if "loss" in line]
        self.evaluations = [as_evaluation(line) for line in kept if "eval_loss" in line]
        if not state.is_world_process_zero:
            return
        write_lines(self.metrics_file, kept)
        self._step_times.append((time.monotonic(), state.global_step))
        self._dashboard = self._open.enter_context(
            ui.dashboard("train", state.max_steps, state.global_step)
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step_times.append((time.monotonic(), state.global_step))
        if self._dashboard is not None:
            self._dashboard.step(state.global_step, *self._speed(args, state))
        estimated = None if self._peak_compared else self._estimated_peak()
        if estimated and state.global_step >= _STEPS_TO_PEAK and args.device.type == "cuda":
            self._peak_compared = True
            ui.say(compare_peaks(estimated, torch.cuda.max_memory_allocated()))
        self._restore_random_state = _save_random_state()
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last metrics are of the last steps
        if self._should_stop(args):
            control.should_save = control.should_training_stop = True

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._should_stop(args):
            return
        control.should_training_stop = True
        # Before the first step there is nothing new to save.
        if self._restore_random_state is not None and self.save_now is not None:
            self._restore_random_state()
            self.save_now()

    def _should_stop(self, args: TrainingArguments) -> bool:
        """Whether any process received a signal: all of them must stop at the same place."""
        if args.world_size == 1:
            return self.stopped_by is not None
        number = torch.tensor(int(self.stopped_by or 0), device=args.device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        self.stopped_by = signal.Signals(int(number)) if number else None
        return self.stopped_by is not None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run does not repeat the evaluation: it continues with what follows it.
        if self._restore_random_state is not None:
            self._restore_random_state = _save_random_state()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if "loss" not in logs and "eval_loss" not in logs:
            return  # the summary at the end, which `train` returns anyway
        line = {"step": state.global_step, **logs}
        if "loss" in logs:
            self.lines.append(line)
        else:
            self.evaluations.append(as_evaluation(line))
        if not state.is_world_process_zero:
            return
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._dashboard is not None:
            self._dashboard.figures(self._figures(args), evaluated="eval_loss" in logs)

    def _speed(self, args: TrainingArguments, state: TrainerState) -> tuple[float, float | None]:
        """Pairs per second over the last steps, and the seconds that remain."""
        (began, first), (now, last) = self._step_times[0], self._step_times[-1]
        if last == first or now == began:
            return 0.0, None
        seconds = (now - began) / (last - first)
        pairs = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return pairs / seconds, seconds * (state.max_steps - last)

    def _figures(self, args: TrainingArguments) -> list[ui.Figure]:
        """What the dashboard shows: the last value of each metric, and its history."""
        figures = [
            _figure(label, self.lines, names, form)
            for label, names, form in (
                ("loss", ["loss"], "{:.4f}"),
                ("accuracy", ["rewards/accuracies"], "{:.3f}"),
                ("margin", ["rewards/margins"], "{:+.3f}"),
                (
                    "rewards",
                    ["rewards/chosen", "rewards/rejected"],
                    "chosen {:+.3f}, rejected {:+.3f}",
                ),
            )
        ]
        if self.evaluations:
            figures.append(
                _figure(
                    "eval",
                    self.evaluations,
                    ["loss", "rewards/accuracies"],
                    "loss {:.4f}, accuracy {:.3f}",
                    template="eval {}",
                )
            )
        return [*figures, ui.Figure("memory", self._memory(args))]

    def _estimated_peak(self) -> int | None:
        return self.forecast.peak_bytes if self.forecast is not None else None

    def _memory(self, args: TrainingArguments) -> str:
        estimated = self._estimated_peak()
        if args.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            text = f"peak {peak / 2**30:.2f} GiB"
            if not estimated:
                return text
            difference = 100 * (estimated / peak - 1)
            return f"{text}, {estimated / 2**30:.2f} estimated ({difference:+.1f}%)"
        # Nothing counts the bytes of tensors here.
        process = f"process {psutil.Process().memory_info().rss / 2**30:.2f} GiB"
        return f"{process}, tensors estimated {estimated / 2**30:.2f}" if estimated else process

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.write_page is not None:
            self.write_page()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._open.close()

    @contextlib.contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Inside, Ctrl-C or SIGTERM saves and ends training; a second Ctrl-C stops at once.

        However it ends, the progress bar is closed and the page written.
        """

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopped_by == number == signal.SIGINT:
                raise KeyboardInterrupt
            is_first, self.stopped_by = self.stopped_by is None, signal.Signals(number)
            if is_first:
                again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
                ui.warn_from_handler(f"{signal.Signals(number).name}: saving a checkpoint{again}")

        is_main_thread = threading.current_thread() is threading.main_thread()
        with contextlib.ExitStack() as handlers:
            for number in (signal.SIGINT, signal.SIGTERM) if is_main_thread else ():
                handlers.callback(signal.signal, number, signal.signal(number, stop))
            try:
                yield
            finally:
                self._open.close()
                if self.write_page is not None and self.lines:
                    self.write_page()


def _figure(
    label: str, lines: Sequence[dict[str, Any]], names: list[str], form: str, *, template: str = ""
) -> ui.Figure:
    values = [line.get(names[0], 0.0) for line in lines]
    text = form.format(*(lines[-1].get(name, 0.0) for name in names)) if lines else "-"
    return ui.Figure(label, text, values, template)


def _save_random_state() -> Callable[[], None]:
    """A function that restores every random number generator to its state now."""
    python_state = random.getstate()
    numpy_state = numpy.random.get_state()
    cpu_state = torch.random.get_rng_state()
    gpu_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.random.set_rng_state(cpu_state)
        if gpu_states:
            torch.cuda.set_rng_state_all(gpu_states)

    return restore


def compare_peaks(estimated_bytes: int, measured_bytes: int) -> str:
    """The estimated beside the measured peak, as a message."""
    difference = 100 * (estimated_bytes / measured_bytes - 1)
    return (
        f"peak memory: {estimated_bytes / 2**30:.2f} GiB estimated, "
        f"{measured_bytes / 2**30:.2f} GiB measured ({difference:+.1f}%)"
    )
