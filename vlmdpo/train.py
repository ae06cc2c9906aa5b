"""`vlmdpo train`: DPO on a prepared dataset, prepared first where need be, with everything a run leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from vlmdpo import prepare, ui
from vlmdpo.config import RATES, SANE_RATES, EstimateMemoryConfig, PrepareConfig, TrainConfig
from vlmdpo.data import store
from vlmdpo.dpo import setup as engine_room
from vlmdpo.errors import DataError, Interrupted, MemoryBudgetError, ModelError, VlmDpoError
from vlmdpo.models.registry import hub_id, short_name

RECIPE = "recipe.yaml"  # the resolved settings; its presence marks a folder as a run of ours
CURVES = "learning_curves.png"
_VERSIONS = ("vlmdpo", "torch", "transformers", "trl", "peft", "datasets", "accelerate")
OVER_LENGTH = "over_length.jsonl"  # rows beyond --max-length: their tokens, and whether they were dropped or trimmed


def run(config: TrainConfig) -> dict[str, Any]:
    """Train, save adapter (or model), processor, metrics and curves, and return the report.

    Raises:
        ConfigError, DataError, ModelError: see the message.
        Interrupted: Ctrl-C; a checkpoint is kept.
    """
    if config.dry_run:
        from vlmdpo import dry_run

        return dry_run.plan(config)
    from vlmdpo.dpo.arguments import dpo_config
    from vlmdpo.dpo.watch import METRICS, Watch
    from vlmdpo.models.load import pick_device

    output_dir = config.output_dir or Path("outputs") / f"{short_name(config.model)}-{short_name(config.dataset)}-dpo"
    if config.doctor:
        return _examined(config)
    config = dataclasses.replace(config, output_dir=output_dir)
    _check_rate(config)
    args = dpo_config(config, output_dir, pick_device(config.device))
    if args.process_index > 0:
        ui.mute()
    with args.main_process_first():  # the others find the data prepared
        if args.process_index == 0:
            _check_output(output_dir, config)
        data = _prepared(config)
    foreseen = _plan_batch(config, args, data) if config.auto_batch_size else None
    watch = Watch(output_dir / METRICS, foreseen_peak_bytes=foreseen)
    with _gone_if_empty(output_dir):
        setup = engine_room.set_up(config, args, data, watch)
    trainer = setup.trainer
    if args.process_index == 0:
        _start_output(output_dir, config, setup.over_length)
    trainer.accelerator.wait_for_everyone()
    engine_room.check(setup, config)
    _say_plan(trainer, config, len(setup.dataset))
    try:
        with setup.watch.catching_ctrl_c():
            outcome = trainer.train(resume_from_checkpoint=config.resume)
    except OSError as problem:
        raise DataError(f"cannot write '{output_dir}': {problem.strerror or problem}") from problem
    trainer.save_references()
    if setup.watch.interrupted and trainer.state.global_step < trainer.state.max_steps:
        again = shlex.join(["vlmdpo", "train", "--config", str(output_dir / RECIPE), "--resume"])
        raise Interrupted(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; go on with: {again}")
    return _finish(setup, outcome.metrics, output_dir, config)


def _check_rate(config: TrainConfig) -> None:
    """Warn of a learning rate that suits another way of training; the embedded model is too small for such rules."""
    way, rate = "LoRA" if config.lora else "full", config.peak_learning_rate
    low, high = SANE_RATES[way]
    if config.model != "tiny" and not low <= rate <= high:
        what = "an adapter" if config.lora else "a whole model"
        ui.warn(f"--learning-rate {rate:g}: {what} usually learns between {low:g} and {high:g}; {RATES[way]:g} is the default")


def _plan_batch(config: TrainConfig, args: Any, data: Path) -> int | None:
    """Set the largest batch that is foreseen to fit the GPU; returns its peak in bytes. Without a GPU nothing is foreseen.

    Raises MemoryBudgetError where not even one pair would fit.
    """
    import torch

    from vlmdpo.models.load import pick_dtype

    if args.device.type != "cuda":
        ui.say(f"no GPU to plan for: starting with batch {args.per_device_train_batch_size}")
        return None
    total = torch.cuda.get_device_properties(args.device).total_memory
    found = foreseen_plan(config, data, total, str(pick_dtype(config.dtype, args.device)).removeprefix("torch."))
    best = found["plan"]["per_device_train_batch_size"]
    if best is None:
        raise MemoryBudgetError(
            f"one pair needs {found['gpu']['needed_bytes'] / 2**30:.1f} GiB, and the GPU has {total / 2**30:.1f}; "
            f"see vlmdpo estimate-memory --model {config.model} --gpu {total // 2**20}MiB"
        )
    args.per_device_train_batch_size = best
    args.gradient_accumulation_steps = found["plan"]["gradient_accumulation_steps"]
    ui.say(f"batch {best} × {args.gradient_accumulation_steps} accumulation steps is foreseen to fit")
    return int(found["plan"]["peak_bytes"])


def foreseen_plan(config: TrainConfig, data: Path, capacity_bytes: int, dtype: str) -> dict[str, Any]:
    """What `estimate-memory` says of this run on its own data. Raises ModelError where it cannot.

    It runs in a process of its own: a simulation sets accelerate's state, of which a process has one, to the CPU.
    """
    shared = {f.name for f in dataclasses.fields(EstimateMemoryConfig)} & {f.name for f in dataclasses.fields(TrainConfig)}
    settings = {name: getattr(config, name) for name in shared - {"json"}}
    settings |= {"dtype": dtype, "dataset": str(data.absolute()), "gpu": f"{capacity_bytes // 2**20}MiB"}
    alone = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    with tempfile.TemporaryDirectory() as name:
        recipe = Path(name) / "estimate.yaml"
        recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
        command = [sys.executable, "-m", "vlmdpo", "estimate-memory", "--config", str(recipe), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env={**alone, "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(f"--auto-batch-size: no batch can be foreseen ({said}); leave it out, or see vlmdpo estimate-memory")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _examined(config: TrainConfig) -> dict[str, Any]:
    """`--doctor`: everything up to the first step, in a folder that is gone afterwards; returns the findings."""
    from vlmdpo.dpo.arguments import dpo_config
    from vlmdpo.dpo.watch import METRICS, Watch
    from vlmdpo.models.load import pick_device

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args = dpo_config(config, folder, pick_device(config.device))
        setup = engine_room.set_up(config, args, _prepared(config), Watch(folder / METRICS))
        return engine_room.examine(setup, config)


@contextlib.contextmanager
def _gone_if_empty(folder: Path) -> Iterator[None]:
    """The trainer makes its folder at once; where setting up fails, an empty one does not stay behind."""
    try:
        yield
    except VlmDpoError:
        with contextlib.suppress(OSError):  # it holds something, then: an earlier run
            folder.rmdir()
        raise


def _check_output(folder: Path, config: TrainConfig) -> None:
    """Refuse a folder that cannot be, holds something else, or an earlier run that nobody said what to do with."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise DataError(f"--output-dir: cannot write '{folder}': '{nearest}' is a file")
    if not os.access(nearest, os.W_OK):
        raise DataError(f"--output-dir: cannot write '{folder}': no permission in '{nearest}'")
    held = folder.is_dir() and any(folder.iterdir())
    if held and not (folder / RECIPE).is_file():
        raise DataError(f"--output-dir: '{folder}' holds something else; give an empty or new folder")
    if held and not (config.resume or config.overwrite):
        raise DataError(f"--output-dir: '{folder}' holds an earlier run; add --resume, --overwrite, or give another folder")
    if config.resume and not any(folder.glob("checkpoint-*")):
        raise DataError(f"--resume: '{folder}' holds no checkpoint; start without --resume")


