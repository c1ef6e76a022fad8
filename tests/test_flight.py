"""When collectives start and when they are awaited: what ladder hides under, forward and backward, without a GPU."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import tiny
import torch

from stepladder.model.decoder import blocks
from stepladder.parallel import flight, tensor
from stepladder.parallel.build import build
from stepladder.parallel.expert import AllToAll
from stepladder.parallel.flight import Lanes, Started
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel

CPU = torch.device("cpu")


def order(rank: int, n: int, wiring: str, layout: Parallel, lowered: bool, channel: str,
          recompute: str = "none") -> tuple[list[str], list[str]]:
    """What this rank did in a pass over two layers, forward and backward: "+2" a collective of sublayer 2's input or
    output was started, "-2" it was awaited, "2" its mixer ran."""
    parts = build(tiny.config("attention0", channel, wiring, layers=2), Mesh(layout, CPU, rank, n), seed=0,
                  dtype=torch.float64, recompute=recompute)
    log: list[str] = []
    number = {f"blocks.{i}.{name}": str(2 * i + j) for i in range(2) for j, name in enumerate(("token", "channel"))}
    start, land = flight._Flight.start, flight._Flight.land

    def say(self: Any, what: str) -> None:
        if isinstance(self.under_way.work, torch.distributed.Work) and self.where in number:
            log.append(what + number[self.where])

    def started(self: Any, trip: Any, x: torch.Tensor) -> None:
        start(self, trip, x)
        say(self, "+")

    def landed(self: Any) -> torch.Tensor:
        say(self, "-")
        return land(self)

    flight._Flight.start, flight._Flight.land = started, landed
    if not lowered:
        sublayer = Lanes.sublayer
        Lanes.sublayer = lambda self, name: (sublayer(self, name), setattr(self, "low", 2**62))
    for i, block in enumerate(blocks(parts.decoder)):
        for j, mixer in enumerate((block.token, block.channel)):
            mixer.register_full_backward_pre_hook(lambda *_, k=2 * i + j: log.append(f"{k}"))
            mixer.register_forward_hook(lambda *_, k=2 * i + j: log.append(f"{k}"))
    forward: list[str] = []
    finish = parts.decoder.finish

    def split(*args: Any) -> Any:
        forward.extend(log)
        log.clear()
        return finish(*args)
    parts.decoder.finish = split
    parts.pipe([tiny.micro(2, 16)])
    return forward, log


TP, SP = Parallel(tp=2), Parallel(tp=2, sequence=True)


def both(wiring: str, layout: Parallel = TP, lowered: bool = True, channel: str = "swiglu0") -> tuple[str, str]:
    forward, backward = ranks.run(2, order, wiring, layout, lowered, channel)[0]
    return " ".join(forward), " ".join(backward)


def test_standard_wiring_awaits_every_sum_before_it_reads() -> None:
    assert both("standard") == ("0 +0 -0 1 +1 -1 2 +2 -2 3 +3", "-3 3 +3 -3 2 +2 -2 1 +1 -1 0 +0 -0")


def test_ladder_runs_a_mixer_between_a_sum_and_its_wait_in_both_directions() -> None:
    forward, backward = both("ladder")
    assert forward == "0 +0 1 +1 -0 2 +2 -1 3 +3"
    assert backward == "-2 -3 3 +3 2 +2 -3 1 +1 -2 0 +0 -1 -0"       # 2 runs before 3's input gradient is awaited


def test_left_to_autograd_the_wait_comes_first() -> None:
    assert both("ladder", lowered=False)[1] == "-2 -3 3 +3 -3 2 +2 -2 1 +1 -1 0 +0 -0"


def test_parallel_wiring_has_one_sum_a_block() -> None:
    forward, backward = both("parallel")
    assert forward == "0 1 +1 -1 2 3 +3"
    assert backward == "-3 3 +3 2 +2 -3 -2 1 +1 0 +0 -1 -0"


def test_ladder_under_sequence_parallel_scatters_while_a_mixer_runs() -> None:
    """The gathers are called one after the other here; on a GPU they are beside the mixer called before them."""
    forward, backward = both("ladder", SP)
    assert forward == "+0 -0 0 +0 +1 -1 1 +1 -0 +2 -2 2 +2 -1 +3 -3 3 +3"
    assert backward.removeprefix("-2 -3 +3 +2 -3 ") == "3 +3 -2 2 +2 -3 +1 -1 1 +1 -2 +0 -0 0 +0 -1 -0"


def test_ladder_sends_tokens_to_experts_behind_the_token_mixers_call_and_back_behind_the_next() -> None:
    forward, backward = both("ladder", Parallel(ep=2, shard=False), channel="moe0")
    assert forward == "0 +1 -1 1 +1 2 -1 +3 -3 3 +3"
    assert backward == "-3 +3 -3 3 +3 2 -3 +1 -1 1 +1 0 -1"


def counted(rank: int, n: int, channel: str, recompute: str) -> list[str]:
    """When this rank read counts on the host ("read"), and when mixers ran, forward and backward."""
    layout = Mesh(Parallel(ep=2, shard=False), CPU, rank, n)
    parts = build(tiny.config("attention0", channel, "ladder", layers=2), layout,
                  seed=0, dtype=torch.float64, recompute=recompute)
    log: list[str] = []
    announce = AllToAll.announce
    AllToAll.announce = lambda self, *chosen: (log.append("read"), announce(self, *chosen))[1]
    for i, block in enumerate(blocks(parts.decoder)):
        for j, mixer in enumerate((block.token, block.channel)):
            mixer.register_forward_hook(lambda *_, k=2 * i + j: log.append(f"{k}"))
    parts.pipe([tiny.micro(2, 16)])
    return log


def test_counts_are_read_once_a_layer_and_pre_gated_ones_before_the_token_mixer_is_called() -> None:
    """Then they have come when they are needed: the router that made them is a block back."""
    assert ranks.run(2, counted, "moe0", "none")[0] == ["0", "read", "1", "2", "read", "3"]
    assert ranks.run(2, counted, "moe1", "none")[0] == ["0", "read", "1", "read", "2", "3"]
    # Recomputed, a layer that gates itself asks again, a pre-gated one does not.
    assert ranks.run(2, counted, "moe0", "channel")[0] == ["0", "read", "1", "2", "read", "3", "read", "read"]
    assert ranks.run(2, counted, "moe1", "channel")[0] == ["0", "read", "1", "read", "2", "3", "read"]


def test_recomputed_sublayers_keep_the_order_of_their_collectives() -> None:
    said = ranks.run(2, order, "ladder", TP, True, "swiglu0", "both")[0][1]
    assert " ".join(x for x in said if x[0] in "+-") == "-2 -3 +3 +2 -3 +1 -2 +0 -1 -0"


def told(rank: int, n: int, layout: Parallel, channel: str) -> list[tuple[str, str]]:
    parts = build(tiny.config("attention0", channel, "ladder", layers=2), Mesh(layout, CPU, rank, n), seed=0,
                  dtype=torch.float64)
    log: list[tuple[str, str]] = []
    tensor.watch = SimpleNamespace(track=lambda work, kind, where: (log.append((kind, where)), work)[1])
    parts.pipe([tiny.micro(2, 16)])
    return log


def test_the_watchdog_is_told_kind_and_sublayer_of_every_collective() -> None:
    sublayers = [f"blocks.{i}.{name}" for i in range(2) for name in ("token", "channel")]
    log = ranks.run(2, told, TP, "swiglu0")[0]
    assert [log.count(("all-reduce", name)) for name in ("embed", *sublayers, "head")] == [1, 2, 2, 2, 2, 1]
    log = ranks.run(2, told, SP, "swiglu0")[0]
    assert {(kind, log.count((kind, name))) for kind in ("all-gather", "reduce-scatter") for name in sublayers} == {
        ("all-gather", 2), ("reduce-scatter", 2)}
    log = ranks.run(2, told, Parallel(ep=2, shard=False), "moe0")[0]
    assert [log.count(("all-to-all", name)) for name in sublayers] == [0, 4, 0, 4]     # there and back, twice


def test_the_watchdog_is_told_of_what_copy_engines_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, str]] = []
    monkeypatch.setattr(tensor, "watch", SimpleNamespace(note=lambda kind, where: log.append((kind, where))))
    carried = lambda x: (x, None)
    engines = SimpleNamespace(gather=carried, scatter=carried, add_up=carried)
    some, x = object.__new__(tensor.Ranks), torch.ones(2, 4, 3)
    some.lanes, some.n, some.copies = Lanes(CPU), 2, [engines, engines]  # pyright: ignore[reportAttributeAccessIssue]
    some.lanes.where = "blocks.1.token"
    some.gather(x), some.scatter(x), some.add_up(x)
    assert log == [(kind, "blocks.1.token") for kind in ("all-gather", "reduce-scatter", "all-reduce")]


def there_and_back(x: torch.Tensor) -> torch.Tensor:
    lanes = Lanes(CPU)
    go, back = (lambda t: Started(t * 3, finish=lambda y: y.flatten())), lambda g: Started(g.view(2, 3) * 5)
    return lanes.start(x, go, back).wait()


def test_a_flight_may_change_shape_and_its_gradient_comes_by_the_way_back() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    y = there_and_back(x)
    assert torch.equal(y, torch.full((6,), 3.0))
    y.backward(torch.arange(6.0))
    assert x.grad is not None
    assert torch.equal(x.grad, 5 * torch.arange(6.0).view(2, 3))


def test_a_flight_lands_once() -> None:
    pending = Lanes(CPU).start(torch.ones(2), lambda t: Started(t), lambda g: Started(g))
    pending.wait()
    with pytest.raises(AssertionError):
        pending.wait()


def test_the_gradient_of_what_is_carried_late_goes_on_behind_the_sublayer_before() -> None:
    lanes, h, ran = Lanes(CPU), torch.ones(1, requires_grad=True), list[str]()

    def sublayer(name: str) -> torch.Tensor:
        lanes.sublayer(name)
        x = h * 2
        y = lanes.carry(x, late=True).wait() * 3
        for node, what in ((x.grad_fn, "norm"), (y.grad_fn, "mixer")):
            node.register_prehook(lambda g, what=what: ran.append(f"{what} {name}"))  # pyright: ignore[reportOptionalMemberAccess]
        return y
    (sublayer("0") + sublayer("1")).backward()
    assert ran == ["mixer 1", "mixer 0", "norm 1", "norm 0"]


def test_what_is_carried_is_awaited_and_its_memory_kept_by_the_lane_that_lands(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    current = SimpleNamespace(record_event=lambda: "made", wait_event=log.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda y, lane: log.append(lane))
    lanes, x = Lanes(CPU), torch.ones(2)
    lanes.side = current  # pyright: ignore[reportAttributeAccessIssue]
    on_its_way = lanes.carry(x)
    assert log == []
    assert on_its_way.wait() is x
    assert log == ["made", current]


def test_private_set_sequence_nr_moves_a_node_back() -> None:
    """torch.autograd.graph.Node._set_sequence_nr, _sequence_nr and torch._C._autograd._get_sequence_nr."""
    before = torch._C._autograd._get_sequence_nr()  # pyright: ignore
    x = torch.ones(1, requires_grad=True)
    late, early = x * 2, x * 3
    assert late.grad_fn is not None
    assert early.grad_fn is not None
    assert [y.grad_fn._sequence_nr() for y in (late, early)] == [before, before + 1]  # pyright: ignore
    ran: list[str] = []
    late.grad_fn.register_prehook(lambda g: ran.append("late"))
    early.grad_fn.register_prehook(lambda g: ran.append("early"))
    early.grad_fn._set_sequence_nr(before - 1)  # pyright: ignore
    (late + early).backward()
    assert ran == ["late", "early"]


def test_what_a_collective_reads_is_known_until_it_has_landed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy that a scatter reads is freed by wait(): the lane that lands must have told the allocator of it."""
    told: list[torch.Tensor] = []
    monkeypatch.setattr(flight, "_used_by", lambda stream, things: told.extend(t for t in things if t is not None))
    copied = torch.zeros(3)
    Lanes(CPU).start(torch.ones(2), lambda t: Started(t * 2, source=copied), lambda g: Started(g)).wait()
    assert any(t is copied for t in told)


def sources(rank: int, n: int) -> list[bool]:
    group = torch.distributed.group.WORLD
    assert group is not None
    reached, y = tensor.Ranks(Lanes(CPU), group), torch.ones(3, 2 * n, 4)
    rows = torch.ones(4, 2 * n).t()
    started = reached.scatter(y), reached.gather(y.transpose(1, 2)), reached.exchange(rows, [2] * n, [2] * n)
    for s in started:
        assert s.work is not None
        with torch.no_grad():
            s.work.wait()
    return [s.source is not None and s.source.is_contiguous() for s in started]


def test_every_collective_that_reads_a_copy_names_it() -> None:
    assert ranks.run(2, sources) == [[True] * 3] * 2
