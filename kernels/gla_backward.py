"""Gated linear attention backward: from the last chunk to the first dS and dv, then all chunks' dq, dk, dg at once.

With e the decay from the chunk's middle row (gla.py), S the state before the chunk and dS the gradient of the state
after it, dA = tril(dy v^T) and P = tril(q k^T, decayed), which forward saved:
    dq = 2^e (dA k 2^-e + dy S^T 2^left)    dk = 2^-e (dA^T q 2^e + v dS^T 2^right)    dv = P^T dy + k 2^(right - e) dS
gate() makes dg of q dq, k dk and what passes through the chunk.
Transposed products are formed anew. Chunks that were slow forward are walked token by token here too.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.gla import FEW, any_slow, halves, rows_of, segments, share, tokens
from stepladder.kernels.gla_states import ahead, starts
from stepladder.kernels.tiles import LOG2E, cdiv, dot, split


@triton.jit
def back(q, k, g, row, x, seen, since, until, coming, bd, bd_in, dS, dv, scale, K: tl.constexpr):
    """dS before a chunk in BK key channels, and dv with what the state after the chunk asks of it."""
    bg = rows_of(g, row, K, x, seen).to(tl.float32)
    ks = tl.where(until[:, None], rows_of(k, row, K, x, seen) * tl.exp2(ahead(bg)), 0.0).to(bd.dtype)
    dv = dot(ks, dS.to(bd.dtype), dv)
    decay = tl.exp2(tl.cumsum(bg, 0) * LOG2E) * scale
    qs = tl.where(since[:, None], rows_of(q, row, K, x, seen) * decay, 0.0).to(bd.dtype)
    dS = tl.where(coming, dS * tl.exp2(tl.sum(bg, 0) * LOG2E)[:, None], 0.0)
    return dot(tl.trans(qs), bd_in, dS), dv


@triton.jit
def reverse_kernel(q, k, g, doc, dy, pairs, slow, dS_in, dstates, dv, dS_out, scale, T, chunks, SEGMENTS,
                   H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                   BV: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr):
    tile, p = tl.program_id(0) % (V // BV), tl.program_id(0) // (V // BV)
    segment, bh = p % SEGMENTS, p // SEGMENTS
    b = (bh // H).to(tl.int64)
    N = tl.cdiv(T, C)
    r, x, w = tl.arange(0, C), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    at = x[:, None] * V + w[None, :]
    dS_in += p.to(tl.int64) * K * V
    doc += b * T
    dSa = tl.load(dS_in + at)
    dSb = dSa
    if K > BK:
        dSb = tl.load(dS_in + BK * V + at)
    begin, end = segment * chunks, tl.minimum(segment * chunks + chunks, N)
    for step in tl.range(begin, end, num_stages=STAGES, disable_licm=True):
        c = begin + end - 1 - step
        t = c * C + r
        seen = (t < T) | EVEN
        row = (b * T + t) * H + bh % H
        n = (b * N + c) * H + bh % H
        before, last = tl.load(doc + c * C - 1, mask=c > 0, other=0), tl.load(doc + tl.minimum(c * C + C, T) - 1)
        of = tl.load(doc + t, mask=seen, other=-1)
        bd = rows_of(dy, row, V, w, seen)
        bd_in = tl.where((of == before)[:, None], bd, 0.0).to(bd.dtype)
        tl.store(dstates + n * K * V + at, dSa.to(bd.dtype))
        if K > BK:
            tl.store(dstates + n * K * V + BK * V + at, dSb.to(bd.dtype))
        A = tl.load(pairs + (n * C + r[:, None]) * C + r[None, :])
        bdv = dot(tl.trans(A), bd) * scale
        dSa, bdv = back(q, k, g, row, x, seen, of == before, of == last, before == last, bd, bd_in, dSa, bdv, scale, K)
        if K > BK:
            dSb, bdv = back(q, k, g, row, BK + x, seen, of == before, of == last, before == last, bd, bd_in, dSb, bdv,
                            scale, K)
        fast = tl.load(slow + n) == 0
        tl.store(dv + row[:, None] * V + w[None, :], bdv.to(bd.dtype), mask=(seen & fast)[:, None])
    tl.store(dS_out + p.to(tl.int64) * K * V + at, dSa)
    if K > BK:
        tl.store(dS_out + p.to(tl.int64) * K * V + BK * V + at, dSb)


@triton.jit
def gate(db, held):
    """dg: what decays by a gate is `held`, all that the state brings in or through, less db of the rows before it.

    db is q dq - k dk without a row's pair with itself, which no gate decays and which would leave its rounding errors;
    over a chunk's pairs it sums up to zero, so rows before a gate say what rows after it do, and need no reverse scan;
    made of the very factors that were multiplied, what should cancel does.
    """
    return held[None, :] - (tl.cumsum(db, 0) - db)


@triton.jit
def keys_kernel(q, k, v, g, doc, dy, S, dS, slow, dq, dk, dg, scale, T, H: tl.constexpr, K: tl.constexpr,
                V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EVEN: tl.constexpr):
    """dq, dk, dg of one chunk in BK key channels."""
    n = (tl.program_id(0) // (K // BK)).to(tl.int64)       # (row, chunk, head)
    if tl.load(slow + n) != 0:
        return
    x = tl.program_id(0) % (K // BK) * BK + tl.arange(0, BK)
    N = tl.cdiv(T, C)
    b, c, h = n // H // N, n // H % N, n % H
    r = tl.arange(0, C)
    seen = (c * C + r < T) | EVEN
    first = (b * T + c * C) * H + h
    q, k, g, dq, dk, dg = q + first * K, k + first * K, g + first * K, dq + first * K, dk + first * K, dg + first * K
    v, dy = v + first * V, dy + first * V
    row = r * H                       # 32 bits from here on: tiles of offsets are held in registers
    coming = tl.load(doc + b * T + c * C) == tl.load(doc + b * T + c * C - 1, mask=c > 0, other=0)
    S, dS = S + n * K * V, dS + n * K * V
    dA, dAt = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    bdq, bdk, carried = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([BK], tl.float32)
    for at in tl.range(0, V, BV, num_stages=1, disable_licm=True):
        w = at + tl.arange(0, BV)
        bv, bd = rows_of(v, row, V, w, seen), rows_of(dy, row, V, w, seen)
        bS = tl.load(S + x[:, None] * V + w[None, :], mask=coming, other=0.0)
        bdS = tl.load(dS + x[:, None] * V + w[None, :])
        dA, dAt = dot(bd, tl.trans(bv), dA), dot(bv, tl.trans(bd), dAt)
        bdq, bdk = dot(bd, tl.trans(bS), bdq), dot(bv, tl.trans(bdS), bdk)
        carried += tl.sum(bS.to(tl.float32) * bdS.to(tl.float32), 1)
    own = tl.sum(tl.where(r[:, None] == r[None, :], dA, 0.0), 1) * scale
    dA = tl.where(r[:, None] > r[None, :], dA * scale, 0.0).to(dy.dtype.element_ty)
    dAt = tl.where(r[:, None] < r[None, :], dAt * scale, 0.0).to(dy.dtype.element_ty)
    bg = rows_of(g, row, K, x, seen).to(tl.float32)
    left, right = halves(bg, r, C)
    e = tl.cumsum(bg, 0) * LOG2E - left[None, :]
    up, down = tl.exp2(e), tl.exp2(-e)
    bq, bk = rows_of(q, row, K, x, seen), rows_of(k, row, K, x, seen)
    qs, ks = (bq * up).to(dA.dtype), (bk * down).to(dA.dtype)
    bdq *= (tl.exp2(left) * scale)[None, :]
    held = tl.sum(qs * bdq, 0) + carried * tl.exp2(left + right)
    bdq = dot(dA, ks, bdq)
    bdk = dot(dAt, qs, bdk * tl.exp2(right)[None, :])
    at = row[:, None] * K + x[None, :]
    tl.store(dq + at, (bdq * up + own[:, None] * bk).to(dq.dtype.element_ty), mask=seen[:, None])
    tl.store(dk + at, (bdk * down + own[:, None] * bq).to(dk.dtype.element_ty), mask=seen[:, None])
    tl.store(dg + at, gate(qs * bdq - ks * bdk, held).to(dg.dtype.element_ty), mask=seen[:, None])


@triton.jit
def slow_keys(q, k, v, g, doc, dy, S, dS, dq, dk, dg, scale, T, n, x, H: tl.constexpr, K: tl.constexpr,
              V: tl.constexpr, C: tl.constexpr):
    """dq, dk, dg of a chunk in the key channels x, token by token.

    db is q dq - k dk without what no gate decays: a token's pair with itself, and the last token's with the end. A
    gate's gradient is the sum of db from its token on, and of what the state brings to the chunk's end.
    """
    n += tl.full([], 0, tl.int64)
    row, begin, count, h = tokens(n, T, H, C)
    w, r = tl.arange(0, V), tl.arange(0, C)
    state = n * K * V + x[:, None] * V + w[None, :]
    bS, passing = tl.load(S + state).to(tl.float32), tl.load(S + state).to(tl.float32)
    db = tl.zeros([C, x.shape[0]], tl.float32)
    before = tl.load(doc + row + begin - 1, mask=begin > 0, other=0)
    for i in range(count):
        at = (row + begin + i) * H + h
        now = tl.load(doc + row + begin + i)
        bq, bk = tl.load(q + at * K + x).to(tl.float32), tl.load(k + at * K + x).to(tl.float32)
        bv, bd = tl.load(v + at * V + w).to(tl.float32), tl.load(dy + at * V + w).to(tl.float32)
        decay = tl.exp2(tl.load(g + at * K + x).to(tl.float32) * LOG2E)
        passing = tl.where(now == before, bS * decay[:, None], 0.0)
        bdq = tl.sum(passing * bd[None, :], 1) * scale
        db = tl.where(r[:, None] == i, (bq * bdq)[None, :], db)
        tl.store(dq + at * K + x, (bdq + tl.sum(bv * bd, 0) * scale * bk).to(dq.dtype.element_ty))
        bS = passing + bk[:, None] * bv[None, :]
        before = now
    bdS = tl.load(dS + state).to(tl.float32)
    bdg = tl.sum(passing * bdS, 1)
    after = before
    for back in range(count):
        i = count - 1 - back
        at = (row + begin + i) * H + h
        now = tl.load(doc + row + begin + i)
        bq, bk = tl.load(q + at * K + x).to(tl.float32), tl.load(k + at * K + x).to(tl.float32)
        bv, bd = tl.load(v + at * V + w).to(tl.float32), tl.load(dy + at * V + w).to(tl.float32)
        decay = tl.exp2(tl.load(g + at * K + x).to(tl.float32) * LOG2E)
        bdS = tl.where(now == after, bdS, 0.0)
        bdk = tl.sum(bdS * bv[None, :], 1)
        bdg = tl.where(now == after, bdg, 0.0) + tl.sum(tl.where(r[:, None] == i, db, 0.0), 0)
        bdg -= tl.where(back == 0, 0.0, bk * bdk)
        tl.store(dg + at * K + x, bdg.to(dg.dtype.element_ty))
        tl.store(dk + at * K + x, (bdk + tl.sum(bv * bd, 0) * scale * bq).to(dk.dtype.element_ty))
        bdS = (bdS + (bq * scale)[:, None] * bd[None, :]) * decay[:, None]
        after = now


@triton.jit
def slow_keys_kernel(q, k, v, g, doc, dy, S, dS, slow, dq, dk, dg, scale, T, total, H: tl.constexpr, K: tl.constexpr,
                     V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr):
    parts: tl.constexpr = K // BK
    if any_slow(slow, total, parts, WIDTH):
        for p in range(tl.program_id(0), total, tl.num_programs(0)):
            if tl.load(slow + p // parts) != 0:
                slow_keys(q, k, v, g, doc, dy, S, dS, dq, dk, dg, scale, T, p // parts,
                          p % parts * BK + tl.arange(0, BK), H, K, V, C)


@triton.jit
def slow_values(q, k, g, doc, dy, dS, dv, scale, T, n, w, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                C: tl.constexpr):
    """dv of a chunk in the value channels w, token by token."""
    n += tl.full([], 0, tl.int64)
    row, begin, count, h = tokens(n, T, H, C)
    x = tl.arange(0, K)
    bdS = tl.load(dS + n * K * V + x[:, None] * V + w[None, :]).to(tl.float32)
    after = tl.load(doc + row + begin + count - 1)
    for back in range(count):
        i = count - 1 - back
        at = (row + begin + i) * H + h
        now = tl.load(doc + row + begin + i)
        bq, bk = tl.load(q + at * K + x).to(tl.float32) * scale, tl.load(k + at * K + x).to(tl.float32)
        decay = tl.exp2(tl.load(g + at * K + x).to(tl.float32) * LOG2E)
        bdS = tl.where(now == after, bdS, 0.0) + bq[:, None] * tl.load(dy + at * V + w).to(tl.float32)[None, :]
        tl.store(dv + at * V + w, tl.sum(bk[:, None] * bdS, 0).to(dv.dtype.element_ty))
        bdS *= decay[:, None]
        after = now


@triton.jit
def slow_values_kernel(q, k, g, doc, dy, dS, slow, dv, scale, T, total, H: tl.constexpr, K: tl.constexpr,
                       V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, WIDTH: tl.constexpr):
    parts: tl.constexpr = V // BV
    if any_slow(slow, total, parts, WIDTH):
        for p in range(tl.program_id(0), total, tl.num_programs(0)):
            if tl.load(slow + p // parts) != 0:
                slow_values(q, k, g, doc, dy, dS, dv, scale, T, p // parts, p % parts * BV + tl.arange(0, BV), H, K, V,
                            C)


# The first of each is run; the others are for a bench to compare.
REVERSE = ((64, 4, 2), (64, 4, 1), (32, 4, 2))      # value channels of a tile, warps, stages
# Key and value channels, warps, registers a thread; 128 let two blocks run at once. One stage: products and elements
# read the same loads, for which triton 3.6 and 3.7 would keep one buffer, and overwrite it while products read.
# (32, 64, 4) took 1.30 ms where the first takes 1.61, and gave wrong dk on an H100: ptxas 12.8 (tests/hazards.py).
KEYS = ((32, 64, 8, 128), (64, 64, 8, None), (64, 32, 8, None))


def backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, doc: Tensor, saved: Tensor, pairs: Tensor, slow: Tensor,
             dy: Tensor, dS: Tensor, scale: float, chunk: int = 64, segment: int = 0,
             block: int = 0) -> tuple[Tensor, ...]:
    """dq, dk, dv, dg and the gradient of the state that came in (B, H, K, V) fp32; dS is that of the state after."""
    B, T, H, K = q.shape
    V, N = v.shape[-1], cdiv(T, chunk)
    tile, warps, stages = REVERSE[0]
    BK, BV = block or min(K, 64), min(V, tile)
    each, count = split(N, segment or segments(T, B * H * V // BV, chunk, q))
    begin = starts(q, dy, g, doc, dS, scale, each, chunk, back=True)
    dq, dk, dv, dg, dstates, out = (torch.empty_like(z) for z in (q, k, v, g, saved, begin))
    sizes, even = (H, K, V, chunk), T % chunk == 0
    reverse_kernel[(B * H * count * V // BV,)](q, k, g, doc, dy, pairs, slow, begin, dstates, dv, out, scale, T, each,
                                               count, *sizes, BK, BV, even, stages, num_warps=warps, num_stages=stages)
    of_keys, tile, warps, registers = KEYS[0]
    BK, BV = block or min(K, of_keys), min(max(V // 2, 16), tile)      # a loop of one pass is unrolled, which spills
    keys_kernel[(B * N * H * (K // BK),)](q, k, v, g, doc, dy, saved, dstates, slow, dq, dk, dg, scale, T, *sizes, BK,
                                          BV, even, num_warps=warps, num_stages=1, maxnreg=registers)
    few = min(K, FEW)
    total = B * N * H * K // few
    programs, width = share(total, q)
    slow_keys_kernel[(programs,)](q, k, v, g, doc, dy, saved, dstates, slow, dq, dk, dg, scale, T, total, *sizes, few,
                                  width, num_warps=1)
    few = min(V, FEW)
    total = B * N * H * V // few
    programs, width = share(total, q)
    slow_values_kernel[(programs,)](q, k, g, doc, dy, dstates, slow, dv, scale, T, total, *sizes, few, width,
                                    num_warps=1)
    return dq, dk, dv, dg, out[:, :, 0].contiguous()
