"""From a MODEL argument and options to a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from infoprune_export.data.vqa import PACKAGED, holds_split
from infoprune_export.errors import InputError
from infoprune_export.models.hub import is_hub_id
from infoprune_export.recipe import DataSource, Recipe, near, packaged, read
from infoprune_export.schema import first_problem


def resolve(model: str, given: dict[str, Any], warn: Callable[[str], None] = lambda line: None) -> Recipe:
    """The recipe that a MODEL argument names, with options over its fields.

    Args:
        model: Recipe name, recipe file, model directory or hub id `org/name`.
        given: Fields to override, such as flops, targets or calibration (a path); None leaves one as it is.
        warn: Gets a line where a default is not what one would choose.

    Raises:
        InputError: nothing of that name (near names are suggested), two budgets, or a field that cannot be so.
    """
    random = given.get("random_weights", False)
    if random:
        _check_random(given)
    if given.get("flops") is not None and given.get("latency") is not None:
        raise InputError("--flops and --latency are two budgets", mend="give one: --latency allocates by times measured on this machine")
    names, path = packaged(), Path(model)
    if model in names:
        recipe = read(names[model])
    elif path.suffix in (".yaml", ".yml"):
        recipe = read(path)
    elif path.is_dir() or is_hub_id(model):
        if not random and given.get("calibration") is None and (given.get("latency") or given.get("flops") or 1) != 1:
            warn("no calibration data named: using the small packaged set; data like your own is better (--calibration)")
        tiny = [DataSource(path=f"{PACKAGED}{name}", split="train") for name in ("vqa", "textvqa", "gqa")]
        local = path.is_dir()
        recipe = Recipe(
            name=path.resolve().name if local else model.split("/")[1], model=str(path.resolve()) if local else model, calibration=tiny
        )
    else:
        raise InputError(
            f"no recipe, file or directory {model!r}{near(model, list(names))}",
            mend=f"recipes: {', '.join(names)}; or name a recipe file, a model directory or a hub id org/name",
        )
    fields = ("flops", "latency", "scope", "dtype", "weights", "samples", "train_steps", "max_drop", "min_speedup")
    changes: dict[str, Any] = {k: given[k] for k in fields if given.get(k) is not None}
    if {"flops", "latency"} & changes.keys():  # what is asked for here stands in place of the recipe's budget
        changes = {"flops": 1.0, "latency": None, **changes}
    if given.get("targets"):
        changes["targets"] = list(dict.fromkeys(given["targets"]))
    if given.get("calibration"):
        changes["calibration"] = [_calibration(str(given["calibration"]))]
    if random:  # synthetic data stand in for all of the recipe's, and nothing can be learned from them
        changes |= {"calibration": [], "training": [], "validation": [], "evaluation": {}, "train_steps": 0, "max_drop": None}
    origin = recipe.origin
    try:
        # What was not set stays so: a workload that names no image tokens gets the model's own.
        recipe = Recipe.model_validate({**recipe.model_dump(exclude_unset=True), **changes})
    except ValidationError as e:
        raise InputError(first_problem(e)) from None
    recipe._origin = origin
    return recipe


def _calibration(named: str) -> DataSource:
    """Data by their path: of a directory, its training questions where it has such, for the others are to be evaluated on."""
    path = named if named.startswith(PACKAGED) else str(Path(named).absolute())
    return DataSource(path=path, split="train" if holds_split(path, "train") else None)


def _check_random(given: dict[str, Any]) -> None:
    """Refuses options that ask random weights for what they cannot have.

    Raises:
        InputError: names the option.
    """
    for name, option in (("train_steps", "--train-steps"), ("max_drop", "--max-drop"), ("calibration", "--calibration")):
        if given.get(name):
            reason = "synthetic data go with them" if name == "calibration" else "random weights have learned nothing"
            raise InputError(f"{option} does not go with --random-weights: {reason}", mend=f"leave {option} out")
