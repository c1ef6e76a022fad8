"""Gated linear recurrence (arXiv:2312.06635):  S_t = exp(g_t) S_{t-1} + k_t v_t^T,   y_t = q_t S_t.

Shapes: q, k, g (B, T, H, K); v, y (B, T, H, V); S (B, H, K, V); start (B, T) bool, true where a document begins and
the state is emptied. g <= 0 is a log decay. Everything is computed in the dtype of q; callers promote.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepladder.ops.kernels import runs, unsound
from stepladder.ops.linear import promote
from stepladder.ops.step import matrix, steps

try:
    from stepladder.kernels import gla as kernels
    from stepladder.kernels import gla_backward as backward_kernels
except ModuleNotFoundError:     # without triton, which comes with torch for CUDA, the torch form runs
    kernels: Any = None
    backward_kernels: Any = None

CHUNK = 64
# Head sizes that kernels have tiles for; of keys of 16 and values of 64 or more Triton 3.6 makes wrong code.
KEYS, VALUES = (32, 64, 128), (16, 32, 64, 128, 256)


def check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor) -> None:
    """Raises ValueError for shapes that do not belong together, and for growing gates where looking costs no sync."""
    B, T, H, K = q.shape
    for name, z, shape in (("keys", k, q.shape), ("gates", g, q.shape), ("values", v, (B, T, H, v.shape[-1])),
                           ("borders", start, (B, T)), ("the state", S, (B, H, K, v.shape[-1]))):
        if z.shape != shape:
            raise ValueError(f"{name} {(*z.shape,)} do not go with queries {(*q.shape,)} and values {(*v.shape,)}: "
                             f"they need {(*shape,)}; a state is made by the begin() of the mixer that steps on it")
    if not g.is_cuda and not torch.compiler.is_compiling() and bool((g > 0).any()):
        raise ValueError(f"a gate is {float(g.max()):.3g} > 0: gates are log decays, and the state would grow without "
                         "bound; take -softplus or logsigmoid of what is projected")


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time. Every other form is tested against this one."""
    check(q, k, v, g, start, S)
    out = [v[:, :0]]
    for t in range(q.shape[1]):
        S = torch.where(start[:, t, None, None, None], 0.0, S)
        S = g[:, t].exp().unsqueeze(-1) * S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        out.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2).unsqueeze(1))
    return torch.cat(out, 1), S


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor,
            chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """The same in T / chunk sequential steps; everything inside a chunk is matrix products.

    Inside a chunk the products are formed by halves: rows of a right half meet columns of its left half relative to
    the decay at the right half's first row, so both factors are exp of something <= 0. That is exact for any gate,
    where the usual q exp(b) (k exp(-b))^T overflows (specs of the chunkwise form: arXiv:2312.06635 section 4).
    Document borders are factors of 0, not large negative decays, so they cost no precision; but 0 NaN is NaN: what is
    not finite in one document reaches the others of its row, as in every form of masked products.
    """
    check(q, k, v, g, start, S)
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
    states = [S]
    for n in range(N):
        states.append(keep[:, :, n] * states[-1] + add[:, :, n])
    before = torch.stack(states, 2)[:, :, :-1]
    y = (q * (b.exp() * first)) @ before + (q * k).sum(-1, keepdim=True) * v

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
    return y.permute(0, 2, 3, 1, 4).reshape(B, T + pad, H, V)[:, :T], states[-1]


def mix(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """y of K^-1/2 q and the state after, by the form for these tokens: kernels in v's dtype, torch as promoted."""
    T, K, V = v.shape[1], q.shape[3], v.shape[3]
    if steps(v, S, K, q, k, g):
        return matrix(q, k, v, g, None, start, S, K**-0.5), S
    if T != 1 and runs("gla", v, v.dtype,
                       None if K in KEYS else f"keys of {K}; sizes are {KEYS}",
                       None if V in VALUES else f"values of {V}; sizes are {VALUES}",
                       unsound(v.dtype)):
        return fused(q, k, v, g, start, S, K**-0.5)
    form = recurrent if T == 1 else chunked
    return form(promote(q) * K**-0.5, promote(k), promote(v), g, start, S)


def fused(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor, scale: float = 1.0,
          chunk: int = CHUNK, segment: int = 0, block: int = 0) -> tuple[Tensor, Tensor]:
    """The kernels, on scale * q: q, k, v of one dtype, S in fp32; the rest as kernels.gla.forward says."""
    check(q, k, v, g, start, S)
    if not (q.dtype == k.dtype == v.dtype) or S.dtype != torch.float32:
        raise ValueError(f"queries, keys, values and state are {q.dtype}, {k.dtype}, {v.dtype}, {S.dtype}; kernels "
                         "take the first three in one dtype, and the state in float32")
    save = torch.is_grad_enabled() and any(z.requires_grad for z in (q, k, v, g, S))
    q, k, v, g, S, start = (z.contiguous() for z in (q, k, v, g, S, start.view(torch.uint8)))
    y, S, *_ = _forward(q, k, v, g, start, S, scale, save, chunk, segment, block)
    return y, S


@torch.library.custom_op("stepladder::gla", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor, scale: float, save: bool, chunk: int,
             segment: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, S, saved, slow = kernels.forward(q, k, v, g, start, S, scale, save, chunk, segment, block)
    return y, S, saved if save else saved.new_empty(0), slow


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor, scale: float, save: bool, chunk: int,
      segment: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, K = q.shape
    N = (T + chunk - 1) // chunk
    saved = q.new_empty(B, N, H, K, v.shape[-1]) if save else q.new_empty(0)
    return torch.empty_like(v), torch.empty_like(S), saved, start.new_empty(B, N, H, dtype=torch.int8)


@torch.library.custom_op("stepladder::gla_backward", mutates_args=())
def _backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, saved: Tensor, slow: Tensor, dy: Tensor,
              dS: Tensor, scale: float, chunk: int, segment: int,
              block: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward_kernels.backward(q, k, v, g, start, saved, slow, dy.contiguous(), dS.contiguous(), scale, chunk,
                                     segment, block)


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, saved: Tensor, slow: Tensor, dy: Tensor, dS: Tensor,
      scale: float, chunk: int, segment: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like
    return like(q), like(k), like(v), like(g), dS.new_empty(dS.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, start, _, scale, _, *sizes = inputs
    ctx.set_materialize_grads(False)        # what is saved beside y and S has none, and is large
    ctx.save_for_backward(q, k, v, g, start, *output[2:])
    ctx.rest = scale, *sizes


def _gradients(ctx: Any, dy: Tensor | None, dS: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *inputs, saved, slow = ctx.saved_tensors
    dy = torch.zeros_like(inputs[2]) if dy is None else dy
    dS = torch.zeros_like(saved[:, 0], dtype=torch.float32) if dS is None else dS
    dq, dk, dv, dg, dS = _backward(*inputs, saved, slow, dy, dS, *ctx.rest)
    return dq, dk, dv, dg, None, dS, *(None,) * 5


_forward.register_autograd(_gradients, setup_context=_save)
