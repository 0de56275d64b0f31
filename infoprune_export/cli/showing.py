"""What people see of results: tables, JSON, a line on stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


def show_plan(plan: Any, as_json: bool) -> None:
    if as_json:
        return click.echo(plan.to_json())
    from infoprune_export.inspect import plan_tables

    for table in plan_tables(plan):
        show(table)


def show_report(directory: Path, report: Any, as_json: bool) -> None:
    """A report that was written: its figures, where it is, and exit code 1 where a gate failed."""
    show_figures(report, as_json)
    if not as_json:
        say(f"bundle: {directory}    report: {directory}/report.html")
    report.raise_for_gates()


def show_figures(report: Any, as_json: bool) -> None:
    if as_json:
        click.echo(report.to_json())
    else:
        from infoprune_export.validation.summary import summary_table

        show(summary_table(report))


def show(renderable: Any) -> None:
    from rich.console import Console

    Console(highlight=False).print(renderable)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1))


def say(line: str, warning: bool = False) -> None:
    click.secho(("warning: " if warning else "") + line, err=True, fg="yellow" if warning else None)
