"""The checkpoints of a run: saved in the background, published whole or not at all, found again, independent of layout.

torch.distributed.checkpoint plans who writes which part of which tensor; checkpoint_folder.py is what lies on disk.
"""

import itertools
import json
import math
import secrets
import shutil
import threading
import weakref
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from stepladder.parallel.checkpoint_folder import (
    FORMAT,
    CheckpointError,
    fault,
    meta,
    read_index,
    refuse_mismatch,
    steps,
    superseded,
    sweep,
    sync_folder,
    valid,
    write_file,
    write_index,
)
from stepladder.parallel.checkpoint_read import ALIGN, DTYPES, fill, misfit, names

__all__ = ["CheckpointError", "Store", "fill", "meta", "names", "refuse_mismatch", "valid"]


SLOWEST = timedelta(hours=2)   # that one rank may write, or read for checksums, longer than another


class Ranks:
    """Object collectives of the store, by group rank; one process alone needs no process group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is None and dist.is_initialized() and dist.get_world_size() > 1:
            group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
            dist.distributed_c10d._set_pg_timeout(SLOWEST, group)      # once all have met
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value on rank 0, an empty list elsewhere."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, group=self.group, group_dst=0)
        return values or []

    def scatter(self, values: list[Any]) -> Any:
        """Entry r of rank 0's list, on rank r."""
        if self.size == 1:
            return values[0]
        mine = [None]
        dist.scatter_object_list(mine, values if self.rank == 0 else None, group=self.group, group_src=0)
        return mine[0]

    def share(self, value: Any) -> Any:
        """Rank 0's value."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def all(self, flag: bool) -> bool:
        """Whether every rank says yes."""
        votes = torch.tensor(int(flag))
        if self.size > 1:
            dist.all_reduce(votes, dist.ReduceOp.MIN, group=self.group)
        return bool(votes)


class Agreement(NamedTuple):
    """Who writes what: found together once, kept while no rank's proposal changes."""

    proposed: SavePlan  # what this rank could write
    items: list[tuple[int, WriteItem]]  # what it was given to write, and at which byte of its file
    size: int  # bytes of its file
    tensors: dict[str, Any]  # rank 0: the index, name -> dtype, shape, chunks


