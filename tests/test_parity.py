"""n ranks equal one rank: loss, likelihood, router load and every gradient, in double precision to 1e-10 relative."""
from __future__ import annotations

from itertools import combinations

import matrix
import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from matrix import Cell, layout
from torch import Tensor

from stepladder.model.config import ModelConfig
from stepladder.model.decoder import skeleton
from stepladder.parallel.build import Parts, build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.pipeline import Result
from stepladder.parallel.shard import local
from stepladder.parallel.support import LAYOUTS, Parallel

EXACT = 1e-10
ROWS, LENGTH = 2, 16
CPU = torch.device("cpu")


def name(features: frozenset[str]) -> str:
    return matrix.spell(*layout(features))


def sample(features: frozenset[str]) -> list[Cell]:
    return matrix.selection()[name(features)]


def passes(parts: Parts, micros: int) -> Result:
    """Forward and backward over this rank's share of the same micro-batches, gradients summed."""
    batch = [tiny.micro(ROWS, LENGTH, seed).to(parts.mesh.device) for seed in range(micros)]
    result = parts.pipe(batch[parts.mesh.dp_rank::parts.mesh.dp])
    parts.sums()
    return result


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # pyright: ignore


SUMS = ("loss", "likelihood", "count", "load")


def reference(cfg: ModelConfig, mesh: Mesh, micros: int) -> dict[str, Tensor]:
    """The four sums and every gradient of one rank, by name; rank 0 computes them and tells the others."""
    shapes = {name: torch.Size() for name in SUMS}
    shapes |= {name: p.shape for name, p in skeleton(cfg).named_parameters() if p.requires_grad}
    flat = torch.zeros(sum(shape.numel() for shape in shapes.values()), dtype=torch.float64, device=mesh.device)
    if mesh.rank == 0:
        one = build(cfg, Mesh(Parallel(), mesh.device), seed=3, dtype=torch.float64)
        result, params = passes(one, micros), one.parameters()
        grads = [params[name].grad for name in shapes if name not in SUMS]
        assert all(g is not None for g in grads)
        flat = torch.cat([_sums(result), *(g.flatten() for g in grads if g is not None)])
    dist.broadcast(flat, 0)
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _sums(result: Result) -> Tensor:
    load = sum((s.load.sum() for s in result.stats), torch.zeros((), device=result.loss.device))
    return torch.stack([x.double() for x in (result.loss, result.nll, result.count, load)])


def errors(mesh: Mesh, cell: Cell, change: dict[str, int] | None = None,
           how: dict[str, str] | None = None) -> dict[str, float]:
    """Relative errors against one rank. `change` goes to the model's configuration, `how` to the parallel build."""
    cfg = tiny.config(*cell, **{"layers": max(4, mesh.layout.stages), **(change or {})})
    micros = mesh.dp * max(2, mesh.pp)
    want = reference(cfg, mesh, micros)
    many = build(cfg, mesh, seed=3, dtype=torch.float64, **(how or {}))
    # Everything but the stages' own share is a sum over dp; loss and likelihood stand on the last stage only.
    sums = _sums(passes(many, micros)) / torch.tensor([mesh.tp, mesh.tp, mesh.tp, 1], device=mesh.device)
    dist.all_reduce(sums)
    got = dict(zip(SUMS, sums, strict=True))
    for key, p in many.parameters().items():
        if p.requires_grad:
            grad = local(torch.zeros_like(p) if p.grad is None else p.grad).to(mesh.device)      # it may be offloaded
            got[f"gradient of {key}"] = whole(many.label(key, grad))
    return {what: _error(ours, want[what.removeprefix("gradient of ")]) for what, ours in got.items()}


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def on_mesh(mesh: Mesh, cell: Cell, change: dict[str, int] | None = None,
            how: dict[str, str] | None = None) -> list[str]:
    """What differs on this rank from one rank."""
    return [f"{what} is off by {e:.1e}" for what, e in errors(mesh, cell, change, how).items() if not e < EXACT]


def compare(rank: int, n: int, cell: Cell, parallel: Parallel) -> list[str]:
    return on_mesh(Mesh(parallel, CPU, rank, n), cell)


def worst(rank: int, n: int, cells: list[Cell], parallel: Parallel) -> tuple[float, list[str]]:
    """This rank's largest error over the cells, and all that are too large."""
    mesh = Mesh(parallel, CPU, rank, n)
    found = {f"{'/'.join(cell)}: {what}": e for cell in cells for what, e in errors(mesh, cell).items()}
    return max(found.values()), [f"{what} is off by {e:.1e}" for what, e in found.items() if not e < EXACT]


@pytest.mark.parametrize("name", matrix.suite())
def test_n_ranks_equal_one_rank(name: str) -> None:
    parallel, n = matrix.LAYOUTS[name]
    answers = ranks.run(n, worst, matrix.suite()[name], parallel, timeout=240)
    assert not any(wrong for _, wrong in answers), "\n".join(sorted({line for _, wrong in answers for line in wrong}))


