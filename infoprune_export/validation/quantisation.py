"""A network with quantised weights in float arithmetic: what its engines are held against, and how far it is from the float network.

Two errors that must not be taken for each other. Quantising the weights makes another network, and how far that one is from the
float network is told as information. Whether an engine computes that other network rightly is a check like any other, and its
reference is the portable graph run as it is written: dequantise, then multiply in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from infoprune_export.bundle import COMPONENTS, DECODER, VISION, Bundle
from infoprune_export.engines.onnxruntime import OrtEngine
from infoprune_export.precision import Precision
from infoprune_export.runtime.config import ModelConfig
from infoprune_export.runtime.session import Session
from infoprune_export.validation.generation import AMPLE, encode_images, reference_logits
from infoprune_export.validation.numerics import closeness
from infoprune_export.validation.records import Distance
from infoprune_export.validation.reference import Reference, text_tokens


def float_answers(bundle: Bundle, precision: Precision, reference: Reference, threads: int | None = None) -> Reference:
    """The reference's questions answered by the portable quantised graphs, without any optimisation.

    Args:
        bundle: With those graphs.
        precision: Of the graphs, such as `q4`.
        reference: Of the float network.
        threads: CPU threads; all cores when None.

    Raises:
        InputError: the bundle lacks a graph, or ONNX Runtime has no kernel for its type on the CPU.
    """
    files = {component: bundle.graph(component, precision) for component in COMPONENTS}
    engines = {component: OrtEngine.open(file, threads, ["CPUExecutionProvider"], optimise=False) for component, file in files.items()}
    session = Session(engines, ModelConfig.from_directory(bundle.path))
    features = encode_images(session, reference.pixel_values, AMPLE.images) if len(reference.pixel_values) else None
    known = text_tokens(reference.prompts[: len(reference.logits)], reference.image_token_id)
    order = sorted(range(len(reference.prompts)), key=lambda i: len(reference.prompts[i].input_ids))
    generated: list[np.ndarray] = [np.zeros(0, np.int64)] * len(order)
    for start in range(0, len(order), AMPLE.batch):
        rows = order[start : start + AMPLE.batch]
        for row, tokens in zip(rows, _continuations(session, reference, rows, features), strict=True):
            generated[row] = tokens
    alone = [next(reference_logits(session, reference, [i], features))[0] for i in range(len(reference.logits))]
    return replace(
        reference,
        generated=tuple(generated),
        image_features=reference.image_features if features is None else features[: len(reference.image_features)].astype(np.float32),
        inputs_embeds=session.embed(known[None])[0].astype(np.float32),
        logits=np.stack(alone),
    )


def distance(quantised: Reference, floating: Reference) -> tuple[dict[str, Distance], int]:
    """How far a quantised network's answers are from the float network's.

    Returns:
        Component to distance, and the number of prompts that both continue alike.
    """
    pairs = {VISION: (quantised.image_features, floating.image_features), DECODER: (quantised.logits, floating.logits)}
    found = {}
    for component, (actual, expected) in pairs.items():
        if expected.size and np.isfinite(actual).all():
            _, max_rel, cosine = closeness(np.asarray(actual, np.float64), np.asarray(expected, np.float64))
            found[component] = Distance(max_rel=max_rel, cosine=cosine)
    return found, sum(np.array_equal(a, b) for a, b in zip(quantised.generated, floating.generated, strict=True))


def describe(name: str, found: Distance) -> str:
    """One line for a person."""
    return f"DISTANCE | {name} | from the float network: relative {found.max_rel:.1e}, cosine {found.cosine:.5f}"


def _continuations(session: Session, reference: Reference, rows: Sequence[int], features: np.ndarray | None) -> list[np.ndarray]:
    """Greedy continuations that end with their end-of-sequence token, as a reference holds them."""
    columns: list[np.ndarray] = []
    ended = np.zeros(len(rows), bool)
    for logits in reference_logits(session, reference, rows, features):
        columns.append(logits.argmax(-1))
        ended |= np.isin(columns[-1], reference.eos_token_ids)
        if ended.all() or len(columns) == reference.max_new_tokens:
            break
    ids = np.stack(columns, axis=1).astype(np.int64)
    ends = [np.flatnonzero(np.isin(row, reference.eos_token_ids))[:1] for row in ids]
    return [row[: end[0] + 1] if len(end) else row for row, end in zip(ids, ends, strict=True)]
