"""The door for weight products, and the precision rules: compute in the input's dtype, promote where sums are long."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _Mixed(torch.autograd.Function):
    """A product with a master weight of higher precision. Its gradient leaves the accumulators in that precision:
    rounding it to bf16 on the way would cost digits, and a pass over every weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.linear(x, w.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        x, w = ctx.saved_tensors
        rows, x = g.flatten(0, -2).t(), x.flatten(0, -2)
        if x.is_cuda and w.dtype == torch.float32:
            dw = torch.mm(rows, x, out_dtype=torch.float32)
        else:
            dw = (rows @ x).to(w.dtype)
        return g @ w.to(g.dtype), dw


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x (..., I), w (O, I) -> (..., O) in x's dtype; fp32 master weights are cast here, and only here."""
    return F.linear(x, w) if w.dtype == x.dtype else _Mixed.apply(x, w)  # pyright: ignore[reportReturnType]


def promote(x: Tensor) -> Tensor:
    """At least fp32, fp64 where it was fp64: parity tests run the very same code in double precision."""
    return x if x.dtype == torch.float64 else x.float()
