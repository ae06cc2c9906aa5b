"""TRL's and PEFT's own arguments, made from our options; what they refuse is a ConfigError."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy
from trl import DPOConfig

from vlmdpo import ui
from vlmdpo.config import LoraOptions, TrainConfig
from vlmdpo.distributed.processes import WAIT_FOR_PEERS
from vlmdpo.errors import (
    ConfigError,
    MissingDependencyError,
    VlmDpoError,
    install_command,
    nearest,
)
from vlmdpo.models.experts import expert_parameters, returns_several, router_layers
from vlmdpo.models.families import linear_layers, parameter_numel
from vlmdpo.models.load import computes_in_bfloat16
from vlmdpo.training.set_fields import extra_fields

if TYPE_CHECKING:
    from vlmdpo.models.protocols import VisionLanguageModel

# Fields that have the same name and meaning in TrainConfig and DPOConfig.
_SAME_FIELDS = (
    *(
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_steps",
    ),
    *(
        "lr_scheduler_type",
        "warmup_steps",
        "beta",
        "max_length",
        "gradient_checkpointing",
        "logging_steps",
    ),
    *("label_smoothing", "save_steps", "save_total_limit", "seed"),
)
_MAX_WORKERS = 4  # by default; more only help where images are large and cores many
_MAX_PREFETCHED_BATCHES = 8  # a worker
_WORKER_SHARED_MEMORY_BYTES = 1 << 30  # batches on their way from a worker to its process


def dpo_config(config: TrainConfig, output_dir: Path, device: torch.device) -> DPOConfig:
    """TRL's arguments for a run.

    Raises ConfigError if TRL refuses them, or `--set` names an unknown field;
    MissingDependencyError where a tracker's or optimizer's package is missing.
    """
    values: dict[str, Any] = {name: getattr(config, name) for name in _SAME_FIELDS}
    losses, weights, _ = config.losses()
    values |= {
        "learning_rate": config.peak_learning_rate,
        "output_dir": str(output_dir),
        "report_to": list(config.trackers()) or "none",
        "loss_type": losses,
        "loss_weights": weights,
        "optim": _optimizer(config.optim, device),
        "bf16": computes_in_bfloat16(device) if config.bf16 is None else config.bf16,
        "use_cpu": device.type == "cpu",
        "disable_tqdm": True,
        "logging_first_step": True,
        # transformers would look at the loss of every batch for it; `RunTrainer` raises an error.
        "logging_nan_inf_filter": False,
    }
    extra = extra_fields(config.set, values, is_shared=config.engine != "stock")
    _check_not_compiled(config, extra)
    values = {**_data_loader_fields(config, device), **values, **extra}
    values.setdefault("ddp_timeout", int(WAIT_FOR_PEERS.total_seconds()))
    for name in config.trackers():
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(
                f"--report-to {name} needs a package: {install_command(name)}"
            )
    with translate_refusals(config):
        args = DPOConfig(**values)
        _check_optimizer(args)
    _use_one_gpu(args, config)
    return args


@contextlib.contextmanager
def translate_refusals(config: TrainConfig) -> Iterator[None]:
    """Inside, what TRL and transformers refuse about settings, or lack for them, is one line."""
    try:
        yield
    except VlmDpoError:
        raise
    except (ValueError, TypeError, ImportError, NotImplementedError) as problem:
        raise _refused(problem, config) from problem
    except (OSError, LookupError, AttributeError) as problem:
        if not config.set:
            raise  # what options of ours cannot cause
        raise _refused(problem, config) from problem


def _refused(problem: Exception, config: TrainConfig) -> VlmDpoError:
    words = " ".join(str(problem).split())
    if not isinstance(problem, ImportError) and "lease install" not in words:
        return ConfigError(f"TRL refuses these settings: {words}")
    given = [f"--optim {config.optim}"] if config.optim != "auto" else []
    given += [f"--set {setting}" for setting in config.set]
    return MissingDependencyError(f"{', '.join(given)}: a package is missing: {words}")


def _check_optimizer(args: DPOConfig) -> None:
    """Raise what transformers raises for an optimizer that cannot be made, most often because its
    package is missing: now, and not once a model has been loaded.
    """
    Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))


def _use_one_gpu(args: DPOConfig, config: TrainConfig) -> None:
    """One process trains on one GPU; say how to use the others.

    transformers counts every GPU that a single process sees, to train on all of them through
    `torch.nn.DataParallel`, which TRL refuses.
    """
    gpus = args.n_gpu
    if gpus <= 1:
        return
    args._n_gpu = 1
    if not config.doctor:
        others = "the other GPU is idle" if gpus == 2 else f"the other {gpus - 1} GPUs are idle"
        ui.say(
            f"training on one of {gpus} GPUs, and {others}; vlmdpo train --num-processes {gpus} "
            "uses all of them"
        )


def _data_loader_fields(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """How batches reach the device: while it computes, from processes of their own."""
    workers = config.dataloader_num_workers
    if workers is None:
        workers = default_num_workers(device)
    fields: dict[str, Any] = {
        "dataloader_num_workers": workers,
        "dataloader_pin_memory": device.type == "cuda",
        "accelerator_config": {"non_blocking": device.type == "cuda"},
    }
    if workers:
        # transformers takes the batches of a whole optimizer step at once.
        batches = math.ceil(config.gradient_accumulation_steps / workers)
        fields["dataloader_prefetch_factor"] = max(2, min(batches, _MAX_PREFETCHED_BATCHES))
        # Workers that outlive an epoch would leave out a random number that new ones draw, so a
        # resumed run would differ.
        fields["dataloader_persistent_workers"] = False
    return fields


def default_num_workers(device: torch.device) -> int:
    """Data loader processes: none on a CPU, whose cores compute; else this process's share of them.

    None either where shared memory, through which they hand over batches, is as small as Docker's
    default of 64 MB.
    """
    if device.type == "cpu":
        return 0
    shared_memory = Path("/dev/shm")
    if (
        shared_memory.is_dir()
        and shutil.disk_usage(shared_memory).free < _WORKER_SHARED_MEMORY_BYTES
    ):
        if os.environ.get("RANK", "0") == "0":
            ui.say(
                f"batches are made between steps: {shared_memory} is too small for data loader "
                "processes (in Docker: --shm-size 8g)"
            )
        return 0
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torch's launcher
    return min(_MAX_WORKERS, available_cores() // processes_here)


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_not_compiled(config: TrainConfig, extra: dict[str, Any]) -> None:
    """Raise ConfigError for `torch.compile`: no two packed rows have the same length and layout, so
    it would compile again for each batch.
    """
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")  # set by accelerate's launcher
    asked = any(name.startswith("torch_compile") and value for name, value in extra.items())
    if config.engine == "stock" or not (asked or backend.lower() != "no"):
        return
    name = "--set torch_compile" if asked else "dynamo_backend in accelerate's configuration"
    raise ConfigError(
        f"{name}: torch.compile would compile again for each batch, because packed rows differ in "
        "length and layout; leave it out, or use --engine stock"
    )


def _optimizer(name: str, device: torch.device) -> str:
    """The optimizer of `--optim`, by transformers' name."""
    if name != "auto":
        return name
    # "adamw_torch" takes a temporary copy of a whole moment on a GPU.
    return "adamw_torch_fused" if device.type == "cuda" else "adamw_torch"


