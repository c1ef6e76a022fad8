"""How outputs travel while mixers compute: two lanes, and collectives that start in one place and land in another.

Mixers run on the front lane, the stream that was current. What joins their outputs (sums, norms, routers) runs beside
it on a stream of its own, as far ahead as the wiring lets it. A collective is started by one autograd node and awaited
by another, and its backward mirrors that:

                    start                       land
enter   forward     beside: gather              front, as the mixer begins
        backward    front, as the mixer ends    beside: scatter, before the norm's backward
leave   forward     front, as the mixer ends    beside: scatter, before the next norm that reads it
        backward    beside: gather              front, as the mixer's backward begins

Under plain tensor parallelism gather is a copy and scatter is a sum. On a CPU there is one lane and the same order.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.model.residual import Pending, Ready, Stream


class Started(NamedTuple):
    """A tensor that a collective is still writing, and what makes the result of it when it is complete. Without one,
    who lands it has waited for the lane that started it: in front(), or by the rules of autograd."""
    y: Tensor
    work: dist.Work | torch.cuda.Event | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    source: Tensor | None = None           # what the collective reads, where that is not y


Trip = Callable[[Tensor], Started]


class Lanes:
    """The two lanes of a decoder, and the order in which its backward goes from one to the other."""

    def __init__(self, device: torch.device):
        # High priority: what runs beside is small, and what waits for it is not.
        self.side = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.main: torch.cuda.Stream | None = None
        self.mark = self.low = 0
        self.where = ""                  # the sublayer whose collectives are being started, for the watchdog

    def beside(self) -> bool:
        """Whether this is the side lane; a backward node runs on the lane its forward ran on."""
        return self.side is not None and torch.cuda.current_stream(self.side.device) == self.side

    def aside(self, run: Callable[[Stream], Stream], s: Stream) -> Stream:
        """run(s) beside the front lane, which has made s, and waits for the result."""
        self.mark = torch.iinfo(torch.int64).max
        if self.side is None:
            return run(s)
        self.main = torch.cuda.current_stream(self.side.device)
        self.side.wait_stream(self.main)
        _used_by(self.side, s)
        with torch.cuda.stream(self.side):
            s = run(s)
        self.main.wait_stream(self.side)
        _used_by(self.main, s)
        return s

    @contextlib.contextmanager
    def front(self, *needs: Any) -> Iterator[None]:
        """Back to the front lane; with `needs`, once the side lane has made them. Who is not beside is there already:
        before aside() that need not be the lane of the pass before, whose passes may be recorded."""
        if self.side is None or self.main is None or not self.beside():
            yield
            return
        if needs:
            self.main.wait_stream(self.side)
            _used_by(self.main, needs)
        with torch.cuda.stream(self.main):
            yield

    def reads(self, *things: Any) -> None:
        """This lane reads what another may have made, and the allocator does not know from autograd."""
        _used_by(None if self.side is None else torch.cuda.current_stream(self.side.device), things)

    def again(self) -> contextlib.AbstractContextManager[Any]:
        """Where a sublayer is computed again: where it was. Autograd would do it on the lane of the first node that
        asks for what was not saved, and has no lane wait for a saved tensor that another made."""
        return contextlib.nullcontext() if self.side is None else torch.cuda.stream(self.side)

    def sublayer(self, name: str) -> None:
        """The next sublayer begins here."""
        self.where = name
        self.low, self.mark = self.mark, torch._C._autograd._get_sequence_nr()  # pyright: ignore

    def start(self, x: Tensor, go: Trip, back: Trip, late: bool = False) -> Pending:
        """Send x off; wait() gives what `go` makes of it, and its gradient comes by `back`.

        late: it is a sublayer's input. Autograd runs the newest ready node, and that would be the wait for its
        gradient: it is made as old as the sublayer before, so that this one's backward is queued first.
        """
        flight = _Flight(self, go, back)
        token: Tensor = _Start.apply(x, flight)  # pyright: ignore[reportAssignmentType]
        if late:
            self._lower(token)
        return Travelling(token, flight)

    def carry(self, x: Tensor, late: bool = False) -> Pending:
        """From this lane to the one that waits. Back comes its gradient by autograd alone: a node runs on the lane that
        its forward ran on, and waits for those that made its inputs."""
        if late:
            self._lower(x)
        return Ready(x) if self.side is None else Carried(x, torch.cuda.current_stream().record_event())

    def _lower(self, x: Tensor) -> None:
        """What takes x's gradient on is made as old as the sublayer before."""
        node: Any = x.grad_fn
        if node is not None:
            node._set_sequence_nr(min(self.low, node._sequence_nr()))


class _Flight:
    """One tensor on its way, forward or backward."""

    def __init__(self, lanes: Lanes, go: Trip, back: Trip):
        self.lanes, self.go, self.back, self.where = lanes, go, back, lanes.where
        self.under_way: Started | None = None

    def start(self, trip: Trip, x: Tensor) -> None:
        self.lanes.where = self.where
        self.under_way = trip(x)

    def land(self) -> Tensor:
        assert self.under_way is not None
        (y, work, finish, source), self.under_way = self.under_way, None
        if work is not None:
            with torch.no_grad():    # gloo's reduce-scatter copies into y here; autograd would take that for the maths
                work.wait()
        # They were made on the lane that started, and may be forgotten while they are still read: a collective holds
        # what it reads until wait() is called, and that only tells this lane when it is over.
        _used_by(None if self.lanes.side is None else torch.cuda.current_stream(), (source, y))
        return y if finish is None else finish(y)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.start(flight.go, x)
        return _stand_in(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return ctx.flight.land(), None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: _Flight) -> Tensor:
        ctx.flight, ctx.token = flight, token.detach()
        return flight.land()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        ctx.flight.start(ctx.flight.back, g)
        return _stand_in(ctx.token), None


def _stand_in(x: Tensor) -> Tensor:
    """For a tensor on its way: its shape, and next to no memory."""
    return x.new_empty(()).expand(x.shape)


class Travelling(NamedTuple):
    token: Tensor
    flight: _Flight

    def wait(self) -> Tensor:
        return _Land.apply(self.token, self.flight)  # pyright: ignore[reportReturnType]


class Carried(NamedTuple):
    y: Tensor
    made: Any              # an event

    def wait(self) -> Tensor:
        lane = torch.cuda.current_stream()
        lane.wait_event(self.made)
        self.y.record_stream(lane)
        return self.y


def _used_by(stream: torch.cuda.Stream | None, things: tuple[Any, ...]) -> None:
    """The allocator must not give their memory away before `stream` has come this far."""
    if stream is None:
        return
    for t in things:
        if isinstance(t, tuple):
            _used_by(stream, t)
        elif isinstance(t, Tensor) and t.device == stream.device:       # not what the host has
            t.record_stream(stream)
