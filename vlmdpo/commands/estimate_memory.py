"""`vlmdpo estimate-memory`: what a training step will take, foreseen before anything is downloaded
or paid for.

Exact counts, the article's table, what vlmdpo allocates, the peak of a simulated step, and whether
it fits. `--fast` uses a closed formula instead of the simulation and needs no torch.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.config import EstimateMemoryConfig, TrainConfig, flag_name
from vlmdpo.data import store
from vlmdpo.errors import ConfigError, DataError
from vlmdpo.memory import fast
from vlmdpo.memory.fit import ERROR_BAND, PeakByBatch, largest_batch_size, verdict
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

_GIB = 2**30
_SHARED = (
    *(
        "model",
        "revision",
        "trust_remote_code",
        "lora",
        "lora_r",
        "lora_scope",
        "per_device_train_batch_size",
    ),
    *(
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "engine",
        "reference_cache",
        "optim",
        "image_splitting",
    ),
)


@dataclasses.dataclass(frozen=True)
class _Counts:
    name: str
    hub_id: str
    total: int
    by_part: dict[str, int]
    adapter: int
    nf4_weights: int = 0


def run(config: EstimateMemoryConfig) -> dict[str, Any]:
    """The report. Raises ConfigError, DataError, ModelError."""
    capacity = capacity_bytes(config.gpu) if config.gpu else None
    config = _as_long_as_prepared(config) if config.fast and config.dataset else config
    counts = _counts(config)
    trainable = counts.adapter if config.lora else counts.total
    lines = article_components(counts.total, trainable, config.dtype, lora=config.lora)
    article = rounded_article_table(counts.total, trainable, config.dtype, lora=config.lora)
    ours = _allocated(config, counts)
    report: dict[str, Any] = {
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
        "components": [{"name": c.name, "bytes": c.bytes, "formula": c.formula} for c in lines],
        "total_bytes": sum(c.bytes for c in lines),
        "article": {
            "components": [{"name": name, "gb": gb, "formula": text} for name, gb, text in article],
            "total_gb": round(sum(gb for _, gb, _ in article), 1),
        },
        "settings": {
            name: getattr(config, name)
            for name in (*_SHARED, "images", "prompt_tokens", "answer_tokens", "dataset")
        },
    }
    if config.fast:
        report |= _fast(config, counts, ours)
    else:
        report |= _simulated(config, counts, capacity)
    report["allocated"] = {
        "components": [dataclasses.asdict(c) for c in ours],
        "total_bytes": sum(c.bytes for c in ours),
    }
    report["unvalidated"] = _unvalidated(config)
    report["loading"] = {
        "host_bytes": lines[0].bytes
    }  # weights are read into the host's memory, then moved
    if capacity is not None:
        report |= _judged(config, report, capacity)
    if config.plot is not None:
        from vlmdpo.report import memory_plot

        memory_plot.draw(report, config.plot)
        report["plot"] = str(config.plot)
    return report


def _as_long_as_prepared(config: EstimateMemoryConfig) -> EstimateMemoryConfig:
    """Question and answers as long as the longest of a prepared dataset, by its manifest. Raises
    DataError.
    """
    manifest = store.read_manifest(Path(str(config.dataset)))
    if manifest is None or "lengths" not in manifest:
        raise DataError(f"--dataset: '{config.dataset}' is no folder that vlmdpo prepare wrote")
    longest = {name: int(figures["max"]) for name, figures in manifest["lengths"].items()}
    answers = max(longest["chosen_tokens"], longest["rejected_tokens"])
    return dataclasses.replace(
        config,
        prompt_tokens=longest["prompt_tokens"] - longest["image_tokens"],
        answer_tokens=max(1, answers),
    )


def _counts(config: EstimateMemoryConfig) -> _Counts:
    """From the registry where it knows the model and nothing else is asked; else from the
    architecture itself.
    """
    known = registry.known(config.model)
    simple = config.lora_scope == "all" and config.quantization == "none"
    if known is not None and (simple or config.fast):
        if config.lora_scope != "all":
            raise ConfigError("--fast counts adapters on all layers; leave out --fast")
        adapter = known.lora_per_rank * config.lora_r if config.lora else 0
        # All but embeddings and head, which stay as they are: norms and the like are too small to
        # count apart.
        nf4 = known.parameters - known.by_part["embed/head"] if config.quantization == "nf4" else 0
        return _Counts(
            known.alias, known.hub_id, known.parameters, dict(known.by_part), adapter, nf4
        )
    if config.fast:
        registry.entry(config.model)  # says which models are known
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
    return _Counts(
        name, registry.hub_id(config.model), sum(by_part.values()), by_part, adapter, nf4
    )


def _allocated(config: EstimateMemoryConfig, counts: _Counts) -> list[Component]:
    return allocated_components(
        counts.total,
        counts.adapter,
        config.dtype,
        lora=config.lora,
        cached=config.reference_cache,
        optim=config.optim,
        nf4_weights=counts.nf4_weights,
        shards=Shards.for_strategy(config.strategy, config.num_gpus),
    )


def _unvalidated(config: EstimateMemoryConfig) -> list[str]:
    """What of the estimate was never held against a measurement."""
    said = ["CUDA context and workspaces", "fragmentation"]
    said += ["nf4 weights"] if config.quantization == "nf4" else []
    said += ["8-bit optimizer"] if "8bit" in config.optim else []
    return said + (["sharding over GPUs"] if config.num_gpus > 1 else [])


def _image(config: EstimateMemoryConfig, limit: int | None) -> tuple[int, int]:
    """The picture's size: as given, or the bound of `prepare` in photographs' proportions."""
    if config.image_size is None:
        side = limit or 1024
        return side, round(side * 3 / 4)
    width, _, height = config.image_size.partition("x")
    return int(width), int(height or width)


def _fast(config: EstimateMemoryConfig, counts: _Counts, ours: list[Component]) -> dict[str, Any]:
    if counts.name not in fast.known_architectures():
        return {"peak_bytes": None, "verdict": None, "phases": None}
    image = _image(config, fast.default_image_side(counts.name))
    tokens, patches = fast.image_tokens(counts.name, image)
    rows = config.per_device_train_batch_size * (1 if config.engine == "shared" else 2)
    answers = config.answer_tokens * (2 if config.engine == "shared" else 1)
    made = fast.activation_bytes(
        fast.ModelShape.of_model(counts.name),
        rows * (config.images * tokens + config.prompt_tokens + answers),
        rows * answers,
        rows * config.images * patches,
        2,  # bfloat16 autocast
        checkpointing=config.gradient_checkpointing,
        lora=config.lora,
    )
    peak = sum(c.bytes for c in ours) + made
    return {
        "peak_bytes": peak,
        "verdict": None,
        "phases": None,
        "error_per_cent": fast.MAX_ERROR_PERCENT,
        "image": image,
    }


def _simulated(
    config: EstimateMemoryConfig, counts: _Counts, capacity: int | None
) -> dict[str, Any]:
    foreseen = _Foreseer(config)
    batch = config.per_device_train_batch_size
    whole = foreseen.at(batch)
    shift = _shift(config, counts)
    found: dict[str, Any] = {
        "peak_bytes": round(whole.peak + shift),
        "verdict": None,
        "image": list(foreseen.image),
    }
    found["phases"] = {name: round(size + shift) for name, size in whole.phases.items()}
    if capacity is not None:
        found["plan"] = _plan(config, foreseen, whole, shift, capacity)
    return found


def _plan(
    config: EstimateMemoryConfig, foreseen: _Foreseer, whole: Any, shift: int, capacity: int
) -> dict[str, Any]:
    """The largest batch that fits: guessed on a line through two simulated ones, then simulated
    itself.
    """
    batch = config.per_device_train_batch_size
    other = 1 if batch > 1 else 2
    known = {batch: whole, other: foreseen.at(other)}
    small, large = sorted(known)
    peaks = PeakByBatch(small, large, known[small].phases, known[large].phases)
    effective = batch * config.gradient_accumulation_steps
    best = largest_batch_size(peaks, shift + CONTEXT_BYTES, capacity, effective)
    while best is not None:
        if best not in known:
            known[best] = foreseen.at(best)
        if verdict(known[best].peak + shift + CONTEXT_BYTES, capacity).word == "fits":
            break
        best = max((b for b in range(1, best) if effective % b == 0), default=None)
    plan = {
        "effective_batch_size": effective * config.num_gpus,
        "per_device_train_batch_size": best,
        "gradient_accumulation_steps": effective // best if best else None,
        "peak_bytes": round(known[best].peak + shift) if best else None,
    }
    return plan if best else {**plan, "first": _first_to_switch_on(config, capacity)}


class _Foreseer:
    """Simulates steps of these settings at any batch size."""

    def __init__(self, config: EstimateMemoryConfig) -> None:
        import torch

        from vlmdpo.memory import architecture as arch
        from vlmdpo.models.families import default_image_side
        from vlmdpo.training import simulate

        self.config, self.dtype = config, getattr(torch, config.dtype)
        origin: dict[str, Any] = {
            "revision": config.revision,
            "trust_remote_code": config.trust_remote_code,
        }
        if config.dataset is None:
            self.shape = arch.load_architecture(config.model, **origin)
            self.image = _image(config, default_image_side(self.shape.processor))
            answer = config.answer_tokens
            work = simulate.Workload(
                self.image, config.images, config.prompt_tokens, answer, answer
            )
            self._rows = lambda count: simulate.synthetic_rows(self.shape.processor, work, count)
        else:
            self.shape = arch.load_architecture_from_files(config.model, **origin)
            rows = simulate.longest_rows(self.shape.processor, Path(config.dataset))
            self.image = rows[0]["images"][0].size if rows[0]["images"] else (0, 0)
            self._rows = lambda count: rows.select([i % len(rows) for i in range(count)])
        if hasattr(self.shape.processor.image_processor, "do_image_splitting"):
            self.shape.processor.image_processor.do_image_splitting = config.image_splitting

    def at(self, batch: int, **changes: Any) -> Any:
        """The foreseen step with so many pairs a device, and these settings changed."""
        from vlmdpo.training import simulate

        settings = {name: getattr(self.config, name) for name in _SHARED}
        settings |= {"per_device_train_batch_size": batch, "bf16": True, **changes}
        # An 8-bit optimizer needs its package even to be simulated: AdamW, whose states are then
        # counted smaller.
        optim = settings["optim"]
        settings["optim"] = "adamw_torch" if "8bit" in optim else optim
        with simulate.gpu_loss_head():
            return simulate.estimate_peak(
                self.shape, TrainConfig(**settings), self._rows(batch), dtype=self.dtype
            )


def _first_to_switch_on(config: EstimateMemoryConfig, capacity: int) -> dict[str, Any] | None:
    """The first setting that makes a batch of 1 fit, simulated; None where none does."""
    changes: list[dict[str, Any]] = []
    changes += [{"gradient_checkpointing": True}] if not config.gradient_checkpointing else []
    changes += [{"engine": "shared"}] if config.engine != "shared" else []
    changes += [{"dtype": "bfloat16"}] if config.dtype == "float32" else []
    changes += [{"lora": True}] if not config.lora else []
    merged: dict[str, Any] = {}
    for change in changes:
        merged |= change
        tried = dataclasses.replace(config, **merged)
        needed = _Foreseer(tried).at(1).peak + _shift(tried, _counts(tried)) + CONTEXT_BYTES
        if verdict(needed, capacity).word == "fits":
            return {"change": dict(merged), "needed_bytes": round(needed)}
    return None


def _shift(config: EstimateMemoryConfig, counts: _Counts) -> int:
    """What sharding, quantization and 8-bit moments take off a step simulated without: they change
    what stands still.
    """
    plain = allocated_components(
        counts.total,
        counts.adapter,
        config.dtype,
        lora=config.lora,
        cached=config.reference_cache,
        optim="adamw_torch",
    )
    return sum(c.bytes for c in _allocated(config, counts)) - sum(c.bytes for c in plain)


def _judged(config: EstimateMemoryConfig, report: dict[str, Any], capacity: int) -> dict[str, Any]:
    if report["peak_bytes"] is None:
        raise ConfigError(f"--fast has no formula for '{report['model']}'; leave out --fast")
    found = verdict(report["peak_bytes"] + CONTEXT_BYTES, capacity)
    sizes = {"needed_bytes": found.needed_bytes, "free_bytes": found.free_bytes}
    return {"verdict": found.word, "gpu": {"name": config.gpu, "capacity_bytes": capacity, **sizes}}


def show(report: dict[str, Any]) -> None:
    """Print the counts, the article's table, what is allocated, the peak, and the verdict."""
    counts = report["parameters"]
    ui.result(f"{report['model']} ({report['hub_id']}): {counts['total']:,} parameters")
    ui.result("  " + ", ".join(f"{part} {count:,}" for part, count in counts["by_part"].items()))
    if report["lora_r"]:
        share = 100 * counts["trainable"] / counts["with_adapter"]
        where = {
            "all": "all linear layers",
            "language": "the language model",
            "connector": "connector and language model",
        }
        ui.result(
            f"  LoRA r={report['lora_r']} on {where[report['settings']['lora_scope']]} trains "
            f"{counts['trainable']:,} of "
            f"{counts['with_adapter']:,} ({share:.2f}%)"
        )
    _show_article(report)
    _show_allocated(report)
    if report["verdict"]:
        _show_verdict(report)
    if "plot" in report:
        ui.result(f"Plot: {report['plot']}")


