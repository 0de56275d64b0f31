"""Where a float16 network leaves the range of its type, whether or not it shows in its answers here.

ONNX Runtime has few float16 kernels for the CPU. It computes the rest in float32 and leaves out the casts in between where it can,
so a network may pass its checks here and overflow on a GPU. A probe casts every product and sum.
"""

from __future__ import annotations

from typing import NamedTuple

from infoprune_export.bundle import COMPONENTS, DECODER, VISION, Bundle
from infoprune_export.engines.probe import Probe
from infoprune_export.runtime.config import ModelConfig
from infoprune_export.runtime.session import Session
from infoprune_export.validation.generation import greedy_logits
from infoprune_export.validation.reference import Reference


class Overflow(NamedTuple):
    """The component, and the weight at or behind which values are first not finite, such as `...layers.3.mlp.down_proj`."""

    component: str
    weight: str

    def __str__(self) -> str:
        return f"float16 ends at 65,504, and values leave it first at {self.weight}: use --dtype bf16 or fp32"


def first_overflow(bundle: Bundle, reference: Reference) -> Overflow | None:
    """Looks inside the compressed network's portable float16 graphs, on the first prompt of the reference.

    Args:
        bundle: With those graphs.
        reference: Prompts and images.

    Returns:
        None where every value is finite.

    Raises:
        InputError: the bundle lacks a graph.
    """
    probes = {component: Probe.of(bundle.graph(component, "fp16")) for component in COMPONENTS}
    session = Session(probes, ModelConfig.from_directory(bundle.path))
    prompt = reference.prompts[0]
    features = None if prompt.image is None else session.encode_images(reference.pixel_values[prompt.image : prompt.image + 1])
    if weight := probes[VISION].left_at:
        return Overflow(VISION, weight)
    next(greedy_logits(session, [prompt.input_ids], features))
    return Overflow(DECODER, weight) if (weight := probes[DECODER].left_at) else None
