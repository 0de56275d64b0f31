"""Optimisation profiles: the ranges of shapes that a TensorRT engine is built for, from the workload.

The axes are those of the component contract in ARCHITECTURE.md. With a prompt of P tokens and N
new ones, the capacity C is P + N rounded up to a multiple of 64:

    prefill   sequence 1..C, tuned for P;  past 0
    decode    sequence 1;                  past 1..C-1, tuned for P + N / 2

A decoder that updates its cache in place has a past of C at all times; the mask says how much of it is used.
Requests of up to C tokens run whatever their mix of text and images, and a longer one needs an
engine built for a longer workload. `spanning` makes one profile of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from infoprune_export.errors import InputError
from infoprune_export.recipe import Workload

CAPACITY_STEP = 64
"""Tokens; attention kernels work in tiles of this size, so a tighter capacity saves nothing."""

DYNAMIC_AXES: Mapping[str, Mapping[int, str]] = {
    "pixel_values": {0: "images"},
    "input_ids": {0: "batch", 1: "sequence"},
    "inputs_embeds": {0: "batch", 1: "sequence"},
    "attention_mask": {0: "batch", 1: "total"},
    "position_ids": {0: "batch", 1: "sequence"},
    "past_key_values": {0: "batch", 2: "past"},
}
"""Input, or first part of its name, to the meaning of its dynamic axes."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Smallest, tuned-for and largest size of an axis."""

    minimum: int
    optimum: int
    maximum: int

    def __add__(self, other: Span) -> Span:
        return Span(self.minimum + other.minimum, self.optimum + other.optimum, self.maximum + other.maximum)


@dataclass(frozen=True)
class Profile:
    """One way the engine is used: a span for every dynamic axis, `total` being past + sequence where it has none of its own."""

    name: str
    axes: Mapping[str, Span]

    def span(self, axis: str) -> Span:
        return self.axes["past"] + self.axes["sequence"] if axis == "total" and axis not in self.axes else self.axes[axis]

    def within(self, capacity: int) -> Profile:
        """The same of an engine whose cache has room for so many tokens in all."""
        total = self.span("total")
        return Profile(self.name, {**self.axes, "total": Span(total.minimum, min(total.optimum, capacity), min(total.maximum, capacity))})

    def shapes(self, tensor: str, shape: Sequence[int]) -> tuple[Shape, Shape, Shape]:
        """Minimum, optimum and maximum shape of one input.

        Args:
            tensor: Name of the input.
            shape: Its shape in the network, -1 where dynamic.

        Raises:
            InputError: for a dynamic axis that the contract does not know.
        """
        meanings = DYNAMIC_AXES.get(tensor.split(".")[0], {})
        spans = []
        for axis, size in enumerate(shape):
            if size >= 0:
                spans.append(Span(size, size, size))
            elif axis in meanings:
                spans.append(self.span(meanings[axis]))
            else:
                raise InputError(
                    f"input {tensor!r} has a dynamic axis {axis} that no component has",
                    mend=f"dynamic axes are {', '.join(f'{name}{sorted(axes)}' for name, axes in DYNAMIC_AXES.items())}",
                )
        return tuple(s.minimum for s in spans), tuple(s.optimum for s in spans), tuple(s.maximum for s in spans)


def capacity(workload: Workload) -> int:
    """Most tokens, prompt and answer together, that an engine for this workload takes."""
    tokens = workload.prompt_tokens + workload.new_tokens
    return -(-tokens // CAPACITY_STEP) * CAPACITY_STEP


def workload_profiles(workload: Workload) -> list[Profile]:
    """The profiles `prefill` and `decode` of a workload."""
    most = capacity(workload)
    prompt = workload.prompt_tokens
    middle = prompt + workload.new_tokens // 2
    images = max(1, workload.images * workload.batch)
    shared = {"batch": Span(1, workload.batch, workload.batch), "images": Span(1, images, images)}
    prefill = {"sequence": Span(1, prompt, most), "past": Span(0, 0, 0)}
    decode = {"sequence": Span(1, 1, 1), "past": Span(1, middle, most - 1)}
    return [Profile("prefill", shared | prefill), Profile("decode", shared | decode)]


def spanning(profiles: Sequence[Profile]) -> Profile:
    """One profile that covers several and is tuned for the last of them."""
    last = profiles[-1]
    axes = {
        axis: Span(min(p.axes[axis].minimum for p in profiles), tuned.optimum, max(p.axes[axis].maximum for p in profiles))
        for axis, tuned in last.axes.items()
    }
    return Profile(" and ".join(p.name for p in profiles), axes)
