"""A budget of time, met end to end and not by the table alone."""

from __future__ import annotations

from collections.abc import Callable

from infoprune_export.errors import InputError
from infoprune_export.plans import Plan
from infoprune_export.timetable import TimeTable
from infoprune_export.validation.stand_ins import Setting, share_that_arrives

ATTEMPTS = 3
TOLERANCE = 0.02
"""Of the request; a plan that is predicted to be this near is taken."""


def meet_latency(
    setting: Setting,
    table: TimeTable,
    requested: float,
    decide: Callable[[float], Plan],
    *,
    seconds: float = 2.0,
    notify: Callable[[str], None] = lambda line: None,
) -> Plan:
    """The plan whose stand-in takes the fraction asked for of the original's time.

    What parts save one by one need not arrive end to end. So the share that arrives is measured on a first plan, and where the
    request is missed another one is decided, for as much more or less by the table.

    Args:
        setting: What the table was measured for.
        table: Of this machine.
        requested: Fraction of the original's time.
        decide: Makes the plan that keeps a fraction of the time by the table.
        seconds: For each part of each plan's stand-in, the original's in turn with it.
        notify: Gets a line where a plan is decided again.

    Raises:
        InputError: out of reach by the table.
    """
    asked, arrives, found = requested, 1.0, []
    for _ in range(ATTEMPTS):
        if found:
            notify(f"{arrives:.2f} of what parts save one by one arrives end to end: deciding for {asked:.3f} of the time by the table")
        try:
            plan = decide(asked)
        except InputError:
            if not found:
                raise
            break  # the table does not go lower: the nearest of the plans so far has to do
        arrives = share_that_arrives(setting, table, plan, seconds)
        predicted = 1 - arrives * (1 - table.kept(plan))
        plan.budget.latency = plan.budget.latency.model_copy(update={"requested": requested, "predicted": predicted})
        found.append(plan)
        if abs(predicted / requested - 1) <= TOLERANCE:
            break
        asked = min(0.99, 1 - (1 - requested) / max(arrives, 0.1))
        if asked <= 0:
            break
    return min(found, key=lambda p: abs(p.budget.latency.predicted - requested))
