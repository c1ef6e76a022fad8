"""Timelines of a pipeline: what each rank did when in one step, as a picture, with the bubble beside the formula's.

And torch's own, of everything that a few steps call, for chrome://tracing.
"""
from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from stepladder.parallel.build import Parts
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel

COLOURS = {"F": "#7aa6d6", "B": "#e0995e", "I": "#e0995e", "W": "#8fbf7f"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
AFTER = 2       # steps before the one that is drawn: the first ones make connections and buffers


Mark = float | torch.cuda.Event


class Box(NamedTuple):
    """A piece of work: forward (F), backward (B), or its halves for inputs (I) and weights (W); in seconds."""
    rank: int
    kind: str
    stage: int
    micro: int
    start: float
    end: float


class Recorder:
    """A pipeline.Clock. On a GPU events are recorded and read when the step is over; nothing waits before."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.marks: list[tuple[str, int, int, Mark, Mark]] = []
        if not mesh.alone:
            dist.barrier(group=mesh.group("pp"))         # the GPUs' clocks begin together
        self.zero = self._now()

    def _now(self) -> Mark:
        if self.mesh.device.type == "cpu":
            return time.time()                           # the same for all processes, unlike perf_counter
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        self.began = self._now()

    def end(self, kind: str, stage: int, micro: int) -> None:
        self.marks.append((kind, stage, micro, self.began, self._now()))

    def boxes(self) -> list[Box]:
        """Of every rank of this pipeline; waits for the device and for the other ranks."""
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        mine = [Box(self.mesh.pp_rank, kind, stage, micro, self._since(a), self._since(b))
                for kind, stage, micro, a, b in self.marks]
        every: list[list[Box]] = [[]] * self.mesh.pp
        dist.all_gather_object(every, mine, group=self.mesh.group("pp"))
        first = min(box.start for rank in every for box in rank)
        return [b._replace(start=b.start - first, end=b.end - first) for rank in every for b in rank]

    def _since(self, mark: Mark) -> float:
        if isinstance(mark, torch.cuda.Event) and isinstance(self.zero, torch.cuda.Event):
            return self.zero.elapsed_time(mark) / 1e3
        return mark  # pyright: ignore[reportReturnType]


@contextmanager
def profiled(on: bool, folder: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Write a trace of steps 3 to 5 of this program; yields what has to be called after each step."""
    if not on:
        yield lambda: None
        return
    when = torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1)
    write = lambda p: p.export_chrome_trace(str(folder / f"trace-rank{rank}.json.gz"))
    with torch.profiler.profile(schedule=when, on_trace_ready=write) as profile:
        yield profile.step


@contextmanager
def drawn(on: bool, parts: Parts, out: Path, tell: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Draw the passes of one step to `out`; yields what has to be called after each step. Collective."""
    if not on:
        yield lambda: None
        return
    done, recorder, pipe, mesh = 0, None, parts.pipe, parts.mesh

    def mark() -> None:
        nonlocal done, recorder
        done += 1
        if done == AFTER:
            pipe.clock = recorder = Recorder(mesh)
        elif recorder is not None:
            pipe.clock, boxes = None, recorder.boxes()
            recorder = None
            if mesh.rank == 0:
                draw(boxes, out, mesh.layout)
                tell(f"{caption(boxes, mesh.layout)}; {out}")
    yield mark


def share(boxes: Sequence[Box]) -> float:
    """The part of the ranks' time, from the first piece of work to the last, in which they did none."""
    total = max(b.end for b in boxes) - min(b.start for b in boxes)
    return 1 - sum(b.end - b.start for b in boxes) / (total * len({b.rank for b in boxes}))


def bubble(layout: Parallel, micros: int) -> float:
    """The same if stages were equal and sending cost nothing.

    1F1B and interleaved: arXiv:2104.04473, section 2.2, there relative to the time without bubbles. Zero-bubble V:
    arXiv:2401.10241, section 6, with F = I = W and 2 pp - 1 micro-batches or more. What remains of it is that rank r
    starts r forwards of a span late; the others wait as long at the end, where a step sums over all ranks.
    """
    starts = {"1f1b": 1, "interleaved": layout.chunks, "zero-bubble": 6}[layout.schedule]
    return (layout.pp - 1) / (starts * micros + layout.pp - 1)


def replay(boxes: Sequence[Box], *, alike: bool = False) -> list[Box]:
    """The same work in the same order if nothing but the data held it up: what the schedule itself costs.

    Each piece takes the mean time of its kind on its stage: what remains of the measured bubble is communication. Or,
    if all are alike, on any stage: what remains then are stages that differ, and what `bubble` has more or less is that
    it takes F, I and W for equally long.
    """
    spent: dict[tuple[str, int], list[float]] = defaultdict(list)
    of = lambda b: (b.kind, 0 if alike else b.stage)
    for b in boxes:
        spent[of(b)].append(b.end - b.start)
    last = max(b.stage for b in boxes)
    left = {r: sorted((b for b in boxes if b.rank == r), key=lambda b: b.start) for r in {b.rank for b in boxes}}
    free, done, out = dict.fromkeys(left, 0.0), {}, []
    while any(left.values()):
        for rank, queue in left.items():
            while queue and all(need in done for need in _needs(queue[0], last)):
                b = queue.pop(0)
                start = max([free[rank], *(done[need] for need in _needs(b, last))])
                free[rank] = done[b.kind, b.stage, b.micro] = start + _mean(spent[of(b)])
                out.append(b._replace(start=start, end=free[rank]))
    return out


def _needs(b: Box, last: int) -> list[tuple[str, int, int]]:
    if b.kind == "F":
        return [("F", b.stage - 1, b.micro)] if b.stage else []
    if b.kind == "W":
        return [("I", b.stage, b.micro)]
    return [("F", b.stage, b.micro), *([(b.kind, b.stage + 1, b.micro)] if b.stage < last else [])]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def caption(boxes: Sequence[Box], layout: Parallel) -> str:
    micros = 1 + max(b.micro for b in boxes)
    return (f"{layout.schedule}, {layout.pp} ranks, {micros} micro-batches: bubble {share(boxes):.1%}; with free "
            f"communication {share(replay(boxes)):.1%}; by formula {bubble(layout, micros):.1%}")


def draw(boxes: Sequence[Box], out: Path, layout: Parallel) -> None:
    """One row a rank; numbers are micro-batches, later spans of a rank are paler."""
    from matplotlib.figure import Figure  # here: a second, which training without a picture does not pay
    ranks = 1 + max(b.rank for b in boxes)
    end = max(b.end for b in boxes)
    figure = Figure(figsize=(16, 1.2 + 0.6 * ranks), layout="constrained")
    ax = figure.subplots()
    for b in boxes:
        alpha = 0.55 if b.stage >= ranks else 1.0
        ax.barh(b.rank, 1e3 * (b.end - b.start), left=1e3 * b.start, height=0.8, color=COLOURS[b.kind], alpha=alpha,
                edgecolor="white", linewidth=0.5)
        if b.end - b.start > end / 150:
            ax.text(5e2 * (b.start + b.end), b.rank, str(b.micro), ha="center", va="center", fontsize=7)
    for kind in dict.fromkeys(b.kind for b in boxes):
        ax.barh(0, 0, color=COLOURS[kind], label=NAMES[kind])
    ax.set_yticks(range(ranks), [f"rank {r}" for r in range(ranks)])
    ax.invert_yaxis()
    ax.set_xlabel("ms")
    ax.set_title(caption(boxes, layout), fontsize=10)
    figure.legend(fontsize=8, frameon=False, ncols=3, loc="outside lower right")
    ax.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
