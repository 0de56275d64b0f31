"""Where the original network is, to be measured beside the compressed one."""

from __future__ import annotations

from dataclasses import dataclass

from infoprune_export.bundle import Bundle
from infoprune_export.errors import InputError
from infoprune_export.precision import Dtype
from infoprune_export.runtime.session import EngineName, Session


@dataclass(frozen=True)
class Baseline:
    """Where the original network is: inside a compressed bundle, or a bundle of its own."""

    bundle: Bundle
    inside: bool

    def open(self, engine: EngineName, dtype: Dtype, threads: int | None) -> Session:
        return Session.open(self.bundle, engine=engine, dtype=dtype, original=self.inside, threads=threads)


def find_baseline(bundle: Bundle, original: Bundle | None = None) -> Baseline | None:
    """The original network of a bundle: the one given, else the one kept inside.

    Raises:
        InputError: the bundle given is of another model, or is compressed and keeps no original.
    """
    if original is None:
        return Baseline(bundle, inside=True) if bundle.has_original else None
    if original.manifest.source.sha256 != bundle.manifest.source.sha256:
        raise InputError(
            f"is made from {original.manifest.source.id}, not from {bundle.manifest.source.id}",
            where=original.path,
            mend="give a bundle of the same source model, made with --flops 1",
        )
    if original.plan().is_identity:
        return Baseline(original, inside=False)
    if original.has_original:
        return Baseline(original, inside=True)
    raise InputError("is compressed and keeps no original", where=original.path, mend="give one made with --flops 1 or --original")
