"""How much memory there is, and how many KV blocks fit in it.

Knows sizes of tensors and of the machine. Knows nothing about requests or plans.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from ernie_serve.errors import NotEnoughMemory, SettingsError
from ernie_serve.kernels import kv_format
from ernie_serve.kernels.layout import SHORT
from ernie_serve.model.config import ModelConfig
from ernie_serve.worker.groups import groups_of, text_of
from ernie_serve.worker.logprobs import ROWS_AT_ONCE

GIB = 1 << 30
SCORED_TOKENS = 256
"""Tokens of prompts that are scored in a step: each holds the logits of a whole vocabulary."""
_USUAL_TOKENS = 2048
"""A step of so many is enough where memory is short."""
_ONEDNN_BYTES = 256 << 20
"""What oneDNN comes to remember on a CPU while it serves (`worker/environment.py`; 186 MiB were measured)."""


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The KV cache that will be made: its blocks, its size, and the longest text (prompt and answer) it serves."""

    num_blocks: int
    num_bytes: int
    max_model_len: int


def require_room(weight_bytes: int, device: torch.device, passing_bytes: int, advice: str) -> None:
    """Raise `NotEnoughMemory`, before anything is read, unless the weights fit beside what the device holds.

    `passing_bytes` are needed only while loading; `advice` says what would help. Weights that are mapped from files
    need their room too: what is dropped from memory is read from the disk again for every token.
    """
    free = free_bytes(device)
    if weight_bytes + passing_bytes > free:
        loading = f", and loading them {told(passing_bytes)} more for a while" if passing_bytes else ""
        raise NotEnoughMemory(
            f"The weights need {told(weight_bytes)}{loading}; {told(free)} are free on {device}. {advice}"
        )


def require_length(config: ModelConfig, max_model_len: int | None) -> None:
    """Raise `SettingsError`, before anything is read, for texts longer than the checkpoint allows."""
    limit = config.max_position_embeddings
    if max_model_len is not None and max_model_len > limit:
        raise SettingsError(f"--max-model-len {max_model_len}: this checkpoint reads at most {limit} tokens.")


