"""Expert parallelism: rows travel to the ranks that hold their experts, and back. Dropless, uneven.

Dispatch starts beside the token mixer and is awaited by the experts; combine starts behind the experts and is awaited
by the next norm that reads. Under ladder wiring the mixers in between run meanwhile.
"""
from __future__ import annotations

from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepladder.model.residual import Pending
from stepladder.ops import experts
from stepladder.parallel.copies import Rows, Shares
from stepladder.parallel.flight import Lanes, Started
from stepladder.parallel.tensor import Ranks


class Carry:
    """An Exchange where every rank holds all experts: rows go from lane to lane."""

    def __init__(self, lanes: Lanes):
        self.lanes = lanes

    def announce(self, counts: Tensor) -> Tensor:
        return counts

    def dispatch(self, rows: Tensor, announced: Tensor) -> tuple[Pending, Tensor, Any]:
        return self.lanes.carry(rows), announced.cumsum(0), None

    def combine(self, rows: Tensor, back: Any) -> Pending:
        return self.carry(rows)

    def carry(self, y: Tensor) -> Pending:
        with self.lanes.front():
            return self.lanes.carry(y)


class Announced(NamedTuple):
    """How many rows will come from whom to whom."""
    counts: Tensor         # (ranks, experts); on the host, when `read` is over
    read: Any              # an event


class Way:
    """Of dispatched rows: how many go where, and where they belong there."""

    def __init__(self, counts: Tensor, rank: int, device: torch.device):
        """counts (from, to, a rank's experts), on the host."""
        self.rows, self.rank = counts.sum(2).tolist(), rank                # (from, to)
        self.send, self.receive = self.rows[rank], [rows[rank] for rows in self.rows]
        self.arriving, self.device = counts[:, rank], device

    def shares(self) -> Shares:
        return Shares(self.send, [sum(column[:self.rank]) for column in zip(*self.rows, strict=True)])

    def most(self) -> int:
        """Rows that any rank gets."""
        return max(map(sum, zip(*self.rows, strict=True)))

    @cached_property
    def sorted(self) -> experts.Sorted:
        return experts.regroup(self.arriving, self.device)


class AllToAll:
    """An Exchange over `ranks`, of which r holds experts r E/n .. (r + 1) E/n. `copies`: by copy engines."""

    def __init__(self, ranks: Ranks, copies: Rows | None = None):
        self.ranks, self.lanes, self.copies = ranks, ranks.lanes, copies
        self.carry = Carry(ranks.lanes).carry

    def announce(self, counts: Tensor) -> Announced:
        every = self.ranks.every(counts)
        # The one read of the device per MoE layer, on its way while the host goes on: uneven splits are host numbers.
        host = torch.empty_like(every, device="cpu", pin_memory=every.is_cuda).copy_(every, non_blocking=True)
        return Announced(host, torch.cuda.current_stream().record_event() if every.is_cuda else None)

    def dispatch(self, rows: Tensor, announced: Announced) -> tuple[Pending, Tensor, Way]:
        counts, read = announced
        if read is not None:
            read.synchronize()
        way = Way(counts.unflatten(1, (self.ranks.n, -1)), self.ranks.rank, rows.device)
        if self.copies is not None:
            self.copies.room(way.most() * rows.shape[1] * rows.itemsize)
        there, home = partial(self.there, way), partial(self.home, way)
        sent = self.lanes.start(rows, there, home, late=True)
        return sent, way.sorted.ends, way           # they are on their way first: sorting takes the host some calls

    def combine(self, rows: Tensor, back: Way) -> Pending:
        with self.lanes.front():
            return self.lanes.start(rows, partial(self.home, back), partial(self.there, back))

    def there(self, way: Way, rows: Tensor) -> Started:
        """Rows as they were sent -> those for this rank's experts, sorted by expert when they have landed."""
        if self.copies is not None:
            self.ranks.note("all-to-all")
            take = self.copies.take
            return Started(rows, self.copies.send(rows, way.shares()), lambda sent: take(way.sorted.order, sent))
        moved = self.ranks.exchange(rows, way.send, way.receive)
        return moved._replace(finish=lambda y: y.index_select(0, way.sorted.order))

    def home(self, way: Way, rows: Tensor) -> Started:
        """And back."""
        if self.copies is not None:
            self.ranks.note("all-to-all")
            return Started(*self.copies.fetch(rows, way.sorted.inverse, way.shares()))
        return self.ranks.exchange(rows.index_select(0, way.sorted.inverse), way.receive, way.send)
