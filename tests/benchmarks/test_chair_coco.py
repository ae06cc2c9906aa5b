"""COCO's annotation files: read as streams, refused where they are others, and kept once read."""

import json
import tracemalloc

import pytest

from tests.conftest import unfolded
from tests.support import coco
from vlmdpo.benchmarks.chair import benchmark, json_stream, kept
from vlmdpo.config import EvalConfig
from vlmdpo.errors import DataError

NAMES = [
    f"{kind}_{split}2014.json" for kind in ("instances", "captions") for split in ("val", "train")
]


@pytest.fixture
def data(tmp_path):
    return coco.write(tmp_path / "annotations", {1: (["dog"], ["A cat."]), 2: ([], ["A bench."])})


def load(data, **options):
    return benchmark.load(EvalConfig(benchmark="chair", data=data, **options))


CONTENT = {
    "info": {"a": [1, {"b": "]}"}]},
    "images": [{"id": 12345, "x": -1.5e-3}, 77, "a, b", [], None],
    "empty": [],
    "number": 1234,
    "annotations": [{"é": '\u2028 \\ "'}, {}],
}


@pytest.mark.parametrize("indent", [None, 2])
def test_entries_are_those_of_a_json_parser(indent, tmp_path):
    text = json.dumps(CONTENT, indent=indent, ensure_ascii=False)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    names = ("images", "annotations", "empty")
    assert list(json_stream.entries(tmp_path / "a.json", names)) == [
        (name, number, entry) for name in names for number, entry in enumerate(CONTENT[name])
    ]


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    text = json.dumps(CONTENT)
    for end in range(len(text)):
        (tmp_path / "a.json").write_text(text[:end])
        with pytest.raises(DataError, match="not valid JSON, or cut short"):
            list(json_stream.entries(tmp_path / "a.json", ["images"]))


@pytest.mark.parametrize("text", ['{"a": 1,}', '{"a" 1}', '{"images": [1 2]}', '{"a": [}', "\xff"])
def test_what_is_no_json_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match="not valid JSON"):
        list(json_stream.entries(tmp_path / "a.json", ["images"]))


def test_a_large_file_is_never_in_memory(tmp_path):
    entry = json.dumps({"image_id": 1, "category_id": 2, "segmentation": [[1.25] * 200]})
    path = tmp_path / "a.json"
    path.write_text(f'{{"annotations": [{", ".join([entry] * 1500)}]}}')
    assert path.stat().st_size > 1_800_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in json_stream.entries(path, ["annotations"])) == 1500
        assert tracemalloc.get_traced_memory()[1] < 600_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("missing", NAMES)
def test_each_of_the_four_files_is_needed(data, missing):
    (data / missing).unlink()
    with pytest.raises(DataError, match=rf"lacks {missing}; CHAIR needs all four"):
        load(data)


def test_other_folders_are_refused_with_the_next_step(data, tmp_path):
    with pytest.raises(DataError, match="does not exist; unpack COCO's annotations_trainval2014"):
        load(tmp_path / "absent")
    with pytest.raises(DataError, match=f"did you mean --data '{data}'"):
        load(tmp_path)
    for name in NAMES:
        (data / name).rename(data / name.replace("2014", "2017"))
    with pytest.raises(DataError, match="files of 2017, and CHAIR needs those of 2014"):
        load(data)


def change(path, **lists):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **lists}))


@pytest.mark.parametrize(
    ("name", "lists", "said"),
    [
        (
            "captions_val2014.json",
            {"annotations": [{"image_id": 1}]},
            "lacks caption",
        ),
        ("captions_train2014.json", {"annotations": []}, "it lists no annotations"),
        ("instances_val2014.json", {"images": [7]}, r"entry 0 .* of images is not an object"),
        (
            "instances_val2014.json",
            {"images": [{"id": "1", "file_name": "a"}]},
            "id must be",
        ),
        ("instances_train2014.json", {"categories": [{"id": 1, "name": "dog"}]}, "80 categories"),
        (
            "instances_val2014.json",
            {"annotations": [{"image_id": 1, "category_id": 99}]},
            "no category 99, which a box has",
        ),
    ],
    ids=str,
)
def test_files_of_another_layout_are_refused(data, name, lists, said):
    change(data / name, **lists)
    with pytest.raises(DataError, match=said):
        load(data)


def test_captions_in_the_place_of_boxes_are_refused(data):
    (data / "instances_val2014.json").write_bytes((data / "captions_val2014.json").read_bytes())
    with pytest.raises(DataError, match="lacks category_id"):
        load(data)


def test_coco_is_read_once_and_captions_once_for_each_image(data, tmp_path, monkeypatch):
    read = []
    original = json_stream.entries

    def entries(path, names):
        read.append(path.name)
        return original(path, names)

    monkeypatch.setattr(json_stream, "entries", entries)
    (tmp_path / "ids").write_text("1")
    first = load(data, ids=tmp_path / "ids")
    assert sorted(read) == sorted(NAMES)
    read.clear()
    again = load(data, ids=tmp_path / "ids")
    assert (again.truths, again.descriptions) == (first.truths, first.descriptions)
    assert not read
    assert load(data).truths == {1: {"dog", "cat"}, 2: {"bench"}}
    assert sorted(read) == ["captions_train2014.json", "captions_val2014.json"]
    read.clear()
    change(data / "captions_val2014.json", annotations=[{"image_id": 1, "caption": "A bus."}])
    assert load(data, ids=tmp_path / "ids").truths == {1: {"dog"}}
    assert sorted(read) == sorted(NAMES)


def test_kept_files_that_are_damaged_are_made_anew(data, tmp_path, capsys):
    truths = load(data).truths
    files = sorted((tmp_path / "cache").iterdir())
    assert [file.name.split("-")[0] for file in files] == ["chair", "coco"]
    for file in files:
        file.write_text(file.read_text().replace("dog", "cow"))
    assert load(data).truths == truths
    said = unfolded(capsys.readouterr().err)
    assert said.count("its content does not match its digest") == 2
    for file in files:
        file.write_bytes(b"\xff")
    assert load(data).truths == truths
    capsys.readouterr()
    assert load(data).truths == truths
    assert "not used" not in capsys.readouterr().err
    assert sorted((tmp_path / "cache").iterdir()) == files, "no temporary files are left"


def test_a_cache_that_cannot_be_written_is_a_warning(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(kept.FOLDER, str(tmp_path / "file"))
    assert load(data).truths == {1: {"dog", "cat"}, 2: {"bench"}}
    assert "name another folder with VLMDPO_CACHE" in unfolded(capsys.readouterr().err)


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(kept.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept.cache_folder() == tmp_path / "vlmdpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kept.cache_folder() == tmp_path / ".cache" / "vlmdpo"
