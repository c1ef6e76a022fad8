"""Gated linear attention forward: chunks' factors and the walk over them (gla_states.py), then chunks that were slow.

What the walk makes of a slow chunk's output is wrong, and may be NaN. slow_kernel, which skips all other chunks, makes
it anew, token by token: exact for any gate, and no row sees anything of another document, NaN included.
"""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.gla_states import WALK, factors, starts, walk
from stepladder.kernels.tiles import LOG2E, cdiv, power, processors, split


@triton.jit
def any_slow(slow, total, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Whether a program has work: every num_programs-th of `total` pieces, PARTS of them for each chunk of a head."""
    pieces = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, WIDTH)
    return tl.max(tl.load(slow + pieces // PARTS, mask=pieces < total, other=0).to(tl.int32)) > 0


@triton.jit
def tokens(n, T, H: tl.constexpr, C: tl.constexpr):
    """Of chunk n of all rows and heads: its row's first token, its own first, how many it has, and its head."""
    N = tl.cdiv(T, C)
    return n // H // N * T, n // H % N * C, tl.minimum(C, T - n // H % N * C), n % H


@triton.jit
def slow_output(q, k, v, g, start, saved, y, scale, T, n, w, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                C: tl.constexpr):
    """y of a chunk, token by token, in the value channels w."""
    n += tl.full([], 0, tl.int64)
    row, begin, count, h = tokens(n, T, H, C)
    x = tl.arange(0, K)
    S = tl.load(saved + n * K * V + x[:, None] * V + w[None, :]).to(tl.float32)
    for i in range(count):
        at = (row + begin + i) * H + h
        decay = tl.exp2(tl.load(g + at * K + x).to(tl.float32) * LOG2E)
        S = tl.where(tl.load(start + row + begin + i) != 0, 0.0, S * decay[:, None])
        S += tl.load(k + at * K + x).to(tl.float32)[:, None] * tl.load(v + at * V + w).to(tl.float32)[None, :]
        o = tl.sum(tl.load(q + at * K + x).to(tl.float32)[:, None] * S, 0)
        tl.store(y + at * V + w, (o * scale).to(y.dtype.element_ty))


@triton.jit
def slow_kernel(q, k, v, g, start, saved, slow, y, scale, T, total, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                C: tl.constexpr, BV: tl.constexpr, WIDTH: tl.constexpr):
    parts: tl.constexpr = V // BV
    if any_slow(slow, total, parts, WIDTH):
        for p in range(tl.program_id(0), total, tl.num_programs(0)):
            if tl.load(slow + p // parts) != 0:
                slow_output(q, k, v, g, start, saved, y, scale, T, p // parts, p % parts * BV + tl.arange(0, BV), H,
                            K, V, C)


FEW = 16        # channels of a slow program: one warp holds its state


def segments(T: int, programs: int, chunk: int, x: Tensor) -> int:
    """How many parts of a row run at once: enough for two programs a processor, each of eight chunks or more."""
    return max(1, min(2 * processors(x) // max(programs, 1), T // (8 * chunk)))


def share(total: int, x: Tensor) -> tuple[int, int]:
    """Programs for `total` pieces most of which are no work, and how many pieces each has, as a power of two."""
    programs = min(total, 16 * processors(x))
    return programs, power(cdiv(total, programs))


def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor, scale: float, save: bool,
            chunk: int = 64, segment: int = 0, block: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y of scale * q; the state after; for backward, states before each chunk (save) and which chunks are slow.

    Contiguous q, k, g (B, T, H, K), v (B, T, H, V), start (B, T) uint8, 1 where a document begins, S (B, H, K, V)
    fp32. segment: how many parts a row is cut into; block: key channels at a time; 0 for what the shape asks for.
    """
    B, T, H, K = q.shape
    V, N = v.shape[-1], cdiv(T, chunk)
    each, _ = split(N, segment or segments(T, B * H * cdiv(V, WALK[0][0]), chunk, q))
    made = factors(q, k, g, start, scale, chunk, False, block)
    y, saved, ends = walk(made, v, starts(made, v, S, each, False), each, save, False)
    few = min(V, FEW)
    total = B * N * H * V // few
    programs, width = share(total, q)
    slow_kernel[(programs,)](q, k, v, g, start, saved, made.slow, y, scale, T, total, H, K, V, chunk, few, width,
                            num_warps=1)
    return y, ends[:, :, -1].contiguous(), saved, made.slow
