"""Which engine a run uses: the shared one if the model allows it and it proves exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmdpo import ui

if TYPE_CHECKING:
    from vlmdpo.config import SpeedOptions
    from vlmdpo.models.protocols import VisionLanguageModel
    from vlmdpo.training.doctor import Check
    from vlmdpo.training.setup import TrainingSetup


def choose_engine(options: SpeedOptions, model: VisionLanguageModel) -> tuple[str, str | None]:
    """(engine, None), or ("rows", why the model cannot share its prefix)."""
    from vlmdpo.engine.forward import check_pairs_shareable
    from vlmdpo.engine.packed_attention import CannotShare

    if options.engine == "stock":
        return "stock", None
    try:
        check_pairs_shareable(model)
    except CannotShare as reason:
        return "rows", str(reason)
    return "shared", None


def verify_engine(setup: TrainingSetup) -> None:
    """Compare the engine with stock rows on one pair; fall back to a simpler one if they differ."""
    from vlmdpo.training import doctor

    trainer = setup.trainer
    while trainer.engine != "stock":
        example = setup.examples()[0]
        if trainer.engine == "shared":
            check = doctor.check_shared_forward(trainer, example)
        else:
            check = doctor.check_images_once(trainer, example)
        if check.passed:
            ui.say(f"self-check: {check.name} {check.seen}")
            break
        setup.fallback_reason = f"{check.name}: {check.cause}"
        ui.warn(f"self-check: {check.name} {check.seen}; falling back to a simpler engine")
        trainer.use_engine("rows" if trainer.engine == "shared" else "stock")
    if setup.fallback_reason and trainer.engine != "shared":
        images = "encoding each image once" if trainer.engine == "rows" else "as TRL does"
        ui.warn(f"no shared prefix ({setup.fallback_reason}); two rows per pair, {images}")


def engine_check(setup: TrainingSetup) -> Check:
    """`--doctor`'s finding on the shared engine."""
    from vlmdpo.training import doctor

    if setup.trainer.engine == "shared":
        return doctor.check_shared_forward(setup.trainer, setup.examples()[0])
    reason = setup.fallback_reason or "--engine stock"
    return doctor.Check("shared forward", None, f"not used: {reason}")
