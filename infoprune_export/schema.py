"""Records that users' files are read into: what a file has to say, nothing besides, and a complaint that names the place."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    """A record that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid")


def first_problem(error: ValidationError) -> str:
    """The first complaint of a validation as `field.path: message`."""
    problem = error.errors()[0]
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in problem["loc"]).lstrip(".")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "unknown field"
    if path == "schema_version":
        message = f"{problem['input']!r} is not {problem['ctx']['expected']}, which this version of infoprune-export reads"
    return f"{path}: {message}" if path else message
