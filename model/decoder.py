"""The decoder: embed, blocks, norm, head. A pipeline stage is the same class over a span of layers."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stepladder.model.config import BlockConfig, ModelConfig, Place
from stepladder.model.context import Context
from stepladder.model.leaf import Leaf, constant, declared, normal
from stepladder.model.mixer import ChannelMixer, Plan, TokenMixer
from stepladder.model.registry import CHANNEL, TOKEN, find
from stepladder.model.residual import Comm, OneRank, Stream, apart
from stepladder.ops.linear import linear
from stepladder.ops.loss import cross_entropy
from stepladder.ops.norm import rms_norm

States = dict[str, Any]      # layer -> its token mixer's own state


class Norm(Leaf):
    scale: Tensor            # (D,)

    def __init__(self, width: int):
        super().__init__()
        self.weight("scale", width, init=constant(1.0))

    def forward(self, h: Tensor, *arrived: Tensor) -> tuple[Tensor, Tensor]:
        """Adds to the stream what has arrived and norms it: (h, x). One pass over memory when compiled."""
        h = sum(arrived, h)
        kept, h = (h, h) if torch.compiler.is_compiling() else apart(h)       # compiled, gradients meet in one pass too
        return kept, rms_norm(h, self.scale)

    def read(self, h: Tensor, arrived: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(h, x), whether something has arrived or not."""
        if arrived:
            return self(h, *arrived)
        kept, h = apart(h)            # before what is compiled: that would return h itself, for autograd to add up
        return kept, self(h)[1]


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, block: BlockConfig, place: Place):
        super().__init__()
        self.lag = block.lag
        self.norm1, self.norm2 = Norm(cfg.width), Norm(cfg.width)
        self.token: TokenMixer = find(TOKEN, block.token.kind).Mixer(cfg, block.token, place)
        self.channel: ChannelMixer = find(CHANNEL, block.channel.kind).Mixer(cfg, block.channel, place)
        self.token_comm: Comm = OneRank()
        self.channel_comm: Comm = OneRank()
        # Whether the token, the channel sublayer forgets its activations and computes them again in the backward.
        self.recompute: tuple[bool, bool] = (False, False)

    def forward(self, s: Stream, ctx: Context, state: Any = None) -> Stream:
        foreseen = self.channel.foresee(s.route)
        s, arrived = s.arrive(self.lag[0])
        h, y = _run(self.token_comm.again if self.recompute[0] else None, self.mix, s.h, arrived, ctx, state)
        s = s._replace(h=h)
        joint = self.lag == (0, 1)            # both outputs are made from the same h and travel as one
        if not joint:
            s = s.write(self.token_comm.leave(y))
        s, arrived = s.arrive(self.lag[1])
        again = self.channel_comm.again if self.recompute[1] else None
        h, z, plan = _run(again, self.feed, s.h, arrived, s.route, foreseen)
        s = s._replace(h=h, route=plan.route, stats=s.stats if plan.stats is None else (*s.stats, plan.stats))
        return s.write(self.channel_comm.leave(self.channel.deliver(z, plan), also=y if joint else None))

    def mix(self, h: Tensor, arrived: tuple[Tensor, ...], ctx: Context, state: Any) -> tuple[Tensor, Tensor]:
        h, x = self.norm1.read(h, arrived)
        x = self.token_comm.enter(x)
        if state is None:
            return h, self.token_comm.work(self.token, x, ctx)
        return h, self.token_comm.work(self.token.step, x, state, ctx)

    def feed(self, h: Tensor, arrived: tuple[Tensor, ...], route: tuple[Tensor, ...],
             foreseen: Any) -> tuple[Tensor, Any, Plan]:
        h, x = self.norm2.read(h, arrived)
        x = self.channel_comm.enter(x)
        plan = self.channel.plan(x, route, foreseen)
        return h, self.channel_comm.work(self.channel, x, plan.way), plan


def _run(again: Callable[[], AbstractContextManager[Any]] | None, f: Callable[..., Any], h: Tensor,
         arrived: tuple[Tensor, ...], *args: Any) -> Any:
    """f(h, arrived, *args), which the backward repeats within again()."""
    if again is None:
        return f(h, arrived, *args)
    # It starts at the norm: under sequence parallel the gathered input must not be what is saved. The sum is done
    # before, so that one tensor is saved and not two.
    return checkpoint(f, sum(arrived, h), (), *args, use_reentrant=False, preserve_rng_state=False,
                      context_fn=lambda: (nullcontext(), again()))


class Embedding(Leaf):
    table: Tensor            # (vocab, D), or the rows from `first` on

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.first, self.vocab = 0, cfg.vocab
        self.weight("table", cfg.vocab, cfg.width, tp=0, init=normal(cfg.std))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """tokens (B, T) -> (B, T, D); zeros where another rank holds the row."""
        if self.table.shape[0] == self.vocab:
            return F.embedding(tokens, self.table).to(dtype)
        local = tokens - self.first
        here = (local >= 0) & (local < self.table.shape[0])
        return (F.embedding(local.where(here, 0), self.table) * here.unsqueeze(-1)).to(dtype)


