"""Linear recurrence with one decay per head, in chunks. Maths in ops/ssd.py.

Forward is one pass. Backward goes from the last chunk to the first for gradients of states, then takes all chunks at
once: first what a chunk's tokens do to one another, then what queries and keys owe to states. What a chunk's keys and
queries say of one another is the same for all heads of a group; only decays are a head's own.

STEP: values have a step each, which scales what they write, and reach their own token's output besides (skip), as in
Mamba-2. Steps scale pairs and what leaves for states, so no scaled values are made; nor are gradients of any.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import LOG2E, cdiv, dot, power, processors, split

CHUNK = 64
KEYS = 64              # channels of keys that a block of _sides has


class Tiles(NamedTuple):
    """How a launch is cut; chosen by shape and type alone."""
    V: int             # value channels a block
    warps: int
    stages: int
    registers: int | None = None       # a thread, at most: several small blocks a processor hide each other's waiting


# The first of each runs; tests/bench/kernels.py measures all. What does not change in a loop is formed there again
# (disable_licm): kept in registers, it spilled up to 700 instructions for sm_90 at K = 128. _inside has stages for
# tiles of values, if there are several: with one, all addresses are constants, and ptxas 12.8 gets some wrong.
HALF: dict[str, tuple[Tiles, ...]] = {
    "forward": (Tiles(64, 4, 2), Tiles(32, 4, 2), Tiles(64, 4, 3)),
    "two": (Tiles(64, 8, 2), Tiles(64, 8, 3)),
    "reverse": (Tiles(64, 4, 3), Tiles(64, 4, 2), Tiles(32, 4, 3)),
    "inside": (Tiles(64, 4, 2), Tiles(128, 4, 2)),
    "sides": (Tiles(128, 4, 1, 168), Tiles(128, 4, 2, 168), Tiles(128, 4, 1))}
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
def _walk(S, A, bq, bk, v, g, step, skip, y, states, valid, here, before, last, H: tl.constexpr, V: tl.constexpr,
          SAVE: tl.constexpr, ENDS: tl.constexpr, STEP: tl.constexpr):
    """One head over one chunk: the state after it, and how much of that before it is kept."""
    C: tl.constexpr = bk.shape[0]
    K: tl.constexpr = bk.shape[1]
    BV: tl.constexpr = S.shape[1]
    r, at = tl.arange(0, C), _tile(C, BV, H * V)
    bv = tl.load(v + at, mask=valid[:, None], other=0.0)
    whole, rest, all_whole, all_rest = _sums(g, valid, C, H)
    until = _decay(here == last, all_whole - whole, all_rest - rest)
    if STEP:
        dt = tl.load(step + r * H, mask=valid, other=0.0)
        until *= dt
    if not ENDS:
        Sb = S.to(bk.dtype)
        if SAVE:
            tl.store(states + _tile(K, BV, V), Sb)
        within = (here[:, None] == here[None, :]) & (r[:, None] >= r[None, :])
        P = A * _decay(within, whole[:, None] - whole[None, :], rest[:, None] - rest[None, :])
        out = dot(bq, Sb) * _decay(here == before, whole, rest)[:, None]
        if STEP:
            P *= dt[None, :]
            out += bv.to(tl.float32) * tl.load(skip)
        tl.store(y + at, dot(P.to(bk.dtype), bv, out).to(bv.dtype), mask=valid[:, None])
    keep = _decay(last == before, all_whole, all_rest)
    return dot(tl.trans(bk), (bv * until[:, None]).to(bk.dtype), S * keep), keep


@triton.jit(do_not_specialize=["T", "per"])      # rows of any length run what one of them compiled
def _forward(q, k, v, g, step, skip, doc, S0, ends, decays, y, states, S1, T, per, G: tl.constexpr, H: tl.constexpr,
             K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, TWO: tl.constexpr,
             SAVE: tl.constexpr, ENDS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr):
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
        S, keep = _walk(S, A, bq, bk, v + n * V + left, g + n, step + n, skip + head, y + n * V + left, states + at,
                        valid, here, before, last, H, V, SAVE, ENDS, STEP)
        total *= keep
        if TWO:
            n, at = n + 1, at + K * V
            S2, keep = _walk(S2, A, bq, bk, v + n * V + left, g + n, step + n, skip + head + 1, y + n * V + left,
                             states + at, valid, here, before, last, H, V, SAVE, ENDS, STEP)
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


@triton.jit(do_not_specialize=["T", "parts"])
def _inside(q, k, v, g, step, skip, doc, dy, dstates, X, dv, edges, keeps, owed, dskip, parts, T, G: tl.constexpr,
            H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
            STEP: tl.constexpr, STAGES: tl.constexpr):
    """dv, X = decay * (v dy^T), keys by queries, what pairs owe to gates, and decays from a chunk's ends and to them.

    Of a chunk's heads of a group, or a part of them, one after the other: X is their sum, before it meets queries and
    keys. A gate scales every pair that passes it; a token with itself passes none. What is owed to a step is written
    down before the step scales it.
    """
    c, b, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2) // parts, tl.program_id(2) % parts
    r, heads = tl.arange(0, C), H // G // parts
    first, valid, here, before, last = _chunk(doc, b, c, T, C)
    at, vat = (first * G + group) * K + _tile(C, K, G * K), _tile(C, BV, H * V)
    bk = tl.load(k + at, mask=valid[:, None], other=0.0)
    A = dot(bk, tl.trans(tl.load(q + at, mask=valid[:, None], other=0.0)))
    mask = (here[:, None] == here[None, :]) & (r[:, None] <= r[None, :])
    itself = r[:, None] == r[None, :]
    total = tl.zeros([C, C], tl.float32)
    for i in tl.range(0, heads, num_stages=1, disable_licm=True):
        head = (group * parts + part) * heads + i
        n, m = first * H + head, (b.to(tl.int64) * tl.cdiv(T, C) + c) * H + head
        whole, rest, all_whole, all_rest = _sums(g + n, valid, C, H)
        until = _decay(here == last, all_whole - whole, all_rest - rest)
        tl.store(edges + m * 2 * C + r, _decay(here == before, whole, rest))
        tl.store(edges + m * 2 * C + C + r, until)
        tl.store(keeps + m, _decay(last == before, all_whole, all_rest))
        D = _decay(mask, whole[None, :] - whole[:, None], rest[None, :] - rest[:, None])
        dP = tl.zeros([C, C], tl.float32)
        for left in tl.range(0, V, BV, num_stages=STAGES):
            bv = tl.load(v + n * V + left + vat, mask=valid[:, None], other=0.0)
            dP = dot(bv, tl.trans(tl.load(dy + n * V + left + vat, mask=valid[:, None], other=0.0)), dP)
        dP *= D
        P = A * D
        if STEP:
            own = tl.where(itself, dP, 0.0)
            tl.store(dskip + m, tl.sum(own))
            tl.store(owed + m * ROWS * C + (ROWS - 1) * C + r, tl.sum(own * A, 1))
            dt = tl.load(step + n + r * H, mask=valid, other=0.0)
            dP_A = tl.where(itself, 0.0, dP * A)
            tl.store(owed + m * ROWS * C + C + r, tl.sum(dP_A, 1))
            tl.store(owed + m * ROWS * C + r, tl.sum(dP_A * dt[:, None], 0))
            total += dP * dt[:, None]
        else:
            total += dP
            dP = tl.where(itself, 0.0, dP * A)
            tl.store(owed + m * ROWS * C + r, tl.sum(dP, 0))
            tl.store(owed + m * ROWS * C + C + r, tl.sum(dP, 1))
        P = P.to(bk.dtype)
        for left in tl.range(0, V, BV, num_stages=STAGES):
            bd = tl.load(dy + n * V + left + vat, mask=valid[:, None], other=0.0)
            dV = dot(P, bd, dot(bk, tl.load(dstates + m * K * V + left + _tile(K, BV, V))) * until[:, None])
            if STEP:
                dV = dV * dt[:, None] + bd.to(tl.float32) * tl.load(skip + head)
            tl.store(dv + n * V + left + vat, dV.to(bd.dtype), mask=valid[:, None])
    at = ((b * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * tl.num_programs(0) + c) * C * C
    tl.store(X + at + _tile(C, C, C), total.to(bk.dtype))


@triton.jit
def _side(own, ours, step, states, dstates, other, X, dz, edges, owed, kept, c, b, tile, T, parts, G: tl.constexpr,
          H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
          ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, QUERIES: tl.constexpr):
    """dq and what reading states owes to gates, or dk and what writing them owes: each is the other's mirror image."""
    tiles: tl.constexpr = K // BK
    left, row = tile * BK, 2 + tile + (0 if QUERIES else tiles)
    group, part, r, heads = tl.program_id(2) // parts, tl.program_id(2) % parts, tl.arange(0, C), H // G // parts
    first, valid = b.to(tl.int64) * T + c * C, r < T - c * C
    at, vat = (first * G + group) * K + left + _tile(C, BK, G * K), _tile(C, BV, H * V)
    dZ = tl.zeros([C, BK], tl.float32)
    for i in tl.range(0, heads, num_stages=STAGES, disable_licm=True):
        head = (group * parts + part) * heads + i
        n, m = first * H + head, (b.to(tl.int64) * tl.cdiv(T, C) + c) * H + head
        near, same = tl.zeros([C, BK], tl.float32), tl.zeros([BK], tl.float32)
        for j in tl.range(0, V, BV, num_stages=1):
            mine = tl.load(ours + n * V + j + vat, mask=valid[:, None], other=0.0)
            S = tl.load((states if QUERIES else dstates) + (m * K + left) * V + j + _tile(BK, BV, V))
            near = dot(mine, tl.trans(S), near)
            if QUERIES:
                dS = tl.load(dstates + (m * K + left) * V + j + _tile(BK, BV, V))
                same += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        near *= tl.load(edges + (m * 2 if QUERIES else m * 2 + 1) * C + r)[:, None]
        passed = tl.sum(tl.load(own + at, mask=valid[:, None], other=0.0).to(tl.float32) * near, 1)
        tl.store(owed + (m * ROWS + row) * C + r, passed)
        if STEP and not QUERIES:
            near *= tl.load(step + n + r * H, mask=valid, other=0.0)[:, None]
        dZ += near
        if QUERIES:
            tl.store(kept + m * tiles + tile, tl.sum(same, 0))
    pairs = tl.load(X + ((b * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * tl.cdiv(T, C) + c) * C * C
                    + _tile(C, C, C))
    if QUERIES:
        pairs = tl.trans(pairs)
    dZ = dot(pairs, tl.load(other + at, mask=valid[:, None], other=0.0), dZ)
    tl.store(dz + (part * tl.num_programs(1)).to(tl.int64) * T * G * K + at, dZ.to(dz.dtype.element_ty),
             mask=valid[:, None])


@triton.jit(do_not_specialize=["T", "parts"])
def _sides(q, k, v, step, dy, states, dstates, X, dq, dk, edges, owed, kept, parts, T, G: tl.constexpr,
           H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
           ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr):
    """Both sides of a chunk, cut by channels of keys: neighbouring blocks share what they read by the cache."""
    tiles: tl.constexpr = K // BK
    c, tile, b = tl.program_id(0) // (2 * tiles), tl.program_id(0) % (2 * tiles), tl.program_id(1)
    if tile < tiles:
        _side(q, dy, step, states, dstates, k, X, dq, edges, owed, kept, c, b, tile, T, parts, G, H, K, V, C, BK, BV,
              ROWS, STEP, 1, True)
    else:
        _side(k, v, step, states, dstates, q, X, dk, edges, owed, kept, c, b, tile - tiles, T, parts, G, H, K, V, C, BK,
              BV, ROWS, STEP, STAGES, False)


@triton.jit(do_not_specialize=["T"])
def _gates(step, keeps, owed, kept, dg, dstep, T, H: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr,
           BH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Sums over what passes each gate, of a chunk and some heads; and of what steps scale.

    Those are pairs of a query from it on and a key before it, the former with the state before the chunk, the latter
    with the state after it, and the two states.
    """
    h, r = tl.program_id(2) * BH + tl.arange(0, BH), tl.arange(0, C)
    t, b = tl.program_id(0) * C + r, tl.program_id(1).to(tl.int64)
    m, ok = (b * tl.num_programs(0) + tl.program_id(0)) * H + h, h < H
    owed += m[:, None] * ROWS * C + r[None, :]
    at, here = (b * T + t)[None, :] * H + h[:, None], ok[:, None] & (t < T)[None, :]
    read, pairs = tl.load(owed, mask=ok[:, None], other=0.0), tl.load(owed + C, mask=ok[:, None], other=0.0)
    written, same = tl.zeros([BH, C], tl.float32), tl.zeros([BH], tl.float32)
    for i in tl.static_range(TILES):
        read += tl.load(owed + (2 + i) * C, mask=ok[:, None], other=0.0)
        written += tl.load(owed + (2 + TILES + i) * C, mask=ok[:, None], other=0.0)
        same += tl.load(kept + m * TILES + i, mask=ok, other=0.0)
    same *= tl.load(keeps + m, mask=ok, other=0.0)
    if STEP:
        itself = tl.load(owed + (ROWS - 1) * C, mask=ok[:, None], other=0.0)
        tl.store(dstep + at, pairs + written + itself, mask=here)
        dt = tl.load(step + at, mask=here, other=0.0)
        pairs *= dt
        written *= dt
    read -= pairs
    out = tl.cumsum(read, 1, reverse=True) + (tl.cumsum(written, 1) - written) + same[:, None]
    tl.store(dg + at, out, mask=here)


def tiles(kernel: str, V: int, dtype: torch.dtype) -> Tiles:
    """Of the table, narrowed to what divides V."""
    found = SINGLE if dtype == torch.float32 else HALF[kernel][0]
    return found._replace(V=min(V & -V, found.V))


def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, step: Tensor | None, skip: Tensor | None, doc: Tensor,
            S: Tensor, save: bool, chunk: int = CHUNK, segments: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """y, the state after the last token and, if they are to be saved, the states before each chunk (B, N, H, K, V).

    doc (B, T) int32 counts the documents begun so far; step (B, T, H) and skip (H,) are fp32, both or neither.
    segments of a row run side by side; 0: as the shape asks.
    """
    (B, T, H, V), (G, K), chunks = v.shape, q.shape[2:], cdiv(v.shape[1], chunk)
    two = V == tiles("two", V, q.dtype).V and H // G % 2 == 0          # of a group: they share q k^T
    BV, warps, stages, _ = tiles("two" if two else "forward", V, q.dtype)
    blocks = V // BV * H // (2 if two else 1)
    per, segments = split(chunks, segments or min(chunks // 8, processors(v) // (B * blocks)))
    y, S1 = torch.empty_like(v), torch.empty_like(S)
    states = v.new_empty(B, chunks, H, K, V) if save else v.new_empty(0)
    ends, decays = S.new_empty(B, segments, H, K, V), S.new_empty(B, segments, H)
    some = (g, g) if step is None or skip is None else (step, skip)        # pointers that are not followed
    for alone in ((True, False) if segments > 1 else (False,)):
        _forward[blocks, B, segments](q, k, v, g, *some, doc, S, ends, decays, y, states, S1, T, per, G, H, K, V,
                                      chunk, BV, two, save and not alone, alone, step is not None, stages,
                                      num_warps=warps)
    return y, S1, states


def backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, step: Tensor | None, skip: Tensor | None, doc: Tensor,
             states: Tensor, dy: Tensor, dS: Tensor, chunk: int = CHUNK, segments: int = 0,
             parts: int = 0) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, g, step and skip (these three fp32), and of the state before the first token.

    parts of a group's heads run side by side, and their dq and dk are added up after; 0: as the shape asks.
    """
    (B, T, H, V), (G, K), chunks = v.shape, q.shape[2:], cdiv(v.shape[1], chunk)
    BV, warps, stages, _ = tiles("reverse", V, q.dtype)
    per, segments = split(chunks, segments or min(chunks // 8, processors(v) // (B * H * (V // BV))))
    dstates, dS0 = torch.empty_like(states), torch.empty_like(dS)
    ends, decays = dS.new_empty(B, segments, H, K, V), dS.new_empty(B, segments, H)
    for alone in ((True, False) if segments > 1 else (False,)):
        _reverse[V // BV * H, B, segments](q, g, doc, dy, dS, ends, decays, dstates, dS0, T, per, G, H, K, V, chunk, BV,
                                           alone, stages, num_warps=warps)
    wanted = parts or max(1, 2 * processors(v) // (2 * chunks * B * G))
    parts = max(n for n in range(1, H // G + 1) if H // G % n == 0 and n <= wanted)
    return *_chunks(q, k, v, g, step, skip, doc, states, dstates, dy, chunk, parts), dS0


def _chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, step: Tensor | None, skip: Tensor | None, doc: Tensor,
            states: Tensor, dstates: Tensor, dy: Tensor, C: int, parts: int) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, g, step and skip from states before each chunk and gradients of those after it."""
    (B, T, H, V), (G, K), chunks = v.shape, q.shape[2:], states.shape[1]
    BK, BH = min(K, KEYS), min(16, power(H))
    has = step is not None
    step, skip = (g, g) if step is None or skip is None else (step, skip)   # pointers that are not followed
    rows = 2 + 2 * K // BK + has
    dq, dk = (z.new_empty(parts, *z.shape, dtype=z.dtype if parts == 1 else torch.float32) for z in (q, k))
    X, dv, dg = q.new_empty(B, G * parts, chunks, C, C), torch.empty_like(v), torch.empty_like(g, dtype=torch.float32)
    dstep, dskip = torch.empty_like(dg) if has else dg.new_empty(0), dg.new_empty(B, chunks, H if has else 0)
    edges, owed = (dg.new_empty(B, chunks, H, n, C) for n in (2, rows))
    keeps, kept = dg.new_empty(B, chunks, H), dg.new_empty(B, chunks, H, K // BK)
    BV, warps, stages, registers = tiles("inside", V, q.dtype)
    _inside[chunks, B, G * parts](q, k, v, g, step, skip, doc, dy, dstates, X, dv, edges, keeps, owed, dskip, parts, T,
                                  G, H, K, V, C, BV, rows, has, stages, num_warps=warps, maxnreg=registers)
    BV, warps, stages, registers = tiles("sides", V, q.dtype)
    _sides[2 * K // BK * chunks, B, G * parts](q, k, v, step, dy, states, dstates, X, dq, dk, edges, owed, kept, parts,
                                               T, G, H, K, V, C, BK, BV, rows, has, stages, num_warps=warps,
                                               maxnreg=registers)
    _gates[chunks, B, cdiv(H, BH)](step, keeps, owed, kept, dg, dstep, T, H, C, K // BK, BH, rows, has)
    return *((z[0] if parts == 1 else z.sum(0).to(q.dtype)) for z in (dq, dk)), dv, dg, dstep, dskip.sum((0, 1))
