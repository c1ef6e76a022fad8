"""The fused prologue of recurrent mixers: convolution, SiLU and heads at length 1."""
from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import fused
import pytest
import torch
from fused import BAR, HALF, SINGLE, agree, outcome, randn
from torch import Tensor

from stepladder.ops import conv

poisoned = fused.poisoned
BORDERS: dict[str, list[int]] = {       # where documents begin in a row of 21 tokens
    "none": [], "the first token": [0], "the last token": [20], "two in a row": [7, 8], "many": [0, 3, 4, 5, 12, 18]}


def inputs(T: int, C: int, W: int, begins: list[int], dtype: torch.dtype = SINGLE, bias: bool = True,
           B: int = 2, device: str = "cpu") -> dict[str, Any]:
    start = torch.zeros(B, T, dtype=torch.bool)
    start[-1, [t for t in begins if t < T]] = True             # the rows before the last are one document
    made = {"x": randn(B, T, C, seed=1).to(dtype), "w": randn(C, W, seed=2).float(), "start": start,
            "before": randn(B, W - 1, C, seed=3).to(dtype)} | ({"bias": randn(C, seed=4).float()} if bias else {})
    return {n: z.to(device) for n, z in made.items()}


def kernel(x: Tensor, w: Tensor, start: Tensor, before: Tensor, bias: Tensor | None = None, unit: int = 0,
           head: int = 1) -> tuple[Tensor, Tensor]:
    return conv.fused(x, w, start, before, bias, unit, head)


def both(unit: int = 0, head: int = 1) -> tuple[Any, Any]:
    return partial(kernel, unit=unit, head=head), partial(conv.activated, unit=unit, head=head)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("border", BORDERS)
def test_the_prologue_and_its_gradients_are_the_torch_forms(border: str, dtype: torch.dtype, poisoned: None) -> None:
    agree(*both(16, 8), inputs(21, 24, 4, BORDERS[border], dtype), BAR[dtype])


@pytest.mark.parametrize(("T", "C", "W", "unit", "head"), [(1, 8, 4, 8, 8), (2, 20, 4, 0, 1), (5, 24, 2, 8, 8),
                                                           (3, 12, 4, 4, 4)])
def test_rows_shorter_than_the_filter_and_channels_that_fill_no_tile(T: int, C: int, W: int, unit: int, head: int,
                                                                     poisoned: None) -> None:
    for bias in (True, False):
        agree(*both(unit, head), inputs(T, C, W, [1, 4], bias=bias), 1e-5)


def test_a_filter_of_one_tap_has_no_state(poisoned: None) -> None:
    made = inputs(9, 20, 1, [1, 4])
    held = {n: made.pop(n) for n in ("start", "before")}
    agree(*(lambda f=f, **x: (f(**x, **held)[0],) for f in both()), made, 1e-5)


