"""Prologue of recurrent mixers in one pass: causal convolution of every channel, SiLU, heads brought to a length.

Channels come from one product and leave in up to three parts, queries, keys and values, each in memory of its own: what
follows wants them apart, and copies would cost as much as all this. A part whose length is 0 keeps its heads' own.

A row is extended to the left by the W - 1 inputs before it, at tokens -(W-1) to -1: outputs, gradients and the state
after the row are then all tiles of one range of tokens. Documents need no running count: a tap is dropped from the
token on at which a document began.
"""
from __future__ import annotations

import math
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import cdiv, power

TILE = 4096                  # elements; a quarter of it where sums over tokens are held besides
SEGMENT = 128                # tokens that a program adds up before its sums go to memory: 1/20 of the bytes of a pass


@triton.jit
def _inputs(x, before, b, t, c, T, C, first, W: tl.constexpr):
    """Tokens t of the extended row (BT, BC) in fp32, zero beyond its ends; first: the smallest t."""
    ok = (c < C)[None, :]
    rows = (b.to(tl.int64) * T + t)[:, None] * C + c[None, :]
    tile = tl.load(x + rows, mask=((t >= 0) & (t < T))[:, None] & ok, other=0.0).to(tl.float32)
    if first < 0:                       # few programs see what was before the row
        rows = (b.to(tl.int64) * (W - 1) + t + W - 1)[:, None] * C + c[None, :]
        tile += tl.load(before + rows, mask=((t < 0) & (t > -W))[:, None] & ok, other=0.0).to(tl.float32)
    return tile


@triton.jit
def _reach(start, b, t, T, W: tl.constexpr, STEP: tl.constexpr):
    """How many of the W - 1 tokens t, t + STEP, ... are passed until one begins a document."""
    go = tl.full(t.shape, 1, tl.int32)
    reach = tl.zeros_like(go)
    for j in tl.static_range(W - 1):
        at = t + STEP * j
        go = go * (tl.load(start + b.to(tl.int64) * T + at, mask=(at >= 0) & (at < T), other=0) == 0)
        reach += go
    return reach[:, None]


@triton.jit
def _part(c, C, C0, C1, z0, z1, z2, length0, length1, length2):
    """Which part channel c is in: its memory, first channel and channels, and the length of its heads."""
    z, low, size, length = z0, c * 0, C0 + c * 0, length0
    if c >= C0:
        z, low, size, length = z1, C0 + c * 0, C1 + c * 0, length1
    if c >= C0 + C1:
        z, low, size, length = z2, C0 + C1 + c * 0, C - C0 - C1 + c * 0, length2
    return z, low, size, length


