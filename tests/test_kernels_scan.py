"""The kernels of the selective scan equal its definition, forward and every gradient."""
from __future__ import annotations

import pytest
import torch
from fused import BAR, HALF, SINGLE, agree, compiled, outcome, poisoned, rand, randn
from torch import Tensor

from stepladder.kernels import scan as kernels
from stepladder.ops import scan

pytestmark = pytest.mark.usefixtures(poisoned.__name__)

# Rates are up to -1: a step is what the steepest entry decays by.
STEPS = {"0": lambda u: 0 * u, "1e-3": lambda u: 0 * u + 1e-3, "to 5": lambda u: 5 * u, "50": lambda u: 0 * u + 50,
         "now and then 50": lambda u: torch.where(u > 0.8, 50.0, 0.01 * u)}
BEGINS: dict[str, list[int]] = {"nowhere": [], "at the first token": [0], "at the last token": [-1],
                                "at edges of chunks": [7, 8, 9, 16], "three times in a chunk": [1, 3, 4]}


def inputs(T: int, steps: str, begins: str, *, D: int = 8, N: int = 16, B: int = 1, dtype: torch.dtype = SINGLE,
           device: str = "cpu") -> dict[str, Tensor]:
    start = torch.zeros(B, T, dtype=torch.bool)
    start[:, [t for t in BEGINS[begins] if t < T]] = True
    dt = STEPS[steps](rand(B, T, D, seed=5))
    out = {"q": randn(B, T, N, seed=1) * N**-0.5, "k": randn(B, T, N, seed=2), "v": randn(B, T, D, seed=3), "dt": dt,
           "A": -rand(D, N, seed=8), "start": start, "h": randn(B, D, N, seed=6)}
    kinds = {"v": dtype, "start": torch.bool}
    return {n: x.to(device, kinds.get(n, SINGLE)) for n, x in out.items()}


@pytest.mark.parametrize(("T", "steps", "begins", "sizes"), [
    (21, "1e-3", "at edges of chunks", {"D": 16}), (9, "to 5", "at the last token", {"N": 4, "D": 12}),
    (17, "to 5", "at the first token", {"B": 2, "N": 8}), (8, "50", "nowhere", {}), (1, "to 5", "nowhere", {}),
    (5, "now and then 50", "three times in a chunk", {"N": 32}), (21, "now and then 50", "nowhere", {"D": 40}),
    (8, "0", "at the last token", {})], ids=str)
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_kernels_equal_the_recurrence(T: int, steps: str, begins: str, sizes: dict[str, int], dtype: torch.dtype):
    agree(scan.fused, scan.recurrent, inputs(T, steps, begins, **sizes, dtype=dtype), BAR[dtype])


@pytest.mark.parametrize("begins", ["nowhere", "at edges of chunks"])
def test_segments_of_a_row_side_by_side_equal_the_recurrence(begins: str):
    agree(lambda **x: scan.fused(**x, segments=3), scan.recurrent, inputs(37, "1e-3", begins), BAR[SINGLE])


def test_long_rows_of_few_channels_are_cut_into_segments():
    assert kernels.cut(torch.empty(1, 1, 64).expand(1, 32768, 64), 4, 8, 0) == (2, 32, 128)
    assert kernels.cut(torch.empty(1, 1, 4096).expand(8, 32768, 4096), 4, 8, 0) == (128, 4096, 1)


@pytest.mark.parametrize("what", ["v", "dt", "k"])
def test_nan_is_passed_on_to_what_follows_it_in_its_document_alone(what: str):
    x = inputs(21, "to 5", "nowhere", B=2)
    x["start"][:, 15] = True
    x[what][0, 10, 0] = torch.nan
    out = outcome(scan.fused, x)
    y = out["y"]
    assert y[0, 10:15, 0].isnan().all()
    for finite in (y[0, :10], y[0, 15:], y[1], out["S"], out["dv"][1]) + (() if what == "k" else (y[0, :, 1:],)):
        assert finite.isfinite().all()


def test_two_runs_are_bitwise_equal():
    x = inputs(21, "to 5", "at edges of chunks", D=40)
    a, b = outcome(scan.fused, x), outcome(scan.fused, x)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_states_are_saved_for_a_backward_pass_alone(monkeypatch: pytest.MonkeyPatch):
    x, made, forward = inputs(9, "to 5", "nowhere"), [], kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: made.append(forward(*args)) or made[-1])
    scan.fused(**x)
    scan.fused(**x | {"A": x["A"].requires_grad_()})
    with torch.no_grad():
        scan.fused(**x)
    assert [states.numel() for _, _, states in made] == [0, 2 * 8 * 16, 0]


