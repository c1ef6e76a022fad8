"""Short causal convolution of every channel by itself, within documents, with the state that decoding carries."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepladder.ops.kernels import runs
from stepladder.ops.linear import promote
from stepladder.ops.norm import EPS, l2_norm

try:
    from stepladder.kernels import conv as kernels
except ModuleNotFoundError:     # without triton, which comes with torch for CUDA, the torch form runs
    kernels: Any = None

TAPS, HEAD = 8, 512             # what the kernel's tiles have room for


def causal(x: Tensor, w: Tensor, start: Tensor, before: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_t = sum_i w_i x_{t-W+1+i} over the taps that reach tokens of t's own document; the last tap is t itself.

    x (B, T, C), w (C, W), bias (C,), start (B, T) true where a document begins; before (B, W - 1, C) are the inputs
    before x, zero where they are of another document than the last. Returns y and what is `before` the next token.
    """
    check(x, w, start, before)
    T, W = x.shape[1], w.shape[1]
    doc = F.pad(start.cumsum(1), (W - 1, 0))                               # what came before goes on with document 0
    x = torch.cat([before.to(x.dtype), x], 1)
    taps = (x[:, i:i + T] * (doc[:, i:i + T] == doc[:, W - 1:]).unsqueeze(-1) * w[:, i] for i in range(W))
    y = sum(taps, 0 if bias is None else bias)
    return y, (x * (doc == doc[:, -1:]).unsqueeze(-1))[:, T:]  # pyright: ignore[reportReturnType]


def activated(x: Tensor, w: Tensor, start: Tensor, before: Tensor, bias: Tensor | None = None,
              sizes: Sequence[int] = (), lengths: Sequence[float] = (), head: int = 1) -> list[Tensor]:
    """silu(causal(x)) in parts of `sizes` channels, and what is `before` the next token.

    A part with one of `lengths` that is not 0 has its heads of `head` channels brought to it. Kernels give x's dtype,
    computed in fp32; the torch form's results are promoted.
    """
    check(x, w, start, before)
    sizes = [*sizes] or [x.shape[2]]
    lengths = [*lengths] + [0.0] * (len(sizes) - len(lengths))
    if sum(sizes) != x.shape[2] or len(lengths) != len(sizes) or (any(lengths) and any(n % head for n in sizes[:-1])):
        raise ValueError(f"parts of {sizes} channels with heads of {head} at lengths {lengths} do not go with "
                         f"{x.shape[2]} channels: they add up to them, and are of whole heads where one has a length")
    if runs("conv", x, x.dtype, None if w.shape[1] <= TAPS else f"{w.shape[1]} taps, more than {TAPS}",
            None if len(sizes) <= 3 else f"{len(sizes)} parts, more than 3",
            None if not any(lengths) or (head <= HEAD and head & (head - 1) == 0)
            else f"heads of {head}; those of a power of two up to {HEAD} have one"):
        x, w, start, before = (z.contiguous() for z in (x, w, start, before))
        return fused(x, w, start, before, bias, sizes, lengths, head)
    if w.dtype != x.dtype:      # rounded, as FSDP has them already; but not their gradient, a sum over all tokens
        w = w + (w.to(x.dtype) - w).detach()
    y, after = causal(promote(x), w, start, before, bias)
    parts = [*F.silu(y).split(sizes, -1)]
    for i, length in enumerate(lengths):
        if length:
            parts[i] = (l2_norm(parts[i].unflatten(-1, (-1, head))) * length).flatten(-2)
    return [*parts, after]


def check(x: Tensor, w: Tensor, start: Tensor, before: Tensor) -> None:
    """Raises ValueError for shapes that do not belong together."""
    if before.shape != (x.shape[0], w.shape[1] - 1, x.shape[2]) or start.shape != x.shape[:2]:
        raise ValueError(f"a convolution of {w.shape[1]} taps over {(*x.shape,)} does not go with a state "
                         f"{(*before.shape,)} and borders {(*start.shape,)}; a state is made by the begin() of the "
                         "mixer that steps on it")


@torch.library.custom_op("stepladder::conv", mutates_args=())
def fused(x: Tensor, w: Tensor, start: Tensor, before: Tensor, bias: Tensor | None, sizes: list[int],
          lengths: list[float], head: int) -> list[Tensor]:
    """w may be of a higher precision than x, which it is rounded to; its gradient is not."""
    return kernels.forward(x, w.to(x.dtype), bias, start, before, sizes, lengths, head, EPS)


@fused.register_fake
def _(x: Tensor, w: Tensor, start: Tensor, before: Tensor, bias: Tensor | None, sizes: list[int], lengths: list[float],
      head: int) -> list[Tensor]:
    return [*(x.new_empty(*x.shape[:2], n) for n in sizes), x.new_empty(before.shape)]


@torch.library.custom_op("stepladder::conv_backward", mutates_args=())
def _backward(x: Tensor, w: Tensor, start: Tensor, before: Tensor, bias: Tensor | None, sizes: list[int],
              lengths: list[float], head: int, dparts: list[Tensor],
              dafter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w, before and bias (empty without one); those of w and bias in fp32."""
    dx, dw, dbias, dbefore = kernels.backward(x, w, bias, start, before, sizes, lengths, head, EPS,
                                              [d.contiguous() for d in dparts], dafter.contiguous())
    return dx, dw, dbefore, dbias


@_backward.register_fake
def _(x: Tensor, w: Tensor, start: Tensor, before: Tensor, bias: Tensor | None, sizes: list[int], lengths: list[float],
      head: int, dparts: list[Tensor], dafter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dw = w.new_empty(w.shape, dtype=torch.float32)
    return torch.empty_like(x), dw, torch.empty_like(before), dw.new_empty(0 if bias is None else w.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.sizes, ctx.lengths, ctx.head = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, w, start, before, bias = ctx.saved_tensors
    *dparts, dafter = grads
    dx, dw, dbefore, dbias = _backward(x, w.to(x.dtype), start, before, bias, ctx.sizes, ctx.lengths, ctx.head, dparts,
                                       dafter)
    return dx, dw.to(w.dtype), None, dbefore, None if bias is None else dbias.to(bias.dtype), None, None, None


fused.register_autograd(_gradients, setup_context=_save)
