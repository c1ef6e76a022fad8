"""Epilogue of recurrent mixers: every head at root mean square 1, times a scale, times silu(gate)."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import cdiv, power, processors

TILE = 4096         # elements; a quarter of it where a sum over rows is held besides


@triton.jit
def _forward(y, scale, gate, out, N, V, eps, R: tl.constexpr, BV: tl.constexpr):
    row, v = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, BV)
    at, ok = row.to(tl.int64)[:, None] * V + v[None, :], (row < N)[:, None] & (v < V)[None, :]
    n = tl.load(y + at, mask=ok, other=0.0).to(tl.float32)
    n *= tl.rsqrt(tl.sum(n * n, 1) / V + eps)[:, None] * tl.load(scale + v, mask=v < V, other=0.0).to(tl.float32)[None]
    g = tl.load(gate + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + at, (n * g * tl.sigmoid(g)).to(out.dtype.element_ty), mask=ok)


@triton.jit
def _backward(y, scale, gate, dout, dy, dgate, partial, N, V, eps, TILES, R: tl.constexpr, BV: tl.constexpr):
    v = tl.arange(0, BV)
    by = tl.load(scale + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    dscale = tl.zeros([R, BV], tl.float32)
    for i in range(TILES):
        row = (tl.program_id(0) * TILES + i) * R + tl.arange(0, R)
        at, ok = row.to(tl.int64)[:, None] * V + v[None, :], (row < N)[:, None] & (v < V)[None, :]
        n = tl.load(y + at, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(gate + at, mask=ok, other=0.0).to(tl.float32)
        d = tl.load(dout + at, mask=ok, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(n * n, 1) / V + eps)[:, None]
        n *= r
        open = tl.sigmoid(g)
        dg = d * n * by * open * (1 + g * (1 - open))
        tl.store(dgate + at, dg.to(dgate.dtype.element_ty), mask=ok)
        d *= g * open
        dscale += d * n
        d *= by
        d = r * (d - n * (tl.sum(d * n, 1) / V)[:, None])
        tl.store(dy + at, d.to(dy.dtype.element_ty), mask=ok)
    tl.store(partial + tl.program_id(0).to(tl.int64) * V + v, tl.sum(dscale, 0), mask=v < V)


def forward(y: Tensor, scale: Tensor, gate: Tensor, eps: float) -> Tensor:
    """y and gate (..., V), scale (V,), contiguous -> rms_norm(y) scale silu(gate) in the gate's dtype."""
    V, out = y.shape[-1], torch.empty_like(gate)
    N, BV = y.numel() // V, power(V)
    R = max(TILE // BV, 1)
    _forward[(cdiv(N, R),)](y, scale, gate, out, N, V, eps, R=R, BV=BV)
    return out


def backward(y: Tensor, scale: Tensor, gate: Tensor, eps: float, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, scale (in fp32) and gate."""
    V, dy, dgate = y.shape[-1], torch.empty_like(y), torch.empty_like(gate)
    N, BV = y.numel() // V, power(V)
    R = max(TILE // 4 // BV, 1)
    tiles = max(cdiv(N, R * 8 * processors(y)), 1)      # as many programs as run at once
    programs = cdiv(N, R * tiles)
    partial = y.new_empty(programs, V, dtype=torch.float32)
    _backward[(programs,)](y, scale, gate, dout, dy, dgate, partial, N, V, eps, tiles, R=R, BV=BV)
    return dy, partial.sum(0), dgate
