"""Was the data prepared for the model that is to train on it?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmdpo import ui
from vlmdpo.config import TrainConfig
from vlmdpo.errors import DataError
from vlmdpo.models.registry import find, is_same_name

if TYPE_CHECKING:
    from vlmdpo.models.protocols import Processor


def check_prepared_for(
    data: Path, manifest: Mapping[str, Any], processor: Processor, config: TrainConfig
) -> None:
    """Raise DataError for data that was prepared for another model, and lost what this one needs.

    With `--data-of-another-model` it is a warning that says what is lost. Token counts are never
    taken over: `lengths.row_lengths` compares processors too.

    Args:
        data: the prepared folder.
        manifest: its own.
        processor: of the model that trains.
    """
    from vlmdpo.models.digest import processor_digest
    from vlmdpo.models.image_limits import default_image_side

    is_same = is_same_name(str(manifest.get("model")), config.model)
    if is_same or manifest.get("processor") == processor_digest(processor, dated=False):
        return
    prepared_for, family = manifest.get("processor_class"), type(processor).__name__
    lost = []
    if prepared_for is not None and prepared_for != family:
        lost.append(f"another family ({prepared_for}; '{config.model}' has {family})")
    lost += _reduced_images(manifest, default_image_side(processor))
    _refuse_or_warn(data, manifest, lost, config)


def check_by_name(data: Path, manifest: Mapping[str, Any], config: TrainConfig) -> None:
    """The same without loading anything, for models whose image size is in the registry."""
    from vlmdpo.memory import fast

    entry = find(config.model)
    is_known = entry is not None and entry.alias in fast.known_architectures()
    if is_same_name(str(manifest.get("model")), config.model) or not is_known:
        return
    assert entry is not None
    lost = _reduced_images(manifest, fast.default_image_side(entry.alias))
    _refuse_or_warn(data, manifest, lost, config)


def _reduced_images(manifest: Mapping[str, Any], side: int | None) -> list[str]:
    """What a model loses whose images may be `side` pixels long; None: of any length."""
    bound = manifest.get("max_image_side")
    if not bound or (side is not None and bound >= side):
        return []
    takes = f"up to {side}" if side else "any number"
    return [f"images were reduced to {bound} pixels per side, where this one takes {takes}"]


def _refuse_or_warn(
    data: Path, manifest: Mapping[str, Any], lost: list[str], config: TrainConfig
) -> None:
    if manifest.get("max_length"):
        limit = manifest["max_length"]
        lost = [*lost, f"rows over --max-length {limit} were dropped or trimmed by its tokens"]
    if not lost:
        return
    what = f"'{data}' was prepared for '{manifest.get('model')}': {'; '.join(lost)}"
    if not config.data_of_another_model:
        raise DataError(
            f"--dataset: {what}. Prepare it again with --model {config.model}, or go on with "
            "--data-of-another-model"
        )
    ui.warn(f"--data-of-another-model: {what}. Tokens are counted anew")
