"""The three components of a bundle as one model: images and token ids in, logits and tokens out.

    session = Session.open(bundle)
    features = session.encode_images(pixel_values)
    logits, cache = session.prefill(session.embed(input_ids, features), attention_mask)
    logits, cache = session.step(logits.argmax(-1), cache)

`generate` does this for a batch. Decoding is greedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infoprune_export.bundle import COMPONENTS, Bundle, engine_name, graph_file
from infoprune_export.engines import load_engine
from infoprune_export.engines.base import CacheBuffers, Engine, Step
from infoprune_export.errors import InputError, MissingRequirement
from infoprune_export.precision import Precision
from infoprune_export.runtime.config import ModelConfig

EngineName = Literal["onnx", "ort", "trt"]
PAST, PRESENT = "past_key_values.", "present."


GROWTH = 256
"""Tokens of room at least that a cache gets behind a prompt when nobody says how many will come."""


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, as the decoder's engine holds them.

    Attributes:
        past: Decoder input name to array, or buffers that every cache of this prompt writes into.
        attention_mask: [batch, tokens so far] int64, 0 where padded.
        fixed: Whether the buffers' capacity was asked for, and may not grow.
        step: What wrote the last of the tokens into the buffers.
    """

    past: dict[str, Any] | CacheBuffers
    attention_mask: np.ndarray
    fixed: bool = False
    step: Step | None = None


