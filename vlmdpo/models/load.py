"""Loads processors, models and adapters, for all commands by the same rules. Nothing else does."""

from __future__ import annotations

import logging
import os
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import (
    is_bitsandbytes_available,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
)

from vlmdpo.errors import MissingDependencyError, ModelError, install_command, nearest
from vlmdpo.models import registry
from vlmdpo.models.families import fallback_chat_template, without_video_processor
from vlmdpo.models.protocols import AdaptedModel, VisionLanguageModel

# What they say to a terminal, this package says itself, as errors and warnings of its own.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def pretrained_source(model: str) -> str:
    """What `from_pretrained` gets: the embedded folder for "tiny", else a Hub id or a path."""
    if model == "tiny":
        return str(resources.files("vlmdpo").joinpath("tiny", "assets", "model"))
    return registry.hub_id(model)


def _not_found(model: str, problem: Exception) -> ModelError:
    """Why a model cannot be loaded, in one line."""
    hint = nearest(model, registry.ENTRIES)
    text = str(problem)
    if Path(model).exists():
        return ModelError(
            f"--model: '{model}' is not a complete model folder: {text.splitlines()[0]}"
        )
    if "gated repo" in text or "401" in text:
        return ModelError(
            f"--model: '{model}' is gated or private; accept its terms on the Hub and run `hf "
            "auth login`"
        )
    if registry.find(model) is not None:
        return ModelError(
            f"--model: '{registry.hub_id(model)}' is not in the cache, and the Hub cannot be "
            "reached"
        )
    return ModelError(
        f"--model: cannot find '{model}' as a folder, in the cache, or on the Hub.{hint} "
        f"Aliases: {', '.join(list(registry.ENTRIES)[:4])} ..."
    )


def check_is_vlm(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        ModelError: there is none, or it is not a vision-language model's.
    """
    try:
        config = AutoConfig.from_pretrained(
            pretrained_source(model), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as problem:
        if "trust_remote_code" in str(problem):
            raise ModelError(
                f"--model: '{model}' runs code of its own; add --trust-remote-code if you trust it"
            ) from problem
        raise _not_found(model, problem) from problem
    remote = trust_remote_code and "AutoModelForImageTextToText" in (
        getattr(config, "auto_map", None) or {}
    )
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not remote:
        raise ModelError(
            f"--model: '{model}' is a {config.model_type} model, not a vision-language model; "
            f"try one of {', '.join(list(registry.ENTRIES)[1:5])} ..."
        )
    return config


def load_processor(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    image_splitting: bool = False,
) -> ProcessorMixin:
    """The model's processor, checked to have a chat template. Raises ModelError."""
    check_is_vlm(model, revision=revision, trust_remote_code=trust_remote_code)
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        processor = _load_processor_parts(pretrained_source(model), origin)
    except (OSError, ValueError) as problem:
        raise _not_found(model, problem) from problem
    except ImportError as problem:
        raise MissingDependencyError(
            f"the processor of '{model}' needs a package: {' '.join(str(problem).split())}"
        ) from problem
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise ModelError(f"--model: '{model}' has no image processor, so it cannot take images")
    if processor.chat_template is None:
        processor.chat_template = fallback_chat_template(processor)
    if processor.chat_template is None:
        raise ModelError(
            f"--model: '{model}' ships no chat template, which DPO data needs; use an "
            "instruction-tuned version"
        )
    if hasattr(processor.image_processor, "do_image_splitting"):
        processor.image_processor.do_image_splitting = image_splitting
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def _load_processor_parts(source: str, origin: dict[str, Any]) -> ProcessorMixin:
    """A processor, without its video part where that cannot be loaded: it needs torchvision."""
    processor, problem = None, None
    try:
        processor = AutoProcessor.from_pretrained(source, **origin)
    except (ImportError, OSError) as raised:
        problem = raised
    if isinstance(processor, ProcessorMixin):
        return processor
    # Without torchvision AutoProcessor fails, or returns the tokenizer alone.
    settings, _ = (
        ProcessorMixin.get_processor_dict(source, **origin) if problem or processor else ({}, None)
    )
    processor_class = getattr(transformers, str(settings.get("processor_class")), None)
    if processor_class is not None and "video_processor" in processor_class.get_attributes():
        return without_video_processor(processor_class).from_pretrained(source, **origin)
    if problem is not None:
        raise problem
    return processor


def pick_device(device: str) -> torch.device:
    """The device that `--device` names. Raises ModelError where there is none such.

    "auto" and "cuda" are a GPU of this process's own where a launcher started several. No GPU is
    initialized: that takes some hundred megabytes on it, and a process of many must not take them
    on the first.
    """
    if device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        picked = torch.device("cuda" if device == "auto" else device)
        if picked.type != "cuda":
            torch.empty(0, device=picked)
            return picked
    except (RuntimeError, AssertionError) as problem:
        raise _no_such_device(device, str(problem).splitlines()[0]) from problem
    if not torch.cuda.is_available():
        has_cuda = torch.backends.cuda.is_built()
        raise _no_such_device(
            device, "no GPU is visible" if has_cuda else "PyTorch was installed without CUDA"
        )
    gpus = torch.cuda.device_count()
    if picked.index is not None and picked.index >= gpus:
        raise _no_such_device(device, f"visible GPUs are numbered from 0 to {gpus - 1}")
    if "LOCAL_RANK" not in os.environ:
        return picked
    # As accelerate does it: launchers may also show each process one GPU only.
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus)
    if picked.index not in (None, own.index):
        raise _no_such_device(
            device, "each process of this run has a GPU of its own; use --device cuda"
        )
    return own


