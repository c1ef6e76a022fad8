"""Expert parallelism: tokens travel to the ranks that hold their experts, and back. Dropless, uneven.

A token goes to a rank once, whichever of its experts live there, and comes back once: as the sum of what they made of
it. With four of 64 experts that is half as much over two ranks as a row for each choice would be, over four two thirds.

Dispatch starts beside the token mixer and is awaited by the experts; combine starts behind the experts and is awaited
by the next norm that reads. Under ladder wiring the mixers in between run meanwhile.
"""
from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepladder.model.channel.moe import Chosen, Here
from stepladder.model.residual import Pending
from stepladder.ops import experts as ops
from stepladder.ops.rows import collect
from stepladder.parallel.copies import Rows
from stepladder.parallel.flight import Lanes, Started
from stepladder.parallel.tensor import Ranks


class Carry(Here):
    """Every rank holds all experts: tokens go from lane to lane."""

    def __init__(self, lanes: Lanes):
        self.lanes = lanes

    def dispatch(self, x: Tensor, announced: Chosen) -> tuple[Pending, Chosen, Any]:
        return self.lanes.carry(x), announced, None

    def combine(self, y: Tensor, back: Any) -> Pending:
        return self.carry(y)

    def carry(self, y: Tensor) -> Pending:
        with self.lanes.front():
            return self.lanes.carry(y)


class Announced(NamedTuple):
    """Who goes to whom."""
    tour: ops.Tour
    weights: Tensor        # (n N, k) of all ranks' tokens
    experts: int           # of a rank
    known: Tensor          # tour.known; on the host, when `read` is over
    read: Any              # an event


class Way(NamedTuple):
    """Of dispatched tokens."""
    sent: Tensor           # (sum of send,) which go, those to rank 0 first
    at: Tensor             # (N, n) tour.at: where they are to be found when they come home
    send: list[int]        # how many go to each rank
    receive: list[int]     # and come from it


class AllToAll:
    """An Exchange over `ranks`, of which r holds experts r E/n .. (r + 1) E/n. `copies`: by copy engines."""

    def __init__(self, ranks: Ranks, copies: Rows | None = None):
        self.ranks, self.lanes, self.copies = ranks, ranks.lanes, copies
        self.carry = Carry(ranks.lanes).carry

    def announce(self, ids: Tensor, weights: Tensor, experts: int) -> Announced:
        """Every rank hears all ranks' choices: 16 k bytes for each of the n N tokens, until they are dispatched."""
        k, each = ids.shape[1], experts // self.ranks.n
        # Whole numbers are exact in fp32, and a router computes in no less.
        every = self.ranks.every(torch.cat([ids.to(weights.dtype), weights], -1), "choices")
        chosen, weights = every.split(k, -1)
        tour = ops.tour(chosen.detach().long(), self.ranks.rank, each, apart=self.copies is not None)
        # The one read of the device per MoE layer, on its way while the host goes on: uneven splits are host numbers.
        host = torch.empty_like(tour.known, device="cpu", pin_memory=ids.is_cuda).copy_(tour.known, non_blocking=True)
        read = torch.cuda.current_stream().record_event() if ids.is_cuda else None
        return Announced(tour, weights.reshape(-1, k), each, host, read)

    def dispatch(self, x: Tensor, announced: Announced) -> tuple[Pending, Chosen, Way]:
        tour, weights, each, known, read = announced
        if read is not None:
            read.synchronize()
        *counts, many = known.tolist()
        send, receive = counts[:self.ranks.n], counts[self.ranks.n:]
        way = Way(tour.sent[:sum(send)], tour.at, send, receive)
        if self.copies is not None:
            self.copies.room(x)
        sent = self.lanes.start(x, partial(self.there, way), partial(self.home, way), late=True)
        came = tour.came[:sum(receive)]
        return sent, Chosen(tour.ids.index_select(0, came), weights.index_select(0, came), many, each), way

    def combine(self, y: Tensor, back: Way) -> Pending:
        with self.lanes.front():
            return self.lanes.start(y, partial(self.home, back), partial(self.there, back))

    def there(self, way: Way, x: Tensor) -> Started:
        """x (N, D), this rank's tokens -> those (U, D) that visit it, the first from rank 0."""
        self.lanes.reads(way.sent)
        if self.copies is not None:
            self.ranks.note("all-to-all")
            return Started(*self.copies.there(x, way.sent.split(way.send), way.receive))
        return self.ranks.exchange(x.index_select(0, way.sent), way.send, way.receive)

    def home(self, way: Way, y: Tensor) -> Started:
        """And back: what became of them (U, D) -> the sums over ranks (N, D)."""
        def add(y: Tensor) -> Tensor:
            self.lanes.reads(way.at)
            return collect(y, way.at)
        if self.copies is not None:
            self.ranks.note("all-to-all")
            return Started(*self.copies.home(y, way.receive, len(way.at), add))
        return self.ranks.exchange(y, way.receive, way.send)._replace(finish=add)
