"""What a run leaves behind: results.json, summary.json, table.md and a figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infoprune_export.engines.machine import machine_report
from infoprune_export.files import write_whole
from infoprune_export.versions import library_versions
from quality.campaign import QUICK_IMAGES, Stage, Tuned
from quality.methods import METHODS, ORIGINAL, OURS
from quality.rows import Row
from quality.settings import SETTINGS
from quality.summary import Results, checks, spread
from quality.versions import commit

EARLIER = "†"
KINDS = {"ours": "ours", "pair": "published pairs", "swap": "one axis of ours exchanged", "ablation": "one choice of ours changed"}


def write(
    out: Path,
    rows: Sequence[Row],
    tuned: list[dict[str, Any]],
    compress_seconds: float | None,
    notes: Sequence[str],
    earlier: Sequence[Row] = (),
) -> None:
    """Writes everything that rows say.

    Args:
        out: Directory; made if need be, files in it are replaced.
        rows: Of one version of model and code.
        tuned: See `tuned_record`.
        compress_seconds: Time to compress smol-llava, if it was taken.
        notes: What a reader must know about this run.
        earlier: Rows of earlier code for what `rows` does not have; shown with a mark.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = Results([*rows, *earlier], [row.place for row in earlier])
    known = {(t["setting"], t["method"], t["budget"]) for t in tuned}
    tuned = [*tuned, *(t for t in _recorded(out / "results.json") if (t["setting"], t["method"], t["budget"]) not in known)]
    head = {"commit": commit(), "machine": machine_report().description(), "versions": library_versions()}
    _json(out / "summary.json", head | {"checks": checks(results, compress_seconds)})
    _json(out / "results.json", head | {"notes": list(notes), "rows": [_record(r) for r in [*rows, *earlier]], "tuned": tuned})
    write_whole(out / "table.md", table(results, notes))
    figure(results, out / "accuracy.png")


def write_again(out: Path, asked: Sequence[str], pairs: Sequence[tuple[Row, Row]], among: int) -> None:
    """Writes again.json: rows as recorded and as measured once more, behind earlier draws of the same commit.

    Args:
        out: Directory; made if need be.
        asked: Patterns that say what was drawn from; all where there are none.
        pairs: As recorded, and as measured now.
        among: Rows that they were drawn from.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"group": old.task.group, "method": old.task.method, "seed": old.task.seed, "n": new.n}
        | {name: {"accuracy": r.accuracy, "device": r.device, "commit": r.commit} for name, r in (("recorded", old), ("again", new))}
        | {"points": 100 * (new.mean - old.mean)}
        for old, new in pairs
    ]
    same = sum((old.accuracy, old.n) == (new.accuracy, new.n) for old, new in pairs)
    furthest = max((abs(row["points"]) for row in rows), default=0.0)
    print(f"{same} of {len(rows)} rows, drawn from {among}, came to the same accuracies; the furthest is {furthest:.3f} points off")
    head, path = {"commit": commit(), "machine": machine_report().description(), "versions": library_versions()}, out / "again.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    draws = before["draws"] if before.get("commit") == head["commit"] else []
    _json(path, head | {"draws": [*draws, {"asked": list(asked), "among": among, "same": same, "rows": rows}]})


def tuned_record(tuned: Tuned, stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What was tried on the validation split, and what was chosen, for every method that is complete."""
    found: dict[tuple, dict[str, Any]] = {}
    for task in (t for s in stages for t in s.tasks):
        which = (task.setting, task.method, task.budget)
        if task.method not in METHODS or task.method == ORIGINAL.name or which in found:
            continue
        try:
            tried, (chosen, _) = tuned.rows(*which), tuned.best(*which)
        except LookupError:
            continue
        found[which] = {
            "setting": task.setting,
            "method": task.method,
            "budget": task.budget,
            "chosen": chosen,
            "tried": [
                {"budget": r.task.budget, "parameters": r.task.parameters, "accuracy": None if r.failed else round(r.mean, 5), "n": r.n}
                for r in tried
            ],
        }
    return list(found.values())


def recorded_parameters(path: Path) -> dict[tuple[str, str, float], dict[str, Any]]:
    """(setting, method, budget) to the parameters that an earlier run chose; empty where there was none."""
    return {(t["setting"], t["method"], t["budget"]): t["chosen"] for t in _recorded(path)}


