"""What checks and choices need of a trainer, so that the trainer itself can call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vlmdpo.engine.forward import SharedForward


class EngineTrainer(Protocol):
    """A trainer whose engine can be checked and changed; `trainer.PairTrainer` is one.

    Attributes:
        engine: "shared", "rows" or "stock".
        is_mdpo: whether only the shared engine can compute its loss.
        pair_collator: makes a batch of rows for the engine.
    """

    model: Any
    ref_model: Any
    args: Any
    accelerator: Any
    processing_class: Any
    beta: float
    engine: str
    is_mdpo: bool
    pair_collator: Any

    @property
    def shared_forwards(self) -> Sequence[SharedForward]: ...
    def use_engine(self, engine: str) -> None: ...
    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]: ...


class DropInTrainer(EngineTrainer, Protocol):
    """A trainer that chooses its engine itself; see `drop_in`."""

    train_dataset: Any
    fallback_reason: str | None
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    _is_vision_dataset: bool


class EngineSetup(Protocol):
    """A run whose engine is being decided; `setup.TrainingSetup` is one.

    Attributes:
        fallback_reason: why the engine is not the one asked for; None if it is.
    """

    fallback_reason: str | None

    @property
    def trainer(self) -> EngineTrainer: ...
    def related_examples(self) -> list[dict[str, Any]]: ...
