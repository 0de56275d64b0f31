"""What a run will take, predicted before it begins: memory, disk and time, from the model's sizes alone.

The memory is that of compressing and exporting, where one layer is held at a time: pages of mapped files are the system's to
take back and do not count. `ledger` holds what a run took against it.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from infoprune_export.errors import NotEnough
from infoprune_export.memory import memory
from infoprune_export.models.anatomy import ATTENTION_ROLES, Anatomy, Layer
from infoprune_export.models.flops import layer_flops, tower_passes
from infoprune_export.recipe import Dtype, Workload
from infoprune_export.workspace import nearest

BASE_BYTES = 550 * 2**20
"""Of PyTorch, transformers and Python, before a model is there (seen: 0.5 GiB)."""
TOKEN_FLOATS = 14.0
"""Floats that a layer keeps of each token for its way back, in units of hidden size plus a third of the feed-forward's (seen)."""
BATCH_TOKENS = 2048
PASS_SPEED = 0.7
"""Of a layer's passes and of summing moments, as a share of a large product's (seen from 1 to 7 billion parameters)."""
EIGEN_FLOPS, EIGEN_FLOPS_DOUBLE = 42.0, 330.0
"""Decompositions and products on one moment of n columns, in n^3 at the speed of a large product: of wide ones, and of those that are
computed in float64 (seen from 0.1 to 7 billion parameters)."""
TRACE_SECONDS, BYTES_A_SECOND = 20.0, 110e6
"""Tracing the graphs, and writing network, factors and graphs (seen)."""
BYTES: dict[Dtype, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Needs:
    """What a run takes.

    Attributes:
        memory: Bytes at the peak, without pages of mapped files.
        network: Bytes of the smaller network and its factors.
        graphs: Bytes of graphs and, where it is trained, of checkpoints.
        spill: Bytes of hidden states and what is kept of pass 1, gone when the network is written.
        spill_per_sample: The part of them that each calibration sample adds.
        seconds: Of compressing and exporting on the CPU; engines and validation come on top.
    """

    memory: int
    network: int
    graphs: int
    spill: int
    spill_per_sample: int
    seconds: float

    @property
    def disk(self) -> int:
        """Bytes at the peak, where everything is on one disk."""
        return self.network + max(self.graphs, self.spill)


@dataclass(frozen=True)
class Work:
    """What a prediction is made of.

    Attributes:
        anatomy: Of the model.
        workload: One calibration sample has as many tokens.
        parameters: All of the checkpoint's.
        stored_bytes: Of the checkpoint's files.
        kept: Fraction of the FLOPs.
        samples: Calibration questions; 0 where nothing is compressed.
        weighted: Whether gradients are gathered.
        answers: What is gathered in a pass of its own, of the gradients of the reference answers: `gates`, `weights`.
        dtypes: Of the graphs.
        original: Whether the original's graphs are kept.
        network: Whether the smaller network is written, and not its factors alone.
        train_steps: Whole networks are in memory where there are any.
        on_gpu: Whether layers are computed on a GPU; networks are in its memory then, and what was trained comes back from there.
    """

    anatomy: Anatomy
    workload: Workload
    parameters: int
    stored_bytes: int
    kept: float
    samples: int
    weighted: bool
    dtypes: tuple[Dtype, ...]
    original: bool
    network: bool = True
    answers: frozenset[str] = frozenset()
    train_steps: int = 0
    on_gpu: bool = False

    def needs(self, flops_per_second: float) -> Needs:
        """The prediction, for a machine that multiplies matrices at a rate."""
        layers = list(self.anatomy.layers())
        mapped = self.stored_bytes >= 4 * self.parameters  # float32 weights are used where they lie
        outside = self.parameters - sum(map(_parameters, layers))
        tables = min(outside, 2 * self.anatomy.vocab_size * self.anatomy.language.hidden)  # embedding and output head have turns, too
        rest, tables = (0 if mapped else 4 * n for n in (outside - tables, tables))
        largest = max(tables, *(self._layer_memory(x, mapped) for x in layers))
        network = 4 * round(self.kept * self.parameters)
        whole = (network if self.on_gpu else 3 * 4 * self.parameters) if self.train_steps else 0
        factors, written = (network if x else 0 for x in (self.samples, self.network))
        graphs = sum(BYTES[d] for d in self.dtypes) * round((self.kept + self.original) * self.parameters)
        training = 6 * 4 * self.parameters * bool(self.train_steps)
        per_sample = sum(4 * self._tokens(x) * x.attention.o.d_out * (1 + self._backwards / 8) for x in layers)
        kept_moments = sum(8 * n**2 for x in layers for n in _ffn_widths(x)) * self.weighted
        gradients = sum(4 * _attention_parameters(x) for x in layers) * ("weights" in self.answers)
        spill = round(self.samples * per_sample) + (kept_moments + gradients + factors if self.samples else 0)
        seconds = sum(map(self._layer_flops, layers)) / flops_per_second if self.samples else 0.0
        seconds += TRACE_SECONDS * bool(self.dtypes) + (written + factors + graphs) / BYTES_A_SECOND
        return Needs(max(BASE_BYTES + rest + largest, whole), written + factors, graphs + training, spill, round(per_sample), seconds)

    @property
    def _backwards(self) -> bool:
        """Whether gradients go back through the layers, for which all hidden states wait on disk."""
        return self.weighted or bool(self.answers)

    def _tokens(self, layer: Layer) -> int:
        """Of one calibration sample."""
        return self.anatomy.geometry.tokens if layer.tower == "vision" else self.workload.prompt_tokens

    def _layer_memory(self, layer: Layer, mapped: bool) -> int:
        o, widths = layer.attention.o, _ffn_widths(layer)
        weights = 0 if mapped else 4 * _parameters(layer)
        biggest = max((m.d_in * m.d_out for m in layer.ffn.matrices.values()), default=0)
        if not self.samples:
            return weights + 8 * biggest
        per_token = 4 * TOKEN_FLOATS * (o.d_out + layer.ffn.down.d_in / 3) if self._backwards else 8 * layer.ffn.down.d_in
        tokens = max(self._tokens(layer), min(BATCH_TOKENS, self.samples * self._tokens(layer)))
        moments = 8 * (o.d_in**2 + o.d_out**2 * self.weighted + sum(n**2 for n in widths) * (1 + self.weighted))
        widest = max([o.d_in, o.d_out, *widths])
        return weights + moments + max(round(per_token * tokens), 12 * biggest + 6 * 8 * widest**2)

    def _layer_flops(self, layer: Layer) -> float:
        """What compressing a layer takes, in FLOPs at the speed of a large product."""
        from infoprune_export.compress.spectra import WIDE

        o, widths = layer.attention.o, _ffn_widths(layer)
        towers = tower_passes(self.anatomy, self.workload.model_copy(update={"batch": 1, "new_tokens": 1}))
        forward = self.samples * layer_flops(layer, None, towers[layer.tower])
        squares = o.d_in**2 + o.d_out**2 + 2 * sum(n**2 for n in widths)
        moments = 2 * self.samples * self._tokens(layer) * squares
        passes = 1 + 2 * self.weighted + 3 * bool(self.answers) + 2
        algebra = sum((EIGEN_FLOPS if n > WIDE else EIGEN_FLOPS_DOUBLE) * n**3 for n in (o.d_out, *widths))
        return (passes * forward + 1.5 * moments) / PASS_SPEED + algebra


def _parameters(layer: Layer) -> int:
    return _attention_parameters(layer) + sum(m.d_in * m.d_out for m in layer.ffn.matrices.values())


def _attention_parameters(layer: Layer) -> int:
    return sum(m.d_in * m.d_out for m in (getattr(layer.attention, role) for role in ATTENTION_ROLES))


def _ffn_widths(layer: Layer) -> list[int]:
    return [min(m.d_in, m.d_out) for m in layer.ffn.matrices.values()]


def matrix_rate(columns: int = 1536, rounds: int = 4) -> float:
    """FLOPs a second of PyTorch's float32 matrix products on this machine, the best of some rounds."""
    import torch

    a, best = torch.ones(columns, columns), math.inf
    for _ in range(rounds):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * columns**3 / best


def check(needs: Needs, work: Work, out: Path, spill: Path, written: int = 0, spilled: int = 0) -> None:
    """Stops before work that would not fit, and says what would.

    Args:
        needs: The prediction.
        work: What it was made of.
        out: The bundle's directory.
        spill: Where hidden states go.
        written: Bytes that an earlier run, which this one goes on from, wrote to the one.
        spilled: Those that it wrote to the other, where that is apart.

    Raises:
        NotEnough: memory or disk.
    """
    if needs.memory > (free := memory().available):
        raise NotEnough(
            f"compressing takes about {gib(needs.memory)} of memory at its peak, {gib(free)} are free",
            where="this machine",
            mend="use a machine with more memory"
            + (", or leave --train-steps out: training holds whole networks" if work.train_steps else ""),
        )
    apart = os.stat(nearest(out)).st_dev != os.stat(nearest(spill)).st_dev
    both = {nearest(out): (needs.network + needs.graphs, written), nearest(spill): (needs.spill, spilled)}
    for place, (needed, there) in (both if apart else {nearest(out): (needs.disk, written + spilled)}).items():
        if needed <= (free := shutil.disk_usage(place).free + there):
            continue
        mends = []
        if place == nearest(spill if apart else out) and needs.spill > needs.graphs:
            fitting = work.samples - -(-(needed - free) // needs.spill_per_sample)
            mends += [f"--samples {fitting}"] * (fitting > 0)
            mends += [f"--spill DIR on another disk, for {gib(needs.spill)} of it"]
        mends += ["--no-original"] * work.original + ["another --out"]
        raise NotEnough(
            f"this run takes about {gib(needed)} of disk, {gib(free)} are free" + " or hold what an earlier run wrote" * bool(there),
            where=place,
            mend=f"make space, or use {', or '.join(mends)}",
        )


def gib(n: float) -> str:
    """Bytes in words."""
    return f"{n / 2**30:.1f} GiB"
