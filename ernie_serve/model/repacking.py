"""Puts packed matrices in a model's places in the order that its kernels read, which is not the packed one.

Knows which parameters are multiplied by and in which rows are looked up. Knows neither that order nor any file.
"""

from collections.abc import Mapping

from ernie_serve.kernels import nibbles
from ernie_serve.kernels.nibbles import Nibbles
from ernie_serve.kernels.packed import Packed
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.forms import Form, Kept
from ernie_serve.model.packing import matrices, set_matrix
from ernie_serve.model.recipes import Quantization


def is_repacked(quantization: Quantization, kernels: ReferenceKernels) -> bool:
    """Whether these kernels read matrices of this quantization in an order of their own. What a GPU reads has none."""
    return quantization.device == "cpu" and kernels.repacks()


class Repacked:
    """Takes packed matrices one by one, from several threads; each is repacked, so the caller may let it go.

    Stacks are made before, at their full size, so that what comes and goes leaves no holes between their matrices. The
    embedding is copied as it is, for its rows; where the head is tied there is a repacked one beside it.
    """

    def __init__(self, model: Ernie, bits: Mapping[str, Form]) -> None:
        self._model = model
        self._multiplied = frozenset(matrices(model))
        self._whole: dict[str, Packed | Nibbles] = {}
        self._stacks: dict[str, Nibbles] = {
            name: nibbles.empty(shape[1], shape[2], form, shape[0])
            for name, form in bits.items()
            if len(shape := model.get_parameter(name).shape) == 3 and isinstance(form, int)
        }
        self._head: Nibbles | None = None

    def keep(self, name: str, expert: int | None, packed: Kept) -> None:
        """Repack the matrix of a parameter, or of one expert of it."""
        assert isinstance(packed, Packed), "what a GPU reads is not repacked"
        if expert is not None:
            self._stacks[name][expert].copy_(self._repack(packed))
        elif name in self._multiplied:
            self._whole[name] = self._repack(packed)
        else:
            self._whole[name] = Packed(packed.data.clone(), packed.row_scales.clone(), packed.bits, packed.rows)
            if self._model.config.tie_word_embeddings:
                self._head = self._repack(packed)

    def finish(self) -> None:
        """Put all of them into the model."""
        for name, matrix in (self._whole | self._stacks).items():
            set_matrix(self._model, name, matrix)
        self._model.embed_tokens.head = self._head

    def _repack(self, packed: Packed) -> Nibbles:
        made = self._model.kernels.repack(packed)
        assert isinstance(made, Nibbles), "kernels that repack have an order of their own"
        return made
