"""Images: which keep their bytes, which are corrected and noted, and which are refused."""

import base64
import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.images import encoded, noise, opened
from vlmdpo.data import images


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("PNG", "L"), ("JPEG", "RGB"), ("JPEG", "L"), ("WEBP", "RGB")],
)
def test_images_that_fit_keep_their_bytes_and_are_not_decoded(kind, mode, monkeypatch):
    data = encoded(kind=kind, mode=mode)
    monkeypatch.setattr(images, "_load", lambda picture: pytest.fail("decoded"))
    for side in (40, None):
        made = images.bounded(data, side)
        assert made.data is data
        assert (made.size, made.changes) == ((40, 30), ())


def test_large_images_are_reduced_and_keep_their_aspect_ratio():
    for size, side, wanted in (
        ((200, 100), 50, (50, 25)),
        ((101, 3), 10, (10, 1)),
        ((3, 1000), 100, (1, 100)),
    ):
        made = images.bounded(encoded(size, kind="JPEG"), side)
        picture = opened(made.data)
        assert (picture.size, made.size, picture.format, picture.mode) == (
            wanted,
            wanted,
            "JPEG",
            "RGB",
        )
        assert made.changes == ("resized",)


def test_reduced_images_look_like_pillows():
    for size in ((640, 480), (1300, 900), (2000, 2500)):  # decoded whole, at a half, at a quarter
        data = noise(size, quality=95)
        made = opened(images.bounded(data, 490).data)
        plain = opened(data)
        plain.thumbnail((490, 490))
        difference = np.abs(
            np.asarray(made, dtype=int) - np.asarray(plain.resize(made.size), dtype=int)
        )
        assert difference.mean() < 2, size


@pytest.mark.parametrize(
    ("mode", "kind", "changes"),
    [
        ("RGBA", "PNG", ("alpha_on_white",)),
        ("LA", "PNG", ("alpha_on_white",)),
        ("RGBA", "WEBP", ("alpha_on_white",)),
        ("P", "PNG", ("palette_to_rgb",)),
        ("I;16", "PNG", ("16bit_to_rgb",)),
        ("CMYK", "JPEG", ("cmyk_to_rgb",)),
        ("CMYK", "TIFF", ("cmyk_to_rgb",)),
        ("1", "PNG", ("mode_to_rgb",)),
        ("RGB", "BMP", ("bmp_to_png",)),
        ("RGB", "TIFF", ("tiff_to_png",)),
    ],
)
def test_other_modes_are_converted_and_named(mode, kind, changes):
    for side, more in ((None, ()), (20, ("resized",))):
        made = images.bounded(encoded(mode=mode, kind=kind), side)
        picture = opened(made.data)
        assert (picture.mode, picture.format) == ("RGB", "JPEG" if kind == "JPEG" else "PNG")
        assert made.changes == (
            (*changes, *more) if changes[0].endswith(("rgb", "white")) or not side else more
        )


