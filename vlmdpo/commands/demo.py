"""`vlmdpo demo`: prepare, estimate, train, infer and evaluate, offline, on the embedded model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vlmdpo import config as cf
from vlmdpo import ui
from vlmdpo.commands import (
    demo_rounds,
    estimate_memory,
    eval_amber,
    eval_amber_screen,
    infer,
    prepare,
    train,
)
from vlmdpo.config import recipes
from vlmdpo.errors import DataError
from vlmdpo.models.registry import recipe
from vlmdpo.training import results

_MARK = "demo.json"
_QUESTION = "Is there a moon in this image?"  # the truth is no: it shows crosses and squares


def run(config: cf.DemoConfig) -> dict[str, Any]:
    """Run all five steps, printing as they go. Returns their reports. Raises DataError."""
    folder = config.output_dir
    _clear(folder)
    ui.step("1/5 prepare: preference pairs, checked and stored")
    prepared = prepare.run(cf.PrepareConfig(output_dir=folder / "data"))
    prepare.show(prepared)
    ui.step("2/5 estimate-memory: the memory of DPO, here and at full size")
    estimates = [
        estimate_memory.run(cf.EstimateMemoryConfig()),
        estimate_memory.run(
            cf.EstimateMemoryConfig(model="idefics2-8b", dtype="bfloat16", lora=True, fast=True)
        ),
    ]
    for estimate in estimates:
        ui.result(
            f"{estimate['model']} ({estimate['dtype']}{', LoRA' if estimate['lora_r'] else ''}): "
            f"{ui.human_bytes(estimate['total_bytes'])} by the article's table, before "
            f"activations; here a step peaks at about {ui.human_bytes(estimate['peak_bytes'])}"
        )
    ui.step("3/5 train: DPO with LoRA")
    layer = {"dataset": str(folder / "data"), "output_dir": folder / "adapter", "seed": config.seed}
    trained = train.run(recipes.build(cf.TrainConfig, recipe("tiny", "train"), layer))
    train.show(trained)
    adapter = Path(trained["output_dir"])
    ui.step("4/5 infer: one image, before and after")
    answered = infer.run(cf.InferConfig(adapter=adapter, compare=True, question=_QUESTION))
    infer.show(answered)
    ui.step("5/5 eval-amber: held-out questions, before and after")
    layer = {"adapter": adapter, "output_dir": folder / "amber"}
    evaluated = eval_amber.run(
        recipes.build(cf.EvalAmberConfig, recipe("tiny", "eval-amber"), layer)
    )
    more = demo_rounds.run(folder, adapter, config) if config.rounds > 1 else None
    return {
        "output_dir": str(folder),
        "rounds": more,
        "prepare": prepared,
        "estimate": estimates,
        "train": trained,
        "infer": answered,
        "eval": evaluated,
    }


def _clear(folder: Path) -> None:
    """Remove an earlier demo. Raises DataError if the folder holds anything else."""
    if folder.is_file():
        raise DataError(f"--output-dir: '{folder}' is a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARK).is_file():
        raise DataError(
            f"--output-dir: '{folder}' holds something else; choose an empty or new folder"
        )
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / _MARK).write_text(
            '{"what": "a vlmdpo demo; the next one replaces this folder"}\n', encoding="utf-8"
        )
    except OSError as problem:
        raise DataError(f"--output-dir: cannot write '{folder}': {problem.strerror}") from problem


def show(report: dict[str, Any]) -> None:
    """Print the scores, and where everything is."""
    eval_amber_screen.show_flips(report["eval"]["comparison"], 6)
    eval_amber.show(report["eval"])
    if report["rounds"] is not None:
        demo_rounds.show(report["rounds"])
    folder = report["output_dir"]
    written = [
        ["prepared pairs", f"{folder}/data"],
        ["adapter and processor", f"{folder}/adapter"],
        ["curves and diagnosis", f"{folder}/adapter/{results.PAGE}"],
        ["answers and scores", f"{folder}/amber"],
    ]
    ui.result("What the demo wrote:")
    for what, where in written:
        ui.result(f"  {what:<22} {where}")
    ui.result(f"Compare and vote: vlmdpo compare --adapter {folder}/adapter --amber {folder}/amber")
    ui.result("At full size: vlmdpo train --model idefics2-8b --dataset rlaif-v")
