"""Sums over a warp's lanes of several numbers at once: of two, a lane gives one away and has the sum of the other left.

That halves them with every exchange: three numbers are exchanged for four sums over four lanes, where to add up each by
itself takes eight. Lanes are counted as triton lays tiles (E, R, 4, 8) out: four along entries, eight along channels.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def apart(x):
    """The K numbers that each lane has of x (K, 4, 8), as tensors (32)."""
    K: tl.constexpr = x.shape[0]
    x = tl.reshape(tl.permute(x, [2, 1, 0]), [32, K])
    if K == 1:
        return (tl.reshape(x, [32]),)
    elif K == 2:
        return tl.split(x)
    elif K == 4:
        a, b = tl.split(tl.reshape(x, [32, 2, 2]))
        a, c = tl.split(a)
        b, d = tl.split(b)
        return a, b, c, d
    else:
        a, b = tl.split(tl.reshape(x, [32, 4, 2]))
        a, c = tl.split(tl.reshape(a, [32, 2, 2]))
        b, d = tl.split(tl.reshape(b, [32, 2, 2]))
        a, e = tl.split(a)
        b, f = tl.split(b)
        c, g = tl.split(c)
        d, h = tl.split(d)
        return a, b, c, d, e, f, g, h


@triton.jit
def exchange(x, lane, BIT: tl.constexpr):
    """Sums over two lanes whose numbers differ by BIT: each is left with every second tensor, or the only one."""
    other, up, out = lane ^ BIT, lane & BIT != 0, ()
    if len(x) == 1:
        out += (x[0] + tl.gather(x[0], other, 0),)
    else:
        for i in tl.static_range(0, len(x), 2):
            out += (tl.where(up, x[i + 1], x[i]) + tl.gather(tl.where(up, x[i], x[i + 1]), other, 0),)
    return out


@triton.jit
def over_entries(x, lane):
    """Sums of x (E, R, 4, 8) over entries: a lane's is that of channel lane % R."""
    return exchange(exchange(apart(tl.sum(x, 0)), lane, 1), lane, 2)[0]


@triton.jit
def over_channels(x, lane):
    """Sums of x (E, R, 4, 8) over channels, until a lane has one, that of entry lane // 4 % E; over_tokens goes on."""
    x = apart(tl.sum(x, 1))
    if len(x) > 1:
        x = exchange(x, lane, 4)
    if len(x) > 1:
        x = exchange(x, lane, 8)
    if len(x) > 1:
        x = exchange(x, lane, 16)
    return x


@triton.jit
def over_tokens(x, lane, E: tl.constexpr):
    """What over_channels left of some tokens, over all channels: a lane's is that of token lane // 4 // E."""
    if E <= 1:
        x = exchange(x, lane, 4)
    if E <= 2:
        x = exchange(x, lane, 8)
    if E <= 4:
        x = exchange(x, lane, 16)
    return x[0]
