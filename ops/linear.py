"""The door for weight products, and the precision rules: compute in the input's dtype, promote where sums are long."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Put(NamedTuple):
    """A weight gradient put off: g (N, O) and x (N, I) give g^T x."""
    w: Tensor
    g: Tensor
    x: Tensor


_later: list[Put] | None = None
_stream: torch.cuda.Stream | None = None


@contextmanager
def put_off(later: list[Put]) -> Iterator[None]:
    """Products made in here leave their weight gradients to catch_up(): a zero-bubble pipeline has a better time.

    Those on another stream than the present one do not: nothing would make catch_up() wait for them.
    """
    global _later, _stream
    before = _later, _stream
    _later, _stream = later, torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        _later, _stream = before


@torch.no_grad()
def catch_up(later: list[Put]) -> None:
    """Add the gradients put off to their weights' own."""
    for w, g, x in later:
        dw = weight_gradient(g, x, w.dtype)
        w.grad = dw if w.grad is None else w.grad.add_(dw)


def weight_gradient(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """g (N, O) and x (N, I) -> g^T x (O, I), which leaves the accumulators in the weight's precision: rounding it to
    bf16 on the way would cost digits, and a pass over every weight."""
    if x.is_cuda and x.dtype != dtype == torch.float32:
        return torch.mm(g.t(), x, out_dtype=torch.float32)
    return (g.t() @ x).to(dtype)


class _Product(torch.autograd.Function):
    """A product with a master weight of higher precision, or one whose weight gradient is put off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, later: list[Put] | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.later, ctx.leaf = later, None if later is None else w     # recomputation saves another tensor than the leaf
        return F.linear(x, w.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore
        x, w = ctx.saved_tensors
        rows, dx = g.flatten(0, -2), g @ w.to(g.dtype)
        if ctx.later is not None:
            ctx.later.append(Put(ctx.leaf, rows, x.flatten(0, -2)))
            return dx, None, None
        return dx, weight_gradient(rows, x.flatten(0, -2), w.dtype), None


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x (..., I), w (O, I) -> (..., O) in x's dtype; fp32 master weights are cast here, and only here."""
    later = _later                    # for leaves alone: the gradients of others are on their way to other nodes
    if later is not None and (not w.is_leaf or (x.is_cuda and torch.cuda.current_stream() != _stream)):
        later = None
    return F.linear(x, w) if w.dtype == x.dtype and later is None else _Product.apply(x, w, later)  # pyright: ignore


def promote(x: Tensor) -> Tensor:
    """At least fp32, fp64 where it was fp64: parity tests run the very same code in double precision."""
    return x if x.dtype == torch.float64 else x.float()
