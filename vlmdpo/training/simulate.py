"""The peak memory of a training step, simulated without its floating-point numbers.

It is the trainer's own step at real size, on tensors without storage, in its phases: forward
(policy and reference), backward (language model, then vision tower), optimizer. Three runs of
shallow copies give each phase's peak as a line in language and in vision layers, from which the
whole model's follows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from transformers import AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from vlmdpo.config import TrainConfig
from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.errors import ModelError
from vlmdpo.memory.architecture import (
    Architecture,
    build_on_meta,
    count_layers,
    make_shallow,
)
from vlmdpo.memory.cuda_autocast import cuda_autocast_rules
from vlmdpo.memory.fake_tensors import SimulationMode, hide_fake_tensors, without_tracebacks
from vlmdpo.memory.measure import AllocationLedger
from vlmdpo.models.families import unwrap_peft
from vlmdpo.training import activation_checkpointing
from vlmdpo.training.arguments import dpo_config, lora_config
from vlmdpo.training.engine_choice import (
    SIMPLER,
    choose_engine,
    join_reasons,
    reason_to_fall_back,
)
from vlmdpo.training.make_trainer import make_trainer
from vlmdpo.training.run_trainer import RunTrainer
from vlmdpo.training.set_fields import extra_fields

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from vlmdpo.models.protocols import VisionLanguageModel

# (language, vision) layers of the three runs. Qwen3-VL has three vision layers of another kind, so
# with only three there would be none of the kind that is multiplied.
_SHALLOW = ((3, 4), (4, 4), (3, 5))


@dataclass(frozen=True)
class SimulatedPeak:
    """Live bytes.

    Attributes:
        static: weights and buffers, before the step.
        phases: the peak in each phase of a step, `static` included.
        engine: what ran the step.
        fallback_reason: why it is not the engine asked for; None if it is.
    """

    static: float
    phases: dict[str, float]
    engine: str = "shared"
    fallback_reason: str | None = None

    @property
    def peak(self) -> float:
        return max(self.static, *self.phases.values())


def estimate_peak(
    architecture: Architecture,
    config: TrainConfig,
    rows: Dataset,
    *,
    dtype: torch.dtype,
    choice: tuple[str, str | None] | None = None,
) -> SimulatedPeak:
    """The step's memory on the whole model, extrapolated from shallow copies if it is deep.

    The engine is chosen as `vlmdpo train` chooses it: if a step cannot be simulated, the next
    simpler one runs it.

    Args:
        architecture: configuration at real size, and processor.
        config: options of `vlmdpo train`; its device is not used.
        rows: the batch.
        dtype: of the base weights.
        choice: engine and reason of an earlier estimate of this architecture.

    Raises ModelError if no engine's step can be simulated.
    """
    if choice is None:
        extra = extra_fields(config.set, (), is_shared=config.engine != "stock")
        choice = choose_engine(
            config.engine,
            build_on_meta(architecture.config),
            router_loss=extra.get("router_aux_loss_coef"),
        )
    engine, reason = choice
    reasons = [reason] if reason else []
    while True:
        try:
            with without_tracebacks():
                peak = _estimate_peak(architecture, config, rows, dtype, engine)
            return dataclasses.replace(peak, engine=engine, fallback_reason=join_reasons(reasons))
        except Exception as problem:
            reason = reason_to_fall_back(problem, "while a step was simulated")
            if engine == "stock":
                raise ModelError(f"no step of this model can be simulated: {reason}") from problem
            reasons.append(reason)
            engine = SIMPLER[engine]


def _estimate_peak(
    architecture: Architecture, config: TrainConfig, rows: Dataset, dtype: torch.dtype, engine: str
) -> SimulatedPeak:
    """`estimate_peak` with this engine."""
    language, vision = count_layers(architecture.config)
    (language_0, vision_0), (language_1, _), (_, vision_1) = _SHALLOW
    if language <= language_1 and vision <= vision_1:
        return simulate(architecture, config, rows, dtype=dtype, engine=engine)
    runs = []
    for layers in _SHALLOW:
        shallow = make_shallow(architecture.config, *layers)
        shallow_architecture = dataclasses.replace(architecture, config=shallow)
        runs.append(simulate(shallow_architecture, config, rows, dtype=dtype, engine=engine))

    def extrapolate(base: float, deeper_language: float, deeper_vision: float) -> float:
        return (
            base
            + (deeper_language - base) / (language_1 - language_0) * (language - language_0)
            + (deeper_vision - base) / (vision_1 - vision_0) * (vision - vision_0)
        )

    phases = {name: extrapolate(*(run.phases[name] for run in runs)) for name in runs[0].phases}
    return SimulatedPeak(extrapolate(*(run.static for run in runs)), phases)


def simulate(
    architecture: Architecture,
    config: TrainConfig,
    rows: Dataset,
    *,
    dtype: torch.dtype,
    engine: str | None = None,
) -> SimulatedPeak:
    """One step in the steady state, of exactly this architecture.

    Optimizer states exist and, with accumulation, gradients too.

    Args:
        engine: in place of the one in `config`.
    """
    engine = engine or config.engine
    building = SimulationMode(small_constant=0)
    with tempfile.TemporaryDirectory() as name, _build_fake(building):
        trainer = _make_fake_trainer(architecture, config, rows, Path(name), dtype, engine)
    ledger = AllocationLedger()
    weights = [*trainer.model.parameters(), *trainer.model.buffers()]
    if trainer.ref_model is not None:
        weights += [*trainer.ref_model.parameters(), *trainer.ref_model.buffers()]
    for tensor in weights:
        ledger.add(tensor.untyped_storage())
    static = ledger.current_bytes
    batches = [trainer.data_collator([*map(dict, trainer.train_dataset)])]  # pixels are real
    with hide_fake_tensors(), SimulationMode(ledger=ledger, fake_mode=building.fake_mode):
        return SimulatedPeak(static, _phase_peaks(trainer, config, ledger, batches), engine)


def _phase_peaks(
    trainer: RunTrainer, config: TrainConfig, ledger: AllocationLedger, batches: list[Any]
) -> dict[str, float]:
    phases: dict[str, float] = {}

    def end_phase(phase: str) -> None:
        phases[phase] = ledger.peak_bytes
        ledger.reset_peak()

    with _keep_device_and_dtype():
        model = trainer.accelerator.prepare_model(trainer.model)  # autocast, where it is on
    trainer.create_optimizer()
    if config.gradient_checkpointing:
        activation_checkpointing.enable(model)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _fill_optimizer_state(trainer.optimizer, trained)
    if config.gradient_accumulation_steps > 1:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    batch = trainer._prepare_inputs(batches.pop())
    for tensor in filter(torch.is_tensor, batch.values()):
        ledger.add(tensor.untyped_storage())
    ledger.reset_peak()
    boundary = _end_of_language_backward(model, lambda: end_phase("backward language"))
    models = [model] + ([trainer.ref_model] if trainer.ref_model is not None else [])
    hooks = [
        each.register_forward_hook(lambda *_: end_phase(f"forward {len(phases) + 1}"))
        for each in models
    ]
    loss = trainer.compute_loss(model, batch)
    end_phase("loss")
    for hook in (*hooks, boundary):
        hook.remove()
    del batch
    loss.backward()
    end_phase("backward")
    torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    end_phase("optimizer")
    return phases


def _end_of_language_backward(
    model: VisionLanguageModel, end: Callable[[], None]
) -> RemovableHandle:
    """Call `end` when the backward pass leaves the language model for the vision tower.

    They are phases of their own, because either can hold the peak: over both together it would not
    be a line in the number of layers, from which the whole model's is extrapolated.
    """

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        embeddings_BSH = kwargs.get("inputs_embeds")
        if embeddings_BSH is not None and embeddings_BSH.requires_grad:
            embeddings_BSH.register_hook(lambda gradient: end())

    decoder = unwrap_peft(model).base_model.get_decoder()
    return decoder.register_forward_pre_hook(watch, with_kwargs=True)


def _fill_optimizer_state(optimizer: Optimizer, trained: list[torch.nn.Parameter]) -> None:
    """Give an optimizer the state that it has after its first step.

    AdamW's is known; others take a step.
    """
    if type(optimizer) is torch.optim.AdamW and not optimizer.defaults["amsgrad"]:
        for parameter in trained:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
        return
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


@contextlib.contextmanager
def cuda_rules() -> Iterator[None]:
    """Inside, simulated steps on the CPU follow the rules of a GPU.

    TRL's head scores only the answers' tokens, where on a CPU it scores all, and its kernels write
    in place, where the CPU's stand-ins take several copies of the logits. Autocast computes norms
    in float32.
    """
    with (
        mock.patch("trl.trainer.utils._use_triton", return_value=True),
        mock.patch("trl.kernels.chunked_logprob._forward_tile", _write_in_place),
        mock.patch("trl.kernels.chunked_logprob._backward_tile", _write_in_place),
        mock.patch("trl.kernels.chunked_logprob._addmm_fp32", _write_in_place),
        cuda_autocast_rules(),
    ):
        yield


def _write_in_place(*args: Any, **kwargs: Any) -> None:
    """A kernel that changes its arguments' numbers, which fake tensors do not have."""


