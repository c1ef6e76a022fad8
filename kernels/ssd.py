"""Linear recurrence with one decay per head, in chunks. Maths in ops/ssd.py.

Forward is one pass; backward is in ssd_backward.py. What a chunk's keys and queries say of one another is the same for
all heads of a group; only decays are a head's own.

STEP: values have a step each, which scales what they write, and reach their own token's output besides (skip), as in
Mamba-2. Steps scale pairs and what leaves for states, so no scaled values are made; nor are gradients of any.
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
    registers: int | None = None       # a thread, at most: several small blocks a processor hide each other's waiting


# The first of each runs; tests/bench/kernels.py measures all. What does not change in a loop is formed there again
# (disable_licm): kept in registers, it spilled up to 700 instructions for sm_90 at K = 128. _inside has stages for
# tiles of values, if there are several: with one, all addresses are constants, and ptxas 12.8 gets some wrong.
HALF: dict[str, tuple[Tiles, ...]] = {
    "forward": (Tiles(64, 4, 2), Tiles(32, 4, 2), Tiles(64, 4, 3)),
    "two": (Tiles(64, 8, 2), Tiles(64, 8, 3)),
    "reverse": (Tiles(64, 4, 3), Tiles(64, 4, 2), Tiles(32, 4, 3)),
    "inside": (Tiles(64, 4, 3), Tiles(64, 4, 2), Tiles(128, 4, 2)),
    "sides": (Tiles(128, 4, 1, 168), Tiles(128, 4, 2, 168), Tiles(128, 4, 1))}
SINGLE = Tiles(32, 8, 1)               # right, not fast: products of fp32 take three passes


@triton.jit
def gate_sums(g, valid, C: tl.constexpr, H: tl.constexpr):
    """Running sums of a chunk's gates for exp2, and their totals: multiples of 1/256, and what is left of each gate.

    The former add up exactly, so that differences of sums do not lose what small gates say after large ones.
    """
    x = tl.load(g + tl.arange(0, C) * H, mask=valid, other=0.0).to(tl.float32) * LOG2E
    x = tl.where(x < -256.0, -256.0, x)        # 2^-256 is 0: keeps sums exact, and -inf out of differences. NaN stays
    whole = tl.floor(x * 256.0) * 0.00390625
    rest = x - whole
    return tl.cumsum(whole, 0), tl.cumsum(rest, 0), tl.sum(whole, 0), tl.sum(rest, 0)


@triton.jit
def decay(mask, whole, rest):
    """2^(whole + rest), 0 where masked: before the power, which may overflow there."""
    return tl.exp2(tl.where(mask, whole + rest, float("-inf")))


@triton.jit
def chunk_of(doc, b, c, T, C: tl.constexpr):
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
def offsets(rows: tl.constexpr, columns: tl.constexpr, stride: tl.constexpr):
    """Offsets in a matrix."""
    return tl.arange(0, rows)[:, None] * stride + tl.arange(0, columns)[None, :]


@triton.jit
def _walk(S, A, bq, bk, v, g, step, skip, y, states, valid, here, before, last, H: tl.constexpr, V: tl.constexpr,
          SAVE: tl.constexpr, ENDS: tl.constexpr, STEP: tl.constexpr):
    """One head over one chunk: the state after it, and how much of that before it is kept."""
    C: tl.constexpr = bk.shape[0]
    K: tl.constexpr = bk.shape[1]
    BV: tl.constexpr = S.shape[1]
    r, at = tl.arange(0, C), offsets(C, BV, H * V)
    bv = tl.load(v + at, mask=valid[:, None], other=0.0)
    whole, rest, all_whole, all_rest = gate_sums(g, valid, C, H)
    wrote = rest                               # a key's step is one more term of its exponents: no more products
    if STEP:
        wrote -= tl.log2(tl.load(step + r * H, mask=valid, other=0.0))
    if not ENDS:
        Sb = S.to(bk.dtype)
        if SAVE:
            tl.store(states + offsets(K, BV, V), Sb)
        within = (here[:, None] == here[None, :]) & (r[:, None] >= r[None, :])
        P = A * decay(within, whole[:, None] - whole[None, :], rest[:, None] - wrote[None, :])
        if STEP:
            P = tl.where(r[:, None] == r[None, :], P + tl.load(skip), P)
        out = dot(bq, Sb) * decay(here == before, whole, rest)[:, None]
        tl.store(y + at, dot(P.to(bk.dtype), bv, out).to(bv.dtype), mask=valid[:, None])
    until = decay(here == last, all_whole - whole, all_rest - wrote)
    keep = decay(last == before, all_whole, all_rest)
    return dot(tl.trans(bk), (bv * until[:, None]).to(bk.dtype), S * keep), keep


@triton.jit(do_not_specialize=["T", "per"])      # rows of any length run what one of them compiled
def _forward(q, k, v, g, step, skip, doc, S0, ends, decays, y, states, S1, T, per, G: tl.constexpr, H: tl.constexpr,
             K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, TWO: tl.constexpr,
             SAVE: tl.constexpr, ENDS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr):
    """A segment of `per` chunks of one head, or of two. ENDS: from nothing, for its last state and decay alone."""
    b, s, tiles = tl.program_id(1), tl.program_id(2), V // BV
    head, left = tl.program_id(0) // tiles * (2 if TWO else 1), tl.program_id(0) % tiles * BV
    group, chunks, tile = head // (H // G), tl.cdiv(T, C), offsets(K, BV, V)
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
        first, valid, here, before, last = chunk_of(doc, b, c, T, C)
        at = (first * G + group) * K
        bq = tl.load(q + at + offsets(C, K, G * K), mask=valid[:, None], other=0.0)
        bk = tl.load(k + at + offsets(C, K, G * K), mask=valid[:, None], other=0.0)
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
