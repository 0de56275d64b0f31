"""Images and a prompt in, text out, as it is made: what the `generate` verb runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from infoprune_export.bundle import Bundle
from infoprune_export.data.images import ImageRef
from infoprune_export.engines.profiles import capacity
from infoprune_export.errors import InputError
from infoprune_export.precision import Precision, float_type
from infoprune_export.recipe import Workload
from infoprune_export.runtime.config import ModelConfig
from infoprune_export.runtime.images import ImageProcessor
from infoprune_export.runtime.prompts import Prompts
from infoprune_export.runtime.session import EngineName, Session, first_held


def generate(
    bundle_dir: Path,
    images: Sequence[Path],
    prompt: str,
    *,
    engine: EngineName | None = None,
    dtype: Precision | None = None,
    max_new_tokens: int = 64,
    original: bool = False,
    threads: int | None = None,
    raw: bool = False,
) -> Iterator[str]:
    """Answers a prompt about images, piece by piece.

    Args:
        bundle_dir: A bundle.
        images: Image files, in the order of the prompt's image tokens; may be none.
        prompt: The question. Where it has no image token, the images go before it.
        engine: What runs the model; ONNX Runtime's engines where the bundle has them, else the portable graphs, when None.
        dtype: Which of the bundle's precisions; when None, the quantised one where the engine has that, else the first type that it has.
        max_new_tokens: Most tokens to make.
        original: Ask the uncompressed model that was kept for comparison.
        threads: CPU threads; all cores when None.
        raw: Take the prompt as it is, without the model's template.

    Returns:
        Pieces of the answer; the work of each is done when it is asked for.

    Raises:
        InputError: a bundle, image or prompt that cannot be used, or a prompt and an answer for which TensorRT's engines were not built;
            before the first piece.
        MissingRequirement: this machine lacks what the engine needs.
    """
    bundle = Bundle.open(bundle_dir)
    prompts = Prompts.from_directory(bundle.path, bundle.manifest.recipe.prompt)
    ids = prompts.encode(prompt, images=len(images), raw=raw)
    pictures = [ImageRef(Path(path)).open() for path in images]
    pixels = ImageProcessor.from_directory(bundle.path)(pictures) if pictures else None
    engine = engine or ("ort" if bundle.engines("ort", original).is_dir() else "onnx")
    if engine == "trt":
        _check_room(len(ids), max_new_tokens, bundle.manifest.workload, ModelConfig.from_directory(bundle.path).max_positions)
    if dtype is None:
        dtype = first_held(bundle, engine, original)
    elif original:  # which is never quantised
        dtype = float_type(dtype)
    session = Session.open(bundle, engine=engine, dtype=dtype, original=original, threads=threads)

    def pieces() -> Iterator[str]:
        stream = prompts.stream()
        for (token,) in session.generate([ids], pixels, max_new_tokens, prompts.eos_ids):
            if token in prompts.eos_ids:
                break
            yield stream.push(int(token))
        yield stream.finish()

    return _without_leading_space(pieces())


def _check_room(prompt: int, new: int, workload: Workload, positions: int | None) -> None:
    """Makes sure that no answer ends in its middle where TensorRT's profiles do."""
    most = capacity(workload)
    room = most - prompt + 1  # the last token is never read
    if (new if positions is None else min(new, positions - prompt + 1)) <= room:
        return
    mend = "make the bundle from a recipe with a longer workload"
    raise InputError(
        f"the prompt takes {prompt} tokens, its answer up to {new}, and the TensorRT engines were built for {most}",
        mend=f"give --max-new-tokens {room}, or {mend}" if room > 0 else f"ask a shorter question, or {mend}",
    )


def _without_leading_space(pieces: Iterator[str]) -> Iterator[str]:
    """Pieces that are not empty; the space between prompt and answer is not part of the answer."""
    started = False
    for piece in pieces:
        if piece := piece if started else piece.lstrip():
            started = True
            yield piece
