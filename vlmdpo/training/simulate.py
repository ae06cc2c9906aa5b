"""The peak memory of a training step, foreseen: the trainer's own step at real size, without its
floating-point numbers.

A step is simulated in the phases it has: forward (policy and reference), backward, optimizer. Three
runs of shallow copies give each phase's peak as a line in language and in vision layers, from which
the whole model's follows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from vlmdpo.config import TrainConfig
from vlmdpo.data import store
from vlmdpo.data.pairs import message
from vlmdpo.engine.lengths import row_lengths
from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.memory.architecture import Architecture, count_layers, make_shallow
from vlmdpo.memory.fake_tensors import SimulationMode, hide_fake_tensors
from vlmdpo.memory.measure import AllocationLedger
from vlmdpo.training import activation_checkpointing
from vlmdpo.training.arguments import dpo_config, lora_config
from vlmdpo.training.trainer import PairTrainer, make_trainer

_SHALLOW = (
    (3, 3),
    (4, 3),
    (3, 4),
)  # (language, vision) layers of the three runs; Qwen3-VL injects three of vision


@dataclass(frozen=True)
class Workload:
    """The rows of a batch: pictures in pixels, and tokens of question and answers, as the longest
    rows have them.
    """

    image: tuple[int, int]
    images: int
    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class SimulatedPeak:
    """Bytes that live: `static`, weights and buffers before the step, and the peak of each phase,
    static included.
    """

    static: float
    phases: dict[str, float]

    @property
    def peak(self) -> float:
        return max(self.static, *self.phases.values())


def estimate_peak(
    architecture: Architecture, config: TrainConfig, rows: Dataset, *, dtype: torch.dtype
) -> SimulatedPeak:
    """The step's memory on the whole model, from shallow copies where it is deep.

    Args:
        architecture: configuration at real size, and processor.
        config: as `vlmdpo train` would have it; its device is not used.
        rows: the batch.
        dtype: of the base weights.
    """
    text, vision = count_layers(architecture.config)
    (t0, v0), (t1, _), (_, v1) = _SHALLOW
    if text <= t1 and vision <= v1:
        return simulate(architecture, config, rows, dtype=dtype)
    runs = []
    for t, v in _SHALLOW:
        cut = dataclasses.replace(architecture, config=make_shallow(architecture.config, t, v))
        runs.append(simulate(cut, config, rows, dtype=dtype))

    def whole(base: float, deeper_text: float, deeper_vision: float) -> float:
        return (
            base
            + (deeper_text - base) / (t1 - t0) * (text - t0)
            + (deeper_vision - base) / (v1 - v0) * (vision - v0)
        )

    phases = {name: whole(*(run.phases[name] for run in runs)) for name in runs[0].phases}
    return SimulatedPeak(whole(*(run.static for run in runs)), phases)


def simulate(
    architecture: Architecture, config: TrainConfig, rows: Dataset, *, dtype: torch.dtype
) -> SimulatedPeak:
    """One steady step (optimizer states are there; with accumulation, gradients too) of exactly
    this architecture.
    """
    building = SimulationMode(small_constant=0)
    with tempfile.TemporaryDirectory() as name, _quick(building):
        trainer = _trainer(architecture, config, rows, Path(name), dtype)
    ledger = AllocationLedger()
    kept = [*trainer.model.parameters(), *trainer.model.buffers()]
    if trainer.ref_model is not None:
        kept += [*trainer.ref_model.parameters(), *trainer.ref_model.buffers()]
    for tensor in kept:
        ledger.add(tensor.untyped_storage())
    static = ledger.current_bytes
    with hide_fake_tensors(), SimulationMode(ledger=ledger, fake_mode=building.fake_mode):
        return SimulatedPeak(static, _phases(trainer, config, ledger))


def _phases(
    trainer: PairTrainer, config: TrainConfig, ledger: AllocationLedger
) -> dict[str, float]:
    phases: dict[str, float] = {}

    def ends(phase: str) -> None:
        phases[phase] = ledger.peak_bytes
        ledger.reset_peak()

    with _unmoved():
        model = trainer.accelerator.prepare_model(trainer.model)  # autocast, where it is on
    trainer.create_optimizer()
    if config.gradient_checkpointing:
        activation_checkpointing.enable(model)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _give_states(trainer.optimizer, trained)  # they are there from the second step on
    if config.gradient_accumulation_steps > 1:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    batch = trainer._prepare_inputs(
        trainer.data_collator([dict(row) for row in trainer.train_dataset])
    )
    ledger.reset_peak()
    models = [one for one in (model, trainer.ref_model) if one is not None]
    hooks = [
        one.register_forward_hook(lambda *_: ends(f"forward {len(phases) + 1}")) for one in models
    ]
    loss = trainer.compute_loss(model, batch)
    ends("loss")
    for hook in hooks:
        hook.remove()
    del batch
    loss.backward()
    ends("backward")
    torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    ends("optimizer")
    return phases


def _give_states(optimizer: Any, trained: list[torch.nn.Parameter]) -> None:
    """What an optimizer holds after its first step; AdamW's is known, of others a step is taken."""
    if type(optimizer) is torch.optim.AdamW and not optimizer.defaults["amsgrad"]:
        for parameter in trained:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
        return
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def gpu_loss_head() -> Any:
    """Inside, TRL's head scores the answers' tokens only, as it does where Triton is; on a CPU it
    scores every token.
    """
    return mock.patch("trl.trainer.utils._use_triton", return_value=True)


