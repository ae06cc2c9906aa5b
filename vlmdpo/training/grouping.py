"""Whether rows of one image train together, and what that saves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmdpo import ui
from vlmdpo.config import SpeedOptions
from vlmdpo.data import store
from vlmdpo.data.groups import RowGroups, answer_numbers, row_groups
from vlmdpo.data.pairs import TokenCounts
from vlmdpo.training.sharing import SharedRows, Sharing

if TYPE_CHECKING:
    from vlmdpo.training.run_trainer import RunTrainer
    from vlmdpo.training.setup import TrainingSetup

_FLAG = "--group-by-image"


def group_by_image(setup: TrainingSetup, options: SpeedOptions) -> None:
    """Find what rows share, and let the trainer group them where that saves something; sets
    `setup.sharing`.

    Call it once the engine and the grouping by length are decided.
    """
    trainer, asked = setup.trainer, options.group_by_image
    groups = row_groups(setup.dataset)
    if asked and trainer.engine != "shared":
        ui.say(f"{_FLAG} does nothing with the {trainer.engine} engine, which shares nothing")
    elif asked and not groups.is_shared:
        ui.say(f"{_FLAG} does nothing here: no two rows have an image or a prompt in common")
    elif asked is not False and trainer.engine == "shared" and groups.is_shared:
        trainer.row_groups = groups
        if trainer.args.train_batch_size == 1:
            ui.say(
                "rows of one image are grouped, but --per-device-train-batch-size 1 computes each "
                "alone: they share nothing until it is larger"
            )
    setup.sharing = _describe(setup, groups)


def _describe(setup: TrainingSetup, groups: RowGroups) -> Sharing:
    from vlmdpo.engine.lengths import known_lengths

    trainer = setup.trainer
    answers = answer_numbers(setup.dataset, groups)
    manifest = store.read_manifest(setup.data)
    lengths = known_lengths(setup.processor, setup.dataset, manifest)
    tokens = None
    if lengths is not None:
        counts = [_within(length, trainer.args.max_length) for length in lengths]
        rows = SharedRows(
            groups,
            answers,
            counts,
            share_images=getattr(trainer.pair_collator, "share_beginnings", False),
            with_copies=trainer.is_mdpo,
        )
        tokens = rows.tokens(
            _first_epoch(trainer),
            trainer.args.train_batch_size if trainer.engine == "shared" else None,
        )
    return Sharing(
        pairs=len(setup.dataset),
        images=groups.num_images,
        prompts=groups.num_prompts,
        answers=len({number for pair in answers for number in pair}),
        is_grouped=trainer.row_groups is not None,
        epoch=tokens,
    )


def _within(counts: TokenCounts, limit: int | None) -> TokenCounts:
    """A row's tokens once its answers are cut to `--max-length`."""
    room = counts.prompt + counts.longest if limit is None else limit - counts.prompt
    return TokenCounts(
        counts.prompt, min(counts.chosen, room), min(counts.rejected, room), counts.images
    )


def _first_epoch(trainer: RunTrainer) -> list[int]:
    """The rows in the order of the first epoch, or in one that is as random."""
    import torch

    from vlmdpo.training.row_order import grouped_sampler

    sampler = grouped_sampler(trainer.row_groups, trainer.row_lengths, trainer.args)
    if sampler is not None:
        return list(sampler)
    # Not the trainer's own sampler, which draws from the global generator.
    generator = torch.Generator().manual_seed(trainer.args.seed)
    return torch.randperm(len(trainer.train_dataset), generator=generator).tolist()
