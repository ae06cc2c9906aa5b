"""A simulated step runs on the engine that training would use."""

import pytest
import torch

from vlmdpo.config import TrainConfig
from vlmdpo.engine.forward import SharedForward
from vlmdpo.errors import ModelError
from vlmdpo.memory.architecture import Architecture
from vlmdpo.tiny import random_models
from vlmdpo.training.simulate import SimulatedPeak, estimate_peak
from vlmdpo.training.synthetic_rows import Workload, synthetic_rows


def estimate(family, **more):
    config, processor = random_models.FAMILIES[family]({}, {}, 32)
    shape = Architecture(config, processor)
    rows = synthetic_rows(processor, Workload((32, 32), 1, 8, 6, 6), 1)
    options = TrainConfig(per_device_train_batch_size=1, gradient_accumulation_steps=1)
    return estimate_peak(shape, options, rows, dtype=torch.float32, **more)


def test_a_model_that_cannot_share_is_estimated_in_rows(monkeypatch):
    def peak(architecture, config, rows, dtype, engine):
        return SimulatedPeak(1.0, {}, engine)

    monkeypatch.setattr("vlmdpo.training.simulate._estimate_peak", peak)
    found = estimate("qwen3_5")
    assert found.engine == "rows"
    assert "linear_attention" in found.fallback_reason
    assert estimate("llava").engine == "shared"
    assert estimate("llava", choice=("stock", "told")).fallback_reason == "told"


def test_a_step_that_cannot_be_simulated_runs_on_the_next_engine(monkeypatch):
    def fail(self, *args, **kwargs):
        raise NotImplementedError("no values")

    monkeypatch.setattr(SharedForward, "_packed_forward", fail)
    found = estimate("llava")
    assert found.peak > found.static
    assert (found.engine, found.fallback_reason) == ("rows", "NotImplementedError: no values")
    monkeypatch.setattr("vlmdpo.training.simulate._phase_peaks", fail)
    with pytest.raises(ModelError, match="no step of this model can be simulated: NotImpl"):
        estimate("llava")
