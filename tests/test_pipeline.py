"""Pipelines: every schedule equals one rank, tied tables stay one, spans are balanced, timelines tell the truth."""
from __future__ import annotations

import gc
import time
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import tiny
import torch
from test_parity import CPU, EXACT, on_mesh, passes
from torch import Tensor

from stepladder.data.loader import Batch
from stepladder.launch import timeline
from stepladder.launch.timeline import Box
from stepladder.launch.train import Trainer
from stepladder.model.config import ModelConfig
from stepladder.model.context import Context, borders
from stepladder.model.decoder import costs, flops, parameters
from stepladder.ops.linear import catch_up
from stepladder.parallel import pipeline
from stepladder.parallel.build import build
from stepladder.parallel.checkpoint import Store
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.optimizer import Optimizer, Report
from stepladder.parallel.shard import Sums
from stepladder.parallel.spans import spans, spell
from stepladder.parallel.support import Parallel

SCHEDULES = ["1f1b", "interleaved", "zero-bubble"]
CELLS = [("attention1", "swiglu0", "parallel"), ("gla0", "between", "ladder"), ("attention0", "moe1", "mixed")]


def piped(schedule: str, pp: int = 2, **more: Any) -> Parallel:
    return Parallel(pp=pp, schedule=schedule, **more)  # pyright: ignore[reportArgumentType]


def differences(rank: int, n: int, layout: Parallel, cells: list[tuple[str, str, str]], change: dict[str, Any],
                how: dict[str, str]) -> list[str]:
    mesh = Mesh(layout, CPU, rank, n)
    return [f"{'/'.join(cell)}: {d}" for cell in cells for d in on_mesh(mesh, cell, change, how)]


def same(layout: Parallel, n: int, cells: list[tuple[str, str, str]] = CELLS, change: dict[str, Any] | None = None,
         how: dict[str, str] | None = None) -> None:
    wrong = ranks.run(n, differences, layout, cells, change or {}, how or {})
    assert not any(wrong), "\n".join(sorted({line for rank in wrong for line in rank}))


# n ranks equal one

@pytest.mark.parametrize("schedule", SCHEDULES[1:])
@pytest.mark.parametrize(("n", "more"), [(2, {}), (4, {"reshard": False}), (4, {"ep": 2})],
                         ids=["alone", "fsdp-kept", "ep-fsdp"])
def test_a_schedule_equals_one_rank(schedule: str, n: int, more: dict[str, Any]) -> None:
    """The other layouts of tests/matrix.py have it compared too."""
    same(piped(schedule, **more), n, [c for c in CELLS if "ep" not in more or c[1] != "swiglu0"])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("n", "more"), [(2, {}), (4, {}), (4, {"tp": 2, "sequence": True}), (4, {"shard": False})],
                         ids=["alone", "fsdp", "sp", "ddp"])
def test_tied_embeddings_of_two_stages_get_one_gradient(schedule: str, n: int, more: dict[str, Any]) -> None:
    same(piped(schedule, **more), n, CELLS[1:2], {"tied": True})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_four_stage_ranks(schedule: str) -> None:
    same(piped(schedule, pp=4), 4, CELLS[1:2], {"tied": True, "layers": 8})


def bordered(rank: int, n: int, every: tuple[int, ...]) -> list[list[int]]:
    parts = build(tiny.config(), Mesh(piped("1f1b"), CPU, rank, n), seed=0, dtype=torch.float64)
    micros = [tiny.micro(1, 256, seed=i, every=e) for i, e in enumerate(every)]
    own = [(m.start, borders(m.start)) for m in micros if m.start is not None]
    seen, packed = [], Context.packed

    def look(start: Tensor, got: Tensor) -> Context:
        i, want = next((i, want) for i, (at, want) in enumerate(own) if torch.equal(start, at))
        assert torch.equal(got[:len(want)], want)
        seen.append([i, *got[len(want):].tolist()])
        return packed(start)

    pipeline.Context = SimpleNamespace(packed=look)  # pyright: ignore
    parts.pipe([m._replace(borders=want) for m, (_, want) in zip(micros, own, strict=True)])
    return seen


def test_micro_batches_of_unequal_numbers_of_documents_go_through_a_pipeline() -> None:
    """As many borders as the one with most: the others' are filled up with the end of the rows."""
    few, many = (len(borders(tiny.micro(1, 256, seed=i, every=e).start)) for i, e in enumerate((7, 2)))
    assert few < many
    for seen in ranks.run(2, bordered, (7, 2)):
        assert sorted(map(tuple, seen)) == [(0, *[256] * (many - few)), (1,)]