def _no_such_device(device: str, reason: str) -> ModelError:
    return ModelError(f"--device: '{device}' is not available here: {reason}")


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The data type of `--dtype`; "auto": bfloat16 on a GPU that supports it, else float32."""
    if dtype == "auto":
        return (
            torch.bfloat16
            if device.type == "cuda" and torch.cuda.is_bf16_supported()
            else torch.float32
        )
    picked = getattr(torch, dtype)
    assert isinstance(picked, torch.dtype)
    return picked


def pick_attention(attention: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The attention that `--attn-implementation` names; None for the model's own.

    "auto" is flash_attention_2 where it can run, else None. Raises MissingDependencyError where
    what was asked for is not installed.
    """
    flash = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
    }
    if attention == "auto":
        runs = device.type == "cuda" and dtype != torch.float32 and is_flash_attn_2_available()
        return "flash_attention_2" if runs else None
    if attention in flash and not flash[attention]():
        if attention == "flash_attention_2":
            package, how = "flash-attn", install_command("flash-attn", "--no-build-isolation")
        else:
            package, how = "flash-attn-3", "build it from flash-attention's hopper folder"
        raise MissingDependencyError(
            f"--attn-implementation {attention} needs the {package} package and a GPU that it "
            f"supports: {how}; or use sdpa"
        )
    return attention


def _quantization_options(quantization: str, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load weights in 4 bits; none for "none".

    Raises ModelError, MissingDependencyError.
    """
    if quantization == "none":
        return {}
    if device.type != "cuda":
        raise ModelError(
            f"--quantization {quantization} needs an NVIDIA GPU, and this run is on "
            f"{device.type}; leave it out"
        )
    if not is_bitsandbytes_available():
        raise MissingDependencyError(
            f"--quantization {quantization} needs bitsandbytes: {install_command(extra='qlora')}"
        )
    compute = pick_dtype("auto", device)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def load_model(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    attention: str = "auto",
    quantization: str = "none",
    adapter: Path | None = None,
) -> VisionLanguageModel:
    """The model on its device, in evaluation mode, with an adapter where one is given.

    Only safetensors are read.

    Args:
        dtype, device, attention: see `pick_dtype`, `pick_device`, `pick_attention`.
        quantization: "nf4" loads weights in 4 bits with double quantization, as QLoRA does, or
            "none".
        adapter: the folder of a PEFT adapter.

    Returns a `PreTrainedModel`, or a `peft.PeftModel` with an adapter. Raises ModelError,
    MissingDependencyError.
    """
    check_is_vlm(model, revision=revision, trust_remote_code=trust_remote_code)
    if adapter is not None:
        check_adapter(adapter)
    where = pick_device(device)
    try:
        loaded: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(
            pretrained_source(model),
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=pick_dtype(dtype, where),
            attn_implementation=pick_attention(attention, where, pick_dtype(dtype, where)),
            use_safetensors=True,
            **_quantization_options(quantization, where),
        )
    except (OSError, ValueError) as problem:
        raise _not_found(model, problem) from problem
    if quantization == "none":
        loaded.to(where)
    loaded.eval()
    return loaded if adapter is None else load_adapter(loaded, adapter)


def check_adapter(adapter: Path) -> None:
    """Raise ModelError where a folder does not hold a PEFT adapter in safetensors."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise ModelError(
                f"--adapter: '{adapter}' holds no {name}; give the output folder of vlmdpo train"
            )


def load_adapter(model: VisionLanguageModel, adapter: Path) -> AdaptedModel:
    """The model wrapped in an adapter from disk. Raises ModelError where the two do not fit."""
    from peft import PeftModel

    check_adapter(adapter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            wrapped = PeftModel.from_pretrained(model, str(adapter), use_safetensors=True)
        except (RuntimeError, ValueError, KeyError) as problem:
            reason = str(problem).splitlines()[0]
            raise ModelError(
                f"--adapter: '{adapter}' does not fit the model: {reason}"
            ) from problem
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if missing:
        raise ModelError(
            f"--adapter: '{adapter}' was trained on another model: some of its weights are "
            "missing here"
        )
    wrapped.eval()
    return wrapped
