"""Rows to experts and back, and the experts' own products: one loop to define them, grouped_mm to be fast."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stepladder.ops.attach import attach
from stepladder.ops.kernels import say
from stepladder.ops.linear import linear, promote


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


def sort(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The stable order of ids (N,) below `experts`, and its inverse. A sort passes over each byte of its keys."""
    order = ids.to(torch.uint8 if experts <= 256 else torch.int16).argsort(stable=True)
    return order, invert(order)


def send(x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., D), ids (N, k) below `experts` -> a row (N k, D) for each choice, sorted by expert; the order, its
    inverse."""
    order, inverse = sort(ids.flatten(), experts)
    return permute(x.flatten(0, -2), order, inverse, ids.shape[-1]), order, inverse


class Sorted(NamedTuple):
    order: Tensor          # (N,) that sorts rows by expert
    inverse: Tensor        # (N,)
    ends: Tensor           # (E,) where each expert's rows end, sorted


def regroup(counts: Tensor, device: torch.device) -> Sorted:
    """counts (R, E), on the host: rows have come from R ranks one after the other, each rank's sorted by expert.

    Without a sort: what one rank sent to one expert stays together, and where that goes is known from the counts.
    """
    came = counts.flatten().cumsum(0).view_as(counts).t().flatten()       # (E R,) where a piece ended as it came
    ends = counts.t().flatten().cumsum(0)                                  # and where it ends when all are sorted
    known, at = torch.stack([ends, came - ends]), torch.arange(int(ends[-1]), device=device)
    ends, away = (known.pin_memory() if device.type == "cuda" else known).to(device, non_blocking=True)
    order = at + away.index_select(0, torch.searchsorted(ends, at, right=True))
    return Sorted(order, invert(order), ends[counts.shape[0] - 1::counts.shape[0]])


class Scores(NamedTuple):
    ids: Tensor            # (B T, k) experts of each token
    weights: Tensor        # (B T, k) by which their outputs are multiplied
    counts: Tensor         # (B, E) int64 tokens of a row that each expert gets
    probs: Tensor          # (B, T, E) scores, summing to 1
    entropy: Tensor        # () of them, summed; without gradients
    squares: Tensor        # () of the logits' logsumexp, summed


class Choice(NamedTuple):
    ids: Tensor            # (B T, k)
    weights: Tensor        # (B T, k) the auxiliary losses hang on them
    load: Tensor           # (E,) int64
    entropy: Tensor        # ()
    balance: Tensor        # () the balance loss; without gradients


def score(x: Tensor, w: Tensor | None, bias: Tensor | None, k: int, kind: str) -> Scores:
    """x (B, T, D) and a router's w (E, D), or logits (B, T, E) and none; bias (E,) is added for choosing only."""
    logits = x if w is None else linear(promote(x), w)
    scores = logits.softmax(-1) if kind == "softmax" else logits.sigmoid()
    known = scores.detach()
    ids = (known if bias is None else known + bias).topk(k, -1).indices
    weights = scores.gather(-1, ids)
    weights = weights / weights.sum(-1, keepdim=True)
    probs = scores / scores.sum(-1, keepdim=True)
    p = probs.detach()
    entropy = -(p * p.clamp_min(1e-20).log()).sum()
    return Scores(ids.flatten(0, 1), weights.flatten(0, 1), count(ids.flatten(1), logits.shape[-1]), probs, entropy,
                  logits.logsumexp(-1).square().sum())


def choose(scores: Scores, counts: Tensor, balance: float, z_loss: float) -> Choice:
    """counts (B, E) are of whole sequences, of which the scores may be those of a rank's own tokens."""
    loss = balance * imbalance(scores.probs, counts)
    weights = attach(scores.weights, loss + z_loss * scores.squares)
    return Choice(scores.ids, weights, scores.counts.sum(0), scores.entropy, loss.detach())


def route(x: Tensor, w: Tensor | None, bias: Tensor | None, k: int, kind: str, balance: float,
          z_loss: float) -> Choice:
    """Both, of whole sequences."""
    scores = score(x, w, bias, k, kind)
    return choose(scores, scores.counts, balance, z_loss)


def imbalance(probs: Tensor, counts: Tensor) -> Tensor:
    """The balance loss of one sequence (arXiv:2412.19437, eq. 17-20) times its length, summed over rows.

    counts (B, E) are of the whole sequence; probs (B, t, E) may be those of a rank's own tokens, and add up by
    themselves.
    """
    f = counts * (counts.shape[-1] / counts.sum(-1, keepdim=True))
    return (f.unsqueeze(1) * probs).sum()


def weigh(rows: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """rows (N k, D) as they were sent, weights (N, k) -> (N, D): each token's rows, weighed and summed."""
    rows = permute(rows, inverse, order).unflatten(0, weights.shape)
    return (rows * weights.to(rows.dtype).unsqueeze(-1)).sum(1)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def loop(x: Tensor, ends: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    """The definition. x (N, D) sorted by expert, whose rows end at ends (E,), the last of them N; up, gate (E, F, D),
    down (E, D, F) -> (N, D)."""
    out = []
    for e, rows in enumerate(x.tensor_split(ends.tolist()[:-1])):       # reads ends on the host: the reference may
        out.append(linear(gated(linear(rows, gate[e]), linear(rows, up[e])), down[e]))
    return torch.cat(out)


def grouped(x: Tensor, ends: Tensor, up: Tensor, gate: Tensor, down: Tensor,
            between: Callable[[Tensor, Tensor], Tensor] = gated) -> Tensor:
    """The same by three grouped products; ends stay on the device. The last must be N: more is not written."""
    ends = ends.to(torch.int32)
    up, gate, down = (w.to(x.dtype).transpose(-2, -1) for w in (up, gate, down))
    h = between(F.grouped_mm(x, gate, offs=ends), F.grouped_mm(x, up, offs=ends))
    return F.grouped_mm(h, down, offs=ends)


def can_group(x: Tensor, hidden: int) -> bool:
    """grouped_mm takes rows of a multiple of 16 bytes: bf16 on a GPU, any half or single precision on a CPU. The loop
    is the reference; on a GPU, where it waits for the device, one line says why it runs."""
    why = None
    if x.dtype not in ((torch.bfloat16,) if x.is_cuda else (torch.float32, torch.bfloat16, torch.float16)):
        why = f"{x.dtype}"
    elif odd := [n for n in (x.shape[-1], hidden) if n * x.element_size() % 16]:
        why = f"rows of {odd[0]} numbers, not a multiple of 16 bytes"
    if why and x.is_cuda:
        say(f"experts: no grouped products for {why}; running the loop")
    return why is None
