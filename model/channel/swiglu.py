"""SwiGLU feed-forward (arXiv:2002.05202)."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from stepladder.model.config import ModelConfig, Place
from stepladder.model.leaf import normal
from stepladder.model.mixer import ChannelMixer
from stepladder.ops.linear import linear, linears


@dataclass(frozen=True)
class Spec:
    hidden: int                      # channels between the products, often 8/3 width
    kind: str = "swiglu"

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden = {self.hidden} must be positive")


class Mixer(ChannelMixer):
    up: Tensor         # (F, D)
    gate: Tensor       # (F, D)
    down: Tensor       # (D, F)

    def __init__(self, cfg: ModelConfig, spec: Spec, place: Place):
        super().__init__()
        self.weight("up", spec.hidden, cfg.width, tp=0, init=normal(cfg.std))
        self.weight("gate", spec.hidden, cfg.width, tp=0, init=normal(cfg.std))
        self.weight("down", cfg.width, spec.hidden, tp=1, init=normal(cfg.std / (2 * place.layers) ** 0.5))

    def forward(self, x: Tensor, way: None = None) -> Tensor:
        gate, up = linears(x, self.gate, self.up)
        return linear(F.silu(gate) * up, self.down)


TINY = [Spec(hidden=64)]
