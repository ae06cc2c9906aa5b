"""Which models are vision-language models that DPO can be done with, and why the others are not."""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from vlmdpo.errors import ModelError
from vlmdpo.models import registry

_OWN_CLASS = "AutoModelForImageTextToText"


def check_supported(config: PreTrainedConfig, model: str, *, trust_remote_code: bool) -> None:
    """Raise ModelError where a configuration is not that of a model that can be trained.

    Args:
        model: as `--model` names it.
    """
    code_of_its_own = getattr(config, "auto_map", None) or {}
    remote = trust_remote_code and _OWN_CLASS in code_of_its_own
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not remote:
        if _takes_images(config) or code_of_its_own:
            raise ModelError(
                f"--model: '{model}' is a {config.model_type} model, which has no image-text-to-"
                "text class in transformers; look for a version of it that has one, whose name "
                "often ends in -hf"
            )
        raise ModelError(
            f"--model: '{model}' is a {config.model_type} model, not a vision-language model; "
            f"try one of {', '.join(list(registry.ENTRIES)[1:5])} ..."
        )
    if _is_encoder_decoder(config):
        raise ModelError(
            f"--model: '{model}' is a {config.model_type} model, an encoder-decoder; vlmdpo trains "
            "decoders, whose prompt and answer are one row of tokens"
        )


def _takes_images(config: PreTrainedConfig) -> bool:
    """Whether a configuration holds that of a vision tower."""
    return any("vision" in name or "visual" in name for name in config.to_dict())


def _is_encoder_decoder(config: PreTrainedConfig) -> bool:
    """Whether the model, or the language model in it, is one (InstructBLIP on Flan-T5)."""
    text = getattr(config, "text_config", None)
    return bool(config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False))
