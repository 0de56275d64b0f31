"""report.html: the report as one page that needs nothing beside itself."""

from __future__ import annotations

from dataclasses import dataclass

from infoprune_export.models.anatomy import TOWERS, Layer, Linear
from infoprune_export.plans import Plan
from infoprune_export.validation import figures
from infoprune_export.validation.records import GenerationNumerics
from infoprune_export.validation.report import Report

TOWER_NAMES = {"vision": "Vision tower", "language": "Language model"}


@dataclass(frozen=True)
class HeadRow:
    """One layer of the picture of heads: for each KV group, which of its query heads are kept."""

    layer: int
    groups: tuple[tuple[bool, ...], ...]

    @property
    def kept(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def total(self) -> int:
        return sum(map(len, self.groups))

    @property
    def groups_kept(self) -> int:
        return sum(map(any, self.groups))


@dataclass(frozen=True)
class RankCell:
    """One matrix of the picture of ranks; `break_even` is the fraction of full rank that costs what the dense matrix costs."""

    role: str
    rank: int | None
    full: int
    break_even: float

    @property
    def fraction(self) -> float:
        return 1.0 if self.rank is None else self.rank / self.full


@dataclass(frozen=True)
class RankRow:
    layer: int
    cells: tuple[RankCell, ...]


@dataclass(frozen=True)
class TowerPicture:
    name: str
    heads: tuple[HeadRow, ...]
    ranks: tuple[RankRow, ...]

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key and a value."""
        return any(len(group) > 1 for row in self.heads for group in row.groups)

    @property
    def cell(self) -> int:
        """Side of a head's cell: 12 for the 32 heads of a large model, up to 20 for a small one's."""
        return max(12, min(20, 300 // max(row.total for row in self.heads)))

    @property
    def heads_kept(self) -> tuple[int, int]:
        return sum(r.kept for r in self.heads), sum(r.total for r in self.heads)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(cell.role for cell in self.ranks[0].cells)


def pictures(plan: Plan) -> list[TowerPicture]:
    """What a plan keeps, tower by tower, as rows to draw."""
    made = []
    for tower in TOWERS:
        layers = plan.anatomy.tower(tower).layers
        if layers:
            made.append(TowerPicture(TOWER_NAMES[tower], tuple(_heads(x, plan) for x in layers), tuple(_ranks(x, plan) for x in layers)))
    return made


def report_page(report: Report, plan: Plan | None = None) -> str:
    """The page.

    Args:
        report: All figures.
        plan: For the pictures of heads and ranks; left out without it.

    Returns:
        HTML with its style inline, without scripts and without addresses of anything outside.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("infoprune_export.validation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "si": figures.si,
        "ms": figures.milliseconds,
        "fraction": figures.fraction,
        "times": figures.times,
        "interval": figures.interval,
        "drop": lambda accuracy, final=False: _typeset(figures.drop(accuracy, final)),
        "signed": lambda points: _typeset(figures.signed(points)),
        "became_time": figures.became_time,
        "significant": figures.significant,
        "duration": figures.duration,
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        latency_budget=figures.latency_budget(report) if report.latency_budget else None,
        whose=figures.WHOSE[report.flops.scope],
        weights=report.quantisation.weights if report.quantisation else None,
        towers=pictures(plan) if plan else [],
        components={k: r for k, r in report.numerics.items() if not isinstance(r, GenerationNumerics)},
        generations={k: r for k, r in report.numerics.items() if isinstance(r, GenerationNumerics)},
        largest_drop=figures.largest_drop(report),
        not_measured=figures.by_reason(report),
        part_names=figures.PART_NAMES,
        machine=_flat(report.machine),
    )


def _typeset(figure: str) -> str:
    return figure.replace("-", "\N{MINUS SIGN}")


def _heads(layer: Layer, plan: Plan) -> HeadRow:
    kept, size = set(plan.decision(layer.tower, layer.index).heads), layer.attention.heads_per_group
    return HeadRow(layer.index, tuple(tuple(g * size + i in kept for i in range(size)) for g in range(layer.attention.kv_groups)))


def _ranks(layer: Layer, plan: Plan) -> RankRow:
    ranks = plan.decision(layer.tower, layer.index).ranks
    return RankRow(layer.index, tuple(_cell(role, m, ranks[role]) for role, m in layer.ffn.matrices.items()))


def _cell(role: str, matrix: Linear, rank: int | None) -> RankCell:
    full = min(matrix.d_in, matrix.d_out)
    # A pair of rank r costs r (d_in + d_out), the dense matrix d_in x d_out.
    return RankCell(role, rank, full, max(matrix.d_in, matrix.d_out) / (matrix.d_in + matrix.d_out))


def _flat(value: object, name: str = "") -> list[tuple[str, str]]:
    """A nested record as lines of name and text, for a table."""
    if isinstance(value, dict):
        return [line for key, inner in value.items() for line in _flat(inner, f"{name} {key}".strip())]
    if isinstance(value, (list, tuple)):
        if any(isinstance(inner, dict) for inner in value):
            return [line for i, inner in enumerate(value) for line in _flat(inner, f"{name} {i}".strip())]
        value = ", ".join(map(str, value)) or figures.ABSENT
    return [(name.replace("_", " "), figures.ABSENT if value is None else str(value))]
