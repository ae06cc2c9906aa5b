"""Reference log-probs on disk: found again if they match, and never used if anything differs."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.support.engines import pairs, step, trainer
from vlmdpo.engine.reference_cache import ReferenceCache, cache_key
from vlmdpo.models.digest import weights_digest
from vlmdpo.tiny import random_models
from vlmdpo.training.prefill import fill_reference_cache

pytestmark = pytest.mark.slow


def filled(folder, key="k", count=3):
    cache = ReferenceCache(folder, key)
    cache.put([f"a{n}" for n in range(count)], torch.linspace(-5, -1, count))
    cache.save()
    return cache


def test_what_was_saved_is_found_again(tmp_path):
    filled(tmp_path)
    again = ReferenceCache(tmp_path, "k")
    assert again.num_known == 3
    assert again.get(["a2", "", "a0"]).tolist() == [-1, 0, -5], "no answer has a log-prob of 0"
    assert again.missing(["a0", "a7", ""]) == {"a7"}


def test_a_part_is_kept_and_the_rest_is_missing(tmp_path):
    cache = ReferenceCache(tmp_path, "k")
    cache.put(["a"], torch.tensor([-1.0]))
    cache.save([("a", -1.5), ("b", -3.0), ("a", -1.0)])
    assert cache.get(["a"]).tolist() == [-1.5], "all processes take the first one's"
    again = ReferenceCache(tmp_path, "k")
    assert again.num_known == 2
    assert again.get(["a", "c"]) is None
    assert again.get(["b", "a"]).tolist() == [-3, -1.5]
    assert not list(tmp_path.rglob("*.partial"))


def test_the_first_value_of_an_answer_stays(tmp_path):
    cache = ReferenceCache(tmp_path, "k")
    held = cache.put(["a", "b", "a", ""], torch.tensor([-1.0, -2.0, -1.1, 0.0]))
    assert held.tolist() == [-1, -2, -1, 0]
    held = cache.put(["c", "a", "c"], torch.tensor([-3.0, -1.2, -3.1]))
    assert held.tolist() == [-3, -1, -3]
    cache.save()
    held = ReferenceCache(tmp_path, "k").put(["d", "c"], torch.tensor([-4.0, -3.2]))
    assert held.tolist() == [-4, -3]


def test_runs_on_the_same_data_keep_each_others_answers(tmp_path):
    one, other = ReferenceCache(tmp_path, "k"), ReferenceCache(tmp_path, "k")
    for cache, key in ((one, "a"), (other, "b"), (one, "c")):
        cache.put([key], torch.tensor([-1.0]))
        cache.save()
    assert ReferenceCache(tmp_path, "k").missing(["a", "b", "c"]) == set()


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "renamed"])
def test_a_damaged_or_foreign_file_is_reported_and_not_used(damage, tmp_path, capfd):
    path = filled(tmp_path).path
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":  # one byte of one number
        at = content.index(torch.tensor(-5.0).numpy().tobytes())
        content[at] ^= 1
        path.write_bytes(content)
    elif damage == "text":
        path.write_text("not Arrow")
    else:
        path.rename(path.with_name("answers-other.arrow"))
    again = ReferenceCache(tmp_path, "other" if damage == "renamed" else "k")
    assert again.num_known == 0
    assert "is not used and will be made anew" in " ".join(capfd.readouterr().err.split())
    filled(tmp_path, again.key)
    assert ReferenceCache(tmp_path, again.key).num_known == 3


def test_damaged_text_is_found_before_it_is_read(tmp_path, capfd):
    """PyArrow reads strings wherever their offsets say: a flipped byte ended in a segfault."""
    path = filled(tmp_path).path
    content = path.read_bytes()
    lengths = np.array([0, 2, 4, 6], dtype=np.int32).tobytes()  # where each of three keys ends
    at = content.index(lengths)
    for place, flip in ((at + 7, 0x80), (at + 6, 0xFF), (at + 15, 0x80)):
        damaged = bytearray(content)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        assert ReferenceCache(tmp_path, "k").num_known == 0
        assert "is not used and will be made anew" in " ".join(capfd.readouterr().err.split())


def test_files_of_earlier_versions_are_named(tmp_path, capfd):
    folder = tmp_path / "reference-logprobs"
    folder.mkdir()
    (folder / "0123456789abcdef.arrow").write_bytes(b"by row")
    assert ReferenceCache(tmp_path, "k").num_known == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "of an earlier version are not used, because they are by row; delete them from" in said
    assert said.endswith("0123456789abcdef.arrow")


def test_non_finite_values_are_refused(tmp_path):
    cache = ReferenceCache(tmp_path, "k")
    cache.put(["a"], torch.tensor([float("nan")]))
    with pytest.raises(FloatingPointError):
        cache.get(["a"])


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
    made = trainer("llava", engine, rows, tmp_path, reference_cache=ReferenceCache(tmp_path, "k"))
    first, second = step(made), step(made)
    made.save_reference_cache()
    calls = []
    later = trainer("llava", engine, rows, tmp_path, reference_cache=ReferenceCache(tmp_path, "k"))
    later.compute_ref_log_probs = lambda *inputs: calls.append(inputs)
    third = step(later)
    assert not calls
    assert first[0] == plain[0]
    assert second[0] == third[0] == pytest.approx(plain[0], rel=1e-6)


def same_prompt(answers, seed=0):
    """A row for each pair of `answers`, all with one image and prompt."""
    from datasets import Dataset

    from vlmdpo.data.pairs import message

    row = pairs(1, seed=seed)[0]
    rows = [
        {**row, "chosen": [message("assistant", c)], "rejected": [message("assistant", r)]}
        for c, r in answers
    ]
    return Dataset.from_list(
        [{**row, "row": number} for number, row in enumerate(rows)], features=pairs(1).features
    )


def counted(made, runs):
    """Let `runs` have how many rows each reference forward of this trainer has."""
    compute = made.compute_ref_log_probs

    def run(model, inputs):
        runs.append(len(inputs["input_ids"]))
        return compute(model, inputs)

    made.compute_ref_log_probs = run
    return made


@pytest.mark.parametrize("engine", ["shared", "stock"])
def test_an_answer_has_one_log_prob_in_all_its_pairs(engine, tmp_path):
    answers = [("one", "two"), ("two", "three"), ("one", "three")]
    rows = same_prompt(answers)
    plain = step(trainer("llava", engine, rows, tmp_path))
    cache = ReferenceCache(tmp_path, "k")
    made = trainer("llava", engine, rows, tmp_path, reference_cache=cache)
    assert step(made, rows=[0, 1])[0] < 100
    assert cache.num_known == 3
    runs = []
    found = step(counted(made, runs))
    assert not runs, "the third pair has only answers of the other two"
    assert found[0] == pytest.approx(plain[0], rel=1e-5)


def test_slices_orders_and_supersets_share_what_they_have(tmp_path):
    rows = pairs(6, images=(1, 0, 2))
    settings = {"per_device_train_batch_size": 1}
    part = trainer(
        *("llava", "shared", rows.select(range(3)), tmp_path),
        **settings,
        reference_cache=ReferenceCache(tmp_path, "k"),
    )
    for number in range(3):
        step(part, rows=[number])
    part.save_reference_cache()
    renumbered = rows.remove_columns("row").select([5, 1, 4, 0, 3, 2]).add_column("row", range(6))
    runs = []
    whole = counted(
        trainer(
            *("llava", "shared", renumbered, tmp_path),
            **settings,
            reference_cache=ReferenceCache(tmp_path, "k"),
        ),
        runs,
    )
    plain = trainer("llava", "shared", renumbered, tmp_path, **settings)
    for number in range(6):
        expected = step(plain, rows=[number])[0]
        assert step(whole, rows=[number])[0] == pytest.approx(expected, rel=1e-6)
    assert len(runs) == 3, "only the rows that the first run did not have"


def test_with_ld_alpha_an_answer_is_known_by_its_pair(tmp_path):
    answers = [("one answer", "two"), ("one answer", "another, and longer"), ("two", "one answer")]
    rows = same_prompt(answers)
    plain = step(trainer("llava", "shared", rows, tmp_path, ld_alpha=0.5))[0]
    cache = ReferenceCache(tmp_path, "k")
    made = trainer("llava", "shared", rows, tmp_path, ld_alpha=0.5, reference_cache=cache)
    assert step(made)[0] == pytest.approx(plain, rel=1e-6)
    assert cache.num_known == 4, "the third pair is the first one, turned"
    assert step(made)[0] == pytest.approx(plain, rel=1e-6)


def test_only_rows_with_missing_answers_are_filled_in(tmp_path):
    answers = [("one", "two"), ("three", "two"), ("one", "three"), ("four", "one")]
    rows = same_prompt(answers)
    cache = ReferenceCache(tmp_path, "k")
    settings = {"per_device_train_batch_size": 1}
    made = trainer("llava", "shared", rows, tmp_path, **settings, reference_cache=cache)
    runs = []
    fill_reference_cache(counted(made, runs))
    assert runs == [6], "the third pair has answers of the first two"
    assert cache.num_known == 4
    fill_reference_cache(made)
    assert len(runs) == 1
    for split in (rows, rows.select([2])):
        again = trainer(
            *("llava", "shared", split, tmp_path),
            **settings,
            reference_cache=ReferenceCache(tmp_path, "k"),
        )
        fill_reference_cache(counted(again, runs))
    assert len(runs) == 1


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
    from vlmdpo.training.run_trainer import RunTrainer

    calls = []
    compute = RunTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        RunTrainer, "compute_ref_log_probs", lambda *a: calls.append(a) or compute(*a)
    )
    more = [kind, "--num-train-epochs", "2", "--lora-dropout", "0"]
    cached, _, first = train(vlmdpo, few, tmp_path / "a", *more)
    once = len(calls)
    assert once > 0
    _, said, second = train(vlmdpo, few, tmp_path / "b", *more)
    assert "reference log-probs: those of 48 answers found in" in said
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
    assert "reference log-probs: those of 48 answers found in" in said


def test_a_damaged_cache_is_rebuilt_by_the_next_run(few, tmp_path, vlmdpo):
    train(vlmdpo, few, tmp_path / "a", "--num-train-epochs", "1")
    [path] = (few / "reference-logprobs").glob("*.arrow")
    before = pa.ipc.open_file(path).read_all()
    path.write_bytes(path.read_bytes()[:100])
    _, said, _ = train(vlmdpo, few, tmp_path / "b", "--num-train-epochs", "1")
    assert "is not used and will be made anew" in said
    after = pa.ipc.open_file(path).read_all()
    assert after["answer"] == before["answer"]
    assert after["ref_logps"].to_pylist() == pytest.approx(
        before["ref_logps"].to_pylist(), rel=1e-5
    )


def test_data_that_is_prepared_again_keeps_what_its_rows_share(tmp_path, vlmdpo):
    from vlmdpo.commands import prepare
    from vlmdpo.config import PrepareConfig

    data = tmp_path / "few"
    for limit, test_size, found in ((16, 0, ""), (24, 0.2, "those of 32 answers found")):
        settings = PrepareConfig(
            limit=limit, test_size=test_size, output_dir=data, overwrite=bool(found)
        )
        prepare.run(settings)
        _, said, _ = train(vlmdpo, data, tmp_path / str(limit), "--num-train-epochs", "1")
        assert found in said
    assert (
        pa.ipc.open_file(*(data / "reference-logprobs").glob("*.arrow")).read_all().num_rows == 48
    )
