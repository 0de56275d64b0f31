"""The work folder: locked, resumable, renamed when whole, gone when refused."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from infoprune_export.errors import InputError, NotEnough
from infoprune_export.workspace import Workspace, check_disk, side_folder


def _finish(out, key="k", text="new"):
    with Workspace(out, key) as space:
        space.stage("write", lambda: (space.path / "manifest.json").write_text(text))
        space.finish()


def test_result_is_in_place_and_nothing_else_is_left(tmp_path):
    _finish(tmp_path / "b" / "out")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["out"]
    assert [p.name for p in (tmp_path / "b" / "out").iterdir()] == ["manifest.json"]


def test_an_older_bundle_is_replaced(tmp_path):
    _finish(tmp_path / "out", text="old")
    _finish(tmp_path / "out", text="new")
    assert (tmp_path / "out" / "manifest.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_run_goes_on_after_its_last_stage(tmp_path):
    ran = []
    with pytest.raises(KeyboardInterrupt), Workspace(tmp_path / "out", "k") as space:
        space.stage("one", lambda: ran.append("one"))
        raise KeyboardInterrupt
    with Workspace(tmp_path / "out", "k") as space:
        assert not space.stage("one", lambda: ran.append("one again"))
        space.stage("two", lambda: ran.append("two"))
    assert ran == ["one", "two"]


@pytest.mark.parametrize("again", [{"key": "other"}, {"key": "k", "resume": False}])
def test_other_inputs_or_no_resume_start_afresh(tmp_path, again):
    with pytest.raises(KeyboardInterrupt), Workspace(tmp_path / "out", "k") as space:
        space.stage("one", lambda: None)
        raise KeyboardInterrupt
    with Workspace(tmp_path / "out", **again) as space:
        assert space.stage("one", lambda: None)


def test_a_refused_run_leaves_nothing(tmp_path):
    with pytest.raises(InputError), Workspace(tmp_path / "new" / "out", "k"):
        raise InputError("no")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_no_bundle_is_never_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="is not a bundle; it is never overwritten"):
        Workspace(tmp_path / "out", "k")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        Workspace(tmp_path / "file", "k")


def test_two_runs_at_once_the_second_is_refused(tmp_path):
    with Workspace(tmp_path / "out", "k"):
        with pytest.raises(InputError, match="another run is writing"), Workspace(tmp_path / "out", "k"):
            pass
        assert (tmp_path / ".out.lock").exists()
    _finish(tmp_path / "out")


def test_kill_9_does_not_block_the_next_run(tmp_path):
    code = f"""
        import time
        from pathlib import Path
        from infoprune_export.workspace import Workspace
        with Workspace(Path({str(tmp_path / "out")!r}), "k") as space:
            space.stage("one", lambda: None)
            print("ready", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.05)
    with Workspace(tmp_path / "out", "k") as space:
        assert not space.stage("one", lambda: None)


def test_a_kill_between_the_two_renames_brings_the_old_bundle_back(tmp_path):
    _finish(tmp_path / "out", text="old")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(KeyboardInterrupt), Workspace(tmp_path / "out", "k"):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "manifest.json").read_text() == "old"


def test_a_full_disk_is_said_and_resumable(tmp_path):
    with pytest.raises(NotEnough, match="the disk is full") as e, Workspace(tmp_path / "out", "k") as space:
        space.stage("one", lambda: None)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert e.value.exit_code == 4
    with Workspace(tmp_path / "out", "k") as space:
        assert not space.stage("one", lambda: None)


def test_disk_is_checked_before_the_work(tmp_path):
    with pytest.raises(NotEnough, match="--no-original"):
        check_disk(tmp_path / "out", 10**18)


# A folder beside the output


