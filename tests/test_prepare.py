"""prepare, from the command line: the embedded pairs, local files, reuse, and what it refuses."""

import json

import pytest
from datasets import Image, List, load_from_disk

from tests.test_data import _bytes, _row


def _jsonl(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "x.png").write_bytes(_bytes((300, 200)))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({**_row(), "image": "x.png", **row}) + "\n" for row in rows))
    return path


def test_bare_prepares_the_scenes_and_reuses_them(vlmdpo):
    code, out, err = vlmdpo("prepare", "--json")
    assert code == 0
    first = json.loads(out)
    assert first["rows_in"] == first["rows_out"] >= 2000
    assert (first["dropped"], first["reused"], first["max_image_side"]) == ({}, False, 72)
    assert "full size: vlmdpo prepare --model idefics2-8b --dataset rlaif-v" in err
    dataset = load_from_disk(first["path"])
    assert dataset.features["images"] == List(Image(decode=True))
    assert dataset[0]["images"][0].size == (72, 72)
    assert set(first["versions"]) >= {"vlmdpo", "datasets", "transformers"}
    code, out, _ = vlmdpo("prepare")
    assert code == 0
    assert "Found prepared" in out
    assert "<end_of_utterance>" in out  # the example, as the chat template renders it


def test_bad_rows_are_dropped_counted_and_named(tmp_path, vlmdpo):
    rows = [{}, {"chosen": ""}, {"rejected": "a"}, {"image": "absent.png"}, {"image": "../x.png"}, {"question": "kept?"}]
    code, out, err = vlmdpo("prepare", "--dataset", _jsonl(tmp_path / "d", rows), "--output-dir", "out", "--json")
    assert code == 0
    report = json.loads(out)
    assert (report["rows_in"], report["rows_out"]) == (6, 2)
    assert report["dropped"] == {"empty_chosen": 1, "identical_answers": 1, "missing_image": 1, "image_outside_root": 1}
    assert report["dropped_examples"]["empty_chosen"] == ["row 1: chosen is ''"]
    assert load_from_disk("out")[1]["images"][0].size == (72, 48)
    code, out, err = vlmdpo("prepare", "--dataset", tmp_path / "d" / "rows.jsonl", "--output-dir", "out")
    assert "identical_answers" in out
    assert "67% of the rows were dropped" in err


def test_on_bad_fail_names_the_row(tmp_path, vlmdpo):
    path = _jsonl(tmp_path / "d", [{}, {"rejected": "a"}])
    code, _, err = vlmdpo("prepare", "--dataset", path, "--on-bad", "fail", "--output-dir", "out")
    assert code == 3
    assert "row 1: identical_answers" in err
    assert not (tmp_path / "out").exists()


def test_options_that_change_the_result_change_the_folder(tmp_path, vlmdpo):
    path = _jsonl(tmp_path / "d", [{"question": f"q{i}"} for i in range(8)])
    paths = set()
    for more in ([], ["--limit", "3"], ["--split", "train[:50%]"], ["--max-image-side", "10"]):
        code, out, _ = vlmdpo("prepare", "--dataset", path, "--json", *more)
        assert code == 0
        paths.add(json.loads(out)["path"])
    assert len(paths) == 4


def test_missing_columns_are_named(tmp_path, vlmdpo):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "x", "prompt": "q", "chosen": "a"}) + "\n")
    code, _, err = vlmdpo("prepare", "--dataset", tmp_path / "rows.jsonl")
    assert code == 3
    assert "missing column question, rejected; found image, prompt, chosen" in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--dataset", "rlaif-w"], 3, "Did you mean 'rlaif-v'?"),
        (["--dataset", "nobody/nothing"], 3, "nobody/nothing"),
        (["--dataset", "absent.parquet"], 3, "no file or folder 'absent.parquet'"),
        (["--model", "nobody/nothing"], 4, "cannot find 'nobody/nothing'"),
        (["--model", "idefics2-8c"], 4, "Did you mean 'idefics2-8b'?"),
        (["--show", "999999"], 3, "--show: row 999999"),
        (["--output-dir", "taken"], 3, "holds something else"),
        (["--output-dir", "file"], 3, "'file' is a file"),
        (["--output-dir", "file/below"], 3, "cannot write 'file/below'"),
    ],
)
def test_refusals(arguments, code, says, tmp_path, vlmdpo):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    got, _, err = vlmdpo("prepare", "--limit", "4", *arguments)
    assert got == code
    assert says in err.strip().splitlines()[-1]
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def test_bad_json_line_is_located(tmp_path, vlmdpo):
    path = _jsonl(tmp_path / "d", [{}])
    path.write_text(path.read_text() + "{broken\n")
    code, _, err = vlmdpo("prepare", "--dataset", path)
    assert code == 3
    assert "line 2 is no valid JSON" in err
