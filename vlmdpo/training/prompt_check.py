"""Is a model asked with the prompt that it is trained on, and is only the answer in the loss?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmdpo import ui
from vlmdpo.data.pairs import SIDES, text_of
from vlmdpo.engine.batch import answer_ids
from vlmdpo.engine.collate import images_of
from vlmdpo.engine.generate import model_inputs
from vlmdpo.training.doctor import Check

if TYPE_CHECKING:
    from vlmdpo.training.run_trainer import RunTrainer


def check_prompts(trainer: RunTrainer, example: dict[str, Any]) -> Check:
    """Compare a row's batch with what `infer` would ask, and its loss with its answers.

    Does not apply to rows that `infer` cannot ask: of several turns, or without exactly one image.
    """
    name = "the prompt asked is the prompt trained"
    turns, images = example["prompt"], images_of(example)
    if len(turns) != 1 or len(images) != 1 or len(turns[0]["content"]) != 2:
        return Check(name, None, "the row is not one question about one image")
    batch = trainer.pair_collator([dict(example)])
    trained, answers = _token_ids(batch)
    question = turns[0]["content"][-1]["text"]
    inputs = model_inputs(trainer.model, trainer.processing_class, images, [question])
    asked = inputs["input_ids"][0].tolist()
    if asked != trained:
        both = zip(asked, trained, strict=False)
        same = next((i for i, (a, b) in enumerate(both) if a != b), min(len(asked), len(trained)))
        seen = f"they differ from token {same} on: {len(asked)} asked, {len(trained)} trained"
        return Check(name, False, seen, "the chat template renders them differently")
    decode = trainer.processing_class.tokenizer.decode
    for side, ids in zip(SIDES, answers, strict=True):
        in_loss = decode(ids, skip_special_tokens=True).strip()
        if not text_of(example[side][0]).strip().startswith(in_loss):
            seen = f"the {side} answer's loss covers {in_loss[:60]!r}"
            return Check(name, False, seen, "the chat template changes answers")
    return Check(name, True, f"{ui.count(len(asked), 'token')}; the loss covers the answers alone")


def _token_ids(batch: dict[str, Any]) -> tuple[list[int], list[list[int]]]:
    """(the prompt's ids, both answers') of a batch of one pair, of any engine's collator."""
    answers = answer_ids(batch)
    if "forest" in batch:
        return batch["tree_ids"][0, : batch["forest"].lengths[0]].tolist(), answers
    is_prompt_S = (batch["attention_mask"][0] == 1) & (batch["completion_mask"][0] == 0)
    return batch["input_ids"][0][is_prompt_S].tolist(), answers
