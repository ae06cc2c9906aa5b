"""The first items of the GPU check: the environment, and whether the engine is exact in bf16."""

from __future__ import annotations

import importlib.util
import math
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from _gpu_models import (
    Duo,
    Machine,
    collate,
    collate_stock,
    gradient_difference,
    loss_and_gradients,
    pad_rows,
    random_rows,
    trainer_of,
)
from _gpu_run import NotHere

from vlmdpo.memory.architecture import Architecture
from vlmdpo.models.families import fallback_chat_template
from vlmdpo.tiny import random_models
from vlmdpo.training import doctor, engine_checks
from vlmdpo.training.rounding import one_more_rounding

_PACKAGES = (
    *("torch", "transformers", "trl", "peft", "accelerate", "datasets", "triton"),
    *("flash-attn", "bitsandbytes", "torchvision"),
)
# Dense bf16 TFLOP/s by the cards' data sheets, without sparsity.
_DATASHEET_TFLOPS = {
    "H100 80GB HBM3": 989,
    "H100 PCIe": 756,
    "H200": 989,
    "A100": 312,
    "B200": 2250,
}
PADDINGS = (1, 7, 64)
_TOY_FAMILIES = {"sdpa": ("idefics2", "paligemma2"), "eager": ("llava",)}
# The relative error of a log-prob that rounding alone may cause.
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 1e-5}


def environment(machine: Machine) -> dict[str, Any]:
    """Card, versions, memory, and what a plain matrix product reaches."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "device": "cpu",
        "cuda": torch.version.cuda,
        "driver": None,
        "total_bytes": None,
        "free_bytes": None,
        "datasheet_tflops": None,
    }
    if machine.is_cuda:
        properties = torch.cuda.get_device_properties(machine.device)
        free, total = torch.cuda.mem_get_info(machine.device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "free_bytes": free,
            "total_bytes": total,
            "datasheet_tflops": next(
                (peak for name, peak in _DATASHEET_TFLOPS.items() if name in properties.name), None
            ),
        }
    found["matmul_tflops"] = matmul_tflops(machine)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The driver's version, where NVIDIA's own Python package is there to ask."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError as problem:
        return f"unknown: {problem}"


def matmul_tflops(machine: Machine) -> float:
    """TFLOP/s of a large bf16 matrix product: what this card reaches at best."""
    side, repeats = (64, 3) if machine.toy else (8192, 10)
    a, b = (torch.randn(side, side, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        started = machine.clock()
        torch.mm(a, b)
        seconds.append(machine.clock() - started)
    return 2 * side**3 / statistics.median(seconds[3:]) / 1e12


def _apart(answers: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The mean difference of two lists of log-probs, in nats per token."""
    return torch.cat([(a - b).abs() for a, b in zip(answers, others, strict=True)]).mean().item()


def exactness(machine: Machine, duo: Duo, example: dict[str, Any]) -> dict[str, Any]:
    """The engine's self-check on one pair, beside the noise of stock rows.

    The noise: stock rows with more padding, which is the same arithmetic in another order, and with
    embeddings rounded once more. An engine that differs by no more than that is as exact as bf16
    allows. Nats per token.
    """
    processor = duo.stock.processing_class
    rows = collate_stock(processor, [example])
    logps = doctor.token_logps(duo.stock, rows)
    padding = processor.tokenizer.pad_token_id
    noise = {
        str(count): _apart(doctor.token_logps(duo.stock, pad_rows(rows, count, padding)), logps)
        for count in PADDINGS
    }
    with one_more_rounding(duo.stock.model):
        noise["one rounding"] = _apart(doctor.token_logps(duo.stock, rows), logps)
    error = _apart(doctor.token_logps(duo.ours, collate(duo.ours, [example])), logps)
    checks = {"shared": engine_checks.check_shared_forward, "rows": engine_checks.check_images_once}
    check = checks[duo.engine](duo.ours, [example])
    size = torch.cat(logps).abs().mean().item()
    return {
        "engine": duo.engine,
        "self_check": {"passed": check.passed, "seen": check.seen, "cause": check.cause},
        "error": error,
        "noise": noise,
        "log_prob": size,
        "tokens": sum(map(len, logps)),
        "passed": bool(check.passed)
        and within_noise(error, max(noise.values()), size, machine.dtype),
    }


