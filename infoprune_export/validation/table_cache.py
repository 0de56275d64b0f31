"""Time tables kept between runs: one file for every model, workload and machine, used only where nothing has changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from infoprune_export.kept import cache_directory, keep
from infoprune_export.timetable import Conditions, TimeTable
from infoprune_export.validation.profile import Progress, measure_table
from infoprune_export.validation.stand_ins import Setting

Notify = Callable[[str], None]


def table_for(setting: Setting, *, notify: Notify = lambda line: None, progress: Progress = lambda what, done, total: None) -> TimeTable:
    """The table kept for a setting, or one measured now and kept; says so where one that is kept cannot be used.

    Args:
        setting: Model, workload, type and threads.
        notify: Gets a line where a table that is kept is stale or damaged.
        progress: Told how much is measured.
    """
    conditions = setting.conditions()
    path = _path(conditions)
    if path.is_file():
        try:
            table = TimeTable.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            notify(f"{path}: no latency table that this version reads; measuring again")
        else:
            if not (changed := table.conditions.differences(conditions)):
                return table
            notify(f"{path}: the latency table is stale ({'; '.join(changed)}); measuring again")
    return measure_and_keep(setting, progress=progress)


def measure_and_keep(setting: Setting, *, seconds: float = 5.0, progress: Progress = lambda what, done, total: None) -> TimeTable:
    """A table measured now, in place of any that was kept; it is returned even where it cannot be kept."""
    table = measure_table(setting, seconds, progress)
    keep(_path(table.conditions), table.model_dump_json(indent=1).encode())
    return table


def _path(conditions: Conditions) -> Path:
    """Versions are not in the name, so that a table measured by others is found and told about."""
    key = conditions.model_dump(mode="json", exclude={"versions", "schema_version"})
    return cache_directory("latency") / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
