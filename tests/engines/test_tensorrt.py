import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from toy_graphs import HIDDEN, decoder, embed_tokens, save, vision_encoder

from infoprune_export.engines import flavours, machine, tensorrt
from infoprune_export.engines.cache_update import update_in_place
from infoprune_export.engines.graphs import read_graph
from infoprune_export.engines.profiles import spanning, workload_profiles
from infoprune_export.errors import InputError, MissingRequirement, NotEnough
from infoprune_export.recipe import Workload

pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra trt-rtx")
PROFILES = workload_profiles(Workload(image_tokens=4, text_tokens=8, new_tokens=4))


@pytest.fixture(autouse=True)
def ahead_of_time(monkeypatch):
    """The same flavour on every machine that runs these tests."""
    rtx = next(f for f in flavours.installed() if f.name == "tensorrt-rtx")
    monkeypatch.setattr(tensorrt, "flavour_for", lambda archs: rtx)
    return rtx


CAPACITY = max(p.span("total").maximum for p in PROFILES)


def network_of(flavour, graph):
    return tensorrt._Network(flavour, read_graph(graph), graph, CAPACITY)


def build(graph, out, *archs):
    return tensorrt.build(graph, out, archs=archs, profiles=PROFILES)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_decoder_becomes_an_engine_for_each_architecture(tmp_path, dtype, opset):
    engines = build(decoder(tmp_path / "decoder.onnx", dtype, opset), tmp_path / "out", "sm86", "sm120")
    assert {arch: path.relative_to(tmp_path).as_posix() for arch, path in engines.items()} == {
        "sm86": "out/sm86/decoder.engine",
        "sm120": "out/sm120/decoder.engine",
    }
    contents = [path.read_bytes() for path in engines.values()]
    assert all(len(c) > 10_000 for c in contents) and contents[0] != contents[1]


def test_the_log_is_kept_and_names_no_directory(tmp_path):
    engine = build(embed_tokens(tmp_path / "embed_tokens.onnx"), tmp_path / "out", "sm86")["sm86"]
    log = engine.with_suffix(".log").read_text()
    assert "Input filename:   embed_tokens.onnx" in log
    assert str(tmp_path) not in log
    assert not list(tmp_path.rglob("*.part"))


def test_a_vision_encoder_is_built_once_not_for_prefill_and_decode(tmp_path, ahead_of_time):
    network = network_of(ahead_of_time, vision_encoder(tmp_path / "v.onnx"))
    assert network._distinct_shapes(PROFILES) == [{"pixel_values": ((1, 3, 8, 8),) * 3}]


def test_products_in_fp32_are_not_rounded_to_tf32(tmp_path, ahead_of_time):
    network = network_of(ahead_of_time, decoder(tmp_path / "decoder.onnx"))
    assert not network._config("sm86", PROFILES).get_flag(ahead_of_time.module.BuilderFlag.TF32)


@pytest.mark.parametrize(("opset", "updates"), [(23, 2), (18, 0)])
def test_the_cache_is_updated_in_place_with_room_for_what_the_profiles_take(tmp_path, ahead_of_time, opset, updates):
    network = network_of(ahead_of_time, decoder(tmp_path / "decoder.onnx", opset=opset))._network
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert kinds.count(ahead_of_time.module.LayerType.KV_CACHE_UPDATE) == updates
    shapes = {x.name: tuple(x.shape) for x in map(network.get_input, range(network.num_inputs))}
    assert shapes["past_key_values.0.key"] == (-1, 2, CAPACITY if updates else -1, 16)


def test_one_profile_for_both_takes_no_more_tokens_than_the_cache_has_room_for(ahead_of_time, tmp_path):
    network = network_of(ahead_of_time, decoder(tmp_path / "decoder.onnx"))
    (shapes,) = network._distinct_shapes([spanning(PROFILES)])
    assert shapes["inputs_embeds"][2][1] == shapes["attention_mask"][2][1] == shapes["past_key_values.0.key"][2][2] == CAPACITY


def recording(made):
    def update(model, capacity):
        made.append((capacity, update_in_place(model, capacity)))
        return made[-1][1]

    return update


