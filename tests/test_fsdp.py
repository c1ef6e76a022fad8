"""FSDP2: what stays in host memory with offload, and what the optimizer makes of it."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import tiny
import torch
from test_parity import CPU, LENGTH, ROWS, on_mesh
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, Shard

from stepladder.parallel import optimizer, shard
from stepladder.parallel.build import Parts, build
from stepladder.parallel.checkpoint import Store
from stepladder.parallel.labels import held
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.optimizer import Optimizer
from stepladder.parallel.support import Parallel, UnsupportedError, refuse

OFFLOAD = Parallel(offload=True)


def made(rank: int, n: int, parallel: Parallel) -> Parts:
    return build(tiny.config("every", "between", "mixed"), Mesh(parallel, CPU, rank, n), seed=3)


def trained(rank: int, n: int, parallel: Parallel) -> list[float]:
    """Losses and gradient norms of three steps in fp32."""
    parts, seen = made(rank, n, parallel), []
    adam, mesh = Optimizer(parts), parts.mesh
    for at in range(3):
        micros = [tiny.micro(ROWS, LENGTH, seed=10 * at + i) for i in range(4)]
        result = parts.pipe(micros[mesh.dp_rank::mesh.dp])
        parts.sums()
        report = adam.step(result, 1e-2)
        seen += [float(report.loss), float(report.norm)]
    return seen


@pytest.mark.parametrize(("n", "parallel"), [
    (1, OFFLOAD), (2, OFFLOAD), (2, Parallel(tp=2, offload=True)), (2, Parallel(ep=2, offload=True)),
    (4, Parallel(dp_replicate=2, offload=True))], ids=["alone", "fsdp", "tp", "ep", "hsdp"])
def test_offload_trains_as_without_it(n: int, parallel: Parallel) -> None:
    (want,) = ranks.run(1, trained, Parallel())
    for got in ranks.run(n, trained, parallel):
        assert got == pytest.approx(want, rel=1e-4)


def summed(rank: int, n: int) -> tuple[list[str], list[int]]:
    """What differs from one rank without FSDP, and how many numbers are summed at once."""
    sizes, dist = [], shard.dist

    def all_reduce(flat: torch.Tensor, group: Any) -> None:
        sizes.append(flat.numel())
        dist.all_reduce(flat, group=group)

    shard.BUCKET, shard.dist = 3000, SimpleNamespace(**{**vars(dist), "all_reduce": all_reduce})  # pyright: ignore
    return on_mesh(Mesh(Parallel(shard=False), CPU, rank, n), ("attention0", "swiglu0", "ladder")), sizes


def test_gradients_are_summed_a_bucket_at_a_time() -> None:
    """All at once they would take as much memory again."""
    for wrong, sizes in ranks.run(2, summed):
        assert not wrong
        assert 2048 <= max(sizes) <= 3000
        assert len(sizes) > 10


def offloaded(rank: int, n: int, parallel: Parallel) -> tuple[int, set[str], set[str]]:
    """FSDP modules that offload, the parameters that FSDP has, and those it has not."""
    found, fully_shard = [], shard.fully_shard

    def seen(module: Any, **kw: Any) -> Any:
        found.append(isinstance(kw["offload_policy"], CPUOffloadPolicy))
        return fully_shard(module, **kw)

    shard.fully_shard = seen
    parts = made(rank, n, parallel)
    has = {name for name, p in parts.parameters().items() if isinstance(p, DTensor)}
    return sum(found), has, {*parts.parameters()} - has


@pytest.mark.parametrize("n", [1, 2])
def test_offload_takes_every_matrix_but_routers_on_one_rank_too(n: int) -> None:
    for modules, has, rest in ranks.run(n, offloaded, OFFLOAD):
        assert modules == 4 * 2 + 2 + 2                   # mixers, the experts of two blocks, the head, the root
        assert {"embed.table", "head.table", "blocks.0.token.wq", "blocks.2.channel.experts.up"} <= has
        assert all("norm" in name or "router" in name or "bias" in name for name in rest)
    assert ranks.run(n, offloaded, Parallel())[0][0] == 0


def test_a_number_of_ranks_that_does_not_divide_shards_as_much() -> None:
    """One rank of four was lost, say: the matrices still fit, though no dimension is a multiple of three."""
    three, two = (ranks.run(n, offloaded, Parallel())[0] for n in (3, 2))
    assert three[1] == {name for name in two[1] if "experts" not in name}              # four do not divide by three


def saved(rank: int, n: int, folder: Path) -> None:
    state = Optimizer(made(rank, n, Parallel()))
    Store(folder, background=False).save(1, state.state(), {}, shapes=state.shapes())


def loaded(rank: int, n: int, folder: Path) -> list[str]:
    """Parameters that are not, bit for bit, what they were before the checkpoint was read into them."""
    state, store = Optimizer(made(rank, n, Parallel())), Store(folder)
    before = {name: p.detach().clone() for name, p in state.pieces.items()}
    for p in before:
        state.pieces[p].data.zero_()
    path = store.newest()
    assert path is not None
    store.load(path, state.state())
    return [name for name, p in state.pieces.items() if not torch.equal(p, before[name])]


@pytest.mark.parametrize(("writer", "reader"), [(3, 1), (1, 3), (3, 2)])
def test_unequal_pieces_make_a_whole_checkpoint(tmp_path: Path, writer: int, reader: int) -> None:
    ranks.run(writer, saved, tmp_path)
    assert ranks.run(reader, loaded, tmp_path) == [[]] * reader


def test_offload_without_fsdp_is_refused() -> None:
    for dp in (1, 2):
        with pytest.raises(UnsupportedError, match=r"offload with ddp .* only what FSDP manages"):
            refuse(tiny.config(), Parallel(offload=True, shard=False), dp)


@pytest.mark.parametrize("shape", [(1 << 26,), (1 << 13, 1 << 13)])
def test_the_host_sums_the_norm_of_a_large_gradient_exactly(shape: tuple[int, ...]) -> None:
    g = torch.full(shape, 1e-3)
    (norm,) = optimizer._norms([g], Mesh(OFFLOAD, CPU))
    assert float(norm) == pytest.approx(1e-3 * 2 ** 13, rel=1e-5)      # equal numbers round alike: the worst case
    assert norm.dtype == g.dtype                                   # fp64 would choose the division of parity tests


def travelled(rank: int, n: int) -> list[str]:
    """The names of a pass's collectives."""
    seen: list[str] = []
    parts = build(tiny.config(), Mesh(Parallel(), CPU, rank, n), seed=3)
    shard.watch = SimpleNamespace(note=seen.append)  # pyright: ignore
    parts.pipe([tiny.micro(ROWS, LENGTH)])
    return seen


