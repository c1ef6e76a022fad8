"""The delta rule, forward: what tokens of a chunk do to one another, then states and outputs from chunk to chunk.

With w_t = v_t - k_t exp(g_t) S_{t-1}, so that u_t = beta_t w_t, a chunk of the state S is

    (I + N) w = v - since * (k S)    N_ij = D_ij beta_j k_i.k_j for j < i; A = (I + N)^-1
    y = since * (q S) + P w          P_ij = D_ij beta_j q_i.k_j for j <= i
    S' = keep S + k^T (until * w)    D_ij decay from token j to i, since_i and keep from the chunk's start to i and to
                                     its end, until_j beta_j times that from j to the end

Documents are masks, never gates, and stay with gates and beta in the first kernel: the loop over chunks knows of none.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import LOG2E, cdiv, dot, power, processors

# Columns of the state, warps, stages, by the size of keys; the first is taken, the others are what a bench may try.
# One stage is not among them: without buffers to step through, all addresses of operands are constants, and ptxas 12.8
# takes some of them from wrong registers. Four warps multiply 64 rows, eight 128.
ACROSS = {
    64: [(64, 4, 2), (64, 4, 3)],
    128: [(64, 4, 2), (128, 8, 3), (128, 8, 2)],
    256: [(32, 8, 2)],
}
FLOOR = tl.constexpr(-1e5)    # exp2 of it is 0, and differences of sums of it are no NaN, as those of -inf would be


@triton.jit
def _add(begun1, sum1, rest1, begun2, sum2, rest2):
    """Two-sum: what rounding takes from a sum is kept beside it. Documents are counted on the way."""
    total = sum1 + sum2
    part = total - sum1
    return begun1 + begun2, total, rest1 + rest2 + ((sum1 - (total - part)) + (sum2 - part))


@triton.jit
def decays(g, start, b, h, c, T, H, C: tl.constexpr, GATED: tl.constexpr):
    """D (C, C), since and until (C,). -1 in since: the token is of a document that began in this chunk.

    Above the diagonal D may be infinite: what is there is to be left out, not multiplied by 0.
    Sums of gates are pairs of numbers: a difference of two would lose what small gates say after large ones.
    Tokens beyond the row go on with its last document and do not decay, so since ends with what the state keeps.
    """
    r = tl.arange(0, C)
    at = b.to(tl.int64) * T + c * C + r
    begun = tl.load(start + at, mask=c * C + r < T, other=0).to(tl.int32)
    if GATED:
        x = tl.load(g + at * H + h, mask=c * C + r < T, other=0.0).to(tl.float32) * LOG2E
        x = tl.where(x < FLOOR, FLOOR, x)
        begun, s, rest = tl.associative_scan((begun, x, tl.zeros_like(x)), 0, _add)
    else:
        begun = tl.cumsum(begun, 0)
    same, last = begun[:, None] == begun[None, :], begun == tl.max(begun, 0)
    if GATED:
        D = tl.exp2((s[:, None] - s[None, :]) + (rest[:, None] - rest[None, :]))
        end = tl.sum(tl.where(r == C - 1, s, 0.0), 0)
        end_rest = tl.sum(tl.where(r == C - 1, rest, 0.0), 0)
        return (tl.where(same, D, 0.0), tl.where(begun == 0, tl.exp2(s + rest), -1.0),
                tl.where(last, tl.exp2((end - s) + (end_rest - rest)), 0.0))
    return same.to(tl.float32), tl.where(begun == 0, 1.0, -1.0), last.to(tl.float32)


@triton.jit(do_not_specialize=["T"])      # rows of any length run what one of them compiled
def _inside(q, k, g, beta, start, A, P, edges, T, H, G, K: tl.constexpr, C: tl.constexpr, GATED: tl.constexpr,
            EVEN: tl.constexpr, LEVELS: tl.constexpr, INNER: tl.constexpr):
    c, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    r, n = tl.arange(0, C), tl.arange(0, K)
    ok = (c * C + r < T) | EVEN
    row = b.to(tl.int64) * T + c * C + r
    rows = (row * G + h // (H // G))[:, None] * K + n[None, :]
    kt = tl.load(k + rows, mask=ok[:, None], other=0.0)
    strength = tl.load(beta + row * H + h, mask=ok, other=0.0).to(tl.float32)
    D, since, until = decays(g, start, b, h, c, T, H, C, GATED)
    D *= strength[None, :]
    at = (bh.to(tl.int64) * tl.num_programs(0) + c) * C
    tl.store(edges + at + r, since)
    tl.store(edges + tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * C + at + r, until * strength)
    i, j = r[:, None], r[None, :]
    tile = (at + i) * C + j
    qt = tl.load(q + rows, mask=ok[:, None], other=0.0)
    tl.store(P + tile, tl.where(i >= j, D * dot(qt, tl.trans(kt)), 0.0).to(P.dtype.element_ty))
    N = (D * dot(kt, tl.trans(kt))).to(INNER)
    X = tl.where(i == j, 1.0, 0.0).to(INNER)
    # Blocks of the diagonal are inverted, then pairs of them joined: [[X1, 0], [-X2 N21 X1, X2]]. Whatever is formed
    # is bounded by beta, so fp16 does, and each number once: powers of N, a Neumann series, would grow like binomial
    # coefficients.
    for level in tl.static_range(LEVELS):
        corner = (i >> level + 1 == j >> level + 1) & (i >> level > j >> level)
        below = tl.where(corner, N, 0.0).to(INNER)
        if level == 0:
            X -= below
        else:
            X -= dot(X, dot(below, X).to(INNER)).to(INNER)
    tl.store(A + tile, X.to(A.dtype.element_ty))


@triton.jit
def edges_of(edges, bh, c, NT, C: tl.constexpr):
    """since, until (C,) and keep of a chunk; negative since and keep stand for a border between documents."""
    at = (bh.to(tl.int64) * NT + c) * C
    r = tl.arange(0, C)
    until = tl.load(edges + tl.num_programs(1).to(tl.int64) * NT * C + at + r)
    return tl.load(edges + at + r), until, tl.load(edges + at + C - 1)


@triton.jit
def reach(edges, bh, begin, end, NT, C: tl.constexpr, SPAN: tl.constexpr, REVERSE: tl.constexpr):
    """The first chunk that the state at `end` remembers, or (REVERSE) the last that remembers the state at `begin`."""
    c = tl.arange(0, SPAN)
    keep = tl.load(edges + (bh.to(tl.int64) * NT + begin + c) * C + C - 1, mask=c < end - begin, other=1.0)
    left = tl.cumsum(tl.where(keep <= 0, FLOOR, tl.log2(tl.where(keep <= 0, 1.0, keep))), 0, reverse=not REVERSE)
    forgotten = left < -24         # below what fp32 sees beside it
    if REVERSE:
        return begin + tl.min(tl.where(forgotten, c, end - begin - 1), 0)
    return begin + tl.max(tl.where(forgotten, c, 0), 0)


@triton.jit(do_not_specialize=["T", "NT", "length"])
def _across(q, k, v, A, P, edges, before, y, w, states, after, T, NT, length, H, G, K: tl.constexpr,
            V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, MAP: tl.constexpr, SAVE: tl.constexpr,
            EVEN: tl.constexpr, STAGES: tl.constexpr, SPAN: tl.constexpr):
    """MAP: not y, but what each segment makes of an empty state, and, in K more columns, of the unit matrix.

    Values are rows here, of the state too: what one product leaves in registers is then the left operand of the next.
    States are turned as they are written, which costs less than in the kernel that reads them.
    """
    bh, segment = tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    r, n, m = tl.arange(0, C), tl.arange(0, K), tl.program_id(0) * BV + tl.arange(0, BV)
    state = n[None, :] * (V + K if MAP else V) + m[:, None]
    at = (bh.to(tl.int64) * tl.num_programs(2) + segment) * K * (V + K if MAP else V) + state
    begin = segment * length
    end = tl.minimum(begin + length, NT)
    if MAP:
        begin = reach(edges, bh, begin, end, NT, C, SPAN, False)
        S = tl.where(n[None, :] == m[:, None] - V, 1.0, 0.0)
    else:
        S = tl.load(before + at)
    for c in tl.range(begin, end, num_stages=STAGES):
        ok = (c * C + r < T) | EVEN
        row = b.to(tl.int64) * T + c * C + r
        keys = (row * G + h // (H // G))[:, None] * K + n[None, :]
        values = (row * H + h)[None, :] * V + m[:, None]
        chunk = bh.to(tl.int64) * NT + c
        tile = chunk * C * C + r[:, None] * C + r[None, :]
        kt = tl.load(k + keys, mask=ok[:, None], other=0.0)
        vt = tl.load(v + values, mask=ok[None, :] & (m < V)[:, None] if MAP else ok[None, :], other=0.0)
        since, until, keep = edges_of(edges, bh, c, NT, C)
        Sb = S.to(kt.dtype)
        if SAVE:
            tl.store(states + chunk * K * V + state, Sb)
        # Where a document began the state is left out, not multiplied by 0: it may be NaN.
        error = vt.to(tl.float32) - tl.where(since[None, :] < 0, 0.0, dot(Sb, tl.trans(kt)) * since[None, :])
        wt = dot(error.to(kt.dtype), tl.trans(tl.load(A + tile)))
        if not MAP:
            qt = tl.load(q + keys, mask=ok[:, None], other=0.0)
            out = tl.where(since[None, :] < 0, 0.0, dot(Sb, tl.trans(qt)) * since[None, :])
            out = dot(wt.to(kt.dtype), tl.trans(tl.load(P + tile)), out)
            tl.store(y + values, out.to(kt.dtype), mask=ok[None, :])
        S = dot((wt * until[None, :]).to(kt.dtype), kt, tl.where(keep < 0, 0.0, S * keep))
        if SAVE:
            tl.store(w + values, wt.to(kt.dtype), mask=ok[None, :])
    tl.store(after + at, S)


def fit(table: dict[int, list[tuple[int, int, int]]], K: int, V: int) -> tuple[int, int, int]:
    columns, warps, stages = table[max(K, 64)][0]
    columns = min(columns, K, V)
    return columns, warps if columns >= 64 else 8, stages       # 32 rows are no warp group's: others multiply them


def segment(v: Tensor, K: int, gated: bool, chunk: int) -> int:
    """Chunks of a row that one program walks: all of them, where tiles of states alone keep the GPU busy.

    What a segment does to the state before it costs as much as its outputs, unless gates let it forget that state.
    Of cut rows there are no more programs than run at once, two on a processor: a second round would be nearly empty.
    """
    B, T, H, V = v.shape
    NT, tiles = cdiv(T, chunk), B * H * V // fit(ACROSS, K, V)[0]
    if tiles >= processors(v) // (1 if gated else 2):
        return NT
    return max(8, cdiv(NT, 2 * processors(v) // tiles))


class Forward(NamedTuple):
    y: Tensor             # (B, T, H, V)
    S: Tensor             # (B, H, K, V) fp32
    A: Tensor             # (B, H, N, C, C)
    P: Tensor             # (B, H, N, C, C)
    edges: Tensor         # (2, B, H, N, C) fp32: since and until
    w: Tensor             # (B, T, H, V)
    states: Tensor        # (B, H, N, K, V) before each chunk
    maps: Tensor          # (B, H, segments, K, K) fp32: what each segment does to the state before it


def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, start: Tensor, S: Tensor,
            save: bool, chunk: int, length: int) -> Forward:
    """q, k (B, T, G, K), v (B, T, H, V) of one 16-bit type or fp32, g (none: no decay) and beta (B, T, H), start (B, T)
    uint8, 1 where a document begins, S (B, H, K, V) fp32, all contiguous. Without save, w and states are empty.
    Segments of `length` chunks run side by side; maps are empty where there is one."""
    B, T, H, V = v.shape
    G, K, NT, C, even = q.shape[2], q.shape[3], cdiv(T, chunk), chunk, T % chunk == 0
    A, P = q.new_empty(B, H, NT, C, C), q.new_empty(B, H, NT, C, C)
    edges, y = S.new_empty(2, B, H, NT, C), torch.empty_like(v)
    w, states = (torch.empty_like(v), q.new_empty(B, H, NT, K, V)) if save else (v.new_empty(0), v.new_empty(0))
    single = q.dtype == torch.float32
    # 128 registers: four programs a processor. With those of three, a seventh slower; with those of five, twice.
    _inside[NT, B * H](q, k, beta if g is None else g, beta, start, A, P, edges, T, H, G, K, C, g is not None, even,
                       C.bit_length() - 1, tl.float32 if single else tl.float16, num_warps=4,
                       maxnreg=None if single else 128)
    BV, warps, stages = fit(ACROSS, K, V)
    segments = cdiv(NT, length)
    common = (T, NT, length, H, G, K, V, C, BV)
    before, maps = S, S.new_empty(0)
    if segments > 1:
        made = S.new_empty(B, H, segments, K, V + K)
        _across[(V + K) // BV, B * H, segments](q, k, v, A, P, edges, S, y, w, states, made, *common, True, False, even,
                                                stages, power(length), num_warps=warps)
        adds, maps = made[..., :V], made[..., V:].contiguous()
        starts = [S]
        for i in range(segments - 1):
            starts.append(maps[:, :, i] @ starts[-1] + adds[:, :, i])
        before = torch.stack(starts, 2)
    after = torch.empty_like(before)
    _across[V // BV, B * H, segments](q, k, v, A, P, edges, before, y, w, states, after, *common, False, save, even,
                                      stages, 1, num_warps=warps)
    return Forward(y, after[:, :, -1].contiguous() if segments > 1 else after, A, P, edges, w, states, maps)
