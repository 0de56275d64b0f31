from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from infoprune_export.data.vqa import fingerprint, load_questions, score
from infoprune_export.errors import InputError


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (shade,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def ten(answer: str) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]


def write_vqa(root: Path, subtype: str = "val2014", n: int = 3, annotated: bool = True, zipped: bool = False) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    ids = [{"image_id": 40 + i, "question_id": 1000 + i} for i in range(n)]
    questions = [{**x, "question": f"what is {x['image_id']}?"} for x in ids]
    path = root / f"v2_OpenEnded_mscoco_{subtype}_questions.json"
    path.write_text(json.dumps({"data_subtype": subtype, "questions": questions}))
    if annotated:
        annotations = [{**x, "answers": ten(str(x["image_id"])), "question_type": "what", "answer_type": "number"} for x in ids]
        (root / f"v2_mscoco_{subtype}_annotations.json").write_text(json.dumps({"annotations": annotations}))
    folder = subtype.replace("test-dev", "test")
    put(root, {f"{folder}/COCO_{folder}_{40 + i:012d}.png": picture(i) for i in range(n)}, f"{folder}.zip" if zipped else None)
    return path


def test_a_fingerprint_changes_with_questions_answers_and_images(tmp_path: Path) -> None:
    """What was made from data that are others now is not gone on from."""
    questions = write_vqa(tmp_path / "vqa")
    seen = [fingerprint(tmp_path / "vqa"), fingerprint(questions)]
    assert seen == [fingerprint(tmp_path / "vqa"), fingerprint(questions)]
    for file in sorted((tmp_path / "vqa").glob("*.json")):
        text = file.read_text()
        file.write_text(text.replace('"answer": "40"', '"answer": "48"').replace("what is 40", "what is 48"))
        seen.append(fingerprint(tmp_path / "vqa"))
        file.write_text(text)
    assert fingerprint(tmp_path / "vqa") == seen[0]
    (tmp_path / "vqa" / "of no concern").write_bytes(b"")
    assert fingerprint(tmp_path / "vqa") == seen[0]
    image = next((tmp_path / "vqa").rglob("*.png"))
    image.write_bytes(image.read_bytes() + b" ")
    seen.append(fingerprint(tmp_path / "vqa"))
    assert seen[0] == seen[1] and len(set(seen)) == 4
    assert fingerprint("tiny:vqa") != fingerprint("tiny:gqa")
    with pytest.raises(InputError, match="does not exist"):
        fingerprint(tmp_path / "nothing")


