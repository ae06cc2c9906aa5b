"""Sources: the same rows from every kind of file, in units that any process can read alone."""

import csv
import io
import json
import tarfile

import pyarrow
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature

from tests.support.images import encoded, sent
from vlmdpo.data import hub, schemas, sources
from vlmdpo.data.pairs import check, text_of
from vlmdpo.data.reasons import UnreadableRow
from vlmdpo.data.sources import Streamed, Unit, bounds
from vlmdpo.errors import DataError

COUNT = 10
PICTURES = [encoded((10 + i, 8)) for i in range(COUNT)]


def _row(i, image):
    return {"image": image, "question": f'q{i}, "said"\nso', "chosen": "a", "rejected": "b"}


def _folder(tmp_path):
    (tmp_path / "p").mkdir()
    for i, picture in enumerate(PICTURES):
        (tmp_path / "p" / f"{i}.png").write_bytes(picture)
    return [_row(i, f"p/{i}.png") for i in range(COUNT)]


def _parquet(path, **more):
    rows = [_row(i, {"bytes": picture, "path": None}) for i, picture in enumerate(PICTURES)]
    pq.write_table(pyarrow.Table.from_pylist(rows), path, **more)


def _saved(path):
    texts = {name: Value("string") for name in ("question", "chosen", "rejected")}
    rows = [_row(i, {"bytes": picture, "path": None}) for i, picture in enumerate(PICTURES)]
    return Dataset.from_list(rows, features=Features({"image": ImageFeature(), **texts}))


