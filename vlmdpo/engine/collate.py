"""Pairs → batch: what rows share is processed once, and laid beside what TRL's loss expects.

Rows of one image become one tree (see `tree`): the image and the words that all prompts begin with
are there once, each prompt's own words once, and equal answers of a prompt once. This module knows
nothing of models: it makes ids, masks and pixels, as TRL's own collator would, without the copies.

Shapes: B pairs, R rows of TRL's loss (2B), D distinct answers, T slots of the packed row, S length
of the longest stock row, C tokens of the longest answer, L tokens of one text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmdpo.data.pairs import SIDES, text_of
from vlmdpo.data.reasons import BadRow
from vlmdpo.engine.content_keys import ContentKeys, content_keys
from vlmdpo.engine.plant import Planted, Prompt, PromptTree, plant
from vlmdpo.engine.processing import BatchingProcessor
from vlmdpo.errors import DataError, ModelError
from vlmdpo.models.families import answer_token_type, image_placeholders
from vlmdpo.models.inputs import image_inputs, inputs_by_token
from vlmdpo.models.protocols import Processor
from vlmdpo.models.rendering import CannotRender, render_answer, render_prompt

Example = dict[str, Any]  # a row of a prepared dataset


@dataclass
class PairCollator:
    """Examples {images, prompt, chosen, rejected[, row]} → a `batch.PairBatch` of B pairs.

    Args:
        processor: the model's processor.
        max_length: answers are cut so that prompt and answer stay within; image tokens never are.
        share: False gives both answers rows of their own, for models that cannot read two answers
            in one row; each image is still given once.
        share_beginnings: whether prompts that differ may share what they begin with; False for
            models that read a prompt in both directions, where only equal prompts are one.
    """

    processor: Processor
    max_length: int | None = None
    share: bool = True
    share_beginnings: bool = True
    # Whether inputs shaped like ids are by token; decided once for each name.
    _is_by_token: dict[str, bool] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._process: Any = BatchingProcessor(self.processor)

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """A `batch.PairBatch`, with the processor's pixels and token types.

        Raises DataError for a prompt that leaves no room for an answer, and for an empty answer.
        """
        host = host_inputs(examples)
        if self.share:
            return {**host, **self._trees(examples, host["image_keys"])}
        return {**host, **self._rows(examples)}

    def _trees(self, examples: list[Example], image_keys: list[str]) -> dict[str, Any]:
        """A batch to run as one packed row, whose images are those of its trees.

        Args:
            image_keys: of each example.
        """
        texts = [self.render(example) for example in examples]
        images = [images_of(example) for example in examples]
        # Examples of equal image and prompt have one `Prompt`.
        contents = [(key, text["prompt"]) for key, text in zip(image_keys, texts, strict=True)]
        groups: dict[object, list[int]] = {}  # the examples of each prompt, by image
        for number, content in enumerate(contents):
            if contents.index(content) == number:
                groups.setdefault(content[0] or number, []).append(number)
        trees, pixels = self._prompt_trees([*groups.values()], texts, images)
        prompts = [prompt for tree in trees for prompt in tree.prompts]
        numbers = {contents[prompt.example]: i for i, prompt in enumerate(prompts)}
        of_examples = [numbers[content] for content in contents]
        limits = [
            self._answer_limit(len(prompts[number].ids), example)
            for number, example in zip(of_examples, examples, strict=True)
        ]
        planted = plant(trees, of_examples, self._answers(texts, limits))
        batch = self._packed_batch(planted, planted.order)
        for name in prompts[0].types:
            batch[name] = planted.lay_out(
                [prompt.types[name] for prompt in prompts],
                partial(self._types_of, name),
            )
        keys_of_trees = [image_keys[tree.prompts[0].example] for tree in trees]
        return {**batch, **pixels, "image_keys": keys_of_trees}

    def _prompt_trees(
        self,
        groups: list[list[int]],
        texts: list[dict[str, str]],
        images: list[list[Image.Image]],
    ) -> tuple[list[PromptTree], dict[str, Any]]:
        """The processed prompts by tree, and the pixels of the trees' images in their order.

        Args:
            groups: an example of each distinct prompt, by image.
        """
        firsts, others = [group[0] for group in groups], [n for group in groups for n in group[1:]]
        found, pixels = self._process_examples(firsts, texts, images)
        if not others:
            return [PromptTree.of([prompt]) for prompt in found], pixels
        by_example = {prompt.example: prompt for prompt in found}
        # The images of a tree are processed anew for each prompt: what a processor puts around an
        # image may depend on the words beside it, so that ids cannot be spliced.
        found, _ = self._process_examples(others, texts, images)
        by_example |= {prompt.example: prompt for prompt in found}
        placeholders = image_placeholders(self.processor) if self.share_beginnings else frozenset()
        trees: list[PromptTree] = []
        for group in groups:
            tree = PromptTree.of([by_example[number] for number in group])
            alone = [PromptTree.of([prompt]) for prompt in tree.prompts]
            trees += [tree] if tree.images_are_shared(placeholders) else alone
        if len(trees) == len(groups):
            return trees, pixels
        examples = [tree.prompts[0].example for tree in trees]
        return trees, self._process_examples(examples, texts, images)[1]

    def _process_examples(
        self,
        numbers: Sequence[int],
        texts: list[dict[str, str]],
        images: list[list[Image.Image]],
    ) -> tuple[list[Prompt], dict[str, Any]]:
        """The prompts of these examples, and what the processor made of their images."""
        inputs = self.process_prompts(
            [texts[number]["prompt"] for number in numbers], [images[number] for number in numbers]
        )
        inputs.pop("labels", None)  # PaliGemma's processor makes some; TRL has its own
        mask = inputs.pop("attention_mask").bool()
        ids = inputs.pop("input_ids")
        names = self._names_by_token(inputs, ids, texts[numbers[0]]["prompt"], images[numbers[0]])
        types = {name: _unpad(inputs.pop(name), mask) for name in names}
        prompts = [
            Prompt(
                example=number,
                ids=ids_L,
                types={name: types[name][place] for name in names},
                images=len(images[number]),
            )
            for place, (number, ids_L) in enumerate(zip(numbers, _unpad(ids, mask), strict=True))
        ]
        return prompts, inputs

    def _rows(self, examples: list[Example]) -> dict[str, Any]:
        """A batch of one row per answer."""
        texts = [self.render(example) for example in examples]
        images = [images_of(example) for example in examples]
        prompts, pixels = self._process_examples(range(len(examples)), texts, images)
        limits = [
            self._answer_limit(len(prompt.ids), example)
            for prompt, example in zip(prompts, examples, strict=True)
        ]
        chosen, rejected = self._answers(texts, limits)
        answers = [*chosen, *rejected]
        twice = [*prompts, *prompts]
        ids = [prompt.ids for prompt in twice]
        batch: dict[str, Any] = {
            "input_ids": self._pad(_join(ids, answers)),
            "attention_mask": _stock_attention_mask([len(i) for i in ids], answers),
            "completion_mask": _completion_mask(ids, answers),
            "image_copies": 2,
        }
        for name in prompts[0].types:
            types = [prompt.types[name] for prompt in twice]
            of_answers = [self._types_of(name, *pair) for pair in zip(answers, types, strict=True)]
            batch[name] = torch.nn.utils.rnn.pad_sequence(
                _join(types, of_answers), batch_first=True
            )
        return {**batch, **pixels}

    def content_keys(self, examples: list[Example]) -> ContentKeys:
        """The keys that the batch of these examples has."""
        return content_keys(examples)

    def render(self, example: Example) -> dict[str, str]:
        """Prompt and answers of one example as text.

        Raises DataError where the model's chat template cannot render it.
        """
        if isinstance(example["prompt"], str):
            return {name: example[name] for name in ("prompt", *SIDES)}
        try:
            return render_example(self.processor, example)
        except CannotRender as problem:
            raise cannot_render(example.get("row"), problem) from problem

    def process_prompts(self, texts: list[str], images: list[list[Image.Image]]) -> dict[str, Any]:
        """The processor's outputs for rendered prompts, padded on the left."""
        inputs: dict[str, Any] = self._process(
            images=images if any(images) else None,
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,  # the chat template has added them
        )
        return inputs

    def stock_rows(self, examples: list[Example]) -> dict[str, Any]:
        """The batch as TRL's collator lays it out, of our ids: each image stands in it twice."""
        rows = replace(self, share=False)(examples)
        rows.pop("image_copies")
        prompts = [self.render(example)["prompt"] for example in examples]
        images = [images_of(example) for example in examples]
        return {**rows, **image_inputs(self.process_prompts(prompts * 2, images * 2))}

    def _names_by_token(
        self, inputs: dict[str, Any], ids: Tensor, text: str, images: list[Image.Image]
    ) -> list[str]:
        """Names of the inputs that hold a value for each token, as token types do.

        The shape may be a coincidence (as many patches as tokens), so that a name has to hold for
        a longer prompt too: `text` is the first prompt's, with its images.
        """
        found = inputs_by_token(inputs, ids)
        if not all(name in self._is_by_token for name in found):
            longer = self.process_prompts([text + " a a a"], [images])
            of_longer = inputs_by_token(longer, longer["input_ids"])
            self._is_by_token |= {
                name: name in of_longer for name in found if name not in self._is_by_token
            }
        return [name for name in found if self._is_by_token[name]]

    def _types_of(self, name: str, answer: Tensor, types: Tensor) -> Tensor:
        """What an input by token says of an answer's tokens: the same as of the text before it.

        Args:
            answer: (L,) its token ids.
            types: (L, ...) what it says of the prompt, whose last token is text.

        Raises ModelError where it numbers the tokens.
        """
        if types.ndim == 1 and len(types) > 3 and bool((types[-3:].diff() == 1).all()):
            raise ModelError(
                f"the processor's '{name}' numbers the prompt's tokens, which cannot be extended "
                "over answers"
            )
        of_one = answer_token_type(self.processor, name, types[-1])
        return of_one.expand(len(answer), *of_one.shape)

    def _answer_limit(self, prompt_tokens: int, example: Example) -> int | None:
        """Tokens that an answer may have behind this prompt. Raises DataError where none."""
        if self.max_length is None:
            return None
        if prompt_tokens >= self.max_length:
            where = f"row {example['row']} (counted from 0)" if "row" in example else "a row"
            raise DataError(
                f"--max-length {self.max_length}: {where} has a prompt of {prompt_tokens:,} "
                "tokens, "
                "images included, which leaves no room for an answer; give a larger limit or none"
            )
        return self.max_length - prompt_tokens

    def _answers(
        self, texts: list[dict[str, str]], limits: list[int | None]
    ) -> tuple[list[Any], list[Any]]:
        """Token ids (L,) of all chosen and of all rejected answers, cut to their limits."""
        chosen, rejected = (
            [self._answer_ids(text[side], limit) for text, limit in zip(texts, limits, strict=True)]
            for side in SIDES
        )
        return chosen, rejected

    def _answer_ids(self, text: str, limit: int | None) -> Tensor:
        """(L,) the answer's token ids, cut to `limit`."""
        ids = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ][0]
        if len(ids) == 0:
            raise DataError("an answer has no tokens; run vlmdpo prepare, which drops such rows")
        return ids[:limit].long()

    def _packed_batch(self, planted: Planted, order: list[int]) -> dict[str, Any]:
        """A batch to run as one packed row, without what comes of images.

        Args:
            order: R numbers, which distinct answer each row of the loss is.
        """
        answers = [planted.answers[number] for number in order]
        last = [planted.last_token(number) for number in order]
        lengths = [planted.prompt_tokens(number) for number in order]
        attention_mask = _stock_attention_mask(lengths, answers)
        forest = replace(planted.forest, stock_tokens=int(attention_mask.sum()))
        batch: dict[str, Any] = {
            "input_ids": self._pad(_join(last, answers)),
            "attention_mask": attention_mask,
            "completion_mask": _completion_mask(last, answers),
            "forest": forest,
            "tree_ids": planted.ids,
        }
        if order != list(range(len(forest.answers))):
            batch["order"] = torch.tensor(order)
            batch["order_back"] = torch.tensor([order.index(n) for n in range(len(forest.answers))])
        return batch

    def _pad(self, rows: list[Tensor]) -> Tensor:
        """(L,) each → (rows, longest L), padded on the right."""
        tokenizer = self.processor.tokenizer
        padding = tokenizer.pad_token_id
        if padding is None:
            padding = tokenizer.eos_token_id
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)


