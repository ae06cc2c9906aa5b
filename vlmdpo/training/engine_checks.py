"""Is the engine exact, on the real model and data?

It is compared with stock rows, and so are engines broken on purpose: it must agree with stock ten
times better than they do, or as well as stock agrees with itself after one more rounding. Then
neither bfloat16's rounding fails the check, nor can an error hide in a tolerance.

Shapes: B pairs of a batch; 2B answers, chosen first; A tokens of one answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmdpo.engine.batch_context import BATCH_CONTEXT
from vlmdpo.engine.collate import PairCollator
from vlmdpo.engine.stock_collator import StockCollator
from vlmdpo.engine.tree import Forest
from vlmdpo.engine.tree_attention import Run
from vlmdpo.engine.tree_layout import TreeLayout
from vlmdpo.models import families
from vlmdpo.models.inputs import other_pixels
from vlmdpo.training.doctor import Check, token_logps
from vlmdpo.training.rounding import one_more_rounding

if TYPE_CHECKING:
    from vlmdpo.models.protocols import Processor
    from vlmdpo.training.protocols import EngineTrainer

Example = dict[str, Any]
_ROUNDINGS = 3.0  # by which results may differ that were added up in another order
_MARGIN = 10.0  # how many times smaller than a broken engine's the error must be


class _AnswerSeesAnother(TreeLayout):
    """Broken on purpose: an answer sees those before it to the same prompt."""

    def sees(self, run: Run) -> tuple[int, ...]:
        return _with_siblings(self, run, set(self.forest.answers))


class _QuestionSeesAnother(TreeLayout):
    """Broken on purpose: a question sees those before it about the same image."""

    def sees(self, run: Run) -> tuple[int, ...]:
        return _with_siblings(self, run, set(self.forest.prompts))


def _with_siblings(layout: TreeLayout, run: Run, kind: set[int]) -> tuple[int, ...]:
    """What a run should see, and the earlier siblings of those of its nodes that are of a kind."""
    forest = layout.forest
    seen = set(forest.path(run.nodes[-1]))
    parents = {forest.parents[node] for node in run.nodes if node in kind} - {-1}
    siblings = {node for node in kind if forest.parents[node] in parents and node < run.nodes[0]}
    return tuple(sorted(seen | siblings))


class _ShiftedPositions(TreeLayout):
    """Broken on purpose: an answer's positions continue those of the one before it."""

    def rows_to_slots(self, rows: Tensor) -> Tensor:
        positions = super().rows_to_slots(rows).clone()
        forest = self.forest
        for prompt in range(len(forest.prompts)):
            answers = forest.answers_of(prompt)
            for before, node in pairwise(answers):
                start = forest.starts[node]
                positions[..., start : start + forest.lengths[node]] += forest.lengths[before]
        return positions


def _broken_layouts(forest: Forest) -> dict[str, type[TreeLayout]]:
    """Layouts that are wrong for these trees, by what is wrong with them."""
    found: dict[str, type[TreeLayout]] = {}
    if len(forest.answers) > len(forest.prompts):
        found["an answer sees another"] = _AnswerSeesAnother
        found["shifted positions"] = _ShiftedPositions
    if len(forest.prompts) > len(forest.roots):
        found["a question sees another"] = _QuestionSeesAnother
    return found


def check_shared_forward(trainer: EngineTrainer, examples: list[Example]) -> Check:
    """Does the shared forward give these pairs the log-probs of stock rows?

    Measured against the errors of engines broken on purpose; see the module's docstring.

    Args:
        examples: rows that share what the data's rows share.
    """
    collate = dataclasses.replace(trainer.pair_collator, max_length=None)
    shared = trainer.shared_forwards[0]
    stock, noise = _stock_and_noise(trainer, examples)

    batch = collate([dict(example) for example in examples])

    def error(batch: dict[str, Any]) -> float:
        return max(_mean_difference(token_logps(trainer, batch), stock))

    own = token_logps(trainer, batch)
    own_error = max(_mean_difference(own, stock))
    broken_errors = {
        name: error({**batch, BATCH_CONTEXT: shared.new_batch(layout_class=layout)})
        for name, layout in _broken_layouts(batch["forest"]).items()
    }
    layouts = list(broken_errors.values())
    other_image = math.inf
    if any(example.get("images") for example in examples):
        other_image = broken_errors["other image"] = error(other_pixels(batch))
    worst = max(own_error, _moved_by_another_answer(trainer, batch, own))
    passed = _is_exact(worst, noise, other_image, layouts)
    compared = {"one rounding": noise, **broken_errors}
    others = ", ".join(f"{name} {value:.1e}" for name, value in compared.items())
    seen = f"agrees with stock rows to {own_error:.1e} per token ({others})"
    cause = f"it differs from stock rows by {worst:.1e} per token"
    return Check("shared forward", passed, seen, cause)


