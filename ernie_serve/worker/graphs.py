"""The decode step as one recording for each size of batch, replayed with new inputs, its tokens left on the device.

Knows buffers, and the order of things on one stream. Knows the device only as something that records, copies and
reads (`Device`), so that all of it but CUDA itself runs without a GPU. Knows nothing of the network's inside.

A step of R rows runs in the least bucket that holds them. Its padded rows have no context, write to no slot, and are
told to the kernels, which send them to no expert. The token that a row feeds may still be under way: then the host
says in which row of the step before it will be, and the recording takes it from there.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from ernie_serve.kernels.layout import Layout, Span
from ernie_serve.messages import UNKNOWN_TOKEN, PlanRow, SamplingParams, StepPlan
from ernie_serve.model.ernie import Ernie
from ernie_serve.worker.sampler import uniform

# R rows of a step, B rows of its bucket, W blocks of the longest text

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
LENGTHS = (1024, 8192, 32768, 1 << 40)
"""A recording serves contexts up to one of these: how far attention is split is part of it."""


class Device(Protocol):
    """What a recording needs of the machine. All calls happen in order, on one stream."""

    def buffer(self, num_bytes: int) -> Tensor:
        """Bytes on the host, from which a copy does not wait."""

    def record(self, run: Callable[[], None]) -> Callable[[], object]:
        """Make a recording of `run`, which may be run on the way, and return what replays it."""

    def read(self, tensor: Tensor) -> Callable[[], list[int]]:
        """Begin to copy a tensor to the host; what is returned waits for that copy and for nothing later."""


class Recordable(Protocol):
    """What kernels need beyond the verbs of the network, for a step that is recorded."""

    def padded(self, num_live: Tensor) -> AbstractContextManager[None]:
        """Within this, rows from `num_live` [1] on are padding."""

    def sample(self, logits: Tensor, settings: Tensor, top_ks: Tensor, num_valid_ids: int) -> Tensor:
        """A token for each row."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that has been started: whose tokens it makes, and how to wait for them."""

    request_ids: list[str]
    tokens: Callable[[], list[int]]


