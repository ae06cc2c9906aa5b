"""What a training run leaves behind: adapter or model, processor, curves, report, card; checked
before they get their names.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmdpo.config import PER_CALL, TrainConfig, recipes
from vlmdpo.errors import ConfigError, DataError
from vlmdpo.models.registry import hub_id
from vlmdpo.training import setup as training_setup

CURVES = "learning_curves.png"
PAGE = "run.html"
_VERSIONS = ("vlmdpo", "torch", "transformers", "trl", "peft", "datasets", "accelerate")
_MADE = ".result.partial"  # where everything is written first


def finish(
    setup: Any, outcome: dict[str, float], folder: Path, config: TrainConfig
) -> dict[str, Any]:
    """Save the model and what was seen on the way; returns the report."""
    from vlmdpo.training.sharding import active_strategy, gather_full_weights

    trainer, watch = setup.trainer, setup.watch
    found = _diagnosed(watch, config)
    if config.foresee_memory and watch.foreseen is not None:
        watch.foreseen.settle()  # it was asked for, and the run was shorter
    report = {
        "output_dir": str(folder),
        "model": config.model,
        "dataset": config.dataset,
        "data": str(setup.data),
        "steps": trainer.state.global_step,
        "learning_rate": config.peak_learning_rate,
        **_last_metrics(watch.lines[-1]),
        "num_processes": trainer.args.world_size,
        "strategy": active_strategy(trainer),
        "pairs_per_s": outcome["train_samples_per_second"],
        "elapsed_s": outcome["train_runtime"],
        "engine": "shared" if trainer.engine == "shared" else "stock",
        "images_once": trainer.engine != "stock",
        "fallback_reason": setup.fallback_reason,
        "checkpointed_layers": trainer.checkpointed_layers,
        "over_length": dict(Counter(row["done"] for row in setup.over_length)),
        "per_device_train_batch_size": _batch_size(trainer),
        "peak_bytes": _peak_bytes(trainer.args.device),
        "foreseen_peak_bytes": watch.foreseen.peak_bytes if watch.foreseen is not None else None,
        "curves": str(folder / CURVES),
        "page": str(folder / PAGE),
        "eval": _last_metrics(watch.evaluations[-1]) if watch.evaluations else None,
        "diagnosis": [dataclasses.asdict(finding) for finding in found],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in _VERSIONS},
        },
    }
    weights = gather_full_weights(trainer)
    if trainer.args.process_index == 0:
        _leave(setup, weights, report, folder, config)
    trainer.accelerator.wait_for_everyone()
    return report


def _leave(
    setup: Any,
    weights: dict[str, Any] | None,
    report: dict[str, Any],
    folder: Path,
    config: TrainConfig,
) -> None:
    """All that a run leaves, checked in a hidden folder before any of it gets its name; the report
    comes last.
    """
    from safetensors import SafetensorError

    from vlmdpo.report import curves, model_card

    made = folder / _MADE
    try:
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        _save_weights(
            setup.trainer.accelerator.unwrap_model(setup.trainer.model), weights, made, config
        )
        setup.processor.save_pretrained(made)
        training_setup.check_saved(setup, weights, made, config)
        curves.draw(setup.watch.lines, setup.watch.evaluations, _title(config), made / CURVES)
        for path in sorted(made.iterdir()):
            if (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)
            path.replace(folder / path.name)
        made.rmdir()
        part = folder / f".{model_card.REPORT}.partial"
        part.write_text(json.dumps(report, indent=2), encoding="utf-8")
        part.replace(folder / model_card.REPORT)
        model_card.write(folder)
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(made, ignore_errors=True)
        raise DataError(
            f"cannot write '{folder}': {getattr(problem, 'strerror', None) or problem}"
        ) from problem


def _title(config: TrainConfig) -> str:
    return f"{config.model} · {config.dataset} · DPO"


def _diagnosed(watch: Any, config: TrainConfig) -> list[Any]:
    from vlmdpo.report.diagnosis import diagnose

    return diagnose(
        watch.lines, watch.evaluations, learning_rate=config.peak_learning_rate, beta=config.beta
    )


def attach_samples_and_page(setup: Any, folder: Path, config: TrainConfig) -> None:
    """Let the run answer samples and keep its page: at every checkpoint, and however it ends.

    Raises ConfigError for samples under DeepSpeed's ZeRO-3.
    """
    from vlmdpo.report import run_page
    from vlmdpo.training.samples import SAMPLES, Samples

    trainer, watch = setup.trainer, setup.watch
    in_parts = setup.is_sharded
    if in_parts and trainer.is_deepspeed_enabled and config.sample_every:
        raise ConfigError(
            "--sample-every cannot ask a model that ZeRO-3 shares out; use --strategy fsdp2, ddp "
            "or zero2"
        )
    samples = None
    # In parts, layers are brought together for every token: too costly for who did not ask.
    if config.sample_every or (config.sample_every is None and not in_parts):
        samples = Samples(folder / SAMPLES, config.sample_every, trainer, together=in_parts)
        trainer.add_callback(samples)
    if trainer.args.process_index:
        return
    pictures = {} if samples is None else run_page.pictures(samples.rows)

    def write() -> None:
        state = trainer.state
        text = run_page.page(
            title=_title(config),
            steps=(state.global_step, state.max_steps),
            lines=watch.lines,
            evaluations=watch.evaluations,
            samples=[] if samples is None else samples.records,
            pictures=pictures,
            settings=recipes.plain(config, without=PER_CALL),
            findings=_diagnosed(watch, config),
        )
        part = folder / f".{PAGE}.partial"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / PAGE)

    watch.page = write


def _batch_size(trainer: Any) -> int:
    """Pairs in a forward pass at the end: fewer than asked for where memory ran out on the way."""
    size = trainer.auto_batch or trainer.args
    return int(size.per_device_train_batch_size)


def _last_metrics(line: dict[str, Any]) -> dict[str, Any]:
    names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    return {name: line[name] for name in names}


def _peak_bytes(device: Any) -> int | None:
    """The most that PyTorch had allocated on a CUDA device; None elsewhere, where nothing counts
    it.
    """
    import torch

    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def _save_weights(
    model: Any, weights: dict[str, Any] | None, folder: Path, config: TrainConfig
) -> None:
    """Adapter or model as safetensors. Not `trainer.save_model`: that leaves training_args.bin, a
    pickle, beside it.
    """
    if not config.lora:
        model.save_pretrained(folder, state_dict=weights, safe_serialization=True)
        return
    # The adapter names its base as the user would: the embedded model's folder means nothing on
    # another machine.
    model.peft_config["default"].base_model_name_or_path = hub_id(config.model)
    # Embeddings never train here; left to find out, PEFT would ask the Hub about the base model.
    model.save_pretrained(
        folder, state_dict=weights, safe_serialization=True, save_embedding_layers=False
    )
