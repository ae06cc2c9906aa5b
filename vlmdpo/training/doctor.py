"""Checks on the real model and data before a run is paid for: is the engine exact, is all sound?

The engine is compared with stock rows, and so are engines broken on purpose: it must agree with
stock ten times better than they do, or as well as stock agrees with itself after one more rounding.
Then neither bfloat16's rounding fails the check, nor can an error hide in a tolerance.

Shapes: B pairs of a batch; 2B answers, chosen first; A tokens of one answer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmdpo.engine.batch_context import BATCH_CONTEXT
from vlmdpo.engine.collate import PairCollator
from vlmdpo.engine.pair_layout import PairLayout, Span
from vlmdpo.engine.stock_collator import StockCollator
from vlmdpo.models import families
from vlmdpo.models.adapters import adapters_off
from vlmdpo.models.inputs import has_images, image_token_id, other_pixels, take_host_only
from vlmdpo.training.rounding import one_more_rounding
from vlmdpo.training.trainer import PairTrainer

if TYPE_CHECKING:
    from torch import nn

    from vlmdpo.models.protocols import Processor, VisionLanguageModel

_MARGIN = 10.0  # how many times smaller than a broken engine's the error must be


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        passed: None if the check does not apply.
        seen: the measured values, as text.
        cause: the likely cause of a failure.
    """

    name: str
    passed: bool | None
    seen: str
    cause: str = ""


class _LeakingLayout(PairLayout):
    """Broken on purpose: the rejected answer sees the chosen one."""

    def visible_to_rejected(self, span: Span, device: torch.device) -> Tensor:
        return torch.ones(span.length, dtype=torch.bool, device=device)


class _ShiftedLayout(PairLayout):
    """Broken on purpose: the rejected answer's positions continue the chosen one's."""

    def rows_to_slots(self, rows: Tensor) -> Tensor:
        positions = super().rows_to_slots(rows).clone()
        for span in self.spans:
            start = span.start + span.prefix + span.chosen
            positions[..., start : start + span.rejected] += span.chosen
        return positions


@torch.no_grad()
def token_logps(
    trainer: PairTrainer, batch: dict[str, Any], *, reference: bool = False
) -> list[Tensor]:
    """Log-probs (A,) of each of the 2B answers' tokens, under the policy or without adapter."""
    inputs = dict(trainer._prepare_inputs(batch))
    take_host_only(inputs)
    labels = inputs["input_ids"].masked_fill(inputs.pop("completion_mask") == 0, -100)
    with (
        _evaluation_mode(trainer.model),
        trainer.accelerator.autocast(),
        _reference_mode(trainer) if reference else contextlib.nullcontext(),
    ):
        # TRL's head, as in its loss: only the answers' tokens are scored.
        logps = trainer.model(
            **inputs, labels=labels, use_cache=False, fused_lm_head=True
        ).log_probs
    return [row[label[1:] != -100].float().cpu() for row, label in zip(logps, labels, strict=True)]


def _reference_mode(trainer: PairTrainer) -> AbstractContextManager[None]:
    """Inside, the model runs without its adapter, if it has one."""
    context: AbstractContextManager[None] = contextlib.nullcontext()
    if hasattr(trainer.model, "peft_config"):
        model = trainer.accelerator.unwrap_model(trainer.model)
        context = adapters_off(model)
    return context


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _mean_difference(answers: list[Tensor], others: list[Tensor]) -> list[float]:
    """The mean difference of each answer's log-probs, in nats per token."""
    return [(a - b).abs().mean().item() for a, b in zip(answers, others, strict=True)]


def _rounding_noise(trainer: PairTrainer, batch: dict[str, Any], stock: list[Tensor]) -> float:
    """How far stock's own log-probs move by one more rounding, in nats per token."""
    with one_more_rounding(trainer.accelerator.unwrap_model(trainer.model)):
        return max(_mean_difference(token_logps(trainer, batch), stock))


def _is_exact(error: float, broken_error: float, noise: float) -> bool:
    """Whether an engine agrees with stock: far better than a broken one, or up to rounding."""
    return error < broken_error and (error * _MARGIN <= broken_error or error <= noise)


def _max_difference(answers: list[Tensor], others: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(answers, others, strict=True))


