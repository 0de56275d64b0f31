"""The bundle: the directory that the main job writes and every other verb reads.

Where things are, what the manifest says of them, and how a reader makes sure that they are
what was written: `Bundle.open` checks every hash and refuses any path that leaves the bundle.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import ValidationError

from infoprune_export.errors import InputError
from infoprune_export.files import PART, file_sha256, write_whole
from infoprune_export.plans import Plan, Source
from infoprune_export.precision import Dtype, Precision, WeightType, float_type, is_quantised, quantised
from infoprune_export.recipe import Recipe, Scope, TargetName, Workload
from infoprune_export.schema import Strict, first_problem

VISION, EMBED, DECODER = COMPONENTS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
MANIFEST = "manifest.json"
UNHASHED = (MANIFEST, "report.json", "report.html")
"""Files that `validate` rewrites, or that hold the hashes themselves."""


class FileRecord(Strict):
    sha256: str
    bytes: int


class Flops(Strict):
    """FLOPs as counted on the exported graphs. Fractions are kept / original over `scope`."""

    denominator: str
    scope: Scope
    requested: float
    achieved: float
    original: int
    compressed: int
    parts: dict[str, dict[str, int]]
    """vision, projector, prefill, decode -> {original, compressed}"""


class QuantisedComponent(Strict):
    """Type of a component's matrices, their number and parameters, and parameters that stay float."""

    type: WeightType
    matrices: int
    parameters: int
    float_parameters: int


class QuantisedWeights(Strict):
    """What of the graphs is quantised: matrices, symmetrically, with a scale for every block of inputs of an output."""

    type: WeightType
    """As asked for; each component says what it has."""
    block_size: int
    components: dict[str, QuantisedComponent]
    stays_float: list[str] = ["norms", "biases", "patch embedding", "positions", "embedding table", "activations"]


class Manifest(Strict):
    schema_version: Literal[1] = 1
    tool: str
    libraries: dict[str, str]
    source: Source
    recipe: Recipe
    workload: Workload
    dtypes: list[Dtype]
    targets: list[TargetName]
    flops: Flops
    weights: QuantisedWeights | None = None
    """Set where the bundle also has the compressed network with quantised weights, once for each of `dtypes`."""
    random_weights: bool = False
    files: dict[str, FileRecord]

    @property
    def quantised(self) -> list[Precision]:
        """Precisions of the quantised graphs; empty where there are none."""
        return [quantised(dtype, self.weights.type) for dtype in self.dtypes] if self.weights else []

    @property
    def precisions(self) -> list[Precision]:
        """Precisions of the compressed network, first what the bundle was made for: quantised weights where they were asked for."""
        return [*self.quantised, *self.dtypes]


def component_precision(component: str, precision: Precision) -> Precision:
    """What a component is in where the network is in `precision`: the embedding is float, and the vision encoder never below int8.

    Four bits cost the features more than they save: a vision encoder waits for its arithmetic, which int8 makes as fast, and it is a
    twentieth of LLaVA-1.5-7B. (tiny-llava at 0.33, mean of three tasks: float 89.5, both in int4 88.6, the decoder alone 89.3.)
    """
    if component == EMBED:
        return float_type(precision)
    return quantised(float_type(precision), "int8") if component == VISION and is_quantised(precision) else precision


def graph_file(component: str, precision: Precision = "fp32") -> str:
    """File name of a component's graph in a network's precision: `decoder_model_merged.onnx`, `..._fp16.onnx`, `..._q4.onnx`."""
    own = component_precision(component, precision)
    return f"{component}.onnx" if own == "fp32" else f"{component}_{own}.onnx"


def engine_name(component: str, precision: Precision) -> str:
    """Name of a component's engine for a target that builds from one float type: `decoder_model_merged`, `..._q4f16`."""
    own = component_precision(component, precision)
    return f"{component}_{own}" if is_quantised(own) else component


def inside(root: Path, relative: str, where: object) -> Path:
    """The file that a relative path names, if it stays inside `root`.

    Raises:
        InputError: for absolute paths, `..` and links that lead out.
    """
    pure = PurePosixPath(relative)
    path = root / pure
    if pure.is_absolute() or ".." in pure.parts or "\\" in relative or not path.resolve().is_relative_to(root.resolve()):
        raise InputError(f"path {relative!r} leaves the bundle", where=where, mend="do not use this bundle; fetch it again from its maker")
    return path


class Bundle:
    """A bundle that was opened and checked."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: Path | str, verify: bool = True) -> Bundle:
        """Opens a bundle.

        Args:
            path: Its directory.
            verify: Check the sha256 of every file that the manifest lists.

        Raises:
            InputError: not a bundle, a changed or missing file, a path that leaves the bundle.
        """
        path = Path(path)
        manifest_path = path / MANIFEST
        if not manifest_path.is_file():
            raise InputError("is not a bundle (no manifest.json)", where=path, mend="make one: infoprune-export MODEL --out DIR")
        try:
            data = json.loads(manifest_path.read_text(encoding="utf-8"))
            manifest = Manifest.model_validate(data)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
            raise InputError(f"cannot be read ({e})", where=manifest_path) from None
        except ValidationError as e:
            raise InputError(first_problem(e), where=manifest_path, mend="make the bundle again with this version") from None
        bundle = cls(path, manifest)
        for name, record in manifest.files.items():
            file = inside(path, name, manifest_path)
            if not file.is_file():
                raise InputError(f"{name} is missing", where=path, mend="fetch or make the bundle again")
            try:
                changed = verify and (file.stat().st_size != record.bytes or file_sha256(file) != record.sha256)
            except OSError as e:
                raise InputError(f"{name} cannot be read ({e.strerror})", where=path) from None
            if changed:
                raise InputError(
                    f"{name} is not the file that was written (sha256 differs)", where=path, mend="fetch or make the bundle again"
                )
        return bundle

    def root(self, original: bool = False) -> Path:
        """The directory that holds `onnx/` and `engines/` of the compressed or the original network."""
        return self.path / "original" if original else self.path

    def graph(self, component: str, precision: Precision = "fp32", original: bool = False) -> Path:
        """Path of one component's graph."""
        return self.root(original) / "onnx" / graph_file(component, precision)

    def engines(self, target: TargetName, original: bool = False) -> Path:
        """Directory of a target's engines."""
        return self.root(original) / "engines" / target

    @property
    def has_original(self) -> bool:
        return (self.path / "original" / "onnx").is_dir()

    @property
    def reference(self) -> Path:
        """Inputs and outputs of the PyTorch network, against which the graphs are validated."""
        return self.path / "reference.safetensors"

    def plan(self) -> Plan:
        return Plan.read(self.path / "plan.json")

    def write_manifest(self) -> None:
        """Hashes every file of the bundle and writes the manifest anew."""
        self.manifest.files = hash_tree(self.path)
        write_whole(self.path / MANIFEST, self.manifest.model_dump_json(indent=1))


def hash_tree(root: Path) -> dict[str, FileRecord]:
    """Path to record of every file below `root` but the unhashed ones and those that are nobody's part of a bundle, sorted."""
    files = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
    kept = {name: p for name, p in files.items() if name not in UNHASHED and not p.name.startswith(".") and p.suffix != PART}
    return {name: FileRecord(sha256=file_sha256(p), bytes=p.stat().st_size) for name, p in kept.items()}