def by_edges(rank: int, n: int, schedule: str) -> tuple[list[str], list[tuple[int, int]]]:
    mesh = Mesh(piped(schedule, pp=4), CPU, rank, n)
    made, used = mesh._edges(), []

    class Edges(dict[tuple[int, int], Any]):
        def get(self, way: tuple[int, int], default: Any = None) -> Any:
            used.append(way)
            return made[way]

    vars(mesh)["edges"] = Edges.fromkeys(made)
    return on_mesh(mesh, CELLS[1], {"layers": 8}, {}), sorted(set(used))


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
def test_each_way_between_stages_has_a_group_of_its_own_where_transfers_queue(schedule: str) -> None:
    """As on GPUs; a V has no way from its last rank to its first."""
    for rank, (wrong, used) in enumerate(ranks.run(4, by_edges, schedule)):
        assert not wrong
        ends = {3 - rank} if schedule == "zero-bubble" and rank in (0, 3) else set()
        beside = {(rank + 1) % 4, (rank - 1) % 4} - ends
        assert used == sorted([*((rank, b) for b in beside), *((b, rank) for b in beside)])


@pytest.mark.parametrize("n", [2, 4])
def test_weight_gradients_put_off_survive_recomputation(n: int) -> None:
    same(piped("zero-bubble"), n, [*CELLS[1:], ("gated_delta0", "swiglu0", "ladder")], how={"recompute": "both"})


def gradients(rank: int, n: int, layout: Parallel, dtype: torch.dtype) -> dict[str, list[float]]:
    cfg = replace(tiny.config("attention0", "between", "ladder"), std=0.1)
    parts = build(cfg, Mesh(layout, CPU, rank, n), seed=3, dtype=dtype)
    passes(parts, 4)
    return {name: whole(parts.label(name, p.grad)) for name, p in parts.parameters().items() if p.grad is not None}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bf16_stages_agree_on_what_crosses_between_them(schedule: str) -> None:
    """Router logits stay fp32 across stages, and FSDP must leave them so; weight gradients put off are not lost."""
    (want,) = ranks.run(1, gradients, Parallel(), torch.float64)
    for rank in ranks.run(4, gradients, piped(schedule), torch.bfloat16):
        for name, grad in rank.items():
            ours, theirs = torch.tensor(grad).double(), torch.tensor(want[name]).double()
            assert float((ours - theirs).norm() / theirs.norm()) < 0.05, name


def greetings(rank: int, n: int) -> list[list[int]]:
    parts = build(tiny.config(), Mesh(piped("zero-bubble"), CPU, rank, n), seed=3)
    stages = [parts.pipe._stage(*held, tiny.micro(1, 16)) for held in zip(
        parts.mesh.layout.held(rank), parts.pipe.stages, strict=True)]
    for stage in stages:
        stage.stage_index_to_group_rank = {0: 0, 1: 1, 2: 1, 3: 0}
    return [[op.group_peer for op in stage._get_init_p2p_neighbors_ops()] for stage in stages]


def test_get_init_p2p_neighbors_ops_leaves_a_rank_itself_out() -> None:
    """torch's private `_get_init_p2p_neighbors_ops`, which 2.11 calls and 2.13 does not."""
    assert ranks.run(2, greetings) == [[[1, 1], [1, 1]], [[0, 0], [0, 0]]]


# What the comparison sees

def without_weights(rank: int, n: int) -> list[str]:
    pipeline.catch_up = lambda later: catch_up([put._replace(g=0 * put.g) for put in later])
    return on_mesh(Mesh(piped("zero-bubble"), CPU, rank, n), CELLS[0])


def test_weight_gradients_that_are_never_made_up_for_are_seen() -> None:
    lines = [line for rank in ranks.run(2, without_weights) for line in rank]
    assert any("blocks.0.token.wq" in line for line in lines)
    assert any("blocks.3.channel.down" in line for line in lines)


def without_ends(rank: int, n: int) -> list[str]:
    init = Sums.__init__

    def mutated(self: Sums, models: Any, mesh: Mesh, sharded: Any) -> None:
        init(self, models, mesh, sharded)
        self.buckets = {key: params for key, params in self.buckets.items() if key[0] is not mesh.ends}  # pyright: ignore
    Sums.__init__ = mutated
    return on_mesh(Mesh(piped("1f1b"), CPU, rank, n), CELLS[0], {"tied": True})


def test_a_tied_table_whose_ends_are_not_summed_is_seen() -> None:
    lines = {line.split(" is off")[0] for rank in ranks.run(2, without_ends) for line in rank}
    assert lines == {"gradient of embed.table"}


