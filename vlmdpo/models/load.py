"""Loads processors, models and adapters, for all commands by the same rules. Nothing else does."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import is_bitsandbytes_available

from vlmdpo import ui
from vlmdpo.errors import MissingDependencyError, ModelError, install_command, is_out_of_memory
from vlmdpo.models import registry
from vlmdpo.models.adapter_files import check_adapter
from vlmdpo.models.attention import check_attention_installed, use_attention
from vlmdpo.models.chat_template import PromptSettings, add_missing_template
from vlmdpo.models.devices import pick_device
from vlmdpo.models.download import shown_download
from vlmdpo.models.load_errors import translate_load_errors
from vlmdpo.models.processor_parts import load_processor_parts
from vlmdpo.models.protocols import AdaptedModel, VisionLanguageModel
from vlmdpo.models.rendering import set_rendering
from vlmdpo.models.supported import check_sizes, check_supported
from vlmdpo.models.weight_files import local_folder
from vlmdpo.models.weights import check_complete, check_finite

# What they say to a terminal, this package says itself, as errors and warnings of its own.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def pretrained_source(model: str) -> str:
    """What `from_pretrained` gets: the embedded folder for "tiny", else a Hub id or a path."""
    if model == "tiny":
        return str(resources.files("vlmdpo").joinpath("tiny", "assets", "model"))
    return registry.hub_id(model)


def check_is_vlm(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        ModelError: there is none, or it is not of a model that can be trained.
    """
    with translate_load_errors(model, revision):
        folder = local_folder(model, revision)
        if folder is not None and (folder / "config.json").is_file():
            # First, because a configuration makes lists as long as it has layers.
            check_sizes(json.loads((folder / "config.json").read_text(encoding="utf-8")), model)
        config = AutoConfig.from_pretrained(
            pretrained_source(model), revision=revision, trust_remote_code=trust_remote_code
        )
    check_sizes(config.to_dict(), model)
    check_supported(config, model, trust_remote_code=trust_remote_code)
    return config


def load_processor(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    image_splitting: bool = False,
    prompts: PromptSettings | None = None,
) -> ProcessorMixin:
    """The model's processor, whose chat template is known to render questions about images.

    Args:
        image_splitting: whether Idefics-like processors split images into tiles.
        prompts: how conversations are rendered, see `rendering`.

    Raises ModelError, MissingDependencyError; ConfigError for `prompts` that the template does not
    take.
    """
    check_is_vlm(model, revision=revision, trust_remote_code=trust_remote_code)
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with translate_load_errors(model, revision):
        processor = load_processor_parts(pretrained_source(model), origin)
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise ModelError(f"--model: '{model}' has no image processor, so it cannot take images")
    if not processor.tokenizer("a word", add_special_tokens=False)["input_ids"]:
        raise ModelError(
            f"--model: '{model}' has no tokenizer that reads text; its folder needs tokenizer.json "
            "or the files of its kind of tokenizer"
        )
    add_missing_template(processor)
    if hasattr(processor.image_processor, "do_image_splitting"):
        processor.image_processor.do_image_splitting = image_splitting
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    set_rendering(processor, prompts or PromptSettings(), model)
    return processor


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device is a GPU that computes in bfloat16.

    Older ones (T4, V100) emulate it, at a fraction of their speed; PyTorch counts them by default.
    """
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The data type of `--dtype`; "auto": bfloat16 on a GPU that computes in it, else float32."""
    if dtype == "auto":
        if computes_in_bfloat16(device):
            return torch.bfloat16
        if device.type == "cuda":
            _say_no_bfloat16()
        return torch.float32
    picked = getattr(torch, dtype)
    assert isinstance(picked, torch.dtype)
    return picked


@functools.cache  # once in a process
def _say_no_bfloat16() -> None:
    ui.say(
        "this GPU does not compute in bfloat16, so --dtype auto is float32; --dtype float16 is "
        "faster and smaller, but its range is so narrow that training can overflow"
    )


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
    return {"quantization_config": settings}


