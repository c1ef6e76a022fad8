"""Lanes: each turns its own blocks into an endless stream of documents, and that into rows.

A lane's stream depends on (seed, lanes, split, manifests) and on nothing else; which rank or process reads it does not
matter. Row n of a run is the next row of lane n mod lanes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from stepladder.data.manifest import Columns
from stepladder.data.shards import Away, Corpus, ShardError

IGNORE = -100  # target where the next token belongs to another document
State = dict[str, Any]  # of a lane, plain JSON: see Lane.state


class Rows(NamedTuple):
    tokens: np.ndarray  # (rows, S) int32
    targets: np.ndarray  # (rows, S) int32
    start: np.ndarray  # (rows, S) bool


class Feed:
    """One source: which blocks a lane owns, and their documents in the order of an epoch."""

    def __init__(
        self, name: str, corpus: Corpus, weight: float, *, seed: int, lanes: int, split: str, heldout: float, skip: bool
    ):
        self.name, self.corpus, self.weight = name, corpus, weight
        self.seed, self.lanes, self.split, self.heldout, self.skip = seed, lanes, split, heldout, skip
        self.broken: dict[tuple[str, int], str] = {}  # shards in which a block was skipped, and why the first was
        self.away = False  # whether the last was skipped for a reason that passes
        counts = [shard.documents for shard in corpus.manifest.shards]
        self._first = np.cumsum([0, *counts])  # number in the corpus of each shard's first document
        self._blocks = self._owned()
        if len(self._blocks) < lanes:
            way = "raise" if split == "heldout" else "lower"
            ways = [f"{way} heldout = {heldout:g}{self._fitting()}"] * bool(heldout)
            ways += [f"use at most {len(self._blocks)} lanes"] * (len(self._blocks) > 0)
            raise ValueError(
                f"source {name!r} has {len(self._blocks)} blocks with {split} documents, fewer than lanes = {lanes}: "
                f"{', '.join([*ways, 'prepare more, or with smaller --block-bytes'])}"
            )

    def order(self, lane: int, epoch: int) -> np.ndarray:
        """(blocks, 2) int64: the lane's (shard, block)s; blocks of a shard stay together, so that it streams once."""
        count = len(self._blocks)
        own = self._blocks[lane * count // self.lanes : (lane + 1) * count // self.lanes]
        key = _key("order", self.seed, self.name, epoch, lane)
        return own[np.lexsort((_scramble(key, own[:, 1]), _scramble(key, own[:, 0])))]

    def documents(self, shard: int, block: int, epoch: int) -> list[np.ndarray]:
        """The block's documents (or pieces of long ones) that belong to the split, shuffled. Raises ShardError."""
        tokens, pieces = self.corpus.read(shard, block)
        ends = np.cumsum(pieces[:, 1])
        order = np.argsort(_scramble(_key("block", self.seed, self.name, epoch, shard, block), np.arange(len(pieces))))
        keep = self._in_split(self._first[shard] + pieces[:, 0])
        return [tokens[ends[i] - pieces[i, 1] : ends[i]] for i in order if keep[i]]

    def _owned(self) -> np.ndarray:
        """(shard, block)s of the split, shards in the seed's order: a lane owns a run of them."""
        shards = self.corpus.manifest.shards
        order = np.argsort(_scramble(_key("shards", self.seed, self.name), np.arange(len(shards))))
        found = [np.zeros((0, 2), np.int64)]
        for shard in order.tolist():
            blocks = np.arange(len(shards[shard].blocks))
            if self.heldout:
                member = self._in_split(self._first[shard] + np.arange(shards[shard].documents))
                before = np.concatenate([[0], np.cumsum(member)])
                first, count = (shards[shard].blocks[:, c] for c in (Columns.FIRST, Columns.DOCUMENTS))
                blocks = blocks[before[first + count] > before[first]]
            found.append(np.stack([np.full(len(blocks), shard), blocks], 1))
        return np.concatenate(found)

    def _fitting(self) -> str:
        """The share to be held out that gives each lane a block, rounded; nothing where none does."""
        draws = []  # of each block's documents
        for number, shard in enumerate(self.corpus.manifest.shards):
            for block in shard.blocks:
                first = self._first[number] + block[Columns.FIRST]
                draws.append(self._draws(np.arange(first, first + block[Columns.DOCUMENTS])))
        if len(draws) < self.lanes:
            return ""
        if self.split == "heldout":
            share = math.ceil(1e3 * sorted(draw.min() for draw in draws)[self.lanes - 1] + 1e-6) / 1e3
        else:
            share = math.floor(1e3 * sorted(draw.max() for draw in draws)[-self.lanes]) / 1e3
        return f" to {share:g}" if share < 1 else ""

    def _draws(self, numbers: np.ndarray) -> np.ndarray:
        """A number in [0, 1) for each document, by its number in the corpus; the same for every seed."""
        return (_scramble(_key("heldout", self.name), numbers) >> np.uint64(11)) * 2.0**-53

    def _in_split(self, numbers: np.ndarray) -> np.ndarray:
        out = self._draws(numbers) < self.heldout
        return out if self.split == "heldout" else ~out


class Place:
    """Where a lane is in one source: the next document, or the open one; `used` tokens were taken from the source."""

    def __init__(self, epoch: int = 0, block: int = 0, document: int = 0, used: int = 0):
        self.epoch, self.block, self.document, self.used = epoch, block, document, used


class Lane:
    def __init__(self, number: int, feeds: Sequence[Feed], state: State | None = None):
        self.number = number
        self.feeds = {feed.name: feed for feed in feeds}
        state = state or fresh(self.feeds)
        self.places = {name: Place(*state["sources"][name]) for name in self.feeds}
        self.open: str | None = state["source"]  # the source of the open document
        self.token: int = state["token"]  # the next token in it
        self._orders: dict[str, tuple[int, np.ndarray]] = {}
        self._blocks: dict[str, tuple[tuple[int, int], list[np.ndarray]]] = {}
        self._document = np.zeros(0, np.int64)
        if self.open is not None:
            found = self._documents(self.feeds[self.open], self.places[self.open])
            place = self.places[self.open]
            if place.document < len(found):
                self._document = found[place.document]
            else:  # its block was sound when the cursor was made and is skipped now
                self.open, self.token = None, 0

    def state(self) -> State:
        """Open source or None, next token of its document, and (epoch, block, document, tokens used) per source."""
        places = {name: [p.epoch, p.block, p.document, p.used] for name, p in self.places.items()}
        return {"source": self.open, "token": self.token, "sources": places}

    def row(self, seq: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next `seq` tokens, their targets, and where documents start. A cut document goes on in the next row."""
        tokens, targets = np.empty(seq, np.int32), np.full(seq, IGNORE, np.int32)
        start = np.zeros(seq, bool)
        at = 0
        while at < seq:
            if self.open is None:
                self._next()
            rest = self._document[self.token :]
            count = min(len(rest), seq - at)
            tokens[at : at + count] = rest[:count]
            follow = rest[1 : count + 1]  # one more than fits, so that the last token of a row has its target too
            targets[at : at + len(follow)] = follow
            start[at] = True
            at += count
            self.token += count
            if count == len(rest):
                self.places[str(self.open)].document += 1
                self.open, self.token = None, 0
        return tokens, targets, start

    def _next(self) -> None:
        """Opens a document of the source that is furthest behind its share."""
        feed = min(self.feeds.values(), key=lambda feed: self.places[feed.name].used / feed.weight)
        place = self.places[feed.name]
        looked = 0
        while place.document >= len(found := self._documents(feed, place)):
            place.block, place.document = place.block + 1, 0
            looked += 1
            if place.block == len(self._order(feed, place.epoch)):
                if looked > place.block:
                    kind, way = (Away, "see to it") if feed.away else (ValueError, "prepare or copy its shards again")
                    what = f"source {feed.name!r}: lane {self.number} cannot read any document of an epoch"
                    raise kind(f"{what}; {way}")
                place.epoch, place.block = place.epoch + 1, 0
        self._document = found[place.document]
        self.open = feed.name
        place.used += len(self._document)

    def _order(self, feed: Feed, epoch: int) -> np.ndarray:
        if self._orders.get(feed.name, (-1,))[0] != epoch:
            self._orders[feed.name] = epoch, feed.order(self.number, epoch)
        return self._orders[feed.name][1]

    def _documents(self, feed: Feed, place: Place) -> list[np.ndarray]:
        """The documents of the place's block; none if it cannot be read and such blocks are skipped."""
        at = place.epoch, place.block
        if self._blocks.get(feed.name, (None,))[0] != at:
            shard, block = self._order(feed, place.epoch)[place.block].tolist()
            try:
                self._blocks[feed.name] = at, feed.documents(shard, block, place.epoch)
            except ShardError as error:
                if not feed.skip:
                    raise
                feed.broken.setdefault((feed.name, shard), error.fault)
                feed.away = error.passing
                self._blocks[feed.name] = at, []
        return self._blocks[feed.name][1]


def fresh(names: Sequence[str] | dict[str, Any]) -> State:
    """The state of a lane that has read nothing."""
    return {"source": None, "token": 0, "sources": {name: [0, 0, 0, 0] for name in names}}


class Share(NamedTuple):
    """Which rows a reader makes: those with n mod dp_size == dp_rank, of its worker's lanes."""

    lanes: int
    seq: int
    rows: int  # of the rank, a batch
    row: int  # number of the first global row
    dp_rank: int
    dp_size: int
    worker: int = 0
    workers: int = 1

    def owners(self) -> Iterator[list[tuple[int, int]]]:
        """Per batch: (lane, worker) of each of the rank's rows."""
        n = self.row + (self.dp_rank - self.row) % self.dp_size
        while True:
            lanes = [(n + i * self.dp_size) % self.lanes for i in range(self.rows)]
            yield [(lane, lane // self.dp_size % self.workers) for lane in lanes]
            n += self.rows * self.dp_size


def read(
    feeds: Sequence[Feed], share: Share, states: dict[str, State]
) -> Iterator[tuple[Rows, dict[str, State], dict]]:
    """Per batch: this worker's rows in order, the states of the lanes they came from, and the broken shards so far."""
    opened: dict[int, Lane] = {}
    make: Callable[[int], Lane] = lambda n: Lane(n, feeds, states[str(n)])
    for owners in share.owners():
        mine = [lane for lane, worker in owners if worker == share.worker]
        for lane in mine:
            if lane not in opened:
                opened[lane] = make(lane)
        made = [opened[lane].row(share.seq) for lane in mine]
        stacked = Rows(*map(np.stack, zip(*made, strict=True))) if made else Rows(*[np.zeros((0, share.seq))] * 3)
        broken = {at: why for feed in feeds for at, why in feed.broken.items()}
        yield stacked, {str(lane): opened[lane].state() for lane in set(mine)}, broken


def _key(*parts: str | int) -> int:
    """64 bits out of a seed's name: the same on every machine and under every version of numpy."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def _scramble(key: int, values: np.ndarray) -> np.ndarray:
    """splitmix64: a random-looking uint64 for every value."""
    x = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