def check_shared_forward(trainer: PairTrainer, example: dict[str, Any]) -> Check:
    """Does the shared forward give this pair the log-probs of two stock rows?

    Measured against the errors of engines broken on purpose; see the module's docstring.
    """
    processor = trainer.processing_class
    collate = PairCollator(processor)
    shared = trainer.shared_forwards[0]
    stock = token_logps(trainer, stock_batch(processor, example))
    noise = _rounding_noise(trainer, stock_batch(processor, example), stock)

    def error(batch: dict[str, Any]) -> float:
        differences = _mean_difference(token_logps(trainer, batch), stock)
        return sum(differences) / len(differences)

    own_error = error(collate([dict(example)]))
    broken_errors = {}
    for name, layout in (
        ("leaking mask", _LeakingLayout),
        ("shifted positions", _ShiftedLayout),
    ):
        batch = collate([dict(example)])
        batch[BATCH_CONTEXT] = shared.new_batch(layout_class=layout)
        broken_errors[name] = error(batch)
    if example.get("images"):
        broken_errors["other image"] = error(other_pixels(collate([dict(example)])))
    # The rejected answer must not depend on the chosen one.
    with_reversed = token_logps(trainer, _reverse_chosen(collate([dict(example)])))
    rejected_moved = (
        (with_reversed[1] - token_logps(trainer, collate([dict(example)]))[1]).abs().mean().item()
    )
    worst = max(own_error, rejected_moved)
    passed = _is_exact(worst, min(broken_errors.values()), noise)
    compared = {"one rounding": noise, **broken_errors}
    others = ", ".join(f"{name} {value:.1e}" for name, value in compared.items())
    seen = f"agrees with stock rows to {own_error:.1e} per token ({others})"
    cause = f"it differs from stock rows by {worst:.1e} per token"
    return Check("shared forward", passed, seen, cause)


def check_images_once(trainer: PairTrainer, example: dict[str, Any]) -> Check:
    """Do rows with each image encoded once give the log-probs of stock rows?

    Measured against the effect of another image.
    """
    collate = PairCollator(trainer.processing_class, share=False)
    stock = token_logps(trainer, stock_batch(trainer.processing_class, example))
    noise = _rounding_noise(trainer, stock_batch(trainer.processing_class, example), stock)

    def error(batch: dict[str, Any]) -> float:
        return max(_mean_difference(token_logps(trainer, batch), stock))

    own_error = error(collate([dict(example)]))
    other_error = math.inf
    if example.get("images"):
        other_error = error(other_pixels(collate([dict(example)])))
    return Check(
        "rows with images once",
        _is_exact(own_error, other_error, noise),
        f"agree with stock rows to {own_error:.1e} per token (one rounding {noise:.1e}, other "
        f"image {other_error:.1e})",
        f"they differ from stock rows by {own_error:.1e} per token",
    )


def stock_batch(processor: Processor, example: dict[str, Any]) -> dict[str, Any]:
    """One pair as stock TRL lays it out: two rows, everything twice."""
    ours = PairCollator(processor).stock_rows([dict(example)])
    if families.inserts_image_tokens(processor):  # TRL's collator cannot make such rows
        return ours
    stock = StockCollator(processor)([dict(example)])
    # Where a processor tokenizes an answer otherwise than its tokenizer does, engines would be
    # compared on different texts.
    same = stock["input_ids"].shape == ours["input_ids"].shape and torch.equal(
        stock["input_ids"] * stock["attention_mask"], ours["input_ids"] * ours["attention_mask"]
    )
    return stock if same else ours


