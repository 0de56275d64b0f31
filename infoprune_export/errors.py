"""What users see when something is wrong: one line, its place, how to mend it, and an exit code."""

from __future__ import annotations


class InfoPruneError(Exception):
    """An error a user can act on.

    Args:
        what: What is wrong, one sentence without a full stop.
        where: File, field or record it was found in.
        mend: What to do about it: a command, an option, a value.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: object = None, mend: str | None = None):
        self.what, self.where, self.mend = what, where, mend
        super().__init__(str(self))

    def __str__(self) -> str:
        first = f"{self.where}: {self.what}" if self.where is not None else self.what
        return f"{first}\n{self.mend}" if self.mend else first


class GateFailed(InfoPruneError):
    """A check the user asked for, or the numerics check, did not pass; the bundle is kept."""

    exit_code = 1


class InputError(InfoPruneError):
    """Wrong usage or bad input: a recipe, plan, model, data file or bundle that cannot be used."""

    exit_code = 2


class MissingRequirement(InfoPruneError):
    """This machine lacks what the target needs; `mend` carries the install line."""

    exit_code = 3


class NotEnough(InfoPruneError):
    """Not enough memory or disk for the work; where it can be predicted, found out before it starts."""

    exit_code = 4


class FullDisk(NotEnough):
    """The disk became full while the work was under way: what is done by then stays for the next run."""
