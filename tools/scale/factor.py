"""Making a low-rank pair our way and SVD-LLM's, on the same matrix and moments in the same process, in turn."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from infoprune_export.compress.lowrank import Weighting, factorise
from infoprune_export.compress.spectra import gram
from infoprune_export.models.anatomy import Linear


def measure(d_in: int, d_out: int, rank: int, rounds: int, threads: int) -> dict[str, Any]:
    """Both procedures on matrices with decaying spectra and activations that do not fill the space evenly.

    Args:
        d_in, d_out: Sizes of the matrix.
        rank: Of both pairs.
        rounds: Matrices.
        threads: Of PyTorch.

    Returns:
        Seconds of both, `speedup`, and `error`: our whitened error over SVD-LLM's, the largest of all rounds.
    """
    torch.set_num_threads(threads)
    linear = Linear(path="x", d_in=d_in, d_out=d_out)
    ours, theirs, errors = [], [], []
    for seed in range(rounds):
        weight, moment = _draw(d_in, d_out, seed)
        side = moment if d_out > d_in else (weight.double() @ moment @ weight.double().T)
        begin = time.perf_counter()
        identity = gram(weight) if d_out > d_in else torch.eye(d_out, dtype=torch.float64)
        pair = factorise(linear, weight, None, Weighting(side, identity, torch.zeros(len(side), dtype=torch.float64)), rank)
        ours.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        first, second = svd_llm(weight, moment, rank)
        theirs.append(time.perf_counter() - begin)
        errors.append(_error(weight, pair["second"] @ pair["first"], moment) / _error(weight, second @ first, moment))
    return {
        "d_in": d_in,
        "d_out": d_out,
        "rank": rank,
        "ours_seconds": statistics.median(ours),
        "svd_llm_seconds": statistics.median(theirs),
        "speedup": statistics.median(theirs) / statistics.median(ours),
        "error": max(errors),
    }


def svd_llm(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """SVD-LLM (arXiv 2403.07378): `S = chol(C)`, SVD of `W S`, `(sqrt(s) V^T S^-1, U sqrt(s))`, in float32 as its code does."""
    identity = torch.eye(len(moment), dtype=moment.dtype)
    root = torch.linalg.cholesky(moment + 1e-6 * moment.diagonal().mean() * identity).float()
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    scale = s[:rank].sqrt()
    first = torch.linalg.solve_triangular(root, scale[:, None] * vt[:rank], upper=False, left=False)
    return first, u[:, :rank] * scale


def _draw(d_in: int, d_out: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    falling = torch.arange(1, d_in + 1).float()
    inputs = torch.randn(2 * d_in, d_in, generator=generator) * falling**-0.5
    turn = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator)).Q
    inputs = inputs @ turn
    weight = torch.randn(d_out, d_in, generator=generator) * falling**-0.3 @ turn.T / d_in**0.5
    return weight, (inputs.T @ inputs / len(inputs)).double()


def _error(weight: Tensor, approximation: Tensor, moment: Tensor) -> float:
    left = (weight - approximation).double()
    return float(((left @ moment) * left).sum()) ** 0.5