def _show_article(report: dict[str, Any]) -> None:
    article = report["article"]
    rows = [
        [rounded["name"], rounded["formula"], f"{rounded['gb']:.1f}", *_in_both(exact["bytes"])]
        for rounded, exact in zip(article["components"], report["components"], strict=True)
    ]
    total = report["total_bytes"]
    ui.table(
        f"The article's table ({report['dtype']}): rounded as there, and exactly",
        ["Component", "Calculation", "GB", "exact GB", "exact GiB"],
        [*rows, ["Total", "", f"{article['total_gb']:.1f}", *_in_both(total)]],
        strong=[4],
        note="1 GB = 1e9 bytes, 1 GiB = 2**30 bytes. Activations come on top.",
        text=(0, 1),
    )


def _show_allocated(report: dict[str, Any]) -> None:
    lines = report["allocated"]["components"]
    rows = [
        [line["name"], line["formula"], *_in_both(line["bytes"]), line["why"] + _star(line)]
        for line in lines
    ]
    rows.append(["Sum", "", *_in_both(report["allocated"]["total_bytes"]), ""])
    strong = [len(rows) - 1]
    peak = report["peak_bytes"]
    how = (
        f"a formula, up to {report['error_per_cent']}% off"
        if "error_per_cent" in report
        else "a simulated step"
    )
    if peak is not None:
        rest = peak - report["allocated"]["total_bytes"]
        rows.append(
            ["Activations and more", _step_of(report), *_in_both(rest), "at the highest point"]
        )
        rows.append(["Peak", "", *_in_both(peak), how])
        strong.append(len(rows) - 1)
        rows.append(["CUDA context and workspaces", "about", *_in_both(CONTEXT_BYTES), "*"])
    host = ui.human_bytes(report["loading"]["host_bytes"])
    if peak is None:
        ui.say(
            f"--fast has no formula for the activations of {report['model']}; leave it out to "
            "simulate a step"
        )
    note = f"* not validated: {', '.join(report['unvalidated'])}. Loading takes {host} of the host's memory first."
    heads = ["Component", "Calculation", "GB", "GiB", "Why"]
    ui.table("What vlmdpo allocates", heads, rows, strong=strong, note=note, text=(0, 1, 4))


