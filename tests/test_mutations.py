"""Bugs that parallel code is prone to, put in on purpose: the comparison with one rank must see every one of them.

Each test compares a cell as it is, which must be clean, then breaks one thing and compares again.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
from test_parity import compare
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from stepladder.model.channel import moe
from stepladder.model.leaf import Decl
from stepladder.model.residual import Pending, Ready, Stream
from stepladder.model.token import attention
from stepladder.ops import experts
from stepladder.parallel import flight, labels, pipeline, shard, tensor
from stepladder.parallel.expert import AllToAll
from stepladder.parallel.support import Parallel

TP = Parallel(tp=2)
SP = Parallel(tp=2, sequence=True)
PP = Parallel(pp=2)
EP = Parallel(ep=2, shard=False)
Cell = tuple[str, str, str]


def clean_then_broken(rank: int, n: int, mutate: Callable[[], None], cell: Cell, layout: Parallel) -> list[list[str]]:
    clean = compare(rank, n, cell, layout)
    mutate()                                      # for good: this process ends with the comparison
    return [clean, compare(rank, n, cell, layout)]


def differences(mutate: Callable[[], None], cell: Cell, layout: Parallel, n: int = 2) -> set[str]:
    """What any of n ranks sees after the mutation: names of gradients, loss, likelihood, count, load."""
    results = ranks.run(n, clean_then_broken, mutate, cell, layout)
    assert not any(clean for clean, _ in results)
    lines = {line for _, broken in results for line in broken}
    return {line.split(" is off")[0].removeprefix("gradient of ") for line in lines}


# Sums of gradients

def _without_sums(of: Callable[[Decl, bool], bool]) -> None:
    groups = shard._groups
    shard._groups = lambda decl, mesh, sharded, norm: [] if of(decl, norm) else groups(decl, mesh, sharded, norm)


def unsplit_not_summed() -> None:
    _without_sums(lambda decl, norm: decl.tp is None and not norm)


def test_a_dropped_sum_of_a_shared_gradient_is_seen() -> None:
    seen = differences(unsplit_not_summed, ("gla0", "swiglu0", "ladder"), TP)
    assert seen == {f"blocks.{i}.token.{name}" for i in range(4) for name in ("gate_down", "norm")}


def shared_heads_not_summed() -> None:
    _without_sums(lambda decl, norm: decl.share)


def shared_heads_summed_over_all_ranks() -> None:
    groups = shard._groups
    every = lambda mesh: [mesh.group("tp")] if mesh.tp > 1 else []         # the one rank compared with has no groups
    shard._groups = lambda decl, mesh, *args: every(mesh) if decl.share else groups(decl, mesh, *args)


KV = {f"blocks.{i}.token.{name}" for i in range(4) for name in ("wk", "wv")}


@pytest.mark.parametrize(("attention", "tp"), [("attention1", 2), ("attention1", 4), ("attention0", 4)])
def test_a_shared_kv_head_whose_gradient_is_not_summed_is_seen(attention: str, tp: int) -> None:
    assert differences(shared_heads_not_summed, (attention, "swiglu0", "standard"), Parallel(tp=tp), tp) == KV


def test_a_shared_kv_head_whose_gradient_is_summed_with_another_heads_is_seen() -> None:
    cell = ("attention0", "swiglu0", "standard")                  # two heads on four ranks
    assert differences(shared_heads_summed_over_all_ranks, cell, Parallel(tp=4), 4) == KV


def replicas_summed_again() -> None:
    groups = shard._groups
    again = lambda decl, mesh, sharded, norm: [mesh.dense["replicate"].get_group()] if sharded else []
    shard._groups = lambda *args: [*groups(*args), *again(*args)]


def test_a_gradient_that_hsdp_has_reduced_and_is_summed_over_replicas_again_is_seen() -> None:
    seen = differences(replicas_summed_again, ("gla0", "swiglu0", "ladder"), Parallel(dp_replicate=2), 4)
    assert {"embed.table", "blocks.0.token.wq", "blocks.3.channel.down"} <= seen
    assert not [name for name in seen if "norm" in name]           # those are summed by us alone


def sums_that_never_come_back() -> None:
    """Into a copy: what moving an offloaded gradient to the device and forgetting it there does."""
    shard.local = lambda t: (t.to_local() if isinstance(t, DTensor) else t).clone()


def test_the_sum_of_an_offloaded_gradient_that_stays_on_the_device_is_seen() -> None:
    seen = differences(sums_that_never_come_back, ("gla0", "swiglu0", "ladder"), Parallel(tp=2, offload=True))
    assert {"blocks.0.token.gate_down", "blocks.0.token.norm"} <= seen


def experts_not_summed() -> None:
    _without_sums(lambda decl, norm: decl.ep is not None)


def test_experts_whose_copies_are_not_summed_are_seen() -> None:
    seen = differences(experts_not_summed, ("attention0", "moe0", "standard"), Parallel(tp=2, shard=False))
    assert seen == {f"blocks.{i}.channel.experts.{name}" for i in range(4) for name in ("up", "gate", "down")}


def experts_averaged() -> None:
    set_factor = FSDPModule.set_gradient_divide_factor

    def mutated(self: FSDPModule, factor: float) -> None:
        set_factor(self, 2.0 if isinstance(self, moe.Experts) else factor)
    FSDPModule.set_gradient_divide_factor = mutated


def test_a_wrong_average_of_experts_is_seen() -> None:
    seen = differences(experts_averaged, ("attention0", "moe0", "standard"), Parallel())
    assert seen == {f"blocks.{i}.channel.experts.{name}" for i in range(4) for name in ("up", "gate", "down")}


def norms_summed() -> None:
    groups = shard._groups
    shard._groups = lambda decl, mesh, sharded, norm: groups(decl, mesh, sharded, False)


def norms_not_summed() -> None:
    _without_sums(lambda decl, norm: norm)


NORMS = {f"blocks.{i}.{name}.scale" for i in range(4) for name in ("norm1", "norm2")} | {"norm.scale"}


def test_norm_gradients_summed_without_sequence_parallel_are_seen() -> None:
    assert differences(norms_summed, ("attention0", "swiglu0", "ladder"), TP) == NORMS


def test_norm_gradients_not_summed_under_sequence_parallel_are_seen() -> None:
    assert differences(norms_not_summed, ("attention0", "swiglu0", "ladder"), SP) == NORMS


# Routers

def auxiliary_losses_totalled() -> None:
    """Every rank attaches the sum over ranks: what a total for the log, attached by mistake, does."""
    choose, attach = moe.Mixer.choose, experts.attach

    def mutated(self: moe.Mixer, x: Tensor, w: Tensor | None = None) -> Any:
        experts.attach = lambda x, loss: attach(x, self.comm.total(loss))
        return choose(self, x, w)
    moe.Mixer.choose = mutated


def test_an_auxiliary_loss_counted_by_every_tp_rank_is_seen() -> None:
    for layout in (TP, SP):
        seen = differences(auxiliary_losses_totalled, ("attention0", "moe0", "ladder"), layout)
        assert {f"blocks.{i}.channel.routers.0.w" for i in range(4)} <= seen


def own_tokens_only() -> None:
    init = tensor.OwnTokens.__init__

    def mutated(self: tensor.OwnTokens, stream: tensor.TensorComm) -> None:
        init(self, stream)
        self.total = lambda v: v
    tensor.OwnTokens.__init__ = mutated


def test_a_balance_loss_over_a_slice_of_the_sequence_is_seen() -> None:
    seen = differences(own_tokens_only, ("attention0", "moe0", "ladder"), SP)
    assert {f"blocks.{i}.channel.routers.0.w" for i in range(4)} <= seen


def experts_swapped() -> None:
    dispatch = AllToAll.dispatch

    def mutated(self: AllToAll, x: Tensor, announced: Any) -> Any:
        sent, chosen, back = dispatch(self, x, announced)
        ids, each = chosen.ids, chosen.experts
        return sent, chosen._replace(ids=torch.where(ids < each, each - 1 - ids, each)), back
    AllToAll.dispatch = mutated


def test_tokens_given_to_the_wrong_expert_of_the_right_rank_are_seen() -> None:
    assert "loss" in differences(experts_swapped, ("attention0", "moe0", "ladder"), EP)


# The stream

def handle_not_awaited() -> None:
    """A sublayer reads what stood there before the sum arrived: this rank's own share."""
    leave = tensor.TensorComm.leave

    def mutated(self: tensor.TensorComm, y: Tensor, also: Tensor | None = None) -> Pending:
        leave(self, y, also).wait()               # other ranks still meet this one
        return Ready(y if also is None else y + also)
    tensor.TensorComm.leave = mutated


