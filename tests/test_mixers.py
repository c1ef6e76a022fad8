"""What holds for every mixer of the registry, in every wiring, on one rank."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise, permutations
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from stepladder.model.channel.moe import Mixer as MoE
from stepladder.model.config import ModelConfig
from stepladder.model.context import Context, borders
from stepladder.model.decoder import Block, Decoder, blocks
from stepladder.model.mixer import TokenMixer
from stepladder.model.residual import Ready
from stepladder.ops.compiled import compiled
from stepladder.ops.norm import rms_norm
from stepladder.parallel.build import Parts, build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.pipeline import Micro
from stepladder.parallel.support import Parallel

each_cell = pytest.mark.parametrize("cell", tiny.CELLS, ids="/".join)


def one_rank(cfg: ModelConfig, dtype: torch.dtype = torch.float64, recompute: str = "none") -> Parts:
    return build(cfg, Mesh(Parallel(), torch.device("cpu")), seed=3, dtype=dtype, recompute=recompute)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10, what: str = "") -> None:
    error = float((got - want).detach().norm() / want.detach().norm())
    assert error < tolerance, f"{what} is off by {error:.1e}"


def token_mixer(token: str) -> TokenMixer:
    return blocks(one_rank(tiny.config(token, layers=1), torch.float32).decoder)[0].token


def with_channel(cfg: ModelConfig, **knobs: object) -> ModelConfig:
    """The same model with these knobs in every channel mixer that has them."""
    def turn(spec: Any) -> Any:
        return replace(spec, **{k: v for k, v in knobs.items() if hasattr(spec, k)})
    return replace(cfg, blocks={k: replace(b, channel=turn(b.channel)) for k, b in cfg.blocks.items()})


def gradients(parts: Parts, micros: list[Micro]) -> dict[str, Tensor]:
    parts.pipe(micros)
    out = {name: p.grad for name, p in parts.parameters().items() if p.requires_grad}
    for p in parts.parameters().values():
        p.grad = None
    assert all(g is not None for g in out.values())
    return out  # pyright: ignore[reportReturnType]


def logits(model: Decoder, tokens: Tensor, ctx: Context, states: dict[str, Any] | None = None) -> Tensor:
    return model.finish(model(tokens, ctx, states))[0]


def documents(m: Micro) -> Context:
    assert m.start is not None
    return Context.packed(m.start)


def split(ctx: Context, a: int, b: int) -> Context:
    return Context(ctx.pos[:, a:b], ctx.start[:, a:b], None if ctx.doc is None else ctx.doc[:, a:b])


# Recurrent form

PIECES = {"token by token": range(14), "a prompt, then tokens": (0, 10, 11, 12, 13), "uneven": (0, 1, 4, 12, 13)}


@each_cell
@torch.no_grad()
def test_recurrent_form_equals_parallel_form_for_any_split(cell: tuple[str, str, str]) -> None:
    model, m = one_rank(tiny.config(*cell)).decoder, tiny.micro(2, 13)
    for ctx in (Context.plain(2, 13), documents(m)):
        want = logits(model, m.tokens, ctx)
        for name, at in PIECES.items():
            states = model.begin(2, 13)
            got = [logits(model, m.tokens[:, a:b], split(ctx, a, b), states) for a, b in pairwise(at)]
            close(torch.cat(got, 1), want, what=name)


@pytest.mark.parametrize("token", tiny.TOKENS)
@torch.no_grad()
def test_decoding_knows_its_place_from_the_tokens_read(token: str) -> None:
    model, m = one_rank(tiny.config(token)).decoder, tiny.micro(2, 13)
    states, read = model.begin(2, 20), torch.zeros(2, dtype=torch.long)
    got = []
    for a, b in ((0, 9), (9, 10), (10, 13)):
        got.append(logits(model, m.tokens[:, a:b], Context.after(read, b - a), states))
        read += b - a
    close(torch.cat(got, 1), logits(model, m.tokens, Context.plain(2, 13)))


@pytest.mark.parametrize("token", tiny.TOKENS)
@torch.no_grad()
def test_state_is_updated_in_place(token: str) -> None:
    """A captured graph replays on the same memory."""
    model, m = one_rank(tiny.config(token)).decoder, tiny.micro(2, 8)
    states = model.begin(2, 8)
    before = {name: [(z.data_ptr(), z.clone()) for z in state] for name, state in states.items()}
    for a, b in ((0, 7), (7, 8)):
        logits(model, m.tokens[:, a:b], split(Context.plain(2, 8), a, b), states)
    for name, state in states.items():
        assert [z.data_ptr() for z in state] == [at for at, _ in before[name]]
        assert any(not torch.equal(z, old) for z, (_, old) in zip(state, before[name], strict=True))


@pytest.mark.parametrize("token", tiny.TOKENS)
def test_a_state_of_another_mixer_is_refused(token: str) -> None:
    kind, x = tiny.TOKENS[token].kind, torch.zeros(2, 3, tiny.WIDTH)
    other = "gla0" if kind == "attention" else "attention0"
    said = f"{kind} was given a state of {tiny.TOKENS[other].kind}; give every layer what its own begin"
    with pytest.raises(ValueError, match=said):
        token_mixer(token).step(x, token_mixer(other).begin(2, 8, x), Context.plain(2, 3))


@pytest.mark.parametrize("token", tiny.TOKENS)
def test_a_state_of_other_rows_is_refused(token: str) -> None:
    own, x, ctx = token_mixer(token), torch.zeros(2, 3, tiny.WIDTH), Context.plain(2, 3)
    with pytest.raises(ValueError, match="a state is made by the begin"):
        own.step(x, own.begin(3, 8, x), ctx._replace(table=own.table(ctx, x.dtype)))


@pytest.mark.parametrize("token", tiny.TOKENS)
def test_tokens_of_other_rows_than_their_context_says_are_refused(token: str) -> None:
    own, x = token_mixer(token), torch.zeros(2, 3, tiny.WIDTH)
    for ctx in (Context.plain(2, 4), Context.plain(3, 3)):
        with pytest.raises(ValueError, match=r"do(es)? not go"):
            own(x, ctx._replace(table=own.table(ctx, x.dtype)))


@pytest.mark.parametrize(("token", "length", "pieces", "fits"), [
    ("attention0", 8, (6, 2), True), ("attention0", 8, (9,), False), ("attention0", 8, (6, 3), False),
    ("attention1", 4, (3, 2), False), ("attention1", 5, (6, 3), True)])     # its window is 5: no ring need be longer
@torch.no_grad()
def test_more_tokens_than_a_state_was_begun_for_are_refused(token: str, length: int, pieces: tuple[int, ...],
                                                            fits: bool) -> None:
    own, x = token_mixer(token), torch.zeros(2, max(pieces), tiny.WIDTH)
    state = own.begin(2, length, x)

    def step(n: int) -> None:
        ctx = Context.after(state.read, n)
        own.step(x[:, :n], state, ctx._replace(table=own.table(ctx, x.dtype)))

    for n in pieces[:-1]:
        step(n)
    if fits:
        step(pieces[-1])
    else:
        said = f"{pieces[-1]} more tokens after {sum(pieces[:-1])} do not fit into a state for {length};"
        with pytest.raises(ValueError, match=said):
            step(pieces[-1])


# Packed documents

def test_positions_and_documents_begin_anew_at_every_start() -> None:
    start = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 1, 0]]).bool()       # the second row goes on with a document
    ctx = Context.packed(start)
    assert ctx.pos.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]]
    assert ctx.doc is not None
    assert ctx.doc.tolist() == [[1, 1, 1, 2, 2], [0, 0, 1, 2, 2]]
    offsets = borders(start)
    assert offsets[:5].tolist() == [0, 3, 5, 7, 8]
    assert set(offsets[5:].tolist()) == {start.numel()}
    assert borders(start | True).shape == offsets.shape                  # shapes repeat, kernels are not rebuilt


@pytest.mark.parametrize(("B", "T", "every", "most"), [(8, 2048, 512, 64), (8, 2048, 256, 64), (8, 2048, 255, 128),
                                                       (3, 64, 64, 32), (1, 16, 1, 16)])
def test_of_the_documents_that_attention_is_given_few_are_empty(B: int, T: int, every: int, most: int) -> None:
    """Its kernels start as many blocks for an empty one as for a whole row."""
    start = (torch.arange(T) % every == 0).repeat(B, 1)
    offsets, real = borders(start), int(start.sum())
    assert len(offsets) == most + 1
    assert offsets[:real].tolist() == start.flatten().nonzero().flatten().tolist()
    assert offsets[real:].tolist() == [B * T] * (most + 1 - real)


@each_cell
def test_packed_documents_do_not_see_each_other(cell: tuple[str, str, str]) -> None:
    # The balance loss is a row's, not a document's: without it documents add up, gradients included.
    parts, m = one_rank(with_channel(tiny.config(*cell), balance=0.0)), tiny.micro(2, 17, every=4)
    ctx = documents(m)
    packed = logits(parts.decoder, m.tokens, ctx).detach()
    want = gradients(parts, [m])
    apart = []
    for row in range(2):
        for a, b in pairwise([*ctx.start[row].nonzero().flatten().tolist(), 17]):
            alone = Micro(m.tokens[row:row + 1, a:b], m.targets[row:row + 1, a:b], None)
            apart.append(alone)
            close(logits(parts.decoder, alone.tokens, Context.plain(1, b - a)), packed[row:row + 1, a:b])
    assert len(apart) > 5
    for name, g in gradients(parts, apart).items():
        close(g, want[name], what=name)


# Learning

@each_cell
def test_every_parameter_learns_the_slope_of_the_loss(cell: tuple[str, str, str]) -> None:
    # Without the routers' own losses: those have gradients but are not in the value.
    parts, m = one_rank(with_channel(tiny.config(*cell), balance=0.0, z_loss=0.0)), tiny.micro(2, 16)
    grads, params = gradients(parts, [m]), parts.parameters()
    slope, gen = 0.0, torch.Generator().manual_seed(1)
    way = {name: torch.randn(g.shape, dtype=g.dtype, generator=gen) for name, g in grads.items()}
    for name, g in grads.items():
        assert g.abs().max() > 1e-8, name
        slope += float((g * way[name]).sum())
    values = []
    for step in (1e-8, -2e-8):      # to one side, then to the other; a norm of nearly nothing is steep
        for name, d in way.items():
            params[name].data.add_(d, alpha=step)
        values.append(float(parts.pipe([m], train=False).loss))
    assert (values[0] - values[1]) / 2e-8 == pytest.approx(slope, rel=1e-5)


@each_cell
def test_recomputation_changes_no_gradient(cell: tuple[str, str, str]) -> None:
    cfg, m = tiny.config(*cell), tiny.micro(2, 16)
    want = gradients(one_rank(cfg), [m])
    for policy, runs in (("token", [2, 1]), ("channel", [1, 2]), ("both", [2, 2])):
        parts = one_rank(cfg, recompute=policy)
        calls: list[str] = []
        block = blocks(parts.decoder)[0]
        block.token.register_forward_pre_hook(lambda *_, calls=calls: calls.append("token"))
        block.channel.register_forward_pre_hook(lambda *_, calls=calls: calls.append("channel"))
        for name, g in gradients(parts, [m]).items():
            close(g, want[name], what=f"{policy}: {name}")
        assert [calls.count("token"), calls.count("channel")] == runs


# Wirings

Sublayer = Callable[[Tensor], Tensor]


def sublayers(model: Decoder, ctx: Context) -> list[tuple[Sublayer, Sublayer]]:
    """The normed (token, channel) functions of every block, to be called in order: router logits pass between them."""
    route: tuple[Tensor, ...] = ()

    def token(block: Block, h: Tensor) -> Tensor:
        return block.token(rms_norm(h, block.norm1.scale), ctx._replace(table=block.token.table(ctx, h.dtype)))

    def channel(block: Block, h: Tensor) -> Tensor:
        nonlocal route
        x = rms_norm(h, block.norm2.scale)
        plan = block.channel.plan(Ready(x), route)
        route = plan.route
        y = block.channel.deliver(block.channel(x, plan.way), plan)
        return y if isinstance(y, Tensor) else y.wait()

    return [(partial(token, b), partial(channel, b)) for b in blocks(model)]


def ladder(x: Tensor, pairs: list[Any]) -> Tensor:
    """x_i = x_{i-1} + f_i(x_{i-2}) over the sublayers (arXiv:2501.06589)."""
    before = x
    for f in (f for pair in pairs for f in pair):
        before, x = x, x + f(before)
    return x


def parallel(x: Tensor, pairs: list[Any]) -> Tensor:
    for token, channel in pairs:
        x = x + token(x) + channel(x)
    return x


def standard(x: Tensor, pairs: list[Any]) -> Tensor:
    for token, channel in pairs:
        x = x + token(x)
        x = x + channel(x)
    return x


@pytest.mark.parametrize("wiring", [ladder, parallel, standard], ids=lambda f: f.__name__)
@pytest.mark.parametrize("channel", tiny.EVERY_CHANNEL)
@pytest.mark.parametrize("token", tiny.CROSSED)
@torch.no_grad()
def test_a_wiring_equals_its_definition(token: str, channel: str, wiring: Callable[..., Tensor]) -> None:
    model, m = one_rank(tiny.config(token, channel, wiring.__name__)).decoder, tiny.micro(2, 9)
    ctx = documents(m)
    want = wiring(model.embed(m.tokens, torch.float64), sublayers(model, ctx))  # pyright: ignore[reportOptionalCall]
    close(model(m.tokens, ctx).read(0).h, want)


@pytest.mark.parametrize("order", list(permutations(tiny.LAGS)), ids="-".join)
@torch.no_grad()
def test_mixed_wirings_hand_over_what_is_still_late(order: tuple[str, ...]) -> None:
    cfg = tiny.config("attention0", "moe1", "mixed", layers=6)
    cfg = replace(cfg, pattern=tuple(f"b{list(tiny.LAGS).index(name)}" for name in order))
    model, m = one_rank(cfg).decoder, tiny.micro(2, 9)
    ctx = documents(m)
    done = [model.embed(m.tokens, torch.float64)]  # pyright: ignore[reportOptionalCall]
    seen = lambda late: torch.stack(done[:max(1, len(done) - late)]).sum(0)      # the embedding is never late
    for block, (token, channel) in zip(cfg.kinds(), sublayers(model, ctx), strict=True):
        match block.lag:
            case (0, 1):
                done.append(token(seen(0)) + channel(seen(0)))                   # travel as one output
            case (late, _):
                done.append(token(seen(late)))
                done.append(channel(seen(late)))
    close(model(m.tokens, ctx).read(0).h, torch.stack(done).sum(0))


# Mixture of experts

MOES = [name for name, spec in tiny.CHANNELS.items() if spec.kind == "moe"]


@pytest.mark.parametrize("channel", MOES)
def test_grouped_experts_train_like_the_loop(channel: str) -> None:
    cfg, m = tiny.config("attention0", channel, "ladder"), tiny.micro(2, 16)
    loop, grouped = (gradients(one_rank(with_channel(cfg, engine=engine), torch.float32), [m])
                     for engine in ("loop", "grouped"))
    for name, g in grouped.items():
        close(g, loop[name], 1e-4, name)


@pytest.mark.parametrize("channel", MOES)
def test_moe_in_compiled_pieces_trains_like_the_whole(channel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is one graph; aot_eager stands for the compiler, and works off the same graphs."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    compiled.cache_clear()
    cfg, m = tiny.config("attention0", channel, "ladder"), tiny.micro(2, 16)
    want, pieces = gradients(one_rank(cfg, torch.float32), [m]), one_rank(cfg, torch.float32)
    for block in blocks(pieces.decoder):
        block.channel.compile()
    for name, g in gradients(pieces, [m]).items():
        close(g, want[name], 1e-5, name)
    shared = cfg.kinds()[0].channel.shared > 0
    assert compiled.cache_info().currsize == 2 + shared      # route, gated, which the shared expert has in its own form
    compiled.cache_clear()


def first_moe(channel: str) -> MoE:
    mixer = blocks(one_rank(tiny.config("attention0", channel)).decoder)[0].channel
    assert isinstance(mixer, MoE)
    return mixer


@pytest.mark.parametrize("channel", MOES)
def test_router_losses_equal_their_formulas(channel: str) -> None:
    mixer, (B, T) = first_moe(channel), (2, 9)
    spec = mixer.spec
    x = torch.randn(B, T, spec.experts, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    choice = mixer.choose(x)
    (got,) = torch.autograd.grad(0 * choice.weights.sum(), x)        # nothing but what is attached
    want = torch.zeros((), dtype=torch.float64)
    for row, chosen in zip(x, choice.ids.view(B, T, -1), strict=True):
        score = row.softmax(-1) if spec.score == "softmax" else row.sigmoid()
        p = (score / score.sum(-1, keepdim=True)).mean(0)
        f = torch.stack([(chosen == e).sum() for e in range(spec.experts)]) * spec.experts / (spec.top_k * T)
        want = want + T * spec.balance * (f * p).sum()        # losses are sums over tokens
    close(choice.balance, want)
    want = want + spec.z_loss * sum(x[b, t].exp().sum().log() ** 2 for b in range(B) for t in range(T))
    close(got, torch.autograd.grad(want, x)[0])
    assert choice.load.tolist() == [int((choice.ids == e).sum()) for e in range(spec.experts)]


def test_the_balance_bias_chooses_experts_but_does_not_weigh_them() -> None:
    mixer = first_moe("moe1")
    scores = torch.tensor([[[1.0, 0.9, 0.8, 0.7]]], dtype=torch.float64)
    mixer.bias.data = torch.tensor([0.0, 0.0, 0.0, 5.0], dtype=torch.float64)
    ids, weights, *_ = mixer.choose(scores)
    assert sorted(ids.flatten().tolist()) == [0, 3]
    close(weights, scores.sigmoid()[..., ids.flatten()].flatten(0, 1) / scores.sigmoid()[..., [0, 3]].sum())
    mixer.rebalance(torch.tensor([9, 1, 4, 2]))               # mean 4
    close(mixer.bias, torch.tensor([-0.01, 0.01, 0.0, 5.01], dtype=torch.float64))
