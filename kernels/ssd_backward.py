"""Gradients of linear recurrence with one decay per head. Maths in ops/ssd.py, forward in ssd.py.

From the last chunk to the first for gradients of states, then all chunks at once: first what a chunk's tokens do to one
another, then what queries and keys owe to states.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.ssd import CHUNK, chunk_of, decay, gate_sums, offsets, tiles
from stepladder.kernels.tiles import cdiv, dot, power, processors, split

KEYS = 64              # channels of keys that a block of _sides has


@triton.jit(do_not_specialize=["T", "per"])
def _reverse(q, g, doc, dy, dS1, ends, decays, dstates, dS0, T, per, G: tl.constexpr, H: tl.constexpr,
             K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, ENDS: tl.constexpr,
             STAGES: tl.constexpr):
    """Gradients of the states after each chunk, from the last to the first; segments as in _forward, mirrored."""
    b, s, tiles = tl.program_id(1), tl.program_id(2), V // BV
    head, left, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BV, offsets(K, BV, V)
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
        first, valid, here, before, last = chunk_of(doc, b, c, T, C)
        n = first * H + head
        bq = tl.load(q + (first * G + group) * K + offsets(C, K, G * K), mask=valid[:, None], other=0.0)
        bd = tl.load(dy + n * V + left + offsets(C, BV, H * V), mask=valid[:, None], other=0.0)
        whole, rest, all_whole, all_rest = gate_sums(g + n, valid, C, H)
        if not ENDS:
            m = ((b.to(tl.int64) * chunks + c) * H + head) * K * V + left
            tl.store(dstates + m + tile, dS.to(bq.dtype))
        keep = decay(last == before, all_whole, all_rest)
        since = decay(here == before, whole, rest)
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
    """dv, X = decay * step * (v dy^T), keys by queries, what pairs owe to gates, and decays to and from a chunk's ends.

    Of a chunk's heads of a group, or a part of them, one after the other: X is their sum, before it meets queries and
    keys. A gate scales every pair that passes it; a token with itself passes none. What is owed to a step is written
    down before the step scales it.
    """
    c, b, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2) // parts, tl.program_id(2) % parts
    r, heads = tl.arange(0, C), H // G // parts
    first, valid, here, before, last = chunk_of(doc, b, c, T, C)
    at, vat = (first * G + group) * K + offsets(C, K, G * K), offsets(C, BV, H * V)
    bk = tl.load(k + at, mask=valid[:, None], other=0.0)
    A = dot(bk, tl.trans(tl.load(q + at, mask=valid[:, None], other=0.0)))
    mask = (here[:, None] == here[None, :]) & (r[:, None] <= r[None, :])
    itself = r[:, None] == r[None, :]
    alone = tl.sum(tl.where(itself, A, 0.0), 1)
    total = tl.zeros([C, C], tl.float32)
    for i in tl.range(0, heads, num_stages=1, disable_licm=True):
        head = (group * parts + part) * heads + i
        n, m = first * H + head, (b.to(tl.int64) * tl.cdiv(T, C) + c) * H + head
        whole, rest, all_whole, all_rest = gate_sums(g + n, valid, C, H)
        until = decay(here == last, all_whole - whole, all_rest - rest)
        tl.store(edges + m * 2 * C + r, decay(here == before, whole, rest))
        tl.store(edges + m * 2 * C + C + r, until)
        tl.store(keeps + m, decay(last == before, all_whole, all_rest))
        D = decay(mask, whole[None, :] - whole[:, None], rest[None, :] - rest[:, None])
        dP = tl.zeros([C, C], tl.float32)
        for left in tl.range(0, V, BV, num_stages=STAGES):
            bv = tl.load(v + n * V + left + vat, mask=valid[:, None], other=0.0)
            dP = dot(bv, tl.trans(tl.load(dy + n * V + left + vat, mask=valid[:, None], other=0.0)), dP)
        dP *= D
        P = A * D
        if STEP:
            own = tl.sum(tl.where(itself, dP, 0.0), 1)
            tl.store(dskip + m, tl.sum(own, 0))
            tl.store(owed + m * ROWS * C + (ROWS - 1) * C + r, own * alone)
            dt = tl.load(step + n + r * H, mask=valid, other=0.0)
            dP_A = tl.where(itself, 0.0, dP * A)
            tl.store(owed + m * ROWS * C + C + r, tl.sum(dP_A, 1))
            tl.store(owed + m * ROWS * C + r, tl.sum(dP_A * dt[:, None], 0))
            total += dP * dt[:, None]
            P = tl.where(itself, P * dt[:, None] + tl.load(skip + head), P * dt[:, None])
            until *= dt
        else:
            total += dP
            dP = tl.where(itself, 0.0, dP * A)
            tl.store(owed + m * ROWS * C + r, tl.sum(dP, 0))
            tl.store(owed + m * ROWS * C + C + r, tl.sum(dP, 1))
        P = P.to(bk.dtype)
        for left in tl.range(0, V, BV, num_stages=STAGES):
            bd = tl.load(dy + n * V + left + vat, mask=valid[:, None], other=0.0)
            dV = dot(P, bd, dot(bk, tl.load(dstates + m * K * V + left + offsets(K, BV, V))) * until[:, None])
            tl.store(dv + n * V + left + vat, dV.to(bd.dtype), mask=valid[:, None])
    at = ((b * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * tl.num_programs(0) + c) * C * C
    tl.store(X + at + offsets(C, C, C), total.to(bk.dtype))


@triton.jit
def _side(own, ours, step, states, dstates, other, X, dz, edges, owed, kept, c, b, tile, T, parts, G: tl.constexpr,
          H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
          ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, QUERIES: tl.constexpr):
    """dq and what reading states owes to gates, or dk and what writing them owes: each is the other's mirror image."""
    tiles: tl.constexpr = K // BK
    left, row = tile * BK, 2 + tile + (0 if QUERIES else tiles)
    group, part, r, heads = tl.program_id(2) // parts, tl.program_id(2) % parts, tl.arange(0, C), H // G // parts
    first, valid = b.to(tl.int64) * T + c * C, r < T - c * C
    at, vat = (first * G + group) * K + left + offsets(C, BK, G * K), offsets(C, BV, H * V)
    dZ = tl.zeros([C, BK], tl.float32)
    for i in tl.range(0, heads, num_stages=STAGES, disable_licm=True):
        head = (group * parts + part) * heads + i
        n, m = first * H + head, (b.to(tl.int64) * tl.cdiv(T, C) + c) * H + head
        near, same = tl.zeros([C, BK], tl.float32), tl.zeros([BK], tl.float32)
        for j in tl.range(0, V, BV, num_stages=1):
            mine = tl.load(ours + n * V + j + vat, mask=valid[:, None], other=0.0)
            S = tl.load((states if QUERIES else dstates) + (m * K + left) * V + j + offsets(BK, BV, V))
            near = dot(mine, tl.trans(S), near)
            if QUERIES:
                dS = tl.load(dstates + (m * K + left) * V + j + offsets(BK, BV, V))
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
                    + offsets(C, C, C))
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
        written = tl.where(here, written * dt, 0.0)      # a product that is subtracted anew below would not cancel
    read -= pairs
    out = tl.cumsum(read, 1, reverse=True) + (tl.cumsum(written, 1) - written) + same[:, None]
    tl.store(dg + at, out, mask=here)


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
