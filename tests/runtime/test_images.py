from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infoprune_export.errors import InputError
from infoprune_export.runtime.images import ImageProcessor

SIZES = [(64, 64), (37, 61), (61, 37), (200, 13), (7, 90), (1, 1), (29, 30), (33, 33)]
MODES = ["RGB", "L", "LA", "RGBA", "P", "CMYK"]
SETTINGS = {
    "clip": ("CLIPImageProcessorPil", {}),
    "clip, odd crop": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 30}, "crop_size": {"height": 45, "width": 25}}),
    "clip, exact size": ("CLIPImageProcessorPil", {"size": {"height": 33, "width": 47}, "do_center_crop": False}),
    "clip, crop alone": ("CLIPImageProcessorPil", {"do_resize": False, "crop_size": 31}),
    "clip, raw values": ("CLIPImageProcessorPil", {"do_rescale": False, "do_normalize": False, "size": 20, "crop_size": 20}),
    "siglip": ("SiglipImageProcessorPil", {"size": {"height": 40, "width": 56}}),
    "dinov2": ("BitImageProcessorPil", {"size": {"shortest_edge": 25}, "crop_size": 22, "resample": 2}),
    "llava, padded": ("LlavaImageProcessorPil", {"do_pad": True, "size": {"shortest_edge": 33}, "crop_size": 33}),
}


def picture(width: int, height: int, mode: str) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    channels = {"L": 1, "LA": 2, "RGB": 3, "P": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
    if mode == "P":
        image = Image.fromarray(pixels).quantize(16)
        image.info["transparency"] = 3
        return image
    return Image.frombytes(mode, (width, height), pixels.tobytes())


@pytest.mark.parametrize("setting", SETTINGS)
def test_like_transformers(tmp_path: Path, setting: str) -> None:
    transformers = pytest.importorskip("transformers")
    name, options = SETTINGS[setting]
    theirs = getattr(transformers, name)(**options)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_directory(tmp_path)
    images = [picture(*size, mode) for size in SIZES for mode in MODES]
    got = ours(images)
    assert got.dtype == np.float32 and got.shape[2:] == ours.output_size
    for image, pixels in zip(images, got, strict=True):
        expected = theirs(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-6, err_msg=f"{image.mode} {image.size}")


def test_the_packaged_model(bundle_dir: Path) -> None:
    ours = ImageProcessor.from_directory(bundle_dir)
    assert ours.output_size == (64, 64)
    white = ours([Image.new("L", (5, 9), 255)])
    assert white.shape == (1, 3, 64, 64)
    np.testing.assert_allclose(
        white[0, :, 3, 3], (1 - np.array([0.48145466, 0.4578275, 0.40821073])) / [0.26862954, 0.26130258, 0.27577711], rtol=1e-6
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"image_processor_type": "CLIPImageProcessorFast", "size": 40, "crop_size": 36},
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": [40, 50], "crop_size": {"height": 36, "width": 36}},
    ],
)
def test_older_files(tmp_path: Path, fields: dict) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    assert ImageProcessor.from_directory(tmp_path).output_size == (36, 36)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"image_processor_type": "Idefics3ImageProcessor"},
            "image processor 'Idefics3ImageProcessor' is not supported\nsupported are BitImage",
        ),
        ({"size": {"longest_edge": 4}}, r"size\.longest_edge"),
        ({"size": {"height": 4}}, "size: give height and width, or shortest_edge"),
        ({"size": {"shortest_edge": -4}}, r"size\.shortest_edge"),
        ({"do_center_crop": False}, "images would come out in different sizes"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"resample": 77}, "resample"),
        ({"do_pad": True}, "do_pad of CLIPImageProcessor is not supported"),
    ],
)
def test_what_cannot_be_followed_is_named(tmp_path: Path, fields: dict, message: str) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", **fields}))
    with pytest.raises(InputError, match=message) as caught:
        ImageProcessor.from_directory(tmp_path)
    assert str(path) in str(caught.value)


def test_no_processor(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no processor_config\.json"):
        ImageProcessor.from_directory(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor":\n oops}')
    with pytest.raises(InputError, match=r"processor_config\.json: line 2: not JSON"):
        ImageProcessor.from_directory(tmp_path)
