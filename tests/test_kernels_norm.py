"""The fused epilogue of recurrent mixers: every head normed, scaled and gated."""
from __future__ import annotations

from typing import Any

import fused
import pytest
import torch
from fused import BAR, HALF, SINGLE, agree, outcome, randn
from torch import Tensor

from stepladder.ops import norm

poisoned = fused.poisoned


def inputs(V: int, dtype: torch.dtype = SINGLE, tokens: tuple[int, ...] = (2, 5, 3), device: str = "cpu",
           gate: torch.dtype | None = None) -> dict[str, Tensor]:
    made = {"y": 3 * randn(*tokens, V, seed=1).to(dtype), "scale": 1 + randn(V, seed=2).float(),
            "gate": 2 * randn(*tokens, V, seed=3).to(gate or dtype)}
    return {n: z.to(device) for n, z in made.items()}


def kernel(**x: Tensor) -> tuple[Tensor]:
    return (norm.fused(**x),)


def torch_form(**x: Tensor) -> tuple[Tensor]:
    return (norm.gated_norm(**x),)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("V", [16, 24, 3])
def test_the_epilogue_and_its_gradients_are_the_torch_forms(V: int, dtype: torch.dtype, poisoned: None) -> None:
    agree(kernel, torch_form, inputs(V, dtype), BAR[dtype])


def test_sums_over_rows_of_several_programs_join(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    monkeypatch.setattr(norm.kernels, "TILE", 128)              # 8 rows, and 2 where sums are held
    for tiles in (1, 3):
        monkeypatch.setattr(norm.kernels, "processors", lambda y, n=tiles: max(1, 4 // n))
        agree(kernel, torch_form, inputs(16, tokens=(3, 7, 5)), 1e-5)


@pytest.mark.filterwarnings("ignore:overflow")          # the interpreter's, of exp
def test_the_result_is_of_the_gates_type_and_large_gates_are_no_harm(poisoned: None) -> None:
    made = inputs(16, SINGLE, gate=HALF)
    made["gate"][0] *= 1e4
    agree(kernel, torch_form, made, BAR[HALF])
    assert norm.fused(**made).dtype == HALF


def test_gradients_in_fp32_lose_nothing_to_a_gate_of_16_bits(poisoned: None) -> None:
    made = inputs(16, SINGLE, gate=HALF)
    got = norm._backward(*made.values(), torch.ones_like(made["gate"]))
    x = {n: z.double().requires_grad_() for n, z in made.items()}
    want = torch.autograd.grad(norm.gated_norm(**x).sum(), [*x.values()])
    assert max(fused.ratio(got[i], want[i]) for i in range(2)) < BAR[SINGLE]


def test_nan_stays_in_its_head() -> None:
    made = inputs(16)
    made["y"][1, 2, 0, 3] = torch.nan
    out = norm.fused(**made)
    dy, dscale, dgate = norm._backward(*made.values(), torch.ones_like(out))
    for z in (out, dy, dgate):
        bad = z.isnan().any(-1)
        assert bad[1, 2, 0]
        assert bad.sum() == 1
    assert dscale.isnan().any()


def test_two_runs_are_bitwise_the_same() -> None:
    one, two = (outcome(kernel, inputs(16, HALF)) for _ in range(2))
    assert all(one[n].equal(two[n]) for n in one)


def test_the_op_says_what_it_does_and_traces_without_a_break() -> None:
    made: dict[str, Any] = {n: z.requires_grad_() for n, z in inputs(8).items()}
    torch.library.opcheck(norm.fused, tuple(made.values()))
    torch.library.opcheck(norm._backward, tuple(z.detach() for z in (*made.values(), made["gate"])))
    torch.compile(lambda **x: norm.fused(**x).sum(), fullgraph=True, backend="aot_eager")(**made).backward()
    assert made["scale"].grad is not None


def test_it_compiles_for_sm_90_without_spills() -> None:
    found = fused.compiled("norm")
    assert {one["kernel"] for one in found} == {"_forward", "_backward"}
    assert all(one["spills"] <= 64 and one["shared"] <= 112 << 10 for one in found), found


# On a GPU

@pytest.mark.gpu
@pytest.mark.parametrize("V", [64, 128, 256, 512])
def test_on_a_gpu_the_epilogue_is_the_torch_form_in_fp64(V: int) -> None:
    for dtype in (torch.bfloat16, SINGLE):
        agree(kernel, torch_form, inputs(V, dtype, (2, 2047, 4), "cuda", torch.bfloat16), 5e-3, dscale=8e-3)


@pytest.mark.gpu
def test_on_a_gpu_a_hundred_runs_are_bitwise_the_same() -> None:
    made = inputs(128, torch.bfloat16, (2, 4096, 16), "cuda")
    one = outcome(kernel, made)
    for _ in range(100):
        two = outcome(kernel, made)
        assert all(one[n].equal(two[n]) for n in one)


@pytest.mark.gpu
def test_on_a_gpu_the_epilogue_is_recorded_and_played_back() -> None:
    made = inputs(128, torch.bfloat16, (2, 64, 16), "cuda")
    norm.fused(**made)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = norm.fused(**made)
    made["y"].mul_(-1)
    graph.replay()
    assert out.equal(norm.fused(**made))