# Training: evaluation, optimizer, checkpoint

def steps(rank: int, n: int, layout: Parallel, out: Path, load: str | None, save: str | None) -> list[Any]:
    """Two steps with an evaluation between them, after reading and before writing a checkpoint."""
    mesh = Mesh(layout, CPU, rank, n)
    parts = build(tiny.config("gla0", "moe1", "ladder", tied=True), mesh, seed=5, dtype=torch.float64)
    optimizer, store, found = Optimizer(parts, eps=1e-3), Store(out, background=False), []
    if load:
        store.load(store.folder / load, optimizer.state())
        optimizer.loaded()
    for at in range(2):
        batch = [tiny.micro(2, 16, seed=10 * at + i) for i in range(4)]
        held_out = parts.pipe(batch, train=False)
        sums = torch.stack([held_out.nll, held_out.count.double()]) / mesh.tp
        if n > 1:
            torch.distributed.all_reduce(sums)
        result = parts.pipe(batch[mesh.dp_rank::mesh.dp])
        parts.sums()
        report: Report = optimizer.step(result, 1e-2)
        found.append((float(sums[0] / sums[1]), float(report.loss), float(report.norm), report.load.tolist()))
    table = parts.parameters().get("embed.table")
    if save:
        store.save(int(save[-2:]), optimizer.state(), {}, shapes=optimizer.shapes())
    return [*found, None if table is None else whole(parts.label("embed.table", table.detach()))]


def whole(t: Tensor) -> list[float]:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).flatten().tolist()  # pyright: ignore


@pytest.mark.parametrize(("schedule", "n", "more"), [
    ("1f1b", 2, {}), ("interleaved", 4, {}), ("zero-bubble", 2, {}), ("zero-bubble", 4, {}), ("1f1b", 4, {"tp": 2})],
    ids=["1f1b", "interleaved-fsdp", "zero-bubble", "zero-bubble-fsdp", "1f1b-tp"])
def test_steps_evaluations_and_checkpoints_of_a_tied_model_are_those_of_one_rank(
        tmp_path: Path, schedule: str, n: int, more: dict[str, Any]) -> None:
    """A tied table counts once in the norm, gets one step on both stages, and is saved once and read by both."""
    layout = piped(schedule, **more)
    want = ranks.run(1, steps, Parallel(), tmp_path, None, "step-00000001")[0]
    for rank in ranks.run(n, steps, layout, tmp_path, None, "step-00000002"):
        agrees(rank, want)
    want = ranks.run(1, steps, Parallel(), tmp_path, "step-00000002", None)[0]
    for rank in ranks.run(n, steps, layout, tmp_path, "step-00000001", None):
        agrees(rank, want)


def streams() -> list[Tensor]:
    """All tensors like what crosses between stages of the micro-batches below."""
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is Tensor and x.shape == (3, 17, 32) and not x.is_meta]


def held(rank: int, n: int, schedule: str) -> list[int]:
    """How many there are when the first forward begins, after a step, after an evaluation."""
    found, parts = [], build(tiny.config(), Mesh(piped(schedule), CPU, rank, n), seed=0)

    def first(*_: Any) -> None:
        once.remove()
        found.append(len(streams()))

    once = parts.pipe.stages[0].register_forward_pre_hook(first)
    for train in (True, False):
        parts.pipe([tiny.micro(3, 17, seed=i) for i in range(6)], train=train)
        found.append(len(streams()))
    return found


def received(rank: int, n: int, schedule: str) -> list[int]:
    """The most at once that came from another stage, in a step of 6 and in one of 12 micro-batches."""
    found, most, parts = [], [], build(tiny.config(), Mesh(piped(schedule), CPU, rank, n), seed=0)
    for stage in parts.pipe.stages:
        stage.register_forward_pre_hook(
            lambda *_: found.append(sum(x.is_leaf and x.requires_grad for x in streams())))
    for micros in (6, 12):
        parts.pipe([tiny.micro(3, 17, seed=i) for i in range(micros)])
        most.append(max(found))
        found.clear()
    return most


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_prepare_infra_makes_no_memory_but_for_micro_batches_under_way(schedule: str) -> None:
    """torch's private `_prepare_forward_infra` and `_prepare_backward_infra` make it for all of them; and torch keeps
    what an evaluation has sent for a backward."""
    for first, *left in ranks.run(2, held, schedule):
        assert first <= 4
        assert left == [0, 0]


