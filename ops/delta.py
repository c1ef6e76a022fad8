"""The delta rule (arXiv:2406.06484), with one decay per head (arXiv:2412.06464):

    S_t = exp(g_t) S_{t-1} + k_t u_t^T,   u_t = beta_t (v_t - k_t exp(g_t) S_{t-1}),   y_t = q_t S_t

Shapes: q, k (B, T, G, K), each for H / G neighbouring heads; v, y (B, T, H, V); g <= 0 and beta (B, T, H);
S (B, H, K, V); start (B, T) bool, true where a document begins and the state is emptied. Keys of norm 1 and beta in
[0, 2] keep the state bounded. Computed in the dtype of q; callers promote.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepladder.ops.chunks import check, cut, decay, join, share
from stepladder.ops.kernels import runs, unsound
from stepladder.ops.linear import promote
from stepladder.ops.step import matrix, steps

try:
    from stepladder.kernels import delta as kernels
    from stepladder.kernels import delta_backward as backward_kernels
except ModuleNotFoundError:     # without triton, which comes with torch for CUDA, the torch form runs
    kernels: Any = None
    backward_kernels: Any = None

CHUNK = 64
SIZES = (32, 64, 128, 256)     # of keys and values, that kernels have tiles for


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
            chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
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


def mix(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, start: Tensor, S: Tensor,
        dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The form for these tokens. Kernels compute in `dtype`, the torch forms as promoted; without g nothing decays."""
    T, K, V = v.shape[1], k.shape[3], v.shape[3]
    if steps(v, S, K, q, k, g, beta):
        return matrix(q, k, v, g, beta, start, S), S
    if T != 1 and runs("delta", v, dtype, unsound(dtype),
                       None if K in SIZES and V in SIZES else f"keys of {K} and values of {V}; sizes are {SIZES}"):
        return fused(q.to(dtype), k.to(dtype), v.to(dtype), g, beta, start, S)
    q, k, v = promote(q), promote(k), promote(v)
    g = torch.zeros_like(beta) if g is None else g
    return recurrent(q, k, v, g, beta, start, S) if T == 1 else chunked(q, k, v, g, beta, start, S)


def fused(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, start: Tensor, S: Tensor,
          chunk: int = CHUNK, length: int | None = None) -> tuple[Tensor, Tensor]:
    """The kernels: q, k, v of one dtype, S in fp32. Without g nothing decays.

    Segments of `length` chunks run side by side; how many there are follows from shapes where none is said.
    """
    check(q, k, v, beta.new_zeros(()).expand(v.shape[:3]) if g is None else g, start, S)
    if beta.shape != v.shape[:3]:
        raise ValueError(f"beta {(*beta.shape,)} does not go with values {(*v.shape,)}: one a token and head")
    save = torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (q, k, v, g, beta, S))
    q, k, v, beta, S, start = (z.contiguous() for z in (q, k, v, beta, S, start.view(torch.uint8)))
    g = None if g is None else g.contiguous()
    length = length or kernels.segment(v, q.shape[3], g is not None, chunk)
    y, S, *_ = _forward(q, k, v, g, beta, start, S, save, chunk, length)
    return y, S


@torch.library.custom_op("stepladder::delta", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, start: Tensor, S: Tensor, save: bool,
             chunk: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return kernels.forward(q, k, v, g, beta, start, S, save, chunk, length)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, start: Tensor, S: Tensor, save: bool,
      chunk: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, T, H, V), K = v.shape, q.shape[3]
    N = -(-T // chunk)
    A, P, edges = q.new_empty(B, H, N, chunk, chunk), q.new_empty(B, H, N, chunk, chunk), S.new_empty(2, B, H, N, chunk)
    w, states = (torch.empty_like(v), q.new_empty(B, H, N, K, V)) if save else (q.new_empty(0), q.new_empty(0))
    maps = S.new_empty(B, H, -(-N // length), K, K) if length < N else S.new_empty(0)
    return torch.empty_like(v), torch.empty_like(S), A, P, edges, w, states, maps


@torch.library.custom_op("stepladder::delta_backward", mutates_args=())
def _backward(q: Tensor, k: Tensor, g: Tensor | None, beta: Tensor, start: Tensor, A: Tensor, P: Tensor, edges: Tensor,
              w: Tensor, states: Tensor, maps: Tensor, dy: Tensor, dS: Tensor,
              length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward_kernels.backward(q, k, g, beta, start, A, P, edges, w, states, maps, dy.contiguous(),
                                     dS.contiguous(), length)


@_backward.register_fake
def _(q: Tensor, k: Tensor, g: Tensor | None, beta: Tensor, start: Tensor, A: Tensor, P: Tensor, edges: Tensor,
      w: Tensor, states: Tensor, maps: Tensor, dy: Tensor, dS: Tensor,
      length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = beta.new_empty(0) if g is None else torch.empty_like(g)
    dS = dS.new_empty(dS.shape)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(w), torch.empty_like(beta), dg, dS


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, g, beta, start, *_, ctx.length = inputs
    ctx.set_materialize_grads(False)        # what is saved beside y and S has none, and is large
    ctx.save_for_backward(q, k, g, beta, start, *output[2:])


def _gradients(ctx: Any, dy: Tensor | None, dS: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *inputs, w, states, maps = ctx.saved_tensors
    dy = torch.zeros_like(w) if dy is None else dy
    dS = torch.zeros_like(states[:, :, 0], dtype=torch.float32) if dS is None else dS
    dq, dk, dv, dbeta, dg, dS = _backward(*inputs, w, states, maps, dy, dS, ctx.length)
    return dq, dk, dv, None if inputs[2] is None else dg, dbeta, None, dS, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
