"""TensorRT engines from ONNX graphs: parsing, profiles, one engine file for every GPU architecture.

Engines are strongly typed: precision is that of the graph. Weights are read from the graph's own
directory. See flavours.py for where this runs, and tensorrt_run.py for running the result.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import onnx

from infoprune_export.engines.cache_update import update_in_place
from infoprune_export.engines.collector import uncollected
from infoprune_export.engines.flavours import Flavour, check_archs, flavour_for, unsupported
from infoprune_export.engines.graphs import read_graph, weight_bytes
from infoprune_export.engines.primitives import write_out
from infoprune_export.engines.profiles import Profile, Shape, spanning
from infoprune_export.engines.whole_blocks import make_whole
from infoprune_export.errors import InfoPruneError, InputError, NotEnough
from infoprune_export.files import write_whole
from infoprune_export.memory import memory

MEMORY_BASE, MEMORY_PER_PROFILE = 1.5, 2.0
"""Memory that a build takes, in units of its weights: 1.4 GB with one profile and 2.2 GB with two were seen for 0.4 GB."""
ONE_PROFILE_FROM = 10**9
"""Bytes of weights from which a flavour that copies them for every profile gets a single one, which covers all."""


def build(
    graph: Path,
    out_dir: Path,
    *,
    archs: Sequence[str],
    profiles: Sequence[Profile],
    name: str | None = None,
    flavour: Flavour | None = None,
) -> dict[str, Path]:
    """Builds one engine file per architecture: `out_dir/<arch>/<name>.engine`.

    Beside it go TensorRT's own messages (`.log`) and, where the flavour times kernels, its timing cache
    (`timing.cache`), which the next build starts from. Files are replaced whole, never written into.

    Args:
        graph: The ONNX file; its external weights lie in its directory.
        out_dir: Where the directories of the architectures go.
        archs: Such as sm86. TensorRT-RTX builds them all without a GPU.
        profiles: Shapes to build for, see profiles.py. TensorRT-RTX keeps a copy of the weights for every
            profile, so a graph of 1 GB or more gets one that covers them all.
        name: Of the engine files; the graph's own when None.
        flavour: The flavour to build with; one that builds for all of `archs` here when None.

    Returns:
        Architecture to engine file.

    Raises:
        InputError: a graph that TensorRT does not take, naming the node.
        MissingRequirement: no flavour here builds for one of the architectures.
        NotEnough: less memory free than the build takes.
    """
    flavour = flavour or flavour_for(archs)
    check_archs(flavour, archs)
    model = read_graph(graph)
    weights = weight_bytes(model, graph)
    capacity = max(p.span("total").maximum for p in profiles)
    if flavour.copies_weights and weights >= ONE_PROFILE_FROM:
        profiles = [spanning(profiles)]
    _check_memory(graph, weights, len(profiles))
    with uncollected():
        network = _Network(flavour, model, graph, capacity)
        return {arch: network.build(arch, profiles, out_dir / arch / f"{name or graph.stem}.engine") for arch in archs}


class _Network:
    """A parsed graph, to be built for one architecture after the other."""

    def __init__(self, flavour: Flavour, model: onnx.ModelProto, graph: Path, capacity: int):
        self._flavour, self._graph = flavour, graph
        self._logger = _logger(flavour, graph.parent)
        trt = flavour.module
        self._builder = trt.Builder(self._logger)
        self._network = self._builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(self._network, self._logger)
        if written := write_out(model, parser.supports_operator):
            self._logger.log(trt.ILogger.Severity.INFO, f"written out, for this parser does not read them: {', '.join(sorted(written))}")
        allow_decomposed_attention(model)
        updated = parser.supports_operator("TensorScatter") and update_in_place(model, capacity)
        self._capacity = capacity if updated else None
        make_whole(model, graph.parent)
        if not parser.parse(model.SerializeToString(), str(graph.resolve())):  # the path is where it looks for weights
            raise _parser_error(parser, graph)
        self._parser_lines = self._logger.take()

    def build(self, arch: str, profiles: Sequence[Profile], engine: Path) -> Path:
        """Writes the engine file for one architecture, and beside it log and timing cache."""
        engine.parent.mkdir(parents=True, exist_ok=True)
        try:
            plan = self._serialise(arch, profiles, engine.with_name("timing.cache"))
        finally:
            lines = [*self._parser_lines, *self._logger.take()]
            write_whole(engine.with_suffix(".log"), "".join(f"{line}\n" for line in lines))
        write_whole(engine, plan)
        return engine

    def _serialise(self, arch: str, profiles: Sequence[Profile], timing_cache: Path) -> memoryview:
        config = self._config(arch, profiles)
        if self._flavour.times_kernels and not start_from_cache(config, timing_cache):
            warning = self._flavour.module.ILogger.Severity.WARNING
            self._logger.log(warning, f"{timing_cache.name} is damaged, or of another TensorRT or GPU: kernels are timed anew")
        plan = self._builder.build_serialized_network(self._network, config)
        if plan is None:
            raise self._build_error(arch)
        if self._flavour.times_kernels:
            write_whole(timing_cache, config.get_timing_cache().serialize())
        return memoryview(plan)

    def _config(self, arch: str, profiles: Sequence[Profile]):
        config = self._builder.create_builder_config()
        config.clear_flag(self._flavour.module.BuilderFlag.TF32)  # else fp32 products have half precision's ten bits
        if self._flavour.ahead_of_time:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(self._flavour.module.ComputeCapability, arch.upper()), 0)
        for shapes in self._distinct_shapes(profiles):
            profile = self._builder.create_optimization_profile()
            for name, (least, tuned, most) in shapes.items():
                profile.set_shape(name, least, tuned, most)
            if config.add_optimization_profile(profile) < 0:
                raise InputError(f"TensorRT refused the shapes {shapes}", where=self._graph, mend="check the recipe's workload")
        return config

    def _distinct_shapes(self, profiles: Sequence[Profile]) -> list[dict[str, tuple[Shape, Shape, Shape]]]:
        """Input shapes of every profile that differs from those before it: a vision encoder has one, whatever the text."""
        inputs = [self._network.get_input(i) for i in range(self._network.num_inputs)]
        profiles = profiles if self._capacity is None else [p.within(self._capacity) for p in profiles]
        every = [{x.name: profile.shapes(x.name, tuple(x.shape)) for x in inputs} for profile in profiles]
        return [shapes for i, shapes in enumerate(every) if shapes not in every[:i]]

    def _build_error(self, arch: str) -> InfoPruneError:
        reason = self._logger.first_error or "it gives no reason"
        if "Turing" in reason and "is not supported" in reason:
            return unsupported(self._flavour, arch, "its builder has no fp32 matrix products for it")
        return InputError(f"{self._flavour.name} could not build it for {arch}: {reason}", where=self._graph)


def start_from_cache(config, timing_cache: Path) -> bool:
    """Gives a build the kernel times of earlier builds, or an empty cache where they are no use.

    Args:
        config: TensorRT's builder config.
        timing_cache: File of an earlier build; it may be missing.

    Returns:
        False for a file that TensorRT does not take: a damaged one, or one of another version or GPU.
    """
    known = timing_cache.read_bytes() if timing_cache.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return True
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return False


def allow_decomposed_attention(model: onnx.ModelProto) -> None:
    """Marks every ONNX Attention node so that TensorRT may build it from smaller operations.

    Its fused kernels take few head sizes and types; without the mark a node that has none fails the build.
    """
    for node in model.graph.node:
        if node.op_type == "Attention" and all(a.name != "TRT_decomposable" for a in node.attribute):
            node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))


def _parser_error(parser, graph: Path) -> InputError:
    error = parser.get_error(0)
    node = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
    return InputError(
        f"TensorRT cannot read it: {node}{' '.join(error.desc().split())}", where=graph, mend="export the graph again with this version"
    )


def _check_memory(graph: Path, weights: int, profiles: int) -> None:
    needed, free = (MEMORY_BASE + MEMORY_PER_PROFILE * profiles) * weights, memory().available
    if needed > free:
        raise NotEnough(
            f"building its engine takes about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free",
            where=graph,
            mend="build on a machine with more memory, or compress further (a lower --flops)",
        )


def _logger(flavour: Flavour, directory: Path):
    """A TensorRT logger (a class of the flavour's own module) that keeps what it is told, without the directory's name."""
    severity = flavour.module.ILogger.Severity

    class Logger(flavour.module.ILogger):
        def __init__(self):
            flavour.module.ILogger.__init__(self)
            self.first_error: str | None = None
            self._lines: list[str] = []

        def log(self, level, message: str) -> None:
            message = message.replace(f"{directory.resolve()}{os.sep}", "")
            if level <= severity.ERROR and self.first_error is None:
                self.first_error = " ".join(message.split())
            if level <= severity.INFO:
                self._lines.append(f"{level.name.lower()}: {message}")

        def take(self) -> list[str]:
            """The lines since the last call."""
            lines, self._lines, self.first_error = self._lines, [], None
            return lines

    return Logger()
