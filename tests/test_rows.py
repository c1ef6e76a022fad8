"""Tokens to experts and back by copy engines: what arrives, without a GPU. tests/lanes.py says how."""
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
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel

CPU = torch.device("cpu")


def sent(rank: int, n: int) -> tuple[list[str], list[list[str]]]:
    """What differs between tokens sent by Rows and by an all-to-all, there and back; and what each memory saw."""
    found, logs, gen = list[str](), list[list[str]](), torch.Generator().manual_seed(0)
    with Model().running():
        rows = Rows(cast(Any, dist.group.WORLD), CPU)
        for call, N in enumerate((4, 900, 2)):                       # the second makes the boxes grow
            which = [[torch.randperm(N, generator=gen)[:int(torch.randint(N + 1, (), generator=gen)) * (r != call % n)]
                      for r in range(n)] for _ in range(n)]          # of each rank, for each; one gets none
            receive = [len(which[r][rank]) for r in range(n)]
            x, mine = torch.randn(N, 3), which[rank]
            come, home = torch.empty(sum(receive), 3), torch.empty(sum(map(len, mine)), 3)
            dist.all_to_all_single(come, x[torch.cat(mine)], receive, [*map(len, mine)])
            rows.room(x)
            got, done = rows.there(x, mine, receive)
            done.wait()
            dist.all_to_all_single(home, 2 * got, [*map(len, mine)], receive)
            box, done, land = rows.home(2 * got, receive, N, Tensor.clone)
            done.wait()
            parts = land(box).split(N)
            back = torch.cat([part[:len(of)] for part, of in zip(parts, mine, strict=True)])
            found += [f"{call} {what}" for what, a, b in (("there", got, come), ("home", back, home))
                      if not torch.equal(a, b)]
            logs.append(cast(Any, rows.handle).log)
    return found, logs


def test_tokens_arrive_where_an_all_to_all_would_bring_them_and_come_back() -> None:
    for rank, (found, (small, *_, log)) in enumerate(ranks.run(3, sent)):
        assert not found
        # Nobody reads a box before all have met who write it, nor writes it again before all have who read it: they
        # meet once each way.
        assert log[-11:] == [f"outbox {rank}"] * 2 + ["meet 1"] + [f"outbox {r}" for r in range(3)] + [
            f"inbox {r}" for r in range(3)] + ["meet 2", f"inbox {rank}"]
        assert small[-1] == "meet 2"                                     # and once more before the memory is given back


class InTurn(Rows):
    """Copies one after the other, not side by side: they are of parts of one tensor, and the model knows only whole
    ones."""
    lines: Any = property(lambda self: (), lambda self, lines: None)


CHANGES = [
    (Change(Rows, "there", "self.out.wait_stream(torch.cuda.current_stream(self.device))"), "order"),
    (Change(Rows, "there", "self.out.wait_event(self.returned)"), "overwrite"),
    (Change(Rows, "there", 'self.last == "there"', "False"), "overwrite"),
    (Change(Rows, "there", "self.out.wait_event(self.landed)"), "overwrite"),
    (Change(Rows, "home", 'self.last == "home"', "False"), "overwrite"),
    (Change(Rows, "home", "self.back.wait_stream(torch.cuda.current_stream(self.device))"), "order"),
    (Change(Rows, "home", "self.back.wait_event(self.came)"), "overwrite"),
    (Change(Rows, "home", "self.back.wait_event(self.landed)"), "overwrite")]


def called(rank: int, n: int, changes: list[Change | None]) -> list[tuple[list[str], list[str]]]:
    """Faults of calls on lanes that know nothing of each other, and when ranks met."""
    answers, which = list[tuple[list[str], list[str]]](), [torch.tensor([1, 2])] * n
    for change in changes:
        model, kept = Model(), list[Any]()
        with model.running(), change.made() if change else contextlib.nullcontext():
            rows = InTurn(cast(Any, dist.group.WORLD), CPU)
            rows.room(torch.ones(3, 4))
            for call in ["there", "home", "there", "there", "home", "home", "there"]:
                with model.stream(lanes.Lane(call, model.current.clock)):        # the room is older than all
                    x = torch.ones(2 * n if call == "home" else 3, 4)
                    if call == "there":
                        kept += [x, rows.there(x, which, [2] * n)]
                    else:
                        box, done, land = rows.home(x, [2] * n, 3, Tensor.clone)
                        with model.stream(lanes.Lane("landing", model.current.clock)):
                            done.wait()
                            kept += [x, land(box)]
        answers.append(([*model.found], [line for line in cast(Any, rows.handle).log if "meet" in line]))
    return answers


def test_who_meets_once_each_way_has_waited_for_all_that_it_tells() -> None:
    (right, met), *wrong = ranks.run(2, called, [None, *(change for change, _ in CHANGES)])[0]
    assert not right
    # Twice where one call follows another of its kind: nobody has said meanwhile that the boxes are free.
    assert met == [f"meet {channel}" for channel in (1, 2, 1, 3, 1, 2, 3, 2, 1)]
    for (change, kind), (found, _) in zip(CHANGES, wrong, strict=True):
        assert any(fault.startswith(kind) for fault in found), f"{change.name} without {change.old}: {found}"


def trained(rank: int, n: int, channel: str, wiring: str, recompute: str) -> tuple[list[str], bool]:
    """Faults of passes whose tokens go by copy engines, and whether each gradient is that of one whose do not."""
    gradients: list[dict[str, Tensor]] = []
    parts = build(tiny.config("attention0", channel, wiring, layers=2), Mesh(Parallel(ep=n, shard=False), CPU, rank, n),
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
            gradients.append({name: p.grad for name, p in parts.parameters().items() if p.grad is not None})
            for p in parts.parameters().values():
                p.grad = None
    plain, *others = gradients
    return [*model.found], all(torch.equal(plain[name], g[name]) for g in others for name in plain)


@pytest.mark.parametrize(("channel", "wiring", "recompute"), [
    ("moe0", "ladder", "none"), ("moe0", "standard", "both"), ("moe1", "parallel", "channel")])
def test_passes_by_copy_engines_have_the_same_gradients_and_their_lanes_wait(channel: str, wiring: str,
                                                                             recompute: str) -> None:
    assert ranks.run(2, trained, channel, wiring, recompute) == [([], True)] * 2

