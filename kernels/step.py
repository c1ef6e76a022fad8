"""One more token of a recurrence: its state is read once and written once, in place, and nothing else is large.

At 16 heads of 128 x 128 the state takes 1 MiB a row of the batch: 64 rows need 134 MB moved, 45 us of an H100.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import LOG2E, cdiv, power, processors


@triton.jit
def _matrix(q, k, v, g, beta, start, S, y, H, V, scale, q_row, k_row, v_row, g_row, beta_row, start_row,
            CUTS: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
            GATE: tl.constexpr, DELTA: tl.constexpr):
    """S (K, BV) of one head: decayed by no gate, one, or one a row (GATE 0 to 2); k v^T or the delta rule's added."""
    i, c = tl.arange(0, BK), tl.program_id(0) % CUTS * BV + tl.arange(0, BV)
    nth = tl.program_id(0) // CUTS      # of all rows' heads
    row, head = (nth // H).to(tl.int64), nth % H
    at = nth.to(tl.int64) * K * V + i[:, None] * V + c[None, :]
    ok = (i < K)[:, None] & (c < V)[None, :]
    # Of a large batch states are more than the L2 cache holds, and do not wait in it: 51 -> 49 us of 64 rows (H100).
    s = tl.load(S + at, mask=ok, other=0.0, eviction_policy="evict_first")
    # Whether a document begins decides what is used, not what is loaded: the load would wait for the answer.
    s = tl.where(tl.load(start + row * start_row) != 0, 0.0, s)
    shared = head // SHARE * K + i
    qt = tl.load(q + row * q_row + shared, mask=i < K, other=0.0).to(tl.float32)[:, None] * scale
    kt = tl.load(k + row * k_row + shared, mask=i < K, other=0.0).to(tl.float32)[:, None]
    vt = tl.load(v + row * v_row + head * V + c, mask=c < V, other=0.0).to(tl.float32)
    if GATE == 1:
        s *= tl.exp2(tl.load(g + row * g_row + head).to(tl.float32) * LOG2E)
    if GATE == 2:
        gates = tl.load(g + row * g_row + head * K + i, mask=i < K, other=0.0).to(tl.float32)
        s *= tl.exp2(gates * LOG2E)[:, None]
    if DELTA:
        # y of the new state is q S + (q k) u: both sums over the old one are taken at once.
        u = tl.load(beta + row * beta_row + head).to(tl.float32) * (vt - tl.sum(kt * s, 0))
        out = tl.sum(qt * s, 0) + tl.sum(qt * kt) * u
        s += kt * u[None, :]
    else:
        s += kt * vt[None, :]
        out = tl.sum(qt * s, 0)
    tl.store(S + at, s, mask=ok, eviction_policy="evict_first")
    tl.store(y + nth.to(tl.int64) * V + c, out.to(y.dtype.element_ty), mask=c < V)


@triton.jit
def _scan(q, k, v, dt, A, start, h, y, D, q_row, k_row, v_row, dt_row, start_row, N: tl.constexpr, BN: tl.constexpr,
          BD: tl.constexpr):
    d, n, row = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN), tl.program_id(1).to(tl.int64)
    at, ok = d[:, None] * N + n[None, :], (d < D)[:, None] & (n < N)[None, :]
    s = tl.load(h + row * D * N + at, mask=ok, other=0.0)
    s = tl.where(tl.load(start + row * start_row) != 0, 0.0, s)
    rate = tl.load(A + at, mask=ok, other=0.0).to(tl.float32)
    step = tl.load(dt + row * dt_row + d, mask=d < D, other=0.0).to(tl.float32)
    vt = tl.load(v + row * v_row + d, mask=d < D, other=0.0).to(tl.float32)
    qt = tl.load(q + row * q_row + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    kt = tl.load(k + row * k_row + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    s = tl.exp2(step[:, None] * rate * LOG2E) * s + (step * vt)[:, None] * kt
    tl.store(h + row * D * N + at, s, mask=ok)
    tl.store(y + row * D + d, tl.sum(s * qt, 1).to(y.dtype.element_ty), mask=d < D)


def flat(z: Tensor, dims: int) -> Tensor:
    """z (B, 1, ...) whose last `dims` dimensions lie together; rows may lie apart, as slices of a projection do."""
    inner, stride = (z.shape[-1], z.stride(-2)) if dims == 2 else (1, 1)
    return z if z.stride(-1) == 1 and stride == inner else z.contiguous()


def columns(heads: int, V: int, wanted: int) -> int:
    """Columns of the state a program takes: wide rows of memory, unless too few programs are left for the GPU."""
    return next((n for n in (64, 32) if n <= V and heads * V >= wanted * n), min(16, power(V)))


def matrix(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, start: Tensor, S: Tensor,
           scale: float) -> Tensor:
    """q, k (B, 1, G, K), v (B, 1, H, V), g (B, 1, H) or (B, 1, H, K), beta (B, 1, H), S (B, H, K, V) fp32 in place."""
    (B, H, K, V), G = S.shape, q.shape[2]
    y = v.new_empty(B, 1, H, V)
    q, k, v = flat(q, 2), flat(k, 2), flat(v, 2)
    g = g if g is None else flat(g, g.dim() - 2)
    beta = beta if beta is None else flat(beta, 1)
    BK, BV = power(K), columns(B * H, V, 2 * processors(S))
    cuts = cdiv(V, BV)
    _matrix[(cuts * B * H,)](
        q, k, v, q if g is None else g, q if beta is None else beta, start.view(torch.uint8), S, y, H, V, scale,
        q.stride(0), k.stride(0), v.stride(0), 0 if g is None else g.stride(0), 0 if beta is None else beta.stride(0),
        start.stride(0), CUTS=cuts, SHARE=H // G, K=K, BK=BK, BV=BV, GATE=0 if g is None else g.dim() - 2,
        DELTA=beta is not None, num_warps=4 if BK * BV <= 8192 else 8)
    return y


def scan(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, h: Tensor) -> Tensor:
    """q, k (B, 1, N), v, dt (B, 1, D), A (D, N), h (B, D, N) fp32 in place."""
    B, D, N = h.shape
    y = v.new_empty(B, 1, D)
    q, k, v, dt = (flat(z, 1) for z in (q, k, v, dt))
    BN = power(N)
    BD = max((2048 if h.numel() > 4096 * processors(h) else 512) // BN, 1)
    _scan[(cdiv(D, BD), B)](
        q, k, v, dt, A.contiguous(), start.view(torch.uint8), h, y, D, q.stride(0), k.stride(0), v.stride(0),
        dt.stride(0), start.stride(0), N=N, BN=BN, BD=BD)
    return y
