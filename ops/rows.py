"""Rows for experts, one for each choice of a token, and what becomes of them: gathered both ways, forward and backward,
where indexing's own backward would add with atomics or sort again."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepladder.ops.kernels import runs

try:
    from stepladder.kernels import rows as kernels
except ModuleNotFoundError:     # without triton, which comes with torch for CUDA, the torch form runs
    kernels: Any = None


def expand(x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
    """x (N, D) -> (M, D), row i being x[order[i] // k]; order (M,) names M different of N k choices, and inverse (N k,)
    says which row each became: M or more where it is none."""
    return _Expand.apply(x, order, inverse, k)  # pyright: ignore[reportReturnType]


def weigh(rows: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """What became of expand()'s rows (M, D), weights (N, k) -> (N, D): each token's, weighed and summed."""
    return _Weigh.apply(rows, order, inverse, weights)  # pyright: ignore[reportReturnType]


def collect(x: Tensor, at: Tensor, weights: Tensor | None = None) -> Tensor:
    """x (M, D), at (U, k) -> (U, D), the sum of x[at] over k, weighed by `weights` (U, k) in x's type; nothing where
    `at` is M or more. No gradients."""
    if not x.numel() or not at.numel():
        return x.new_zeros(at.shape[0], x.shape[1])
    if runs("rows", x, x.dtype):
        return kernels.collect(x.contiguous(), at.contiguous(), None if weights is None else weights.contiguous())
    there = at < x.shape[0]
    y = x.index_select(0, at.where(there, 0).flatten()).unflatten(0, at.shape)
    y = y if weights is None else y * weights.to(y.dtype).unsqueeze(-1)
    return torch.where(there.unsqueeze(-1), y, 0).sum(1)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        (inverse,) = ctx.saved_tensors
        return collect(g, inverse.view(-1, ctx.k)), None, None, None


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, order, weights)
        return collect(rows, inverse.view_as(weights), weights)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, Tensor]:  # pyright: ignore
        rows, order, weights = ctx.saved_tensors
        if rows.shape[0] and runs("rows", rows, rows.dtype):
            dx, dweights = kernels.weigh_back(g.contiguous(), rows.contiguous(), order, weights.contiguous())
            return dx, None, None, dweights
        g, w = g.index_select(0, order // weights.shape[1]), weights.flatten().index_select(0, order).to(g.dtype)
        found = (g * rows).sum(-1).to(weights.dtype)
        dweights = weights.new_zeros(weights.numel()).index_copy_(0, order, found).view_as(weights)
        return g * w.unsqueeze(-1), None, None, dweights