def _recorded(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["tuned"] if path.is_file() else []


def table(results: Results, notes: Sequence[str]) -> str:
    """Every group of rows as a Markdown table: accuracy in percent, its deviation over seeds, points against ours."""
    lines = ["<!-- written by tools/bench_quality.py -->", "# Accuracy after compression", ""]
    lines += [
        "Accuracy in percent: exact match of greedy answers, mean over the model's tasks, then over seeds;",
        "± is the sample standard deviation over seeds. Budgets are the fraction of the FLOPs kept, scope all.",
        "The best pair is the one with the highest mean on these very test questions; ± of the difference to it is the",
        "deviation, over seeds, of ours minus that pair with the same calibration questions. Parameters were chosen on the",
        "validation split, out of as many candidates for every method: results.json has them all.",
        *([f"{EARLIER} was measured with earlier code, whose commit results.json names."] if results.earlier else []),
        "",
        *(f"- {note}" for note in notes),
    ]
    for setting in SETTINGS:
        if (before := results.original(setting)) is None:
            continue
        tasks = results.rows(f"{setting}.free.1", ORIGINAL.name)[0]
        asked = ", ".join(f"{name} {100 * tasks.accuracy[name]:.2f} ({tasks.n[name]:,} questions)" for name in tasks.accuracy)
        lines += ["", f"## {SETTINGS[setting].recipe_name}", "", f"Original: {100 * before:.2f} ({asked})."]
        for trained in ("free", "trained"):
            groups = [g for g in results.groups() if g.startswith(f"{setting}.{trained}.") and not g.endswith(".1")]
            groups.sort(key=lambda g: -float(g.rpartition("trained." if trained == "trained" else "free.")[2]))
            if groups:
                lines += ["", f"### {_title(results, groups)}", "", *_rows(results, groups)]
    return "\n".join(lines) + "\n"


def _title(results: Results, groups: Sequence[str]) -> str:
    """Whether and how long networks were trained."""
    task = results.any(groups[0]).task
    if not task.steps:
        return "Training-free"
    images = f"{SETTINGS[task.setting].train_images:,} training images of each task"
    return f"With training: {task.steps} steps of {SETTINGS[task.setting].recipe.recovery.batch} images, out of {images}"


def _rows(results: Results, groups: Sequence[str]) -> list[str]:
    budgets = [g.split(".", 2)[2] for g in groups]
    lines = ["| method | " + " | ".join(budgets) + " |", "|---" * (len(groups) + 1) + "|"]
    for kind, title in KINDS.items():
        members = [m.name for m in METHODS.values() if m.kind == kind and any(results.seeds(g, m.name) for g in groups)]
        if members and kind != "ours":
            lines.append(f"| *{title}* |" + " |" * len(groups))
        for name in members:
            shown = f"**{name}**" if kind == "ours" else name
            lines.append(f"| {shown} | " + " | ".join(_cell(results, g, name) for g in groups) + " |")
    best = [results.best_baseline(g) for g in groups]
    if any(best):
        gaps = [None if b is None or not results.seeds(g, OURS.name) else _gap(results, g, b) for g, b in zip(groups, best, strict=True)]
        lines.append("| *ours minus the best pair* | " + " | ".join(gap or "" for gap in gaps) + " |")
    return lines


def _cell(results: Results, group: str, name: str) -> str:
    if not (values := list(results.seeds(group, name).values())):
        return ""
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    mark = f" {EARLIER}" if any((group, name) == place[:2] for place in results.earlier) else ""
    return f"{100 * statistics.fmean(values):.2f}{deviation}{mark}"


def _gap(results: Results, group: str, best: str) -> str:
    deviation = spread(results, group)
    difference = 100 * (results.mean(group, OURS.name) - results.mean(group, best))
    return f"{difference:+.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "") + f" ({best})"


def figure(results: Results, path: Path) -> None:
    """Accuracy against the FLOPs kept, a line for each method, training-free solid and trained dashed; a panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = [s for s in SETTINGS if results.original(s) is not None]
    if not settings:
        return
    picture, axes = plt.subplots(1, len(settings), figsize=(6.4 * len(settings), 4.8), squeeze=False, layout="constrained")
    names = [m.name for m in METHODS.values() if m.kind in ("ours", "pair")]
    shades = {OURS.name: "black", **{name: f"C{i}" for i, name in enumerate(names[1:])}}
    for axis, setting in zip(axes[0], settings, strict=True):
        before = 100 * results.original(setting)
        axis.axhline(before, color="gray", linewidth=1, linestyle=":", label=f"original {before:.1f}")
        for name in names:
            for trained, style in (("free", "-"), ("trained", "--")):
                groups = [g for g in results.groups() if g.startswith(f"{setting}.{trained}.") and results.seeds(g, name)]
                if groups:
                    label = name if trained == "free" else f"{name}, trained"
                    axis.errorbar(**_line(results, groups, name), color=shades[name], linestyle=style, label=label, **_weight(name))
        axis.set(xlabel="FLOPs kept", ylabel="accuracy, %", title=SETTINGS[setting].recipe_name, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    picture.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(picture)


def _weight(name: str) -> dict[str, Any]:
    own = name == OURS.name
    return {"linewidth": 2.4 if own else 1.2, "marker": "o", "markersize": 5 if own else 3, "capsize": 3, "zorder": 3 if own else 2}


def _line(results: Results, groups: Sequence[str], name: str) -> dict[str, list[float]]:
    points = []
    for group in groups:
        rows = results.rows(group, name)
        values = [100 * r.mean for r in rows]
        points.append(
            (statistics.fmean(r.flops for r in rows), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        )
    x, y, error = zip(*sorted(points), strict=True)
    return {"x": list(x), "y": list(y), "yerr": list(error)}


def quick_note() -> str:
    return f"A quick run: one seed, the first {QUICK_IMAGES} images of each task's test split, parameters as recorded by the full run."


def _record(row: Row) -> dict[str, Any]:
    task = row.task
    record = {"group": task.group, "method": task.method, "kind": METHODS[task.method].kind, "seed": task.seed, "steps": task.steps}
    record |= {"parameters": task.parameters, "flops": row.flops, "accuracy": row.accuracy, "n": row.n, "seconds": row.seconds}
    record |= {"device": row.device, "commit": row.commit}
    return record | ({"failed": row.failed} if row.failed else {"mean": row.mean}) | {"key": row.key}


def _json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1) + "\n")
