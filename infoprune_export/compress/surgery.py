"""Surgery: a plan and its factors applied to a PyTorch model, in place; heads and ranks are really gone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from infoprune_export.compress.lowrank import LowRankLinear
from infoprune_export.errors import InputError
from infoprune_export.models.anatomy import ATTENTION_ROLES, Attention, Layer, Linear, site
from infoprune_export.plans import Factors, Plan, projector_key


def apply_plan(model: nn.Module, plan: Plan, factors: Factors) -> None:
    """Removes what the plan removes and puts the factors in place.

    Args:
        model: The original; changed in place.
        plan: What to keep.
        factors: Contents of factors.safetensors. A dense map that is absent is taken, or sliced, from the original;
            a missing low-rank pair is an error.

    Raises:
        InputError: the plan does not fit the model, or factors are missing or of the wrong shape.
    """
    for layer in plan.anatomy.layers():
        apply_to_layer(model, layer, plan, factors)
    apply_to_projector(model, plan, factors)


def apply_to_layer(model: nn.Module, layer: Layer, plan: Plan, factors: Factors) -> None:
    """`apply_plan` for one layer, whose weights are in memory."""
    _check(model, layer)
    _prune(model, layer, plan)
    for role, rank in plan.decision(layer.tower, layer.index).ranks.items():
        if rank is not None:
            _split(model, layer, role, rank, factors)
    for role in (*ATTENTION_ROLES, *layer.ffn.matrices):
        _replace(model, layer.linear(role), site(layer.tower, layer.index, role), factors)


def apply_to_projector(model: nn.Module, plan: Plan, factors: Factors) -> None:
    """`apply_plan` for what lies between the towers, which training may have changed."""
    for i, linear in enumerate(plan.anatomy.projector):
        _replace(model, linear, projector_key(i), factors)


def shape_as_planned(model: nn.Module, plan: Plan) -> None:
    """Gives a freshly built model the plan's shapes; its weights are loaded afterwards."""
    for layer in plan.anatomy.layers():
        decision = plan.decision(layer.tower, layer.index)
        _check(model, layer)
        _prune(model, layer, plan)
        for role, rank in decision.ranks.items():
            if rank is not None:
                old = model.get_submodule(layer.linear(role).path)
                with old.weight.device:
                    new = LowRankLinear(old.in_features, old.out_features, rank, old.bias is not None, old.weight.dtype)
                model.set_submodule(layer.linear(role).path, new)


def head_rows(attention: Attention, kept: list[int]) -> list[int]:
    """Rows (of q, k or v) or columns (of o) that belong to kept heads or groups."""
    return [h * attention.head_dim + i for h in kept for i in range(attention.head_dim)]


def prune_heads(model: nn.Module, attention: Attention, heads: list[int], kv_groups: list[int]) -> None:
    """Keeps some query heads and KV groups of one attention block; the output projection is sliced."""
    if len(heads) == attention.heads and len(kv_groups) == attention.kv_groups:
        return
    for linear, kept in ((attention.q, heads), (attention.k, kv_groups), (attention.v, kv_groups)):
        old = model.get_submodule(linear.path)
        rows = head_rows(attention, kept)
        bias = None if old.bias is None else old.bias[rows]
        model.set_submodule(linear.path, dense(old.weight[rows], bias))
    old = model.get_submodule(attention.o.path)
    model.set_submodule(attention.o.path, dense(old.weight[:, head_rows(attention, heads)], old.bias))
    module = model.get_submodule(attention.path)
    sizes = {
        "num_heads": len(heads),
        "num_attention_heads": len(heads),
        "num_key_value_heads": len(kv_groups),
        "num_key_value_groups": len(heads) // len(kv_groups),
        "all_head_size": len(heads) * attention.head_dim,
    }
    for name, value in sizes.items():
        if hasattr(module, name):
            setattr(module, name, value)


def _prune(model: nn.Module, layer: Layer, plan: Plan) -> None:
    """Keeps a layer's planned heads; an output projection that is to gain a bias gets one of zeros."""
    decision, path = plan.decision(layer.tower, layer.index), layer.attention.o.path
    prune_heads(model, layer.attention, decision.heads, decision.kv_groups)
    if plan.gains_bias(layer):
        weight = model.get_submodule(path).weight
        model.set_submodule(path, dense(weight, weight.new_zeros(len(weight))))


def dense(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear map that owns copies of its weights."""
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype, device="meta")
    new.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return new


def low_rank(first: Tensor, second: Tensor, bias: Tensor | None) -> LowRankLinear:
    """A frozen low-rank pair."""
    pair = LowRankLinear.__new__(LowRankLinear)
    nn.Module.__init__(pair)
    pair.first, pair.second = dense(first, None), dense(second, bias)
    return pair


def _check(model: nn.Module, layer: Layer) -> None:
    for role in ("q", "k", "v", "o", *layer.ffn.matrices):
        linear = layer.linear(role)
        where = f"plan, {site(layer.tower, layer.index, role)}"
        try:
            module = model.get_submodule(linear.path)
        except AttributeError:
            raise InputError(f"the model has no {linear.path}", where=where, mend="use the plan with the model it was made for") from None
        if not isinstance(module, nn.Linear) or module.weight.shape != (linear.d_out, linear.d_in):
            raise InputError(
                f"{linear.path} is not a {linear.d_out} x {linear.d_in} map here", where=where, mend="apply plans to the original"
            )


def _replace(model: nn.Module, linear: Linear, key: str, factors: Factors) -> None:
    """Gives a dense map the weights that the factors have for it, if any."""
    if f"{key}.weight" in factors:
        old = model.get_submodule(linear.path)
        weight = _factor(factors, f"{key}.weight", tuple(old.weight.shape)).to(old.weight)
        bias = None if old.bias is None else _factor(factors, f"{key}.bias", tuple(old.bias.shape)).to(old.bias)
        model.set_submodule(linear.path, dense(weight, bias))


def _split(model: nn.Module, layer: Layer, role: str, rank: int, factors: Factors) -> None:
    linear: Linear = layer.linear(role)
    key, old = site(layer.tower, layer.index, role), model.get_submodule(linear.path)
    first = _factor(factors, f"{key}.first", (rank, linear.d_in)).to(old.weight)
    second = _factor(factors, f"{key}.second", (linear.d_out, rank)).to(old.weight)
    bias = _factor(factors, f"{key}.bias", (linear.d_out,)).to(old.weight) if linear.bias else None
    model.set_submodule(linear.path, low_rank(first, second, bias))


def _factor(factors: Factors, name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in factors:
        raise InputError(
            f"{name} is missing", where="factors.safetensors", mend="make the factors again: infoprune-export apply PLAN --to MODEL"
        )
    array = factors[name]
    if array.shape != shape:
        raise InputError(
            f"{name} has shape {list(array.shape)}, the plan asks for {list(shape)}",
            where="factors.safetensors",
            mend="after editing a plan's ranks or heads, delete factors_sha256 so that apply makes its factors again",
        )
    return torch.from_numpy(np.array(array))
