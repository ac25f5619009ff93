"""Runs every operator of `cpu.cpp` once over odd sizes, in a build with sanitizers. A script for test_sanitizers.py."""

import os

os.environ.pop("LD_PRELOAD", None)  # the sanitizers' own library is for this process, not for the compiler

import torch

from ernie_serve.kernels import kv_format, native
from ernie_serve.kernels.packed import empty

FLAGS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def main() -> None:
    ops = native.load(extra_flags=FLAGS)
    torch.manual_seed(0)

    def matrix(bits: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        made = empty(rows, columns, bits)
        ops.quantize(torch.randn(rows, columns), bits, True, made.data, made.row_scales)
        return made.data, made.row_scales, bits

    def stack(bits: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        members = [matrix(bits, rows, columns) for _ in range(5)]
        return torch.stack([m[0] for m in members]), torch.stack([m[1] for m in members]), bits

    def in_panels(rows: int, columns: int) -> torch.Tensor:
        return ops.panels(torch.randn(rows, columns).bfloat16())

    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in ((45, 51), (16, 8), (100, 1), (700, 200)):  # the last one is shared by two threads
            panels = in_panels(rows, columns)
            ops.panel_embedding(torch.tensor([0, rows - 1, 7]), panels, rows, dtype)
            for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 13):
                ops.panel_linear(torch.randn(tokens, columns).to(dtype), panels, rows)
        stacks = [[in_panels(64, 48) for _ in range(5)], [in_panels(48, 32) for _ in range(5)]]
        for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 13):
            x = torch.randn(tokens, 48).to(dtype)
            router = torch.randn(5, 48), torch.randn(5), 3, 1e-12
            ops.panel_moe(x, *router, *stacks, in_panels(192, 48), in_panels(48, 96))
            ops.panel_moe(x, *router, *stacks, None, None)
        for bits in (4, 8):
            weight = matrix(bits, 45, 192)
            ops.embedding(torch.tensor([0, 44, 7]), *weight, 45, dtype)
            routed, shared = (
                (stack(bits, 128, 128), stack(bits, 128, 64)),
                (matrix(12 - bits, 256, 128), matrix(12 - bits, 128, 128)),
            )
            for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 13):
                ops.linear(torch.randn(tokens, 192).to(dtype), *weight, 45)
                x = torch.randn(tokens, 128).to(dtype)
                router = torch.randn(5, 128), torch.randn(5), 3, 1e-12
                ops.route(x, *router)
                ops.swiglu(x)
                ops.moe(x, *router, *routed[0], *routed[1], *shared[0], *shared[1])
                ops.moe(x, *router, *routed[0], *routed[1], None, None, 0, None, None, 0)
                for size in (128, 43, 5):
                    ops.add_rms_norm(x[:, :size].clone(), x[:, :size], torch.randn(size).to(dtype), 1e-5)
                    ops.add_rms_norm(x[:, :size], None, torch.randn(size).to(dtype), 1e-5)
        for cache in (torch.float32, torch.bfloat16, torch.int8):
            for heads, kv_heads, head_dim in ((10, 2, 16), (7, 1, 24)):
                shape = (20, 32, kv_heads, kv_format.width(head_dim, cache))
                kept = [torch.zeros(shape, dtype=kv_format.element(cache)) for _ in range(2)]
                qkv = torch.randn(640, (heads + 2 * kv_heads) * head_dim).to(dtype)
                rotary = torch.randn(640, head_dim // 2, 2)
                q = ops.rope_and_write(qkv, rotary, *kept, torch.randperm(640), heads)
                ops.rotary(torch.randint(0, 1 << 17, (37,)), torch.rand(head_dim // 2))
                tables = torch.stack([torch.arange(20), torch.arange(20).flip(0), torch.arange(20)]).int()
                starts, contexts = torch.tensor([0, 1, 20, 23]).int(), torch.tensor([640, 637, 3]).int()
                ops.attention(q[:23], *kept, tables, starts, contexts)
                ops.attend(qkv[:23], rotary[:23], *kept, torch.randperm(640)[:23], heads, tables, starts, contexts)
    print("every operator ran")


main()
