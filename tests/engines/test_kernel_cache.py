"""Kernels of TensorRT-RTX between processes, on a driver and a TensorRT that work in main memory."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from fake_cuda import FakeDriver, FakeRuntimeCache, fake_tensorrt

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
        return len(trt.engine.context.compiled)

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
