"""Spectra and roots of moments: exact on small ones, and on wide ones by what gives the same answer in a fraction of the time.

A wide moment (LLaVA-1.5-7B's are 4096 wide) is rooted by Cholesky instead of an eigendecomposition; products and
eigenvectors of wide matrices are computed in float32. docs/method.md says what that costs in accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from infoprune_export.errors import InputError

WIDE = 1024
"""Columns above which the fast ways are taken."""
RIDGE = 1e-9
"""Added to a wide moment, relative to its mean diagonal: with few samples it has directions without any data."""


@dataclass(frozen=True)
class Root:
    """`R` with `R R^T = matrix`, and its inverse.

    Attributes:
        matrix: R, shape [n, n]: symmetric, or lower triangular.
        inverse: The symmetric pseudo-inverse on the numerical rank; None where R is triangular.
    """

    matrix: Tensor
    inverse: Tensor | None

    @classmethod
    def of(cls, moment: Tensor) -> Root:
        """The root of a positive semi-definite matrix, shape [n, n].

        Raises:
            InputError: it is not finite.
        """
        if not moment.sum().isfinite():  # decompositions of such fail in words of their own, or never end
            raise InputError(
                "the calibration data give moments that are not finite", mend="check the model's weights and the calibration images"
            )
        if len(moment) <= WIDE:
            return cls(symmetric_power(moment, 0.5), symmetric_power(moment, -0.5))
        ridge = RIDGE * float(moment.diagonal().mean())
        identity = torch.eye(len(moment), dtype=moment.dtype)
        while True:  # rounding can leave eigenvalues below the ridge's size under zero
            factor, failed = torch.linalg.cholesky_ex(moment + ridge * identity)
            if not failed:
                return cls(factor, None)
            ridge = max(100 * ridge, torch.finfo(moment.dtype).tiny)

    def undo(self, rows: Tensor) -> Tensor:
        """`rows R^-1`, shape [m, n]."""
        if self.inverse is not None:
            return rows @ self.inverse
        return torch.linalg.solve_triangular(self.matrix, rows, upper=False, left=False)

    def around(self, matrix: Tensor) -> Tensor:
        """`R^T matrix R` of a symmetric matrix, symmetric."""
        around = product(self.matrix.T, matrix, self.matrix)
        return (around + around.T) / 2


def symmetric_power(matrix: Tensor, power: float, rtol: float = 1e-10) -> Tensor:
    """A real power of a positive semi-definite matrix.

    Args:
        matrix: Symmetric, shape [n, n]; tiny negative eigenvalues from rounding count as zero.
        power: The exponent; negative ones give the pseudo-inverse power on the numerical rank.
        rtol: Eigenvalues below this fraction of the largest count as zero.
    """
    values, vectors = torch.linalg.eigh(matrix)
    keep = values > rtol * values[-1].clamp_min(0)
    scaled = torch.where(keep, values.clamp_min(torch.finfo(values.dtype).tiny).pow(power), torch.zeros_like(values))
    return (vectors * scaled) @ vectors.T


def working_type(*matrices: Tensor) -> torch.dtype:
    """What products of matrices are computed in: float64, float32 where one is wide."""
    return torch.float32 if max(x for m in matrices for x in m.shape) > WIDE else torch.float64


def product(*matrices: Tensor) -> Tensor:
    """A product of matrices in float64, computed in the working type, from the left to the right."""
    dtype = working_type(*matrices)
    return reduce(torch.matmul, (m.to(dtype) for m in matrices)).double()


def spectrum_of_moment(moment: Tensor) -> Tensor:
    """Singular values, descending, of any A with `A A^T = moment` (or `A^T A`), float64, shape [n]."""
    return torch.linalg.eigvalsh(moment.to(working_type(moment))).clamp_min(0).double().sqrt().flip(0)


def top_eigenvectors(matrix: Tensor, count: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues of a positive semi-definite matrix, the largest first, float64, shape [n, count].

    Those of a wide matrix are orthonormal to float32's rounding.
    """
    return torch.linalg.eigh(matrix.to(working_type(matrix))).eigenvectors[:, -count:].flip(1).double()
