"""Prologue of recurrent mixers in one pass: causal convolution of every channel, SiLU, heads brought to a length.

Channels come from one product and leave in up to three parts, queries, keys and values, each in memory of its own: what
follows wants them apart, and copies would cost as much as all this. A part whose length is 0 keeps its heads' own.

A program walks several spans of a row side by side, a token of each at a step, with the last W inputs in registers: all
is read once but for the W - 1 tokens before a span, which for the first are the inputs before the row. Backward it
walks W - 1 tokens further, until what it began is whole. A document's first token empties what is in registers. Most
tokens are near no end of a row, span or document: for these the code is there a second time, without questions.
"""
from __future__ import annotations

import math
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import cdiv, power, processors, sigmoid

# Elements of a step, tokens of a span, at most, and warps; the first runs. What a span begins and ends with costs two
# groups of tokens twice their time, so long spans are better where there are programs enough. _borders has bits for
# spans of some 240.
FORWARD: dict[str, tuple[tuple[int, int, int], ...]] = {
    "conv": ((512, 64, 4), (512, 32, 4), (1024, 32, 4))}
BACKWARD: dict[str, tuple[tuple[int, int, int], ...]] = {
    "conv": ((512, 128, 4), (512, 64, 4), (1024, 64, 8))}
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
def _next(seen, x, fresh, W: tl.constexpr, EDGES: tl.constexpr):
    """The last W inputs of a document, the newest first. where, not a product: a NaN stays in its document."""
    new = (x.to(tl.float32),)
    for j in tl.static_range(W - 1):
        new += (tl.where(fresh, 0.0, seen[j]) if EDGES else seen[j],)
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
        seen, reach = _next(seen, new, fresh, W, True), tl.where(fresh, 0, tl.minimum(reach + 1, W - 1))
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
def _load(z, b, t, c, T, size, C, G: tl.constexpr):
    """Tokens t, t + 1, ... of z."""
    out = ()
    for i in tl.static_range(G):
        rows = (b * T + t + i) * size + c[None, :]
        out += (tl.load(z + rows, mask=(t + i < T) & (c[None, :] < C), other=0.0),)
    return out


@triton.jit
def _borders(start, b, t, T, W: tl.constexpr, S: tl.constexpr, G: tl.constexpr):
    """A bit for every G tokens of the spans that begin at t: whether, in any span, one of them or of the W - 1 before
    them begins a document. Where none does nobody asks again, which halves a step's instructions."""
    before: tl.constexpr = (W + G - 2) // G             # groups that hold the W - 1 tokens before a group
    i = tl.arange(0, 64)
    found = tl.zeros([64], tl.int32)
    for j in tl.static_range(G):
        found |= tl.max(_begins(start, b, t + (i[None, :] - before) * G + j, T).to(tl.int32), 0)
    bits = tl.sum(found.to(tl.int64) << i, 0)
    for _ in tl.static_range(before):
        bits |= bits >> 1
    return bits


@triton.jit
def _outputs(seen, inputs, taps, shift, start, b, t, c, T, C, y, low, size, length, eps, W: tl.constexpr,
             NORM: tl.constexpr, G: tl.constexpr, EDGES: tl.constexpr):
    """Those of tokens t, t + 1, ... of every span, and the last W inputs after them. EDGES: rows or documents end."""
    for i in tl.static_range(G):
        seen = _next(seen, inputs[i], _begins(start, b, t + i, T) if EDGES else False, W, EDGES)
        total = _sum(seen, taps, shift, W)
        total *= sigmoid(total)
        if NORM:                    # a block of channels is a head; a branch would let no token's sum begin early
            total *= tl.where(length > 0, length * tl.rsqrt(tl.sum(total * total, 1) + eps), 1.0)[:, None]
        mask = (c < C)[None, :]
        if EDGES:
            mask &= t + i < T
        tl.store(y + (b * T + t + i) * size + (c - low)[None, :], total.to(y.dtype.element_ty), mask=mask)
    return seen


