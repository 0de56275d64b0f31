"""A model walked one layer at a time by all calibration batches together, forward and back.

Moments of one layer are complete when its turn is over, and no more than one layer has its activations in memory: the
hidden states between layers wait in a file. Going back, a layer runs once more on what it was given, and passes the gradient of
its output on to its input. What lies between the towers and behind the last one runs as the model itself runs it, with the
layers replaced by what they gave.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from infoprune_export.models.anatomy import Anatomy, Layer, Tower, TowerName

if TYPE_CHECKING:
    from infoprune_export.compress.statistics import Batch

Watch = Callable[[Layer], AbstractContextManager[object]]
"""Makes a layer's hooks for the time of its turn."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Of logits [batch, sequence, vocabulary] and targets [batch, sequence]."""


@dataclass(frozen=True)
class Call:
    """What the layers of a tower are called with for one batch, beside hidden states: the same for every layer.

    Attributes:
        batch: The batch.
        args: By position.
        kwargs: By name.
    """

    batch: Batch
    args: tuple
    kwargs: dict[str, Any]

    def through(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """What a layer makes of hidden states."""
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


class Reached(Exception):
    """Raised by a hook to end a forward pass once what was wanted of it has been taken."""


def calls_of(model: nn.Module, tower: Tower, batch: Batch) -> list[tuple[Call, Tensor]]:
    """What the first layer of a tower is called with for a batch; nothing for a vision tower where there are no images."""
    found: list[tuple[Call, Tensor]] = []

    def take(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        found.append((Call(batch, args[1:], kwargs), hidden))
        raise Reached

    handle = model.get_submodule(tower.layers[0].path).register_forward_pre_hook(take, with_kwargs=True)
    try:
        with suppress(Reached):
            model(**batch.inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return found


class _Spill:
    """Tensors in a file without a name, which is gone when nobody needs it any more."""

    def __init__(self, directory: Path | None):
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (closed with the walk)

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Writes a tensor; what comes back reads it."""
        offset, device, shape, dtype = self._file.seek(0, 2), tensor.device, tensor.shape, tensor.dtype
        self._file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy())

        def get() -> Tensor:
            self._file.seek(offset)
            content = np.fromfile(self._file, np.uint8, int(np.prod(shape)) * dtype.itemsize)
            return torch.from_numpy(content).view(dtype).view(shape).to(device)

        return get


@dataclass
class _Track:
    """The way of every batch through a tower.

    Attributes:
        tower: Which.
        calls: Of every batch that comes there, by its number.
        states: Of every batch, hidden states in front of each layer and behind the last.
        asked: Outputs of layers that were put in their places in the pass under way, by the layer's number, and asked for gradients.
    """

    tower: Tower
    calls: dict[int, Call]
    states: dict[int, list[Callable[[], Tensor]]]
    asked: dict[int, Tensor] = field(default_factory=dict)


class Walk:
    """Batches on their way through a model.

    Args:
        model: In evaluation mode, frozen or not.
        anatomy: Of that model.
        batches: In a fixed order.
        watch: Makes the hooks of a layer.
        start: Told of every batch before it runs through a watched layer.
        advance: Called when a layer's turn is over.
        spill: Directory for hidden states; the system's own for temporary files when None.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        batches: Sequence[Batch],
        watch: Watch,
        *,
        start: Callable[[Batch], None] = lambda batch: None,
        advance: Callable[[Layer], None] = lambda layer: None,
        spill: Path | None = None,
    ):
        self.model, self.anatomy, self.batches = model, anatomy, batches
        self.watch, self.start, self.advance = watch, start, advance
        self._spill = _Spill(spill)
        self._tracks: dict[TowerName, _Track] = {}

    @torch.no_grad()
    def forward(self) -> None:
        """Takes every batch through every layer, watched."""
        self._forward(self.watch)

    def forward_and_back(self, loss: Loss) -> None:
        """Takes every batch through every layer and the gradient of its loss back, watched on the way back."""
        with torch.no_grad():
            self._forward(None)
        with torch.enable_grad():
            gradients = self._back(self.anatomy.language, self._at_the_end(loss))
            self._back(self.anatomy.vision, self._between(gradients))

    def _forward(self, watch: Watch | None) -> None:
        for tower in (self.anatomy.vision, self.anatomy.language):
            track = _Track(tower, {}, {})
            for n, batch in enumerate(self.batches):
                with self._played(n):
                    for call, hidden in calls_of(self.model, tower, batch):
                        track.calls[n], track.states[n] = call, [self._spill.put(hidden)]
            for layer in tower.layers:
                module = self.model.get_submodule(layer.path)
                with watch(layer) if watch else ExitStack():
                    for n, call in track.calls.items():
                        self.start(call.batch)
                        track.states[n].append(self._spill.put(call.through(module, track.states[n][-1]())))
                if watch:
                    self.advance(layer)
            self._tracks[tower.name] = track

    def _at_the_end(self, loss: Loss) -> dict[int, dict[int, Tensor]]:
        """Gradients of the loss at the outputs of the language model's layers, batch by batch."""
        found = {}
        for n, batch in enumerate(self.batches):
            # Answers come last: logits before the first of them would be most of the memory, and are not needed.
            first = int((batch.targets != -100).any(0).int().argmax())
            wanted = batch.targets.shape[1] - first
            with self._played(n, asking="language") as track:
                logits = self.model(**batch.inputs, use_cache=False, logits_to_keep=wanted).logits
                loss(logits, batch.targets[:, -wanted:]).backward()
                found[n] = {i: x.grad for i, x in track.asked.items() if x.grad is not None}
        return found

    def _between(self, gradients: dict[int, Tensor]) -> dict[int, dict[int, Tensor]]:
        """Gradients at the outputs of the vision tower's layers, from those in front of the language model's first."""
        found = {}
        for n in self._tracks["vision"].calls:
            with self._played(n, asking="vision") as track:
                ((_, hidden),) = calls_of(self.model, self.anatomy.language, self.batches[n])
                hidden.backward(gradients[n])
                found[n] = {i: x.grad for i, x in track.asked.items() if x.grad is not None}
        return found

    def _back(self, tower: Tower, outputs: dict[int, dict[int, Tensor]]) -> dict[int, Tensor]:
        """Takes gradients at the outputs of a tower's layers back to the input of its first, for every batch."""
        track, gradients = self._tracks[tower.name], {}
        for i, layer in reversed(list(enumerate(tower.layers))):
            module = self.model.get_submodule(layer.path)
            with self.watch(layer):
                for n, call in track.calls.items():
                    self.start(call.batch)
                    hidden, gradient = track.states[n][i](), gradients.get(n)
                    if (own := outputs.get(n, {}).get(i)) is not None:
                        gradient = own if gradient is None else gradient + own
                    if gradient is None:  # the loss does not feel this layer
                        with torch.no_grad():
                            call.through(module, hidden)
                        continue
                    call.through(module, hidden.requires_grad_()).backward(gradient)
                    gradients[n] = hidden.grad
            self.advance(layer)
        return gradients

    @contextmanager
    def _played(self, n: int, asking: TowerName | None = None) -> Iterator[_Track]:
        """The model with the layers walked so far giving what they gave for a batch; those of one tower ask for gradients."""
        played = []
        for name, track in self._tracks.items():
            if n not in track.calls:
                continue
            track.asked = {}
            for i, layer in enumerate(track.tower.layers):
                module = self.model.get_submodule(layer.path)
                module.forward = self._player(track, n, i, asking == name)
                played.append(module)
        try:
            yield self._tracks[asking] if asking else None
        finally:
            for module in played:
                del module.forward

    def _player(self, track: _Track, n: int, i: int, asks: bool) -> Callable[..., Tensor]:
        def play(*args: object, **kwargs: object) -> Tensor:
            given = track.states[n][i + 1]()
            if asks:
                track.asked[i] = given.requires_grad_()
            return given

        return play
