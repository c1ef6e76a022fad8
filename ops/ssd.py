"""Linear recurrence with one decay per head (arXiv:2405.21060, arXiv:2307.08621):

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,   y_t = q_t S_t

Shapes: q, k (B, T, G, K), each for H / G neighbouring heads; v, y (B, T, H, V); g (B, T, H) <= 0; S (B, H, K, V);
start (B, T) bool, true where a document begins and the state is emptied. Computed in the dtype of q; callers promote.
"""
from __future__ import annotations

import torch
from torch import Tensor

from stepladder.ops.chunks import check, cut, decay, join, share


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time. Every other form is tested against this one."""
    check(q, k, v, g, start, S)
    q, k, out = share(q, v.shape[2]), share(k, v.shape[2]), [v[:, :0]]
    for t in range(q.shape[1]):
        S = torch.where(start[:, t, None, None, None], 0.0, S)
        S = g[:, t, :, None, None].exp() * S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        out.append((q[:, t].unsqueeze(-2) @ S).transpose(1, 2))
    return torch.cat(out, 1), S


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor,
            chunk: int = 64) -> tuple[Tensor, Tensor]:
    """The same in T / chunk sequential steps; everything inside a chunk is matrix products."""
    check(q, k, v, g, start, S)
    T, H = v.shape[1:3]
    C = min(chunk, max(T, 1))
    d = decay(g, start, C)
    q, k, v = cut(share(q, H), C), cut(share(k, H), C), cut(v, C)          # (B, H, N, C, ...)
    add = (k * d.until).mT @ v                                             # (B, H, N, K, V)
    states = [S]
    for n in range(add.shape[2]):
        states.append(d.keep[:, :, n] * states[-1] + add[:, :, n])
    before = torch.stack(states, 2)[:, :, :-1]
    return join((q * d.since) @ before + (q @ k.mT * d.within) @ v, T), states[-1]
