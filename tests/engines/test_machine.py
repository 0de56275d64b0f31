import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from infoprune_export.engines import cuda, flavours, machine


@pytest.fixture
def system(monkeypatch):
    """Replaces the small system files that are read."""
    files: dict[str, str] = {}
    monkeypatch.setattr(machine, "read_small", lambda path: files.get(str(path), ""))
    return files


def test_cores_are_capped_by_the_quota(system, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.cores() == 8
    system["/sys/fs/cgroup/cpu.max"] = "250000 100000"
    assert machine.cores() == 2
    system["/sys/fs/cgroup/cpu.max"] = "max 100000"
    assert machine.cores() == 8


def test_the_report_is_for_tables_and_for_json(tmp_path):
    report = machine.machine_report(tmp_path)
    rows = dict(report.as_rows())
    assert rows["Python"] in sys.version
    assert "CPUExecutionProvider" in rows["ONNX Runtime"]
    assert {"target onnx", "target ort", "target trt"} <= set(rows)
    json.dumps(report.as_dict())
    json.dumps(report.description())


def test_the_description_names_no_host():
    import platform

    if (host := platform.node()) and len(host) > 3:
        assert host not in json.dumps(machine.machine_report().description())


def target(name):
    return next(t for t in machine.machine_report().targets if t.target == name)


def test_a_machine_without_tensorrt_gets_the_install_line(monkeypatch):
    monkeypatch.setattr(flavours, "installed", lambda: ())
    trt = target("trt")
    assert (trt.can_build, trt.can_run) == (False, False)
    assert trt.mend == "pip install 'infoprune-export[trt-rtx]'"


def test_a_machine_without_a_gpu_builds_ahead_of_time(monkeypatch):
    known = SimpleNamespace(__version__="1", ComputeCapability=SimpleNamespace(__members__=dict.fromkeys(["SM86", "SM120"])))
    monkeypatch.setattr(flavours, "installed", lambda: (flavours.Flavour("tensorrt-rtx", known),))
    monkeypatch.setattr(cuda, "driver", lambda: None)
    trt = target("trt")
    assert (trt.can_build, trt.can_run) == (True, False)
    assert "sm86, sm120" in trt.detail and "no NVIDIA driver" in trt.detail


def test_without_pytorch_the_report_names_the_extra(monkeypatch):
    monkeypatch.setattr(machine, "_versions", lambda names: {})
    onnx = target("onnx")
    assert not onnx.can_build and onnx.mend == "pip install 'infoprune-export[export]'"


def test_looking_at_the_machine_imports_no_pytorch():
    code = (
        "import sys; from infoprune_export.engines.machine import machine_report; machine_report(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
