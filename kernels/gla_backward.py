"""Gated linear attention backward: the reverse sweep of gla_states.py, then every chunk's gradients at once.

With e the decay from the chunk's middle row (gla.py), S the state before the chunk and dS the gradient of the state
after it, dA = tril(dy v^T) and P = tril(q k^T, decayed):
    dq = 2^e (dA k 2^-e + dy S^T 2^left)    dk = 2^-e (dA^T q 2^e + v dS^T 2^right)    dv = P^T dy + k 2^(right - e) dS
gate() makes dg of q dq, k dk and what passes through the chunk.
Transposed products are formed anew. Chunks that were slow forward are slow here, in kernels of their own.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.gla import LIMIT, any_slow, attend, halves, parts, rows_of, segments, share, since, sums
from stepladder.kernels.gla_states import sweep
from stepladder.kernels.tiles import LOG2E, cdiv, dot, split


@triton.jit
def pairs(v, dy, row, seen, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr):
    """dy v^T and its transpose (C, C), not masked."""
    dA, dAt = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for at in range(0, V, BV):
        w = at + tl.arange(0, BV)
        bv, bd = rows_of(v, row, V, w, seen), rows_of(dy, row, V, w, seen)
        dA, dAt = dot(bd, tl.trans(bv), dA), dot(bv, tl.trans(bd), dAt)
    return dA, dAt


@triton.jit
def through(v, dy, S, dS, row, x, seen, coming, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
            BV: tl.constexpr):
    """dy S^T and v dS^T (C, BK), and the sum over values of S dS (BK,); where nothing comes in, S counts as zero."""
    dq, dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    carried = tl.zeros([BK], tl.float32)
    for at in range(0, V, BV):
        w = at + tl.arange(0, BV)
        bv, bd = rows_of(v, row, V, w, seen), rows_of(dy, row, V, w, seen)
        bS = tl.load(S + x[:, None] * V + w[None, :], mask=coming, other=0.0)
        bdS = tl.load(dS + x[:, None] * V + w[None, :])
        dq, dk = dot(bd, tl.trans(bS), dq), dot(bv, tl.trans(bdS), dk)
        carried += tl.sum(bS.to(tl.float32) * bdS.to(tl.float32), 1)
    return dq, dk, carried


@triton.jit
def gate(db, held):
    """dg: what decays by a gate is `held`, all that the state brings in or through, less db of the rows before it.

    db is q dq - k dk without a row's pair with itself, which no gate decays and which would leave its rounding errors;
    over a chunk's pairs it sums up to zero, so rows before a gate say what rows after it do, and need no reverse scan;
    made of the very factors that were multiplied, what should cancel does.
    """
    return held[None, :] - (tl.cumsum(db, 0) - db)


@triton.jit
def block(q, k, v, g, dy, S, dS, dq, dk, dg, row, x, seen, coming, dA, dAt, own, P, scale, K: tl.constexpr,
          V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Stores dq, dk, dg of BK key channels; adds theirs to P^T and returns k, decayed to the chunk's end."""
    r = tl.arange(0, C)
    bg = rows_of(g, row, K, x, seen)
    left, right = halves(bg, r, C)
    e = tl.cumsum(bg.to(tl.float32), 0) * LOG2E - left[None, :]
    up, down = tl.exp2(e), tl.exp2(-e)
    bq, bk = rows_of(q, row, K, x, seen), rows_of(k, row, K, x, seen)
    qs, ks = (bq * up).to(dA.dtype), (bk * down).to(dA.dtype)
    P = dot(ks, tl.trans(qs), P)
    bdq, bdk, carried = through(v, dy, S, dS, row, x, seen, coming, V, C, BK, BV)
    bdq *= (tl.exp2(left) * scale)[None, :]
    held = tl.sum(qs * bdq, 0) + carried * tl.exp2(left + right)
    bdq = dot(dA, ks, bdq)
    bdk = dot(dAt, qs, bdk * tl.exp2(right)[None, :])
    at = row[:, None] * K + x[None, :]
    tl.store(dq + at, (bdq * up + own[:, None] * bk).to(dq.dtype.element_ty), mask=seen[:, None])
    tl.store(dk + at, (bdk * down + own[:, None] * bq).to(dk.dtype.element_ty), mask=seen[:, None])
    tl.store(dg + at, gate(qs * bdq - ks * bdk, held).to(dg.dtype.element_ty), mask=seen[:, None])
    return P, (ks * tl.exp2(right)[None, :]).to(dA.dtype)


