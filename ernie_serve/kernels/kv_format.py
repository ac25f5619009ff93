"""How keys and values lie in the cache: as they are, or in 8 bits with a scale for each token and head.

Knows one row of numbers. Knows nothing of blocks, requests or attention.

A cache is one tensor for keys and one for values, [B, S, K, width]. In a floating dtype the width is the head size D;
torch.float8_e4m3fn is one, without a scale, and holds up to 448 of either sign.
With 8 bits the tensor is uint8 and a row is D int8 and then a float32 scale, the row's largest magnitude over 127.
"""

import torch
from torch import Tensor

_SCALE_BYTES = 4


def width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a row; `dtype` torch.int8 asks for 8 bits."""
    return head_dim + _SCALE_BYTES if dtype == torch.int8 else head_dim


def row_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """Bytes that the key, or the value, of one token takes in one head."""
    return width(head_dim, dtype) * dtype.itemsize


def element(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the tensor that holds the cache."""
    return torch.uint8 if dtype == torch.int8 else dtype


def head_dim(cache: Tensor) -> int:
    """D of a cache [.., width]."""
    return cache.shape[-1] - _SCALE_BYTES if cache.dtype == torch.uint8 else cache.shape[-1]


def stored(x: Tensor, cache: Tensor) -> Tensor:
    """`x` [.., D] as `cache` keeps it: [.., width]."""
    if cache.dtype != torch.uint8:
        return (x.float().clamp(-448, 448) if cache.dtype == torch.float8_e4m3fn else x).to(cache.dtype)
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    q = torch.where(scale > 0, x / scale, 0).round().to(torch.int8)
    return torch.cat((q.view(torch.uint8), scale.view(torch.uint8)), dim=-1)


def numbers(rows: Tensor) -> Tensor:
    """What rows [.., width] of a cache stand for: [.., D] in float32."""
    if rows.dtype != torch.uint8:
        return rows.float()
    D = head_dim(rows)
    scale = rows[..., D:].contiguous().view(torch.float32)
    return rows[..., :D].view(torch.int8).float() * scale
