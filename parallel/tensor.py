"""Tensor and sequence parallelism: every rank holds a slice of each sublayer; outputs are summed on their way back.

            stream h          enter: spread         leave: collect
tensor      whole             copy                  all-reduce
sequence    own tokens        all-gather            reduce-scatter
own tokens  whole             slice own tokens      all-gather        (MoE without sequence parallel)
            own tokens        nothing               nothing           (MoE under sequence parallel)

Each column is the other's backward. parallel/flight.py says when they start and when they are awaited.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from stepladder.model.residual import Pending, Ready, Stream
from stepladder.parallel.copies import Copies
from stepladder.parallel.flight import Lanes, Started
from stepladder.parallel.watch import watch

Group = dist.ProcessGroup
# torch 2.13 renames these two and warns of the old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks:
    """The ranks of one axis, by two communicators: each works off its collectives in order, and what is started beside
    the mixers must not queue behind what waits for a mixer. `copies`: large ones by copy engines, see copies.py."""

    def __init__(self, lanes: Lanes, front: Group, beside: Group | None = None, copies: bool = False):
        self.lanes, self.groups = lanes, (front, beside or front)
        self.n, self.rank = dist.get_world_size(front), dist.get_rank(front)
        self.copies = [Copies(g, lanes.side.device) for g in self.groups] if copies and lanes.side is not None else None

    def group(self) -> Group:
        return self.groups[self.lanes.beside()]

    def gather(self, x: Tensor) -> Started:
        """x (B, t, D) of every rank -> (B, n t, D)."""
        if self.copies is not None:
            return Started(*self._copied("all-gather").gather(x), _join)
        x, out = x.contiguous(), x.new_empty(self.n, *x.shape)
        work = all_gather_single(out.flatten(0, 1), x, group=self.group(), async_op=True)
        return Started(out, self._track(work, "all-gather"), _join, x)

    def scatter(self, y: Tensor) -> Started:
        """y (B, T, D) shares -> this rank's tokens (B, T/n, D) of their sum."""
        parts = y.unflatten(1, (self.n, -1)).transpose(0, 1)
        if self.copies is not None:
            return Started(*self._copied("reduce-scatter").scatter(parts))
        parts = parts.contiguous()
        out = torch.empty_like(parts[0])
        work = reduce_scatter_single(out, parts.flatten(0, 1), group=self.group(), async_op=True)
        return Started(out, self._track(work, "reduce-scatter"), source=parts)

    def add_up(self, y: Tensor) -> Started:
        """y shares -> their sum."""
        if self.copies is not None and y.numel() % self.n == 0:
            return Started(*self._copied("all-reduce").add_up(y.contiguous()))
        y = y.clone(memory_format=torch.contiguous_format)       # gradients may be shared: never write them in place
        return Started(y, self._track(dist.all_reduce(y, group=self.group(), async_op=True), "all-reduce"))

    def own(self, x: Tensor) -> Started:
        """This rank's tokens of x (B, T, D)."""
        return Started(x.chunk(self.n, 1)[self.rank].contiguous())

    def exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Started:
        """rows (sum of send, D), those for rank 0 first -> (sum of receive, D), those from rank 0 first."""
        rows, out = rows.contiguous(), rows.new_empty(sum(receive), rows.shape[1])
        work = dist.all_to_all_single(out, rows, receive, send, group=self.group(), async_op=True)
        return Started(out, self._track(work, "all-to-all"), source=rows)

    def every(self, v: Tensor, what: str) -> Tensor:
        """v of every rank -> (n, *v.shape); this lane goes on with it. `what` it is, for the watchdog."""
        return _Every.apply(v, self, what)  # pyright: ignore[reportReturnType]

    def total(self, v: Tensor) -> Tensor:
        return _Total.apply(v, self)  # pyright: ignore[reportReturnType]

    def highest(self, v: Tensor) -> Tensor:
        return self._reduced(v, dist.ReduceOp.MAX)

    def _reduced(self, v: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        v = v.clone(memory_format=torch.contiguous_format)
        self._await(dist.all_reduce(v, op=op, group=self.group(), async_op=True), "all-reduce of a statistic")
        return v

    def _await(self, work: dist.Work | None, kind: str) -> None:
        """This lane goes on when it is over."""
        work = self._track(work, kind)
        assert work is not None
        work.wait()

    def _copied(self, kind: str) -> Copies:
        """What carries the next one."""
        assert self.copies is not None
        self.note(kind)
        return self.copies[self.lanes.beside()]

    def note(self, kind: str) -> None:
        """What copy engines carry has no handle: the watchdog is told its name."""
        if not self._recorded():
            watch.note(kind, self.lanes.where)

    def _track(self, work: dist.Work | None, kind: str) -> dist.Work | None:
        return work if work is None or self._recorded() else watch.track(work, kind, self.lanes.where)

    def _recorded(self) -> bool:
        """What is being recorded does not run."""
        return self.lanes.side is not None and torch.cuda.is_current_stream_capturing()


def copy(x: Tensor) -> Started:
    return Started(x.detach())


def _join(x: Tensor) -> Tensor:
    """(n, B, t, D) -> (B, n t, D)"""
    return x.transpose(0, 1).flatten(1, 2)


class _Every(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, ranks: Ranks, what: str) -> Tensor:
        ctx.ranks, ctx.what, v, out = ranks, what, v.contiguous(), v.new_empty(ranks.n, *v.shape)
        work = all_gather_single(out.flatten(0, 1), v, group=ranks.group(), async_op=True)
        ranks._await(work, f"all-gather of {what}")
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        ranks, g, out = ctx.ranks, g.contiguous(), g.new_empty(g.shape[1:])
        work = reduce_scatter_single(out, g.flatten(0, 1), group=ranks.group(), async_op=True)
        ranks._await(work, f"reduce-scatter of {ctx.what}")
        return out, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks._reduced(v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return ctx.ranks._reduced(g), None


class TensorComm:
    """The Comm of mixers that hold a slice of each weight; without ranks, of any on two lanes."""

    def __init__(self, lanes: Lanes, ranks: Ranks | None, sequence: bool = False, name: str = ""):
        self.lanes, self.ranks, self.sequence, self.name = lanes, ranks, sequence, name
        self.divided = ranks is not None

    def spread(self, x: Tensor) -> Started:
        assert self.ranks is not None
        return self.ranks.gather(x) if self.sequence else copy(x)

    def collect(self, y: Tensor) -> Started:
        assert self.ranks is not None
        return self.ranks.scatter(y) if self.sequence else self.ranks.add_up(y)

    def aside(self, run: Callable[[Stream], Stream], s: Stream) -> Stream:
        return self.lanes.aside(run, s)

    def again(self) -> AbstractContextManager[Any]:
        return self.lanes.again()

    def enter(self, x: Tensor) -> Pending:
        self.lanes.sublayer(self.name)
        if self.ranks is None:
            return self.lanes.carry(x, late=True)
        return self.lanes.start(x, self.spread, self.collect, late=True)

    def work(self, mixer: Callable[..., Any], x: Pending, *args: Any) -> Any:
        with self.lanes.front(x, args):
            return mixer(x.wait(), *args)

    def leave(self, y: Tensor | Pending, also: Tensor | None = None) -> Pending:
        self.lanes.where = self.name
        with self.lanes.front():
            y = y if isinstance(y, Tensor) else y.wait()
            y = y if also is None else y + also
            return self.lanes.carry(y) if self.ranks is None else self.lanes.start(y, self.collect, self.spread)

    def total(self, v: Tensor) -> Tensor:
        return v if self.ranks is None else self.ranks.total(v)

    def highest(self, v: Tensor) -> Tensor:
        return v if self.ranks is None else self.ranks.highest(v)


class OwnTokens:
    """For mixers that take this rank's tokens and return whole rows. `stream` moves the shares of other mixers."""

    def __init__(self, stream: TensorComm):
        self.stream, self.lanes, self.ranks, self.name = stream, stream.lanes, stream.ranks, stream.name
        self.work, self.aside, self.again = stream.work, stream.aside, stream.again
        self.total, self.highest = stream.total, stream.highest
        self.divided = stream.divided

    def enter(self, x: Tensor) -> Pending:
        """Awaited at once: routing, beside the mixers, reads it."""
        self.lanes.sublayer(self.name)
        return Ready(x if self.whole() else self.lanes.start(x, self.spread, self.collect, late=True).wait())

    def leave(self, y: Tensor | Pending, also: Tensor | None = None) -> Pending:
        assert not isinstance(y, Tensor)
        if also is not None:        # a share of all tokens: own rows are placed in it, and one collective sums both
            with self.lanes.front():
                mine = y.wait()
                if not self.whole() or self.stream.sequence:
                    assert self.ranks is not None
                    before = self.ranks.rank * mine.shape[1]
                    mine = F.pad(mine, (0, 0, before, also.shape[1] - before - mine.shape[1]))
                return self.stream.leave(mine, also)
        return y if self.whole() else Gathering(y, self)

    def whole(self) -> bool:
        """Whether the stream holds this rank's tokens and no others."""
        return self.ranks is None or self.stream.sequence

    def spread(self, x: Tensor) -> Started:
        assert self.ranks is not None
        return self.ranks.own(x)

    def collect(self, y: Tensor) -> Started:
        assert self.ranks is not None
        return self.ranks.gather(y)


class Gathering(NamedTuple):
    """Own tokens that every rank needs, once they have come back from the experts."""
    y: Pending
    comm: OwnTokens

    def wait(self) -> Tensor:
        self.comm.lanes.where = self.comm.name
        return self.comm.lanes.start(self.y.wait(), self.comm.collect, self.comm.spread).wait()
