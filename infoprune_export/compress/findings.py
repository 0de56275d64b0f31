"""What pass 1 finds out about every layer: a score for each unit, a spectrum for each matrix, and what pass 2 asks of it.

Moments are as large as a layer's weights. They are looked at when a layer's turn is over and let go: what stays of them is
a few numbers, and those matrices that pass 2 weights by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from infoprune_export.compress.allocate import LayerKey
from infoprune_export.compress.evidence import gather_for, needs_gradients
from infoprune_export.compress.lowrank import loss_moment, seen_before, spectrum, weighting
from infoprune_export.compress.moments import InputScale, Moments
from infoprune_export.compress.scores import HEAD_RULES, Evidence
from infoprune_export.compress.statistics import Batch, Statistics, no_gradient
from infoprune_export.models.anatomy import Anatomy, Layer, Linear, site
from infoprune_export.models.streamed import at_hand
from infoprune_export.recipe import Criterion
from infoprune_export.stopwatch import Stopwatch
from infoprune_export.tensors import TensorFile, described, write_tensors


@dataclass(frozen=True)
class LayerFindings:
    """What is known of one layer.

    Attributes:
        units: Score of each KV group with its query heads, the more the worthier.
        spectra: Role of a feed-forward matrix to its weighted singular values, descending; empty where no allocation looks at them.
        seen: Whether any calibration sample came there.
        felt: Whether the loss has a gradient there; False where none was asked for.
    """

    units: list[float]
    spectra: dict[str, np.ndarray]
    seen: bool
    felt: bool


Findings = dict[LayerKey, LayerFindings]


def look(layer: Layer, model: nn.Module, stats: Statistics, criterion: Criterion, seed: int = 0) -> LayerFindings:
    """Scores one layer: a function of its weights and moments alone.

    Args:
        layer: The layer, its weights in memory.
        model: The original.
        stats: Pass 1, of this layer at least.
        criterion: How to score.
        seed: For the head rule that draws.
    """
    key = site(layer.tower, layer.index, "o")
    rule = HEAD_RULES[criterion.heads]
    units = rule.score(layer, Evidence(model, stats, seed, criterion.erank_weight))
    spectra = {}
    for role, linear in layer.ffn.matrices.items():
        spectra[role] = np.empty(0)
        if criterion.allocation != "uniform":
            at = site(layer.tower, layer.index, role)
            weight = weight_of(model, linear)
            seen = seen_before(criterion.weighting, at, stats)
            spectra[role] = spectrum(linear, weighting(criterion.weighting, at, linear, weight, seen, stats)).numpy()
    felt = key in stats.gradients and bool(stats.gradients[key].outer.any())
    return LayerFindings(list(units), spectra, stats.attention[key].count > 0, felt)


def weight_of(model: nn.Module, linear: Linear) -> Tensor:
    """A map's weight where the moments are, float64, shape [d_out, d_in]."""
    return model.get_submodule(linear.path).weight.double().cpu()


def look_at_all(model: nn.Module, anatomy: Anatomy, stats: Statistics, criterion: Criterion, seed: int = 0) -> Findings:
    """Scores every layer from statistics that are all in memory."""
    found = {}
    for layer in anatomy.layers():
        with at_hand(model, layer.path):
            found[layer.tower, layer.index] = look(layer, model, stats, criterion, seed)
    return found


class Survey:
    """Pass 1, kept on disk layer by layer.

    Args:
        directory: Where findings go; those of an earlier run are gone on from.
        criterion: How to score.
    """

    def __init__(self, directory: Path, criterion: Criterion):
        self.directory, self.criterion = directory, criterion
        self.samples = 0

    def take(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        batches: Sequence[Batch],
        *,
        seed: int = 0,
        progress: Callable[[Layer], None] = lambda layer: None,
        stopwatch: Stopwatch | None = None,
    ) -> Findings:
        """Takes pass 1; see `evidence.gather_for` for arguments and errors.

        Args:
            stopwatch: Gets what running the calibration data takes (`calibration`), and what looking at moments takes (`algebra`).

        Returns:
            What was found of every layer.
        """
        self.samples = sum(b.samples for b in batches)
        measuring = (stopwatch or Stopwatch()).measuring

        def finish(layer: Layer, stats: Statistics) -> None:
            with measuring("algebra"):
                self._keep(layer, model, look(layer, model, stats, self.criterion, seed), stats)

        with measuring("calibration"):
            gather_for(
                self.criterion, model, anatomy, batches, seed=seed, progress=progress, finish=finish, directory=self.directory / "states"
            )
        found = {(layer.tower, layer.index): self._found(layer) for layer in anatomy.layers()}
        if needs_gradients(self.criterion) and not any(x.felt for x in found.values()):
            raise no_gradient()
        return found

    def of(self, layer: Layer) -> Statistics:
        """What pass 2 asks pass 1 of a layer."""
        file = TensorFile(self._file(layer))
        stats = Statistics(samples=self.samples, weighted=self.criterion.weighting == "loss")
        for name in file:
            kind, _, rest = name.partition("/")
            key, _, part = rest.partition("/")
            if kind == "losses":
                stats.losses[key] = torch.tensor(file[name])
            elif part == "outer":
                parts = {p: file[f"{kind}/{key}/{p}"] for p in ("total", "outer", "count")}
                kept = Moments(torch.tensor(parts["total"]), torch.tensor(parts["outer"]), int(parts["count"]))
                getattr(stats, kind)[key] = kept
            elif kind == "scales" and part == "total":
                stats.scales[key] = InputScale(torch.tensor(file[name]), int(file[f"{kind}/{key}/count"]))
        return stats

    def _file(self, layer: Layer) -> Path:
        return self.directory / f"{layer.tower}.{layer.index}.safetensors"

    def _keep(self, layer: Layer, model: nn.Module, found: LayerFindings, stats: Statistics) -> None:
        tensors: dict[str, np.ndarray] = {
            "units": np.array(found.units, np.float64),
            "noticed": np.array([found.seen, found.felt], np.int64),
            **{f"spectra/{role}": np.asarray(s, np.float64) for role, s in found.spectra.items()},
        }
        if self.criterion.weighting == "loss":
            for role, linear in layer.ffn.matrices.items():
                key = site(layer.tower, layer.index, role)
                tensors[f"losses/{key}"] = loss_moment(key, linear, weight_of(model, linear), stats).numpy()
        if not self.criterion.recalibrate:
            tensors |= _moments("attention", stats.attention) | _moments("ffn", stats.ffn)
            for key, scale in stats.scales.items():
                tensors |= {f"scales/{key}/total": scale.total.numpy(), f"scales/{key}/count": np.array(scale.count, np.int64)}
        write_tensors(self._file(layer), described(tensors), tensors.items())

    def _found(self, layer: Layer) -> LayerFindings:
        file = TensorFile(self._file(layer))
        seen, felt = (bool(x) for x in file["noticed"])
        spectra = {role: file[f"spectra/{role}"].copy() for role in layer.ffn.matrices}
        return LayerFindings(file["units"].tolist(), spectra, seen, felt)


def _moments(kind: str, found: dict[str, Moments]) -> dict[str, np.ndarray]:
    return {
        f"{kind}/{key}/{part}": np.array(m.count, np.int64) if part == "count" else getattr(m, part).numpy()
        for key, m in found.items()
        for part in ("total", "outer", "count")
    }
