"""Hidden states on the way through a model, and the states in front of its output head."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from torch import Tensor, nn

from infoprune_export.models.anatomy import Anatomy


class Taps:
    """Runs a model and takes the outputs of some of its modules on the way; threads do not disturb one another."""

    def __init__(self, model: nn.Module, paths: Sequence[str]):
        self.model, self.taken = model, threading.local()
        self.handles = [model.get_submodule(path).register_forward_hook(self._hook(path)) for path in paths]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, path: str):
        def take(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            if (found := getattr(self.taken, "found", None)) is not None:
                found[path] = output[0] if isinstance(output, tuple) else output

        return take

    def run(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Outputs of the modules by path, and the last hidden states in front of the head; inputs may be on any device."""
        device = next(self.model.parameters()).device
        self.taken.found = {}
        try:
            moved = {k: v.to(device, non_blocking=True) for k, v in inputs.items()}
            states = self.model.base_model(**moved, use_cache=False).last_hidden_state
            return self.taken.found, states
        finally:
            self.taken.found = None


def tap_points(anatomy: Anatomy, every: int) -> list[str]:
    """Modules whose outputs are compared: every few layers and the last of both towers, and the projector; none for 0."""
    if not every:
        return []
    points = [x.path for t in (anatomy.vision, anatomy.language) for x in t.layers if (x.index + 1) % every == 0 or x is t.layers[-1]]
    return [*points, anatomy.projector[-1].path] if anatomy.projector else points
