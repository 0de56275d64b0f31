"""Kernels of TensorRT-RTX between processes, on a driver and a TensorRT that work in main memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import GONE_TOO_EARLY, FakeDriver, FakeRuntimeCache, fake_tensorrt

from infoprune_export.engines import cuda, tensorrt_run
from infoprune_export.engines.flavours import Flavour
from infoprune_export.engines.tensorrt_run import load_engine

EMPTY = np.zeros((1, 0), np.float32)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    driver = cuda.Driver(FakeDriver())
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    return tmp_path / "cache" / "infoprune-export" / "kernels"


@pytest.fixture
def process(home, tmp_path, monkeypatch):
    """Loads an engine as a new process would, runs it on prompts of so many tokens, and tells what had to be compiled."""

    def run(*lengths, flavour="tensorrt-rtx", content=b"engine"):
        trt = fake_tensorrt()
        monkeypatch.setattr(tensorrt_run, "installed", lambda: (Flavour(flavour, trt),))
        path = tmp_path / flavour / "sm89" / "decoder.engine"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        engine = load_engine(path)
        for n in lengths:
            assert engine.run({"x": np.ones((1, n), np.float32), "past": EMPTY})["total"] == n
        del engine
        gc.collect()
        assert not GONE_TOO_EARLY
        return len(trt.engine.compiled)

    return run


def test_a_kernel_is_compiled_once_whatever_the_process(process):
    assert process(1, 2) == 2
    assert process(2, 1) == 0
    assert process(2, 3) == 1
    assert process(1, 2, 3) == 0


def test_nothing_is_written_where_nothing_was_compiled(process, home):
    process(1)
    (file,) = home.iterdir()
    before = file.stat()
    process(1)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_kernels_of_another_driver_are_compiled_anew_and_replaced(process, monkeypatch):
    process(1)
    monkeypatch.setattr(FakeRuntimeCache, "version", "13000")
    assert process(1) == 1
    assert process(1) == 0


def test_every_engine_has_its_own(process, home):
    process(1)
    assert process(1, content=b"another") == 1
    assert len(list(home.iterdir())) == 2


def test_a_home_that_cannot_be_written_costs_time_only(process, home, monkeypatch):
    home.parent.parent.write_text("a file")
    assert process(1) == 1
    assert process(1) == 1


def test_the_server_flavour_has_nothing_to_compile(process, home):
    assert process(1, flavour="tensorrt") == 0
    assert not home.exists()


def test_a_service_that_is_killed_has_kept_them(process, monkeypatch):
    monkeypatch.setattr(tensorrt_run, "KEPT_AFTER", 2)
    monkeypatch.setattr(tensorrt_run.weakref, "finalize", lambda *arguments: None)
    process(1, 2, 3)
    assert process(1, 2) == 0
    assert process(3) == 1


def test_they_are_kept_when_the_process_ends(home, tmp_path):
    """With the engine still there, as at the end of a command."""
    path = tmp_path / "tensorrt-rtx" / "sm89" / "decoder.engine"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"engine")
    script = f"""
import numpy as np
from fake_cuda import FakeDriver, fake_tensorrt
from infoprune_export.engines import cuda, tensorrt_run
from infoprune_export.engines.flavours import Flavour
driver = cuda.Driver(FakeDriver())
cuda.driver = lambda: driver
trt = fake_tensorrt()
tensorrt_run.installed = lambda: (Flavour("tensorrt-rtx", trt),)
from pathlib import Path
engine = tensorrt_run.load_engine(Path({str(path)!r}))
engine.run({{"x": np.ones((1, 2), np.float32), "past": np.zeros((1, 0), np.float32)}})
"""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": paths}, timeout=60)
    (file,) = home.iterdir()
    assert b"past" in file.read_bytes()
