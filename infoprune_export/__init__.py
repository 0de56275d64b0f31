"""InfoPrune-Export: compress a vision-language model by an information criterion and export it.

The functions below are what the command line calls; see `infoprune_export.api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["apply", "export", "load", "plan", "validate"]

if TYPE_CHECKING:
    from infoprune_export.api import apply, export, load, plan, validate


def __getattr__(name: str) -> Any:
    """Imports the interface when it is first used, so that `import infoprune_export` stays light."""
    if name in __all__:
        from infoprune_export import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
