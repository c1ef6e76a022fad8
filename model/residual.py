"""The residual stream, what may lag behind it, and the seam where parallelism enters a block.

A sublayer reads `h`; its output is summed over the tensor-parallel group and joins `h` later. `lag` says how many
earlier outputs may still be in flight when a sublayer reads: (0, 0) is the usual block, (0, 1) runs token and channel
mixer side by side and their outputs travel as one, (1, 1) is ladder residual (arXiv:2501.06589).
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return h.view_as(h), h.view_as(h)

    @staticmethod
    def backward(ctx: Any, one: Tensor | None, other: Tensor | None) -> Tensor | None:  # pyright: ignore
        return other if one is None else one if other is None else one + other


def apart(h: Tensor) -> tuple[Tensor, Tensor]:
    """h for two readers. Their gradients are added in new memory: autograd adds the second to the first where nobody
    else has that one any more, on the host. The mixer whose output arrived in h has it, too, and on another lane still
    reads it when the host is done with it."""
    return _Apart.apply(h) if torch.is_grad_enabled() else (h, h)  # pyright: ignore[reportReturnType]


class Pending(Protocol):
    """A sublayer output that may still be travelling."""

    def wait(self) -> Tensor: ...


class Ready(NamedTuple):
    y: Tensor

    def wait(self) -> Tensor:
        return self.y


class Comm(Protocol):
    """What a sublayer needs of the other ranks; OneRank is the identity, the others are in parallel/."""
    divided: bool          # whether the mixer's work on the same rows is divided among ranks

    def aside(self, run: Callable[[Stream], Stream], s: Stream) -> Stream:
        """run(s), beside the mixers' own lane where the machine has two."""
        ...

    def again(self) -> AbstractContextManager[Any]:
        """Around what is computed again in the backward: the lane that aside() ran it on."""
        ...

    def enter(self, x: Tensor) -> Pending:
        """The normed stream (B, T, D), or this rank's tokens of it, -> the mixer's input: copied, gathered, sliced."""
        ...

    def work(self, mixer: Callable[..., Any], x: Pending, *args: Any) -> Any:
        """mixer(x, *args) on the mixers' lane; what it returns is for leave() or ChannelMixer.deliver()."""
        ...

    def leave(self, y: Tensor | Pending, also: Tensor | None = None) -> Pending:
        """Start adding up the mixer's output. `also` is a token mixer's share that travels along. Never in place."""
        ...

    def total(self, v: Tensor) -> Tensor:
        """A statistic summed over the ranks among which the work is divided."""
        ...

    def highest(self, v: Tensor) -> Tensor:
        """The same for an element-wise maximum; not differentiable."""
        ...


class OneRank:
    divided = False

    def aside(self, run: Callable[[Stream], Stream], s: Stream) -> Stream:
        return run(s)

    def again(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def enter(self, x: Tensor) -> Pending:
        return Ready(x)

    def work(self, mixer: Callable[..., Any], x: Pending, *args: Any) -> Any:
        return mixer(x.wait(), *args)

    def leave(self, y: Tensor | Pending, also: Tensor | None = None) -> Pending:
        if also is not None:
            return Ready(also + (y if isinstance(y, Tensor) else y.wait()))
        return Ready(y) if isinstance(y, Tensor) else y

    def total(self, v: Tensor) -> Tensor:
        return v

    def highest(self, v: Tensor) -> Tensor:
        return v


class Stats(NamedTuple):
    """What one MoE layer did with this rank's tokens; detached, for the log and the balance bias."""
    load: Tensor       # (E,) tokens sent to each expert
    entropy: Tensor    # () sum over tokens of the entropy of the router's distribution, nats
    balance: Tensor    # () the balance loss, summed over tokens like every loss


class Stream(NamedTuple):
    """What flows between blocks and across pipeline stages."""
    h: Tensor                          # (B, T, D), or this rank's token shard under sequence parallel
    late: tuple[Pending, ...] = ()     # sublayer outputs not yet in h, oldest first
    route: tuple[Tensor, ...] = ()     # router logits made ahead, next MoE block's first, in own-token layout
    stats: tuple[Stats, ...] = ()      # of the MoE layers passed; stays on its pipeline stage

    def arrive(self, lag: int) -> tuple[Stream, tuple[Tensor, ...]]:
        """Wait for all but the newest `lag` outputs; the norm that reads next adds them to h, in one pass."""
        n = max(0, len(self.late) - lag)
        return self._replace(late=self.late[n:]), tuple(p.wait() for p in self.late[:n])

    def read(self, lag: int) -> Stream:
        """The same with the sums done."""
        s, arrived = self.arrive(lag)
        return s._replace(h=sum(arrived, s.h))

    def write(self, y: Pending) -> Stream:
        return self._replace(late=(*self.late, y))
