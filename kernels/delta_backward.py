"""The delta rule, backward: gradients of states from the last chunk to the first, then all chunks at once.

With R = v - since * (k S), so that w = A R, and Sigma' the gradient of the state after the chunk:

    dR = A^T (P^T dy + until * (k Sigma')) = dv
    Sigma = keep Sigma' + q^T (since * dy) - k^T (since * dR)
    dN = -dR w^T below the diagonal, for (I + N) w = R: neither R nor A is needed for it
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.delta import decays, edges_of, fit, reach
from stepladder.kernels.tiles import cdiv, dot, power

# By the size of keys; the first is taken, the others are what a bench may try.
REVERSE = {      # columns of the state, warps, stages
    64: [(64, 4, 2), (32, 4, 2)],
    128: [(32, 4, 2), (64, 4, 2)],
    256: [(32, 4, 2)],
}
# By the larger size: columns of keys and of values, warps, stages, registers a thread; 128 let two blocks run at once.
# With gates there is one stage: triton 3.6 and 3.7 give what both a product and an element read (S and dS of `kept`)
# one buffer, and the next copy overwrites what the product still reads: dk and dg were wrong, now and then.
GRADIENTS = {
    64: [(32, 32, 8, 2, 128), (32, 32, 8, 2, None)],
    128: [(32, 64, 8, 2, 128), (64, 64, 8, 2, None), (32, 64, 8, 1, 128), (64, 64, 8, 1, 128)],
    256: [(32, 32, 8, 2, 128), (32, 64, 8, 1, 128), (64, 64, 8, 2, None)],
}


@triton.jit(do_not_specialize=["T", "NT", "length"])
def _reverse(q, k, A, P, edges, dy, after, dv, dstates, before, T, NT, length, H, G, K: tl.constexpr,
             V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, MAP: tl.constexpr, EVEN: tl.constexpr,
             STAGES: tl.constexpr, SPAN: tl.constexpr):
    """MAP: nothing but what each segment alone asks of the state before it."""
    bh, segment = tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    r, n, m = tl.arange(0, C), tl.arange(0, K), tl.program_id(0) * BV + tl.arange(0, BV)
    state = n[:, None] * V + m[None, :]
    at = (bh.to(tl.int64) * tl.num_programs(2) + segment) * K * V + state
    begin = segment * length
    end = tl.minimum(begin + length, NT)
    if MAP:
        dS = tl.zeros([K, BV], tl.float32)
        end = reach(edges, bh, begin, end, NT, C, SPAN, True) + 1
    else:
        dS = tl.load(after + at)
    for back in tl.range(begin, end, num_stages=STAGES):
        c = end - 1 - (back - begin)
        ok = (c * C + r < T) | EVEN
        row = b.to(tl.int64) * T + c * C + r
        keys = (row * G + h // (H // G))[:, None] * K + n[None, :]
        values = (row * H + h)[:, None] * V + m[None, :]
        chunk = bh.to(tl.int64) * NT + c
        tile = chunk * C * C + r[:, None] * C + r[None, :]
        kt = tl.load(k + keys, mask=ok[:, None], other=0.0)
        qt = tl.load(q + keys, mask=ok[:, None], other=0.0)
        dyt = tl.load(dy + values, mask=ok[:, None], other=0.0)
        since, until, keep = edges_of(edges, bh, c, NT, C)
        dSb = dS.to(kt.dtype)
        if not MAP:
            tl.store(dstates + chunk * K * V + state, dSb)
        dw = dot(tl.trans(tl.load(P + tile)), dyt, dot(kt, dSb) * until[:, None])
        dR = dot(tl.trans(tl.load(A + tile)), dw.to(kt.dtype))
        if not MAP:
            tl.store(dv + values, dR.to(kt.dtype), mask=ok[:, None])
        reached = since[:, None] >= 0
        dS = tl.where(keep < 0, 0.0, dS * keep)
        dS = dot(tl.trans(kt), tl.where(reached, -dR * since[:, None], 0.0).to(kt.dtype), dS)
        dS = dot(tl.trans(qt), tl.where(reached, dyt.to(tl.float32) * since[:, None], 0.0).to(kt.dtype), dS)
    tl.store(before + at, dS)


@triton.jit
def _pair(x, z, ok, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr):
    """x z^T and z x^T of rows (C, V)."""
    one, two = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for m in range(0, V, BV):
        n = m + tl.arange(0, BV)[None, :]
        xt, zt = tl.load(x + n, mask=ok[:, None], other=0.0), tl.load(z + n, mask=ok[:, None], other=0.0)
        one = dot(xt, tl.trans(zt), one)
        two = dot(zt, tl.trans(xt), two)
    return one, two


@triton.jit
def _product(x, z, ok, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """x z^T of rows (C, K)."""
    total = tl.zeros([C, C], tl.float32)
    for m in range(0, K, BK):
        n = m + tl.arange(0, BK)[None, :]
        zt = tl.load(z + n, mask=ok[:, None], other=0.0)
        total = dot(tl.load(x + n, mask=ok[:, None], other=0.0), tl.trans(zt), total)
    return total


@triton.jit(do_not_specialize=["T"])
def _gradients(q, k, g, beta, doc, w, states, dy, dv, dstates, dq, dk, dg, dbeta, T, H, G, K: tl.constexpr,
               V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr,
               EVEN: tl.constexpr):
    c, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    r = tl.arange(0, C)
    ok = (c * C + r < T) | EVEN
    row = b.to(tl.int64) * T + c * C + r
    keys = (row * G + h // (H // G))[:, None] * K
    values = (row * H + h)[:, None] * V
    i, j = r[:, None], r[None, :]

    strength = tl.load(beta + row * H + h, mask=ok, other=0.0).to(tl.float32)
    D, since, until = decays(g, doc, b, h, c, T, H, C, GATED)

    # Both a product and its transpose are computed: a transposed result in registers is no operand of a product
    # (triton before 3.7.1 gets it wrong on Hopper). What P and N ask for is computed in turn, to hold fewer tiles.
    one, two = _pair(dy + values, w + values, ok, V, C, BV)
    one, two = tl.where(i >= j, D * one, 0.0), tl.where(i <= j, D * two, 0.0)
    X, Xt = (one * strength[None, :]).to(q.dtype.element_ty), (two * strength[:, None]).to(q.dtype.element_ty)
    Z = one * _product(q + keys, k + keys, ok, K, C, BK)
    one, two = _pair(dv + values, w + values, ok, V, C, BV)
    one, two = tl.where(i > j, D * one, 0.0), tl.where(i < j, D * two, 0.0)
    E = (-one * strength[None, :] - two * strength[:, None]).to(q.dtype.element_ty)
    Z -= one * _product(k + keys, k + keys, ok, K, C, BK)
    db = tl.sum(Z, 0)
    if GATED:       # a gate's gradient is the sum of what passes it; a token's own pair, on the diagonal, does not
        Z = tl.where(i > j, Z, 0.0) * strength[None, :]
        crossing = tl.sum(Z, 1) - tl.sum(Z, 0)

    kept, put = tl.zeros([BK, BV], tl.float32), tl.zeros([C, BK], tl.float32)
    passing = tl.zeros([C, BK], tl.float32)
    chunk = (bh.to(tl.int64) * tl.num_programs(0) + c) * K * V
    for n0 in range(0, K, BK):
        n = n0 + tl.arange(0, BK)
        dqt, dkt, dut = (tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32))
        for m0 in range(0, V, BV):
            m = values + m0 + tl.arange(0, BV)[None, :]
            at = chunk + n[:, None] * V + m0 + tl.arange(0, BV)[None, :]
            S, dS = tl.load(states + at), tl.load(dstates + at)
            dqt = dot(tl.load(dy + m, mask=ok[:, None], other=0.0), tl.trans(S), dqt)
            dkt = dot(tl.load(w + m, mask=ok[:, None], other=0.0), tl.trans(dS), dkt)
            dut = dot(tl.load(dv + m, mask=ok[:, None], other=0.0), tl.trans(S), dut)
            if GATED:
                kept += S.to(tl.float32) * dS.to(tl.float32)
        kt = tl.load(k + keys + n[None, :], mask=ok[:, None], other=0.0)
        qt = tl.load(q + keys + n[None, :], mask=ok[:, None], other=0.0)
        dqt = tl.where(since[:, None] < 0, 0.0, dqt * since[:, None])
        dut = tl.where(since[:, None] < 0, 0.0, -dut * since[:, None])
        put += kt * dkt
        dkt *= (until * strength)[:, None]
        if GATED:
            passing += qt * dqt + kt * dut
        at = (row * H + h)[:, None] * K + n[None, :]
        tl.store(dq + at, dot(X, kt, dqt).to(dq.dtype.element_ty), mask=ok[:, None])
        dkt = dot(Xt, qt, dkt + dut)
        tl.store(dk + at, dot(E, kt, dkt).to(dk.dtype.element_ty), mask=ok[:, None])
    put = tl.sum(put, 1) * until
    tl.store(dbeta + row * H + h, (db + put).to(dbeta.dtype.element_ty), mask=ok)
    if GATED:
        crossing += tl.sum(passing, 1)
        put = tl.where(r == tl.minimum(C, T - c * C) - 1, 0.0, put * strength)     # the last token passes no gate here
        keep = tl.sum(tl.where(r == C - 1, since, 0.0), 0)
        passed = tl.cumsum(crossing, 0, reverse=True) + (tl.cumsum(put, 0) - put)
        passed += tl.where(keep < 0, 0.0, tl.sum(kept) * keep)
        tl.store(dg + row * H + h, passed.to(dg.dtype.element_ty), mask=ok)


def backward(q: Tensor, k: Tensor, g: Tensor | None, beta: Tensor, doc: Tensor, A: Tensor, P: Tensor, edges: Tensor,
             w: Tensor, states: Tensor, maps: Tensor, dy: Tensor, dS: Tensor,
             length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g (empty without gates) and the initial state, from what forward() saved."""
    (B, T, H, V), (G, K), (NT, C) = dy.shape, q.shape[2:], A.shape[2:4]
    dv, dstates, even = torch.empty_like(dy), torch.empty_like(states), T % C == 0
    BV, warps, stages = fit(REVERSE, K, V)
    segments = cdiv(NT, length)
    common = (T, NT, length, H, G, K, V, C, BV)
    after = dS
    if segments > 1:
        adds = dS.new_empty(B, H, segments, K, V)
        _reverse[V // BV, B * H, segments](q, k, A, P, edges, dy, dS, dv, dstates, adds, *common, True, even, stages,
                                           power(length), num_warps=warps)
        ends = [dS]
        for i in range(segments - 1, 0, -1):
            ends.insert(0, maps[:, :, i].mT @ ends[0] + adds[:, :, i])
        after = torch.stack(ends, 2)
    before = torch.empty_like(after)
    _reverse[V // BV, B * H, segments](q, k, A, P, edges, dy, after, dv, dstates, before, *common, False, even, stages,
                                       1, num_warps=warps)
    # Heads that share a key give their parts in fp32: sums over them are in order, and rounded once.
    dq, dk = (q.new_empty(B, T, H, K, dtype=q.dtype if G == H else torch.float32) for _ in range(2))
    dbeta = torch.empty_like(beta)
    dg = beta.new_empty(0) if g is None else torch.empty_like(g)
    BK, BV, warps, stages, registers = GRADIENTS[max(K, V, 64)][0]
    # Two trips at least: a loop of one is no loop, and its tiles are all held at once, in hundreds of spills.
    BK, BV = min(BK, K // 2), min(BV, V // 2)
    _gradients[NT, B * H](q, k, beta if g is None else g, beta, doc, w, states, dy, dv, dstates, dq, dk, dg,
                          dbeta, T, H, G, K, V, C, BK, BV, g is not None, even, num_warps=warps,
                          num_stages=stages if g is None else 1, maxnreg=registers)
    if G < H:
        dq, dk = (z.unflatten(2, (G, -1)).sum(3).to(q.dtype) for z in (dq, dk))
    return dq, dk, dv, dbeta, dg, before[:, :, 0].contiguous() if segments > 1 else before