def test_the_head_s_weights_and_gradients_travel_beside_the_blocks() -> None:
    for seen in ranks.run(2, travelled):
        gathers, scatters = ([x for x in seen if kind in x] for kind in ("all-gather", "reduce-scatter"))
        assert "head" in gathers[4 * 2 + 1]               # after the embedding's and the mixers' of the forward pass
        assert "head" in scatters[0]
        assert "ends" in scatters[-1]


def added(rank: int, n: int, parallel: Parallel, count: int) -> tuple[float, int]:
    """How far gradients of blocks are from the sum in fp32 of one rank's for each of `count` micro-batches; how many
    of their numbers bf16 has no place for."""
    micros = [tiny.micro(ROWS, LENGTH, seed=i) for i in range(count)]
    meshes = Mesh(parallel, CPU, rank, n), Mesh(Parallel(), CPU)
    parts, one = (build(tiny.config(), mesh, seed=3, dtype=torch.bfloat16) for mesh in meshes)
    parts.pipe(micros[parts.mesh.dp_rank::parts.mesh.dp])
    far, wide, want = 0.0, 0, dict[str, torch.Tensor]()
    for m in micros:
        one.pipe([m])
        for name, p in one.parameters().items():
            assert p.grad is not None
            want[name], p.grad = want.get(name, 0) + p.grad, None
    for name, p in parts.parameters().items():
        if name.startswith("blocks") and isinstance(p.grad, DTensor):
            got = p.grad.full_tensor()
            far = max(far, float((got - want[name]).norm() / want[name].norm()))
            wide += int((got != got.bfloat16()).sum())
    return far, wide


@pytest.mark.parametrize(("parallel", "count", "bar"), [
    (Parallel(), 2, 0.0), (Parallel(), 6, 1e-7), (Parallel(pp=2, offload=True), 2, 0.0)],
    ids=["ranks", "and their micro-batches", "micro-batches of pp"])
def test_gradients_of_bf16_are_added_in_fp32(parallel: Parallel, count: int, bar: float) -> None:
    """Those of more are added in another order."""
    for far, wide in ranks.run(2, added, parallel, count):
        assert far <= bar
        assert wide > 10_000


def sent(rank: int, n: int, local: int) -> set[tuple[bool, torch.dtype]]:
    """In which types gradients travel: (of experts, type)."""
    seen, reduce = set(), shard._Added.__call__

    def noted(self: Any, output_tensor: torch.Tensor, input_tensor: torch.Tensor, **options: Any) -> Any:
        seen.add(("experts" in self.name, input_tensor.dtype))
        return reduce(self, output_tensor, input_tensor, **options)

    shard._Added.__call__ = noted  # pyright: ignore
    mesh = Mesh(Parallel(dp_replicate=2), CPU, rank, n, local=local)
    build(tiny.config(channel="moe0", layers=1), mesh, seed=3, dtype=torch.bfloat16).pipe([tiny.micro(ROWS, LENGTH)])
    return seen


