"""Several sources in one preparation, and votes among them: which rows are kept, how often."""

import json
from collections import Counter

import pytest
from datasets import load_from_disk

from tests.support.images import encoded
from vlmdpo import hub
from vlmdpo.data import mixture, store

PAIR = {"image": "a.png", "question": "Moon?", "chosen": "Yes", "rejected": "No"}
SWAPPED = {**PAIR, "chosen": "No", "rejected": "Yes"}


def _write(folder, rows, name="d.jsonl"):
    folder.mkdir(exist_ok=True)
    for picture in ("a", "b"):
        (folder / f"{picture}.png").write_bytes(encoded((30, 20 + (picture == "b"))))
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def _at(minute, row):
    return {**row, "voted_at": f"2026-11-27T10:{minute:02}:00+00:00"}


def _prepare(vlmdpo, *arguments):
    code, out, err = vlmdpo("prepare", *arguments, "--output-dir", "out", "--json", "--overwrite")
    assert code == 0, err
    return json.loads(out)


def _answers(folder="out"):
    rows = load_from_disk(folder)
    return [
        tuple(row[side][0]["content"][0]["text"] for side in ("chosen", "rejected")) for row in rows
    ]


def test_the_last_vote_on_a_pair_of_answers_counts(tmp_path, vlmdpo):
    other = {**PAIR, "chosen": "A full one"}
    votes = [_at(1, PAIR), _at(2, other), _at(3, SWAPPED), _at(4, {**PAIR, "image": "b.png"})]
    report = _prepare(vlmdpo, "--dataset", _write(tmp_path / "d", votes), "--on-bad", "fail")
    assert report["dropped"] == {"earlier_vote": 1}
    assert report["dropped_examples"]["earlier_vote"] == [
        "row 0: a later vote on these answers counts"
    ]
    assert _answers() == [("A full one", "No"), ("No", "Yes"), ("Yes", "No")]
    again = [_at(1, PAIR), _at(2, SWAPPED), _at(3, PAIR)]  # and back
    assert _prepare(vlmdpo, "--dataset", _write(tmp_path / "d", again))["rows_out"] == 1
    assert _answers() == [("Yes", "No")]
    late = [_at(9, PAIR), _at(2, SWAPPED)]  # joined from two files
    _prepare(vlmdpo, "--dataset", _write(tmp_path / "d", late))
    assert _answers() == [("Yes", "No")]


def test_without_votes_the_first_row_counts(tmp_path, vlmdpo):
    report = _prepare(vlmdpo, "--dataset", _write(tmp_path / "d", [PAIR, SWAPPED]))
    assert (report["dropped"], _answers()) == ({"swapped_copy": 1}, [("Yes", "No")])


def test_votes_count_over_the_pairs_they_are_mixed_with(tmp_path, vlmdpo):
    pairs = [PAIR, {**PAIR, "question": "Sun?"}, {**PAIR, "chosen": "Two"}]
    votes = [_at(1, SWAPPED), _at(2, {**PAIR, "chosen": "Two"})]
    data = [_write(tmp_path / "d", pairs), _write(tmp_path / "v", votes, "votes.jsonl")]
    report = _prepare(vlmdpo, "--dataset", ",".join(data))
    assert report["dropped"] == {"duplicate": 1, "swapped_copy": 1}
    assert report["dropped_examples"]["swapped_copy"] == ["'d.jsonl' row 0: a vote counts instead"]
    assert _answers() == [("Yes", "No"), ("No", "Yes"), ("Two", "No")]
    assert [row["source_row"] for row in load_from_disk("out")] == [1, 3, 4]


