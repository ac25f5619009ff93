"""Compiles each kernel for `cuda:CAPABILITY`. No GPU is needed.

Prints its name, shared memory, asynchronous loads, and bytes a thread that did not fit into registers.

A launch is recorded, not made: the functions of `kernels/triton` are called on meta tensors of the real geometry, with
`JITFunction.run` in our hands, so that what is compiled is what would be launched.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ernie_serve.kernels.quantized import quantize
from ernie_serve.kernels.triton import (
    align,
    attention,
    experts,
    experts_of_one,
    linear,
    norm,
    one_row,
    prompt,
    rope,
    router,
    sampling,
)
from ernie_serve.kernels.triton.tiles import tile_for

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")
T, N, E, A, WIDTH, H, K, D, VOCAB = 64, 2560, 64, 6, 1536, 20, 4, 128, 103424

target = GPUTarget("cuda", int(sys.argv[1]), 32)
seen: set[str] = set()
prefix = ""  # what is said of kernels that are compiled for a card with less shared memory


def compile_instead(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    given = dict(zip(kernel.arg_names, args, strict=False)) | named
    signature, constants, attributes = {}, {}, {}
    for place, param in enumerate(kernel.params):
        value = given[param.name]
        if param.is_constexpr:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = "*" + TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    name = f"{kernel.fn.__name__} {sorted(constants.items())} {sorted(signature.items())} {sorted(options.items())}"
    if name in seen:
        return
    seen.add(name)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=target, options=options)
    label = f"{prefix}{kernel.fn.__name__}-{constants.get('FORMAT', '')}-{constants.get('BM', '')}-{len(seen)}"
    print(
        label,
        built.metadata.shared,
        built.asm["ptx"].count("cp.async.c"),
        *in_binary(built.asm["cubin"], kernel),
        flush=True,
    )


def in_binary(binary: bytes, kernel: JITFunction) -> tuple[int, int]:
    """Bytes a thread that did not fit into registers, and its loads before it computes or meets others.

    The loads are counted for the kernels of one row, which ask for much at once; of others that is -1, since taking a
    kernel apart takes about as long as compiling it.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        usage = told("cuobjdump", "-res-usage", file.name)
        code = told("nvdisasm", "-c", file.name) if kernel.fn.__name__ == "_one_row" else None
    spilled = int(re.findall(r"STACK:(\d+)", usage)[0])
    if code is None:
        return spilled, -1
    found = re.findall(r"\b(LDG|FFMA|FMUL|FADD|BAR)\.?[^;\n]*;", code)
    return spilled, next((i for i, each in enumerate(found) if each != "LDG"), len(found))


def told(tool: str, option: str, file: str) -> str:
    command = [Path(nvidia.__file__).parent / "bin" / tool, option, file]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


