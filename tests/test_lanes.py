"""No lane reads, writes or is given what another still needs: tests/lanes.py says how that is seen without a GPU."""
from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from itertools import combinations, product
from typing import Any, NamedTuple
from unittest import mock

import lanes
import pytest
import ranks
import tiny
import torch

from stepladder.model.decoder import Norm, blocks
from stepladder.model.residual import Stream
from stepladder.parallel.build import build
from stepladder.parallel.expert import AllToAll
from stepladder.parallel.flight import Carried, Lanes, _Flight
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel

CPU = torch.device("cpu")
LAYOUTS = {"tp": Parallel(tp=2, shard=False), "sp": Parallel(tp=2, sequence=True, shard=False),
           "ep": Parallel(ep=2, shard=False), "tp ep": Parallel(tp=2, ep=2, shard=False),
           "sp ep": Parallel(tp=2, ep=2, sequence=True, shard=False)}
PASSES = {"training": (True, "none"), "recompute": (True, "both"), "evaluation": (False, "none")}


class Case(NamedTuple):
    layout: str
    channel: str
    wiring: str
    passes: str


RECOMPUTED = Case("ep", "moe1", "ladder", "recompute")
EVALUATED = Case("sp", "moe1", "parallel", "evaluation")
LADDER = Case("tp", "swiglu0", "ladder", "training")
PARALLEL = Case("tp", "swiglu0", "parallel", "training")


class Change(NamedTuple):
    """A method of which `old` is replaced."""
    owner: Any
    name: str
    old: str
    new: str = "pass"

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        method = inspect.unwrap(getattr(self.owner, self.name))
        source = textwrap.dedent(inspect.getsource(method))
        assert source.count(self.old) == 1, f"{self.old} is no longer in {self.name}"
        made: dict[str, Any] = {}
        exec(compile(source.replace(self.old, self.new), inspect.getfile(method), "exec"), method.__globals__, made)
        with mock.patch.object(self.owner, self.name, made[self.name]):
            yield


def selection() -> list[Case]:
    """A few cases that together have every two of a layout, a channel mixer, a wiring and a kind of pass."""
    every = [Case(*c) for c in product(LAYOUTS, ("swiglu0", "moe0", "moe1"), ("ladder", "parallel", "standard"), PASSES)
             if "ep" not in c[0] or c[1] != "swiglu0"]
    pairs = lambda case: set(combinations(enumerate(case), 2))
    chosen = [RECOMPUTED, EVALUATED]
    while wanted := set().union(*map(pairs, every)) - set().union(*map(pairs, chosen)):
        chosen.append(max(every, key=lambda case: len(pairs(case) & wanted)))
    return chosen


def faults(rank: int, n: int, todo: list[tuple[Case, Change | None]], first: str = "front") -> list[list[str]]:
    """Of two passes, the first on lane `first`. Rank 1 is there to answer."""
    return [found(rank, n, case, change, first) for case, change in todo]


def found(rank: int, n: int, case: Case, change: Change | None, first: str) -> list[str]:
    train, recompute = PASSES[case.passes]
    cfg = tiny.config("attention0", case.channel, case.wiring, layers=2)
    parts = build(cfg, Mesh(LAYOUTS[case.layout], CPU, rank, n), seed=0, dtype=torch.bfloat16, recompute=recompute)
    run = lambda seed: parts.pipe([tiny.micro(2, 16, seed)], train=train)
    if rank:
        run(0), run(1)
        return []
    model = lanes.Model()
    with model.running(), change.made() if change else contextlib.nullcontext():
        parts.decoder.embed_comm.lanes.side = lanes.Lane("side")
        parts.pipe.backward = model.backward
        with contextlib.nullcontext() if first == "front" else torch.cuda.stream(lanes.Lane(first)):
            run(0)
        run(1)
    return list(model.found)


def test_every_lane_waits_for_what_it_needs_and_the_allocator_knows_who_reads_what() -> None:
    cases = selection()
    for case, said in zip(cases, ranks.run(2, faults, [(case, None) for case in cases])[0], strict=True):
        assert not said, f"{case}: {said[0]}"


CHANGES = [
    (EVALUATED, Change(Lanes, "aside", "self.side.wait_stream(self.main)"), "order"),
    (Case("ep", "moe1", "parallel", "evaluation"), Change(Lanes, "reads", "things)", "())"), "reuse"),
    (EVALUATED, Change(Lanes, "front", "self.main.wait_stream(self.side)"), "order"),
    (EVALUATED, Change(Lanes, "front", "_used_by(self.main, needs)"), "reuse"),
    (Case("ep", "moe0", "ladder", "recompute"),
     Change(Lanes, "again", "torch.cuda.stream(self.side)", "contextlib.nullcontext()"), "reuse"),
    (LADDER, Change(Norm, "forward", "else apart(h)", "else (h, h)"), "overwrite"),
    (PARALLEL, Change(Norm, "read", "apart(h)", "(h, h)"), "overwrite"),
    (EVALUATED, Change(_Flight, "land", "work.wait()"), "order"),
    (EVALUATED, Change(_Flight, "land", "(source, y)", "(y,)"), "reuse"),
    (EVALUATED, Change(_Flight, "land", "(source, y)", "(source,)"), "reuse"),
    (Case("ep", "moe0", "standard", "evaluation"), Change(Carried, "wait", "lane.wait_event(self.made)"), "order")]


