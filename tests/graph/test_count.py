"""FLOPs of graphs: against the prediction from the anatomy, against brute force, and refusals."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from infoprune_export.bundle import DECODER, graph_file
from infoprune_export.errors import InputError
from infoprune_export.graph.count import count_bundle, count_graph
from infoprune_export.models.flops import count
from infoprune_export.recipe import Workload

WORKLOADS = [
    Workload(batch=1, images=1, image_tokens=16, text_tokens=6, new_tokens=5),
    Workload(batch=3, images=2, image_tokens=16, text_tokens=1, new_tokens=2),
    Workload(batch=2, images=0, image_tokens=16, text_tokens=9, new_tokens=1),
]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_graphs_and_anatomy_agree_exactly(exported, workload):
    _, anatomy, directory = exported
    predicted = count(anatomy, workload)
    assert count_bundle(directory, workload) == {**predicted.parts(), "total": predicted.total}


def test_decode_is_the_sum_over_every_step(exported):
    _, _, directory = exported
    workload = Workload(batch=2, images=1, image_tokens=16, text_tokens=6, new_tokens=6)
    steps = 0
    for past in range(22, 22 + 5):
        dims = {"batch": 2, "sequence": 1, "past": past, "past + sequence": past + 1}
        steps += count_graph(directory / graph_file(DECODER), dims)
    assert count_bundle(directory, workload)["decode"] == steps


def test_weights_are_not_needed(exported, tmp_path):
    _, _, directory = exported
    for file in directory.glob("*.onnx"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert count_bundle(tmp_path, WORKLOADS[0]) == count_bundle(directory, WORKLOADS[0])


def graph(tmp_path, nodes, inputs, outputs, **initialisers):
    def port(name, shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    weights = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in initialisers.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [port(*i) for i in inputs.items()], [port(*o) for o in outputs.items()], weights),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)],
    )
    onnx.save(model, tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


@pytest.mark.parametrize(
    ("node", "inputs", "output", "weights", "flops"),
    [
        (helper.make_node("MatMul", ["x", "w"], ["y"]), {"x": ["b", 3, 4]}, ["b", 3, 5], {"w": [4, 5]}, 2 * 2 * 3 * 4 * 5),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), {"x": ["b", 4]}, ["b", 5], {"w": [5, 4]}, 2 * 2 * 4 * 5),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transA=1), {"x": [4, "b"]}, ["b", 5], {"w": [4, 5]}, 2 * 2 * 4 * 5),
        (
            helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], group=2),
            {"x": ["b", 4, 8, 8]}, ["b", 6, 4, 4], {"w": [6, 2, 2, 2]}, 2 * 2 * 6 * 4 * 4 * 2 * 2 * 2,
        ),
        (
            helper.make_node("Attention", ["q", "k", "k"], ["y"]),
            {"q": ["b", 6, 3, 8], "k": ["b", 2, 7, 8]}, ["b", 6, 3, 8], {}, 2 * 2 * (2 * 6 * 3 * 7 * 8),
        ),
        (helper.make_node("Add", ["x", "x"], ["y"]), {"x": ["b", 4]}, ["b", 4], {}, 0),
    ],
    ids=lambda v: v.op_type if isinstance(v, onnx.NodeProto) else "",
)  # fmt: skip
def test_by_hand(tmp_path, node, inputs, output, weights, flops):
    assert count_graph(graph(tmp_path, [node], inputs, {"y": output}, **weights), {"b": 2}) == flops


def test_axis_without_a_size_is_named(exported):
    _, _, directory = exported
    with pytest.raises(InputError, match="no size is given for axis 'past \\+ sequence' of attention_mask"):
        count_graph(directory / graph_file(DECODER), {"batch": 1, "sequence": 1, "past": 3})


def test_unknown_shape_is_an_error_naming_the_node(tmp_path):
    nodes = [
        helper.make_node("NonZero", ["x"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["w", "f"], ["y"], name="product"),
    ]
    path = graph(tmp_path, nodes, {"x": [2, 3]}, {"y": [5, None]}, w=[5, 2])
    with pytest.raises(InputError, match=r"node product \(MatMul\): shape of 'y' is unknown"):
        count_graph(path, {})


@pytest.mark.parametrize("op", ["Einsum", "ConvTranspose", "GroupQueryAttention"])
def test_operators_that_cannot_be_counted_are_refused(tmp_path, op):
    domain = "com.microsoft" if op == "GroupQueryAttention" else ""
    attributes = {"equation": "ij,jk->ik"} if op == "Einsum" else {}
    path = graph(tmp_path, [helper.make_node(op, ["x", "w"], ["y"], domain=domain, **attributes)], {"x": [2, 3]}, {"y": [2, 4]}, w=[3, 4])
    with pytest.raises(InputError, match=r"cannot be counted|shapes do not fit"):
        count_graph(path, {})


def test_graphs_inside_nodes_are_refused(tmp_path):
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "i", [], [helper.make_tensor_value_info("z", 1, [2])])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True])),
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
    ]
    with pytest.raises(InputError, match=r"\(If\): operator cannot be counted"):
        count_graph(graph(tmp_path, nodes, {"x": [2]}, {"y": [2]}), {})


def test_a_file_that_is_no_graph_is_named(tmp_path):
    (tmp_path / "g.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match=r"g\.onnx: is not a readable ONNX graph"):
        count_graph(tmp_path / "g.onnx", {})
