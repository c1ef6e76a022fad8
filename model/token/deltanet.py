"""DeltaNet (arXiv:2406.06484): a matrix state per head that is corrected by the delta rule and never decays."""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.model.config import ModelConfig, Place
from stepladder.model.context import Context
from stepladder.model.leaf import constant, normal, uniform
from stepladder.model.mixer import Recurrent
from stepladder.ops import conv, delta
from stepladder.ops.linear import linear, linears, promote
from stepladder.ops.norm import rms_norm


@dataclass(frozen=True)
class Spec:
    heads: int                       # each with a state of key_dim x value_dim
    key_dim: int                     # per head
    value_dim: int                   # per head
    taps: int = 4                    # of the convolution over queries, keys and values
    negative: bool = False           # beta up to 2: eigenvalues down to -1, states that can flip (arXiv:2411.12537)
    kind: str = "deltanet"

    def __post_init__(self) -> None:
        for name in ("heads", "key_dim", "value_dim", "taps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")


class State(NamedTuple):
    S: Tensor                        # (B, H, K, V) at least fp32
    before: Tensor                   # (B, W - 1, C) what the convolution still needs of its last inputs


class Mixer(Recurrent):
    State = State
    wq: Tensor                       # (H*K, D)
    wk: Tensor                       # (H*K, D)
    wv: Tensor                       # (H*V, D)
    conv_q: Tensor                   # (H*K, W)
    conv_k: Tensor                   # (H*K, W)
    conv_v: Tensor                   # (H*V, W)
    wb: Tensor                       # (H, D) beta
    norm: Tensor                     # (V,) shared by the heads
    wo: Tensor                       # (D, H*V)

    def __init__(self, cfg: ModelConfig, spec: Spec, place: Place):
        super().__init__()
        D, H, K, V, W = cfg.width, spec.heads, spec.key_dim, spec.value_dim, spec.taps
        taps = uniform(-W**-0.5, W**-0.5)
        self.spec = spec
        self.weight("wq", H * K, D, tp=0, units=H, init=normal(cfg.std))
        self.weight("wk", H * K, D, tp=0, units=H, init=normal(cfg.std))
        self.weight("wv", H * V, D, tp=0, units=H, init=normal(cfg.std))
        self.weight("conv_q", H * K, W, tp=0, units=H, init=taps)
        self.weight("conv_k", H * K, W, tp=0, units=H, init=taps)
        self.weight("conv_v", H * V, W, tp=0, units=H, init=taps)
        self.weight("wb", H, D, tp=0, units=H, init=normal(cfg.std))
        self.weight("norm", V, init=constant(1.0))
        self.weight("wo", D, H * V, tp=1, units=H, init=normal(cfg.std / (2 * place.layers) ** 0.5))

    def begin(self, batch: int, length: int, like: Tensor) -> State:
        K, V, H = self.spec.key_dim, self.spec.value_dim, self.wb.shape[0]
        C = self.wq.shape[0] + self.wk.shape[0] + self.wv.shape[0]
        return State(promote(like.new_empty(0)).new_zeros(batch, H, K, V), like.new_zeros(batch, self.spec.taps - 1, C))

    def flops(self, T: int) -> int:
        return 6 * self.wv.shape[0] * self.spec.key_dim

    def mix(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        K, V = self.spec.key_dim, self.spec.value_dim
        qkv, beta = linears(x, (self.wq, self.wk, self.wv), self.wb)
        taps, sizes = torch.cat([self.conv_q, self.conv_k, self.conv_v]), [len(w) for w in (self.wq, self.wk, self.wv)]
        *qkv, before = conv.activated(qkv, taps, ctx.start, state.before, None, sizes, (K**-0.5, 1.0), K)
        q, k, v = (z.unflatten(-1, (-1, n)) for z, n in zip(qkv, (K, K, V), strict=True))
        beta = promote(beta).sigmoid() * (2 if self.spec.negative else 1)
        y, S = delta.mix(q, k, v, None, beta, ctx.start, state.S, x.dtype)
        return linear(rms_norm(y, self.norm).to(x.dtype).flatten(2), self.wo), State(S, before)


TINY = [Spec(heads=4, key_dim=8, value_dim=16)]
