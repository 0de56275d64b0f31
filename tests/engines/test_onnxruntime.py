from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from toy_graphs import decoder

from infoprune_export.engines import load_engine
from infoprune_export.engines import onnxruntime as ort
from infoprune_export.engines.onnxruntime import OrtEngine, build
from infoprune_export.errors import InputError

TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16}


def write_graph(path: Path, kind: int = TensorProto.FLOAT, location: str | None = None) -> Path:
    """y = gelu(x W + b) and z = x, with the tanh-free erf form that ONNX Runtime fuses; W in an external file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    constants = {"W": rng.standard_normal((32, 32)), "b": rng.standard_normal(32), "r": 2**0.5, "one": 1.0, "half": 0.5}
    weights = [numpy_helper.from_array(np.asarray(v, TYPES[kind]), k) for k, v in constants.items()]
    steps = [("MatMul", "x W", "m"), ("Add", "m b", "h"), ("Div", "h r", "d"), ("Erf", "d", "e"), ("Add", "e one", "p")]
    steps += [("Mul", "h p", "q"), ("Mul", "q half", "y"), ("Identity", "x", "z")]
    nodes = [helper.make_node(op, a.split(), [b], name=b) for op, a, b in steps]
    port = lambda name: helper.make_tensor_value_info(name, kind, ["n", 32])
    graph = helper.make_graph(nodes, "g", [port("x")], [port("y"), port("z")], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=512)
    if location is not None:
        model = onnx.load(path, load_external_data=False)
        next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = location
        path.write_bytes(model.SerializeToString())
    return path


def expected(x: np.ndarray, path: Path) -> np.ndarray:
    from math import erf

    model = onnx.load(path)
    w, b = (numpy_helper.to_array(t) for t in model.graph.initializer[:2])
    h = x @ w + b
    return 0.5 * h * (1 + np.vectorize(erf)(h / 2**0.5))


X = np.random.default_rng(1).standard_normal((5, 32)).astype(np.float32)


def test_run(tmp_path: Path) -> None:
    engine = OrtEngine.open(write_graph(tmp_path / "g.onnx"), threads=1)
    assert [(s.name, s.dtype, s.shape) for s in engine.inputs] == [("x", np.float32, ("n", 32))]
    assert [s.name for s in engine.outputs] == ["y", "z"]
    result = engine.run({"x": X})
    np.testing.assert_allclose(result["y"], expected(X, tmp_path / "g.onnx"), atol=1e-5)
    assert list(engine.run({"x": X}, ["z"])) == ["z"]
    kept = engine.run_on_device({"x": X}, ["z"])
    np.testing.assert_array_equal(engine.run({"x": kept["z"]})["y"], result["y"])


def test_unoptimised(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "g.onnx")
    engine = OrtEngine.open(path, threads=1, providers=["CPUExecutionProvider"], optimise=False)
    np.testing.assert_allclose(engine.run({"x": X})["y"], expected(X, path), atol=1e-5)


def test_half_precision(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "g.onnx", TensorProto.FLOAT16)
    engine = OrtEngine.open(path, threads=1)
    assert engine.inputs[0].dtype == np.float16
    result = engine.run({"x": X.astype(np.float16)})["y"]
    assert result.dtype == np.float16
    np.testing.assert_allclose(result, expected(X, path), atol=0.1)


def test_bfloat16_arrays(tmp_path: Path) -> None:
    port = lambda name: helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["n", 32])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [port("x")], [port("y")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "g.onnx")
    engine = OrtEngine.open(tmp_path / "g.onnx", threads=1)
    x = X.astype(ml_dtypes.bfloat16)
    result = engine.run({"x": x})["y"]
    assert result.dtype == x.dtype and (result == x).all()
    stayed = engine.run_on_device({"x": x}, ["y"])["y"]
    assert (engine.run({"x": stayed})["y"] == x).all()


def test_bfloat16_without_kernels_says_what_to_do(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "g.onnx", TensorProto.BFLOAT16)
    with pytest.raises(InputError, match=r"Could not find an implementation for .*\nuse another --dtype"):
        OrtEngine.open(path, threads=1)


def test_build_fuses_and_keeps_the_numbers(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "onnx" / "g.onnx")
    built = build(path, tmp_path / "engines" / "ort" / "g.onnx")
    assert {p.name for p in built.parent.iterdir()} == {"g.onnx", "g.onnx_data"}
    assert len(onnx.load(built).graph.node) < len(onnx.load(path).graph.node)
    np.testing.assert_allclose(load_engine("ort", built, threads=1).run({"x": X})["y"], expected(X, path), atol=1e-5)


def test_build_gives_the_same_bytes_anywhere(tmp_path: Path) -> None:
    builds = [build(write_graph(tmp_path / where / "g.onnx"), tmp_path / where / "ort" / "g.onnx") for where in ("a", "b/c")]
    assert builds[0].read_bytes() == builds[1].read_bytes()
    assert builds[0].with_name("g.onnx_data").read_bytes() == builds[1].with_name("g.onnx_data").read_bytes()
    again = build(tmp_path / "a" / "g.onnx", builds[0])
    assert again.read_bytes() == builds[1].read_bytes()


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "g.onnx", TensorProto.BFLOAT16)
    with pytest.raises(InputError):
        build(path, tmp_path / "ort" / "g.onnx")
    assert not list((tmp_path / "ort").iterdir())


def test_cuda_gets_the_graphs_that_it_has_kernels_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    portable = decoder(tmp_path / "onnx" / "decoder.onnx")
    in_place = build(portable, tmp_path / "ort" / "decoder.onnx")
    asked, open_session = [], ort._session

    def on_the_cpu(path, options, providers):
        asked.append(providers)
        return open_session(path, options, ["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "_session", on_the_cpu)
    monkeypatch.setattr(ort.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    engines = [OrtEngine.open(path, threads=1) for path in (portable, in_place)]
    assert asked == [[("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"], ["CPUExecutionProvider"]]
    assert engines[1].device == "cpu" and engines[1].open_cache(1, 8) is not None


@pytest.mark.parametrize("content", [b"", b"no graph at all", b"\x08\x09\x12\x03abc\xff\xff"])
def test_files_that_are_no_graphs(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "g.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"g\.onnx: ") as caught:
        OrtEngine.open(path)
    assert len(str(caught.value).splitlines()) <= 2
    with pytest.raises(InputError):
        OrtEngine.open(tmp_path / "missing.onnx")


def test_a_cut_graph(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "g.onnx")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"g\.onnx"):
        OrtEngine.open(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret"])
def test_external_data_that_leaves_the_directory(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(8192))
    path = write_graph(tmp_path / "in" / "g.onnx", location=location)
    for use in (OrtEngine.open, lambda p: build(p, tmp_path / "out.onnx")):
        with pytest.raises(InputError, match="leaves the bundle"):
            use(path)


def test_external_data_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(8192))
    path = write_graph(tmp_path / "in" / "g.onnx")
    data = path.with_name("g.onnx_data")
    data.unlink()
    data.symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="leaves the bundle"):
        OrtEngine.open(path)


def test_external_data_that_is_missing_or_cut(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "g.onnx")
    data = path.with_name("g.onnx_data")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(InputError, match=r"g\.onnx_data"):
        OrtEngine.open(path)
    data.unlink()
    with pytest.raises(InputError, match=r"weights file g\.onnx_data is missing"):
        OrtEngine.open(path)


@pytest.mark.parametrize("key", ["offset", "length"])
def test_external_data_with_nonsense_places(tmp_path: Path, key: str) -> None:
    path = write_graph(tmp_path / "g.onnx")
    model = onnx.load(path, load_external_data=False)
    next(e for e in model.graph.initializer[0].external_data if e.key == key).value = "-1"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="'W' has no valid offset and length"):
        OrtEngine.open(path)


def test_external_data_of_a_local_function(tmp_path: Path) -> None:
    model = onnx.load(write_graph(tmp_path / "in" / "g.onnx"), load_external_data=False)
    hidden = onnx.TensorProto(data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL, name="hidden")
    hidden.external_data.add(key="location", value="../secret")
    constant = helper.make_node("Constant", [], ["c"], value=hidden)
    model.functions.append(helper.make_function("d", "F", [], ["c"], [constant], [helper.make_opsetid("", 18)]))
    (tmp_path / "in" / "g.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="leaves the bundle"):
        OrtEngine.open(tmp_path / "in" / "g.onnx")


def test_wrong_inputs_are_one_line(tmp_path: Path) -> None:
    engine = OrtEngine.open(write_graph(tmp_path / "g.onnx"), threads=1)
    for feeds in ({}, {"x": X[:, :3]}, {"x": X.astype(np.float64)}):
        with pytest.raises(InputError, match="cannot run this graph on these inputs") as caught:
            engine.run(feeds)
        assert len(str(caught.value).splitlines()) == 1
