"""Finds a model's anatomy: one small entry per family, everything below it found by role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infoprune_export.errors import InputError
from infoprune_export.models.anatomy import Anatomy, Attention, FeedForward, Layer, Linear, Tower, VisionGeometry

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Family:
    """Module paths of the parts of a family's model."""

    vision: str
    projector: str
    language: str
    head: str


FAMILIES: dict[str, Family] = {
    "llava": Family(vision="model.vision_tower", projector="model.multi_modal_projector", language="model.language_model", head="lm_head"),
}
"""`model_type` of a config to its family."""

_ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query"),
    "k": ("k_proj", "key"),
    "v": ("v_proj", "value"),
    "o": ("o_proj", "out_proj", "dense"),
    "gate": ("gate_proj",),
    "up": ("up_proj", "fc1"),
    "down": ("down_proj", "fc2"),
}


def check_family(config: dict[str, Any], where: object) -> str:
    """The family of a parsed config.json.

    Raises:
        InputError: for a model type without a known anatomy.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(
            f"model_type {model_type!r} has no known anatomy", where=where, mend=f"families known: {', '.join(sorted(FAMILIES))}"
        )
    return model_type


def find_anatomy(model: nn.Module) -> Anatomy:
    """Describes a model by the roles of its modules.

    Args:
        model: A Hugging Face vision-language model, uncompressed, on any device (`meta` too).

    Raises:
        InputError: for an unknown family, or a layer whose projections are not found.
    """
    config = model.config
    name = check_family(config.to_dict(), type(model).__name__)
    family = FAMILIES[name]
    vision_module, language_module = model.get_submodule(family.vision), model.get_submodule(family.language)
    vision = _tower("vision", vision_module, family.vision, config.vision_config.hidden_size)
    vision = _cut_unused(vision, feature_layers(config))
    language = _tower("language", language_module, family.language, config.text_config.hidden_size)
    head = model.get_submodule(family.head)
    projector = model.get_submodule(family.projector)
    return Anatomy(
        family=name,
        vision=vision,
        language=language,
        geometry=_geometry(vision_module, config),
        projector=tuple(_linear(m, f"{family.projector}.{path}") for path, m in projector.named_modules() if _is_linear(m)),
        vocab_size=head.out_features,
        embed_path=f"{family.language}.{_name_of(language_module, language_module.get_input_embeddings())}",
        head_path=family.head,
    )


def _tower(name: str, module: nn.Module, path: str, hidden: int) -> Tower:
    stack_path, stack = _layer_stack(module, path)
    layers = tuple(_layer(name, i, f"{stack_path}.{i}", m) for i, m in enumerate(stack))
    return Tower(name=name, path=path, hidden=hidden, layers=layers)


def _layer_stack(module: nn.Module, path: str) -> tuple[str, nn.Module]:
    """The longest module list whose members have attention projections."""
    from torch import nn

    stacks = [
        (f"{path}.{n}", m)
        for n, m in module.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) and _find(m[0], "q") and _find(m[0], "o")
    ]
    if not stacks:
        raise InputError("no stack of layers with q, k, v and output projections found", where=path)
    return max(stacks, key=lambda s: len(s[1]))


def _layer(tower: str, index: int, path: str, module: nn.Module) -> Layer:
    found = {role: _find(module, role) for role in _ROLES}
    missing = [role for role, m in found.items() if m is None and role != "gate"]
    if missing:
        raise InputError(f"projections not found by role: {', '.join(missing)}", where=path)
    linears = {role: _linear(m[1], f"{path}.{m[0]}") for role, m in found.items() if m}
    attention_path = linears["q"].path.rpartition(".")[0]
    attention = module.get_submodule(attention_path.removeprefix(f"{path}."))
    head_dim = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
    if not isinstance(head_dim, int) or linears["q"].d_out % head_dim or linears["k"].d_out % head_dim:
        raise InputError(f"head size {head_dim!r} does not divide the projections", where=attention_path)
    return Layer(
        tower=tower,
        index=index,
        path=path,
        attention=Attention(
            path=attention_path,
            heads=linears["q"].d_out // head_dim,
            kv_groups=linears["k"].d_out // head_dim,
            head_dim=head_dim,
            **{role: linears[role] for role in "qkvo"},
        ),
        ffn=FeedForward(path=linears["up"].path.rpartition(".")[0], gate=linears.get("gate"), up=linears["up"], down=linears["down"]),
    )


def _find(layer: nn.Module, role: str) -> tuple[str, nn.Module] | None:
    """Name and module of the linear map in `layer` that plays a role."""
    return next(((n, m) for n, m in layer.named_modules() if _is_linear(m) and n.rpartition(".")[2] in _ROLES[role]), None)


def _is_linear(module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)


def _linear(module: nn.Module, path: str) -> Linear:
    return Linear(path=path, d_in=module.in_features, d_out=module.out_features, bias=module.bias is not None)


def _name_of(parent: nn.Module, child: nn.Module) -> str:
    return next(n for n, m in parent.named_modules() if m is child)


def _cut_unused(tower: Tower, feature_layers: list[int]) -> Tower:
    """Leaves out the layers past the deepest one that feeds the projector."""
    used = max(feature_layers) + 1
    return tower.model_copy(update={"layers": tower.layers[:used], "unused_layers": len(tower.layers) - used})


def feature_layers(config: Any) -> list[int]:
    """Indices of the vision layers whose outputs the projector takes, ascending; -1 for the embedding in front of the first.

    `hidden_states[0]` is the embedding, so index i of a config is the output of the first i layers.
    """
    depth, wanted = config.vision_config.num_hidden_layers, config.vision_feature_layer
    return sorted({(i if i >= 0 else depth + 1 + i) - 1 for i in ([wanted] if isinstance(wanted, int) else wanted)})


def _geometry(vision: nn.Module, config: Any) -> VisionGeometry:
    tower = config.vision_config
    patches = (tower.image_size // tower.patch_size) ** 2
    # Class and register tokens are parameters of the embedding, whatever the tower is called.
    extra = 0
    for name, parameter in vision.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("class_embedding", "cls_token"):
            extra += 1
        elif leaf == "register_tokens":
            extra += parameter.shape[1]
    drops_first = config.vision_feature_select_strategy == "default"
    return VisionGeometry(
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        channels=getattr(tower, "num_channels", 3),
        tokens=patches + extra,
        image_tokens=patches + extra - int(drops_first),
    )
