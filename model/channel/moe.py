"""Mixture of experts; with `ahead` the router of one MoE block picks the experts of a later one (arXiv:2308.12066).

The mixer sees this rank's own tokens and returns whole rows. Every rank's experts are a slice of `Experts`; where
tokens have to travel, parallel/expert.py replaces its `exchange`.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from stepladder.model.config import ModelConfig, Place
from stepladder.model.leaf import Leaf, constant, normal
from stepladder.model.mixer import ChannelMixer, Plan
from stepladder.model.residual import Pending, Ready, Stats
from stepladder.ops import experts, rows
from stepladder.ops.compiled import compiled
from stepladder.ops.linear import linear, linears, promote


@dataclass(frozen=True)
class Spec:
    experts: int                     # SwiGLU networks, among which a router chooses for every token
    top_k: int                       # experts that a token visits
    hidden: int                      # channels between the products of one expert
    ahead: int = 0                   # MoE blocks between a router and the experts it chooses; 1: pre-gated, 0: its own
    shared: int = 0                  # hidden width of the expert every token visits; 0: none
    score: str = "softmax"           # or "sigmoid" (arXiv:2412.19437), of the router's logits
    balance: float = 0.01            # coefficient of the per-sequence balance loss
    z_loss: float = 0.001            # coefficient of the router's logsumexp^2 (arXiv:2202.08906)
    bias_rate: float = 0.0           # step of the auxiliary-loss-free balance bias (arXiv:2408.15664); 0: none
    engine: str = "grouped"          # "grouped": torch grouped_mm; "loop": one expert after the other, the reference
    kind: str = "moe"

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k = {self.top_k} must be at least 1 and at most experts = {self.experts}")
        if self.hidden < 1 or self.shared < 0 or self.ahead < 0:
            raise ValueError(f"hidden = {self.hidden} must be positive, shared = {self.shared} and "
                             f"ahead = {self.ahead} not negative")
        if min(self.balance, self.z_loss, self.bias_rate) < 0:
            raise ValueError(f"balance = {self.balance}, z_loss = {self.z_loss}, bias_rate = {self.bias_rate} "
                             "must not be negative")
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"score = {self.score!r} is not 'softmax' or 'sigmoid'")
        if self.engine not in ("grouped", "loop"):
            raise ValueError(f"engine = {self.engine!r} is not 'grouped' or 'loop'")


class Chosen(NamedTuple):
    """Of tokens that are where their experts are."""
    ids: Tensor            # (U, k) among this rank's experts; equal to their number: one of another rank
    weights: Tensor        # (U, k)
    many: int              # how many of the ids are this rank's
    experts: int           # how many it has


class Exchange(Protocol):
    """Carries tokens to the ranks that hold their experts, and back."""

    def announce(self, ids: Tensor, weights: Tensor, experts: int) -> Any:
        """Tell the others which of the `experts` each token goes to, ids and weights (N, k); for dispatch()."""
        ...

    def dispatch(self, x: Tensor, announced: Any) -> tuple[Pending, Chosen, Any]:
        """x (N, D) -> the tokens (U, D) that this rank's experts are chosen by, how, and the way back."""
        ...

    def combine(self, y: Tensor, back: Any) -> Pending:
        """What became of dispatched tokens (U, D) -> (N, D): the sum of what ranks made of each."""
        ...

    def carry(self, y: Tensor) -> Pending:
        """y, from the lane of the experts to that of the stream."""
        ...


class Here:
    """An Exchange where every rank holds all experts."""

    def announce(self, ids: Tensor, weights: Tensor, experts: int) -> Chosen:
        return Chosen(ids, weights, ids.numel(), experts)

    def dispatch(self, x: Tensor, announced: Chosen) -> tuple[Pending, Chosen, Any]:
        return Ready(x), announced, None

    def combine(self, y: Tensor, back: Any) -> Pending:
        return Ready(y)

    def carry(self, y: Tensor) -> Pending:
        return Ready(y)


class Foreseen(NamedTuple):
    """What follows from the router alone. Pre-gated, it is known a block early: the host has read how many tokens will
    come before it needs that, where it otherwise waits for the device."""
    announced: Any         # of the exchange
    stats: Stats


class Way(NamedTuple):
    """To the experts."""
    tokens: Pending        # (U, D)
    order: Tensor          # (M,) by expert, which of their U k choices each row is for
    inverse: Tensor        # (U k,) its row; M or more: none here
    ends: Tensor           # (this rank's experts,) where each one's rows end
    weights: Tensor        # (U, k)


class Back(NamedTuple):
    """And back."""
    exchanged: Any         # what the exchange wants to know
    shape: torch.Size      # (B, T, D)


class Returning(NamedTuple):
    """Outputs on their way from the experts."""
    tokens: Pending        # (B T, D)
    shared: Pending | None
    shape: torch.Size      # (B, T, D)

    def wait(self) -> Tensor:
        y = self.tokens.wait().view(self.shape)
        return y if self.shared is None else y + self.shared.wait()


class Router(Leaf):
    w: Tensor          # (E, D)
    replicated = True  # plan() runs outside the mixer's forward, where FSDP has gathered nothing

    def __init__(self, cfg: ModelConfig, spec: Spec):
        super().__init__()
        self.weight("w", spec.experts, cfg.width, init=normal(cfg.std))

    def forward(self, x: Tensor) -> Tensor:
        return linear(promote(x), self.w)


