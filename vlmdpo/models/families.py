"""What differs between model families, and nothing else: image limits, chat templates, token types,
positions, parts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmdpo.models.protocols import Backbone

PARTS = ("vision", "connector", "language", "head")
# PaliGemma ships no chat template: images first, then the text as it is; its processor adds <bos>
# and a line break.
_PALIGEMMA_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% "
    "endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def fallback_chat_template(processor: Any) -> str | None:
    """A chat template for processors that ship none though their models need none; None for all
    others.
    """
    return _PALIGEMMA_TEMPLATE if _is_paligemma(processor) else None


def _is_paligemma(thing: Any) -> bool:
    return "paligemma" in type(thing).__name__.lower()


def has_bidirectional_prompt(backbone: Any) -> bool:
    """Whether a prompt's tokens see what follows them in the prompt, so that no two prompts share
    their beginning.
    """
    return _is_paligemma(backbone) or bool(
        getattr(backbone.config.get_text_config(), "use_bidirectional_attention", False)
    )


TOKEN_TYPE_KEYS = (
    "token_type_ids",
    "mm_token_type_ids",
)  # by which some processors tell text, prefix and pictures apart


def answer_token_type(processor: Any, name: str) -> int:
    """The token type of an answer: 1 where PaliGemma tells the causal part from the prefix, else 0
    (text).
    """
    return int(name == "token_type_ids" and _is_paligemma(processor))


def unwrap_peft(model: Any) -> Any:
    """The transformers model inside a PEFT model; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_configs(backbone: Any) -> list[Any]:
    """Every configuration object that the language model reads, each once (modules may hold
    copies).
    """
    found = [backbone.config.get_text_config()]
    found += [
        module.config for module in backbone.get_decoder().modules() if hasattr(module, "config")
    ]
    return list({id(config): config for config in found}.values())


def stock_position_ids(
    backbone: Any, ids: Tensor, mask: Tensor, inputs: Mapping[str, Any], copies: int = 1
) -> Tensor:
    """The position ids that the model would give stock rows.

    Args:
        backbone: the model without its head.
        ids, mask: (B, S) token ids and 1 where there is a token, padded on the right.
        inputs: the rest of the batch: image grids and token types, where the family has them.
        copies: how often the rows' images stand in `inputs` less than in `ids`.

    Returns:
        (B, S), or (3, B, S) for families that count time, height and width apart (M-RoPE).
    """
    if hasattr(backbone, "compute_3d_position_ids") and inputs.get("image_grid_thw") is not None:
        found: Tensor = backbone.compute_3d_position_ids(
            input_ids=ids,
            inputs_embeds=None,
            image_grid_thw=inputs["image_grid_thw"].repeat(copies, 1),
            video_grid_thw=None,
            past_key_values=None,
            attention_mask=mask,
            mm_token_type_ids=inputs["mm_token_type_ids"],
        )
        return found
    first = 1 if _is_paligemma(backbone) else 0
    return torch.arange(first, first + ids.shape[1], device=ids.device).expand_as(ids)


def parameters_by_part(model: Any) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(part, name, parameter) for each parameter: language model, head, the projection between, or
    the vision tower.
    """
    base = unwrap_peft(model)
    language = {id(p) for p in base.base_model.get_decoder().parameters()}
    head = base.get_output_embeddings()
    ends = {id(p) for p in head.parameters()} if head is not None else set()
    ends |= {id(p) for p in base.get_input_embeddings().parameters()}
    for name, parameter in base.named_parameters():
        if id(parameter) in ends:
            yield "head", name, parameter
        elif id(parameter) in language:
            yield "language", name, parameter
        else:
            yield part_of_parameter(name), name, parameter


def part_of_parameter(name: str) -> str:
    """The part of a parameter or module outside the language model, by the names that families use."""
    if any(
        word in name
        for word in ("connector", "projector", "merger", "perceiver", "resampler", "image_newline")
    ):
        return "connector"
    return "vision"


def vision_parameters(backbone: Any) -> list[nn.Parameter]:
    """Everything that image features are made of: all parameters outside the language model."""
    language = {id(p) for p in backbone.get_decoder().parameters()}
    language |= {id(p) for p in backbone.get_input_embeddings().parameters()}
    return [p for p in backbone.parameters() if id(p) not in language]


def vision_models(backbone: Backbone) -> list[nn.Module]:
    """Every transformers model inside `backbone` besides the language model: towers, and connectors
    that are models of their own, nested ones after those that hold them.
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
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in vision_models(backbone):
        if id(module) in inside:
            continue
        if not any(parameter.requires_grad for parameter in module.parameters()):
            found.append(module)
            inside |= set(map(id, module.modules()))
    return found