def _start_output(folder: Path, config: TrainConfig, over_length: list[dict[str, Any]]) -> None:
    try:
        if config.overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
        # A recipe is for doing it again: flags that belong to one call stay out of it.
        plain = {
            name: list(v) if isinstance(v, tuple) else v
            for name, v in plain.items()
            if name not in ("resume", "overwrite", "doctor", "dry_run", "gpu", "json")
        }
        if over_length:
            (folder / OVER_LENGTH).write_text("".join(json.dumps(row) + "\n" for row in over_length), encoding="utf-8")
        (folder / RECIPE).write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    except OSError as problem:
        raise DataError(f"--output-dir: cannot write '{folder}': {problem.strerror or problem}") from problem


def _prepared(config: TrainConfig) -> Path:
    """The prepared folder behind --dataset: that folder itself, or what `prepare` makes of the source."""
    folder = Path(config.dataset)
    if store.read_manifest(folder) is not None:
        return folder
    shared = {
        name: getattr(config, name) for name in ("model", "revision", "trust_remote_code", "dataset", "split", "max_image_side")
    }
    report = prepare.run(PrepareConfig(**shared))
    ui.say(f"{'found prepared' if report['reused'] else 'prepared'}: {report['rows_out']:,} pairs in {report['path']}")
    return Path(report["path"])


