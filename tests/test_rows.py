"""Rows to experts and back by copy engines: what arrives, without a GPU. tests/lanes.py says how."""
from __future__ import annotations

import contextlib
from typing import Any, cast

import lanes
import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from lanes import Model
from test_lanes import Change
from torch import Tensor

from stepladder.model.decoder import blocks
from stepladder.parallel.build import build
from stepladder.parallel.copies import Rows, Shares
from stepladder.parallel.expert import Way
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel

CPU = torch.device("cpu")


def sent(rank: int, n: int) -> tuple[list[str], list[list[str]]]:
    """What differs between rows sent by Rows and by an all-to-all, there and back; and what each memory saw."""
    found, logs, gen = list[str](), list[list[str]](), torch.Generator().manual_seed(0)
    with Model().running():
        rows = Rows(cast(Any, dist.group.WORLD), CPU)
        for call, most in enumerate((4, 900, 2)):                    # the second makes the boxes grow
            moved = torch.randint(0, most, (n, n), generator=gen) * (torch.arange(n) != call % n)     # one gets none
            way = Way(moved.unsqueeze(2), rank, CPU)
            x, came, shares = torch.randn(sum(way.send), 3), torch.empty(sum(way.receive), 3), way.shares()
            dist.all_to_all_single(came, x, way.receive, way.send)
            order = torch.randperm(len(came))
            rows.room(way.most() * 12)
            rows.send(x, shares).wait()
            got = rows.take(order, x)
            back, done = rows.fetch(got, order.argsort(), shares)
            done.wait()
            found += [f"{call} {what}" for what, a, b in (("there", got, came[order]), ("back", back, x))
                      if not torch.equal(a, b)]
            logs.append(cast(Any, rows.handle).log)
    return found, logs


def test_rows_arrive_where_an_all_to_all_would_bring_them_and_come_back() -> None:
    for rank, (found, (small, *_, log)) in enumerate(ranks.run(3, sent)):
        assert not found
        # Nobody reads a box before all have met who write it, nor writes it again before all have who read it: they
        # meet once each way.
        assert log[-10:] == ["inbox 0", "inbox 1", "inbox 2", "meet 1", f"inbox {rank}",
                             f"outbox {rank}", "meet 2", "outbox 0", "outbox 1", "outbox 2"]
        assert small[-1] == "meet 2"                                     # and once more before the memory is given back


class InTurn(Rows):
    """Copies one after the other, not side by side: they are of parts of one tensor, and the model knows only whole
    ones."""
    lines: Any = property(lambda self: (), lambda self, lines: None)


CHANGES = [
    (Change(Rows, "send", "self.there.wait_stream(torch.cuda.current_stream(self.device))"), "order"),
    (Change(Rows, "send", "self.there.wait_event(self.fetched)"), "overwrite"),
    (Change(Rows, "send", 'self.last == "send"', "False"), "overwrite"),
    (Change(Rows, "send", "self.there.wait_event(self.taken)"), "overwrite"),
    (Change(Rows, "fetch", 'self.last == "fetch"', "False"), "overwrite"),
    (Change(Rows, "fetch", "lane.wait_event(self.came)"), "overwrite"),
    (Change(Rows, "fetch", "self.home.wait_stream(lane)"), "order"),
    (Change(Rows, "fetch", "self.home.wait_event(self.taken)"), "overwrite")]


def called(rank: int, n: int, changes: list[Change | None]) -> list[tuple[list[str], list[str]]]:
    """Faults of calls on lanes that know nothing of each other, and when ranks met."""
    shares, answers = Shares([2] * n, [2 * rank] * n), list[tuple[list[str], list[str]]]()
    order = torch.arange(2 * n)
    for change in changes:
        model, kept = Model(), list[Any]()
        with model.running(), change.made() if change else contextlib.nullcontext():
            rows = InTurn(cast(Any, dist.group.WORLD), CPU)
            rows.room(24 * n)
            for call in ["send", "take", "fetch", "send", "take", "send", "take", "fetch", "fetch", "send", "take"]:
                with model.stream(lanes.Lane(call, model.current.clock)):        # the room is older than all
                    x = torch.ones(2 * n, 3)
                    if call == "take":
                        rows.came.wait()
                    kept += [x, rows.send(x, shares) if call == "send" else
                             rows.take(order, x) if call == "take" else rows.fetch(x, order, shares)]
        answers.append(([*model.found], [line for line in cast(Any, rows.handle).log if "meet" in line]))
    return answers


def test_who_meets_once_each_way_has_waited_for_all_that_it_tells() -> None:
    (right, met), *wrong = ranks.run(2, called, [None, *(change for change, _ in CHANGES)])[0]
    assert not right
    # Twice where one call follows another of its kind: nobody has said meanwhile that the boxes are free.
    assert met == [f"meet {channel}" for channel in (1, 2, 1, 1, 1, 2, 2, 2, 1)]
    for (change, kind), (found, _) in zip(CHANGES, wrong, strict=True):
        assert any(fault.startswith(kind) for fault in found), f"{change.name} without {change.old}: {found}"


def trained(rank: int, n: int, wiring: str, recompute: str) -> tuple[list[str], bool]:
    """Faults of passes whose rows go by copy engines, and whether each gradient is that of one whose do not."""
    gradients: list[dict[str, Tensor]] = []
    parts = build(tiny.config("attention0", "moe0", wiring, layers=2), Mesh(Parallel(ep=n, shard=False), CPU, rank, n),
                  seed=0, dtype=torch.float64, recompute=recompute)
    model = Model()
    with model.running():
        copied = InTurn(cast(Any, dist.group.WORLD), CPU)
        cast(Any, parts.decoder.embed_comm).lanes.side = lanes.Lane("side")
        parts.pipe.backward = model.backward
        for engine in (None, copied, copied):
            for block in blocks(parts.decoder):
                cast(Any, block.channel).experts.exchange.copies = engine
            parts.pipe([tiny.micro(2, 16)])
            gradients.append({name: cast(Tensor, p.grad) for name, p in parts.parameters().items()})
            for p in parts.parameters().values():
                p.grad = None
    plain, *others = gradients
    return [*model.found], all(torch.equal(plain[name], g[name]) for g in others for name in plain)


@pytest.mark.parametrize(("wiring", "recompute"), [("ladder", "none"), ("standard", "both")])
def test_passes_by_copy_engines_have_the_same_gradients_and_their_lanes_wait(wiring: str, recompute: str) -> None:
    assert ranks.run(2, trained, wiring, recompute) == [([], True)] * 2

