"""InfoPrune-Export: compress a vision-language model by an information criterion and export it."""

from __future__ import annotations

__version__ = "0.1.0"