def _tar(path, mode="w"):
    with tarfile.open(path, mode) as archive:
        for i, picture in enumerate(PICTURES):
            row = _row(i, None)
            held = {
                f"{i:04d}.jpg": picture,
                f"{i:04d}.json": json.dumps(
                    {"chosen": row["chosen"], "rejected": row["rejected"]}
                ).encode(),
                f"{i:04d}.question.txt": row["question"].encode(),
            }
            for name, data in held.items():
                member = tarfile.TarInfo(f"shard/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def _write(kind, tmp_path):
    rows = _folder(tmp_path)
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        _parquet(path)
    elif kind == "jsonl":
        path.write_text("\n".join([*(json.dumps(row) for row in rows), ""]))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "saved":
        _saved(path).save_to_disk(str(path))
    elif kind == "dict":
        DatasetDict({"train": _saved(path), "test": _saved(path).select([0])}).save_to_disk(
            str(path)
        )
    elif kind == "folder":
        path = tmp_path / "p"
        (path / "metadata.csv").write_text(
            "file_name,question,chosen,rejected\n"
            + "".join(f'{i}.png,"q{i}, ""said""\nso",a,b\n' for i in range(COUNT))
        )
    else:
        _tar(path, "w:gz" if kind == "tar.gz" else "w")
    return path


@pytest.mark.parametrize(
    "kind", ["parquet", "jsonl", "json", "csv", "tsv", "saved", "dict", "tar", "tar.gz", "folder"]
)
def test_every_kind_of_file_gives_the_same_pairs(kind, tmp_path):
    source = hub.open_source(str(_write(kind, tmp_path)), "train")
    assert source.count == COUNT
    first = source.first_row()
    draft = schemas.detect(source.columns, first, "here").unchecked_pair
    assert bounds(source, "train[20%:70%]", None) == (2, 7)
    for start, stop in ((0, COUNT), (2, 7)):
        units = list(source.units(start, stop))
        away = sent(source)  # as another process has it
        found = [check(draft(row), source.root) for unit in units for row in away.rows(sent(unit))]
        assert [text_of(pair.prompt[0]) for pair in found] == [
            f'<image>\nq{i}, "said"\nso' for i in range(start, stop)
        ]
        assert [pair.images[0] for pair in found] == PICTURES[start:stop]


def _numbers(units):
    return [(unit.number, unit.first, unit.last) for unit in units]


def test_units_are_the_same_in_every_run_and_limited_by_rows_or_bytes(monkeypatch):
    monkeypatch.setattr(sources, "UNIT_ROWS", 4)
    monkeypatch.setattr(sources, "_UNIT_BYTES", 100)
    source = Streamed(
        name="s",
        fingerprint="f",
        count=10,
        root=None,
        stream=lambda: ({"text": "x" * 9, "n": i} for i in range(10)),
    )
    assert _numbers(source.units(0, None)) == [(0, 0, 4), (1, 4, 8), (2, 8, 10)]
    assert _numbers(source.units(3, 9)) == [(0, 3, 7), (1, 7, 9)]
    heavy = Streamed(
        name="s",
        fingerprint="f",
        count=3,
        root=None,
        stream=lambda: ({"b": b"x" * 90} for _ in range(3)),
    )
    assert _numbers(heavy.units(0, None)) == [(0, 0, 2), (1, 2, 3)]
    with pytest.raises(DataError, match="has no rows"):
        Streamed(name="s", fingerprint="f", count=0, root=None, stream=lambda: iter(())).first_row()


@pytest.mark.parametrize("group", [1, 3, 5, 10])
@pytest.mark.parametrize("huge", [False, True])
def test_parquet_units_follow_row_groups_and_stream_huge_ones(group, huge, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_ROWS", 4)
    monkeypatch.setattr(sources, "_ROW_GROUP_ROWS", 4 if huge else 100)
    (tmp_path / "d").mkdir()
    for name in ("a", "b"):
        _parquet(tmp_path / "d" / f"{name}.parquet", row_group_size=group)
    source = hub.open_source(str(tmp_path / "d"), "train")
    for first, last in ((0, 20), (3, 17), (7, 8), (11, 20)):
        units = list(source.units(first, last))
        assert [unit.number for unit in units] == list(range(len(units)))
        assert [unit.first for unit in units] == [first, *(unit.last for unit in units[:-1])]
        assert units[-1].last == last
        assert any(unit.records is not None for unit in units) == (huge and group > 4)
        rows = [row["image"]["bytes"] for unit in units for row in source.rows(unit)]
        assert rows == (PICTURES * 2)[first:last]


def test_files_of_a_folder_are_chosen_by_split(tmp_path):
    (tmp_path / "d" / "data").mkdir(parents=True)
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        _parquet(tmp_path / "d" / "data" / f"{name}.parquet")
    assert hub.open_source(str(tmp_path / "d"), "train[:50%]").count == COUNT
    with pytest.raises(DataError, match=r"no file in .* is named after 'validation'"):
        hub.open_source(str(tmp_path / "d"), "validation")


def test_what_has_no_splits_is_the_split_train(tmp_path):
    _parquet(tmp_path / "rows.parquet")
    path = str(tmp_path / "rows.parquet")
    assert hub.open_source(path, "train[:50%]").count == COUNT
    with pytest.raises(DataError, match=r"rows.parquet' has no split 'test'; all its rows are"):
        hub.open_source(path, "test[:50%]")
    _parquet(tmp_path / "test.parquet")
    assert hub.open_source(str(tmp_path / "test.parquet"), "test").count == COUNT
    Dataset.from_dict({"a": ["1"]}).save_to_disk(tmp_path / "saved")
    assert hub.open_source(str(tmp_path / "saved"), "train").count == 1
    with pytest.raises(DataError, match=r"saved' has no split 'test'"):
        hub.open_source(str(tmp_path / "saved"), "test")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.json", '[{"a": 1}', "is not valid JSON"),
        ("x.csv", 'a,b\n"1,2\n', "is not valid CSV"),
        ("x.tar", "no archive", "is not a readable tar archive"),
        ("x.parquet", "no parquet", "is not a readable Parquet file"),
        ("x.txt", "text", "expected files of one kind"),
    ],
)
def test_broken_files_are_located(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says):
        list(hub.open_source(str(tmp_path / name), "train").units(0, None))