JITFunction.run = compile_instead
torch.set_default_device("meta")
x, delta, weight = torch.empty(T, N, dtype=torch.bfloat16), torch.empty(T, 8, N, dtype=torch.bfloat16), torch.empty(N)
norm.add_rms_norm(x, delta, weight.bfloat16(), 1e-5)
norm.add_rms_norm(x, None, weight.bfloat16(), 1e-5)
qkv = torch.empty(T, (H + 2 * K) * D, dtype=torch.bfloat16)
READS_FP8 = target.arch >= 89
for dtype in (torch.bfloat16, *([torch.float8_e4m3fn] if READS_FP8 else []), torch.uint8):
    cache = torch.empty(100, 64, K, D + 4 * (dtype == torch.uint8), dtype=dtype)
    slots = torch.empty(T, dtype=torch.int64)
    q = rope.rope_and_write(qkv, torch.empty(T, D // 2, 2), cache, cache, slots, H)
    tables, lens = torch.empty(T, 64, dtype=torch.int32), torch.empty(T, dtype=torch.int32)
    for splits in (1, 16) if dtype == torch.bfloat16 else (16,):
        attention.decode_attention(q, cache, cache, tables, lens, splits)
live = torch.empty(1, dtype=torch.int32)
weights, ids = router.route(x, torch.empty(E, N), torch.empty(E), A, 1e-12, live)
router.route(x, torch.empty(E, N), torch.empty(E), A, 1e-12, live, torch.empty_like(x, dtype=torch.float16))
for tokens in (T, 2048):
    align.align(torch.empty(tokens, A, dtype=torch.int32), E, 2, 16)
    align.sort(torch.empty(tokens, A, dtype=torch.int32), E)
for outputs in ((H + 2 * K) * D, VOCAB):
    linear.linear(x[:16], torch.empty(outputs, N, dtype=torch.bfloat16))
for format in ("int8", *(["fp8"] if READS_FP8 else [])):
    matrix = quantize(torch.empty((H + 2 * K) * D, N, dtype=torch.bfloat16), format)
    for tokens in (1, 64, 256):
        linear.linear(torch.empty(tokens, N, dtype=torch.bfloat16), matrix)
    linear.widened(matrix, torch.bfloat16)
    prefix = "small "
    linear.linear(x[:16], matrix, linear._OF_8_BITS_ON_SMALL)
    prefix = ""
for format in (None, "int8", *(["fp8"] if READS_FP8 else []), "int4"):
    made = [torch.empty(shape, dtype=torch.bfloat16) for shape in ((E, 2 * WIDTH, N), (E, N, WIDTH))]
    both = [torch.empty(shape, dtype=torch.bfloat16) for shape in ((4 * WIDTH, N), (N, 2 * WIDTH))]
    if format:
        made, both = ([quantize(each, format) for each in some] for some in (made, both))
    for tokens in (1, 128, 512) if format is None else (64, 512, 1200) if format == "int4" else (64,):
        rows = torch.empty(tokens, N, dtype=torch.float16 if format else torch.bfloat16)
        chances, picked = torch.empty(tokens, A, dtype=torch.bfloat16), torch.empty(tokens, A, dtype=torch.int32)
        experts.experts(rows, chances, picked, *made, tuple(both))
    prefix, rows = "small ", torch.empty(1200 if format else 512, N, dtype=torch.float16 if format else torch.bfloat16)
    chances, picked = (torch.empty(len(rows), A, dtype=dtype) for dtype in (torch.bfloat16, torch.int32))
    kind = "plain" if format is None else "int4" if format == "int4" else "row"
    tiles = tuple(tile_for(kernel, len(rows), kind, small=True) for kernel in ("gate_up", "down"))
    experts.experts(rows, chances, picked, *made, tuple(both), tiles=tiles)
    prefix = ""
    one = torch.empty(1, N, dtype=torch.float16 if format else torch.bfloat16)
    experts_of_one.experts_of_one(one, torch.empty(1, E), torch.empty(E), A, 1e-12, *made, tuple(both), x[:1])
x_row, g_row, one_slot = x[:1], weight.bfloat16(), torch.empty(1, dtype=torch.int64)
for format in (None, "int8", *(["fp8"] if READS_FP8 else [])):
    matrix = torch.empty((H + 2 * K) * D, N, dtype=torch.bfloat16)
    matrix = quantize(matrix, format) if format else matrix
    for dtype in (torch.bfloat16, *([torch.float8_e4m3fn] if READS_FP8 else [])):
        cache, angles = torch.empty(100, 64, K, D, dtype=dtype), torch.empty(1, D // 2, 2)
        one_row.linear_and_turn(x_row, matrix, g_row, 1e-5, angles, cache, cache, one_slot, H)
        one_row.linear_and_turn(x_row, matrix, None, 1e-5, angles, cache, cache, one_slot, H)
    for narrow in (N, 3072):
        for norm_weight in (None, torch.empty(narrow, dtype=torch.bfloat16)):
            gate = torch.empty(2 * narrow, narrow, dtype=torch.bfloat16)
            row = torch.empty(1, narrow, dtype=torch.bfloat16)
            one_row.linear(row, quantize(gate, format) if format else gate, norm_weight, 1e-5)
    square = torch.empty(N, N, dtype=torch.bfloat16)
    one_row.add_linear(x_row, x_row, quantize(square, format) if format else square)
one_row.scores(x_row, torch.empty(E, N), g_row, 1e-5, torch.float16)
prompt.swiglu(torch.empty(T, 2 * WIDTH, dtype=torch.bfloat16))
prompt.combine(x, torch.empty(T, A, dtype=torch.int64), chances[:T], x)
sampling.sample(torch.empty(T, VOCAB, dtype=torch.bfloat16), torch.empty(T, 4, dtype=torch.float64), live, VOCAB - 1)
prefix, experts.has_large_tiles = "float32 ", lambda device: False
cache = torch.empty(100, 64, K, D)
attention.decode_attention(torch.empty(1, H, D), cache, cache, tables[:1], lens[:1], 16)
router.route(torch.empty(512, N), torch.empty(E, N), torch.empty(E), A, 1e-12)
for format, tokens in ((None, 128), ("int8", 1), ("int4", 512)):
    made = [torch.empty(shape) for shape in ((E, 2 * WIDTH, N), (E, N, WIDTH))]
    if format:
        made = [quantize(each, format) for each in made]
    chances, picked = torch.empty(tokens, A), torch.empty(tokens, A, dtype=torch.int32)
    experts.experts(torch.empty(tokens, N), chances, picked, *made, None)