@contextlib.contextmanager
def _quick(shadow: SimulationMode) -> Iterator[None]:
    """Models are made without numbers: initial values are not computed, and nothing is moved to a
    device or data type.
    """
    with no_init_weights(), _unmoved(), shadow:
        yield


def _unmoved() -> Any:
    """Inside, modules stay on their device and in their data type: fake tensors cannot be swapped."""
    return mock.patch.object(torch.nn.Module, "to", lambda self, *a, **k: self)


def _trainer(
    architecture: Architecture, config: TrainConfig, rows: Dataset, folder: Path, dtype: torch.dtype
) -> PairTrainer:
    config = dataclasses.replace(config, device="cpu")

    def model() -> Any:
        made = AutoModelForImageTextToText.from_config(architecture.config, dtype=dtype)
        made.tie_weights()
        return made

    policy = model()
    cached = config.reference_cache
    # Full fine-tuning fills its cache before the first step, LoRA in the first epoch, which is the
    # one that peaks.
    references = (
        _Foreseen(folder, "foreseen", len(rows), filled=not config.lora) if cached else None
    )
    trainer = make_trainer(
        engine=config.engine,
        model=policy,
        reference=None if config.lora or cached else model(),
        processor=architecture.processor,
        dataset=rows,
        args=dpo_config(config, folder, torch.device("cpu")),
        lora=lora_config(config, policy),
        references=references,
    )
    trainer.has_real_values = False
    return trainer


class _Foreseen(ReferenceCache):
    """A cache that holds everything, or nothing yet and keeps nothing."""

    def __init__(self, folder: Path, key: str, rows: int, *, filled: bool) -> None:
        super().__init__(folder, key, rows)
        self._filled = filled

    def get(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Any numbers, as many as rows."""
        return (
            (torch.full((len(rows),), -1.0), torch.full((len(rows),), -2.0))
            if self._filled
            else None
        )

    def put(self, rows: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        """Numbers that are none are not kept."""


def longest_rows(processor: Any, folder: Path, count: int = 64) -> Dataset:
    """The longest rows of a prepared dataset, longest first. Raises DataError where there is none."""
    dataset = store.load(folder)
    lengths = sorted(
        row_lengths(processor, dataset, store.read_manifest(folder)),
        key=lambda length: -length.longest,
    )
    return dataset.select([length.row for length in lengths[:count]])


def synthetic_rows(processor: Any, workload: Workload, count: int) -> Dataset:
    """Rows with gray pictures and as many tokens as the workload says; a template's own tokens come
    on top.
    """
    tokenizer = processor.tokenizer

    def words(tokens: int) -> str:
        per_word = len(tokenizer(" a" * 64, add_special_tokens=False)["input_ids"]) / 64
        return ("a " * max(1, round(tokens / per_word))).strip()

    row = {
        "images": [Image.new("RGB", workload.image, "gray") for _ in range(workload.images)],
        "prompt": [message("user", words(workload.prompt), workload.images)],
        "chosen": [message("assistant", words(workload.chosen))],
        "rejected": [message("assistant", words(workload.rejected))],
    }
    return Dataset.from_list([row] * count, features=store.pair_features())
