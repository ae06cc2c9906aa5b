"""Reference log-probs before the first step, for full fine-tuning, which changes the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from accelerate.utils import gather_object
from torch.utils.data import ConcatDataset, DataLoader, Subset

from vlmdpo import ui
from vlmdpo.models.inputs import take_host_only
from vlmdpo.training.run_trainer import RunTrainer

_BATCHES = 4  # of training in one of these: nothing is kept for a backward pass


def fill_reference_cache(trainer: RunTrainer) -> None:
    """Compute the reference log-probs of all answers that the cache does not hold.

    Every process must call this.
    """
    rows = _rows_to_run(trainer)
    if not rows:
        return
    loader = trainer.accelerator.prepare(_loader(trainer, rows, trainer.data_collator))
    model = trainer.ref_model or trainer.model
    with ui.progress("reference", len(loader)) as bar:
        for batch in loader:
            inputs = dict(trainer._prepare_inputs(batch))
            numbers, _, answer_keys = take_host_only(inputs)
            trainer.reference_logps(model, inputs, numbers, answer_keys)
            trainer.check_finite()
            bar.advance()
    trainer.save_reference_cache()


def _rows_to_run(trainer: RunTrainer) -> list[int]:
    """Places, over all datasets, of rows that together have every answer that is missing."""
    assert trainer.reference_cache is not None
    keys_by_row = dict(_keys_by_row(trainer))
    missing = trainer.reference_cache.missing(key for keys in keys_by_row.values() for key in keys)
    # Processes without a common disk may have found different caches, and must do the same here.
    if trainer.args.world_size > 1:
        missing = set().union(*gather_object([missing]))
    rows = []
    for row, keys in sorted(keys_by_row.items()):
        if not missing.isdisjoint(keys):
            rows.append(row)
            missing.difference_update(keys)
    return rows


def _keys_by_row(trainer: RunTrainer) -> Iterable[tuple[int, list[str]]]:
    """(place, keys of its answers) of each row. Processes share the work of reading the images."""
    count, args = sum(map(len, trainer.datasets)), trainer.args
    places = list(range(args.process_index, count, args.world_size))
    loader = _loader(trainer, places, trainer.data_collator.content_keys)
    size = loader.batch_size or 1
    found: list[tuple[int, list[str]]] = []
    with ui.progress("answers", len(loader)) as bar:
        for keys in loader:
            rows = places[len(found) : len(found) + size]
            answer_keys = trainer.reference_keys(keys["answer_keys"])
            # TRL's rows lie pair by pair of a kind: all chosen ones, then all rejected ones.
            found += [(row, answer_keys[at :: len(rows)]) for at, row in enumerate(rows)]
            bar.advance()
    return gather_object(found) if args.world_size > 1 else found


def _loader(trainer: RunTrainer, rows: list[int], collate: Callable[..., Any]) -> DataLoader[Any]:
    return DataLoader(
        Subset(ConcatDataset(trainer.datasets), rows),
        batch_size=_BATCHES * trainer.args.per_device_train_batch_size,
        collate_fn=collate,
        num_workers=trainer.args.dataloader_num_workers,
    )
