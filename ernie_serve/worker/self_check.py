"""Whether a step of one row, which has kernels of its own, gives what several rows give; asked once, by a start.

Cards differ in what a program may take and versions of Triton in what they make of one, and no list has them all. An
engine that is slower with one stream serves; one that starts and answers nonsense does not.

Knows the network and its cache. Knows no plan.
"""

import logging
from typing import Protocol

import torch
from torch import Tensor

from ernie_serve.kernels.layout import Layout, Span
from ernie_serve.model.ernie import Ernie, KVCache

logger = logging.getLogger(__name__)

NUM_TOKENS = 3
TOLERANCE = 0.5
"""Of the logits' spread. Rounding, and an expert that a rounded score flips, stay far below; nonsense gives 1.4."""


class Fusing(Protocol):
    """Kernels that join the verbs of one row unless they are told not to."""

    fuses: bool


@torch.inference_mode()
def check_one_row(model: Ernie, kernels: Fusing, cache: KVCache, block_size: int) -> None:
    """Stop `kernels` from fusing, and say so, where a text read token by token does not end as the same read at once.

    Writes into the first blocks of `cache`, which nobody may own yet. Raises `torch.OutOfMemoryError`.
    """
    told = "One stream does without kernels of its own"
    try:
        error = _difference(model, cache, block_size)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # a compiler's and a driver's own, of many kinds
        logger.warning("%s, because they do not run here: %s: %s", told, type(failure).__name__, failure)
        kernels.fuses = False
        return
    if not error < TOLERANCE:
        logger.warning("%s, because theirs are off by %.2g here.", told, error)
        kernels.fuses = False


def _difference(model: Ernie, cache: KVCache, block_size: int) -> float:
    """How far the last token's logits lie apart, as a share of how far they are spread."""
    ids = torch.arange(1, NUM_TOKENS + 1, device=model.norm.weight.device)
    together = _logits(model, cache, block_size, ids, 0)
    for at in range(NUM_TOKENS):
        alone = _logits(model, cache, block_size, ids[at : at + 1], at)
    return float((alone - together).std() / together.std())


def _logits(model: Ernie, cache: KVCache, block_size: int, ids: Tensor, start: int) -> Tensor:
    """Those of the last of `ids`, which stand from `start` on in a text that has the cache's first blocks."""
    count, where = len(ids), ids.device
    end = start + count
    places = torch.arange(start, end, device=where)
    layout = Layout(
        positions=places,
        slots=places,
        block_tables=torch.arange(-(-end // block_size), dtype=torch.int32, device=where)[None],
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=where),
        context_lens=torch.tensor([end], dtype=torch.int32, device=where),
        spans=(Span(0, count, end),),
        block_size=block_size,
    )
    logits: Tensor = model(ids, layout, cache, torch.tensor([count - 1], device=where))
    return logits[0].float()
