"""One fused node where the tracer writes ten: rotary embeddings of any element type."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, rewrite


class RotaryFusion(RewriteRuleClassBase):
    """`x * cos + rotate_half(x) * sin`, with the cosines and sines that `components.Rotary` makes, to RotaryEmbedding."""

    def __init__(self):
        super().__init__(remove_nodes=False)  # every layer uses the same cosines and sines

    def pattern(self, op, x, cos, sin, start, middle, middle_again, end):
        cosines = op.Unsqueeze(op.Concat(cos, cos, axis=-1), [1])
        sines = op.Unsqueeze(op.Concat(sin, sin, axis=-1), [1])
        first = op.Slice(x, start, middle, [3], [1])
        second = op.Slice(x, middle_again, end, [3], [1])
        return op.Add(op.Mul(x, cosines), op.Mul(op.Concat(op.Neg(second), first, axis=-1), sines))

    def check(self, context, x, start, middle, middle_again, end, **_) -> MatchResult:
        result = MatchResult()
        if x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int):
            return result.fail("head size is unknown", x)
        half = x.shape[3] // 2
        found = [_integer(v) for v in (start, middle, middle_again, end)]
        if None in found or found[:3] != [0, half, half] or found[3] < 2 * half:
            return result.fail("x is not cut into halves", x)
        return result

    def rewrite(self, op, x, cos, sin, **_):
        return op.RotaryEmbedding(x, cos, sin)


def fuse_rotary(model: ir.Model) -> ir.Model:
    """Replaces every rotary embedding that the rule matches; what it does not match stays, and computes the same."""
    return rewrite(model, [RotaryFusion.rule()])


def _integer(value: ir.Value) -> int | None:
    constant = ir.convenience.get_const_tensor(value)
    return int(constant.numpy().item()) if constant is not None and constant.size == 1 else None
