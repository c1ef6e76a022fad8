"""Gated linear attention forward: state, products inside a chunk and output in one kernel, at any gate.

One program walks the chunks of one head's row (or segment of it) with BV value channels of the state in registers.
Key channels go in blocks of BK, so that four warps hold everything. Exponents are in base 2.

The decay between rows i >= j, 2^(b_i - b_j) with b the running sum of the gates, is split in two factors around a
reference row in the chunk's middle: one matrix product while both factors stay in range. Where they do not, or a
document begins inside the chunk, the chunk is slow: of it this kernel updates the state alone, whose factors are never
above 1, and what it makes of the output is dropped. slow_kernel, which skips all other chunks, walks those token by
token: exact for any gate, and no row sees anything of another document, NaN included.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.gla_states import ahead, starts
from stepladder.kernels.tiles import LOG2E, cdiv, dot, power, processors, split

LIMIT = {torch.bfloat16: 64, torch.float32: 16, torch.float16: 8}   # log2 of a factor: fp16 ends at 16, fp32 is precise


@triton.jit
def rows_of(z, row, D: tl.constexpr, x, seen):
    """Rows (C, x) of z (.., D), zero where not seen."""
    return tl.load(z + row[:, None] * D + x[None, :], mask=seen[:, None], other=0.0)


@triton.jit
def halves(g, r, C: tl.constexpr):
    """Sums of the gates up to the reference row C / 2, and after it, for exp2."""
    return (tl.sum(tl.where((r <= C // 2)[:, None], g, 0.0), 0) * LOG2E,
            tl.sum(tl.where((r > C // 2)[:, None], g, 0.0), 0) * LOG2E)


@triton.jit
def block(q, k, g, row, x, r, seen, mine, coming, bv, S, A, o, K: tl.constexpr, C: tl.constexpr):
    """S after the chunk, in BK key channels, what they add to the pairs A and the output o, and the least exponent."""
    bg = tl.where(mine[:, None], rows_of(g, row, K, x, seen).to(tl.float32), 0.0)
    bq, bk = rows_of(q, row, K, x, seen), rows_of(k, row, K, x, seen)
    left, right = halves(bg, r, C)
    e = tl.cumsum(bg, 0) * LOG2E - left[None, :]
    qs, ks = (bq * tl.exp2(e)).to(bv.dtype), (bk * tl.exp2(-e)).to(bv.dtype)
    A = dot(qs, tl.trans(ks), A)
    o = dot(qs, tl.where(coming, S * tl.exp2(left)[:, None], 0.0).to(bv.dtype), o)
    # a difference of sums loses what small gates say after large ones; beyond what 16 bits can tell it is right
    e = ahead(bg) if bv.dtype == tl.float32 else right[None, :] - e
    ks = tl.where(mine[:, None], bk * tl.exp2(e), 0.0).to(bv.dtype)
    S = dot(tl.trans(ks), bv, tl.where(coming, S * tl.exp2(left + right)[:, None], 0.0))
    return S, A, o, tl.minimum(tl.min(left), tl.min(right))


@triton.jit
def forward_kernel(q, k, v, g, doc, S_in, y, saved, pairs, slow, S_out, scale, T, chunks, SEGMENTS,
                   H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                   BV: tl.constexpr, LIMIT: tl.constexpr, SAVE: tl.constexpr, EVEN: tl.constexpr,
                   STAGES: tl.constexpr):
    tile, p = tl.program_id(0) % (V // BV), tl.program_id(0) // (V // BV)      # tiles of a head side by side: L2
    segment, bh = p % SEGMENTS, p // SEGMENTS
    b = (bh // H).to(tl.int64)
    N = tl.cdiv(T, C)
    r, x, w = tl.arange(0, C), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    causal = r[:, None] >= r[None, :]
    at = x[:, None] * V + w[None, :]
    S_in += p.to(tl.int64) * K * V
    doc += b * T
    Sa = tl.load(S_in + at)
    Sb = Sa
    if K > BK:
        Sb = tl.load(S_in + BK * V + at)
    begin, end = segment * chunks, tl.minimum(segment * chunks + chunks, N)
    for c in tl.range(begin, end, num_stages=STAGES, disable_licm=True):
        t = c * C + r
        seen = (t < T) | EVEN
        row = (b * T + t) * H + bh % H
        n = (b * N + c) * H + bh % H
        before = tl.load(doc + c * C - 1, mask=c > 0, other=0)
        first, last = tl.load(doc + c * C), tl.load(doc + tl.minimum(c * C + C, T) - 1)
        mine = tl.load(doc + t, mask=seen, other=-1) == last
        bv = rows_of(v, row, V, w, seen)
        bv = tl.where(mine[:, None], bv, 0.0).to(bv.dtype)
        Sa_in, Sb_in = Sa.to(bv.dtype), Sb.to(bv.dtype)
        A, o = tl.zeros([C, C], tl.float32), tl.zeros([C, BV], tl.float32)
        Sa, A, o, low = block(q, k, g, row, x, r, seen, mine, before == last, bv, Sa, A, o, K, C)
        if K > BK:
            Sb, A, o, lowest = block(q, k, g, row, BK + x, r, seen, mine, before == last, bv, Sb, A, o, K, C)
            low = tl.minimum(low, lowest)
        fast = (first == last) & (low >= -LIMIT)            # not where a gate is NaN
        tl.store(slow + n, 1 - fast.to(tl.int8))            # every tile writes the same
        wanted = SAVE | (fast == 0)                         # by the backward pass, or by the slow kernel
        tl.store(saved + n * K * V + at, Sa_in, mask=wanted)
        if K > BK:
            tl.store(saved + n * K * V + BK * V + at, Sb_in, mask=wanted)
        A = tl.where(causal, A, 0.0).to(bv.dtype)
        if SAVE:
            tl.store(pairs + (n * C + r[:, None]) * C + r[None, :], A, mask=tile == 0)
        o = dot(A, bv, o)
        tl.store(y + row[:, None] * V + w[None, :], (o * scale).to(bv.dtype), mask=(seen & fast)[:, None])
    if end == N:
        tl.store(S_out + bh.to(tl.int64) * K * V + at, Sa)
        if K > BK:
            tl.store(S_out + bh.to(tl.int64) * K * V + BK * V + at, Sb)


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
def slow_output(q, k, v, g, doc, saved, y, scale, T, n, w, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                C: tl.constexpr):
    """y of a chunk, token by token, in the value channels w."""
    n += tl.full([], 0, tl.int64)
    row, begin, count, h = tokens(n, T, H, C)
    x = tl.arange(0, K)
    S = tl.load(saved + n * K * V + x[:, None] * V + w[None, :]).to(tl.float32)
    before = tl.load(doc + row + begin - 1, mask=begin > 0, other=0)
    for i in range(count):
        at = (row + begin + i) * H + h
        now = tl.load(doc + row + begin + i)
        decay = tl.exp2(tl.load(g + at * K + x).to(tl.float32) * LOG2E)
        S = tl.where(now == before, S * decay[:, None], 0.0)
        S += tl.load(k + at * K + x).to(tl.float32)[:, None] * tl.load(v + at * V + w).to(tl.float32)[None, :]
        o = tl.sum(tl.load(q + at * K + x).to(tl.float32)[:, None] * S, 0)
        tl.store(y + at * V + w, (o * scale).to(y.dtype.element_ty))
        before = now


@triton.jit
def slow_kernel(q, k, v, g, doc, saved, slow, y, scale, T, total, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                C: tl.constexpr, BV: tl.constexpr, WIDTH: tl.constexpr):
    parts: tl.constexpr = V // BV
    if any_slow(slow, total, parts, WIDTH):
        for p in range(tl.program_id(0), total, tl.num_programs(0)):
            if tl.load(slow + p // parts) != 0:
                slow_output(q, k, v, g, doc, saved, y, scale, T, p // parts, p % parts * BV + tl.arange(0, BV), H, K, V,
                            C)


# Value channels of a tile, warps, stages. The first is run; the others are for a bench to compare.
FORWARD = ((64, 4, 2), (64, 4, 1), (32, 4, 2), (64, 4, 3))
FEW = 16        # channels of a slow program: one warp holds its state


def segments(T: int, programs: int, chunk: int, x: Tensor) -> int:
    """How many parts of a row run at once: enough for two programs a processor, each of eight chunks or more."""
    return max(1, min(2 * processors(x) // max(programs, 1), T // (8 * chunk)))


def share(total: int, x: Tensor) -> tuple[int, int]:
    """Programs for `total` pieces most of which are no work, and how many pieces each has, as a power of two."""
    programs = min(total, 16 * processors(x))
    return programs, power(cdiv(total, programs))


def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, doc: Tensor, S: Tensor, scale: float, save: bool,
            chunk: int = 64, segment: int = 0, block: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y of scale * q; the state after; for backward, states before each chunk, pairs (save) and which chunks are slow.

    Contiguous q, k, g (B, T, H, K), v (B, T, H, V), doc (B, T) int32, S (B, H, K, V) fp32. segment: how many parts a
    row is cut into; block: key channels at a time; 0 for what the shape asks for.
    """
    B, T, H, K = q.shape
    V, N = v.shape[-1], cdiv(T, chunk)
    tile, warps, stages = FORWARD[0]
    BK, BV = block or min(K, 64), min(V, tile)
    each, count = split(N, segment or segments(T, B * H * V // BV, chunk, q))
    begin = starts(k, v, g, doc, S, 1.0, each, chunk, back=False)
    y, S_out, saved = torch.empty_like(v), torch.empty_like(S), q.new_empty(B, N, H, K, V)
    pairs = q.new_empty(B, N, H, chunk, chunk) if save else q.new_empty(0)
    slow = torch.empty((B, N, H), dtype=torch.int8, device=q.device)
    forward_kernel[(B * H * count * V // BV,)](
        q, k, v, g, doc, begin, y, saved, pairs, slow, S_out, scale, T, each, count, H, K, V, chunk, BK, BV,
        LIMIT[q.dtype], save, T % chunk == 0, stages, num_warps=warps, num_stages=stages)
    few = min(V, FEW)
    total = B * N * H * V // few
    programs, width = share(total, q)
    slow_kernel[(programs,)](q, k, v, g, doc, saved, slow, y, scale, T, total, H, K, V, chunk, few, width, num_warps=1)
    return y, S_out, saved, pairs, slow
