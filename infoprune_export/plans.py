"""plan.json: what is kept of every layer. A person can read it, edit it and apply it.

A plan carries the anatomy of the model it was made for, so tables and FLOP counts can be made
from it alone. The weights that go with it are in factors.safetensors (see `Plan.factors_sha256`):

    {site}.weight, {site}.bias      refitted output projection (site = "language.3.o"); after training, any map that is dense
    {site}.first, {site}.second     low-rank pair, second @ first, of a feed-forward matrix
    {site}.bias                     its bias, where it has one
    projector.{n}.weight, .bias     n-th linear map of the projector, after training

Without training, query, key and value projections need no factors: they are rows of the original's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from infoprune_export.errors import InputError
from infoprune_export.files import file_sha256
from infoprune_export.models.anatomy import ATTENTION_ROLES, Anatomy, Layer, Linear, TowerName, site
from infoprune_export.recipe import Criterion, Scope, Workload
from infoprune_export.schema import Strict, first_problem
from infoprune_export.tensors import TensorFile, described, encoded, write_tensors

Factors = Mapping[str, np.ndarray]
"""Contents of factors.safetensors: tensor name to float32 array."""


class LayerPlan(Strict):
    """What is kept of one layer: query heads, KV groups, and a rank (None = dense) per FFN matrix."""

    tower: Literal["vision", "language"]
    layer: int
    kv_groups: list[int] = Field(description="kept KV groups, ascending; for attention without grouping, the kept heads")
    heads: list[int] = Field(description="kept query heads, ascending, the same number in every kept group")
    ranks: dict[Literal["gate", "up", "down"], int | None]

    def cuts(self, layer: Layer) -> bool:
        """Whether anything of the layer is removed."""
        return len(self.heads) < layer.attention.heads or any(r is not None for r in self.ranks.values())


class Source(Strict):
    id: str
    sha256: str


class LatencyBudget(Strict):
    """Time asked for and predicted by a table of this machine, as fractions kept of the original's request, end to end."""

    requested: float
    predicted: float
    original_ms: float = Field(description="of the original's request, when the table was measured")


class Budget(Strict):
    """FLOPs asked for (1 where time was) and predicted, as fractions kept of the original's over the scope."""

    scope: Scope
    requested: float
    predicted: float
    original_flops: int
    compressed_flops: int
    eps: dict[TowerName, float] | None = Field(
        None, description="tower to the KS distance of its pooled feed-forward spectra: the share of their mass that is cut off"
    )
    latency: LatencyBudget | None = Field(None, description="where time was asked for and not FLOPs")

    @property
    def asked(self) -> str:
        """What was asked for, in words."""
        return f"{self.latency.requested:g} of the time" if self.latency else f"{self.requested:g}"


class TrainingRecord(Strict):
    """How a plan's choice of heads, and the factors that go with it, were trained."""

    head_steps: int = Field(0, description="steps that learned which heads go; 0 where the scores said it")
    steps: int = Field(description="steps of recovery")
    rate: float | None = Field(None, description="largest learning rate of recovery")
    kept: int | None = Field(None, description="step whose state answered most validation questions, and was kept; null: the last")
    data: list[str] = Field(description="names of the data sets")
    images: int
    questions: int

    def __str__(self) -> str:
        heads = f"{counted(self.head_steps, 'step')} for the choice of heads, then " if self.head_steps else ""
        seen = f"{counted(self.images, 'image')} with {counted(self.questions, 'question')}{' of ' * bool(self.data)}{', '.join(self.data)}"
        kept = f"; kept as it was after step {self.kept}" if self.kept not in (None, self.steps) else ""
        return f"{heads}{counted(self.steps, 'step')} on {seen}{kept}"


