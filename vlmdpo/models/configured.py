"""Model and processor as a command's options ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from vlmdpo.config.common import PromptOptions, RuntimeOptions

if TYPE_CHECKING:
    from vlmdpo.models.chat_template import PromptSettings
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


def configured_processor(
    options: RuntimeOptions,
    *,
    adapter: Path | None = None,
    date: str | None = None,
    close_thinking: bool = False,
) -> Processor:
    """`load_processor` by these options. Prints what is special about its prompts.

    Args:
        adapter: prompts are rendered as when it was trained, unless options say otherwise.
        date: the date that prompts hold, where they hold one; today's if None and the adapter has
            none.
        close_thinking: see `PromptSettings`.

    Raises ModelError, ConfigError.
    """
    from vlmdpo.models.load import load_processor
    from vlmdpo.models.rendering import announce

    processor = load_processor(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        image_splitting=options.image_splitting,
        prompts=prompt_settings(options, adapter=adapter, date=date, close_thinking=close_thinking),
    )
    announce(processor)
    return processor


def prompt_settings(
    options: PromptOptions,
    *,
    adapter: Path | None = None,
    date: str | None = None,
    close_thinking: bool = False,
) -> PromptSettings:
    """How prompts are rendered: by options, else as the adapter or the model was trained here.

    Raises ModelError for a damaged record beside the weights.
    """
    from vlmdpo.models.chat_template import PromptSettings
    from vlmdpo.models.rendering import read_settings

    folders = [adapter] if adapter is not None else []
    trained = None
    for folder in (*folders, Path(options.model).expanduser()):
        trained = trained or read_settings(folder)
    trained = trained or PromptSettings()
    return PromptSettings(
        system=options.system if options.system is not None else trained.system,
        template_kwargs={**trained.template_kwargs, **options.template_kwargs},
        date=date or trained.date,
        close_thinking=close_thinking,
    )