class Store:
    """The checkpoints of one run. Every method but `finish` is called by all ranks together, and so is the constructor.

    group: a gloo group over all ranks for the store alone; made here when there is more than one rank.
    keep_last, keep_every: how many of the newest checkpoints stay; those of every keep_every-th step stay as well.
    on_failure: told of a save that failed, from the writing thread; note: told of other things worth a line in the log.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep_last: int = 3,
        keep_every: int = 0,
        background: bool = True,
        group: dist.ProcessGroup | None = None,
        on_failure: Callable[[str], None] = lambda text: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        if keep_last < 1 or keep_every < 0:
            raise CheckpointError(f"keep_last={keep_last} must be at least 1 and keep_every={keep_every} at least 0")
        self.folder = Path(run) / "checkpoints"
        self.keep_last, self.keep_every, self.background = keep_last, keep_every, background
        self.on_failure, self.note = on_failure, note
        self.failures: list[str] = []
        self.passed: list[str] = []  # why newer checkpoints were not taken, each with its path
        self.ranks = Ranks(group)
        self.token = self.ranks.share(secrets.token_hex(4))
        self.agreement: Agreement | None = None
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.stream: torch.cuda.Stream | None = None
        self.thread: threading.Thread | None = None
        self.saved: int | None = None  # the step last saved or loaded
        self.sound: Path | None = None  # its checksums were compared here

    def save(self, step: int, state: dict[str, Tensor], meta: dict, *,
             shapes: dict[str, tuple[int, ...]], prune: bool = True) -> torch.cuda.Event | None:
        """Save state (DTensors on every rank that holds a part; plain tensors equal everywhere) as step.

        shapes: the declared global shape of every name in state. meta: JSON values with string keys; rank 0's is kept.
        prune: remove those that it supersedes.
        Returns when the tensors have been copied, so they may change at once; on a GPU when the copies are queued
        beside the kernels to come, and then what changes the tensors must wait for the event that is returned.
        Raises CheckpointError on all ranks if state is not what was declared; a failure to write is reported instead.
        """
        self.finish()
        if step == self.saved:
            self.note(f"step {step} is saved already")
            return None
        text = json.dumps(meta)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        agreement = self.agreement = self._agree(planner, state, shapes)
        copied = self._copy(planner, agreement)
        # The thread uses collectives, safely: they run on the store's own gloo group, whose connections nothing else
        # uses, on CPU memory, and `finish` above keeps it to one thread of every rank at a time, in the same order.
        work = (step, agreement, text, copied, prune)
        if self.background:
            self.thread = threading.Thread(target=self._write, args=work, name=f"save step {step}", daemon=True)
            self.thread.start()
        else:
            self._write(*work)
        return copied

    def finish(self) -> None:
        """Wait for the save under way; a program that ends without this loses it. Failures are in self.failures."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def newest(self) -> Path | None:
        """The newest sound checkpoint, the same on all ranks; None if there is none at all.

        Raises CheckpointError if there are checkpoints but no sound one: a silent fresh start would overwrite them.
        """
        self.finish()
        self.passed = []
        found = self.ranks.share(steps(self.folder))
        for path in found:
            reason = self._fault(path)
            if reason is None:
                for newer, text in zip(found, self.passed, strict=False):
                    self.note(f"passed over {newer.name}: {text}; taking {path.name} instead")
                return path
            self.passed.append(reason)
        if faults := "; ".join(self.passed):
            raise CheckpointError(
                f"no checkpoint in {self.folder} is sound: {faults}; restore one or start in another folder"
            )
        return None

    def load(self, path: Path, state: dict[str, Tensor], *, prefix: str = "") -> dict:
        """Fill state in place, in whatever layout it has, and return meta.

        The ranks together must ask for exactly the names of the checkpoint that start with prefix.
        Raises CheckpointError on all ranks, naming the tensor and both shapes or dtypes, before anything is written.
        """
        self.finish()
        path = Path(path)
        if path != self.sound and (reason := self._fault(path)):
            raise CheckpointError(f"{reason}; choose another checkpoint")
        index = read_index(path)
        answers = self.ranks.gather((misfit(state, index), list(state)))
        problem = next((text for text, _ in answers if text), None)
        asked = set(itertools.chain.from_iterable(names for _, names in answers))
        for name, entry in index["tensors"].items() if answers and not problem else ():
            if name.startswith(prefix) and name not in asked:
                problem = f"{name} {tuple(entry['shape'])} is in the checkpoint, but this model has no such tensor"
                break
        if problem := self.ranks.share(problem):
            raise CheckpointError(f"{path}: {problem}")
        fill(path, state, index)
        if path.parent == self.folder:
            self.saved = index["step"]
        return index["meta"]

    def _agree(self, planner: DefaultSavePlanner, state: dict[str, Tensor], shapes: dict[str, tuple]) -> Agreement:
        """Plan the save together. Planning costs more with every rank, so an unchanged plan is only confirmed."""
        problem, proposed = _undeclared(state, shapes), SavePlan([])
        if problem is None:
            planner.set_up_planner(state, is_coordinator=self.ranks.rank == 0)
            proposed = planner.create_local_plan()
        old = self.agreement
        if self.ranks.all(problem is None and old is not None and old.proposed == proposed) and old is not None:
            return old
        answers = self.ranks.gather((problem, proposed))
        problem = next((text for text, _ in answers if text), None)
        plans, tensors = [proposed] * len(answers), {}
        if answers and not problem:
            try:
                plans, _ = planner.create_global_plan([plan for _, plan in answers])
                tensors = _index_tensors(plans)
            except (ValueError, AssertionError) as error:
                problem = f"the parts that the ranks hold do not make up whole tensors: {error}"
        problem, plan = self.ranks.scatter([(problem, plan) for plan in plans])
        if problem:
            raise CheckpointError(problem)
        return Agreement(proposed, *_lay_out(plan), tensors)

    @torch.no_grad()
    def _copy(self, planner: DefaultSavePlanner, agreement: Agreement) -> torch.cuda.Event | None:
        """Copy this rank's part into the host buffer, which is byte for byte its file."""
        parts = [(start, item, cast(Tensor, planner.resolve_data(item))) for start, item in agreement.items]
        cuda = any(part.is_cuda for _, _, part in parts)
        if len(self.buffer) != agreement.size:
            self.buffer = _host_buffer(agreement.size, pinned=cuda)
        if cuda:  # a stream of their own: the pass that follows does not wait for them
            self.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # none: no change
            for start, item, part in parts:
                room = self.buffer[start : start + _box(item)[3]].view(part.dtype).view(part.shape)
                room.copy_(part, non_blocking=True)
        if self.stream is None:
            return None
        copied = torch.cuda.Event()
        copied.record(self.stream)
        return copied

    def _write(self, step: int, agreement: Agreement, meta: str, copied: torch.cuda.Event | None,
               prune: bool) -> None:
        """Every rank writes its file, then rank 0 publishes the checkpoint or all take it back."""
        temporary = self.folder / f"step-{step:08d}.tmp-{self.token}"
        try:
            entry: tuple[str, int, str] | str | None = None
            try:
                if copied is not None:
                    copied.synchronize()
                temporary.mkdir(parents=True, exist_ok=True)
                if self.ranks.rank == 0:
                    sweep(self.folder, self.token)
                if agreement.size:
                    name = f"rank-{self.ranks.rank:05d}.bin"
                    entry = (name, agreement.size, write_file(temporary / name, self.buffer.numpy().data))
            except Exception as error:  # whatever it was, the other ranks are waiting for an answer
                entry = f"rank {self.ranks.rank}: {error or type(error).__name__}"
            problem = self._publish(step, temporary, self.ranks.gather(entry), agreement, meta, prune)
            problem = self.ranks.share(problem)
            if problem is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        except Exception as error:  # a rank is gone; training will notice too, and says more
            late = "Timed out waiting" in str(error)      # gloo's words, not those of a broken connection
            problem = f"{f'waited {SLOWEST} for' if late else 'lost'} another rank: {error}"
        if problem is None:
            self.saved = step
            return
        text = f"step {step} was not saved in {self.folder} ({problem}); the checkpoints before it are untouched"
        self.failures.append(text)
        self.on_failure(text)

    def _publish(self, step: int, temporary: Path, entries: list, agreement: Agreement, meta: str,
                 prune: bool) -> str | None:
        """Rank 0: write the index, rename, remove what is no longer kept. Returns what went wrong, if it did."""
        if self.ranks.rank != 0:
            return None
        problem = next((entry for entry in entries if isinstance(entry, str)), None)
        final = self.folder / f"step-{step:08d}"
        try:
            if problem is None:
                files = {name: [size, checksum] for name, size, checksum in filter(None, entries)}
                body = {"format": FORMAT, "step": step, "files": files, "meta": json.loads(meta)}
                write_index(temporary, {**body, "tensors": agreement.tensors})
                if reason := fault(temporary, parts=0):
                    raise CheckpointError(f"{reason}; is the run folder the same one on all machines?")
                if final.exists():  # broken, or of a future that this run has left behind
                    self._discard(final)
                temporary.rename(final)
                sync_folder(self.folder)
                for path in superseded(self.folder, step, self.keep_last, self.keep_every) if prune else ():
                    self._discard(path)
        except Exception as error:  # as in _write: the others are waiting
            problem = str(error) or type(error).__name__
        return problem

    def _discard(self, path: Path) -> None:
        """Remove a checkpoint so that nobody ever sees half of it. One that cannot be removed is no reason to stop."""
        doomed = path.with_name(f"{path.name}.tmp-{self.token}-old")
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            self.note(f"{path} could not be removed: {error}")

    def _fault(self, path: Path) -> str | None:
        """As `valid`, with the files divided among the ranks; all get the same answer."""
        faults = self.ranks.gather(fault(path, self.ranks.rank, self.ranks.size))
        reason = self.ranks.share(next(filter(None, faults), None))
        self.sound = path if reason is None else self.sound
        return reason


