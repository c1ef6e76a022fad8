"""The two kinds of mixer a block is made of."""
from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepladder.model.context import Context
from stepladder.model.leaf import Leaf
from stepladder.model.residual import Pending, Stats


class TokenMixer(Leaf):
    """Mixes along the row. model/token/<name>.py: Spec, State, Mixer, TINY; one line in registry.TOKEN."""
    State: type            # what begin() makes: a NamedTuple of tensors, batch first
    spec: Any

    def table(self, ctx: Context, dtype: torch.dtype) -> Any:
        """What every layer with this Spec needs of the positions; made once a pass and handed back as ctx.table."""
        return None

    @abstractmethod
    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Parallel form: x (B, T, D) -> this rank's share of y (B, T, D)."""

    @abstractmethod
    def begin(self, batch: int, length: int, like: Tensor) -> Any:
        """Empty State for `batch` rows of up to `length` tokens; what keeps every token has room for no more."""

    @abstractmethod
    def step(self, x: Tensor, state: Any, ctx: Context) -> Tensor:
        """Recurrent form: S >= 1 more tokens of each row; the state is updated in place."""

    def own(self, state: Any) -> None:
        """Raises ValueError if the state is another mixer's."""
        if not isinstance(state, self.State):
            its, ours = (c.__module__.rpartition(".")[2] for c in (type(state), self.State))
            raise ValueError(f"{ours} was given a state of {its}; give every layer what its own begin() made")

    @abstractmethod
    def flops(self, T: int) -> int:
        """Forward FLOPs a token of mixing alone, mean over a row of T tokens; weight products come from the shapes."""


class Recurrent(TokenMixer):
    """A token mixer that remembers its state and nothing else: mix() is both of its forms."""

    @abstractmethod
    def mix(self, x: Tensor, state: Any, ctx: Context) -> tuple[Tensor, Any]:
        """x (B, T, D) and a state -> this rank's share of y (B, T, D), and the state after it.

        Kernels that decode, so without gradients, make the new state in place of the old one.
        """

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.mix(x, self.begin(x.shape[0], 0, x), ctx)[0]

    def step(self, x: Tensor, state: Any, ctx: Context) -> Tensor:
        self.own(state)
        y, new = self.mix(x, state, ctx)
        for z, z_new in zip(state, new, strict=True):
            z.copy_(z_new)
        return y


class Plan(NamedTuple):
    """Where a channel mixer sends its tokens; made beside the token mixer where the wiring allows it."""
    route: tuple[Tensor, ...] = ()      # router logits for the MoE blocks after this one
    stats: Stats | None = None
    way: Any = None                     # the mixer's own, for forward()
    back: Any = None                    # the mixer's own, for deliver()


class ChannelMixer(Leaf):
    """Mixes within a token. model/channel/<name>.py: Spec, Mixer, TINY; one line in registry.CHANNEL."""
    tokens: str = "all"    # "all": all tokens in, this rank's share out; "own": this rank's tokens in, whole rows out

    def foresee(self, route: tuple[Tensor, ...]) -> Any:
        """What router logits made ahead tell before the token mixer runs; plan() gets it back."""
        return None

    def plan(self, x: Pending, route: tuple[Tensor, ...], foreseen: Any = None) -> Plan:
        """Routing alone, and the tokens' departure; dense mixers hand `route` on."""
        return Plan(route)

    @abstractmethod
    def forward(self, x: Tensor, way: Any) -> Any:
        """x (B, T, D) -> y (B, T, D), or what deliver() makes y of."""

    def deliver(self, y: Any, plan: Plan) -> Tensor | Pending:
        """y (B, T, D), perhaps still on its way."""
        return y

    def flops(self) -> int:
        """Forward FLOPs a token of what shapes do not tell: weights split by ep are not counted from shapes."""
        return 0
