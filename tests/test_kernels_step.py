"""Decode steps: one more token, the state updated in place."""
from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import fused
import pytest
import tiny
import torch
from fused import BAR, HALF, SINGLE, randn, ratio
from torch import Tensor

from stepladder.model.context import Context
from stepladder.model.decoder import blocks
from stepladder.ops import conv, delta, gla, norm, scan, ssd, step
from stepladder.parallel.build import build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel

poisoned = fused.poisoned
GATES = {"0": 0.0, "-1e-3": -1e-3, "-5": -5.0, "-50": -50.0}


def matrices(kind: str, B: int, H: int, G: int, K: int, V: int, gate: float = -1.0, dtype: torch.dtype = SINGLE,
             device: str = "cpu") -> dict[str, Any]:
    g = gate * randn(B, 1, H, K, seed=4).abs() if gate > -50 else torch.full((B, 1, H, K), gate)
    made: dict[str, Any] = {"q": randn(B, 1, G, K, seed=1).to(dtype), "k": randn(B, 1, G, K, seed=2).to(dtype),
                            "v": randn(B, 1, H, V, seed=3).to(dtype), "g": (g if kind == "gla" else g[..., 0]).float()}
    if kind == "delta":
        made["k"] /= made["k"].double().norm(dim=-1, keepdim=True).to(dtype)
        made["beta"] = 2 * randn(B, 1, H, seed=5).sigmoid().float()
    made |= {"start": torch.arange(B).unsqueeze(1) == 1, "S": randn(B, H, K, V, seed=6).float()}
    return {n: z.to(device) for n, z in made.items()}


def definition(kind: str, made: dict[str, Tensor], scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """y and the new state in fp64."""
    made = {n: z.double() if z.is_floating_point() else z for n, z in made.items()}
    form: Callable[..., tuple[Tensor, Tensor]] = {"gla": gla, "ssd": ssd, "delta": delta}[kind].recurrent
    return form(**made | {"q": made["q"] * scale})


def kernel(made: dict[str, Any], scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """y, and the state that was made new in place; that of `made` stays."""
    S = made["S"].clone()
    return step.matrix(made["q"], made["k"], made["v"], made["g"], made.get("beta"), made["start"], S, scale), S


def agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], bar: float) -> None:
    assert ratio(got[0], want[0]) < bar
    assert ratio(got[1], want[1]) < 1e-5             # inputs are the same, the state is fp32


