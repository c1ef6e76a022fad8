"""Cross entropy over a vocabulary that may be split, without ever holding all logits."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepladder.ops.compiled import compiled as fast
from stepladder.ops.linear import promote, weight_gradient

IGNORE = -100
Reduce = Callable[[Tensor], Tensor]


class _CrossEntropy(torch.autograd.Function):
    """Forward makes the gradients too, chunk by chunk, so that a chunk's logits are the most that ever exists."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, targets: Tensor, first: int, z_loss: float, chunk: int,
                total: Reduce, highest: Reduce, compiled: bool, learn: bool) -> tuple[Tensor, Tensor]:
        statistics, gradient = map(fast, (_statistics, _gradient)) if compiled else (_statistics, _gradient)
        w = table.to(x.dtype)
        dx = torch.empty_like(x) if learn else x.new_empty(0)
        dw = torch.zeros(table.shape, dtype=promote(table).dtype, device=x.device) if learn else x.new_empty(0)
        loss = x.new_zeros((), dtype=promote(x).dtype)
        nll = torch.zeros_like(loss)
        for at in range(0, x.shape[0], chunk):
            xs, t = x[at:at + chunk], targets[at:at + chunk]
            logits = xs @ w.t()
            top, norm, hit = statistics(logits, t - first)
            best = highest(top)
            norm = total(norm * (top - best).exp())            # over the whole vocabulary
            lse, live = best + norm.log(), (t != IGNORE).to(norm.dtype)
            nll += ((lse - total(hit)) * live).sum()
            loss += z_loss * (lse.square() * live).sum()
            if learn:
                d = gradient(logits, t - first, lse, live, z_loss)
                torch.mm(d, w, out=dx[at:at + chunk])
                dw += weight_gradient(d, xs, dw.dtype)
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(nll)
        return loss + nll, nll

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        dx, dw = ctx.saved_tensors
        return (g * dx).to(dx.dtype), (g * dw).to(dw.dtype), *[None] * 8


def _statistics(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's (N,) maximum, sum of exp below it, and target logit (0 where another rank has it), in fp32."""
    z = promote(logits)
    top = z.amax(-1)
    here = (local >= 0) & (local < z.shape[-1])
    hit = z.gather(-1, local.clamp(0, z.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    return top, (z - top.unsqueeze(-1)).exp().sum(-1), torch.where(here, hit, 0.0)


def _gradient(logits: Tensor, local: Tensor, lse: Tensor, live: Tensor, z_loss: float) -> Tensor:
    """d loss / d logits (N, V), in the logits' dtype. By comparison, not scatter: one pass when compiled."""
    p = (promote(logits) - lse.unsqueeze(-1)).exp()
    hit = torch.arange(logits.shape[-1], device=logits.device) == local.unsqueeze(-1)
    return (live.unsqueeze(-1) * (p * (1 + 2 * z_loss * lse).unsqueeze(-1) - hit.to(p.dtype))).to(logits.dtype)


def cross_entropy(x: Tensor, table: Tensor, targets: Tensor, *, first: int = 0, z_loss: float = 0.0, chunk: int = 8192,
                  total: Reduce = lambda v: v, highest: Reduce = lambda v: v,
                  compiled: bool = False) -> tuple[Tensor, Tensor]:
    """Sums over tokens of (cross entropy + z_loss * logsumexp^2) and of the cross entropy alone; divide by the count.

    x (N, D); table (V, D), or the rows `first`..`first + V` of it, with `total` and `highest` reducing over the ranks
    that hold the others; targets (N,) int64 ids of the whole vocabulary, IGNORE where there is nothing to learn.
    """
    learn = torch.is_grad_enabled() and (x.requires_grad or table.requires_grad)
    return _CrossEntropy.apply(  # pyright: ignore[reportReturnType]
        x, table, targets, first, z_loss, chunk, total, highest, compiled, learn)