def image_side_limit(processor: Any) -> tuple[int | None, bool]:
    """The longest image side, in pixels, that a processor passes on, and whether smaller images
    stay smaller.

    The limit has another name in every family. Idefics2/3 and SmolVLM: `longest_edge`, and smaller
    images stay as they are, so bounding them saves work. Qwen2-VL and its successors:
    `longest_edge` is an *area* in pixels, likewise an upper bound. CLIP (LLaVA) and SigLIP
    (PaliGemma, Gemma 3): one fixed size that every image is scaled to. (None, True) where the
    processor names no limit.
    """
    image_processor = processor.image_processor
    size = dict(getattr(image_processor, "size", None) or {})
    longest = size.get("longest_edge")
    if longest and "Qwen" in type(image_processor).__name__:
        return math.isqrt(int(longest)), True
    if longest:
        return int(longest), True
    if size.get("height") and size.get("width"):
        return max(int(size["height"]), int(size["width"])), False
    if size.get("shortest_edge"):
        return int(size["shortest_edge"]), False
    return None, True


def default_image_side(processor: Any) -> int | None:
    """The bound that `prepare` puts on images: half the limit, as in the article, where smaller
    images stay smaller.

    Where every image is scaled to one size anyway, halving it would only blur: there the bound is
    the size itself.
    """
    limit, upper_bound = image_side_limit(processor)
    if limit is None:
        return None
    return max(1, limit // 2) if upper_bound else limit


def parameter_numel(parameter: Tensor) -> int:
    """How many numbers a parameter holds, over all processes (DeepSpeed's parts keep the whole's
    size beside them).
    """
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


def without_video_processor(processor_class: Any) -> Any:
    """A processor class without its video part, which exists only where torchvision does, under the
    same name.
    """

    @classmethod  # type: ignore[misc]
    def get_attributes(cls: Any) -> list[str]:
        return ["image_processor", "tokenizer"]

    return type(processor_class.__name__, (processor_class,), {"get_attributes": get_attributes})


def image_tokens(processor: Any, sizes: Sequence[tuple[int, int]]) -> int | None:
    """Tokens that pictures of these sizes (width, height) take, without their pixels, up to a
    constant a picture.

    None where the processor cannot tell. Raises ValueError for a size that the processor refuses.
    """
    if type(processor).__name__ == "Idefics2Processor":
        return 0  # the resampler makes as many of any picture
    if not hasattr(processor, "_get_num_multimodal_tokens"):
        return None
    told = processor._get_num_multimodal_tokens(
        image_sizes=[(height, width) for width, height in sizes]
    )
    return int(sum(told["num_image_tokens"]))


def reserved_tokens(processor: Any) -> tuple[str, ...]:
    """Texts that a processor or its tokenizer takes for a picture, so that none may stand in a
    question or answer.
    """
    names = ("image_token", "boi_token", "fake_image_token", "video_token")
    return tuple({str(token) for name in names if (token := getattr(processor, name, None))})


def linear_layers(model: Any, scope: str) -> list[str]:
    """Names of all linear layers that LoRA may adapt within `scope`: "language", or "connector"
    (both of them).
    """
    base = unwrap_peft(model)
    language = {id(module) for module in base.base_model.get_decoder().modules()}
    head = base.get_output_embeddings()
    found = []
    for name, module in base.named_modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        inside = id(module) in language or (
            scope == "connector" and part_of_parameter(name) == "connector"
        )
        if inside:
            found.append(name)
    return found


def keep_signature(method: Any, replacement: Any) -> Any:
    """`replacement` with the name and signature of `method`, since transformers' `generate` looks
    at signatures.
    """

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs)

    return call


def repeat_features(value: Any, copies: int) -> Any:
    """Image features as if every image stood `copies` times in the batch, the whole list after
    itself.
    """
    if copies == 1 or value is None:
        return value
    for name in ("pooler_output", "deepstack_features"):
        part = getattr(value, name, None)
        if isinstance(part, Tensor):
            value[name] = torch.cat([part] * copies)
        elif name == "pooler_output" and part is not None:
            value[name] = tuple(part) * copies
        elif part is not None:
            value[name] = [
                tuple(layer) * copies
                if not isinstance(layer, Tensor)
                else torch.cat([layer] * copies)
                for layer in part
            ]
    return value
