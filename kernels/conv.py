"""Prologue of recurrent mixers in one pass: causal convolution of every channel, SiLU, heads brought to a length.

Channels come from one product and leave in up to three parts, queries, keys and values, each in memory of its own: what
follows wants them apart, and copies would cost as much as all this. A part whose length is 0 keeps its heads' own.

A program walks several spans of a row side by side, a token of each at a step, with the last W inputs in registers: all
is read once but for the W - 1 tokens before a span, which for the first are the inputs before the row. Backward it
walks W - 1 tokens further, until what it began is whole. A document's first token empties what is in registers.
"""
from __future__ import annotations

import math
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import cdiv, power

# Elements of a step, tokens of a span and warps; the first runs.
FORWARD: dict[str, tuple[tuple[int, int, int], ...]] = {
    "conv": ((1024, 32, 4), (512, 32, 4), (1024, 16, 4), (2048, 32, 8))}
BACKWARD: dict[str, tuple[tuple[int, int, int], ...]] = {
    "conv": ((1024, 60, 4), (512, 60, 4), (1024, 28, 4), (512, 124, 4))}
STEPS = 4                    # tokens whose inputs are loaded together


@triton.jit
def _taps(w, c, C, W: tl.constexpr):
    """Those of lags 0 to W - 1, (1, BC) each."""
    taps = ()
    for lag in tl.static_range(W):
        taps += (tl.load(w + c * W + W - 1 - lag, mask=c < C, other=0.0).to(tl.float32)[None, :],)
    return taps


@triton.jit
def _begins(start, b, t, T):
    """Whether a document begins at tokens t (S, 1)."""
    return tl.load(start + b * T + t, mask=(t >= 0) & (t < T), other=0) != 0


@triton.jit
def _next(seen, x, fresh, W: tl.constexpr):
    """The last W inputs of a document, the newest first. where, not a product: a NaN stays in its document."""
    new = (x.to(tl.float32),)
    for j in tl.static_range(W - 1):
        new += (tl.where(fresh, 0.0, seen[j]),)
    return new


@triton.jit
def _earlier(x, before, start, b, t, c, T, C, W: tl.constexpr, S: tl.constexpr, BC: tl.constexpr):
    """The W inputs up to the token before t (S, 1), how many of the last W - 1 of them are of t's document."""
    seen, reach, ok = (tl.zeros([S, BC], tl.float32),) * W, tl.full([S, 1], W - 1, tl.int32), c[None, :] < C
    for i in tl.static_range(W - 1):
        at = t + i - (W - 1)
        new = tl.load(x + (b * T + at) * C + c[None, :], mask=(at >= 0) & (at < T) & ok, other=0.0)
        new += tl.load(before + (b * (W - 1) + at + W - 1) * C + c[None, :], mask=(at < 0) & ok, other=0.0)
        fresh = _begins(start, b, at, T)
        seen, reach = _next(seen, new, fresh, W), tl.where(fresh, 0, tl.minimum(reach + 1, W - 1))
    return seen, reach


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
def _sum(seen, taps, shift, W: tl.constexpr):
    total = shift + seen[0] * taps[0]
    for lag in tl.static_range(1, W):
        total += seen[lag] * taps[lag]
    return total


@triton.jit
def _load(z, start, b, t, c, T, size, C, G: tl.constexpr):
    """Tokens t, t + 1, ... of z, and whether documents begin there."""
    out = ()
    for i in tl.static_range(G):
        rows = (b * T + t + i) * size + c[None, :]
        out += ((tl.load(z + rows, mask=(t + i < T) & (c[None, :] < C), other=0.0), _begins(start, b, t + i, T)),)
    return out


