"""Rows cut into chunks, and one decay per head inside them: what chunked forms share."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor) -> None:
    """Raises ValueError for shapes that do not belong together, and for growing gates where looking costs no sync."""
    B, T, H, V = v.shape
    if q.shape != k.shape or q.shape[:2] != (B, T) or H % q.shape[2]:
        raise ValueError(f"queries {(*q.shape,)} and keys {(*k.shape,)} do not go with values {(*v.shape,)}: rows and "
                         "tokens must be the same, and the heads of the values a multiple of theirs")
    if start.shape != (B, T) or g.shape != (B, T, H):
        raise ValueError(f"borders {(*start.shape,)} and gates {(*g.shape,)} do not go with {B} rows of {T} tokens and "
                         f"{H} heads; give {(B, T)} and {(B, T, H)}")
    if S.shape != (B, H, q.shape[3], V):
        raise ValueError(f"the state is {(*S.shape,)}, but these tokens need {(B, H, q.shape[3], V)}; a state is "
                         "made by the begin() of the mixer that steps on it")
    if not g.is_cuda and not torch.compiler.is_compiling() and bool((g > 0).any()):
        raise ValueError(f"a gate is {float(g.max()):.3g} > 0: gates are log decays, and the state would grow without "
                         "bound; take -softplus or logsigmoid of what is projected")


def share(z: Tensor, H: int) -> Tensor:
    """z (B, T, G, K) -> (B, T, H, K): every H / G neighbouring heads use the same."""
    return z if z.shape[2] == H else z.repeat_interleave(H // z.shape[2], 2)


def rows(z: Tensor, C: int) -> Tensor:
    """(B, T, ...) -> (B, N, C, ...), the last chunk filled up with zeros."""
    return F.pad(z.movedim(1, -1), (0, -z.shape[1] % C)).movedim(-1, 1).unflatten(1, (-1, C))


def cut(z: Tensor, C: int) -> Tensor:
    """(B, T, H, ...) -> (B, H, N, C, ...)"""
    return rows(z, C).movedim(3, 1)


def join(y: Tensor, T: int) -> Tensor:
    """(B, H, N, C, V) -> (B, T, H, V)"""
    return y.movedim(1, 3).flatten(1, 2)[:, :T]


class Decay(NamedTuple):
    """Products of exp(g) inside chunks. Another document's tokens have 0: borders are masks, not large gates.

    0 NaN is NaN: what is not finite in one document reaches the others of its row.
    """
    within: Tensor     # (B, H, N, C, C) from after token j up to token i >= j
    since: Tensor      # (B, H, N, C, 1) of the state that comes in, up to token i
    until: Tensor      # (B, H, N, C, 1) from after token j to the chunk's end
    keep: Tensor       # (B, H, N, 1, 1) of the state that comes in, to the chunk's end


def decay(g: Tensor, start: Tensor, C: int) -> Decay:
    """g (B, T, H) <= 0, start (B, T).

    Each sum of gates is taken by itself: a difference of two running sums loses what small gates say after large ones.
    """
    g = cut(g, C)                                                          # (B, H, N, C)
    doc = cut(start.unsqueeze(2), C).cumsum(-1)                            # (B, 1, N, C) documents begun in this chunk
    same = (doc.unsqueeze(-1) == doc.unsqueeze(-2)).tril()
    within = g.unsqueeze(-1).expand(*g.shape, C).tril(-1).cumsum(-2).exp() * same
    since = (g.cumsum(-1).exp() * (doc == 0)).unsqueeze(-1)
    return Decay(within, since, within[..., -1, :].unsqueeze(-1), since[..., -1:, :])
