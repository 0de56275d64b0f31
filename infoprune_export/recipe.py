"""Recipes: what to compress and for what, as YAML with path-precise errors."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from infoprune_export.errors import InputError
from infoprune_export.models.anatomy import TowerName
from infoprune_export.precision import Dtype, WeightType
from infoprune_export.schema import Strict, first_problem

Scope = Literal["all", "vision", "language"]
TargetName = Literal["onnx", "ort", "trt"]
HeadRuleName = Literal["ks", "ks-activation", "random", "magnitude", "michel", "taylor", "flap", "wanda-sp"]
HeadRankingName = Literal["global", "flops", "layer"]
WeightingName = Literal["loss", "activation", "asvd", "none"]
AllocationName = Literal["ks", "uniform", "d-rank"]
CompensationName = Literal["refit", "bias", "none"]


class Workload(Strict):
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
        # A recipe that does not name them takes the model's own number of image tokens, which is not known before the model is.
        image = f"{self.image_tokens} image" if "image_tokens" in self.model_fields_set else "the model's image"
        return f"batch {self.batch}, {self.images} x {image} + {self.text_tokens} text tokens, {self.new_tokens} new"


class DataSource(Strict):
    """Questions about images in an official file format (VQAv2, TextVQA or GQA)."""

    path: str = Field(
        description="directory or questions file, relative to the recipe (to the working directory, if packaged); or `tiny:NAME`"
    )
    split: str | None = None
    samples: int | None = Field(None, ge=1, description="how many questions to use; all when absent")


class Floor(Strict):
    """What every layer of a tower, and the tower in total, keeps at least, beyond the one unit and the smallest rank that always stay."""

    heads: float = Field(0.0, ge=0, le=1, description="share of a layer's head groups")
    ranks: float = Field(0.0, ge=0, le=1, description="share of a feed-forward matrix's FLOPs")
    total: float = Field(0.0, ge=0, le=1, description="share of the whole tower's FLOPs; for heads and ranks that compete for one budget")


class Criterion(Strict):
    """How heads and ranks are scored (see docs/method.md).

    Every field is a choice of its own; the published methods are combinations of them.
    """

    heads: HeadRuleName = Field("ks", description="score of a head group; ks and ks-activation are ours, the others are published")
    weighting: WeightingName = Field(
        "loss",
        description="what a low-rank pair approximates best: outputs weighted by the loss gradient (ours), outputs (activation, "
        "as SVD-LLM), weights scaled by their inputs (asvd), weights (none)",
    )
    allocation: AllocationName = Field(
        "ks", description="ranks by one price on the pooled spectra (ks, ours), the same share of every matrix, or D-Rank's rule"
    )
    head_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the attention FLOPs that stays, the feed-forwards get what is left; absent: heads and ranks compete "
        "where both are ours and in one currency, else both keep the same share",
    )
    head_ranking: HeadRankingName | None = Field(
        None, description="compare head scores over the whole model, or keep the same share of every layer; absent: as published"
    )
    compensate: CompensationName = Field(
        "refit",
        description="for removed heads: refit the output projection on the kept ones, put the mean of what is gone into a bias "
        "(added where there is none), or nothing",
    )
    temperature: float = Field(2.0, gt=0, description="softens the predictions that the loss gradients are drawn from")
    erank_weight: float = Field(
        0.0, ge=0, le=1, description="a: 0 scores heads by KS distance alone, 1 by KS distance times effective rank"
    )
    head_weight: float = Field(1.0, gt=0, description="how much one unit of a head's information counts against one of a feed-forward's")
    text_share: float | None = Field(
        0.8, gt=0, lt=1, description="share of the text tokens in the language model's moments; null: every token counts the same"
    )
    recalibrate: bool = Field(
        True, description="make each layer's factors on what the compressed layers before it give, and not on what the original's gave"
    )
    rank_multiple: int = Field(8, ge=1)
    floors: dict[TowerName, Floor] = Field({}, description="tower to what stays of it at least")

    @model_validator(mode="after")
    def _totals_need_one_currency(self) -> Criterion:
        if self.total_floors and not (self.one_currency and self.head_share is None):
            raise ValueError("a floor on a tower's total needs heads ks with allocation ks, and no head_share")
        return self

    @property
    def total_floors(self) -> dict[TowerName, float]:
        """Towers of which a share of all their FLOPs stays at least."""
        return {tower: floor.total for tower, floor in self.floors.items() if floor.total}

    @property
    def one_currency(self) -> bool:
        """Whether scores of heads and spectra of matrices are in the same units, so that both can compete for one budget."""
        same_units = (self.heads, self.weighting) in (("ks", "loss"), ("ks-activation", "activation"))
        return same_units and self.allocation == "ks" and self.head_ranking != "layer"


LORA_FROM = 10**9
"""Parameters of the original above which `recovery.method: auto` trains low-rank updates instead of whole matrices."""


class Recovery(Strict):
    """How the compressed network is trained (see docs/method.md); it has no effect while `train_steps` is 0."""

    method: Literal["auto", "full", "lora"] = Field(
        "auto",
        description="full: all linear maps of the towers that were cut; lora: low-rank updates of them; auto: lora from 10^9 parameters",
    )
    batch: int = Field(16, ge=1, description="images per step, each with all of its questions")
    rate: float | None = Field(None, gt=0, description="largest learning rate; absent: found, five times that of the best first step")
    temperature: float = Field(2.0, gt=0, description="softens the predictions of both networks")
    answer_weight: float = Field(1.0, ge=0, description="of the cross-entropy on the answers")
    teacher_weight: float = Field(1.0, ge=0, description="of the divergence from the original's predictions")
    hidden_weight: float = Field(1.0, ge=0, description="of the distance from the original's hidden states")
    hidden_every: int = Field(2, ge=0, description="layers from one compared hidden state to the next; 0 compares none")
    patience: int | None = Field(
        None, ge=1, description="looks at the validation data, 10 in all, without a better result after which training ends; absent: never"
    )
    head_share: float = Field(0.0, ge=0, lt=1, description="share of the steps that learns which heads go; 0 goes by the scores")
    lora_rank: int = Field(32, ge=1, description="rank of the updates with lora")

    def by_lora(self, parameters: int) -> bool:
        """Whether a network with an original of so many parameters is trained by low-rank updates."""
        return parameters > LORA_FROM if self.method == "auto" else self.method == "lora"


class Recipe(Strict):
    name: str
    model: str = Field(description="model directory (relative to the recipe), `package:NAME`, or hub id org/name")
    revision: str | None = None
    prepare: str | None = Field(None, description="how to get the model and the data; told where one of them is missing")
    prompt: str = Field("USER: <image>\n{question} ASSISTANT:", description="used where the model has no chat template")
    workload: Workload = Workload()
    flops: float = Field(1.0, gt=0, le=1, description="fraction of the FLOPs kept")
    latency: float | None = Field(None, gt=0, lt=1, description="instead of flops: fraction kept of a request's time on this machine")
    scope: Scope = "all"
    targets: list[TargetName] = Field(["ort"], min_length=1)
    dtype: Dtype | None = None
    weights: WeightType | None = Field(None, description="also quantise the compressed network's matrices, block by block")
    criterion: Criterion = Criterion()
    calibration: list[DataSource] = []
    samples: int = Field(64, ge=1, description="calibration questions")
    train_steps: int = Field(0, ge=0, description="steps of training after compression; 0 compresses without training")
    training: list[DataSource] = Field([], description="data to train on; all of the calibration data when empty")
    validation: list[DataSource] = Field([], description="data to choose the best state by; the last one is taken when empty")
    recovery: Recovery = Recovery()
    evaluation: dict[str, DataSource] = Field({}, description="task name to data")
    max_drop: float | None = Field(None, description="gate: largest loss of accuracy allowed, in points")
    min_speedup: float | None = Field(None, description="gate: smallest end-to-end speed-up allowed")

    _origin: Path | None = None

    @model_validator(mode="after")
    def _heads_are_learned_without_totals(self) -> Recipe:
        if self.criterion.total_floors and self.recovery.head_share:
            raise ValueError("criterion.floors with a total and recovery.head_share do not go together")
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        if self.latency is not None and self.flops < 1:
            raise ValueError("flops and latency are two budgets: give one")
        return self

    @property
    def kept(self) -> float:
        """The fraction asked for, of time or of FLOPs; 1 exports the model as it is."""
        return self.flops if self.latency is None else self.latency

    @property
    def budget(self) -> str:
        """`0.5 of the time` or `0.5 of the FLOPs`."""
        return f"{self.kept:g} of the {'FLOPs' if self.latency is None else 'time'}"

    @property
    def origin(self) -> Path | None:
        """File that the recipe was read from."""
        return self._origin


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
    sources = dict.fromkeys(("calibration", "training", "validation", "evaluation"), DataSource)
    owner = {"workload": Workload, "criterion": Criterion, "recovery": Recovery, **sources}
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
