"""`vlmdpo train`: DPO on a prepared dataset, prepared first where need be, with everything a run
leaves behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vlmdpo import ui
from vlmdpo.commands import prepare
from vlmdpo.config import DEFAULT_RATES, PER_CALL, USUAL_RATES, PrepareConfig, TrainConfig, recipes
from vlmdpo.data import store
from vlmdpo.distributed.processes import launched_strategy
from vlmdpo.errors import DataError, Interrupted, MemoryBudgetError, Preempted
from vlmdpo.models.registry import short_name
from vlmdpo.training import memory_forecast, results
from vlmdpo.training import setup as training_setup

RECIPE = "recipe.yaml"  # the resolved settings; its presence marks a folder as a run of ours
# a recipe is for doing it again: what belongs to one call, or one machine, stays out of it
_PER_CALL = {
    *("resume", "overwrite", "doctor", "dry_run", "gpu", *PER_CALL),
    *("num_machines", "machine_rank", "main_process_ip", "main_process_port"),
}
# rows beyond --max-length: their tokens, and whether they were dropped or trimmed
OVER_LENGTH = "over_length.jsonl"


def run(config: TrainConfig) -> dict[str, Any]:
    """Train, save adapter (or model), processor, metrics and curves, and return the report.

    Raises:
        ConfigError, DataError, ModelError: see the message.
        Interrupted, Preempted: Ctrl-C, SIGTERM; a checkpoint is kept.
        MemoryBudgetError: memory ran out.
    """
    if config.dry_run:
        from vlmdpo.commands import train_plan

        return train_plan.plan(config)
    with _preempted_by_sigterm():
        return _train(config)


class _Told(BaseException):
    """SIGTERM, raised wherever the program happens to be. No Exception: libraries catch those, and
    go on or say another.
    """


@contextlib.contextmanager
def _preempted_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the program at once: there is nothing to save yet, or nothing left to
    do. Only what trains has a handler of its own.
    """
    told = False

    def stop(number: int, frame: Any) -> None:
        nonlocal told
        told = True
        raise _Told

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException as problem:
        if not told:
            raise
        # Whatever it is by now: where it was raised, as in the middle of an import, it may have
        # been made another error.
        message = "SIGTERM outside training; what checkpoints there are stay, and --resume goes on from them"
        raise Preempted(message) from problem
    finally:
        signal.signal(signal.SIGTERM, before)


def _train(config: TrainConfig) -> dict[str, Any]:
    from vlmdpo.models.load import pick_device
    from vlmdpo.training.arguments import dpo_config
    from vlmdpo.training.monitor import METRICS, TrainingMonitor

    output_dir = (
        config.output_dir
        or Path("outputs") / f"{short_name(config.model)}-{short_name(config.dataset)}-dpo"
    )
    if config.doctor:
        return _examined(config)
    config = dataclasses.replace(config, output_dir=output_dir)
    _check_rate(config)
    args = dpo_config(config, output_dir, pick_device(config.device))
    if args.process_index > 0:
        ui.mute()
    with args.main_process_first():  # the others find the data prepared
        if args.process_index == 0:
            config = _check_output(output_dir, config)
        data = _prepared(config)
    if config.auto_batch_size:
        _plan_batch(config, args, data)
    with _foreseeing(config, args, data) as peak:
        with _gone_if_empty(output_dir):
            setup = training_setup.set_up_training(
                config, args, data, TrainingMonitor(output_dir / METRICS, foreseen=peak)
            )
        return _run(setup, config, output_dir)


def _run(setup: Any, config: TrainConfig, output_dir: Path) -> dict[str, Any]:
    """Check, train, and leave what was learnt."""
    trainer, args = setup.trainer, setup.trainer.args
    if args.process_index == 0:
        _start_output(output_dir, config, setup.over_length)
    trainer.accelerator.wait_for_everyone()
    training_setup.check(setup, config)
    results.attach_samples_and_page(setup, output_dir, config)
    _say_plan(trainer, config, len(setup.dataset))
    last = _last_checkpoint(output_dir) if config.resume else None
    with _in_words(setup, output_dir), setup.watch.catching_signals():
        outcome = trainer.train(resume_from_checkpoint=str(last) if last else None)
    trainer.save_references()
    if setup.watch.stopped_by and trainer.state.global_step < trainer.state.max_steps:
        again = shlex.join(["vlmdpo", "train", "--config", str(output_dir / RECIPE), "--resume"])
        kind = Interrupted if setup.watch.stopped_by == signal.SIGINT else Preempted
        raise kind(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; go on "
            f"with: {again}"
        )
    return results.finish(setup, outcome.metrics, output_dir, config)


