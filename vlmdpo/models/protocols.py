"""What this package needs of a model and of a processor, for annotations.

transformers ships no types that mypy could check, and every model class and every PEFT wrapper
brings its own methods; these protocols say which of them are relied on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )
    from transformers.utils import ModelOutput


class Module(Protocol):
    """The part of `torch.nn.Module` that is used here."""

    training: bool

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def state_dict(self) -> Mapping[str, Tensor]: ...
    def train(self, mode: bool = True) -> Module: ...
    def eval(self) -> Module: ...


class Backbone(Module, Protocol):
    """A vision-language model without its head: `base_model` of a transformers model."""

    config: PreTrainedConfig
    forward: Callable[..., ModelOutput]
    get_image_features: Callable[..., ModelOutput]

    def __call__(self, **inputs: Any) -> ModelOutput: ...
    def get_decoder(self) -> nn.Module: ...
    def get_input_embeddings(self) -> nn.Module: ...


class VisionLanguageModel(Module, Protocol):
    """A transformers image-text-to-text model, or the PEFT model around one."""

    config: PreTrainedConfig
    generation_config: GenerationConfig
    device: torch.device
    dtype: torch.dtype
    forward: Callable[..., ModelOutput]

    @property
    def base_model(self) -> Any: ...  # a Backbone, or PEFT's tuner around the model
    def __call__(self, **inputs: Any) -> ModelOutput: ...
    def generate(self, **inputs: Any) -> Any: ...
    def get_input_embeddings(self) -> nn.Module: ...
    def get_output_embeddings(self) -> nn.Module | None: ...


class AdaptedModel(VisionLanguageModel, Protocol):
    """A `peft.PeftModel`."""

    def disable_adapter(self) -> AbstractContextManager[None]: ...
    def get_base_model(self) -> VisionLanguageModel: ...
    def merge_and_unload(self) -> PreTrainedModel: ...


class ImageProcessor(Protocol):
    """The image part of a processor."""

    preprocess: Callable[..., Any]

    def to_dict(self) -> dict[str, Any]: ...


class Processor(Protocol):
    """A transformers processor: chat template, tokenizer and image processor in one."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: ImageProcessor
    chat_template: str | None

    def __call__(self, **inputs: Any) -> Any: ...  # a BatchFeature
    def apply_chat_template(self, conversation: Any, **options: Any) -> str: ...
    def batch_decode(self, sequences: Any, **options: Any) -> list[str]: ...
    def to_dict(self) -> dict[str, Any]: ...
    def save_pretrained(self, save_directory: Any) -> Any: ...
