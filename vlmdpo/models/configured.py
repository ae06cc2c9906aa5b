"""Model and processor as a command's options ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from vlmdpo.config.common import RuntimeOptions

if TYPE_CHECKING:
    from vlmdpo.models.protocols import AdaptedModel, Processor


@overload
def configured_model(options: RuntimeOptions, *, adapter: Path) -> AdaptedModel: ...
@overload
def configured_model(options: RuntimeOptions, *, adapter: Path | None = None) -> Any: ...
def configured_model(options: RuntimeOptions, *, adapter: Path | None = None) -> Any:
    """`load_model` by these options. Raises ModelError, MissingDependencyError."""
    from vlmdpo.models.load import load_model

    return load_model(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        dtype=options.dtype,
        device=options.device,
        attention=options.attn_implementation,
        adapter=adapter,
    )


def configured_processor(options: RuntimeOptions) -> Processor:
    """`load_processor` by these options. Raises ModelError."""
    from vlmdpo.models.load import load_processor

    return load_processor(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        image_splitting=options.image_splitting,
    )