def _last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint; said, where there is none."""
    from vlmdpo.training import checkpoints

    found = checkpoints.list_checkpoints(folder)
    if not found:
        ui.say(f"no checkpoint in '{folder}' yet: starting from the beginning")
        return None
    ui.say(f"going on from {found[-1].name}")
    return found[-1]


@contextlib.contextmanager
def _in_words(setup: Any, folder: Path) -> Iterator[None]:
    """What can end a training from within, as an error that says what to do."""
    import torch

    from vlmdpo.training.trainer import NonFiniteLoss

    trainer = setup.trainer
    try:
        yield
    except NonFiniteLoss as problem:
        raise training_setup.explain_non_finite_loss(setup, problem, folder) from problem
    except torch.OutOfMemoryError as problem:
        batch = trainer.args.per_device_train_batch_size
        raise MemoryBudgetError(
            f"out of memory at step {trainer.state.global_step + 1} with batch {batch}; add "
            "--auto-batch-size, or see "
            "vlmdpo estimate-memory"
        ) from problem
    except OSError as problem:
        raise DataError(f"cannot write '{folder}': {problem.strerror or problem}") from problem
    except RuntimeError as problem:
        if "DataLoader worker" not in str(problem):
            raise
        workers = trainer.args.dataloader_num_workers
        raise DataError(
            f"one of --dataloader-num-workers {workers} died at step "
            f"{trainer.state.global_step + 1}, as one does that runs "
            "out of memory; go on with --resume, and fewer"
        ) from problem


def _check_rate(config: TrainConfig) -> None:
    """Warn of a learning rate that suits another way of training; the embedded model is too small
    for such rules.
    """
    way, rate = "LoRA" if config.lora else "full", config.peak_learning_rate
    low, high = USUAL_RATES[way]
    if config.model != "tiny" and not low <= rate <= high:
        what = "an adapter" if config.lora else "a whole model"
        ui.warn(
            f"--learning-rate {rate:g}: {what} usually learns between {low:g} and {high:g}; "
            f"{DEFAULT_RATES[way]:g} is the default"
        )


def _dtype(config: TrainConfig, args: Any) -> str:
    """The data type of the base weights, by name."""
    from vlmdpo.models.load import pick_dtype

    return str(pick_dtype(config.dtype, args.device)).removeprefix("torch.")


@contextlib.contextmanager
def _foreseeing(config: TrainConfig, args: Any, data: Path) -> Iterator[Any]:
    """Inside, the peak memory is being foreseen, or None: it is not wanted, or the batch was
    planned by it already.
    """
    wanted = args.device.type == "cuda" if config.foresee_memory is None else config.foresee_memory
    if (
        not wanted or args.process_index or config.losses().is_mdpo
    ):  # mDPO's step is not one that can be foreseen
        yield None
        return
    # As the run is, whoever launched it: --auto-batch-size and accelerate's own launcher may have
    # changed what was asked for.
    told = {
        name: getattr(args, name)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    }
    told |= {"num_processes": args.world_size, "num_machines": 1, "machine_rank": 0}
    told["strategy"] = (launched_strategy() if args.world_size > 1 else "") or "ddp"
    found = memory_forecast.MemoryForecast(
        dataclasses.replace(config, auto_batch_size=False, **told), data, _dtype(config, args)
    )
    try:
        yield found
    finally:
        found.close()


def _plan_batch(config: TrainConfig, args: Any, data: Path) -> None:
    """Set the largest batch that is foreseen to fit the GPU. Without a GPU nothing is foreseen.

    Raises MemoryBudgetError where not even one pair would fit.
    """
    import torch

    if args.device.type != "cuda":
        ui.say(f"no GPU to plan for: starting with batch {args.per_device_train_batch_size}")
        return
    total = torch.cuda.get_device_properties(args.device).total_memory
    found = memory_forecast.plan(config, data, total, _dtype(config, args))
    best = found["plan"]["per_device_train_batch_size"]
    if best is None:
        raise MemoryBudgetError(
            f"one pair needs {found['gpu']['needed_bytes'] / 2**30:.1f} GiB, and the GPU has "
            f"{total / 2**30:.1f}; "
            f"see vlmdpo estimate-memory --model {config.model} --gpu {total // 2**20}MiB"
        )
    args.per_device_train_batch_size = best
    args.gradient_accumulation_steps = found["plan"]["gradient_accumulation_steps"]
    ui.say(
        f"batch {best} × {args.gradient_accumulation_steps} accumulation steps is foreseen to fit"
    )


def _examined(config: TrainConfig) -> dict[str, Any]:
    """`--doctor`: everything up to the first step, in a folder that is gone afterwards; returns the
    findings.
    """
    from vlmdpo.models.load import pick_device
    from vlmdpo.training.arguments import dpo_config
    from vlmdpo.training.monitor import METRICS, TrainingMonitor

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args = dpo_config(config, folder, pick_device(config.device))
        setup = training_setup.set_up_training(
            config, args, _prepared(config), TrainingMonitor(folder / METRICS)
        )
        return training_setup.examine(setup, config)


@contextlib.contextmanager
def _gone_if_empty(folder: Path) -> Iterator[None]:
    """The trainer makes its folder at once; where setting up fails, an empty one does not stay
    behind.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it holds something, then: an earlier run
            folder.rmdir()
        raise