@contextlib.contextmanager
def _build_fake(mode: SimulationMode) -> Iterator[None]:
    """Inside, models are built from fake tensors, without computing initial values."""
    with no_init_weights(), _keep_device_and_dtype(), mode:
        yield


def _keep_device_and_dtype() -> AbstractContextManager[object]:
    """Inside, modules keep their device and data type: fake tensors cannot be replaced."""
    return mock.patch.object(torch.nn.Module, "to", lambda self, *a, **k: self)


def _make_fake_trainer(
    architecture: Architecture,
    config: TrainConfig,
    rows: Dataset,
    folder: Path,
    dtype: torch.dtype,
    engine: str,
) -> RunTrainer:
    config = dataclasses.replace(config, device="cpu")

    def build_model() -> PreTrainedModel:
        model = AutoModelForImageTextToText.from_config(architecture.config, dtype=dtype)
        model.tie_weights()
        return model

    policy = build_model()
    cache = None
    if config.reference_cache:
        # Full fine-tuning fills its cache before the first step, LoRA in the first epoch, which is
        # the one that peaks.
        cache = _FakeReferenceCache(folder, "simulated", filled=not config.lora)
    trainer = make_trainer(
        engine=engine,
        model=policy,
        reference_model=None if config.lora or cache is not None else build_model(),
        processor=architecture.processor,
        train_dataset=rows,
        args=dpo_config(config, folder, torch.device("cpu")),
        lora_config=lora_config(config, policy),
        reference_cache=cache,
    )
    trainer.has_real_values = False
    return trainer


class _FakeReferenceCache(ReferenceCache):
    """A cache that holds everything or, while it is being filled, nothing; it keeps nothing."""

    def __init__(self, folder: Path, key: str, *, filled: bool) -> None:
        super().__init__(folder, key)
        self._filled = filled

    def get(self, keys: Sequence[str]) -> torch.Tensor | None:
        """Arbitrary log-probs (R,)."""
        return torch.full((len(keys),), -1.0) if self._filled else None

    def put(self, keys: Sequence[str], logps_R: torch.Tensor) -> torch.Tensor:
        """Fake log-probs are not kept."""
        return logps_R
