"""The kernels of the recurrence with one decay per head equal its definition, forward and every gradient."""
from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from fused import BAR, HALF, SINGLE, agree, compiled, outcome, poisoned, rand, randn
from torch import Tensor

from stepladder.kernels import ssd as kernels
from stepladder.kernels import ssd_backward
from stepladder.ops import ssd

pytestmark = [pytest.mark.usefixtures(poisoned.__name__),
              pytest.mark.filterwarnings("ignore:divide by zero")]       # the interpreter's, of the logarithm of a step

C = 16                                         # tokens of a chunk
GATES = {"0": lambda u: 0 * u, "-1e-3": lambda u: 0 * u - 1e-3, "to -5": lambda u: -5 * u, "-50": lambda u: 0 * u - 50,
         "now and then -50": lambda u: torch.where(u > 0.8, -50.0, -0.01 * u),
         "now and then -inf": lambda u: torch.where(u > 0.8, -torch.inf, -0.01 * u)}
BEGINS: dict[str, list[int]] = {"nowhere": [], "at the first token": [0], "at the last token": [-1],
                                "at edges of chunks": [15, 16, 17, 32], "three times in a chunk": [1, 4, 9],
                                "everywhere": [*range(1000)]}


def inputs(T: int, gate: str, begins: str, *, G: int = 1, H: int = 2, K: int = 16, V: int = 16, B: int = 1,
           dtype: torch.dtype = SINGLE, device: str = "cpu", steps: bool = False) -> dict[str, Tensor]:
    """q and k of G heads, scaled to sums of some 1. steps: with those of Mamba-2, from 0 to 2, some of them 0."""
    q, k, v = randn(B, T, G, K, seed=1) * K**-0.5, randn(B, T, G, K, seed=2), randn(B, T, H, V, seed=3)
    start = torch.zeros(B, T, dtype=torch.bool)
    start[:, [t for t in BEGINS[begins] if t < T]] = True
    out = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "g": GATES[gate](rand(B, T, H, seed=5)).float(),
           "start": start, "S": randn(B, H, K, V, seed=6).float()}
    if steps:
        out |= {"dt": (2 * rand(B, T, H, seed=7) - 0.2).clamp_min(0.0).float(), "D": randn(H, seed=8).float()}
    return {n: x.to(device) for n, x in out.items()}


def fast(**x: Tensor) -> tuple[Tensor, Tensor]:
    return ssd.fused(**x, chunk=C)


@pytest.mark.parametrize(("T", "gate", "begins", "sizes"), [
    (37, "0", "at edges of chunks", {}), (21, "-1e-3", "at the last token", {"H": 1, "V": 48}),
    (37, "to -5", "at the first token", {"G": 2, "B": 2}),
    (21, "to -5", "at edges of chunks", {"G": 2, "H": 4, "K": 128}), (16, "-50", "nowhere", {}),
    (1, "to -5", "nowhere", {}),
    (5, "now and then -50", "three times in a chunk", {"H": 3, "K": 32}), (37, "now and then -50", "nowhere", {}),
    (32, "now and then -inf", "three times in a chunk", {"V": 32})], ids=str)
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("steps", [False, True], ids=["", "steps"])
def test_kernels_equal_the_recurrence(T: int, gate: str, begins: str, sizes: dict[str, int], dtype: torch.dtype,
                                      steps: bool):
    agree(fast, ssd.recurrent, inputs(T, gate, begins, **sizes, dtype=dtype, steps=steps), BAR[dtype])


@pytest.mark.parametrize("begins", ["nowhere", "at edges of chunks"])
@pytest.mark.parametrize("steps", [False, True], ids=["", "steps"])
def test_segments_of_a_row_side_by_side_equal_the_recurrence(begins: str, steps: bool):
    agree(lambda **x: ssd.fused(**x, chunk=C, segments=3), ssd.recurrent, inputs(70, "to -5", begins, steps=steps),
          BAR[SINGLE])


@pytest.mark.parametrize("steps", [False, True], ids=["", "steps"])
def test_heads_of_a_group_one_after_the_other_equal_the_recurrence(monkeypatch: pytest.MonkeyPatch, steps: bool):
    """What a small group does side by side, and adds up after, where there is no processor left for it."""
    monkeypatch.setattr(ssd_backward, "processors", lambda x: 1)
    agree(fast, ssd.recurrent, inputs(21, "to -5", "at edges of chunks", H=4, V=32, steps=steps), BAR[SINGLE])


