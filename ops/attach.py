"""Auxiliary losses enter the backward pass here: no list of losses to collect, double or lose."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.shape, loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        shape, dtype, device = ctx.like
        return g, torch.ones(shape, dtype=dtype, device=device)


def attach(x: Tensor, loss: Tensor) -> Tensor:
    """x unchanged; its backward also starts the backward of `loss`, with gradient 1.

    Losses here are sums over tokens, as the cross entropy is: the step divides all of them once by the token count.
    Recomputation and pipelining run the node exactly once a micro-batch, because it sits on x's own path.
    """
    return _Attach.apply(x, loss)  # pyright: ignore[reportReturnType]
