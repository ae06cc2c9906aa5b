"""Checks on the real model and the real data before a run is paid for: is the engine exact, is the
setup sane?

The engine's self-check compares with stock rows, and with engines broken on purpose: it must agree
with stock ten times better than they do, so that neither rounding in bfloat16 fails it nor an error
hides in it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import use_adapter

from vlmdpo.engine.batch_context import BATCH_CONTEXT
from vlmdpo.engine.collate import PairCollator
from vlmdpo.engine.pair_layout import PairLayout, Span
from vlmdpo.engine.stock_collator import StockCollator
from vlmdpo.models import families
from vlmdpo.training.trainer import PairTrainer

_MARGIN = 10.0


@dataclass(frozen=True)
class Check:
    """One finding: what was checked, whether it holds (None: nothing to hold), what was seen, and
    the likely cause.
    """

    name: str
    passed: bool | None
    seen: str
    cause: str = ""


class _Leaking(PairLayout):
    """Broken on purpose: the rejected answer sees the chosen one."""

    def seen_by_rejected(self, span: Span, device: torch.device) -> Tensor:
        return torch.ones(span.length, dtype=torch.bool, device=device)


class _Shifted(PairLayout):
    """Broken on purpose: the rejected answer's positions go on where the chosen one's end."""

    def from_rows(self, rows: Tensor) -> Tensor:
        found = super().from_rows(rows).clone()
        for span in self.spans:
            start = span.start + span.prefix + span.chosen
            found[..., start : start + span.rejected] += span.chosen
        return found


@torch.no_grad()
def token_logps(
    trainer: PairTrainer, batch: dict[str, Any], *, reference: bool = False
) -> list[Tensor]:
    """Log-probs of each answer's tokens, chosen rows first, under the policy (or, with `reference`,
    without adapter).
    """
    inputs = dict(trainer._prepare_inputs(batch))
    inputs.pop("row", None)
    labels = inputs["input_ids"].masked_fill(inputs.pop("completion_mask") == 0, -100)
    with (
        _evaluating(trainer.model),
        trainer.accelerator.autocast(),
        _adapter(trainer, off=reference),
    ):
        found = trainer.model(
            **inputs, labels=labels, use_cache=False, fused_lm_head=True
        ).log_probs
    return [row[label[1:] != -100].float().cpu() for row, label in zip(found, labels, strict=True)]


def _adapter(trainer: PairTrainer, *, off: bool) -> Any:
    if not (off and hasattr(trainer.model, "peft_config")):
        return contextlib.nullcontext()
    return use_adapter(trainer.accelerator.unwrap_model(trainer.model), adapter_name=None)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def self_check(trainer: PairTrainer, example: dict[str, Any]) -> Check:
    """Does the shared forward say what two stock rows would, for this pair? See the module's
    docstring.
    """
    processor = trainer.processing_class
    pair = PairCollator(processor)
    shared = trainer.shared_forwards[0]

    def error(batch: dict[str, Any], expected: list[Tensor]) -> float:
        found = token_logps(trainer, batch)
        return sum((f - e).abs().mean().item() for f, e in zip(found, expected, strict=True)) / len(
            found
        )

    stock = token_logps(trainer, stock_batch(processor, example))
    found = error(pair([dict(example)]), stock)
    broken = {}
    for name, layout in (("leaking mask", _Leaking), ("shifted positions", _Shifted)):
        batch = pair([dict(example)])
        batch[BATCH_CONTEXT] = shared.new_batch(layout_class=layout)
        broken[name] = error(batch, stock)
    if example.get("images"):
        broken["other image"] = error(other_image(pair([dict(example)])), stock)
    turned = token_logps(trainer, _reversed_answer(pair([dict(example)])))
    moved = (turned[1] - token_logps(trainer, pair([dict(example)]))[1]).abs().mean().item()
    least = min(broken.values())
    passed = math.isfinite(found) and max(found, moved) * _MARGIN <= least
    seen = f"agrees with stock rows to {found:.1e} a token ({', '.join(f'{k} {v:.1e}' for k, v in broken.items())})"
    return Check(
        "shared forward",
        passed,
        seen,
        f"it differs from stock rows by {max(found, moved):.1e} a token",
    )


def rows_check(trainer: PairTrainer, example: dict[str, Any]) -> Check:
    """Do rows with each image encoded once say what stock rows do? Measured against another image's
    effect.
    """
    rows = PairCollator(trainer.processing_class, share=False)
    stock = token_logps(trainer, stock_batch(trainer.processing_class, example))

    def error(batch: dict[str, Any]) -> float:
        return max(
            (f - e).abs().mean().item()
            for f, e in zip(token_logps(trainer, batch), stock, strict=True)
        )

    found = error(rows([dict(example)]))
    other = error(other_image(rows([dict(example)]))) if example.get("images") else math.inf
    seen = f"agree with stock rows to {found:.1e} a token (other image {other:.1e})"
    return Check(
        "rows with images once",
        found * _MARGIN <= other,
        seen,
        f"they differ from stock rows by {found:.1e} a token",
    )


def stock_batch(processor: Any, example: dict[str, Any]) -> dict[str, Any]:
    """One pair as stock TRL lays it out: two rows, everything twice."""
    if (
        families.own_chat_template(processor) is not None
    ):  # stock's collator cannot make PaliGemma's rows
        batch = PairCollator(processor, share=False)([dict(example)])
        copies = batch.pop("image_copies")
        return {**batch, "pixel_values": batch["pixel_values"].repeat(copies, 1, 1, 1)}
    return StockCollator(processor)([dict(example)])


def other_image(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with other pictures of the same size: upside down, and negative."""
    pixels = batch["pixel_values"]
    return {**batch, "pixel_values": -pixels.flip(0 if pixels.ndim == 2 else -2)}