def enable_evaluation(args: DPOConfig, steps: float | None) -> None:
    """Evaluate on the test split, in batches as large as in training.

    Args:
        steps: optimizer steps between two evaluations, or a share of the run; None for ten times.
    """
    args.eval_strategy = IntervalStrategy.STEPS
    args.eval_steps = 0.1 if steps is None else steps
    args.per_device_eval_batch_size = args.per_device_train_batch_size


def lora_config(options: LoraOptions, model: VisionLanguageModel) -> LoraConfig | None:
    """PEFT's configuration of the adapter, or None for full fine-tuning.

    Names in `--lora-target-modules` may be those of experts' weights, which are no layers.

    Raises ConfigError if no layer matches both `--lora-scope` and `--lora-target-modules`, and for
    dropout where PEFT cannot use it.
    """
    if not options.lora:
        return None
    names = [name.strip() for name in options.lora_target_modules.split(",") if name.strip()]
    _check_targets(names, model)
    weights = _expert_targets(options, model, names)
    names = [name for name in names if name not in weights]
    is_all = names == ["all-linear"]
    targets: str | list[str] = "all-linear" if is_all else names
    routers = router_layers(model)
    if names and (options.lora_scope != "all" or (is_all and routers)):
        layers = linear_layers(model, options.lora_scope)
        adapted = [layer for layer in layers if is_all or layer.rsplit(".", 1)[-1] in names]
        if not adapted:
            raise ConfigError(
                f"--lora-target-modules: no layer '{', '.join(names)}' within --lora-scope "
                f"{options.lora_scope}"
            )
        targets = adapted
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        # PEFT's layer returns one tensor, and some routers return more.
        exclude_modules=[name for name in routers if _returns_several(model, name)] or None,
        target_parameters=weights or None,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        bias="none",
    )


def _check_targets(names: list[str], model: VisionLanguageModel) -> None:
    """Raise ConfigError for a name of `--lora-target-modules` that nothing in the model has.

    PEFT is content if one of several is found.
    """
    held = {name for name, _ in model.named_modules()} | set(expert_parameters(model))
    for wanted in names:
        if wanted == "all-linear" or any(f".{name}".endswith(f".{wanted}") for name in held):
            continue
        last = {name.rpartition(".")[2] for name in linear_layers(model, "all")}
        raise ConfigError(
            f"--lora-target-modules: no layer '{wanted}' in this model.{nearest(wanted, last)} "
            f"Linear layers: {', '.join(sorted(last)[:12])}"
        )


def _returns_several(model: VisionLanguageModel, name: str) -> bool:
    return returns_several(type(dict(model.named_modules())[name]))


def _expert_targets(
    options: LoraOptions, model: VisionLanguageModel, names: list[str]
) -> list[str]:
    """Those of `--lora-target-modules` that name experts' weights.

    Raises ConfigError for what PEFT cannot do with them.
    """
    parameters = expert_parameters(model)
    found = [name for name in names if any(p.endswith(f".{name}") for p in parameters)]
    weights = f"experts' weights ({', '.join(found)})"
    if found and options.lora_dropout:
        raise ConfigError(
            f"--lora-dropout: PEFT cannot use dropout on {weights}; add --lora-dropout 0"
        )
    if found and options.use_dora:
        raise ConfigError(f"--use-dora: PEFT cannot use it on {weights}; leave it out")
    return found


def say_what_lora_leaves(adapter: LoraConfig | None, model: VisionLanguageModel) -> None:
    """Say how many weights of experts an adapter leaves as they are, and how to adapt them."""
    parameters = expert_parameters(model)
    if adapter is None or adapter.target_parameters or not parameters:
        return
    count = sum(map(parameter_numel, parameters.values()))
    kinds = sorted({".".join(name.rsplit(".", 2)[-2:]) for name in parameters})
    ui.say(
        f"LoRA covers layers, not the {ui.count(count, 'weight')} of experts; to adapt them too, "
        "add "
        f"{','.join(kinds)} to --lora-target-modules"
    )
