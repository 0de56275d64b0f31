from __future__ import annotations

import pytest

from infoprune_export import stopwatch
from infoprune_export.stopwatch import Stopwatch


def test_time_inside_another_measurement_counts_there_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    watch = Stopwatch()
    passes(5)
    with watch.measuring("forward"):
        passes(1)
        with watch.measuring("algebra"):
            passes(10)
        passes(2)
    passes(7)
    with pytest.raises(KeyError), watch.measuring("algebra"):
        passes(20)
        raise KeyError
    assert watch.seconds == {"forward": 3.0, "algebra": 30.0}
