"""The three networks that become graphs, cut out of a LLaVA-like model.

`split` copies the model's module tree without its weights, puts modules that trace cleanly in the place of
linear maps, rotary embeddings and attention functions, and hangs the parts into three wrappers whose inputs
and outputs are the graphs' own. The caller's model is left as it was. Which weight of the model goes where is
what `Component.weights` says; they are written into the graphs' files one by one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from infoprune_export.bundle import DECODER, EMBED, VISION
from infoprune_export.errors import InputError
from infoprune_export.graph.working_type import STAND_IN
from infoprune_export.models.anatomy import Anatomy
from infoprune_export.models.families import FAMILIES

ATTENTION = "infoprune_export"
OPSET = 23
FIXED_ROTARY = ("default", "linear", "llama3", "yarn", "proportional")
"""Rotary embeddings whose frequencies do not depend on the sequence's length."""


class Component(nn.Module):
    """A network that becomes one graph.

    Attributes:
        paths: Own attribute to the module path of the model that its weights are named after.
    """

    def __init__(self, model: nn.Module, **paths: str):
        super().__init__()
        self.paths = paths
        for name, path in paths.items():
            self.add_module(name, model.get_submodule(path))

    def weights(self) -> dict[str, tuple[str, bool]]:
        """Own parameter to the name that it has in the Hugging Face model, and whether it is that one's transpose."""
        found = {}
        for name, _ in self.named_parameters():
            part, _, rest = name.partition(".")
            owner = self.get_submodule(name.rpartition(".")[0])
            found[name] = (f"{self.paths[part]}.{rest}", isinstance(owner, Matrix) and name.endswith(".weight"))
        return found


class VisionEncoder(Component):
    """pixel_values [images, channels, H, W] -> image_features [images, tokens, hidden].

    Layers past the last feature layer are traced like the rest and fall out of the graph, because nothing uses them.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy):
        super().__init__(model, tower=anatomy.vision.path, projector=FAMILIES[anatomy.family].projector)
        wanted = model.config.vision_feature_layer
        self.feature_layers = [wanted] if isinstance(wanted, int) else list(wanted)
        self.first_token = int(model.config.vision_feature_select_strategy == "default")

    def forward(self, pixel_values: Tensor) -> Tensor:
        states = self.tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        return self.projector(torch.cat([states[i][:, self.first_token :] for i in self.feature_layers], dim=-1))


class TokenEmbedding(Component):
    """input_ids [batch, sequence] int64 -> inputs_embeds [batch, sequence, hidden]."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy):
        super().__init__(model, embedding=anatomy.embed_path)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embedding(input_ids)