def test_the_room_does_not_depend_on_how_many_profiles_there_are(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(tensorrt, "ONE_PROFILE_FROM", 0)
    monkeypatch.setattr(tensorrt, "update_in_place", recording(made))
    build(decoder(tmp_path / "decoder.onnx"), tmp_path / "out", "sm86")
    assert made == [(CAPACITY, 2)]


def test_a_parser_without_the_update_gets_the_graph_as_it_is(tmp_path, ahead_of_time, monkeypatch):
    monkeypatch.setattr(ahead_of_time.module.OnnxParser, "supports_operator", lambda parser, name: name != "TensorScatter")
    network = network_of(ahead_of_time, decoder(tmp_path / "decoder.onnx"))._network
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert ahead_of_time.module.LayerType.KV_CACHE_UPDATE not in kinds


def test_a_parser_of_older_operators_gets_them_written_out(tmp_path, ahead_of_time, monkeypatch):
    """As that of TensorRT 10.3 in JetPack 6 would; this is TensorRT-RTX's, told not to."""
    newer = ("Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter")
    monkeypatch.setattr(ahead_of_time.module.OnnxParser, "supports_operator", lambda parser, name: name not in newer)
    engine = build(decoder(tmp_path / "decoder.onnx"), tmp_path / "out", "sm86")["sm86"]
    log = engine.with_suffix(".log").read_text()
    assert "written out, for this parser does not read them: Attention\n" in log and "Opset version:    21" in log


def test_the_decoder_is_compiled_for_prefill_and_for_decode(tmp_path):
    engine = build(decoder(tmp_path / "decoder.onnx"), tmp_path / "out", "sm86")["sm86"]
    assert engine.with_suffix(".log").read_text().count("Total Activation Memory") == len(PROFILES)


def test_weights_are_not_copied_for_every_profile_from_a_gigabyte_on(tmp_path, monkeypatch):
    graph = save(
        tmp_path / "wide.onnx",
        [helper.make_node("MatMul", ["inputs_embeds", "w"], ["y"])],
        [helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT16, ["batch", "sequence", 1024])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", "sequence", 1024])],
        {"w": np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float16)},
        18,
    )
    two = build(graph, tmp_path / "two", "sm86")["sm86"].stat().st_size
    monkeypatch.setattr(tensorrt, "ONE_PROFILE_FROM", 1_000_000)
    one = build(graph, tmp_path / "one", "sm86")["sm86"].stat().st_size
    assert one < two - 1_900_000


def test_attention_is_marked_in_memory_alone(tmp_path):
    graph = decoder(tmp_path / "decoder.onnx")
    before = graph.read_bytes()
    model = read_graph(graph)
    tensorrt.allow_decomposed_attention(model)
    tensorrt.allow_decomposed_attention(model)
    (node,) = (n for n in model.graph.node if n.op_type == "Attention")
    assert [(a.name, a.i) for a in node.attribute] == [("TRT_decomposable", 1)]
    build(graph, tmp_path / "out", "sm86")
    assert graph.read_bytes() == before


