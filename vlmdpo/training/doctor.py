"""Checks on the real model and data before a run is paid for; `engine_checks` has the engine's.

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

from vlmdpo import ui
from vlmdpo.models import families
from vlmdpo.models.adapters import reference_adapter, use_adapter
from vlmdpo.models.inputs import has_images, image_token_id, other_pixels, take_host_only

if TYPE_CHECKING:
    from torch import nn

    from vlmdpo.models.protocols import VisionLanguageModel
    from vlmdpo.training.protocols import EngineTrainer


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


@torch.no_grad()
def token_logps(
    trainer: EngineTrainer, batch: dict[str, Any], *, reference: bool = False
) -> list[Tensor]:
    """Log-probs (A,) of each of the 2B answers' tokens, under the policy or the reference."""
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


def _reference_mode(trainer: EngineTrainer) -> AbstractContextManager[None]:
    """Inside, the model runs with its reference's adapter or, where that has none, without one."""
    context: AbstractContextManager[None] = contextlib.nullcontext()
    if hasattr(trainer.model, "peft_config"):
        model = trainer.accelerator.unwrap_model(trainer.model)
        context = use_adapter(model, reference_adapter(model))
    return context


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _max_difference(answers: list[Tensor], others: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(answers, others, strict=True))


def check_setup(trainer: EngineTrainer, examples: list[dict[str, Any]]) -> list[Check]:
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


def _check_first_loss(trainer: EngineTrainer, batch: dict[str, Any]) -> Check:
    policy, reference = token_logps(trainer, batch), token_logps(trainer, batch, reference=True)
    largest = max((p.sum() - r.sum()).abs().item() for p, r in zip(policy, reference, strict=True))
    loss = math.log1p(math.exp(min(trainer.beta * 2 * largest, 50.0)))
    cause = "the adapter does not start as the reference does, or dropout is on"
    if not all(bool(logps.isfinite().all()) for logps in (*policy, *reference)):
        loss, cause = math.nan, "weights or pictures overflow in this --dtype, or hold NaN"
    return Check("loss at step 0 is ln 2", loss - math.log(2) < 0.05, f"{loss:.4f}", cause)


def _check_image_matters(trainer: EngineTrainer, batch: dict[str, Any]) -> Check:
    before, after = token_logps(trainer, batch), token_logps(trainer, other_pixels(batch))
    moved = _max_difference(after, before)
    return Check(
        "another image changes the log-probs",
        moved > 1e-6,
        f"by up to {moved:.2g} per token",
        "pixels do not reach the language model: look at the chat template's image tokens with "
        "vlmdpo prepare",
    )


def _check_answers_end(trainer: EngineTrainer, batch: dict[str, Any]) -> Check:
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


def _check_image_tokens(trainer: EngineTrainer, batch: dict[str, Any]) -> Check:
    name = "image tokens match image features"
    cause = "--max-length cut image tokens, or processor and model are of different versions"
    ids = batch.get("tree_ids", batch["input_ids"])
    image_token = image_token_id(families.unwrap_peft(trainer.model).config)
    try:
        token_logps(trainer, batch)
    except ValueError as problem:  # transformers compares the two in its forward pass
        return Check(name, False, str(problem).splitlines()[0], cause)
    if image_token is None:
        return Check(name, True, "the model takes them; its configuration names no image token")
    count = int((ids == image_token).sum())
    return Check(name, count > 0, ui.count(count, "token"), cause)


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


def check_saved_adapter(trainer: EngineTrainer, example: dict[str, Any], folder: Path) -> Check:
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
    trainer: EngineTrainer, weights: dict[str, Tensor], folder: Path, *, adapter: bool
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
