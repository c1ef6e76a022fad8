"""Parameters are declared once: whole shape, split and initial value stand on one line."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stepladder.model.residual import Comm, OneRank

Init = Callable[[Tensor, torch.Generator], Tensor]


def normal(std: float) -> Init:
    return lambda p, gen: p.normal_(0.0, std, generator=gen)


def constant(value: float) -> Init:
    return lambda p, gen: p.fill_(value)


def uniform(low: float, high: float) -> Init:
    return lambda p, gen: p.uniform_(low, high, generator=gen)


def rates(low: float, high: float) -> Init:
    """Logarithms of decay rates that are uniform; above zero, of which there is no logarithm."""
    return lambda p, gen: p.uniform_(low, high, generator=gen).clamp_min_(1e-4).log_()


def time_steps(low: float = 1e-3, high: float = 1e-1) -> Init:
    """Biases whose softplus is log-uniform: how far a recurrence moves on at a token (arXiv:2312.00752)."""
    def init(p: Tensor, gen: torch.Generator) -> Tensor:
        dt = p.uniform_(math.log(low), math.log(high), generator=gen).exp_()
        return p.copy_(dt + torch.log(-torch.expm1(-dt)))          # the inverse of softplus
    return init


class Decl(NamedTuple):
    shape: tuple[int, ...]    # of the whole parameter, whatever is split
    init: Init
    tp: int | None            # dimension split over the tensor-parallel group
    ep: int | None            # dimension split over the expert-parallel group
    units: int = 0            # heads, which the tp dimension is not cut through; 0: any cut will do
    share: bool = False       # with fewer units than tp, neighbouring ranks hold the same one

    def pieces(self, tp: int) -> int:
        """Number of different slices among `tp` ranks."""
        return min(tp, self.units) if self.share else tp


class Leaf(nn.Module):
    """A module that declares weights. Forward code computes with whatever slice it holds; counts come from shapes."""
    comm: Comm                # parallel/build.py replaces it
    replicated = False        # whole and fp32 on every data-parallel rank: small, or needed outside forward()

    def __init__(self) -> None:
        super().__init__()
        self.decls: dict[str, Decl] = {}
        self.comm = OneRank()

    def weight(self, name: str, *shape: int, init: Init, tp: int | None = None, ep: int | None = None, units: int = 0,
               share: bool = False, learn: bool = True) -> None:
        """Declare parameter `name` with its whole `shape`. learn=False: saved and moved with the others, no gradient.

        One-dimensional parameters (norms, biases, decays) stay fp32 and out of weight decay.
        """
        self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=learn))
        self.decls[name] = Decl(shape, init, tp, ep, units, share)


def declared(module: nn.Module) -> dict[str, Decl]:
    """Global parameter name -> declaration, in the order of named_parameters()."""
    return {f"{path}.{name}" if path else name: decl for path, leaf in module.named_modules() if isinstance(leaf, Leaf)
            for name, decl in leaf.decls.items()}
