"""Whether what runs on a GPU's streams waits for what it needs, found without a GPU.

The code runs on a CPU, one operation after the other, and believes that it has streams. Every operation that torch
dispatches is an event on the current stream; every stream knows up to which event of each other one it has waited:

order      an operation reads what another stream, or a collective, may not have written yet
overwrite  it writes what another may still read
reuse      its stream gets memory back that another may still read: the allocator was not told of that one
           (record_stream), or of one that had not waited for it

Modelled: streams and events; collectives, which run beside the stream that starts them until wait() and hold what they
are given until then; what this rank does of an exchange by copy engines (Boxes); the allocator, with a pool for each
stream; autograd, which runs a node on the stream of its forward, has it wait for those that made its gradients, and
does neither for the tensors that were saved; that it adds up gradients in place of the first, which it does where
nobody else has that any more, here always.
Not modelled: what the host reads, sums by copy engines, graphs, FSDP, several devices. Which memory is given
away is not known: the worst is taken, that a stream's next operation gets it.
"""
from __future__ import annotations

import contextlib
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepladder.parallel import copies, tensor
from stepladder.parallel.flight import Lanes

UNREAD = {"empty_like", "new_empty", "new_zeros", "zeros_like"}          # they ask for a shape alone


class Lane:
    """A stream; an event, which is what a stream knew; or a collective."""
    device = torch.device("cpu")

    def __init__(self, name: str, knows: dict[Lane, int] | None = None):
        self.name, self.clock = name, dict(knows or {})

    def tick(self) -> int:
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def knows(self, lane: Lane, time: int) -> bool:
        return lane is self or self.clock.get(lane, 0) >= time

    def wait_stream(self, other: Lane) -> None:
        self.clock |= {lane: time for lane, time in other.clock.items() if not self.knows(lane, time)}

    wait_event = wait_stream

    def record_event(self) -> Lane:
        return Lane(self.name, self.clock)

    def wait(self) -> None:
        """Of an event: of the current stream, which a Model knows."""


@dataclass
class Memory:
    owner: Lane                        # of the pool it goes back to
    storage: StorageWeakRef
    written: tuple[Lane, int, str]
    reads: dict[Lane, tuple[int, str]] = field(default_factory=dict)
    told: set[Lane] = field(default_factory=set)


