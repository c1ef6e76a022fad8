"""Retention (arXiv:2307.08621): a matrix state per head that decays at one rate, the head's own or the token's."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stepladder.model.config import ModelConfig, Place
from stepladder.model.context import Context
from stepladder.model.leaf import constant, normal
from stepladder.model.mixer import Recurrent
from stepladder.model.token.attention import angles, rotate
from stepladder.ops import ssd
from stepladder.ops.linear import linear, linears, promote
from stepladder.ops.norm import gated_norm


@dataclass(frozen=True)
class Spec:
    heads: int                       # each with a state of key_dim x value_dim
    key_dim: int                     # per head
    value_dim: int                   # per head
    decay: Literal["fixed", "scalar"] = "fixed"        # fixed: 1 - 2^(-5-h) a token, in head h; scalar: learned
    theta: float = 10_000.0          # base of the rotation of queries and keys; 0: none
    tau: float = 16.0                # scalar log decays are divided by tau, so that heads start out remembering
    kind: str = "retention"

    def __post_init__(self) -> None:
        for name in ("heads", "key_dim", "value_dim", "tau"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if self.decay not in ("fixed", "scalar"):
            raise ValueError(f'decay = "{self.decay}" is neither "fixed" nor "scalar"')
        if self.theta < 0 or (self.theta and self.key_dim % 2):
            raise ValueError(f"theta = {self.theta} turns pairs of channels and must not be negative, and key_dim = "
                             f"{self.key_dim} even; theta = 0 turns none")


class State(NamedTuple):
    S: Tensor                        # (B, H, K, V) at least fp32


class Mixer(Recurrent):
    State = State
    wq: Tensor                       # (H*K, D)
    wk: Tensor                       # (H*K, D)
    wv: Tensor                       # (H*V, D)
    log_decay: Tensor                # (H,) fixed
    gate: Tensor                     # (H, D) scalar
    gate_bias: Tensor                # (H,) scalar
    out_gate: Tensor                 # (H*V, D)
    norm: Tensor                     # (V,) shared by the heads
    wo: Tensor                       # (D, H*V)

    def __init__(self, cfg: ModelConfig, spec: Spec, place: Place):
        super().__init__()
        D, H, K, V = cfg.width, spec.heads, spec.key_dim, spec.value_dim
        self.spec = spec
        self.weight("wq", H * K, D, tp=0, units=H, init=normal(cfg.std))
        self.weight("wk", H * K, D, tp=0, units=H, init=normal(cfg.std))
        self.weight("wv", H * V, D, tp=0, units=H, init=normal(cfg.std))
        if spec.decay == "fixed":    # a weight, because a rank holds those of its own heads
            self.weight("log_decay", H, tp=0, units=H, init=fixed, learn=False)
        else:
            self.weight("gate", H, D, tp=0, units=H, init=normal(cfg.std))
            self.weight("gate_bias", H, tp=0, units=H, init=constant(0.0))
        self.weight("out_gate", H * V, D, tp=0, units=H, init=normal(cfg.std))
        self.weight("norm", V, init=constant(1.0))
        self.weight("wo", D, H * V, tp=1, units=H, init=normal(cfg.std / (2 * place.layers) ** 0.5))

    def begin(self, batch: int, length: int, like: Tensor) -> State:
        K, V = self.spec.key_dim, self.spec.value_dim
        return State(promote(like.new_empty(0)).new_zeros(batch, self.wq.shape[0] // K, K, V))

    def flops(self, T: int) -> int:
        return 4 * self.wq.shape[0] * self.spec.value_dim

    def table(self, ctx: Context, dtype: torch.dtype) -> Tensor | None:
        return angles(ctx.pos, self.spec.key_dim, self.spec.theta).to(dtype) if self.spec.theta else None

    def mix(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        K, V = self.spec.key_dim, self.spec.value_dim
        learned = self.spec.decay != "fixed"
        q, k, v, gate, *g = linears(x, self.wq, self.wk, self.wv, self.out_gate, *([self.gate] if learned else []))
        q, k, v = (promote(z).unflatten(-1, (-1, n)) for z, n in zip((q, k, v), (K, K, V), strict=True))
        if ctx.table is not None:
            q, k = rotate(q, ctx.table), rotate(k, ctx.table)
        if learned:
            g = F.logsigmoid(promote(g[0]) + self.gate_bias) / self.spec.tau
        else:
            g = self.log_decay.to(v.dtype).expand(v.shape[:3])
        y, S = ssd.mix(q * K**-0.5, k, v, g, ctx.start, state.S, x.dtype)
        gate = gate.unflatten(-1, (-1, V))
        return linear(gated_norm(y, self.norm, gate).flatten(2), self.wo), State(S)


def fixed(p: Tensor, gen: torch.Generator) -> Tensor:
    """log(1 - 2^(-5-h)): head h looks back some 2^(5+h) tokens."""
    return p.copy_(torch.log1p(-2.0 ** (-5.0 - torch.arange(len(p)))))


TINY = [Spec(heads=4, key_dim=8, value_dim=16, theta=100.0),
        Spec(heads=4, key_dim=8, value_dim=8, decay="scalar", theta=0.0)]