def test_transparent_parts_become_white_and_sixteen_bits_are_scaled():
    clear = images.bounded(encoded((4, 4), "RGBA", color=(255, 0, 0, 0)), None)
    assert opened(clear.data).getpixel((0, 0)) == (255, 255, 255)
    deep = images.bounded(encoded((4, 4), "I;16", color=40_000), None)
    assert opened(deep.data).getpixel((0, 0)) == (156, 156, 156)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied_once(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    buffer = io.BytesIO()
    picture = Image.new("RGB", (40, 20))
    picture.paste("white", (0, 0, 20, 20))  # the left half, which the turn puts on top
    picture.save(buffer, format=kind, exif=exif)
    for side, size in ((None, (20, 40)), (10, (5, 10))):
        made = images.bounded(buffer.getvalue(), side)
        turned = opened(made.data)
        assert turned.size == size
        assert "exif_rotated" in made.changes
        assert turned.getpixel((2, 1))[0] > 200 > 60 > turned.getpixel((2, size[1] - 2))[0]
        assert turned.getexif().get(0x0112) is None


def test_the_first_of_several_frames_is_used_and_noted():
    red = Image.new("RGB", (9, 9), "red")
    for kind, name in (
        ("GIF", "animated_first_frame"),
        ("PNG", "animated_first_frame"),
        ("MPO", "first_of_several_pictures"),
    ):
        buffer = io.BytesIO()
        red.save(
            buffer, format=kind, save_all=True, append_images=[Image.new("RGB", (9, 9), "blue")]
        )
        made = images.bounded(buffer.getvalue(), None)
        assert name in made.changes
        assert opened(made.data).getpixel((4, 4))[0] > 200


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_truncated_at_any_point_are_refused(kind):
    data = noise((120, 90), kind=kind)
    for stop in range(1, len(data), len(data) // 40):
        with pytest.raises(images.BadImage) as caught:
            images.bounded(data[:stop], None)
        assert caught.value.reason in ("truncated_image", "unreadable_image")


def test_a_damaged_png_is_refused_and_a_jpeg_with_trailing_bytes_is_not():
    data = bytearray(noise((120, 90), kind="PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(images.BadImage) as caught:
        images.bounded(bytes(data), None)
    assert caught.value.reason == "truncated_image"
    whole = noise((120, 90))
    for tail in (b"\x00" * 10, b"camera's own trailer"):
        assert images.bounded(whole + tail, None).data == whole + tail


def test_bytes_that_are_not_an_image_have_a_reason():
    for data in (b"no picture at all", b""):
        with pytest.raises(images.BadImage) as caught:
            images.bounded(data, 64)
        assert caught.value.reason == "unreadable_image"


def test_bombs_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(images.BadImage, match="40x30") as caught:
        images.bounded(encoded(), 64)
    assert caught.value.reason == "oversized_image"


def test_a_bomb_that_pillow_refuses_has_the_same_reason(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(images.BadImage) as caught:
        images.bounded(encoded(), 64)
    assert caught.value.reason == "oversized_image"


def test_paths_stay_inside_their_root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded())
    (root / "fine.png").write_bytes(encoded())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    assert images.read("fine.png", root) == encoded()
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        with pytest.raises(images.BadImage) as caught:
            images.read(path, root)
        assert caught.value.reason == "image_outside_root"


def test_cells_of_every_kind_are_read(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded())
    uri = "data:image/png;base64," + base64.b64encode(encoded()).decode()
    cells = [
        encoded(),
        {"bytes": encoded(), "path": "gone.png"},
        {"bytes": None, "path": "x.png"},
        "x.png",
        uri,
    ]
    assert {images.read(cell, tmp_path) for cell in cells} == {encoded()}
    assert opened(images.read(Image.new("RGB", (3, 2)), tmp_path)).size == (3, 2)
    for cell, reason in (
        (7, "unreadable_image"),
        ("", "missing_image"),
        ("absent.png", "missing_image"),
        ("https://example.org/x.png", "image_is_url"),
        ("data:image/png;base64,!", "unreadable_image"),
    ):
        with pytest.raises(images.BadImage) as caught:
            images.read(cell, tmp_path)
        assert caught.value.reason == reason


def test_only_wanted_formats_are_opened_and_pillow_never_starts_a_program(monkeypatch):
    """A Postscript file named .png would run Ghostscript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    eps = io.BytesIO()
    Image.new("RGB", (9, 9)).save(eps, "EPS")
    for kind, data in (("EPS", eps.getvalue()), ("PPM", encoded(kind="PPM"))):
        assert opened(data) if kind == "PPM" else data.startswith(b"%!PS")  # Pillow itself would
        for read in (images.decode, images.open_bytes, lambda data: images.bounded(data, 8)):
            with pytest.raises(images.BadImage, match="no picture: begins with") as caught:
                read(data)
            assert caught.value.reason == "unreadable_image"


def test_all_of_vlmdpo_opens_images_in_one_place():
    root = Path(images.__file__).parent.parent
    opens = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(r"Image\.open\(", path.read_text("utf-8"))
    ]
    assert opens == ["data/images.py"]


def test_a_jpeg_of_very_many_scans_is_refused_before_decoding(monkeypatch):
    data = noise((300, 200), progressive=True)
    scan = data.rindex(b"\xff\xda")
    many = data[:-2] + data[scan:-2] * 100 + data[-2:]
    assert images.bounded(many, None).size == (300, 200)  # small enough
    monkeypatch.setattr(images, "MAX_SCANNED_PIXELS", 1_000_000)
    assert images.bounded(data, None).data == data
    with pytest.raises(images.BadImage, match="scans of 300x200") as caught:
        images.bounded(many, None)
    assert caught.value.reason == "oversized_image"


def test_links_stay_in_the_root_or_in_the_folder_that_is_allowed(tmp_path):
    """As in snapshots of the Hub, DVC's checkouts and folders of several datasets."""
    for name in ("blobs", "snapshot", "private"):
        (tmp_path / name).mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(encoded())
    (tmp_path / "private" / "x.png").write_bytes(encoded())
    (tmp_path / "snapshot" / "x.png").symlink_to("../blobs/abc")
    (tmp_path / "snapshot" / "own.png").symlink_to("x.png")
    (tmp_path / "snapshot" / "secret.png").symlink_to(tmp_path / "private" / "x.png")
    (tmp_path / "named").symlink_to("snapshot")
    allowed = (tmp_path / "blobs",)
    for root in (tmp_path / "snapshot", tmp_path / "named"):
        for name in ("x.png", "own.png", "../blobs/abc", str(tmp_path / "blobs" / "abc")):
            assert images.read(name, root, allowed) == encoded()
            with pytest.raises(images.BadImage, match="points outside"):
                images.read(name, root)
        for name in ("secret.png", "../private/x.png", "../blobs/../private/x.png"):
            with pytest.raises(images.BadImage) as caught:
                images.read(name, root, allowed)
            assert caught.value.reason == "image_outside_root"


def test_an_image_that_the_user_names_may_be_a_link(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(encoded())
    (tmp_path / "b.png").symlink_to("a/x.png")
    assert images.open_file(tmp_path / "b.png").size == (40, 30)


def test_messages_show_a_part_of_a_cell_and_no_address(tmp_path):
    for cell in ("x" * 9000 + ".png", "../" + "x" * 9000, "http://" + "x" * 9000, b"y" * 9000):
        with pytest.raises(images.BadImage) as caught:
            images.bounded(images.read(cell, tmp_path), None)
        assert len(str(caught.value)) < 200 + len(str(tmp_path))
        assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO"])
def test_whatever_bytes_are_damaged_an_image_is_read_or_has_a_reason(kind):
    data = noise((60, 40), kind=kind)
    random = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(data)
        for at in random.integers(0, min(len(data), 400), 4):
            damaged[at] = random.integers(256)
        for read in (images.decode, lambda data: images.bounded(data, 20)):
            with contextlib.suppress(images.BadImage):
                read(bytes(damaged))