class Model(TorchDispatchMode):
    """Within it, torch.cuda has streams; `found` are the faults of what ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}
        self.memory: dict[int, Memory] = {}
        self.shared: set[int] = set()                                     # of it, what not its owner alone has read
        self.pools: dict[Lane, list[tuple[Lane, int, str]]] = {}          # given back: who may still read it
        self.lanes: list[Lane | None] = [Lane("front")]                   # None: autograd's own work between nodes
        self.moves: list[tuple[int, Lane]] = [(0, self.current)]          # which node is the first made on a lane
        self.lowered: dict[Any, Lane] = {}
        self.node = ""

    @property
    def current(self) -> Lane:
        assert self.lanes[-1] is not None
        return self.lanes[-1]

    @contextlib.contextmanager
    def stream(self, lane: Lane) -> Iterator[None]:
        self._move(self.lanes.append, lane)
        try:
            yield
        finally:                       # what is computed again ends by an exception
            self._move(self.lanes.pop)

    def _move(self, to: Callable[..., Any], *args: Any) -> None:
        to(*args)
        self.moves.append((torch._C._autograd._get_sequence_nr(), self.current))  # pyright: ignore

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        lower = Lanes._lower

        def lowered(lanes: Lanes, x: Tensor) -> None:
            self.lowered[x.grad_fn] = self.current                        # its number will be that of an older one
            lower(lanes, x)
        with contextlib.ExitStack() as stack:
            for where, name, new in (
                    (torch.cuda, "stream", self.stream), (torch.cuda, "current_stream", lambda *_: self.current),
                    (torch.cuda, "is_current_stream_capturing", lambda: False), (Lanes, "_lower", lowered),
                    (torch.cuda, "Stream", lambda device, priority: Lane("copies")), (copies, "symmetric", Boxes(self)),
                    (torch.cuda, "synchronize", lambda device: None),
                    (Lane, "wait", lambda event: self.current.wait_event(event)),
                    (Tensor, "record_stream", lambda x, lane: self._told(x, lane)),
                    *((m, name, partial(self._collective, getattr(m, name))) for m, name in (
                        (dist, "all_reduce"), (dist, "all_to_all_single"), (tensor, "all_gather_single"),
                        (tensor, "reduce_scatter_single")))):
                stack.enter_context(mock.patch.object(where, name, new))
            stack.enter_context(self)
            yield

    def _told(self, x: Tensor, lane: Lane) -> None:
        if _key(x) in self.memory:
            self.memory[_key(x)].told.add(lane)

    # Operations and their memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.lanes[-1] is None:
            return out
        given, made, writes = _tensors((kwargs.get("out"), args, kwargs)), _tensors(out), func._schema.is_mutable
        known = {_key(x) for x in given}
        new = [x for x in made if _key(x) not in known]
        if made and not new and not writes:
            return out                                                    # a view
        self._collect()
        event = self.current, self.current.tick(), f"{func} on {self.current.name}{self._where()}"
        for i, x in enumerate(given if func._schema.name.removeprefix("aten::") not in UNREAD else ()):
            self._touch(_key(x), event, writes and i == 0)
        for x in new:
            self._born(x, event)
        return out

    def _collective(self, start: Callable[..., dist.Work], *args: Any, async_op: bool = False, **kw: Any) -> Any:
        """The first argument is what it writes."""
        self.lanes.append(None)
        work = start(*args, async_op=True, **kw)
        self.lanes.pop()
        wire = Lane(f"{start.__name__}{self._where()}", self.current.clock)
        for i, x in enumerate(_tensors(args)):
            self._touch(_key(x), (wire, 1, wire.name), i == 0)
        wire.tick()

        def wait(held: Any = args) -> None:
            self.current.wait_event(wire)
            work.wait()                        # gloo's reduce-scatter copies here
        return SimpleNamespace(wait=wait) if async_op else wait()

    def _touch(self, key: int, event: tuple[Lane, int, str], writes: bool) -> None:
        memory, (lane, now, what) = self.memory.get(key), event
        if memory is None:
            return                                                        # older than the model
        writer, then, wrote = memory.written
        if not lane.knows(writer, then):
            self.found[f"order: {what} does not wait for {wrote}"] = None
        if writes:
            for reader, (time, read) in memory.reads.items():
                if not lane.knows(reader, time):
                    self.found[f"overwrite: {what} does not wait for {read}"] = None
            memory.written = event
        memory.reads[lane] = now, what
        if lane is not memory.owner:
            self.shared.add(key)

    def _born(self, x: Tensor, event: tuple[Lane, int, str]) -> None:
        lane, _, what = event
        for reader, time, read in self.pools.pop(lane, ()):    # what this one has waited for, all later ones have
            if not lane.knows(reader, time):
                self.found[f"reuse: {what} may get what was {read}"] = None
        self.memory[_key(x)] = Memory(lane, StorageWeakRef(x.untyped_storage()), event)

    def _collect(self) -> None:
        """What nobody has any more goes back to its pool, at the latest now."""
        for key in [k for k in self.shared if self.memory[k].storage.expired()]:
            self.shared.remove(key)
            memory = self.memory.pop(key)
            for reader, (time, read) in memory.reads.items():
                if not any(lane.knows(reader, time) for lane in (memory.owner, *memory.told)):
                    self.pools.setdefault(memory.owner, []).append(
                        (reader, time, f"written by {memory.written[2]} and read by {read}"))

    def _where(self) -> str:
        frame: Any = sys._getframe(1)
        while frame is not None and "/stepladder/" not in frame.f_code.co_filename:
            frame = frame.f_back
        node = f" in {self.node}" if self.node else ""
        return node if frame is None else f"{node} at {frame.f_code.co_filename.split('/')[-1]}:{frame.f_lineno}"

    # Autograd

    def backward(self, loss: Tensor) -> None:
        pending: dict[Any, Lane] = {}                       # what a node will have waited for before it begins
        self.first: dict[tuple[Any, int], int] = {}         # memory of the first gradient of a node's output
        leaves, todo, seen = Lane("leaves"), [loss.grad_fn], set[Any]()
        while todo:
            node: Any = todo.pop()
            if node is None or node in seen or node.name().endswith("AccumulateGrad"):
                continue
            seen.add(node)
            todo.extend(m for m, _ in node.next_functions)
            pending[node] = Lane(node.name())
            node.register_prehook(partial(self._begin, node, pending))
            node.register_hook(partial(self._end, node, pending, leaves))
        self.lanes.append(None)
        loss.backward()
        self._move(self.lanes.pop)
        self.current.wait_stream(leaves)
        self.lowered.clear()

    def _lane(self, node: Any) -> Lane:
        made = bisect_right(self.moves, node._sequence_nr(), key=lambda move: move[0])
        return self.lowered.get(node) or self.moves[made - 1][1]

    def _begin(self, node: Any, pending: dict[Any, Lane], gradients: Sequence[Tensor | None]) -> None:
        lane = self._lane(node)
        lane.wait_stream(pending[node])
        for i in range(len(gradients)):
            self.first.pop((node, i), None)
        self.lanes.append(lane)
        self.node = node.name()
        for g in _tensors(gradients):
            if _key(g) not in self.memory:                  # autograd has added it up, on this lane
                self._born(g, (lane, lane.tick(), f"{self.node} on {lane.name}"))
            self._told(g, lane)

    def _end(self, node: Any, pending: dict[Any, Lane], leaves: Lane, gradients: Sequence[Tensor | None],
             _: Any) -> None:
        lane, self.node = self.current, ""
        self.lanes.pop()
        for (m, i), g in zip(node.next_functions, gradients, strict=True):
            pending.get(m, leaves).wait_stream(lane)
            if m in pending and g is not None and (first := self.first.setdefault((m, i), _key(g))) != _key(g):
                self._added(first, m, pending[m])

    def _added(self, first: int, node: Any, makers: Lane) -> None:
        """Autograd adds a gradient to the first one, in place, as it does where nobody else has that any more."""
        lane = self._lane(node)
        adds = Lane(lane.name, lane.clock | {lane: sys.maxsize})
        adds.wait_stream(makers)
        for reader, (time, read) in self.memory[first].reads.items() if first in self.memory else ():
            if not adds.knows(reader, time):
                self.found[f"overwrite: the sum of gradients for {node.name()} does not wait for {read}"] = None


class Boxes:
    """Symmetric memory of processes of one machine, each half a storage of its own."""

    def __init__(self, model: Model):
        self.model = model

    def empty(self, size: int, dtype: torch.dtype, device: torch.device) -> int:
        return size // 2

    def rendezvous(self, half: int, group: dist.ProcessGroup) -> Boxes:
        self.half, self.group, self.log, self.others = half, group, list[str](), Lane("others")
        with tempfile.TemporaryDirectory() as mine:
            folder = [mine]
            with self.apart():
                dist.broadcast_object_list(folder, 0, group)
            self.boxes = [[torch.from_file(f"{folder[0]}/{owner}{i}", True, half, dtype=torch.uint8) for i in range(2)]
                          for owner in range(dist.get_world_size(group))]
            with self.apart():
                dist.barrier(group)
        return self

    def get_buffer(self, owner: int, shape: torch.Size, dtype: torch.dtype, begin: int) -> Tensor:
        half, begin = divmod(begin * dtype.itemsize, self.half)
        self.log.append(f"{('in', 'out')[half]}box {owner}")
        return self.boxes[owner][half][begin:begin + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def barrier(self, channel: int) -> None:
        """Until it or from it on the others write this rank's inbox, read its outbox, and write their own. From that of
        channel 1 to the next they read this rank's outbox, and from that of channel 2 their inbox."""
        self.log.append(f"meet {channel}")
        with self.apart():
            dist.barrier(self.group)
        lane, me = self.model.current, dist.get_rank(self.group)
        lane.wait_stream(self.others)
        self.others = Lane("others", lane.clock)
        for owner, boxes in enumerate(self.boxes):
            for kind, box in enumerate(boxes):
                if owner == me or kind:
                    written = (owner == me) != bool(kind)
                    self.model._touch(_key(box), (lane, lane.tick(), "what others do"), written)
                if (owner == me, kind, channel) in ((True, 1, 1), (False, 0, 2)):
                    self.model._touch(_key(box), (self.others, self.others.tick(), "what others do then"), False)
        self.others.wait_stream(lane)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        self.model.lanes.append(None)
        yield
        self.model.lanes.pop()


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _tensors(things: Any) -> list[Tensor]:
    return [x for x in tree_leaves(things) if isinstance(x, Tensor)]