def _reverse_chosen(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch of one pair with the tokens of its chosen answer reversed."""
    prompt, chosen, _ = batch["pairs"][0]
    packed_ids, pair_token_ids = batch["pair_ids"].clone(), batch["input_ids"].clone()
    packed_ids[0, prompt : prompt + chosen] = packed_ids[0, prompt : prompt + chosen].flip(0)
    pair_token_ids[0, 1 : 1 + chosen] = pair_token_ids[0, 1 : 1 + chosen].flip(0)
    return {**batch, "pair_ids": packed_ids, "input_ids": pair_token_ids}


def check_setup(trainer: PairTrainer, examples: list[dict[str, Any]]) -> list[Check]:
    """What must hold before a run, by each check's name; that of the loss comes first.

    Args:
        examples: a few rows of the dataset.
    """
    collate = trainer.pair_collator
    batch, first = collate([dict(example) for example in examples]), collate([dict(examples[0])])
    return [
        _check_first_loss(trainer, batch),
        *([_check_image_matters(trainer, first)] if examples[0].get("images") else []),
        _check_answers_end(trainer, batch),
        _check_no_empty_answer(batch),
        *([_check_image_tokens(trainer, batch)] if has_images(batch) else []),
        _check_trainable(trainer.model),
    ]


def _check_first_loss(trainer: PairTrainer, batch: dict[str, Any]) -> Check:
    policy, reference = token_logps(trainer, batch), token_logps(trainer, batch, reference=True)
    largest = max((p.sum() - r.sum()).abs().item() for p, r in zip(policy, reference, strict=True))
    loss = math.log1p(math.exp(min(trainer.beta * 2 * largest, 50.0)))
    cause = "the adapter does not start at zero, or dropout is on"
    if not all(bool(logps.isfinite().all()) for logps in (*policy, *reference)):
        loss, cause = math.nan, "weights or pictures overflow in this --dtype, or hold NaN"
    return Check("loss at step 0 is ln 2", loss - math.log(2) < 0.05, f"{loss:.4f}", cause)


def _check_image_matters(trainer: PairTrainer, batch: dict[str, Any]) -> Check:
    before, after = token_logps(trainer, batch), token_logps(trainer, other_pixels(batch))
    moved = _max_difference(after, before)
    return Check(
        "another image changes the log-probs",
        moved > 1e-6,
        f"by up to {moved:.2g} per token",
        "pixels do not reach the language model: look at the chat template's image tokens with "
        "vlmdpo prepare",
    )


def _check_answers_end(trainer: PairTrainer, batch: dict[str, Any]) -> Check:
    tokenizer = trainer.processing_class.tokenizer
    configured = families.unwrap_peft(trainer.model).generation_config.eos_token_id
    end_tokens = {
        tokenizer.eos_token_id,
        *tokenizer.all_special_ids,
        *(configured if isinstance(configured, list) else [configured]),
    }
    answers = [
        ids[mask.bool()]
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    without_end = sum(not end_tokens.intersection(answer[-3:].tolist()) for answer in answers)
    return Check(
        "answers end in an end token",
        without_end == 0,
        f"{len(answers) - without_end} of {len(answers)}",
        "the chat template does not close the assistant's turn: the tuned model will not learn to "
        "stop",
    )


def _check_no_empty_answer(batch: dict[str, Any]) -> Check:
    lengths = batch["completion_mask"].sum(dim=1)
    return Check(
        "no answer is empty",
        bool((lengths > 0).all()),
        f"{int(lengths.min())} to {int(lengths.max())} tokens",
        "--max-length leaves no room, or the chat template drops the answer",
    )


def _check_image_tokens(trainer: PairTrainer, batch: dict[str, Any]) -> Check:
    name = "image tokens match image features"
    cause = "--max-length cut image tokens, or processor and model are of different versions"
    ids = batch.get("pair_ids", batch["input_ids"])
    image_token = image_token_id(families.unwrap_peft(trainer.model).config)
    try:
        token_logps(trainer, batch)
    except ValueError as problem:  # transformers compares the two in its forward pass
        return Check(name, False, str(problem).splitlines()[0], cause)
    if image_token is None:
        return Check(name, True, "the model takes them; its configuration names no image token")
    count = int((ids == image_token).sum())
    return Check(name, count > 0, f"{count} tokens", cause)


def _check_trainable(model: VisionLanguageModel) -> Check:
    counts = dict.fromkeys(families.PARTS, 0)
    for part, _, parameter in families.parameters_by_part(model):
        counts[part] += families.parameter_numel(parameter) if parameter.requires_grad else 0
    trainable = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
    return Check(
        "trainable parameters",
        bool(trainable),
        trainable or "none",
        "no layer matches both --lora-scope and --lora-target-modules",
    )


def check_saved_adapter(trainer: PairTrainer, example: dict[str, Any], folder: Path) -> Check:
    """Does the adapter saved in `folder` give the live one's log-probs?

    It is loaded beside the live adapter, then removed.
    """
    batch = trainer.pair_collator([dict(example)])
    live = token_logps(trainer, batch)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.load_adapter(str(folder), "saved")
    try:
        model.set_adapter("saved")
        saved = token_logps(trainer, batch)
    finally:
        model.set_adapter("default")
        model.delete_adapter("saved")
    difference = _max_difference(live, saved)
    return Check(
        "the saved adapter equals the live one",
        difference < 1e-3,
        f"they differ by {difference:.1e} per token",
        "weights were not saved, or PEFT loads them under other names",
    )


def check_saved_files(
    trainer: PairTrainer, weights: dict[str, Tensor], folder: Path, *, adapter: bool
) -> Check:
    """Are the tensors in the saved files bitwise equal to the gathered weights?"""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    live = weights
    if adapter:
        model = trainer.accelerator.unwrap_model(trainer.model)
        live = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    saved = {
        name: value
        for path in folder.glob("*.safetensors")
        for name, value in load_file(path).items()
    }
    differing = [
        name
        for name, value in saved.items()
        if name not in live or not torch.equal(value, live[name].cpu())
    ]
    is_complete = bool(saved) and (len(saved) == len(live) or not adapter)
    seen = f"{len(saved) - len(differing)} of {len(saved)} tensors, {len(live)} live"
    return _saved_weights_check(is_complete and not differing, seen, differing)


def check_saved_model(live: VisionLanguageModel, saved: VisionLanguageModel) -> Check:
    """Are the weights of the saved model, loaded again, bitwise equal to the live ones?"""
    saved_weights = saved.state_dict()
    differing = [
        name
        for name, value in live.state_dict().items()
        if not torch.equal(value.cpu(), saved_weights[name].to(value.dtype).cpu())
    ]
    seen = f"{len(saved_weights) - len(differing)} of {len(saved_weights)} tensors"
    return _saved_weights_check(not differing, seen, differing)


def _saved_weights_check(passed: bool, seen: str, differing: list[str]) -> Check:
    first = differing[0] if differing else "none"
    return Check("the saved weights equal the live ones", passed, seen, f"first to differ: {first}")
