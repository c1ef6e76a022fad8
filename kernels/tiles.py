"""What kernels share."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Read once, as triton reads it: kernels are interpreted on the CPU, one operation at a time (TRITON_INTERPRET=1).
INTERPRET: bool = triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue]
LOG2E = tl.constexpr(1.4426950408889634)      # exponents are formed for exp2: one instruction, no multiplication
_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc), summed in fp32; products of fp32 tiles take three tf32 passes and are right to some 1e-6.

    The interpreter multiplies bf16 as the integers that hold its bits, without a word: there, both are made fp32.
    """
    if _INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if acc is None:
        return tl.dot(a, b, input_precision="tf32x3")
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of fp32, to some 1e-7 (1 + |x|) of itself as tl.sigmoid, in 4 instructions where that takes 12:
    those that flush numbers below 2^-126 to 0 need not scale others out of their way. A NaN stays one."""
    if _INTERPRET:
        return tl.sigmoid(x)
    x = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -LOG2E], tl.float32, True, 1)
    x += 1
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def fetch(p, there):
    """Have the L2 cache load what p points to, if `there`, without waiting. The interpreter has no caches."""
    if not _INTERPRET:
        tl.inline_asm_elementwise("{ .reg .pred p; setp.ne.u32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
                                  "=r,l,r", [p.to(tl.int64), tl.cast(there, tl.int32)], tl.int32, False, 1)


def cdiv(n: int, tile: int) -> int:
    """Tiles that cover n. triton's own functions, of this and the next, are typed for use inside kernels."""
    return -(-n // tile)


def power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def split(chunks: int, wanted: int) -> tuple[int, int]:
    """A row in segments that run side by side: chunks of one, and how many there are; none is empty."""
    each = cdiv(chunks, max(wanted, 1))
    return each, cdiv(chunks, each)


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of x's device; those of an H100 where there is none to ask."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
