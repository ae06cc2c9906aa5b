"""Many questions to one picture: it is encoded once, and what their prompts have in common crosses
the model once.

The common prefix is the longest common run of *token ids* of the processed prompts: processors put
spaces and tokens of their own around pictures, so ids cannot be spliced. Behind it the rest of all
prompts lie in one packed row, each seeing the prefix and itself; so do the answers, token by token.
Families that cannot fork there (prefix language models, recurrent layers) still have the picture
encoded once. Answers are those of greedy `generate`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from vlmdpo.engine.generate import prompt_of
from vlmdpo.models import families

# Settings that change greedy answers beyond a repetition penalty, and their values that change
# nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
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
Decided = Callable[[str], bool]


@dataclass
class _Prompt:
    """One processed question: its token ids, its position ids (..., S), and its token types (1, S)."""

    ids: list[int]
    positions: Tensor
    types: dict[str, Tensor]


class BranchLayout:
    """A shared prefix of `prefix` cached slots, and behind it the slots of branches that do not see
    each other.
    """

    def __init__(self, prefix: int, device: torch.device) -> None:
        self.prefix = prefix
        self.index = torch.empty(0, dtype=torch.long, device=device)
        self.branch = torch.empty(0, dtype=torch.long, device=device)
        self.new = 0

    def extend(self, branch: Tensor, index: Tensor) -> None:
        """New slots (T,): the branch each belongs to, and its index in the row that its branch
        would have alone.
        """
        self.branch, self.index = torch.cat([self.branch, branch]), torch.cat([self.index, index])
        self.new = len(branch)

    def mask(self, allowed: Callable[..., Tensor], device: torch.device) -> Tensor:
        """(1, 1, new, prefix + all slots) bool, of the model's own mask function."""
        first = torch.tensor(0, device=device)
        queries, keys = (
            self.index[-self.new :],
            torch.cat([torch.arange(self.prefix, device=device), self.index]),
        )
        own = self.branch[-self.new :, None] == self.branch[None, :]
        own = torch.cat([own.new_ones(self.new, self.prefix), own], dim=1)
        return (allowed(first, first, queries[:, None], keys[None, :]) & own)[None, None]


@dataclass
class _Branch:
    """One question on its way: tokens said so far, and where the next one stands."""

    number: int
    ids: list[int]
    position: Tensor  # (..., 1) of the last slot
    said: list[int] = field(default_factory=list)


