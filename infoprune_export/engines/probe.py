"""A portable graph run with a look inside: where values first leave the range of its type.

float16 ends at 65,504. What grows beyond is infinite from there on and NaN soon after, so the end of a graph says that it
happened, but not where. A probe makes every product and sum of a graph an output and names the first that is not finite.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from infoprune_export.engines.graphs import read_graph
from infoprune_export.engines.onnxruntime import OrtEngine

LOOKED_AT = ("Conv", "MatMul", "Gemm", "Add", "Mul")
"""Operators that make values larger; norms, softmax and activations do not."""


class Probe(OrtEngine):
    """One component run by ONNX Runtime on the CPU, unoptimised.

    Attributes:
        left_at: The weight at or behind which the last run's values were first not finite, such as
            `model.language_model.layers.3.mlp.down_proj`; None where all were finite.
    """

    left_at: str | None = None

    @classmethod
    def of(cls, path: Path) -> Probe:
        """Opens a graph.

        Args:
            path: ONNX file, its external data beside it.

        Raises:
            InputError: not an ONNX graph, or external data that is missing or outside the directory.
        """
        model = read_graph(path)
        behind, own = _values(model), {x.name for x in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in behind if name not in own)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        probe = cls(session, path)
        probe.outputs = tuple(x for x in probe.outputs if x.name in own)
        probe._names = [x.name for x in probe.outputs]
        probe._behind = behind
        return probe

    def _run(self, feeds: Mapping[str, Any], outputs: Sequence[str], stay: Collection[str]) -> dict[str, Any]:
        results = super()._run(feeds, list({**dict.fromkeys(outputs), **self._behind}), stay)
        self.left_at = next((weight for value, weight in self._behind.items() if not np.isfinite(results[value]).all()), None)
        return {name: results[name] for name in outputs}


def _values(model: onnx.ModelProto) -> dict[str, str]:
    """Values to look at, in the order in which they are computed, each with the last weight before it."""
    matrices = {t.name for t in model.graph.initializer if len(t.dims) > 1}
    found: dict[str, str] = {}
    weight = None
    for node in model.graph.node:
        weight = next((name for name in node.input if name in matrices and node.op_type in LOOKED_AT[:3]), weight)
        # What comes before the first weight are positions and masks.
        if weight and node.op_type in LOOKED_AT:
            found[node.output[0]] = weight.removesuffix(".weight")
    return found