def test_gradients_travel_as_they_are_made_inside_a_machine_and_as_sums_between_machines() -> None:
    """Of four ranks, two a machine, two share a mixer and all four the experts."""
    assert ranks.run(4, sent, 2) == [{(False, torch.bfloat16), (True, torch.float32)}] * 4
    assert ranks.run(4, sent, 0) == [{(False, torch.bfloat16), (True, torch.bfloat16)}] * 4


def neighbours(rank: int, n: int, machines: list[tuple[int, ...]]) -> list[tuple[bool, bool]]:
    meshes = [Mesh(Parallel(dp_replicate=2), CPU, rank, n, local=machine[rank]) for machine in machines]
    return [(mesh.near("shard"), mesh.near("edp")) for mesh in meshes]


def test_ranks_of_unequal_machines_agree_on_who_is_near() -> None:
    """By its own machine of three, rank 1 would take rank 0 for a neighbour: one would send what the other adds up."""
    even, uneven = (2, 2, 2, 2), (1, 3, 3, 3)
    assert ranks.run(4, neighbours, [even, uneven]) == [[(True, False), (False, False)]] * 4


def slim(rank: int, n: int) -> tuple[int | None, list[str], list[tuple[str, bool]]]:
    """The multiprocessors that products leave, the slim groups that are asked for first, and which collectives of a
    pass go by one."""
    group, groups, names, dist = torch.distributed.new_group(), [], list[str](), shard.dist
    mesh, asked = Mesh(Parallel(shard_ctas=4), CPU, rank, n), list[str]()
    object.__setattr__(mesh, "slim", lambda axis: (asked.append(axis), group)[1])
    torch.backends.cuda.preferred_blas_library = groups.append  # pyright: ignore
    gather, change = shard.all_gather_single, dist.all_to_all_single
    shard.all_gather_single = lambda *a, group, **kw: (groups.append(group), gather(*a, group=group, **kw))[1]
    shard.dist = SimpleNamespace(**{**vars(dist), "all_to_all_single": lambda *a, group: (  # pyright: ignore
        groups.append(group), change(*a, group=group))[1]})
    parts = build(tiny.config(channel="moe0", layers=2), mesh, seed=3, dtype=torch.bfloat16)
    shard.watch = SimpleNamespace(note=names.append)  # pyright: ignore
    parts.pipe([tiny.micro(ROWS, LENGTH)])
    assert groups.pop(0) == "cublaslt"
    return torch._C._get_sm_carveout_experimental(), asked[:2], [*zip(names, (g is group for g in groups), strict=True)]


def test_sm_carveout_experimental_is_what_collectives_take_that_run_beside_products() -> None:
    for left, asked, seen in ranks.run(2, slim):
        assert left == 4
        assert asked == ["shard", "edp"]                  # by all ranks, before any knows which layers it holds
        assert {name for name, by in seen if not by} == {"all-gather of the model's ends's weights",
                                                         "reduce-scatter of the model's ends's gradients"}
        assert {"all-gather of head's weights", "reduce-scatter of blocks.1.channel.experts's gradients"} <= {
            name for name, by in seen if by}


@pytest.mark.parametrize(("axis", "rows"), [
    ("shard", [[0, 2], [1, 3], [4, 6], [5, 7]]), ("edp", [[0, 4], [1, 5], [2, 6], [3, 7]])])
def test_a_slim_group_has_the_ranks_of_its_axis_and_few_ctas(monkeypatch: pytest.MonkeyPatch, axis: str,
                                                             rows: list[list[int]]) -> None:
    made = []

    def new(rows: list[list[int]], timeout: object, pg_options: Any) -> Any:
        made.append((rows, pg_options.config.max_ctas))
        return torch.distributed.ProcessGroup(0, 2), []  # pyright: ignore

    options = SimpleNamespace(Options=lambda: SimpleNamespace(config=SimpleNamespace()))
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", options, raising=False)
    monkeypatch.setattr(torch.distributed, "new_subgroups_by_enumeration", new)
    parallel = Parallel(tp=2, ep=4, dp_replicate=2, shard_ctas=3)
    mesh = Mesh(parallel, torch.device("cuda"), 5, 8)
    assert mesh.slim(axis) is mesh.slim(axis) is not None
    assert made == [(rows, 3)]
    for other in (Mesh(parallel, CPU, 5, 8), Mesh(replace(parallel, shard_ctas=0), torch.device("cuda"), 5, 8)):
        assert other.slim(axis) is None


def labelled(rank: int, n: int) -> None:
    """A mesh of another device, as far as a machine without one can have it: the pieces pretend."""
    mesh = init_device_mesh("cpu", (n,))
    piece = torch.full((3, 2), float(rank))
    mesh._device_type = "meta"
    whole = held(piece, (3 * n, 2), mesh, [Shard(0)])
    assert tuple(whole.shape) == (3 * n, 2)
    assert whole.to_local().data_ptr() == piece.data_ptr()


def test_dtensor_constructor_and_spec_label_a_piece_where_it_lies() -> None:
    ranks.run(2, labelled)
