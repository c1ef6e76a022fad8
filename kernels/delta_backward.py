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
    64: [(64, 4, 2), (64, 4, 3)],
    128: [(64, 4, 2), (128, 8, 3), (128, 8, 2)],
    256: [(32, 8, 2)],
}
# By the larger size: columns of keys, warps. There is one stage: triton 3.6 and 3.7 give what both a product and an
# element read (k; with gates S and dS too) one buffer, and the next copy overwrites what the product still reads: dk
# and dg were wrong, now and then.
GRADIENTS = {
    64: [(32, 4)],
    128: [(32, 4), (16, 4)],
    256: [(16, 4)],
}


@triton.jit(do_not_specialize=["T", "NT", "length"])
def _reverse(q, k, A, P, edges, dy, after, dv, dstates, before, T, NT, length, H, G, K: tl.constexpr,
             V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, MAP: tl.constexpr, EVEN: tl.constexpr,
             STAGES: tl.constexpr, SPAN: tl.constexpr):
    """MAP: nothing but what each segment alone asks of the state before it. Values are rows, as in _across."""
    bh, segment = tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    r, n, m = tl.arange(0, C), tl.arange(0, K), tl.program_id(0) * BV + tl.arange(0, BV)
    state = n[None, :] * V + m[:, None]
    at = (bh.to(tl.int64) * tl.num_programs(2) + segment) * K * V + state
    begin = segment * length
    end = tl.minimum(begin + length, NT)
    if MAP:
        dS = tl.zeros([BV, K], tl.float32)
        end = reach(edges, bh, begin, end, NT, C, SPAN, True) + 1
    else:
        dS = tl.load(after + at)
    for back in tl.range(begin, end, num_stages=STAGES):
        c = end - 1 - (back - begin)
        ok = (c * C + r < T) | EVEN
        row = b.to(tl.int64) * T + c * C + r
        keys = (row * G + h // (H // G))[:, None] * K + n[None, :]
        values = (row * H + h)[None, :] * V + m[:, None]
        chunk = bh.to(tl.int64) * NT + c
        tile = chunk * C * C + r[:, None] * C + r[None, :]
        kt = tl.load(k + keys, mask=ok[:, None], other=0.0)
        qt = tl.load(q + keys, mask=ok[:, None], other=0.0)
        dyt = tl.load(dy + values, mask=ok[None, :], other=0.0)
        since, until, keep = edges_of(edges, bh, c, NT, C)
        dSb = dS.to(kt.dtype)
        if not MAP:
            tl.store(dstates + chunk * K * V + state, dSb)
        dw = dot(dyt, tl.load(P + tile), dot(dSb, tl.trans(kt)) * until[None, :])
        dR = dot(dw.to(kt.dtype), tl.load(A + tile))
        if not MAP:
            tl.store(dv + values, dR.to(kt.dtype), mask=ok[None, :])
        reached = since[None, :] >= 0
        dS = tl.where(keep < 0, 0.0, dS * keep)
        dS = dot(tl.where(reached, -dR * since[None, :], 0.0).to(kt.dtype), kt, dS)
        dS = dot(tl.where(reached, dyt.to(tl.float32) * since[None, :], 0.0).to(kt.dtype), qt, dS)
    tl.store(before + at, dS)


@triton.jit(do_not_specialize=["T"])
def _gradients(q, k, g, beta, start, w, states, dy, dv, dstates, X, E, dq, dk, dg, dbeta, T, H, G, K: tl.constexpr,
               V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, GATED: tl.constexpr,
               EVEN: tl.constexpr):
    c, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    r, n, m = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, V)
    ok = (c * C + r < T) | EVEN
    row = b.to(tl.int64) * T + c * C
    key, head = row * G + h // (H // G), row * H + h
    values = r[:, None] * (H * V) + m[None, :]
    keys, outs, token = r[:, None] * (G * K) + n[None, :], r[:, None] * (H * K) + n[None, :], r * H
    q, k, dq, dk = q + key * K, k + key * K, dq + head * K, dk + head * K
    i, j = r[:, None], r[None, :]
    at = bh.to(tl.int64) * tl.num_programs(0) + c
    tile = at * C * C + i * C + j
    chunk = at * K * V + n[:, None] * V + m[None, :]
    wt = tl.load(w + head * V + values, mask=ok[:, None], other=0.0)
    dyt = tl.load(dy + head * V + values, mask=ok[:, None], other=0.0)
    strength = tl.load(beta + head + token, mask=ok, other=0.0).to(tl.float32)
    D, since, until = decays(g, start, b, h, c, T, H, C, GATED)
    one = tl.where(i >= j, D * dot(dyt, tl.trans(wt)), 0.0)
    tl.store(X + tile, (one * strength[None, :]).to(q.dtype.element_ty))
    dvt = tl.load(dv + head * V + values, mask=ok[:, None], other=0.0)
    two = tl.where(i > j, D * dot(dvt, tl.trans(wt)), 0.0)
    tl.store(E + tile, (-two * strength[None, :]).to(q.dtype.element_ty))
    Z = tl.zeros([C, C], tl.float32)
    for n0 in tl.range(0, K, W):
        full = r[:, None] * (G * K) + n0 + tl.arange(0, W)[None, :]
        kt = tl.load(k + full, mask=ok[:, None], other=0.0)
        qt = tl.load(q + full, mask=ok[:, None], other=0.0)
        Z += one * dot(qt, tl.trans(kt))
        Z -= two * dot(kt, tl.trans(kt))
    db = tl.sum(Z, 0)
    put, passing = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    if GATED:       # a gate's gradient is the sum of what passes it; a token's own pair, on the diagonal, does not
        Z = tl.where(i > j, Z, 0.0) * strength[None, :]
        crossing = tl.sum(Z, 1) - tl.sum(Z, 0)
        kept = tl.zeros([BK], tl.float32)
    # Through memory, to be read as they are and transposed: a result in registers is no transposed operand.
    tl.debug_barrier()
    Xs, Es = tl.load(X + tile), tl.load(E + tile)
    for n0 in tl.range(0, K, BK):
        S, dS = tl.load(states + chunk + n0 * V), tl.load(dstates + chunk + n0 * V)
        kn = tl.load(k + keys + n0, mask=ok[:, None], other=0.0)
        qn = tl.load(q + keys + n0, mask=ok[:, None], other=0.0)
        dqt = tl.where(since[:, None] < 0, 0.0, dot(dyt, tl.trans(S)) * since[:, None])
        dut = tl.where(since[:, None] < 0, 0.0, -dot(dvt, tl.trans(S)) * since[:, None])
        dkt = dot(wt, tl.trans(dS))
        put += tl.sum(kn * dkt, 1)
        if GATED:
            kept += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
            passing += tl.sum(qn * dqt + kn * dut, 1)
        dkt *= (until * strength)[:, None]
        tl.store(dq + outs + n0, dot(Xs, kn, dqt).to(dq.dtype.element_ty), mask=ok[:, None])
        dkt = dot(tl.trans(Xs), qn, dkt + dut)
        dkt = dot(Es, kn, dkt)
        tl.store(dk + outs + n0, dot(tl.trans(Es), kn, dkt).to(dk.dtype.element_ty), mask=ok[:, None])
    put *= until
    tl.store(dbeta + head + token, (db + put).to(dbeta.dtype.element_ty), mask=ok)
    if GATED:
        put = tl.where(r == tl.minimum(C, T - c * C) - 1, 0.0, put * strength)     # the last token passes no gate here
        keep = tl.sum(tl.where(r == C - 1, since, 0.0), 0)
        passed = tl.cumsum(crossing + passing, 0, reverse=True) + (tl.cumsum(put, 0) - put)
        passed += tl.where(keep < 0, 0.0, tl.sum(kept) * keep)
        tl.store(dg + head + token, passed.to(dg.dtype.element_ty), mask=ok)


def backward(q: Tensor, k: Tensor, g: Tensor | None, beta: Tensor, start: Tensor, A: Tensor, P: Tensor, edges: Tensor,
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
    BK, warps = GRADIENTS[max(K, V, 64)][0]
    X, E = (torch.empty_like(A) for _ in range(2))
    # Two trips at least: a loop of one is no loop, and its tiles are all held at once, in hundreds of spills. What is
    # made of keys alone is cut too: of 256 columns, or many more than values have, ptxas takes addresses amiss.
    _gradients[NT, B * H](q, k, beta if g is None else g, beta, start, w, states, dy, dv, dstates, X, E, dq, dk, dg,
                          dbeta, T, H, G, K, V, C, min(BK, K // 2), min(K, V, 128), g is not None, even,
                          num_warps=warps, num_stages=1)
    if G < H:
        dq, dk = (z.unflatten(2, (G, -1)).sum(3).to(q.dtype) for z in (dq, dk))
    return dq, dk, dv, dbeta, dg, before[:, :, 0].contiguous() if segments > 1 else before
