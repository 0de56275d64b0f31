"""Files that stand whole or not at all."""

from __future__ import annotations

import os

import pytest

from infoprune_export.files import write_whole, written_whole


def test_text_and_bytes_replace_what_was_there(tmp_path):
    for content in ("a longer text, ä", b"bytes", memoryview(b"view")):
        write_whole(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == (content.encode() if isinstance(content, str) else bytes(content))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_link_to_the_old_file_keeps_it(tmp_path):
    write_whole(tmp_path / "a", "old")
    os.link(tmp_path / "a", tmp_path / "b")
    write_whole(tmp_path / "a", "new")
    assert [(tmp_path / name).read_text() for name in "ab"] == ["new", "old"]


def test_a_file_that_could_not_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "a") as f:
        f.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "a", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]
