"""Processes that make batches change nothing of a run but its speed."""

import pytest
import torch
from torch import nn
from torch.utils.data import get_worker_info

from tests.support.engines import pairs, trainer
from tests.support.ranks import full_above
from vlmdpo.training.run_trainer import RunTrainer

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train two epochs of six steps: (losses, weights, rows collated in this process)."""

    def train(name, workers, *, limit=None, resume=None):
        made = trainer(
            *("llava", "shared", pairs(24, seed=3), tmp_path / name),
            **{"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2},
            **{"logging_steps": 1, "save_steps": 2, "dataloader_num_workers": workers},
            dataloader_prefetch_factor=2 if workers else None,
        )
        for module in made.model.modules():
            if hasattr(module, "lora_dropout"):  # random numbers must be the same, too
                module.lora_dropout["default"] = nn.Dropout(0.1)
        collate, here = made.data_collator, []

        def watched(examples):
            if get_worker_info() is None:
                here.extend(example["row"] for example in examples)
            return collate(examples)

        made.data_collator = watched
        if limit is not None:
            made.enable_auto_batch()
            monkeypatch.setattr(RunTrainer, "_compute_loss", full_above(limit))
        made.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        monkeypatch.undo()
        weights = [p.detach().clone() for p in made.model.parameters() if p.requires_grad]
        return [line["loss"] for line in made.state.log_history if "loss" in line], weights, here

    return train


def assert_equal(run, other):
    assert run[0] == other[0]
    assert all(map(torch.equal, run[1], other[1]))


def test_a_run_is_the_same_with_any_number_of_workers_and_after_a_resume(run):
    alone, with_workers = run("alone", 0), run("workers", 2)
    assert len(alone[0]) == 12
    assert len(alone[2]) == 48
    assert not with_workers[2], "every batch is made in a worker"
    assert_equal(alone, with_workers)
    for checkpoint in ("alone/checkpoint-4", "alone/checkpoint-6"):  # within and after an epoch
        assert_equal(alone, run("again", 2, resume=checkpoint))


def test_workers_collate_parts_for_auto_batch_size(run):
    alone, with_workers = run("alone", 0, limit=2), run("workers", 2, limit=2)
    assert_equal(alone, with_workers)
    assert 0 < len(with_workers[2]) <= 24, "only what was on its way when memory ran out"
    assert len(alone[2]) > 48
