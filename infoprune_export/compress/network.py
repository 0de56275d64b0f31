"""The smaller network on disk: safetensors in, safetensors out, its shapes from the plan beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from infoprune_export.compress.surgery import apply_to_layer, apply_to_projector, shape_as_planned
from infoprune_export.errors import InputError
from infoprune_export.models.streamed import at_hand, file_shelf, lay_out, lent_paths, load_all, skeleton
from infoprune_export.plans import Factors, Plan
from infoprune_export.tensors import Shapes, TensorFile, write_tensors

WEIGHTS = Path("model") / "model.safetensors"
FLOAT = np.dtype(np.float32)


def open_network(root: Path) -> nn.Module:
    """The compressed PyTorch model of a bundle (or of what `apply` wrote), laid out: layers get their weights when at hand.

    Raises:
        InputError: the weights do not fit the plan.
    """
    plan, file = Plan.read(root / "plan.json"), TensorFile(root / WEIGHTS)
    model = skeleton(root)
    shape_as_planned(model, plan)
    expected = _shapes(model)
    wrong = [n for n in {*expected} ^ {*file} if n not in expected or n not in file]
    wrong += [n for n in expected if n in file and file[n].shape != expected[n][1]]
    if wrong:
        raise InputError(f"{min(wrong)} does not fit the plan", where=root / WEIGHTS, mend="fetch or make the bundle again")
    model.infoprune_plan = plan
    return lay_out(model, file_shelf(file), plan.anatomy)


def load_network(root: Path) -> nn.Module:
    """The compressed PyTorch model of a bundle with all its weights, the very ones that were saved; see `open_network`."""
    return load_all(open_network(root))


def save_weights(model: nn.Module, root: Path) -> None:
    """Writes the weights of a network that is in memory; tied ones are written once."""
    state = model.state_dict()
    shapes = _shapes(model)
    write_tensors(root / WEIGHTS, shapes, ((name, _array(state[name])) for name in shapes))


def save_compressed(original: nn.Module, plan: Plan, factors: Factors, root: Path) -> None:
    """Writes the weights of the network that a plan and its factors make of an original, one layer after the other.

    Args:
        original: Laid out; used up.
        plan: What to keep.
        factors: Contents of factors.safetensors.
        root: Gets the weights; processor files are expected there.
    """
    small = skeleton(original.config)
    shape_as_planned(small, plan)
    shapes = _shapes(small)
    apply_to_projector(original, plan, factors)
    write_tensors(root / WEIGHTS, shapes, _smaller(original, plan, factors, shapes))


def _smaller(original: nn.Module, plan: Plan, factors: Factors, names: Shapes) -> Iterator[tuple[str, np.ndarray]]:
    """The weights of the smaller network in the order of `names`, which goes through layers one by one."""
    layers, paths = {x.path: x for x in plan.anatomy.layers()}, lent_paths(plan.anatomy)
    current = None
    with ExitStack() as lent:
        for name in names:
            at = next((path for path in paths if name.startswith(f"{path}.")), None)
            if at != current:
                lent.close()
                current = at
                if at is not None:
                    lent.enter_context(at_hand(original, at))
                if at in layers:
                    apply_to_layer(original, layers[at], plan, factors)
            yield name, _array(original.get_parameter_or_buffer(name))


def _shapes(model: nn.Module) -> Shapes:
    """Of every weight, in the order of the model; tied ones once."""
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    return {name: (FLOAT, tuple(t.shape)) for name, t in model.state_dict().items() if name not in tied}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
