"""The kernels of gated linear attention equal its definition: outputs, states and every gradient."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import fused
import pytest
import torch
from fused import BAR, HALF, SINGLE, agree, outcome, rand, randn, ratio
from torch import Tensor

from stepladder.kernels import gla_backward, gla_states
from stepladder.ops import gla

poisoned = fused.poisoned
# what is made of a chunk whose gates are out of range is dropped, and made anew token by token
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
CHUNK, SCALE = 16, 0.5
GATES: dict[str, Callable[[Tensor], Tensor]] = {      # of numbers in [0, 1)
    "0": lambda z: 0 * z, "-0.001": lambda z: 0 * z - 1e-3, "-5": lambda z: 0 * z - 5, "-50": lambda z: 0 * z - 50,
    "-0.1 to 0": lambda z: -z / 10, "-5 to 0": lambda z: -5 * z,
    "of all sizes": lambda z: -torch.tensor([0, 1e-3, 5, 50]).to(z)[(4 * z).long()]}
BORDERS: dict[str, list[int]] = {"none": [], "the first token": [0], "the last token": [36],
                                 "a chunk's edges": [16, 31], "many": [0, 3, 4, 5, 15, 17, 30, 32]}
dtypes = pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["fp32", "fp16"])


def inputs(T: int = 37, gate: str = "-0.1 to 0", begins: list[int] | None = None, dtype: torch.dtype = SINGLE,
           B: int = 1, H: int = 1, K: int = 16, V: int = 16, device: str = "cpu") -> dict[str, Any]:
    """Documents begin in the last row."""
    start = torch.zeros(B, T, dtype=torch.bool)
    start[-1, [t for t in begins or () if t < T]] = True
    made = {n: randn(B, T, H, d, seed=i).to(dtype) for i, (n, d) in enumerate((("q", K), ("k", K), ("v", V)))}
    made |= {"g": GATES[gate](rand(B, T, H, K, seed=4)).float(), "start": start, "S": randn(B, H, K, V, seed=6).float()}
    return {n: z.to(device) for n, z in made.items()}


def kernel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor, segment: int = 1,
           block: int = 0) -> tuple[Tensor, Tensor]:
    return gla.fused(q, k, v, g, start, S, SCALE, CHUNK, segment, block)


def definition(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    return gla.recurrent(SCALE * q, k, v, g, start, S)


@dtypes
@pytest.mark.parametrize("border", BORDERS)
def test_documents_begin_anywhere(border: str, dtype: torch.dtype, poisoned: None) -> None:
    agree(kernel, definition, inputs(begins=BORDERS[border], dtype=dtype), BAR[dtype])


@dtypes
@pytest.mark.parametrize("gate", GATES)
def test_gates_of_any_size(gate: str, dtype: torch.dtype, poisoned: None) -> None:
    agree(kernel, definition, inputs(gate=gate, begins=[20], dtype=dtype), BAR[dtype])


@pytest.mark.parametrize("T", [1, 5, 16, 33])
def test_rows_of_any_length(T: int, poisoned: None) -> None:
    agree(kernel, definition, inputs(T, begins=[3], B=2, H=2), BAR[SINGLE])


@pytest.mark.parametrize("steep", [1, 1000])
def test_channels_go_in_blocks_and_tiles(steep: float, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the second block of channels alone is out of range, too."""
    for module, table in ((gla_states, "FACTORS"), (gla_states, "WALK"), (gla_states, "SWEEP"), (gla_backward, "KEYS")):
        monkeypatch.setattr(module, table, ((16, *getattr(module, table)[0][1:]),))
    x = inputs(begins=[18], K=32, V=32)
    x["g"][..., 16:] *= steep
    agree(partial(kernel, block=16), definition, x, BAR[SINGLE])


