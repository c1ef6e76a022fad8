"""Gated linear recurrence (arXiv:2312.06635):  S_t = exp(g_t) S_{t-1} + k_t v_t^T,   y_t = q_t S_t.

Shapes: q, k, g (B, T, H, K); v, y (B, T, H, V); S (B, H, K, V); start (B, T) bool, true where a document begins and
the state is emptied. g <= 0 is a log decay. Everything is computed in the dtype of q; callers promote.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time. Every other form is tested against this one."""
    out = []
    for t in range(q.shape[1]):
        S = torch.where(start[:, t, None, None, None], 0.0, S)
        S = g[:, t].exp().unsqueeze(-1) * S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        out.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(out, 1), S


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor,
            chunk: int = 64) -> tuple[Tensor, Tensor]:
    """The same in T / chunk sequential steps; everything inside a chunk is matrix products.

    Inside a chunk the products are formed by halves: rows of a right half meet columns of its left half relative to
    the decay at the right half's first row, so both factors are exp of something <= 0. That is exact for any gate,
    where the usual q exp(b) (k exp(-b))^T overflows (specs of the chunkwise form: arXiv:2312.06635 section 4).
    Document borders are masks, not large negative decays, so they cost no precision.
    """
    B, T, H = q.shape[:3]
    V, C = v.shape[-1], min(chunk, 1 << max(T - 1, 1).bit_length())
    assert C & (C - 1) == 0, f"chunk {C} cannot be halved down to 1"
    pad = -T % C
    if pad:
        q, k, v, g = (F.pad(z, (0, 0, 0, 0, 0, pad)) for z in (q, k, v, g))
        start = F.pad(start, (0, pad))
    N = (T + pad) // C
    # (B, H, N, C, ...) from here on
    q, k, v, g = (z.unflatten(1, (N, C)).permute(0, 3, 1, 2, 4) for z in (q, k, v, g))
    doc = start.unflatten(1, (N, C)).cumsum(-1).unsqueeze(1)               # (B, 1, N, C) documents begun in this chunk
    b = g.cumsum(-2)                                                       # decay since the chunk began
    total = b[..., -1:, :]                                                 # (B, H, N, 1, K)

    first = (doc == 0).unsqueeze(-1)                                       # still the document the chunk came in with
    last = (doc == doc[..., -1:]).unsqueeze(-1)                            # the document the chunk goes out with
    keep = (total.exp() * first[..., -1:, :]).transpose(-1, -2)            # (B, H, N, K, 1) of the incoming state
    add = (k * ((total - b).exp() * last)).transpose(-1, -2) @ v           # (B, H, N, K, V)
    states = []
    for n in range(N):
        states.append(S)
        S = keep[:, :, n] * S + add[:, :, n]
    y = (q * (b.exp() * first)) @ torch.stack(states, 2) + (q * k).sum(-1, keepdim=True) * v

    half = C // 2
    while half:
        pairs = [z.unflatten(-2, (-1, 2, half)) for z in (q, k, v, b)]     # (B, H, N, P, 2, half, ...)
        (q1, k0, v0), (b0, b1) = (pairs[0][..., 1, :, :], *(z[..., 0, :, :] for z in pairs[1:3])), pairs[3].unbind(-3)
        here = b1[..., :1, :]
        A = (q1 * (b1 - here).exp()) @ (k0 * (here - b0).exp()).transpose(-1, -2)      # (B, H, N, P, half, half)
        d0, d1 = doc.unflatten(-1, (-1, 2, half)).unbind(-2)
        right = (A * (d1.unsqueeze(-1) == d0.unsqueeze(-2))) @ v0
        y = y + torch.stack([torch.zeros_like(right), right], -3).flatten(-4, -2)
        half //= 2
    return y.permute(0, 2, 3, 1, 4).reshape(B, T + pad, H, V)[:, :T], S
