"""Simulated steps of one call of `estimate-memory`, at any batch size.

Imports torch only inside functions, so that importing the command stays fast.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmdpo import ui
from vlmdpo.config import EstimateMemoryConfig, TrainConfig, set_key
from vlmdpo.data import store

if TYPE_CHECKING:
    from datasets import Dataset

    from vlmdpo.training.simulate import SimulatedPeak

# Options with the same name and meaning in `vlmdpo train`.
TRAIN_OPTIONS = (
    *("model", "revision", "trust_remote_code", "image_splitting", "lora", "lora_r", "lora_scope"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    *("engine", "reference_cache", "optim", "set"),
)
# Fields of --set that say how a device works, which a simulated step has not.
_OF_THE_DEVICE = ("activation_offloading", "fp16", "tf32")


class StepSimulator:
    """Simulates training steps of these settings at any batch size."""

    def __init__(self, config: EstimateMemoryConfig) -> None:
        import torch

        from vlmdpo.memory import architecture as arch
        from vlmdpo.models.image_limits import default_image_side

        self.config, self.dtype = config, getattr(torch, config.dtype)
        self._set = tuple(one for one in config.set if set_key(one) not in _OF_THE_DEVICE)
        if left := [one for one in config.set if one not in self._set]:
            ui.say(f"--set {', '.join(left)}: the estimate is of a step without it")
        self._choice: tuple[str, str | None] | None = None  # the engine, and why it is that one
        origin: dict[str, Any] = {
            "revision": config.revision,
            "trust_remote_code": config.trust_remote_code,
        }
        if config.dataset is None:
            self.architecture = arch.load_architecture(config.model, **origin)
            self.image = image_size(config, default_image_side(self.architecture.processor))
            self._take_synthetic_rows()
        else:
            self.architecture = arch.load_architecture_from_files(config.model, **origin)
            self._take_rows_of(Path(config.dataset))
        if hasattr(self.architecture.processor.image_processor, "do_image_splitting"):
            self.architecture.processor.image_processor.do_image_splitting = config.image_splitting

    def _take_synthetic_rows(self) -> None:
        from vlmdpo.training.synthetic_rows import Workload, synthetic_rows

        config, answer = self.config, self.config.answer_tokens
        self.pairs_per_prompt: float = config.pairs_per_prompt or 1
        work = Workload(
            self.image,
            config.images,
            config.prompt_tokens,
            *(answer, answer),
            pairs_per_prompt=config.pairs_per_prompt or 1,
        )
        self._batches: Callable[[int, str], list[Dataset]] = lambda pairs, _: [
            synthetic_rows(self.architecture.processor, work, pairs)
        ]

    def _take_rows_of(self, folder: Path) -> None:
        """Let batches be the largest that training can have of these rows.

        Raises DataError if there is none.
        """
        from vlmdpo.engine.lengths import row_lengths
        from vlmdpo.memory import architecture as arch
        from vlmdpo.models.families import has_bidirectional_prompt, unwrap_peft
        from vlmdpo.training.worst_batch import WorstBatches

        config, rows = self.config, store.load(folder)
        lengths = row_lengths(self.architecture.processor, rows, store.read_manifest(folder))
        per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
        grouped = config.pairs_per_prompt is None
        model = arch.build_on_meta(self.architecture.config)
        worst = WorstBatches(
            *(rows, lengths, per_step * config.num_gpus),
            grouped=grouped,
            share_images=not has_bidirectional_prompt(unwrap_peft(model).base_model),
        )
        self.pairs_per_prompt = round(worst.pairs_per_prompt, 2) if grouped else 1
        self._batches = lambda pairs, engine: [
            rows.select(batch) for batch in worst.of_size(pairs, shared=engine == "shared")
        ]
        images = self._batches(1, config.engine)[0][0]["images"]
        self.image = images[0].size if images else (0, 0)

    def at_batch(self, pairs: int) -> SimulatedPeak:
        """The simulated step with this many pairs per device: of the batch that needs the most."""
        engine = self._choice[0] if self._choice else self.config.engine
        peak = max((self._simulate(rows) for rows in self._batches(pairs, engine)), key=_peak)
        if peak.engine != engine and self.config.dataset:  # other batches are its largest
            rows_of = self._batches(pairs, peak.engine)
            peak = max((self._simulate(rows) for rows in rows_of), key=_peak)
        return peak

    def _simulate(self, rows: Dataset) -> SimulatedPeak:
        from vlmdpo.training import simulate

        settings = {name: getattr(self.config, name) for name in TRAIN_OPTIONS}
        settings |= {"per_device_train_batch_size": len(rows), "bf16": True, "set": self._set}
        # An 8-bit optimizer could not be made without its package: AdamW stands in for it, and
        # `_static_difference` makes its states smaller.
        if settings["optim"] == "auto" or "8bit" in settings["optim"]:
            settings["optim"] = "adamw_torch_fused"
        with simulate.cuda_rules():
            peak = simulate.estimate_peak(
                self.architecture,
                TrainConfig(**settings),
                rows,
                dtype=self.dtype,
                choice=self._choice,
            )
        self._choice = peak.engine, peak.fallback_reason
        return peak


def _peak(step: SimulatedPeak) -> float:
    return step.peak


def image_size(config: EstimateMemoryConfig, limit: int | None) -> tuple[int, int]:
    """(width, height) in pixels: as given, or what `prepare` leaves of a 4:3 photograph."""
    if config.image_size is None:
        side = limit or 1024
        return side, round(side * 3 / 4)
    width, _, height = config.image_size.partition("x")
    return int(width), int(height or width)
