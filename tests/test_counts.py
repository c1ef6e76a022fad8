"""Parameters and FLOPs are computed from declarations: checked against what is built and what torch counts."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import ranks
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepladder.model.config import BlockConfig, ModelConfig
from stepladder.model.context import Context
from stepladder.model.decoder import Decoder, flops, parameters
from stepladder.ops import delta, gla, scan, ssd
from stepladder.parallel.build import build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.shard import local
from stepladder.parallel.support import Parallel

CPU = torch.device("cpu")
each_model = pytest.mark.parametrize(("token", "channel"), dict.fromkeys(cell[:2] for cell in tiny.CELLS))


def one_rank(cfg: ModelConfig) -> Decoder:
    return build(cfg, Mesh(Parallel(), CPU), seed=3, dtype=torch.float64).decoder       # fp64: experts run by the loop


@pytest.mark.parametrize("tied", [False, True])
@each_model
def test_parameters_are_those_of_the_built_module(token: str, channel: str, tied: bool) -> None:
    cfg = tiny.config(token, channel, "ladder", tied=tied)
    total, active = parameters(cfg)
    assert total == sum(p.numel() for p in one_rank(cfg).parameters())
    moes = [b.channel for b in cfg.kinds() if b.channel.kind == "moe"]
    assert active == total - sum((m.experts - m.top_k) * 3 * m.hidden * cfg.width for m in moes)


def pairs(block: BlockConfig, T: int) -> float:
    """Keys a query sees, mean over a row of T."""
    window = block.token.window or T
    return sum(min(t + 1, window) for t in range(T)) / T


def convolved(t: Any, channels: int) -> int:
    return 2 * t.taps * channels


OUTER: dict[str, Callable[[Any], int]] = {     # products of vectors by element: k v^T, and convolutions
    "gla": lambda t: 2 * t.heads * t.key_dim * t.value_dim,
    "gated_delta": lambda t: 2 * (t.value_heads or t.heads) * t.key_dim * t.value_dim + convolved(
        t, 2 * t.heads * t.key_dim + (t.value_heads or t.heads) * t.value_dim),
    "deltanet": lambda t: 2 * t.heads * t.key_dim * t.value_dim + convolved(
        t, t.heads * (2 * t.key_dim + t.value_dim)),
    "mamba2": lambda t: 2 * t.heads * t.key_dim * t.value_dim + convolved(
        t, t.heads * t.value_dim + 2 * t.groups * t.key_dim),
    "retention": lambda t: 2 * t.heads * t.key_dim * t.value_dim,
    "mamba": lambda t: 2 * t.inner * t.state + convolved(t, t.inner),
}


@pytest.mark.parametrize("T", [1, 4, 16, 33])
@each_model
@torch.no_grad()
def test_flops_are_those_torch_counts(token: str, channel: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the counter's habits are corrected for: it counts masked products whole, and outer products not at all."""
    cfg = tiny.config(token, channel, "ladder", tied=channel == "moe0")
    for op in (gla, delta, ssd, scan):
        monkeypatch.setattr(op, "chunked", op.recurrent)              # the definition has no products but its own
    model = one_rank(cfg)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):        # fused kernels count as zero
        model.finish(model(tiny.micro(1, T).tokens, Context.plain(1, T)))
    want = counter.get_total_flops() / T
    for block in cfg.kinds():
        t = block.token
        if t.kind == "attention":
            want += 4 * t.heads * t.head_dim * (pairs(block, T) - T)   # q k^T and p v
        else:
            want += OUTER[t.kind](t)
    assert abs(flops(cfg, T) - want) < cfg.layers                     # whole numbers


def test_flops_of_a_long_row_are_quadratic_for_attention_and_constant_for_windows_and_recurrence() -> None:
    def mixing(token: str) -> float:
        cfg = tiny.config(token)
        return (flops(cfg, 4096) - flops(cfg, 2048)) / (flops(cfg, 2048) - flops(cfg, 1024) or 1)

    assert mixing("attention0") == pytest.approx(2.0, rel=1e-2)
    windowed = replace(tiny.config("attention1"), vocab=8)
    assert flops(windowed, 4096) == pytest.approx(flops(windowed, 1024), rel=1e-2)
    assert mixing("gla0") == 0.0


def pieces(rank: int, n: int, cfg: ModelConfig, layout: Parallel) -> float:
    parts = build(cfg, Mesh(layout, CPU, rank, n), seed=3)
    return sum(local(p).numel() / parts.copies(name) for name, p in parts.parameters().items())


@pytest.mark.parametrize("layout", [Parallel(tp=2), Parallel(tp=2, ep=2), Parallel(pp=2), Parallel(ep=2),
                                    Parallel(shard=False)], ids=["tp", "tp-ep", "pp", "ep-fsdp", "ddp"])
def test_pieces_over_all_ranks_add_up_to_the_model(layout: Parallel) -> None:
    """A piece that several ranks hold counts by its copies: so does the global gradient norm."""
    cfg = tiny.config("attention1", "between", "mixed")               # one kv head, shared by the tp ranks
    assert sum(ranks.run(2, pieces, cfg, layout)) == pytest.approx(parameters(cfg)[0])
