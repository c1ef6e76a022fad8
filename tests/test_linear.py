"""Products with weights: one and several, their gradients, and those that are put off."""
from __future__ import annotations

import pytest
import tiny
import torch
from test_parity import LENGTH, ROWS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stepladder.ops.linear import Put, _products, _products_backward, catch_up, linear, linears, put_off


@pytest.mark.parametrize(("x_type", "w_type"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_weight_gradients_put_off_are_those_of_autograd(x_type: torch.dtype, w_type: torch.dtype) -> None:
    w, twin = (torch.linspace(-1, 1, 12, dtype=w_type).view(3, 4).requires_grad_() for _ in range(2))
    x = torch.linspace(-2, 3, 40, dtype=x_type).view(2, 5, 4)
    later: list[Put] = []
    for _ in range(2):
        (linear(x, twin) ** 2).sum().backward()
        with put_off(later):
            (linear(x, w) ** 2).sum().backward()
    assert w.grad is None
    catch_up(later)
    assert w.grad is not None
    assert twin.grad is not None
    assert torch.equal(w.grad, twin.grad)


@pytest.mark.parametrize("tokens", [3, 40], ids=["fewer rows than channels", "more"])
@pytest.mark.parametrize(("x_type", "w_type"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_several_weights_give_what_each_gives_in_fewer_products(tokens: int, x_type: torch.dtype,
                                                                w_type: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(0)
    together, alone, last = [[torch.randn(n, 8, generator=gen, dtype=w_type).requires_grad_() for n in sizes]
                             for sizes in ((3, 5, 2), (7,), (4,))]
    ws, weights = together + alone + last, (together, *alone, last)
    x = torch.randn(tokens, 8, generator=gen, dtype=torch.float64).to(x_type).requires_grad_()
    gs = [torch.randn(tokens, n, generator=gen, dtype=torch.float64).to(x_type) for n in (10, 7, 4)]
    want = [torch.cat([linear(x, w) for w in some], -1) for some in (together, alone, last)]
    with torch.profiler.profile() as profile:
        got = linears(x, *weights)
    products = sum(e.count for e in profile.key_averages() if e.key == "aten::mm")
    assert products == (3 if tokens > 8 else 5)
    bar = {"rtol": 2e-2, "atol": 3e-2} if x_type == torch.bfloat16 else {}
    for a, b in zip((*got, *torch.autograd.grad(got, (x, *ws), gs)), (*want, *torch.autograd.grad(want, (x, *ws), gs)),
                    strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **bar)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(linears(x, *weights), (x, *ws), gs)
    assert counter.get_total_flops() == 3 * 2 * tokens * 8 * 21
    with put_off(later := []):
        torch.autograd.backward(linears(x, *weights), gs)
    assert all(w.grad is None for w in ws)
    catch_up(later)
    for w, dw in zip(ws, torch.autograd.grad(linears(x, *weights), ws, gs), strict=True):
        assert w.grad is not None
        assert torch.equal(w.grad, dw)


def test_an_output_that_nothing_learns_from_costs_its_weight_zeros() -> None:
    a, b = (torch.ones(n, 4, requires_grad=True) for n in (3, 2))
    x = torch.ones(8, 4, requires_grad=True)
    first, _ = linears(x, a, b)
    dx, da, db = torch.autograd.grad(first.sum(), (x, a, b), allow_unused=True)
    assert torch.equal(dx, torch.full_like(x, 3))
    assert torch.equal(da, torch.full_like(a, 8))
    assert db is None or not db.any()


def test_torch_holds_the_operators_to_be_well_formed() -> None:
    ws = [torch.randn(n, 8, requires_grad=True) for n in (3, 5, 4)]
    gs = [torch.randn(2, 5, n) for n in (8, 4)]
    for x in (torch.randn(2, 5, 8), torch.randn(5, 2, 8).transpose(0, 1)):
        torch.library.opcheck(_products, (x.requires_grad_(), ws, [2, 1]))
        torch.library.opcheck(_products_backward, (gs, x.detach(), [w.detach() for w in ws], [2, 1]))


def test_ranks_are_compared_on_tokens_enough_for_one_product() -> None:
    """Of one rank; what is divided by dp takes the other way, and gives the same."""
    assert ROWS * LENGTH >= tiny.WIDTH


def test_a_compiled_product_keeps_its_weights_and_no_copy_of_them() -> None:
    """FSDP takes the weights back after the forward pass; a copy would stay."""
    ws, kept = [torch.randn(n, 16, requires_grad=True) for n in (8, 24)], list[Tensor]()
    f = torch.compile(lambda x, *ws: linears(x, ws)[0].sigmoid(), fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(lambda z: (kept.append(z), z)[1], lambda z: z):
        f(torch.randn(40, 16), *ws).sum().backward()
    known = {w.data_ptr() for w in ws}
    assert {z.data_ptr() for z in kept if z.shape[-1] == 16 and z.shape[0] != 40} == known


def test_a_frozen_weight_among_those_put_off_gets_no_gradient() -> None:
    learns, frozen = torch.ones(3, 4, requires_grad=True), torch.ones(2, 4)
    with put_off(later := []):
        linears(torch.ones(8, 4), (learns, frozen))[0].sum().backward()
    catch_up(later)
    assert learns.grad is not None
    assert frozen.grad is None


def test_nothing_is_put_off_outside_of_the_pipeline() -> None:
    w = torch.ones(3, 4, requires_grad=True)
    with put_off(later := []):
        linear(torch.ones(2, 4), w * 1).sum().backward()      # not a leaf: its gradient is on its way elsewhere
    linear(torch.ones(2, 4), w).sum().backward()
    assert not later
    assert w.grad is not None
    assert float(w.grad.sum()) == 48
