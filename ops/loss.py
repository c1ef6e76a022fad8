"""Cross entropy over a vocabulary that may be split, without ever holding all logits."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepladder.ops.linear import promote

IGNORE = -100
Reduce = Callable[[Tensor], Tensor]


class _CrossEntropy(torch.autograd.Function):
    """Forward makes the gradients too, chunk by chunk, so that a chunk's logits are the most that ever exists."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, targets: Tensor, first: int, z_loss: float, chunk: int,
                total: Reduce, highest: Reduce) -> tuple[Tensor, Tensor]:
        w = table.to(x.dtype)
        grad = x.requires_grad or table.requires_grad
        dx = torch.empty_like(x) if grad else x.new_empty(0)
        dw = torch.zeros(table.shape, dtype=promote(table).dtype, device=x.device) if grad else x.new_empty(0)
        loss = x.new_zeros((), dtype=promote(x).dtype)
        nll = torch.zeros_like(loss)
        for at in range(0, x.shape[0], chunk):
            xs, t = x[at:at + chunk], targets[at:at + chunk]
            parts = _chunk(xs @ w.t(), t, first, w.shape[0], z_loss, total, highest)
            loss, nll = loss + parts[0], nll + parts[1]
            if grad:
                d = parts[2].to(x.dtype)
                torch.mm(d, w, out=dx[at:at + chunk])
                dw += d.t() @ xs
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        dx, dw = ctx.saved_tensors
        return (g * dx).to(dx.dtype), (g * dw).to(dw.dtype), None, None, None, None, None, None


def _chunk(logits: Tensor, targets: Tensor, first: int, size: int, z_loss: float,
           total: Reduce, highest: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of losses, sum of plain negative log-likelihoods, and d loss / d logits of one chunk, all in fp32."""
    z = promote(logits)
    top = highest(z.amax(-1, keepdim=True))
    e = (z - top).exp()
    norm = total(e.sum(-1, keepdim=True))                          # (N, 1) over the whole vocabulary
    lse = top + norm.log()
    local = targets - first
    here = ((local >= 0) & (local < size)).unsqueeze(-1)
    at = local.clamp(0, size - 1).unsqueeze(-1)
    hit = total(torch.where(here, z.gather(-1, at), 0.0))
    live = (targets != IGNORE).unsqueeze(-1).to(z.dtype)
    nll = ((lse - hit) * live).sum()
    loss = nll + z_loss * (lse.square() * live).sum()
    d = e * ((1 + 2 * z_loss * lse) * live / norm)
    return loss, nll, d.scatter_add(-1, at, -(here * live).to(z.dtype))


def cross_entropy(x: Tensor, table: Tensor, targets: Tensor, *, first: int = 0, z_loss: float = 0.0, chunk: int = 4096,
                  total: Reduce = lambda v: v, highest: Reduce = lambda v: v) -> tuple[Tensor, Tensor]:
    """Sums over tokens of (cross entropy + z_loss * logsumexp^2) and of the cross entropy alone; divide by the count.

    x (N, D); table (V, D), or the rows `first`..`first + V` of it, with `total` and `highest` reducing over the ranks
    that hold the others; targets (N,) int64 ids of the whole vocabulary, IGNORE where there is nothing to learn.
    """
    return _CrossEntropy.apply(x, table, targets, first, z_loss, chunk, total, highest)  # pyright: ignore
