"""Linear recurrence with one decay per head (arXiv:2405.21060, arXiv:2307.08621):

    S_t = exp(g_t) S_{t-1} + dt_t k_t v_t^T,   y_t = q_t S_t + D v_t

Shapes: q, k (B, T, G, K), each for H / G neighbouring heads; v, y (B, T, H, V); g (B, T, H) <= 0; S (B, H, K, V);
dt (B, T, H) >= 0 and D (H,), which are given both or neither: 1 and 0; below 0 the kernel, which takes logarithms of
steps, gives NaN. It rounds D to the type of q, as weights of products are;
start (B, T) bool, true where a document begins and the state is emptied. Computed in the dtype of q; callers promote.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepladder.ops.chunks import check, cut, decay, join, share
from stepladder.ops.kernels import runs
from stepladder.ops.linear import promote
from stepladder.ops.step import matrix, steps

try:
    from stepladder.kernels import ssd as kernels
    from stepladder.kernels import ssd_backward as backward_kernels
except ModuleNotFoundError:        # no triton: the torch form runs
    kernels: Any = None
    backward_kernels: Any = None


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor, dt: Tensor | None = None,
              D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time. Every other form is tested against this one."""
    check(q, k, v, g, start, S)
    add = stepped(v, dt, D)
    q, k, out = share(q, v.shape[2]), share(k, v.shape[2]), [v[:, :0]]
    for t in range(q.shape[1]):
        S = torch.where(start[:, t, None, None, None], 0.0, S)
        S = g[:, t, :, None, None].exp() * S + k[:, t].unsqueeze(-1) * add[:, t].unsqueeze(-2)
        out.append((q[:, t].unsqueeze(-2) @ S).transpose(1, 2))
    return skipped(torch.cat(out, 1), v, D), S


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor, dt: Tensor | None = None,
            D: Tensor | None = None, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """The same in T / chunk sequential steps; everything inside a chunk is matrix products."""
    check(q, k, v, g, start, S)
    T, H = v.shape[1:3]
    C = min(chunk, max(T, 1))
    d = decay(g, start, C)
    u = stepped(v, dt, D)
    q, k, u = cut(share(q, H), C), cut(share(k, H), C), cut(u, C)          # (B, H, N, C, ...)
    add = (k * d.until).mT @ u                                             # (B, H, N, K, V)
    states = [S]
    for n in range(add.shape[2]):
        states.append(d.keep[:, :, n] * states[-1] + add[:, :, n])
    before = torch.stack(states, 2)[:, :, :-1]
    return skipped(join((q * d.since) @ before + (q @ k.mT * d.within) @ u, T), v, D), states[-1]


def check_steps(v: Tensor, dt: Tensor | None, D: Tensor | None) -> None:
    """Raises ValueError where dt and D do not go with values: kernels would read beyond them."""
    given = [None if z is None else (*z.shape,) for z in (dt, D)]
    if given not in ([None, None], [v.shape[:3], v.shape[2:3]]):
        raise ValueError(f"dt {given[0]} and D {given[1]} do not go with values {(*v.shape,)}: give both or neither, a "
                         "step for each token and head and a number for each head")


def stepped(v: Tensor, dt: Tensor | None, D: Tensor | None) -> Tensor:
    """What values write."""
    check_steps(v, dt, D)
    return v if dt is None else v * dt.unsqueeze(-1)


def skipped(y: Tensor, v: Tensor, D: Tensor | None) -> Tensor:
    """y, with what of values reaches their own token's output besides."""
    return y if D is None else y + v * D.unsqueeze(-1)


