"""What the processes of one launch tell each other."""

from __future__ import annotations

import os
import threading

import pytest

from infoprune_export import launched


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


def test_alone_there_is_nobody_to_tell(monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert launched.processes() == 1 and launched.is_first()
    launched.announce(tmp_path, "train")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["train", "done"])
def test_the_others_wait_for_the_first_ones_word(launch, tmp_path, word):
    assert launched.processes() == 2 and not launched.is_first()
    timer = threading.Timer(0.3, launched.announce, (tmp_path, word))
    timer.start()
    assert launched.wait(tmp_path) == word
    timer.join()


def test_what_an_earlier_launch_left_is_not_meant_for_this_one(launch, tmp_path, monkeypatch):
    launched.announce(tmp_path, "done")
    monkeypatch.setattr(os, "getppid", lambda: -1)
    timer = threading.Timer(0.3, launched.announce, (tmp_path, "train"))
    timer.start()
    assert launched.wait(tmp_path) == "train"
    timer.join()


def test_names_of_the_processes_of_a_launch(launch, monkeypatch):
    assert launched.own("spill") == "spill-1"
    monkeypatch.setenv("RANK", "0")
    assert launched.own("spill") == "spill"