def plan_cache(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    gpu_memory_utilization: float,
    max_model_len: int | None = None,
    kv_cache_memory_bytes: int | None = None,
    cache_dtype: torch.dtype | None = None,
    max_scored_tokens: int = 0,
    mapped_bytes: int = 0,
    widened_bytes: int = 0,
    smaller: tuple[str, ...] = (),
) -> CachePlan:
    """Decide the cache, once the weights are in memory.

    `dtype` is the arithmetic's, `cache_dtype` the cache's where it has one of its own. `mapped_bytes` are weights in
    files that are mapped: the system counts them as free, but they have to stay. `widened_bytes` are for a matrix that
    a step makes wide, and for that of a recorded step.

    A given `kv_cache_memory_bytes` is taken at its word, as far as there is so much. Otherwise the cache gets what the
    device has left beside the largest step, on a CPU at most 4 GiB and not what oneDNN will remember. On a
    GPU parts of a step that follow one another are added up, since torch keeps what one gave back in pieces that need
    not suit the next; what CUDA takes for itself is for the share that `gpu_memory_utilization` leaves. Without
    `max_model_len` texts may be as long as the checkpoint allows and the cache holds. Raises `NotEnoughMemory` with the
    numbers and the flag to change; `smaller` are flags that would make the weights smaller.
    """
    limit = config.max_position_embeddings
    kept = cache_dtype or dtype
    each = bytes_per_block(config, kept, block_size)
    budget = kv_cache_memory_bytes
    free = max(0, free_bytes(device) - mapped_bytes)
    if budget is not None and budget > free:
        raise NotEnoughMemory(
            f"--kv-cache-memory-bytes asks for {told(budget)}; beside the weights {told(free)} are free on {device}. "
            "Lower it, or leave it out."
        )
    if budget is None:
        step = step_bytes(config, dtype, max_num_batched_tokens, max_num_seqs, max_scored_tokens)
        held = beside = 0
        if device.type == "cuda":
            held = min(free, int(device_bytes(device) * (1 - gpu_memory_utilization)))
            step += recorded_bytes(config, dtype, max_num_seqs, max_model_len or limit) + 2 * widened_bytes
            beside = gathered_bytes(config, dtype)
        if step >= free - held:
            raise NotEnoughMemory(
                f"One step of {max_num_batched_tokens} tokens and {max_num_seqs} requests needs about {told(step)} "
                f"beside the weights; {told(free - held)} are free"
                + (
                    f", {told(held)} more are kept free by --gpu-memory-utilization {gpu_memory_utilization}"
                    if held
                    else ""
                )
                + f". {_ways(free - held > 0, held > 0 and step < free, smaller)}"
            )
        budget = free - held - step
        # of the longest text, with what is gathered of it, or of several that are short
        fitting = budget // (each // block_size + beside)
        if fitting < SHORT:
            fitting = max(0, budget - SHORT * beside) // (each // block_size)
        budget = max(0, budget - max(SHORT, max_model_len or min(limit, fitting)) * beside)
        if device.type == "cpu":
            # a tenth for what nobody counts, or oneDNN's, of which a small machine has to do with less
            budget = min(4 * GIB, budget - max(budget // 10, min(_ONEDNN_BYTES, budget // 4)))
    instead = None
    if device.type == "cuda" and kv_cache_memory_bytes is None:
        needed = blocks_for(max_model_len or 1, block_size)
        spared = (max_num_batched_tokens - _USUAL_TOKENS) * _layer_bytes(config, dtype)
        ways = {
            f"--max-model-len {fitting // block_size * block_size}": fitting >= block_size,
            f"--max-num-batched-tokens {_USUAL_TOKENS}": needed * each <= budget + spared,
            "--kv-cache-dtype int8": needed * bytes_per_block(config, torch.int8, block_size) <= budget,
        }
        instead = (*(way for way, helps in ways.items() if helps), *smaller)
    num_blocks = blocks_that_fit(
        config, kept, budget, block_size=block_size, max_model_len=max_model_len, instead=instead
    )
    length = max_model_len or min(limit, num_blocks * block_size)
    if kv_cache_memory_bytes is None:
        num_blocks = min(num_blocks, max_num_seqs * blocks_for(length, block_size))
    return CachePlan(num_blocks, num_blocks * each, length)


def _ways(can_shrink: bool, can_raise: bool, smaller: tuple[str, ...]) -> str:
    """What helps where a step has no room."""
    ways = [
        *(["lower --max-num-batched-tokens or --max-num-seqs"] if can_shrink else []),
        *(["raise --gpu-memory-utilization"] if can_raise else []),
        *(f"set {flag}" for flag in smaller),
    ]
    told = ", or ".join(ways or ["use a smaller checkpoint, or a device with more memory"])
    return f"{told[0].upper()}{told[1:]}."


def blocks_that_fit(
    config: ModelConfig,
    dtype: torch.dtype,
    num_bytes: int,
    *,
    block_size: int,
    max_model_len: int | None = None,
    instead: tuple[str, ...] | None = None,
) -> int:
    """Blocks of KV cache in `num_bytes`. Raises `NotEnoughMemory` if one text of `max_model_len` would not fit.

    `num_bytes` can be raised by a flag, unless they are all there is: then `instead` are the flags that help, if any.
    """
    each = bytes_per_block(config, dtype, block_size)
    num_blocks = num_bytes // each
    needed = blocks_for(max_model_len or 1, block_size)
    if num_blocks < needed:
        room = (
            f"or lower --max-model-len to {num_blocks * block_size}" if num_blocks else "or use --kv-cache-dtype int8"
        )
        remedy = f"Raise --kv-cache-memory-bytes to {needed * each}, {room}."
        if instead is not None:
            remedy = f"Set {' or '.join(instead or ('a higher --gpu-memory-utilization',))}."
        raise NotEnoughMemory(
            f"The KV cache of one text of {max_model_len or block_size} tokens needs {told(needed * each)}; "
            f"{told(num_bytes)} are there for it. {remedy}"
        )
    return num_blocks


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // block_size)


def bytes_per_block(config: ModelConfig, dtype: torch.dtype, block_size: int) -> int:
    """Keys and values of `block_size` tokens in all layers; torch.int8 means 8 bits and their scales."""
    row = kv_format.row_bytes(config.head_dim, dtype)
    return 2 * config.num_hidden_layers * block_size * config.num_key_value_heads * row


def step_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_scored_tokens: int = 0,
) -> int:
    """About the most that one step needs beside weights and cache: its widest layer, its logits and their sampling.

    All logits are there while tokens are sampled, which takes five float32 copies of their rows, with bias, masks and
    logprobs of each; prompts are scored after that, with three copies of a few rows.
    """
    logits = (max_num_seqs + max_scored_tokens) * config.vocab_size * dtype.itemsize
    copies = max(5 * max_num_seqs, 3 * ROWS_AT_ONCE if max_scored_tokens else 0) * config.vocab_size * 4
    return max_num_batched_tokens * _layer_bytes(config, dtype) + logits + copies


def recorded_bytes(config: ModelConfig, dtype: torch.dtype, max_num_seqs: int, longest: int) -> int:
    """What recorded steps of a GPU keep to themselves: the largest one, which no other step may use in between.

    Beside its layer and logits it has the parts of contexts that are split, one for 8,192 tokens, in float32, and room
    for what top-p searches, 4 bytes a logit.
    """
    c = config
    splits = next((n for n in (1, 4, 16) if n * 8192 >= longest), 64)
    parts = splits * c.num_attention_heads * (c.head_dim + 1) * 4
    return max_num_seqs * (_layer_bytes(c, dtype) + c.vocab_size * (dtype.itemsize + 4) + parts)


def gathered_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What a token of the context of a prompt takes on a GPU while a layer attends to it: key and value, in order."""
    return 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize


def _layer_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What a token takes in the widest layer."""
    c = config
    dense = 3 * c.intermediate_size
    routed = c.moe_k * (3 * c.moe_intermediate_size + 2 * c.hidden_size) + 3 * c.shared_intermediate_size
    attention = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    return (4 * c.hidden_size + max(dense, routed, attention)) * dtype.itemsize


def total_bytes(root: Path = Path("/")) -> int:
    """Memory of the machine, or of the smallest control group of this process, if that is less; 0 where unknown."""
    lines = text_of(root / "proc/meminfo").splitlines()
    known = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    return min(known + _limits(root), default=0)


def device_bytes(device: torch.device) -> int:
    """All memory of a GPU."""
    return int(torch.cuda.mem_get_info(device)[1])


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that can still be taken on a device.

    On a CPU: what the machine has available, or what the control groups of this process leave, if that is less.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = _available(root) + _left_by_groups(root)
    if not known:
        raise NotEnoughMemory("How much memory is free is not known here: /proc/meminfo says nothing. Mount /proc.")
    return max(0, min(known))


def _available(root: Path) -> list[int]:
    """`MemAvailable` of /proc/meminfo, where there is one."""
    lines = text_of(root / "proc/meminfo").splitlines()
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]


