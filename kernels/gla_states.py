"""Gated linear attention, what both passes share: the factors of each chunk, and the walk from chunk to chunk.

The decay between rows i >= j of a chunk, 2^(b_i - b_j) with b the running sum of the gates, is split in two factors
around the chunk's middle. With them the walk is products alone, and backward it is the same walk from the last chunk
to the first, with what adds to the state and what reads it exchanged:

    forward   M = 2^left S     y = q' M + tril(q' k'^T) v       S  = 2^right (M + k'^T v)
    backward  M = 2^right dS   dv = k' M + triu(k' q'^T) dy     dS = 2^left (M + q'^T dy)

Where a factor is out of range, or a document begins inside the chunk, the chunk is slow: its factors are then those
that the state alone needs, never above 1, and zero in the rows of other documents than the state's.

Factors cost a pass over memory and save the walk nine tenths of its instructions, which were what it took its time for.
Now bytes are: pairs of rows are multiplied by every tile of values, which has both factors at hand, and kept nowhere.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import LOG2E, cdiv, dot

# log2 of a factor: fp16 ends at 16, fp32 is precise. Models compute by kernels in 16 bits alone (ops/kernels.py); fp32
# is for the interpreter, which rounds bf16 wrongly.
LIMIT = {torch.bfloat16: 64, torch.float32: 16, torch.float16: 8}


@triton.jit
def rows_of(z, row, D: tl.constexpr, x, seen):
    """Rows (C, x) of z (.., D), zero where not seen."""
    return tl.load(z + row[:, None] * D + x[None, :], mask=seen[:, None], other=0.0)


@triton.jit
def sums(weights, z, PARTS: tl.constexpr):
    """weights @ z, summed in fp32: of z, in PARTS numbers of 8 bits each, and weights that bf16 holds exactly."""
    part = (z.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    out = dot(weights, part.to(tl.bfloat16))
    for _ in tl.static_range(PARTS - 1):
        z -= part
        part = (z.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        out = dot(weights, part.to(tl.bfloat16), out)
    return out


@triton.jit
def from_middle(r, C: tl.constexpr):
    """Weights (C, C) whose product with gates is the log of the decay from the middle to each row, negated before."""
    late = r[None, :] >= C // 2
    return tl.where(r[None, :] <= r[:, None], tl.where(late, 1.0, 0.0), tl.where(late, 0.0, -1.0)).to(tl.bfloat16)


@triton.jit
def halves(g, r, C: tl.constexpr):
    """Sums of the gates before the middle, and from it on."""
    return (tl.sum(tl.where((r < C // 2)[:, None], g, 0.0), 0), tl.sum(tl.where((r >= C // 2)[:, None], g, 0.0), 0))


@triton.jit
def ahead(g):
    """Sums of the gates after each row: small ones survive large ones before."""
    return tl.cumsum(g, 0, reverse=True) - g


@triton.jit
def slow_factors(q, k, g, row, seen, since, until, coming, qs, ks, decay, after, scale, K: tl.constexpr,
                 C: tl.constexpr):
    """q' of the rows that the state before the chunk reaches, k' of those that reach the state after it."""
    for at in range(0, K, 16):
        x = at + tl.arange(0, 16)
        to = tl.arange(0, C)[:, None] * K + x[None, :]
        bg = rows_of(g, row, K, x, seen).to(tl.float32) * LOG2E
        bq, bk = rows_of(q, row, K, x, seen), rows_of(k, row, K, x, seen)
        bq = tl.where(since, bq * (tl.exp2(tl.cumsum(tl.where(since, bg, 0.0), 0)) * scale), 0.0)
        bg = tl.where(until, bg, 0.0)
        bk = tl.where(until, bk * tl.exp2(ahead(bg)), 0.0)
        tl.store(qs + to, bq.to(qs.dtype.element_ty))
        tl.store(ks + to, bk.to(ks.dtype.element_ty))
        tl.store(decay + x, tl.where(coming, tl.sum(bg, 0), float("-inf")))
        tl.store(after + x, tl.zeros([16], tl.float32))


@triton.jit
def factors_kernel(q, k, g, start, qs, ks, decay, edge, slow, scale, T, H: tl.constexpr, K: tl.constexpr,
                   C: tl.constexpr, BK: tl.constexpr, LIMIT: tl.constexpr, BACK: tl.constexpr, EVEN: tl.constexpr,
                   PARTS: tl.constexpr):
    """q' and k' of one chunk, its rows to a multiple of C; log2 of what the state is scaled by before and after the
    chunk's products; and the first row that reaches the state that leaves, or how many (BACK)."""
    N = tl.cdiv(T, C)
    p, rows = tl.program_id(0), tl.num_programs(0) // N // H
    p = p if BACK else tl.num_programs(0) - 1 - p      # what the walk reads first is made last, for L2: no gain seen
    c, b, h = p // H // rows, (p // H % rows).to(tl.int64), p % H
    n = (b * N + c) * H + h
    r, x = tl.arange(0, C), tl.arange(0, BK)
    seen = (c * C + r < T) | EVEN
    here = ((b * T + c * C) * H + h) * K
    q, k, g, row, start = q + here, k + here, g + here, r * H, start + b * T + c * C
    qs, ks, to = qs + n * C * K, ks + n * C * K, r[:, None] * K + x[None, :]
    decay, after = decay + n * K, decay + (n + tl.num_programs(0)) * K
    begun, new = tl.load(start + r, mask=seen, other=0).to(tl.int32), tl.load(start) != 0
    outside = tl.zeros([BK], tl.int32)
    for at in tl.static_range(0, K, BK):
        bg = rows_of(g, row, K, at + x, seen).to(tl.float32) * LOG2E
        bq, bk = rows_of(q, row, K, at + x, seen), rows_of(k, row, K, at + x, seen)
        left, right = halves(bg, r, C)
        e = sums(from_middle(r, C), bg, PARTS)
        bq, bk = (bq * (tl.exp2(e) * scale)).to(bq.dtype), (bk * tl.exp2(-e)).to(bk.dtype)
        tl.store(qs + at + to, bq)
        tl.store(ks + at + to, bk)
        outside += 1 - ((left >= -LIMIT) & (right >= -LIMIT)).to(tl.int32)          # 1 where a gate is NaN, too
        left = tl.where(new, float("-inf"), left)
        tl.store(decay + at + x, right if BACK else left)
        tl.store(after + at + x, left if BACK else right)
    last = tl.sum(begun, 0)                                 # documents begun in this chunk: 0 is the state's before it
    fast = (last == new.to(tl.int32)) & (tl.sum(outside, 0) == 0)
    tl.store(slow + n, 1 - fast.to(tl.int8))
    tl.store(edge + n, C if BACK else 0)
    if not fast:
        tl.debug_barrier()                                  # other threads wrote the same places
        of = tl.where(seen, tl.cumsum(begun, 0), -1)
        since, until = (of == 0)[:, None], (of == last)[:, None]
        tl.store(edge + n, tl.sum(((of == 0) if BACK else ((of != last) & seen)).to(tl.int32), 0))
        slow_factors(q, k, g, row, seen, since, until, last == 0, qs, ks, decay, after, scale, K, C)


