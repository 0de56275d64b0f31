"""Spectra and roots of moments: exact on small ones, and on wide ones by what gives the same answer in a fraction of the time.

A wide moment (LLaVA-1.5-7B's are 4096 wide) is rooted by Cholesky instead of an eigendecomposition, products of wide
matrices are computed in float32, and of a product's eigenvectors only the wanted ones are sought, by subspace iteration.
docs/method.md says what that costs in accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infoprune_export.errors import InputError

WIDE = 1024
"""Columns above which the fast ways are taken."""
RIDGE = 1e-9
"""Added to a wide moment, relative to its mean diagonal: with few samples it has directions without any data."""
OVERSAMPLING, MOST_ITERATIONS = 64, 24
TOLERANCE = 3e-4
"""Subspace iteration ends when a step captures no more than this share of what is not captured yet."""


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
        product = sandwich(self.matrix.T, matrix)
        return (product + product.T) / 2


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


def sandwich(a: Tensor, b: Tensor) -> Tensor:
    """`a b a^T` in float64, computed in the working type, shape [m, m]."""
    dtype = working_type(a, b)
    a, b = a.to(dtype), b.to(dtype)
    return (a @ b @ a.T).double()


def spectrum_of_moment(moment: Tensor) -> Tensor:
    """Singular values, descending, of any A with `A A^T = moment` (or `A^T A`), float64, shape [n]."""
    return torch.linalg.eigvalsh(moment.to(working_type(moment))).clamp_min(0).double().sqrt().flip(0)


def top_eigenvectors(matrix: Tensor, count: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues of a positive semi-definite matrix, the largest first, shape [n, count].

    Of a wide matrix those of a subspace that leaves out as little of its trace, to some parts in ten thousand.
    """
    n = len(matrix)
    if n <= WIDE or count > 3 * n // 4:
        return torch.linalg.eigh(matrix).eigenvectors[:, -count:].flip(1)
    total, single = float(matrix.trace()), matrix.float()
    basis, before = torch.randn(n, count + OVERSAMPLING, generator=torch.Generator().manual_seed(n + count)), -torch.inf
    for _ in range(MOST_ITERATIONS):
        basis = torch.linalg.qr(basis).Q
        image = single @ basis
        captured = float((basis * image).sum(dtype=torch.float64))
        if captured - before <= TOLERANCE * (total - captured):
            break
        basis, before = image, captured
    basis = torch.linalg.qr(basis.double()).Q
    return basis @ torch.linalg.eigh(basis.T @ matrix @ basis).eigenvectors[:, -count:].flip(1)
