"""Linear recurrence with one decay per head, in chunks: forward in one pass, backward in two. Maths in ops/ssd.py.

What a chunk's keys and queries say of one another is the same for all heads of a group; only decays are a head's own.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import LOG2E, cdiv, dot, processors, split

CHUNK = 64


class Tiles(NamedTuple):
    """How a launch is cut; chosen by shape and type alone."""
    V: int             # value channels a block
    warps: int
    stages: int


# The first of each runs; tests/bench/kernels.py measures all. For sm_90 at K = 128 they spill up to 43 instructions,
# because what does not change in a loop is formed there again (disable_licm): kept in registers, it spilled up to 700.
HALF: dict[str, tuple[Tiles, ...]] = {
    "forward": (Tiles(64, 4, 2), Tiles(32, 4, 2), Tiles(64, 4, 3)),
    "two": (Tiles(64, 8, 2), Tiles(64, 8, 3)),
    "reverse": (Tiles(64, 4, 3), Tiles(64, 4, 2), Tiles(32, 4, 3)),
    "gradients": (Tiles(64, 8, 2), Tiles(64, 8, 3), Tiles(32, 8, 2))}
SINGLE = Tiles(32, 8, 1)               # right, not fast: products of fp32 take three passes


@triton.jit
def _sums(g, valid, C: tl.constexpr, H: tl.constexpr):
    """Running sums of a chunk's gates for exp2, and their totals: multiples of 1/256, and what is left of each gate.

    The former add up exactly, so that differences of sums do not lose what small gates say after large ones.
    """
    x = tl.load(g + tl.arange(0, C) * H, mask=valid, other=0.0).to(tl.float32) * LOG2E
    x = tl.where(x < -256.0, -256.0, x)        # 2^-256 is 0: keeps sums exact, and -inf out of differences. NaN stays
    whole = tl.floor(x * 256.0) * 0.00390625
    rest = x - whole
    return tl.cumsum(whole, 0), tl.cumsum(rest, 0), tl.sum(whole, 0), tl.sum(rest, 0)


@triton.jit
def _decay(mask, whole, rest):
    """2^(whole + rest), 0 where masked: before the power, which may overflow there."""
    return tl.exp2(tl.where(mask, whole + rest, float("-inf")))


@triton.jit
def _chunk(doc, b, c, T, C: tl.constexpr):
    """First token of chunk c, which of its tokens there are, their documents, the one before the chunk and its last.

    The first token is a 64-bit number, what is added to it inside a chunk one of 32: pointers would fill registers.
    """
    first, r = b.to(tl.int64) * T + c * C, tl.arange(0, C)
    valid = r < T - c * C
    here = tl.load(doc + first + r, mask=valid, other=-1)          # beyond the row: of no document
    before = tl.load(doc + first - 1, mask=c > 0, other=0)
    last = tl.load(doc + first + tl.minimum(C, T - c * C) - 1)
    return first, valid, here, before, last


@triton.jit
def _tile(rows: tl.constexpr, columns: tl.constexpr, stride: tl.constexpr):
    """Offsets in a matrix."""
    return tl.arange(0, rows)[:, None] * stride + tl.arange(0, columns)[None, :]


@triton.jit
def _walk(S, A, bq, bk, v, g, y, states, valid, here, before, last, H: tl.constexpr, V: tl.constexpr,
          SAVE: tl.constexpr, ENDS: tl.constexpr):
    """One head over one chunk: the state after it, and how much of that before it is kept."""
    C: tl.constexpr = bk.shape[0]
    K: tl.constexpr = bk.shape[1]
    BV: tl.constexpr = S.shape[1]
    r, at = tl.arange(0, C), _tile(C, BV, H * V)
    bv = tl.load(v + at, mask=valid[:, None], other=0.0)
    whole, rest, all_whole, all_rest = _sums(g, valid, C, H)
    if not ENDS:
        Sb = S.to(bk.dtype)
        if SAVE:
            tl.store(states + _tile(K, BV, V), Sb)
        within = (here[:, None] == here[None, :]) & (r[:, None] >= r[None, :])
        P = A * _decay(within, whole[:, None] - whole[None, :], rest[:, None] - rest[None, :])
        out = dot(bq, Sb) * _decay(here == before, whole, rest)[:, None]
        tl.store(y + at, dot(P.to(bk.dtype), bv, out).to(bv.dtype), mask=valid[:, None])
    until = _decay(here == last, all_whole - whole, all_rest - rest)
    keep = _decay(last == before, all_whole, all_rest)
    return dot(tl.trans(bk), (bv * until[:, None]).to(bk.dtype), S * keep), keep


@triton.jit(do_not_specialize=["T", "per"])      # rows of any length run what one of them compiled
def _forward(q, k, v, g, doc, S0, ends, decays, y, states, S1, T, per, G: tl.constexpr, H: tl.constexpr,
             K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, TWO: tl.constexpr,
             SAVE: tl.constexpr, ENDS: tl.constexpr, STAGES: tl.constexpr):
    """A segment of `per` chunks of one head, or of two. ENDS: from nothing, for its last state and decay alone."""
    b, s, tiles = tl.program_id(1), tl.program_id(2), V // BV
    head, left = tl.program_id(0) // tiles * (2 if TWO else 1), tl.program_id(0) % tiles * BV
    group, chunks, tile = head // (H // G), tl.cdiv(T, C), _tile(K, BV, V)
    mine = (b * H + head).to(tl.int64) * K * V + left
    S, S2 = tl.zeros([K, BV], tl.float32), tl.zeros([K, BV], tl.float32)
    total, total2 = 1.0, 1.0
    if not ENDS:
        S += tl.load(S0 + mine + tile)
        if TWO:
            S2 += tl.load(S0 + mine + K * V + tile)
        for m in range(s):                     # what the segments before this one make of it
            n = (b * tl.num_programs(2) + m).to(tl.int64) * H + head
            S = S * tl.load(decays + n) + tl.load(ends + n * K * V + left + tile)
            if TWO:
                S2 = S2 * tl.load(decays + n + 1) + tl.load(ends + (n + 1) * K * V + left + tile)
    for c in tl.range(s * per, tl.minimum(s * per + per, chunks), num_stages=STAGES, disable_licm=True):
        first, valid, here, before, last = _chunk(doc, b, c, T, C)
        at = (first * G + group) * K
        bq = tl.load(q + at + _tile(C, K, G * K), mask=valid[:, None], other=0.0)
        bk = tl.load(k + at + _tile(C, K, G * K), mask=valid[:, None], other=0.0)
        A = dot(bq, tl.trans(bk))              # once for both heads
        n, at = first * H + head, ((b.to(tl.int64) * chunks + c) * H + head) * K * V + left
        S, keep = _walk(S, A, bq, bk, v + n * V + left, g + n, y + n * V + left, states + at, valid, here, before, last,
                        H, V, SAVE, ENDS)
        total *= keep
        if TWO:
            n, at = n + 1, at + K * V
            S2, keep = _walk(S2, A, bq, bk, v + n * V + left, g + n, y + n * V + left, states + at, valid, here, before,
                             last, H, V, SAVE, ENDS)
            total2 *= keep
    if ENDS:
        n = (b * tl.num_programs(2) + s).to(tl.int64) * H + head
        tl.store(ends + n * K * V + left + tile, S)
        tl.store(decays + n, total)
        if TWO:
            tl.store(ends + (n + 1) * K * V + left + tile, S2)
            tl.store(decays + n + 1, total2)
    elif s == tl.num_programs(2) - 1:
        tl.store(S1 + mine + tile, S)
        if TWO:
            tl.store(S1 + mine + K * V + tile, S2)


@triton.jit(do_not_specialize=["T", "per"])
def _reverse(q, g, doc, dy, dS1, ends, decays, dstates, dS0, T, per, G: tl.constexpr, H: tl.constexpr,
             K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, ENDS: tl.constexpr,
             STAGES: tl.constexpr):
    """Gradients of the states after each chunk, from the last to the first; segments as in _forward, mirrored."""
    b, s, tiles = tl.program_id(1), tl.program_id(2), V // BV
    head, left, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BV, _tile(K, BV, V)
    group, chunks, segments = head // (H // G), tl.cdiv(T, C), tl.num_programs(2)
    mine = (b * H + head).to(tl.int64) * K * V + left
    dS, total = tl.zeros([K, BV], tl.float32), 1.0
    if not ENDS:
        dS += tl.load(dS1 + mine + tile)
        for i in range(segments - 1 - s):
            n = (b * segments + segments - 1 - i).to(tl.int64) * H + head
            dS = dS * tl.load(decays + n) + tl.load(ends + n * K * V + left + tile)
    stop = tl.minimum(s * per + per, chunks)
    for i in tl.range(0, stop - s * per, num_stages=STAGES, disable_licm=True):
        c = stop - 1 - i
        first, valid, here, before, last = _chunk(doc, b, c, T, C)
        n = first * H + head
        bq = tl.load(q + (first * G + group) * K + _tile(C, K, G * K), mask=valid[:, None], other=0.0)
        bd = tl.load(dy + n * V + left + _tile(C, BV, H * V), mask=valid[:, None], other=0.0)
        whole, rest, all_whole, all_rest = _sums(g + n, valid, C, H)
        if not ENDS:
            m = ((b.to(tl.int64) * chunks + c) * H + head) * K * V + left
            tl.store(dstates + m + tile, dS.to(bq.dtype))
        keep = _decay(last == before, all_whole, all_rest)
        since = _decay(here == before, whole, rest)
        dS = dot(tl.trans(bq), (bd * since[:, None]).to(bq.dtype), dS * keep)
        total *= keep
    if ENDS:
        n = (b * segments + s).to(tl.int64) * H + head
        tl.store(ends + n * K * V + left + tile, dS)
        tl.store(decays + n, total)
    elif s == 0:
        tl.store(dS0 + mine + tile, dS)


@triton.jit
def _side(q, k, v, g, doc, dy, states, dstates, dz, dv, dg, c, b, group, part, parts, T, G: tl.constexpr,
          H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
          QUERIES: tl.constexpr):
    """dq and what gates owe to reading, or dk, dv and what they owe to writing: each is the other's mirror image.

    A chunk's heads of a group, or a part of them, one after the other. X = decay * (dy v^T) is summed over them and
    over value tiles before it meets the keys. Each side forms products of its own way round: one that is turned over
    in registers must not go into the next. A gate scales every product that passes it: of the state that comes in with
    queries, of pairs (a token with itself passes none), of keys with the state that leaves, of the two states.
    """
    r, tiles, heads = tl.arange(0, C), V // BV, H // G // parts
    first, valid, here, before, last = _chunk(doc, b, c, T, C)
    at, tile = (first * G + group) * K, _tile(C, K, G * K)
    own = tl.load((q if QUERIES else k) + at + tile, mask=valid[:, None], other=0.0)
    A = dot(own, tl.trans(tl.load((k if QUERIES else q) + at + tile, mask=valid[:, None], other=0.0)))
    mask = (here[:, None] == here[None, :]) & ((r[:, None] >= r[None, :]) if QUERIES else (r[:, None] <= r[None, :]))
    X, dZ = tl.zeros([C, C], tl.float32), tl.zeros([C, K], tl.float32)
    pairs, edges, kept = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), 0.0
    for i in tl.range(0, heads * tiles, num_stages=STAGES, disable_licm=True):
        head, left, done = (group * parts + part) * heads + i // tiles, i % tiles * BV, i % tiles == tiles - 1
        n, vat = first * H + head, _tile(C, BV, H * V)
        m = ((b.to(tl.int64) * tl.cdiv(T, C) + c) * H + head) * K * V + left
        ours = tl.load((dy if QUERIES else v) + n * V + left + vat, mask=valid[:, None], other=0.0)
        theirs = tl.load((v if QUERIES else dy) + n * V + left + vat, mask=valid[:, None], other=0.0)
        S = tl.load((states if QUERIES else dstates) + m + _tile(K, BV, V))
        whole, rest, all_whole, all_rest = _sums(g + n, valid, C, H)
        if QUERIES:
            edge = _decay(here == before, whole, rest)
            D = _decay(mask, whole[:, None] - whole[None, :], rest[:, None] - rest[None, :])
        else:
            edge = _decay(here == last, all_whole - whole, all_rest - rest)
            D = _decay(mask, whole[None, :] - whole[:, None], rest[None, :] - rest[:, None])
        dP = dot(ours, tl.trans(theirs)) * D
        X += dP
        near = dot(own, S) * edge[:, None]
        pairs += tl.sum(tl.where(r[:, None] == r[None, :], 0.0, dP * A), 1)
        edges += tl.sum(ours * near, 1)
        if QUERIES:
            product = S.to(tl.float32) * tl.load(dstates + m + _tile(K, BV, V)).to(tl.float32)
            kept += tl.sum(tl.sum(product, 1), 0) * _decay(last == before, all_whole, all_rest)
            dG = tl.cumsum(pairs + edges, 0, reverse=True) + kept
        else:
            dV = dot((A * D).to(theirs.dtype), theirs, near)
            tl.store(dv + n * V + left + vat, dV.to(theirs.dtype), mask=valid[:, None])
            dG = tl.cumsum(edges + pairs, 0) - (edges + pairs) - tl.sum(pairs, 0)
        tl.store(dg + n + r * H, dG, mask=valid & done)
        dZ = dot((ours * edge[:, None]).to(ours.dtype), tl.trans(S), dZ)
        pairs, edges, kept = tl.where(done, 0.0, pairs), tl.where(done, 0.0, edges), tl.where(done, 0.0, kept)
    other = tl.load((k if QUERIES else q) + at + tile, mask=valid[:, None], other=0.0)
    at += (part * tl.num_programs(1)).to(tl.int64) * T * G * K
    tl.store(dz + at + tile, dot(X.to(other.dtype), other, dZ).to(dz.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["T", "parts"])
def _gradients(q, k, v, g, doc, dy, states, dstates, dq, dk, dv, dg, dg2, parts, T, G: tl.constexpr, H: tl.constexpr,
               K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr):
    """Two neighbouring blocks share what they read by the second-level cache; one block for both would spill."""
    c, b, group, part = tl.program_id(0) // 2, tl.program_id(1), tl.program_id(2) // parts, tl.program_id(2) % parts
    if tl.program_id(0) % 2 == 0:
        _side(q, k, v, g, doc, dy, states, dstates, dq, dv, dg, c, b, group, part, parts, T, G, H, K, V, C, BV, STAGES,
              True)
    else:
        _side(q, k, v, g, doc, dy, states, dstates, dk, dv, dg2, c, b, group, part, parts, T, G, H, K, V, C, BV, STAGES,
              False)


def tiles(kernel: str, V: int, dtype: torch.dtype) -> Tiles:
    """Of the table, narrowed to what divides V."""
    found = SINGLE if dtype == torch.float32 else HALF[kernel][0]
    return found._replace(V=min(V & -V, found.V))


def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, doc: Tensor, S: Tensor, save: bool,
            chunk: int = CHUNK, segments: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """y, the state after the last token and, if they are to be saved, the states before each chunk (B, N, H, K, V).

    doc (B, T) int32 counts the documents begun so far. segments of a row run side by side; 0: as the shape asks.
    """
    (B, T, H, V), (G, K), chunks = v.shape, q.shape[2:], cdiv(v.shape[1], chunk)
    two = V == tiles("two", V, q.dtype).V and H // G % 2 == 0          # of a group: they share q k^T
    BV, warps, stages = tiles("two" if two else "forward", V, q.dtype)
    blocks = V // BV * H // (2 if two else 1)
    per, segments = split(chunks, segments or min(chunks // 8, processors(v) // (B * blocks)))
    y, S1 = torch.empty_like(v), torch.empty_like(S)
    states = v.new_empty(B, chunks, H, K, V) if save else v.new_empty(0)
    ends, decays = S.new_empty(B, segments, H, K, V), S.new_empty(B, segments, H)
    for alone in ((True, False) if segments > 1 else (False,)):
        _forward[blocks, B, segments](q, k, v, g, doc, S, ends, decays, y, states, S1, T, per, G, H, K, V, chunk, BV,
                                      two, save and not alone, alone, stages, num_warps=warps)
    return y, S1, states


def backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, doc: Tensor, states: Tensor, dy: Tensor, dS: Tensor,
             chunk: int = CHUNK, segments: int = 0, parts: int = 0) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, g (fp32) and the state before the first token.

    parts of a group's heads run side by side, and their dq and dk are added up after; 0: as the shape asks.
    """
    (B, T, H, V), (G, K), chunks = v.shape, q.shape[2:], cdiv(v.shape[1], chunk)
    BV, warps, stages = tiles("reverse", V, q.dtype)
    per, segments = split(chunks, segments or min(chunks // 8, processors(v) // (B * H * (V // BV))))
    dstates, dS0 = torch.empty_like(states), torch.empty_like(dS)
    ends, decays = dS.new_empty(B, segments, H, K, V), dS.new_empty(B, segments, H)
    for alone in ((True, False) if segments > 1 else (False,)):
        _reverse[V // BV * H, B, segments](q, g, doc, dy, dS, ends, decays, dstates, dS0, T, per, G, H, K, V, chunk, BV,
                                           alone, stages, num_warps=warps)
    wanted = parts or max(1, 2 * processors(v) // (2 * chunks * B * G))
    parts = max(n for n in range(1, H // G + 1) if H // G % n == 0 and n <= wanted)
    dq, dk = (z.new_empty(parts, *z.shape, dtype=z.dtype if parts == 1 else torch.float32) for z in (q, k))
    dv, dg = torch.empty_like(v), torch.empty(2, B, T, H, dtype=torch.float32, device=v.device)
    BV, warps, stages = tiles("gradients", V, q.dtype)
    _gradients[2 * chunks, B, G * parts](q, k, v, g, doc, dy, states, dstates, dq, dk, dv, dg[0], dg[1], parts, T, G, H,
                                         K, V, chunk, BV, stages, num_warps=warps)
    return *((z[0] if parts == 1 else z.sum(0).to(q.dtype)) for z in (dq, dk)), dv, dg[0] + dg[1], dS0