@pytest.mark.parametrize("wiring", ["ladder", "parallel"])
def test_a_stale_handle_is_seen(wiring: str) -> None:
    assert "loss" in differences(handle_not_awaited, ("gla0", "swiglu0", wiring), TP)


def gathered_backwards() -> None:
    tensor._join = lambda x: x.flip(0).transpose(0, 1).flatten(1, 2)


@pytest.mark.parametrize(("channel", "layout"), [("swiglu0", SP), ("moe0", TP)], ids=["sequence", "own tokens"])
def test_tokens_gathered_in_the_wrong_order_are_seen(channel: str, layout: Parallel) -> None:
    assert "loss" in differences(gathered_backwards, ("attention0", channel, "standard"), layout)


def late_output_dropped() -> None:
    pipeline.Stream = lambda h, late, route: Stream(h, (Ready(0 * late[0].wait()),), route)


def late_output_twice() -> None:
    pipeline.Stream = lambda h, late, route: Stream(h + late[0].wait(), late, route)


@pytest.mark.parametrize("mutation", [late_output_dropped, late_output_twice])
def test_an_output_lost_or_counted_twice_between_stages_is_seen(mutation: Callable[[], None]) -> None:
    assert "loss" in differences(mutation, ("attention0", "moe1", "ladder"), PP)


