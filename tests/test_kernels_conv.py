"""The fused prologue of recurrent mixers: convolution, SiLU and heads at length 1."""
from __future__ import annotations

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


def both(sizes: tuple[int, ...] = (), lengths: tuple[float, ...] = (), head: int = 1) -> tuple[Any, Any]:
    """The kernel and the torch form, as functions whose parts are one tensor again."""
    def kernel(x: Tensor, w: Tensor, start: Tensor, before: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        wanted = [*lengths] + [0.0] * (max(len(sizes), 1) - len(lengths))
        *parts, after = conv.fused(x, w, start, before, bias, [*sizes] or [x.shape[2]], wanted, head)
        assert all(part.is_contiguous() for part in parts)
        return torch.cat(parts, -1), after

    def torch_form(**x: Tensor) -> tuple[Tensor, Tensor]:
        *parts, after = conv.activated(**x, sizes=sizes, lengths=lengths, head=head)    # pyright: ignore
        return torch.cat(parts, -1), after
    return kernel, torch_form


@pytest.mark.parametrize(("border", "dtype"), [*((name, SINGLE) for name in BORDERS), ("many", HALF)])
def test_the_prologue_and_its_gradients_are_the_torch_forms(border: str, dtype: torch.dtype, poisoned: None) -> None:
    agree(*both((8, 8, 8), (0.3, 1), 8), inputs(21, 24, 4, BORDERS[border], dtype), BAR[dtype])


@pytest.mark.parametrize(("T", "W", "sizes", "lengths", "head"), [
    (1, 4, (8, 8), (1.0, 1.0), 8), (2, 4, (20,), (), 1), (5, 2, (8, 16), (1.0,), 8), (3, 4, (12, 8, 4), (), 1),
    (3, 4, (4, 8, 6), (0, 2.0), 4)])
def test_rows_shorter_than_the_filter_and_parts_that_fill_no_tile(
        T: int, W: int, sizes: tuple[int, ...], lengths: tuple[float, ...], head: int, poisoned: None) -> None:
    agree(*both(sizes, lengths, head), inputs(T, sum(sizes), W, [1, 4], bias=T != 3), 1e-5)


def test_a_filter_of_one_tap_has_no_state(poisoned: None) -> None:
    made = inputs(9, 20, 1, [1, 4])
    held = {n: made.pop(n) for n in ("start", "before")}
    agree(*(lambda f=f, **x: (f(**x, **held)[0],) for f in both()), made, 1e-5)


@pytest.mark.parametrize(("T", "begins"), [(67, [4, 6, 18, 40]), (64, [])], ids=["borders", "none"])
def test_spans_of_a_long_row_join(T: int, begins: list[int], monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Those are long enough for groups of tokens that are near no end of anything."""
    for table in (conv.kernels.FORWARD, conv.kernels.BACKWARD):
        monkeypatch.setitem(table, "conv", ((64, 16, 1),))     # two spans of 16 tokens a program
    agree(*both((32, 16), (1.0,), 32), inputs(T, 48, 4, begins, B=1, bias=T == 64), 1e-5)


@pytest.mark.parametrize("W", [4, 6, 8])
def test_what_is_before_a_row_is_owed_by_its_first_span_alone(W: int, monkeypatch: pytest.MonkeyPatch,
                                                              poisoned: None) -> None:
    """Of fewer tokens than the filter reaches back: the second span meets them as well."""
    monkeypatch.setitem(conv.kernels.BACKWARD, "conv", ((8, 4, 1),))
    agree(*both(), inputs(12, 8, W, [], B=1), 1e-5)


def test_nan_stays_in_its_document() -> None:
    made = inputs(21, 8, 4, [4, 12])
    made["x"][1, [4, 11]] = torch.nan                   # its first and its last token
    args = *made.values(), [8], [1.0], 8
    y, after = conv.fused(*args)
    assert y[1, [4, 11]].isnan().all()
    assert all(z.isfinite().all() for z in (y[0], y[1, :4], y[1, 12:], after))
    dx, dw, dbefore, _ = conv._backward(*args, [torch.ones_like(y)], torch.ones_like(after))
    assert all(z.isnan().all() for z in (dw, dx[1, [4, 11]]))
    assert all(z.isfinite().all() for z in (dx[0], dx[1, :4], dx[1, 12:], dbefore))


def test_two_runs_are_bitwise_the_same() -> None:
    one, two = (outcome(both((8, 16), (1.0,), 8)[0], inputs(21, 24, 4, [3], HALF)) for _ in range(2))
    assert all(one[n].equal(two[n]) for n in one)


def test_the_torch_form_is_what_mixers_did_by_themselves() -> None:
    x, w, start, before, bias = inputs(21, 24, 4, [3, 9], HALF).values()
    y, after = conv.causal(x.float(), w.to(HALF), start, before, bias)
    y = torch.nn.functional.silu(y)
    q, k, v = y.split([8, 8, 8], -1)
    got = conv.activated(x, w, start, before, bias, (8, 8, 8), (8**-0.5, 1), 4)
    q, k = (conv.l2_norm(z.unflatten(-1, (-1, 4))) for z in (q, k))
    for part, want in zip(got, ((q * 8**-0.5).flatten(2), k.flatten(2), v, after), strict=True):
        assert part.equal(want)


def test_the_gradient_of_masters_is_not_rounded_to_the_inputs_type() -> None:
    """They are; FSDP has done it already where it shards them. The slopes are ones, which rounding leaves alone."""
    def gradient(f: Any, **made: Tensor) -> Tensor:
        made["w"].requires_grad_()
        torch.stack([z.sum().float() for z in f(**made)]).sum().backward()
        assert made["w"].grad is not None
        return made["w"].grad

    made = inputs(21, 8, 4, BORDERS["many"], HALF)
    want = gradient(both()[1], **made | {"w": made["w"].to(HALF).float(), "x": made["x"].float()})
    for f in both():
        got = gradient(f, **made | {"w": made["w"].clone()})
        assert float((got - want).norm() / want.norm()) < 1e-6


def test_parts_that_do_not_add_up_are_refused() -> None:
    made = inputs(4, 24, 4, [])
    for sizes, lengths in (((8, 8), ()), ((12, 12), (1.0,)), ((24,), (1.0, 1.0))):
        with pytest.raises(ValueError, match="do not go with 24 channels"):
            conv.activated(**made, sizes=sizes, lengths=lengths, head=8)
    with pytest.raises(ValueError, match="does not go with a state"):
        conv.activated(**made | {"before": made["before"][:, 1:]})


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_the_op_says_what_it_does_and_traces_without_a_break(bias: bool) -> None:
    made = inputs(2, 8, 4, [1], B=1, bias=bias)
    args = (*(z.requires_grad_() if z.is_floating_point() else z for z in made.values()), *[None] * (not bias), [4, 4],
            [1.0, 0.0], 4)
    torch.library.opcheck(conv.fused, args)
    torch.library.opcheck(conv._backward, (*(z.detach() if isinstance(z, Tensor) else z for z in args),
                                           [torch.ones(1, 2, 4)] * 2, torch.ones(1, 3, 8)))
    torch.compile(lambda x: sum(z.sum() for z in conv.fused(x, *args[1:])), fullgraph=True,
                  backend="aot_eager")(args[0]).backward()
    assert made["w"].grad is not None


def test_it_compiles_for_sm_90_without_spills() -> None:
    found = fused.compiled("conv")
    assert {one["kernel"] for one in found} == {"_forward", "_backward"}
    assert all(one["spills"] <= 64 and one["shared"] <= 112 << 10 for one in found), found


# On a GPU

GATED = (2048, 2048, 2048), (128**-0.5, 1.0), 128          # 16 heads of 128


def real(C: int, tokens: int) -> dict[str, Any]:
    begins = [t for t in (0, 1, 63, 64, 1000, 1001, 1003, tokens - 1) if t < tokens]
    return inputs(tokens, C, 4, begins, torch.bfloat16, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "lengths", "head"), [
    GATED, ((1024, 1024, 1024), (1.0, 1.0), 64), ((1536, 1536, 3072), (1.0, 1.0), 256), ((4096, 128, 128), (), 1)])
def test_on_a_gpu_the_prologue_is_the_torch_form_in_fp64_at_real_sizes(
        sizes: tuple[int, ...], lengths: tuple[float, ...], head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for T, many in ((1, 132), (2047, 132), (2047, 1)):           # 1: spans as long as those of large batches
        monkeypatch.setattr(conv.kernels, "processors", lambda x, many=many: many)
        agree(*both(sizes, lengths, head), real(sum(sizes), T), 5e-3, dx=8e-3, dbefore=8e-3, dw=8e-3, dbias=8e-3)


@pytest.mark.gpu
def test_on_a_gpu_a_hundred_runs_are_bitwise_the_same() -> None:
    made = real(6144, 2048)
    one = outcome(both(*GATED)[0], made)
    for _ in range(100):
        two = outcome(both(*GATED)[0], made)
        assert all(one[n].equal(two[n]) for n in one)


@pytest.mark.gpu
def test_on_a_gpu_the_prologue_is_recorded_and_played_back() -> None:
    made = real(6144, 64)
    run = both(*GATED)[0]
    run(**made)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, after = run(**made)
    made["x"].copy_(torch.flip(made["x"], [1]))
    graph.replay()
    want = run(**made)
    assert y.equal(want[0])
    assert after.equal(want[1])