def check_images_once(trainer: EngineTrainer, examples: list[Example]) -> Check:
    """Do rows with each image encoded once give the log-probs of stock rows?

    Measured against the effect of another image.
    """
    collate = PairCollator(trainer.processing_class, share=False)
    stock, noise = _stock_and_noise(trainer, examples)

    def error(batch: dict[str, Any]) -> float:
        return max(_mean_difference(token_logps(trainer, batch), stock))

    batch = collate([dict(example) for example in examples])
    own_error = error(batch)
    other_error = math.inf
    if any(example.get("images") for example in examples):
        other_error = error(other_pixels(batch))
    return Check(
        "rows with images once",
        _is_exact(own_error, noise, other_error),
        f"agree with stock rows to {own_error:.1e} per token (one rounding {noise:.1e}, other "
        f"image {other_error:.1e})",
        f"they differ from stock rows by {own_error:.1e} per token",
    )


def stock_batch(processor: Processor, example: Example) -> dict[str, Any]:
    """One pair as stock TRL lays it out: two rows, everything twice."""
    ours = PairCollator(processor).stock_rows([dict(example)])
    if families.inserts_image_tokens(processor):  # TRL's collator cannot make such rows
        return ours
    stock = StockCollator(processor)([dict(example)])
    # Where a processor and its tokenizer tokenize an answer differently, engines would be compared
    # on different texts.
    same = stock["input_ids"].shape == ours["input_ids"].shape and torch.equal(
        stock["input_ids"] * stock["attention_mask"], ours["input_ids"] * ours["attention_mask"]
    )
    return stock if same else ours


def _stock_and_noise(trainer: EngineTrainer, examples: list[Example]) -> tuple[list[Tensor], float]:
    """Stock's log-probs (A,) of the 2B answers, and how far they move by one more rounding, in nats
    per token. One pair at a time: memory need not hold more stock rows than one pair has.
    """
    chosen: list[Tensor] = []
    rejected: list[Tensor] = []
    noise = 0.0
    for example in examples:
        batch = stock_batch(trainer.processing_class, example)
        stock = token_logps(trainer, batch)
        with one_more_rounding(trainer.accelerator.unwrap_model(trainer.model)):
            noise = max(noise, *_mean_difference(token_logps(trainer, batch), stock))
        chosen.append(stock[0])
        rejected.append(stock[1])
    return chosen + rejected, noise


def _moved_by_another_answer(
    trainer: EngineTrainer, batch: dict[str, Any], before: list[Tensor]
) -> float:
    """How far the first distinct answer's tokens, reversed, move the others, in nats per token."""
    forest = batch["forest"]
    first = forest.answers[0]
    slots = slice(forest.starts[first], forest.starts[first] + forest.lengths[first])
    tree_ids = batch["tree_ids"].clone()
    tree_ids[0, slots] = tree_ids[0, slots].flip(0)
    order = batch.get("order")
    of_rows = order.tolist() if order is not None else range(len(forest.answers))
    after = token_logps(trainer, {**batch, "tree_ids": tree_ids})
    moved = _mean_difference(after, before)
    return max((by for by, answer in zip(moved, of_rows, strict=True) if answer), default=0.0)


def _mean_difference(answers: list[Tensor], others: list[Tensor]) -> list[float]:
    """The mean difference of each answer's log-probs, in nats per token."""
    return [(a - b).abs().mean().item() for a, b in zip(answers, others, strict=True)]


def _is_exact(
    error: float, noise: float, other_image: float, broken_layouts: Iterable[float] = ()
) -> bool:
    """Whether an engine agrees with stock: up to rounding, or far better than broken ones.

    Args:
        error: of the engine.
        noise: what one more rounding changes.
        other_image: the error with another image: never smaller than that with the right one.
        broken_layouts: errors of layouts broken on purpose. Very short answers hide some mistakes,
            which then change no more than a few roundings do, and say nothing.
    """
    if error == 0:
        return True
    least = _ROUNDINGS * noise
    visible = [broken for broken in (*broken_layouts, other_image) if least < broken < math.inf]
    is_far_better = bool(visible) and error * _MARGIN <= min(visible)
    return error < other_image and (error <= noise or is_far_better)
