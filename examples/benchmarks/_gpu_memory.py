"""Items of the GPU check about memory: estimates beside PyTorch's counters; running out of it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _gpu_models import (
    Machine,
    architecture,
    build,
    collate,
    gradient_difference,
    loss_and_gradients,
    optimizer_step,
    random_rows,
    trained,
    trainer_of,
)
from _gpu_run import NotHere

from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.models.load import load_model
from vlmdpo.training.prefill import fill_reference_cache
from vlmdpo.training.synthetic_rows import Workload, synthetic_rows
from vlmdpo.training.trainer import PairTrainer

_PROMPT, _ANSWER, _ACCUMULATION = 50, 250, 2
_TOY_ANSWER, _TOY_IMAGE = 8, (48, 36)
_WORKERS = 4
_WAIT_S = 90.0


@dataclass(frozen=True)
class MemoryCase:
    """One setting of `estimate-memory` and of a real run."""

    model: str
    image: tuple[int, int]
    batch: int
    engine: str = "shared"
    lora: bool = True
    checkpointing: bool = True
    dtype: str = "bfloat16"
    quantization: str = "none"

    @property
    def name(self) -> str:
        how = "LoRA" if self.lora else "full"
        parts = [self.model, how, self.engine, f"batch{self.batch}"]
        parts += [] if self.checkpointing else ["no-checkpointing"]
        parts += [] if self.quantization == "none" else [self.quantization]
        return "memory-" + "-".join(parts)

    def options(self, *, toy: bool) -> dict[str, Any]:
        """Options of `estimate-memory`."""
        width, height = _TOY_IMAGE if toy else self.image
        return {
            "model": "tiny" if toy else self.model,
            "image_size": f"{width}x{height}",
            "prompt_tokens": _PROMPT,
            "answer_tokens": _TOY_ANSWER if toy else _ANSWER,
            "dtype": "float32" if toy else self.dtype,
            "lora": self.lora,
            "engine": self.engine,
            "per_device_train_batch_size": 1 if toy else self.batch,
            "gradient_accumulation_steps": _ACCUMULATION,
            "gradient_checkpointing": self.checkpointing,
            "quantization": self.quantization,
        }


CASES = (
    MemoryCase("idefics2-8b", (980, 735), 2),
    MemoryCase("idefics2-8b", (490, 368), 2, engine="stock"),
    MemoryCase("qwen2-vl-2b", (640, 480), 2, lora=False, dtype="float32"),
    MemoryCase("llava-1.5-7b", (640, 480), 4),
    MemoryCase("qwen2.5-vl-3b", (1024, 768), 2, checkpointing=False),
    MemoryCase("qwen2-vl-2b", (640, 480), 4, quantization="nf4"),
    MemoryCase("smolvlm-2.2b", (384, 288), 8),
    MemoryCase("paligemma-3b-224", (224, 224), 4),
    MemoryCase("gemma-3-4b", (896, 672), 2),
    MemoryCase("llava-1.5-7b", (640, 480), 2, engine="stock"),
)


def cases(*, toy: bool) -> list[MemoryCase]:
    """The settings; of a toy run, three: with an adapter, without, and one that needs a GPU."""
    return [CASES[0], CASES[2], CASES[5]] if toy else list(CASES)


class Forecasts:
    """The estimates, made in processes beside the measurements of memory.

    In processes of their own also because an estimate sets accelerate's state, of which a process
    has one, to the CPU.
    """

    def __init__(self, folder: Path, cases: list[MemoryCase], *, toy: bool) -> None:
        self._files = [folder / f"forecast-{n}.jsonl" for n in range(1 if toy else _WORKERS)]
        self._cases, self._toy = cases, toy
        self._processes: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        """Start them, once: only when nothing is timed any more, whose pace the CPU sets."""
        if self._processes:
            return
        count = len(self._files)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        for number, path in enumerate(self._files):
            jobs = [[case.name, case.options(toy=self._toy)] for case in self._cases[number::count]]
            with path.open("w") as out, path.with_suffix(".log").open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("_gpu_forecast.py"))],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=log,
                    text=True,
                    env=environment,
                )
            assert process.stdin is not None
            process.stdin.write(json.dumps(jobs))
            process.stdin.close()
            self._processes.append(process)

    def get(self, name: str, timeout_s: float) -> dict[str, Any]:
        """{"report": ...} or {"error": ...} of a case; waits for it."""
        until = time.monotonic() + timeout_s
        while True:
            done = all(process.poll() is not None for process in self._processes)
            for path in self._files:
                for line in path.read_text().splitlines(keepends=True):
                    if line.endswith("\n") and json.loads(line)["name"] == name:
                        return dict(json.loads(line))
            if done or time.monotonic() > until:
                logs = "".join(path.with_suffix(".log").read_text() for path in self._files)
                reason = f"ended: {logs[-400:]}" if done else f"not done in {timeout_s:.0f} s"
                return {"name": name, "error": f"estimate-memory {reason}"}
            time.sleep(0.2)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def memory(machine: Machine, case: MemoryCase, forecasts: Forecasts) -> dict[str, Any]:
    """One setting: what `estimate-memory` says, and what PyTorch's allocator counted."""
    found: dict[str, Any] = {"options": case.options(toy=machine.toy)}
    if case.quantization != "none":
        if not machine.is_cuda:
            raise NotHere("4-bit weights need a GPU")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise NotHere("bitsandbytes is not installed")
    machine.release()
    forecasts.start()
    before = machine.allocated_bytes()
    found |= _measured(machine, case)
    found["before_bytes"] = before
    forecast = forecasts.get(case.name, min(_WAIT_S, max(1.0, machine.seconds_left())))
    if "error" in forecast:
        return {**found, "estimate_error": forecast["error"], "ratio": None, "passed": False}
    report = forecast["report"]
    found["estimated_bytes"] = report["peak_bytes"]
    found["estimated"] = {
        "static_bytes": report["allocated"]["total_bytes"],
        "components": {c["name"]: c["bytes"] for c in report["allocated"]["components"]},
        "phases": report["phases"],
    }
    peak = found["peak_bytes"]
    found["ratio"] = None if peak is None else found["estimated_bytes"] / peak["allocated"]
    found["passed"] = None if peak is None else abs(found["ratio"] - 1) < 0.05
    return found


