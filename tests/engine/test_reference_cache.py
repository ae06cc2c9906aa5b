"""Reference log-probs on disk: found again if they match, and never used if anything differs."""

import json

import pyarrow as pa
import pytest
import torch

from tests.support.engines import pairs, step, trainer
from vlmdpo.engine.reference_cache import ReferenceCache, cache_key
from vlmdpo.models.digest import weights_digest
from vlmdpo.tiny import random_models

pytestmark = pytest.mark.slow


def filled(folder, key="k", rows=3):
    cache = ReferenceCache(folder, key, rows)
    cache.put(range(rows), torch.linspace(-5, -1, rows), torch.linspace(-9, -2, rows))
    cache.save()
    return cache


def test_what_was_saved_is_found_again(tmp_path):
    filled(tmp_path)
    again = ReferenceCache(tmp_path, "k", 3)
    assert again.num_known == 3
    chosen, rejected = again.get([2, 0])
    assert chosen.tolist() == [-1, -5]
    assert rejected.tolist() == [-2, -9]
    assert again.holds([0, 1, 2])


def test_a_part_is_kept_and_the_rest_is_missing(tmp_path):
    cache = ReferenceCache(tmp_path, "k", 4)
    cache.put([1], torch.tensor([-1.0]), torch.tensor([-2.0]))
    cache.save(others=[(3, -3.0, -4.0)])
    again = ReferenceCache(tmp_path, "k", 4)
    assert again.num_known == 2
    assert again.get([1, 2]) is None
    assert again.get([3])[1].tolist() == [-4.0]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "renamed", "other rows"])
def test_a_damaged_or_foreign_file_is_reported_and_not_used(damage, tmp_path, capfd):
    path = filled(tmp_path).path
    content = bytearray(path.read_bytes())
    rows = 3
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":  # one byte of one number
        at = content.index(torch.tensor(-5.0).numpy().tobytes())
        content[at] ^= 1
        path.write_bytes(content)
    elif damage == "text":
        path.write_text("not Arrow")
    elif damage == "renamed":
        path.rename(path.with_name("other.arrow"))
    else:
        rows = 5
    again = ReferenceCache(tmp_path, "other" if damage == "renamed" else "k", rows)
    assert again.num_known == 0
    assert "is not used and will be made anew" in " ".join(capfd.readouterr().err.split())
    filled(tmp_path, again.key, rows)
    assert ReferenceCache(tmp_path, again.key, rows).num_known == rows


def test_non_finite_values_are_refused(tmp_path):
    cache = ReferenceCache(tmp_path, "k", 1)
    cache.put([0], torch.tensor([float("nan")]), torch.tensor([-1.0]))
    with pytest.raises(FloatingPointError):
        cache.get([0])


def test_the_key_follows_every_weight():
    model, _ = random_models.make("llava")
    before = weights_digest(model)
    assert weights_digest(random_models.make("llava")[0]) == before
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[0] += 1
    assert weights_digest(model) != before
    assert cache_key({"weights": before}) != cache_key({"weights": weights_digest(model)})


@pytest.mark.parametrize("engine", ["shared", "rows", "stock"])
def test_cached_reference_gives_the_same_step(engine, tmp_path):
    rows = pairs(3)
    plain = step(trainer("llava", engine, rows, tmp_path))
    made = trainer(
        "llava", engine, rows, tmp_path, reference_cache=ReferenceCache(tmp_path, "k", 3)
    )
    first, second = step(made), step(made)
    made.save_reference_cache()
    calls = []
    later = trainer(
        "llava", engine, rows, tmp_path, reference_cache=ReferenceCache(tmp_path, "k", 3)
    )
    later.compute_ref_log_probs = lambda *inputs: calls.append(inputs)
    third = step(later)
    assert not calls
    assert first[0] == plain[0]
    assert second[0] == third[0] == pytest.approx(plain[0], rel=1e-6)


@pytest.fixture
def few(tmp_path):
    """A prepared folder of 24 embedded pairs, without any cache."""
    from vlmdpo.commands import prepare
    from vlmdpo.config import PrepareConfig

    prepare.run(PrepareConfig(limit=24, output_dir=tmp_path / "few"))
    return tmp_path / "few"


def train(vlmdpo, data, out, *more):
    code, stdout, err = vlmdpo(
        "train", "--dataset", data, "--output-dir", out, "--logging-steps", "1", "--json", *more
    )
    assert code == 0, err
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads(stdout), " ".join(err.split()), lines


@pytest.mark.parametrize("kind", ["--lora", "--no-lora"])
def test_runs_share_the_cache_and_learn_the_same(kind, few, tmp_path, vlmdpo, monkeypatch):
    from vlmdpo.training.trainer import PairTrainer

    calls = []
    compute = PairTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        PairTrainer, "compute_ref_log_probs", lambda *a: calls.append(a) or compute(*a)
    )
    more = [kind, "--num-train-epochs", "2", "--lora-dropout", "0"]
    cached, _, first = train(vlmdpo, few, tmp_path / "a", *more)
    once = len(calls)
    assert once > 0
    _, said, second = train(vlmdpo, few, tmp_path / "b", *more)
    assert "24 of 24 rows found" in said
    assert len(calls) == once, "nothing is computed a second time"
    plain, _, third = train(vlmdpo, few, tmp_path / "c", *more, "--no-reference-cache")
    for lines in (second, third):
        assert [line["loss"] for line in lines] == pytest.approx(
            [line["loss"] for line in first], rel=1e-3
        )
    assert cached["steps"] == plain["steps"]


def test_no_cache_leaves_no_file(few, tmp_path, vlmdpo):
    train(vlmdpo, few, tmp_path / "out", "--no-reference-cache", "--max-steps", "1")
    assert not (few / "reference-logprobs").exists()
    train(vlmdpo, few, tmp_path / "out2", "--max-steps", "1")
    assert len(list((few / "reference-logprobs").glob("*.arrow"))) == 1


def test_lora_and_full_fine_tuning_start_from_the_same_reference(few, tmp_path, vlmdpo):
    train(vlmdpo, few, tmp_path / "a", "--no-lora", "--max-steps", "1")
    _, said, _ = train(vlmdpo, few, tmp_path / "b", "--lora", "--max-steps", "1")
    assert "24 of 24 rows found" in said


def test_a_damaged_cache_is_rebuilt_by_the_next_run(few, tmp_path, vlmdpo):
    train(vlmdpo, few, tmp_path / "a", "--num-train-epochs", "1")
    [path] = (few / "reference-logprobs").glob("*.arrow")
    before = pa.ipc.open_file(path).read_all()
    path.write_bytes(path.read_bytes()[:100])
    _, said, _ = train(vlmdpo, few, tmp_path / "b", "--num-train-epochs", "1")
    assert "is not used and will be made anew" in said
    after = pa.ipc.open_file(path).read_all()
    assert after.num_rows == 24
    assert after["ref_chosen_logps"].to_pylist() == pytest.approx(
        before["ref_chosen_logps"].to_pylist(), rel=1e-5
    )
