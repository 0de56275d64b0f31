"""The information criterion: effective rank and Kolmogorov-Smirnov distance of spectra.

Both work on singular values. The singular values of a map that matter are not those of its weights but of
its *weighted* action `G^(1/2) W C^(1/2)`, C the second moment of its inputs and G that of the loss gradient
at its outputs; on raw weights effective rank is nearly flat. See `spectra` for those.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor


def effective_rank(singular_values: np.ndarray | Tensor) -> float:
    """Entropy-based effective rank: `exp(-sum p_i ln p_i)`, `p_i = s_i / sum s`.

    Source: Roy & Vetterli, "The effective rank", EUSIPCO 2007.

    Args:
        singular_values: Non-negative values, any order, shape [n].

    Returns:
        A number between 1 and the count of non-zero values; 0 for an all-zero spectrum.

    Raises:
        ValueError: for negative or non-finite values.
    """
    s = np.asarray(singular_values, dtype=np.float64).ravel()
    if not np.isfinite(s).all() or (s < 0).any():
        raise ValueError("singular values must be finite and non-negative")
    if (total := s.sum()) == 0:
        return 0.0
    p = s[s > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def ks_distance(original: np.ndarray | Tensor, compressed: np.ndarray | Tensor, *, absolute: bool = False) -> float:
    """Kolmogorov-Smirnov distance between two spectra, as distributions over the index.

    `F(k) = sum_{i<=k} s_i`, both divided by the *original's* total, so that for a truncated spectrum the
    distance is the share of spectral mass lost. (A two-sample test on the sets of values, as some use, gives
    `1 - r/n` under truncation for every matrix and so says nothing.)

    Args:
        original: Singular values of the original, any order, shape [n].
        compressed: Those of the compressed, shape [m]; missing ones count as zero.
        absolute: Leave out the division, so that distances of different blocks compare, in units of the values.

    Returns:
        `max_k |F(k) - F'(k)|`; between 0 and 1 unless absolute or the compressed carries more mass.
    """
    a, b = (np.sort(np.asarray(x, dtype=np.float64).ravel())[::-1] for x in (original, compressed))
    n = max(len(a), len(b))
    f, g = (np.cumsum(np.pad(x, (0, n - len(x)))) for x in (a, b))
    if n == 0 or f[-1] == 0:
        return 0.0 if n == 0 or g[-1] == 0 or absolute is False else float(g[-1])
    distance = float(np.abs(f - g).max())
    return distance if absolute else distance / float(f[-1])
