"""How long work is shown: steps with a spinner and bars on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What the pipeline tells about its work."""

    def step(self, name: str):
        """A context: a piece of work of unknown length."""

    def bar(self, name: str, total: int):
        """A context that gives a function to call with the number of units just done and, if there are any, figures to show."""

    def counter(self) -> Callable[[str, int, int], None]:
        """A function to be told what is under way, how much of it is done, and of how much."""

    def note(self, line: str) -> None:
        """A line worth reading."""


class Silent:
    """Shows nothing."""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        yield

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        yield lambda n, figures="": None

    def counter(self) -> Callable[[str, int, int], None]:
        return lambda what, done, total: None

    def note(self, line: str) -> None:
        pass


class Terminal:
    """Shows progress on stderr."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        if self.console.is_terminal:
            with self.console.status(name):
                yield
        else:
            yield
        self.console.print(f"[green]✓[/] {name} [dim]{time.monotonic() - start:.1f} s[/]")

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        start = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[figures]}"),
        )
        with RichProgress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bars:
            task = bars.add_task(name, total=total, figures="")
            last = ""

            def advance(n: int, figures: str = "") -> None:
                nonlocal last
                last = figures
                bars.update(task, advance=n, figures=figures)

            yield advance
        shown = f", {last}" if last else ""
        self.console.print(f"[green]✓[/] {name} [dim]{total} in {time.monotonic() - start:.1f} s{shown}[/]")

    def counter(self) -> Callable[[str, int, int], None]:
        started: dict[str, float] = {}

        def told(what: str, done: int, total: int) -> None:
            start = started.setdefault(what, time.monotonic())
            if done >= total:
                self.console.print(f"[green]✓[/] {what} [dim]{total} in {time.monotonic() - start:.1f} s[/]")
            elif self.console.is_terminal:
                self.console.print(f"  {what} {done}/{total}", end="\r")

        return told

    def note(self, line: str) -> None:
        self.console.print(line, markup=False)