@pytest.mark.parametrize("half", ["forward", "backward"])
def test_prepare_infra_that_fails_leaves_a_stage_on_its_own_device(monkeypatch: pytest.MonkeyPatch, half: str) -> None:
    stage, where = object.__new__(pipeline._Timed), []
    stage.device = CPU

    def fails(self: Any) -> None:
        where.append(self.device)
        raise ValueError("no room")

    monkeypatch.setattr(pipeline.PipelineStage, f"_prepare_{half}_infra", fails)
    with pytest.raises(ValueError, match="no room"):
        getattr(stage, f"_prepare_{half}_infra")()
    assert (where, stage.device) == ([pipeline.META], CPU)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_internal_losses_do_not_keep_what_came_in_of_micro_batches_that_are_done(schedule: str) -> None:
    """torch's private `_internal_losses`: the last stage's of a step, whose graphs lead back to its inputs."""
    most = ranks.run(2, received, schedule)
    assert all(few == many for few, many in most)
    assert max(max(rank) for rank in most) > 0


def test_an_evaluation_has_no_more_micro_batches_at_once_than_a_step() -> None:
    """What a stage sends is kept until all is sent."""
    passes: list[int] = []

    def pipe(micros: list[Any], train: bool) -> SimpleNamespace:
        passes.append(len(micros))
        return SimpleNamespace(nll=torch.tensor(3.0 * len(passes)), count=torch.tensor(2))

    nothing = torch.zeros(1, 1, dtype=torch.bool)
    fake: Any = SimpleNamespace(
        device=CPU, mesh=Mesh(Parallel(), CPU), parts=SimpleNamespace(pipe=pipe), plan=SimpleNamespace(accumulation=4),
        run=SimpleNamespace(train=SimpleNamespace(eval_batches=3)),
        _loader=lambda *_: (Batch(nothing, nothing, nothing, {}) for _ in range(12)))
    assert Trainer.evaluate(fake) == 3.0
    assert passes == [4, 4, 4]


def agrees(got: list[Any], want: list[Any]) -> None:
    for ours, theirs in zip(got[:-1], want[:-1], strict=True):
        assert ours[:3] == pytest.approx(theirs[:3], rel=EXACT)
        assert ours[3] == theirs[3]
    if got[-1] is not None:
        assert got[-1] == pytest.approx(want[-1], rel=1e-9, abs=1e-13)


# Spans

def cost_of(cfg: ModelConfig, cuts: list[range], key: str) -> list[int]:
    first, *layers, last = costs(cfg, 64)
    layers[0] += first
    layers[-1] += last
    return [sum(getattr(layers[i], key) for i in span) for span in cuts]


@pytest.mark.parametrize("vocab", [48, 480, 4800])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_no_other_cut_has_a_smaller_largest_cost(vocab: int, stages: int) -> None:
    cfg = replace(tiny.config("every", "between", layers=9), vocab=vocab)
    ours = spans(cfg, stages, 64)
    assert [i for span in ours for i in span] == [*range(9)]
    every = [[range(a, b) for a, b in pairwise((0, *at, 9))] for at in combinations(range(1, 9), stages - 1)]
    best = min((max(cost_of(cfg, cuts, "flops")), max(cost_of(cfg, cuts, "parameters"))) for cuts in every)
    assert (max(cost_of(cfg, ours, "flops")), max(cost_of(cfg, ours, "parameters"))) == best


def test_a_large_head_takes_layers_from_the_last_stage() -> None:
    cfg = tiny.config(layers=8)
    assert [len(s) for s in spans(cfg, 2, 64)] == [4, 4]
    assert [len(s) for s in spans(replace(cfg, vocab=640), 2, 64)] == [5, 3]


def test_costs_add_up_to_the_whole_model() -> None:
    for tied in (False, True):
        cfg = tiny.config("every", "between", tied=tied)
        assert sum(c.flops for c in costs(cfg, 64)) == flops(cfg, 64)
        assert sum(c.parameters for c in costs(cfg, 64)) == parameters(cfg)[0]


def test_the_log_says_which_rank_holds_which_layers() -> None:
    text = spell(tiny.config(layers=8), piped("zero-bubble"), 64)
    assert "rank 0 0-1 and 6-7 (5" in text
    assert "rank 1 2-3 and 4-5 (4" in text
    assert text.endswith("zero-bubble")


def test_every_stage_is_held_once() -> None:
    for schedule in SCHEDULES:
        layout = piped(schedule, pp=4)
        held = [i for rank in range(4) for i in layout.held(rank)]
        assert sorted(held) == [*range(layout.stages)]
    assert Parallel(schedule="zero-bubble").held(0) == [0]


# Timelines

