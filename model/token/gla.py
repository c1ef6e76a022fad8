"""Gated linear attention (arXiv:2312.06635): a matrix state per head, decayed by a learned gate per key channel."""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from stepladder.model.config import ModelConfig, Place
from stepladder.model.context import Context
from stepladder.model.leaf import constant, normal
from stepladder.model.mixer import Recurrent
from stepladder.ops import gla
from stepladder.ops.linear import linear, linears, promote
from stepladder.ops.norm import gated_norm


@dataclass(frozen=True)
class Spec:
    heads: int                       # each with a state of key_dim x value_dim
    key_dim: int                     # per head
    value_dim: int                   # per head
    gate_rank: int = 16              # width of the low-rank decay projection
    tau: float = 16.0                # log decays are divided by tau, so that heads start out remembering
    kind: str = "gla"

    def __post_init__(self) -> None:
        for name in ("heads", "key_dim", "value_dim", "gate_rank", "tau"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")


class State(NamedTuple):
    S: Tensor                        # (B, H, K, V) at least fp32


class Mixer(Recurrent):
    State = State
    wq: Tensor                       # (H*K, D)
    wk: Tensor                       # (H*K, D)
    wv: Tensor                       # (H*V, D)
    gate_down: Tensor                # (R, D)
    gate_up: Tensor                  # (H*K, R)
    gate_bias: Tensor                # (H*K,)
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
        self.weight("gate_down", spec.gate_rank, D, init=normal(cfg.std))
        self.weight("gate_up", H * K, spec.gate_rank, tp=0, units=H, init=normal(cfg.std))
        self.weight("gate_bias", H * K, tp=0, units=H, init=constant(0.0))
        self.weight("out_gate", H * V, D, tp=0, units=H, init=normal(cfg.std))
        self.weight("norm", V, init=constant(1.0))
        self.weight("wo", D, H * V, tp=1, units=H, init=normal(cfg.std / (2 * place.layers) ** 0.5))

    def begin(self, batch: int, length: int, like: Tensor) -> State:
        K, V = self.spec.key_dim, self.spec.value_dim
        return State(promote(like.new_empty(0)).new_zeros(batch, self.wq.shape[0] // K, K, V))

    def flops(self, T: int) -> int:
        return 4 * self.wq.shape[0] * self.spec.value_dim

    def mix(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        K, V = self.spec.key_dim, self.spec.value_dim
        q, k, v, gate, g = linears(x, self.wq, self.wk, self.wv, self.out_gate, self.gate_down)
        q, k, v, gate = (z.unflatten(-1, (-1, n)) for z, n in zip((q, k, v, gate), (K, K, V, V), strict=True))
        g = promote(linear(g, self.gate_up)) + self.gate_bias
        g = (F.logsigmoid(g) / self.spec.tau).unflatten(-1, (-1, K))
        y, S = gla.mix(q, k, v, g, ctx.start, state.S)
        return linear(gated_norm(y, self.norm, gate).flatten(2), self.wo), State(S)


TINY = [Spec(heads=4, key_dim=8, value_dim=16)]
