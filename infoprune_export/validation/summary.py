"""What the terminal shows of a report, within 80 columns."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from infoprune_export.timetable import TimeTable
from infoprune_export.validation import figures
from infoprune_export.validation.affinity import spans
from infoprune_export.validation.records import PartLatency
from infoprune_export.validation.report import Report


def summary_table(report: Report) -> RenderableType:
    """What was asked and reached, beside the original: the end of the main job."""
    quantised = report.quantisation
    table = _table("", "original", "compressed", *([quantised.weights] if quantised else []), "change")

    def add(name: str, before: str, after: str, small: str, change: str) -> None:
        table.add_row(name, before, after, *([small] if quantised else []), change)

    flops, size = report.flops, report.size
    after = figures.si(flops.compressed, "FLOP")
    add("FLOPs a request", figures.si(flops.original, "FLOP"), after, after, _kept(flops.achieved))
    smallest = size.quantised_bytes or size.compressed_bytes
    add(
        "graphs and weights",
        figures.si(size.original_bytes, "B") if size.original_bytes else figures.ABSENT,
        figures.si(size.compressed_bytes, "B"),
        figures.si(smallest, "B"),
        _kept(smallest / size.original_bytes) if size.original_bytes else figures.ABSENT,
    )
    for task, a in report.accuracy.items():
        change = f"{figures.drop(a, final=True)} points" if a.final_drop_points is not None else figures.ABSENT
        scores = (figures.fraction(x) for x in (a.original, a.compressed, a.quantised))
        add(f"{escape(task)} accuracy", *scores, change)
    for engine, parts in report.latency.items():
        for part, latency in parts.items():
            medians = (figures.milliseconds(t.median_ms if t else None) for t in (latency.original, latency.compressed, latency.quantised))
            add(f"{escape(engine)} {figures.PART_NAMES.get(part, escape(part))}", *medians, figures.times(latency.final_speedup))
    asked = f"asked for at most {figures.fraction(flops.requested)} of the FLOPs" if flops.requested < 1 else "exported whole"
    if report.latency_budget:
        asked = f"{figures.latency_budget(report)}; of the FLOPs"
    head = Text.assemble((report.name, "bold"), f": {asked}, kept {flops.achieved:.4f}")
    random = [Text("random weights: times and sizes mean something, answers do not", style="bold yellow")] if report.random_weights else []
    of = Text(f"of {flops.denominator}; {report.workload}", style="dim")
    trained = [Text(f"trained: {report.training}", style="dim")] if report.training else []
    times = sorted({a.measured_at for a in report.accuracy.values() if a.measured_at})
    kept = [Text(f"accuracy: kept of an earlier report, measured {time}", style="dim") for time in times]
    return Group(head, *random, of, *trained, table, *kept, *_verdicts(report), *_missing(report))


def latency_table(report: Report) -> RenderableType:
    """Order statistics of every part, as the `bench` verb prints them: milliseconds, or seconds where some take ten."""
    groups: list[RenderableType] = []
    for engine, parts in report.latency.items():
        timings = [t for record in parts.values() for t in (record.original, record.compressed, record.quantised) if t is not None]
        unit, scale = ("s", 1e-3) if any(t.max_ms >= 10_000 for t in timings) else ("ms", 1.0)
        table = _table(f"{escape(engine)}, {unit}", "", "min", "mean", "median", "p90", "p95", "p99", "max", "n", gap=1)
        table.columns[1].justify = "left"
        for part, record in parts.items():
            quantised = f" [bold]{figures.times(record.quantised_speedup)}[/]" if record.quantised_speedup else ""
            names = [figures.PART_NAMES.get(part, escape(part)), _gain(record), quantised]
            for side, t in (("original", record.original), ("compressed", record.compressed), ("quantised", record.quantised)):
                if t is not None:
                    values = (t.min_ms, t.mean_ms, t.median_ms, t.p90_ms, t.p95_ms, t.p99_ms, t.max_ms)
                    shown = (figures.ABSENT if v is None else figures.significant(scale * v) for v in values)
                    table.add_row(names.pop(0), side, *shown, str(t.n))
        groups += [table, *_settings(report, engine)]
    return Group(*groups, Text(str(report.workload), style="dim"), *_missing(report))


def _settings(report: Report, engine: str) -> list[Text]:
    """What the figures depend on."""
    s = report.latency_settings.get(engine)
    if s is None:
        return []
    threads = f"{s.threads} thread{'s' * (s.threads != 1)}" if s.threads else "threads of the engine's choice"
    turns = "both networks in turn" if any(p.original for p in report.latency[engine].values()) else "the compressed network alone"
    said = [f"{s.dtype}{f' on {s.where}' * bool(s.where)}, {threads}"]
    said += [f"on CPUs {spans(s.cpus)}"] if s.cpus else []
    said += [f"{s.warmup_rounds} warm-up rounds, then {s.seconds_per_part:g} s a part, {turns}", s.transfers.partition(":")[0]]
    said += [f"load average before {s.load_average:g}"] if s.load_average is not None else []
    return [Text("; ".join(said), style="dim")]


def layer_table(table: TimeTable) -> RenderableType:
    """What `bench --profile-layers` prints: what each layer saves of a pass, by what is kept of one of its parts."""
    c, groups = table.conditions, []
    for name, part in table.parts.items():
        whole = f"{figures.PART_NAMES[name]}: {figures.milliseconds(part.whole / 1e6)}"
        rows = _table(whole, "saved in each layer, microseconds, by what is kept", gap=2)
        rows.columns[1].justify = "left"
        for what, shapes in (("groups of ", part.attention), ("rank of ", part.pairs)):
            for shape, savings in shapes.items():
                points = zip(savings.sizes, savings.nanoseconds, strict=True)
                rows.add_row(what + shape, "  ".join(f"{size}: {ns / 1e3:.0f}" for size, ns in points))
        groups.append(rows)
    machine = f"{c.engine} {c.dtype}, {c.threads} threads, {c.machine['cpu']}; {c.workload}"
    return Group(*groups, Text(f"end to end: {figures.milliseconds(table.end_to_end / 1e6)}; {machine}", style="dim"))


def _gain(record: PartLatency) -> str:
    """Speed-up, beside what it would be if time fell as the part's FLOPs did."""
    if record.speedup is None:
        return ""
    ideal = f" [dim](ideal {figures.times(1 / record.flops_kept)})[/]" if record.flops_kept else ""
    return f" [bold]{figures.times(record.speedup)}[/]{ideal}"


def _table(first: str, *columns: str, gap: int = 2) -> Table:
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True, overflow="ellipsis", min_width=12)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _kept(value: float) -> str:
    return f"{value:.3f} kept"


def _verdicts(report: Report) -> list[Text]:
    lines = []
    for name, gate in report.gates.items():
        verdict = ("passed", "bold green") if gate.passed else ("FAILED", "bold red")
        lines.append(Text.assemble(verdict, f"  {name.replace('_', ' ')}: {gate.measured} (required: {gate.required})"))
    failures = [record.message for record in report.numerics.values() if record.message]
    return lines + [Text(f"        {message}", style="red") for message in failures]


def _missing(report: Report) -> list[Text]:
    return [Text(f"not measured: {', '.join(whats)} ({reason})", style="dim") for reason, whats in figures.by_reason(report).items()]
