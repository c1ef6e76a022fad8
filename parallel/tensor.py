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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from stepladder.model.residual import Pending, Ready, Stream
from stepladder.parallel.flight import Lanes, Started

Group = dist.ProcessGroup
# torch 2.13 renames these two and warns of the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather(x: Tensor, group: Group) -> Started:
    """x (B, t, D) of every rank -> (B, n t, D)."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    return Started(out, _all_gather_single(out.flatten(0, 1), x.contiguous(), group=group, async_op=True), _join)


def scatter(y: Tensor, group: Group) -> Started:
    """y (B, T, D) shares -> this rank's tokens (B, T/n, D) of their sum."""
    n = dist.get_world_size(group)
    parts = y.unflatten(1, (n, -1)).transpose(0, 1).contiguous()
    out = torch.empty_like(parts[0])
    return Started(out, _reduce_scatter_single(out, parts.flatten(0, 1), group=group, async_op=True))


def add_up(y: Tensor, group: Group) -> Started:
    """y shares -> their sum."""
    y = y.clone(memory_format=torch.contiguous_format)       # gradients may be shared: never write them in place
    return Started(y, dist.all_reduce(y, group=group, async_op=True))


def own(x: Tensor, group: Group) -> Started:
    """This rank's tokens of x (B, T, D)."""
    return Started(x.chunk(dist.get_world_size(group), 1)[dist.get_rank(group)].contiguous())


def _join(x: Tensor) -> Tensor:
    """(n, B, t, D) -> (B, n t, D)"""
    return x.transpose(0, 1).flatten(1, 2)


def copy(x: Tensor) -> Started:
    return Started(x.detach())


class Ranks:
    """The ranks of one axis, by two communicators: each works off its collectives in order, and what is started beside
    the mixers must not queue behind what waits for a mixer."""

    def __init__(self, lanes: Lanes, front: Group, beside: Group | None = None):
        self.lanes, self.front, self.side = lanes, front, beside or front

    def group(self) -> Group:
        return self.side if self.lanes.beside() else self.front

    def total(self, v: Tensor) -> Tensor:
        return _Total.apply(v, self)  # pyright: ignore[reportReturnType]

    def highest(self, v: Tensor) -> Tensor:
        v = v.clone()
        dist.all_reduce(v, op=dist.ReduceOp.MAX, group=self.group())
        return v


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _all_reduce(v, ranks.group())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return _all_reduce(g, ctx.ranks.group()), None


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class TensorComm:
    """The Comm of mixers that hold a slice of each weight; without ranks, of any on two lanes."""

    def __init__(self, lanes: Lanes, ranks: Ranks | None, sequence: bool = False):
        self.lanes, self.ranks, self.sequence = lanes, ranks, sequence

    def spread(self, x: Tensor) -> Started:
        return gather(x, self.ranks.group()) if self.ranks is not None and self.sequence else copy(x)

    def collect(self, y: Tensor) -> Started:
        if self.ranks is None:
            return copy(y)
        return (scatter if self.sequence else add_up)(y, self.ranks.group())

    def aside(self, run: Callable[[Stream], Stream], s: Stream) -> Stream:
        return self.lanes.aside(run, s)

    def enter(self, x: Tensor) -> Pending:
        self.lanes.sublayer()
        return self.lanes.start(x, self.spread, self.collect, late=True)

    def work(self, mixer: Callable[..., Any], x: Pending, *args: Any) -> Any:
        with self.lanes.front(x, args):
            return mixer(x.wait(), *args)

    def leave(self, y: Tensor | Pending, also: Tensor | None = None) -> Pending:
        with self.lanes.front():
            y = y if isinstance(y, Tensor) else y.wait()
            return self.lanes.start(y if also is None else y + also, self.collect, self.spread)

    def total(self, v: Tensor) -> Tensor:
        return v if self.ranks is None else self.ranks.total(v)

    def highest(self, v: Tensor) -> Tensor:
        return v if self.ranks is None else self.ranks.highest(v)


class OwnTokens:
    """For mixers that take this rank's tokens and return whole rows. `stream` moves the shares of other mixers."""

    def __init__(self, stream: TensorComm):
        self.stream, self.lanes, self.ranks = stream, stream.lanes, stream.ranks
        self.work, self.aside, self.total, self.highest = stream.work, stream.aside, stream.total, stream.highest

    def enter(self, x: Tensor) -> Pending:
        """Awaited at once: routing, beside the mixers, reads it."""
        self.lanes.sublayer()
        return Ready(x if self.whole() else self.lanes.start(x, self.spread, self.collect, late=True).wait())

    def leave(self, y: Tensor | Pending, also: Tensor | None = None) -> Pending:
        assert not isinstance(y, Tensor)
        if also is not None:        # a share of all tokens: own rows are placed in it, and one collective sums both
            with self.lanes.front():
                mine = y.wait()
                if not self.whole() or self.stream.sequence:
                    assert self.ranks is not None
                    before = dist.get_rank(self.ranks.front) * mine.shape[1]
                    mine = F.pad(mine, (0, 0, before, also.shape[1] - before - mine.shape[1]))
                return self.stream.leave(mine, also)
        return y if self.whole() else Gathering(y, self)

    def whole(self) -> bool:
        """Whether the stream holds this rank's tokens and no others."""
        return self.ranks is None or self.stream.sequence

    def spread(self, x: Tensor) -> Started:
        assert self.ranks is not None
        return own(x, self.ranks.group())

    def collect(self, y: Tensor) -> Started:
        assert self.ranks is not None
        return gather(y, self.ranks.group())


class Gathering(NamedTuple):
    """Own tokens that every rank needs, once they have come back from the experts."""
    y: Pending
    comm: OwnTokens

    def wait(self) -> Tensor:
        return self.comm.lanes.start(self.y.wait(), self.comm.collect, self.comm.spread).wait()