def _say_plan(trainer: Any, config: TrainConfig, pairs: int) -> None:
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    args = trainer.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    way = {"shared": "shared prefix", "rows": "stock rows, images once", "stock": "stock TRL"}[trainer.engine]
    attention = trainer.accelerator.unwrap_model(trainer.model).config._attn_implementation
    precision = "bfloat16 autocast" if trainer.args.bf16 else str(trainer.model.dtype).removeprefix("torch.")
    what = f"LoRA r={config.lora_r}" if config.lora else "all weights"
    ui.say(
        f"{pairs:,} pairs, {batch} a step; {what}: {trainable:,} of {total:,} parameters train; "
        f"{trainer.args.device}, {precision}, {attention} attention, {way}"
    )


def _finish(setup: Any, outcome: dict[str, float], folder: Path, config: TrainConfig) -> dict[str, Any]:
    """Save the model and what was seen on the way; returns the report."""
    from vlmdpo.report import curves, model_card

    trainer, watch = setup.trainer, setup.watch
    if not all(math.isfinite(line["loss"]) for line in watch.lines):
        raise ModelError(f"the loss is no longer a number; lower --learning-rate. Metrics: '{folder / 'metrics.jsonl'}'")
    report = {
        "output_dir": str(folder),
        "model": config.model,
        "dataset": config.dataset,
        "steps": trainer.state.global_step,
        "learning_rate": config.peak_learning_rate,
        **_last_metrics(watch.lines[-1]),
        "pairs_per_s": outcome["train_samples_per_second"],
        "elapsed_s": outcome["train_runtime"],
        "engine": "shared" if trainer.engine == "shared" else "stock",
        "images_once": trainer.engine != "stock",
        "fallback_reason": setup.fallback_reason,
        "checkpointed_layers": trainer.checkpointed_layers,
        "over_length": dict(Counter(row["done"] for row in setup.over_length)),
        "per_device_train_batch_size": _batch_size(trainer),
        "peak_bytes": _peak_bytes(trainer.args.device),
        "curves": str(folder / CURVES),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
    }
    try:
        if trainer.args.process_index == 0:
            _save_weights(trainer.accelerator.unwrap_model(trainer.model), folder, config)
            setup.processor.save_pretrained(folder)
            engine_room.check_saved(setup, folder, config)
            curves.draw(watch.lines, f"{config.model} · {config.dataset} · DPO", folder / CURVES)
            (folder / model_card.REPORT).write_text(json.dumps(report, indent=2), encoding="utf-8")
            model_card.write(folder)
        trainer.accelerator.wait_for_everyone()
    except OSError as problem:
        raise DataError(f"cannot write '{folder}': {problem.strerror or problem}") from problem
    return report


def _batch_size(trainer: Any) -> int:
    """Pairs in a forward pass at the end: fewer than asked for where memory ran out on the way."""
    size = trainer.auto_batch or trainer.args
    return int(size.per_device_train_batch_size)


def _last_metrics(line: dict[str, Any]) -> dict[str, Any]:
    names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    return {name: line[name] for name in names}


def _peak_bytes(device: Any) -> int | None:
    """The most that PyTorch had allocated on a CUDA device; None elsewhere, where nothing counts it."""
    import torch

    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def _save_weights(model: Any, folder: Path, config: TrainConfig) -> None:
    """Adapter or model as safetensors. Not `trainer.save_model`: that leaves training_args.bin, a pickle, beside it."""
    if not config.lora:
        model.save_pretrained(folder, safe_serialization=True)
        return
    # The adapter names its base as the user would: the embedded model's folder means nothing on another machine.
    model.peft_config["default"].base_model_name_or_path = hub_id(config.model)
    # Embeddings never train here; left to find out, PEFT would ask the Hub about the base model.
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)


def show(report: dict[str, Any]) -> None:
    """Print how the run ended and where its results are; for `--doctor`, that all is well."""
    if "dry_run" in report:
        from vlmdpo import dry_run

        dry_run.show(report)
        return
    if "checks" in report:
        ui.result(f"All {len(report['checks'])} checks hold; leave out --doctor to train.")
        return
    ui.table(
        f"Trained {report['model']} on {report['dataset']}",
        ["Steps", "Loss", "Reward accuracy", "Reward margin", "Pairs/s", "Seconds"],
        [
            [
                f"{report['steps']}",
                f"{report['loss']:.4f}",
                f"{report['rewards/accuracies']:.3f}",
                f"{report['rewards/margins']:+.3f}",
                f"{report['pairs_per_s']:.1f}",
                f"{report['elapsed_s']:.0f}",
            ]
        ],
        note="Loss, accuracy and margin as last logged.",
    )
    if report["fallback_reason"]:
        ui.result(f"Engine: stock rows, because {report['fallback_reason']}")
    ui.result(f"Adapter, processor, metrics and curves: {report['output_dir']}")
    ui.result(f"Curves: {report['curves']}")
