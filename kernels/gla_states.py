"""Gated linear attention: states alone, forward or, for gradients, backward; by chunks, and by segments of a row.

Of a chunk with borders only the rows of one document reach the state that leaves it (forward its last document, and
backward the one that came in); the others are zeros here, so one path is right for every gate and any documents.
"""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import LOG2E, cdiv, dot


@triton.jit
def push(z, g, row, x, w, S, seen, keep, scale, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
         BACK: tl.constexpr):
    """S after a chunk, and log2 of what is left of S: adds scale * z^T w over the rows seen, keeps S where `keep`.

    Each row decays by the gates after it (BACK: up to and with it), summed by themselves, so that no small gate is
    lost in a difference of large sums and no factor exceeds 1.
    """
    r = tl.arange(0, C)
    if BACK:
        gates = tl.load(g + row[:, None] * K + x[None, :], mask=seen[:, None], other=0.0).to(tl.float32)
        total = tl.sum(gates, 0) * LOG2E
    else:
        after = seen & (r < tl.max(tl.where(seen, r, -1)))         # read one row on, but for the last
        gates = tl.load(g + row[:, None] * K + H * K + x[None, :], mask=after[:, None], other=0.0).to(tl.float32)
        one = tl.load(g + row[:, None] * K + x[None, :], mask=(seen & (r == 0))[:, None], other=0.0).to(tl.float32)
        total = tl.sum(gates + one, 0) * LOG2E
    zs = tl.load(z + row[:, None] * K + x[None, :], mask=seen[:, None], other=0.0)
    zs = (zs * (tl.exp2(tl.cumsum(gates, 0, reverse=not BACK) * LOG2E) * scale)).to(w.dtype)
    S = tl.where(keep, S * tl.exp2(total)[:, None], 0.0)
    return dot(tl.trans(zs), w, S), tl.where(keep, total, float("-inf"))


@triton.jit
def sweep_kernel(z, w, g, doc, S_in, saved, S_out, left, scale, T, chunks, SEGMENTS,
                 H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                 BV: tl.constexpr, BACK: tl.constexpr, SAVE: tl.constexpr, FROM_ZERO: tl.constexpr):
    """States of a segment's chunks: z, w are k, v; BACK: q, dy, and S the gradient of the state a chunk hands on."""
    tiles: tl.constexpr = (K // BK) * (V // BV)
    tile, p = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    segment, bh = p % SEGMENTS, p // SEGMENTS
    b = (bh // H).to(tl.int64)
    N = tl.cdiv(T, C)
    r = tl.arange(0, C)
    x, wv = tile % (K // BK) * BK + tl.arange(0, BK), tile // (K // BK) * BV + tl.arange(0, BV)
    at = x[:, None] * V + wv[None, :]
    doc += b * T
    S = tl.zeros([BK, BV], tl.float32)
    if not FROM_ZERO:
        S += tl.load(S_in + p.to(tl.int64) * K * V + at)
    through = tl.zeros([BK], tl.float32)                 # log2 of what a state keeps through the segment
    begin, end = segment * chunks, tl.minimum(segment * chunks + chunks, N)
    if FROM_ZERO:                                        # no segment begins with what the last one makes
        end = tl.where(segment == (0 if BACK else SEGMENTS - 1), begin, end)
    for step in range(begin, end):
        c = begin + end - 1 - step if BACK else step
        t = c * C + r
        row = (b * T + t) * H + bh % H
        before = tl.load(doc + c * C - 1, mask=c > 0, other=0)
        last = tl.load(doc + tl.minimum(c * C + C, T) - 1)
        seen = tl.load(doc + t, mask=t < T, other=-1) == (before if BACK else last)
        tile_w = tl.load(w + row[:, None] * V + wv[None, :], mask=seen[:, None], other=0.0)
        if SAVE:
            tl.store(saved + ((b * N + c) * H + bh % H) * K * V + at, S.to(tile_w.dtype))
        S, kept = push(z, g, row, x, tile_w, S, seen, before == last, scale, H, K, C, BACK)
        through += kept
    tl.store(S_out + p.to(tl.int64) * K * V + at, S)
    if FROM_ZERO:
        tl.store(left + p.to(tl.int64) * K + x, through)


@triton.jit
def fold_kernel(S, left, S_in, SEGMENTS, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BACK: tl.constexpr):
    """In place: what each segment made from zero becomes what it begins with, given what the row begins with."""
    bh = tl.program_id(0) // (K // BK)
    x, w = tl.program_id(0) % (K // BK) * BK + tl.arange(0, BK), tl.arange(0, V)
    at = x[:, None] * V + w[None, :]
    now = tl.load(S_in + bh.to(tl.int64) * K * V + at)
    for step in range(SEGMENTS):
        p = (bh * SEGMENTS + (SEGMENTS - 1 - step if BACK else step)).to(tl.int64)
        made, kept = tl.load(S + p * K * V + at), tl.load(left + p * K + x)
        tl.store(S + p * K * V + at, now)
        # a state that a border cut off is dropped: it may be NaN
        now = tl.where((kept == float("-inf"))[:, None], 0.0, now * tl.exp2(kept)[:, None]) + made


# Value channels of a tile, warps. The first is run.
SWEEP = ((128, 4), (64, 4), (128, 8))


def sweep(z: Tensor, w: Tensor, g: Tensor, doc: Tensor, S: Tensor, scale: float, each: int, chunk: int,
          back: bool, saved: Tensor | None) -> Tensor:
    """Where a row's segments of `each` chunks begin; with saved, from S (B, H, segments, K, V), where they end."""
    B, T, H, K = z.shape
    V, N = w.shape[-1], cdiv(T, chunk)
    count = cdiv(N, each)
    BK, BV = min(K, 64), min(V, SWEEP[0][0])
    out = S.new_empty(B, H, count, K, V)
    left = S.new_empty(B, H, count, K)
    sweep_kernel[(B * H * count * (K // BK) * (V // BV),)](
        z, w, g, doc, S, out if saved is None else saved, out, left, scale, T, each, count, H, K, V, chunk, BK, BV,
        back, saved is not None, saved is None, num_warps=SWEEP[0][1], num_stages=1)
    return out if saved is not None else fold(out, left, S, back)


def fold(made: Tensor, left: Tensor, S: Tensor, back: bool) -> Tensor:
    B, H, count, K, V = made.shape
    BK = min(K, 16)
    fold_kernel[(B * H * K // BK,)](made, left, S, count, K, V, BK, back, num_warps=4)
    return made
