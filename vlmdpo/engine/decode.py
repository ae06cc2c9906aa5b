"""Many questions about one image: it is encoded once, and what the prompts share is read once.

The common prefix is the longest common run of *token ids* of the processed prompts: processors put
spaces and tokens of their own around images, so ids cannot be spliced. The rest of all prompts lies
behind it in one packed row, each seeing the prefix and itself; so do the answers, token by token.
Families that cannot fork there (prefix language models, recurrent layers) still have the image
encoded once. Answers are those of greedy `generate`.

Shapes: K active answers, V vocabulary; see `leaves` for the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    DynamicCache,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.feature_extraction_utils import BatchFeature

from vlmdpo.engine import packed_attention
from vlmdpo.engine.leaves import Leaf, Prompt, Step
from vlmdpo.engine.tree import GrowingTree, common_beginning
from vlmdpo.models import families
from vlmdpo.models.inputs import image_inputs, image_token_id, inputs_by_token, pixels_in
from vlmdpo.models.protocols import Backbone, ImageProcessor, Processor, VisionLanguageModel
from vlmdpo.models.rendering import render_question, stop_token_ids

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

# Generation settings that change greedy answers beyond a repetition penalty, each with the values
# that change nothing.
_NEUTRAL_SETTINGS: dict[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
}
StopWhen = Callable[[str], bool]


class PromptTreeDecoder:
    """Answers many questions about each image, encoding it once and their common prefix once.

    Args:
        model: the model, or a PEFT model whose adapter may be switched off and on between calls.
        processor: its processor.
        keep_features: whether an image's features serve with and without the adapter; False where
            the adapter touches what makes them.

    Attributes:
        reason_not_shared: why prompts cannot share their prefix, or "". Images are encoded once
            either way.
    """

    def __init__(
        self, model: VisionLanguageModel, processor: Processor, *, keep_features: bool
    ) -> None:
        self.model, self.processor, self.keep_features = model, processor, keep_features
        self.base = families.unwrap_peft(model)
        self.backbone: Backbone = self.base.base_model
        self.reason_not_shared = _reason_not_shared(model, self.backbone)
        if not self.reason_not_shared:
            packed_attention.use_packed_attention(self.backbone)
        self.end_tokens = set(stop_token_ids(self.base, processor))
        penalty = self.base.generation_config.repetition_penalty
        self.repetition_penalty = (
            RepetitionPenaltyLogitsProcessor(penalty) if penalty not in (None, 1.0) else None
        )

    @contextlib.contextmanager
    def open(self, image: Image.Image) -> Iterator[OpenedImage]:
        """An image to ask about. Nothing computed for it outlives the context."""
        opened = OpenedImage(self, image)
        get_image_features = self.backbone.get_image_features
        # `generate` and the backbone call it themselves, so it is replaced on this instance.
        self.backbone.get_image_features = families.keep_signature(
            get_image_features, partial(opened.image_features, get_image_features)
        )
        try:
            with _preprocess_once(self.processor.image_processor):
                yield opened
        finally:
            self.backbone.get_image_features = get_image_features

    def text(self, ids: Sequence[int]) -> str:
        """An answer's token ids as text, stripped."""
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()


