"""The door for weight products, and the precision rules: compute in the input's dtype, promote where sums are long."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula


class Put(NamedTuple):
    """Weight gradients put off: g (N, O) and x (N, I) give g^T x, of which each weight has its rows."""
    ws: tuple[Tensor, ...]
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
    for ws, g, x in later:
        for w, dw in zip(ws, weight_gradient(g, x, ws[0].dtype).split([len(w) for w in ws]), strict=True):
            if w.requires_grad:
                w.grad = dw if w.grad is None else w.grad.add_(dw)


def weight_gradient(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """g (N, O) and x (N, I) -> g^T x (O, I), which leaves the accumulators in the weight's precision: rounding it to
    bf16 on the way would cost digits, and a pass over every weight."""
    if x.is_cuda and x.dtype != dtype == torch.float32:
        return torch.mm(g.t(), x, out_dtype=torch.float32)
    return (g.t() @ x).to(dtype)


class _Product(torch.autograd.Function):
    """A product with master weights of higher precision, or one whose weight gradients are put off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, later: list[Put] | None, *ws: Tensor) -> Tensor:
        ctx.save_for_backward(x, *ws)
        ctx.later, ctx.leaves = later, () if later is None else ws    # recomputation saves others than the leaves
        return F.linear(x, _stacked(ws, x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *ws = ctx.saved_tensors
        if ctx.later is not None:
            ctx.later.append(Put(ctx.leaves, g.flatten(0, -2), x.flatten(0, -2)))
            return g @ _stacked(ws, g.dtype), None, *(None for _ in ws)
        return g @ ws[0].to(g.dtype), None, weight_gradient(g.flatten(0, -2), x.flatten(0, -2), ws[0].dtype)


def _stacked(ws: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return ws[0].to(dtype) if len(ws) == 1 else torch.cat([w.to(dtype) for w in ws])


@torch.library.custom_op("stepladder::products", mutates_args=())
def _products(x: Tensor, ws: list[Tensor], counts: list[int]) -> list[Tensor]:
    """x (..., I), each w (O, I) -> for counts of them (..., sum of O). An operator, because a compiler that sees inside
    keeps the weights that it laid side by side for the backward pass, and so a copy of what FSDP has given back."""
    return [F.linear(x, _stacked(some, x.dtype)) for some in _cut(ws, counts)]


@_products.register_fake
def _(x: Tensor, ws: list[Tensor], counts: list[int]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], sum(len(w) for w in some)) for some in _cut(ws, counts)]


@torch.library.custom_op("stepladder::products_backward", mutates_args=())
def _products_backward(gs: list[Tensor], x: Tensor, ws: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Gradients of x, and of each product's weights one below the other. The narrowest product writes that of x, and
    each after it adds to what is there, which takes less than to read and add them all up after."""
    groups, dx = _cut(ws, counts), x.new_empty(x.shape)
    into = dx.flatten(0, -2)
    for i, (g, some) in enumerate(sorted(zip(gs, groups, strict=True), key=lambda pair: pair[0].shape[-1])):
        into.addmm_(g.flatten(0, -2), _stacked(some, x.dtype), beta=min(i, 1))        # what is times 0 is not read
    x = x.flatten(0, -2)
    return [dx, *(weight_gradient(g.flatten(0, -2), x, some[0].dtype) for g, some in zip(gs, groups, strict=True))]


@_products_backward.register_fake
def _(gs: list[Tensor], x: Tensor, ws: list[Tensor], counts: list[int]) -> list[Tensor]:
    return [x.new_empty(x.shape), *(ws[0].new_empty(g.shape[-1], x.shape[-1]) for g in gs)]


def _cut(ws: Sequence[Tensor], counts: Sequence[int]) -> list[Sequence[Tensor]]:
    return [ws[sum(counts[:i]):sum(counts[:i + 1])] for i in range(len(counts))]


def _save(ctx: Any, inputs: tuple[Tensor, list[Tensor], list[int]], output: list[Tensor]) -> None:
    x, ws, ctx.counts = inputs
    ctx.save_for_backward(x, *ws)


def _gradients(ctx: Any, gs: list[Tensor]) -> tuple[Tensor, list[Tensor], None]:
    x, *ws = ctx.saved_tensors
    dx, *dws = _products_backward(gs, x, ws, ctx.counts)
    groups = zip(dws, _cut(ws, ctx.counts), strict=True)
    return dx, [d for dw, some in groups for d in dw.split([len(w) for w in some])], None


_products.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.stepladder.products)
def _(x: Sequence[int], ws: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    return sum(2 * prod(x) * w[0] for w in ws)


@register_flop_formula(torch.ops.stepladder.products_backward)
def _(gs: Any, x: Sequence[int], ws: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    return sum(4 * prod(x) * w[0] for w in ws)


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x (..., I), w (O, I) -> (..., O) in x's dtype; fp32 master weights are cast in this file, and nowhere else."""
    later = _postponed(x, (w,))
    return F.linear(x, w) if later is None and w.dtype == x.dtype else _Product.apply(x, later, w)  # pyright: ignore


def linears(x: Tensor, *weights: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """linear(x, w) for each, or for several that are given together their outputs side by side: (..., sum of O).

    Those together are one product forward, and one for each kind of gradient: narrow ones alone leave most of a GPU
    idle. The gradients of x of all of them are summed as they are made. For less than a row for each of I, outputs are
    laid side by side instead of weights: in decoding a copy of these would take as long as reading them.
    """
    groups = [(w,) if isinstance(w, Tensor) else w for w in weights]
    if x.numel() < x.shape[-1]**2:
        return [torch.cat(ys, -1) if len(ys) > 1 else ys[0] for ys in ([linear(x, w) for w in ws] for ws in groups)]
    ws = [w for some in groups for w in some]
    if (later := _postponed(x, ws)) is not None:
        return [_Product.apply(x, later, *some) for some in groups]  # pyright: ignore
    return _products(x, ws, [len(some) for some in groups])


def _postponed(x: Tensor, ws: Sequence[Tensor]) -> list[Put] | None:
    """Where to put the gradients of leaves; those of others are on their way to other nodes."""
    if _later is None or not all(w.is_leaf for w in ws) or (x.is_cuda and torch.cuda.current_stream() != _stream):
        return None
    return _later


def promote(x: Tensor) -> Tensor:
    """At least fp32, fp64 where it was fp64: parity tests run the very same code in double precision."""
    return x if x.dtype == torch.float64 else x.float()
