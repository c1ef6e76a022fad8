"""Model configuration. A mixer's own knobs are in the mixer's file, not here."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class BlockConfig:
    """A kind of block, under a name of yours: a token mixer, a channel mixer, and how they are wired."""
    token: Any                        # its token mixer, which moves between positions: kind and knobs
    channel: Any                      # its channel mixer, which works within a position: kind and knobs
    lag: tuple[int, int] = (0, 0)     # how many mixers' outputs may still be on their way to the residual stream when
                                      # the token mixer reads it, and when the channel mixer does: [0, 0] is standard
                                      # wiring, [0, 1] parallel (both mixers side by side), [1, 1] ladder residual

    def __post_init__(self) -> None:
        if self.lag not in ((0, 0), (0, 1), (1, 1)):
            raise ValueError(f"lag {list(self.lag)} is not one of [0, 0] (standard), [0, 1] (parallel), "
                             "[1, 1] (ladder)")


@dataclass(frozen=True)
class ModelConfig:
    """The decoder: blocks one above the other, which read and add to one residual stream."""
    vocab: int                        # rows of the embedding and of the head; at least the tokenizer's
    width: int                        # channels of the residual stream
    layers: int                       # blocks, one above the other
    blocks: dict[str, BlockConfig]
    pattern: tuple[str, ...]          # names from `blocks`, repeated over the depth
    tied: bool = False                # the head is the embedding table
    std: float = 0.02                 # of the initial weights; projections into the stream get std / sqrt(2 layers)
    z_loss: float = 0.0               # coefficient of mean(logsumexp(logits)^2) in the loss

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)} must be at least 1")
        if self.std <= 0 or self.z_loss < 0:
            raise ValueError(f"model.std = {self.std} must be above 0 and model.z_loss = {self.z_loss} not negative")
        if not self.pattern:
            raise ValueError("model.pattern is empty; name at least one block of [model.blocks]")
        for name in self.pattern:
            if name not in self.blocks:
                raise ValueError(f"model.pattern names block {name!r}; [model.blocks] has {', '.join(self.blocks)}")

    def kinds(self) -> list[BlockConfig]:
        """The block of every layer, first to last."""
        return [self.blocks[self.pattern[i % len(self.pattern)]] for i in range(self.layers)]


class Place(NamedTuple):
    """Where a block stands; `nth` of `count` blocks whose channel mixer is of the same kind."""
    layer: int
    layers: int
    nth: int
    count: int
