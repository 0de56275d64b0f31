"""LLaVA configs from a tenth of a billion parameters to seven, made for `--random-weights`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).resolve().parents[2] / "infoprune_export" / "models" / "configs" / "llava-hf--llava-1.5-7b-hf.json"


@dataclass(frozen=True)
class Size:
    """A language model behind LLaVA-1.5's vision tower, which is cut with it.

    Attributes:
        name: In billions of parameters, about.
        hidden, layers, heads, ffn: Of the language model.
        vision_layers: Of CLIP ViT-L/14-336's 24.
        image: Pixels a side.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    ffn: int
    vision_layers: int
    image: int

    def write(self, directory: Path) -> Path:
        """Writes the config; gives its directory."""
        config = json.loads(CONFIG.read_text(encoding="utf-8"))
        config["text_config"] |= {
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
        }
        config["text_config"].pop("head_dim", None)
        config["vision_config"] |= {"num_hidden_layers": self.vision_layers, "image_size": self.image}
        config["image_seq_length"] = (self.image // config["vision_config"]["patch_size"]) ** 2
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        return directory


def counted(config: Path) -> dict[str, Any]:
    """Of the network that a config describes: `parameters`, and `layer_bytes` of its largest layer in float32."""
    from infoprune_export.inspect import parameters
    from infoprune_export.models.families import find_anatomy
    from infoprune_export.models.random_weights import RandomCheckpoint

    model = RandomCheckpoint(config, 0).model
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layer_bytes": 4 * max(parameters(x, None) for x in find_anatomy(model).layers()),
    }


SIZES = {
    "0.1": Size("0.1", 512, 8, 8, 1408, 4, 112),
    "0.3": Size("0.3", 1024, 8, 8, 2816, 8, 112),
    "1": Size("1", 2048, 16, 16, 5504, 12, 224),
    "3": Size("3", 3072, 20, 24, 8192, 24, 336),
}
"""Smaller networks see smaller images, so that a sample's tokens grow with the rest."""
