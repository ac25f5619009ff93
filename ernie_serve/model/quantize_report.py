"""How far quantized weights are from those of the checkpoint: matrix by matrix, and in what the network says.

Knows matrices, logits and distances. Knows nothing of files or of how numbers are shown.
"""

import threading
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie_serve.kernels import packed
from ernie_serve.kernels.layout import Layout, Span
from ernie_serve.kernels.packed import Packed
from ernie_serve.kernels.quantized import Quantized
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.forms import Form, Kept, Quantize
from ernie_serve.model.recipes import MatrixClass, class_of

_BLOCKS = 8  # of 8 rows, and one more, measured of a matrix: each row is rounded by itself
_MATRICES = 16  # of a class


@dataclass(frozen=True, slots=True)
class MatrixError:
    """Distance of rounded weights over the size of the weights, over all matrices of a class that were measured.

    `plain` is what rounding by the largest magnitude of each group would give, at the same size; a GPU's formats are
    rounded so.
    """

    kind: MatrixClass
    bits: Form
    num_matrices: int
    written: float
    plain: float


@dataclass(frozen=True, slots=True)
class LogitError:
    """Distance of two models' predictions over some tokens.

    `divergence` is the mean of KL(original || quantized) in nats, `worst` its largest, `agreement` the share of tokens
    after which both think the same token the likeliest.
    """

    what: str
    num_tokens: int
    divergence: float
    worst: float
    agreement: float


class Measured:
    """Quantizes as the function it is given does, and measures some of the matrices. Safe for threads."""

    def __init__(self, quantize: Quantize) -> None:
        self._quantize = quantize
        self._lock = threading.Lock()
        self._found: dict[tuple[MatrixClass, Form], list[tuple[float, float, float]]] = defaultdict(list)

    def __call__(self, name: str, matrix: Tensor, bits: Form) -> Kept:
        """The quantized matrix of a parameter."""
        made = self._quantize(name, matrix, bits)
        kind = class_of(name)
        assert kind is not None, f"{name} is no matrix"
        with self._lock:
            if len(self._found[kind, bits]) >= _MATRICES:
                return made
        last = matrix.shape[0] // packed.ROWS - 1
        blocks = torch.tensor(sorted({last * each // _BLOCKS for each in range(_BLOCKS + 1)}))
        rows = (blocks[:, None] * packed.ROWS + torch.arange(packed.ROWS)).flatten()
        weights = matrix[rows].float()
        if isinstance(made, Packed):
            scales = made.row_scales.view(-1, packed.ROWS)[blocks].flatten()
            ours = Packed(made.data[blocks], scales, made.bits, len(rows)).dequantized()
            largest = packed.quantize(weights, made.bits, search=False).dequantized()
        else:
            data = made.data.view(torch.uint8)[rows].view(made.data.dtype)
            ours = largest = Quantized(data, made.scales[rows], made.format).dequantized()
        size, written, plain = (
            float(each.double().square().sum()) for each in (weights, ours - weights, largest - weights)
        )
        with self._lock:
            self._found[kind, bits].append((size, written, plain))
        return made

    @property
    def errors(self) -> list[MatrixError]:
        """One for each class, in no order of matrices."""
        found = []
        for (kind, bits), squares in self._found.items():
            size, written, plain = (sum(column) for column in zip(*squares, strict=True))
            size = max(size, 1e-30)
            found.append(MatrixError(kind, bits, len(squares), (written / size) ** 0.5, (plain / size) ** 0.5))
        return sorted(found, key=lambda each: each.kind)


@torch.inference_mode()
def logit_errors(original: Ernie, quantized: Ernie, num_tokens: int, num_valid_ids: int) -> list[LogitError]:
    """Compare two models on a text that the original says itself, by chance, and on tokens without any sense."""
    chance = torch.Generator().manual_seed(21)
    vocabulary = min(num_valid_ids, original.config.vocab_size)
    senseless = torch.randint(0, vocabulary, (num_tokens,), generator=chance)
    texts = {"its own text": _say(original, num_tokens, vocabulary, chance), "random tokens": senseless}
    found = []
    for what, ids in texts.items():
        left, right = (_Pass(model, num_tokens)(ids)[:, :vocabulary].float() for model in (original, quantized))
        left, right = left.log_softmax(-1), right.log_softmax(-1)
        divergences = (left.exp() * (left - right)).sum(-1).clamp(min=0)
        same = (left.argmax(-1) == right.argmax(-1)).float().mean()
        found.append(LogitError(what, num_tokens, float(divergences.mean()), float(divergences.max()), float(same)))
    return found


def _say(model: Ernie, num_tokens: int, vocabulary: int, chance: torch.Generator) -> Tensor:
    """A text by the model's own likelihoods, from the token that begins one."""
    step = _Pass(model, num_tokens)
    ids = [model.config.bos_token_id or 0]
    while len(ids) < num_tokens:
        logits = step(torch.tensor(ids[-1:]))[-1, :vocabulary].float()
        ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=chance)))
    return torch.tensor(ids)


class _Pass:
    """One text through a model, in one piece or in several, in a cache of one block."""

    def __init__(self, model: Ernie, num_tokens: int) -> None:
        config, norm = model.config, model.norm.weight
        heads = (config.num_key_value_heads, config.head_dim)
        self.model = model
        self.size = num_tokens
        self.done = 0
        self.cache = [
            model.kernels.empty_cache(1, num_tokens, *heads, norm.dtype, norm.device)
            for _ in range(config.num_hidden_layers)
        ]

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits after each of these tokens, which follow those before."""
        start, self.done = self.done, self.done + len(ids)
        positions = torch.arange(start, self.done)
        layout = Layout(
            positions=positions,
            slots=positions,
            block_tables=torch.zeros(1, 1, dtype=torch.int32),
            query_starts=torch.tensor([0, len(ids)], dtype=torch.int32),
            context_lens=torch.tensor([self.done], dtype=torch.int32),
            spans=(Span(0, len(ids), self.done),),
            block_size=self.size,
        )
        logits: Tensor = self.model(ids, layout, self.cache, torch.arange(len(ids)))
        return logits
