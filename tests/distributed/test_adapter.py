"""`train --adapter` in several processes: what one learns, with the whole model in each or sharded.

With a reference cache the reference runs before the policy, without one after it.
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_launch import curve, report, spec
from tests.support.ranks import FSDP2, run_groups

pytestmark = pytest.mark.slow


@pytest.mark.exhaustive
def test_an_adapter_trains_on_alike_in_every_arrangement(vlmdpo):
    code, _, err = vlmdpo("prepare", "--limit", "16", "--output-dir", "data")
    assert code == 0, err
    # The embedded model's own recipe adds SFT, which TRL averages over each process's tokens.
    plain = ["--loss-type", "sigmoid"]
    more = [*plain, "--adapter", "first", "--no-reference-cache"]
    run_groups(
        [
            spec("first", 1, 8, 1, "--lora-r", "4"),
            spec("one", 1, 8, 1, *more),
            spec("two", 2, 4, 1, *more),
            spec("sharded", 2, 4, 1, *more, env=FSDP2),
            spec("cached", 2, 4, 1, *plain, "--adapter", "first", env=FSDP2),
        ]
    )
    assert [report(name)["strategy"] for name in ("one", "two", "sharded")] == [
        "single",
        "ddp",
        "fsdp2",
    ]
    assert curve("one")[0][2] == pytest.approx(0, abs=1e-5), "the reference is the adapter's model"
    assert len(curve("one")) == 2
    for name in ("two", "sharded", "cached"):
        for here, there in zip(curve(name), curve("one"), strict=True):
            assert here == pytest.approx(there, rel=5e-4, abs=5e-6), name
    first, one, saved = (
        load_file(f"{name}/adapter_model.safetensors") for name in ("first", "one", "cached")
    )
    assert saved.keys() == one.keys() == first.keys()
    for name in one:
        torch.testing.assert_close(saved[name], one[name], rtol=0, atol=2e-5)
    assert any((one[name] - first[name]).abs().max() > 1e-5 for name in one)