@pytest.mark.parametrize(
    ("name", "text", "reason", "says"),
    [
        ("x.jsonl", '{"a": "1"}\n{broken\n{"a": "2"}\n', "bad_json", "line 2 is not valid JSON"),
        ("x.jsonl", '{"a": "1"}\n[1]\n{"a": "2"}\n', "bad_json", "line 2 holds list"),
        ("x.json", '[{"a": "1"}, 2, {"a": "2"}]', "bad_json", "entry 1 (counted from 0) holds int"),
        ("x.csv", "a\n1\n1,1\n2\n", "ragged_line", "line 3 has 2 cells, the header 1 columns"),
        ("x.tsv", "a\n1\n1\t1\n2\n", "ragged_line", "line 3 has 2 cells, the header 1 columns"),
    ],
)
def test_a_line_that_cannot_be_read_is_one_row(name, text, reason, says, tmp_path):
    (tmp_path / name).write_text(text)
    source = hub.open_source(str(tmp_path / name), "train")
    assert source.count == 3
    first, bad, last = (row for unit in source.units(0, None) for row in source.rows(unit))
    assert (first["a"], last["a"]) == ("1", "2")
    assert isinstance(bad, UnreadableRow)
    assert bad["reason"] == reason
    assert says in bad["detail"]


@pytest.mark.parametrize(
    "line", ["a.png\tWhat is it?\tRed.\tBlue.", "1\t2\tyes\tno", "/9j/4AA\tyes\tyes\tno"]
)
def test_a_table_without_a_header_is_recognized(line, tmp_path, vlmdpo):
    says = "if its first line is a row, write the column names above it"
    (tmp_path / "x.tsv").write_text(f"{line}\n{line}\n")
    for more in ([], ["--map", "question=ask"]):
        code, _, err = vlmdpo("prepare", "--dataset", "x.tsv", *more)
        assert code == 3
        assert says in err
    (tmp_path / "x.tsv").write_text("photo\task\tgood\tbad\n" + line)
    code, _, err = vlmdpo("prepare", "--dataset", "x.tsv")
    assert code == 3
    assert says not in err


def test_a_folder_of_two_kinds_is_refused_and_its_json_is_not_data(tmp_path):
    _write("parquet", tmp_path)
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert hub.open_source(str(tmp_path), "train").count == COUNT
    (tmp_path / "more.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match=r"expected files of one kind .* found \.csv, \.parquet"):
        hub.open_source(str(tmp_path), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no \.parquet"):
        hub.open_source(str(tmp_path / "empty"), "train")


def test_saved_lists_of_images_are_read_as_stored_and_leave_nothing_behind(tmp_path):
    features = Features(
        {"images": List(ImageFeature()), "prompt": Value("string"), "n": Value("int32")}
    )
    rows = [
        {"images": [{"bytes": picture, "path": None}] * 2, "prompt": "q", "n": i}
        for i, picture in enumerate(PICTURES)
    ]
    Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "s"))
    before = sorted(path.name for path in (tmp_path / "s").iterdir())
    source = hub.open_source(str(tmp_path / "s"), "train")
    found = [row for unit in source.units(0, None) for row in source.rows(unit)]
    assert [[image["bytes"] for image in row["images"]] for row in found] == [
        [picture] * 2 for picture in PICTURES
    ]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == before


@pytest.mark.parametrize(
    ("split", "says"),
    [("train[:0]", "is empty"), ("train[", "cannot read"), ("train+test", "cannot read")],
)
def test_bad_splits(split, says):
    source = Streamed(name="s", fingerprint="f", count=10, root=None, stream=lambda: iter(()))
    with pytest.raises(DataError, match=says):
        bounds(source, split, None)


def test_a_stream_of_unknown_length_accepts_a_limit_but_not_a_slice():
    source = Streamed(
        name="s",
        fingerprint="f",
        count=None,
        root=None,
        stream=lambda: ({"n": i} for i in range(10)),
    )
    assert bounds(source, "train", None) == (0, None)
    assert bounds(source, "train", 3) == (0, 3)
    with pytest.raises(DataError, match="use --limit instead"):
        bounds(source, "train[:5]", None)
    assert list(source.units(0, 3)) == [Unit(0, 0, 3, [{"n": 0}, {"n": 1}, {"n": 2}])]


