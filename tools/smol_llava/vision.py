"""The vision tower: a DINOv2-S out of the ONNX graph of a saliency detector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model

PATCH = 14
# DINOv2 has heads of this width in every size.
HEAD_DIM = 64
_TOWER = "backbone."


def load_vision(path: Path, side: int) -> Dinov2Model:
    """Reads the detector's backbone; its saliency decoder is left out.

    Args:
        path: The ONNX graph.
        side: Patches along one edge of an image; the position table is interpolated to them.
    """
    tensors, positions = _tensors(path)
    hidden = positions.shape[-1]
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer."))
    config = Dinov2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_DIM,
        image_size=side * PATCH,
        patch_size=PATCH,
    )
    state = {
        **tensors,
        "embeddings.position_embeddings": interpolate_positions(positions, side),
        "embeddings.mask_token": torch.zeros(1, hidden),  # only masked training reads it, and the graph has none
    }
    # transformers knows the tensors' older names, which the graph was traced with.
    model, info = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    unfit = {kind: names for kind, names in info.items() if names}
    if unfit:
        raise ValueError(f"{path.name}: tensors do not fit a Dinov2Model: {unfit}")
    return model


def _tensors(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The backbone's tensors by their module paths, and its position table [1, 1 + patches, hidden].

    Tracing kept the names of biases and norms. Matrices were transposed and lost theirs, so they are named after the
    node that multiplies by them; the position table was split in two, class token and patches.
    """
    graph = onnx.load(path).graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    named = {name.removeprefix(_TOWER): a for name, a in arrays.items() if name.startswith(_TOWER)}
    for node in graph.node:
        module = node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
        if node.op_type == "MatMul" and module.startswith(_TOWER) and node.input[1] in arrays:
            named[f"{module.removeprefix(_TOWER)}.weight"] = arrays[node.input[1]].T
    tables = [a for name, a in arrays.items() if a.ndim == 3 and name.startswith("onnx::")]
    positions = np.concatenate(sorted(tables, key=np.size), axis=1)
    return {name: torch.tensor(np.ascontiguousarray(a)) for name, a in named.items()}, torch.tensor(positions)


def interpolate_positions(table: Tensor, side: int) -> Tensor:
    """Resizes a position table as DINOv2 does for images of another size.

    Args:
        table: [1, 1 + n * n, hidden], the class token's position first.
        side: Patches along one edge.

    Returns:
        [1, 1 + side * side, hidden].
    """
    first, grid = table[:, :1], table[:, 1:]
    edge = int(grid.shape[1] ** 0.5)
    grid = grid.unflatten(1, (edge, edge)).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)
