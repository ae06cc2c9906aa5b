"""`vlmdpo estimate-memory`: the memory of a training step, before anything is downloaded or paid.

Exact parameter counts, the article's table, what vlmdpo allocates, the peak of a simulated step,
and whether it fits. `--fast` replaces the simulation by a closed formula and needs no torch.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmdpo.commands.estimate_memory_screen import show
from vlmdpo.config import EstimateMemoryConfig
from vlmdpo.data import store
from vlmdpo.errors import ConfigError, DataError, ModelError
from vlmdpo.memory import fast
from vlmdpo.memory.fit import PeakByBatch, largest_batch_size, verdict
from vlmdpo.memory.gpus import capacity_bytes
from vlmdpo.memory.terms import (
    CONTEXT_BYTES,
    Component,
    Shards,
    allocated_components,
    article_components,
    rounded_article_table,
)
from vlmdpo.models import registry
from vlmdpo.models.adapter_files import read_config
from vlmdpo.training.step_simulator import TRAIN_OPTIONS, StepSimulator, image_size

if TYPE_CHECKING:
    from vlmdpo.training.simulate import SimulatedPeak

__all__ = ["run", "show"]


@dataclasses.dataclass(frozen=True)
class _ParameterCounts:
    """A model's size, in parameters."""

    name: str
    hub_id: str
    total: int
    by_part: dict[str, int]
    adapter: int
    nf4_weights: int = 0


def run(config: EstimateMemoryConfig) -> dict[str, Any]:
    """The report. Raises ConfigError, DataError, ModelError."""
    capacity = capacity_bytes(config.gpu) if config.gpu else None
    if config.adapter is not None:
        config = dataclasses.replace(config, lora=True, lora_r=_rank(config.adapter))
    if config.fast and config.dataset:
        config = _with_longest_row_of(config, Path(config.dataset))
    elif config.dataset and not Path(config.dataset).is_dir():  # said before libraries are loaded
        raise DataError(f"--dataset: '{config.dataset}' is not a folder; run vlmdpo prepare first")
    counts = _count_parameters(config)
    static = _static_components(config, counts)
    report = _article_report(config, counts)
    if config.fast:
        report |= _by_formula(config, counts, static)
    else:
        report |= _by_simulation(config, counts, capacity)
    report["allocated"] = {
        "components": [dataclasses.asdict(component) for component in static],
        "total_bytes": sum(component.bytes for component in static),
    }
    report["unvalidated"] = _unvalidated(config)
    # Weights are read into the host's memory, then moved.
    report["loading"] = {"host_bytes": report["components"][0]["bytes"]}
    if capacity is not None:
        report |= _judge(config, report, capacity)
    if config.plot is not None:
        from vlmdpo.report import memory_plot

        memory_plot.draw(report, config.plot)
        report["plot"] = str(config.plot)
    return report


def _rank(adapter: Path) -> int:
    """The rank of a LoRA adapter. Raises ModelError for a folder without one."""
    rank = read_config(adapter).get("r")
    if not isinstance(rank, int) or rank < 1:
        raise ModelError(f"--adapter: '{adapter}' is not a LoRA adapter: it names no rank")
    return rank


def _article_report(config: EstimateMemoryConfig, counts: _ParameterCounts) -> dict[str, Any]:
    """Settings, parameter counts, and the article's table: exact, and rounded as published."""
    trainable = counts.adapter if config.lora else counts.total
    exact = article_components(counts.total, trainable, config.dtype, lora=config.lora)
    article = rounded_article_table(counts.total, trainable, config.dtype, lora=config.lora)
    settings = (*TRAIN_OPTIONS, "images", "prompt_tokens", "answer_tokens", "dataset")
    return {
        "model": counts.name,
        "hub_id": counts.hub_id,
        "dtype": config.dtype,
        "lora_r": config.lora_r if config.lora else None,
        "parameters": {
            "total": counts.total,
            "trainable": trainable,
            "with_adapter": counts.total + counts.adapter,
            "by_part": counts.by_part,
        },
        "components": [{"name": c.name, "bytes": c.bytes, "formula": c.formula} for c in exact],
        "total_bytes": sum(c.bytes for c in exact),
        "article": {
            "components": [{"name": name, "gb": gb, "formula": text} for name, gb, text in article],
            "total_gb": round(sum(gb for _, gb, _ in article), 1),
        },
        "settings": {name: getattr(config, name) for name in settings},
        "pairs_per_prompt": config.pairs_per_prompt or 1,
    }