def test_what_a_run_does_not_keep_is_removed_at_its_end(tmp_path):
    with side_folder(tmp_path / "deep" / "out", "random") as folder:
        folder.mkdir()
        (folder / "x").touch()
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_leaves_nothing_and_an_interrupted_one_its_work(tmp_path):
    out = tmp_path / "deep" / "out"
    for error, left in ((InputError("refused"), False), (KeyboardInterrupt(), True)):
        with pytest.raises(type(error)), side_folder(out, "random") as folder:
            folder.mkdir()
            (folder / "x").touch()
            raise error
        assert (folder / "x").exists() is left
        assert out.parent.exists() is left
    with side_folder(out, "random") as folder:
        assert (folder / "x").exists()
    with pytest.raises(KeyboardInterrupt), side_folder(out, "random") as folder:
        folder.mkdir()
        raise KeyboardInterrupt
    with side_folder(out, "random", resume=False) as folder:
        assert not folder.exists()


def test_what_was_made_of_other_inputs_is_removed(tmp_path):
    for key, found in (("a", False), ("a", True), ("b", False), ("a", False)):
        with pytest.raises(KeyboardInterrupt), side_folder(tmp_path / "out", "spill", key=key) as folder:
            assert (folder / "x").exists() is found
            (folder / "x").touch()
            raise KeyboardInterrupt


def test_a_folder_beside_an_output_is_one_runs_at_a_time(tmp_path):
    with side_folder(tmp_path / "out", "random") as folder:
        folder.mkdir()
        with pytest.raises(InputError, match="another run is writing"), side_folder(tmp_path / "out", "random"):
            pass
        assert folder.exists()


def test_a_folder_may_stand_beside_anything(tmp_path):
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.json").touch()
    with side_folder(tmp_path / "plan", "spill", key="k") as folder:
        assert folder.is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]
    with pytest.raises(InputError, match="cannot be written"), side_folder(Path("/proc/nowhere/plan"), "spill"):
        pass


def test_a_full_disk_leaves_the_folder_to_the_same_command(tmp_path):
    with pytest.raises(NotEnough, match="disk is full"), side_folder(tmp_path / "out", "random") as folder:
        folder.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert folder.exists()


def test_a_disk_that_fills_in_a_work_folder_leaves_the_folder_elsewhere(tmp_path):
    spilled, space = side_folder(tmp_path / "spill" / "out", "spill"), Workspace(tmp_path / "out", "k")
    with pytest.raises(NotEnough, match="disk is full"), spilled as folder, space:
        folder.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert folder.exists()


def test_the_path_that_is_full_is_named(tmp_path, monkeypatch):
    (tmp_path / "small").mkdir()
    free = lambda path: 10**9 * ("small" not in path.parts)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free(path)))
    for named, where in ((None, tmp_path / "small"), (str(tmp_path / "x"), tmp_path / "x")):
        with pytest.raises(NotEnough) as e, Workspace(tmp_path / "out", "k", also=[tmp_path / "small" / "spill"]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), named)
        assert str(e.value).startswith(f"{where}: the disk is full")


def test_a_link_stays_one_and_what_it_points_to_is_replaced(tmp_path):
    disk, out = tmp_path / "disk" / "llava", tmp_path / "build" / "llava"
    disk.mkdir(parents=True)
    out.parent.mkdir()
    out.symlink_to(disk)
    for text in ("old", "new", "newer"):
        _finish(out, text=text)
        assert out.is_symlink() and (disk / "manifest.json").read_text() == text
    assert [p.name for p in disk.parent.iterdir()] == ["llava"]


def test_what_others_left_goes_with_a_bundle_and_stays_with_a_change_of_it(tmp_path):
    """The work of a killed export over an old bundle, to which engines are added meanwhile."""
    out = tmp_path / "llava[1]"
    with pytest.raises(KeyboardInterrupt), Workspace(out, "export") as space:
        space.stage("compress", lambda: None)
        raise KeyboardInterrupt
    with Workspace(out, "build", resume=False) as space:
        (space.path / "manifest.json").write_text("{}")
        space.finish(alone=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".llava[1].work-export", "llava[1]"]
    _finish(out, key="other")
    assert [p.name for p in tmp_path.iterdir()] == ["llava[1]"]