def _check_output(folder: Path, config: TrainConfig) -> TrainConfig:
    """Refuse a folder that cannot be, holds something else, or an earlier run that nobody said what
    to do with; returns the settings, with --overwrite where a person agreed to it.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise DataError(f"--output-dir: cannot write '{folder}': '{nearest}' is a file")
    if not os.access(nearest, os.W_OK):
        raise DataError(f"--output-dir: cannot write '{folder}': no permission in '{nearest}'")
    held = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if held and not (folder / RECIPE).is_file():
        raise DataError(
            f"--output-dir: '{folder}' holds something else; give an empty or new folder"
        )
    if held and not (config.resume or config.overwrite):
        if not ui.confirm(f"'{folder}' holds an earlier run. Replace it?"):
            raise DataError(
                f"--output-dir: '{folder}' holds an earlier run; add --resume, --overwrite, or "
                "give another folder"
            )
        return dataclasses.replace(config, overwrite=True)
    if held and config.resume:
        _warn_of_changes(folder, config)
    return config


def _warn_of_changes(folder: Path, config: TrainConfig) -> None:
    """Say which settings are others than those the run was begun with: what follows is then no
    longer the same run.
    """
    begun, now = (
        yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8")),
        recipes.plain(config, without=_PER_CALL),
    )
    changed = [
        f"{name} {begun.get(name)} → {value}"
        for name, value in now.items()
        if begun.get(name) != value
    ]
    if changed:
        ui.warn(f"--resume with other settings than the run was begun with: {', '.join(changed)}")


def _start_output(folder: Path, config: TrainConfig, over_length: list[dict[str, Any]]) -> None:
    from vlmdpo.training import checkpoints

    try:
        if config.overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_partial(folder)
        part = folder / f".{RECIPE}.partial"
        part.write_text(
            yaml.safe_dump(recipes.plain(config, without=_PER_CALL), sort_keys=False),
            encoding="utf-8",
        )
        part.replace(
            folder / RECIPE
        )  # first of all: from now on the folder is known as a run of ours
        if over_length:
            (folder / OVER_LENGTH).write_text(
                "".join(json.dumps(row) + "\n" for row in over_length), encoding="utf-8"
            )
    except OSError as problem:
        raise DataError(
            f"--output-dir: cannot write '{folder}': {problem.strerror or problem}"
        ) from problem


def _prepared(config: TrainConfig) -> Path:
    """The prepared folder behind --dataset: that folder itself, or what `prepare` makes of the
    source.
    """
    folder = Path(config.dataset)
    if store.read_manifest(folder) is not None:
        return folder
    shared = {
        name: getattr(config, name)
        for name in ("model", "revision", "trust_remote_code", "dataset", "split", "max_image_side")
    }
    report = prepare.run(PrepareConfig(**shared))
    ui.say(
        f"{'found prepared' if report['reused'] else 'prepared'}: {report['rows_out']:,} pairs in "
        f"{report['path']}"
    )
    return Path(report["path"])


def _say_plan(trainer: Any, config: TrainConfig, pairs: int) -> None:
    from vlmdpo.models.families import size_of

    trainable = sum(size_of(p) for p in trainer.model.parameters() if p.requires_grad)
    total = sum(map(size_of, trainer.model.parameters()))
    args = trainer.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    way = {"shared": "shared prefix", "rows": "stock rows, images once", "stock": "stock TRL"}[
        trainer.engine
    ]
    attention = trainer.accelerator.unwrap_model(trainer.model).config._attn_implementation
    precision = (
        "bfloat16 autocast"
        if trainer.args.bf16
        else str(trainer.model.dtype).removeprefix("torch.")
    )
    what = f"LoRA r={config.lora_r}" if config.lora else "all weights"
    ui.say(
        f"{pairs:,} pairs, {batch} a step; {what}: {trainable:,} of {total:,} parameters train; "
        f"{trainer.args.device}, {precision}, {attention} attention, {way}"
    )


def show(report: dict[str, Any]) -> None:
    """Print how the run ended and where its results are; for `--doctor`, that all is well."""
    if "dry_run" in report:
        from vlmdpo.commands import train_plan

        train_plan.show(report)
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
    for finding in report["diagnosis"]:
        ui.result(f"{finding['title']}.")
        ui.result(f"  {finding['seen'][0].upper()}{finding['seen'][1:]} {finding['means']}")
        ui.result(f"  {'Next' if finding['level'] == 'good' else 'Try'}: {finding['tries'][0]}")
    ui.result(f"Adapter, processor, metrics and curves: {report['output_dir']}")
    ui.result(f"Curves, settings, samples and diagnosis: {report['page']}")
