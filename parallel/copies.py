"""Collectives by copy engines: they take no multiprocessor from the mixers they hide under. NCCL's sums take 24 of 132
and slow the products beside them by 5 % (two H200, an all-reduce of 32 MiB); its exchanges take 32, which makes of a
product's one wave two and of attention's backward pass half as much again, and are three times as slow beside it.

A rank writes its parts into the memory of the ranks that add them, straight from where they lie; a sum is pulled from
the rank that formed it. Only additions, gathers and meetings are kernels, and few: each waits for multiprocessors that
products hold, up to 50 us at a time, whatever its priority. Within one machine, over peer-to-peer links.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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


class Rows:
    """Tokens to the ranks of `group` and back, uneven: there() and home(). In each direction one after the other, on a
    stream of its own: what goes home waits for mixers.

    By turns one meeting each way, which also tells that the boxes of the other way are free: who comes to home()'s has
    taken what was for it, who comes to the next there()'s has added up what came home.
      outbox   there(): written by its owner, read by all after the meeting and before that in home()
      inbox    home(): written by all before the meeting, read by its owner when the result lands, before there()'s next
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.n, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.others = [(self.rank + i) % self.n for i in range(1, self.n)]
        self.out, self.back = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
        self.lines = [torch.cuda.Stream(device, priority=-1) for _ in range(min(self.n, 4) - 1)]
        self.size, self.last, self.flying = 0, "", False
        self.came = self.landed = self.returned = self.back.record_event()

    def room(self, x: Tensor) -> None:
        """Two boxes that hold x (N, D) once for each rank: 2 n N D numbers. Collective where they grow: x has one shape
        on all ranks."""
        assert not self.flying, "what came home has not landed, and its box would be given back"
        if x.nbytes > self.size:
            if self.size:                                           # which others may still be reading
                with torch.cuda.stream(self.back):
                    self.back.wait_event(self.came)
                    self._meet(2)
            torch.cuda.synchronize(self.device)
            self.size = -(-x.nbytes // 4096) * 4096
            self.memory = symmetric.empty(2 * self.n * self.size, dtype=torch.uint8, device=self.device)
            self.handle = symmetric.rendezvous(self.memory, self.group)

    def there(self, x: Tensor, which: Sequence[Tensor], receive: list[int]) -> tuple[Tensor, Any]:
        """x (N, D), of which `which` go to each rank -> what comes (sum of receive, D), the first from rank 0, and the
        event that completes it."""
        assert not self.flying, "what came home has not landed, and its box would be written again"
        N = x.shape[0]
        self.out.wait_stream(torch.cuda.current_stream(self.device))
        x.record_stream(self.out)
        for of in which:
            of.record_stream(self.out)
        with torch.cuda.stream(self.out):
            self.out.wait_event(self.returned)
            if self.last == "there":                # what is computed again is sent again, and came home not once
                self._meet(3)
            y = x.new_empty(sum(receive), x.shape[1])
            parts = y.split(receive)
            for r, of in enumerate(which):
                to = parts[r] if r == self.rank else self._box(1, self.rank, r, N, of.shape[0], x)
                torch.index_select(x, 0, of, out=to)
            self.out.wait_event(self.landed)
            self._meet(1)
            self._copy(parts, [self._box(1, r, self.rank, N, part.shape[0], x) for r, part in enumerate(parts)])
            self.came = self.out.record_event()
        self.last = "there"
        return y, self.came

    def home(self, y: Tensor, send: list[int], N: int, add: Callable[[Tensor], Tensor]) -> tuple[Tensor, Any, Any]:
        """y (sum of send, D), those for rank 0 first -> where they come home (n N, D), the first N for rank 0's; the
        event that completes them; and what lands them: `add` makes of them what is kept."""
        assert not self.flying, "what came home has not landed, and its box would be written again"
        self.back.wait_stream(torch.cuda.current_stream(self.device))
        y.record_stream(self.back)
        with torch.cuda.stream(self.back):
            self.back.wait_event(self.came)
            if self.last == "home":
                self.back.wait_event(self.landed)
                self._meet(3)
            parts = y.split(send)
            boxes = [self._box(0, r, self.rank, N, part.shape[0], y) for r, part in enumerate(parts)]
            self._copy(boxes, parts, own=True)
            self._meet(2)
            self.returned = self.back.record_event()
        self.last, self.flying = "home", True
        box = self._box(0, self.rank, 0, 0, self.n * N, y)

        def land(box: Tensor) -> Tensor:
            out = add(box)
            self.landed, self.flying = torch.cuda.current_stream(self.device).record_event(), False
            return out

        return box, self.returned, land

    def _copy(self, to: Sequence[Tensor], of: Sequence[Tensor], own: bool = False) -> None:
        """By rank, several at once: one after the other, ranks out of step meet at the same peer, and each has half of
        its link (four H200: 180 GB/s of 385 in a sixth of the copies). What stays is last, and nobody waits behind it:
        within a GPU the driver copies by a kernel, which waits for multiprocessors."""
        lane = torch.cuda.current_stream(self.device)
        lines = [lane, *self.lines]
        for line in self.lines:
            line.wait_stream(lane)
        for i, r in enumerate((*self.others, *[self.rank] * own)):
            with torch.cuda.stream(lines[i % len(lines)]):
                to[r].copy_(of[r])
        for line in self.lines:
            lane.wait_stream(line)

    def _box(self, kind: int, owner: int, other: int, N: int, rows: int, like: Tensor) -> Tensor:
        """Of a rank's inbox (0) or outbox (1), what is from or for another: it has room for N."""
        begin = kind * self.n * self.size // like.itemsize + other * N * like.shape[1]
        return self.handle.get_buffer(owner, torch.Size((rows, like.shape[1])), like.dtype, begin)

    def _meet(self, channel: int) -> None:
        """By a channel of its own: memory may share its signals with what was allocated before."""
        self.handle.barrier(channel)