@pytest.mark.parametrize("kind", ["gla", "ssd", "delta"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_a_step_is_the_definitions(kind: str, dtype: torch.dtype, poisoned: None) -> None:
    for gate in GATES.values():
        made = matrices(kind, 3, 2, 2, 16, 16, gate, dtype)
        agree(kernel(made, 0.25), definition(kind, made, 0.25), BAR[dtype])


@pytest.mark.parametrize("kind", ["ssd", "delta"])
def test_heads_of_a_group_share_queries_and_keys_and_no_size_is_a_tiles(kind: str, poisoned: None) -> None:
    for H, G, K, V in ((4, 2, 12, 20), (3, 1, 8, 8), (1, 1, 1, 1)):
        made = matrices(kind, 2, H, G, K, V)
        agree(kernel(made), definition(kind, made), 1e-5)


def test_the_tile_follows_from_the_number_of_heads(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    assert [step.kernels.columns(heads, 128, 264) for heads in (1024, 128, 66, 16)] == [64, 32, 32, 16]
    assert [step.kernels.columns(1 << 20, V, 264) for V in (128, 48, 8)] == [64, 32, 8]
    made = matrices("delta", 2, 2, 1, 8, 72)
    for programs in (1, 8, 64):
        monkeypatch.setattr(step.kernels, "processors", lambda S, n=programs: n)
        agree(kernel(made), definition("delta", made), 1e-5)


def test_no_gate_is_a_gate_of_zero(poisoned: None) -> None:
    made = matrices("delta", 2, 2, 2, 8, 8, 0.0)
    for got, want in zip(kernel(made | {"g": None}), kernel(made), strict=True):
        assert got.equal(want)


def test_inputs_may_be_slices_of_one_projection(poisoned: None) -> None:
    made = matrices("delta", 2, 2, 1, 8, 16)
    parts = torch.cat([made[n].flatten(2) for n in ("q", "k", "v", "beta", "g")], -1).split([8, 8, 32, 2, 2], -1)
    q, k, v = (z.unflatten(2, (-1, n)) for z, n in zip(parts, (8, 8, 16), strict=False))
    cut = made | {"q": q, "k": k, "v": v, "beta": parts[3], "g": parts[4], "start": made["start"].expand(2, 3)[:, :1]}
    turned = made | {"q": q.mT.contiguous().mT, "v": v.mT.contiguous().mT, "start": torch.eye(2, 3).bool()[:, :1]}
    agree(kernel(cut), definition("delta", made), 1e-5)
    agree(kernel(turned), definition("delta", made | {"start": torch.eye(2, 1).bool()}), 1e-5)


def scan_inputs(B: int, D: int, N: int, dtype: torch.dtype = SINGLE, device: str = "cpu") -> dict[str, Any]:
    made = {"q": randn(B, 1, N, seed=1).to(dtype), "k": randn(B, 1, N, seed=2).to(dtype),
            "v": randn(B, 1, D, seed=3).to(dtype), "dt": randn(B, 1, D, seed=4).exp().float(),
            "A": -randn(D, N, seed=5).exp().float(), "start": torch.arange(B).unsqueeze(1) == 1,
            "h": randn(B, D, N, seed=6).float()}
    return {n: z.to(device) for n, z in made.items()}


def scanned(made: dict[str, Any]) -> tuple[Tensor, Tensor]:
    h = made["h"].clone()
    return step.scan(**made | {"h": h}), h


def scan_definition(made: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return scan.recurrent(**{n: z.double() if z.is_floating_point() else z for n, z in made.items()})


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_a_step_of_the_scan_is_the_definitions(dtype: torch.dtype, poisoned: None) -> None:
    for B, D, N in ((3, 40, 16), (2, 5, 3), (1, 1, 1)):
        made = scan_inputs(B, D, N, dtype)
        agree(scanned(made), scan_definition(made), BAR[dtype])


def test_nan_stays_in_its_head_and_ends_with_its_document(poisoned: None) -> None:
    made = matrices("delta", 3, 2, 2, 6, 8)
    made["S"][1:, 1, 3, 4] = torch.nan                          # a document begins in row 1
    made["k"][2, 0, 1] = torch.nan
    y, S = kernel(made)
    assert y[2, 0, 1].isnan().all()
    assert all(z.isfinite().all() for z in (y[:2], S[:2], y[2, 0, 0], S[2, 0]))
    made = scan_inputs(3, 4, 4)
    made["h"][1:, 2, 1] = torch.nan
    y, h = scanned(made)
    assert y.isnan().nonzero().tolist() == [[2, 0, 2]]
    assert h.isnan().nonzero().tolist() == [[2, 2, 1]]


def test_steps_are_for_one_token_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "runs", lambda family, v, dtype, *reasons: dtype.itemsize < 8 and not any(reasons))
    v, S = torch.zeros(2, 1, 2, 8), torch.zeros(2, 2, 8, 8)
    assert step.steps(v, S, 8)
    assert step.steps(v, S, 8, torch.ones(1))
    assert not step.steps(v.expand(2, 3, 2, 8), S, 8)
    assert not step.steps(v, S, 512)
    assert not step.steps(v, S.mT, 8)
    assert not step.steps(v.double(), S, 8)
    assert not step.steps(v, S.bfloat16(), 8)
    learned = torch.ones(1, requires_grad=True)
    assert not step.steps(v, S, 8, learned)
    with torch.no_grad():
        assert step.steps(v, S, 8, learned)


def test_what_does_not_fit_a_state_is_refused() -> None:
    made = matrices("delta", 2, 4, 2, 8, 16)
    for n, z in made.items():
        if n != "S":
            with pytest.raises(ValueError, match=f"^{n} is .* one token of a state .2, 4, 8, 16. needs"):
                kernel(made | {n: torch.cat([z, z], -1)})
    with pytest.raises(ValueError, match="3 heads of queries and keys are not shared evenly by the state's 4"):
        kernel(made | {n: made[n][:, :, [0, 0, 0]] for n in "qk"})
    made = scan_inputs(2, 4, 8)
    for n, z in made.items():
        if n != "h":
            with pytest.raises(ValueError, match=f"^{n} is .* one token of a state .2, 4, 8. needs"):
                scanned(made | {n: torch.cat([z, z], -1)})


@pytest.mark.parametrize("kind", ["gla", "ssd", "delta", "scan"])
def test_mix_takes_one_token_by_a_step_and_gives_the_state_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, rest = {"gla": (gla, ()), "ssd": (ssd, (SINGLE,)), "delta": (delta, (SINGLE,)), "scan": (scan, (SINGLE,))}[kind]
    made = scan_inputs(2, 8, 4) if kind == "scan" else matrices(kind, 2, 2, 2, 8, 8)
    want = op.mix(*made.values(), *rest)
    monkeypatch.setattr(step, "runs", lambda family, z, dtype, *reasons: dtype.itemsize < 8 and not any(reasons))
    got = op.mix(*made.values(), *rest)
    assert got[1] is [*made.values()][-1]
    agree(got, want, 1e-5)


@pytest.mark.parametrize("token", ["gla0", "gated_delta1", "deltanet0", "mamba20", "retention1", "mamba0"])
@torch.no_grad()
def test_a_mixer_decodes_by_kernels_as_by_torch(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, a token, one that begins a document, by prologue, step and epilogue; the state stays where it is."""
    mesh = Mesh(Parallel(), torch.device("cpu"))
    layer = blocks(build(tiny.config(token, layers=1), mesh, seed=3, dtype=SINGLE).decoder)[0].token
    x = randn(2, 5, tiny.WIDTH).float()
    start = torch.zeros(2, 5, dtype=torch.bool)
    start[1, 4] = True

    def decoded() -> Tensor:
        state, out = layer.begin(2, 5, x), []
        held = [z.data_ptr() for z in state]
        for a, b in pairwise((0, 3, 4, 5)):
            out.append(layer.step(x[:, a:b], state, Context(torch.arange(a, b).expand(2, -1), start[:, a:b], None)))
        assert held == [z.data_ptr() for z in state]
        return torch.cat([*out, *(z.flatten()[:tiny.WIDTH].expand(2, 1, -1) for z in state)], 1)

    want, ran = decoded(), []
    for module in (step, conv, norm):
        monkeypatch.setattr(module, "runs", lambda family, z, dtype, *reasons:
                            dtype.itemsize < 8 and not any(reasons) and not ran.append(family))
    assert ratio(decoded(), want) < 1e-5
    assert ran.count("step") == 2


def test_the_ops_say_what_they_do_and_trace_without_a_break() -> None:
    made = matrices("delta", 2, 2, 1, 8, 8)
    args = *(made[n] for n in ("q", "k", "v", "g", "beta", "start", "S")), 0.5
    torch.library.opcheck(step.matrix, args)
    torch.library.opcheck(step.scan, tuple(scan_inputs(2, 4, 4).values()))
    want = kernel(made, 0.5)
    y = torch.compile(lambda *x: step.matrix(*x) + 0, fullgraph=True, backend="aot_eager")(*args)
    agree((y, made["S"]), want, 1e-6)


def test_they_compile_for_sm_90_without_spills() -> None:
    found = fused.compiled("step")
    assert {one["kernel"] for one in found} == {"_matrix", "_scan"}
    assert all(one["spills"] <= 64 and one["shared"] <= 112 << 10 for one in found), found


# On a GPU

REAL = [("gla", 16, 16, 128, 128), ("gla", 4, 4, 128, 256), ("ssd", 64, 1, 128, 64), ("delta", 32, 16, 128, 128),
        ("delta", 6, 6, 256, 512), ("ssd", 16, 16, 64, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "H", "G", "K", "V"), REAL)
def test_on_a_gpu_steps_are_the_definitions_at_real_sizes(kind: str, H: int, G: int, K: int, V: int) -> None:
    for B in (1, 64):
        made = matrices(kind, B, H, G, K, V, dtype=torch.bfloat16, device="cuda")
        agree(kernel(made, K**-0.5), definition(kind, made, K**-0.5), 5e-3)
        again = kernel(made, K**-0.5)
        assert all(a.equal(b) for _ in range(100) for a, b in zip(kernel(made, K**-0.5), again, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_steps_of_the_scan_are_the_definitions_at_real_sizes() -> None:
    for B in (1, 64):
        made = scan_inputs(B, 4096, 16, torch.bfloat16, "cuda")
        agree(scanned(made), scan_definition(made), 5e-3)


@pytest.mark.gpu
def test_on_a_gpu_steps_are_recorded_and_played_back() -> None:
    made = matrices("delta", 4, 16, 16, 128, 128, dtype=torch.bfloat16, device="cuda")
    made["start"].zero_()
    args = [made[n] for n in ("q", "k", "v", "g", "beta", "start", "S")]
    step.matrix(*args, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step.matrix(*args, 1.0)
    for begin in (False, True, False):
        made["start"].fill_(begin)
        want = definition("delta", made)
        graph.replay()
        agree((y, made["S"]), want, 5e-3)
