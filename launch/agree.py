"""Ranks agree before they work: on the run and the code at the start, on the batches in the first steps.

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
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.watch import listed

LAYERS = ("launch", "parallel", "model", "ops", "kernels", "data")
CODE, TORCH = "the code of stepladder", "the version of torch"
START = 10.0                        # minutes that ranks may come after one another, however short the limit
MARGIN = timedelta(seconds=30)      # for rank 0 to say whom it missed
GOODBYE = timedelta(seconds=5)      # for the others to hear a verdict
_round = itertools.count()          # a store outlives a run in tests: every question has a number of its own


class Disagreement(ValueError):
    """Ranks that were not started alike."""


def consult(store: dist.Store, rank: int, size: int, word: str, judge: Callable[[list[str]], str | None],
            minutes: float) -> None:
    """Every rank says its word; rank 0 judges them; its verdict, if there is one, is raised on every rank."""
    key, limit = f"agree/{next(_round)}", timedelta(minutes=minutes)
    store.set(f"{key}/{rank}", word)
    if rank == 0:
        store.set(f"{key}/verdict", _missing(store, key, size, limit) or judge(
            [store.get(f"{key}/{r}").decode() for r in range(size)]) or "")
    store.wait([f"{key}/verdict"], limit + MARGIN)
    if verdict := store.get(f"{key}/verdict").decode():
        store.set(f"{key}/heard/{rank}", "")
        if rank == 0:                            # who may hold the store, and would take it along
            with contextlib.suppress(RuntimeError):
                store.wait([f"{key}/heard/{r}" for r in range(size)], GOODBYE)
        raise Disagreement(verdict)


def _missing(store: dist.Store, key: str, size: int, limit: timedelta) -> str | None:
    try:
        store.wait([f"{key}/{r}" for r in range(size)], limit)
    except RuntimeError:                         # each kind of store has its own below it
        absent = [r for r in range(size) if not store.check([f"{key}/{r}"])]
        return (f"{listed(absent)} did not come within {limit.total_seconds() / 60:g} minutes; "
                "look at what was said there last, or raise train.collective_minutes")


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


def flat(table: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A run's tables as one, with keys as on the command line: {"data": {"seq": 8}} -> {"data.seq": 8}"""
    out = {}
    for name, value in table.items():
        out |= flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return out


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
