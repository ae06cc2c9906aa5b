"""What a training run leaves behind: adapter or model, processor, curves, report and card.

All of it is checked in a hidden folder before it gets its name.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmdpo.config import PER_CALL, LoraOptions, TrainConfig, recipes
from vlmdpo.errors import ConfigError, DataError
from vlmdpo.models.registry import hub_id
from vlmdpo.training.setup import TrainingSetup

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from vlmdpo.report.diagnosis import Finding
    from vlmdpo.training.run_trainer import RunTrainer

CURVES = "learning_curves.png"
PAGE = "run.html"
_VERSIONS = ("vlmdpo", "torch", "transformers", "trl", "peft", "datasets", "accelerate")
_PARTIAL = ".result.partial"  # where everything is written first


def save_results(
    setup: TrainingSetup, outcome: dict[str, float], folder: Path, config: TrainConfig
) -> dict[str, Any]:
    """Save the model and all that describes the run; returns the report.

    Args:
        outcome: what `Trainer.train` returned: runtime and speed.
    """
    from vlmdpo.training.sharding import active_strategy, gather_full_weights

    trainer, monitor = setup.trainer, setup.monitor
    assert setup.sharing is not None
    setup.tokens = trainer.tokens.total()
    best = setup.keep_best.summary() if setup.keep_best is not None else None
    findings = _diagnose(setup, folder, config)
    forecast = monitor.forecast
    if config.foresee_memory and forecast is not None:
        forecast.wait_or_warn()  # the user asked for it, and the run was shorter
    report = {
        "output_dir": str(folder),
        "model": config.model,
        "dataset": config.dataset,
        "data": str(setup.data),
        "adapter": None if config.adapter is None else str(config.adapter),
        "lineage": setup.lineage,
        "steps": trainer.state.global_step,
        "learning_rate": config.peak_learning_rate,
        **_last_metrics(monitor.lines[-1]),
        "num_processes": trainer.args.world_size,
        "strategy": active_strategy(trainer),
        "pairs_per_s": outcome["train_samples_per_second"],
        "elapsed_s": outcome["train_runtime"],
        "engine": trainer.engine,
        "tokens": dataclasses.asdict(setup.tokens),
        "sharing": dataclasses.asdict(setup.sharing),
        "images_once": trainer.engine != "stock",
        "fallback_reason": setup.fallback_reason,
        "checkpointed_layers": trainer.checkpointed_layers,
        "over_length": dict(Counter(row["done"] for row in setup.over_length)),
        "per_device_train_batch_size": _batch_size(trainer),
        "peak_bytes": _peak_bytes(trainer.args.device),
        "foreseen_peak_bytes": forecast.peak_bytes if forecast is not None else None,
        "curves": str(folder / CURVES),
        "page": str(folder / PAGE),
        "eval": _last_metrics(monitor.evaluations[-1]) if monitor.evaluations else None,
        "best": best,
        "diagnosis": [dataclasses.asdict(finding) for finding in findings],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in _VERSIONS},
        },
    }
    weights = gather_full_weights(trainer)
    if trainer.args.process_index == 0:
        _write_results(setup, weights, report, folder, config)
    trainer.accelerator.wait_for_everyone()
    return report


def _write_results(
    setup: TrainingSetup,
    weights: dict[str, Tensor] | None,
    report: dict[str, Any],
    folder: Path,
    config: TrainConfig,
) -> None:
    """Write everything to a hidden folder, check it, then rename it; the report comes last."""
    from safetensors import SafetensorError

    from vlmdpo.models.rendering import save_settings
    from vlmdpo.report import curves, model_card
    from vlmdpo.training import preflight

    partial = folder / _PARTIAL
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        model = setup.trainer.accelerator.unwrap_model(setup.trainer.model)
        _save_weights(model, weights, partial, config, base_model=config.model)
        setup.processor.save_pretrained(partial)
        save_settings(setup.processor, partial)
        preflight.check_saved(setup, weights, partial, config)
        curves.draw(
            setup.monitor.lines, setup.monitor.evaluations, _title(config), partial / CURVES
        )
        if setup.monitor.write_page is not None:
            setup.monitor.write_page()  # now with the tokens of all processes
        for path in sorted(partial.iterdir()):
            if (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)
            path.replace(folder / path.name)
        partial.rmdir()
        partial_report = folder / f".{model_card.REPORT}.partial"
        partial_report.write_text(json.dumps(report, indent=2), encoding="utf-8")
        partial_report.replace(folder / model_card.REPORT)
        model_card.write(folder)
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(partial, ignore_errors=True)
        raise DataError(
            f"cannot write '{folder}': {getattr(problem, 'strerror', None) or problem}"
        ) from problem


def _title(config: TrainConfig) -> str:
    return f"{config.model} · {config.dataset} · DPO"


def _diagnose(setup: TrainingSetup, folder: Path, config: TrainConfig) -> list[Finding]:
    from vlmdpo.report.diagnosis import best_kept, diagnose, of_this_model

    monitor, keep_best = setup.monitor, setup.keep_best
    findings = diagnose(
        monitor.lines,
        monitor.evaluations,
        learning_rate=config.peak_learning_rate,
        beta=config.beta,
        settings=config,
    )
    findings += best_kept(keep_best.summary() if keep_best is not None else None)
    return of_this_model(findings, evaluation_command(folder, config))


def evaluation_command(folder: Path, config: TrainConfig) -> str:
    """The command that scores what a run leaves in `folder`."""
    base = [] if config.model == "tiny" else ["--model", config.model]
    trained = [*base, "--adapter", str(folder)] if config.lora else ["--model", str(folder)]
    return shlex.join(["vlmdpo", "eval-amber", *trained])


def attach_samples_and_page(setup: TrainingSetup, folder: Path, config: TrainConfig) -> None:
    """Let the run generate samples, and write its page at every checkpoint and at its end.

    Raises ConfigError for samples under DeepSpeed's ZeRO-3.
    """
    from vlmdpo.report import run_page
    from vlmdpo.training.samples import SAMPLES_FILE, SampleAnswers

    trainer, monitor = setup.trainer, setup.monitor
    is_sharded = setup.is_sharded
    if is_sharded and trainer.is_deepspeed_enabled and config.sample_every:
        raise ConfigError(
            "--sample-every cannot generate with weights that ZeRO-3 shards; use --strategy fsdp2, "
            "ddp or zero2"
        )
    samples = None
    # Sharded layers are gathered for every token, which is too slow to do by default.
    if config.sample_every or (config.sample_every is None and not is_sharded):
        samples = SampleAnswers(
            folder / SAMPLES_FILE, config.sample_every, trainer, all_processes=is_sharded
        )
        trainer.add_callback(samples)
    if trainer.args.process_index:
        return
    pictures = {} if samples is None else run_page.image_uris(samples.rows)

    def write() -> None:
        state = trainer.state
        text = run_page.page(
            title=_title(config),
            steps=(state.global_step, state.max_steps),
            lines=monitor.lines,
            evaluations=monitor.evaluations,
            samples=[] if samples is None else samples.records,
            pictures=pictures,
            settings=recipes.plain(config, without=PER_CALL),
            facts=_facts(setup),
            findings=_diagnose(setup, folder, config),
        )
        partial = folder / f".{PAGE}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / PAGE)

    monitor.write_page = write


def _facts(setup: TrainingSetup) -> list[str]:
    """Sentences on the data and on what was computed, for the page."""
    processes = setup.trainer.args.world_size
    tokens, where = setup.tokens, ""
    if tokens is None:
        tokens = setup.trainer.tokens.here()
        where = f", in the first of {processes} processes" if processes > 1 else ""
    if setup.is_resumed:
        where += " since it was resumed"
    facts = [f"The {setup.sharing.sentence}."] if setup.sharing is not None else []
    return [*facts, f"It has computed {tokens.words}{where}."] if tokens.stock else facts


def _batch_size(trainer: RunTrainer) -> int:
    """Pairs in a forward pass at the end: fewer than asked for if memory ran out on the way."""
    source = trainer.auto_batch or trainer.args
    return int(source.per_device_train_batch_size)


def _last_metrics(line: dict[str, Any]) -> dict[str, Any]:
    names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    return {name: line[name] for name in names}


def _peak_bytes(device: torch.device) -> int | None:
    """The most that PyTorch had allocated on a CUDA device; None on other devices."""
    import torch

    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def _save_weights(
    model: PreTrainedModel | PeftModel,
    weights: dict[str, Tensor] | None,
    folder: Path,
    options: LoraOptions,
    *,
    base_model: str,
) -> None:
    """Write adapter or model as safetensors.

    Not by `trainer.save_model`, which adds training_args.bin, a pickle.
    """
    if not options.lora:
        model.save_pretrained(folder, state_dict=weights, safe_serialization=True)
        return
    # The adapter names its base model as the user did: the embedded model's folder means nothing
    # on another machine.
    model.peft_config["default"].base_model_name_or_path = hub_id(base_model)
    model.save_pretrained(
        folder,
        state_dict=weights,
        safe_serialization=True,
        selected_adapters=["default"],  # not the reference's
        # Embeddings never train here. To find out, PEFT would ask the Hub about the base model.
        save_embedding_layers=False,
    )