def write_textvqa(root: Path, split: str = "val", **changes: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    record = {"question": "what does it say?", "image_id": "ab12", "question_id": 7, "answers": ["Stop"] * 10, "set_name": split, **changes}
    path = root / f"TextVQA_0.5.1_{split}.json"
    path.write_text(json.dumps({"dataset_type": split, "data": [{k: v for k, v in record.items() if v is not None}]}))
    put(root, {f"{'test' if split == 'test' else 'train'}_images/ab12.png": picture(1)}, None)
    return path


def write_gqa(root: Path, split: str = "testdev", kind: str = "balanced", **changes: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    record = {"question": "is it red?", "imageId": "n12", "answer": "no", **changes}
    path = root / f"{split}_{kind}_questions.json"
    path.write_text(json.dumps({"201": {k: v for k, v in record.items() if v is not None}}))
    put(root, {"images/n12.png": picture(1)}, "images.zip")
    return path


def put(root: Path, images: dict[str, bytes], archive: str | None) -> None:
    if archive:
        with zipfile.ZipFile(root / archive, "w") as z:
            for name, content in images.items():
                z.writestr(name, content)
        return
    for name, content in images.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)


@pytest.mark.parametrize("zipped", [False, True])
def test_vqav2(tmp_path: Path, zipped: bool) -> None:
    write_vqa(tmp_path, zipped=zipped)
    before = sorted(tmp_path.rglob("*"))
    data = load_questions(tmp_path)
    assert data.format == "vqav2" and data.name == "v2_OpenEnded_mscoco_val2014_questions.json"
    assert [q.id for q in data.questions] == ["1000", "1001", "1002"]
    assert data.questions[1].question == "what is 41?" and data.questions[1].answers == ("41",) * 10
    assert [q.image.open().getpixel((0, 0))[0] for q in data.questions] == [0, 1, 2]
    assert sorted(tmp_path.rglob("*")) == before, "archives are read in place"


def test_textvqa(tmp_path: Path) -> None:
    write_textvqa(tmp_path)
    (question,) = load_questions(tmp_path).questions
    assert (question.id, question.answers[0]) == ("7", "Stop")
    assert score("textvqa", "stop", question.answers) == 1
    assert question.image.open().size == (4, 3)


def test_gqa(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    (question,) = load_questions(tmp_path).questions
    assert (question.id, question.question, question.answers) == ("201", "is it red?", ("no",))
    assert question.image.member == "images/n12.png"


def test_images_may_lie_in_a_folder_of_that_name(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    (tmp_path / "val2014").rename(tmp_path / "images")
    assert load_questions(tmp_path).questions[0].image.path.parent.name == "images"


def test_questions_and_annotations_in_their_own_folders(tmp_path: Path) -> None:
    questions = write_vqa(tmp_path)
    for folder, file in (("Questions", questions), ("Annotations", tmp_path / "v2_mscoco_val2014_annotations.json")):
        (tmp_path / folder).mkdir()
        file.rename(tmp_path / folder / file.name)
    for path in (tmp_path, tmp_path / "Questions" / questions.name):
        assert load_questions(path).questions[0].answers == ("40",) * 10


def test_which_split(tmp_path: Path) -> None:
    for subtype in ("train2014", "val2014", "test-dev2015", "test2015"):
        write_vqa(tmp_path, subtype, annotated="test" not in subtype)
    assert "val2014" in load_questions(tmp_path).name
    assert "train2014" in load_questions(tmp_path, split="train").name
    assert "test-dev2015" in load_questions(tmp_path, split="testdev").name
    test = load_questions(tmp_path, split="test")
    assert "test2015" in test.name and test.questions[0].answers == ()
    with pytest.raises(InputError, match="needs reference answers"):
        score(test.format, "red", test.questions[0].answers)
    with pytest.raises(InputError, match=r"has no split 'challenge'\nthere are: test, testdev, train, val"):
        load_questions(tmp_path, split="challenge")
    with pytest.raises(InputError, match="is the split 'val', not 'train'"):
        load_questions(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", split="train")


def test_train_is_taken_where_there_is_nothing_else(tmp_path: Path) -> None:
    write_textvqa(tmp_path, "train")
    assert load_questions(tmp_path).name == "TextVQA_0.5.1_train.json"


def test_gqa_prefers_the_balanced_questions(tmp_path: Path) -> None:
    write_gqa(tmp_path, kind="all")
    write_gqa(tmp_path, kind="balanced")
    assert load_questions(tmp_path).name == "testdev_balanced_questions.json"


@pytest.mark.parametrize(("write", "split"), [(write_textvqa, "test"), (write_gqa, "test")])
def test_test_splits_have_no_answers(tmp_path: Path, write, split: str) -> None:
    write(tmp_path, split, **({"answers": None} if write is write_textvqa else {"answer": None}))
    assert load_questions(tmp_path).questions[0].answers == ()


def test_samples_are_repeatable_and_nested(tmp_path: Path) -> None:
    write_vqa(tmp_path, n=40)
    ids = lambda **kw: [q.id for q in load_questions(tmp_path, **kw).questions]
    few, more = ids(samples=8), ids(samples=20)
    assert few == ids(samples=8) and len(few) == 8 and set(few) < set(more)
    assert few == sorted(few), "in the order of the file"
    assert few != ids(samples=8, seed=1)
    assert ids(samples=99) == ids()
    # Fixed for ever: calibration, and with it a bundle's bytes, depends on it.
    assert few == ["1001", "1011", "1016", "1017", "1020", "1023", "1029", "1033"]


def test_only_sampled_images_have_to_be_there(tmp_path: Path) -> None:
    write_vqa(tmp_path, n=40)
    chosen = {q.image.path for q in load_questions(tmp_path, samples=4).questions}
    for path in (tmp_path / "val2014").iterdir():
        if path not in chosen:
            path.unlink()
    assert len(load_questions(tmp_path, samples=4)) == 4
    with pytest.raises(InputError, match=r"_questions\.json: record \d+: image COCO_val2014_\d{12}\.jpg \(or \.png\) is missing"):
        load_questions(tmp_path)


@pytest.mark.parametrize("name", ["tiny:vqa", "tiny:textvqa", "tiny:gqa", "tiny:val/vqa", "tiny:val/textvqa", "tiny:val/gqa"])
def test_packaged_sets(name: str) -> None:
    data = load_questions(name)
    assert len(data) >= 200
    assert all(score(data.format, q.answers[0], q.answers) == 1 for q in data.questions)
    assert data.questions[0].image.open().size == (64, 64)


def test_unknown_packaged_set() -> None:
    with pytest.raises(InputError, match=r"tiny:vqa2: no packaged data set; did you mean tiny:vqa"):
        load_questions("tiny:vqa2")


def spoil(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("write", "change", "message"),
    [
        (write_vqa, lambda d: d["questions"][1].pop("question"), "questions.json: record 2: field 'question' is missing"),
        (write_vqa, lambda d: d["questions"][0].update(image_id="x"), "record 1: field 'image_id' is not a whole number"),
        (write_vqa, lambda d: d["questions"][2].update(question_id=5), "record 3: question_id 5 has no annotation"),
        (write_vqa, lambda d: d["questions"].__setitem__(0, "x"), "record 1: is not an object with fields"),
        (write_vqa, lambda d: d.update(data_subtype=["../val"]), "field 'data_subtype'"),
        (write_vqa, lambda d: d["questions"].clear(), "holds no questions"),
        (write_textvqa, lambda d: d["data"].__setitem__(0, 1), "record 1: is not an object with fields"),
        (write_textvqa, lambda d: d["data"].__setitem__(0, "answers"), "record 1: is not an object with fields"),
        (write_textvqa, lambda d: d["data"][0].pop("image_id"), "record 1: field 'image_id' is missing"),
        (write_textvqa, lambda d: d["data"][0].pop("answers"), "record 1: field 'answers' is missing"),
        (write_textvqa, lambda d: d["data"][0].update(answers=["a"] * 9), "record 1: field 'answers' does not hold 10 answers"),
        (write_textvqa, lambda d: d["data"][0].update(image_id="../../secret"), "field 'image_id' is not the name of an image"),
        (write_gqa, lambda d: d["201"].pop("answer"), r"record 1 \(201\): field 'answer' is missing"),
        (write_gqa, lambda d: d["201"].update(imageId="a/b"), "field 'imageId' is not the name of an image"),
        (write_gqa, lambda d: d["201"].update(question=5), "field 'question' is not a string"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, write, change, message: str) -> None:
    path = write(tmp_path)
    spoil(path, change)
    with pytest.raises(InputError, match=message) as caught:
        load_questions(path)
    assert path.name in str(caught.value)


def test_bad_annotations_are_named(tmp_path: Path) -> None:
    write_vqa(tmp_path)
    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    spoil(path, lambda d: d["annotations"][1]["answers"][3].pop("answer"))
    with pytest.raises(InputError, match=r"annotations\.json: record 2: answers\[3\]: field 'answer' is missing"):
        load_questions(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"data": [\n  {"question": "a",\n]}', "line 3: not JSON"),
        (b"", "line 1: not JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[1, 2]", "is not a VQAv2, TextVQA or GQA questions file"),
        (b'{"annotations": []}', "holds annotations, not questions"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "questions.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_questions(path)


def test_directories_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_questions(tmp_path / "none")
    with pytest.raises(InputError, match="has no questions file with an official name"):
        load_questions(tmp_path)
    write_vqa(tmp_path)
    write_gqa(tmp_path)
    with pytest.raises(InputError, match="holds questions of gqa and vqav2"):
        load_questions(tmp_path)
