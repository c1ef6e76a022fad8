"""Ranks agree before they work: that all have come, on the run and the code, and on the batches of the first steps.

They speak through the store that brings them together, not through collectives: those of a GPU group need the GPU, and
ranks that differ might not start the same ones.
"""
from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import tomllib
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stepladder.data.loader import Batch
from stepladder.launch.toml import flat
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.watch import EXIT, listed

LAYERS = ("launch", "parallel", "model", "ops", "kernels", "data")
CODE, TORCH = "the code of stepladder", "the version of torch"
START = 10.0                        # minutes that ranks may come after one another, however short the limit
MARGIN = timedelta(seconds=30)      # for rank 0 to say whom it missed
GOODBYE = timedelta(seconds=5)      # for the others to hear a verdict
_round = itertools.count()          # a store outlives a run in tests: every question has a number of its own


class Disagreement(ValueError):
    """Ranks that were not started alike."""


class Missing(Disagreement):
    """Ranks that did not come, or went."""

    exit = EXIT            # of the program: nothing to mend
    passing = True         # started again, they may come


class _Over(Missing):
    """A start that rank 0 gave up for another."""


KINDS = {kind.__name__: kind for kind in (Disagreement, Missing, _Over)}
Judge = Callable[[dict[int, str]], Disagreement | None]      # of the words of those that came


def on_the_start(store: dist.Store, rank: int, size: int, minutes: float, word: str = "",
                 judge: Judge | None = None) -> dist.Store:
    """Wait for all ranks; the part of a store in which they speak, and nobody did before. word, judge: as in `consult`,
    but a judge hears of those that came, and lets them go on without the others if it wants to.

    torchrun's store outlives its workers, and no variable says which start this is: every agent counts for itself. So
    starts are numbered in the store. Rank 0 opens the first that is not open; the one before it is then over, also for
    ranks that came too early and took it for theirs. The others come to the first that is open and not over.
    """
    judge = judge or (lambda words: _absent(words, size, minutes))
    starts = (dist.PrefixStore(f"start/{number}", store) for number in itertools.count(1))
    if rank == 0:
        own = last = next(starts)
        while own.check(["open"]):
            last, own = own, next(starts)
        if own is not last and not last.check(["verdict"]):
            last.set("verdict", json.dumps([_Over.__name__, "rank 0 was started again"]))
        own.set("open", "")
        _consult(own, rank, size, word, judge, minutes)
        return own
    for own in starts:
        _wait(own, "open", minutes)
        if not own.check(["verdict"]):
            with contextlib.suppress(_Over):
                _consult(own, rank, size, word, judge, minutes)
                return own
    raise AssertionError("numbers do not end")


def consult(store: dist.Store, rank: int, size: int, word: str, judge: Callable[[list[str]], str | None],
            minutes: float) -> None:
    """Every rank says its word; rank 0 judges them; its verdict, if there is one, is raised on every rank."""
    def strict(words: dict[int, str]) -> Disagreement | None:
        absent = _absent(words, size, minutes)
        return absent or (Disagreement(verdict) if (verdict := judge([*words.values()])) else None)

    _consult(dist.PrefixStore(f"agree/{next(_round)}", store), rank, size, word, strict, minutes)


def _consult(store: dist.Store, rank: int, size: int, word: str, judge: Judge, minutes: float) -> None:
    """As `consult`, in a part of the store where nothing else was asked."""
    store.set(f"{rank}", word)
    if rank == 0:
        found = judge(words(store, size, minutes))
        store.set("verdict", json.dumps([type(found).__name__, str(found)] if found else ["", ""]))
    _wait(store, "verdict", minutes)
    kind, verdict = json.loads(store.get("verdict"))
    if kind:
        store.set(f"heard/{rank}", "")
        if rank == 0:                            # who may hold the store, and would take it along
            with contextlib.suppress(RuntimeError):
                store.wait([f"heard/{r}" for r in range(size)], GOODBYE)
        raise KINDS[kind](verdict)


def words(store: dist.Store, size: int, minutes: float) -> dict[int, str]:
    """What the ranks that come in time say, each under its number."""
    came = [*range(size)]
    try:
        store.wait([f"{r}" for r in came], timedelta(minutes=minutes))
    except RuntimeError:                         # each kind of store has its own below it
        came = [r for r in came if store.check([f"{r}"])]
    return dict(zip(came, (word.decode() for word in store.multi_get([f"{r}" for r in came])), strict=True))


def _absent(words: dict[int, str], size: int, minutes: float) -> Missing | None:
    if absent := [r for r in range(size) if r not in words]:
        return Missing(f"{listed(absent)} did not come within {minutes:g} minutes; "
                       "look at what was said there last, or raise train.collective_minutes")
    return None


def _wait(store: dist.Store, key: str, minutes: float) -> None:
    """Wait for what rank 0 is to say."""
    try:
        store.wait([key], timedelta(minutes=minutes) + MARGIN)
    except RuntimeError as error:
        raise Missing(f"rank 0 did not come within {minutes:g} minutes, or is gone ({str(error).splitlines()[0]}); "
                      "look at what was said there last") from None


def on_the_run(store: dist.Store, rank: int, size: int, config: str, flags: dict[str, Any], minutes: float) -> None:
    """Raises Disagreement for ranks whose code, configuration (TOML text) or command-line flags differ."""
    words = {CODE: code(), TORCH: torch.__version__,
             **flat(tomllib.loads(config)), **flags}
    consult(store, rank, size, json.dumps(words, default=str), _first_difference, minutes)


def code(root: Path = Path(__file__).parents[1]) -> str:
    """A hash of the package's own sources."""
    digest = hashlib.sha256()
    for path in sorted(path for layer in LAYERS for path in (root / layer).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _first_difference(words: list[str]) -> str | None:
    tables = [json.loads(word) for word in words]
    for key in dict.fromkeys(key for table in tables for key in table):
        values = [json.dumps(table[key]) if key in table else "absent" for table in tables]
        if len(set(values)) > 1:
            out = "install one version on every machine" if key in (CODE, TORCH) else \
                "start every rank with the same file, overrides and flags"
            return f"the ranks differ in {key}: {_shares(values)}; {out}"
    return None


def on_the_batch(store: dist.Store, mesh: Mesh, step: int, batches: Sequence[Batch], minutes: float) -> None:
    """Raises Disagreement for ranks of one data-parallel rank with different batches: they would train on, wrongly."""
    digest = hashlib.sha256()
    for batch in batches:
        for t in (batch.tokens, batch.targets, batch.start):
            digest.update(t.numpy().tobytes())

    def judge(words: list[str]) -> str | None:
        for dp_rank in range(mesh.dp):
            alike = {r: words[r] for r in range(mesh.size) if mesh.at(r).dp_rank == dp_rank}
            if len(set(alike.values())) > 1:
                return (f"the ranks of data-parallel rank {dp_rank} hold different batches in step {step}: "
                        f"{_shares([*alike.values()], [*alike])}; make data.sources the same shards on their machines")
        return None

    consult(store, mesh.rank, mesh.size, digest.hexdigest()[:12], judge, minutes)


def _shares(values: Sequence[str], ranks: Sequence[int] | None = None) -> str:
    """Who holds which value: "1 on ranks 0 and 2, 2 on rank 1"."""
    holders: dict[str, list[int]] = defaultdict(list)
    for rank, value in zip(ranks or range(len(values)), values, strict=True):
        holders[value].append(rank)
    return ", ".join(f"{value} on {listed(held)}" for value, held in holders.items())
