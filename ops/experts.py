"""Rows to experts and back, and the experts' own products: one loop to define them, grouped_mm to be fast."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepladder.ops.linear import linear


class _Rows(torch.autograd.Function):
    """x[order // k]; backward gathers too, where indexing's own backward would add with atomics or sort again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k if k > 1 else order)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        (inverse,) = ctx.saved_tensors
        g = g.index_select(0, inverse)
        return g.unflatten(0, (-1, ctx.k)).sum(1) if ctx.k > 1 else g, None, None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor, k: int = 1) -> Tensor:
    """x (N, D) -> (N k, D), row i being x[order[i] // k]; order is a permutation of N k and inverse its inverse."""
    return _Rows.apply(x, order, inverse, k)  # pyright: ignore[reportReturnType]


def invert(order: Tensor) -> Tensor:
    """The inverse of a permutation (N,), without a sort."""
    at = torch.arange(order.shape[0], device=order.device)
    return torch.empty_like(order).scatter_(0, order, at)


def count(ids: Tensor, experts: int) -> Tensor:
    """(..., M) expert ids -> (..., experts) int64; by comparison: bincount would wait for the device."""
    return (ids.unsqueeze(-1) == torch.arange(experts, device=ids.device)).sum(-2)


def loop(x: Tensor, counts: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    """The definition. x (N, D) sorted by expert, counts (E,); up, gate (E, F, D), down (E, D, F) -> (N, D)."""
    out = []
    for e, rows in enumerate(x.split(counts.tolist())):       # reads counts on the host: the reference may
        out.append(linear(F.silu(linear(rows, gate[e])) * linear(rows, up[e]), down[e]))
    return torch.cat(out)


def grouped(x: Tensor, counts: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    """The same by three grouped products; counts stay on the device. They must add up to N: more is not written."""
    ends = counts.cumsum(0).to(torch.int32)
    up, gate, down = (w.to(x.dtype).transpose(-2, -1) for w in (up, gate, down))
    h = F.silu(F.grouped_mm(x, gate, offs=ends)) * F.grouped_mm(x, up, offs=ends)
    return F.grouped_mm(h, down, offs=ends)


def can_group(x: Tensor, hidden: int) -> bool:
    """grouped_mm takes rows of a multiple of 16 bytes: bf16 on a GPU, any half or single precision on a CPU."""
    fits = x.dtype == torch.bfloat16 if x.is_cuda else x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return fits and all(n * x.element_size() % 16 == 0 for n in (x.shape[-1], hidden))