class Decoder(Component):
    """Language model with its cache as plain inputs and outputs, and the logits of the last position."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy):
        super().__init__(model, language=anatomy.language.path, head=anatomy.head_path)
        if isinstance(self.head, TiedHead):
            self.paths["head"] = anatomy.embed_path  # the name under which the table is stored already
        self.windows = _windows(self.language.config)

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """One step.

        Args:
            inputs_embeds: [batch, sequence, hidden].
            attention_mask: [batch, past + sequence] int64, 0 where padded (on the left).
            position_ids: [batch, sequence] int64.
            past: Keys and values of each layer, [batch, kv_groups, past, head_dim].

        Returns:
            Logits [batch, 1, vocab] and the keys and values with this step's appended.
        """
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        masks = {kind: _mask(attention_mask, inputs_embeds.shape[1], window) for kind, window in self.windows.items()}
        hidden = self.language(
            inputs_embeds=inputs_embeds,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.head(hidden[:, -1:]), [(layer.keys, layer.values) for layer in cache.layers]


class Matrix(nn.Module):
    """A linear map with its weight held as [d_in, d_out], the way an ONNX MatMul takes it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class TiedHead(nn.Module):
    """The output head on the embedding's own table [vocab, hidden], so that both graphs can share it on disk."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x[:, -1], self.weight] if self.bias is None else [x[:, -1], self.weight, self.bias]
        shape = (x.shape[0], self.weight.shape[0])
        return torch.onnx.ops.symbolic("Gemm", inputs, {"transB": 1}, dtype=x.dtype, shape=shape, version=13).unsqueeze(1)


class Rotary(nn.Module):
    """Cosines and sines of the positions, in float32 whatever the graph's type, without a matrix product.

    (Some versions of transformers multiply frequencies and positions as matrices, and converting a model to half
    precision rounds its frequencies.)
    """

    def __init__(self, original: nn.Module, where: str):
        super().__init__()
        kind = getattr(original, "rope_type", "default")
        if kind not in FIXED_ROTARY:
            raise InputError(f"rotary embedding of type {kind!r} changes with the sequence's length and has no graph", where=where)
        self.inv_freq = nn.Buffer(original.inv_freq.detach().float(), persistent=False)
        self.scaling = float(original.attention_scaling)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.scaling != 1:
            cos, sin = cos * self.scaling, sin * self.scaling
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def split(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, Component]:
    """The three components of a model, in the stand-in type and ready to be traced; the model itself stays untouched.

    Args:
        model: The model, original or compressed.
        anatomy: Of the original.

    Returns:
        Component name to module, its parameters on PyTorch's `meta` device.

    Raises:
        InputError: for a rotary embedding or an attention pattern that no graph can express.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta", STAND_IN), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    if (shelf := getattr(model, "infoprune_shelf", None)) is not None:
        memo[id(shelf)] = shelf
    model = copy.deepcopy(model, memo).eval().requires_grad_(False)
    AttentionInterface.register(ATTENTION, _attention)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = ATTENTION
    table = model.get_submodule(anatomy.embed_path).weight
    tied = model.get_submodule(anatomy.head_path).weight is table
    _replace(model, anatomy.head_path if tied else None)
    _convert_buffers(model)
    return {VISION: VisionEncoder(model, anatomy), EMBED: TokenEmbedding(model, anatomy), DECODER: Decoder(model, anatomy)}


def _replace(model: nn.Module, tied_head: str | None) -> None:
    for name, module in list(model.named_modules()):
        if name == tied_head:
            model.set_submodule(name, TiedHead(module))
        elif isinstance(module, nn.Linear):
            model.set_submodule(name, Matrix(module))
        elif isinstance(getattr(module, "inv_freq", None), Tensor):
            model.set_submodule(name, Rotary(module, name))


def _convert_buffers(model: nn.Module) -> None:
    """Converts what is neither a weight nor the frequencies of a rotary embedding."""
    for module in model.modules():
        if not isinstance(module, Rotary):
            for name, b in list(module.named_buffers(recurse=False)):
                if b.is_floating_point():
                    setattr(module, name, b.to(STAND_IN))


def _windows(config: Any) -> dict[str, int | None]:
    """Kinds of attention that the language model's layers use, each with its window (None = all that is past)."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise InputError("attention with a soft cap has no graph", where=type(config).__name__)
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise InputError(f"attention of kind {min(unknown)!r} has no graph", where=type(config).__name__)
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}


def _mask(attention_mask: Tensor, sequence: int, window: int | None) -> Tensor:
    """Who may look at whom, [batch, 1, sequence, past + sequence] bool.

    Every position may look at itself, even padding: a row without any key would be NaN after the softmax, and
    NaN times the weight 0 that others give it is NaN still.
    """
    total = attention_mask.shape[1]
    keys = torch.arange(total, device=attention_mask.device)
    queries = torch.arange(sequence, device=attention_mask.device)[:, None] + (total - sequence)
    seen = keys <= queries
    if window is not None:
        seen = seen & (keys > queries - window)
    return (seen & attention_mask.bool()[:, None, None, :]) | (keys == queries)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as one ONNX node, which groups query heads itself and leaves keys and values unrepeated."""
    # Opset 23's node rather than MatMul and Softmax: ONNX Runtime has one kernel for it in fp32 and fp16 (measured to sum in fp32 over
    # 20,000 keys), TensorRT-RTX a dedicated one in fp16. No `softmax_precision`: TensorRT refuses it, ONNX Runtime does not need it.
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    inputs = (query, key, value) if attention_mask is None else (query, key, value, attention_mask)
    y = torch.onnx.ops.symbolic("Attention", inputs, {"scale": scale}, dtype=query.dtype, shape=query.shape, version=OPSET)
    return y.transpose(1, 2), None
