"""TensorRT engines from ONNX graphs: parsing, profiles, one engine file for every GPU architecture.

Engines are strongly typed: precision is that of the graph. Weights are read from the graph's own
directory. See flavours.py for where this runs, and tensorrt_run.py for running the result.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import onnx

from infoprune_export.engines.flavours import Flavour, check_archs, find_flavour, unsupported
from infoprune_export.engines.graphs import read_graph, weight_bytes
from infoprune_export.engines.machine import memory
from infoprune_export.engines.profiles import Profile
from infoprune_export.errors import InputError, NotEnough

BUILD_MEMORY = 3
"""Memory that a build takes, in units of its weights: a 423 MB layer of a 7B decoder was seen to take 1.3 GB."""


def build(
    graph: Path,
    out_dir: Path,
    *,
    archs: Sequence[str],
    profiles: Sequence[Profile],
    log: Path,
    timing_cache: Path | None = None,
    flavour: Flavour | None = None,
) -> dict[str, Path]:
    """Builds one engine file per architecture, `out_dir/<arch>/<graph name>.engine`.

    Args:
        graph: The ONNX file; its external weights lie in its directory.
        out_dir: Where the directories of the architectures go.
        archs: Such as sm86. TensorRT-RTX builds them all without a GPU.
        profiles: Shapes to build for; see profiles.py.
        log: TensorRT's own messages are appended to this file.
        timing_cache: File to take kernel timings from and save them to. TensorRT-RTX times nothing when
            it builds, and saves an empty one.
        flavour: The flavour to build with; `find_flavour()` when None.

    Returns:
        Architecture to engine file.

    Raises:
        InputError: a graph that TensorRT does not take, naming the node.
        MissingRequirement: no flavour here builds for one of the architectures.
        NotEnough: less memory free than the build takes.
    """
    flavour = flavour or find_flavour()
    check_archs(flavour, archs)
    model = read_graph(graph)
    _check_memory(graph, weight_bytes(model, graph))
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as lines:
        builder = _Builder(flavour, model, graph, profiles, _logger(flavour, lines))
        engines = {}
        for arch in archs:
            engines[arch] = out_dir / arch / f"{graph.stem}.engine"
            engines[arch].parent.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            engines[arch].write_bytes(builder.build(arch, timing_cache))
            size = engines[arch].stat().st_size / 1e6
            lines.write(f"built {graph.stem} for {arch}: {size:.1f} MB in {time.perf_counter() - started:.1f} s\n")
    return engines


class _Builder:
    """A parsed network, to be built for one architecture after the other."""

    def __init__(self, flavour: Flavour, model: onnx.ModelProto, graph: Path, profiles: Sequence[Profile], logger):
        self._flavour, self._graph, self._profiles, self._logger = flavour, graph, profiles, logger
        trt = flavour.module
        self._builder = trt.Builder(logger)
        flags = trt.NetworkDefinitionCreationFlag
        self._network = self._builder.create_network(1 << int(flags.STRONGLY_TYPED))
        parser = trt.OnnxParser(self._network, logger)
        allow_decomposed_attention(model)
        if not parser.parse(model.SerializeToString(), str(graph.resolve())):
            raise _parser_error(parser, graph)

    def build(self, arch: str, timing_cache: Path | None) -> memoryview:
        """The serialised engine for one architecture."""
        config = self._config(arch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT-RTX calls its timing cache deprecated
            known = timing_cache.read_bytes() if timing_cache and timing_cache.is_file() else b""
            config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
            self._logger.errors.clear()
            plan = self._builder.build_serialized_network(self._network, config)
            if plan is not None and timing_cache:
                timing_cache.write_bytes(config.get_timing_cache().serialize())
        if plan is None:
            raise self._build_error(arch)
        return memoryview(plan)

    def _config(self, arch: str):
        config = self._builder.create_builder_config()
        if self._flavour.ahead_of_time:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(self._flavour.module.ComputeCapability, arch.upper()), 0)
        for shapes in self._distinct_shapes():
            profile = self._builder.create_optimization_profile()
            for name, (least, tuned, most) in shapes.items():
                profile.set_shape(name, least, tuned, most)
            if config.add_optimization_profile(profile) < 0:
                raise InputError(f"TensorRT refused the shapes {shapes}", where=self._graph, mend="check the recipe's workload")
        return config

    def _distinct_shapes(self) -> list[dict]:
        """Input shapes of every profile that differs from those before it; a vision encoder has one, whatever the text."""
        inputs = [self._network.get_input(i) for i in range(self._network.num_inputs)]
        every = [{x.name: profile.shapes(x.name, tuple(x.shape)) for x in inputs} for profile in self._profiles]
        return [shapes for i, shapes in enumerate(every) if shapes not in every[:i]]

    def _build_error(self, arch: str) -> Exception:
        reason = self._logger.errors[0] if self._logger.errors else "it gives no reason"
        if "is not supported" in reason and "Turing" in reason:
            return unsupported(self._flavour, arch, "its builder has no fp32 matrix products for it")
        return InputError(f"{self._flavour.name} could not build it for {arch} ({reason})", where=self._graph)


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


def _check_memory(graph: Path, weights: int) -> None:
    needed, free = BUILD_MEMORY * weights, memory().available
    if needed > free:
        raise NotEnough(
            f"building it takes about {needed / 1e9:.1f} GB of memory ({BUILD_MEMORY} times its weights), {free / 1e9:.1f} GB are free",
            where=graph,
            mend="build on a machine with more memory, or compress further (a lower --flops)",
        )


def _logger(flavour: Flavour, lines):
    """A TensorRT logger that writes to a file and remembers errors; a class of the flavour's own module."""
    trt = flavour.module

    class FileLogger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(" ".join(message.split()))
            if severity <= trt.ILogger.Severity.INFO:
                lines.write(f"{severity.name.lower()}: {message}\n")

    return FileLogger()
