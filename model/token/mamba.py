"""Mamba (arXiv:2312.00752): every channel has a small state; what is written, read and kept depends on the token."""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stepladder.model.config import ModelConfig, Place
from stepladder.model.context import Context
from stepladder.model.leaf import constant, normal, time_steps, uniform
from stepladder.model.mixer import Recurrent
from stepladder.ops import conv, scan
from stepladder.ops.linear import linear, linears, promote


@dataclass(frozen=True)
class Spec:
    inner: int                       # channels; published: 2 width
    state: int = 16                  # entries of a channel's state
    rank: int = 0                    # of the projection to step sizes; 0: width / 16, rounded up
    taps: int = 4                    # of the convolution over the channels
    kind: str = "mamba"

    def __post_init__(self) -> None:
        for name in ("inner", "state", "taps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if self.rank < 0:
            raise ValueError(f"rank = {self.rank} must not be negative; 0 means width / 16")


class State(NamedTuple):
    h: Tensor                        # (B, E, N) at least fp32; E inner channels
    before: Tensor                   # (B, W - 1, E) what the convolution still needs of its last inputs


class Mixer(Recurrent):
    State = State
    wx: Tensor                       # (E, D)
    wz: Tensor                       # (E, D) gate
    conv_x: Tensor                   # (E, W)
    bias_x: Tensor                   # (E,)
    select: Tensor                   # (R + 2N, E) step sizes, B and C
    wdt: Tensor                      # (E, R)
    dt_bias: Tensor                  # (E,)
    A_log: Tensor                    # (E*N,) in one dimension: decays stay fp32 and do not decay
    skip: Tensor                     # (E,)
    wo: Tensor                       # (D, E)

    def __init__(self, cfg: ModelConfig, spec: Spec, place: Place):
        super().__init__()
        D, E, N, W = cfg.width, spec.inner, spec.state, spec.taps
        R, taps = spec.rank or -(-D // 16), uniform(-W**-0.5, W**-0.5)
        self.spec = spec
        self.weight("wx", E, D, tp=0, init=normal(cfg.std))
        self.weight("wz", E, D, tp=0, init=normal(cfg.std))
        self.weight("conv_x", E, W, tp=0, init=taps)
        self.weight("bias_x", E, tp=0, init=taps)
        self.weight("select", R + 2 * N, E, tp=1, init=normal(cfg.std))
        self.weight("wdt", E, R, tp=0, init=uniform(-R**-0.5, R**-0.5))
        self.weight("dt_bias", E, tp=0, init=time_steps())
        self.weight("A_log", E * N, tp=0, units=E, init=lambda p, gen: p.copy_(torch.arange(1, N + 1).log().repeat(E)))
        self.weight("skip", E, tp=0, init=constant(1.0))
        self.weight("wo", D, E, tp=1, init=normal(cfg.std / (2 * place.layers) ** 0.5))

    def begin(self, batch: int, length: int, like: Tensor) -> State:
        E = self.wx.shape[0]
        return State(promote(like.new_empty(0)).new_zeros(batch, E, self.spec.state),
                     like.new_zeros(batch, self.spec.taps - 1, E))

    def flops(self, T: int) -> int:
        return 4 * self.wx.shape[0] * self.spec.state

    def mix(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        N, R = self.spec.state, self.wdt.shape[1]
        z, v = linears(x, self.wz, self.wx)
        v, before = conv.activated(v, self.conv_x, ctx.start, state.before, self.bias_x)
        # What is selected depends on all channels: their ranks' shares are summed here, in the middle of the mixer.
        select = self.comm.total(promote(linear(v.to(x.dtype), self.select)))
        dt, k, q = select.split([R, N, N], -1)
        dt = F.softplus(promote(linear(dt.to(x.dtype), self.wdt)) + self.dt_bias)      # (B, T, E)
        A = -self.A_log.exp().view(-1, N)
        y, h = scan.mix(q, k, v, dt, A, ctx.start, state.h, x.dtype)
        y = (y + self.skip * v) * F.silu(promote(z))
        return linear(y.to(x.dtype), self.wo), State(h, before)


TINY = [Spec(inner=32, state=4)]
