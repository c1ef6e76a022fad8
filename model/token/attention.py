"""Causal softmax attention with grouped key-value heads (arXiv:2305.13245) and rotary positions (arXiv:2104.09864)."""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stepladder.model.config import ModelConfig, Place
from stepladder.model.context import Context
from stepladder.model.leaf import constant, normal
from stepladder.model.mixer import TokenMixer
from stepladder.ops import attention
from stepladder.ops.linear import linear, linears, promote
from stepladder.ops.norm import rms_norm


@dataclass(frozen=True)
class Spec:
    heads: int                       # of queries
    head_dim: int = 0                # channels of a head, even; 0: width / heads
    kv_heads: int = 0                # of keys and values, each for heads / kv_heads of queries; 0: as many as heads
    window: int = 0                  # keys seen by a query, itself included; 0: all before it
    theta: float = 10_000.0          # RoPE base
    rope_scale: float = 1.0          # positions are divided by this (linear interpolation, arXiv:2306.15595)
    max_length: int = 0              # longest row RoPE is meant for; 0: no limit
    qk_norm: bool = False            # RMS-norm of every query and key head (arXiv:2302.05442)
    kind: str = "attention"

    def __post_init__(self) -> None:
        if self.kv_heads < 0:
            raise ValueError(f"kv_heads = {self.kv_heads} must not be negative; 0 means as many as heads")
        if self.heads < 1 or self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads = {self.heads} is not divisible by kv_heads = {self.kv_heads}")
        if self.head_dim < 0 or self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even and not negative: RoPE turns pairs of channels")
        if self.window < 0:
            raise ValueError(f"window = {self.window} must not be negative; 0 means no window")
        if self.max_length < 0:
            raise ValueError(f"max_length = {self.max_length} must not be negative; 0 means no limit")
        if self.theta <= 0 or self.rope_scale <= 0:
            raise ValueError(f"theta = {self.theta} and rope_scale = {self.rope_scale} must be positive")

    def channels(self, width: int) -> int:
        """Of one head, in a model of `width`."""
        K = self.head_dim or width // self.heads
        if not self.head_dim and (width % self.heads or K % 2):
            raise ValueError(f"width = {width} does not divide into heads = {self.heads} of an even size each; "
                             "set head_dim, or change one of them")
        return K


class State(NamedTuple):
    """A ring of the last L tokens' keys and values; L is the row length, or the window."""
    k: Tensor        # (B, L, G, K)
    v: Tensor        # (B, L, G, K)
    at: Tensor       # (B, L) int64 place of each key in its row; -1: empty
    doc: Tensor      # (B, L) int64 its document
    read: Tensor     # (B,) int64 tokens read so far; on the device, so that a captured step can advance it