class DecodeGraphs:
    """Recordings of one model over one cache, made when a size is first needed, or all of them by `record_all`."""

    def __init__(
        self,
        model: Ernie,
        cache: list[tuple[Tensor, Tensor]],
        block_size: int,
        device: Device,
        *,
        max_num_seqs: int,
        max_model_len: int,
        num_valid_ids: int | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.block_size = block_size
        self.max_rows = max_num_seqs
        self._kernels = cast("Recordable", model.kernels)  # whoever asks for recordings has given such kernels
        self._device = device
        self._num_valid_ids = num_valid_ids or model.config.vocab_size
        self._width = -(-max_model_len // block_size)
        self._buckets = [*(b for b in BUCKETS if b < max_num_seqs), max_num_seqs]
        where = model.norm.weight.device
        most = self._buckets[-1]
        self._tokens = torch.zeros(most, dtype=torch.int64, device=where)  # of the last step
        # a graph knows what it reads by its address: all of that lives as long as this object
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=where)
        self._rows = torch.arange(most, device=where)
        self._inputs = {
            b: _Inputs(torch.zeros(_size(b, self._width), dtype=torch.uint8, device=where), b, self._width)
            for b in self._buckets
        }
        self._hosts = [device.buffer(_size(most, self._width)) for _ in range(2)]
        self._turn = 0
        self._replays: dict[tuple[int, int], Callable[[], object]] = {}
        self._last_rows: dict[str, int] = {}

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Flight | None:
        """Start a step and do not wait for it; `None` where it is not one that is recorded.

        At most one step may be under way that is not collected yet.
        """
        rows = plan.rows
        if len(rows) > self.max_rows or not all(map(is_plain, rows)):
            return None
        bucket = next(b for b in self._buckets if b >= len(rows))
        longest = max(row.start + 1 for row in rows)
        key = (bucket, next(length for length in LENGTHS if length >= longest))
        replay = self._replays.get(key) or self._record(*key)
        host = _Inputs(self._hosts[self._turn], bucket, self._width)
        self._turn = 1 - self._turn
        self._fill(host, rows)
        self._inputs[bucket].flat.copy_(host.flat, non_blocking=True)
        replay()
        self._last_rows = {row.request_id: i for i, row in enumerate(rows)}
        return Flight([row.request_id for row in rows], self._device.read(self._tokens[: len(rows)]))

    @torch.inference_mode()
    def record_all(self, longest: int, report: Callable[[float], None] | None = None) -> None:
        """Record every bucket, the largest first, so that the others find its memory, for contexts up to `longest`."""
        lengths = [length for i, length in enumerate(LENGTHS) if i == 0 or LENGTHS[i - 1] < longest]
        keys = [(bucket, length) for bucket in reversed(self._buckets) for length in lengths]
        for i, key in enumerate(keys):
            if report:
                report(i / len(keys))
            if key not in self._replays:
                self._record(*key)

    def _record(self, bucket: int, length: int) -> Callable[[], object]:
        inputs = self._inputs[bucket]
        host = _Inputs(self._device.buffer(_size(bucket, self._width)), bucket, self._width)
        self._fill(host, [])
        inputs.flat.copy_(host.flat)
        under_way = self._tokens.clone()  # recording runs the step, and the next one may still need these
        longest = min(length, self._width * self.block_size)
        spans = tuple(Span(row, 1, longest) for row in range(bucket))  # for choosing a kernel, not for reading

        def run() -> None:
            ids = torch.where(inputs.feeds >= 0, self._tokens[inputs.feeds.clamp(min=0)], inputs.ids)
            layout = Layout(
                positions=inputs.positions,
                slots=inputs.slots,
                block_tables=inputs.tables,
                query_starts=self._starts[: bucket + 1],
                context_lens=inputs.lens,
                spans=spans,
                block_size=self.block_size,
            )
            with self._kernels.padded(inputs.num_live):
                logits = self.model(ids, layout, self.cache, self._rows[:bucket])
                tokens = self._kernels.sample(logits, inputs.settings, inputs.top_ks, self._num_valid_ids)
            self._tokens[:bucket] = tokens

        replay = self._replays[bucket, length] = self._device.record(run)
        self._tokens.copy_(under_way)
        return replay

    def _fill(self, host: "_Inputs", rows: list[PlanRow]) -> None:
        """Write a step's inputs; a row that is not there has no context, no slot and takes token 0 greedily."""
        R, size = len(rows), self.block_size
        host.flat.zero_()
        host.feeds.fill_(-1)
        host.slots.fill_(-1)
        host.settings[:, 2] = 1.0
        host.num_live.fill_(R)
        ids, feeds, positions, slots, lens, top_ks, tables, settings = (
            x.numpy()
            for x in (
                host.ids, host.feeds, host.positions, host.slots, host.lens, host.top_ks, host.tables, host.settings
            )
        )  # fmt: skip
        for r, row in enumerate(rows):
            (token,) = row.token_ids
            if token == UNKNOWN_TOKEN:
                feeds[r] = self._last_rows[row.request_id]
            else:
                ids[r] = token
            at, p = row.start, row.sampling
            num_blocks = at // size + 1
            positions[r], lens[r], top_ks[r] = at, at + 1, p.top_k
            slots[r] = row.block_ids[at // size] * size + at % size
            tables[r, :num_blocks] = row.block_ids[:num_blocks]
            settings[r] = uniform(p.seed, num_output(row)), p.temperature, p.top_p, p.min_p


class CudaDevice:
    """The current CUDA device: graphs that share one pool of memory, pinned buffers, events."""

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None
        self._aside: torch.cuda.Stream | None = None

    def buffer(self, num_bytes: int) -> Tensor:
        """Pinned bytes."""
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def record(self, run: Callable[[], None]) -> Callable[[], object]:
        """Run twice aside, so that every kernel is compiled and every library has its workspace; then capture.

        All of that on one stream: cuBLAS keeps a workspace for each that it has met, of 32 MiB on a Hopper.
        """
        if self._aside is None:
            self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch does not type it
        aside = self._aside
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, aside):  # type: ignore[arg-type]  # torch's own handle type is private
            run()
        self._pool = graph.pool()
        return graph.replay

    def read(self, tensor: Tensor) -> Callable[[], list[int]]:
        """Copy to pinned memory, and an event behind the copy."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch does not type it
        event.record()

        def wait() -> list[int]:
            event.synchronize()
            return cast("list[int]", host.tolist())

        return wait


class _Inputs:
    """What a step is given, as views of one run of bytes, so that it travels as one copy."""

    def __init__(self, flat: Tensor, rows: int, width: int) -> None:
        self.flat = flat[: _size(rows, width)]
        self._at = 0
        self.ids, self.feeds, self.positions, self.slots = (self._take(torch.int64, rows) for _ in range(4))
        self.settings = self._take(torch.float64, rows, 4)
        self.lens, self.top_ks = (self._take(torch.int32, rows) for _ in range(2))
        self.tables = self._take(torch.int32, rows, width)
        self.num_live = self._take(torch.int32, 1)

    def _take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        start = self._at
        self._at += int(np.prod(shape)) * dtype.itemsize
        return self.flat[start : self._at].view(dtype).view(shape)


def _size(rows: int, width: int) -> int:
    """Bytes of a step's inputs."""
    return rows * (4 * 8 + 4 * 8 + 2 * 4 + width * 4) + 4


def is_plain(row: PlanRow) -> bool:
    """Whether a row is a decode whose token needs nothing of the host: no penalty, bias, mask or logprobs."""
    p: SamplingParams = row.sampling
    return (
        len(row.token_ids) == 1
        and row.wants_token
        and not row.wants_prompt_logprobs
        and p.logprobs is None
        and not p.logit_bias
        and not p.is_constrained
        and not (p.stop_token_ids and num_output(row) < p.min_tokens)
        and p.repetition_penalty == 1
        and not p.presence_penalty
        and not p.frequency_penalty
    )


def num_output(row: PlanRow) -> int:
    """Tokens that a row has put out when its step ends, without the one that the step makes."""
    return row.start + len(row.token_ids) - len(row.prompt_token_ids)
