"""Selective scan (arXiv:2312.00752): every channel has a small state whose entries decay at rates of their own.

    h_t = exp(dt_t A) h_{t-1} + dt_t v_t k_t,   y_t = q_t h_t      for each channel; the paper's B is k, its C is q

Shapes: q, k (B, T, N), the same for all channels; v, y and dt > 0 (B, T, D); A (D, N) < 0; h (B, D, N);
start (B, T) bool, true where a document begins and the state is emptied. Computed in the dtype of v; callers promote.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stepladder.ops.chunks import rows
from stepladder.ops.kernels import runs
from stepladder.ops.step import scan as step
from stepladder.ops.step import steps

try:
    from stepladder.kernels import scan as kernels
except ModuleNotFoundError:        # no triton: the torch form runs
    kernels: Any = None

ENTRIES = (4, 8, 16, 32)       # of a channel's state, that kernels have tiles for


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


def mix(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, h: Tensor,
        dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The fastest form there is. The kernel reads v in dtype, the layer's, and computes in fp32."""
    if steps(v, h, A.shape[1], q, k, dt, A):
        return step(q, k, v, dt, A, start, h), h
    if v.shape[1] == 1:
        return recurrent(q, k, v, dt, A, start, h)
    if runs("scan", v, dtype, None if A.shape[1] in ENTRIES else f"states of {A.shape[1]} entries"):
        return fused(q, k, v.to(dtype), dt, A, start, h)
    return chunked(q, k, v, dt, A, start, h)


def fused(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, h: Tensor,
          segments: int = 0) -> tuple[Tensor, Tensor]:
    """The same as a kernel: y in the dtype of v, h in fp32.

    segments of a row are walked side by side, at the cost of walking twice; 0: where there are too few channels.
    """
    check(q, k, v, dt, A, start, h)
    inputs = tuple(z.contiguous() for z in (q, k, v, dt, A, start, h.float()))
    save = torch.is_grad_enabled() and any(z.requires_grad for z in inputs)
    return _forward(*inputs, save, segments)[:2]


@torch.library.custom_op("stepladder::scan", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, h: Tensor, save: bool,
             segments: int) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.forward(q, k, v, dt, A, start, h, save, segments)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, h: Tensor, save: bool,
      segments: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = v.shape
    states = v.new_empty(B, -(-T // kernels.SAVED), A.shape[1], D) if save else v.new_empty(0)
    return torch.empty_like(v), torch.empty_like(h), states


@torch.library.custom_op("stepladder::scan_backward", mutates_args=())
def _backward(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, states: Tensor, dy: Tensor,
              dh: Tensor, segments: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, dt, A (fp32) and h."""
    return kernels.backward(q, k, v, dt, A, start, states, dy.contiguous(), dh.contiguous(), segments)


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, states: Tensor, dy: Tensor,
      dh: Tensor, segments: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, ddt = (torch.empty_like(z) for z in (q, k, v, dt))
    return dq, dk, dv, ddt, torch.empty_like(A, dtype=torch.float32), dh.new_empty(dh.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, h, _, ctx.segments = inputs
    ctx.set_materialize_grads(False)        # the saved states' would be as large as they are
    ctx.shape = h.shape
    ctx.save_for_backward(*tensors, output[2])


def _gradients(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, dt, A, start, states = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy
    dh = v.new_zeros(ctx.shape, dtype=torch.float32) if dh is None else dh
    dq, dk, dv, ddt, dA, dh = _backward(q, k, v, dt, A, start, states, dy, dh, ctx.segments)
    return dq, dk, dv, ddt, dA.to(A.dtype), None, dh, None, None


_forward.register_autograd(_gradients, setup_context=_save)
