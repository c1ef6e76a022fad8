"""The delta rule, backward: gradients of states from the last chunk to the first, then all chunks at once.

With R = v - since * (k S), so that w = A R, and Sigma' the gradient of the state after the chunk:

    dR = A^T (beta (P^T dy + until * (k Sigma'))) = dv
    Sigma = keep Sigma' + q^T (since * dy) - k^T (since * dR)
    dN = -dR w^T below the diagonal, for (I + N) w = R: neither R nor A is needed for it
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.delta import Forward, decays, edges_of
from stepladder.kernels.tiles import dot


@triton.jit
def _reverse(q, k, beta, A, P, edges, dy, after, dv, dstates, before, T, NT, length, H, G, K: tl.constexpr,
             V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, OUT: tl.constexpr, EVEN: tl.constexpr,
             STAGES: tl.constexpr):
    bh, segment = tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    r, n, m = tl.arange(0, C), tl.arange(0, K), tl.program_id(0) * BV + tl.arange(0, BV)
    state = n[:, None] * V + m[None, :]
    at = (bh.to(tl.int64) * tl.num_programs(2) + segment) * K * V + state
    dS = tl.load(after + at)
    end = tl.minimum(segment * length + length, NT)
    for back in tl.range(segment * length, end, num_stages=STAGES):
        c = end - 1 - (back - segment * length)
        ok = (c * C + r < T) | EVEN
        row = b.to(tl.int64) * T + c * C + r
        keys = (row * G + h // (H // G))[:, None] * K + n[None, :]
        values = (row * H + h)[:, None] * V + m[None, :]
        chunk = bh.to(tl.int64) * NT + c
        tile = chunk * C * C + r[:, None] * C + r[None, :]
        kt = tl.load(k + keys, mask=ok[:, None], other=0.0)
        qt = tl.load(q + keys, mask=ok[:, None], other=0.0)
        dyt = tl.load(dy + values, mask=ok[:, None], other=0.0)
        strength = tl.load(beta + row * H + h, mask=ok, other=0.0).to(tl.float32)
        since, until, keep = edges_of(edges, bh, c, NT, C)
        dSb = dS.to(kt.dtype)
        if OUT:
            tl.store(dstates + chunk * K * V + state, dSb)
        dw = dot(tl.trans(tl.load(P + tile)), dyt, dot(kt, dSb) * until[:, None]) * strength[:, None]
        dR = dot(tl.trans(tl.load(A + tile)), dw.to(kt.dtype))
        if OUT:
            tl.store(dv + values, dR.to(kt.dtype), mask=ok[:, None])
        reached = since[:, None] >= 0
        dS = tl.where(keep < 0, 0.0, dS * keep)
        dS = dot(tl.trans(kt), tl.where(reached, -dR * since[:, None], 0.0).to(kt.dtype), dS)
        dS = dot(tl.trans(qt), tl.where(reached, dyt.to(tl.float32) * since[:, None], 0.0).to(kt.dtype), dS)
    tl.store(before + at, dS)


@triton.jit
def _gradients(q, k, g, beta, doc, edges, w, states, dy, dv, dstates, dq, dk, dg, dbeta, T, H, G, K: tl.constexpr,
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

    # Both a product and its transpose are computed: a transposed result in registers is no operand of a product
    # (triton before 3.7.1 gets it wrong on Hopper).
    PQ, PQt, PN, PNt = (tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32),
                        tl.zeros([C, C], tl.float32))
    for m0 in range(0, V, BV):
        m = values + m0 + tl.arange(0, BV)[None, :]
        wt = tl.load(w + m, mask=ok[:, None], other=0.0)
        dyt = tl.load(dy + m, mask=ok[:, None], other=0.0)
        dR = tl.load(dv + m, mask=ok[:, None], other=0.0)
        PQ = dot(dyt, tl.trans(wt), PQ)
        PQt = dot(wt, tl.trans(dyt), PQt)
        PN = dot(dR, tl.trans(wt), PN)
        PNt = dot(wt, tl.trans(dR), PNt)
    QK, KK = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for n0 in range(0, K, BK):
        n = keys + n0 + tl.arange(0, BK)[None, :]
        kt = tl.load(k + n, mask=ok[:, None], other=0.0)
        QK = dot(tl.load(q + n, mask=ok[:, None], other=0.0), tl.trans(kt), QK)
        KK = dot(kt, tl.trans(kt), KK)

    strength = tl.load(beta + row * H + h, mask=ok, other=0.0).to(tl.float32)
    D, _, _ = decays(g, doc, b, h, c, T, H, C, GATED)
    since, until, keep = edges_of(edges, bh, c, tl.num_programs(0), C)
    Z = tl.where(i >= j, D * PQ * QK, 0.0) - tl.where(i > j, D * PN * KK, 0.0)
    db = tl.sum(Z, 0)
    dG = tl.sum(Z * strength[None, :], 1) - db * strength
    X = tl.where(i >= j, D * PQ, 0.0) * strength[None, :]
    Xt = tl.where(i <= j, D * PQt, 0.0) * strength[:, None]
    E = -tl.where(i > j, D * PN, 0.0) * strength[None, :] - tl.where(i < j, D * PNt, 0.0) * strength[:, None]
    X, Xt, E = X.to(q.dtype.element_ty), Xt.to(q.dtype.element_ty), E.to(q.dtype.element_ty)

    kept = 0.0
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
                kept += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
        kt = tl.load(k + keys + n[None, :], mask=ok[:, None], other=0.0)
        qt = tl.load(q + keys + n[None, :], mask=ok[:, None], other=0.0)
        dqt = tl.where(since[:, None] < 0, 0.0, dqt * since[:, None])
        dut = tl.where(since[:, None] < 0, 0.0, -dut * since[:, None])
        written = tl.sum(kt * dkt, 1) * until
        db += written
        dkt *= (until * strength)[:, None]
        if GATED:
            dG += tl.sum(qt * dqt, 1) + tl.sum(kt * dut, 1) - written * strength
            dG += tl.where(r == C - 1, tl.sum(written * strength), 0.0)
        at = (row * H + h)[:, None] * K + n[None, :]
        tl.store(dq + at, dot(X, kt, dqt).to(dq.dtype.element_ty), mask=ok[:, None])
        dkt = dot(Xt, qt, dkt + dut)
        tl.store(dk + at, dot(E, kt, dkt).to(dk.dtype.element_ty), mask=ok[:, None])
    tl.store(dbeta + row * H + h, db.to(dbeta.dtype.element_ty), mask=ok)
    if GATED:
        dG += tl.where(r == C - 1, tl.where(keep < 0, 0.0, kept * keep), 0.0)
        tl.store(dg + row * H + h, tl.cumsum(dG, 0, reverse=True).to(dg.dtype.element_ty), mask=ok)


def backward(q: Tensor, k: Tensor, g: Tensor | None, beta: Tensor, doc: Tensor, made: Forward, dy: Tensor,
             dS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g (empty without gates), beta and the initial state; `made` by a forward pass that saved."""
    (B, T, H, V), (G, K), (NT, C) = dy.shape, q.shape[2:], made.A.shape[2:4]
    dv, dstates, before = torch.empty_like(dy), torch.empty_like(made.states), torch.empty_like(dS)
    even = T % C == 0
    BV = min(32, V)
    _reverse[V // BV, B * H, 1](q, k, beta, made.A, made.P, made.edges, dy, dS, dv, dstates, before, T, NT, NT, H, G,
                                K, V, C, BV, True, even, 2, num_warps=4)
    # Heads that share a key give their parts in fp32: sums over them are in order, and rounded once.
    dq, dk = (q.new_empty(B, T, H, K, dtype=q.dtype if G == H else torch.float32) for _ in range(2))
    dbeta = torch.empty_like(beta)
    dg = beta.new_empty(0) if g is None else torch.empty_like(g)
    BK, BV = min(64, K), min(64, V)
    _gradients[NT, B * H](q, k, beta if g is None else g, beta, doc, made.edges, made.w, made.states, dy, dv, dstates,
                          dq, dk, dg, dbeta, T, H, G, K, V, C, BK, BV, g is not None, even, num_warps=8)
    if G < H:
        dq, dk = (z.unflatten(2, (G, -1)).sum(3).to(q.dtype) for z in (dq, dk))
    return dq, dk, dv, dg, dbeta, before
