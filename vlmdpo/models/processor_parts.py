"""Processors without the parts that this package does not need and that may not load here.

A processor is made of parts: tokenizer, image processor, and in some families a video processor
(which needs torchvision) or a feature extractor for sound. transformers hands them to the class by
position, in the order of its `__init__`, which differs between families.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoProcessor, ProcessorMixin

_VIDEO = "video_processor"


class _WithoutVideo(ProcessorMixin):
    """Stands between a processor class and ProcessorMixin, to take its parts without the video's.

    Attributes:
        all_parts: the class's parts, in the order in which it hands them on.
    """

    all_parts: tuple[str, ...] = ()

    def __init__(self, *parts: Any, **more: Any) -> None:
        # ProcessorMixin would count the parts and name them by position.
        named = {**dict(zip(self.all_parts, parts, strict=False)), **more}
        named.pop(_VIDEO, None)
        super().__init__(**named)

    @classmethod
    def get_attributes(cls) -> list[str]:
        # By it transformers decides which parts to load, save and check.
        return [part for part in cls.all_parts if part != _VIDEO]

    @classmethod
    def from_args_and_dict(
        cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any
    ) -> ProcessorMixin:
        # transformers hands on what `get_attributes` names by position, from the first on.
        named = dict(zip(cls.get_attributes(), args, strict=True))
        settings = {name: value for name, value in processor_dict.items() if name != _VIDEO}
        return super().from_args_and_dict([], settings, **{_VIDEO: None}, **named, **kwargs)

    @property
    def video_processor(self) -> Any:
        # MiniCPM-V's constructor reads settings of it, which its image processor has too.
        return self.image_processor


def without_video_processor(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor class without its video part, under the same name. Give parts by keyword."""
    parts = tuple(processor_class.get_attributes())
    if _VIDEO not in parts:
        return processor_class
    # `super().__init__` in the class is then ours.
    return type(processor_class.__name__, (processor_class, _WithoutVideo), {"all_parts": parts})


def load_processor_parts(source: str, origin: dict[str, Any]) -> ProcessorMixin:
    """A processor, without its video part where that cannot be loaded.

    Args:
        source: a folder or Hub id.
        origin: `revision` and `trust_remote_code`.
    """
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
    if processor_class is not None and _VIDEO in processor_class.get_attributes():
        return without_video_processor(processor_class).from_pretrained(source, **origin)
    if problem is not None:
        raise problem
    return processor
