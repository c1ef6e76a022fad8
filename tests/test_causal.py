"""Nothing later changes anything earlier: tokens, and the experts chosen ahead."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor, nn

from stepladder.model.channel.moe import Mixer as MoE
from stepladder.model.config import ModelConfig
from stepladder.model.context import Context
from stepladder.model.decoder import Decoder, blocks
from stepladder.ops.linear import linear
from stepladder.parallel.build import build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel

T = 12


def model(cfg: ModelConfig) -> Decoder:
    return build(cfg, Mesh(Parallel(), torch.device("cpu")), seed=3, dtype=torch.float64).decoder


@torch.no_grad()
def outputs(model: Decoder, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the router logits by which every MoE block chose."""
    routed: list[Tensor] = []
    for block in blocks(model):
        if isinstance(block.channel, MoE):
            def choose(x: Tensor, w: Tensor | None = None, mixer: MoE = block.channel) -> object:
                routed.append(x if w is None else linear(x, w))
                return MoE.choose(mixer, x, w)
            block.channel.choose = choose  # pyright: ignore[reportAttributeAccessIssue]
    return model.finish(model(tokens, Context.plain(tokens.shape[0], T)))[0], routed


@pytest.mark.parametrize("cell", tiny.CELLS, ids="/".join)
def test_a_token_changes_nothing_before_it_and_no_other_row(cell: tuple[str, str, str]) -> None:
    decoder, tokens = model(tiny.config(*cell)), tiny.micro(2, T).tokens
    before = outputs(decoder, tokens)
    for t in (1, 6, T - 1):
        other = tokens.clone()
        other[0, t] = (other[0, t] + 1) % tiny.VOCAB
        after = outputs(decoder, other)
        for a, b in zip((before[0], *before[1]), (after[0], *after[1]), strict=True):
            torch.testing.assert_close(b[0, :t], a[0, :t], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(b[1], a[1], rtol=1e-12, atol=1e-12)
        assert (after[0][0, t] - before[0][0, t]).abs().max() > 1e-3


def routers(decoder: Decoder) -> list[int]:
    return [len(b.channel.routers) for b in blocks(decoder) if isinstance(b.channel, MoE)]


@torch.no_grad()
def disturb(parts: Iterable[nn.Module]) -> None:
    for p in (p for part in parts for p in part.parameters()):
        p.mul_(torch.rand(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())) + 0.5)


def after_input(decoder: Decoder, first: int, stop: int) -> list[nn.Module]:
    """All that computes between the channel input of block `first` and the experts of block `stop`."""
    body = list(blocks(decoder))
    start, end = body[first].channel, body[stop]
    assert isinstance(start, MoE)
    return [start.experts, *body[first + 1:stop], end.token, end.norm1, end.norm2]


@pytest.mark.parametrize("lag", [*tiny.LAGS, "mixed"])
def test_pre_gated_experts_depend_on_nothing_after_the_input_of_the_block_before(lag: str) -> None:
    decoder, tokens = model(tiny.config("gla0", "between", lag, layers=6)), tiny.micro(2, T).tokens      # MoE: 0, 2, 4
    before, (_, second, third) = outputs(decoder, tokens)
    disturb(after_input(decoder, 2, 4))
    after, (_, same, same_too) = outputs(decoder, tokens)
    assert torch.equal(second, same)
    assert torch.equal(third, same_too)
    assert (after - before).abs().max() > 1e-3
    disturb(after_input(decoder, 0, 2))
    _, (_, same, changed) = outputs(decoder, tokens)
    assert torch.equal(second, same)
    assert (changed - third).abs().max() > 1e-3


def test_experts_chosen_two_blocks_ahead_depend_on_the_first_input_alone() -> None:
    cfg = tiny.config("attention0", "moe1", "ladder", layers=4)
    cfg = replace(cfg, blocks={k: replace(b, channel=replace(b.channel, ahead=2)) for k, b in cfg.blocks.items()})
    decoder, tokens = model(cfg), tiny.micro(2, T).tokens
    assert routers(decoder) == [3, 1, 0, 0]
    _, (_, second, third, fourth) = outputs(decoder, tokens)
    disturb(after_input(decoder, 0, 2))                      # the router of block 1 too: it chooses for block 3
    _, (_, same, same_too, changed) = outputs(decoder, tokens)
    assert torch.equal(second, same)
    assert torch.equal(third, same_too)
    assert (changed - fourth).abs().max() > 1e-3


def test_the_last_blocks_of_a_pre_gated_model_have_no_router_to_spare() -> None:
    decoder = model(tiny.config("attention0", "between", "standard", layers=6))
    assert routers(decoder) == [2, 1, 0]                     # the first chooses for itself and the next
