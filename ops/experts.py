"""Who chooses which expert and where that is, and the experts' own products: one loop to define them, grouped_mm to
be fast."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stepladder.ops.attach import attach
from stepladder.ops.kernels import say
from stepladder.ops.linear import linear, promote


def invert(order: Tensor) -> Tensor:
    """The inverse of a permutation (N,), without a sort."""
    at = torch.arange(order.shape[0], device=order.device)
    return torch.empty_like(order).scatter_(0, order, at)


def count(ids: Tensor, experts: int) -> Tensor:
    """(..., M) expert ids -> (..., experts) int64; by comparison: bincount would wait for the device."""
    return (ids.unsqueeze(-1) == torch.arange(experts, device=ids.device)).sum(-2)


class Sorted(NamedTuple):
    order: Tensor          # (N k,) choices by expert, then by token
    inverse: Tensor        # (N k,) where each choice is in that order
    ends: Tensor           # (E,) where each expert's choices end in it


def sort(ids: Tensor, experts: int) -> Sorted:
    """ids (N, k); those that are `experts` are of none, and come last. A sort passes over each byte of its keys."""
    keys = ids.flatten().to(next(t for t in (torch.uint8, torch.int16, torch.int64) if experts <= torch.iinfo(t).max))
    keys, order = keys.sort(stable=True)
    each = torch.arange(experts, dtype=keys.dtype, device=keys.device)
    return Sorted(order, invert(order), torch.searchsorted(keys, each, right=True))


class Tour(NamedTuple):
    """Tokens of n ranks, N of each, on their way: a token goes to a rank once, whichever of its experts live there."""
    at: Tensor             # (N, n) where it is among all those that go; n N: it does not
    sent: Tensor           # (n N,) which tokens go, those to rank 0 first; the rest means nothing
    came: Tensor           # (n N,) which of all ranks' tokens come here, those of rank 0 first; the rest means nothing
    ids: Tensor            # (n N, k) of all ranks' tokens, among this rank's experts; equal to their number: another's
    known: Tensor          # (2 n + 1,) how many go to each rank, come from each rank, and are chosen here in all


def tour(ids: Tensor, rank: int, experts: int, apart: bool = False) -> Tour:
    """ids (n, N, k): every rank's choices. `experts`: those of a rank, which has the `rank`-th of them. apart: `at`
    leaves room for all tokens on each rank.

    Few calls, for each costs the host as much as the device: what goes and what comes is found together.
    """
    n, N, k = ids.shape
    owner, ranks, all_of_them = ids // experts, torch.arange(n, device=ids.device), n * N
    here = owner == rank
    visits = torch.stack([owner[rank] == ranks[:, None, None], here]).any(-1)             # (2, n, N) going, coming
    many = visits.sum(2)
    at = visits.flatten(1).cumsum(1) - 1
    at = torch.where(visits.flatten(1), at, all_of_them)
    # Nonzero would wait for the device.
    lists = at.new_empty(2, all_of_them + 1).scatter_(1, at, torch.arange(all_of_them, device=at.device).expand(2, -1))
    at, (sent, came) = at[0].view(n, N), lists[:, :-1]
    if apart:
        at = torch.where(visits[0], at + (ranks * N + many[0] - many[0].cumsum(0)).unsqueeze(1), all_of_them)
    local = torch.where(here, ids - rank * experts, experts)
    known = torch.cat([many.flatten(), here.sum().view(1)])
    return Tour(at.t().contiguous(), sent % N, came, local.view(-1, k), known)


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
