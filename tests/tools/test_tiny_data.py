"""The rendered sets: deterministic, apart from each other, in the official formats."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("easy_vqa")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_tiny_data  # noqa: E402
from tiny_data import easy_shapes, scene_questions, splits, text_images, words  # noqa: E402
from tiny_data.sample import HEAD_INDEX, IGNORE, stream  # noqa: E402
from tiny_data.scenes import Thing, related  # noqa: E402

EMBEDDED = ROOT / "infoprune_export" / "data"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The data sets with few images, written once."""
    patch = pytest.MonkeyPatch()
    patch.setattr(make_tiny_data, "TRAINING_IMAGES", dict.fromkeys(("vqa", "text", "gqa"), 6))
    patch.setattr(make_tiny_data, "VALIDATION_IMAGES", 5)
    patch.setattr(make_tiny_data, "TEST_IMAGES", {"vqa": 7, "text": 7, "gqa": 7})
    out = tmp_path_factory.mktemp("data")
    make_tiny_data.write(out)
    yield out
    patch.undo()


def _hashes(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


def _pictures(folder: Path) -> dict[str, list[str]]:
    """Returns pixel hashes per split of one data directory."""
    found: dict[str, list[str]] = {}

    def add(split: str, archive: zipfile.ZipFile, member: str) -> None:
        pixels = Image.open(io.BytesIO(archive.read(member))).convert("RGB").tobytes()
        found.setdefault(split, []).append(hashlib.sha256(pixels).hexdigest())

    for path in sorted((folder / "vqa").glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                add(f"vqa {path.stem}", archive, member)
    with zipfile.ZipFile(folder / "textvqa" / "train_val_images.zip") as archive:
        for path in sorted((folder / "textvqa").glob("*.json")):
            for image in {q["image_id"] for q in json.loads(path.read_text())["data"]}:
                add(f"text {path.stem}", archive, f"train_images/{image}.png")
    with zipfile.ZipFile(folder / "gqa" / "images.zip") as archive:
        for path in sorted((folder / "gqa").glob("*.json")):
            for image in {q["imageId"] for q in json.loads(path.read_text()).values()}:
                add(f"gqa {path.stem}", archive, f"images/{image}.png")
    return found


def test_same_bytes_again(small, tmp_path, monkeypatch):
    monkeypatch.setattr(make_tiny_data, "TRAINING_IMAGES", dict.fromkeys(("vqa", "text", "gqa"), 6))
    monkeypatch.setattr(make_tiny_data, "VALIDATION_IMAGES", 5)
    monkeypatch.setattr(make_tiny_data, "TEST_IMAGES", {"vqa": 7, "text": 7, "gqa": 7})
    make_tiny_data.write(tmp_path)
    assert _hashes(tmp_path) == _hashes(small)


@pytest.mark.parametrize("which", ["small", "embedded"])
def test_no_image_is_in_two_splits(which, small):
    root = small if which == "small" else EMBEDDED
    splits_seen: dict[str, str] = {}
    for name in ("tiny", "tiny_val"):
        for split, pictures in _pictures(root / name).items():
            assert len(set(pictures)) == len(pictures), split
            for picture in pictures:
                assert splits_seen.setdefault(picture, f"{name} {split}") == f"{name} {split}"


def test_vqa_format(small):
    folder = small / "tiny" / "vqa"
    for subtype in ("train2014", "val2014"):
        questions = json.loads((folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json").read_text())
        annotations = json.loads((folder / f"v2_mscoco_{subtype}_annotations.json").read_text())
        assert questions["data_subtype"] == annotations["data_subtype"] == subtype
        asked = {q["question_id"]: q for q in questions["questions"]}
        assert set(asked) == {a["question_id"] for a in annotations["annotations"]}
        with zipfile.ZipFile(folder / f"{subtype}.zip") as archive:
            names = set(archive.namelist())
        for annotation in annotations["annotations"]:
            answers = {a["answer"] for a in annotation["answers"]}
            assert len(annotation["answers"]) == 10
            assert answers == {annotation["multiple_choice_answer"]}
            assert f"{subtype}/COCO_{subtype}_{annotation['image_id']:012d}.png" in names


def test_textvqa_and_gqa_formats(small):
    text = json.loads((small / "tiny/textvqa/TextVQA_0.5.1_val.json").read_text())
    assert text["dataset_name"] == "textvqa" and text["dataset_version"] == "0.5.1"
    assert all(len(q["answers"]) == 10 and q["set_name"] == "val" for q in text["data"])
    for split in ("train", "testdev"):
        gqa = json.loads((small / f"tiny/gqa/{split}_balanced_questions.json").read_text())
        assert all(q["isBalanced"] and q["types"]["structural"] for q in gqa.values())


def test_held_out_words_are_never_trained_on():
    assert not set(words.SEEN) & set(words.HELD_OUT)
    rng = stream("test")
    drawn = {words.pick_for_training(rng) for _ in range(5000)}
    assert not drawn & set(words.HELD_OUT)
    assert all(len(word) in (3, 4, 5) and word.isupper() for word in drawn)


def test_text_answers_and_labels():
    sample = text_images.render(stream(3), "GRAPE")
    answers = {q.kind: q.answer for q in sample.questions}
    assert answers == {
        "word": "GRAPE",
        "first letter": "G",
        "second letter": "R",
        "third letter": "A",
        "last letter": "E",
    }
    letters = sample.patches[:, HEAD_INDEX["letter"]]
    assert {chr(64 + n) for n in letters if n > 0} == set("GRAPE")


@pytest.mark.parametrize("word", ["WMWMW", "WWWWW", "III"])
def test_no_word_is_cut_off(word):
    for seed in range(60):
        pixels = text_images.render(stream(seed), word).image.load()
        background = pixels[0, 0]
        assert all(pixels[x, y] == background for x in (0, 63) for y in range(64))


def test_relations():
    left = Thing("red", "circle", "small", 10, 40, 5)
    right = Thing("blue", "square", "large", 40, 10, 9)
    things = [left, right]
    assert related(things, right, "left of") == [left]
    assert related(things, right, "below") == [left]
    assert related(things, right, "above") == []


def test_scene_answers_follow_from_the_scene():
    for seed in range(200):
        sample = scene_questions.sample(stream("relations", seed))
        by_name = {t.name: t for t in sample.info["things"]}
        assert len({q.text for q in sample.questions}) == len(sample.questions)
        for question in sample.questions:
            if question.kind == "choose size":
                name = question.text.removeprefix("is the ").removesuffix(" small or large?")
                assert by_name[name].size == question.answer
            if question.kind == "relate count":
                start, anchor = question.text.removesuffix("?").rsplit(" the ", 1)
                direction = start.removeprefix("how many shapes are ")
                assert len(related(sample.info["things"], by_name[anchor], direction)) == int(question.answer)


def test_yes_and_no_are_balanced_in_scenes():
    answers = [
        q.answer
        for seed in range(400)
        for q in scene_questions.sample(stream("balance", seed), splits.ASKED).questions
        if q.answer in ("yes", "no")
    ]
    assert 0.42 < answers.count("yes") / len(answers) < 0.58


def test_easy_vqa_splits_are_apart():
    train, val = set(easy_shapes.image_ids("train")), set(easy_shapes.image_ids("val"))
    assert not train & val
    assert len(val) == easy_shapes.VALIDATION_IMAGES


def test_unsupervised_columns_are_ignored():
    sample = easy_shapes.sample("train", easy_shapes.image_ids("train")[0])
    assert (sample.patches[:, HEAD_INDEX["from_start"]] == IGNORE).all()
