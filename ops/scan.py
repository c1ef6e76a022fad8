"""Selective scan (arXiv:2312.00752): every channel has a small state whose entries decay at rates of their own.

    h_t = exp(dt_t A) h_{t-1} + dt_t v_t k_t,   y_t = q_t h_t      for each channel; the paper's B is k, its C is q

Shapes: q, k (B, T, N), the same for all channels; v, y and dt > 0 (B, T, D); A (D, N) < 0; h (B, D, N);
start (B, T) bool, true where a document begins and the state is emptied. Computed in the dtype of v; callers promote.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from stepladder.ops.chunks import rows


def check(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, h: Tensor) -> None:
    """Raises ValueError for shapes that do not belong together, and for growing states where looking costs no sync."""
    (B, T, D), N = v.shape, A.shape[1]
    if dt.shape != v.shape or A.shape[0] != D or not q.shape == k.shape == (B, T, N):
        raise ValueError(f"values {(*v.shape,)}, steps {(*dt.shape,)}, rates {(*A.shape,)}, q {(*q.shape,)} and k "
                         f"{(*k.shape,)} do not go together: they are (B, T, D), (B, T, D), (D, N) and (B, T, N)")
    if start.shape != (B, T):
        raise ValueError(f"borders {(*start.shape,)} do not go with {B} rows of {T} tokens; give {(B, T)}")
    if h.shape != (B, D, N):
        raise ValueError(f"the state is {(*h.shape,)}, but these tokens need {(B, D, N)}; a state is made by the "
                         "begin() of the mixer that steps on it")
    if not v.is_cuda and not torch.compiler.is_compiling() and bool((A > 0).any() | (dt < 0).any()):
        raise ValueError(f"a rate is {float(A.max()):.3g} and a step {float(dt.min()) if T else 0:.3g}: the state "
                         "would grow without bound; rates are -exp of what is learned, steps a softplus")


def recurrent(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor,
              h: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time. Every other form is tested against this one."""
    check(q, k, v, dt, A, start, h)
    out = [v[:, :0]]
    for t in range(v.shape[1]):
        h = torch.where(start[:, t, None, None], 0.0, h)
        h = (dt[:, t].unsqueeze(-1) * A).exp() * h + (dt[:, t] * v[:, t]).unsqueeze(-1) * k[:, t].unsqueeze(1)
        out.append((h @ q[:, t].unsqueeze(-1)).mT)
    return torch.cat(out, 1), h


def chunked(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, h: Tensor,
            chunk: int = 0) -> tuple[Tensor, Tensor]:
    """The same in chunk + T / chunk sequential steps: all chunks walk their tokens at once, then hand on their states.

    There is no form in matrix products: the decay differs by channel and entry. chunk = 0: the square root of T.
    """
    check(q, k, v, dt, A, start, h)
    T = v.shape[1]
    C = chunk or math.isqrt(max(T - 1, 0)) + 1
    q, k, v, dt, fresh = (rows(z, C) for z in (q, k, v, dt, start))        # (B, N, C, ...)
    move = (dt.unsqueeze(-1) * A).exp() * ~fresh[..., None, None]          # (B, N, C, D, N)
    add = (dt * v).unsqueeze(-1) * k.unsqueeze(-2)
    alone, passed = [add[:, :, 0]], [move[:, :, 0]]                        # from zero; what is left of what came in
    for t in range(1, C):
        alone.append(move[:, :, t] * alone[-1] + add[:, :, t])
        passed.append(move[:, :, t] * passed[-1])
    before = [h]
    for n in range(v.shape[1]):
        before.append(passed[-1][:, n] * before[-1] + alone[-1][:, n])
    states = torch.stack(alone, 2) + torch.stack(passed, 2) * torch.stack(before, 1)[:, :-1].unsqueeze(2)
    return (states @ q.unsqueeze(-1)).squeeze(-1).flatten(1, 2)[:, :T], before[-1]