def test_tiles_and_segments_of_a_long_row_join(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    monkeypatch.setattr(conv.kernels, "TILE", 128)             # 4 tokens, and 1 where sums are held
    monkeypatch.setattr(conv.kernels, "SEGMENT", 7)
    agree(*both(32, 32), inputs(19, 48, 4, [4, 6, 18], B=1), 1e-5)


def test_nan_stays_in_its_document() -> None:
    made = inputs(21, 8, 4, [4, 12])
    made["x"][1, [4, 11]] = torch.nan                   # its first and its last token
    y, after = conv.fused(**made, unit=8, head=8)
    assert y[1, [4, 11]].isnan().all()
    assert all(z.isfinite().all() for z in (y[0], y[1, :4], y[1, 12:], after))
    dx, dw, dbefore, _ = conv._backward(*made.values(), 8, 8, torch.ones_like(y), torch.ones_like(after))
    assert all(z.isnan().all() for z in (dw, dx[1, [4, 11]]))
    assert all(z.isfinite().all() for z in (dx[0], dx[1, :4], dx[1, 12:], dbefore))


def test_two_runs_are_bitwise_the_same() -> None:
    one, two = (outcome(both(8, 8)[0], inputs(21, 24, 4, [3], HALF)) for _ in range(2))
    assert all(one[n].equal(two[n]) for n in one)


def test_the_torch_form_is_what_mixers_did_by_themselves() -> None:
    x, w, start, before, bias = inputs(21, 24, 4, [3, 9], HALF).values()
    y, after = conv.causal(x.float(), w, start, before, bias)
    y = torch.nn.functional.silu(y)
    q = conv.l2_norm(y[..., :16].unflatten(-1, (-1, 8))).flatten(-2)
    got = conv.activated(x, w, start, before, bias, 16, 8)
    assert got[0].equal(torch.cat([q, y[..., 16:]], -1))
    assert got[1].equal(after)


def test_heads_that_are_not_whole_are_refused() -> None:
    made = inputs(4, 24, 4, [])
    for unit, head in ((12, 8), (32, 8), (-8, 8)):
        with pytest.raises(ValueError, match=f"unit = {unit} of 24 channels are no whole heads of {head}"):
            conv.activated(**made, unit=unit, head=head)
    with pytest.raises(ValueError, match="does not go with a state"):
        conv.activated(**made | {"before": made["before"][:, 1:]})


def test_the_op_says_what_it_does_and_traces_without_a_break() -> None:
    made = inputs(3, 8, 4, [1])
    args = (*(z.requires_grad_() if z.is_floating_point() else z for z in made.values()), 8, 8)
    torch.library.opcheck(conv.fused, args)
    torch.library.opcheck(conv._backward, (*(z.detach() if isinstance(z, Tensor) else z for z in args),
                                           torch.ones(2, 3, 8), torch.ones(2, 3, 8)))
    torch.compile(lambda x: conv.fused(x, *args[1:])[0].sum(), fullgraph=True, backend="aot_eager")(args[0]).backward()
    assert made["w"].grad is not None


def test_it_compiles_for_sm_90_without_spills(tmp_path: Path) -> None:
    found = fused.compiled("conv", tmp_path)
    assert {one["kernel"] for one in found} == {"_forward", "_slopes", "_mirrored"}
    assert all(one["spills"] <= 64 and one["shared"] <= 112 << 10 for one in found), found


# On a GPU

def real(W: int, C: int, unit: int, head: int, tokens: int) -> dict[str, Any]:
    begins = [t for t in (0, 1, 63, 64, 1000, 1001, 1003, tokens - 1) if t < tokens]
    return inputs(tokens, C, W, begins, torch.bfloat16, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("C", "unit", "head"), [(6144, 4096, 128), (3072, 2048, 64), (8192, 4096, 256), (4352, 0, 1)])
def test_on_a_gpu_the_prologue_is_the_definitions_at_real_sizes(C: int, unit: int, head: int) -> None:
    for T in (1, 2047):
        agree(*both(unit, head), real(4, C, unit, head, T), 5e-3, dx=8e-3, dbefore=8e-3, dw=8e-3, dbias=8e-3)


@pytest.mark.gpu
def test_on_a_gpu_a_hundred_runs_are_bitwise_the_same() -> None:
    made = real(4, 6144, 4096, 128, 2048)
    one = outcome(both(4096, 128)[0], made)
    for _ in range(100):
        two = outcome(both(4096, 128)[0], made)
        assert all(one[n].equal(two[n]) for n in one)


@pytest.mark.gpu
def test_on_a_gpu_the_prologue_is_recorded_and_played_back() -> None:
    made = real(4, 6144, 4096, 128, 64)
    run = both(4096, 128)[0]
    run(**made)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, after = run(**made)
    made["x"].copy_(torch.flip(made["x"], [1]))
    graph.replay()
    want = run(**made)
    assert y.equal(want[0])
    assert after.equal(want[1])
