"""What differs between model families, and nothing else: chat templates, token types, positions,
parts. Image limits are in `image_limits`.

Shapes: B rows, S tokens of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmdpo.models.experts import router_layers
from vlmdpo.models.protocols import Backbone, Processor, VisionLanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.utils import ModelOutput

PARTS = ("vision", "connector", "language", "head")
# What families call the connector where it lies in the vision tower, or is a model of its own.
_CONNECTOR_NAMES = (
    "connector",
    "projector",
    "merger",
    "perceiver",
    "resampler",
    "image_newline",
    "vision_adapter",
)
_WITHIN_THE_TOWER = "vit_merger"  # MiniCPM-V's lies between two of the tower's layers
# PaliGemma ships no chat template: images first, then the text as it is; its processor adds <bos>
# and a line break.
_PALIGEMMA_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% "
    "endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def fallback_chat_template(processor: Processor) -> str | None:
    """A chat template for processors whose models need none and that ship none; else None."""
    return _PALIGEMMA_TEMPLATE if _is_paligemma(processor) else None


def _is_paligemma(model_or_processor: object) -> bool:
    return "paligemma" in type(model_or_processor).__name__.lower()


def inserts_image_tokens(processor: Processor) -> bool:
    """Whether a processor moves image tokens to the front of a prompt and adds more to it.

    All others replace each image token where it stands.
    """
    return _is_paligemma(processor)


def has_bidirectional_prompt(backbone: Backbone) -> bool:
    """Whether prompt tokens see those that follow them, so that prompts cannot share a prefix."""
    both_ways = getattr(backbone.config.get_text_config(), "use_bidirectional_attention", None)
    # "vision" (Gemma 4): only the tokens of a picture do, which lies in the prefix as a whole.
    return _is_paligemma(backbone) or both_ways not in (None, False, "vision")


def answer_token_type(processor: Processor, name: str, last: Tensor) -> Tensor:
    """The token type of an answer: 1 where PaliGemma marks the causal part, else that of the text
    before it, `last`.
    """
    marks_answers = name == "token_type_ids" and _is_paligemma(processor)
    return torch.ones_like(last) if marks_answers else last


def unwrap_peft(model: VisionLanguageModel) -> VisionLanguageModel:
    """The transformers model inside a PEFT model; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_configs(backbone: Backbone) -> list[PreTrainedConfig]:
    """Every configuration object that the language model reads, each once.

    Modules may hold copies of their model's configuration.
    """
    configs = [backbone.config.get_text_config()]
    configs += [
        module.config for module in backbone.get_decoder().modules() if hasattr(module, "config")
    ]
    return list({id(config): config for config in configs}.values())


def stock_position_ids(
    backbone: Backbone,
    ids: Tensor,
    mask: Tensor,
    inputs: Mapping[str, Any],
    image_rows: Sequence[int] | None = None,
) -> Tensor:
    """The position ids that the model would give stock rows.

    Args:
        backbone: the model without its head.
        ids, mask: (B, S) token ids, and 1 where there is a token, padded on the right.
        inputs: the rest of the batch: image grids and token types, where the family has them.
        image_rows: the images of all rows in their order, by their numbers in `inputs`; None where
            `inputs` has each as often as it stands in a row.

    Returns:
        (B, S), or (3, B, S) for families that count time, height and width apart (M-RoPE).
    """
    if hasattr(backbone, "compute_3d_position_ids") and inputs.get("image_grid_thw") is not None:
        # It takes rows apart number by number, and would wait for a GPU at each.
        ids_BS, mask_BS, types_BS = torch.stack([ids, mask, inputs["mm_token_type_ids"]]).cpu()
        grids = inputs["image_grid_thw"].cpu()
        positions_3BS = backbone.compute_3d_position_ids(
            input_ids=ids_BS,
            inputs_embeds=None,
            image_grid_thw=grids if image_rows is None else grids[list(image_rows)],
            video_grid_thw=None,
            past_key_values=None,
            attention_mask=mask_BS,
            mm_token_type_ids=types_BS,
        )
        return positions_3BS.to(ids.device)
    first = 1 if _is_paligemma(backbone) else 0
    return torch.arange(first, first + ids.shape[1], device=ids.device).expand_as(ids)


