"""Spectra and roots of moments: exact on small ones, and on wide ones by what gives the same answer in a fraction of the time.

A wide moment (LLaVA-1.5-7B's are 4096 wide) is rooted by Cholesky instead of an eigendecomposition, and of symmetric
products one half is computed. Products and eigenvectors of wide matrices are computed in float32, and few of the vectors by
subspace iteration. docs/method.md says what that costs in accuracy.
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
BLOCK = 512
"""Columns at a time where half of a product is known to be zero, or the mirror of the other half."""
OVERSAMPLING, BLIND_STEPS, STEPS = 256, 3, 6
"""Of subspace iteration: vectors beyond those that are wanted, steps before the first that may be good enough, and all steps."""
EXCESS = 1.5e-3
"""What few vectors may leave out of the trace beyond what the exact ones do, relative to that."""


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
        while True:  # rounding can leave eigenvalues below the ridge's size under zero
            ridged = moment.clone()
            ridged.diagonal().add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(ridged)
            if not failed:
                return cls(factor, None)
            ridge = max(100 * ridge, torch.finfo(moment.dtype).tiny)

    def undo(self, rows: Tensor) -> Tensor:
        """`rows R^-1`, shape [m, n]."""
        if self.inverse is not None:
            return rows @ self.inverse
        return torch.linalg.solve_triangular(self.matrix, rows, upper=False, left=False)

    def around(self, matrix: Tensor) -> Tensor:
        """`R^T matrix R` of a symmetric matrix, symmetric, in the working type."""
        if self.inverse is not None:
            around = product(self.matrix.T, matrix, self.matrix)
            return (around + around.T) / 2
        dtype = working_type(matrix)
        root, matrix = self.matrix.to(dtype), matrix.to(dtype)
        right, around = torch.empty_like(matrix), torch.empty_like(matrix)
        for i in range(0, len(matrix), BLOCK):  # above its diagonal the root is zero
            own = slice(i, i + BLOCK)
            right[:, own] = matrix[:, i:] @ root[i:, own]
        for i in range(0, len(matrix), BLOCK):
            own = slice(i, i + BLOCK)
            around[own, : i + BLOCK] = root[i:, own].T @ right[i:, : i + BLOCK]
            around[:i, own] = around[own, :i].T
        return around


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


def gram(a: Tensor) -> Tensor:
    """`a^T a` in float64, computed in the working type, shape [n, n] of [m, n]."""
    a, n = a.to(working_type(a)), a.shape[1]
    found = torch.empty(n, n, dtype=a.dtype)
    for i in range(0, n, BLOCK):
        own = slice(i, i + BLOCK)
        found[i:, own] = a[:, i:].T @ a[:, own]
        found[own, i + BLOCK :] = found[i + BLOCK :, own].T
    return found.double()


def spectrum_of_moment(moment: Tensor) -> Tensor:
    """Singular values, descending, of any A with `A A^T = moment` (or `A^T A`), float64, shape [n]."""
    return torch.linalg.eigvalsh(moment.to(working_type(moment))).clamp_min(0).double().sqrt().flip(0)


def top_eigenvectors(matrix: Tensor, count: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues of a positive semi-definite matrix, the largest first, float64, shape [n, count].

    Where those of a wide matrix are few in comparison, they span a subspace that leaves out little more of its trace, see `EXCESS`.
    """
    n = len(matrix)
    matrix = matrix.to(working_type(matrix))
    found = _by_iteration(matrix, count) if n > WIDE and 4 * (count + OVERSAMPLING) <= n else None
    found = (torch.linalg.eigh(matrix).eigenvectors[:, -count:] if found is None else found).flip(1)
    if found.dtype == torch.float64:
        return found
    found = found.double()  # a Newton step makes what is orthonormal in float32 so in float64
    return 1.5 * found - 0.5 * found @ (found.T @ found)


def _by_iteration(matrix: Tensor, count: int) -> Tensor | None:
    """By subspace iteration, ascending; None where its steps do not suffice, as when eigenvalues hardly fall.

    What the eigenvalue behind a Ritz vector u of value t still gains is about `|S u - t u|^2 / (t - t')`, t' being the least of the values
    (Parlett, The Symmetric Eigenvalue Problem, 11.7); measured, the sum was 0.7 to 0.9 of the truth.
    """
    image = matrix @ torch.randn(len(matrix), count + OVERSAMPLING, generator=torch.Generator().manual_seed(count), dtype=matrix.dtype)
    trace = matrix.diagonal().sum(dtype=torch.float64)
    for _ in range(BLIND_STEPS):
        image = matrix @ _upright(image)
    for _ in range(STEPS - BLIND_STEPS):
        basis = torch.linalg.qr(image).Q
        image = matrix @ basis
        values, turn = torch.linalg.eigh(basis.T @ image)
        top, turn, least = values[-count:], turn[:, -count:], values[0]
        vectors = basis @ turn
        residual = (image @ turn - vectors * top).square().sum(0)
        gain = (residual / (top - least).clamp_min(torch.finfo(matrix.dtype).tiny)).sum(dtype=torch.float64)
        if gain <= EXCESS * (trace - top.sum(dtype=torch.float64)):
            return vectors
    return None


def _upright(vectors: Tensor) -> Tensor:
    """A basis of the same space that is far from singular, though not orthonormal: a triangular factor takes a third of a QR's time."""
    packed, swaps, _ = torch.linalg.lu_factor_ex(vectors)  # a zero among its pivots is no harm here
    order = list(range(len(vectors)))
    for i, j in enumerate(swaps.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    rows = torch.tensor(order).argsort()
    packed.tril_(-1).diagonal().fill_(1)
    return packed.T.index_select(1, rows).T
