"""Tensor and sequence parallelism: every rank holds a slice of each sublayer; outputs are summed on their way back.

            stream h          enter                 leave
tensor      whole             copy                  all-reduce
sequence    own tokens        all-gather            reduce-scatter
own tokens  whole             slice own tokens      all-gather        (MoE without sequence parallel)
            own tokens        nothing               nothing           (MoE under sequence parallel)

Each forward is the other column's backward. Handles are never awaited here but in Stream.read.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from stepladder.model.residual import Pending, Ready

Group = dist.ProcessGroup
# torch 2.13 renames these two and warns of the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class InFlight(NamedTuple):
    """A tensor that a collective is still writing."""
    y: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        with torch.no_grad():        # gloo's reduce-scatter copies into y here; autograd would take that for the maths
            self.work.wait()
        return self.y


def gather(x: Tensor, group: Group) -> tuple[Tensor, dist.Work]:
    """x (B, t, D) of every rank -> (n, B, t, D), still in flight."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    work = _all_gather_single(out.flatten(0, 1), x.contiguous(), group=group, async_op=True)
    assert work is not None
    return out, work


def scatter(y: Tensor, group: Group) -> tuple[Tensor, dist.Work]:
    """y (B, T, D) shares -> this rank's tokens (B, T/n, D) of their sum, still in flight."""
    n = dist.get_world_size(group)
    parts = y.unflatten(1, (n, -1)).transpose(0, 1).contiguous()
    out = torch.empty_like(parts[0])
    work = _reduce_scatter_single(out, parts.flatten(0, 1), group=group, async_op=True)
    assert work is not None
    return out, work


def join(x: Tensor) -> Tensor:
    """(n, B, t, D) -> (B, n t, D)"""
    return x.transpose(0, 1).flatten(1, 2)


def own(x: Tensor, group: Group) -> Tensor:
    """This rank's tokens of x (B, T, D)."""
    return x.chunk(dist.get_world_size(group), 1)[dist.get_rank(group)]


def _all_gather(x: Tensor, group: Group) -> Tensor:
    out, work = gather(x, group)
    work.wait()
    return join(out)


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)       # gradients may be shared: never write them in place
    dist.all_reduce(x, group=group)
    return x


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return _all_reduce(g, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Group, box: list[dist.Work]) -> Tensor:
        y = y.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(y, group=group, async_op=True)
        assert work is not None
        box.append(work)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return g, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        out, work = scatter(g, ctx.group)
        work.wait()
        return out, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Group, box: list[dist.Work]) -> Tensor:
        ctx.group = group
        out, work = scatter(y, group)
        box.append(work)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return _all_gather(g, ctx.group), None, None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return own(x, group).contiguous()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return _all_gather(g, ctx.group), None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Group, box: list[dist.Work]) -> Tensor:
        ctx.group = group
        out, work = gather(y, group)
        box.append(work)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return g[dist.get_rank(ctx.group)], None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_reduce(v, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return _all_reduce(g, ctx.group), None


class _Grouped:
    def __init__(self, group: Group):
        self.group = group

    def total(self, v: Tensor) -> Tensor:
        return _Total.apply(v, self.group)  # pyright: ignore[reportReturnType]

    def highest(self, v: Tensor) -> Tensor:
        v = v.clone()
        dist.all_reduce(v, op=dist.ReduceOp.MAX, group=self.group)
        return v


class TensorComm(_Grouped):
    def enter(self, x: Tensor) -> Tensor:
        return _Copy.apply(x, self.group)  # pyright: ignore[reportReturnType]

    def leave(self, y: Tensor, also: Tensor | None = None) -> Pending:
        box: list[dist.Work] = []
        out = _Sum.apply(y if also is None else y + also, self.group, box)
        return InFlight(out, box[0])  # pyright: ignore[reportArgumentType]


class SequenceComm(_Grouped):
    def enter(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self.group)  # pyright: ignore[reportReturnType]

    def leave(self, y: Tensor, also: Tensor | None = None) -> Pending:
        box: list[dist.Work] = []
        out = _Scatter.apply(y if also is None else y + also, self.group, box)
        return InFlight(out, box[0])  # pyright: ignore[reportArgumentType]


class Joined(NamedTuple):
    """Gathered tokens, put in order when they have arrived."""
    flight: InFlight

    def wait(self) -> Tensor:
        return join(self.flight.wait())


class OwnTokens(_Grouped):
    """For mixers that take this rank's tokens and return whole rows. `stream` moves the shares of other mixers."""

    def __init__(self, stream: TensorComm | SequenceComm):
        super().__init__(stream.group)
        self.stream = stream

    def enter(self, x: Tensor) -> Tensor:
        return x if isinstance(self.stream, SequenceComm) else _Slice.apply(x, self.group)  # pyright: ignore

    def leave(self, y: Tensor, also: Tensor | None = None) -> Pending:
        if also is not None:        # a share of all tokens: own rows are placed in it, and one collective sums both
            before = dist.get_rank(self.group) * y.shape[1]
            after = also.shape[1] - before - y.shape[1]
            return self.stream.leave(also + F.pad(y, (0, 0, before, after)))
        if isinstance(self.stream, SequenceComm):
            return Ready(y)
        box: list[dist.Work] = []
        out = _Whole.apply(y, self.group, box)
        return Joined(InFlight(out, box[0]))  # pyright: ignore[reportArgumentType]
