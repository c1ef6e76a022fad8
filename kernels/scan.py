"""Selective scan, token by token, states in registers; ops/scan.py has the maths.

A block is one warp with 8 R channels, and all N entries of their states. Tiles have four dimensions, of which
triton keeps the first two in each thread's registers and spreads the last two over the warp's lanes:

    (N / 4, R, 4, 8)

Sums go over entries and over channels: as squares as can be, threads exchange least, and none leaves the warp. Where
a document begins states are emptied: chunks in which none does, nearly all, run without masks.

Few warps fit a processor, and a store holds back the loads that are written after it: what several tokens need is
loaded before the first of them is computed, or each would wait for memory by itself. D is a constant, so that rows
lie at fixed distances and addresses are formed once. Backward, the next chunk's are in the L2 cache when it begins.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.lanes import over_channels, over_entries, over_tokens
from stepladder.kernels.tiles import LOG2E, cdiv, fetch, processors, split

CHANNELS, GROUP = 4, 4    # forward: channels of a lane (R), tokens loaded together
ENDS = 2                  # backward, where segments' ends alone are asked for: half the registers, twice the warps
SAVED = 8                 # tokens between saved states, which are also those that the backward pass has in registers
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(D: tl.constexpr, N: tl.constexpr, R: tl.constexpr):
    """A block's entries (N / 4, 1, 4, 1), channels (1, R, 4, 8) and which of these there are.

    What a thread has is contiguous, and channels are of all lanes, though four load the same: were there fewer, triton
    would lay tiles out as it loads these, and exchange what is in registers. Loads as small as entries' follow others.
    """
    n = tl.arange(0, N // 4)[:, None, None, None] + (tl.arange(0, 4) * (N // 4))[None, None, :, None]
    channels = (tl.program_id(0) * 8 + tl.arange(0, 8))[None, None, None, :] * R + tl.arange(0, R)[None, :, None, None]
    d = tl.broadcast_to(channels, [1, R, 4, 8])
    return n, d, (d < D) if D % (8 * R) else tl.full([1, R, 4, 8], 1, tl.int1)


@triton.jit
def _mine(D: tl.constexpr, R: tl.constexpr):
    """A lane's number, the channel whose sums it is left with, and whether there is one."""
    lane = tl.arange(0, 32)
    mine = (tl.program_id(0) * 8 + lane // 4) * R + lane % R
    return lane, mine, (mine < D) if D % (8 * R) else tl.full([32], 1, tl.int1)


@triton.jit
def _wide(n, N: tl.constexpr):
    """Entries for loads and stores of 16 bytes a thread, if that is all it has of them."""
    return tl.broadcast_to(n, [N // 4, 1, 4, 8]) if N <= 16 else n


@triton.jit
def _token(v, dt, k, row, valid, live, D: tl.constexpr, N: tl.constexpr):
    """For how long a token lasts, what it writes and with; beyond the row it lasts no time."""
    x = tl.load(dt + row * D, mask=valid & live, other=0.0).to(tl.float32)
    return x, tl.load(v + row * D, mask=valid & live, other=0.0), tl.load(k + row * N, mask=valid, other=0.0)


@triton.jit
def _fold(h, ends, spans, at, d, tile, rate, live, D: tl.constexpr, N: tl.constexpr):
    """What a segment makes of h, of which it has been seen what it makes of nothing. span < 0: a document began.

    A walk sets span to -inf there: what later tokens add leaves it that.
    """
    span = tl.load(spans + at * D + d, mask=live, other=0.0)
    return (tl.where(span < 0, 0.0, tl.exp2(tl.maximum(span, 0.0) * rate) * h)
            + tl.load(ends + at * D * N + tile, mask=live, other=0.0))


@triton.jit
def _borders(start, c, T, C: tl.constexpr):
    """Where documents begin in chunk c; tokens beyond the row stand for documents.

    As many as lanes: their maximum is one instruction, of which ptxas knows that all lanes have the same of it. Where
    it does not, it makes a second copy of what follows, for lanes that part.
    """
    i = tl.arange(0, 32)
    t = c * C + i
    return tl.where(i < C, tl.load(start + t, mask=(t >= 0) & (t < T) & (i < C), other=1).to(tl.int32), 0)


@triton.jit
def _walk(h, span, rate, q, k, v, dt, start, y, live, alive, lane, left, D: tl.constexpr, N: tl.constexpr,
          C: tl.constexpr, G: tl.constexpr, ENDS: tl.constexpr, PLAIN: tl.constexpr):
    """C tokens, of which there are `left` more in the row. PLAIN: no document begins, and there are C."""
    for g in tl.static_range(0, C, G):
        seen = ()
        for i in tl.static_range(g, g + G):
            valid = True if PLAIN else i < left
            x, u, key = _token(v, dt, k, i, valid, live, D, N)
            query = key
            if not ENDS:
                query = tl.load(q + i * N, mask=valid, other=0.0)
            fresh = False
            if not PLAIN:
                fresh = tl.load(start + i, mask=valid, other=0) != 0
            seen += ((x, u, key, query, fresh),)
        for i in tl.static_range(G):
            x, u, key, query, fresh = seen[i]       # pyright: ignore
            u, key = u.to(tl.float32), key.to(tl.float32)  # pyright: ignore
            if not PLAIN:
                h = tl.where(fresh, 0.0, h)
            h = tl.exp2(x * rate) * h + x * u * key
            if ENDS:
                span += x
                if not PLAIN:
                    span = tl.where(fresh, float("-inf"), span)
            else:
                out = over_entries(h * query.to(tl.float32), lane).to(y.dtype.element_ty)
                if PLAIN:
                    tl.store(y + (g + i) * D, out, mask=alive)
                else:
                    tl.store(y + (g + i) * D, out, mask=(g + i < left) & alive)
    return h, span


@triton.jit(do_not_specialize=["T", "per", "segments"])      # rows of any length run what one of them compiled
def _forward(q, k, v, dt, A, start, h0, ends, spans, y, states, h1, T, per, segments, D: tl.constexpr, N: tl.constexpr,
             C: tl.constexpr, R: tl.constexpr, G: tl.constexpr, SAVE: tl.constexpr, ENDS: tl.constexpr):
    """A segment of `per` chunks. ENDS: from nothing, for its last state and its time alone."""
    b, s, chunks = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.cdiv(T, C)
    n, d, live = _tile(D, N, R)
    tile, wide, part = d * N + n, _wide(n, N), b * segments + s
    lane, mine, alive = _mine(D, R)
    rate = tl.load(A + tile, mask=live, other=0.0).to(tl.float32) * LOG2E
    h, span = tl.zeros_like(rate), tl.zeros(d.shape, tl.float32)
    if not ENDS:
        h += tl.load(h0 + b * D * N + tile, mask=live, other=0.0)
        for m in range(s):
            h = _fold(h, ends, spans, b * segments + m, d, tile, rate, live, D, N)
    start += b * T
    borders = _borders(start, s * per, T, C)
    for c in range(s * per, tl.minimum(s * per + per, chunks)):
        if SAVE:
            tl.store(states + ((b * chunks + c) * N + n) * D + d, h, mask=live)
        plain, t = tl.max(borders) == 0, tl.cast(c, tl.int64) * C
        borders, at = _borders(start, c + 1, T, C), b * T + t
        if plain:
            h, span = _walk(h, span, rate, q + at * N + wide, k + at * N + wide, v + at * D + d, dt + at * D + d,
                            start + t, y + at * D + mine, live, alive, lane, T - t, D, N, C, G, ENDS, True)
        else:
            h, span = _walk(h, span, rate, q + at * N + wide, k + at * N + wide, v + at * D + d, dt + at * D + d,
                            start + t, y + at * D + mine, live, alive, lane, T - t, D, N, C, G, ENDS, False)
    if ENDS:
        tl.store(ends + part * D * N + tile, h, mask=live)
        tl.store(spans + part * D + d, span, mask=live)
    elif s == segments - 1:
        tl.store(h1 + b * D * N + tile, h, mask=live)


@triton.jit
def _walk_back(flow, span, rate, q, dt, start, dy, live, left, D: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
               G: tl.constexpr, PLAIN: tl.constexpr):
    """C tokens from the last on, of which there are `left` in the row. PLAIN: no document begins, and there are C."""
    for g in tl.static_range(C - G, -1, -G):
        seen = ()
        for i in tl.static_range(g, g + G):
            valid, fresh = True if PLAIN else i < left, False
            x, dout, query = _token(dy, dt, q, i, valid, live, D, N)
            if not PLAIN:
                fresh = tl.load(start + i, mask=valid, other=0) != 0
            seen += ((x, dout, query, fresh),)
        for i in tl.static_range(G - 1, -1, -1):
            x, dout, query, fresh = seen[i]             # pyright: ignore
            flow = tl.exp2(x * rate) * (dout.to(tl.float32) * query.to(tl.float32) + flow)   # pyright: ignore
            span += x
            if not PLAIN:
                flow, span = tl.where(fresh, 0.0, flow), tl.where(fresh, float("-inf"), span)
    return flow, span


@triton.jit(do_not_specialize=["T", "per"])
def _backward_ends(q, dt, A, start, dy, ends, spans, T, per, D: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
                   R: tl.constexpr, G: tl.constexpr):
    """A segment of `per` chunks, but for the first, of which nobody asks.

    The gradient of the state before it, were there no tokens after it; and its time.
    """
    b, s, segments = tl.program_id(1).to(tl.int64), tl.program_id(2) + 1, tl.num_programs(2) + 1
    n, d, live = _tile(D, N, R)
    tile, part, first = d * N + n, b * segments + s, s * per
    rate = tl.load(A + tile, mask=live, other=0.0).to(tl.float32) * LOG2E
    flow, span = tl.zeros_like(rate), tl.zeros(d.shape, tl.float32)
    q, dt, dy, start = q + b * T * N + _wide(n, N), dt + b * T * D + d, dy + b * T * D + d, start + b * T
    many = tl.minimum(first + per, tl.cdiv(T, C)) - first
    borders = _borders(start, first + many - 1, T, C)
    for j in range(many):
        c = tl.cast(first + many - 1 - j, tl.int64)
        t, plain = c * C, tl.max(borders) == 0
        borders = _borders(start, c - 1, T, C)
        if plain:
            flow, span = _walk_back(flow, span, rate, q + t * N, dt + t * D, start + t, dy + t * D, live, T - t, D, N,
                                    C, G, True)
        else:
            flow, span = _walk_back(flow, span, rate, q + t * N, dt + t * D, start + t, dy + t * D, live, T - t, D, N,
                                    C, G, False)
    tl.store(ends + part * D * N + tile, flow, mask=live)
    tl.store(spans + part * D + d, span, mask=live)


@triton.jit
def _again(q, k, v, dt, dy, i, live, D: tl.constexpr, N: tl.constexpr):
    """All that the way back needs of token i."""
    x, u, key = _token(v, dt, k, i, True, live, D, N)
    return x, u, key, tl.load(q + i * N), tl.load(dy + i * D, mask=live, other=0.0)


@triton.jit
def _gradients(token, h, flow, slowed, rate, dt, v, dv, ddt, lane, alive):
    """Of one token, all but dq. h: the state before it. Returns flow and slowed before the token, and parts of dk."""
    x, u, key, query, dout = token
    u = u.to(tl.float32)
    dh = dout.to(tl.float32) * query.to(tl.float32) + flow
    dk = over_channels(dh * (x * u), lane)
    flow = tl.exp2(x * rate) * dh
    lost = flow * h
    written, slower = over_entries(dh * key.to(tl.float32), lane), over_entries(lost * rate, lane) * LN2
    step, value = tl.load(dt, mask=alive, other=0.0).to(tl.float32), tl.load(v, mask=alive, other=0.0).to(tl.float32)
    tl.store(dv, (step * written).to(dv.dtype.element_ty), mask=alive)
    tl.store(ddt, value * written + slower, mask=alive)
    return flow, slowed + lost * x, dk


@triton.jit
def _saved(state, live, D: tl.constexpr, N: tl.constexpr):
    """A saved state, of which `state` is each lane's first entry.

    Loaded as channels are: as a whole, triton would lay it out otherwise, and form all that follows in both ways.
    """
    e = tl.arange(0, N // 4)[:, None, None, None]
    h = tl.zeros([N // 4, state.shape[1], 4, 8], tl.float32)
    for i in tl.static_range(N // 4):
        h = tl.where(e == i, tl.load(state + i * D, mask=live, other=0.0).to(tl.float32), h)
    return h


@triton.jit
def _fetch(states, q, k, v, dt, dy, c, at, there, D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    """Have the L2 cache load what chunk c of all rows' reads, whose first token is `at`: a lane asks for 32 bytes."""
    lane, first, e = tl.arange(0, 32), tl.program_id(0) * 8 * R, tl.arange(0, 2 * N if N > 16 else 32)
    channels = (at + lane // (32 // C)) * D + tl.minimum(first + lane % 4 * 2 * R, D - 1)
    tokens = at * N + lane * (C * N // 32)
    fetch(dt + channels, there)
    fetch(v + channels, there)
    fetch(dy + channels, there)
    fetch(q + tokens, there)
    fetch(k + tokens, there)
    fetch(states + (c * N + e // 2 % N) * D + tl.minimum(first + e % 2 * 4 * R, D - 1), there)


@triton.jit
def _chunk(state, flow, slowed, rate, q, k, v, dt, dy, dq, dk, dv, ddt, n, d, mine, live, alive, D: tl.constexpr,
           N: tl.constexpr, C: tl.constexpr):
    """C tokens of one document: forward for their states and dq, then back. What is read again is in the cache.

    dq and dk are stored for as many tokens together as there are lanes for.
    """
    E: tl.constexpr = N // 4
    P: tl.constexpr = 32 // N if 32 // N < C else C
    wide, seen, kept, lane = _wide(n, N), (), (), tl.arange(0, 32)
    some = lane // 4 // E % P * N + lane % 4 * E + lane // 4 % E
    dq, dk, value, step, dv, ddt = dq + some, dk + some, v + mine, dt + mine, dv + mine, ddt + mine
    q, k, v, dt, dy = q + wide, k + wide, v + d, dt + d, dy + d
    for i in tl.static_range(C):
        x, u, key = _token(v, dt, k, i, True, live, D, N)
        seen += ((x, u, key, tl.load(dy + i * D, mask=live, other=0.0)),)
    h, parts = _saved(state, live, D, N), ()
    for i in tl.static_range(C):
        x, u, key, dout = seen[i]
        kept += (h,)
        h = tl.exp2(x * rate) * h + x * u.to(tl.float32) * key.to(tl.float32)
        parts += over_channels(dout.to(tl.float32) * h, lane)
        if i % P == P - 1:
            tl.store(dq + (i - P + 1) * N, over_tokens(parts, lane, E))
            parts = ()
    ahead = _again(q, k, v, dt, dy, C - 1, live, D, N)
    for i in tl.static_range(C - 1, -1, -1):
        now, h = ahead, kept[i]
        if i > 0:                       # a token ahead, for stores hold back what is read after them
            ahead = _again(q, k, v, dt, dy, i - 1, live, D, N)
        else:                           # rather than kept: registers are full
            h = _saved(state, live, D, N)
        flow, slowed, part = _gradients(now, h, flow, slowed, rate, step + i * D, value + i * D, dv + i * D,
                                        ddt + i * D, lane, alive)
        parts = part + parts
        if i % P == 0:
            tl.store(dk + i * N, over_tokens(parts, lane, E))
            parts = ()
    return flow, slowed


@triton.jit
def _tokens(state, flow, slowed, rate, q, k, v, dt, start, dy, dq, dk, dv, ddt, n, d, mine, live, alive, count,
            D: tl.constexpr, N: tl.constexpr):
    """`count` tokens in which documents begin, each one's state formed from the first on: slow, and small."""
    E: tl.constexpr = N // 4
    wide, lane = _wide(n, N), tl.arange(0, 32)
    some = lane % 4 * E + lane // 4 % E
    for m in range(count):
        i, h = count - 1 - m, _saved(state, live, D, N)
        for j in range(i):
            x, u, key = _token(v + d, dt + d, k + wide, j, True, live, D, N)
            h = tl.where(tl.load(start + j) != 0, 0.0, h)
            h = tl.exp2(x * rate) * h + x * u.to(tl.float32) * key.to(tl.float32)
        token, fresh = _again(q + wide, k + wide, v + d, dt + d, dy + d, i, live, D, N), tl.load(start + i) != 0
        x, u, key, _, dout = token
        h = tl.where(fresh, 0.0, h)
        after = tl.exp2(x * rate) * h + x * u.to(tl.float32) * key.to(tl.float32)
        tl.store(dq + i * N + some, over_tokens(over_channels(dout.to(tl.float32) * after, lane), lane, E))
        at = i * D + mine
        flow, slowed, part = _gradients(token, h, flow, slowed, rate, dt + at, v + at, dv + at, ddt + at, lane, alive)
        tl.store(dk + i * N + some, over_tokens(part, lane, E))
        flow = tl.where(fresh, 0.0, flow)
    return flow, slowed


@triton.jit(do_not_specialize=["T", "per"])
def _backward(q, k, v, dt, A, start, states, dy, dh1, ends, spans, dq, dk, dv, ddt, dA, dh0, T, per,
              D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    """A segment of `per` chunks from the last to the first, each one's states formed again from those saved.

    dq and dk are sums over this block's channels, dA over this segment's tokens: added up outside, in one order.
    """
    b, s, segments, chunks = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2), tl.cdiv(T, C)
    n, d, live = _tile(D, N, R)
    tile, part = d * N + n, (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + b) * T
    rate = tl.load(A + tile, mask=live, other=0.0).to(tl.float32) * LOG2E
    flow = tl.load(dh1 + b * D * N + tile, mask=live, other=0.0)
    for m in range(segments - 1 - s):
        flow = _fold(flow, ends, spans, b * segments + segments - 1 - m, d, tile, rate, live, D, N)
    slowed, start, first = tl.zeros_like(rate), start + b * T, s * per
    _, mine, alive = _mine(D, R)
    entry = (tl.arange(0, 4) * (N // 4))[None, None, :, None]
    many = tl.minimum(first + per, chunks) - first
    borders = _borders(start, first + many - 1, T, C)
    for j in range(many):
        c = tl.cast(first + many - 1 - j, tl.int64)
        t, at, state = c * C, b * T + c * C, states + ((b * chunks + c) * N + entry) * D + d
        plain = tl.max(borders) == 0
        borders = _borders(start, c - 1, T, C)
        _fetch(states, q, k, v, dt, dy, b * chunks + c - 1, at - C, j + 1 < many, D, N, C, R)
        if plain:
            flow, slowed = _chunk(state, flow, slowed, rate, q + at * N, k + at * N, v + at * D, dt + at * D,
                                  dy + at * D, dq + (part + t) * N, dk + (part + t) * N, dv + at * D,
                                  ddt + at * D, n, d, mine, live, alive, D, N, C)
        else:
            flow, slowed = _tokens(state, flow, slowed, rate, q + at * N, k + at * N, v + at * D, dt + at * D,
                                   start + t, dy + at * D, dq + (part + t) * N, dk + (part + t) * N,
                                   dv + at * D, ddt + at * D, n, d, mine, live, alive, tl.minimum(C, T - t), D, N)
    tl.store(dA + (b * segments + s) * D * N + tile, slowed, mask=live)
    if s == 0:
        tl.store(dh0 + b * D * N + tile, flow, mask=live)


def cut(v: Tensor, R: int, warps: int, segments: int) -> tuple[int, int, int]:
    """Blocks of channels, chunks of a segment, segments; these as asked, or until processors have `warps` each."""
    B, T, D = v.shape
    blocks, chunks = cdiv(D, 8 * R), cdiv(T, SAVED)
    return blocks, *split(chunks, segments or min(chunks // 32, warps * processors(v) // (B * blocks)))


def forward(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, h: Tensor, save: bool,
            segments: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """y, the state after the last token and, if they are to be saved, those before each chunk (B, T / C, N, D)."""
    (B, T, D), N, C = v.shape, A.shape[1], SAVED
    R = min(CHANNELS, 64 // N)      # 16 entries of states a thread; backward, those of 8 tokens fill its registers
    blocks, per, segments = cut(v, R, 16, segments)
    y, h1 = torch.empty_like(v), torch.empty_like(h)
    states = v.new_empty(B, cdiv(T, C), N, D) if save else v.new_empty(0)
    ends, spans = h.new_empty(B, segments, D, N), h.new_empty(B, segments, D)
    # 128 registers: 16 warps a processor. The GPU tests of this kernel ran without that limit.
    for alone in ((True, False) if segments > 1 else (False,)):
        _forward[blocks, B, segments - alone](q, k, v, dt, A, start.view(torch.uint8), h, ends, spans, y, states, h1, T,
                                              per, segments, D, N, C, R, min(GROUP, C), save and not alone, alone,
                                              num_warps=1, maxnreg=128)
    return y, h1, states


def backward(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, states: Tensor, dy: Tensor,
             dh: Tensor, segments: int = 0) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, dt, A and the state before the first token."""
    (B, T, D), N, C = v.shape, A.shape[1], SAVED
    R, S = (4, ENDS) if N <= 16 else (1, 1)
    blocks, per, segments = cut(v, R, 8, segments)
    ends, spans, fresh = dh.new_empty(B, segments, D, N), dh.new_empty(B, segments, D), start.view(torch.uint8)
    if segments > 1:
        _backward_ends[cdiv(D, 8 * S), B, segments - 1](q, dt, A, fresh, dy, ends, spans, T, per, D, N, C, S, GROUP,
                                                        num_warps=1)
    dq, dk = torch.empty(2, blocks, B, T, N, device=v.device)
    dv, ddt, dA, dh0 = torch.empty_like(v), torch.empty_like(dt), dh.new_empty(B * segments, D, N), torch.empty_like(dh)
    _backward[blocks, B, segments](q, k, v, dt, A, fresh, states, dy, dh, ends, spans, dq, dk, dv, ddt, dA, dh0, T, per,
                                   D, N, C, R, num_warps=1)
    return dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype), dv, ddt, dA.sum(0), dh0
