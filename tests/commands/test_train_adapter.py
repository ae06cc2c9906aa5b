"""`train --adapter` from end to end: two rounds of the embedded model, resumed and exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

FEW = ["--dataset", "data", "--device", "cpu", "--sample-every", "0", "--logging-steps", "1"]
FEW += ["--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "1"]
SECOND = ["train", *FEW, "--adapter", "one", "--output-dir", "two", "--max-steps", "4", "--json"]


@pytest.fixture
def one(vlmdpo):
    """Prepared pairs, and a first adapter of rank 4."""
    assert vlmdpo("prepare", "--limit", "16", "--output-dir", "data")[0] == 0
    code, _, err = vlmdpo(
        *("train", *FEW, "--output-dir", "one", "--max-steps", "2", "--lora-r", "4")
    )
    assert code == 0, err
    return Path("one")


def _weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_a_second_round_holds_the_first_and_can_be_used_alone(one, vlmdpo):
    code, out, err = vlmdpo(*SECOND)
    assert code == 0, err
    report = json.loads(out)
    assert (report["engine"], report["fallback_reason"]) == ("shared", None)
    assert "LoRA r=4 going on from 'one': 100,352 of 2,523,008 parameters train" in err
    lines = [json.loads(line) for line in Path("two/metrics.jsonl").read_text().splitlines()]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert lines[0][name] == pytest.approx(0, abs=1e-5)
    [entry] = report["lineage"]
    assert (entry["adapter"], entry["dataset"], entry["steps"]) == ("one", "data", 2)
    assert json.loads(Path("two/lineage.json").read_text()) == [entry]
    card = Path("two/README.md").read_text()
    assert "Round 2: it goes on from these adapters" in card
    assert entry["digest"][:16] in card
    assert not Path("two/ref").exists()
    first, second = _weights("one"), _weights("two")
    assert first.keys() == second.keys()
    moved = max((first[n] - second[n]).abs().max().item() for n in first)
    assert 0 < moved < 0.05, "it goes on from the weights of the first"
    code, out, err = vlmdpo("infer", "--adapter", "two", "--question", "What is it?", "--json")
    assert code == 0, err
    assert json.loads(out)["model"] == "tiny"
    code, _, err = vlmdpo("export", "--adapter", "two", "--merge", "--output-dir", "merged")
    assert code == 0, err
    assert "Round 2" in Path("merged/README.md").read_text()


def test_a_resumed_second_round_ends_as_an_unbroken_one(one, vlmdpo):
    code, _, err = vlmdpo(*SECOND, "--save-steps", "2")
    assert code == 0, err
    whole = _weights("two")
    shutil.rmtree("two/checkpoint-4")
    for name in ("adapter_model.safetensors", "train_report.json"):
        Path("two", name).unlink()
    changed = one / "adapter_model.safetensors"
    kept = changed.read_bytes()
    from safetensors.torch import save_file

    save_file({n: w + 1 for n, w in _weights("one").items()}, changed)
    code, _, err = vlmdpo(*SECOND, "--save-steps", "2", "--resume")
    assert code == 4
    assert "is not what the run went on from" in err
    changed.write_bytes(kept)
    code, _, err = vlmdpo(*SECOND, "--save-steps", "2", "--resume")
    assert code == 0, err
    assert "resuming from checkpoint-2" in err
    resumed = _weights("two")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_result_may_not_overwrite_where_it_came_from(one, vlmdpo):
    code, _, err = vlmdpo(
        *("train", *FEW, "--adapter", "one", "--output-dir", "one"), "--overwrite"
    )
    assert code == 3
    assert "holds the adapter that training goes on from" in err
    assert _weights("one")


def test_a_plan_names_the_adapter(one, vlmdpo):
    code, out, err = vlmdpo("train", "--adapter", "one", "--dry-run")
    assert code == 0, err
    assert "LoRA r=4 on the layers of 'one', from its weights" in out
    assert "--adapter one" in out, "so does the command that estimates its memory"
