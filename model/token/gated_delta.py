"""Gated DeltaNet (arXiv:2412.06464): a matrix state per head, decayed by one gate, corrected by the delta rule."""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stepladder.model.config import ModelConfig, Place
from stepladder.model.context import Context
from stepladder.model.leaf import constant, normal, rates, time_steps, uniform
from stepladder.model.mixer import Recurrent
from stepladder.ops import conv, delta
from stepladder.ops.linear import linear, linears, promote
from stepladder.ops.norm import gated_norm


@dataclass(frozen=True)
class Spec:
    heads: int                       # of queries and keys
    key_dim: int                     # per head
    value_dim: int                   # per head
    value_heads: int = 0             # neighbouring ones share a query and a key; 0: as many as heads
    taps: int = 4                    # of the convolution over queries, keys and values
    negative: bool = False           # beta up to 2: eigenvalues down to -1, states that can flip (arXiv:2411.12537)
    kind: str = "gated_delta"

    def __post_init__(self) -> None:
        for name in ("heads", "key_dim", "value_dim", "taps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if self.value_heads < 0 or self.value_heads % self.heads:
            raise ValueError(f"value_heads = {self.value_heads} is no multiple of heads = {self.heads}; "
                             "0 means as many")


class State(NamedTuple):
    S: Tensor                        # (B, H, K, V) at least fp32; H value heads
    before: Tensor                   # (B, W - 1, C) what the convolution still needs of its last inputs


class Mixer(Recurrent):
    State = State
    wq: Tensor                       # (G*K, D)
    wk: Tensor                       # (G*K, D)
    wv: Tensor                       # (H*V, D)
    conv_q: Tensor                   # (G*K, W)
    conv_k: Tensor                   # (G*K, W)
    conv_v: Tensor                   # (H*V, W)
    wa: Tensor                       # (H, D) decay
    dt_bias: Tensor                  # (H,)
    A_log: Tensor                    # (H,)
    wb: Tensor                       # (H, D) beta
    out_gate: Tensor                 # (H*V, D)
    norm: Tensor                     # (V,) shared by the heads
    wo: Tensor                       # (D, H*V)

    def __init__(self, cfg: ModelConfig, spec: Spec, place: Place):
        super().__init__()
        D, G, K, V, W = cfg.width, spec.heads, spec.key_dim, spec.value_dim, spec.taps
        H, taps = spec.value_heads or G, uniform(-W**-0.5, W**-0.5)
        self.spec = spec
        self.weight("wq", G * K, D, tp=0, units=G, init=normal(cfg.std))
        self.weight("wk", G * K, D, tp=0, units=G, init=normal(cfg.std))
        self.weight("wv", H * V, D, tp=0, units=G, init=normal(cfg.std))
        self.weight("conv_q", G * K, W, tp=0, units=G, init=taps)
        self.weight("conv_k", G * K, W, tp=0, units=G, init=taps)
        self.weight("conv_v", H * V, W, tp=0, units=G, init=taps)
        self.weight("wa", H, D, tp=0, units=G, init=normal(cfg.std))
        self.weight("dt_bias", H, tp=0, units=G, init=time_steps())
        self.weight("A_log", H, tp=0, units=G, init=rates(0.0, 16.0))
        self.weight("wb", H, D, tp=0, units=G, init=normal(cfg.std))
        self.weight("out_gate", H * V, D, tp=0, units=G, init=normal(cfg.std))
        self.weight("norm", V, init=constant(1.0))
        self.weight("wo", D, H * V, tp=1, units=G, init=normal(cfg.std / (2 * place.layers) ** 0.5))

    def begin(self, batch: int, length: int, like: Tensor) -> State:
        K, V, H = self.spec.key_dim, self.spec.value_dim, self.wa.shape[0]
        C = self.wq.shape[0] + self.wk.shape[0] + self.wv.shape[0]
        return State(promote(like.new_empty(0)).new_zeros(batch, H, K, V), like.new_zeros(batch, self.spec.taps - 1, C))

    def flops(self, T: int) -> int:
        return 6 * self.wv.shape[0] * self.spec.key_dim

    def mix(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        K, V = self.spec.key_dim, self.spec.value_dim
        qkv, ab, gate = linears(x, (self.wq, self.wk, self.wv), (self.wa, self.wb), self.out_gate)
        taps, sizes = torch.cat([self.conv_q, self.conv_k, self.conv_v]), [len(w) for w in (self.wq, self.wk, self.wv)]
        *qkv, before = conv.activated(qkv, taps, ctx.start, state.before, None, sizes, (K**-0.5, 1.0), K)
        q, k, v = (z.unflatten(-1, (-1, n)) for z, n in zip(qkv, (K, K, V), strict=True))
        a, beta = promote(ab).chunk(2, -1)                                              # (B, T, H)
        g = -self.A_log.exp() * F.softplus(a + self.dt_bias)
        beta = beta.sigmoid() * (2 if self.spec.negative else 1)
        y, S = delta.mix(q, k, v, g, beta, ctx.start, state.S, x.dtype)
        gate = gate.unflatten(-1, (-1, V))
        return linear(gated_norm(y, self.norm, gate).flatten(2), self.wo), State(S, before)


TINY = [Spec(heads=4, key_dim=8, value_dim=16),
        Spec(heads=4, key_dim=8, value_dim=8, value_heads=8, taps=3, negative=True)]
