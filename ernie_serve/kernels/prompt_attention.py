"""Attention of the tokens of prompts to what is before them and to themselves, by what torch has for a GPU.

Requests that stand side by side are one call of flash attention, which takes texts of different lengths end to end: of
many short prompts the calls are what takes time.

From Hopper on cuDNN is faster for a long one (510 and 310 TFLOP/s on an H200). But it makes a plan for
each pair of lengths that it has not met, which can take half a second, and it has no mask for tokens behind others. So
it gets few lengths: tokens are filled up to a multiple of UNIT, and what is before them comes in blocks of BLOCK. Each
part yields the logarithm of its sum, by which they are joined; what is left beside whole blocks is flash attention's,
and so is all where filling up would not pay.

Knows a run of requests. Knows no cache.
Source: joining parts by their log-sums is what Flash-Decoding and ring attention do.
"""

import functools
import logging
from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from ernie_serve.kernels.layout import Run, Span

logger = logging.getLogger(__name__)

UNIT = 1024
BLOCK = 8192

# T tokens of L, H query heads, K key/value heads, D head size


def attend(q: Tensor, keys: Tensor, values: Tensor, run: Run) -> Tensor:
    """The tokens `q` [T, H, D] of a run attend to their contexts, the others [L, K, D], in the run's order."""
    (T, H, D), K = q.shape, keys.shape[1]
    if len(run.spans) == 1 and _pays(T) and prefers_cudnn(q.device) and _joins_well(q.device, q.dtype, H, K, D, _up(T)):
        return _joined(q, keys, values)
    # alone behind others, the context of few tokens is split between processors, which that of a run is not
    if (len(run.spans) > 1 or len(keys) == T) and takes_runs(q.device) and _runs_well(q.device, q.dtype, H, K, D):
        return _by_runs(q, keys, values, run)
    return _one_by_one(q, keys, values, run)


def meet(device: torch.device, dtype: torch.dtype, H: int, K: int, D: int, most: int) -> None:
    """Let cuDNN make its plans for pieces of up to `most` tokens, so that no prompt waits for them.

    They are kept for the thread that this runs in, which has to be the one that computes.
    """
    if dtype != torch.float32 and prefers_cudnn(device):  # float32 is the reference's
        for T in range(UNIT, _up(most) + 1, UNIT):
            if _pays(min(T, most)) and _up(min(T, most)) == T:
                _joins_well(device, dtype, H, K, D, T)


def _pays(T: int) -> bool:
    """Whether so many tokens are worth a plan: filled up they are at most a quarter more."""
    return UNIT <= T and _up(T) <= T + T // 4


