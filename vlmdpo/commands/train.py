"""`vlmdpo train`: DPO on a prepared dataset, which is prepared first if it is not yet."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.commands import prepare, train_folder
from vlmdpo.config import DEFAULT_RATES, USUAL_RATES, PrepareConfig, TrainConfig
from vlmdpo.data import store
from vlmdpo.data.folder_lock import locked
from vlmdpo.distributed.processes import launched_strategy
from vlmdpo.errors import (
    ConfigError,
    DataError,
    Interrupted,
    MemoryBudgetError,
    Preempted,
    is_out_of_memory,
    out_of_memory_reason,
)
from vlmdpo.memory.terms import CONTEXT_BYTES
from vlmdpo.models.registry import short_name
from vlmdpo.training import (
    build,
    continued_options,
    lineage,
    memory_forecast,
    non_finite,
    results,
)
from vlmdpo.training.preemption import preempted_by_sigterm

# Options that `vlmdpo prepare` takes too, for data that is not prepared yet.
_PREPARE_OPTIONS = (
    *("model", "revision", "trust_remote_code", "system", "chat_template_kwargs"),
    *("dataset", "split", "max_image_side"),
)


def run(config: TrainConfig) -> dict[str, Any]:
    """Train, save adapter (or model), processor, metrics and curves, and return the report.

    Raises:
        ConfigError, DataError, ModelError: see the message.
        Interrupted, Preempted: Ctrl-C, SIGTERM; a checkpoint is kept.
        MemoryBudgetError: memory ran out.
    """
    config = continued_options.settle(config)
    if config.dry_run:
        from vlmdpo.commands import train_plan

        return train_plan.plan(config)
    with preempted_by_sigterm():
        return _doctor(config) if config.doctor else _train(config)


def _train(config: TrainConfig) -> dict[str, Any]:
    from vlmdpo.models.devices import pick_device
    from vlmdpo.report.metrics import METRICS_FILE
    from vlmdpo.training.arguments import dpo_config
    from vlmdpo.training.monitor import TrainingMonitor
    from vlmdpo.training.trial import try_if_unusual

    name = f"{short_name(config.model)}-{short_name(config.dataset)}-dpo"
    output_dir = config.output_dir or Path("outputs") / name
    config = dataclasses.replace(config, output_dir=output_dir)
    train_folder.check_apart(output_dir, config.adapter)
    _warn_of_unusual_rate(config)
    _warn_of_half_precision_weights(config)
    args = dpo_config(config, output_dir, pick_device(config.device))
    if args.process_index > 0:
        ui.mute()
    try_if_unusual(config, args.device)
    is_first = args.process_index == 0
    # Data is the same whoever prepares it; two runs are two results.
    with locked(output_dir, "training in") if is_first else contextlib.nullcontext():
        last = None
        with args.main_process_first():  # so that the others find the data prepared
            if is_first:
                config = train_folder.check(output_dir, config)
                if config.resume:
                    last = train_folder.checkpoint_to_resume(output_dir, args.world_size)
                if last is not None:
                    lineage.check_same(output_dir, config.adapter)
            data = _prepared(config)
        if config.auto_batch_size:
            _plan_batch(config, args, data)
        with _memory_forecast(config, args, data) as forecast:
            with train_folder.removed_if_empty(output_dir):
                monitor = TrainingMonitor(output_dir / METRICS_FILE, forecast=forecast)
                setup = build.build_setup(config, args, data, monitor)
            return _run(setup, config, output_dir, last)


def _run(setup: Any, config: TrainConfig, output_dir: Path, last: Path | None) -> dict[str, Any]:
    """Check, train, and save the results.

    Args:
        last: the checkpoint to resume from, known to the first process.
    """
    from accelerate.utils import broadcast_object_list

    from vlmdpo.training import preflight

    trainer, args = setup.trainer, setup.trainer.args
    preflight.check_before_training(setup, config)
    results.attach_samples_and_page(setup, output_dir, config)
    if args.process_index == 0:
        train_folder.start(output_dir, config, setup.over_length, last)
        lineage.write(output_dir, setup.lineage)
        if last is not None:
            resumed = last
            setup.monitor.on_begin = lambda: train_folder.go_on(output_dir, config, resumed)
    trainer.accelerator.wait_for_everyone()
    _say_plan(trainer, config, len(setup.dataset))
    ui.say(setup.sharing.sentence)
    if args.world_size > 1:
        last = broadcast_object_list([last])[0]
    setup.is_resumed = last is not None
    with _translate_errors(setup, output_dir, last), setup.monitor.catching_signals():
        outcome = trainer.train(resume_from_checkpoint=str(last) if last else None)
    trainer.save_reference_cache()
    state = trainer.state
    if setup.monitor.stopped_by and state.global_step < state.max_steps:
        recipe = str(output_dir / train_folder.RECIPE)
        command = shlex.join(["vlmdpo", "train", "--config", recipe, "--resume"])
        error = Interrupted if setup.monitor.stopped_by == signal.SIGINT else Preempted
        raise error(
            f"stopped at step {state.global_step} of {state.max_steps}; continue with: {command}"
        )
    if setup.keep_best is not None:
        setup.keep_best.restore(trainer)
    return results.save_results(setup, outcome.metrics, output_dir, config)


@contextlib.contextmanager
def _translate_errors(setup: Any, folder: Path, last: Path | None) -> Iterator[None]:
    """Inside, errors that end a training become errors that say what to do.

    Args:
        last: the checkpoint to resume from.
    """
    from vlmdpo.training.finite_check import NonFiniteLoss

    trainer = setup.trainer
    try:
        yield
    except NonFiniteLoss as problem:
        raise non_finite.explain_non_finite_loss(setup, problem, folder) from problem
    except (RuntimeError, ValueError, MemoryError, OSError) as problem:
        if is_out_of_memory(problem):
            batch = trainer.args.per_device_train_batch_size
            raise MemoryBudgetError(
                f"out of memory at step {trainer.state.global_step + 1} with batch {batch}: "
                f"{out_of_memory_reason(problem)}; add --auto-batch-size, or see: vlmdpo "
                "estimate-memory --gpu"
            ) from problem
        if last is not None and not setup.monitor.has_begun:
            raise ConfigError(
                f"--resume: {last.name} does not fit this run's settings: "
                f"{' '.join(str(problem).split())[:200]}; use those that it was started with, in "
                f"'{folder / train_folder.RECIPE}'"
            ) from problem
        if isinstance(problem, OSError):
            raise DataError(f"cannot write '{folder}': {problem.strerror or problem}") from problem
        if isinstance(problem, ValueError) or "DataLoader worker" not in str(problem):
            raise
        workers = trainer.args.dataloader_num_workers
        raise DataError(
            f"one of --dataloader-num-workers {workers} died at step "
            f"{trainer.state.global_step + 1}, probably out of memory; continue with --resume and "
            "fewer workers"
        ) from problem


def _warn_of_unusual_rate(config: TrainConfig) -> None:
    """Warn of a learning rate that suits LoRA for full fine-tuning, or the reverse. The embedded
    model is too small for these ranges.
    """
    way, rate = "LoRA" if config.lora else "full", config.peak_learning_rate
    low, high = USUAL_RATES[way]
    if config.model != "tiny" and not low <= rate <= high:
        what = "LoRA" if config.lora else "full fine-tuning"
        ui.warn(
            f"--learning-rate {rate:g}: {what} usually takes {low:g} to {high:g}; the default is "
            f"{DEFAULT_RATES[way]:g}"
        )


def _warn_of_half_precision_weights(config: TrainConfig) -> None:
    """Warn of full fine-tuning of weights that are too coarse for its small steps."""
    if not config.lora and config.weights_dtype not in ("auto", "float32"):
        ui.warn(
            f"--dtype {config.dtype} with --no-lora: steps are smaller than its rounding, so most "
            "weights will not move; leave --dtype out for float32 weights, which compute in "
            "bfloat16 all the same"
        )


def _dtype_name(config: TrainConfig, args: Any) -> str:
    """The data type of the base weights, by name."""
    from vlmdpo.models.load import pick_dtype

    return str(pick_dtype(config.weights_dtype, args.device)).removeprefix("torch.")


@contextlib.contextmanager
def _memory_forecast(config: TrainConfig, args: Any, data: Path) -> Iterator[Any]:
    """Inside, the peak memory is estimated in another process. Gives None if it is not wanted."""
    wanted = args.device.type == "cuda" if config.foresee_memory is None else config.foresee_memory
    # mDPO's step cannot be simulated.
    if not wanted or args.process_index or config.losses().is_mdpo:
        yield None
        return
    # Describe the run as it is: --auto-batch-size and accelerate's own launcher may have changed
    # what was asked for.
    as_it_is: dict[str, Any] = {
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_processes": args.world_size,
        "num_machines": 1,
        "machine_rank": 0,
        "strategy": (launched_strategy() if args.world_size > 1 else "") or "ddp",
    }
    forecast = memory_forecast.MemoryForecast(
        dataclasses.replace(config, auto_batch_size=False, **as_it_is),
        data,
        _dtype_name(config, args),
    )
    try:
        yield forecast
    finally:
        forecast.close()


def _plan_batch(config: TrainConfig, args: Any, data: Path) -> None:
    """Set `args` to the largest batch that is estimated to fit the GPU; without a GPU, leave it.

    Raises MemoryBudgetError if not even one pair fits.
    """
    import torch

    if args.device.type != "cuda":
        ui.say(f"no GPU to plan for: starting with batch {args.per_device_train_batch_size}")
        return
    free, total = torch.cuda.mem_get_info(args.device)
    capacity = min(total, free + CONTEXT_BYTES)  # this process's own context exists by now
    report = memory_forecast.plan_batch(config, data, capacity, _dtype_name(config, args))
    plan = report["plan"]
    if plan["per_device_train_batch_size"] is None:
        raise MemoryBudgetError(
            f"one pair needs {report['gpu']['needed_bytes'] / 2**30:.1f} GiB, and the GPU has "
            f"{capacity / 2**30:.1f} of {total / 2**30:.1f} free; "
            f"see vlmdpo estimate-memory --model {config.model} --gpu {capacity // 2**20}MiB"
        )
    args.per_device_train_batch_size = plan["per_device_train_batch_size"]
    args.gradient_accumulation_steps = plan["gradient_accumulation_steps"]
    ui.say(
        f"batch {args.per_device_train_batch_size} × {args.gradient_accumulation_steps} "
        "accumulation steps is estimated to fit"
    )


def _doctor(config: TrainConfig) -> dict[str, Any]:
    """Everything up to the first step, in a temporary folder; returns the findings."""
    from vlmdpo.models.devices import pick_device
    from vlmdpo.report.metrics import METRICS_FILE
    from vlmdpo.training import preflight
    from vlmdpo.training.arguments import dpo_config
    from vlmdpo.training.monitor import TrainingMonitor

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args = dpo_config(config, folder, pick_device(config.device))
        monitor = TrainingMonitor(folder / METRICS_FILE)
        setup = build.build_setup(config, args, _prepared(config), monitor)
        return preflight.run_doctor(setup, config)


def _prepared(config: TrainConfig) -> Path:
    """The prepared folder: `--dataset` itself, or what `prepare` makes of it."""
    folder = Path(config.dataset)
    manifest = store.read_manifest(folder)
    if manifest is not None:
        if config.split not in ("train", manifest.get("split")):
            ui.warn(
                f"--split {config.split} has no effect: '{folder}' is prepared already, from "
                f"split {manifest.get('split')}"
            )
        return folder
    report = prepare.run(PrepareConfig(**{n: getattr(config, n) for n in _PREPARE_OPTIONS}))
    done = "found prepared" if report["reused"] else "prepared"
    ui.say(f"{done}: {ui.count(report['rows_out'], 'pair')} in {report['path']}")
    return Path(report["path"])


def _say_plan(trainer: Any, config: TrainConfig, pairs: int) -> None:
    from vlmdpo.models.adapters import REFERENCE
    from vlmdpo.models.attention import describe_attention
    from vlmdpo.models.families import parameter_numel

    trainable = sum(parameter_numel(p) for p in trainer.model.parameters() if p.requires_grad)
    copied = f".{REFERENCE}."  # of the reference, not of the model
    named = trainer.model.named_parameters()
    total = sum(parameter_numel(weight) for name, weight in named if copied not in name)
    args = trainer.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    engine = {
        "shared": "shared prefix",
        "rows": "stock rows, each image encoded once",
        "stock": "stock TRL",
    }[trainer.engine]
    attention = describe_attention(trainer.accelerator.unwrap_model(trainer.model))
    dtype = str(trainer.model.dtype).removeprefix("torch.")
    precision = "bfloat16 autocast" if args.bf16 else dtype
    what = f"LoRA r={config.lora_r}" if config.lora else "all weights"
    what += f" going on from '{config.adapter}'" if config.adapter is not None else ""
    ui.say(
        f"{ui.count(pairs, 'pair')}, {batch} per step; {what}: {trainable:,} of {total:,} "
        "parameters train; "
        f"{args.device}, {precision}, {attention} attention, {engine}"
    )


def show(report: dict[str, Any]) -> None:
    """Print how the run ended and where its results are; for `--doctor`, that all checks passed."""
    if "dry_run" in report:
        from vlmdpo.commands import train_plan

        train_plan.show(report)
        return
    if "checks" in report:
        ui.result(f"All {len(report['checks'])} checks passed; leave out --doctor to train.")
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
        note="Loss, accuracy and margin: the last ones logged.",
    )
    if report["fallback_reason"]:
        ui.result(f"Engine: stock rows ({report['fallback_reason']})")
    for finding in report["diagnosis"]:
        ui.result(f"{finding['title']}.")
        ui.result(f"  {finding['seen'][0].upper()}{finding['seen'][1:]} {finding['means']}")
        ui.result(f"  {'Next' if finding['level'] == 'good' else 'Try'}: {finding['tries'][0]}")
    ui.result(f"Adapter, processor, metrics and curves: {report['output_dir']}")
    ui.result(f"Curves, settings, samples and diagnosis: {report['page']}")
