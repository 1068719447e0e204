"""The linear maps of a plain Hugging Face model by site: which module is which, and which of them read the same tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp.errors import InputError
from interp.models import weights
from interp.models.checkpoint import Shape
from interp.models.hooked import HookedModel
from interp.models.pair import ModelPair
from interp.models.wrap import structure_copy
from interp.sites import Site

if TYPE_CHECKING:
    from interp.models.editing import Editing


def plain_copy(model: HookedModel) -> Any:
    """The plain model with the tensors in force, in evaluation mode, with parameters that no gradient goes to.

    Modules are copies, tensors are shared: whatever is done to flags or hooks of the copy leaves the model alone.

    Raises:
        InputError: something beside weights is changed now, which the plain model does not know.
    """
    if any(actions for _, actions in model._active):
        raise InputError(f"{model.name} has patches or activation edits in force; factors take edits of weights only")
    wrapped = model.wrapped
    wrapped.refresh()
    plain: Any = structure_copy(wrapped.source).eval()
    for name, _ in list(plain.named_parameters(remove_duplicate=False)):
        path, _, last = name.rpartition(".")
        plain.get_submodule(path)._parameters[last] = nn.Parameter(wrapped.parameter(name).detach(), requires_grad=False)
    bias = wrapped.unembedding._parameters.get("bias")  # an edit may have brought one
    if bias is not None:
        plain.get_output_embeddings()._parameters["bias"] = nn.Parameter(bias.detach(), requires_grad=False)
    return plain


def matrix_sites(model: HookedModel, modules: Sequence[str] | None, layers: Sequence[int] | None) -> list[Site]:
    """The matrices of blocks that are asked for, in the order of the model; None is all.

    Raises:
        InputError: no such matrix or layer; the message lists those that exist.
    """
    shape = model.shape
    if not weights.known(shape):
        raise InputError(f"the matrices of {shape.architecture} are not known; known: {', '.join(sorted(weights.FAMILIES))}")
    known = weights.modules(shape)
    asked = known if modules is None else listed(modules, "modules")
    for name in asked:
        if name in ("W_U", "W_E"):
            tied = "they are one tensor here (tied), read at both ends; " if shape.tied else ""
            raise InputError(f"{name} has no factors: {tied}the matrices within blocks have some: {', '.join(known)}")
        if name not in known:
            raise InputError(f"{model.name} has no {name}; its matrices are {', '.join(known)}")
    numbers = range(shape.n_layers) if layers is None else listed(layers, "layers")
    for layer in numbers:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or layer not in range(shape.n_layers):
            raise InputError(f"{model.name} has no layer {layer!r}; it has 0 to {shape.n_layers - 1}")
    if not asked or not numbers:
        raise InputError("no matrices were asked for: modules or layers are empty")
    return [Site(m, layer) for layer in sorted(set(map(int, numbers))) for m in known if m in asked]


def listed(values: Any, what: str) -> list[Any]:
    """Layers or modules as they are given: one of them, or several.

    Raises:
        InputError: what is neither.
    """
    if isinstance(values, int | str):
        return [values]
    if not isinstance(values, Iterable):
        raise InputError(f"{what} is one of them or a list, such as {'0,2' if what == 'layers' else 'W_in,W_out'}, but {values!r} came")
    return list(values)


def check_one_model(model: object, what: str) -> None:
    """Refuse what is no single loaded model.

    Raises:
        InputError: a pair, a name, or something else.
    """
    if not isinstance(model, HookedModel):
        came = f"{model!r}" if isinstance(model, str) else f"a {type(model).__name__}"
        which = "pair.base or pair.tuned" if isinstance(model, ModelPair) else "what HookedModel.load returns"
        raise InputError(f"{what} takes one model, {which}, but {came} came")


def check_apart(model: Editing, sites: Sequence[Site]) -> None:
    """Refuse matrices that are one tensor with another matrix of the model: a curvature, or a change, of one is that of both.

    Raises:
        InputError: two blocks share one of these; both are named.
    """
    shape, held = model.shape, model.wrapped
    names = [name for name, _ in held.source.named_parameters(remove_duplicate=False)]
    first: dict[tuple[torch.device, int], Site] = {}
    for site in (Site(m, layer) for layer in range(shape.n_layers) for m in weights.modules(shape)):
        for key, view in weights.locate(site, names, shape):
            matrix = view(held.parameter(key).detach())
            other = first.setdefault((matrix.device, matrix.data_ptr()), site)
            if other != site and {other, site} & set(sites):
                both = f"{other} and {site} of {model.name} are one tensor (tied)"
                raise InputError(f"{both}, so that neither has a curvature or a change of its own; choose modules or layers without them")


@dataclass(frozen=True, eq=False)
class Linear:
    """A module that is one linear map, or several side by side.

    Attributes:
        name: of the module.
        module: itself.
        outputs: the sites wanted of it, with the number of their columns.
        d_in: dimensions of its input.
        share: name of the input: the first wanted site of all modules that read the same tensor.
        records: whether it is the first of these.
    """

    name: str
    module: nn.Module
    outputs: Mapping[Site, int]
    d_in: int
    share: str
    records: bool
    shape: Shape

    def split(self, out: Tensor) -> dict[Site, Tensor]:
        """The output (or its gradient) [row, columns] by site, those that are wanted."""
        return {site: x for site, x in weights.split_columns(self.name, out, self.shape).items() if site in self.outputs}


def linear_maps(plain: Any, wanted: Sequence[Site], shape: Shape) -> list[Linear]:
    """The modules that hold the wanted matrices, in the order in which the model runs them.

    Which of them read one tensor is found by running a short prompt.

    Raises:
        InputError: a matrix is in no module, or in one that runs several times in a pass.
    """
    left = set(wanted)
    found = {name: module for name, module in plain.named_modules() if left & set(weights.module_sites(name, shape))}
    ran: list[tuple[str, Tensor]] = []  # with the tensors themselves, or an id could be used again
    handles = [m.register_forward_pre_hook(lambda _, args, name=name: ran.append((name, args[0]))) for name, m in found.items()]
    try:
        with torch.no_grad():
            device = plain.get_input_embeddings().weight.device
            plain(input_ids=torch.zeros(1, min(2, shape.n_ctx), dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    maps: list[Linear] = []
    shares: dict[int, str] = {}
    for name, x in ran:
        sites = [site for site in weights.module_sites(name, shape) if site in left]
        if not sites:
            raise InputError(f"the module {name} runs more than once in a pass; its factors would mix several places")
        left -= set(sites)
        first = id(x) not in shares
        share = shares.setdefault(id(x), str(sites[0]))
        outputs = {site: weights.weight_shape(site.component, shape)[-1] for site in sites}
        maps.append(Linear(name, found[name], outputs, x.shape[-1], share, first, shape))
    if left:
        missing = ", ".join(sorted(map(str, left)))
        raise InputError(f"no module of the model computes {missing}, or it did not run")
    return maps