def _with_longest_row_of(config: EstimateMemoryConfig, dataset: Path) -> EstimateMemoryConfig:
    """The settings with question and answers as long as the longest of a prepared dataset, by its
    manifest. Raises DataError if the folder has none.
    """
    manifest = store.read_manifest(dataset)
    if manifest is None or "lengths" not in manifest:
        raise DataError(f"--dataset: '{dataset}' was not written by vlmdpo prepare")
    if not registry.is_same_name(str(manifest.get("model")), config.model):
        raise DataError(
            f"--dataset: the tokens of '{dataset}' were counted for '{manifest.get('model')}', not "
            f"'{config.model}'; leave out --fast, which counts them anew"
        )
    longest = {name: int(figures["max"]) for name, figures in manifest["lengths"].items()}
    answers = max(longest["chosen_tokens"], longest["rejected_tokens"])
    return dataclasses.replace(
        config,
        prompt_tokens=longest["prompt_tokens"] - longest["image_tokens"],
        answer_tokens=max(1, answers),
    )


def _count_parameters(config: EstimateMemoryConfig) -> _ParameterCounts:
    """Counts from the registry if it has all that is asked for, else from the architecture."""
    known = registry.find(config.model)
    simple = config.lora_scope == "all" and config.quantization == "none"
    if known is not None and (simple or config.fast):
        if config.lora_scope != "all":
            raise ConfigError("--fast counts adapters on all layers; leave out --fast")
        adapter = known.lora_per_rank * config.lora_r if config.lora else 0
        # Embeddings and head are not quantized; norms are too small to count separately.
        nf4 = known.parameters - known.by_part["embed/head"] if config.quantization == "nf4" else 0
        return _ParameterCounts(
            known.alias, known.hub_id, known.parameters, dict(known.by_part), adapter, nf4
        )
    if config.fast:
        registry.get(config.model)  # raises ModelError with the known models
    from vlmdpo.memory import architecture as arch

    origin: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }
    model = arch.build_on_meta(arch.load_config(config.model, **origin))
    by_part = arch.count_parameters(model)
    adapter = (
        arch.count_adapter_parameters(model, config.lora_r, config.lora_scope) if config.lora else 0
    )
    nf4 = arch.count_quantized_weights(model) if config.quantization == "nf4" else 0
    name = registry.short_name(config.model)
    return _ParameterCounts(
        name, registry.hub_id(config.model), sum(by_part.values()), by_part, adapter, nf4
    )


def _static_components(config: EstimateMemoryConfig, counts: _ParameterCounts) -> list[Component]:
    """What stays allocated through a step: weights, gradients, optimizer states."""
    return allocated_components(
        counts.total,
        counts.adapter,
        config.dtype,
        lora=config.lora,
        cached=config.reference_cache,
        optim=config.optim,
        nf4_weights=counts.nf4_weights,
        shards=Shards.for_strategy(config.strategy, config.num_gpus),
        goes_on=config.adapter is not None,
    )


def _unvalidated(config: EstimateMemoryConfig) -> list[str]:
    """The parts of the estimate that were never compared with a measurement."""
    parts = ["CUDA context and workspaces", "fragmentation"]
    parts += ["nf4 weights"] if config.quantization == "nf4" else []
    parts += ["8-bit optimizer"] if "8bit" in config.optim else []
    return parts + (["sharding over GPUs"] if config.num_gpus > 1 else [])


def _by_formula(
    config: EstimateMemoryConfig, counts: _ParameterCounts, static: list[Component]
) -> dict[str, Any]:
    """The peak by `memory.fast`; None for a model without a formula."""
    if counts.name not in fast.known_architectures():
        return {"peak_bytes": None, "verdict": None, "phases": None}
    image = image_size(config, fast.default_image_side(counts.name))
    tokens, patches = fast.image_tokens(counts.name, image)
    pairs = config.per_device_train_batch_size
    answers = 2 * pairs * config.answer_tokens
    # How often image and prompt are computed.
    prompts = (
        math.ceil(pairs / (config.pairs_per_prompt or 1))
        if config.engine == "shared"
        else 2 * pairs
    )
    activation_bytes = fast.activation_bytes(
        fast.ModelShape.of_model(counts.name),
        prompts * (config.images * tokens + config.prompt_tokens) + answers,
        answers,
        prompts * config.images * patches,
        2,  # bfloat16 autocast
        checkpointing=config.gradient_checkpointing,
        lora=config.lora,
    )
    peak = sum(c.bytes for c in static) + activation_bytes
    return {
        "peak_bytes": peak,
        "verdict": None,
        "phases": None,
        "error_per_cent": fast.MAX_ERROR_PERCENT,
        "image": image,
    }