class Session:
    """A vision-language model that runs on engines."""

    def __init__(self, engines: dict[str, Engine], config: ModelConfig):
        """
        Args:
            engines: Component name to engine.
            config: Of the model.
        """
        self.engines, self.config = engines, config
        self._vision, self._embed, self._decoder = (engines[c] for c in COMPONENTS)
        self._past = {x.name: x for x in self._decoder.inputs if x.name.startswith(PAST)}
        self._stay = [PRESENT + name.removeprefix(PAST) for name in self._past]

    @classmethod
    def open(
        cls, bundle: Bundle, *, engine: EngineName = "ort", dtype: Precision = "fp32", original: bool = False, threads: int | None = None
    ) -> Session:
        """Opens a bundle's network.

        Args:
            bundle: The bundle.
            engine: `onnx` for its portable graphs, `ort` and `trt` for the engines built from them.
            dtype: Which of its precisions, such as `fp32` or `q4`.
            original: The uncompressed network that was kept for comparison.
            threads: CPU threads; all cores when None.

        Raises:
            InputError: the bundle does not hold this network, type or engine.
            MissingRequirement: this machine lacks what the engine needs.
        """
        if original and not bundle.has_original:
            raise InputError("does not hold the original network", where=bundle.path, mend="make the bundle with --original")
        files = {component: _file(bundle, component, engine, dtype, original) for component in COMPONENTS}
        engines = {component: load_engine(engine, file, threads) for component, file in files.items()}
        return cls(engines, ModelConfig.from_directory(bundle.path))

    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """Features of images in the language model's space.

        Args:
            pixel_values: [images, channels, height, width], any float type.

        Returns:
            [images, tokens, hidden] in the graph's type.
        """
        (spec,) = self._vision.inputs
        (name,) = (x.name for x in self._vision.outputs[:1])
        return self._vision.run({spec.name: pixel_values.astype(spec.dtype, copy=False)}, [name])[name]

    def embed(self, input_ids: np.ndarray, image_features: np.ndarray | None = None) -> np.ndarray:
        """Embeds tokens and puts image features in the places of image tokens, in order.

        Args:
            input_ids: [batch, sequence] int64.
            image_features: [images of all rows, tokens, hidden]; None without images.

        Returns:
            [batch, sequence, hidden] in the graph's type.

        Raises:
            InputError: the image tokens are not as many as the features.
        """
        embeds = self._look_up(input_ids)
        places = np.zeros(input_ids.shape, bool) if self.config.image_token_id is None else input_ids == self.config.image_token_id
        per_image = 1 if image_features is None else image_features.shape[1]
        expected = 0 if image_features is None else len(image_features) * per_image
        if places.sum() != expected or (places.sum(-1) % per_image).any():
            raise InputError(
                f"the prompt has {places.sum()} image tokens, the images need {expected} ({expected // per_image} x {per_image})",
                mend="give one image token per image feature, or use Prompts.encode, which repeats them",
            )
        if image_features is not None:
            embeds[places] = image_features.reshape(expected, -1).astype(embeds.dtype, copy=False)
        return embeds

    def _look_up(self, input_ids: np.ndarray) -> np.ndarray:
        (spec,), (out,) = self._embed.inputs, self._embed.outputs
        return self._embed.run({spec.name: input_ids.astype(spec.dtype, copy=False)})[out.name]

    def prefill(self, inputs_embeds: np.ndarray, attention_mask: np.ndarray, capacity: int | None = None) -> tuple[np.ndarray, Cache]:
        """Reads whole prompts.

        Args:
            inputs_embeds: [batch, sequence, hidden], padded on the left.
            attention_mask: [batch, sequence], 0 where padded.
            capacity: Most tokens of a row, prompt and answer together; room is made as it is needed when None.

        Returns:
            Logits [batch, vocab] float32 after the last token, and the cache.

        Raises:
            InputError: the prompt is longer than the capacity.
        """
        batch, tokens = attention_mask.shape
        past = self._decoder.open_cache(batch, tokens + GROWTH if capacity is None else capacity)
        if past is None:
            past = {name: np.zeros((batch, x.shape[1], 0, x.shape[3]), x.dtype) for name, x in self._past.items()}
        positions = np.maximum(attention_mask.cumsum(-1) - 1, 0)
        return self._decode(inputs_embeds, positions, Cache(past, attention_mask, capacity is not None))

    def step(self, token_ids: np.ndarray, cache: Cache) -> tuple[np.ndarray, Cache]:
        """Reads one more token of every row.

        Args:
            token_ids: [batch].
            cache: Of the tokens before. It can be continued again later; of an engine that works in place, what was made of it
                before then ends.

        Returns:
            Logits [batch, vocab] float32, and the longer cache.

        Raises:
            InputError: the cache has no room left, or another continuation took its place.
        """
        mask = np.pad(cache.attention_mask, ((0, 0), (0, 1)), constant_values=1)
        past, tokens = cache.past, mask.shape[1]
        if isinstance(past, CacheBuffers) and tokens > past.capacity and not cache.fixed:
            past = past.larger(tokens - 1, 2 * tokens) or past  # those that cannot grow say so when they are run
        longer = replace(cache, past=past, attention_mask=mask)
        # A model may say its image token; no image belongs to it then, and it is a token like any other.
        return self._decode(self._look_up(token_ids[:, None]), mask.sum(-1, keepdims=True) - 1, longer)

    def _decode(self, inputs_embeds: np.ndarray, position_ids: np.ndarray, cache: Cache) -> tuple[np.ndarray, Cache]:
        """Reads tokens; `cache` has the past, and a mask that covers them."""
        feeds = {"inputs_embeds": inputs_embeds, "attention_mask": cache.attention_mask, "position_ids": position_ids}
        types = {x.name: x.dtype for x in self._decoder.inputs}
        feeds = {name: x.astype(types[name], copy=False) for name, x in feeds.items()}
        if isinstance(cache.past, CacheBuffers):
            logits, step = cache.past.run(feeds, cache.step)
            return logits[:, -1].astype(np.float32), replace(cache, step=step)
        results = self._decoder.run_on_device({**feeds, **cache.past}, self._stay)
        present = {PAST + name.removeprefix(PRESENT): results[name] for name in self._stay}
        return results["logits"][:, -1].astype(np.float32), replace(cache, past=present)

    def generate(
        self,
        input_ids: Sequence[np.ndarray],
        pixel_values: np.ndarray | None,
        max_new_tokens: int,
        eos_ids: Sequence[int] | None = None,
        capacity: int | None = None,
    ) -> Iterator[np.ndarray]:
        """Continues a batch of prompts greedily.

        Args:
            input_ids: Token ids of each prompt, [sequence], image tokens repeated.
            pixel_values: [images of all prompts in their order, channels, height, width]; None without images.
            max_new_tokens: Most tokens to make; fewer where the model's positions run out.
            eos_ids: Tokens that end a row; the model's own when None, none at all when empty.
            capacity: Tokens that the cache has room for; what prompt and answer can take when None.

        Yields:
            [batch] int64, the next token of every row. A finished row repeats its end token; it stops when all are finished.

        Raises:
            InputError: with the first token, for a prompt that is too long for the model or, with its answer, for the capacity; later
                for an answer that outgrows the capacity which the engine was built for.
        """
        ends = self.config.eos_ids if eos_ids is None else tuple(eos_ids)
        ids, mask = left_pad(input_ids, padding_id(self.config.image_token_id))
        self.config.check_length(ids.shape[1])
        if self.config.max_positions is not None:
            max_new_tokens = min(max_new_tokens, self.config.max_positions - ids.shape[1] + 1)  # the last is never read
        most = ids.shape[1] + max_new_tokens
        if capacity is not None and capacity < most:
            what = f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones do not fit into a cache for {capacity}"
            raise InputError(what, mend=f"give a capacity of {most}, or none")
        features = None if pixel_values is None else self.encode_images(pixel_values)
        bounded = self.config.max_positions is not None
        logits, cache = self.prefill(self.embed(ids, features), mask, capacity or (most if bounded else None))
        tokens = logits.argmax(-1)
        for _ in range(max_new_tokens - 1):
            yield tokens
            finished = np.isin(tokens, ends)
            if finished.all():
                return
            logits, cache = self.step(tokens, cache)
            tokens = np.where(finished, tokens, logits.argmax(-1))
        yield tokens


