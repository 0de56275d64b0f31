from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infoprune_export.data import images as image_module
from infoprune_export.data.images import ImageFolder, ImageRef, to_rgb
from infoprune_export.errors import InputError


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def png(colour: tuple[int, ...] = (1, 2, 3), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (3, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def noise_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not an image", "does not decode as an image"),
        (noise_png()[:2000], "does not decode as an image"),
        (png_header(20_000, 6_000), "is too large \\(20000 x 6000 pixels; at most 100 megapixels\\)"),
        (png_header(60_000, 60_000), "is too large"),
    ],
    ids=["empty", "text", "cut", "large", "bomb"],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_bad_images_are_named(tmp_path: Path, content: bytes, message: str, zipped: bool) -> None:
    path = tmp_path / ("a.zip" if zipped else "a.png")
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("in/a.png", content)
    else:
        path.write_bytes(content)
    image = ImageRef(path, "in/a.png" if zipped else None)
    with pytest.raises(InputError, match=message) as caught:
        image.open()
    assert str(image) in str(caught.value) and len(str(caught.value).splitlines()) <= 2


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        ImageRef(tmp_path / "none.png").open()


def test_a_member_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infoprune_export.data.images.MAX_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(100_000))
    with pytest.raises(InputError, match="is too large"):
        ImageRef(tmp_path / "a.zip", "a.png").open()


def test_a_damaged_member(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png())
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot be read"):
        ImageRef(path, "a.png").open()


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png((10, 20, 30, 0), "RGBA"))
    image = ImageRef(tmp_path / "a.png").open()
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    assert to_rgb(palette).getpixel((0, 0)) == (9, 9, 9)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_followed(tmp_path: Path) -> None:
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, :2] = 200
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    opened = ImageRef(tmp_path / "a.png").open()
    assert opened.size == (2, 4) and opened.getpixel((0, 0)) == (200, 200, 200) and opened.getpixel((0, 3)) == (0, 0, 0)


def test_a_folder_comes_before_an_archive(tmp_path: Path) -> None:
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "both.jpg").write_bytes(b"x")
    with zipfile.ZipFile(tmp_path / "val2014.zip", "w") as archive:
        archive.writestr("val2014/both.png", b"x")
        archive.writestr("val2014/zipped.jpeg", b"x")
    folder = ImageFolder([tmp_path], ["val2014", "images"], ["val2014.zip"])
    assert folder.find("both", "q") == ImageRef(tmp_path / "val2014" / "both.jpg")
    assert folder.find("zipped", "q") == ImageRef(tmp_path / "val2014.zip", "val2014/zipped.jpeg")
    with pytest.raises(InputError, match=r"q: image none\.jpg .* is missing\nput it into one of .*val2014, .*images, .*val2014\.zip"):
        folder.find("none", "q")


def test_an_archive_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"a\.zip: is not a readable zip archive"):
        ImageFolder([tmp_path], [], ["a.zip"]).find("x", "q")


def test_a_damaged_compressed_member(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("a.png", png() + bytes(range(256)) * 20)
        data = bytearray(path.read_bytes())
        data[45:60] = b"\xff" * 15
        path.write_bytes(data)
        image_module._archive.cache_clear()
        with pytest.raises(InputError, match="cannot be read"):
            ImageRef(path, "a.png").open()