def routes_swapped() -> None:
    pipeline.Stream = lambda h, late, route: Stream(h, late, tuple(r.roll(1, 0) for r in route))


def test_pre_gates_of_another_row_between_stages_are_seen() -> None:
    assert "loss" in differences(routes_swapped, ("attention0", "moe1", "ladder"), PP)


# Flights

def way_back_is_a_copy() -> None:
    """The input gradient of every sublayer stays this rank's share."""
    start = flight.Lanes.start

    def mutated(self: Any, x: Tensor, go: Any, back: Any, late: bool = False) -> Pending:
        return start(self, x, go, tensor.copy if late else back, late)
    flight.Lanes.start = mutated


def test_an_input_gradient_that_is_not_summed_is_seen() -> None:
    seen = differences(way_back_is_a_copy, ("attention0", "swiglu0", "ladder"), TP)
    assert NORMS - {"blocks.3.norm2.scale", "norm.scale"} <= seen


def gradients_of_dispatched_tokens_stay() -> None:
    """Tokens travel to their experts, their gradients do not come back."""
    start = flight.Lanes.start

    def mutated(self: Any, x: Tensor, go: Any, back: Any, late: bool = False) -> Pending:
        stay = lambda g: flight.Started(g.new_zeros(x.shape))
        return start(self, x, go, stay if late and x.dim() == 2 else back, late)
    flight.Lanes.start = mutated


def test_gradients_of_dispatched_tokens_that_do_not_come_back_are_seen() -> None:
    seen = differences(gradients_of_dispatched_tokens_stay, ("attention0", "moe0", "ladder"), EP)
    assert {f"blocks.{i}.norm2.scale" for i in range(4)} <= seen


# A norm over a dimension that is split

def _joint_norm(local: bool) -> None:
    """Attention whose queries are normed over all heads together, as some models do."""
    project = attention.Mixer.project

    def mutated(self: attention.Mixer, x: Tensor, ctx: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = project(self, x, ctx)
        total = (lambda s: s) if local else self.comm.total
        width = total(torch.full((), float(q[0, 0].numel()), dtype=q.dtype))
        return q * (total(q.square().sum((-2, -1), keepdim=True)) / width).rsqrt(), k, v
    attention.Mixer.project = mutated


def norm_over_all_heads() -> None:
    _joint_norm(local=False)


def norm_over_local_heads() -> None:
    _joint_norm(local=True)


def test_a_norm_over_a_local_slice_is_seen_and_its_total_is_exact() -> None:
    assert not differences(norm_over_all_heads, ("attention0", "swiglu0", "ladder"), TP)
    assert "loss" in differences(norm_over_local_heads, ("attention0", "swiglu0", "ladder"), TP)


# Labels

def split_forgotten() -> None:
    held = labels.held
    labels.held = lambda piece, shape, over, places: held(piece, shape, over, [Replicate()] * len(places))


@pytest.mark.parametrize(("layout", "piece"), [(TP, "attention0"), (EP, "experts"), (Parallel(), "fsdp")],
                         ids=lambda x: x if isinstance(x, str) else "")
def test_a_slice_saved_as_if_it_were_whole_is_refused(layout: Parallel, piece: str) -> None:
    with pytest.raises(ranks.RankFailed, match=r"the piece is .*, of the declared .* it should be"):
        differences(split_forgotten, ("attention0", "moe0", "standard"), layout)