def mix(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor, dtype: torch.dtype,
        dt: Tensor | None = None, D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The fastest form there is. The kernel takes q, k and v in dtype, the layer's, and adds up in fp32."""
    if steps(v, S, q.shape[3], q, k, g, dt, D):
        return skipped(matrix(q, k, stepped(v, dt, D), g, None, start, S), v, D), S
    if v.shape[1] != 1 and runs("ssd", v, dtype, uncovered(q, v, dtype)):
        return fused(q.to(dtype), k.to(dtype), v.to(dtype), g, start, S, dt, D)
    form = recurrent if v.shape[1] == 1 else chunked
    return form(promote(q), promote(k), promote(v), g, start, S, dt, D)


def uncovered(q: Tensor, v: Tensor, dtype: torch.dtype) -> str | None:
    """What the kernel has no answer to, if anything. Of one tile of 16 or 32 values and long keys ptxas 12.8 makes
    wrong code (tests/hazards.py)."""
    V, K = v.shape[3], q.shape[3]
    said = {f"{dtype}": dtype not in (torch.bfloat16, torch.float16),
            f"keys of {K} channels": K not in (16, 32, 64, 128), f"values of {V} channels": V % 16 > 0 or V < 48}
    return next((words for words, true in said.items() if true), None)


def fused(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor, dt: Tensor | None = None,
          D: Tensor | None = None, chunk: int = 64, segments: int = 0) -> tuple[Tensor, Tensor]:
    """The same as a kernel: q, k, v and y of one 16-bit type or fp32, g of any, S, dt and D fp32.

    segments of a row are walked side by side, at the cost of walking twice; 0: where there are too few rows and heads.
    """
    check(q, k, v, g, start, S)
    check_steps(v, dt, D)
    q, k, v, g = (z.contiguous() for z in (q, k, v, g))
    doc, S = start.cumsum(1, dtype=torch.int32), S.float().contiguous()
    dt, D = (z if z is None else z.float().contiguous() for z in (dt, D))
    save = torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (q, k, v, g, dt, D, S))
    return _forward(q, k, v, g, dt, D, doc, S, save, chunk, segments)[:2]


@torch.library.custom_op("stepladder::ssd", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor | None, D: Tensor | None, doc: Tensor, S: Tensor,
             save: bool, chunk: int, segments: int) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.forward(q, k, v, g, dt, D, doc, S, save, chunk, segments)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor | None, D: Tensor | None, doc: Tensor, S: Tensor,
      save: bool, chunk: int, segments: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, V = v.shape
    states = v.new_empty(B, -(-T // chunk), H, q.shape[3], V) if save else v.new_empty(0)
    return torch.empty_like(v), torch.empty_like(S), states


@torch.library.custom_op("stepladder::ssd_backward", mutates_args=())
def _backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor | None, D: Tensor | None, doc: Tensor,
              states: Tensor, dy: Tensor, dS: Tensor, chunk: int,
              segments: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, dt and D (these three fp32; empty without dt and D) and S."""
    return backward_kernels.backward(q, k, v, g, dt, D, doc, states, dy.contiguous(), dS.contiguous(), chunk, segments)


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor | None, D: Tensor | None, doc: Tensor, states: Tensor,
      dy: Tensor, dS: Tensor, chunk: int,
      segments: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = torch.empty_like(g, dtype=torch.float32)
    ddt, dD = (dg.new_empty(0), dg.new_empty(0)) if dt is None else (torch.empty_like(dg), dg.new_empty(g.shape[2]))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dg, ddt, dD, dS.new_empty(dS.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, S, _, ctx.chunk, ctx.segments = inputs
    ctx.set_materialize_grads(False)        # the saved states' would be as large as they are
    ctx.shape = S.shape
    ctx.save_for_backward(*tensors, output[2])


def _gradients(ctx: Any, dy: Tensor | None, dS: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, g, dt, D, doc, states = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy
    dS = v.new_zeros(ctx.shape, dtype=torch.float32) if dS is None else dS
    dq, dk, dv, dg, ddt, dD, dS = _backward(q, k, v, g, dt, D, doc, states, dy, dS, ctx.chunk, ctx.segments)
    ddt, dD = (None, None) if dt is None else (ddt, dD)
    return dq, dk, dv, dg.to(g.dtype), ddt, dD, None, dS, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