@triton.jit(do_not_specialize=["T", "span"])     # rows of any length run what one of them compiled
def _forward(x, w, bias, start, before, y0, y1, y2, after, T, C, C0, C1, length0, length1, length2, eps, span,
             W: tl.constexpr, BIAS: tl.constexpr, S: tl.constexpr, BC: tl.constexpr, G: tl.constexpr):
    c0, b = tl.program_id(0) * BC, tl.program_id(2).to(tl.int64)
    c, t = c0 + tl.arange(0, BC), ((tl.program_id(1) * S + tl.arange(0, S)) * span)[:, None]
    taps, shift, ok = _taps(w, c, C, W), tl.zeros([1, BC], tl.float32), (c < C)[None, :]
    if BIAS:
        shift += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    y, low, size, length = _part(c0, C, C0, C1, y0, y1, y2, length0, length1, length2)
    seen, _ = _earlier(x, before, start, b, t, c, T, C, W, S, BC)
    for g in range(0, span, G):
        inputs = _load(x, start, b, t + g, c, T, C, C, G)
        for i in tl.static_range(G):
            seen = _next(seen, inputs[i][0], inputs[i][1], W)
            total, at = _sum(seen, taps, shift, W), t + g + i
            total *= tl.sigmoid(total)
            if length > 0:              # a block of channels is a head
                total *= (length * tl.rsqrt(tl.sum(total * total, 1) + eps))[:, None]
            tl.store(y + (b * T + at) * size + (c - low)[None, :], total.to(y0.dtype.element_ty), mask=(at < T) & ok)
    if (tl.program_id(1) + 1) * S * span >= T:          # the last inputs are what is before the next token
        last, _reach = _earlier(x, before, start, b, tl.full([1, 1], T, tl.int32), c, T, C, W, 1, BC)
        for j in tl.static_range(W - 1):
            rows = (b * (W - 1) + W - 2 - j) * C + c[None, :]
            tl.store(after + rows, last[j].to(after.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["T", "span"])
def _backward(x, w, bias, start, before, dy0, dy1, dy2, dafter, dx, dbefore, partial, T, C, C0, C1, length0, length1,
              length2, eps, span, W: tl.constexpr, BIAS: tl.constexpr, S: tl.constexpr, BC: tl.constexpr,
              G: tl.constexpr):
    """Gradients of the inputs, and what these spans add to those of the taps and the bias."""
    c0, b = tl.program_id(0) * BC, tl.program_id(2).to(tl.int64)
    c, t = c0 + tl.arange(0, BC), ((tl.program_id(1) * S + tl.arange(0, S)) * span)[:, None]
    taps, shift, ok = _taps(w, c, C, W), tl.zeros([1, BC], tl.float32), (c < C)[None, :]
    if BIAS:
        shift += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    dy, low, size, length = _part(c0, C, C0, C1, dy0, dy1, dy2, length0, length1, length2)
    seen, reach = _earlier(x, before, start, b, t, c, T, C, W, S, BC)
    none = tl.zeros([S, BC], tl.float32)
    flow, sums = (none,) * W, (none,) * (W + 1)          # of the last W inputs, the newest first
    for g in range(0, span + W - 1, G):
        inputs = _load(x, start, b, t + g, c, T, C, C, G)
        slopes = _load(dy - low, start, b, t + g, c, T, size, C, G)
        for i in tl.static_range(G):
            at = t + g + i
            fresh = inputs[i][1]
            seen, reach = _next(seen, inputs[i][0], fresh, W), tl.where(fresh, 0, tl.minimum(reach + 1, W - 1))
            total, d = _sum(seen, taps, shift, W), slopes[i][0].to(tl.float32)
            open = tl.sigmoid(total)
            if length > 0:              # of n = length y / |y| that of y is (dn - y <y, dn> / |y|^2) length / |y|
                y = total * open
                r = tl.rsqrt(tl.sum(y * y, 1) + eps)[:, None]
                d = length * r * (d - y * (r * r * tl.sum(y * d, 1)[:, None]))
            d = tl.where(at < T, d * open * (1 + total * (1 - open)), 0.0)
            own = tl.where(g + i < span, d, 0.0)
            whole, more = (d * taps[0],), (sums[0] + seen[0] * own,)
            for lag in tl.static_range(1, W):
                whole += (flow[lag - 1] + tl.where(lag <= reach, d, 0.0) * taps[lag],)
                more += (sums[lag] + seen[lag] * own,)
            more += (sums[W] + own,)
            flow, sums = whole, more
            of = at - (W - 1)            # the token whose gradient is whole
            last = (of >= T - (W - 1)) & (of < T) & (reach == W - 1) & ok
            rows = (b * (W - 1) + of - (T - (W - 1))) * C + c[None, :]
            out = flow[W - 1] + tl.load(dafter + rows, mask=last, other=0.0).to(tl.float32)
            mine = (of >= t) & (of < t + span) & (of < T) & ok
            tl.store(dx + (b * T + of) * C + c[None, :], out.to(dx.dtype.element_ty), mask=mine)
            rows = (b * (W - 1) + of + W - 1) * C + c[None, :]
            tl.store(dbefore + rows, out.to(dbefore.dtype.element_ty), mask=(of < 0) & ok)
    at = (b * tl.num_programs(1) + tl.program_id(1)) * (W + 1)
    for lag in tl.static_range(W):
        tl.store(partial + (at + W - 1 - lag) * C + c, tl.sum(sums[lag], 0), mask=c < C)
    tl.store(partial + (at + W) * C + c, tl.sum(sums[W], 0), mask=c < C)


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


def cut(T: int, BC: int, config: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Spans of a program, tokens of a span, programs of a row, warps."""
    elements, span, warps = config
    S = max(1, min(elements // BC, power(T)))
    span = min(span, STEPS * cdiv(T, S * STEPS))
    return S, span, cdiv(T, S * span), warps


def forward(x: Tensor, w: Tensor, bias: Tensor | None, start: Tensor, before: Tensor, sizes: list[int],
            lengths: list[float], head: int, eps: float) -> list[Tensor]:
    """x (B, T, C), w (C, W), bias (C,), start (B, T), before (B, W - 1, C), all contiguous -> parts, and what is after.

    sizes: channels of the parts, of one to three; lengths: of their heads of `head` channels, 0 to leave them.
    """
    (B, T, C), W = x.shape, w.shape[1]
    parts, after, BC = [x.new_empty(B, T, n) for n in sizes], x.new_empty(B, W - 1, C), block(sizes, lengths, head)
    S, span, programs, warps = cut(T, BC, FORWARD["conv"][0])
    ys, ends, wanted = three(parts, sizes, lengths)
    _forward[(cdiv(C, BC), programs, B)](
        x, w, bias, start.view(torch.uint8), before, *ys, after, T, C, *ends, *wanted, eps, span, W=W,
        BIAS=bias is not None, S=S, BC=BC, G=STEPS, num_warps=warps)
    return [*parts, after]


def backward(x: Tensor, w: Tensor, bias: Tensor | None, start: Tensor, before: Tensor, sizes: list[int],
             lengths: list[float], head: int, eps: float, dparts: list[Tensor],
             dafter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w, bias and before, those of w and bias in fp32."""
    (B, T, C), W = x.shape, w.shape[1]
    dx, dbefore, BC = torch.empty_like(x), torch.empty_like(before), block(sizes, lengths, head)
    S, span, programs, warps = cut(T, BC, BACKWARD["conv"][0])
    dys, ends, wanted = three(dparts, sizes, lengths)
    partial = x.new_empty(B * programs, W + 1, C, dtype=torch.float32)
    _backward[(cdiv(C, BC), programs, B)](
        x, w, bias, start.view(torch.uint8), before, *dys, dafter, dx, dbefore, partial, T, C, *ends, *wanted, eps,
        span, W=W, BIAS=bias is not None, S=S, BC=BC, G=STEPS, num_warps=warps)
    return dx, partial[:, :W].sum(0).t().contiguous(), partial[:, W].sum(0), dbefore
