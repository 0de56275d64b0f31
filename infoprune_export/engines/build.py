"""Engines from a bundle's graphs, without PyTorch: what the main job's last stage and the verb `build` do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from infoprune_export.bundle import COMPONENTS, EMBED, Bundle, QuantisedWeights, engine_name, graph_file
from infoprune_export.errors import InputError
from infoprune_export.precision import Dtype, Precision, WeightType, is_quantised, quantised
from infoprune_export.progress import Progress, Silent
from infoprune_export.recipe import Workload
from infoprune_export.workspace import Workspace

EngineTarget = Literal["ort", "trt"]
PREFERRED: dict[str, tuple[Dtype, ...]] = {"ort": ("fp32", "fp16", "bf16"), "trt": ("fp16", "bf16", "fp32")}
"""Target to the types of graph it is built from, best first."""


def check_target(target: EngineTarget, archs: Sequence[str] = ()) -> None:
    """Makes sure, before any work, that this machine can build for a target.

    Args:
        target: `ort` or `trt`.
        archs: GPU architectures wanted for `trt`; the default ones when empty.

    Raises:
        InputError: something that is no architecture.
        MissingRequirement: TensorRT is missing, or does not build for one of them here.
    """
    from infoprune_export.engines import flavours

    if target == "trt":
        flavours.flavour_for([flavours.parse_arch(a) for a in archs] or flavours.default_archs())


def build_into(
    root: Path,
    target: EngineTarget,
    workload: Workload,
    precision: Precision | None = None,
    archs: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Path]:
    """Builds the engines of one network from `root/onnx` into `root/engines/<target>`.

    The embedding is float in every precision, so quantised graphs get none of their own: build the float ones too.

    Args:
        root: A bundle, its `original/`, or the folder in which a bundle grows; no manifest is needed.
        target: `ort`, or `trt` (into `trt/<flavour>/<arch>/`).
        workload: Shapes that TensorRT engines are made for.
        precision: Of the graphs to build from; the target's preferred one of those present when None.
        archs: GPU architectures of `trt`; the GPUs present, else a fixed list, when empty.
        progress: Shows a step for every component; nothing when None.

    Returns:
        The engine files.

    Raises:
        InputError: graphs that are missing or cannot be built.
        MissingRequirement, NotEnough: see `engines.tensorrt.build`.
    """
    progress = progress or Silent()
    precision = precision or _present_dtype(root, target, progress)
    make = _trt_maker(root, workload, archs) if target == "trt" else partial(_build_ort, root / "engines" / "ort")
    built: list[Path] = []
    for component in COMPONENTS:
        if is_quantised(precision) and component == EMBED:
            continue
        graph = root / "onnx" / graph_file(component, precision)
        if not graph.is_file():
            raise InputError(f"{graph.name} is missing", where=root / "onnx", mend="make the bundle again with this --dtype")
        with progress.step(f"{component} for {target}{f', {precision}' if is_quantised(precision) else ''}"):
            built += make(engine_name(component, precision), graph)
    return built


def build_bundle(
    path: Path,
    target: EngineTarget,
    *,
    dtype: Dtype | None = None,
    weights: WeightType | None = None,
    archs: Sequence[str] = (),
    original: bool = True,
    progress: Progress | None = None,
) -> list[Path]:
    """Builds a target's engines into a bundle, which changes all at once or not at all.

    A bundle with quantised graphs gets engines of them too.

    The work goes on in a folder beside the bundle that shares its files through hard links and takes its
    place when the manifest is written. Engines of other targets and architectures stay.

    Args:
        path: The bundle; every file is checked against the manifest first.
        target, archs, progress: As for `build_into`.
        dtype: Type of the float graphs to build from; the target's preferred one of those present when None.
        weights: Quantise the compressed network's graphs first.
        original: Build for the original network too where the bundle has its graphs.

    Returns:
        The engine files of the compressed network.

    Raises:
        InputError: no bundle, one that changed since it was written, or one with weights quantised otherwise.
        MissingRequirement, NotEnough: see `build_into`; the bundle stays as it was.
    """
    progress = progress or Silent()
    check_target(target, archs)
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    if manifest.weights and weights not in (None, manifest.weights.type):
        what = f"has {manifest.weights.type} graphs already"
        raise InputError(what, where=path, mend=f"make a bundle of its own with --weights {weights}")
    with Workspace(path, f"build-{target}", resume=False) as space:
        _share_tree(path, space.path)
        if weights and not manifest.weights:
            manifest.weights = add_quantised(space.path / "onnx", manifest.dtypes, weights, progress)
        dtype = dtype or _present_dtype(space.path, target, progress)
        precisions = [dtype, *([quantised(dtype, manifest.weights.type)] if manifest.weights else [])]
        built = [file for p in precisions for file in build_into(space.path, target, manifest.workload, p, archs, progress)]
        if original and bundle.has_original:
            build_into(space.path / "original", target, manifest.workload, dtype, archs, progress)
        manifest.targets = list(dict.fromkeys([*manifest.targets, target]))
        Bundle(space.path, manifest).write_manifest()
        space.finish(alone=True)
    return [path / file.relative_to(space.path) for file in built]


def add_quantised(onnx_dir: Path, dtypes: Sequence[Dtype], weights: WeightType, progress: Progress | None = None) -> QuantisedWeights:
    """Writes quantised graphs beside a network's float ones, of every type.

    Returns:
        What is quantised, for the manifest.
    """
    from infoprune_export.engines.quantise import describe, quantise_graphs

    for dtype in dtypes:
        with (progress or Silent()).step(f"quantising to {weights} ({dtype})"):
            quantise_graphs(onnx_dir, dtype, weights)
    return describe(onnx_dir, dtypes[0], weights)


def _trt_maker(root: Path, workload: Workload, archs: Sequence[str]) -> Callable[[str, Path], list[Path]]:
    from infoprune_export.engines import flavours, tensorrt
    from infoprune_export.engines.profiles import workload_profiles

    wanted = list(dict.fromkeys(flavours.parse_arch(a) for a in archs)) or flavours.default_archs()
    flavour = flavours.flavour_for(wanted)
    out, profiles = root / "engines" / "trt" / flavour.name, workload_profiles(workload)
    build = partial(tensorrt.build, out_dir=out, archs=wanted, profiles=profiles, flavour=flavour)
    return lambda component, graph: list(build(graph, name=component).values())


def _build_ort(out: Path, component: str, graph: Path) -> list[Path]:
    from infoprune_export.engines import onnxruntime

    return [onnxruntime.build(graph, out / graph.name)]


def _present_dtype(root: Path, target: EngineTarget, progress: Progress) -> Dtype:
    """The preferred type of graph among those that are there for every component; says so where it is not the best."""
    best = PREFERRED[target][0]
    for dtype in PREFERRED[target]:
        if all((root / "onnx" / graph_file(component, dtype)).is_file() for component in COMPONENTS):
            if dtype != best:
                progress.note(f"engines for {target} are built in {dtype}: there are no {best} graphs (--dtype {best} makes some)")
            return dtype
    raise InputError("has no complete set of graphs", where=root / "onnx", mend="make the bundle again: infoprune-export MODEL --out DIR")


def _share_tree(source: Path, target: Path) -> None:
    """Gives `target` the files of `source` as hard links, or as copies where the disk has no links.

    Builders replace files and never write into them, so the source keeps its own.
    """

    def share(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:
            shutil.copy2(old, new)

    shutil.copytree(source, target, copy_function=share, dirs_exist_ok=True)