def padding_id(image_token_id: int | None) -> int:
    """A token to pad with: any but the image's, since its embedding is masked out."""
    return 1 if image_token_id == 0 else 0


def left_pad(prompts: Sequence[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask of a batch, both [batch, longest] int64."""
    longest = max(len(p) for p in prompts)
    ids = np.stack([np.pad(p, (longest - len(p), 0), constant_values=pad_id) for p in prompts]).astype(np.int64)
    mask = np.stack([np.pad(np.ones(len(p), np.int64), (longest - len(p), 0)) for p in prompts])
    return ids, mask


def first_held(bundle: Bundle, engine: EngineName, original: bool = False) -> Precision:
    """The precision to run a network in where nobody names one: the first of the bundle's that an engine has files of.

    Engines may be fewer than graphs: TensorRT's are built in half precision, and quantised graphs for one target need not be built
    for another. Where an engine has none at all, it is the bundle's first, and opening it says what is missing.
    """
    precisions = bundle.manifest.dtypes if original else bundle.manifest.precisions
    return next((p for p in precisions if is_held(bundle, engine, p, original)), precisions[0])


def is_held(bundle: Bundle, engine: EngineName, precision: Precision, original: bool = False) -> bool:
    """Whether a bundle has an engine's files of a network in a precision, whether or not they run here."""
    try:
        for component in COMPONENTS:
            _file(bundle, component, engine, precision, original)
    except (InputError, MissingRequirement):
        return False
    return True


def _file(bundle: Bundle, component: str, engine: EngineName, dtype: Precision, original: bool) -> Path:
    """The graph or engine file of one component."""
    if engine == "trt":
        from infoprune_export.engines.tensorrt_run import find_engine

        return find_engine(bundle.engines("trt", original), engine_name(component, dtype))
    if engine == "onnx":
        path = bundle.graph(component, dtype, original)
        mend = f"make the bundle with --dtype {dtype}"
    else:
        path = bundle.engines(engine, original) / graph_file(component, dtype)
        mend = f"build it: infoprune-export build {bundle.path} --target {engine}"
    if not path.is_file():
        raise InputError(f"has no {component} for {engine} in {dtype}", where=bundle.path, mend=mend)
    return path
