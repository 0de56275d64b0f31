"""How long work is shown: steps with a spinner and bars on a terminal, plain lines or JSON elsewhere; always on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console


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


LINE_EVERY = 60.0
"""Seconds between two lines about the same work where there is no terminal."""


class Terminal:
    """Shows progress on stderr: bars on a terminal, elsewhere a line when something is done, and one a minute on the way."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        from rich.markup import escape

        start, name = time.monotonic(), escape(name)
        if self.console.is_terminal:
            with self.console.status(name):
                yield
        else:
            yield
        self.console.print(f"[green]✓[/] {name} [dim]{time.monotonic() - start:.1f} s[/]")

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[figures]}"),
        )
        with RichProgress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bars:
            task = bars.add_task(escape(name), total=total, figures="")
            lines = _Lines(self.console, name)
            last, done = "", 0

            def advance(n: int, figures: str = "") -> None:
                nonlocal last, done
                last, done = figures, done + n
                bars.update(task, advance=n, figures=figures)
                lines.on_the_way(done, total, figures)

            yield advance
        lines.end(total, last)

    def counter(self) -> Callable[[str, int, int], None]:
        under_way: dict[str, _Lines] = {}

        def told(what: str, done: int, total: int) -> None:
            lines = under_way.setdefault(what, _Lines(self.console, what))
            if done >= total:
                under_way.pop(what).end(total)
            elif self.console.is_terminal:
                self.console.print(f"  {what} {done}/{total}", end="\r", markup=False)
            lines.on_the_way(done, total)

        return told

    def note(self, line: str) -> None:
        self.console.print(line, markup=False)


class _Lines:
    """What is said of one piece of work in lines: that it is done, and where there is no terminal, once a minute how far it is."""

    def __init__(self, console: Console, name: str):
        from rich.markup import escape

        self.console, self.name = console, escape(name)
        self.start = self.told = time.monotonic()

    def on_the_way(self, done: int, total: int, figures: str = "") -> None:
        now = time.monotonic()
        if not self.console.is_terminal and 0 < done < total and now - self.told >= LINE_EVERY:
            self.told = now
            self.console.print(f"  {self.name} {done}/{total}, {_left(now - self.start, done, total)}{f', {figures}' * bool(figures)}")

    def end(self, total: int, figures: str = "") -> None:
        seconds = time.monotonic() - self.start
        self.console.print(f"[green]✓[/] {self.name} [dim]{total} in {seconds:.1f} s{f', {figures}' * bool(figures)}[/]")


class Events:
    """Writes progress as JSON, a line each: `{"event": "begin", "what": "statistics", "total": 55}`.

    `begin` and `done` (with `seconds`) enclose every piece of work, `advance` has `done` of `total` and perhaps `figures`, `note` a `line`.
    """

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = self._begin(name)
        yield
        self._write("done", what=name, seconds=time.monotonic() - start)

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        start, done = self._begin(name, total=total), 0

        def advance(n: int, figures: str = "") -> None:
            nonlocal done
            done += n
            self._write("advance", what=name, done=done, total=total, **({"figures": figures} if figures else {}))

        yield advance
        self._write("done", what=name, total=total, seconds=time.monotonic() - start)

    def counter(self) -> Callable[[str, int, int], None]:
        started: dict[str, float] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in started:
                started[what] = self._begin(what, total=total)
            self._write("advance", what=what, done=done, total=total)
            if done >= total:
                self._write("done", what=what, total=total, seconds=time.monotonic() - started.pop(what))

        return told

    def note(self, line: str) -> None:
        self._write("note", line=line)

    def _begin(self, name: str, **more: object) -> float:
        self._write("begin", what=name, **more)
        return time.monotonic()

    def _write(self, event: str, **fields: object) -> None:
        if "seconds" in fields:
            fields["seconds"] = round(fields["seconds"], 2)
        print(json.dumps({"event": event, **fields}), file=sys.stderr, flush=True)


def _left(seconds: float, done: int, total: int) -> str:
    """How long the rest takes at the pace so far."""
    left = round(seconds / done * (total - done))
    return f"about {left // 60} min left" if left >= 60 else f"about {left} s left"