class OpenedImage:
    """One image, its processed prompts, and its features; made by `PromptTreeDecoder.open`."""

    def __init__(self, decoder: PromptTreeDecoder, image: Image.Image) -> None:
        self.decoder, self.image = decoder, image
        self._prompts: dict[str, Prompt] = {}
        self._pixel_inputs: dict[str, Tensor | list[object]] = {}
        self._features: ModelOutput | None = None

    @torch.inference_mode()
    def answer(
        self,
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        batch_size: int = 32,
        stop_when: StopWhen | None = None,
    ) -> list[str]:
        """Greedy answers, stripped of special tokens.

        Args:
            questions: any number of them.
            max_new_tokens: longest answer.
            batch_size: questions per forward pass.
            stop_when: an answer ends as soon as this holds for its text.
        """
        if not self.decoder.keep_features:
            self._features = None  # the adapter may have been switched since the last call
        prompts = [self._prompt(question) for question in questions]
        prefix = 0 if self.decoder.reason_not_shared else self._shared_prefix(prompts)
        cache = self._prefix_cache(prompts[0], prefix) if prefix else None
        answers: list[str] = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            if cache is None:
                answers += self._generate(batch, max_new_tokens, stop_when)
            else:
                answers += self._decode_leaves(cache, prefix, batch, max_new_tokens, stop_when)
                cache.crop(prefix - cache.get_seq_length())
        return answers

    def _prompt(self, question: str) -> Prompt:
        if question in self._prompts:
            return self._prompts[question]
        decoder, device = self.decoder, self.decoder.model.device
        inputs = dict(
            decoder.processor(
                text=[render_question(decoder.processor, question)],
                images=[[self.image]],
                add_special_tokens=False,  # the chat template has added them
                return_tensors="pt",
            )
        )
        inputs.pop("labels", None)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        positions = families.stock_position_ids(decoder.backbone, ids, mask, inputs)
        types = {name: value.to(device) for name, value in inputs_by_token(inputs, ids).items()}
        self._prompts[question] = Prompt(ids[0].tolist(), positions.to(device), types)
        if not self._pixel_inputs:
            pixels = BatchFeature(image_inputs(inputs))
            self._pixel_inputs = dict(pixels.to(device, decoder.model.dtype))
        return self._prompts[question]

    def _shared_prefix(self, prompts: Sequence[Prompt]) -> int:
        """Tokens that all prompts begin with; 0 where the image is not wholly among them."""
        length = common_beginning([prompt.ids for prompt in prompts])
        image_token = image_token_id(self.decoder.base.config)
        return length if image_token not in prompts[0].ids[length:] else 0

    def _prefix_cache(self, prompt: Prompt, length: int) -> DynamicCache:
        """Keys and values (one row) of a prompt's first `length` tokens, its image among them."""
        # Not given the configuration: with it a sliding window would drop the prefix.
        cache = DynamicCache()
        ids = torch.tensor([prompt.ids[:length]], device=self.decoder.model.device)
        self.decoder.backbone(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=prompt.positions[..., :length],
            past_key_values=cache,
            use_cache=True,
            **{name: types[:, :length] for name, types in prompt.types.items()},
            **self._pixel_inputs,
        )
        return cache

    def _decode_leaves(
        self,
        cache: DynamicCache,
        prefix: int,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        stop_when: StopWhen | None,
    ) -> list[str]:
        device = self.decoder.model.device
        tree = GrowingTree(prefix, [0] * len(prompts), device)
        active = [
            Leaf(node, list(prompt.ids), prompt.positions[..., -1:])
            for node, prompt in enumerate(prompts, start=1)
        ]
        answers = [""] * len(prompts)
        step = Step.of_prompts(prompts, prefix, device)
        for count in range(1, max_new_tokens + 1):
            tree.extend(step.nodes, step.index)
            with packed_attention.packed(tree):
                logits_KV = self.decoder.base(
                    input_ids=step.ids,
                    attention_mask=step.ids.new_ones(1, len(tree)),
                    position_ids=step.positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=step.ends,
                ).logits[0]
            for leaf, token in zip(active, self._next_tokens(active, logits_KV), strict=True):
                leaf.append(token)
                answers[leaf.node - 1] = self.decoder.text(leaf.answer_ids)
            active = [
                leaf
                for leaf in active
                if leaf.answer_ids[-1] not in self.decoder.end_tokens
                and not (stop_when and stop_when(answers[leaf.node - 1]))
            ]
            if not active or count == max_new_tokens:
                break
            step = Step.of_last_tokens(active, device)
        return answers

    def _next_tokens(self, active: Sequence[Leaf], logits_KV: Tensor) -> list[int]:
        """The greedy next token of each active answer, as `generate` would choose it."""
        penalty = self.decoder.repetition_penalty
        if penalty is not None:
            rows = [
                penalty(torch.tensor([leaf.ids], device=row.device), row[None])
                for leaf, row in zip(active, logits_KV, strict=True)
            ]
            logits_KV = torch.cat(rows)
        tokens: list[int] = logits_KV.argmax(dim=-1).tolist()
        return tokens

    def _generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop_when: StopWhen | None
    ) -> list[str]:
        """Rows padded on the left through `generate`, with the image encoded once for all."""
        decoder = self.decoder
        width = max(len(prompt.ids) for prompt in prompts)

        def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
            return torch.tensor(
                [[fill] * (width - len(row)) + list(row) for row in rows],
                device=decoder.model.device,
            )

        ids = [prompt.ids for prompt in prompts]
        types = {
            name: padded([prompt.types[name][0].tolist() for prompt in prompts], 0)
            for name in prompts[0].types
        }
        pixels = {
            name: torch.cat([value] * len(prompts))
            if isinstance(value, Tensor)
            else value * len(prompts)
            for name, value in self._pixel_inputs.items()
        }
        criteria = StoppingCriteriaList(
            [_StopEachRow(stop_when, decoder.text, width)] if stop_when else []
        )
        sequences = decoder.model.generate(
            input_ids=padded(ids, decoder.processor.tokenizer.pad_token_id),
            attention_mask=padded([[1] * len(row) for row in ids], 0),
            **types,
            **pixels,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stopping_criteria=criteria,
        )
        return [decoder.text(row[width:].tolist()) for row in sequences]

    def image_features(
        self, get_image_features: Callable[..., ModelOutput], *args: Any, **kwargs: Any
    ) -> ModelOutput:
        """In place of `get_image_features`: once for the opened image, then repeated."""
        if not self._pixel_inputs:  # not asked through this object
            return get_image_features(*args, **kwargs)
        pixels = next(pixels_in([*args, *kwargs.values()]))
        copies = len(pixels) // len(next(pixels_in(self._pixel_inputs.values())))
        if self._features is None:

            def of_one_image(value: object) -> object:
                return value[: len(value) // copies] if isinstance(value, Tensor) else value

            self._features = get_image_features(
                *map(of_one_image, args),
                **{name: of_one_image(value) for name, value in kwargs.items()},
            )
        return families.repeat_features(_shallow_copy(self._features), copies)


def _shallow_copy(features: ModelOutput) -> ModelOutput:
    """The same features in a new container: models and `repeat_features` write into theirs."""
    return type(features)(**features) if hasattr(features, "keys") else features


class _StopEachRow(StoppingCriteria):
    """Ends each row of a `generate` call as soon as `stop_when` holds for its text."""

    def __init__(
        self, stop_when: StopWhen, text: Callable[[Sequence[int]], str], prompt_width: int
    ) -> None:
        self.stop_when, self.text, self.prompt_width = stop_when, text, prompt_width

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        answers = (self.text(row[self.prompt_width :].tolist()) for row in input_ids)
        return torch.tensor([self.stop_when(text) for text in answers], device=input_ids.device)


def _reason_not_shared(model: VisionLanguageModel, backbone: Backbone) -> str:
    try:
        packed_attention.check_shareable(model)
    except packed_attention.CannotShare as problem:
        return str(problem)
    if families.has_bidirectional_prompt(backbone):
        return "its prompts are read in both directions"
    config = families.unwrap_peft(model).generation_config
    for name, neutral_values in _NEUTRAL_SETTINGS.items():
        if getattr(config, name, None) not in neutral_values:
            return f"its generation config sets {name}"
    return ""


@contextlib.contextmanager
def _preprocess_once(image_processor: ImageProcessor) -> Iterator[None]:
    """Inside, the image processor processes one image only, and does it once.

    Processors call `preprocess` for each prompt anew, so it is replaced on this instance.
    """
    results: list[BatchFeature] = []
    plain = image_processor.preprocess

    def preprocess(*args: Any, **kwargs: Any) -> BatchFeature:
        if not results:
            results.append(plain(*args, **kwargs))
        return BatchFeature(dict(results[0]))  # processors take things out of what they get

    image_processor.preprocess = preprocess
    try:
        yield
    finally:
        del image_processor.preprocess