def _left_by_groups(root: Path) -> list[int]:
    """What each control group above this process leaves; file cache can be taken back."""
    return [most - used + _file_cache(folder) for folder, most, used in _groups(root) if used is not None]


def _limits(root: Path) -> list[int]:
    """The limit of each control group above this process."""
    return [most for _, most, _ in _groups(root)]


def _groups(root: Path) -> list[tuple[Path, int, int | None]]:
    """Folder, limit and usage of each control group above this process that has a limit."""
    found = []
    for folder, is_second in groups_of("memory", root):
        limit, usage = ("max", "current") if is_second else ("limit_in_bytes", "usage_in_bytes")
        most, used = _number(folder / f"memory.{limit}"), _number(folder / f"memory.{usage}")
        if most is not None:
            found.append((folder, most, used))
    return found


def _file_cache(folder: Path) -> int:
    stat = dict(line.split(" ", 1) for line in text_of(folder / "memory.stat").splitlines())
    return sum(int(stat.get(f"total_{name}", stat.get(name, "0"))) for name in ("inactive_file", "active_file"))


def _number(path: Path) -> int | None:
    text = text_of(path).strip()
    return int(text) if text.isdigit() else None


def told(num_bytes: int) -> str:
    """In GiB, or in MiB below one."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / (1 << 20):.1f} MiB"
