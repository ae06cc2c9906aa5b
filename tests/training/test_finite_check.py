"""A loss that is not finite ends the run before its optimizer step, and names its batch."""

import pytest
import torch

from tests.support.engines import pairs, trainer
from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.training.finite_check import FiniteCheck, NonFiniteLoss


def test_the_first_batch_that_is_not_finite_is_found_and_each_is_checked_once():
    check = FiniteCheck()
    assert check.first_non_finite() is None
    check.add([0, 1], torch.tensor(0.7), torch.tensor([-1.0, -2.0]))
    check.add([2, 3], torch.tensor(0.7), torch.tensor([-1.0, -torch.inf]))
    check.add([4, 5], torch.tensor(torch.nan))
    assert check.first_non_finite() == [2, 3]
    assert check.first_non_finite() is None


@pytest.mark.parametrize("cached", [False, True], ids=["loss", "reference"])
def test_a_run_stops_before_the_optimizer_takes_the_step(cached, tmp_path, monkeypatch):
    cache = ReferenceCache(tmp_path, "k") if cached else None
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    made = trainer("llava", "shared", pairs(6), tmp_path, reference_cache=cache, **settings)
    collate, batches, checks = made.data_collator, [], []

    def poisoned(examples):
        batch = collate(examples)
        batches.append(batch["row"])
        if len(batches) == 5:  # in the middle of the second step
            batch["pixel_values"] = batch["pixel_values"] * torch.nan
        return batch

    found = FiniteCheck.first_non_finite

    def counted(self):
        checks.append(made.state.global_step)
        return found(self)

    monkeypatch.setattr(FiniteCheck, "first_non_finite", counted)
    made.data_collator = poisoned
    with pytest.raises(NonFiniteLoss) as caught:
        made.train()
    assert (caught.value.rows, caught.value.step) == (batches[4], 2)
    assert checks == [0, 1], "once a step, not once a batch"
    assert all(p.isfinite().all() for p in made.model.parameters())
    assert made.state.global_step == 1