def host_inputs(examples: list[Example]) -> dict[str, Any]:
    """What a batch holds for the host: its rows' numbers, if they have any, and content keys."""
    numbered = {"row": [example["row"] for example in examples]} if "row" in examples[0] else {}
    return {**numbered, **content_keys(examples)}


def cannot_render(row: int | None, problem: BadRow) -> DataError:
    """The error for a row of prepared data that a model's chat template cannot render."""
    where = "a row" if row is None else f"row {row} (counted from 0)"
    return DataError(
        f"{where}: {problem}; run vlmdpo prepare with this --model, which drops such rows"
    )


def render_example(processor: Processor, example: Example) -> dict[str, str]:
    """Prompt and answers of one example as text. Raises CannotRender."""
    answers = {side: render_answer(processor, text_of(example[side][0])) for side in SIDES}
    return {"prompt": render_prompt(processor, example["prompt"]), **answers}


def images_of(example: Example) -> list[Image.Image]:
    """The images of an example; empty where it has none."""
    return list(example.get("images") or [])


def _unpad(padded: Tensor, mask: Tensor) -> list[Tensor]:
    """(B, longest L) → B times (L,): each row's values where `mask` is true."""
    return [row[keep] for row, keep in zip(padded, mask, strict=True)]


def _join(prompts: Sequence[Tensor], answers: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(prompts, answers, strict=True)]


def _completion_mask(prompts: Sequence[Tensor], answers: Sequence[Tensor]) -> Tensor:
    """(rows, longest L): 1 where a token is an answer's, 0 for prompt and padding."""
    masks = _join([torch.zeros_like(p) for p in prompts], [torch.ones_like(a) for a in answers])
    return torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)


def _stock_attention_mask(prompts: Sequence[int], answers: Sequence[Tensor]) -> Tensor:
    """(R, S): 1 where a stock row has a token.

    Args:
        prompts: tokens of the prompt of each row.
        answers: R token ids (L,).
    """
    lengths = torch.tensor([p + len(a) for p, a in zip(prompts, answers, strict=True)])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long()