def test_what_is_taken_out_of_the_lanes_is_missed() -> None:
    answers = ranks.run(2, faults, [(case, change) for case, change, _ in CHANGES])[0]
    for (_, change, kind), said in zip(CHANGES, answers, strict=True):
        assert any(fault.startswith(kind) for fault in said), f"{change.name} without {change.old}"


def waited(rank: int, n: int, channel: str) -> list[tuple[str, bool]]:
    """Whether the side lane has waited for all that the front lane was given, where a block's first norm begins and
    where it is said who goes to whom."""
    parts = build(tiny.config("attention0", channel, "ladder", layers=3), Mesh(LAYOUTS["ep"], CPU, rank, n), seed=0,
                  dtype=torch.bfloat16)
    model, log = lanes.Model(), list[tuple[str, bool]]()
    with model.running():
        front, side = model.current, lanes.Lane("side")
        parts.decoder.embed_comm.lanes.side = side
        parts.pipe.backward = model.backward

        def say(what: str) -> None:
            log.append((what, side.knows(front, front.clock.get(front, 0))))
        for i, block in enumerate(blocks(parts.decoder)):
            block.norm1.register_forward_pre_hook(lambda *_, i=i: say(f"norm {i}"))
        announce = AllToAll.announce
        with mock.patch.object(AllToAll, "announce", lambda *args: (say("announce"), announce(*args))[1]):
            parts.pipe([tiny.micro(2, 16)], train=False)
    return log


def test_what_has_nothing_to_do_with_the_experts_does_not_wait_for_them() -> None:
    said = ranks.run(2, waited, "moe1")[0]
    assert [what for what, _ in said] == ["norm 0", "announce", "announce", "norm 1", "announce", "norm 2"], said
    assert [late for _, late in said] == [True, False, False, False, False, False], said


def test_the_pass_after_a_recorded_one_is_on_its_own_front_lane() -> None:
    case = Case("tp", "swiglu0", "ladder", "evaluation")
    stays = Change(Lanes, "front", "not self.beside()", "False")
    untold = Change(Lanes, "aside", "_used_by(self.main, s)")
    right, wrong, reused = ranks.run(2, faults, [(case, None), (case, stays), (case, untold)], "the recording's")[0]
    assert not right
    assert wrong[0].startswith("order: aten.clone.default on the recording's")
    assert reused[0].startswith("reuse: ")


def carried(here: Lanes, _: lanes.Model) -> None:
    """From the front lane to the side lane, which reads it when nobody else has it."""
    y = here.carry(torch.ones(4) + 1)
    with torch.cuda.stream(here.side):
        y.wait() + 1  # pyright: ignore[reportUnusedExpression]
    del y
    torch.ones(4) + 1  # pyright: ignore[reportUnusedExpression]


def read_after(here: Lanes, _: lanes.Model) -> None:
    """What was made beside, on the front lane."""
    here.aside(lambda s: Stream(s.h + 1), Stream(torch.ones(4))).h + 1  # pyright: ignore[reportUnusedExpression]


def saved(here: Lanes, model: lanes.Model) -> None:
    """By a node of the side lane, which is the last to have it; the front lane goes on in the backward."""
    w = torch.ones(4, requires_grad=True)

    def beside(s: Stream) -> Stream:
        with here.front():
            other = w * 3
        return Stream(s.h * s.h, route=(other,))
    s = here.aside(beside, Stream(w + 1))
    model.backward(s.h.sum() + s.route[0].sum())


@pytest.mark.parametrize(("walk", "change", "kind"), [
    (carried, Change(Carried, "wait", "lane.wait_event(self.made)"), "order"),
    (carried, Change(Carried, "wait", "self.y.record_stream(lane)"), "reuse"),
    (saved, Change(Lanes, "aside", "_used_by(self.side, s)"), "reuse"),
    (read_after, Change(Lanes, "aside", "self.main.wait_stream(self.side)"), "order")])
def test_what_another_wait_makes_up_for_in_a_models_passes_is_missed_elsewhere(
        walk: Callable[[Lanes, lanes.Model], None], change: Change, kind: str) -> None:
    for made, kinds in ((contextlib.nullcontext(), set()), (change.made(), {kind})):
        model, here = lanes.Model(), Lanes(CPU)
        here.side = lanes.Lane("side")  # pyright: ignore[reportAttributeAccessIssue]
        with model.running(), made:
            walk(here, model)
        assert {fault.partition(":")[0] for fault in model.found} == kinds
