"""Gated linear attention forward: state, products inside a chunk and output in one kernel, at any gate.

One program walks the chunks of one head's row (or segment of it) with BV value channels of the state in registers.
Key channels go in blocks of BK, so that four warps hold everything. Exponents are in base 2.

The decay between rows i >= j, 2^(b_i - b_j) with b the running sum of the gates, is split in two factors around a
reference row in the chunk's middle: one matrix product while both factors stay in range. Where they do not, or a
document begins inside the chunk, the chunk is slow: this kernel updates the state alone, and a second one, which skips
all other chunks, makes the output. It takes each document of the chunk by itself with all other rows
loaded as zeros, so nothing of them is seen, NaN included; and splits by halves, where both factors are at most 1, until
the range allows the rest at once, so any gate is exact.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.gla_states import push, sweep
from stepladder.kernels.tiles import LOG2E, cdiv, dot, power, processors, split

LIMIT = {torch.bfloat16: 64, torch.float32: 16, torch.float16: 8}   # log2 of a factor: fp16 ends at 16, fp32 is precise


@triton.jit
def sums(M, g, PARTS: tl.constexpr):
    """M @ g for M of -1, 0 and 1, in PARTS bf16 pieces of g: one is exact for bf16 gates, three for fp32."""
    g = g.to(tl.float32)
    part = g.to(tl.bfloat16)
    M = M.to(tl.float32).to(tl.bfloat16)             # by fp32: the interpreter takes the bits of a bool as they are
    out = dot(M, part)
    for _ in tl.static_range(1, PARTS):
        g -= part.to(tl.float32)
        part = g.to(tl.bfloat16)
        out = dot(M, part, out)
    return out * LOG2E


@triton.jit
def sums_t(g, M, PARTS: tl.constexpr):
    """g @ M, as above: products of a transposed tile are formed anew, never by transposing a product in registers."""
    g = g.to(tl.float32)
    part = g.to(tl.bfloat16)
    out = dot(part, M.to(tl.bfloat16))
    for _ in tl.static_range(1, PARTS):
        g -= part.to(tl.float32)
        part = g.to(tl.bfloat16)
        out = dot(part, M.to(tl.bfloat16), out)
    return out * LOG2E


@triton.jit
def since(i, t, here):
    """The matrix of b_i - b_here over gates t: no sum is a difference of two, so small gates survive large ones."""
    return ((t > here) & (t <= i)).to(tl.float32) - ((t > i) & (t <= here)).to(tl.float32)


@triton.jit
def rows_of(z, row, D: tl.constexpr, x, seen):
    """Rows (C, x) of z (.., D), zero where not seen; the same transposed is cols_of."""
    return tl.load(z + row[:, None] * D + x[None, :], mask=seen[:, None], other=0.0)


@triton.jit
def cols_of(z, row, D: tl.constexpr, x, seen):
    return tl.load(z + row[None, :] * D + x[:, None], mask=seen[None, :], other=0.0)


@triton.jit
def attend(q, k, g, row, seen, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
           LIMIT: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(C, C) of sum_x q_ix k_jx 2^(b_ix - b_jx), i >= j, over the rows seen, at any gate. TRANSPOSED: q is the keys."""
    r = tl.arange(0, C)
    i, j = r[:, None], r[None, :]
    A = tl.zeros([C, C], tl.float32)
    for at in range(0, K, BK):
        x = at + tl.arange(0, BK)
        bq, kt = rows_of(q, row, K, x, seen), cols_of(k, row, K, x, seen)
        bg, gt = rows_of(g, row, K, x, seen), cols_of(g, row, K, x, seen)
        size = tl.full([], C, tl.int32)
        while size > 0:         # blocks of `size` rows: the pairs that span their halves, or all of them at once
            here = r // size * size + size // 2
            e, et = sums(since(i, j, here[:, None]), bg, PARTS), sums_t(gt, since(j, i, here[None, :]), PARTS)
            whole = (tl.max(tl.abs(e)) <= LIMIT) | (size == 1)
            both = tl.where(whole, size, 0)              # added to a row's number, puts it on both sides of here
            if TRANSPOSED:
                e, et, rows, cols, causal = -e, -et, r < here + both, r + both >= here, i <= j
            else:
                rows, cols, causal = r + both >= here, r < here + both, i >= j
            qs = bq * tl.exp2(tl.where(rows[:, None], e, float("-inf")))
            ks = kt * tl.exp2(tl.where(cols[None, :], -et, float("-inf")))
            spanned = (here[:, None] == here[None, :]) & rows[:, None] & cols[None, :] & causal
            # after the product: what is not asked for may have overflowed
            A += tl.where(spanned, dot(qs.to(bq.dtype), ks.to(bq.dtype)), 0.0)
            size = tl.where(whole, 0, size // 2)
    return A


@triton.jit
def block(q, k, g, row, x, left, bv, S, A, o, K: tl.constexpr, seen):
    """What BK key channels of a chunk add to the state S, the pairs A and the output o, in the frame of the middle."""
    e = tl.cumsum(g.to(tl.float32), 0) * LOG2E - left[None, :]
    qs = (rows_of(q, row, K, x, seen) * tl.exp2(e)).to(bv.dtype)
    ks = (rows_of(k, row, K, x, seen) * tl.exp2(-e)).to(bv.dtype)
    S *= tl.exp2(left)[:, None]
    return dot(tl.trans(ks), bv, S), dot(qs, tl.trans(ks), A), dot(qs, S.to(bv.dtype), o)


@triton.jit
def halves(g, r, C: tl.constexpr):
    """Sums of the gates up to the reference row C / 2, and after it."""
    g = g.to(tl.float32)
    return (tl.sum(tl.where((r <= C // 2)[:, None], g, 0.0), 0) * LOG2E,
            tl.sum(tl.where((r > C // 2)[:, None], g, 0.0), 0) * LOG2E)


@triton.jit
def forward_kernel(q, k, v, g, doc, S_in, y, saved, slow, S_out, scale, T, chunks, SEGMENTS,
                   H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                   BV: tl.constexpr, LIMIT: tl.constexpr, SAVE: tl.constexpr, EVEN: tl.constexpr,
                   STAGES: tl.constexpr):
    tile, p = tl.program_id(0) % (V // BV), tl.program_id(0) // (V // BV)      # tiles of a head side by side: L2
    segment, bh = p % SEGMENTS, p // SEGMENTS
    b = (bh // H).to(tl.int64)
    N = tl.cdiv(T, C)
    r, x, w = tl.arange(0, C), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    at = x[:, None] * V + w[None, :]
    S_in += p.to(tl.int64) * K * V
    doc += b * T
    Sa = tl.load(S_in + at)
    Sb = Sa
    if K > BK:
        Sb = tl.load(S_in + BK * V + at)
    begin, end = segment * chunks, tl.minimum(segment * chunks + chunks, N)
    before = tl.load(doc + begin * C - 1, mask=begin > 0, other=0)
    for c in tl.range(begin, end, num_stages=STAGES):
        t = c * C + r
        seen = (t < T) | EVEN
        row = (b * T + t) * H + bh % H
        first, last = tl.load(doc + c * C), tl.load(doc + tl.minimum(c * C + C, T) - 1)
        n = (b * N + c) * H + bh % H
        bv, ga = rows_of(v, row, V, w, seen), rows_of(g, row, K, x, seen)
        la, ra = halves(ga, r, C)
        low = tl.minimum(tl.min(la), tl.min(ra))
        if K > BK:
            gb = rows_of(g, row, K, BK + x, seen)
            lb, rb = halves(gb, r, C)
            low = tl.minimum(low, tl.minimum(tl.min(lb), tl.min(rb)))
        fast = (first == last) & (low >= -LIMIT)
        tl.store(slow + n, 1 - fast.to(tl.int8))           # every tile writes the same
        if SAVE | (not fast):
            tl.store(saved + n * K * V + at, Sa.to(bv.dtype))
            if K > BK:
                tl.store(saved + n * K * V + BK * V + at, Sb.to(bv.dtype))
        if fast:
            if first != before:
                Sa, Sb = tl.zeros_like(Sa), tl.zeros_like(Sb)
            A, o = tl.zeros([C, C], tl.float32), tl.zeros([C, BV], tl.float32)
            Sa, A, o = block(q, k, ga, row, x, la, bv, Sa, A, o, K, seen)
            Sa *= tl.exp2(ra)[:, None]
            if K > BK:
                Sb, A, o = block(q, k, gb, row, BK + x, lb, bv, Sb, A, o, K, seen)
                Sb *= tl.exp2(rb)[:, None]
            o = dot(tl.where(r[:, None] >= r[None, :], A, 0.0).to(bv.dtype), bv, o)
            tl.store(y + row[:, None] * V + w[None, :], (o * scale).to(bv.dtype), mask=seen[:, None])
        else:
            mine = tl.load(doc + t, mask=seen, other=-1) == last
            vd = rows_of(v, row, V, w, mine)
            Sa, _ = push(k, g, row, x, vd, Sa, mine, before == last, 1.0, H, K, C, False)
            if K > BK:
                Sb, _ = push(k, g, row, BK + x, vd, Sb, mine, before == last, 1.0, H, K, C, False)
        before = last
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
def slow_output(q, k, v, g, doc, saved, y, scale, T, n, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, LIMIT: tl.constexpr):
    n += tl.full([], 0, tl.int64)
    N = tl.cdiv(T, C)
    b, c, h = n // H // N, n // H % N, n % H
    r = tl.arange(0, C)
    t = c * C + r
    row = (b * T + t) * H + h
    docs = tl.load(doc + b * T + t, mask=t < T, other=-1)
    before, last = tl.load(doc + b * T + c * C - 1, mask=c > 0, other=0), tl.max(docs)
    for d in range(before, last + 1):
        mine = docs == d
        A = attend(q, k, g, row, mine, K, C, BK, PARTS, LIMIT, False).to(v.dtype.element_ty)
        for at in range(0, V, BV):
            w = at + tl.arange(0, BV)
            o = dot(A, rows_of(v, row, V, w, mine))
            if d == before:
                for ax in range(0, K, BK):
                    x = ax + tl.arange(0, BK)
                    b_in = tl.cumsum(rows_of(g, row, K, x, mine).to(tl.float32), 0) * LOG2E
                    qs = (rows_of(q, row, K, x, mine) * tl.exp2(b_in)).to(A.dtype)
                    o = dot(qs, tl.load(saved + n * K * V + x[:, None] * V + w[None, :]), o)
            tl.store(y + row[:, None] * V + w[None, :], (o * scale).to(A.dtype), mask=mine[:, None])


@triton.jit
def slow_forward_kernel(q, k, v, g, doc, saved, slow, y, scale, T, total,
                        H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                        BV: tl.constexpr, PARTS: tl.constexpr, LIMIT: tl.constexpr, WIDTH: tl.constexpr):
    if any_slow(slow, total, 1, WIDTH):
        for n in range(tl.program_id(0), total, tl.num_programs(0)):
            if tl.load(slow + n) != 0:
                slow_output(q, k, v, g, doc, saved, y, scale, T, n, H, K, V, C, BK, BV, PARTS, LIMIT)


# Value channels of a tile, warps, stages. The first is run; the others are for a bench to compare.
FORWARD = ((64, 4, 1), (64, 8, 1), (64, 4, 2), (128, 8, 1))


def parts(q: Tensor, g: Tensor) -> int:
    """bf16 pieces that a gate is taken in: enough for q's precision."""
    return 1 if g.dtype == torch.bfloat16 else 3 if q.dtype == torch.float32 else 2


def segments(T: int, programs: int, chunk: int, x: Tensor) -> int:
    """How many parts of a row run at once: enough for two programs a processor, each of eight chunks or more."""
    return max(1, min(2 * processors(x) // max(programs, 1), T // (8 * chunk)))


def share(total: int, x: Tensor) -> tuple[int, int]:
    """Programs for `total` pieces most of which are no work, and how many pieces each has, as a power of two.

    A program for each piece would be gone at once, but with all its registers no other runs beside it meanwhile.
    """
    programs = min(total, 4 * processors(x))
    return programs, power(cdiv(total, programs))


def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, doc: Tensor, S: Tensor, scale: float, save: bool,
            chunk: int = 64, segment: int = 0, block: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y of scale * q; the state after; for backward, states before each chunk (save) and which chunks are slow.

    Contiguous q, k, g (B, T, H, K), v (B, T, H, V), doc (B, T) int32, S (B, H, K, V) fp32. segment: how many parts a
    row is cut into; block: key channels at a time; 0 for what the shape asks for.
    """
    B, T, H, K = q.shape
    V, N = v.shape[-1], cdiv(T, chunk)
    tile, warps, stages = FORWARD[0]
    BK, BV = block or min(K, 64), min(V, tile)
    segment = segment or segments(T, B * H * V // BV, chunk, q)
    each, count = split(N, segment)
    S_in = S if count == 1 else sweep(k, v, g, doc, S, 1.0, each, chunk, back=False, saved=None)
    y, S_out, saved = torch.empty_like(v), torch.empty_like(S), q.new_empty(B, N, H, K, V)
    slow = torch.empty((B, N, H), dtype=torch.int8, device=q.device)
    forward_kernel[(B * H * count * V // BV,)](
        q, k, v, g, doc, S_in, y, saved, slow, S_out, scale, T, each, count, H, K, V, chunk, BK, BV, LIMIT[q.dtype],
        save, T % chunk == 0, stages, num_warps=warps, num_stages=stages)
    programs, width = share(B * N * H, q)
    slow_forward_kernel[(programs,)](q, k, v, g, doc, saved, slow, y, scale, T, B * N * H, H, K, V, chunk, min(BK, 32),
                                     min(V, 64), parts(q, g), LIMIT[q.dtype], width, num_warps=8, num_stages=1)
    return y, S_out, saved, slow