def _by_simulation(
    config: EstimateMemoryConfig, counts: _ParameterCounts, capacity: int | None
) -> dict[str, Any]:
    """The peak of a simulated step, and with a GPU's capacity the largest batch that fits."""
    simulator = StepSimulator(config)
    batch = config.per_device_train_batch_size
    step = simulator.at_batch(batch)
    shift = _static_difference(config, counts)
    result: dict[str, Any] = {
        "peak_bytes": round(step.peak + shift),
        "verdict": None,
        "image": list(simulator.image),
        "engine": step.engine,
        "fallback_reason": step.fallback_reason,
        "pairs_per_prompt": simulator.pairs_per_prompt,
    }
    result["phases"] = {name: round(size + shift) for name, size in step.phases.items()}
    if capacity is not None:
        result["plan"] = _plan(config, simulator, step, shift, capacity)
    return result


def _plan(
    config: EstimateMemoryConfig,
    simulator: StepSimulator,
    step: SimulatedPeak,
    shift: int,
    capacity: int,
) -> dict[str, Any]:
    """The largest batch that fits: extrapolated from two simulated batches, then simulated."""
    batch = config.per_device_train_batch_size
    other = 1 if batch > 1 else 2
    known = {batch: step, other: simulator.at_batch(other)}
    small, large = sorted(known)
    peaks = PeakByBatch(small, large, known[small].phases, known[large].phases)
    effective = batch * config.gradient_accumulation_steps
    best = largest_batch_size(peaks, shift + CONTEXT_BYTES, capacity, effective)
    while best is not None:
        if best not in known:
            known[best] = simulator.at_batch(best)
        if verdict(known[best].peak + shift + CONTEXT_BYTES, capacity).word == "fits":
            break
        best = max((b for b in range(1, best) if effective % b == 0), default=None)
    plan = {
        "effective_batch_size": effective * config.num_gpus,
        "per_device_train_batch_size": best,
        "gradient_accumulation_steps": effective // best if best else None,
        "peak_bytes": round(known[best].peak + shift) if best else None,
    }
    return plan if best else {**plan, "first": _first_saving_that_fits(config, capacity)}


def _first_saving_that_fits(config: EstimateMemoryConfig, capacity: int) -> dict[str, Any] | None:
    """The first setting with which a simulated batch of 1 fits; None if there is none."""
    changes: list[dict[str, Any]] = []
    changes += [{"gradient_checkpointing": True}] if not config.gradient_checkpointing else []
    changes += [{"engine": "shared"}] if config.engine != "shared" else []
    # Only with an adapter: the steps of full fine-tuning are too small for bfloat16 weights.
    smaller: dict[str, Any] = {"dtype": "bfloat16"} if config.dtype == "float32" else {}
    if not config.lora:
        changes.append({**smaller, "lora": True})
    elif smaller:
        changes.append(smaller)
    merged: dict[str, Any] = {}
    for change in changes:
        merged |= change
        tried = dataclasses.replace(config, **merged)
        shift = _static_difference(tried, _count_parameters(tried))
        needed = StepSimulator(tried).at_batch(1).peak + shift + CONTEXT_BYTES
        if verdict(needed, capacity).word == "fits":
            return {"change": dict(merged), "needed_bytes": round(needed)}
    return None


def _static_difference(config: EstimateMemoryConfig, counts: _ParameterCounts) -> int:
    """Bytes that sharding, quantization and 8-bit moments change. Steps are simulated without them,
    which is exact: they change what stays allocated, not activations.
    """
    plain = allocated_components(
        counts.total,
        counts.adapter,
        config.dtype,
        lora=config.lora,
        cached=config.reference_cache,
        optim="adamw_torch_fused",
    )
    return sum(c.bytes for c in _static_components(config, counts)) - sum(c.bytes for c in plain)


def _judge(config: EstimateMemoryConfig, report: dict[str, Any], capacity: int) -> dict[str, Any]:
    """Whether the peak fits. Raises ConfigError if `--fast` has no peak to judge."""
    if report["peak_bytes"] is None:
        raise ConfigError(f"--fast has no formula for '{report['model']}'; leave out --fast")
    found = verdict(report["peak_bytes"] + CONTEXT_BYTES, capacity)
    sizes = {"needed_bytes": found.needed_bytes, "free_bytes": found.free_bytes}
    return {"verdict": found.word, "gpu": {"name": config.gpu, "capacity_bytes": capacity, **sizes}}
