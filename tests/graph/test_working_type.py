"""One traced graph in several types: constants of the type, casts where the type differs, none where it does not."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from infoprune_export.graph.working_type import in_type

TENTH = 0.1
TYPES = {"fp32": (TensorProto.FLOAT, np.float32), "fp16": (TensorProto.FLOAT16, np.float16)}


def traced():
    """`float64(float32(x) squared) * 0.1 + weight`, the square in float32 whatever the graph's type."""
    constant = numpy_helper.from_array(np.array(TENTH), "tenth")
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "wide"], ["square"]),
        helper.make_node("Cast", ["square"], ["own"], to=TensorProto.DOUBLE),
        helper.make_node("Constant", [], ["factor"], value=constant),
        helper.make_node("Mul", ["own", "factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "weight"], ["y"]),
    ]
    port = lambda name: helper.make_tensor_value_info(name, TensorProto.DOUBLE, [2])
    weight = numpy_helper.from_array(np.array([TENTH, 1.0]), "weight")
    graph = helper.make_graph(nodes, "traced", [port("x")], [port("y")], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True))


def proto(model):
    found = ir.to_proto(model)
    onnx.checker.check_model(found, full_check=True)
    return found


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_computes_in_the_type(dtype):
    element, numpy_type = TYPES[dtype]
    found = proto(in_type(traced(), dtype))
    assert [v.type.tensor_type.elem_type for v in (*found.graph.input, *found.graph.output)] == [element, element]
    x = np.array([0.3, 30.0], numpy_type)
    (y,) = onnxruntime.InferenceSession(found.SerializeToString()).run(None, {"x": x})
    square = (x.astype(np.float32) ** 2).astype(numpy_type)
    # ONNX Runtime has no half-precision kernels for these here and rounds between them where it likes.
    np.testing.assert_allclose(y, square * numpy_type(TENTH) + np.array([TENTH, 1], numpy_type), rtol=2 * np.finfo(numpy_type).eps)
    assert y.dtype == numpy_type


def test_casts_stay_only_where_types_differ():
    casts = {
        dtype: [n.attribute[0].i for n in proto(in_type(traced(), dtype)).graph.node if n.op_type == "Cast"] for dtype in ("fp32", "fp16")
    }
    assert casts == {"fp32": [], "fp16": [TensorProto.FLOAT, TensorProto.FLOAT16]}


def test_constants_have_the_type():
    found = in_type(traced(), "bf16")
    weight = found.graph.initializers["weight"].const_value
    assert weight.dtype == ir.DataType.BFLOAT16
    assert weight.numpy()[0] == np.float64(TENTH).astype(ml_dtypes.bfloat16)


def test_the_trace_stays_as_it_is():
    model = traced()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    for dtype in ("fp32", "fp16", "bf16"):
        in_type(model, dtype)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_weights_may_be_missing():
    model = traced()
    model.graph.initializers["weight"].const_value = None
    weight = in_type(model, "fp16").graph.initializers["weight"]
    assert weight.dtype == ir.DataType.FLOAT16 and weight.const_value is None


def test_an_output_that_is_an_input_in_fp32():
    port = lambda name, element: helper.make_tensor_value_info(name, element, [2])
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    graph = helper.make_graph([node], "cast", [port("x", TensorProto.DOUBLE)], [port("y", TensorProto.FLOAT)])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    assert [n.op_type for n in proto(in_type(model, "fp16")).graph.node] == ["Cast"]
    assert not list(in_type(model, "fp32").graph)


def test_branches_too():
    one = helper.make_graph(
        [helper.make_node("Constant", [], ["a"], value=numpy_helper.from_array(np.array([TENTH]), "tenth"))],
        "one",
        [],
        [helper.make_tensor_value_info("a", TensorProto.DOUBLE, [1])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])], "other", [], [helper.make_tensor_value_info("b", TensorProto.DOUBLE, [1])]
    )
    node = helper.make_node("If", ["which"], ["y"], then_branch=one, else_branch=other)
    ports = [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [1]), helper.make_tensor_value_info("which", TensorProto.BOOL, [])]
    graph = helper.make_graph([node], "branches", ports, [helper.make_tensor_value_info("y", TensorProto.DOUBLE, [1])])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    session = onnxruntime.InferenceSession(proto(in_type(model, "fp16")).SerializeToString())
    for which, wanted in ((True, TENTH), (False, 0.5)):
        (y,) = session.run(None, {"x": np.array([0.5], np.float16), "which": np.array(which)})
        assert y.dtype == np.float16 and y == np.float16(wanted)


def test_bodies_with_inputs_and_constants_of_their_own():
    double = lambda name: helper.make_tensor_value_info(name, TensorProto.DOUBLE, [1])
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["goes"]),
            helper.make_node("Cast", ["sum"], ["same"], to=TensorProto.FLOAT),
            helper.make_node("Cast", ["same"], ["back"], to=TensorProto.DOUBLE),
            helper.make_node("Add", ["back", "tenth"], ["more"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            double("sum"),
        ],
        [helper.make_tensor_value_info("goes", TensorProto.BOOL, []), double("more")],
        [numpy_helper.from_array(np.array([TENTH]), "tenth")],
        value_info=[double("back"), helper.make_tensor_value_info("same", TensorProto.FLOAT, [1])],
    )
    node = helper.make_node("Loop", ["rounds", "", "x"], ["y"], body=body)
    rounds = numpy_helper.from_array(np.array(3), "rounds")
    graph = helper.make_graph([node], "loop", [double("x")], [double("y")], [rounds])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    for dtype, casts in (("fp32", 0), ("fp16", 2)):
        found = proto(in_type(model, dtype))
        (inner,) = (a.g for a in found.graph.node[0].attribute)
        assert [n.op_type for n in inner.node].count("Cast") == casts
        (y,) = onnxruntime.InferenceSession(found.SerializeToString()).run(None, {"x": np.zeros(1, TYPES[dtype][1])})
        np.testing.assert_allclose(y, [3 * TENTH], rtol=2e-3)


def test_a_cast_of_a_value_whose_type_is_not_known_stays():
    model = traced()
    for node in model.graph:
        if node.op_type == "Cast":
            node.inputs[0].type = node.outputs[0].type = None
    assert [n.op_type for n in in_type(model, "fp32").graph].count("Cast") == 2
