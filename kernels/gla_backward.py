"""Gated linear attention backward: the walk from the last chunk to the first (gla_states.py), then all chunks at once.

With the factors q' and k' of a chunk and e their exponents, S the state before the chunk, dS the gradient of the state
after it, and dA = tril(dy v^T):
    dq = 2^e (dA k' + dy S^T 2^left)    dk = 2^-e (dA^T q' + v dS^T 2^right)
gate() makes dg of q dq, k dk and what passes through the chunk.
Chunks that were slow forward are walked token by token here too.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.gla import FEW, any_slow, segments, share, tokens
from stepladder.kernels.gla_states import WALK, factors, from_middle, rows_of, starts, sums, walk
from stepladder.kernels.tiles import LOG2E, cdiv, dot, split


@triton.jit
def diagonal(z, r):
    """Of a square tile, whose rows are r."""
    return tl.sum(tl.where(r[:, None] == r[None, :], z, 0.0), 1)


@triton.jit
def gate(db, held, weights, r, C: tl.constexpr, PARTS: tl.constexpr):
    """dg: what decays by a gate is `held`, all that the state brings in or through, less db of the rows before it.

    db is q dq - k dk without a row's pair with itself, which no gate decays and which would leave its rounding errors;
    over a chunk's pairs it sums up to zero, so rows before a gate say what rows after it do, and need no reverse sum;
    made of the very factors that were multiplied, what should cancel does. The weights are from_middle's: to what they
    leave of the rows before one, those before the middle are added.
    """
    before = tl.sum(tl.where((r < C // 2)[:, None], db, 0.0), 0)
    return (held - before)[None, :] + db - sums(weights, db, PARTS)


@triton.jit
def keys_kernel(q, k, v, g, start, dy, S, dS, decay, slow, dq, dk, dg, scale, T, TOTAL, H: tl.constexpr,
                K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
                PARTS: tl.constexpr, STAGES: tl.constexpr):
    """dq, dk, dg of one chunk, BK key channels at a time."""
    n = tl.program_id(0).to(tl.int64)                       # (row, chunk, head)
    N = tl.cdiv(T, C)
    b, c, h = n // H // N, n // H % N, n % H
    coming = tl.load(start + b * T + c * C) == 0
    if tl.load(slow + n) != 0:
        return
    r, w = tl.arange(0, C), tl.arange(0, V)
    seen = (c * C + r < T) | EVEN
    first = (b * T + c * C) * H + h
    q, k, g, dq, dk, dg = q + first * K, k + first * K, g + first * K, dq + first * K, dk + first * K, dg + first * K
    row = r * H                       # 32 bits from here on: tiles of offsets are held in registers
    S, dS, decay = S + n * K * V, dS + n * K * V, decay + n * K
    bv, bd = rows_of(v + first * V, row, V, w, seen), rows_of(dy + first * V, row, V, w, seen)
    dA, dAt = dot(bd, tl.trans(bv)) * scale, dot(bv, tl.trans(bd)) * scale
    own = diagonal(dA, r)[:, None]
    dA = tl.where(r[:, None] > r[None, :], dA, 0.0).to(bd.dtype)
    dAt = tl.where(r[:, None] < r[None, :], dAt, 0.0).to(bd.dtype)
    for at in tl.range(0, K, BK, num_stages=STAGES, disable_licm=True):
        x = at + tl.arange(0, BK)
        state, to = x[:, None] * V + w[None, :], row[:, None] * K + x[None, :]
        bg, bq, bk = rows_of(g, row, K, x, seen), rows_of(q, row, K, x, seen), rows_of(k, row, K, x, seen)
        bS, bdS = tl.load(S + state, mask=coming, other=0.0), tl.load(dS + state)
        right, left = tl.load(decay + x), tl.load(decay + TOTAL * K + x)
        held = tl.sum(bS.to(tl.float32) * bdS.to(tl.float32), 1) * tl.exp2(left + right)
        weights = from_middle(r, C)
        e = sums(weights, bg.to(tl.float32) * LOG2E, PARTS)
        up, down = tl.exp2(e), tl.exp2(-e)
        qs, ks = (bq * up).to(bd.dtype), (bk * down).to(bd.dtype)
        bdq = dot(bd, tl.trans(bS)) * (tl.exp2(left) * scale)[None, :]
        held += tl.sum(qs * bdq, 0)
        bdq = dot(dA, ks, bdq)
        tl.store(dq + to, ((bdq + own * ks) * up).to(dq.dtype.element_ty), mask=seen[:, None])
        bdk = dot(dAt, qs, dot(bv, tl.trans(bdS)) * tl.exp2(right)[None, :])
        tl.store(dk + to, ((bdk + own * qs) * down).to(dk.dtype.element_ty), mask=seen[:, None])
        bdg = gate(qs * bdq - ks * bdk, held, weights, r, C, PARTS)
        tl.store(dg + to, bdg.to(dg.dtype.element_ty), mask=seen[:, None])


@triton.jit
def slow_keys(q, k, v, g, start, dy, S, dS, dq, dk, dg, scale, T, n, x, H: tl.constexpr, K: tl.constexpr,
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
    for i in range(count):
        at = (row + begin + i) * H + h
        bq, bk = tl.load(q + at * K + x).to(tl.float32), tl.load(k + at * K + x).to(tl.float32)
        bv, bd = tl.load(v + at * V + w).to(tl.float32), tl.load(dy + at * V + w).to(tl.float32)
        decay = tl.exp2(tl.load(g + at * K + x).to(tl.float32) * LOG2E)
        passing = tl.where(tl.load(start + row + begin + i) != 0, 0.0, bS * decay[:, None])
        bdq = tl.sum(passing * bd[None, :], 1) * scale
        db = tl.where(r[:, None] == i, (bq * bdq)[None, :], db)
        tl.store(dq + at * K + x, (bdq + tl.sum(bv * bd, 0) * scale * bk).to(dq.dtype.element_ty))
        bS = passing + bk[:, None] * bv[None, :]
    bdS = tl.load(dS + state).to(tl.float32)
    bdg = tl.sum(passing * bdS, 1)
    new = tl.zeros([], tl.uint8)                 # whether a document begins with the token after
    for back in range(count):
        i = count - 1 - back
        at = (row + begin + i) * H + h
        bq, bk = tl.load(q + at * K + x).to(tl.float32), tl.load(k + at * K + x).to(tl.float32)
        bv, bd = tl.load(v + at * V + w).to(tl.float32), tl.load(dy + at * V + w).to(tl.float32)
        decay = tl.exp2(tl.load(g + at * K + x).to(tl.float32) * LOG2E)
        bdS = tl.where(new != 0, 0.0, bdS)
        bdk = tl.sum(bdS * bv[None, :], 1)
        bdg = tl.where(new != 0, 0.0, bdg) + tl.sum(tl.where(r[:, None] == i, db, 0.0), 0)
        bdg -= tl.where(back == 0, 0.0, bk * bdk)
        tl.store(dg + at * K + x, bdg.to(dg.dtype.element_ty))
        tl.store(dk + at * K + x, (bdk + tl.sum(bv * bd, 0) * scale * bq).to(dk.dtype.element_ty))
        bdS = (bdS + (bq * scale)[:, None] * bd[None, :]) * decay[:, None]
        new = tl.load(start + row + begin + i)


@triton.jit
def slow_keys_kernel(q, k, v, g, start, dy, S, dS, slow, dq, dk, dg, scale, T, total, H: tl.constexpr, K: tl.constexpr,
                     V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr):
    parts: tl.constexpr = K // BK
    if any_slow(slow, total, parts, WIDTH):
        for p in range(tl.program_id(0), total, tl.num_programs(0)):
            if tl.load(slow + p // parts) != 0:
                slow_keys(q, k, v, g, start, dy, S, dS, dq, dk, dg, scale, T, p // parts,
                          p % parts * BK + tl.arange(0, BK), H, K, V, C)


@triton.jit
def slow_values(q, k, g, start, dy, dS, dv, scale, T, n, w, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                C: tl.constexpr):
    """dv of a chunk in the value channels w, token by token."""
    n += tl.full([], 0, tl.int64)
    row, begin, count, h = tokens(n, T, H, C)
    x = tl.arange(0, K)
    bdS = tl.load(dS + n * K * V + x[:, None] * V + w[None, :]).to(tl.float32)
    new = tl.zeros([], tl.uint8)                 # whether a document begins with the token after
    for back in range(count):
        i = count - 1 - back
        at = (row + begin + i) * H + h
        bq, bk = tl.load(q + at * K + x).to(tl.float32) * scale, tl.load(k + at * K + x).to(tl.float32)
        decay = tl.exp2(tl.load(g + at * K + x).to(tl.float32) * LOG2E)
        bdS = tl.where(new != 0, 0.0, bdS) + bq[:, None] * tl.load(dy + at * V + w).to(tl.float32)[None, :]
        tl.store(dv + at * V + w, tl.sum(bk[:, None] * bdS, 0).to(dv.dtype.element_ty))
        bdS *= decay[:, None]
        new = tl.load(start + row + begin + i)


@triton.jit
def slow_values_kernel(q, k, g, start, dy, dS, slow, dv, scale, T, total, H: tl.constexpr, K: tl.constexpr,
                       V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, WIDTH: tl.constexpr):
    parts: tl.constexpr = V // BV
    if any_slow(slow, total, parts, WIDTH):
        for p in range(tl.program_id(0), total, tl.num_programs(0)):
            if tl.load(slow + p // parts) != 0:
                slow_values(q, k, g, start, dy, dS, dv, scale, T, p // parts, p % parts * BV + tl.arange(0, BV), H, K,
                            V, C)


# Key channels at a time, warps, stages, registers a thread.
KEYS = ((32, 4, 2, None),)


def backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, saved: Tensor, slow: Tensor, dy: Tensor,
             dS: Tensor, scale: float, chunk: int = 64, segment: int = 0, block: int = 0) -> tuple[Tensor, ...]:
    """dq, dk, dv, dg and the gradient of the state that came in (B, H, K, V) fp32; dS is that of the state after."""
    B, T, H, K = q.shape
    V, N = v.shape[-1], cdiv(T, chunk)
    each, _ = split(N, segment or segments(T, B * H * cdiv(V, WALK[0][0]), chunk, q))
    dq, dk = (q.new_empty(B * N * chunk * H * K) for _ in range(2))         # what the walk reads is in their place
    made = factors(q, k, g, start, scale, chunk, True, block, (dq.view(B, N, H, chunk, K), dk.view(B, N, H, chunk, K)))
    dv, dstates, out = walk(made, dy, starts(made, dy, dS, each, True), each, True, True)
    dq, dk, dg = dq[:q.numel()].view_as(q), dk[:k.numel()].view_as(k), torch.empty_like(g)
    sizes, even = (H, K, V, chunk), T % chunk == 0
    BK, warps, stages, registers = KEYS[0]
    keys_kernel[(B * N * H,)](
        q, k, v, g, start, dy, saved, dstates, made.decay, slow, dq, dk, dg, scale, T, B * N * H, *sizes,
        min(BK, max(K // 2, 16)), even, 3 if q.dtype == torch.float32 else 2, stages, num_warps=warps,
        num_stages=stages, maxnreg=None if q.dtype == torch.float32 else registers)
    few = min(K, FEW)
    total = B * N * H * K // few
    programs, width = share(total, q)
    slow_keys_kernel[(programs,)](q, k, v, g, start, dy, saved, dstates, slow, dq, dk, dg, scale, T, total, *sizes, few,
                                  width, num_warps=1)
    few = min(V, FEW)
    total = B * N * H * V // few
    programs, width = share(total, q)
    slow_values_kernel[(programs,)](q, k, g, start, dy, dstates, slow, dv, scale, T, total, *sizes, few, width,
                                    num_warps=1)
    return dq, dk, dv, dg, out[:, :, 0].contiguous()
