"""The delta rule (arXiv:2406.06484), with one decay per head (arXiv:2412.06464):

    S_t = exp(g_t) S_{t-1} + k_t u_t^T,   u_t = beta_t (v_t - k_t exp(g_t) S_{t-1}),   y_t = q_t S_t

Shapes: q, k (B, T, G, K), each for H / G neighbouring heads; v, y (B, T, H, V); g <= 0 and beta (B, T, H);
S (B, H, K, V); start (B, T) bool, true where a document begins and the state is emptied. Keys of norm 1 and beta in
[0, 2] keep the state bounded. Computed in the dtype of q; callers promote.
"""
from __future__ import annotations

import torch
from torch import Tensor

from stepladder.ops.chunks import check, cut, decay, join, share


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, start: Tensor,
              S: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time. Every other form is tested against this one."""
    check(q, k, v, g, start, S)
    q, k, out = share(q, v.shape[2]), share(k, v.shape[2]), [v[:, :0]]
    for t in range(q.shape[1]):
        S = torch.where(start[:, t, None, None, None], 0.0, S) * g[:, t, :, None, None].exp()
        u = beta[:, t].unsqueeze(-1) * (v[:, t] - (k[:, t].unsqueeze(-2) @ S).squeeze(-2))
        S = S + k[:, t].unsqueeze(-1) * u.unsqueeze(-2)
        out.append((q[:, t].unsqueeze(-2) @ S).transpose(1, 2))
    return torch.cat(out, 1), S


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, start: Tensor, S: Tensor,
            chunk: int = 64) -> tuple[Tensor, Tensor]:
    """The same in T / chunk sequential steps; everything inside a chunk is matrix products and one triangular inverse.

    The inverse needs no gates: decays and borders are a similarity, (I + L * D)^-1 = D * (I + L)^-1 elementwise for
    D_ij = exp(g_{j+1} + ... + g_i), so keys and beta alone decide how well it is conditioned.
    """
    check(q, k, v, g, start, S)
    T, H = v.shape[1:3]
    C = min(chunk, max(T, 1))
    d = decay(g, start, C)
    q, k, v, beta = cut(share(q, H), C), cut(share(k, H), C), cut(v, C), cut(beta, C)      # (B, H, N, C, ...)
    eye = torch.eye(C, dtype=k.dtype, device=k.device)
    L = (beta.unsqueeze(-1) * (k @ k.mT)).tril(-1)
    solve = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False, unitriangular=True)
    solve = solve * beta.unsqueeze(-2) * d.within                          # (B, H, N, C, C)
    u, w = solve @ v, solve @ (k * d.since)                                # u of the definition is u - w S
    out = (k * d.until).mT                                                 # (B, H, N, K, C)
    move, add = d.keep * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - out @ w, out @ u
    states = [S]
    for n in range(add.shape[2]):
        states.append(move[:, :, n] @ states[-1] + add[:, :, n])
    before = torch.stack(states, 2)[:, :, :-1]
    return join((q * d.since) @ before + (q @ k.mT * d.within) @ (u - w @ before), T), states[-1]
