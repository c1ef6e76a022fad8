"""n ranks equal one rank: loss, likelihood, router load and every gradient, in double precision to 1e-10 relative."""
from __future__ import annotations

from itertools import product

import pytest
import ranks
import tiny
import torch

from stepladder.parallel.build import Parts, build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.pipeline import Result
from stepladder.parallel.support import LAYOUTS, Parallel

EXACT = 1e-10
ROWS, LENGTH = 2, 16
CPU = torch.device("cpu")

TOKENS = ["attention0", "attention1", "gla0"]                    # attention1 has a window and fewer kv heads than tp
CHANNELS = ["swiglu0", "moe0", "moe1", "between"]                # moe1 is pre-gated; "between": dense blocks between
WIRINGS = ["standard", "parallel", "ladder", "mixed"]
CELLS = list(product(TOKENS, CHANNELS, WIRINGS))


def layout(features: frozenset[str]) -> tuple[Parallel, int]:
    """A listed layout at two ranks a dimension (HSDP needs two by two), and its world size."""
    tp, pp = 1 + ("tp" in features), 1 + ("pp" in features)
    dp = 4 if "hsdp" in features else 2 if {"fsdp", "ddp"} & features else 1
    parallel = Parallel(tp=tp, pp=pp, ep=1 + ("ep" in features), dp_replicate=1 + ("hsdp" in features),
                        sequence="sp" in features, shard="ddp" not in features)
    assert parallel.features(dp) == features
    return parallel, tp * pp * dp


def name(features: frozenset[str]) -> str:
    return "x".join(sorted(features)) or "alone"


def passes(parts: Parts, micros: int) -> Result:
    """Forward and backward over this rank's share of the same micro-batches, gradients summed."""
    batch = [tiny.micro(ROWS, LENGTH, seed).to(parts.mesh.device) for seed in range(micros)]
    result = parts.pipe(batch[parts.mesh.dp_rank::parts.mesh.dp])
    parts.sums()
    return result


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # pyright: ignore


def differences(rank: int, n: int, cells: list[tuple[str, str, str]], parallel: Parallel) -> list[str]:
    """What differs on this rank between one rank and `n`, for every cell."""
    mesh = Mesh(parallel, CPU, rank, n)
    return [f"{'/'.join(cell)}: {d}" for cell in cells for d in on_mesh(mesh, cell)]


def compare(rank: int, n: int, cell: tuple[str, str, str], parallel: Parallel) -> list[str]:
    return on_mesh(Mesh(parallel, CPU, rank, n), cell)


def on_mesh(mesh: Mesh, cell: tuple[str, str, str], change: dict[str, bool] | None = None,
            how: dict[str, str] | None = None) -> list[str]:
    """`change` goes to the model's configuration, `how` to the parallel build alone."""
    cfg, device = tiny.config(*cell, **(change or {})), mesh.device
    one = build(cfg, Mesh(Parallel(), device), seed=3, dtype=torch.float64)
    many = build(cfg, mesh, seed=3, dtype=torch.float64, **(how or {}))
    want, got = (passes(parts, mesh.dp * max(2, mesh.pp)) for parts in (one, many))
    # Everything but the stages' own share is a sum over dp; loss and likelihood stand on the last stage only.
    sums = torch.stack([got.loss / mesh.tp, got.nll / mesh.tp, got.count / mesh.tp])
    load = torch.stack([s.load.sum() for s in got.stats]).sum() if got.stats else torch.zeros((), device=device)
    sums = torch.cat([sums, load.double().view(1)])
    torch.distributed.all_reduce(sums)
    sent = sum(s.load.sum() for s in want.stats)
    out = [f"{what} {a} != {b}" for what, a, b in zip(
        ("loss", "likelihood", "count", "load"), sums.tolist(),
        [float(x) for x in (want.loss, want.nll, want.count, sent)], strict=True)
        if abs(a - b) > EXACT * max(1.0, abs(b))]
    grads = {k: p.grad for k, p in one.parameters().items()}
    for key, p in many.parameters().items():
        if p.requires_grad:
            ours, theirs = whole(many.label(key, p.grad)), grads[key]  # pyright: ignore[reportArgumentType]
            assert theirs is not None
            error = float((ours - theirs).norm() / theirs.norm())
            if not error < EXACT:
                out.append(f"gradient of {key} is off by {error:.1e}")
    return out


def sample(features: frozenset[str]) -> list[tuple[str, str, str]]:
    """Every pair of (token, channel), (token, wiring), (channel, wiring) at least once over neighbouring layouts."""
    at, cells = LAYOUTS.index(features), [c for c in CELLS if c[1] != "swiglu0" or "ep" not in features]
    return cells[at % 7::7] if layout(features)[1] < 8 else cells[at % 11::11]


@pytest.mark.parametrize("features", [f for f in LAYOUTS if f], ids=name)
def test_n_ranks_equal_one_rank(features: frozenset[str]) -> None:
    parallel, n = layout(features)
    wrong = ranks.run(n, differences, sample(features), parallel, timeout=240)
    assert not any(wrong), "\n".join(sorted({line for rank in wrong for line in rank}))


def test_the_sample_covers_every_pair() -> None:
    run = [(features, cell) for features in LAYOUTS if features for cell in sample(features)]
    assert len(run) >= 60
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert {(c[a], c[b]) for _, c in run} == {(c[a], c[b]) for c in CELLS}
    for feature in ("tp", "sp", "pp", "ep", "fsdp", "ddp", "hsdp"):
        cells = {c for f, c in run if feature in f}
        assert {c[0] for c in cells} == set(TOKENS), feature
        assert {c[2] for c in cells} == set(WIRINGS), feature
        assert {c[1] for c in cells} >= set(CHANNELS) - ({"swiglu0"} if feature == "ep" else set()), feature


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