def _placement(quantization: str, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that put weights on a GPU as they are read, and quantize them.

    Without them every process would build the whole model in the machine's memory first. Models
    that processes share are asked for on the CPU, and split from there.
    """
    options = _quantization_options(quantization, device)
    if device.type != "cuda":
        return options
    # With its number: the trainer takes "cuda" for another device than its own "cuda:0".
    index = torch.cuda.current_device() if device.index is None else device.index
    return {**options, "device_map": {"": torch.device("cuda", index)}}


@contextlib.contextmanager
def _download_shown(model: str, revision: str | None) -> Iterator[None]:
    source = pretrained_source(model)
    with contextlib.ExitStack() as stack:
        if not Path(source).exists():
            stack.enter_context(shown_download(source, revision))
        yield


def meta_model(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> VisionLanguageModel:
    """The model's modules without weights, to look up names. Raises ModelError."""
    config = check_is_vlm(model, revision=revision, trust_remote_code=trust_remote_code)
    with translate_load_errors(model, revision), torch.device("meta"):
        empty: VisionLanguageModel = AutoModelForImageTextToText.from_config(
            config, trust_remote_code=trust_remote_code
        )
    return empty


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
        dtype, device: see `pick_dtype`, `pick_device`.
        attention: of `--attn-implementation`; see `models.attention`.
        quantization: "nf4" loads weights in 4 bits with double quantization, as QLoRA does, or
            "none".
        adapter: the folder of a PEFT adapter.

    Returns a `PreTrainedModel`, or a `peft.PeftModel` with an adapter. Raises ModelError,
    MissingDependencyError, MemoryBudgetError.
    """
    config = check_is_vlm(model, revision=revision, trust_remote_code=trust_remote_code)
    if adapter is not None:
        check_adapter(adapter, model, revision)
    where = pick_device(device)
    picked = pick_dtype(dtype, where)
    check_attention_installed(attention)
    with translate_load_errors(model, revision):
        options = _placement(quantization, where)
        is_remote = type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        if is_remote and attention != "auto":  # code of its own may choose only as it is built
            options["attn_implementation"] = attention
        with _download_shown(model, revision):
            loaded, keys = AutoModelForImageTextToText.from_pretrained(
                pretrained_source(model),
                revision=revision,
                trust_remote_code=trust_remote_code,
                dtype=picked,
                use_safetensors=True,
                # What does not fit is an error here too, but one that names it.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        check_complete(keys, model)
        check_finite(loaded.named_parameters(), f"--model: '{model}'")
        if "device_map" not in options:
            loaded.to(where)
        if not is_remote:
            use_attention(loaded, attention, where, picked)
    loaded.eval()
    return loaded if adapter is None else load_adapter(loaded, adapter)


def load_adapter(
    model: VisionLanguageModel, adapter: Path, *, is_trainable: bool = False
) -> AdaptedModel:
    """The model wrapped in an adapter from disk, which `check_adapter` has seen.

    Args:
        is_trainable: whether its weights are to train further.

    Raises ModelError where the two do not fit, or the adapter holds NaN.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its keys are looked at below
            wrapped = PeftModel.from_pretrained(
                model, str(adapter), use_safetensors=True, is_trainable=is_trainable
            )
            # Once more, because only this says which keys it found.
            keys = wrapped.load_adapter(str(adapter), "default", is_trainable=is_trainable)
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as problem:
        if is_out_of_memory(problem):
            raise
        # PyTorch lists what does not fit in the lines below its first.
        reason = " ".join(str(problem).split("\n\t", 2)[:2]) or type(problem).__name__
        raise ModelError(f"--adapter: '{adapter}' does not fit the model: {reason}") from problem
    for names, what in (
        (keys.missing_keys, "it lacks weights for this one"),
        (keys.unexpected_keys, "this one has no place for some of its weights"),
    ):
        if names:
            raise ModelError(
                f"--adapter: '{adapter}' was trained on another model: {what}, as {min(names)}"
            )
    adapted = ((name, weight) for name, weight in wrapped.named_parameters() if ".default" in name)
    check_finite(adapted, f"--adapter: '{adapter}'")
    wrapped.eval()
    return wrapped