@triton.jit
def grads_kernel(q, k, v, g, doc, dy, S, dS, slow, dq, dk, dv, dg, scale, T,
                 H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                 BV: tl.constexpr, EVEN: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)                      # (row, chunk, head)
    if tl.load(slow + n) != 0:
        return
    N = tl.cdiv(T, C)
    b, c, h = n // H // N, n // H % N, n % H
    r = tl.arange(0, C)
    seen = (c * C + r < T) | EVEN
    first = (b * T + c * C) * H + h
    q, k, g, dq, dk, dg = q + first * K, k + first * K, g + first * K, dq + first * K, dk + first * K, dg + first * K
    v, dy, dv = v + first * V, dy + first * V, dv + first * V
    row = r * H                       # 32 bits from here on: tiles of offsets are held in registers
    coming = tl.load(doc + b * T + c * C) == tl.load(doc + b * T + c * C - 1, mask=c > 0, other=0)
    S, dS = S + n * K * V, dS + n * K * V
    dA, dAt = pairs(v, dy, row, seen, V, C, BV)
    own = tl.sum(tl.where(r[:, None] == r[None, :], dA, 0.0), 1) * scale
    dA = tl.where(r[:, None] > r[None, :], dA * scale, 0.0).to(dy.dtype.element_ty)
    dAt = tl.where(r[:, None] < r[None, :], dAt * scale, 0.0).to(dy.dtype.element_ty)
    P = tl.zeros([C, C], tl.float32)
    x = tl.arange(0, BK)
    P, ka = block(q, k, v, g, dy, S, dS, dq, dk, dg, row, x, seen, coming, dA, dAt, own, P, scale, K, V, C, BK, BV)
    kb = ka
    if K > BK:
        P, kb = block(q, k, v, g, dy, S, dS, dq, dk, dg, row, BK + x, seen, coming, dA, dAt, own, P, scale, K, V, C, BK,
                      BV)
    P = tl.where(r[:, None] <= r[None, :], P * scale, 0.0).to(dA.dtype)
    for at in range(0, V, BV):
        w = at + tl.arange(0, BV)
        bdv = dot(P, rows_of(dy, row, V, w, seen))
        bdv = dot(ka, tl.load(dS + x[:, None] * V + w[None, :]), bdv)
        if K > BK:
            bdv = dot(kb, tl.load(dS + (BK + x)[:, None] * V + w[None, :]), bdv)
        tl.store(dv + row[:, None] * V + w[None, :], bdv.to(dv.dtype.element_ty), mask=seen[:, None])