@triton.jit
def decayed(S, by):
    """2^by S. What a border cuts off is left out, not multiplied by 0: it may be NaN."""
    return tl.where((by == float("-inf"))[:, None], 0.0, S * tl.exp2(by)[:, None])


@triton.jit
def walk_kernel(read, add, w, decay, edge, slow, S_in, y, states, S_out, kept, T, chunks, SEGMENTS, TOTAL,
                H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
                BACK: tl.constexpr, OUT: tl.constexpr, SAVE: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr):
    """A head's row, or segment of it, in BV value channels. Without OUT, what a segment makes of an empty state."""
    tile, p = tl.program_id(0) % (V // BV), tl.program_id(0) // (V // BV)      # tiles of a head side by side: L2
    segment, bh = p % SEGMENTS, p // SEGMENTS
    b = (bh // H).to(tl.int64)
    N = tl.cdiv(T, C)
    r, x, v = tl.arange(0, C), tl.arange(0, K), tile * BV + tl.arange(0, BV)
    at, keys = x[:, None] * V + v[None, :], r[:, None] * K + x[None, :]
    paired = r[:, None] <= r[None, :] if BACK else r[:, None] >= r[None, :]
    values = (r * H)[:, None] * V + v[None, :]
    begin, end = segment * chunks, tl.minimum(segment * chunks + chunks, N)
    if OUT:
        S = tl.load(S_in + p.to(tl.int64) * K * V + at)
    else:
        S = tl.zeros([K, BV], tl.float32)
        end = tl.where(segment == (0 if BACK else SEGMENTS - 1), begin, end)   # nobody begins with what these make
    through = tl.zeros([K], tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        c = begin + end - 1 - step if BACK else step
        n = (b * N + c) * H + bh % H
        here = ((b * T + c * C) * H + bh % H) * V
        border = tl.load(edge + n)
        mine = (r < border if BACK else r >= border) & (EVEN | (c * C + r < T))
        bw = tl.load(w + here + values, mask=mine[:, None], other=0.0)
        first, then = tl.load(decay + n * K + x), tl.load(decay + (n + TOTAL) * K + x)
        if SAVE:
            tl.store(states + n * K * V + at, S.to(bw.dtype))
        elif OUT:
            tl.store(states + n * K * V + at, S.to(bw.dtype), mask=tl.load(slow + n) != 0)
        S = decayed(S, first)
        to_add = tl.load(add + n * C * K + keys)
        if OUT:
            to_read = tl.load(read + n * C * K + keys)
            P = tl.where(paired, dot(to_read, tl.trans(to_add)), 0.0)
            o = dot(P.to(bw.dtype), bw, dot(to_read, S.to(bw.dtype)))
            tl.store(y + here + values, o.to(bw.dtype), mask=(EVEN | (c * C + r < T))[:, None])
        else:
            through += first + then
        S = dot(tl.trans(to_add), bw, S)
        S = decayed(S, then) if BACK else S * tl.exp2(then)[:, None]
    tl.store(S_out + p.to(tl.int64) * K * V + at, S)
    if not OUT:
        tl.store(kept + p.to(tl.int64) * K + x, through)


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


# Key channels at a time, warps, registers a thread of 16-bit types: with these three blocks run at once.
FACTORS = ((64, 4, 168),)
WALK = ((64, 4, 2),)            # value channels of a tile, warps, stages: two blocks share a processor's memory
SWEEP = ((64, 4, 2),)


class Factors(NamedTuple):
    q: Tensor           # (B, N, H, C, K)
    k: Tensor
    decay: Tensor       # (2, B, N, H, K)
    edge: Tensor        # (B, N, H)
    slow: Tensor        # (B, N, H)


def factors(q: Tensor, k: Tensor, g: Tensor, start: Tensor, scale: float, chunk: int, back: bool, block: int,
            scratch: tuple[Tensor, Tensor] | None = None) -> Factors:
    """block: key channels at a time, 0 for what is best; scratch: what q and k are written to."""
    B, T, H, K = q.shape
    N = cdiv(T, chunk)
    qs, ks = scratch or (q.new_empty(B, N, H, chunk, K), q.new_empty(B, N, H, chunk, K))
    decay = torch.empty((2, B, N, H, K), dtype=torch.float32, device=q.device)
    edge, slow = (torch.empty((B, N, H), dtype=d, device=q.device) for d in (torch.int32, torch.int8))
    few, warps, registers = FACTORS[0]
    factors_kernel[(B * N * H,)](q, k, g, start, qs, ks, decay, edge, slow, scale, T, H, K, chunk,
                                 block or min(K, few), LIMIT[q.dtype], back, T % chunk == 0,
                                 3 if q.dtype == torch.float32 else 2, num_warps=warps,
                                 maxnreg=None if q.dtype == torch.float32 else registers)
    return Factors(qs, ks, decay, edge, slow)


def walk(made: Factors, w: Tensor, S: Tensor, each: int, save: bool, back: bool) -> tuple[Tensor, ...]:
    """y (backward dv), states before each chunk (after) and the states that segments end with, S (B, H, segments, K, V)
    those that they begin with."""
    B, T, H, V = w.shape
    K, N, chunk = S.shape[3], made.q.shape[1], made.q.shape[3]
    tile, warps, stages = WALK[0]
    BV = min(V, tile)
    read, add = (made.k, made.q) if back else (made.q, made.k)
    y, states, S_out = torch.empty_like(w), w.new_empty(B, N, H, K, V), torch.empty_like(S)
    walk_kernel[(B * H * S.shape[2] * (V // BV),)](
        read, add, w, made.decay, made.edge, made.slow, S, y, states, S_out, S, T, each, S.shape[2], B * N * H,
        H, K, V, chunk, BV, back, True, save, T % chunk == 0, stages, num_warps=warps, num_stages=stages)
    return y, states, S_out


def starts(made: Factors, w: Tensor, S: Tensor, each: int, back: bool) -> Tensor:
    """States (B, H, segments, K, V) that a row's segments of `each` chunks begin with, S the first (back: last)."""
    B, T, H, V = w.shape
    K, N, chunk = S.shape[2], made.q.shape[1], made.q.shape[3]
    count = cdiv(N, each)
    if count == 1:
        return S.unsqueeze(2)
    tile, warps, stages = SWEEP[0]
    BV = min(V, tile)
    out, left = S.new_empty(B, H, count, K, V), S.new_empty(B, H, count, K)
    add = made.q if back else made.k
    walk_kernel[(B * H * count * (V // BV),)](
        add, add, w, made.decay, made.edge, made.slow, S, w, w, out, left, T, each, count, B * N * H, H, K, V,
        chunk, BV, back, False, False, T % chunk == 0, stages, num_warps=warps, num_stages=stages)
    few = min(K, 16)
    fold_kernel[(B * H * K // few,)](out, left, S, count, K, V, few, back, num_warps=4)
    return out
