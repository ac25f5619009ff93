"""Keeps the matrices of a model in the order that its kernels read fastest.

Knows which parameters of the page are matrices. Knows neither what a file looks like nor what the order is.
"""

import torch
from torch import Tensor

from ernie_serve.kernels.panels import Panels
from ernie_serve.kernels.reference import Matrices, Matrix
from ernie_serve.model.ernie import Ernie, Experts, Linear
from ernie_serve.model.placing import Progress, into_matrices, into_parameters
from ernie_serve.model.shards import Source
from ernie_serve.model.weights import load_weights


def load_packed(model: Ernie, source: Source, progress: Progress | None = None, *, device: torch.device) -> None:
    """Fill a model on the meta device from a checkpoint, packing each matrix as soon as it is read.

    No stack of experts is ever there twice: beside the weights themselves a few matrices take memory, and a second copy
    of a tied embedding: for a moment, or for good where rows cannot be looked up in the packed one. Raises what
    `load_weights` raises.
    """
    dtype = model.embed_tokens.dtype
    if not model.kernels.packs(dtype):
        load_weights(model, source, progress, device=device)
        return
    shapes = {name: model.get_parameter(name).shape for name in matrices(model)}
    experts: dict[str, dict[int, Tensor | Panels]] = {name: {} for name, shape in shapes.items() if len(shape) == 3}

    def keep(name: str, expert: int | None, matrix: Tensor) -> None:
        packed = model.kernels.pack(matrix)
        assert isinstance(packed, Tensor | Panels), "one matrix is packed as one"
        if expert is None:
            set_matrix(model, name, packed)
        else:
            experts[name][expert] = packed

    put = into_matrices(shapes, dtype, keep, into_parameters(model, device, frozenset(shapes)))
    load_weights(model, source, progress, device=device, put=put)
    for name, stack in experts.items():
        set_matrix(model, name, [stack[expert] for expert in range(len(stack))])
    _pack_head(model)


def pack(model: Ernie) -> None:
    """Pack a model whose parameters are filled. Needs room for one layer's experts on the way."""
    if model.kernels.packs(model.embed_tokens.dtype):
        for name in matrices(model):
            set_matrix(model, name, model.kernels.pack(model.get_parameter(name).detach()))
        _pack_head(model)


def matrices(model: Ernie) -> list[str]:
    """The parameters that are multiplied by: all projections and experts, not the embedding and the routers."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            found.append(f"{path}.weight")
        elif isinstance(module, Experts):
            found += [f"{path}.gate_up", f"{path}.down"]
    return found


def set_matrix(model: Ernie, name: str, matrix: Matrix | Matrices) -> None:
    """Put a matrix in the place of a parameter, which it then no longer is."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    delattr(module, attribute)
    setattr(module, attribute, matrix)


def _pack_head(model: Ernie) -> None:
    """Pack a tied embedding for the logits: in its place, or beside its rows where they cannot be looked up in it."""
    if model.config.tie_word_embeddings:
        packed = model.kernels.pack(model.get_parameter("embed_tokens.weight").detach())
        if isinstance(packed, Panels):
            return set_matrix(model, "embed_tokens.weight", packed)
        assert isinstance(packed, Tensor), "one matrix is packed as one"
        model.embed_tokens.head = packed
    return None