def recorded(rank: int, n: int, layout: Parallel, slow: float,
             micros: int = 4) -> tuple[list[Box], dict[int, list[Any]]]:
    """The boxes of the second step, the last pipeline rank being slower in every forward."""
    parts = build(tiny.config(layers=8), Mesh(layout, CPU, rank, n), seed=3)
    batch = [tiny.micro(2, 16, seed) for seed in range(micros)]
    parts.pipe(batch)
    if rank == n - 1:
        for stage in parts.pipe.stages:
            stage.register_forward_pre_hook(lambda *_: time.sleep(slow))
    parts.pipe.clock = recorder = timeline.Recorder(parts.mesh)
    parts.pipe(batch)
    parts.pipe(batch, train=False)                      # an evaluation between steps is no part of it
    boxes = recorder.boxes()
    order = getattr(next(iter(parts.pipe.schedules.values())), "pipeline_order", {})
    return boxes, order


KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
ONE_F_ONE_B = [[("F", 0, 0), ("F", 0, 1), ("B", 0, 0), ("F", 0, 2), ("B", 0, 1), ("F", 0, 3), ("B", 0, 2), ("B", 0, 3)],
               [(kind, 1, micro) for micro in range(4) for kind in "FB"]]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_timeline_is_what_was_done(schedule: str, tmp_path: Path) -> None:
    layout, slow = piped(schedule), 0.02
    boxes, order = ranks.run(2, recorded, layout, slow)[0]
    for rank in range(2):
        mine = sorted((b for b in boxes if b.rank == rank), key=lambda b: b.start)
        assert all(a.start < a.end <= b.start < b.end for a, b in pairwise(mine))
        done = [(b.kind, b.stage, b.micro) for b in mine]
        if schedule == "1f1b":
            assert done == ONE_F_ONE_B[rank]
        else:
            assert done == [(KINDS[a.computation_type.name], a.stage_index, a.microbatch_index)
                            for a in order[rank] if a is not None]
    at = {(b.kind, b.stage, b.micro): b for b in boxes}
    for (kind, stage, micro), b in at.items():          # the ranks' clocks agree: nothing begins before what it needs
        needs = [at[key] for key in timeline._needs(b, layout.stages - 1)]
        assert all(need.end <= b.start for need in needs), (kind, stage, micro)
        assert b.end - b.start > slow or not (kind == "F" and b.rank == 1)
    busy = sum(b.end - b.start for b in boxes)
    total = max(b.end for b in boxes) - min(b.start for b in boxes)
    assert timeline.share(boxes) == pytest.approx(1 - busy / (2 * total))
    assert timeline.share(boxes) > timeline.bubble(layout, 4)         # rank 0 waits for the slow one
    said = timeline.caption(boxes, layout)
    assert said.startswith(f"{schedule}, 2 ranks, 4 micro-batches: bubble {timeline.share(boxes):.1%}; ")
    assert said.endswith(f"by formula {timeline.bubble(layout, 4):.1%}")
    timeline.draw(boxes, tmp_path / "deep" / "timeline.png", layout)
    assert (tmp_path / "deep" / "timeline.png").read_bytes()[:4] == b"\x89PNG"


def with_equal_stages(boxes: list[Box], rank: int) -> list[Box]:
    """A rank's work in the order in which it was done, its pieces as long as the formulas assume."""
    mine = sorted((b for b in boxes if b.rank == rank), key=lambda b: b.start)
    return [b._replace(start=at, end=at + (2 if b.kind == "B" else 1)) for at, b in enumerate(mine)]


@pytest.mark.parametrize(("schedule", "pp", "micros"), [
    ("1f1b", 2, 4), ("1f1b", 4, 8), ("interleaved", 2, 8), ("interleaved", 4, 8), ("zero-bubble", 2, 4),
    ("zero-bubble", 4, 16)])
def test_formulas_are_what_torchs_schedules_cost_with_equal_stages(schedule: str, pp: int, micros: int) -> None:
    layout = piped(schedule, pp=pp)
    done, _ = ranks.run(pp, recorded, layout, 0.0, micros)[0]
    boxes = timeline.replay([b for rank in range(pp) for b in with_equal_stages(done, rank)])
    assert len(boxes) == micros * layout.stages * (3 if schedule == "zero-bubble" else 2)
    assert timeline.share(boxes) == pytest.approx(timeline.bubble(layout, micros))
    slow = [b._replace(end=b.end + (b.stage == layout.stages - 1)) for b in boxes]
    assert timeline.share(timeline.replay(slow)) > 1.1 * timeline.bubble(layout, micros)
    assert timeline.share(timeline.replay(slow, alike=True)) == pytest.approx(timeline.bubble(layout, micros))
