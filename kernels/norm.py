"""Epilogue of recurrent mixers: rows at root mean square 1, times a scale, times silu(gate) before or after that.

Rows are heads that share a scale, or those of G groups a token, each with a scale of its own.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import cdiv, power, processors, sigmoid

TILE = 4096         # elements; a quarter of it where a sum over rows is held besides
LONGEST = 8192      # channels of a row: a program holds it in registers, with its gate and three gradients


@triton.jit
def _forward(y, scale, gate, out, N, V, eps, R: tl.constexpr, BV: tl.constexpr, FIRST: tl.constexpr):
    """Of N tokens and program_id(1)'s group. FIRST: gated before the norm."""
    row, v, group, G = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, BV), tl.program_id(1), tl.num_programs(1)
    at, ok = (row.to(tl.int64) * G + group)[:, None] * V + v[None, :], (row < N)[:, None] & (v < V)[None, :]
    n = tl.load(y + at, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=ok, other=0.0).to(tl.float32)
    g *= sigmoid(g)
    if FIRST:
        n *= g
    n *= tl.rsqrt(tl.sum(n * n, 1) / V + eps)[:, None]
    n *= tl.load(scale + group * V + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    if not FIRST:
        n *= g
    tl.store(out + at, n.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _backward(y, scale, gate, dout, dy, dgate, partial, N, V, eps, TILES, R: tl.constexpr, BV: tl.constexpr,
              FIRST: tl.constexpr):
    v, group, G = tl.arange(0, BV), tl.program_id(1), tl.num_programs(1)
    by = tl.load(scale + group * V + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    dscale = tl.zeros([R, BV], tl.float32)
    for i in range(TILES):
        row = (tl.program_id(0) * TILES + i) * R + tl.arange(0, R)
        at, ok = (row.to(tl.int64) * G + group)[:, None] * V + v[None, :], (row < N)[:, None] & (v < V)[None, :]
        x = tl.load(y + at, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(gate + at, mask=ok, other=0.0).to(tl.float32)
        d = tl.load(dout + at, mask=ok, other=0.0).to(tl.float32)
        open = sigmoid(g)
        slope = open * (1 + g * (1 - open))
        g *= open
        n = x * g if FIRST else x
        r = tl.rsqrt(tl.sum(n * n, 1) / V + eps)[:, None]
        n *= r
        if not FIRST:
            tl.store(dgate + at, (d * n * by * slope).to(dgate.dtype.element_ty), mask=ok)
            d *= g
        dscale += d * n
        d *= by
        d = r * (d - n * (tl.sum(d * n, 1) / V)[:, None])
        if FIRST:
            tl.store(dgate + at, (d * x * slope).to(dgate.dtype.element_ty), mask=ok)
            d *= g
        tl.store(dy + at, d.to(dy.dtype.element_ty), mask=ok)
    tl.store(partial + (tl.program_id(0) * G + group).to(tl.int64) * V + v, tl.sum(dscale, 0), mask=v < V)


def warps(elements: int) -> int:
    """Of a tile: from four on, so that a thread has 16 elements of a long row or fewer."""
    return min(max(elements // 512, 4), 16)


def forward(y: Tensor, scale: Tensor, gate: Tensor, first: bool, eps: float) -> Tensor:
    """y and gate (..., G, V), scale (G, V), contiguous -> the rows, gated first or last, in the gate's dtype."""
    (G, V), out = scale.shape, torch.empty_like(gate)
    N, BV = y.numel() // (G * V), power(V)
    R = max(TILE // BV, 1)
    _forward[cdiv(N, R), G](y, scale, gate, out, N, V, eps, R=R, BV=BV, FIRST=first,
                            num_warps=4 if R > 1 else warps(BV))
    return out


def backward(y: Tensor, scale: Tensor, gate: Tensor, first: bool, eps: float,
             dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, scale (in fp32) and gate."""
    (G, V), dy, dgate = scale.shape, torch.empty_like(y), torch.empty_like(gate)
    N, BV = y.numel() // (G * V), power(V)
    R = max(TILE // 4 // BV, 1)
    tiles = max(cdiv(N * G, R * 32 // warps(R * BV) * processors(y)), 1)    # as many programs as run at once
    programs = cdiv(N, R * tiles)
    partial = y.new_empty(programs, G, V, dtype=torch.float32)
    _backward[programs, G](y, scale, gate, dout, dy, dgate, partial, N, V, eps, tiles, R=R, BV=BV, FIRST=first,
                           num_warps=warps(R * BV))
    return dy, partial.sum(0), dgate
