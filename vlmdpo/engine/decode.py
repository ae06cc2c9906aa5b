"""Many questions about one image: it is encoded once, and what the prompts share is read once.

The common prefix is the longest common run of *token ids* of the processed prompts: processors put
spaces and tokens of their own around images, so ids cannot be spliced. The rest of all prompts lies
behind it in one packed row, each seeing the prefix and itself; so do the answers, token by token,
any number to each question.
Families that cannot fork there (prefix language models, recurrent layers) still have the image
encoded once (`padded_rows`). Answers are those of `generate`, greedy or drawn.

Shapes: K active answers, V vocabulary; see `leaves` for the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache
from transformers.feature_extraction_utils import BatchFeature

from vlmdpo.engine import packed_attention
from vlmdpo.engine.content_keys import image_key
from vlmdpo.engine.leaves import Leaf, Prompt, Step, plant
from vlmdpo.engine.next_token import TokenChooser
from vlmdpo.engine.padded_rows import generate_rows, reason_not_shared
from vlmdpo.engine.sampling import GREEDY, Sample, Sampling
from vlmdpo.engine.tree import GrowingTree, common_beginning
from vlmdpo.engine.yes_no import MOST_BLANKS, YesNoReader, YesNoTokens, is_blank, yes_no_tokens
from vlmdpo.models import families
from vlmdpo.models.inputs import image_inputs, image_token_id, inputs_by_token, pixels_in
from vlmdpo.models.protocols import Backbone, ImageProcessor, Processor, VisionLanguageModel
from vlmdpo.models.rendering import render_question, stop_token_ids

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

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
        self.reason_not_shared = reason_not_shared(model)
        if not self.reason_not_shared:
            packed_attention.use_packed_attention(self.backbone)
        self.end_tokens = set(stop_token_ids(self.base, processor))

    @cached_property
    def yes_no_tokens(self) -> YesNoTokens:
        """The tokens that answers Yes and No begin with. Raises ModelError."""
        return yes_no_tokens(self.processor.tokenizer)

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

    def sample(self, ids: Sequence[int]) -> Sample:
        """An answer of these token ids, its end token among them if it has one."""
        finished = bool(ids) and ids[-1] in self.end_tokens
        return Sample(self.text(ids), len(ids) - finished, finished)


class OpenedImage:
    """One image, its processed prompts, and its features; made by `PromptTreeDecoder.open`."""

    def __init__(self, decoder: PromptTreeDecoder, image: Image.Image) -> None:
        self.decoder, self.image = decoder, image
        self._prompts: dict[str, Prompt] = {}
        self._pixel_inputs: dict[str, Tensor | list[object]] = {}
        self._features: ModelOutput | None = None

    def process(self, questions: Sequence[str]) -> int:
        """Prepare the prompts of these questions, which other calls then find; no model runs.

        Returns the tokens of the longest prompt, its image's among them.

        Raises whatever a chat template or processor raises about a question or the image.
        """
        return max((len(self._prompt(question).ids) for question in questions), default=0)

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
        leaves = [Leaf(self._prompt(question)) for question in questions]
        chooser = TokenChooser(self.decoder.base.generation_config, GREEDY)
        self._grow(leaves, max_new_tokens, chooser, batch_size, stop_when)
        return [self.decoder.text(leaf.answer_ids) for leaf in leaves]

    @torch.inference_mode()
    def sample(
        self,
        questions: Sequence[str],
        sampling: Sampling,
        max_new_tokens: int,
        *,
        batch_size: int = 32,
    ) -> list[list[Sample]]:
        """Answers to each question that are drawn; the greedy one where nothing is drawn.

        They have the distribution of `generate`'s. Each draws by itself, seeded by the seed, the
        image's pixels, the question and its own number: the same answers come in any batch, order
        and process, but for rounding. A question that stands there twice gets the same ones twice.

        Args:
            questions: any number of them.
            max_new_tokens: longest answer.
            batch_size: answers that grow together.
        """
        count, key = sampling.answers, image_key([self.image])
        leaves = [
            Leaf(
                self._prompt(question),
                draws=torch.Generator().manual_seed(sampling.seed_of((key, question, number))),
            )
            for question in questions
            for number in range(count)
        ]
        chooser = TokenChooser(self.decoder.base.generation_config, sampling)
        self._grow(leaves, max_new_tokens, chooser, batch_size)
        samples = [self.decoder.sample(leaf.answer_ids) for leaf in leaves]
        return [samples[start : start + count] for start in range(0, len(samples), count)]

    @torch.inference_mode()
    def log_odds(self, questions: Sequence[str], *, batch_size: int = 32) -> list[float]:
        """How far the answer to each question leans to Yes.

        The log of the probability that its first word is Yes, minus that of No (natural logarithm,
        above 0 for Yes), with the model's repetition penalty, if it has one; see `yes_no` for which
        tokens count. One forward pass, or more where answers begin with blank tokens.

        Args:
            questions: any number of them.
            batch_size: questions per forward pass.

        Raises ModelError where the tokenizer has no tokens for these words.
        """
        leaves = [Leaf(self._prompt(question)) for question in questions]
        reader = YesNoReader(self.decoder.base.generation_config, self.decoder.yes_no_tokens)
        self._grow(leaves, MOST_BLANKS, reader, batch_size, lambda text: not is_blank(text))
        return [reader.log_odds(leaf) for leaf in leaves]

    def _grow(
        self,
        leaves: Sequence[Leaf],
        max_new_tokens: int,
        chooser: TokenChooser,
        batch_size: int,
        stop_when: StopWhen | None = None,
    ) -> None:
        """Complete all answers, `batch_size` of them together."""
        if not leaves:
            return
        decoder = self.decoder
        if not decoder.keep_features:
            self._features = None  # the adapter may have been switched since the last call
        prefix = 0 if decoder.reason_not_shared else self._shared_prefix(leaves)
        cache = self._prefix_cache(leaves[0].prompt, prefix) if prefix else None

        def stops(ids: Sequence[int]) -> bool:
            return stop_when is not None and stop_when(decoder.text(ids))

        for start in range(0, len(leaves), batch_size):
            batch = leaves[start : start + batch_size]
            if cache is not None:
                self._grow_in_tree(cache, prefix, batch, max_new_tokens, chooser, stops)
                cache.crop(prefix - cache.get_seq_length())
                continue
            generate_rows(
                decoder.model,
                batch,
                self._pixel_inputs,
                max_new_tokens,
                chooser,
                pad_token=decoder.processor.tokenizer.pad_token_id,
                end_tokens=decoder.end_tokens,
                stop_when=stops if stop_when else None,
            )

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

    def _shared_prefix(self, leaves: Sequence[Leaf]) -> int:
        """Tokens that all prompts begin with; 0 where the image is not wholly among them."""
        prompts = list({id(leaf.prompt): leaf.prompt for leaf in leaves}.values())
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

    def _grow_in_tree(
        self,
        cache: DynamicCache,
        prefix: int,
        leaves: Sequence[Leaf],
        max_new_tokens: int,
        chooser: TokenChooser,
        stops: Callable[[Sequence[int]], bool],
    ) -> None:
        """Complete answers in one row: what their prompts do not share, then token by token."""
        device = self.decoder.model.device
        prompts, parents = plant(leaves)
        tree = GrowingTree(prefix, [*[0] * len(prompts), *parents], device)
        active = list(leaves)
        step = Step.of_prompts(prompts, parents, prefix, device)
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
            tokens = chooser.choose(active, chooser.penalize(active, logits_KV))
            for leaf, token in zip(active, tokens, strict=True):
                leaf.answer_ids.append(token)
            active = [
                leaf
                for leaf in active
                if leaf.answer_ids[-1] not in self.decoder.end_tokens and not stops(leaf.answer_ids)
            ]
            if not active or count == max_new_tokens:
                break
            step = Step.of_last_tokens(active, device)

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