@triton.jit
def slow_keys(q, k, v, g, doc, dy, S, dS, dq, dk, dg, scale, T, n, x,
              H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
              PARTS: tl.constexpr, LIMIT: tl.constexpr):
    """dq, dk, dg of BK key channels of a slow chunk, a document at a time: pairs by halves, as attend() of gla.py."""
    n += tl.full([], 0, tl.int64)
    N = tl.cdiv(T, C)
    b, c, h = n // H // N, n // H % N, n % H
    r = tl.arange(0, C)
    i, j = r[:, None], r[None, :]
    row = (b * T + c * C + r) * H + h
    docs = tl.load(doc + b * T + c * C + r, mask=c * C + r < T, other=-1)
    before, last = tl.load(doc + b * T + c * C - 1, mask=c > 0, other=0), tl.max(docs)
    S, dS = S + n * K * V, dS + n * K * V
    for d in range(before, last + 1):
        mine = docs == d
        dA, dAt = pairs(v, dy, row, mine, V, C, BV)
        own = tl.sum(tl.where(i == j, dA, 0.0), 1) * scale
        dA, dAt = (dA * scale).to(dy.dtype.element_ty), (dAt * scale).to(dy.dtype.element_ty)
        bg = rows_of(g, row, K, x, mine)
        bdq, bdk, carried = through(v, dy, S, dS, row, x, mine, d == before, V, C, BK, BV)
        bdq *= tl.exp2(sums(i >= j, bg, PARTS)) * scale
        bdk = tl.where(d == last, bdk * tl.exp2(sums(i < j, bg, PARTS)), 0.0)
        bq, bk = rows_of(q, row, K, x, mine), rows_of(k, row, K, x, mine)
        carried *= tl.exp2(tl.sum(bg.to(tl.float32), 0) * LOG2E)
        db = bq * bdq - bk * bdk
        held = tl.sum(bq * bdq, 0) + tl.where((d == before) & (d == last), carried, 0.0)
        size = tl.full([], C, tl.int32)
        while size > 1:
            here = r // size * size + size // 2
            e = sums(since(i, j, here[:, None]), bg, PARTS)
            whole = tl.max(tl.abs(e)) <= LIMIT
            both = tl.where(whole, size, 0)
            right, left = r + both >= here, r < here + both
            same = here[:, None] == here[None, :]
            up = tl.exp2(tl.where(right[:, None], e, float("-inf")))
            down = tl.exp2(tl.where(left[:, None], -e, float("-inf")))
            of_q = tl.where(same & right[:, None] & left[None, :] & (i > j), dA, 0.0)
            of_k = tl.where(same & left[:, None] & right[None, :] & (i < j), dAt, 0.0)
            qs, ks = (bq * up).to(dA.dtype), (bk * down).to(dA.dtype)
            to_q, to_k = dot(of_q, ks), dot(of_k, qs)
            bdq, bdk = bdq + to_q * up, bdk + to_k * down
            db += qs * to_q - ks * to_k
            size = tl.where(whole, 0, size // 2)
        at = row[:, None] * K + x[None, :]
        tl.store(dq + at, (bdq + own[:, None] * bk).to(dq.dtype.element_ty), mask=mine[:, None])
        tl.store(dk + at, (bdk + own[:, None] * bq).to(dk.dtype.element_ty), mask=mine[:, None])
        tl.store(dg + at, gate(db, held).to(dg.dtype.element_ty), mask=mine[:, None])


@triton.jit
def slow_keys_kernel(q, k, v, g, doc, dy, S, dS, slow, dq, dk, dg, scale, T, total,
                     H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                     BV: tl.constexpr, PARTS: tl.constexpr, LIMIT: tl.constexpr, WIDTH: tl.constexpr):
    if any_slow(slow, total, K // BK, WIDTH):
        for p in range(tl.program_id(0), total, tl.num_programs(0)):
            if tl.load(slow + p // (K // BK)) != 0:
                x = p % (K // BK) * BK + tl.arange(0, BK)
                slow_keys(q, k, v, g, doc, dy, S, dS, dq, dk, dg, scale, T, p // (K // BK), x, H, K, V, C, BK,
                          BV, PARTS, LIMIT)


@triton.jit
def slow_values(q, k, g, doc, dy, dS, dv, scale, T, n, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, LIMIT: tl.constexpr):
    n += tl.full([], 0, tl.int64)
    N = tl.cdiv(T, C)
    b, c, h = n // H // N, n // H % N, n % H
    r = tl.arange(0, C)
    row = (b * T + c * C + r) * H + h
    docs = tl.load(doc + b * T + c * C + r, mask=c * C + r < T, other=-1)
    before, last = tl.load(doc + b * T + c * C - 1, mask=c > 0, other=0), tl.max(docs)
    for d in range(before, last + 1):
        mine = docs == d
        P = (attend(k, q, g, row, mine, K, C, BK, PARTS, LIMIT, True) * scale).to(dy.dtype.element_ty)
        for at in range(0, V, BV):
            w = at + tl.arange(0, BV)
            bdv = dot(P, rows_of(dy, row, V, w, mine))
            if d == last:
                for ax in range(0, K, BK):
                    x = ax + tl.arange(0, BK)
                    until = sums(r[:, None] < r[None, :], rows_of(g, row, K, x, mine), PARTS)
                    ks = (rows_of(k, row, K, x, mine) * tl.exp2(until)).to(P.dtype)
                    bdv = dot(ks, tl.load(dS + n * K * V + x[:, None] * V + w[None, :]), bdv)
            tl.store(dv + row[:, None] * V + w[None, :], bdv.to(dv.dtype.element_ty), mask=mine[:, None])


@triton.jit
def slow_values_kernel(q, k, g, doc, dy, dS, slow, dv, scale, T, total,
                       H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                       BV: tl.constexpr, PARTS: tl.constexpr, LIMIT: tl.constexpr, WIDTH: tl.constexpr):
    if any_slow(slow, total, 1, WIDTH):
        for n in range(tl.program_id(0), total, tl.num_programs(0)):
            if tl.load(slow + n) != 0:
                slow_values(q, k, g, doc, dy, dS, dv, scale, T, n, H, K, V, C, BK, BV, PARTS, LIMIT)


# Value channels of a tile, warps. The first is run.
GRADS = ((64, 8), (32, 8))


def backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, doc: Tensor, saved: Tensor, slow: Tensor, dy: Tensor,
             dS: Tensor, scale: float, chunk: int = 64, segment: int = 0, block: int = 0) -> tuple[Tensor, ...]:
    """dq, dk, dv, dg and the gradient of the state that came in (B, H, K, V) fp32; dS is that of the state after."""
    B, T, H, K = q.shape
    V, N = v.shape[-1], cdiv(T, chunk)
    BK = block or min(K, 64)
    segment = segment or segments(T, B * H * max(K // 64, 1) * max(V // 128, 1), chunk, q)
    each, count = split(N, segment)
    begin = dS if count == 1 else sweep(q, dy, g, doc, dS, scale, each, chunk, back=True, saved=None)
    states = torch.empty_like(saved)
    dS_in = sweep(q, dy, g, doc, begin, scale, each, chunk, back=True, saved=states)[:, :, 0].contiguous()
    dq, dk, dv, dg = (torch.empty_like(z) for z in (q, k, v, g))
    sizes, exact = (H, K, V, chunk), (parts(q, g), LIMIT[q.dtype])
    tile, warps = GRADS[0]
    BV = min(max(V // 2, 16), tile)     # a loop of one pass is unrolled, which spills
    grads_kernel[(B * N * H,)](q, k, v, g, doc, dy, saved, states, slow, dq, dk, dv, dg, scale, T, *sizes, BK,
                               BV, T % chunk == 0, num_warps=warps, num_stages=1)
    few = 16                            # key channels; with more it would spill
    total = B * N * H * K // few
    programs, width = share(total, q)
    slow_keys_kernel[(programs,)](q, k, v, g, doc, dy, saved, states, slow, dq, dk, dg, scale, T, total, *sizes, few,
                                  BV, *exact, width, num_warps=8, num_stages=1)
    programs, width = share(B * N * H, q)
    slow_values_kernel[(programs,)](q, k, g, doc, dy, states, slow, dv, scale, T, B * N * H, *sizes, min(BK, 32),
                                    min(V, 64), *exact, width, num_warps=8, num_stages=1)
    return dq, dk, dv, dg, dS_in