def test_an_operator_that_tensorrt_does_not_know_is_named(tmp_path):
    graph = save(
        tmp_path / "odd.onnx",
        [helper.make_node("Bernoulli", ["inputs_embeds"], ["y"], name="toss")],
        [helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, ["batch", "sequence", HIDDEN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", HIDDEN])],
        {},
        18,
    )
    with pytest.raises(InputError, match=r"odd.onnx: TensorRT cannot read it: node 'toss' \(Bernoulli\)") as error:
        build(graph, tmp_path / "out", "sm86")
    assert len(str(error.value).splitlines()) == 2


def test_weights_outside_the_directory_are_refused(tmp_path):
    graph = decoder(tmp_path / "graphs" / "decoder.onnx")
    model = onnx.load(graph, load_external_data=False)
    (graph.parent / "decoder.onnx_data").rename(tmp_path / "secret")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"'\.\./secret' leaves the bundle"):
        build(graph, tmp_path / "out", "sm86")
    assert not (tmp_path / "out").exists()


def test_an_architecture_it_cannot_build_for_stops_it_before_the_first(tmp_path):
    with pytest.raises(MissingRequirement, match="cannot build for sm90") as error:
        build(decoder(tmp_path / "decoder.onnx"), tmp_path / "out", "sm86", "sm90")
    assert error.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_turing_takes_half_precision_only(tmp_path):
    with pytest.raises(MissingRequirement, match=r"(?s)cannot build for sm75 .*no fp32 matrix products.*on the device"):
        build(decoder(tmp_path / "decoder.onnx", "fp32"), tmp_path / "out", "sm75")
    assert build(decoder(tmp_path / "half.onnx", "fp16"), tmp_path / "out", "sm75")["sm75"].is_file()


def test_memory_is_checked_before_the_build(tmp_path, monkeypatch):
    graph = decoder(tmp_path / "decoder.onnx")
    monkeypatch.setattr(tensorrt, "memory", lambda: machine.Memory(total=10**9, available=10_000))
    with pytest.raises(NotEnough, match="memory") as error:
        build(graph, tmp_path / "out", "sm86")
    assert error.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_a_later_build_replaces_files_and_leaves_hard_links_alone(tmp_path):
    graph = embed_tokens(tmp_path / "embed_tokens.onnx")
    engine = build(graph, tmp_path / "out", "sm86")["sm86"]
    link = tmp_path / "link"
    link.hardlink_to(engine)
    link.write_bytes(b"old")  # both names
    build(graph, tmp_path / "out", "sm86")
    assert link.read_bytes() == b"old"
    assert engine.stat().st_size > 10_000


OLDER_BUILDER = """
import gc, sys
from pathlib import Path

from infoprune_export.engines import flavours, tensorrt
from infoprune_export.engines.graphs import read_graph
from infoprune_export.engines.profiles import workload_profiles
from infoprune_export.recipe import Workload

make_logger = tensorrt._logger


def collecting(flavour, directory):
    class Collecting(type(make_logger(flavour, directory))):
        def log(self, level, message):
            if gc.isenabled():
                gc.collect()

    return Collecting()


graph, out = Path(sys.argv[1]), Path(sys.argv[2])
rtx = next(f for f in flavours.installed() if f.name == "tensorrt-rtx")
gc.disable()
cycle = [tensorrt._Network(rtx, read_graph(graph), graph, 64)]
cycle.append(cycle)
del cycle
tensorrt._logger = collecting
gc.set_threshold(10**6)
gc.enable()
profiles = workload_profiles(Workload(image_tokens=4, text_tokens=8, new_tokens=4))
tensorrt.build(graph, out, archs=["sm86"], profiles=profiles, flavour=rtx)
"""


def test_an_older_builder_that_is_freed_while_a_new_one_is_made_blocks_nothing(tmp_path):
    """The older one is garbage in a cycle, and a collection begins where TensorRT calls the logger, if it may."""
    graph, root = embed_tokens(tmp_path / "embed_tokens.onnx"), Path(tensorrt.__file__).parents[2]
    subprocess.run([sys.executable, "-c", OLDER_BUILDER, graph, tmp_path / "out"], check=True, timeout=120, cwd=root)
    assert (tmp_path / "out" / "sm86" / "embed_tokens.engine").is_file()


class FakeConfig:
    """A builder config as TensorRT documents it: no cache comes of damaged bytes, and one of another GPU is not set."""

    def __init__(self):
        self.cache = None

    def create_timing_cache(self, content):
        return None if content == b"damaged" else content or b"empty"

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache == b"of another GPU" and not ignore_mismatch:
            return False
        self.cache = cache
        return True


@pytest.mark.parametrize(
    ("content", "taken", "cache"),
    [(b"times", True, b"times"), (None, True, b"empty"), (b"damaged", False, b"empty"), (b"of another GPU", False, b"empty")],
)
def test_a_stale_timing_cache_is_begun_anew(tmp_path, content, taken, cache):
    config, path = FakeConfig(), tmp_path / "timing.cache"
    if content is not None:
        path.write_bytes(content)
    assert tensorrt.start_from_cache(config, path) is taken
    assert config.cache == cache