def _measured(machine: Machine, case: MemoryCase) -> dict[str, Any]:
    """Peak of the second optimizer step, when its states exist."""
    started = time.monotonic()
    trainer, batches = _trainer(machine, case)
    with_weights = machine.allocated_bytes()

    def step() -> None:
        if case.lora:  # in the first epoch, which peaks, the reference is computed
            trainer.reference_cache = ReferenceCache(machine.folder, "none")
        optimizer_step(trainer, *batches)

    step()
    peak = machine.peak_of(step)
    found = {
        "weights_bytes": with_weights,
        "after_step_bytes": machine.allocated_bytes(),
        "peak_bytes": peak,
        "trainable": sum(p.numel() for p in trained(trainer).values()),
        "optimizer": type(trainer.optimizer).__name__,
        "fused": trainer.optimizer.defaults.get("fused"),
        "seconds": time.monotonic() - started,
    }
    if machine.is_cuda:
        free, total = torch.cuda.mem_get_info(machine.device)
        # Context, cuBLAS and what else the driver has given to others.
        found["outside_allocator_bytes"] = total - free - torch.cuda.memory_reserved(machine.device)
    return found


def _trainer(machine: Machine, case: MemoryCase) -> tuple[PairTrainer, list[dict[str, Any]]]:
    """The trainer of a real run with this setting, and the batches of one optimizer step."""
    options = case.options(toy=machine.toy)
    shape = architecture(machine, options["model"])
    answer, batch = options["answer_tokens"], options["per_device_train_batch_size"]
    work = Workload(_TOY_IMAGE if machine.toy else case.image, 1, _PROMPT, answer, answer)
    count = _ACCUMULATION * batch
    rows = list(synthetic_rows(shape.processor, work, count).add_column("row", range(count)))
    model = build(machine, shape.config, getattr(torch, options["dtype"]))
    if case.quantization != "none":
        model = _quantized(machine, model, case)
    cache = None if case.lora else ReferenceCache(machine.folder, case.name)
    trainer = trainer_of(
        machine,
        shape,
        model,
        rows,
        engine=case.engine,
        reference_cache=cache,
        lora=case.lora,
        gradient_checkpointing=case.checkpointing,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=_ACCUMULATION,
    )
    if cache is not None:
        with torch.no_grad():
            fill_reference_cache(trainer)
        trainer.model.train()
    starts = range(0, count, batch)
    return trainer, [collate(trainer, rows[start : start + batch]) for start in starts]


def _quantized(machine: Machine, model: Any, case: MemoryCase) -> Any:
    """The same model as a real run loads it in 4 bits: from files."""
    folder = machine.folder / "weights"
    model.save_pretrained(folder)
    del model
    machine.release()
    return load_model(
        str(folder), dtype=case.dtype, device=machine.device.type, quantization=case.quantization
    )


