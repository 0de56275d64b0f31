#!/usr/bin/env python3
"""Measures everything that needs an NVIDIA GPU, in one command, and writes JSON.

    python tools/gpu_checks.py                     # into benchmarks/gpu/<device>.json, within 8 minutes
    python tools/gpu_checks.py --only train        # one section; what the file has of the others stays
    python tools/gpu_checks.py --device cpu        # the same way through at toy sizes, where there is no GPU

Dense and compressed LLaVA-1.5-7B shapes with random weights in PyTorch; then the package: training on the device, engines
of ONNX Runtime and TensorRT as far as they are installed. A section that fails is written down with its reason and costs
the others nothing; what does not fit into the time is left out, and named.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8.0
SECTIONS = ("torch", "train", "engines")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    parser.add_argument("--shape", help="llava7b or small (default: llava7b on a GPU, small on the CPU)")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="one section; may be repeated")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which nothing new begins (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu", help="directory (default: %(default)s)")
    args = parser.parse_args(arguments)
    args.only = args.only or list(SECTIONS)
    return args


def figures(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks, `torch.<shape>.<part>.b<batch>.<mode>.speedup`: the dense network's median over the compressed one's."""
    return [
        {"name": f"{name}.{part}.b{batch}.{mode}.speedup", "value": found["speedup"]}
        for name, section in sections.items()
        if name.startswith("torch.")
        for part, by_batch in section["times"].items()
        for batch, by_mode in by_batch.items()
        for mode, found in by_mode.items()
        if "speedup" in found
    ]


def main(arguments: list[str] | None = None) -> int:
    """Runs every section that this machine has the parts for; 0 if it ran."""
    args = parse(arguments)
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    import torch
    from gpu import package, pytorch
    from quality.versions import commit
    from sections import Sections
    from shapes import SHAPES

    from infoprune_export.compress.devices import find_device
    from infoprune_export.engines import flavours
    from infoprune_export.engines.machine import machine_report
    from infoprune_export.errors import InfoPruneError
    from infoprune_export.versions import library_versions

    try:
        device = find_device(args.device)
    except InfoPruneError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    cuda = device.type == "cuda"
    shape = SHAPES[args.shape or ("llava7b" if cuda else "small")]
    checks = Sections(60 * args.minutes)
    modes = list(pytorch.MODES) if cuda else ["eager"]
    with tempfile.TemporaryDirectory() as work:
        if "torch" in args.only:
            if not cuda:
                checks.skip("CUDA graphs, torch.compile", "no GPU here")
            half = 30 * args.minutes  # the networks may take one half of the time
            checks.section(
                f"torch.{shape.name}",
                lambda: pytorch.measure(shape, device, (1, 8) if cuda else (1, 2), modes, lambda: checks.left < half),
            )
        if "train" in args.only:
            checks.section("train", lambda: package.train(str(device), Path(work), checks.left))
        if "engines" in args.only:
            targets = ["ort", *(["trt"] if flavours.installed() else [])]
            if "trt" not in targets:
                checks.skip("tensorrt", "neither flavour is installed")
            checks.section("engines", lambda: package.engines(targets, Path(work), checks.left))
    name = torch.cuda.get_device_name(device) if cuda else "cpu"
    path = args.out / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    earlier = json.loads(path.read_text())["sections"] if path.is_file() else {}
    head = {"commit": commit(), "machine": machine_report().description() | {"device": name}, "versions": library_versions()}
    found = earlier | {name: x | {"commit": head["commit"]} for name, x in checks.found.items()}
    result = head | {"checks": figures(found), "sections": found, "not_measured": checks.not_measured}
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