@pytest.mark.parametrize("wrong", [{"D": None}, {"dt": None}, {"dt": (1, 4, 2)}, {"dt": (1, 5, 1)}, {"D": (1,)}],
                         ids=str)
def test_steps_and_skips_that_do_not_go_with_values_are_refused(wrong: dict[str, tuple[int, ...] | None]):
    x = inputs(5, "0", "nowhere", steps=True)
    x |= {name: cast(Tensor, shape and torch.ones(shape)) for name, shape in wrong.items()}
    for form in (fast, ssd.recurrent, ssd.chunked):
        with pytest.raises(ValueError, match=r"dt .* and D .* do not go with values \(1, 5, 2, 16\): give both"):
            form(**x)


def test_one_token_moves_the_state_in_place_only_where_nothing_learns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stepladder.ops.step.runs", lambda *args: True)
    x = inputs(1, "to -5", "nowhere", steps=True)
    x["dt"].requires_grad_()
    before = x["S"].clone()
    y, _ = ssd.mix(**x, dtype=SINGLE)
    assert torch.equal(x["S"], before)
    (got,) = torch.autograd.grad(y.sum(), x["dt"])
    (want,) = torch.autograd.grad(ssd.recurrent(**x)[0].sum(), x["dt"])
    torch.testing.assert_close(got, want)


def test_a_step_of_0_still_has_a_gradient():
    """It is found before the step scales it, not divided by the step after."""
    x = inputs(37, "to -5", "nowhere", steps=True)
    x["dt"].zero_()
    agree(fast, ssd.recurrent, x, BAR[SINGLE])


def test_long_rows_of_few_heads_are_cut_into_segments():
    assert kernels.split(512, 132 // 16) == (64, 8)
    assert kernels.split(5, 3) == (2, 3)
    assert kernels.split(4, 3) == (2, 2)                     # no segment is empty
    assert kernels.split(7, 0) == (7, 1)


@pytest.mark.parametrize("what", ["v", "g"])
def test_nan_is_passed_on_to_what_follows_it_and_to_no_other_head_or_row(what: str):
    x = inputs(37, "to -5", "nowhere", B=2)
    x["start"][:, 30] = True
    x[what][0, 20, 0] = torch.nan
    out = outcome(fast, x)
    assert out["y"][0, 20:30, 0].isnan().all()
    assert out["y"][0, :C].isfinite().all()                  # the chunk before
    for y in (out["y"], out["dv"], out["dg"]):
        assert y[0, :, 1].isfinite().all()
        assert y[1].isfinite().all()


def test_two_runs_are_bitwise_equal():
    x = inputs(37, "to -5", "at edges of chunks")
    a, b = outcome(fast, x), outcome(fast, x)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_states_are_saved_for_a_backward_pass_alone(monkeypatch: pytest.MonkeyPatch):
    x, made, forward = inputs(5, "0", "nowhere"), [], kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: made.append(forward(*args)) or made[-1])
    fast(**x)
    fast(**x | {"g": x["g"].requires_grad_()})
    with torch.no_grad():
        fast(**x)
    assert [states.numel() for _, _, states in made] == [0, 2 * 16 * 16, 0]


def test_gradients_of_the_output_or_the_state_alone():
    for i, name in enumerate(("y", "S")):
        x = {n: z.requires_grad_() if z.is_floating_point() else z for n, z in inputs(21, "to -5", "nowhere").items()}
        got, want = (torch.autograd.grad(f(**x)[i].sum(), [x["v"], x["S"]]) for f in (fast, ssd.recurrent))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("steps", [False, True], ids=["", "steps"])
def test_torch_holds_the_operators_to_be_well_formed(steps: bool):
    made = inputs(5, "to -5", "nowhere", steps=steps)
    x = {n: z.requires_grad_() if z.is_floating_point() else z for n, z in made.items()}
    names = "q", "k", "v", "g", "dt", "D"
    args = *(x.get(n) for n in names), x["start"].cumsum(1, dtype=torch.int32), x["S"]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ssd._forward, (*args, True, C, 0), test_utils=tests)
    made = [z.detach() for z in ssd._forward(*args, True, C, 0)]
    with torch.no_grad():
        torch.library.opcheck(ssd._backward, (*args[:7], made[2], made[0], made[1], C, 0), test_utils=tests[::2])