def parameters_by_part(model: VisionLanguageModel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(part, name, parameter) of each parameter; for the parts see `PARTS`."""
    base = unwrap_peft(model)
    language = {id(p) for p in base.base_model.get_decoder().parameters()}
    head = base.get_output_embeddings()
    embeddings = {id(p) for p in head.parameters()} if head is not None else set()
    embeddings |= {id(p) for p in base.get_input_embeddings().parameters()}
    for name, parameter in base.named_parameters():
        if id(parameter) in embeddings:
            yield "head", name, parameter
        elif id(parameter) in language:
            yield "language", name, parameter
        else:
            yield part_outside_language(base, name), name, parameter


def part_outside_language(base: VisionLanguageModel, name: str) -> str:
    """The part of a parameter or module outside the language model: "vision" or "connector".

    Towers, also those for sound, are models of their own within the backbone. What lies beside them
    connects, whatever its name; within them a name tells.

    Args:
        base: the model without adapters.
        name: of a parameter or module of it.
    """
    if any(word in name for word in _CONNECTOR_NAMES) and _WITHIN_THE_TOWER not in name:
        return "connector"
    backbone = base.base_model
    inner = name if backbone is base else name.partition(".")[2]
    child = getattr(backbone, inner.partition(".")[0], None)
    return "vision" if isinstance(child, PreTrainedModel) else "connector"


def vision_parameters(backbone: Backbone) -> list[nn.Parameter]:
    """All parameters outside the language model: everything that image features are made of."""
    language = {id(p) for p in backbone.get_decoder().parameters()}
    language |= {id(p) for p in backbone.get_input_embeddings().parameters()}
    return [p for p in backbone.parameters() if id(p) not in language]


def vision_models(backbone: Backbone) -> list[nn.Module]:
    """Every transformers model inside `backbone` besides the language model.

    These are towers, and connectors that are models of their own. One that contains another comes
    first.
    """
    language = set(map(id, backbone.get_decoder().modules()))
    return [
        module
        for module in backbone.modules()
        if isinstance(module, PreTrainedModel)
        and module is not backbone
        and id(module) not in language
    ]


def frozen_towers(backbone: Backbone) -> list[nn.Module]:
    """The outermost of `vision_models` none of whose parameters train."""
    towers: list[nn.Module] = []
    inside: set[int] = set()
    for module in vision_models(backbone):
        if id(module) in inside:
            continue
        if not any(parameter.requires_grad for parameter in module.parameters()):
            towers.append(module)
            inside |= set(map(id, module.modules()))
    return towers


def parameter_numel(parameter: Tensor) -> int:
    """How many elements a parameter has, over all processes.

    DeepSpeed leaves an empty tensor where a parameter is sharded, and keeps its size beside it.
    """
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


def estimated_image_tokens(processor: Processor, sizes: Sequence[tuple[int, int]]) -> int | None:
    """Tokens of images of these sizes (width, height), up to a constant for each image.

    None where the processor offers no estimate. Raises ValueError for a size that it refuses.
    """
    if type(processor).__name__ == "Idefics2Processor":
        return 0  # its resampler makes the same number of any image
    if not hasattr(processor, "_get_num_multimodal_tokens"):
        return None
    # Private, and there is no public counterpart.
    counts = processor._get_num_multimodal_tokens(
        image_sizes=[(height, width) for width, height in sizes]
    )
    return int(sum(counts["num_image_tokens"]))


def reserved_tokens(processor: Processor) -> tuple[str, ...]:
    """Texts that a processor takes for an image or video, which no text may contain."""
    names = ("image_token", "boi_token", "fake_image_token", "video_token")
    return tuple({str(token) for name in names if (token := getattr(processor, name, None))})


def image_placeholders(processor: Processor) -> frozenset[int]:
    """Ids of the tokens that stand for images in a processed prompt; empty where none is named."""
    vocabulary = processor.tokenizer.get_vocab()
    ids = {vocabulary.get(token) for token in reserved_tokens(processor)}
    ids.add(getattr(processor, "image_token_id", None))
    return frozenset(number for number in ids if isinstance(number, int))


def linear_layers(model: VisionLanguageModel, scope: str) -> list[str]:
    """Names of all linear layers that LoRA may adapt: not the head, and not routers to experts.

    Args:
        scope: "language", "connector" for the connector's too, or "all".
    """
    base = unwrap_peft(model)
    # A family whose decoder is not known still has adapters on all of its layers.
    decoder = None if scope == "all" else base.base_model.get_decoder()
    language = {id(module) for module in decoder.modules()} if decoder is not None else set()
    head, routers = base.get_output_embeddings(), set(router_layers(base))
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and name not in routers
        and (
            scope == "all"
            or id(module) in language
            or (scope == "connector" and part_outside_language(base, name) == "connector")
        )
    ]


def keep_signature(
    method: Callable[..., Any], replacement: Callable[..., Any]
) -> Callable[..., Any]:
    """`replacement` with the name and signature of `method`, which `generate` inspects."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs)

    return call


def repeat_features(features: ModelOutput | None, copies: int) -> ModelOutput | None:
    """Image features as if each image stood `copies` times in the batch. Changed in place.

    The whole list of images is repeated after itself.
    """
    if copies == 1 or features is None:
        return features
    for name in ("pooler_output", "deepstack_features"):
        part = getattr(features, name, None)
        if isinstance(part, Tensor):
            features[name] = torch.cat([part] * copies)
        elif name == "pooler_output" and part is not None:
            features[name] = tuple(part) * copies
        elif part is not None:
            features[name] = [
                torch.cat([layer] * copies) if isinstance(layer, Tensor) else tuple(layer) * copies
                for layer in part
            ]
    return features
