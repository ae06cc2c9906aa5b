"""Grouped rows in the trainer: the same steps for every division, and after a resume."""

import pytest

from tests.support.engines import pairs, trainer
from vlmdpo.data.groups import RowGroups

pytestmark = pytest.mark.slow

GROUPS = RowGroups([0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 5], [0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9])
LENGTHS = [40, 41, 44, 90, 92, 30, 31, 30, 70, 55, 51, 50]


def _visited(folder, batch, accumulation, lengths=None, resume=None):
    """The rows of each optimizer step of two epochs, steps of four rows; saved after the fourth."""
    made = trainer(
        "llava",
        "shared",
        pairs(12, seed=1),
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        save_steps=4,
        learning_rate=0.0,
        disable_tqdm=True,
    )
    made.row_groups, made.row_lengths = GROUPS, lengths
    steps = {}
    step = made.training_step

    def watched(model, inputs, *args):
        steps.setdefault(made.state.global_step, []).extend(inputs["row"])
        return step(model, inputs, *args)

    made.training_step = watched
    made.train(resume_from_checkpoint=resume)
    return steps


def test_a_resumed_run_visits_the_rows_that_the_whole_run_would_have(tmp_path):
    whole = _visited(tmp_path / "out", 2, 2, LENGTHS)
    assert len(whole) == 6
    for epoch in (range(3), range(3, 6)):
        assert sorted(row for step in epoch for row in whole[step]) == list(range(12))
    checkpoint = str(tmp_path / "out" / "checkpoint-4")
    resumed = _visited(tmp_path / "again", 2, 2, LENGTHS, checkpoint)
    assert resumed == {step: whole[step] for step in (4, 5)}


def test_steps_hold_the_same_rows_however_they_are_divided(tmp_path):
    steps = [_visited(tmp_path / f"{n}", n, 4 // n) for n in (1, 2, 4)]
    assert steps[0] == steps[1] == steps[2]
    for rows in steps[0].values():
        images = [GROUPS.images[row] for row in rows]
        assert images == sorted(images, key=images.index), "rows of an image are neighbours"