_AUTO_ROWS = 8


def auto_batch(machine: Machine, model_alias: str) -> dict[str, Any]:
    """A batch that does not fit must be computed in parts, with the same loss and gradients."""
    machine.release()
    shape = architecture(machine, model_alias)
    rows = (
        random_rows(_AUTO_ROWS, (30, 24), 8, (4, 9))
        if machine.toy
        else random_rows(_AUTO_ROWS, (640, 480), 50, (150, 250))
    )
    model = build(machine, shape.config, machine.dtype)
    trainer = trainer_of(machine, shape, model, rows, engine="shared")
    runs = {size: collate(trainer, rows[:size]) for size in (len(rows), len(rows) // 2)}
    loss_and_gradients(trainer, runs[len(rows)])  # compiles what is compiled
    before = machine.allocated_bytes()
    peaks = {
        size: machine.peak_of(lambda batch=batch: loss_and_gradients(trainer, batch))
        for size, batch in runs.items()
    }
    whole = _on_host(loss_and_gradients(trainer, runs[len(rows)]))
    halves = _mean(
        [
            _on_host(loss_and_gradients(trainer, collate(trainer, half)))
            for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :])
        ]
    )
    trainer.enable_auto_batch()
    auto = trainer.auto_batch
    assert auto is not None
    with _little_memory(machine, trainer, peaks, before) as ballast_bytes:
        tried = _on_host(loss_and_gradients(trainer, auto.collator(rows)))
    parts = auto.num_parts
    found = {
        "model": model_alias,
        "rows": len(rows),
        "real": machine.is_cuda,
        "ballast_bytes": ballast_bytes,
        "peaks": peaks,
        "parts": parts,
        "loss": {"whole": whole[0], "two halves": halves[0], "after running out": tried[0]},
        "gradient_difference": {
            "whole and two halves": gradient_difference(whole[1], halves[1]),
            "whole and after running out": gradient_difference(whole[1], tried[1]),
            "two halves and after running out": gradient_difference(halves[1], tried[1]),
        },
        "before_bytes": before,
    }
    del whole, halves, tried, runs
    trainer.model.zero_grad(set_to_none=True)
    found["after_bytes"] = machine.allocated_bytes()
    apart = found["gradient_difference"]
    found["freed"] = before is None or found["after_bytes"] <= before + 2**20
    found["passed"] = (
        parts > 1
        and found["freed"]
        and apart["whole and after running out"]
        <= max(4 * apart["whole and two halves"], 1e-4 if machine.toy else 0.05)
    )
    return found


def _on_host(found: tuple[float, dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    """The same loss and gradients, without taking the GPU's memory."""
    return found[0], {name: gradient.cpu() for name, gradient in found[1].items()}


def _mean(found: list[tuple[float, dict[str, Any]]]) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of a batch from those of equal parts of it."""
    gradients = {name: sum(part[name] for _, part in found) / len(found) for name in found[0][1]}
    return sum(loss for loss, _ in found) / len(found), gradients


@contextlib.contextmanager
def _little_memory(
    machine: Machine, trainer: PairTrainer, peaks: dict[int, Any], before: int | None
) -> Iterator[int | None]:
    """Inside, half a batch fits into memory, and a whole one does not.

    On a GPU a tensor takes the rest; a CPU's memory is not filled: there the model raises what
    PyTorch would raise.
    """
    large, small = sorted(peaks, reverse=True)
    if not machine.is_cuda:

        def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if len(kwargs["input_ids"]) > 2 * small:
                raise torch.OutOfMemoryError("pretended to be out of memory, on a CPU")

        hook = trainer.model.register_forward_pre_hook(refuse, with_kwargs=True)
        try:
            yield None
        finally:
            hook.remove()
        return
    assert before is not None
    torch.cuda.empty_cache()
    # Halfway between the two, as the allocator reserves memory.
    needed = (peaks[large]["reserved"] + peaks[small]["reserved"]) // 2
    free, _ = torch.cuda.mem_get_info(machine.device)
    size = free - max(0, needed - torch.cuda.memory_reserved(machine.device))
    size -= size % 2**21  # the driver gives out whole pages of 2 MiB
    ballast = torch.empty(size, dtype=torch.uint8, device=machine.device)
    try:
        yield size
    finally:
        del ballast
        torch.cuda.empty_cache()
