"""Weights of 8 and 4 bits as half precision, exactly, in about one instruction each.

A weight-only format saves time only while widening costs less than reading. The processor's own conversions of single
bytes run at an eighth of the rate of its arithmetic; so an integer is put, by its bits, into the lower end of a number
between 1024 and 2048, whose steps are 1, and that offset is taken off again. e4m3 has an instruction for two at once.

The interpreter, which knows no assembly, converts plainly (`PLAINLY`).
Source: own; the offset is the old trick of converting integers to floats.
"""

import triton
import triton.language as tl


@triton.jit
def bytes_as_half(w, PLAINLY: tl.constexpr):
    """int8 or e4m3 as float16."""
    if PLAINLY or w.dtype != tl.int8:
        return w.to(tl.float16)
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 bits, magic, offset;
        mov.b32 magic, 0x64646464;
        mov.b32 offset, 0x64806480;
        xor.b32 bits, $2, 0x80808080;
        prmt.b32 $0, bits, magic, 0x4140;
        prmt.b32 $1, bits, magic, 0x4342;
        sub.f16x2 $0, $0, offset;
        sub.f16x2 $1, $1, offset;
        }""",
        "=&r,=&r,r",
        [w],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def nibbles_as_half(packed, PLAINLY: tl.constexpr):
    """The low and the high halves of bytes, less 8, as float16."""
    if PLAINLY:
        low = (packed & 15).to(tl.int8) - 8
        high = (packed >> 4).to(tl.int8) - 8
        return low.to(tl.float16), high.to(tl.float16)
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 first, second, low, high, magic, offset, sixteenth, other;
        mov.b32 low, 0x000F000F;
        mov.b32 high, 0x00F000F0;
        mov.b32 magic, 0x64006400;
        mov.b32 offset, 0x64086408;
        mov.b32 sixteenth, 0x2C002C00;
        mov.b32 other, 0xD480D480;
        prmt.b32 first, $4, 0, 0x4140;
        prmt.b32 second, $4, 0, 0x4342;
        lop3.b32 $0, first, low, magic, 0xEA;
        lop3.b32 $1, second, low, magic, 0xEA;
        lop3.b32 $2, first, high, magic, 0xEA;
        lop3.b32 $3, second, high, magic, 0xEA;
        sub.f16x2 $0, $0, offset;
        sub.f16x2 $1, $1, offset;
        fma.rn.f16x2 $2, $2, sixteenth, other;
        fma.rn.f16x2 $3, $3, sixteenth, other;
        }""",
        "=&r,=&r,=&r,=&r,r",
        [packed],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )
