"""What a person sees of a training run: live progress, a metrics file, and stops that keep a
checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
import psutil
import torch
from transformers import TrainerCallback

from vlmdpo import ui

METRICS = "metrics.jsonl"
_COMPARED_AT = 3  # optimizer steps after which memory has been at its highest
_LATELY = 20  # optimizer steps that the speed is told of


class Foreseen(Protocol):
    """Something that knows, or will know, the peak memory foreseen."""

    @property
    def peak_bytes(self) -> int | None: ...

    def settle(self) -> None: ...


class TrainingMonitor(TrainerCallback):
    """Shows progress, appends to the metrics file, and turns Ctrl-C and SIGTERM into a checkpoint
    and a clean stop.

    After training, `stopped_by` tells which of them ended it, `lines` holds every logged line, and
    `evaluations` those of the test split, their names without "eval_". With a foreseen peak, the
    measured one is set beside it after the first steps, on a GPU. `page` is called whenever there
    is a new checkpoint, and however training ends.

    A stop does not wait for the end of an optimizer step, whose accumulation may take minutes:
    weights are still those of the step before, and random numbers are put back to where they were
    then, so that a resumed run repeats the step.
    """

    def __init__(self, metrics_file: Path, *, foreseen: Foreseen | None = None) -> None:
        self.foreseen = foreseen
        self.metrics_file = metrics_file
        self.page: Callable[[], None] | None = None
        self.stopped_by: signal.Signals | None = None
        self.save_now: Callable[[], None] | None = None  # the trainer's, once there is one
        self._chance: Callable[[], None] | None = None
        self.lines: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self._board: ui.Dashboard | None = None
        self._lately: deque[tuple[float, int]] = deque(maxlen=_LATELY + 1)
        self._compared = False
        self._open = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # After a resume, lines past the checkpoint belong to steps that will be done again.
        kept = [line for line in read_lines(self.metrics_file) if line["step"] <= state.global_step]
        self.lines = [line for line in kept if "loss" in line]
        self.evaluations = [_evaluation(line) for line in kept if "eval_loss" in line]
        if not state.is_world_process_zero:
            return
        write_lines(self.metrics_file, kept)
        self._lately.append((time.monotonic(), state.global_step))
        self._board = self._open.enter_context(
            ui.dashboard("train", state.max_steps, state.global_step)
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lately.append((time.monotonic(), state.global_step))
        if self._board is not None:
            self._board.step(state.global_step, *self._speed(args, state))
        foreseen = (
            self.foreseen.peak_bytes if self.foreseen is not None and not self._compared else None
        )
        if foreseen and state.global_step >= _COMPARED_AT and args.device.type == "cuda":
            self._compared = True
            ui.say(compared(foreseen, torch.cuda.max_memory_allocated()))
        self._chance = _chance()
        if self._stopping(args):
            control.should_save = control.should_training_stop = True

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._stopping(args):
            return
        control.should_training_stop = True
        if (
            self._chance is not None and self.save_now is not None
        ):  # else no step was done since the last checkpoint
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

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (
            self._chance is not None
        ):  # a resumed run will not evaluate again: it goes on with the numbers that come now
            self._chance = _chance()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if (
            "loss" not in logs and "eval_loss" not in logs
        ):  # the summary at the end, which `train` returns anyway
            return
        line = {"step": state.global_step, **logs}
        if "loss" in logs:
            self.lines.append(line)
        else:
            self.evaluations.append(_evaluation(line))
        if not state.is_world_process_zero:
            return
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            self._board.figures(self._figures(args), evaluated="eval_loss" in logs)

    def _speed(self, args: Any, state: Any) -> tuple[float, float | None]:
        """Pairs a second over the last steps, and seconds left."""
        (began, first), (now, last) = self._lately[0], self._lately[-1]
        if last == first or now == began:
            return 0.0, None
        seconds = (now - began) / (last - first)
        pairs = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return pairs / seconds, seconds * (state.max_steps - last)

    def _figures(self, args: Any) -> list[ui.Figure]:
        """What the dashboard shows: the last value of each metric, and how it came there."""
        found = [
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
            found.append(
                _figure(
                    "eval",
                    self.evaluations,
                    ["loss", "rewards/accuracies"],
                    "loss {:.4f}, accuracy {:.3f}",
                    talk="eval {}",
                )
            )
        return [*found, ui.Figure("memory", self._memory(args))]

    def _memory(self, args: Any) -> str:
        foreseen = self.foreseen.peak_bytes if self.foreseen is not None else None
        if args.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            if foreseen:
                return f"peak {peak / 2**30:.2f} GiB, {foreseen / 2**30:.2f} foreseen ({100 * (foreseen / peak - 1):+.1f}%)"
            return f"peak {peak / 2**30:.2f} GiB"
        # nothing counts tensors here
        held = f"process {psutil.Process().memory_info().rss / 2**30:.2f} GiB"
        return f"{held}, tensors foreseen {foreseen / 2**30:.2f}" if foreseen else held

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.page is not None:
            self.page()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()

    @contextlib.contextmanager
    def catching_signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM saves and ends; a second Ctrl-C stops at once. The bar closes
        either way.
        """

        def stop(number: int, frame: Any) -> None:
            if self.stopped_by == number == signal.SIGINT:
                raise KeyboardInterrupt
            first, self.stopped_by = self.stopped_by is None, signal.Signals(number)
            if first:
                again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
                ui.warn_from_handler(f"{signal.Signals(number).name}: keeping a checkpoint{again}")

        with contextlib.ExitStack() as handlers:
            for number in (
                (signal.SIGINT, signal.SIGTERM)
                if threading.current_thread() is threading.main_thread()
                else ()
            ):
                handlers.callback(signal.signal, number, signal.signal(number, stop))
            try:
                yield
            finally:
                self._open.close()
                if self.page is not None and self.lines:
                    self.page()


def _figure(
    label: str, lines: Sequence[dict[str, Any]], names: list[str], form: str, *, talk: str = ""
) -> ui.Figure:
    values = [line.get(names[0], 0.0) for line in lines]
    text = form.format(*(lines[-1].get(name, 0.0) for name in names)) if lines else "-"
    return ui.Figure(label, text, values, talk)


def _evaluation(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the test split, its metrics by the names that training's have."""
    return {name.removeprefix("eval_"): value for name, value in line.items()}


def _chance() -> Callable[[], None]:
    """Puts every random number generator back to where it is now."""
    python, arrays, torch_cpu = (
        random.getstate(),
        numpy.random.get_state(),
        torch.random.get_rng_state(),
    )
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


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """A file of JSON lines, under its name once it is whole."""
    part = path.with_suffix(".partial")
    part.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    part.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of such a file; none where there is no file."""
    if not path.exists():
        return []
    whole, newline, _ = path.read_text(encoding="utf-8").rpartition(
        "\n"
    )  # a last line without end was cut by a kill
    return [json.loads(line) for line in whole.splitlines()] if newline else []
