"""What is kept for later runs, and what happens where nothing can be."""

from __future__ import annotations

import pytest

from infoprune_export.kept import cache_directory, keep, kept


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_directory("kernels") / "a.cache"


def test_the_last_that_was_kept_is_there_whole_and_alone(place, tmp_path):
    assert place.is_relative_to(tmp_path) and kept(place) is None
    for data in (b"first, longer", b"second"):
        keep(place, data)
        assert kept(place) == data
    assert [p.name for p in place.parent.iterdir()] == ["a.cache"]


def test_without_the_variable_it_is_the_users_own_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory("latency") == tmp_path / ".cache" / "infoprune-export" / "latency"


def test_what_cannot_be_kept_is_not(place, tmp_path):
    (tmp_path / "infoprune-export").write_text("a file where a directory should be")
    keep(place, b"data")
    assert kept(place) is None
