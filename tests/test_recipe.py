"""Recipes: what is accepted, and errors that name file, line and field."""

from pathlib import Path

import pytest

from infoprune_export.errors import InputError
from infoprune_export.recipe import DataSource, Workload, packaged, read
from infoprune_export.resolution import resolve


def _write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def test_packaged_recipes_are_valid():
    recipes = {name: read(path) for name, path in packaged().items()}
    assert {"llava", "tiny-llava"} <= set(recipes)
    assert all(r.name == name for name, r in recipes.items())


def test_defaults(tmp_path):
    recipe = read(_write(tmp_path, "model: some/model\n"))
    assert (recipe.name, recipe.flops, recipe.scope, recipe.targets) == ("r", 1.0, "all", ["ort"])
    assert recipe.origin == tmp_path / "r.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nflosp: 0.5\n", "line 2: flosp: unknown field; did you mean flops?"),
        ("model: m\nworkload:\n  batch: 1\n  text_token: 3\n", "line 4: workload.text_token: unknown field; did you mean text_tokens"),
        ("model: m\n\nflops: 1.5\n", "line 3: flops: "),
        ("model: m\nflops: .nan\n", "line 2: flops: "),
        ("name: x\n", "line 1: model: Field required"),
        ("model: m\ncalibration:\n - {path: a}\n - {pth: b}\n", "line 4: calibration[1]."),
        ("model: m\ncriterion:\n  heads: mitchel\n", "line 3: criterion.heads: Input should be 'ks', "),
        ("model: m\ncriterion:\n  head_share: 0\n", "line 3: criterion.head_share: "),
        ("model: m\ncriterion:\n  compensate: true\n", "line 3: criterion.compensate: Input should be 'refit', 'bias' or 'none'"),
        ("model: m\ncriterion:\n  wieghting: none\n", "line 3: criterion.wieghting: unknown field; did you mean weighting?"),
        ("model: m\ncriterion:\n  floors:\n    vision: {heads: 2}\n", "line 4: criterion.floors.vision.heads: "),
        (
            "model: m\ncriterion:\n  head_share: 0.5\n  floors: {vision: {total: 0.5}}\n",
            "line 2: criterion: a floor on a tower's total needs",
        ),
        ("model: m\ncriterion: {floors: {vision: {total: 0.5}}}\nrecovery: {head_share: 0.3}\n", "line 1: criterion.floors with a total"),
        ("model: m\ntargets: []\n", "line 2: targets: "),
        ("model: [\n", "line 2: not valid YAML"),
        ("- a\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
    ],
)
def test_errors_name_line_and_field(tmp_path, text, message):
    path = _write(tmp_path, text)
    with pytest.raises(InputError) as e:
        read(path)
    assert str(e.value).startswith(f"{path}: {message}")


def test_binary_file_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="cannot be read"):
        read(path)


def test_workload_counts_its_prompt():
    assert Workload(images=2, image_tokens=10, text_tokens=5).prompt_tokens == 25


def test_calibration_by_path_takes_training_questions_where_there_are_such(tmp_path):
    """The others are to be evaluated on."""
    assert resolve("tiny-llava", {"calibration": Path("tiny:vqa")}).calibration == [DataSource(path="tiny:vqa", split="train")]
    file = tmp_path / "TextVQA_0.5.1_val.json"
    file.write_text("{}")
    for given in (file, tmp_path):
        assert resolve("tiny-llava", {"calibration": given}).calibration == [DataSource(path=str(given))]
    (tmp_path / "TextVQA_0.5.1_train.json").write_text("{}")
    assert resolve("tiny-llava", {"calibration": tmp_path}).calibration == [DataSource(path=str(tmp_path), split="train")]
