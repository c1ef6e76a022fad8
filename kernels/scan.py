"""Selective scan, token by token, states in registers; ops/scan.py has the maths.

A block is one warp with 512 / N channels, and all N entries of their states. Tiles have four dimensions, of which
triton keeps the first two in each thread's registers and spreads the last two over the warp's lanes:

    (N / 4, channels, 4, 8)

Sums go over entries and over channels: as squares as can be, threads exchange least, and none leaves the warp.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import LOG2E, cdiv, processors, split

CHUNK = 8                              # tokens between saved states
PIECE = tl.constexpr(4)                # tokens whose states the backward pass has in registers: 8 spill
ELEMENTS = 16                          # entries of states a thread
_ELEMENTS, LN2 = tl.constexpr(ELEMENTS), tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(N: tl.constexpr):
    """A block's entries (N / 4, 1, 4, 1) and channels (1, ., 4, 8).

    What a thread has is contiguous, and channels are of all lanes, though four load the same: were there fewer, triton
    would lay tiles out as it loads these, and exchange what is in registers. Loads as small as entries' follow others.
    """
    own: tl.constexpr = N // 4
    d: tl.constexpr = _ELEMENTS // own
    n = tl.arange(0, own)[:, None, None, None] + (tl.arange(0, 4) * own)[None, None, :, None]
    channels = (tl.program_id(0) * 8 + tl.arange(0, 8))[None, None, None, :] * d + tl.arange(0, d)[None, :, None, None]
    return n, tl.broadcast_to(channels, [1, d, 4, 8])


@triton.jit
def _token(v, dt, k, start, row, valid, d, n, D, N: tl.constexpr):
    """What a token writes with and for how long, and whether a document begins; beyond the row it lasts no time."""
    x = tl.load(dt + row * D + d, mask=valid & (d < D), other=0.0).to(tl.float32)
    u = tl.load(v + row * D + d, mask=valid & (d < D), other=0.0).to(tl.float32)
    key = tl.load(k + row * N + n, mask=valid, other=0.0).to(tl.float32)
    return x, u, key, tl.load(start + row, mask=valid, other=0) != 0


@triton.jit
def _fold(h, ends, spans, at, d, tile, rate, D, N: tl.constexpr):
    """What a segment makes of h, of which it has been seen what it makes of nothing. span < 0: a document began."""
    span = tl.load(spans + at * D + d, mask=d < D, other=0.0)
    return (tl.where(span < 0, 0.0, tl.exp2(tl.maximum(span, 0.0) * rate) * h)
            + tl.load(ends + at * D * N + tile, mask=d < D, other=0.0))


@triton.jit
def _over_entries(x):
    return tl.sum(tl.sum(x, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _over_channels(x):
    return tl.sum(tl.sum(x, 1, keep_dims=True), 3, keep_dims=True)


@triton.jit(do_not_specialize=["T", "per"])      # rows of any length run what one of them compiled
def _forward(q, k, v, dt, A, start, h0, ends, spans, y, states, h1, T, D, per,
             N: tl.constexpr, C: tl.constexpr, SAVE: tl.constexpr, ENDS: tl.constexpr):
    """A segment of `per` chunks. ENDS: from nothing, for its last state and its time alone."""
    b, s, segments, chunks = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2), tl.cdiv(T, C)
    n, d = _tile(N)
    tile, live, mine = d * N + n, d < D, b * segments + s
    rate = tl.load(A + tile, mask=live, other=0.0).to(tl.float32) * LOG2E
    h, span = tl.zeros_like(rate), tl.zeros(d.shape, tl.float32)
    if not ENDS:
        h += tl.load(h0 + b * D * N + tile, mask=live, other=0.0)
        for m in range(s):
            h = _fold(h, ends, spans, b * segments + m, d, tile, rate, D, N)
    for c in range(s * per, tl.minimum(s * per + per, chunks)):
        if SAVE:
            tl.store(states + ((b * chunks + c) * N + n) * D + d, h, mask=live)
        for i in tl.static_range(C):
            row, valid = b * T + c * C + i, c * C + i < T
            x, u, key, fresh = _token(v, dt, k, start, row, valid, d, n, D, N)
            h = tl.exp2(x * rate) * tl.where(fresh, 0.0, h) + x * u * key
            if ENDS:
                span = tl.where(fresh | (span < 0), -1.0, span + x)
            else:
                query = tl.load(q + row * N + n, mask=valid, other=0.0).to(tl.float32)
                tl.store(y + row * D + d, _over_entries(h * query).to(y.dtype.element_ty), mask=valid & live)
    if ENDS:
        tl.store(ends + mine * D * N + tile, h, mask=live)
        tl.store(spans + mine * D + d, span, mask=live)
    elif s == segments - 1:
        tl.store(h1 + b * D * N + tile, h, mask=live)


@triton.jit(do_not_specialize=["T", "per"])
def _backward_ends(q, dt, A, start, dy, ends, spans, T, D, per, N: tl.constexpr):
    """A segment of `per` tokens: the gradient of the state before it, were there no tokens after it; and its time."""
    b, s, segments = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    n, d = _tile(N)
    tile, live, mine = d * N + n, d < D, b * segments + s
    rate = tl.load(A + tile, mask=live, other=0.0).to(tl.float32) * LOG2E
    flow, span = tl.zeros_like(rate), tl.zeros(d.shape, tl.float32)
    stop = tl.minimum(s * per + per, T)
    for i in range(stop - s * per):
        row = b * T + stop - 1 - i
        x, dout, query, fresh = _token(dy, dt, q, start, row, True, d, n, D, N)
        flow = tl.where(fresh, 0.0, tl.exp2(x * rate) * (dout * query + flow))
        span = tl.where(fresh | (span < 0), -1.0, span + x)
    tl.store(ends + mine * D * N + tile, flow, mask=live)
    tl.store(spans + mine * D + d, span, mask=live)


@triton.jit(do_not_specialize=["T", "per"])
def _backward(q, k, v, dt, A, start, states, dy, dh1, ends, spans, dq, dk, dv, ddt, dA, dh0, T, D, per,
              N: tl.constexpr, C: tl.constexpr):
    """A segment of `per` tokens from the last to the first, each piece's states formed again from those saved.

    dq and dk are sums over this block's channels, dA over this segment's tokens: added up outside, in one order.
    """
    b, s, segments, chunks = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2), tl.cdiv(T, C)
    n, d = _tile(N)
    tile, live = d * N + n, d < D
    rate = tl.load(A + tile, mask=live, other=0.0).to(tl.float32) * LOG2E
    flow = tl.load(dh1 + b * D * N + tile, mask=live, other=0.0)
    for m in range(segments - 1 - s):
        flow = _fold(flow, ends, spans, b * segments + segments - 1 - m, d, tile, rate, D, N)
    slowed = tl.zeros_like(rate)
    part, wide = tl.program_id(0).to(tl.int64) * tl.num_programs(1) * T, tl.broadcast_to(n, [N // 4, 1, 4, 8])
    pieces = tl.cdiv(tl.minimum(s * per + per, T) - s * per, PIECE)
    for j in range(pieces):
        first = s * per + (pieces - 1 - j) * PIECE
        h = tl.load(states + ((b * chunks + first // C) * N + n) * D + d, mask=live, other=0.0).to(tl.float32)
        for t in range(first // C * C, first):
            x, u, key, fresh = _token(v, dt, k, start, b * T + t, True, d, n, D, N)
            h = tl.exp2(x * rate) * tl.where(fresh, 0.0, h) + x * u * key
        before = ()
        for i in tl.static_range(PIECE):
            x, u, key, fresh = _token(v, dt, k, start, b * T + first + i, first + i < T, d, n, D, N)
            before = before + (tl.where(fresh, 0.0, h),)    # noqa: RUF005  triton knows no starred tuple
            h = tl.exp2(x * rate) * before[i] + x * u * key
        for i in tl.static_range(PIECE):
            t = first + PIECE - 1 - i
            row, valid = b * T + t, t < T
            x, u, key, fresh = _token(v, dt, k, start, row, valid, d, n, D, N)
            query = tl.load(q + row * N + n, mask=valid, other=0.0).to(tl.float32)
            dout = tl.load(dy + row * D + d, mask=valid & live, other=0.0).to(tl.float32)
            decay = tl.exp2(x * rate)
            kept = decay * before[PIECE - 1 - i]
            dh = dout * query + flow
            tl.store(dq + (part + row) * N + wide, _over_channels(dout * (kept + x * u * key)), mask=valid)
            tl.store(dk + (part + row) * N + wide, _over_channels(dh * (x * u)), mask=valid)
            written, slower = _over_entries(dh * key), _over_entries(dh * kept * rate) * LN2
            tl.store(dv + row * D + d, (x * written).to(dv.dtype.element_ty), mask=valid & live)
            tl.store(ddt + row * D + d, u * written + slower, mask=valid & live)
            slowed += dh * kept * x
            flow = tl.where(fresh, 0.0, decay * dh)
    tl.store(dA + (b * segments + s) * D * N + tile, slowed, mask=live)
    if s == 0:
        tl.store(dh0 + b * D * N + tile, flow, mask=live)


def cut(v: Tensor, N: int, segments: int) -> tuple[int, int, int]:
    """Blocks of channels, chunks of a segment, segments; these as asked, or until two warps a scheduler are busy."""
    B, T, D = v.shape
    blocks = cdiv(D * N, 32 * ELEMENTS)
    chunks = cdiv(T, CHUNK)
    return blocks, *split(chunks, segments or min(chunks // 32, 8 * processors(v) // (B * blocks)))


def forward(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, h: Tensor, save: bool,
            segments: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """y, the state after the last token and, if they are to be saved, those before each chunk (B, T / 8, N, D)."""
    (B, T, D), N = v.shape, A.shape[1]
    blocks, per, segments = cut(v, N, segments)
    y, h1 = torch.empty_like(v), torch.empty_like(h)
    states = v.new_empty(B, cdiv(T, CHUNK), N, D) if save else v.new_empty(0)
    ends, spans = h.new_empty(B, segments, D, N), h.new_empty(B, segments, D)
    for alone in ((True, False) if segments > 1 else (False,)):
        _forward[blocks, B, segments](q, k, v, dt, A, start.view(torch.uint8), h, ends, spans, y, states, h1, T, D, per,
                                      N, CHUNK, save and not alone, alone, num_warps=1)
    return y, h1, states


def backward(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, states: Tensor, dy: Tensor,
             dh: Tensor, segments: int = 0) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, dt, A and the state before the first token."""
    (B, T, D), N = v.shape, A.shape[1]
    blocks, per, segments = cut(v, N, segments)
    ends, spans, fresh = dh.new_empty(B, segments, D, N), dh.new_empty(B, segments, D), start.view(torch.uint8)
    if segments > 1:
        _backward_ends[blocks, B, segments](q, dt, A, fresh, dy, ends, spans, T, D, per * CHUNK, N, num_warps=1)
    dq, dk = torch.empty(2, blocks, B, T, N, device=v.device)
    dv, ddt, dA, dh0 = torch.empty_like(v), torch.empty_like(dt), dh.new_empty(B * segments, D, N), torch.empty_like(dh)
    _backward[blocks, B, segments](q, k, v, dt, A, fresh, states, dy, dh, ends, spans, dq, dk, dv, ddt, dA, dh0, T, D,
                                   per * CHUNK, N, CHUNK, num_warps=1)
    return dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype), dv, ddt, dA.sum(0), dh0
