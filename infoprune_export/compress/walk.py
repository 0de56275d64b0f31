"""A model walked one layer at a time by all calibration batches together, forward and back.

A layer's weights are in memory for its turn, the embedding's and the output head's for theirs, and no more than one layer has
its activations there: the hidden states between layers wait on disk. Going back, a layer runs once more on what it was given, and
passes the gradient of its output on to its input. What lies between the towers and behind the last one runs as the model itself
runs it, with the layers replaced by what they gave. A turn whose outcome is on disk is not taken again, so a walk that was killed
goes on where it was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from infoprune_export.compress.spill import Spill
from infoprune_export.models.anatomy import Anatomy, Layer, Tower, TowerName
from infoprune_export.models.families import feature_layers
from infoprune_export.models.streamed import at_hand, tables_at_hand

if TYPE_CHECKING:
    from infoprune_export.compress.statistics import Batch

Watch = Callable[[Layer], AbstractContextManager[object]]
"""Makes a layer's hooks for the time of its turn; the layer's weights are in memory then."""
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


def outlets(model: nn.Module, tower: Tower) -> list[int]:
    """Indices of the layers of a tower whose outputs are used outside it, ascending."""
    return feature_layers(model.config) if tower.name == "vision" else [len(tower.layers) - 1]


class Stage:
    """The towers of a model, entered one after the other; those entered before give what they gave.

    Args:
        model: In evaluation mode, laid out or whole.
        anatomy: Of the original.
        batches: In a fixed order.
        spill: Gets the hidden states in front of every layer and behind the last.
        name: Of the pass, by which the spill's groups begin.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, batches: Sequence[Batch], spill: Spill, name: str):
        self.model, self.anatomy, self.batches, self.spill, self.name = model, anatomy, batches, spill, name
        self.calls: dict[TowerName, dict[int, Call]] = {}

    def enter(self, tower: Tower) -> dict[int, Call]:
        """Takes every batch as far as a tower's first layer; gives what those that come there call layers with, by their number."""
        calls: dict[int, Call] = {}

        def arrive() -> Iterator[tuple[int, Tensor]]:
            for n, batch in enumerate(self.batches):
                with self.played(n):
                    for call, hidden in calls_of(self.model, tower, batch):
                        calls[n] = call
                        yield n, hidden

        with torch.no_grad(), tables_at_hand(self.model, self.anatomy):
            if self._furthest(tower) < 0:
                self.spill.put(self._in_front(tower.name, 0), arrive())
            else:  # an earlier run was here; what layers are called with is not on disk, and is soon made
                for _ in arrive():
                    pass
        self.calls[tower.name] = calls
        return calls

    def _in_front(self, tower: TowerName, index: int) -> str:
        return f"{self.name}.{tower}.{index}"

    def _furthest(self, tower: Tower) -> int:
        """The last layer that hidden states on disk lie in front of, or the number of layers; -1 where there are none."""
        return max((i for i in range(len(tower.layers) + 1) if self.spill.has(self._in_front(tower.name, i))), default=-1)

    def passed(self, layer: Layer) -> bool:
        """Whether the batches have gone through a layer, now or in an earlier run."""
        return self._furthest(self.anatomy.tower(layer.tower)) > layer.index

    def state(self, layer: Layer, n: int) -> Tensor:
        """Hidden states of a batch in front of a layer."""
        return self.spill.get(self._in_front(layer.tower, layer.index), n, self.batches[n].targets.device)

    def put_behind(self, layer: Layer, states: Iterator[tuple[int, Tensor]]) -> None:
        """Keeps what a layer gives for every batch; the layer has been passed once `states` has run to its end."""
        with torch.no_grad():
            self.spill.put(self._in_front(layer.tower, layer.index + 1), states)

    def through(self, layer: Layer, module: nn.Module) -> Iterator[tuple[int, Tensor]]:
        """What a layer gives for every batch."""
        for n, call in self.calls[layer.tower].items():
            yield n, call.through(module, self.state(layer, n))

    def drop(self, layer: Layer) -> None:
        """Forgets the hidden states in front of a layer, unless they leave the tower there."""
        if layer.index - 1 not in outlets(self.model, self.anatomy.tower(layer.tower)):
            self.spill.drop(self._in_front(layer.tower, layer.index))

    @contextmanager
    def played(self, n: int, asking: TowerName | None = None) -> Iterator[dict[int, Tensor]]:
        """The model with the towers entered so far giving what they gave for a batch.

        Args:
            n: Number of the batch.
            asking: A tower whose outlets ask for gradients.

        Yields:
            Outlets of the asking tower to what they gave, once the model has run.
        """
        asked: dict[int, Tensor] = {}
        played: list[nn.Module] = []
        for name, calls in self.calls.items():
            if n in calls:
                tower = self.anatomy.tower(name)
                out = outlets(self.model, tower)
                for layer in tower.layers:
                    module = self.model.get_submodule(layer.path)
                    module.forward = self._player(layer, n, asked if asking == name else None) if layer.index in out else _pass_on
                    played.append(module)
        try:
            yield asked
        finally:
            for module in played:
                del module.forward

    def _player(self, layer: Layer, n: int, asked: dict[int, Tensor] | None) -> Callable[..., Tensor]:
        def play(*args: object, **kwargs: object) -> Tensor:
            given = self.spill.get(self._in_front(layer.tower, layer.index + 1), n, self.batches[n].targets.device)
            if asked is not None:
                asked[layer.index] = given.requires_grad_()
            return given

        return play