def _step_of(report: dict[str, Any]) -> str:
    s = report["settings"]
    image = "x".join(str(edge) for edge in report["image"])
    return f"batch {s['per_device_train_batch_size']}, {s['images']} image {image}, {s['engine']} engine"


def _in_both(size: float) -> list[str]:
    return [f"{size / 1e9:.3f}", f"{size / _GIB:.3f}"]


def _star(line: dict[str, Any]) -> str:
    return "" if line["validated"] else " *"


def _show_verdict(report: dict[str, Any]) -> None:
    found, plan = report["gpu"], report.get("plan")
    needed, capacity = found["needed_bytes"] / _GIB, found["capacity_bytes"] / _GIB
    room = found["free_bytes"] / _GIB
    rest = f"{room:.1f} GiB to spare" if room >= 0 else f"{-room:.1f} GiB short"
    band = (
        f" (within the {100 * ERROR_BAND:.0f}% that the peak may be off)"
        if report["verdict"] == "tight"
        else ""
    )
    ui.result(
        f"{found['name']}: {report['verdict']}{band}; needs {needed:.1f} of {capacity:.1f} GiB, "
        f"{rest}"
    )
    if plan and plan["per_device_train_batch_size"]:
        ui.result(
            f"Largest batch that fits: {_command(report, plan)}  "
            f"(effective batch {plan['effective_batch_size']}, peak "
            f"{plan['peak_bytes'] / _GIB:.1f} GiB)"
        )
    elif plan and plan["first"]:
        changed = {
            **report,
            **plan["first"]["change"],
            "settings": {**report["settings"], **plan["first"]["change"]},
        }
        one = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": plan["effective_batch_size"],
        }
        flags = " ".join(_flag(name, value) for name, value in plan["first"]["change"].items())
        ui.result(f"Switch on first: {flags}, as in: {_command(changed, one)}")
        ui.result(f"  (then a batch of 1 needs {plan['first']['needed_bytes'] / _GIB:.1f} GiB)")
    elif plan:
        ui.result(
            "No setting here makes it fit: take a smaller model, smaller images, or more GPUs "
            "(--num-gpus, --strategy)"
        )


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag_name(name) if value else "--no-" + name.replace("_", "-")
    return f"{flag_name(name)} {value}"


def _command(report: dict[str, Any], plan: dict[str, Any]) -> str:
    """The training command with this plan; what is its default is left out."""
    settings, default = report["settings"], TrainConfig()
    words = ["vlmdpo", "train", "--model", str(settings["model"])]
    words += (
        ["--dtype", report["dtype"]] if report["dtype"] != "bfloat16" else []
    )  # which a GPU gets by itself
    for name in (
        "lora",
        "lora_r",
        "lora_scope",
        "gradient_checkpointing",
        "engine",
        "reference_cache",
        "optim",
    ):
        if settings[name] != getattr(default, name):
            words += _flag(name, settings[name]).split(" ", 1)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        words += [flag_name(name), str(plan[name])]
    return shlex.join(words)
