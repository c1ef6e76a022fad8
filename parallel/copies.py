"""Collectives by copy engines: they take no multiprocessor from the mixers they hide under. NCCL's sums take 24 of 132
and slow the products beside them by 5 % (two H200, an all-reduce of 32 MiB); its exchanges take 32, which makes of a
product's one wave two and of attention's backward pass half as much again, and are three times as slow beside it.

A rank writes its parts into the memory of the ranks that add them, straight from where they lie; a sum is pulled from
the rank that formed it. Only the additions and the meetings are kernels, and few: each waits for multiprocessors that
products hold, up to 50 us at a time, whatever its priority. Within one machine, over peer-to-peer links.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from stepladder.ops.parts import add


class Copies:
    """Collectives among the ranks of `group`, one after the other on a stream of their own.

    A call returns its result and the event that completes it. Parts are added once, in fp32, in the order of ranks, so
    every rank has the same bits.

    The ranks meet twice in a call, and so never depend on the calls before: a recorded graph may follow any other.
      inbox   written before the first meeting, by others or (gather) by its owner; read between the two
      total   written by its owner between the two; read by others after the second and before the next call's first
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.n, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.others = [(self.rank + i) % self.n for i in range(1, self.n)]      # not all at the same one
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.size, self.memory = 0, []

    def gather(self, x: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """x of every rank -> (n, *x.shape)."""
        x = x.contiguous()
        with self._beside(x):
            out = x.new_empty(self.n, *x.shape)
            self._of(self.rank, x.shape, x).copy_(x)
            self._meet()
            for peer in self.others:
                out[peer].copy_(self._of(peer, x.shape, x))
            out[self.rank].copy_(x)
            self._meet()
            return out, self._done()

    def scatter(self, parts: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """parts (n, ...) -> the sum over ranks of part number `rank`."""
        parts = parts.contiguous()
        with self._beside(parts):
            out = torch.empty_like(parts[0])
            add(self._delivered(parts.view(self.n, -1)), out)
            self._meet()
            return out, self._done()

    def add_up(self, y: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """y, contiguous -> its sum over ranks. y.numel() is a multiple of n."""
        with self._beside(y):
            parts = y.view(self.n, -1)
            out = torch.empty_like(parts)
            add(self._delivered(parts), self._total(self.rank, parts), out[self.rank])
            self._meet()
            for peer in self.others:
                out[peer].copy_(self._total(peer, parts))
            return out.view(y.shape), self._done()

    def _delivered(self, parts: Tensor) -> list[Tensor]:
        """parts (n, size) -> this rank's of every rank's, each (size,): its own where it lies, the others' here."""
        of = lambda owner, writer: self._of(owner, parts[0].shape, parts, writer * parts.shape[1])
        for peer in self.others:
            of(peer, self.rank).copy_(parts[peer])
        self._meet()
        return [parts[r] if r == self.rank else of(self.rank, r) for r in range(self.n)]

    def _total(self, owner: int, parts: Tensor) -> Tensor:
        return self._of(owner, parts[0].shape, parts, self.size // parts.itemsize)

    def _of(self, owner: int, shape: torch.Size, like: Tensor, begin: int = 0) -> Tensor:
        """A rank's memory from element number `begin` on."""
        return self.handle.get_buffer(owner, shape, like.dtype, begin)

    def _meet(self) -> None:
        self.handle.barrier()

    @contextlib.contextmanager
    def _beside(self, x: Tensor) -> Iterator[None]:
        if x.nbytes > self.size:
            self._allocate(x.nbytes)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        x.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            yield

    def _done(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def _allocate(self, size: int) -> None:
        """Room for the inbox, and for a total behind it. Collective, and it waits for the device: in the first passes
        only. What there was stays: graphs may have recorded it. It is made on the lane of the caller, one group's own:
        memory of one lane may share a segment, and that has one pad of signals for all that meet in it."""
        torch.cuda.synchronize(self.device)
        self.size = -(-size // 4096) * 4096
        self.memory.append(symmetric.empty(2 * self.size, dtype=torch.uint8, device=self.device))
        self.handle = symmetric.rendezvous(self.memory[-1], self.group)


class Shares(NamedTuple):
    """Of a rank's rows, what is whose."""
    sizes: list[int]       # rows for each rank, the first for rank 0
    begins: list[int]      # where they begin among all those for that rank, the first from rank 0


class Rows:
    """Rows to the ranks of `group` that they are for and back, uneven: send() and take() there, fetch() home. In each
    direction one after the other, on a stream of its own: what goes home waits for mixers.

    By turns one meeting each way, which also tells that the boxes of the other way are free: who comes to fetch()'s has
    taken its rows, who comes to the next send()'s has read every outbox. A meeting of take()'s own waited for the
    slowest rank while the experts began: its kernel keeps a multiprocessor from their first product.
      inbox    written by all before the meeting in send(), read by its owner in take() before that in fetch()
      outbox   written by its owner before the meeting in fetch(), read by all before that in send()
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.n, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.others = [(self.rank + i) % self.n for i in range(1, self.n)]
        self.there, self.home = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
        self.lines = [torch.cuda.Stream(device, priority=-1) for _ in range(min(self.n, 4) - 1)]
        self.size, self.last, self.sent = 0, "", False
        self.came = self.taken = self.fetched = self.home.record_event()

    def room(self, size: int) -> None:
        """Every rank's boxes hold `size` bytes. Collective where they grow, with the same size on every rank."""
        if size > self.size:
            if self.size:                                           # which others may still be reading
                with torch.cuda.stream(self.home):
                    self.home.wait_event(self.taken)
                    self._meet(2)
            torch.cuda.synchronize(self.device)
            self.size = -(-size * 5 // 4 // 4096) * 4096            # the next rows are seldom as many
            self.memory = symmetric.empty(2 * self.size, dtype=torch.uint8, device=self.device)
            self.handle = symmetric.rendezvous(self.memory, self.group)

    def send(self, x: Tensor, shares: Shares) -> Any:
        """x (N, D), the first rows for rank 0, is needed until the event is over; take() then gives what has come."""
        assert not self.sent, "rows lie in the inbox that nobody has taken"
        parts = x.split(shares.sizes)
        self.there.wait_stream(torch.cuda.current_stream(self.device))
        self.there.wait_event(self.fetched)
        with torch.cuda.stream(self.there):
            if self.last == "send":                     # what is computed again is sent again, and not fetched between
                self.there.wait_event(self.taken)
                self._meet(1)
            self._copy([self._inbox(r, shares.begins[r], part) for r, part in enumerate(parts)], parts)
            self._meet(1)
            self.came = self.there.record_event()
        self.last, self.sent = "send", True
        return self.came

    def take(self, order: Tensor, like: Tensor) -> Tensor:
        """What has come, in another order (n,). like (N, D) is what was sent."""
        shape = torch.Size((order.shape[0], like.shape[1]))
        y = self.handle.get_buffer(self.rank, shape, like.dtype, 0).index_select(0, order)
        self.taken, self.sent = torch.cuda.current_stream(self.device).record_event(), False
        return y

    def fetch(self, x: Tensor, order: Tensor, shares: Shares) -> tuple[Tensor, Any]:
        """x (n, D), what became of the rows that had come, once in `order` as they had; those sent, and the event that
        completes them."""
        assert not self.sent, "rows lie in the inbox that nobody has taken"
        lane = torch.cuda.current_stream(self.device)
        if self.last == "fetch":
            with torch.cuda.stream(self.home):
                self._meet(2)
                self.came = self.home.record_event()
        lane.wait_event(self.came)
        torch.index_select(x, 0, order, out=self._outbox(self.rank, 0, x))
        self.home.wait_stream(lane)
        self.home.wait_event(self.taken)
        with torch.cuda.stream(self.home):
            self._meet(2)
            y = x.new_empty(sum(shares.sizes), x.shape[1])
            parts = y.split(shares.sizes)
            self._copy(parts, [self._outbox(r, shares.begins[r], part) for r, part in enumerate(parts)])
            self.fetched = self.home.record_event()
        self.last = "fetch"
        return y, self.fetched

    def _copy(self, to: Sequence[Tensor], of: Sequence[Tensor]) -> None:
        """By rank, several at once: one after the other, ranks out of step meet at the same peer, and each has half of
        its link (four H200: 180 GB/s of 385 in a sixth of the copies). What stays is last, and nobody waits behind it:
        within a GPU the driver copies by a kernel, which waits for multiprocessors."""
        lane = torch.cuda.current_stream(self.device)
        lines = [lane, *self.lines]
        for line in self.lines:
            line.wait_stream(lane)
        for i, r in enumerate((*self.others, self.rank)):
            with torch.cuda.stream(lines[i % len(lines)]):
                to[r].copy_(of[r])
        for line in self.lines:
            lane.wait_stream(line)

    def _inbox(self, owner: int, begin: int, like: Tensor) -> Tensor:
        return self.handle.get_buffer(owner, like.shape, like.dtype, begin * like.shape[1])

    def _outbox(self, owner: int, begin: int, like: Tensor) -> Tensor:
        return self.handle.get_buffer(owner, like.shape, like.dtype, self.size // like.itemsize + begin * like.shape[1])

    def _meet(self, channel: int) -> None:
        """By a channel of its own: memory may share its signals with what was allocated before."""
        self.handle.barrier(channel)