class Experts(Leaf):
    up: Tensor         # (E, F, D)
    gate: Tensor       # (E, F, D)
    down: Tensor       # (E, D, F)

    def __init__(self, cfg: ModelConfig, spec: Spec, place: Place):
        super().__init__()
        E, H, D = spec.experts, spec.hidden, cfg.width
        self.exchange: Exchange = Here()
        self.hidden, self.engine, self.compiled = H, spec.engine, False
        self.weight("up", E, H, D, ep=0, init=normal(cfg.std))
        self.weight("gate", E, H, D, ep=0, init=normal(cfg.std))
        self.weight("down", E, D, H, ep=0, init=normal(cfg.std / (2 * place.layers) ** 0.5))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows (N, D) sorted by expert, which end at ends (its experts,) -> (N, D) in the same order."""
        if self.engine == "loop" or not experts.can_group(rows, self.hidden):
            return experts.loop(rows, ends, self.up, self.gate, self.down)
        # Dynamic: where rows come from other ranks, N is another every time.
        between = compiled(experts.gated, dynamic=True) if self.compiled else experts.gated
        return experts.grouped(rows, ends, self.up, self.gate, self.down, between)


class Mixer(ChannelMixer):
    tokens = "own"
    bias: Tensor       # (E,) added to the scores for choosing only
    shared_up: Tensor
    shared_gate: Tensor
    shared_down: Tensor

    def __init__(self, cfg: ModelConfig, spec: Spec, place: Place):
        super().__init__()
        self.spec, self.compiled, D = spec, False, cfg.width
        # Block n makes the logits of block n + ahead; the first makes those of the blocks before that too.
        made = range(spec.ahead + 1) if place.nth == 0 else [place.nth + spec.ahead]
        self.routers = nn.ModuleList(Router(cfg, spec) for n in made if n < place.count)
        self.experts = Experts(cfg, spec, place)
        if spec.bias_rate:
            self.weight("bias", spec.experts, init=constant(0.0), learn=False)
        if spec.shared:
            self.weight("shared_up", spec.shared, D, init=normal(cfg.std))
            self.weight("shared_gate", spec.shared, D, init=normal(cfg.std))
            self.weight("shared_down", D, spec.shared, init=normal(cfg.std / (2 * place.layers) ** 0.5))

    def compile(self, *args: Any, **kw: Any) -> None:
        """What lies between collectives and grouped products, which stay calls: some hundred small kernels a pass."""
        self.compiled = self.experts.compiled = True

    def fast(self, f: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(f) if self.compiled else f

    def foresee(self, route: tuple[Tensor, ...]) -> Foreseen | None:
        return self._foresee(route[0]) if route else None

    def plan(self, x: Pending, route: tuple[Tensor, ...], foreseen: Foreseen | None = None) -> Plan:
        tokens = x.wait()
        routers = [*self.routers]
        # Where no block before has chosen for this one, its own router does: the first that it holds.
        foreseen = foreseen or self.foresee(route) or self._foresee(tokens, cast(Router, routers.pop(0)).w)
        later = (*route[1:], *(router(tokens) for router in routers))
        sent, chosen, exchanged = self.experts.exchange.dispatch(tokens.flatten(0, -2), foreseen.announced)
        order, inverse, ends = experts.sort(chosen.ids, chosen.experts)
        way = Way(sent, order[:chosen.many], inverse, ends, chosen.weights)
        return Plan(later, foreseen.stats, way, Back(exchanged, tokens.shape))

    def _foresee(self, x: Tensor, w: Tensor | None = None) -> Foreseen:
        ids, weights, *stats = self.choose(x, w)
        return Foreseen(self.experts.exchange.announce(ids, weights, self.spec.experts), Stats(*stats))

    def choose(self, x: Tensor, w: Tensor | None = None) -> experts.Choice:
        """x (B, T, D) and a router's w, or logits (B, T, E) -> experts of each token, and the auxiliary losses: in one
        piece, if no sum over ranks lies between."""
        spec, bias = self.spec, self.bias if self.spec.bias_rate else None
        if not self.comm.divided:
            return self.fast(experts.route)(x, w, bias, spec.top_k, spec.score, spec.balance, spec.z_loss)
        scores = self.fast(experts.score)(x, w, bias, spec.top_k, spec.score)
        return self.fast(experts.choose)(scores, self.comm.total(scores.counts), spec.balance, spec.z_loss)

    def forward(self, x: Tensor, way: Way) -> tuple[Tensor, Tensor | None]:
        """What this rank's experts made of each token (U, D), and the shared expert's output, made while they travel.

        Weighed here: on the other lane, that would wait for the experts, with all that has nothing to do with them.
        """
        shared = None
        if self.spec.shared:
            gated = self.fast(experts.gated)
            shared = linear(gated(*linears(x, self.shared_gate, self.shared_up)), self.shared_down)
        x = rows.expand(way.tokens.wait(), way.order, way.inverse, self.spec.top_k)
        return rows.weigh(self.experts(x, way.ends), way.order, way.inverse, way.weights), shared

    def deliver(self, y: tuple[Tensor, Tensor | None], plan: Plan) -> Pending:
        (made, shared), (exchanged, shape), exchange = y, plan.back, self.experts.exchange
        return Returning(exchange.combine(made, exchanged), None if shared is None else exchange.carry(shared), shape)

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        """After a step: load (E,) of all ranks; overfull experts become less, underfull more attractive."""
        load = load.to(self.bias.dtype)
        self.bias.add_((load.mean() - load).sign(), alpha=self.spec.bias_rate)

    def flops(self) -> int:
        down = self.experts.decls["down"].shape
        return 6 * self.spec.top_k * down[1] * down[2]


TINY = [Spec(experts=4, top_k=2, hidden=32),
        Spec(experts=4, top_k=2, hidden=32, ahead=1, shared=16, score="sigmoid", bias_rate=0.01)]