class Mixer(TokenMixer):
    State = State
    wq: Tensor       # (H*K, D)
    wk: Tensor       # (G*K, D)
    wv: Tensor       # (G*K, D)
    wo: Tensor       # (D, H*K)
    q_norm: Tensor   # (K,)
    k_norm: Tensor   # (K,)

    def __init__(self, cfg: ModelConfig, spec: Spec, place: Place):
        super().__init__()
        D, K, G = cfg.width, spec.channels(cfg.width), spec.kv_heads or spec.heads
        self.spec, self.head_dim = spec, K
        self.weight("wq", spec.heads * K, D, tp=0, units=spec.heads, init=normal(cfg.std))
        self.weight("wk", G * K, D, tp=0, units=G, share=True, init=normal(cfg.std))
        self.weight("wv", G * K, D, tp=0, units=G, share=True, init=normal(cfg.std))
        self.weight("wo", D, spec.heads * K, tp=1, units=spec.heads, init=normal(cfg.std / (2 * place.layers) ** 0.5))
        if spec.qk_norm:
            self.weight("q_norm", K, init=constant(1.0))
            self.weight("k_norm", K, init=constant(1.0))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        q, k, v = self.project(x, ctx)
        y = attention.causal(q, k, v, ctx.doc, ctx.borders, self.spec.window)
        return linear(y.flatten(2), self.wo)

    def begin(self, batch: int, length: int, like: Tensor) -> State:
        K, L = self.head_dim, min(length, self.spec.window or length)
        kv = like.new_zeros(2, batch, L, self.wk.shape[0] // K, K)
        at = torch.full((batch, L), -1, dtype=torch.long, device=like.device)
        return State(kv[0], kv[1], at, torch.zeros_like(at), at.new_zeros(batch))

    def step(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.own(state)
        q, k, v = self.project(x, ctx)
        self.fits(k, state)
        S, L = x.shape[1], state.k.shape[1]
        at = state.read.unsqueeze(1) + torch.arange(S, device=x.device)                     # (B, S)
        doc = torch.zeros_like(at) if ctx.doc is None else ctx.doc
        new = (k, v, at, doc)
        old = state[:4]
        if self.spec.window:      # keys of this piece may still be needed when they have left the ring: look at both
            k, v, k_at, k_doc = (torch.cat(z, 1) for z in zip(old, new, strict=True))
            y = attention.masked(q, k, v, attention.visible(at, k_at, doc, k_doc, self.spec.window))
        row = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        for ring, z in zip(old, new, strict=True):
            ring[row, at[:, -L:] % L] = z[:, -L:]
        if not self.spec.window:
            y = attention.masked(q, state.k, state.v, attention.visible(at, state.at, doc, state.doc, 0))
        state.read.add_(S)
        return linear(y.flatten(2), self.wo)

    def fits(self, k: Tensor, state: State) -> None:
        """Raises ValueError if tokens of keys k (B, S, G, K) do not fit the state, as far as looking costs no sync."""
        (B, S, *head), (rows, L, *its) = k.shape, state.k.shape
        if (B, head) != (rows, its):
            raise ValueError(f"{B} rows with keys of {(*head,)} were given a state of {rows} rows with keys of "
                             f"{(*its,)}; a state is made by the begin() of the mixer that steps on it")
        if 0 < self.spec.window <= L:
            return                                             # a ring that has all that a query sees is never full
        most = int(state.read.max()) if k.is_cpu and B and not torch.compiler.is_compiling() else 0
        if most + S > L:
            raise ValueError(f"{S} more tokens after {most} do not fit into a state for {L}; begin() it with the "
                             "length that the row will have")

    def flops(self, T: int) -> int:
        W = min(T, self.spec.window or T)
        return 4 * self.wq.shape[0] * (W * T - W * (W - 1) // 2) // T        # keys really seen: causal is halved

    def table(self, ctx: Context, dtype: torch.dtype) -> Tensor:
        return angles(ctx.pos / self.spec.rope_scale, self.head_dim, self.spec.theta).to(dtype)

    def project(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in linears(x, self.wq, self.wk, self.wv))
        if self.spec.qk_norm:
            q, k = rms_norm(q, self.q_norm), rms_norm(k, self.k_norm)
        return rotate(q, ctx.table), rotate(k, ctx.table), v


def angles(pos: Tensor, K: int, theta: float) -> Tensor:
    """pos (B, T) -> cosines and sines (2, B, T, 1, K/2) of pos * theta^(-2i/K), in fp64: long rows need the digits.

    A table, because computed where they are used they cost more than the rotation: 10 ms of a 227 ms step on an H100.
    """
    f = theta ** (-torch.arange(0, K, 2, device=pos.device, dtype=torch.float64) / K)
    a = pos[..., None, None].double() * f
    return torch.stack([a.cos(), a.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (B, T, H, K) with channel pairs (i, i + K/2) turned by the angles of the table, in at least fp32.

    Raises ValueError for a table of other rows.
    """
    if table.shape[1:3] != x.shape[:2]:
        raise ValueError(f"positions {(*table.shape[1:3],)} do not go with tokens {(*x.shape[:2],)}; a context has as "
                         "many as there are tokens")
    (x1, x2), (cos, sin) = promote(x).chunk(2, -1), table
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)


TINY = [Spec(heads=4, kv_heads=2, head_dim=8, theta=100.0),
        Spec(heads=4, kv_heads=1, head_dim=8, window=5, qk_norm=True, rope_scale=2.0)]