class Head(Leaf):
    table: Tensor            # (vocab, D), or the rows from `first` on; absent where the embedding's is used

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.first, self.z_loss = 0, cfg.z_loss
        self.compiled = False
        if not cfg.tied:
            self.weight("table", cfg.vocab, cfg.width, tp=0, init=normal(cfg.std))

    def forward(self, x: Tensor, tied: Tensor | None, targets: Tensor | None) -> tuple[Tensor, ...]:
        """x (B, T, D) -> (logits,) or, with targets (B, T), (sum of losses, sum of negative log-likelihoods)."""
        table = self.table if tied is None else tied
        if targets is None:
            return (linear(x, table),)
        return cross_entropy(x.flatten(0, 1), table, targets.flatten(), first=self.first, z_loss=self.z_loss,
                             total=self.comm.total, highest=self.comm.highest, compiled=self.compiled)


class Decoder(nn.Module):
    def __init__(self, cfg: ModelConfig, span: range | None = None):
        super().__init__()
        span = range(cfg.layers) if span is None else span
        self.cfg, self.span = cfg, span
        self.dtype = torch.float32                # of the stream; weights are cast to it where they are used
        self.embed = Embedding(cfg) if span.start == 0 or (cfg.tied and span.stop == cfg.layers) else None
        self.blocks = nn.ModuleDict({str(i): Block(cfg, cfg.kinds()[i], place(cfg, i)) for i in span})
        self.norm = Norm(cfg.width) if span.stop == cfg.layers else None
        self.head = Head(cfg) if span.stop == cfg.layers else None
        self.embed_comm: Comm = OneRank()
        self.head_comm: Comm = OneRank()

    def forward(self, x: Tensor | Stream, ctx: Context, states: States | None = None) -> Stream:
        """Tokens (B, T), or the stream of the stage before, through this span's blocks. The one layer loop."""
        if isinstance(x, Stream):
            s = x
        else:
            assert self.embed is not None
            s = Stream(self.embed_comm.leave(self.embed(x, self.dtype)).wait())
        tables: dict[Any, Any] = {}
        for block in blocks(self):
            spec = block.token.spec
            if spec not in tables:
                tables[spec] = block.token.table(ctx, torch.promote_types(self.dtype, torch.float32))

        def run(s: Stream) -> Stream:
            for name, block in zip(self.blocks, blocks(self), strict=True):
                s = block(s, ctx._replace(table=tables[block.token.spec]), states[name] if states is not None else None)
            return s
        return self.embed_comm.aside(run, s)

    def finish(self, s: Stream, targets: Tensor | None = None) -> tuple[Tensor, ...]:
        """The last stage's stream -> (logits (B, T, vocab),), or with targets (loss sum, likelihood sum)."""
        assert self.norm is not None
        assert self.head is not None
        tied = self.embed.table if self.cfg.tied and self.embed is not None else None
        s, arrived = s.arrive(0)
        _, x = self.norm(s.h, *arrived)
        return self.head_comm.work(self.head, self.head_comm.enter(x), tied, targets)

    def begin(self, batch: int, length: int) -> States:
        """Empty decoding states for `batch` rows of up to `length` tokens."""
        like = next(self.parameters()).new_empty(0, dtype=self.dtype)
        return {name: block.token.begin(batch, length, like)
                for name, block in zip(self.blocks, blocks(self), strict=True)}


def place(cfg: ModelConfig, layer: int) -> Place:
    kinds = [b.channel.kind for b in cfg.kinds()]
    return Place(layer, cfg.layers, kinds[:layer].count(kinds[layer]), kinds.count(kinds[layer]))


def parameters(cfg: ModelConfig) -> tuple[int, int]:
    """Parameters in all, and those one token meets (top_k of the experts), without building the weights."""
    model = skeleton(cfg)
    sizes = {name: torch.Size(d.shape).numel() for name, d in declared(model).items()}
    idle = 0
    for layer, block in zip(model.blocks, cfg.kinds(), strict=True):
        if block.channel.kind == "moe":
            held = sum(n for name, n in sizes.items() if name.startswith(f"blocks.{layer}.channel.experts."))
            idle += held * (block.channel.experts - block.channel.top_k) // block.channel.experts
    return sum(sizes.values()), sum(sizes.values()) - idle


class Cost(NamedTuple):
    flops: int               # forward, a token: products with weights and mixing, causal halves not counted
    parameters: int

    def __add__(self, other: Cost) -> Cost:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Cost(self.flops + other.flops, self.parameters + other.parameters)


def costs(cfg: ModelConfig, T: int) -> list[Cost]:
    """Of the embedding, of each layer, and of the final norm with the head; FLOPs are the mean over a row of T."""
    model = skeleton(cfg)
    table = cfg.vocab * cfg.width             # a lookup is no product; a tied head multiplies with a table it lacks
    layers = [_cost(b, b.token.flops(T) + b.channel.flops()) for b in blocks(model)]
    return [Cost(0, table), *layers, Cost(2 * table, cfg.width + (0 if cfg.tied else table))]


def _cost(module: nn.Module, mixing: int) -> Cost:
    sizes = [(torch.Size(d.shape).numel(), len(d.shape) > 1 and d.ep is None) for d in declared(module).values()]
    return Cost(2 * sum(n for n, product in sizes if product) + mixing, sum(n for n, _ in sizes))


def flops(cfg: ModelConfig, T: int) -> int:
    """Forward FLOPs a token, mean over a row of T."""
    return sum(c.flops for c in costs(cfg, T))


def blocks(model: Decoder) -> list[Block]:
    return [b for b in model.blocks.values() if isinstance(b, Block)]


def skeleton(cfg: ModelConfig, span: range | None = None) -> Decoder:
    """The module tree without memory for its weights."""
    with torch.device("meta"):
        return Decoder(cfg, span)
