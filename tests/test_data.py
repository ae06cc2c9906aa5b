"""Images, sources and the prepared store: what is taken, what is refused, and by what name."""

import io
import json

import pytest
from PIL import Image

from vlmdpo.data import images, sources, store
from vlmdpo.errors import DataError


def _bytes(size=(40, 30), mode="RGB", kind="PNG", **more):
    buffer = io.BytesIO()
    Image.new(mode, size, 1 if mode == "P" else None).save(buffer, format=kind, **more)
    return buffer.getvalue()


def test_fitting_pictures_pass_untouched():
    for kind in ("PNG", "JPEG"):
        data = _bytes(kind=kind)
        assert images.bound(data, 40) is data
    assert images.bound(_bytes(), None) == _bytes()


def test_large_pictures_are_bounded_and_keep_their_shape():
    made = Image.open(io.BytesIO(images.bound(_bytes((200, 100), kind="JPEG"), 50)))
    assert (made.size, made.format, made.mode) == ((50, 25), "JPEG", "RGB")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK", "LA"])
def test_other_modes_become_rgb(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    made = Image.open(io.BytesIO(images.bound(_bytes(mode=mode, kind=kind), None)))
    assert made.mode == "RGB"


def test_transparent_parts_become_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(buffer, format="PNG")
    assert Image.open(io.BytesIO(images.bound(buffer.getvalue(), None))).getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    made = Image.open(io.BytesIO(images.bound(_bytes((40, 20), kind="JPEG", exif=exif), None)))
    assert made.size == (20, 40)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no picture at all", "unreadable_image"),
        (b"", "unreadable_image"),
        (_bytes((300, 300), kind="JPEG")[:400], "truncated_image"),
        (_bytes((300, 300))[:60], "truncated_image"),
    ],
)
def test_broken_pictures_have_a_reason(data, reason):
    with pytest.raises(images.BadImage) as caught:
        images.bound(data, 64)
    assert caught.value.reason == reason


def test_bombs_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(images.BadImage, match="40x30") as caught:
        images.bound(_bytes(), 64)
    assert caught.value.reason == "oversized_image"


def test_paths_stay_inside_their_root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(_bytes())
    (root / "fine.png").write_bytes(_bytes())
    assert images.read("fine.png", root) == _bytes()
    for path in ("../secret.png", str(tmp_path / "secret.png")):
        with pytest.raises(images.BadImage) as caught:
            images.read(path, root)
        assert caught.value.reason == "image_outside_root"


def _row(**changes):
    return {"image": {"bytes": _bytes(), "path": None}, "question": "What?", "chosen": "a", "rejected": "b", **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": " "}, "empty_chosen"),
        ({"rejected": None}, "empty_rejected"),
        ({"question": ""}, "empty_question"),
        ({"rejected": "a "}, "identical_answers"),
        ({"image": None}, "missing_image"),
        ({"image": "absent.png"}, "missing_image"),
        ({"image": 7}, "unreadable_image"),
    ],
)
def test_bad_rows_have_a_reason(changes, reason, tmp_path):
    with pytest.raises(sources.BadRow) as caught:
        sources.check(_row(**changes), tmp_path)
    assert caught.value.reason == reason


def test_local_sources_give_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet as pq
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = [_row(question=f"q{i}") for i in range(10)]
    pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "x.png").write_bytes(_bytes())
    lines = [json.dumps({**row, "image": "p/x.png"}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, ""]))
    columns = {name: Value("string") for name in sources.COLUMNS[1:]}
    Dataset.from_list(rows, features=Features({"image": ImageFeature(), **columns})).save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.parquet", "rows.jsonl", "saved"):
        source = sources.open_source(str(tmp_path / name), "train")
        assert source.count == 10
        first, last = sources.bounds(source, "train[20%:70%]", None)
        pairs = [sources.check(row, source.image_root) for row in source.rows(first, last)]
        assert [pair.question for pair in pairs] == [f"q{i}" for i in range(2, 7)]
        assert {pair.image for pair in pairs} == {_bytes()}


@pytest.mark.parametrize(
    ("split", "says"), [("train[:0]", "is empty"), ("train[", "cannot read"), ("train+test", "cannot read")]
)
def test_bad_splits(split, says):
    source = sources.Source("s", "f", 10, lambda first, last: iter(()), None)
    with pytest.raises(DataError, match=says):
        sources.bounds(source, split, None)


def test_store_is_whole_or_absent(tmp_path):
    pair = sources.PreferencePair(_bytes(), "q", "a", "b")

    def broken():
        yield pair
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(tmp_path / "out", broken(), dict)
    assert list(tmp_path.iterdir()) == []
    manifest = store.write(tmp_path / "out", iter([pair] * 3), lambda: {"key": "k"})
    assert (manifest["rows_out"], manifest["key"]) == (3, "k")
    loaded = store.load(tmp_path / "out")
    assert loaded[0]["images"][0].size == (40, 30)
    assert loaded.features == store.features()
