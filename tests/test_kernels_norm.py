"""The fused epilogue of recurrent mixers: every row normed, scaled, and gated before or after that."""
from __future__ import annotations

from functools import partial
from typing import Any

import fused
import pytest
import torch
from fused import BAR, HALF, SINGLE, agree, outcome, randn
from torch import Tensor

from stepladder.ops import norm

poisoned = fused.poisoned


def inputs(V: int, dtype: torch.dtype = SINGLE, tokens: tuple[int, ...] = (2, 5, 3), device: str = "cpu",
           gate: torch.dtype | None = None, groups: bool = False) -> dict[str, Tensor]:
    """groups: the last of the tokens' dimensions is of groups, which have a scale each."""
    scale = 1 + randn(*tokens[-1:] * groups, V, seed=2).float()
    made = {"y": 3 * randn(*tokens, V, seed=1).to(dtype), "scale": scale,
            "gate": 2 * randn(*tokens, V, seed=3).to(gate or dtype)}
    return {n: z.to(device) for n, z in made.items()}


def kernel(y: Tensor, scale: Tensor, gate: Tensor, first: bool = False) -> tuple[Tensor]:
    return (norm.fused(y, scale.view(-1, scale.shape[-1]), gate, first),)


def torch_form(first: bool = False, **x: Tensor) -> tuple[Tensor]:
    return (norm.gated_norm(**x, first=first),)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("V", [16, 24, 3])
@pytest.mark.parametrize("groups", [False, True], ids=["", "groups"])
@pytest.mark.parametrize("first", [False, True], ids=["", "gated first"])
def test_the_epilogue_and_its_gradients_are_the_torch_forms(V: int, dtype: torch.dtype, groups: bool, first: bool,
                                                            poisoned: None) -> None:
    agree(partial(kernel, first=first), partial(torch_form, first=first), inputs(V, dtype, groups=groups), BAR[dtype])


def test_the_torch_form_gated_first_is_mamba_2s() -> None:
    x = inputs(16, torch.float64, groups=True)
    u = x["y"] * x["gate"] * x["gate"].sigmoid()
    want = u / (u.square().mean(-1, keepdim=True) + norm.EPS).sqrt() * x["scale"]
    torch.testing.assert_close(norm.gated_norm(**x, first=True), want)


def test_sums_over_rows_of_several_programs_join(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    monkeypatch.setattr(norm.kernels, "TILE", 128)              # 8 rows, and 2 where sums are held
    for tiles, groups in ((1, False), (3, False), (3, True)):
        monkeypatch.setattr(norm.kernels, "processors", lambda y, n=tiles: max(1, 4 // n))
        agree(kernel, torch_form, inputs(16, tokens=(3, 7, 5), groups=groups), 1e-5)


@pytest.mark.filterwarnings("ignore:overflow")          # the interpreter's, of exp
def test_the_result_is_of_the_gates_type_and_large_gates_are_no_harm(poisoned: None) -> None:
    made = inputs(16, SINGLE, gate=HALF)
    made["gate"][0] *= 1e4
    agree(kernel, torch_form, made, BAR[HALF])
    assert kernel(**made)[0].dtype == HALF


def test_gradients_in_fp32_lose_nothing_to_a_gate_of_16_bits(poisoned: None) -> None:
    made = inputs(16, SINGLE, gate=HALF)
    got = norm._backward(made["y"], made["scale"][None], made["gate"], False, torch.ones_like(made["gate"]))
    x = {n: z.double().requires_grad_() for n, z in made.items()}
    want = torch.autograd.grad(norm.gated_norm(**x).sum(), [*x.values()])
    assert max(fused.ratio(got[i].squeeze(), want[i].squeeze()) for i in range(2)) < BAR[SINGLE]


@pytest.mark.parametrize("scale", [(4, 8), (5, 8), (7,)])
def test_scales_that_do_not_go_with_rows_are_refused(scale: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rows \(4, 6, 8\) do not go with a gate \(4, 6, 8\) and a scale"):
        norm.gated_norm(torch.ones(4, 6, 8), torch.ones(scale), torch.ones(4, 6, 8))


@pytest.mark.parametrize("first", [False, True], ids=["", "gated first"])
def test_nan_stays_in_its_head(first: bool) -> None:
    made = inputs(16)
    made["y"][1, 2, 0, 3] = torch.nan
    (out,) = kernel(**made, first=first)
    dy, dscale, dgate = norm._backward(made["y"], made["scale"][None], made["gate"], first, torch.ones_like(out))
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
    args = made["y"], made["scale"].detach()[None].requires_grad_(), made["gate"], True
    torch.library.opcheck(norm.fused, args)
    torch.library.opcheck(norm._backward, (*(z.detach() for z in args[:3]), True, made["gate"].detach()))
    torch.compile(lambda **x: kernel(**x)[0].sum(), fullgraph=True, backend="aot_eager")(**made).backward()
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
@pytest.mark.parametrize(("groups", "V"), [(1, 4096), (3, 1536), (1, 8192), (8, 512)])
def test_on_a_gpu_rows_gated_first_are_the_torch_form_in_fp64(groups: int, V: int) -> None:
    agree(partial(kernel, first=True), partial(torch_form, first=True),
          inputs(V, torch.bfloat16, (2, 999, groups), "cuda", groups=True), 5e-3, dscale=8e-3)


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
    kernel(**made)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (out,) = kernel(**made)
    made["y"].mul_(-1)
    graph.replay()
    assert out.equal(kernel(**made)[0])
