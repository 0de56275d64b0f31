"""Packages that a part of the work needs: refused early, with the line that installs them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from infoprune_export.errors import MissingRequirement


def require(who: str, packages: Iterable[str], extra: str) -> None:
    """Makes sure that packages are installed, without importing them.

    Args:
        who: The beginning of the message, such as `this training needs`.
        packages: By the names that are imported.
        extra: Of this package, that has them.

    Raises:
        MissingRequirement: names the first that is missing.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingRequirement(f"{who} {package}", mend=f'pip install "infoprune-export[{extra}]"')


def require_graphs() -> None:
    """Makes sure of what rewrites graphs, without PyTorch; see `require`."""
    require("rewriting graphs needs", ("onnx_graphsurgeon", "onnx_ir"), "export")


def require_export() -> None:
    """Makes sure of PyTorch and its friends; see `require`."""
    require("compressing and exporting need", ("torch", "transformers", "onnxscript", "onnx_graphsurgeon", "scipy"), "export")
