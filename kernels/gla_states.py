"""Gated linear attention: what each segment of a row makes of an empty state, forward or, for gradients, backward.

Of a chunk with borders only the rows of one document reach the state that leaves it (forward its last document, and
backward the one that came in); the others are zeros here, so one path is right for every gate and any documents.
"""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import LOG2E, cdiv, dot


@triton.jit
def ahead(g):
    """log2 of the decay from each row of a chunk to its end: sums of the gates after it, so small ones survive."""
    return (tl.cumsum(g, 0, reverse=True) - g) * LOG2E


@triton.jit
def sweep_kernel(z, w, g, doc, S_out, left, scale, T, chunks, SEGMENTS, H: tl.constexpr, K: tl.constexpr,
                 V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BACK: tl.constexpr,
                 STAGES: tl.constexpr):
    """z, w are k, v; BACK: q, dy, and the state the gradient of the one that a chunk hands on."""
    tiles: tl.constexpr = (K // BK) * (V // BV)
    tile, p = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    segment, bh = p % SEGMENTS, p // SEGMENTS
    b = (bh // H).to(tl.int64)
    N = tl.cdiv(T, C)
    r = tl.arange(0, C)
    x, wv = tile % (K // BK) * BK + tl.arange(0, BK), tile // (K // BK) * BV + tl.arange(0, BV)
    doc += b * T
    S, through = tl.zeros([BK, BV], tl.float32), tl.zeros([BK], tl.float32)      # log2 of what a state keeps
    begin, end = segment * chunks, tl.minimum(segment * chunks + chunks, N)
    end = tl.where(segment == (0 if BACK else SEGMENTS - 1), begin, end)         # nobody begins with what these make
    for step in tl.range(begin, end, num_stages=STAGES, disable_licm=True):
        c = begin + end - 1 - step if BACK else step
        t = c * C + r
        row = (b * T + t) * H + bh % H
        before = tl.load(doc + c * C - 1, mask=c > 0, other=0)
        last = tl.load(doc + tl.minimum(c * C + C, T) - 1)
        mine = tl.load(doc + t, mask=t < T, other=-1) == (before if BACK else last)
        bz = tl.load(z + row[:, None] * K + x[None, :], mask=(t < T)[:, None], other=0.0)
        bw = tl.load(w + row[:, None] * V + wv[None, :], mask=(t < T)[:, None], other=0.0)
        bg = tl.load(g + row[:, None] * K + x[None, :], mask=(t < T)[:, None], other=0.0).to(tl.float32)
        bg = tl.where(mine[:, None], bg, 0.0)
        decay = tl.cumsum(bg, 0) * LOG2E if BACK else ahead(bg)
        zs = tl.where(mine[:, None], bz * (tl.exp2(decay) * scale), 0.0).to(bw.dtype)
        kept = tl.where(before == last, tl.sum(bg, 0) * LOG2E, float("-inf"))
        S = tl.where(before == last, S * tl.exp2(kept)[:, None], 0.0)
        S = dot(tl.trans(zs), tl.where(mine[:, None], bw, 0.0).to(bw.dtype), S)
        through += kept
    tl.store(S_out + p.to(tl.int64) * K * V + x[:, None] * V + wv[None, :], S)
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


# Value channels of a tile, warps, stages. The first is run.
SWEEP = ((64, 4, 2), (128, 4, 2), (128, 8, 2))


def starts(z: Tensor, w: Tensor, g: Tensor, doc: Tensor, S: Tensor, scale: float, each: int, chunk: int,
           back: bool) -> Tensor:
    """States (B, H, segments, K, V) that a row's segments of `each` chunks begin with, S the first (back: last)."""
    B, T, H, K = z.shape
    V, count = w.shape[-1], cdiv(cdiv(T, chunk), each)
    if count == 1:
        return S.unsqueeze(2)
    tile, warps, stages = SWEEP[0]
    BK, BV = min(K, 64), min(V, tile)
    made, left = S.new_empty(B, H, count, K, V), S.new_empty(B, H, count, K)
    sweep_kernel[(B * H * count * (K // BK) * (V // BV),)](
        z, w, g, doc, made, left, scale, T, each, count, H, K, V, chunk, BK, BV, back, stages, num_warps=warps,
        num_stages=stages)
    few = min(K, 16)
    fold_kernel[(B * H * K // few,)](made, left, S, count, K, V, few, back, num_warps=4)
    return made