@triton.jit
def _forward(x, w, bias, start, before, y0, y1, y2, after, T, C, C0, C1, length0, length1, length2, eps,
             W: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    c0, b = tl.program_id(0) * BC, tl.program_id(2)
    first = tl.program_id(1) * BT - (W - 1)
    c, t = c0 + tl.arange(0, BC), first + tl.arange(0, BT)
    ok = (c < C)[None, :]
    reach = _reach(start, b, t, T, W, -1)
    total = tl.zeros([BT, BC], tl.float32)
    if BIAS:
        total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for lag in tl.static_range(W):
        tap = tl.load(w + c * W + W - 1 - lag, mask=c < C, other=0.0).to(tl.float32)[None, :]
        # where, not a product: a NaN stays in its document
        total += tl.where(lag <= reach, _inputs(x, before, b, t - lag, c, T, C, first - lag, W), 0.0) * tap
    total *= tl.sigmoid(total)
    y, low, size, length = _part(c0, C, C0, C1, y0, y1, y2, length0, length1, length2)
    if length > 0:                      # a block of channels is a head
        total *= (length * tl.rsqrt(tl.sum(total * total, 1) + eps))[:, None]
    rows = (b.to(tl.int64) * T + t)[:, None] * size + (c - low)[None, :]
    tl.store(y + rows, total.to(y0.dtype.element_ty), mask=((t >= 0) & (t < T))[:, None] & ok)
    if first + BT > T - (W - 1):        # the last inputs are what is before the next token
        whole = _reach(start, b, t + 1, T, W, 1) == W - 1
        kept = tl.where(whole, _inputs(x, before, b, t, c, T, C, first, W), 0.0)
        at = t - (T - (W - 1))
        rows = (b.to(tl.int64) * (W - 1) + at)[:, None] * C + c[None, :]
        tl.store(after + rows, kept.to(after.dtype.element_ty), mask=((at >= 0) & (t < T))[:, None] & ok)


@triton.jit
def _slopes(x, w, bias, start, before, dy0, dy1, dy2, dc, partial, T, C, C0, C1, length0, length1, length2, eps, TILES,
            W: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Gradients of the convolution's results, and what TILES tiles of tokens add to those of its taps and bias."""
    c0, b = tl.program_id(0) * BC, tl.program_id(2)
    c = c0 + tl.arange(0, BC)
    shift = tl.zeros([1, BC], tl.float32)
    if BIAS:
        shift += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    dy, low, size, length = _part(c0, C, C0, C1, dy0, dy1, dy2, length0, length1, length2)
    sums = (tl.zeros([BT, BC], tl.float32),) * (W + 1)
    for i in range(TILES):
        first = (tl.program_id(1) * TILES + i) * BT
        t = first + tl.arange(0, BT)
        inside = (t < T)[:, None] & (c < C)[None, :]
        reach, taps, total = _reach(start, b, t, T, W, -1), (), shift + tl.zeros([BT, BC], tl.float32)
        for lag in tl.static_range(W):
            tap = tl.load(w + c * W + W - 1 - lag, mask=c < C, other=0.0).to(tl.float32)[None, :]
            seen = tl.where(lag <= reach, _inputs(x, before, b, t - lag, c, T, C, first - lag, W), 0.0)
            total += seen * tap
            taps += (seen,)
        row = (b.to(tl.int64) * T + t)[:, None]
        d = tl.load(dy + row * size + (c - low)[None, :], mask=inside, other=0.0).to(tl.float32)
        open = tl.sigmoid(total)
        if length > 0:                  # of n = length y / |y| that of y is (dn - y <y, dn> / |y|^2) length / |y|
            y = total * open
            r = tl.rsqrt(tl.sum(y * y, 1) + eps)[:, None]
            d = length * r * (d - y * (r * r * tl.sum(y * d, 1)[:, None]))
        d = tl.where(inside, d * open * (1 + total * (1 - open)), 0.0)
        tl.store(dc + row * C + c[None, :], d.to(dc.dtype.element_ty), mask=inside)
        new = ()
        for lag in tl.static_range(W):
            new += (sums[lag] + taps[lag] * d,)
        new += (sums[W] + d,)
        sums = new
    at = (b.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (W + 1)
    for lag in tl.static_range(W):
        tl.store(partial + (at + W - 1 - lag) * C + c, tl.sum(sums[lag], 0), mask=c < C)
    tl.store(partial + (at + W) * C + c, tl.sum(sums[W], 0), mask=c < C)


@triton.jit
def _mirrored(dc, w, start, dafter, dx, dbefore, T, C, W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Gradients of the inputs: the filter turned round, over the gradients of its results."""
    b = tl.program_id(2)
    first = tl.program_id(1) * BT - (W - 1)
    c, t = tl.program_id(0) * BC + tl.arange(0, BC), first + tl.arange(0, BT)
    ok = (c < C)[None, :]
    rows = (b.to(tl.int64) * T + t)[:, None] * C + c[None, :]
    reach = _reach(start, b, t + 1, T, W, 1)
    total = tl.zeros([BT, BC], tl.float32)
    for ahead in tl.static_range(W):
        inside = ((t + ahead >= 0) & (t + ahead < T))[:, None] & ok
        d = tl.load(dc + rows + ahead * C, mask=inside & (ahead <= reach), other=0.0).to(tl.float32)
        total += d * tl.load(w + c * W + W - 1 - ahead, mask=c < C, other=0.0).to(tl.float32)[None, :]
    at = t - (T - (W - 1))
    if first + BT > T - (W - 1):        # what the state after the row keeps has no document begin behind it
        kept = ((at >= 0) & (t < T))[:, None] & (reach == W - 1) & ok
        last = (b.to(tl.int64) * (W - 1) + at)[:, None] * C + c[None, :]
        total += tl.load(dafter + last, mask=kept, other=0.0).to(tl.float32)
    tl.store(dx + rows, total.to(dx.dtype.element_ty), mask=((t >= 0) & (t < T))[:, None] & ok)
    if first < 0:
        rows = (b.to(tl.int64) * (W - 1) + t + W - 1)[:, None] * C + c[None, :]
        tl.store(dbefore + rows, total.to(dbefore.dtype.element_ty), mask=((t < 0) & (t > -W))[:, None] & ok)


def block(sizes: list[int], lengths: list[float], head: int) -> int:
    """Channels of a tile, which is of one part: a head where some are brought to a length, to see it whole."""
    if any(lengths):
        return head
    edges = math.gcd(*accumulate(sizes[:-1]))       # 0 of one part
    return min(128, power(sum(sizes)), edges & -edges or 128)


def three(parts: list[Tensor], sizes: list[int], lengths: list[float]) -> tuple[list[Tensor], list[int], list[float]]:
    """The arguments of _part: memory of three parts, channels of two, lengths of three; what is not there is empty."""
    more = 3 - len(parts)
    return parts + parts[:1] * more, (sizes + [0] * more)[:2], lengths + [0.0] * more


def forward(x: Tensor, w: Tensor, bias: Tensor | None, start: Tensor, before: Tensor, sizes: list[int],
            lengths: list[float], head: int, eps: float) -> list[Tensor]:
    """x (B, T, C), w (C, W), bias (C,), start (B, T), before (B, W - 1, C), all contiguous -> parts, and what is after.

    sizes: channels of the parts, of one to three; lengths: of their heads of `head` channels, 0 to leave them.
    """
    (B, T, C), W = x.shape, w.shape[1]
    parts, after, BC = [x.new_empty(B, T, n) for n in sizes], x.new_empty(B, W - 1, C), block(sizes, lengths, head)
    BT, (ys, ends, wanted) = min(TILE // BC, power(T + W - 1)), three(parts, sizes, lengths)
    _forward[(cdiv(C, BC), cdiv(T + W - 1, BT), B)](
        x, w, bias, start.view(torch.uint8), before, *ys, after, T, C, *ends, *wanted, eps, W=W, BIAS=bias is not None,
        BT=BT, BC=BC)
    return [*parts, after]


def backward(x: Tensor, w: Tensor, bias: Tensor | None, start: Tensor, before: Tensor, sizes: list[int],
             lengths: list[float], head: int, eps: float, dparts: list[Tensor],
             dafter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w, bias and before, those of w and bias in fp32."""
    (B, T, C), W = x.shape, w.shape[1]
    dc, dx, dbefore = torch.empty_like(x), torch.empty_like(x), torch.empty_like(before)
    BC, (dys, ends, wanted) = block(sizes, lengths, head), three(dparts, sizes, lengths)
    BT, start = min(TILE // 4 // BC, power(T)), start.view(torch.uint8)
    tiles = cdiv(min(SEGMENT, T), BT)
    segments = cdiv(T, tiles * BT)
    partial = x.new_empty(B * segments, W + 1, C, dtype=torch.float32)
    _slopes[(cdiv(C, BC), segments, B)](
        x, w, bias, start, before, *dys, dc, partial, T, C, *ends, *wanted, eps, tiles, W=W, BIAS=bias is not None,
        BT=BT, BC=BC)
    BT = min(TILE // BC, power(T + W - 1))
    _mirrored[(cdiv(C, BC), cdiv(T + W - 1, BT), B)](
        dc, w, start, dafter, dx, dbefore, T, C, W=W, BT=BT, BC=BC)
    return dx, partial[:, :W].sum(0).t().contiguous(), partial[:, W].sum(0), dbefore
