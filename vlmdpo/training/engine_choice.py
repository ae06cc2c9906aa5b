"""Which engine a run uses: the shared one if the model allows it and it is exact, else the next.

Whatever goes wrong while an engine is built or tried on one pair is a reason to use a simpler one,
except that memory ran out: TRL's own rows need more of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmdpo import ui
from vlmdpo.errors import (
    ConfigError,
    MemoryBudgetError,
    ModelError,
    VlmDpoError,
    is_out_of_memory,
    out_of_memory_reason,
)

if TYPE_CHECKING:
    from vlmdpo.models.protocols import VisionLanguageModel
    from vlmdpo.training.doctor import Check
    from vlmdpo.training.protocols import EngineSetup, EngineTrainer

SIMPLER = {"shared": "rows", "rows": "stock"}


def choose_engine(
    engine: str, model: VisionLanguageModel, *, router_loss: float | None = None
) -> tuple[str, str | None]:
    """(the engine to use, None or why it is not the one asked for).

    Args:
        engine: of `--engine`.
        router_loss: TRL's `router_aux_loss_coef`; None for the model's own.
    """
    reasons: list[str] = []
    while engine != "stock":
        try:
            _try_to_build(engine, model, router_loss)
            break
        except Exception as problem:  # noqa: BLE001 - said in words, and the next engine is tried
            reasons.append(reason_to_fall_back(problem, "while the engine was built"))
            engine = SIMPLER[engine]
    return engine, join_reasons(reasons)


def _try_to_build(engine: str, model: VisionLanguageModel, router_loss: float | None) -> None:
    """Wrap the model as the engine does, and unwrap it again."""
    from vlmdpo.engine.forward import SharedForward, check_pairs_shareable
    from vlmdpo.models.families import text_configs, unwrap_peft

    if engine == "shared":
        check_pairs_shareable(model, router_loss)
    # Left as it was: whether a model's attention is switched decides on names of caches.
    before = [(c, c._attn_implementation) for c in text_configs(unwrap_peft(model).base_model)]
    try:
        SharedForward(model, share=engine == "shared").remove()
    finally:
        for config, attention in before:
            config._attn_implementation = attention


def reason_to_fall_back(problem: Exception, when: str) -> str:
    """What went wrong with an engine, in one line; raised again where no simpler one would help.

    Args:
        when: it happened, for the message that memory ran out.

    Raises MemoryBudgetError, or the problem itself if data or options are its cause.
    """
    from vlmdpo.engine.packed_attention import CannotShare

    if is_out_of_memory(problem):
        raise MemoryBudgetError(
            f"out of memory {when}: {out_of_memory_reason(problem)}; see: vlmdpo estimate-memory "
            "--gpu"
        ) from problem
    if isinstance(problem, VlmDpoError) and not isinstance(problem, ModelError):
        raise problem
    line = next(iter(str(problem).strip().splitlines()), "")
    if isinstance(problem, (CannotShare, ModelError)):
        return line
    return f"{type(problem).__name__}: {line}" if line else type(problem).__name__


def join_reasons(reasons: list[str]) -> str | None:
    """Several reasons as one, each once; None if there is none."""
    return "; ".join(dict.fromkeys(reasons)) or None


def verify_engine(setup: EngineSetup) -> None:
    """Compare the engine with stock rows on a few pairs; use the next simpler one until they agree.

    Raises:
        ModelError: TRL's own rows cannot be trained on either.
        MemoryBudgetError: memory ran out.
        ConfigError: `--loss mdpo`, which only the shared engine can train.
    """
    trainer, examples = setup.trainer, setup.related_examples()
    reasons = [setup.fallback_reason] if setup.fallback_reason else []
    setup.fallback_reason = join_reasons([*reasons, *settle_engine(trainer, examples)])
    if trainer.engine == "stock":
        _check_stock(trainer, examples[0])
    if setup.fallback_reason and trainer.engine != "shared":
        images = "encoding each image once" if trainer.engine == "rows" else "as TRL does"
        ui.warn(f"no shared prefix ({setup.fallback_reason}); two rows per pair, {images}")


def settle_engine(trainer: EngineTrainer, examples: list[dict[str, Any]]) -> list[str]:
    """Switch to the next simpler engine until one agrees with stock rows; why not to others.

    Args:
        examples: rows that the trainer's `pair_collator` takes.

    Raises MemoryBudgetError, and ConfigError as `verify_engine`.
    """
    reasons: list[str] = []
    while trainer.engine != "stock":
        reason = _why_not_exact(trainer, examples)
        if reason is None:
            break
        reasons += _fall_back(trainer, reason)
    return reasons


def _why_not_exact(trainer: EngineTrainer, examples: list[dict[str, Any]]) -> str | None:
    """Why the trainer's engine cannot be used, or None if it agrees with stock rows."""
    from vlmdpo.training import engine_checks

    is_shared = trainer.engine == "shared"
    check_engine = (
        engine_checks.check_shared_forward if is_shared else engine_checks.check_images_once
    )
    try:
        check = check_engine(trainer, examples)
    except Exception as problem:  # noqa: BLE001 - said in words, and the next engine is tried
        return reason_to_fall_back(problem, "while the engine was checked on a few pairs")
    if check.passed:
        ui.say(f"self-check: {check.name} {check.seen}")
        return None
    return f"{check.name}: {check.cause}"


def _fall_back(trainer: EngineTrainer, reason: str) -> list[str]:
    """Switch to the next simpler engine that can be built; this reason, and why not to others."""
    if trainer.is_mdpo:
        raise ConfigError(f"--loss mdpo needs the shared engine, which cannot be used: {reason}")
    ui.warn(f"self-check: {reason}; falling back to a simpler engine")
    reasons = [reason]
    engine = SIMPLER[trainer.engine]
    try:
        trainer.use_engine(engine)
    except Exception as problem:  # noqa: BLE001 - said in words, and the next engine is tried
        reasons.append(reason_to_fall_back(problem, "while the engine was built"))
        trainer.use_engine("stock")
    return reasons


def _check_stock(trainer: EngineTrainer, example: dict[str, Any]) -> None:
    """Raise ModelError if TRL's own collator or the model's forward refuses a pair."""
    from vlmdpo.engine.stock_collator import StockCollator
    from vlmdpo.training import doctor

    batch = None
    try:
        batch = trainer.pair_collator([dict(example)])
        doctor.token_logps(trainer, batch)
    except Exception as problem:
        reason = reason_to_fall_back(problem, "on one pair")
        names = StockCollator(trainer.processing_class).not_extended(dict(example)) if batch else []
        if names:
            reason = f"its inputs by token ({', '.join(names)}) are not extended over answers"
        raise ModelError(f"TRL cannot train this family: {reason}") from problem


def engine_check(setup: EngineSetup) -> Check:
    """`--doctor`'s finding on the shared engine."""
    from vlmdpo.training import doctor, engine_checks

    if setup.trainer.engine == "shared":
        return engine_checks.check_shared_forward(setup.trainer, setup.related_examples())
    reason = setup.fallback_reason or "--engine stock"
    return doctor.Check("shared forward", None, f"not used: {reason}")