@pytest.mark.parametrize("begins", [[], [0, 40]])
def test_segments_of_a_row_are_the_row(begins: list[int], poisoned: None) -> None:
    agree(partial(kernel, segment=3), definition, inputs(78, "-5 to 0" if begins else "-0.1 to 0", begins), BAR[SINGLE])


def test_gates_may_be_half_as_wide(poisoned: None) -> None:
    x = inputs(begins=[20], dtype=HALF)
    agree(kernel, definition, x | {"g": x["g"].half()}, BAR[HALF])


def test_a_run_repeats_bitwise(poisoned: None) -> None:
    one, two = (outcome(partial(kernel, segment=2), inputs(20, begins=[5], gate="of all sizes")) for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("which", ["q", "k", "v", "g"])
def test_nan_stays_in_the_rest_of_its_document(which: str, poisoned: None) -> None:
    x = inputs(40, begins=[4, 12, 35])
    x[which][0, 8, 0, 0] = torch.nan
    got = outcome(kernel, x)
    assert got["y"][0, 8].isnan().any()
    assert got["dg"][0, 4:9].isnan().any()
    for n in ("y", "dq", "dk", "dv", "dg"):
        assert got[n][0, :4].isfinite().all(), n
        assert got[n][0, 12:].isfinite().all(), n
    assert got["S"].isfinite().all()
    assert got["dS"].isfinite().all()


def test_nan_is_cut_off_by_a_border_in_a_later_segment(poisoned: None) -> None:
    x = inputs(78, begins=[40])
    x["v"][0, 5, 0, 0] = torch.nan
    got = outcome(partial(kernel, segment=3), x)
    assert got["y"][0, 5:40].isnan().any(-1).all()
    assert all(got[n][0, 40:].isfinite().all() for n in ("y", "dq", "dk", "dv", "dg"))
    assert got["S"].isfinite().all()


def test_nan_reaches_the_state_and_what_comes_later(poisoned: None) -> None:
    x = inputs(40)
    x["v"][0, 20] = torch.nan
    got = outcome(partial(kernel, segment=3), x)
    assert got["y"][0, 20:].isnan().all()
    assert got["S"].isnan().all()


def test_the_torch_op_is_whole_and_compiles_without_a_break(poisoned: None) -> None:
    x = {n: z.requires_grad_() if z.is_floating_point() else z for n, z in inputs(17, begins=[2]).items()}
    q, k, v, g, start, S = x.values()
    torch.library.opcheck(gla._forward, (q, k, v, g, start.view(torch.uint8), S, SCALE, True, CHUNK, 1, 0),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    whole = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    got, want = outcome(whole, x), outcome(kernel, x)
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_without_gradients_nothing_is_kept(poisoned: None) -> None:
    x = inputs(20, begins=[18], gate="of all sizes")
    y, S = kernel(**x)
    want = definition(**x)
    assert max(ratio(y, want[0]), ratio(S, want[1])) < BAR[SINGLE]


def test_for_backward_states_are_kept_and_no_pairs() -> None:
    x = {n: z.requires_grad_() if z.is_floating_point() else z for n, z in inputs(V=32).items()}
    held: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: held.append((*z.shape,)) or z, lambda z: z):
        kernel(**x)
    given = {(*z.shape,) for z in x.values()}
    assert [shape for shape in held if shape not in given] == [(1, 3, 1, 16, 32), (1, 3, 1)]


@pytest.mark.parametrize(("which", "change", "said"), [
    ("g", lambda z: z - 2 * z.min(), r"a gate is .* > 0"),
    ("g", lambda z: z[:, :-1], r"gates \(1, 6, 1, 16\) do not go with queries \(1, 7, 1, 16\)"),
    ("start", lambda z: z[:, :-1], r"borders \(1, 6\) do not go"), ("k", lambda z: z[..., 1:], r"keys \(1, 7, 1, 15\)"),
    ("S", lambda z: z[..., 1:], r"the state \(1, 1, 16, 15\) .* need \(1, 1, 16, 16\); a state is made by the begin")])
def test_what_does_not_belong_together_is_refused(which: str, change: Callable[[Tensor], Tensor], said: str) -> None:
    x = inputs(7)
    for form in (gla.recurrent, gla.chunked, gla.fused):
        with pytest.raises(ValueError, match=said):
            form(**x | {which: change(x[which])})


def test_kernels_refuse_mixed_types() -> None:
    x = inputs(7)
    with pytest.raises(ValueError, match=r"are torch.float32, torch.float32, torch.float64, torch.float32; kernels"):
        gla.fused(**x | {"v": x["v"].double()})


@pytest.mark.parametrize("takes", [False, True])
def test_mixing_scales_queries_whichever_form_runs(takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gla, "runs", lambda *_: takes)
    x = inputs(18, begins=[3])
    agree(gla.mix, lambda q, **rest: gla.recurrent(q * 16**-0.5, **rest), x, BAR[SINGLE])


def test_fp32_and_keys_of_16_take_the_torch_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sizes the compilers make wrong code, which tests/hazards.py finds; of 16 x 16 gradients were wrong."""
    said: list[list[str | None]] = []
    monkeypatch.setattr(gla, "runs", lambda *args: said.append([*args[3:]]))
    for dtype, K in ((SINGLE, 32), (HALF, 32), (HALF, 16)):
        gla.mix(**inputs(5, K=K, dtype=dtype))
    assert [any(why) for why in said] == [True, False, True]


def test_every_launch_compiles_for_hopper_within_its_registers() -> None:
    found = fused.compiled("gla")
    assert {one["kernel"] for one in found} == {"factors_kernel", "walk_kernel", "slow_kernel", "keys_kernel",
                                                "slow_keys_kernel", "slow_values_kernel"}
    for one in found:
        most = {"factors_kernel": 80, "keys_kernel": 232}          # without spills they are slower
        assert one["spills"] <= most.get(one["kernel"], 64), one
        assert one["shared"] <= 113 * 1024, one                    # two blocks a processor


# On a GPU

def on_gpu(K: int, V: int, gate: str, T: int = 1000, H: int = 4) -> dict[str, Tensor]:
    x = inputs(T, gate, [0, 17, 64, 500, 501, 999], torch.bfloat16, B=2, H=H, K=K, V=V, device="cuda")
    return x | {"q": x["q"] * K**-0.5, "k": x["k"] * K**-0.5}


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (128, 256)])
def test_on_a_gpu_kernels_equal_the_recurrence_in_double_precision(K: int, V: int, gate: str, poisoned: None) -> None:
    for segment in (1, 3):
        agree(lambda *, s=segment, **x: gla.fused(**x, segment=s), gla.chunked, on_gpu(K, V, gate), 0.008, y=0.005,
              S=0.005, dg=0.02)


@pytest.mark.gpu
def test_on_a_gpu_a_run_repeats_bitwise() -> None:
    x = on_gpu(128, 128, "-0.1 to 0", T=4096, H=16)
    first = outcome(gla.fused, x)
    for _ in range(100):
        assert all(torch.equal(z, first[n]) for n, z in outcome(gla.fused, x).items())


@pytest.mark.gpu
def test_on_a_gpu_a_captured_step_is_the_step() -> None:
    x = on_gpu(128, 128, "of all sizes")
    want = outcome(gla.fused, x)
    leaves = {n: z.requires_grad_() if z.is_floating_point() else z for n, z in x.items()}
    weights = [randn(*want[n].shape, seed=100 + i).to(want[n]) for i, n in enumerate(("y", "S"))]
    floats = [z for z in leaves.values() if z.is_floating_point()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, S = gla.fused(**leaves)
        grads = torch.autograd.grad((y, S), floats, weights)
    graph.replay()
    for got, name in zip((y, S, *grads), want, strict=True):
        assert torch.equal(got, want[name]), name
