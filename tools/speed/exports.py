"""Our export against `transformers.exporters` on one checkpoint: time and peak memory, each in a process of its own.

python tools/speed/exports.py ours|transformers CHECKPOINT OUT     # one export; prints {"seconds", "peak_mib", "files"}
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("ours", "transformers")


def measure(checkpoint: Path, work: Path, rounds: int = 3) -> dict[str, Any]:
    """Exports in turn; both load the checkpoint, trace it and write the graphs with their weights, imports not counted.

    Args:
        checkpoint: A LLaVA-like model.
        work: For the graphs.
        rounds: Exports of each side.

    Returns:
        Side to `{seconds, peak_mib, files}`, medians; `time_ratio` and `memory_ratio`, ours over theirs.

    Raises:
        RuntimeError: an export failed.
    """
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for i in range(rounds):
        for side in SIDES:
            line = [sys.executable, __file__, side, str(checkpoint), str(work / f"{side}{i}")]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{side}: {done.stderr[-1500:]}")
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    found = {
        side: {key: statistics.median(x[key] for x in each) for key in ("seconds", "peak_mib")} | {"files": each[0]["files"]}
        for side, each in runs.items()
    }
    ours, theirs = (found[side] for side in SIDES)
    return found | {"time_ratio": ours["seconds"] / theirs["seconds"], "memory_ratio": ours["peak_mib"] / theirs["peak_mib"]}


def main(side: str, checkpoint: Path, out: Path) -> None:
    """Exports once and says what it took."""
    import transformers  # noqa: F401

    import infoprune_export.graph.export  # noqa: F401

    begin = time.perf_counter()
    (_ours if side == "ours" else _transformers)(checkpoint, out)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "peak_mib": _peak_mib(), "files": {x.name: x.stat().st_size for x in sorted(out.iterdir())}}))


def _peak_mib() -> float:
    """Most memory that this process had. Linux alone tells: getrusage's figure begins with that of the process that started it."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _ours(checkpoint: Path, out: Path) -> None:
    from infoprune_export.graph.export import export_graphs
    from infoprune_export.models.families import find_anatomy
    from infoprune_export.models.load import locate

    model = locate(str(checkpoint)).open_model()
    export_graphs(model, find_anatomy(model), out)


def _transformers(checkpoint: Path, out: Path) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    vision, tokens = model.config.vision_config, 8
    image = (vision.image_size // vision.patch_size) ** 2
    ids = torch.cat([torch.full((1, image), model.config.image_token_id), torch.ones(1, tokens, dtype=torch.long)], 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size),
    }
    OnnxExporter().export_for_generation(model, inputs, OnnxConfig(dynamic=True)).save_pretrained(out)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