def test_the_hub_is_streamed_with_stored_images(monkeypatch):
    """What `load_dataset(streaming=True)` returns, made here: nothing is downloaded in tests."""
    import datasets
    import huggingface_hub

    stream = _saved(None).to_iterable_dataset()
    seen = {}

    def load_dataset(repo, subset, **settings):
        seen.update(repo=repo, subset=subset, **settings)
        return stream

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(
        huggingface_hub, "dataset_info", lambda repo, revision: type("Info", (), {"sha": "abc"})
    )
    source = hub.open_source("rlaif-v", "train", subset="part", revision="v1", streaming=True)
    assert seen == {
        "repo": "openbmb/RLAIF-V-Dataset",
        "subset": "part",
        "split": "train",
        "revision": "v1",
        "streaming": True,
    }
    assert source.fingerprint == "openbmb/RLAIF-V-Dataset@abc/part/train"
    rows = [row for unit in source.units(2, 5) for row in source.rows(unit)]
    assert [row["image"]["bytes"] for row in rows] == PICTURES[2:5]


def _archive(path, members):
    """A tar of (name, content); a content that is a tuple names the type and target of a link."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
                archive.addfile(member)
                continue
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


_FIELDS = json.dumps({"question": "?", "chosen": "a", "rejected": "b"}).encode()


def test_members_of_an_archive_that_cannot_be_used_cost_their_row_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmdpo.data.archives.MAX_BYTES", 1000)
    picture = encoded()
    samples = {
        "good": [("jpg", picture), ("json", b"\xef\xbb\xbf" + _FIELDS)],
        "hard": [("jpg", (tarfile.LNKTYPE, "good.jpg")), ("json", _FIELDS)],
        "soft": [("jpg", (tarfile.SYMTYPE, "good.jpg")), ("json", _FIELDS)],
        "lost": [("jpg", (tarfile.SYMTYPE, "gone.jpg")), ("json", _FIELDS)],
        "loop": [("jpg", (tarfile.SYMTYPE, "loop.jpg")), ("json", _FIELDS)],
        "fifo": [("jpg", (tarfile.FIFOTYPE, "")), ("json", _FIELDS)],
        "huge": [("jpg", b"\0" * 2000), ("json", _FIELDS)],
        "film": [("mp4", b"\0" * 2000), ("json", _FIELDS)],
        "pair": [("v1.jpg", picture), ("v1.json", _FIELDS), ("v2.jpg", picture), ("v2.json", b"")],
        "same": [("jpg", picture), ("json", _FIELDS), ("jpg", picture)],
        "poor": [("json", b"{")],
        "list": [("json", b"[]")],
    }
    members = [(f"{name}.{end}", data) for name, held in samples.items() for end, data in held]
    _archive(tmp_path / "x.tar", members)
    source = hub.open_source(str(tmp_path / "x.tar"), "train")
    assert source.count == len(samples)
    rows = [row for unit in source.units(0, None) for row in source.rows(unit)]
    found = [row.get("reason") or row["images"] for row in rows]
    assert found == [
        *[[picture]] * 3,
        *["missing_image"] * 3,
        *("oversized_image", "video", "merged_samples", "merged_samples", "bad_json", "bad_json"),
    ]


def test_a_full_disk_while_downloading_is_said_in_words(monkeypatch):
    import datasets
    from datasets.exceptions import DatasetGenerationError

    def full(*_, **__):
        try:
            raise OSError(28, "No space left on device")
        except OSError as problem:
            raise DatasetGenerationError("An error occurred while generating") from problem

    for fails in (full, lambda *_, **__: (_ for _ in ()).throw(OSError("Not enough disk space."))):
        monkeypatch.setattr(datasets, "load_dataset", fails)
        with pytest.raises(DataError, match="the disk is full; free some space, let HF_HOME"):
            hub.open_source("me/pairs", "train")


def test_duplicate_columns_of_parquet_are_refused_and_a_fifo_is_no_data(tmp_path):
    import os

    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    table = pyarrow.Table.from_arrays(columns, names=["chosen", "chosen"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="two columns named 'chosen'"):
        hub.open_source(str(tmp_path / "x.parquet"), "train")
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        hub.open_source(str(tmp_path / "x.jsonl"), "train")
