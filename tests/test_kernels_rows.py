"""Rows of experts back to their tokens: the kernels against the torch form in fp64, forward and gradients."""
from __future__ import annotations

import pytest
import torch
from fused import HALF, SINGLE, poison, randn, ratio
from torch import Tensor

from stepladder.kernels import rows as kernels
from stepladder.ops import experts, rows

BARS = {SINGLE: 1e-6, HALF: 2e-3, torch.bfloat16: 8e-3}


def case(N: int, k: int, D: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A third of the choices are another rank's: x (M, D), order, inverse, weights, the gradient of what is weighed."""
    ids = torch.randint(6, (N, k), generator=torch.Generator().manual_seed(N)).clamp(max=4)
    order, inverse, ends = experts.sort(ids, 4)
    order = order[:int(ends[-1])]
    x, weights, dy = randn(len(order), D), randn(N, k, seed=1), randn(N, D, seed=2)
    return (x.to(device, dtype), order.to(device), inverse.to(device), weights.to(device), dy.to(device, dtype))


def compare(N: int, k: int, D: int, dtype: torch.dtype, device: str = "cpu") -> None:
    x, order, inverse, weights, dy = case(N, k, D, dtype, device)
    rounded = weights.to(dtype).double().cpu().requires_grad_()
    wide = x.double().cpu().requires_grad_()
    want = rows.weigh(wide, order.cpu(), inverse.cpu(), rounded)
    dx, dweights = torch.autograd.grad(want, (wide, rounded), dy.double().cpu())
    at = inverse.view(N, k)
    with poison():
        got = {"y": kernels.collect(x, at, weights), "sum": kernels.collect(x, at, None)}
        got["dx"], got["dweights"] = kernels.weigh_back(dy, x, order, weights)
    wanted = {"y": want, "sum": rows.collect(wide.detach(), at.cpu()), "dx": dx, "dweights": dweights}
    for name, z in got.items():
        assert ratio(z.cpu(), wanted[name]) < BARS[dtype], name


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize(("N", "k", "D"), [(1, 1, 8), (7, 2, 24), (5, 4, 40)])
def test_rows_are_weighed_and_their_gradients_are_those_of_the_torch_form(N: int, k: int, D: int, dtype: torch.dtype,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 16)             # several of them a row, the last one not full
    compare(N, k, D, dtype)


def test_what_is_another_ranks_is_not_read() -> None:
    x = torch.full((3, 8), torch.nan)
    x[0] = 1
    at = torch.tensor([[0, 3], [9, 0], [5, 7]])
    for f in (kernels.collect, rows.collect):
        assert torch.equal(f(x, at, torch.ones(3, 2)), torch.tensor([1.0, 1, 0]).unsqueeze(1).expand(3, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF, SINGLE])
@pytest.mark.parametrize(("N", "k", "D"), [(1000, 4, 2048), (333, 8, 5120), (77, 2, 24)])
def test_on_a_gpu_rows_are_weighed_and_their_gradients_are_right(N: int, k: int, D: int, dtype: torch.dtype) -> None:
    compare(N, k, D, dtype, "cuda")