def counted(n: int, what: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{n:,} {what}{'s' * (n != 1)}"


class Plan(Strict):
    schema_version: Literal[1] = 1
    source: Source
    seed: int = 0
    criterion: Criterion
    workload: Workload
    budget: Budget
    layers: list[LayerPlan]
    anatomy: Anatomy
    training: TrainingRecord | None = None
    factors_sha256: str | None = None

    @model_validator(mode="after")
    def _fits_anatomy(self) -> Plan:
        known = {(layer.tower, layer.index): layer for layer in self.anatomy.layers()}
        seen = set()
        for i, decision in enumerate(self.layers):
            where = f"layers[{i}]"
            key = (decision.tower, decision.layer)
            if key not in known:
                raise ValueError(f"{where}: the model has no layer {decision.layer} in its {decision.tower} tower")
            if key in seen:
                raise ValueError(f"{where}: {decision.tower} layer {decision.layer} is planned twice")
            seen.add(key)
            attention, ffn = known[key].attention, known[key].ffn
            _check_kept(f"{where}.kv_groups", decision.kv_groups, attention.kv_groups)
            _check_kept(f"{where}.heads", decision.heads, attention.heads)
            per_group = {g: sum(h // attention.heads_per_group == g for h in decision.heads) for g in decision.kv_groups}
            if sum(per_group.values()) != len(decision.heads) or len(set(per_group.values())) != 1:
                raise ValueError(f"{where}.heads: keep the same number of query heads in every kept KV group, and none outside them")
            if set(decision.ranks) != set(ffn.matrices):
                raise ValueError(f"{where}.ranks: expected exactly {', '.join(ffn.matrices)}")
            for role, rank in decision.ranks.items():
                full = min(ffn.matrices[role].d_in, ffn.matrices[role].d_out)
                if rank is not None and not 1 <= rank <= full:
                    raise ValueError(f"{where}.ranks.{role}: {rank} is not a rank between 1 and {full} (or null for dense)")
        missing = set(known) - seen
        if missing:
            tower, index = min(missing)
            raise ValueError(f"layers: {tower} layer {index} is missing")
        return self

    def decision(self, tower: str, index: int) -> LayerPlan:
        """The decision for one layer of one tower."""
        return next(d for d in self.layers if (d.tower, d.layer) == (tower, index))

    def gains_bias(self, layer: Layer) -> bool:
        """Whether a layer's output projection gets a bias that the original's does not have."""
        fewer = len(self.decision(layer.tower, layer.index).heads) < layer.attention.heads
        return self.criterion.compensate == "bias" and fewer and not layer.attention.o.bias

    def low_rank_sites(self) -> dict[str, int]:
        """Site to rank, of every matrix that becomes a low-rank pair."""
        return {site(d.tower, d.layer, role): r for d in self.layers for role, r in d.ranks.items() if r is not None}

    def trained_maps(self) -> dict[str, Linear]:
        """Key in factors.safetensors to linear map, of all that training may change: the towers that were cut, and the projector."""
        cut = {x.tower for x in self.anatomy.layers() if self.decision(x.tower, x.index).cuts(x)}
        maps = {
            site(x.tower, x.index, role): x.linear(role)
            for x in self.anatomy.layers()
            if x.tower in cut
            for role in (*ATTENTION_ROLES, *x.ffn.matrices)
        }
        return maps | {projector_key(i): linear for i, linear in enumerate(self.anatomy.projector)}

    _factors: Factors | None = None

    @property
    def factors(self) -> Factors | None:
        """Contents of factors.safetensors, where they are at hand."""
        return self._factors

    @factors.setter
    def factors(self, factors: Factors) -> None:
        self._factors = factors
        self.factors_sha256 = factors_sha256(factors)

    def save(self, directory: Path | str) -> None:
        """Writes plan.json and, where they are at hand, factors.safetensors."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._factors is not None:
            write_tensors(directory / "factors.safetensors", described(self._factors), self._factors.items())
        (directory / "plan.json").write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path | str) -> Plan:
        """Reads plan.json and its factors from a directory, such as a bundle.

        Raises:
            InputError: either cannot be read, or they do not belong together.
        """
        directory = Path(directory)
        plan = cls.read(directory / "plan.json")
        if plan.factors_sha256 is not None:
            plan._factors = read_factors(directory / "factors.safetensors", plan.factors_sha256)
        return plan

    def __str__(self) -> str:
        """The tables that `infoprune-export inspect` shows."""
        from rich.console import Console

        from infoprune_export.inspect import plan_tables

        console = Console(width=100, highlight=False)
        with console.capture() as captured:
            for table in plan_tables(self):
                console.print(table)
        return captured.get().rstrip()

    @property
    def is_identity(self) -> bool:
        """Whether nothing is removed."""
        return not any(self.decision(x.tower, x.index).cuts(x) for x in self.anatomy.layers())

    def to_json(self) -> str:
        return _compact(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: str, where: object = "plan") -> Plan:
        """Reads a plan and checks it against the anatomy that it carries.

        Raises:
            InputError: naming the field.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise InputError(f"line {e.lineno}: not JSON ({e.msg})", where=where) from None
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            raise InputError(first_problem(e), where=where) from None

    @classmethod
    def read(cls, path: Path) -> Plan:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"cannot be read ({e})", where=path) from None
        return cls.from_json(text, where=path)


def projector_key(index: int) -> str:
    """The name of one of the projector's linear maps in factors.safetensors."""
    return f"projector.{index}"


def factors_sha256(factors: Factors) -> str:
    """Hash of the factors.safetensors that factors make."""
    digest = hashlib.sha256()
    for piece in encoded(described(factors), factors.items()):
        digest.update(piece)
    return digest.hexdigest()


def read_factors(path: Path, sha256: str) -> Factors:
    """Factors that belong to a plan; they stay in their file, which is read as they are looked at.

    Raises:
        InputError: missing, damaged, or of another plan.
    """
    mend = "set factors_sha256 to null so that new ones are made"
    try:
        found = file_sha256(path)
    except OSError as e:
        raise InputError(f"cannot be read ({e.strerror})", where=path, mend=f"keep it beside plan.json, or {mend}") from None
    if found != sha256:
        raise InputError("is not the file this plan was saved with", where=path, mend=mend)
    return TensorFile(path)


def _check_kept(where: str, kept: list[int], of: int) -> None:
    if not kept:
        raise ValueError(f"{where}: at least one must stay")
    if kept != sorted(set(kept)):
        raise ValueError(f"{where}: must ascend without repeats")
    if kept[0] < 0 or kept[-1] >= of:
        raise ValueError(f"{where}: {kept[-1] if kept[-1] >= of else kept[0]} is not between 0 and {of - 1}")


def _compact(value: object, indent: int = 0) -> str:
    """JSON with one line per leaf object, so that a plan reads as a table."""
    pad = " " * (indent + 1)
    if isinstance(value, dict) and any(isinstance(v, (dict, list)) and v for v in value.values()) and indent < 3:
        items = ",\n".join(f"{pad}{json.dumps(k)}: {_compact(v, indent + 1)}" for k, v in value.items())
        return "{\n" + items + "\n" + " " * indent + "}"
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        items = ",\n".join(f"{pad}{json.dumps(v)}" for v in value)
        return "[\n" + items + "\n" + " " * indent + "]"
    return json.dumps(value)