def _pass_on(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    """A layer whose output only further layers would see, and those give what they gave whatever they are given."""
    return hidden_states


class Walk:
    """Batches on their way through a model.

    Args:
        model: In evaluation mode, frozen or not, laid out or whole.
        anatomy: Of that model.
        batches: In a fixed order.
        watch: Makes the hooks of a layer.
        start: Told of every batch before it runs through a watched layer.
        finish: Called at the end of a layer's watched turn, before it counts as taken: what it makes has to be on disk when it
            returns, if the walk is to be gone on with. Not called for layers whose turn an earlier run has taken.
        advance: Called when a layer's turn is over, or was in an earlier run.
        directory: For hidden states, and to go on from; a temporary one when None.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        batches: Sequence[Batch],
        watch: Watch,
        *,
        start: Callable[[Batch], None] = lambda batch: None,
        finish: Callable[[Layer], None] = lambda layer: None,
        advance: Callable[[Layer], None] = lambda layer: None,
        directory: Path | None = None,
    ):
        self.model, self.anatomy, self.batches = model, anatomy, batches
        self.watch, self.start, self.finish, self.advance = watch, start, finish, advance
        self.directory = directory

    def forward(self) -> None:
        """Takes every batch through every layer, watched."""
        with self._staged():
            for tower in (self.anatomy.vision, self.anatomy.language):
                self._forward(tower, watched=True)

    def forward_and_back(self, loss: Loss) -> None:
        """Takes every batch through every layer and the gradient of its loss back, watched on the way back."""
        vision, language = self.anatomy.vision, self.anatomy.language
        with self._staged(), torch.enable_grad():
            if self.spill.has("end.vision"):  # all that is left is the way back through the vision tower
                self.stage.enter(vision)
            elif self.spill.has("end.language"):
                self.stage.enter(vision)
                self.stage.enter(language)
            else:
                self._forward(vision, watched=False)
                self._forward(language, watched=False)
                self.spill.put("end.language", self._at_the_end(loss))
            self._back(language)
            if not self.spill.has("end.vision"):
                self.spill.put("end.vision", self._between())
            self._back(vision)

    @contextmanager
    def _staged(self) -> Iterator[None]:
        with ExitStack() as until:
            directory = self.directory or Path(until.enter_context(tempfile.TemporaryDirectory(prefix="infoprune-")))
            self.spill = Spill(directory)
            self.stage = Stage(self.model, self.anatomy, self.batches, self.spill, "forward")
            yield

    def _forward(self, tower: Tower, watched: bool) -> None:
        self.stage.enter(tower)
        for layer in tower.layers:
            if not self.stage.passed(layer):
                with at_hand(self.model, layer.path) as module:
                    self.stage.put_behind(layer, self._watched(layer, module) if watched else self.stage.through(layer, module))
            if watched:
                self.stage.drop(layer)
                self.advance(layer)

    def _watched(self, layer: Layer, module: nn.Module) -> Iterator[tuple[int, Tensor]]:
        with self.watch(layer):
            for n, call in self.stage.calls[layer.tower].items():
                self.start(call.batch)
                yield n, call.through(module, self.stage.state(layer, n))
        self.finish(layer)

    def _at_the_end(self, loss: Loss) -> Iterator[tuple[str, Tensor]]:
        """Gradients of the loss at the outlets of the language model, batch by batch."""
        with tables_at_hand(self.model, self.anatomy):
            for n, batch in enumerate(self.batches):
                # Answers come last: logits before the first of them would be most of the memory, and are not needed.
                first = int((batch.targets != -100).any(0).int().argmax())
                wanted = batch.targets.shape[1] - first
                with self.stage.played(n, asking="language") as asked:
                    logits = self.model(**batch.inputs, use_cache=False, logits_to_keep=wanted).logits
                    loss(logits, batch.targets[:, -wanted:]).backward()
                    yield from _gradients(n, asked)

    def _between(self) -> Iterator[tuple[str, Tensor]]:
        """Gradients at the outlets of the vision tower, from those in front of the language model's first layer."""
        with tables_at_hand(self.model, self.anatomy):
            for n in self.stage.calls["vision"]:
                with self.stage.played(n, asking="vision") as asked:
                    ((_, hidden),) = calls_of(self.model, self.anatomy.language, self.batches[n])
                    hidden.backward(self._gradient("back.language.0", n))
                    yield from _gradients(n, asked)

    def _back(self, tower: Tower) -> None:
        """Takes the gradients at a tower's outlets back to the input of its first layer, watched."""
        behind = [f"back.{tower.name}.{i}" for i in range(len(tower.layers))]
        for layer in reversed(tower.layers):
            i = layer.index
            if not any(self.spill.has(group) for group in behind[: i + 1]):
                with at_hand(self.model, layer.path) as module:
                    self.spill.put(behind[i], self._turn_back(layer, module))
            if i + 1 < len(behind):
                self.spill.drop(behind[i + 1])
            self.stage.drop(layer)
            self.advance(layer)

    def _turn_back(self, layer: Layer, module: nn.Module) -> Iterator[tuple[int, Tensor]]:
        with self.watch(layer):
            for n, call in self.stage.calls[layer.tower].items():
                self.start(call.batch)
                hidden = self.stage.state(layer, n)
                gradient = self._gradient(f"back.{layer.tower}.{layer.index + 1}", n)
                if (own := self._gradient(f"end.{layer.tower}", f"{n}-{layer.index}")) is not None:
                    gradient = own if gradient is None else gradient + own
                if gradient is None:  # the loss does not feel this layer
                    with torch.no_grad():
                        call.through(module, hidden)
                    continue
                call.through(module, hidden.requires_grad_()).backward(gradient)
                yield n, hidden.grad
        self.finish(layer)

    def _gradient(self, group: str, name: object) -> Tensor | None:
        return self.spill.get(group, name, self.batches[0].targets.device)


def _gradients(n: int, asked: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"{n}-{i}", x.grad) for i, x in asked.items() if x.grad is not None)
