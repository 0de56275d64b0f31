"""Recipes: what to compress and for what, as YAML with path-precise errors."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infoprune_export.errors import InputError

Scope = Literal["all", "vision", "language"]
Dtype = Literal["fp32", "fp16", "bf16"]
TargetName = Literal["onnx", "ort", "trt"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Workload(_Strict):
    """The shape of one request; every FLOP and latency figure names it.

    The first new token comes out of the prefill, so `new_tokens` takes `new_tokens - 1` decode steps.
    """

    batch: int = Field(1, ge=1)
    images: int = Field(1, ge=0, description="images per request")
    image_tokens: int = Field(576, ge=0, description="tokens that one image takes in the language model")
    text_tokens: int = Field(64, ge=1)
    new_tokens: int = Field(16, ge=1)

    @property
    def prompt_tokens(self) -> int:
        return self.images * self.image_tokens + self.text_tokens

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.images} x {self.image_tokens} image + {self.text_tokens} text tokens, {self.new_tokens} new"


class DataSource(_Strict):
    """Questions about images in an official file format (VQAv2, TextVQA or GQA)."""

    path: str = Field(
        description="directory or questions file, relative to the recipe (to the working directory, if packaged); or `tiny:NAME`"
    )
    split: str | None = None
    samples: int | None = Field(None, ge=1, description="how many questions to use; all when absent")


class Criterion(_Strict):
    """How heads and ranks are scored (see docs/method.md)."""

    weighting: Literal["loss", "activation"] = Field(
        "loss", description="loss: moments of activations and loss gradients; activation: of activations alone"
    )
    temperature: float = Field(2.0, gt=0, description="softens the predictions that the loss gradients are drawn from")
    erank_weight: float = Field(
        0.0, ge=0, le=1, description="a: 0 scores heads by KS distance alone, 1 by KS distance times effective rank"
    )
    head_weight: float = Field(1.0, gt=0, description="how much one unit of a head's information counts against one of a feed-forward's")
    rank_multiple: int = Field(8, ge=1)
    compensate: bool = Field(True, description="refit the output projection on the kept heads")


class Recipe(_Strict):
    name: str
    model: str = Field(description="model directory (relative to the recipe), `package:NAME`, or hub id org/name")
    revision: str | None = None
    prompt: str = Field("USER: <image>\n{question} ASSISTANT:", description="used where the model has no chat template")
    workload: Workload = Workload()
    flops: float = Field(1.0, gt=0, le=1, description="fraction of the FLOPs kept")
    scope: Scope = "all"
    targets: list[TargetName] = ["ort"]
    dtype: Dtype | None = None
    criterion: Criterion = Criterion()
    calibration: list[DataSource] = []
    samples: int = Field(64, ge=1, description="calibration questions")
    evaluation: dict[str, DataSource] = Field({}, description="task name to data")
    max_drop: float | None = Field(None, description="gate: largest loss of accuracy allowed, in points")
    min_speedup: float | None = Field(None, description="gate: smallest end-to-end speed-up allowed")

    _origin: Path | None = None

    @property
    def origin(self) -> Path | None:
        """File that the recipe was read from."""
        return self._origin


def first_problem(error: ValidationError) -> str:
    """The first complaint of a validation as `field.path: message`."""
    problem = error.errors()[0]
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in problem["loc"]).lstrip(".")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "unknown field"
    return f"{path}: {message}" if path else message


def packaged() -> dict[str, Path]:
    """Recipe name to file, of the recipes that come with the package."""
    root = Path(str(resources.files("infoprune_export"))) / "recipes"
    if not root.is_dir():  # a source checkout keeps them at the top level
        root = root.parent.parent / "recipes"
    return {p.stem: p for p in sorted(root.glob("*.yaml"))}


def near(name: str, names: list[str]) -> str:
    """`, did you mean ...?` or nothing."""
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def read(path: Path) -> Recipe:
    """Reads and validates a recipe file.

    Raises:
        InputError: with file, line and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot be read ({e})", where=path) from None
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{line}not valid YAML ({getattr(e, 'problem', None) or e})", where=path) from None
    if not isinstance(data, dict):
        raise InputError("a recipe is a mapping of fields", where=path, mend="see recipes/tiny-llava.yaml")
    try:
        recipe = Recipe.model_validate({"name": path.stem, **data})
    except ValidationError as e:
        loc = e.errors()[0]["loc"]
        hint = near(str(loc[-1]), _fields_at(loc[:-1])) if e.errors()[0]["type"] == "extra_forbidden" else ""
        raise InputError(f"line {_line_of(tree, loc)}: {first_problem(e)}{hint}", where=path) from None
    recipe._origin = path
    return recipe


def _fields_at(loc: tuple) -> list[str]:
    owner = {"workload": Workload, "criterion": Criterion, "calibration": DataSource, "evaluation": DataSource}
    return list((owner.get(str(loc[0]), Recipe) if loc else Recipe).model_fields)


def _line_of(node: yaml.Node, loc: tuple) -> int:
    """Line of the deepest existing node on a validation path."""
    line = node.start_mark.line + 1
    for step in loc:
        if isinstance(node, yaml.MappingNode):
            match = next(((k, v) for k, v in node.value if k.value == str(step)), None)
            if match is None:
                break
            line, node = match[0].start_mark.line + 1, match[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return line
