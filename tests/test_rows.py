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
from stepladder.parallel.copies import Rows
from stepladder.parallel.expert import Way
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel

CPU = torch.device("cpu")


def sent(rank: int, n: int) -> tuple[list[str], list[str]]:
    """What differs between rows sent by Rows and by an all-to-all, there and back; and what the last call did."""
    found, gen = list[str](), torch.Generator().manual_seed(0)
    with Model().running():
        rows = Rows(cast(Any, dist.group.WORLD), CPU)
        for call, most in enumerate((4, 9, 2)):                      # the second makes the boxes grow
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
    return found, cast(Any, rows.handle).log[-12:]


def test_rows_arrive_where_an_all_to_all_would_bring_them_and_come_back() -> None:
    for rank, (found, log) in enumerate(ranks.run(3, sent)):
        assert not found
        # Nobody reads a box before all have met who write it, nor writes it again before all have who read it.
        assert log == ["inbox 0", "inbox 1", "inbox 2", "meet 1", f"inbox {rank}", "meet 1",
                       f"outbox {rank}", "meet 2", "outbox 0", "outbox 1", "outbox 2", "meet 2"]


class InTurn(Rows):
    """What stays on a rank is copied before the rest, not beside it: both are parts of one tensor, and the model knows
    only whole ones."""
    own: Any = property(lambda self: torch.cuda.current_stream(), lambda self, stream: None)


def trained(rank: int, n: int, wiring: str, recompute: str, change: Change | None = None) -> tuple[list[str], bool]:
    """Faults of passes whose rows go by copy engines, and whether each gradient is that of one whose do not."""
    gradients: list[dict[str, Tensor]] = []
    parts = build(tiny.config("attention0", "moe0", wiring, layers=2), Mesh(Parallel(ep=n, shard=False), CPU, rank, n),
                  seed=0, dtype=torch.float64, recompute=recompute)
    model = Model()
    with model.running(), change.made() if change else contextlib.nullcontext():
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


@pytest.mark.parametrize(("change", "kind"), [
    (Change(Rows, "send", "self.there.wait_stream(torch.cuda.current_stream(self.device))"), "order"),
    (Change(Rows, "take", "self.there.wait_stream(torch.cuda.current_stream(self.device))"), "overwrite"),
    (Change(Rows, "fetch", "lane.wait_event(self.fetched)"), "overwrite"),
    (Change(Rows, "fetch", "self.home.wait_stream(lane)"), "order")], ids=["send", "take", "outbox", "fetch"])
def test_what_is_taken_out_of_it_is_missed(change: Change, kind: str) -> None:
    found, _ = ranks.run(2, trained, "ladder", "none", change)[0]
    assert any(fault.startswith(kind) for fault in found)