def within_noise(error: float, noise: float, size: float, dtype: torch.dtype) -> bool:
    """Whether an error is no more than four times the noise, or than one rounding of its size."""
    return math.isfinite(error) and error <= max(4 * noise, _ROUNDING[dtype] * size)


def losses_and_gradients(machine: Machine, duo: Duo, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss and gradients of the same rows by stock TRL and ours, beside stock's own noise."""
    processor = duo.stock.processing_class
    batch = collate_stock(processor, rows)
    stock, gradients = loss_and_gradients(duo.stock, batch)
    padded, gradient_noise = [], []
    for count in PADDINGS[1:]:
        more = pad_rows(batch, count, processor.tokenizer.pad_token_id)
        loss, padded_gradients = loss_and_gradients(duo.stock, more)
        padded.append(loss)
        gradient_noise.append(gradient_difference(gradients, padded_gradients))
    with one_more_rounding(duo.stock.model):
        loss, rounded_gradients = loss_and_gradients(duo.stock, batch)
    padded.append(loss)
    gradient_noise.append(gradient_difference(gradients, rounded_gradients))
    ours, our_gradients = loss_and_gradients(duo.ours, collate(duo.ours, rows))
    found = {
        "loss": {"stock": stock, "stock with noise": padded, "ours": ours},
        "loss_error": abs(ours - stock),
        "loss_noise": max(abs(loss - stock) for loss in padded),
        "gradient_error": gradient_difference(gradients, our_gradients),
        "gradient_noise": max(gradient_noise),
    }
    same_loss = within_noise(found["loss_error"], found["loss_noise"], 1.0, machine.dtype)
    same_gradient = found["gradient_error"] <= max(4 * found["gradient_noise"], 0.05)
    return {**found, "passed": same_loss and same_gradient}


def tiny(machine: Machine, attention: str) -> dict[str, Any]:
    """Self-check and loss of a tiny model of every family in bf16, with this attention."""
    reason = attention_reason(attention, machine)
    if reason is not None:
        raise NotHere(reason)
    found: dict[str, Any] = {}
    for family in _TOY_FAMILIES[attention] if machine.toy else random_models.FAMILIES:
        try:
            found[family] = _tiny_family(machine, family, attention)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, ImportError, RuntimeError, AttributeError, TypeError) as problem:
            # A family that refuses this attention, or fails with it, leaves the others.
            text = f"{type(problem).__name__}: {str(problem).strip()[:400]}"
            refused = "does not support" in text
            found[family] = {"unsupported" if refused else "error": text}
        machine.release()
    return {"attention": attention, "families": found}


def _tiny_family(machine: Machine, family: str, attention: str) -> dict[str, Any]:
    rows = random_rows(2, (40, 28), 12, (8, 20))
    duo = Duo(
        machine,
        *_tiny_model(machine, family, attention, machine.dtype),
        rows,
        gradient_checkpointing=False,
    )
    found = exactness(machine, duo, rows[0])
    found["agreement"] = losses_and_gradients(machine, duo, rows)
    found["passed"] = found["passed"] and found["agreement"]["passed"]
    if attention == "sdpa":
        # In float32, rounding is no longer seen: how far is each from that truth?
        shape, model = _tiny_model(machine, family, attention, torch.float32)
        settings = {"engine": "stock", "bf16": False, "gradient_checkpointing": False}
        exact = trainer_of(machine, shape, model, rows, **settings)
        stock = collate_stock(shape.processor, rows[:1])
        truth = doctor.token_logps(exact, stock)
        ours = collate(duo.ours, rows[:1])
        found["error_from_float32"] = {
            "stock": _apart(doctor.token_logps(duo.stock, stock), truth),
            "ours": _apart(doctor.token_logps(duo.ours, ours), truth),
        }
    return found


def _tiny_model(
    machine: Machine, family: str, attention: str, dtype: torch.dtype
) -> tuple[Architecture, Any]:
    model, processor = random_models.make(family)
    processor.chat_template = processor.chat_template or fallback_chat_template(processor)
    model.set_attn_implementation(attention)
    for parameter in model.parameters():  # buffers stay float32, as when a model is loaded
        parameter.data = parameter.data.to(dtype)
    return Architecture(model.config, processor), model.to(machine.device)


def attention_reason(attention: str, machine: Machine) -> str | None:
    """Why an attention cannot run here; None if it can."""
    if attention != "flash_attention_2":
        return None
    if not machine.is_cuda:
        return "flash_attention_2 needs a GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    return None
