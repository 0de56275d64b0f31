"""How work is told where nobody looks at a terminal."""

from __future__ import annotations

import json

import pytest

from infoprune_export import progress
from infoprune_export.progress import Events, Terminal


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_a_minute(clock, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with Terminal().bar("statistics", 10) as advance:
        for i in range(10):
            clock[0] += 25
            advance(1, f"loss {i}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "  statistics 3/10, about 2 min left, loss 2",
        "  statistics 6/10, about 1 min left, loss 5",
        "  statistics 9/10, about 25 s left, loss 8",
        "✓ statistics 10 in 250.0 s, loss 9",
    ]


def test_what_is_counted_has_a_line_a_minute_too(clock, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    told = Terminal().counter()
    for done in range(5):
        told("vqa, compressed", done, 4)
        clock[0] += 45
    told("vqa, compressed", 0, 1)
    told("vqa, compressed", 1, 1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "  vqa, compressed 2/4, about 1 min left",
        "✓ vqa, compressed 4 in 180.0 s",
        "✓ vqa, compressed 1 in 0.0 s",
    ]


def test_names_are_shown_as_they_are(clock, capsys):
    """A task may be called what a terminal's library takes for markup."""
    terminal, name = Terminal(), "vqa[val] [/x]"
    with terminal.step(name):
        pass
    with terminal.bar(name, 1) as advance:
        advance(1)
    terminal.counter()(name, 1, 1)
    assert [name in line for line in capsys.readouterr().err.splitlines()] == [True] * 3


def test_quick_work_is_told_once(clock, capsys):
    with Terminal().bar("factors", 4) as advance:
        advance(4)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_events_are_json_a_line_each(clock, capsys):
    events = Events()
    with events.step("loading"):
        clock[0] += 1.5
    with events.bar("statistics", 2) as advance:
        advance(1)
        advance(1, "loss 3")
    told = events.counter()
    for done in range(3):
        told("vqa", done, 2)
        clock[0] += 1
    events.note("a line")
    out, err = capsys.readouterr()
    assert not out
    assert [json.loads(line) for line in err.splitlines()] == [
        {"event": "begin", "what": "loading"},
        {"event": "done", "what": "loading", "seconds": 1.5},
        {"event": "begin", "what": "statistics", "total": 2},
        {"event": "advance", "what": "statistics", "done": 1, "total": 2},
        {"event": "advance", "what": "statistics", "done": 2, "total": 2, "figures": "loss 3"},
        {"event": "done", "what": "statistics", "total": 2, "seconds": 0.0},
        {"event": "begin", "what": "vqa", "total": 2},
        {"event": "advance", "what": "vqa", "done": 0, "total": 2},
        {"event": "advance", "what": "vqa", "done": 1, "total": 2},
        {"event": "advance", "what": "vqa", "done": 2, "total": 2},
        {"event": "done", "what": "vqa", "total": 2, "seconds": 2.0},
        {"event": "note", "line": "a line"},
    ]


def test_json_on_the_command_line_gives_results_and_events_apart(run, small_model):
    done = run(small_model, "--flops", "0.7", "--samples", "4", "--dry-run", "--json")
    assert json.loads(done.stdout)["layers"]
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert {"event": "begin", "what": "statistics", "total": 4} in events and any(e["event"] == "advance" for e in events)