def _host_buffer(size: int, *, pinned: bool) -> Tensor:
    """Host bytes, kept between saves. Pinned by registration: torch's allocator would round up to a power of two."""
    buffer = torch.zeros(size, dtype=torch.uint8)
    if pinned and size:
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(buffer.data_ptr(), size, 0))
        weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
    return buffer


def _box(item: WriteItem) -> tuple[list[int], list[int], torch.dtype, int]:
    """Offsets, sizes, dtype and bytes of what an item writes."""
    data = cast(Any, item.tensor_data)  # never None: only tensors pass _undeclared
    offsets, sizes, dtype = list(data.chunk.offsets), list(data.chunk.sizes), data.properties.dtype
    return offsets, sizes, dtype, math.prod(sizes) * dtype.itemsize


def _lay_out(plan: SavePlan) -> tuple[list[tuple[int, WriteItem]], int]:
    """Where each item of a rank's plan starts in its file, and how long the file is."""
    items, end = [], 0
    for item in plan.items:
        start = -(-end // ALIGN) * ALIGN
        items.append((start, item))
        end = start + _box(item)[3]
    return items, end


def _index_tensors(plans: Iterable[SavePlan]) -> dict[str, Any]:
    """name -> dtype, shape and chunks [offsets, sizes, file, first byte], from what every rank is going to write."""
    tensors: dict[str, Any] = {}
    for rank, plan in enumerate(plans):
        for start, item in _lay_out(plan)[0]:
            offsets, sizes, dtype, _ = _box(item)
            shape = list(cast(Any, item.tensor_data).size)
            new = {"dtype": str(dtype).removeprefix("torch."), "shape": shape, "chunks": []}
            tensors.setdefault(item.index.fqn, new)["chunks"].append([offsets, sizes, f"rank-{rank:05d}.bin", start])
    return tensors


def _undeclared(state: dict[str, Tensor], shapes: dict[str, tuple]) -> str | None:
    """The first tensor that would not be recorded as declared.

    DCP keeps one of several ranks' parts of the same name and offset, taking them for copies. A tensor-parallel slice
    that was not labelled as one is therefore lost in silence, and its shape is all that gives it away.
    """
    for name in sorted(state.keys() | shapes.keys()):
        if name not in state or name not in shapes:
            return f"{name} is {'declared but not in the state' if name in shapes else 'in the state but not declared'}"
        tensor, shape = state[name], tuple(shapes[name])
        if tuple(tensor.shape) != shape:
            return (
                f"{name} would be recorded with shape {tuple(tensor.shape)} but is declared as {shape}; "
                "label this rank's part as a DTensor over every axis that splits it"
            )
        if tensor.dtype not in DTYPES.values():
            return f"{name} has dtype {tensor.dtype}, which checkpoints do not store (they store {', '.join(DTYPES)})"
    return None
