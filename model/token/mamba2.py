"""Mamba-2 (arXiv:2405.21060): a matrix state per head that one learned step size both decays and writes to."""
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
from stepladder.ops import conv, ssd
from stepladder.ops.linear import linear, linears, promote
from stepladder.ops.norm import EPS, gated_norm


@dataclass(frozen=True)
class Spec:
    heads: int                       # published: 2 width / value_dim
    value_dim: int = 64              # channels of a head
    key_dim: int = 128               # channels of B and C, the size of the state
    groups: int = 1                  # neighbouring heads of a group share B and C, and are normed together
    taps: int = 4                    # of the convolution over x, B and C
    kind: str = "mamba2"

    def __post_init__(self) -> None:
        for name in ("heads", "value_dim", "key_dim", "groups", "taps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if self.heads % self.groups:
            raise ValueError(f"heads = {self.heads} is not divisible by groups = {self.groups}")


class State(NamedTuple):
    S: Tensor                        # (B, H, K, V) at least fp32
    before: Tensor                   # (B, W - 1, C) what the convolution still needs of its last inputs


class Mixer(Recurrent):
    State = State
    wz: Tensor                       # (H*V, D) gate
    wx: Tensor                       # (H*V, D) values
    wB: Tensor                       # (G*K, D) keys
    wC: Tensor                       # (G*K, D) queries
    wdt: Tensor                      # (H, D)
    conv_x: Tensor                   # (H*V, W)
    conv_B: Tensor                   # (G*K, W)
    conv_C: Tensor                   # (G*K, W)
    bias_x: Tensor                   # (H*V,)
    bias_B: Tensor                   # (G*K,)
    bias_C: Tensor                   # (G*K,)
    dt_bias: Tensor                  # (H,)
    A_log: Tensor                    # (H,)
    skip: Tensor                     # (H,)
    norm: Tensor                     # (H*V,)
    wo: Tensor                       # (D, H*V)

    def __init__(self, cfg: ModelConfig, spec: Spec, place: Place):
        super().__init__()
        D, H, V, K, G, W = cfg.width, spec.heads, spec.value_dim, spec.key_dim, spec.groups, spec.taps
        taps, one = uniform(-W**-0.5, W**-0.5), G == 1     # one group is shared by all ranks, several are divided
        self.spec = spec
        self.weight("wz", H * V, D, tp=0, units=H, init=normal(cfg.std))
        self.weight("wx", H * V, D, tp=0, units=H, init=normal(cfg.std))
        self.weight("wB", G * K, D, tp=0, units=G, share=one, init=normal(cfg.std))
        self.weight("wC", G * K, D, tp=0, units=G, share=one, init=normal(cfg.std))
        self.weight("wdt", H, D, tp=0, units=H, init=normal(cfg.std))
        self.weight("conv_x", H * V, W, tp=0, units=H, init=taps)
        self.weight("conv_B", G * K, W, tp=0, units=G, share=one, init=taps)
        self.weight("conv_C", G * K, W, tp=0, units=G, share=one, init=taps)
        self.weight("bias_x", H * V, tp=0, units=H, init=taps)
        self.weight("bias_B", G * K, tp=0, units=G, share=one, init=taps)
        self.weight("bias_C", G * K, tp=0, units=G, share=one, init=taps)
        self.weight("dt_bias", H, tp=0, units=H, init=time_steps())
        self.weight("A_log", H, tp=0, units=H, init=rates(1.0, 16.0))
        self.weight("skip", H, tp=0, units=H, init=constant(1.0))
        self.weight("norm", H * V, tp=0, units=H, init=constant(1.0))
        self.weight("wo", D, H * V, tp=1, units=H, init=normal(cfg.std / (2 * place.layers) ** 0.5))

    def begin(self, batch: int, length: int, like: Tensor) -> State:
        S = promote(like.new_empty(0)).new_zeros(batch, self.wdt.shape[0], self.spec.key_dim, self.spec.value_dim)
        C = self.wx.shape[0] + self.wB.shape[0] + self.wC.shape[0]
        return State(S, like.new_zeros(batch, self.spec.taps - 1, C))

    def flops(self, T: int) -> int:
        return 4 * self.wx.shape[0] * self.spec.key_dim

    def mix(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        K, V = self.spec.key_dim, self.spec.value_dim
        z, xBC, dt = linears(x, self.wz, (self.wx, self.wB, self.wC), self.wdt)
        taps, bias = (torch.cat(w) for w in ((self.conv_x, self.conv_B, self.conv_C),
                                             (self.bias_x, self.bias_B, self.bias_C)))
        sizes = [len(w) for w in (self.wx, self.wB, self.wC)]
        v, k, q, before = conv.activated(xBC, taps, ctx.start, state.before, bias, sizes)
        v, k, q = v.unflatten(-1, (-1, V)), k.unflatten(-1, (-1, K)), q.unflatten(-1, (-1, K))
        dt = F.softplus(promote(dt) + self.dt_bias)                                    # (B, T, H)
        y, S = ssd.mix(q, k, v, -self.A_log.exp() * dt, ctx.start, state.S, x.dtype, dt, self.skip)
        return linear(self.normed(y.flatten(2), z).to(x.dtype), self.wo), State(S, before)

    def normed(self, y: Tensor, z: Tensor) -> Tensor:
        """y and z (B, T, H*V): RMS norm of each group, after the gate; a single group is spread over the ranks."""
        if self.spec.groups == 1 and self.comm.divided:
            y = y * F.silu(promote(z))
            square = self.comm.total(y.square().sum(-1, keepdim=True))
            return y * (square / (self.spec.heads * self.spec.value_dim) + EPS).rsqrt() * self.norm
        groups = self.wB.shape[0] // self.spec.key_dim
        y, z, scale = (x.unflatten(-1, (groups, -1)) for x in (y, z, self.norm))
        return gated_norm(y, scale, z, first=True).flatten(-2)


TINY = [Spec(heads=4, value_dim=8, key_dim=8),
        Spec(heads=8, value_dim=8, key_dim=8, groups=4, taps=2)]
