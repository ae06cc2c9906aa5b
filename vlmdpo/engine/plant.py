"""Processed prompts and answers → the trees of a batch: which tokens lie in which node.

Shapes: B pairs, D distinct answers, T slots of the packed row, L tokens of one text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmdpo.engine.tree import ROOT, Forest, common_beginning


@dataclass(frozen=True)
class Prompt:
    """One distinct prompt of a batch, processed.

    Attributes:
        example: an example that has it.
        ids: (L,) token ids.
        types: (L, ...) what each input by token says of it, by name.
        images: how many images it holds.
    """

    example: int
    ids: Tensor
    types: dict[str, Tensor]
    images: int


@dataclass(frozen=True)
class PromptTree:
    """Distinct prompts of a batch that lie in one tree.

    Attributes:
        beginning: tokens that all of them begin with; all of a prompt that is alone.
    """

    prompts: list[Prompt]
    beginning: int

    @classmethod
    def of(cls, prompts: list[Prompt]) -> PromptTree:
        """These prompts, which share what their token ids and types have in common."""
        if len(prompts) == 1:
            return cls(prompts, len(prompts[0].ids))
        return cls(prompts, common_beginning([_tokens(prompt) for prompt in prompts]))

    def images_are_shared(self, placeholders: frozenset[int]) -> bool:
        """Whether the images of these prompts lie in what all of them begin with.

        Args:
            placeholders: ids of the tokens that stand for images. Without any, only a prompt that
                is alone is sure to have them there.
        """
        if len(self.prompts) == 1:
            return True
        tails = (prompt.ids[self.beginning :].tolist() for prompt in self.prompts)
        return (
            bool(placeholders) and self.beginning > 0 and all(map(placeholders.isdisjoint, tails))
        )


@dataclass(frozen=True)
class Planted:
    """A batch's texts in their places.

    Attributes:
        forest: the nodes.
        ids: (1, T) token ids of the packed row.
        prompts: all prompts, tree by tree.
        answers: D token ids (L,).
        order: 2B numbers, which distinct answer each chosen one is, then each rejected one; -1
            where there is none.
    """

    forest: Forest
    ids: Tensor
    prompts: list[Prompt]
    answers: list[Tensor]
    order: list[int]

    def last_token(self, answer: int) -> Tensor:
        """(1,) the id of the last token before a distinct answer."""
        return self._prompt(answer).ids[-1:]

    def prompt_tokens(self, answer: int) -> int:
        """Tokens of the prompt of a distinct answer."""
        return len(self._prompt(answer).ids)

    def _prompt(self, answer: int) -> Prompt:
        return self.prompts[self.forest.prompt_of(self.forest.answers[answer])]

    def lay_out(
        self, of_prompts: Sequence[Tensor], of_answer: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """(1, T, ...) values of tokens in the order of the packed row.

        Args:
            of_prompts: (L, ...) for each prompt.
            of_answer: makes those of an answer, of its ids and the values of its prompt.
        """
        forest = self.forest
        of_answers = [
            of_answer(answer, of_prompts[forest.prompt_of(node)])
            for node, answer in zip(forest.answers, self.answers, strict=True)
        ]
        return _in_order(forest, of_prompts, of_answers)


def plant(
    trees: Sequence[PromptTree],
    prompt_of_example: Sequence[int],
    answers: tuple[Sequence[Tensor | None], Sequence[Tensor | None]],
) -> Planted:
    """Lay out trees, equal answers of a prompt once.

    Args:
        prompt_of_example: B numbers, counted over all trees.
        answers: B chosen and B rejected token ids (L,); None where an example has none.
    """
    prompts = [prompt for tree in trees for prompt in tree.prompts]
    distinct: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for side, of_side in enumerate(answers):
        for example, answer in enumerate(of_side):
            if answer is not None:
                key = prompt_of_example[example], tuple(answer.tolist())
                distinct.setdefault(key, []).append(side * len(of_side) + example)
    # In depth-first order: by prompt, then as they come.
    keys = sorted(distinct, key=lambda key: key[0])
    number_of_row = {row: number for number, key in enumerate(keys) for row in distinct[key]}
    counts = [sum(prompt == number for prompt, _ in keys) for number in range(len(prompts))]
    lengths = [len(ids) for _, ids in keys]
    forest = _make_forest(trees, counts, lengths)
    ids = [torch.tensor(ids) for _, ids in keys]
    return Planted(
        forest=forest,
        ids=_in_order(forest, [prompt.ids for prompt in prompts], ids),
        prompts=prompts,
        answers=ids,
        order=[number_of_row.get(row, -1) for row in range(sum(map(len, answers)))],
    )


def _make_forest(
    trees: Sequence[PromptTree], counts: Sequence[int], answer_lengths: Sequence[int]
) -> Forest:
    """Nodes of these trees.

    Args:
        counts: answers of each prompt.
        answer_lengths: tokens of all answers, by prompt.
    """
    parents: list[int] = []
    lengths: list[int] = []
    ends: list[int] = []
    leaves: list[int] = []

    def add(parent: int, tokens: int) -> int:
        parents.append(parent)
        lengths.append(tokens)
        return len(parents) - 1

    answer_count, answer_tokens = iter(counts), iter(answer_lengths)
    for tree in trees:
        root = add(ROOT, tree.beginning)
        for prompt in tree.prompts:
            own = len(prompt.ids) - tree.beginning
            ends.append(add(root, own) if own else root)
            leaves += [add(ends[-1], next(answer_tokens)) for _ in range(next(answer_count))]
    images = tuple(tree.prompts[0].images for tree in trees)
    return Forest(tuple(parents), tuple(lengths), tuple(ends), tuple(leaves), images)


def _tokens(prompt: Prompt) -> list[tuple[object, ...]]:
    """Each token of a prompt: its id, and what the inputs by token say of it."""
    types = [
        values.flatten(1).tolist() if values.ndim > 1 else values.tolist()
        for values in prompt.types.values()
    ]
    return list(zip(prompt.ids.tolist(), *types, strict=True))


def _in_order(forest: Forest, prompts: Sequence[Tensor], answers: Sequence[Tensor]) -> Tensor:
    """(1, T, ...): values of prompts and answers (L, ...), node by node."""
    of_node: dict[int, Tensor] = dict(zip(forest.answers, answers, strict=True))
    for end, values in zip(forest.prompts, prompts, strict=True):
        place = 0
        for node in forest.path(end):
            of_node.setdefault(node, values[place : place + forest.lengths[node]])
            place += forest.lengths[node]
    return torch.cat([of_node[node] for node in range(len(forest.parents))])[None]
