"""What a run is predicted to take, and what is said where it does not fit."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from hurry import HURRY

from infoprune_export import ledger, preflight
from infoprune_export.errors import NotEnough
from infoprune_export.ledger import Ledger
from infoprune_export.memory import Memory
from infoprune_export.models.anatomy import Anatomy
from infoprune_export.preflight import Work, check
from infoprune_export.recipe import Workload
from infoprune_export.workspace import Workspace

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def llava() -> Anatomy:
    """Of LLaVA-1.5-7B, from the packaged config; no weights."""
    from infoprune_export.models.families import find_anatomy
    from infoprune_export.models.random_weights import RandomCheckpoint

    configs = Path(preflight.__file__).parent / "models" / "configs"
    return find_anatomy(RandomCheckpoint(configs / "llava-hf--llava-1.5-7b-hf.json", 0).model)


@pytest.fixture
def work(llava) -> Work:
    return Work(
        anatomy=llava,
        workload=Workload(image_tokens=576, text_tokens=64, new_tokens=16),
        parameters=7_063_427_072,
        stored_bytes=2 * 7_063_427_072,
        kept=0.33,
        samples=8,
        weighted=True,
        dtypes=("fp16",),
        original=False,
    )


def test_memory_does_not_depend_on_samples_and_disk_does(work):
    few, many = work.needs(1e11), replace(work, samples=64).needs(1e11)
    assert few.memory == many.memory < 8 * 2**30
    assert many.spill - few.spill == pytest.approx(56 * few.spill_per_sample, rel=1e-6)
    assert many.seconds > few.seconds > 60


def test_float32_files_take_no_memory_of_their_own(work):
    layer, projector = 4 * (4 * 4096**2 + 3 * 4096 * 11008), 4 * (1024 + 4096) * 4096
    saved = work.needs(1e11).memory - replace(work, stored_bytes=4 * work.parameters).needs(1e11).memory
    assert layer + projector < saved < layer + 2 * projector, "of one layer, and of what is always there"


def test_training_holds_whole_networks_and_exporting_alone_no_moments(work):
    assert replace(work, train_steps=100).needs(1e11).memory > 70 * 2**30
    assert replace(work, train_steps=100, on_gpu=True).needs(1e11).memory < 10 * 2**30, "on a GPU they are in its memory"
    alone = replace(work, samples=0, kept=1.0).needs(1e11)
    assert alone.spill == 0 and alone.memory < work.needs(1e11).memory and 20 < alone.seconds < work.needs(1e11).seconds / 10


def test_a_pass_for_the_reference_answers_takes_time_and_disk(work, llava):
    one = replace(work, weighted=False).needs(1e11)
    gates, weights = (replace(work, weighted=False, answers=frozenset({x})).needs(1e11) for x in ("gates", "weights"))
    assert one.seconds < gates.seconds == weights.seconds and one.spill < gates.spill
    assert weights.spill - gates.spill == sum(4 * 4 * x.attention.o.d_in**2 for x in llava.layers())


def test_too_little_memory_is_refused(work, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "memory", lambda: Memory(4 * 2**30, 3 * 2**30))
    with pytest.raises(NotEnough, match=r"GiB of memory at its peak, 3\.0 GiB are free"):
        check(work.needs(1e11), work, tmp_path / "out", tmp_path)
    with pytest.raises(NotEnough, match="leave --train-steps out"):
        check(replace(work, train_steps=5).needs(1e11), replace(work, train_steps=5), tmp_path / "out", tmp_path)


@pytest.mark.parametrize(("samples", "words"), [(512, "--samples "), (8, "--spill DIR")])
def test_too_little_disk_names_the_smallest_mend(work, monkeypatch, tmp_path, samples, words):
    work = replace(work, samples=samples)
    needs = work.needs(1e11)
    monkeypatch.setattr(preflight, "memory", lambda: Memory(2**36, 2**36))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needs.disk - 2**30))
    with pytest.raises(NotEnough, match=words) as refused:
        check(needs, work, tmp_path / "out", tmp_path)
    if samples == 512:
        fitting = int(str(refused.value).partition("--samples ")[2].split(",")[0].split()[0])
        assert 0 < fitting < samples and replace(work, samples=fitting).needs(1e11).disk <= needs.disk - 2**30


def test_what_fits_is_let_through(work, monkeypatch, tmp_path):
    needs = work.needs(1e11)
    monkeypatch.setattr(preflight, "memory", lambda: Memory(needs.memory, needs.memory))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needs.disk))
    check(needs, work, tmp_path / "out", tmp_path)


def test_the_time_is_the_cpus_and_said_to_be(work, monkeypatch, tmp_path):
    monkeypatch.setattr(ledger, "matrix_rate", lambda: 1e11)
    monkeypatch.setattr(ledger, "check", lambda *given: None)
    told = []
    Ledger(replace(work, on_gpu=True), Workspace(tmp_path / "out", "k"), None, told.append)
    assert "minutes on the CPU and less with the GPU, " in told[0]


def test_what_an_earlier_run_wrote_is_not_needed_again(work, monkeypatch, tmp_path):
    needs = work.needs(1e11)
    monkeypatch.setattr(preflight, "memory", lambda: Memory(2**36, 2**36))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needs.disk - 3 * 2**30))
    with pytest.raises(NotEnough, match="are free or hold what an earlier run wrote"):
        check(needs, work, tmp_path / "out", tmp_path, 2**30, 2**30)
    check(needs, work, tmp_path / "out", tmp_path, 2 * 2**30, 2**30)


def test_a_ledger_tells_long_work_and_writes_down_what_it_took(work, monkeypatch, tmp_path):
    given_to_check = []
    monkeypatch.setattr(ledger, "matrix_rate", lambda: 1e11)
    monkeypatch.setattr(ledger, "check", lambda *given: given_to_check.append(given[-2:]))
    monkeypatch.setattr(ledger, "LOOK_EVERY", 0.001)
    space = Workspace(tmp_path / "out", "k" * 20)
    for again in (False, True):
        told = []
        book = Ledger(work, space, None, told.append)
        assert len(told) == 1 and "minutes" in told[0] and "CPU" not in told[0]
        with space, book.kept():
            book.stage("compress", lambda: (space.path / "x").write_bytes(b"\0" * 12345))
            found = book.close({"algebra": 0.0})
        assert found.memory_bytes.predicted == book.needs.memory and found.seconds.predicted > 60
        if again:
            assert found.disk_bytes.measured is None and found.parts == {}, "an earlier run had done a part"
            assert given_to_check == [(0, 0), (12345, 0)], "and what it wrote needs no disk again"
        else:
            assert found.disk_bytes.measured >= 12345 and found.memory_bytes.measured > 10 * 2**20
            assert set(found.parts) == {"algebra", "files"}


@pytest.mark.parametrize(
    ("left", "resume", "known"), [("", True, True), ("work", True, False), ("spill", True, False), ("work", False, True)]
)
def test_what_a_run_took_is_not_known_where_a_killed_one_had_begun(work, monkeypatch, tmp_path, left, resume, known):
    monkeypatch.setattr(ledger, "matrix_rate", lambda: 1e11)
    monkeypatch.setattr(ledger, "check", lambda *given: None)
    space, spill = Workspace(tmp_path / "out", "k", resume), tmp_path / "spill"
    for folder in (space.folder, spill):
        folder.mkdir()
    if left:
        ({"work": space.folder, "spill": spill}[left] / "begun").write_text("x")
    book = Ledger(work, space, spill, print)
    with space, book.kept():
        book.stage("compress", lambda: (spill / "states").write_bytes(b"\0" * 12345))
        found = book.close({})
    assert (found.disk_bytes.measured is not None) is known
    assert not known or found.disk_bytes.measured >= 12345, "of both places"


def test_a_run_puts_its_states_where_spill_says_and_reports_what_it_took(run, small_model, tmp_path):
    spill, out = tmp_path / "elsewhere" / "spill", tmp_path / "out"
    run(small_model, "--flops", "0.7", "--samples", "6", "--target", "onnx", *HURRY, "--out", out, "--spill", spill)
    assert not spill.exists(), "nothing stays there"
    resources = json.loads((out / "report.json").read_text())["resources"]
    assert resources["memory_bytes"]["measured"] > 50 * 2**20 and resources["disk_bytes"]["measured"] > 2**20
    assert set(resources["parts"]) == {"calibration", "algebra", "files"} and all(x >= 0 for x in resources["parts"].values())
    assert sum(resources["parts"].values()) == pytest.approx(resources["seconds"]["measured"])
