"""docs/scaling.md: its tables are what the script makes, and the simulation keeps to what can be
said without it.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

import vlmdpo as package

ROOT = Path(package.__file__).parent.parent


@pytest.fixture(scope="module")
def scaling():
    place = importlib.util.spec_from_file_location("scaling", ROOT / "examples" / "scaling.py")
    module = importlib.util.module_from_spec(place)
    sys.modules["scaling"] = module
    place.loader.exec_module(module)
    return module


def test_the_page_holds_the_tables_of_the_script(scaling):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling.BEGIN + scaling.tables() + scaling.END in page


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_a_step_takes_between_the_longer_and_the_sum_of_arithmetic_and_transfer(strategy, scaling):
    for model in scaling.MODELS:
        for gpus in scaling.COUNTS:
            for full in (False, True):
                plan = scaling.Plan(model, gpus, strategy, full)
                seconds, alone = scaling.step_s(plan)
                sent = plan.sent_bytes / plan.link_bytes_s
                hops = (2 * plan.accumulation + 3) * model.layers * 2 * (gpus - 1) * scaling.HOP_S
                assert max(alone, sent) <= seconds * (1 + 1e-9)
                assert seconds <= alone + sent + hops + 0.5 * alone / model.layers


def test_sizes_are_those_of_the_models(scaling):
    from vlmdpo.models import registry

    small, large = scaling.MODELS
    known = registry.find("idefics2-8b")
    assert small.parameters == known.parameters
    assert small.adapter == known.lora_per_rank * 16
    assert large.parameters == pytest.approx(73.4e9, rel=0.01)
