"""Expert parallelism: rows travel to the ranks that hold their experts, and back. Dropless, uneven.

Dispatch starts beside the token mixer and is awaited by the experts; combine starts behind the experts and is awaited
by the next norm that reads. Under ladder wiring the mixers in between run meanwhile.
"""
from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.model.residual import Pending
from stepladder.ops import experts
from stepladder.parallel.flight import Lanes
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
    """How many rows will come from whom."""
    counts: Tensor         # (2, ranks, a rank's experts) sent, received; on the host, when `read` is over
    read: Any              # an event


class Back(NamedTuple):
    """The way back of dispatched rows."""
    order: Tensor          # of arrived rows, by expert
    inverse: Tensor
    send: list[int]        # rows to each rank
    receive: list[int]     # rows from each rank


class Sorting(NamedTuple):
    """Rows that will be sorted by expert when they have arrived."""
    rows: Pending
    back: Back

    def wait(self) -> Tensor:
        return experts.permute(self.rows.wait(), self.back.order, self.back.inverse)


class AllToAll:
    """An Exchange over `ranks`, of which r holds experts r E/n .. (r + 1) E/n."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.lanes = ranks, ranks.lanes
        self.carry = Carry(ranks.lanes).carry

    def announce(self, counts: Tensor) -> Announced:
        counts = counts.view(self.ranks.n, -1)                       # (rank, its experts)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.ranks.group())
        # The one read of the device per MoE layer, on its way while the host goes on: uneven splits are host numbers.
        both = torch.stack([counts, arriving])
        host = torch.empty_like(both, device="cpu", pin_memory=both.is_cuda).copy_(both, non_blocking=True)
        return Announced(host, torch.cuda.current_stream().record_event() if both.is_cuda else None)

    def dispatch(self, rows: Tensor, announced: Announced) -> tuple[Pending, Tensor, Back]:
        counts, read = announced
        if read is not None:
            read.synchronize()
        send, receive = counts.sum(2).tolist()
        order, inverse, ends = experts.regroup(counts[1], rows.device)
        back = Back(order, inverse, send, receive)
        move = self.ranks.exchange
        there, home = partial(move, send=send, receive=receive), partial(move, send=receive, receive=send)
        return Sorting(self.lanes.start(rows, there, home, late=True), back), ends, back

    def combine(self, rows: Tensor, back: Back) -> Pending:
        with self.lanes.front():
            rows = experts.permute(rows, back.inverse, back.order)
            move = self.ranks.exchange
            there = partial(move, send=back.receive, receive=back.send)
            return self.lanes.start(rows, there, partial(move, send=back.send, receive=back.receive))