class Asker:
    """Asks a model questions about pictures, one picture open at a time. Wraps its backbone until
    `close`.

    Args:
        model: the model, or a PEFT model whose adapter may be switched off and on between calls.
        processor: its processor.
        keep_features: whether image features of the open picture serve with and without the
            adapter; False where the adapter touches what makes them.

    Attributes:
        why_not: why prompts cannot share their prefix, or "". Pictures are encoded once either way.
    """

    def __init__(self, model: Any, processor: Any, *, keep_features: bool) -> None:
        self.model, self.processor, self.keep_features = model, processor, keep_features
        self.base = families.base_of(model)
        self.backbone = self.base.base_model
        self.why_not = _why_not(model, self.backbone)
        if not self.why_not:
            packed_attention.use_packed_attention(families.text_configs(self.backbone))
        config = self.base.generation_config
        ends = (
            config.eos_token_id
            if config.eos_token_id is not None
            else processor.tokenizer.eos_token_id
        )
        self._ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
        penalty = config.repetition_penalty
        self._penalty = (
            RepetitionPenaltyLogitsProcessor(penalty) if penalty not in (None, 1.0) else None
        )
        self._features = self.backbone.get_image_features
        self._kept: Any = None
        self._copies = 1
        self._pictured: dict[str, _Prompt] = {}
        self._pixels: dict[str, Any] = {}
        self._picture: Image.Image | None = None
        self.backbone.get_image_features = families.stand_in(self._features, self._image_features)

    def close(self) -> None:
        """Take the wrapping off again."""
        self.backbone.get_image_features = self._features
        self._picture = None

    @contextlib.contextmanager
    def picture(self, picture: Image.Image) -> Iterator[None]:
        """Inside, all questions are about this picture: nothing made for another is ever used."""
        self._picture, self._kept, self._pixels, self._pictured = picture, None, {}, {}
        try:
            with _processed_once(self.processor.image_processor):
                yield
        finally:
            self._picture, self._kept, self._pixels, self._pictured = None, None, {}, {}

    @torch.inference_mode()
    def ask(
        self,
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        at_once: int = 32,
        decided: Decided | None = None,
    ) -> list[str]:
        """Greedy answers about the open picture, stripped of special tokens.

        Args:
            questions: in any number.
            max_new_tokens: longest answer.
            at_once: questions per forward pass.
            decided: an answer is cut short as soon as this holds of its text.
        """
        assert self._picture is not None, "open a picture first"
        if not self.keep_features:
            self._kept = None
        prompts = [self._process(question) for question in questions]
        shared = 0 if self.why_not else self._common(prompts)
        answers: list[str] = []
        cache = self._prefix(prompts[0], shared) if shared else None
        for start in range(0, len(prompts), at_once):
            some = prompts[start : start + at_once]
            if cache is None:
                answers += self._rows(some, max_new_tokens, decided)
            else:
                answers += self._branches(cache, shared, some, max_new_tokens, decided)
                cache.crop(shared - cache.get_seq_length())
        return answers

    def _process(self, question: str) -> _Prompt:
        if question not in self._pictured:
            made = dict(
                self.processor(
                    text=[prompt_of(self.processor, question)],
                    images=[[self._picture]],
                    add_special_tokens=False,  # the chat template has put them in
                    return_tensors="pt",
                )
            )
            made.pop("labels", None)
            ids, mask = made["input_ids"], made["attention_mask"]
            positions = families.positions(self.backbone, ids, mask, made)
            device = self.model.device
            types = {name: made[name].to(device) for name in families.TYPE_KEYS if name in made}
            self._pictured[question] = _Prompt(ids[0].tolist(), positions.to(device), types)
            if not self._pixels:
                rest = {
                    k: v
                    for k, v in made.items()
                    if k not in ("input_ids", "attention_mask", *families.TYPE_KEYS)
                }
                self._pixels = dict(BatchFeature(rest).to(device, self.model.dtype))
        return self._pictured[question]

    def _common(self, prompts: Sequence[_Prompt]) -> int:
        """Tokens that all prompts begin with, leaving each at least one; 0 where the picture is not
        wholly among them.
        """
        columns = zip(*(prompt.ids for prompt in prompts), strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
        same = min(same, min(len(prompt.ids) for prompt in prompts) - 1)
        return same if self.base.config.image_token_id not in prompts[0].ids[same:] else 0

    def _prefix(self, prompt: _Prompt, length: int) -> DynamicCache:
        """The keys and values (1 row) of a prompt's first `length` tokens, its picture among them."""
        cache = (
            DynamicCache()
        )  # without the configuration: a sliding window would throw the prefix away
        ids = torch.tensor([prompt.ids[:length]], device=self.model.device)
        self.backbone(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=prompt.positions[..., :length],
            past_key_values=cache,
            use_cache=True,
            **{name: kind[:, :length] for name, kind in prompt.types.items()},
            **self._pixels,
        )
        return cache

    def _branches(
        self,
        cache: DynamicCache,
        shared: int,
        prompts: Sequence[_Prompt],
        longest: int,
        decided: Decided | None,
    ) -> list[str]:
        device = self.model.device
        layout = BranchLayout(shared, device)
        tails = [prompt.ids[shared:] for prompt in prompts]
        branches = [
            _Branch(number, list(prompt.ids), prompt.positions[..., -1:])
            for number, prompt in enumerate(prompts)
        ]
        lengths = torch.tensor([len(tail) for tail in tails], device=device)
        owner = torch.repeat_interleave(torch.arange(len(tails), device=device), lengths)
        index = torch.cat(
            [torch.arange(shared, shared + len(tail), device=device) for tail in tails]
        )
        ids = torch.tensor([list(itertools.chain(*tails))], device=device)
        positions = torch.cat([prompt.positions[..., shared:] for prompt in prompts], dim=-1)
        ends = lengths.cumsum(0) - 1
        going = branches
        texts = [""] * len(prompts)
        for step in range(longest):
            layout.extend(owner, index)
            with packed_attention.packed(layout):
                logits = self.base(
                    input_ids=ids,
                    attention_mask=ids.new_ones(1, shared + len(layout.index)),
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=ends,
                ).logits[0]
            going = self._said(going, logits, texts, decided)
            if not going or step + 1 == longest:
                break
            ids = torch.tensor([[branch.said[-1] for branch in going]], device=device)
            owner = torch.tensor([branch.number for branch in going], device=device)
            index = torch.tensor([len(branch.ids) - 1 for branch in going], device=device)
            positions = torch.cat([branch.position for branch in going], dim=-1)
            ends = torch.arange(len(going), device=device)
        return texts

    def _said(
        self, going: Sequence[_Branch], logits: Tensor, texts: list[str], decided: Decided | None
    ) -> list[_Branch]:
        """Take the next token (N,) of each branch from its logits (N, V); those that are not at
        their end go on.
        """
        if self._penalty is not None:
            rows = [
                self._penalty(torch.tensor([b.ids], device=logits.device), row[None])
                for b, row in zip(going, logits, strict=True)
            ]
            logits = torch.cat(rows)
        left = []
        for branch, token in zip(going, logits.argmax(dim=-1).tolist(), strict=True):
            branch.said.append(token)
            branch.ids.append(token)
            branch.position = branch.position + 1
            texts[branch.number] = self._text(branch.said)
            if token not in self._ends and not (decided and decided(texts[branch.number])):
                left.append(branch)
        return left

    def _text(self, said: Sequence[int]) -> str:
        text: str = self.processor.tokenizer.decode(said, skip_special_tokens=True)
        return text.strip()

    def _rows(self, prompts: Sequence[_Prompt], longest: int, decided: Decided | None) -> list[str]:
        """Rows padded on the left through `generate`, with the picture encoded once for all of
        them.
        """
        width = max(len(prompt.ids) for prompt in prompts)

        def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
            return torch.tensor(
                [[fill] * (width - len(row)) + list(row) for row in rows], device=self.model.device
            )

        ids = [prompt.ids for prompt in prompts]
        inputs: dict[str, Any] = {
            "input_ids": padded(ids, self.processor.tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            **{
                name: padded([p.types[name][0].tolist() for p in prompts], 0)
                for name in prompts[0].types
            },
            **{
                k: torch.cat([v] * len(prompts)) if isinstance(v, Tensor) else v * len(prompts)
                for k, v in self._pixels.items()
            },
        }
        stop = StoppingCriteriaList([_DecidedAll(decided, self._text, width)]) if decided else None
        self._copies = len(prompts)
        try:
            made = self.model.generate(
                **inputs, max_new_tokens=longest, do_sample=False, stopping_criteria=stop
            )
        finally:
            self._copies = 1
        return [self._text(row[width:].tolist()) for row in made]

    def _image_features(self, *args: Any, **kwargs: Any) -> Any:
        """The open picture's features, computed once, as often as it stands in the batch."""
        if self._picture is None:
            return self._features(*args, **kwargs)
        if self._kept is None:

            def one(value: Any) -> Any:
                return value[: len(value) // self._copies] if isinstance(value, Tensor) else value

            self._kept = self._features(
                *map(one, args), **{name: one(value) for name, value in kwargs.items()}
            )
        return families.repeat_features(_copy(self._kept), self._copies)


def _copy(features: Any) -> Any:
    """The same features in a new container, since models and `repeat_features` write into it."""
    return type(features)(**features) if hasattr(features, "keys") else features


class _DecidedAll(StoppingCriteria):
    """Ends each row as soon as its text is decided."""

    def __init__(self, decided: Decided, text: Callable[[Sequence[int]], str], start: int) -> None:
        self.decided, self.text, self.start = decided, text, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = [self.decided(self.text(row[self.start :].tolist())) for row in input_ids]
        return torch.tensor(done, device=input_ids.device)


def _why_not(model: Any, backbone: Any) -> str:
    try:
        packed_attention.check_shareable(model)
    except packed_attention.CannotShare as why:
        return str(why)
    if families.reads_prompts_both_ways(backbone):
        return "its prompts are read in both directions"
    config = families.base_of(model).generation_config
    for name, neutral in _NEUTRAL.items():
        if getattr(config, name, None) not in neutral:
            return f"its generation config sets {name}"
    return ""


@contextlib.contextmanager
def _processed_once(image_processor: Any) -> Iterator[None]:
    """Inside, there is one picture only, and the image processor computes it once."""
    found: list[BatchFeature] = []
    plain = image_processor.preprocess

    def preprocess(*args: Any, **kwargs: Any) -> BatchFeature:
        if not found:
            found.append(plain(*args, **kwargs))
        return BatchFeature(dict(found[0]))  # processors take things out of what they get

    image_processor.preprocess = preprocess
    try:
        yield
    finally:
        del image_processor.preprocess
