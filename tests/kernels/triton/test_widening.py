"""The assembly that widens bytes and nibbles, which the interpreter cannot run: here it is, an instruction at a time.

Instructions are those of the PTX ISA, as far as the kernels use them; a register is an int of 32 bits.
"""

import inspect
import re
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl

from ernie_serve.kernels.triton import widening

HALF, BFLOAT = torch.float16, torch.bfloat16


def numbers(register: int, dtype: torch.dtype) -> torch.Tensor:
    """The two numbers of 16 bits in a register, the lower first, in float32."""
    return torch.tensor([register], dtype=torch.int64).to(torch.int32).view(dtype).float()


def register(values: torch.Tensor, dtype: torch.dtype) -> int:
    return int(values.to(dtype).view(torch.int32).item()) & 0xFFFFFFFF


def prmt(a: int, b: int, selector: int) -> int:
    data = (a | b << 32).to_bytes(8, "little")
    return int.from_bytes(bytes(data[selector >> 4 * i & 7] for i in range(4)), "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32))
    return sum((table >> bit & 1) << i for i, bit in enumerate(bits))


def e4m3(pair: int) -> int:
    return register(torch.tensor(list(pair.to_bytes(2, "little")), dtype=torch.uint8).view(torch.float8_e4m3fn), HALF)


def arithmetic(dtype, work):
    return lambda *registers: register(work(*(numbers(each, dtype) for each in registers)), dtype)


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "sub.f16x2": arithmetic(HALF, lambda a, b: a - b),
    "fma.rn.f16x2": arithmetic(HALF, lambda a, b, c: a * b + c),
    "fma.rn.bf16x2": arithmetic(BFLOAT, lambda a, b, c: a * b + c),
    "cvt.rn.f16x2.e4m3x2": e4m3,
}


def assembly(name: str) -> str:
    """The assembly of a function, or that which has a name of its own."""
    found = getattr(widening, name)
    if isinstance(found, tl.constexpr):
        return found.value
    [text] = re.findall(r'"""(\{.*?\})"""', inspect.getsource(found.fn), re.S)
    return text


def run(text: str, argument: int, num_results: int) -> list[int]:
    registers = {f"${num_results}": argument}

    def value(word: str) -> int:
        return registers[word] if word in registers else int(word, 16 if word.startswith("0x") else 10)

    for line in filter(None, (part.strip() for part in text.strip("{} \n").split(";"))):
        name, rest = line.split(None, 1)
        if name == ".reg":
            continue
        if halves := re.match(r"\{(\w+), (\w+)\}, (\S+)", rest):  # a register taken apart
            registers[halves[1]], registers[halves[2]] = value(halves[3]) & 0xFFFF, value(halves[3]) >> 16
            continue
        target, *words = (word.strip() for word in rest.split(","))
        registers[target] = INSTRUCTIONS[name](*map(value, words))
    return [registers[f"${i}"] for i in range(num_results)]


def every_byte() -> Iterator[tuple[int, torch.Tensor]]:
    """Registers of four bytes, so that each byte stands at each place, beside its fellows or itself."""
    for step in (0, 1, 85):
        for b in range(256):
            four = [(b + step * i) % 256 for i in range(4)]
            yield int.from_bytes(bytes(four), "little"), torch.tensor(four, dtype=torch.uint8)


def int8(data: torch.Tensor) -> torch.Tensor:
    return data.view(torch.int8).float()


def fp8(data: torch.Tensor) -> torch.Tensor:
    return data.view(torch.float8_e4m3fn).float()


@pytest.mark.parametrize(
    ("name", "dtype", "plainly", "order"),
    [
        ("bytes_as_half", HALF, int8, (0, 1, 2, 3)),
        ("_BYTES_IN_ORDER", BFLOAT, int8, (0, 1, 2, 3)),
        ("_BYTES_APART", BFLOAT, int8, (0, 2, 1, 3)),
        ("_E4M3_AS_BFLOAT", BFLOAT, fp8, (0, 1, 2, 3)),
        ("pairs_apart", HALF, fp8, (0, 2, 1, 3)),
    ],
)
def test_every_byte_is_the_number_it_stands_for(name, dtype, plainly, order):
    text = assembly(name)
    for argument, data in every_byte():
        got = torch.cat([numbers(each, dtype) for each in run(text, argument, 2)])
        want = plainly(data)[list(order)]
        is_kept = want.isfinite() if name == "_E4M3_AS_BFLOAT" else torch.ones(4, dtype=torch.bool)
        torch.testing.assert_close(got[is_kept], want[is_kept], rtol=0, atol=0, equal_nan=True)


def test_every_nibble_is_itself_less_8():
    text = assembly("nibbles_as_half")
    for argument, data in every_byte():
        low, high = data.float() % 16 - 8, (data // 16).float() - 8
        got = torch.cat([numbers(each, HALF) for each in run(text, argument, 4)])
        assert torch.equal(got, torch.cat((low, high)))
