"""Batches of packed rows, read ahead, each with the cursor from which the next one follows.

The global rows of a run are one sequence n = 0, 1, 2, ...; row n comes from lane n mod lanes and goes to the rank
n mod dp_size. So the sequence does not depend on dp_size, on the workers or on how many rows a batch has.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from multiprocessing import util
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepladder.data.fetch import DEFAULT, Limits
from stepladder.data.manifest import Manifest
from stepladder.data.pack import IGNORE as IGNORE
from stepladder.data.pack import Feed, Share, State, fresh, read
from stepladder.data.shards import Corpus
from stepladder.data.tokenizer import Tokenizer

Cursor = dict[str, Any]  # plain JSON


class Batch(NamedTuple):
    tokens: Tensor  # (B, S) int64
    targets: Tensor  # (B, S) int64; IGNORE where the next token belongs to another document
    start: Tensor  # (B, S) bool, true on each document's first token in the row
    cursor: Cursor  # where this rank's lanes stand after this batch


class Source(NamedTuple):
    name: str
    shards: str  # folder, http(s) address, `pipe:` command or fsspec address of a prepared corpus
    weight: float = 1.0


class Loader:
    """An endless iterator of this rank's batches. See `Source`, `Batch` and `merge`.

    cursor: of this rank, or merged from all ranks of a run with any dp_size; None starts at the beginning.
    heldout: share of the documents that split = "train" never yields and split = "heldout" does.
    workers: processes that read; 0 reads in a thread. prefetch: batches made ahead; 0 makes them when asked.
    on_error: "stop" raises ShardError, "skip" leaves unreadable blocks out and counts their shards in `skipped`.
    limits: for sources that are no folders.
    vocab: of the model; a tokenizer with more ids is refused.
    manifests: of another loader of these sources, which are not read again.
    Raises ValueError for what cannot work, before anything is read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seq: int,
        rows: int,
        lanes: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        split: str = "train",
        heldout: float = 0.0,
        cursor: Cursor | None = None,
        workers: int = 0,
        prefetch: int = 4,
        pin: bool = False,
        on_error: str = "stop",
        limits: Limits = DEFAULT,
        vocab: int | None = None,
        manifests: Mapping[str, Manifest] | None = None,
    ):
        _check(sources, seq, rows, lanes, dp_rank, dp_size, split, heldout, workers, prefetch, on_error)
        self._broken: dict[tuple[str, int], str] = {}
        self._told: set[tuple[str, int]] = set()
        self.waited = 0.0
        limits = limits._replace(seed=f"{seed} {dp_rank}")
        known = manifests or {}
        corpora = {s.name: Corpus(s.shards, lanes // dp_size, limits, known.get(s.name)) for s in sources}
        self.manifests = {name: corpus.manifest for name, corpus in corpora.items()}
        _check_corpora(corpora, vocab, sizes=on_error == "stop")
        self.manifest_hash = _hash(sources, corpora)
        self._corpus = corpora[sources[0].name]
        feeds = [
            Feed(s.name, corpora[s.name], s.weight, seed=seed, lanes=lanes, split=split, heldout=heldout,
                 skip=on_error == "skip")
            for s in sources if s.weight
        ]  # fmt: skip
        told = {"seed": seed, "lanes": lanes, "split": split, "heldout": heldout}
        start = _start(cursor, told, [feed.name for feed in feeds], range(dp_rank, lanes, dp_size))
        share = Share(lanes, seq, rows, start["row"], dp_rank, dp_size, 0, max(1, min(workers, lanes // dp_size)))
        pin = pin and torch.cuda.is_available()
        crew = _Crew(feeds, share, start["state"]) if workers else None
        parts = crew.parts() if crew else ([part] for part in read(feeds, share, start["state"]))
        self._batches = _assemble(parts, share, start, pin)
        self._ended: BaseException | None = None
        self._queue: queue.Queue | None = queue.Queue(prefetch) if prefetch else None
        stop = threading.Event()
        self._thread = threading.Thread(target=_fill, args=(self._batches, self._queue, stop), daemon=True)
        if prefetch:
            self._thread.start()
        # Also when the loader is dropped, and at exit before multiprocessing joins its children.
        self._end = util.Finalize(self, _end, args=(stop, crew, [*corpora.values()]), exitpriority=10)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._ended:
            raise self._ended
        began = time.perf_counter()
        try:
            made = self._queue.get() if self._queue else next(self._batches)
            if isinstance(made, BaseException):
                raise made
        except BaseException as error:
            self.close()
            self._ended = error
            raise
        self.waited += time.perf_counter() - began
        batch, self._broken = made
        return batch

    @property
    def skipped(self) -> int:
        """Shards of which blocks were left out so far."""
        return len(self._broken)

    def news(self) -> list[str]:
        """Why shards were skipped since the last call, a sentence each."""
        new = [why for at, why in self._broken.items() if at not in self._told]
        self._told |= self._broken.keys()
        return new

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one that all sources share."""
        return self._corpus.tokenizer()

    def close(self) -> None:
        """Ends the workers and the thread."""
        self._ended = self._ended or ValueError("the loader is closed")
        self._end()
        if self._thread.is_alive():
            self._thread.join()


def merge(cursors: Iterable[Cursor]) -> Cursor:
    """The cursors of all dp ranks after the same step -> one that any dp_size can start from."""
    all_ = list(cursors)
    heads = [{key: value for key, value in cursor.items() if key != "state"} for cursor in all_]
    if not all_ or any(head != heads[0] for head in heads):
        raise ValueError(f"cursors of different steps or runs cannot be merged: {heads}")
    state: dict[str, State] = {}
    for cursor in all_:
        state.update(cursor["state"])
    lanes = heads[0]["lanes"]
    if len(state) != lanes or sum(len(cursor["state"]) for cursor in all_) != lanes:
        raise ValueError(f"cursors with {len(state)} of {lanes} lanes: merge those of every dp rank, each once")
    return {**heads[0], "state": {str(lane): state[str(lane)] for lane in range(lanes)}}


def _start(cursor: Cursor | None, told: dict[str, Any], names: list[str], mine: range) -> Cursor:
    """The cursor to begin with, this rank's lanes only."""
    if cursor is None:
        return {**told, "row": 0, "state": {str(lane): fresh(names) for lane in mine}}
    for key, value in told.items():
        if cursor.get(key) != value:
            raise ValueError(
                f"the data cursor was made with {key} = {cursor.get(key)}, this run has {value}; "
                "change it back or start a new run folder"
            )
    lost = [lane for lane in mine if str(lane) not in cursor["state"]]
    if lost:
        raise ValueError(f"the data cursor lacks lanes {lost} of this rank: merge the cursors of all dp ranks")
    state = {str(lane): cursor["state"][str(lane)] for lane in mine}
    known = list(next(iter(state.values()))["sources"])
    if sorted(known) != sorted(names):
        raise ValueError(
            f"the data cursor was made with sources {known}, this run has {names}; "
            "change them back or start a new run folder"
        )
    return {**told, "row": cursor["row"], "state": state}


def _assemble(parts: Iterator[list], share: Share, start: Cursor, pin: bool) -> Iterator[tuple[Batch, dict]]:
    """The workers' rows in the order of the rank's rows, with the cursor after them and the broken shards so far."""
    row, states = start["row"], dict(start["state"])
    head = {key: value for key, value in start.items() if key not in ("row", "state")}
    for owners, made in zip(share.owners(), parts, strict=False):
        rows = [iter(zip(*part[0], strict=True)) for part in made]
        ordered = list(zip(*(next(rows[worker]) for _, worker in owners), strict=True))
        kinds = (torch.int64, torch.int64, torch.bool)
        tensors = [torch.empty(share.rows, share.seq, dtype=kind, pin_memory=pin) for kind in kinds]
        for tensor, values in zip(tensors, ordered, strict=True):
            for at, value in enumerate(values):
                tensor[at] = torch.from_numpy(value)
        for _, moved, _ in made:
            states.update(moved)
        row += share.rows * share.dp_size
        broken = {at: why for part in made for at, why in part[2].items()}
        yield Batch(tensors[0], tensors[1], tensors[2], {**head, "row": row, "state": dict(states)}), broken


def _fill(batches: Iterator, ahead: queue.Queue, stop: threading.Event) -> None:
    """Puts batches into the queue, then the error that ended them. Holds no reference to the loader."""

    def put(made) -> None:
        while not stop.is_set():
            try:
                return ahead.put(made, timeout=0.1)
            except queue.Full:
                continue

    try:
        for made in batches:
            put(made)
            if stop.is_set():
                return
    except BaseException as error:  # raised again where the batch is asked for
        put(error)


def _end(stop: threading.Event, crew: _Crew | None, corpora: list[Corpus]) -> None:
    stop.set()
    for corpus in corpora:
        corpus.close()
    if crew:
        crew.kill()


class _Crew:
    """Worker processes, each reading its share of the lanes. Their pipes hold them back when nobody reads."""

    def __init__(self, feeds: list[Feed], share: Share, states: dict[str, State]):
        # Not fork: the parent has threads and perhaps CUDA.
        context = multiprocessing.get_context("forkserver")
        self.workers: list[tuple[Any, Connection]] = []
        for worker in range(share.workers):
            here, there = context.Pipe(duplex=False)
            args = there, feeds, share._replace(worker=worker), states
            process = context.Process(target=_work, args=args, daemon=True, name=f"data worker {worker}")
            process.start()
            there.close()  # so that a dead worker is an end of file here
            self.workers.append((process, here))

    def parts(self) -> Iterator[list]:
        while True:
            made = [self._receive(*worker) for worker in self.workers]
            yield made

    def _receive(self, process, connection: Connection):
        try:
            part = connection.recv()
        except (EOFError, OSError):
            process.join(5)
            code = process.exitcode
            how = f"was killed by signal {-code}" if code and code < 0 else f"ended with code {code}"
            raise ChildProcessError(f"{process.name} (process {process.pid}) {how}; no data is lost: resume") from None
        if isinstance(part, BaseException):
            raise part
        return part

    def kill(self) -> None:
        for process, _ in self.workers:
            process.kill()
        for process, _ in self.workers:
            process.join()


def _work(connection: Connection, feeds: list[Feed], share: Share, states: dict[str, State]) -> None:
    # The whole process group gets Ctrl-C and a scheduler's TERM and USR1; the parent decides what they mean.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    try:
        for part in read(feeds, share, states):
            connection.send(part)
    except BrokenPipeError:
        return  # the parent is gone
    except Exception as error:
        connection.send(error)


def _hash(sources: Sequence[Source], corpora: dict[str, Corpus]) -> str:
    told = [[s.name, float(s.weight), corpora[s.name].manifest.hash()] for s in sources]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _check(sources, seq, rows, lanes, dp_rank, dp_size, split, heldout, workers, prefetch, on_error) -> None:
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"data sources {names}: at least one is needed, and each a name of its own")
    for name, _, weight in sources:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"source {name!r}: weight {weight} must be a finite number, 0 or more")
    if not any(source.weight for source in sources):
        raise ValueError(f"data sources {names}: every weight is 0; give at least one a positive weight")
    for key, value, least in (("seq", seq, 1), ("rows", rows, 1), ("lanes", lanes, 1), ("workers", workers, 0),
                              ("prefetch", prefetch, 0)):  # fmt: skip
        if value < least:
            raise ValueError(f"{key} = {value}: must be at least {least}")
    if lanes % dp_size:
        raise ValueError(f"lanes = {lanes} is not divisible by {dp_size} data-parallel ranks: use a multiple of it")
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank = {dp_rank} is not below dp_size = {dp_size}")
    if not 0 <= heldout < 1 or (split == "heldout" and not heldout):
        raise ValueError(f"heldout = {heldout} with split = {split!r}: must be a share of the documents, below 1")
    for key, value, known in (("split", split, ("train", "heldout")), ("on_error", on_error, ("stop", "skip"))):
        if value not in known:
            raise ValueError(f"{key} = {value!r}: must be one of {', '.join(known)}")


def _check_corpora(corpora: dict[str, Corpus], vocab: int | None, sizes: bool) -> None:
    (name, first), *others = corpora.items()
    for other, corpus in others:
        for what, a, b in (("tokenizer", first.manifest.tokenizer, corpus.manifest.tokenizer),
                           ("dtype", first.manifest.dtype, corpus.manifest.dtype)):  # fmt: skip
            if a != b:
                told = [f"{x['name']} {x['hash'][:12]}" if isinstance(x, dict) else x for x in (a, b)]
                raise ValueError(
                    f"sources {name!r} and {other!r} have different {what}s, {told[0]} and {told[1]}: "
                    f"prepare one with --tokenizer {first.url('tokenizer.json')}"
                )
    ids = first.manifest.tokenizer["vocab"]
    if vocab is not None and ids > vocab:
        raise ValueError(
            f"the tokenizer of source {name!r} has {ids} ids, the model vocab = {vocab}: raise model.vocab"
        )
    if sizes:
        for corpus in corpora.values():
            corpus.check_sizes()