@pytest.mark.parametrize("steps", [False, True], ids=["", "steps"])
def test_a_compiled_program_has_no_break(steps: bool):
    x = inputs(5, "to -5", "nowhere", steps=steps)
    want, got = outcome(fast, x), outcome(torch.compile(fast, fullgraph=True, backend="aot_eager"), x)
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_the_kernel_is_taken_where_it_runs_and_the_torch_form_elsewhere(monkeypatch: pytest.MonkeyPatch):
    x = inputs(21, "to -5", "nowhere", V=48)
    chunked = ssd.chunked(**x)
    assert torch.equal(ssd.mix(**x, dtype=HALF)[0], chunked[0])
    monkeypatch.setattr(ssd, "runs", lambda family, x, dtype, why: family == "ssd" and why is None)
    y, S = ssd.mix(**x, dtype=HALF)
    assert (y.dtype, S.dtype) == (HALF, SINGLE)
    torch.testing.assert_close(y.float(), chunked[0], rtol=0.02, atol=0.02)
    assert torch.equal(ssd.mix(**x, dtype=SINGLE)[0], chunked[0])


@pytest.mark.parametrize(("sizes", "dtype", "said"), [
    ({"K": 48}, HALF, "keys of 48 channels"), ({"V": 72}, HALF, "values of 72 channels"),
    ({"V": 32}, HALF, "values of 32 channels"), ({}, torch.float64, "torch.float64"), ({}, SINGLE, "torch.float32"),
    ({"V": 48}, HALF, None)])
def test_what_the_kernel_does_not_cover_has_a_name(sizes: dict[str, int], dtype: torch.dtype, said: str | None):
    x = inputs(5, "0", "nowhere", **sizes)
    assert ssd.uncovered(x["q"], x["v"], dtype) == said


def test_kernels_fit_a_hopper_gpu():
    found = compiled("ssd")
    assert {one["kernel"] for one in found} == {"_forward", "_reverse", "_inside", "_sides", "_gates"}
    for one in found:
        assert one["spills"] <= 64, one
        alone = "num_warps=8" in one["constants"]            # its registers leave no room for a second block
        assert one["shared"] <= (227 if alone else 112) * 1024, one


# On a GPU

SIZES = [{"G": 1, "H": 16, "K": 128, "V": 64}, {"G": 4, "H": 4, "K": 128, "V": 128}, {"G": 4, "H": 4, "K": 64, "V": 64},
         {"G": 2, "H": 4, "K": 128, "V": 256}, {"G": 1, "H": 3, "K": 32, "V": 48}]      # tiles of 16 values


def large(sizes: dict[str, int], begins: str, T: int = 1000) -> dict[str, Any]:
    return inputs(T, "to -5", begins, **sizes, B=2, dtype=torch.bfloat16, device="cuda", steps=sizes["G"] < 4)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("begins", ["nowhere", "at edges of chunks", "everywhere"])     # there gates reach nothing
@pytest.mark.parametrize("segments", [1, 5])
def test_gpu_kernels_equal_the_chunked_form_in_fp64(sizes: dict[str, int], begins: str, segments: int):
    agree(lambda **x: ssd.fused(**x, segments=segments), ssd.chunked, large(sizes, begins), 0.008, y=0.005, S=0.005,
          dg=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_a_hundred_gpu_runs_are_bitwise_equal(sizes: dict[str, int]):
    x = large(sizes, "at edges of chunks")
    first = outcome(ssd.fused, x)
    for _ in range(100):
        again = outcome(ssd.fused, x)
        assert all(torch.equal(again[n], first[n]) for n in first)


@pytest.mark.gpu
def test_gpu_kernels_are_captured_in_a_graph():
    x = large(SIZES[0], "at edges of chunks")
    want = outcome(ssd.fused, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        ssd.fused(**x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y, S = ssd.fused(**x)
        graph.replay()
        stream.synchronize()
    assert torch.equal(y, want["y"])
    assert torch.equal(S, want["S"])
