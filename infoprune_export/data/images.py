"""Images as files or as members of an archive: found by their official names, opened when needed.

Archives are read in place and never unpacked. An image is opened as RGB in the way that transformers
opens one: turned as its EXIF tag says, transparency laid on white.
"""

from __future__ import annotations

import io
import lzma
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

from PIL import Image, ImageOps

from infoprune_export.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_PIXELS = 100_000_000
MAX_BYTES = 256 << 20
"""Of one compressed image; a member of an archive that unpacks to more is refused unread."""


@dataclass(frozen=True)
class ImageRef:
    """One image that was found and not opened yet.

    Attributes:
        path: The image file, or the archive that holds it.
        member: Name inside the archive; None for a file.
    """

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def open(self) -> Image.Image:
        """The decoded image, RGB.

        Raises:
            InputError: missing, empty, larger than `MAX_PIXELS`, or not an image that decodes.
        """
        if self.member is not None:
            return _decode(io.BytesIO(_read_member(self.path, self.member)), str(self))
        try:
            size = self.path.stat().st_size
            if size == 0:
                raise InputError("is empty (zero bytes)", where=self)
            with open(self.path, "rb") as f:
                return _decode(f, str(self))
        except OSError as e:
            raise InputError(f"cannot be read ({e.strerror or e})", where=self) from None


def _decode(stream: IO[bytes], where: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, by our own limit
            image = Image.open(stream)
        if image.width * image.height > MAX_PIXELS:
            raise _too_large(where, f"{image.width} x {image.height} pixels")
        return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise _too_large(where, "hundreds of megapixels") from None
    except InputError:
        raise
    except Exception as e:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
        raise InputError(f"does not decode as an image ({_reason(e)})", where=where, mend="give a JPEG or PNG file") from None


def _too_large(where: str, size: str) -> InputError:
    return InputError(f"is too large ({size}; at most {MAX_PIXELS // 10**6} megapixels)", where=where, mend="give a smaller copy")


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].partition(" <_io")[0] or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB copy; transparent pixels show white."""
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image.convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


@lru_cache(maxsize=8)
def _archive(path: Path) -> tuple[zipfile.ZipFile, dict[str, str]]:
    """An archive kept open, and its image members by their bare name."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as e:
        raise InputError(f"is not a readable zip archive ({_reason(e)})", where=path, mend="fetch it again") from None
    names = (name for name in archive.namelist() if name.lower().endswith(SUFFIXES))
    return archive, {PurePosixPath(name).name: name for name in names}


_DAMAGE = (KeyError, OSError, RuntimeError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged member, or one packed in an unknown way (a RuntimeError), raises."""


def _read_member(path: Path, member: str) -> bytes:
    where = f"{path}:{member}"
    archive, _ = _archive(path)
    try:
        size = archive.getinfo(member).file_size
        if size > MAX_BYTES:
            raise _too_large(where, f"{size >> 20} MiB")
        content = archive.read(member)
    except _DAMAGE as e:
        raise InputError(f"cannot be read ({_reason(e)})", where=where) from None
    if not content:
        raise InputError("is empty (zero bytes)", where=where)
    return content


class ImageFolder:
    """Where a data set keeps its images: folders and archives, in order of preference."""

    def __init__(self, roots: Iterable[Path], folders: Iterable[str], archives: Iterable[str]):
        roots, folders, archives = list(dict.fromkeys(roots)), list(folders), list(archives)
        self.folders = [root / name for root in roots for name in folders if (root / name).is_dir()]
        self.archives = [root / name for root in roots for name in archives if (root / name).is_file()]
        self._looked = [str(roots[0] / name) for name in (*folders, *archives)]

    def find(self, stem: str, where: str) -> ImageRef:
        """The image with a file name without suffix.

        Args:
            stem: File name without suffix, a single path component.
            where: Question that asks for it, for the error.

        Raises:
            InputError: there is none; lists where it was looked for.
        """
        for folder in self.folders:
            for suffix in SUFFIXES:
                if (path := folder / (stem + suffix)).is_file():
                    return ImageRef(path)
        for path in self.archives:
            members = _archive(path)[1]
            for suffix in SUFFIXES:
                if stem + suffix in members:
                    return ImageRef(path, members[stem + suffix])
        raise InputError(f"image {stem}.jpg (or .png) is missing", where=where, mend=f"put it into one of {', '.join(self._looked)}")