def _reversed_answer(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch of one pair with its chosen answer back to front; all else stays where it is."""
    prompt, chosen, _ = batch["pairs"][0]
    ids, row = batch["pair_ids"].clone(), batch["input_ids"].clone()
    ids[0, prompt : prompt + chosen] = ids[0, prompt : prompt + chosen].flip(0)
    row[0, 1 : 1 + chosen] = row[0, 1 : 1 + chosen].flip(0)
    return {**batch, "pair_ids": ids, "input_ids": row}


def checkup(trainer: PairTrainer, examples: list[dict[str, Any]]) -> list[Check]:
    """What must hold before a run: see each check's name. `examples` are a few rows of the dataset."""
    collate = trainer.pair_collator
    batch, first = collate([dict(example) for example in examples]), collate([dict(examples[0])])
    return [
        _loss_at_start(trainer, batch),
        *([_image_matters(trainer, first)] if examples[0].get("images") else []),
        _answers_end(trainer, batch),
        _no_empty_answer(batch),
        *([_image_tokens(trainer, batch)] if "pixel_values" in batch else []),
        _trainable(trainer.model),
    ]


def _loss_at_start(trainer: PairTrainer, batch: dict[str, Any]) -> Check:
    policy, reference = token_logps(trainer, batch), token_logps(trainer, batch, reference=True)
    apart = max((p.sum() - r.sum()).abs().item() for p, r in zip(policy, reference, strict=True))
    loss = math.log1p(math.exp(min(trainer.beta * 2 * apart, 50.0)))
    cause = "the adapter does not start at zero, or dropout is on"
    return Check("loss at step 0 is ln 2", loss - math.log(2) < 0.05, f"{loss:.4f}", cause)


def _image_matters(trainer: PairTrainer, batch: dict[str, Any]) -> Check:
    before, after = token_logps(trainer, batch), token_logps(trainer, other_image(batch))
    moved = max((a - b).abs().max().item() for a, b in zip(after, before, strict=True))
    cause = "pixels do not reach the language model: look at the chat template's image tokens with vlmdpo prepare"
    return Check(
        "another image changes the log-probs", moved > 1e-6, f"by up to {moved:.2g} a token", cause
    )


def _answers_end(trainer: PairTrainer, batch: dict[str, Any]) -> Check:
    tokenizer = trainer.processing_class.tokenizer
    told = families.base_of(trainer.model).generation_config.eos_token_id
    ends = {
        tokenizer.eos_token_id,
        *tokenizer.all_special_ids,
        *(told if isinstance(told, list) else [told]),
    }
    answers = [
        ids[mask.bool()]
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    without = sum(not ends.intersection(answer[-3:].tolist()) for answer in answers)
    cause = "the chat template does not close the assistant's turn: the tuned model will not learn to stop"
    return Check(
        "answers end in an end token",
        without == 0,
        f"{len(answers) - without} of {len(answers)}",
        cause,
    )


def _no_empty_answer(batch: dict[str, Any]) -> Check:
    lengths = batch["completion_mask"].sum(dim=1)
    cause = "--max-length leaves no room, or the chat template drops the answer"
    return Check(
        "no answer is empty",
        bool((lengths > 0).all()),
        f"{int(lengths.min())} to {int(lengths.max())} tokens",
        cause,
    )


def _image_tokens(trainer: PairTrainer, batch: dict[str, Any]) -> Check:
    base = families.base_of(trainer.model)
    ids = batch.get("pair_ids", batch["input_ids"])
    tokens = int((ids == base.config.image_token_id).sum())
    cause = "--max-length cut image tokens, or processor and model are of different versions"
    try:
        token_logps(trainer, batch)
    except ValueError as problem:
        return Check(
            "image tokens match image features", False, str(problem).splitlines()[0], cause
        )
    return Check("image tokens match image features", tokens > 0, f"{tokens} tokens", cause)


def _trainable(model: Any) -> Check:
    counts = dict.fromkeys(families.PARTS, 0)
    for part, _, parameter in families.parts(model):
        counts[part] += families.size_of(parameter) if parameter.requires_grad else 0
    seen = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
    return Check(
        "trainable parameters",
        bool(seen),
        seen or "none",
        "no layer is in --lora-scope and --lora-target-modules",
    )


def adapter_check(trainer: PairTrainer, example: dict[str, Any], folder: Path) -> Check:
    """Does the adapter just saved in `folder` say what the live one says? It is loaded beside it,
    then removed.
    """
    batch = trainer.pair_collator([dict(example)])
    live = token_logps(trainer, batch)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.load_adapter(str(folder), "saved")
    try:
        model.set_adapter("saved")
        again = token_logps(trainer, batch)
    finally:
        model.set_adapter("default")
        model.delete_adapter("saved")
    apart = max((a - b).abs().max().item() for a, b in zip(live, again, strict=True))
    cause = "weights were not saved, or PEFT loads them under other names"
    return Check(
        "the saved adapter says what the live one says",
        apart < 1e-3,
        f"apart {apart:.1e} a token",
        cause,
    )


def files_check(
    trainer: PairTrainer, weights: dict[str, Any], folder: Path, *, adapter: bool
) -> Check:
    """Are the tensors in the saved files, to the bit, the weights that were brought together from
    all processes?
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    model = trainer.accelerator.unwrap_model(trainer.model)
    live = (
        get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
        if adapter
        else weights
    )
    saved = {
        name: value
        for path in folder.glob("*.safetensors")
        for name, value in load_file(path).items()
    }
    differ = [
        name
        for name, value in saved.items()
        if name not in live or not torch.equal(value, live[name].cpu())
    ]
    passed = bool(saved) and not differ and (len(saved) == len(live) or not adapter)
    seen = f"{len(saved) - len(differ)} of {len(saved)} tensors, {len(live)} live"
    return Check(
        "the saved weights are the live ones",
        passed,
        seen,
        f"first that differs: {(differ or ['none'])[0]}",
    )


def weights_check(live: Any, saved: Any) -> Check:
    """Are the saved model's weights, loaded anew, the live ones to the bit?"""
    kept = saved.state_dict()
    differ = [
        name
        for name, value in live.state_dict().items()
        if not torch.equal(value.cpu(), kept[name].to(value.dtype).cpu())
    ]
    seen = f"{len(kept) - len(differ)} of {len(kept)} tensors"
    return Check(
        "the saved weights are the live ones",
        not differ,
        seen,
        f"first that differs: {(differ or ['none'])[0]}",
    )