def _up(length: int) -> int:
    return -(-length // UNIT) * UNIT


def _by_torch(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """All at once, by torch's flash attention; for tokens with nothing before them it would take cuDNN's by itself."""
    queries, k, v = map(_by_head, (q, keys, values))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        if len(q) == len(keys):
            found = F.scaled_dot_product_attention(queries, k, v, is_causal=True, enable_gqa=True)
        else:
            mask = causal_lower_right(len(q), len(keys))
            found = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, enable_gqa=True)
    return found[0].transpose(0, 1)


def _one_by_one(q: Tensor, keys: Tensor, values: Tensor, run: Run) -> Tensor:
    """The requests of a run, each by a call of its own."""
    found, begun, read = [], 0, 0
    for span in run.spans:
        mine, context = slice(begun, begun + span.query_len), slice(read, read + span.context_len)
        found.append(_by_torch(q[mine], keys[context], values[context]))
        begun, read = mine.stop, context.stop
    return torch.cat(found)


def _by_runs(q: Tensor, keys: Tensor, values: Tensor, run: Run) -> Tensor:
    """All requests of a run at once; of each the last tokens of its context are asked for."""
    longest = max(span.query_len for span in run.spans), max(span.context_len for span in run.spans)
    starts = run.query_starts, run.context_starts
    out: Tensor = torch.ops.aten._flash_attention_forward(q, keys, values, *starts, *longest, 0.0, True, False)[0]
    return out


def _joined(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The tokens to themselves, to each whole block before them, and to what is left, joined in float32."""
    T, before = len(q), len(keys) - len(q)
    queries = _by_head(_filled(q))
    own_keys, own_values = (_by_head(_filled(x[before:])) for x in (keys, values))
    found, total = _by_cudnn(queries, own_keys, own_values, is_causal=True)
    if not before:
        return found[0, :, :T].transpose(0, 1)
    joined = found.float()
    for first in range(0, before, BLOCK):
        k, v = (_by_head(x[first : min(first + BLOCK, before)]) for x in (keys, values))
        part, log = (_by_cudnn if k.shape[2] == BLOCK else _by_flash)(queries, k, v)
        log = log.view(total.shape)
        total = torch.logaddexp(total, log)
        joined.lerp_(part.float(), (log - total).exp_())
    return joined[0, :, :T].transpose(0, 1).to(q.dtype)


def _by_cudnn(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> tuple[Tensor, Tensor]:
    """Attention of [1, heads, tokens, D], and the natural logarithm of each row's sum, [1, H, T, 1] in float32."""
    out, log, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, False)
    return out, log


def _by_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same of any length, with logarithms [1, H, T]."""
    out, log, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)
    return out, log


@functools.cache
def prefers_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's attention is the faster one on this device: on those on which torch takes it by itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))


@functools.cache
def takes_runs(device: torch.device) -> bool:
    """Whether flash attention is there for texts end to end: on every GPU that has it at all."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _runs_well(device: torch.device, dtype: torch.dtype, H: int, K: int, D: int) -> bool:
    """Whether three texts at once, of which two have something before them, are what each is alone: tried once."""
    lens, contexts = [5, 70, 3], [5, 200, 77]
    spans = tuple(Span(sum(lens[:i]), *each) for i, each in enumerate(zip(lens, contexts, strict=True)))
    starts = (torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device) for each in (lens, contexts))
    run = Run(spans, torch.empty(0, dtype=torch.int64, device=device), *starts)
    q, keys, values = _random(device, dtype, (sum(lens), H, D), (sum(contexts), K, D), (sum(contexts), K, D))
    return _agree(
        "Each prompt of a step is a call of its own",
        lambda: _by_runs(q, keys, values, run),
        lambda: _one_by_one(q, keys, values, run),
    )


@functools.cache
def _joins_well(device: torch.device, dtype: torch.dtype, H: int, K: int, D: int, T: int) -> bool:
    """Whether parts of T tokens, joined, are what flash attention makes of the whole: tried once, by a start."""
    L = BLOCK + 64 + T
    texts = _random(device, dtype, (T, H, D), (L, K, D), (L, K, D))
    return _agree(
        f"Pieces of prompts of {T} tokens take flash attention", lambda: _joined(*texts), lambda: _by_torch(*texts)
    )


def _random(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def _agree(told: str, get: Callable[[], Tensor], want: Callable[[], Tensor]) -> bool:
    """Whether both are the same to rounding; if not it is told what that means.

    The operators that yield log-sums, or take texts end to end, are torch's own, but not public: a version may have
    other ones.
    """
    try:
        found, expected = get().float(), want().float()
        error = float((found - expected).norm() / expected.norm())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError) as failure:
        logger.warning("%s, because torch's operator does not give what is asked of it: %s", told, failure)
        return False
    if not error < 0.02:
        logger.warning("%s, because what torch's operator gives is off by %.2g.", told, error)
    return error < 0.02


def _filled(x: Tensor) -> Tensor:
    """`x` [T, heads, D] with zeros behind up to the next unit: no token before them sees them."""
    return x if _up(len(x)) == len(x) else F.pad(x, (0, 0, 0, 0, 0, _up(len(x)) - len(x)))


def _by_head(x: Tensor) -> Tensor:
    """[tokens, heads, D] as [1, heads, tokens, D]."""
    return x.transpose(0, 1)[None]