def test_the_selection_covers_every_pair() -> None:
    run = [(name, *cell) for name, few in matrix.suite().items() for cell in few]
    every = [(name, *cell) for name in matrix.suite() for cell in matrix.allowed(name)]
    assert {name(f) for f in LAYOUTS if f - {"zero"}} <= set(matrix.LAYOUTS)        # DeepSpeed: test_deepspeed.py
    for a, b in combinations(range(4), 2):
        assert {(c[a], c[b]) for c in run} == {(c[a], c[b]) for c in every}
    assert {c[1] for c in every} == {*tiny.CROSSED}
    assert len(run) < len(every) / 8
    assert sum(len(matrix.cells(name)) for name in matrix.LAYOUTS) >= 300


def test_the_readme_holds_the_parity_table() -> None:
    """Its layouts and numbers are the matrix's; the errors stand as `make parity` found them."""
    found, held = matrix.recorded(), matrix.MARKED.search(matrix.README.read_text())
    assert held is not None
    assert set(found) == set(matrix.LAYOUTS), "python tests/parity.py --new"
    assert held[0] == matrix.table(found)
    assert max(map(float, found.values())) < EXACT


def some_mixers_at_once(rank: int, n: int, parallel: Parallel) -> list[str]:
    return compare(rank, n, ("every", "between", "mixed"), parallel)


@pytest.mark.parametrize("features", [{"tp", "pp"}, {"tp", "ep"}, {"tp", "sp", "pp", "fsdp"}, {"pp", "ep", "fsdp"}],
                         ids=lambda f: name(frozenset(f)))
def test_a_model_of_every_mixer_and_wiring(features: set[str]) -> None:
    parallel, n = layout(frozenset(features))
    assert not any(ranks.run(n, some_mixers_at_once, parallel))


def variant(rank: int, n: int, parallel: Parallel, change: dict[str, bool], how: dict[str, str]) -> list[str]:
    mesh = Mesh(parallel, CPU, rank, n)
    return on_mesh(mesh, ("gla0", "between", "mixed"), change, how)


@pytest.mark.parametrize("features", [{"tp"}, {"tp", "sp", "fsdp"}, {"fsdp"}], ids=lambda f: name(frozenset(f)))
def test_tied_embeddings(features: set[str]) -> None:
    parallel, n = layout(frozenset(features))
    assert not any(ranks.run(n, variant, parallel, {"tied": True}, {}))


@pytest.mark.parametrize("features", [{"tp", "sp"}, {"tp", "ep"}, {"pp", "fsdp"}], ids=lambda f: name(frozenset(f)))
def test_recomputation(features: set[str]) -> None:
    parallel, n = layout(frozenset(features))
    assert not any(ranks.run(n, variant, parallel, {}, {"recompute": "both"}))


def held_out(rank: int, n: int, parallel: Parallel) -> tuple[float, float]:
    parts = build(tiny.config("gla0", "between", "mixed"), Mesh(parallel, CPU, rank, n), seed=3, dtype=torch.float64)
    found = []
    for _ in range(2):                       # the second evaluation meets a schedule that has run
        result = parts.pipe([tiny.micro(ROWS, LENGTH, seed) for seed in range(2)], train=False)
        for key, p in parts.parameters().items():          # and the model can be saved at once
            assert p.grad is None
            assert tuple(parts.label(key, p.detach()).shape) == parts.decls[key].shape
        found.append(float(result.nll))
    assert found[0] == found[1]
    return found[0], float(result.count)


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(reshard=False), Parallel(ep=2), Parallel(pp=2),
                                      Parallel(tp=2, sequence=True)], ids=["fsdp", "kept", "ep", "pp", "sp"])
def test_evaluation(parallel: Parallel) -> None:
    """Every dp rank is given the same rows here."""
    ((nll, count),) = ranks.run(1, held_out, Parallel())
    assert ranks.run(2, held_out, parallel)[-1] == (pytest.approx(nll, rel=EXACT), count)


def in_bf16(rank: int, n: int, parallel: Parallel) -> float:
    parts = build(tiny.config("gla0", "moe1", "ladder"), Mesh(parallel, CPU, rank, n), seed=3, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in parts.parameters().values())       # masters
    result = passes(parts, 2)
    sums = torch.stack([result.loss, result.count])
    if not parts.mesh.alone:
        torch.distributed.all_reduce(sums)
    return float(sums[0] / sums[1])


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2), Parallel(ep=2)], ids=["fsdp", "tp", "ep"])
def test_bf16_over_fp32_masters(parallel: Parallel) -> None:
    (one,) = ranks.run(1, in_bf16, Parallel())
    assert ranks.run(2, in_bf16, parallel)[0] == pytest.approx(one, rel=1e-2)