@triton.jit(do_not_specialize=["T", "span"])     # rows of any length run what one of them compiled
def _forward(x, w, bias, start, before, y0, y1, y2, after, T, C, C0, C1, length0, length1, length2, eps, span,
             W: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr, BC: tl.constexpr,
             G: tl.constexpr):
    c0, b = tl.program_id(0) * BC, tl.program_id(2).to(tl.int64)
    c, t = c0 + tl.arange(0, BC), ((tl.program_id(1) * S + tl.arange(0, S)) * span)[:, None]
    taps, shift, ok = _taps(w, c, C, W), tl.zeros([1, BC], tl.float32), (c < C)[None, :]
    if BIAS:
        shift += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    y, low, size, length = _part(c0, C, C0, C1, y0, y1, y2, length0, length1, length2)
    seen, _ = _earlier(x, before, start, b, t, c, T, C, W, S, BC)
    end, borders = (tl.program_id(1) + 1) * S * span, _borders(start, b, t, T, W, S, G)
    for g in range(0, span, G):
        inputs = _load(x, b, t + g, c, T, C, C, G)
        if ((borders >> g // G) & 1 == 0) & (end <= T):
            seen = _outputs(seen, inputs, taps, shift, start, b, t + g, c, T, C, y, low, size, length, eps, W, NORM, G,
                            False)
        else:
            seen = _outputs(seen, inputs, taps, shift, start, b, t + g, c, T, C, y, low, size, length, eps, W, NORM, G,
                            True)
    if end >= T:                     # the last inputs are what is before the next token
        last, _reach = _earlier(x, before, start, b, tl.full([1, 1], T, tl.int32), c, T, C, W, 1, BC)
        for j in tl.static_range(W - 1):
            rows = (b * (W - 1) + W - 2 - j) * C + c[None, :]
            tl.store(after + rows, last[j].to(after.dtype.element_ty), mask=ok)


@triton.jit
def _slopes(seen, reach, flow, sums, inputs, slopes, taps, shift, start, dafter, dx, dbefore, b, t, g, span, c, T, C,
            length, eps, W: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, G: tl.constexpr,
            EDGES: tl.constexpr):
    """Tokens t + g, ... of every span. EDGES: rows, spans or documents begin or end."""
    for i in tl.static_range(G):
        at = t + g + i
        fresh = _begins(start, b, at, T) if EDGES else False
        seen = _next(seen, inputs[i], fresh, W, EDGES)
        reach = tl.where(fresh, 0, tl.minimum(reach + 1, W - 1)) if EDGES else reach * 0 + (W - 1)
        total, d = _sum(seen, taps, shift, W), slopes[i].to(tl.float32)
        open = sigmoid(total)
        y = total * open
        if NORM:                    # of n = length y / |y| that of y is (dn - y <y, dn> / |y|^2) length / |y|
            r = tl.rsqrt(tl.sum(y * y, 1) + eps)
            along = tl.where(length > 0, r * r * tl.sum(y * d, 1), 0.0)[:, None]
            d = tl.where(length > 0, length * r, 1.0)[:, None] * (d - y * along)
        d *= open + y * (1 - open)
        own = d
        if EDGES:
            d = tl.where(at < T, d, 0.0)
            own = tl.where(g + i < span, d, 0.0)
        whole, more = (d * taps[0],), (sums[0] + seen[0] * own,)
        for lag in tl.static_range(1, W):
            reached = tl.where(lag <= reach, d, 0.0) if EDGES else d
            whole += (flow[lag - 1] + reached * taps[lag],)
            more += (sums[lag] + seen[lag] * own,)
        if BIAS:
            more += (sums[W] + own,)
        flow, sums = whole, more
        of, ok = at - (W - 1), (c < C)[None, :]            # the token whose gradient is whole
        out, mine = flow[W - 1], ok
        if EDGES:
            last = (of >= T - (W - 1)) & (of < T) & (reach == W - 1) & ok
            rows = (b * (W - 1) + of - (T - (W - 1))) * C + c[None, :]
            out += tl.load(dafter + rows, mask=last, other=0.0).to(tl.float32)
            mine = (of >= t) & (of < t + span) & (of < T) & ok
            rows = (b * (W - 1) + of + W - 1) * C + c[None, :]
            first = (t == 0) & (of < 0) & ok           # a span after it sees a part of what these are owed
            tl.store(dbefore + rows, out.to(dbefore.dtype.element_ty), mask=first)
        tl.store(dx + (b * T + of) * C + c[None, :], out.to(dx.dtype.element_ty), mask=mine)
    return seen, reach, flow, sums


@triton.jit(do_not_specialize=["T", "span"])
def _backward(x, w, bias, start, before, dy0, dy1, dy2, dafter, dx, dbefore, partial, T, C, C0, C1, length0, length1,
              length2, eps, span, W: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, S: tl.constexpr,
              BC: tl.constexpr, G: tl.constexpr):
    """Gradients of the inputs, and what these spans add to those of the taps and the bias."""
    c0, b = tl.program_id(0) * BC, tl.program_id(2).to(tl.int64)
    c, t = c0 + tl.arange(0, BC), ((tl.program_id(1) * S + tl.arange(0, S)) * span)[:, None]
    taps, shift = _taps(w, c, C, W), tl.zeros([1, BC], tl.float32)
    if BIAS:
        shift += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    dy, low, size, length = _part(c0, C, C0, C1, dy0, dy1, dy2, length0, length1, length2)
    seen, reach = _earlier(x, before, start, b, t, c, T, C, W, S, BC)
    none = tl.zeros([S, BC], tl.float32)
    flow, sums = (none,) * W, (none,) * (W + BIAS)       # of the last W inputs, the newest first
    top, borders = ((tl.program_id(1) + 1) * S - 1) * span, _borders(start, b, t, T, W, S, G)
    for g in range(0, span + W - 1, G):
        inputs = _load(x, b, t + g, c, T, C, C, G)
        slopes = _load(dy - low, b, t + g, c, T, size, C, G)
        plain = ((borders >> g // G) & 1 == 0) & (g >= W - 1) & (g + G <= span) & (top + g + G <= T - (W - 1))
        if plain:
            seen, reach, flow, sums = _slopes(
                seen, reach, flow, sums, inputs, slopes, taps, shift, start, dafter, dx, dbefore, b, t, g, span, c, T,
                C, length, eps, W, BIAS, NORM, G, False)
        else:
            seen, reach, flow, sums = _slopes(
                seen, reach, flow, sums, inputs, slopes, taps, shift, start, dafter, dx, dbefore, b, t, g, span, c, T,
                C, length, eps, W, BIAS, NORM, G, True)
    at = (b * tl.num_programs(1) + tl.program_id(1)) * (W + BIAS)
    for lag in tl.static_range(W):
        tl.store(partial + (at + W - 1 - lag) * C + c, tl.sum(sums[lag], 0), mask=c < C)
    if BIAS:
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


def cut(x: Tensor, BC: int, config: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Spans of a program, tokens of a span, programs of a row, warps."""
    (B, T, C), (elements, span, warps) = x.shape, config
    S = max(1, min(elements // BC, power(T)))
    while span > 16 and cdiv(T, S * span) * B * cdiv(C, BC) < 3 * processors(x):       # as many as run at once
        span //= 2
    span = min(span, STEPS * cdiv(T, S * STEPS))
    return S, span, cdiv(T, S * span), warps


def forward(x: Tensor, w: Tensor, bias: Tensor | None, start: Tensor, before: Tensor, sizes: list[int],
            lengths: list[float], head: int, eps: float) -> list[Tensor]:
    """x (B, T, C), w (C, W), bias (C,), start (B, T), before (B, W - 1, C), all contiguous -> parts, and what is after.

    sizes: channels of the parts, of one to three; lengths: of their heads of `head` channels, 0 to leave them.
    """
    (B, T, C), W = x.shape, w.shape[1]
    parts, after, BC = [x.new_empty(B, T, n) for n in sizes], x.new_empty(B, W - 1, C), block(sizes, lengths, head)
    S, span, programs, warps = cut(x, BC, FORWARD["conv"][0])
    ys, ends, wanted = three(parts, sizes, lengths)
    _forward[(cdiv(C, BC), programs, B)](
        x, w, bias, start.view(torch.uint8), before, *ys, after, T, C, *ends, *wanted, eps, span, W=W,
        BIAS=bias is not None, NORM=any(lengths), S=S, BC=BC, G=STEPS, num_warps=warps)
    return [*parts, after]


def backward(x: Tensor, w: Tensor, bias: Tensor | None, start: Tensor, before: Tensor, sizes: list[int],
             lengths: list[float], head: int, eps: float, dparts: list[Tensor],
             dafter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w, bias (empty without one) and before, those of w and bias in fp32."""
    (B, T, C), W, has = x.shape, w.shape[1], bias is not None
    dx, dbefore, BC = torch.empty_like(x), torch.empty_like(before), block(sizes, lengths, head)
    S, span, programs, warps = cut(x, BC, BACKWARD["conv"][0])
    dys, ends, wanted = three(dparts, sizes, lengths)
    partial = x.new_empty(B * programs, W + has, C, dtype=torch.float32)
    _backward[(cdiv(C, BC), programs, B)](
        x, w, bias, start.view(torch.uint8), before, *dys, dafter, dx, dbefore, partial, T, C, *ends, *wanted, eps,
        span, W=W, BIAS=has, NORM=any(lengths), S=S, BC=BC, G=STEPS, num_warps=warps)
    return dx, partial[:, :W].sum(0).t().contiguous(), partial[:, W:].sum(0).flatten(), dbefore
