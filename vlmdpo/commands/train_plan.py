"""`vlmdpo train --dry-run`: what a run would be, without a network, a GPU or the model."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.commands import estimate_memory
from vlmdpo.config import (
    PER_CALL,
    DataOptions,
    EstimateMemoryConfig,
    LoraOptions,
    RunOptions,
    TrainConfig,
)
from vlmdpo.data import store
from vlmdpo.data.groups import row_groups
from vlmdpo.data.hub import DATASETS
from vlmdpo.data.sources import Streamed, bounds
from vlmdpo.errors import (
    ConfigError,
    DataError,
    MissingDependencyError,
    ModelError,
    nearest,
)
from vlmdpo.memory import fast
from vlmdpo.memory.gpus import capacity_bytes
from vlmdpo.models import registry
from vlmdpo.training.build import check_eval_steps, freeze_parts
from vlmdpo.training.data_check import check_by_name

_PUBLISHED_ROWS = {"openbmb/RLAIF-V-Dataset": 83_132}  # source: the dataset's card on the Hub
_COMMON_OPTIONS = {field.name for field in dataclasses.fields(EstimateMemoryConfig)} & {
    field.name for field in dataclasses.fields(TrainConfig)
}


def plan(config: TrainConfig) -> dict[str, Any]:
    """The plan of a run. Nothing is loaded, downloaded or written.

    Raises:
        ConfigError: settings that TRL refuses.
        DataError, ModelError: a data or model path that does not exist.
    """
    _try_settings(config)
    gpus, gpu = _parse_gpus(config.gpu)
    known = _registry_entry(config.model)
    _check_layers(config, known)
    gpus = config.num_processes if config.num_processes > 1 else gpus
    rows, rows_known_by = _training_rows(config)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * gpus
    losses, weights, is_mdpo = config.losses()
    distinct = (store.read_manifest(Path(config.dataset)) or {}).get("distinct")
    has_counted_adapter = (
        config.lora
        and config.lora_scope == "all"
        and config.lora_target_modules == "all-linear"
        and not config.use_dora
    )
    return {
        "dry_run": True,
        "model": config.model,
        "hub_id": registry.hub_id(config.model),
        "parameters": known.parameters if known else None,
        "trainable": known.lora_per_rank * config.lora_r if known and has_counted_adapter else None,
        "dataset": config.dataset,
        "rows": rows,
        "rows_known_by": rows_known_by,
        "distinct": distinct,
        "order": _order(config, distinct),
        "gpus": gpus,
        "effective_batch": batch,
        "steps": _optimizer_steps(config, rows, batch),
        "learning_rate": config.peak_learning_rate,
        "losses": ["mdpo"] if is_mdpo else losses,
        "loss_weights": None if is_mdpo else weights,
        "how": _what_trains(config),
        "memory": _memory_by_formula(config, gpus, gpu),
        "estimate": _estimate_command(config, gpus, gpu),
    }


def _try_settings(config: TrainConfig) -> None:
    """Raise ConfigError for what TRL refuses, and MissingDependencyError for an optimizer without
    its package; where `--gpu` plans for another machine, that is a warning.
    """
    from vlmdpo.models.devices import pick_device
    from vlmdpo.training.trial import try_settings

    try:
        try_settings(config, pick_device("cpu"))
    except MissingDependencyError as problem:
        if config.gpu is None or config.optim == "auto":
            raise
        ui.warn(f"{problem}; the machine that trains needs it")
        try_settings(dataclasses.replace(config, optim="auto"), pick_device("cpu"))


def _parse_gpus(gpu: str | None) -> tuple[int, str | None]:
    """(number, kind) of "8xh100" or "h100". Raises ConfigError for one that is not known."""
    counted = re.fullmatch(r"([1-9]\d{0,5})x(.+)", gpu or "")
    number, kind = (int(counted[1]), counted[2]) if counted else (1, gpu)
    if kind is not None:
        capacity_bytes(kind)
    return number, kind


def _check_layers(config: TrainConfig, known: registry.ModelEntry | None) -> None:
    """Raise ConfigError for layers to adapt or parts to freeze that the model does not have, where
    its configuration is at hand: of a known model or a local folder.
    """
    is_usual = config.lora_target_modules == "all-linear" and config.lora_scope == "all"
    if (is_usual and config.lora) or not (known or Path(config.model).expanduser().is_dir()):
        return
    from vlmdpo.memory.architecture import build_on_meta, load_config
    from vlmdpo.training.arguments import lora_config

    is_here = known is None or known.alias in ("tiny", *fast.counted_architectures())
    if not is_here:
        return
    model = build_on_meta(
        load_config(
            config.model,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    )
    freeze_parts(config, model)
    lora_config(config, model)


def _registry_entry(model: str) -> registry.ModelEntry | None:
    """The model's entry, or None for a folder or another Hub model. Raises ModelError if it can be
    neither.
    """
    known = registry.find(model)
    if known is None and "/" not in model and not Path(model).exists():
        registry.get(model)  # raises, naming the nearest alias
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise ModelError(f"--model: folder '{model}' does not exist")
    return known


def _training_rows(config: TrainConfig) -> tuple[int | None, str]:
    """(number of rows, how it is known); None if it takes a download to know."""
    folder = Path(config.dataset)
    manifest = store.read_manifest(folder)
    check_eval_steps(config, has_test_split=store.has_test_split(folder))
    if manifest is not None:
        check_by_name(folder, manifest, config)
        return int(manifest["splits"]["train"]), "prepared"
    if config.dataset == "scenes":
        from vlmdpo.tiny import pairs

        return _rows_of_split(pairs.source().count, config), "embedded"
    if folder.expanduser().exists():
        from vlmdpo.data.hub import open_source

        return _rows_of_split(
            open_source(config.dataset, config.split).count, config
        ), "counted, before checks"
    repo = DATASETS.get(config.dataset, config.dataset)
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise DataError(
            f"--dataset: '{repo}' is not a file, a folder or a Hub id."
            f"{nearest(repo, ('scenes', *DATASETS))}"
        )
    if repo in _PUBLISHED_ROWS:
        return _rows_of_split(_PUBLISHED_ROWS[repo], config), "published, before checks"
    return None, "not known without a download"


def _rows_of_split(count: int | None, config: DataOptions) -> int | None:
    """The rows that `--split` selects of `count`."""
    if count is None:
        return None
    source = Streamed(
        name=config.dataset, fingerprint="", count=count, root=Path("."), stream=lambda: iter(())
    )
    first, last = bounds(source, config.split, None)
    return (count if last is None else last) - first


def _order(config: TrainConfig, distinct: dict[str, float] | None) -> str:
    """The order in which rows will train, in words."""
    by_length = ", by length" if config.group_by_length else ""
    if config.group_by_image is False or config.engine == "stock":
        return f"random{by_length}"
    if distinct is None:
        return f"random{by_length}; rows of one image together, if the data has such rows"
    found = f"{ui.count(distinct['images'], 'image')}, {ui.count(distinct['prompts'], 'prompt')}"
    is_shared = row_groups(store.load(Path(config.dataset))).is_shared
    together = "rows of one image" if is_shared else "no rows"
    return f"random{by_length}; {together} together ({found})"


def _optimizer_steps(config: RunOptions, rows: int | None, batch: int) -> int | None:
    if config.max_steps > 0:
        return config.max_steps
    return None if rows is None else math.ceil(config.num_train_epochs * math.ceil(rows / batch))


def _what_trains(config: LoraOptions) -> str:
    """What trains, and from where, in words."""
    if not config.lora:
        frozen = f" but {config.freeze}" if config.freeze else ""
        return f"all weights{frozen}"
    kind = "QLoRA (nf4)" if config.quantization == "nf4" else "LoRA"
    more = [name for name, on in (("rslora", config.use_rslora), ("dora", config.use_dora)) if on]
    where = "all linear layers" if config.lora_scope == "all" else f"the {config.lora_scope} part"
    if config.adapter is not None:
        where = f"the layers of '{config.adapter}', from its weights"
    return f"{kind} r={config.lora_r} on {where}" + (f" ({', '.join(more)})" if more else "")


def _estimate_options(config: TrainConfig, gpus: int, gpu: str | None) -> dict[str, Any]:
    """The options of `estimate-memory` for this run."""
    strategy = config.strategy if config.num_processes > 1 or config.lora or gpus == 1 else "fsdp2"
    dtype = "bfloat16" if config.weights_dtype == "auto" else config.weights_dtype
    shared = {
        name: getattr(config, name)
        for name in _COMMON_OPTIONS - {"dataset", "dtype", "gpu", *PER_CALL}
    }
    manifest = store.read_manifest(Path(config.dataset))
    # Token counts of another model's processor say nothing of this one.
    is_counted = manifest and registry.is_same_name(str(manifest.get("model")), config.model)
    return {
        **shared,
        "dtype": dtype,
        "dataset": config.dataset if is_counted else None,
        "pairs_per_prompt": 1 if is_counted and config.group_by_image is False else None,
        "num_gpus": gpus,
        "strategy": strategy,
        "gpu": gpu,
    }


def _memory_by_formula(config: TrainConfig, gpus: int, gpu: str | None) -> dict[str, Any] | None:
    """The peak of one GPU by formula; None for a model or setting without one."""
    known = registry.find(config.model)
    if known is None or known.alias not in fast.known_architectures():
        return None
    try:
        # --set changes the engine of mixtures of experts, which have no formula, and no sizes.
        options = {**_estimate_options(config, gpus, gpu), "set": (), "fast": True}
        report = estimate_memory.run(EstimateMemoryConfig(**options))
    except ConfigError:  # a setting that only the simulation knows
        return None
    names = ("peak_bytes", "verdict", "gpu", "error_per_cent", "pairs_per_prompt")
    return {name: report.get(name) for name in names}


def _estimate_command(config: TrainConfig, gpus: int, gpu: str | None) -> str:
    default = EstimateMemoryConfig()
    words = ["vlmdpo", "estimate-memory"]
    for name, value in sorted(_estimate_options(config, gpus, gpu).items()):
        if value == getattr(default, name):
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, tuple):
            words += [word for one in value for word in (flag, one)]
            continue
        words += (
            [flag if value else f"--no-{flag[2:]}"]
            if isinstance(value, bool)
            else [flag, str(value)]
        )
    return shlex.join(words)


def show(report: dict[str, Any]) -> None:
    """Print the plan, line by line."""
    size = f", {report['parameters']:,} parameters" if report["parameters"] else ""
    ui.result(f"Model     {report['model']} ({report['hub_id']}){size}")
    rows = ui.count(report["rows"], "row") if report["rows"] is not None else "rows"
    ui.result(f"Data      {report['dataset']}: {rows} ({report['rows_known_by']})")
    ui.result(f"Order     {report['order']}")
    trains = f": {report['trainable']:,} parameters train" if report["trainable"] else ""
    ui.result(f"Training  {report['how']}{trains}; learning rate {report['learning_rate']:g}")
    weights = ""
    if report["loss_weights"] and any(weight != 1 for weight in report["loss_weights"]):
        weights = f", weights {', '.join(f'{weight:g}' for weight in report['loss_weights'])}"
    ui.result(f"Loss      {', '.join(report['losses'])}{weights}")
    steps = f"{report['steps']:,}" if report["steps"] is not None else "unknown"
    on = f" over {report['gpus']} GPUs" if report["gpus"] > 1 else ""
    ui.result(f"Steps     {steps}, {ui.count(report['effective_batch'], 'pair')} each{on}")
    ui.result(f"Memory    {_memory_line(report['memory'])}")
    ui.result(f"          for a simulation, run: {report['estimate']}")
    ui.result("Nothing was loaded, downloaded or written; leave out --dry-run to train.")


def _memory_line(memory: dict[str, Any] | None) -> str:
    if memory is None or memory["peak_bytes"] is None:
        return "no formula for this model or setting"
    line = (
        f"peak of about {memory['peak_bytes'] / 2**30:.1f} GiB per GPU, by formula, within "
        f"{memory['error_per_cent']}%"
    )
    return line + (
        f"; {memory['gpu']['name']}: {memory['verdict']}"
        if memory["verdict"]
        else "; --gpu h100 gives a verdict"
    )
