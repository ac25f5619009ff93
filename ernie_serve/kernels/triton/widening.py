"""Weights of 8 and 4 bits as half precision, exactly, in about one instruction each.

A weight-only format saves time only while widening costs less than reading. The processor's own conversions of single
bytes run at an eighth of the rate of its arithmetic; so an integer is put, by its bits, into the lower end of a number
between 1024 and 2048, whose steps are 1, and that offset is taken off again. e4m3 has an instruction for two at once,
but none to bfloat16.

The interpreter, which knows no assembly, converts plainly (`PLAINLY`).
Source: own; the offset is the old trick of converting integers to floats.
"""

import triton
import triton.language as tl

_INT8_AS_BFLOAT = """{
.reg .b32 first, second, number, offset, magic, minus;
mov.b32 magic, 0x43434343;
mov.b32 minus, 0xBF80BF80;
prmt.b32 first, $2, magic, %s;
prmt.b32 second, $2, magic, %s;
and.b32 number, first, 0x437F437F;
and.b32 offset, first, 0x43804380;
fma.rn.bf16x2 $0, offset, minus, number;
and.b32 number, second, 0x437F437F;
and.b32 offset, second, 0x43804380;
fma.rn.bf16x2 $1, offset, minus, number;
}"""
"""Behind 0x43 seven bits of a byte are 128 and more, and the eighth is what to take off, as 128 or 256."""
_BYTES_IN_ORDER = tl.constexpr(_INT8_AS_BFLOAT % ("0x4140", "0x4342"))
_BYTES_APART = tl.constexpr(_INT8_AS_BFLOAT % ("0x4240", "0x4341"))


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
def as_float(w, FORMAT: tl.constexpr, PLAINLY: tl.constexpr):
    """Weights, of 8 bits where FORMAT is "row", as float32."""
    if FORMAT == "row":
        return bytes_as_half(w, PLAINLY).to(tl.float32)
    return w.to(tl.float32)


_E4M3_AS_BFLOAT = tl.constexpr("""{
.reg .b32 first, second, sign, factor, zero;
mov.b32 factor, 0x7B807B80;
mov.b32 zero, 0x80008000;
prmt.b32 first, $2, 0, 0x1404;
prmt.b32 second, $2, 0, 0x3424;
and.b32 sign, first, 0x80008000;
shr.u32 first, first, 4;
lop3.b32 first, first, 0x07F007F0, sign, 0xEA;
fma.rn.bf16x2 $0, first, factor, zero;
and.b32 sign, second, 0x80008000;
shr.u32 second, second, 4;
lop3.b32 second, second, 0x07F007F0, sign, 0xEA;
fma.rn.bf16x2 $1, second, factor, zero;
}""")
"""Four bits of exponent and three behind the point, in the places of a bfloat16's lowest: 2^120 times too small."""


@triton.jit
def bytes_as_bfloat(w):
    """int8, or e4m3 but for its not-a-number, as bfloat16."""
    return tl.inline_asm_elementwise(
        _BYTES_IN_ORDER if w.dtype == tl.int8 else _E4M3_AS_BFLOAT,
        "=&r,=&r,r",
        [w],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def pairs_apart(words, FORMAT: tl.constexpr, TO: tl.constexpr):
    """The low and the high bytes of int16, which are int8 or e4m3 by FORMAT ("int8", "fp8").

    In float32 for any format and without assembly, else int8 in bfloat16 and e4m3 in float16.
    """
    if tl.float32 == TO:
        low = (words & 255).to(tl.uint8)
        high = ((words >> 8) & 255).to(tl.uint8)
        if FORMAT == "int8":
            low = low.to(tl.int8, bitcast=True).to(TO)
            high = high.to(tl.int8, bitcast=True).to(TO)
        else:
            low = low.to(tl.float8e4nv, bitcast=True).to(TO)
            high = high.to(tl.float8e4nv, bitcast=True).to(TO)
    elif FORMAT == "int8":
        low, high = tl.inline_asm_elementwise(
            _BYTES_APART,
            "=&r,=&r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b16 first, second;
            .reg .b32 one, other;
            mov.b32 {first, second}, $2;
            cvt.rn.f16x2.e4m3x2 one, first;
            cvt.rn.f16x2.e4m3x2 other, second;
            prmt.b32 $0, one, other, 0x5410;
            prmt.b32 $1, one, other, 0x7632;
            }""",
            "=&r,=&r,r",
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return low, high


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