def test_shares_and_repeats_are_taken_and_counted(tmp_path, vlmdpo):
    data = [
        _write(tmp_path / name, [{**PAIR, "question": f"{name}{i}?"} for i in range(10)])
        for name in "xyz"
    ]
    base = ["--dataset", ",".join(data), "--mix", "1,0.5,2.3"]
    report = _prepare(vlmdpo, *base)
    assert [
        (source["mix"], source["rows_in"], source["usable"], source["rows_out"])
        for source in report["sources"]
    ] == [(1, 10, 10, 10), (0.5, 10, 10, 5), (2.3, 10, 10, 23)]
    assert report["rows_out"] == 38
    # Repeats have their prompt in common.
    assert report["distinct"] == {"images": 1, "prompts": 25, "pairs_per_prompt": 38 / 25}
    questions = [row["prompt"][0]["content"][-1]["text"] for row in load_from_disk("out")]
    assert Counter(question[0] for question in questions) == {"x": 10, "y": 5, "z": 23}
    assert sorted(Counter(questions).values()) == [1] * 15 + [2] * 7 + [3] * 3
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Sources</h2>" in page
    card = hub.card(store.read_manifest(tmp_path / "out"), "me/pairs")
    assert "| d.jsonl | 10 | 10 | 2.3 | 23 |" in card
    assert str(tmp_path) not in card
    _, screen, _ = vlmdpo("prepare", *base, "--output-dir", "out")
    assert "Sources" in screen
    other = _prepare(vlmdpo, *base, "--seed", "7")
    assert other["rows_out"] == 38
    assert questions != [row["prompt"][0]["content"][-1]["text"] for row in load_from_disk("out")]


def test_a_test_split_of_a_mixture_has_no_repeats_and_no_row_of_the_other(tmp_path, vlmdpo):
    rows = [{**PAIR, "image": None, "question": f"{i}?"} for i in range(20)]
    report = _prepare(
        *(vlmdpo, "--dataset", f"{_write(tmp_path / 'd', rows)},scenes", "--mix", "3,0.01"),
        *("--test-size", "0.3", "--limit", "100"),
    )
    splits = {
        split: [json.dumps(row["prompt"]) for row in store.load(tmp_path / "out", split)]
        for split in ("train", "test")
    }
    assert not set(splits["train"]) & set(splits["test"])
    assert len(set(splits["test"])) == len(splits["test"])
    assert max(Counter(splits["train"]).values()) == 3
    assert sum(source["rows_out"] for source in report["sources"]) == report["rows_out"]


def test_a_row_that_is_dropped_and_one_that_is_repeated_do_not_make_up_for_each_other(
    tmp_path, vlmdpo
):
    """A shard is linked only if it holds just the rows that are wanted, not as many."""
    rows = [PAIR, PAIR, {**PAIR, "question": "Sun?"}]
    report = _prepare(vlmdpo, "--dataset", _write(tmp_path / "d", rows), "--mix", "1.5")
    assert report["rows_out"] == 3
    assert len(set(map(str, load_from_disk("out")["prompt"]))) == 2


def test_prepared_data_is_a_source_too(tmp_path, vlmdpo):
    first = _write(tmp_path / "d", [PAIR, {**PAIR, "image": "b.png"}])
    assert vlmdpo("prepare", "--dataset", first, "--output-dir", "mine", "--test-size", "1")[0] == 0
    votes = _write(tmp_path / "v", [_at(1, {**PAIR, "question": "Sun?"})])
    report = _prepare(vlmdpo, "--dataset", f"mine,{votes}", "--mix", "1,2")
    assert [source["rows_out"] for source in report["sources"]] == [1, 2]
    assert [len(images) for images in load_from_disk("out")["images"]] == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dataset", "a,a"], "names a source twice"),
        (["--dataset", "a,"], "names a source twice or none"),
        (["--dataset", "a,b", "--mix", "1"], "give 2 numbers above 0"),
        (["--dataset", "a,b", "--mix", "1,x"], "cannot read '1,x'"),
        (["--mix", "0"], "give 1 numbers above 0"),
        (["--mix", "nan"], "give 1 numbers above 0"),
    ],
)
def test_mixtures_that_cannot_be_read(arguments, says, vlmdpo):
    code, _, err = vlmdpo("prepare", *arguments)
    assert (code, says in err) == (2, True), err


def test_copies_are_seeded_and_exact():
    parts = [0] * 10 + [1] * 10
    taken = mixture.copies([0.5, 2.25], parts, 1)
    assert sum(taken[:10]) == 5
    assert sorted(taken[10:]) == [2] * 8 + [3] * 2
    assert taken == mixture.copies([0.5, 2.25], parts, 1) != mixture.copies([0.5, 2.25], parts, 2)
