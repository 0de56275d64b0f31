"""Opening a bundle: whole, unchanged, and never outside itself."""

import pytest

from infoprune_export.bundle import Bundle, graph_file, hash_tree, inside
from infoprune_export.errors import InputError


def test_graph_files_carry_their_type():
    assert graph_file("vision_encoder") == "vision_encoder.onnx"
    assert graph_file("vision_encoder", "fp16") == "vision_encoder_fp16.onnx"


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a\\..\\x", "link/x"])
def test_paths_that_leave_are_refused(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="leaves the bundle"):
        inside(root, path, "manifest.json")


def test_not_a_bundle(tmp_path):
    with pytest.raises(InputError, match=r"is not a bundle \(no manifest.json\)"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "Expecting"), ("[]", "valid dict"), ('{"schema_version": 1}', "tool: Field required"), ('{"schema_version": 2}', "2 is not 1")],
)
def test_broken_manifest(tmp_path, text, said):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=rf"manifest\.json: .*{said}"):
        Bundle.open(tmp_path)


def test_hashes_cover_everything_but_what_is_rewritten(tmp_path):
    for name in ("a", "report.json", "manifest.json", "d/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(hash_tree(tmp_path)) == ["a", "d/b"]


def test_what_others_put_there_is_no_part_of_a_bundle(tmp_path):
    for name in ("a", ".DS_Store", "manifest.json.part", "d/.a.swp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(hash_tree(tmp_path)) == ["a"]
