"""Image preprocessing as the model's own processor does it, with Pillow and NumPy.

Reproduces transformers' CLIPImageProcessor, SiglipImageProcessor, BitImageProcessor (DINOv2) and
LlavaImageProcessor: RGB, pad to a square, resize, crop the centre, rescale, normalise, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from infoprune_export.data.images import to_rgb
from infoprune_export.errors import InputError
from infoprune_export.runtime.config import read_json
from infoprune_export.schema import Strict, first_problem

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_CLIP = {"size": {"shortest_edge": 224}, "do_center_crop": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "SiglipImageProcessor": {"size": {"height": 224, "width": 224}, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3},
}
"""What each processor does where its file says nothing."""


def _size(value: Any, square: bool) -> Any:
    """Old files hold a plain number: the shortest edge, or both sides of a crop."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return {"height": value[0], "width": value[1]}
    if isinstance(value, int):
        return {"height": value, "width": value} if square else {"shortest_edge": value}
    return value


class Size(Strict):
    """Height and width, or the shortest edge alone."""

    height: int | None = Field(None, gt=0)
    width: int | None = Field(None, gt=0)
    shortest_edge: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Size:
        if (self.height is None) != (self.width is None) or (self.height is None) == (self.shortest_edge is None):
            raise ValueError("give height and width, or shortest_edge")
        return self

    def of(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that an image of the given size is resized to."""
        if self.shortest_edge is None:
            return self.width, self.height
        longest = int(self.shortest_edge * max(width, height) / min(width, height))
        return (self.shortest_edge, longest) if width <= height else (longest, self.shortest_edge)


Channels = tuple[float, float, float]


class ImageProcessor(BaseModel):
    """Turns images into the vision encoder's input; called with PIL images.

    Fields are those of the processor's file; others in it do not change the pixels.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    do_resize: bool = True
    size: Annotated[Size, BeforeValidator(lambda v: _size(v, square=False))]
    resample: int = Field(Image.Resampling.BICUBIC, ge=0, le=5)
    do_center_crop: bool | None = None
    crop_size: Annotated[Size, BeforeValidator(lambda v: _size(v, square=True))] = Size(height=224, width=224)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Channels
    image_std: Channels
    do_pad: bool | None = None

    @model_validator(mode="after")
    def _has_one_size(self) -> ImageProcessor:
        if self.do_center_crop and self.crop_size.height is None:
            raise ValueError("crop_size: give height and width")
        if not self.do_center_crop and not (self.do_resize and self.size.height is not None):
            raise ValueError("images would come out in different sizes: it neither crops nor resizes to a height and width")
        return self

    @classmethod
    def from_directory(cls, directory: Path) -> ImageProcessor:
        """Reads the image processor of a model directory or bundle.

        Args:
            directory: Holds processor_config.json (with `image_processor`) or preprocessor_config.json.

        Raises:
            InputError: neither file, a processor of another kind, or a field that cannot be followed.
        """
        directory = Path(directory)
        path = directory / "processor_config.json"
        fields = read_json(path).get("image_processor")
        if not fields:
            path = directory / "preprocessor_config.json"
            fields = read_json(path)
        if not fields:
            raise InputError("has no processor_config.json or preprocessor_config.json for images", where=directory)
        kind = _kind(fields)
        if kind not in DEFAULTS:
            raise InputError(f"image processor {kind!r} is not supported", where=path, mend=f"supported are {', '.join(sorted(DEFAULTS))}")
        if fields.get("do_pad") and kind != "LlavaImageProcessor":
            raise InputError(f"do_pad of {kind} is not supported", where=path, mend="LlavaImageProcessor pads to a square")
        try:
            return cls.model_validate({**DEFAULTS[kind], **{k: v for k, v in fields.items() if v is not None}})
        except ValidationError as e:
            raise InputError(first_problem(e), where=path) from None

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of every image it makes."""
        size = self.crop_size if self.do_center_crop else self.size
        return size.height, size.width

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Pixel values [images, 3, height, width] float32."""
        return np.stack([self._one(image) for image in images])

    def _one(self, image: Image.Image) -> np.ndarray:
        image = to_rgb(image)
        if self.do_pad:
            image = _pad_to_square(image, tuple(int(255 * x) for x in self.image_mean))
        if self.do_resize:
            image = image.resize(self.size.of(image.width, image.height), self.resample)
        pixels = np.asarray(image)
        if self.do_center_crop:
            pixels = _center_crop(pixels, *self.output_size)
        if self.do_rescale:
            pixels = pixels.astype(np.float64) * self.rescale_factor
        pixels = pixels.astype(np.float32)
        if self.do_normalize:
            pixels = (pixels - np.float32(self.image_mean)) / np.float32(self.image_std)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _kind(fields: Mapping[str, Any]) -> str:
    """Name of the processor's class, without its variant (Fast, Pil) or its old name."""
    name = str(fields.get("image_processor_type") or fields.get("feature_extractor_type") or "")
    return name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def _pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of an image [H, W, C]; what lies outside of it is black.

    Of an odd margin the larger half is cut off below and right; but added above and left.
    """
    for axis, wanted in ((0, height), (1, width)):
        spare = pixels.shape[axis] - wanted
        if spare >= 0:
            pixels = pixels.take(range(spare // 2, spare // 2 + wanted), axis)
        else:
            before = -(spare // 2)
            pixels = np.pad(pixels, [(before, -spare - before) if a == axis else (0, 0) for a in range(3)])
    return pixels