def test_gradients_of_the_output_or_the_state_alone():
    for i in range(2):
        x = {n: z.requires_grad_() if z.is_floating_point() else z for n, z in inputs(5, "to 5", "nowhere").items()}
        got, want = (torch.autograd.grad(f(**x)[i].sum(), [x["v"], x["h"]]) for f in (scan.fused, scan.recurrent))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_torch_holds_the_operators_to_be_well_formed():
    x = inputs(5, "to 5", "nowhere")
    args = [z.requires_grad_() if z.is_floating_point() else z for z in x.values()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(scan._forward, (*args, True, 0), test_utils=tests)
    y, h, states = (z.detach() for z in scan._forward(*args, True, 0))
    with torch.no_grad():
        torch.library.opcheck(scan._backward, (*args[:6], states, y, h, 0), test_utils=tests[::2])


def test_a_compiled_program_has_no_break():
    x = inputs(5, "to 5", "nowhere")
    want = outcome(scan.fused, x)
    got = outcome(torch.compile(scan.fused, fullgraph=True, backend="aot_eager"), x)
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_the_kernel_is_taken_where_it_runs_and_the_torch_form_elsewhere(monkeypatch: pytest.MonkeyPatch):
    x = inputs(9, "to 5", "nowhere")
    chunked = scan.chunked(**x)
    assert torch.equal(scan.mix(**x, dtype=HALF)[0], chunked[0])
    monkeypatch.setattr(scan, "runs", lambda family, x, dtype, why: family == "scan" and why is None)
    y, h = scan.mix(**x, dtype=HALF)
    assert (y.dtype, h.dtype) == (HALF, SINGLE)
    torch.testing.assert_close(y.float(), chunked[0], rtol=0.01, atol=0.01)
    odd = inputs(5, "0", "nowhere", N=12)
    assert torch.equal(scan.mix(**odd, dtype=HALF)[0], scan.chunked(**odd)[0])


def test_kernels_fit_a_hopper_gpu():
    found = compiled("scan")
    assert {one["kernel"] for one in found} == {"_forward", "_backward_ends", "_backward"}
    for one in found:
        assert one["spills"] <= 64, one
        assert one["shared"] <= 4096, one                    # blocks of one warp: many a processor


def test_the_backward_pass_forms_a_power_twice_a_token_and_entry():
    """By 8 tokens, and some where documents begin and segments meet. States laid out in two ways took 24 and more."""
    for one in compiled("scan"):
        if one["kernel"] == "_backward":
            entries = 16 if "N=16" in one["constants"] else 8
            assert one["powers"] <= 20 * entries, one


# On a GPU

def large(begins: str, D: int = 512, N: int = 16, B: int = 2) -> dict[str, Tensor]:
    return inputs(1000, "to 5", begins, D=D, N=N, B=B, dtype=torch.bfloat16, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "N"), [(512, 16), (200, 16), (256, 8), (128, 32), (64, 4)])
@pytest.mark.parametrize("begins", ["nowhere", "at edges of chunks"])
@pytest.mark.parametrize("segments", [1, 5])
def test_gpu_kernels_equal_the_chunked_form_in_fp64(D: int, N: int, begins: str, segments: int):
    agree(lambda **x: scan.fused(**x, segments=segments), scan.chunked, large(begins, D, N), 0.008, y=0.005, S=0.005,
          ddt=0.02, dA=0.02)


@pytest.mark.gpu
def test_a_hundred_gpu_runs_are_bitwise_equal():
    x = large("at edges of chunks")
    first = outcome(scan.fused, x)
    for _ in range(100):
        again = outcome(scan.fused, x)
        assert all(torch.equal(again[n], first[n]) for n in first)


@pytest.mark.gpu
def test_gpu_kernels_are_captured_in_a_graph():
    x = large("at edges of chunks")
    want = outcome(scan.fused, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        scan.fused(**x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y, h = scan.fused(**x)
        graph.replay()
        stream.synchronize()
    assert torch.equal(y, want["y"])
    assert torch.equal(h, want["S"])
