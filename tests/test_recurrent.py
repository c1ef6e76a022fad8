"""The recurrences' fast forms equal their definitions, and the mixers made of them hold what their papers say."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import matrix
import pytest
import ranks
import test_ops
import tiny
import torch
from test_ops import DOUBLE, GATES, STARTS, agree, close, randn
from test_parity import on_mesh
from torch import Tensor
from torch.nn import functional as F

from stepladder.launch import config, rules
from stepladder.model.config import BlockConfig
from stepladder.model.context import Context
from stepladder.model.decoder import blocks, parameters
from stepladder.model.registry import TOKEN, find
from stepladder.ops import conv, delta, gla, scan, ssd
from stepladder.ops.norm import l2_norm
from stepladder.parallel.build import build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parents[1] / "examples"
poisoned = test_ops.poisoned
SIZES = ((1, 64), (2, 64), (3, 1), (5, 2), (17, 16), (37, 64), (70, 32))        # tokens, chunk


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


# Convolution

def taps(x: Tensor, w: Tensor, start: Tensor, before: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: token by token, remembering the last inputs of the document."""
    out, held = [x[:, :0]], before
    for t in range(x.shape[1]):
        held = torch.where(start[:, t, None, None], 0.0, held)
        seen = torch.cat([held, x[:, t:t + 1]], 1)
        out.append((seen * w.t()).sum(1, keepdim=True) + bias)
        held = seen[:, 1:]
    return torch.cat(out, 1), held


def conv_inputs(T: int, W: int, start: str) -> tuple[Tensor, ...]:
    return randn(2, T, 3, seed=1), randn(3, W, seed=2), STARTS[start](rand(2, T, seed=6)), randn(2, W - 1, 3, seed=3)


@pytest.mark.parametrize("start", STARTS)
def test_convolution_equals_a_loop_over_tokens(start: str) -> None:
    for T, W in ((1, 4), (2, 4), (3, 1), (5, 2), (17, 4)):
        agree(conv.causal, taps, *conv_inputs(T, W, start), randn(3, seed=4))


def test_a_convolution_computes_in_its_inputs_type_whether_fsdp_has_cast_the_taps_or_not() -> None:
    x, w, start, before = conv_inputs(9, 4, [*STARTS][-1])
    x, before, w = x.bfloat16(), before.bfloat16(), w.float()
    for ours, fsdps in zip(conv.activated(x, w, start, before), conv.activated(x, w.bfloat16(), start, before),
                           strict=True):
        assert torch.equal(ours, fsdps)


def test_convolution_is_torchs_own() -> None:
    x, w, start, before = conv_inputs(9, 4, "one long document")
    want = F.conv1d(x.mT, w.unsqueeze(1), randn(3, seed=4), padding=3, groups=3)[..., :9].mT
    close(conv.causal(x, w, start, 0 * before, randn(3, seed=4))[0], want, 1e-12)


@pytest.mark.parametrize("start", STARTS)
def test_convolution_goes_on_where_it_stopped(start: str) -> None:
    x, w, start_at, before = conv_inputs(13, 4, start)
    want, end = conv.causal(x, w, start_at, before)
    got = []
    for a, b in pairwise((0, 1, 2, 7, 8, 13)):
        y, before = conv.causal(x[:, a:b], w, start_at[:, a:b], before)
        got.append(y)
    close(torch.cat(got, 1), want, 1e-12)
    close(before, end, 1e-12)


def test_a_key_of_zeros_is_normed_with_a_gradient() -> None:
    x = torch.stack([torch.zeros(4), torch.tensor([3.0, 0, 4, 0])]).requires_grad_()
    y = l2_norm(x)
    y.sum().backward()
    close(y.detach(), torch.tensor([[0.0, 0, 0, 0], [0.6, 0, 0.8, 0]]), 1e-6)
    assert x.grad is not None
    assert x.grad.isfinite().all()


# Recurrences with one decay per head

OPS: dict[str, Any] = {"ssd": ssd, "delta": delta}
each_op = pytest.mark.parametrize("op", OPS)


def inputs(op: str, T: int, gate: str, start: str, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, ...]:
    """Queries and keys of two heads, values of four; keys of norm 1, beta up to 2."""
    B, G, H, K, V = 2, 2, 4, 5, 3
    q, k, v = (randn(B, T, heads, n, seed=i) for i, (heads, n) in enumerate(((G, K), (G, K), (H, V))))
    beta = (2 * rand(B, T, H, seed=7),) if op == "delta" else ()
    g, S = GATES[gate](rand(B, T, H, seed=5)), randn(B, H, K, V, seed=9)
    parts = (q, F.normalize(k, dim=-1), v, g, *beta)
    return (*(z.to(dtype) for z in parts), STARTS[start](rand(B, T, seed=6)), S.to(dtype))


def test_the_scalar_recurrence_is_a_decayed_sum_over_the_document_so_far() -> None:
    q, k, v, g, start, S = inputs("ssd", 9, "to -5", "anywhere")
    doc, b = start.cumsum(1), g.cumsum(1)
    q, k, want = q.repeat_interleave(2, 2), k.repeat_interleave(2, 2), torch.zeros_like(v)
    for row in range(2):
        for t in range(9):
            if doc[row, t] == 0:
                want[row, t] += torch.einsum("hk,h,hkv->hv", q[row, t], b[row, t].exp(), S[row])
            for s in range(t + 1):
                if doc[row, s] == doc[row, t]:
                    A = torch.einsum("hk,hk,h->h", q[row, t], k[row, s], (b[row, t] - b[row, s]).exp())
                    want[row, t] += A[:, None] * v[row, s]
    close(ssd.recurrent(q, k, v, g, start, S)[0], want, 1e-12)


def test_the_delta_rule_decays_and_projects_before_it_writes() -> None:
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, equation 10 of arXiv:2412.06464."""
    q, k, v, g, beta, start, S = inputs("delta", 9, "to -5", "one long document")
    got, end = delta.recurrent(q, k, v, g, beta, start, S)
    for t in range(9):
        K = k[:, t].repeat_interleave(2, 1)
        move = torch.eye(5, dtype=DOUBLE) - beta[:, t, :, None, None] * K.unsqueeze(-1) * K.unsqueeze(-2)
        S = g[:, t, :, None, None].exp() * (move @ S) + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], K, v[:, t])
        close(got[:, t], torch.einsum("bhk,bhkv->bhv", q[:, t].repeat_interleave(2, 1), S), 1e-12)
    close(end, S, 1e-12)


@each_op
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("gate", GATES)
def test_chunked_form_equals_the_recurrence(op: str, gate: str, start: str) -> None:
    for T, chunk in SIZES:
        agree(lambda *x, c=chunk: OPS[op].chunked(*x, chunk=c), OPS[op].recurrent, *inputs(op, T, gate, start))


@each_op
def test_chunked_form_equals_the_recurrence_in_single_precision(op: str) -> None:
    for gate in GATES:
        agree(OPS[op].chunked, OPS[op].recurrent, *inputs(op, 130, gate, "anywhere", torch.float32), tolerance=1e-5)


def test_chunked_delta_rule_bears_keys_that_are_all_alike() -> None:
    """The worst keys for the triangular inverse: powers of its matrix grow like binomial coefficients."""
    q, k, v, g, beta, start, S = inputs("delta", 70, "none", "one long document", torch.float32)
    same = (q, k[:, :1].expand_as(k), v, g, 0 * beta + 2, start, S)
    for got, want in zip(delta.chunked(*same), delta.recurrent(*(z.double() if z.is_floating_point() else z
                                                                 for z in same)), strict=True):
        close(got.double(), want, 1e-5)


@pytest.mark.parametrize("op", [*OPS, "gla"])
def test_no_tokens_leave_the_state_as_it_is(op: str) -> None:
    forms: Any = {**OPS, "gla": gla}[op]
    for form in (forms.recurrent, forms.chunked):
        y, S = form(*(x := (test_ops.gla_inputs if op == "gla" else partial(inputs, op))(0, "none", "anywhere")))
        assert y.shape == x[2].shape
        assert torch.equal(S, x[-1])


@each_op
@pytest.mark.parametrize("start", STARTS)
def test_a_recurrence_goes_on_where_it_stopped(op: str, start: str) -> None:
    *parts, begins, S = inputs(op, 40, "to -5", start)
    want, end = OPS[op].recurrent(*parts, begins, S)
    got = []
    for a, b in pairwise((0, 1, 1, 18, 19, 40)):
        y, S = OPS[op].chunked(*(z[:, a:b] for z in (*parts, begins)), S, chunk=8)
        got.append(y)
    close(torch.cat(got, 1), want, 1e-10)
    close(S, end, 1e-10)


@each_op
def test_nan_is_passed_on_to_what_follows_it_in_its_document(op: str) -> None:
    """By the definition to no other document; in masked products borders are factors of 0, and 0 NaN is NaN."""
    x = inputs(op, 12, "to -5", "one long document")
    x[-2][:, 9] = True
    x[2][0, 5, 0] = torch.nan
    for form in (OPS[op].recurrent, OPS[op].chunked):
        y, _ = form(*x)
        assert y[0, 5:9, 0].isnan().all()
        assert form is OPS[op].chunked or y[0, 9:].isfinite().all()
        assert y[1].isfinite().all()
        assert y[0, :, 1:].isfinite().all()


@each_op
@pytest.mark.parametrize(("which", "change", "said"), [
    ("g", lambda z: z - 2 * z.min(), r"a gate is .* > 0"),
    ("g", lambda z: z[:, :-1], r"gates \(2, 6, 4\) do not go with 2 rows of 7 tokens"),
    ("start", lambda z: z[:, :-1], r"borders \(2, 6\) .* 2 rows of 7 tokens"),
    ("S", lambda z: z.mT, r"the state is \(2, 4, 3, 5\), .* need \(2, 4, 5, 3\)"),
    ("k", lambda z: z[..., :-1], r"queries \(2, 7, 2, 5\) and keys \(2, 7, 2, 4\)"),
    ("v", lambda z: z[:, :, :-1], r"heads of the values a multiple")])
def test_what_does_not_belong_together_is_refused(op: str, which: str, change: Callable[[Tensor], Tensor],
                                                  said: str) -> None:
    names = {"q": 0, "k": 1, "v": 2, "g": 3, "start": -2, "S": -1}
    x = list(inputs(op, 7, "to -5", "anywhere"))
    x[names[which]] = change(x[names[which]])
    for form in (OPS[op].recurrent, OPS[op].chunked):
        with pytest.raises(ValueError, match=said):
            form(*x)


# Selective scan

def scan_inputs(T: int, gate: str, start: str, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, ...]:
    """The steepest of four channels' three entries decays as the gates say."""
    B, D, N = 2, 4, 3
    q, k, v, h = (randn(*shape, seed=i) for i, shape in enumerate(((B, T, N), (B, T, N), (B, T, D), (B, D, N))))
    dt, A = -GATES[gate](rand(B, T, D, seed=5)), -rand(D, N, seed=8)
    return (*(z.to(dtype) for z in (q, k, v, dt, A)), STARTS[start](rand(B, T, seed=6)), h.to(dtype))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("gate", GATES)
def test_chunked_scan_equals_the_recurrence(gate: str, start: str) -> None:
    for T, chunk in ((1, 0), (2, 4), (3, 1), (17, 0), (37, 4)):
        agree(lambda *x, c=chunk: scan.chunked(*x, chunk=c), scan.recurrent, *scan_inputs(T, gate, start))


def test_every_channel_of_a_scan_is_a_scalar_recurrence_of_its_entries() -> None:
    """One entry of one channel is ssd with a head of one key and one value channel."""
    q, k, v, dt, A, start, h = scan_inputs(9, "to -5", "anywhere")
    want = torch.zeros_like(v)
    for n in range(3):
        one, write = torch.ones_like(v).unsqueeze(-1), (dt * v * k[..., n:n + 1]).unsqueeze(-1)
        y, _ = ssd.recurrent(one, one, write, dt * A[:, n], start, h[..., n, None, None])
        want += q[..., n:n + 1] * y.squeeze(-1)
    close(scan.recurrent(q, k, v, dt, A, start, h)[0], want, 1e-12)


@pytest.mark.parametrize("start", STARTS)
def test_a_scan_goes_on_where_it_stopped(start: str) -> None:
    q, k, v, dt, A, begins, h = scan_inputs(30, "to -5", start)
    want, end = scan.recurrent(q, k, v, dt, A, begins, h)
    got = []
    for a, b in pairwise((0, 1, 1, 18, 19, 30)):
        y, h = scan.chunked(q[:, a:b], k[:, a:b], v[:, a:b], dt[:, a:b], A, begins[:, a:b], h)
        got.append(y)
    close(torch.cat(got, 1), want, 1e-10)
    close(h, end, 1e-10)


@pytest.mark.parametrize(("which", "change", "said"), [
    (4, lambda z: -z, r"a rate is .* would grow"), (3, lambda z: z - 1, r"a step -.* would grow"),
    (2, lambda z: z[:, :-1], r"values \(2, 6, 4\), steps \(2, 7, 4\)"), (5, lambda z: z[:, :-1], r"borders \(2, 6\)"),
    (6, lambda z: z.mT, r"the state is \(2, 3, 4\), .* need \(2, 4, 3\)")])
def test_what_does_not_belong_to_a_scan_is_refused(which: int, change: Callable[[Tensor], Tensor], said: str) -> None:
    x = list(scan_inputs(7, "to -5", "anywhere"))
    x[which] = change(x[which])
    forms: tuple[Any, ...] = (scan.recurrent, scan.chunked)
    for form in forms:
        with pytest.raises(ValueError, match=said):
            form(*x)


# Mixers

OTHERS = [name for name in tiny.TOKENS if name not in tiny.CROSSED]


def mixer(token: str, dtype: torch.dtype = DOUBLE, layout: Parallel | None = None) -> Any:
    decoder = build(tiny.config(token, layers=1), Mesh(layout or Parallel(), CPU), seed=3, dtype=dtype).decoder
    return blocks(decoder)[0].token


def test_decays_stay_in_single_precision_and_out_of_weight_decay() -> None:
    found = set()
    for token in OTHERS:
        own = mixer(token, torch.bfloat16)
        for name in {"A_log", "dt_bias"} & own.decls.keys():
            found.add((tiny.TOKENS[token].kind, name))
            assert own.get_parameter(name).dtype == torch.float32
            assert len(own.decls[name].shape) == 1                   # the optimizer decays matrices alone
    assert found == {(kind, name) for kind in ("gated_delta", "mamba2", "mamba") for name in ("A_log", "dt_bias")}


@pytest.mark.parametrize("token", [t for t in OTHERS if "dt_bias" in mixer(t).decls])
def test_initial_time_steps_and_decays_are_those_published(token: str) -> None:
    own = mixer(token)
    dt, A = F.softplus(own.dt_bias.detach()), own.A_log.detach().exp()
    assert (dt > 0.99e-3).all()
    assert (dt < 1.01e-1).all()
    assert (A > 0).all()
    assert (A <= 16.01).all()


def test_retention_turns_queries_and_keys_and_decays_at_the_published_rates() -> None:
    """A sum over all earlier tokens, with rotations as complex numbers; head h keeps 1 - 2^(-5-h) a token."""
    own, T, H, K = mixer("retention0"), 6, 4, 8
    x, ctx = randn(1, T, tiny.WIDTH), Context.plain(1, T)
    q, k = ((x[0] @ w.t()).view(T, H, K) for w in (own.wq, own.wk))
    q, k = (torch.complex(z[..., :K // 2], z[..., K // 2:]) for z in (q, k))
    v, t = (x[0] @ own.wv.t()).view(T, H, 16), torch.arange(T, dtype=DOUBLE)
    ahead = (t[:, None] - t)[..., None]
    turn = torch.polar(torch.ones(T, T, K // 2, dtype=DOUBLE), ahead * 100.0 ** (-torch.arange(4) / 4))
    A = torch.einsum("thk,shk,tsk->tsh", q, k.conj(), turn).real / K ** 0.5
    A = A * (ahead >= 0) * (1 - 2.0 ** (-5 - torch.arange(H, dtype=DOUBLE))) ** ahead
    y = F.rms_norm(torch.einsum("tsh,shv->thv", A, v), (16,), eps=1e-6) * F.silu(x[0] @ own.out_gate.t()).view(T, H, 16)
    got = own(x, ctx._replace(table=own.table(ctx, DOUBLE)))
    close(got[0], y.flatten(1) @ own.wo.t(), 1e-6)                   # the rates are kept in fp32
    assert not own.log_decay.requires_grad


@pytest.mark.parametrize(("kind", "negative"), [(k, n) for k in ("gated_delta", "deltanet") for n in (False, True)])
def test_negative_eigenvalues_are_an_option(kind: str, negative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """beta k k^T takes off up to twice what is along k, or at most all of it."""
    betas: list[Tensor] = []
    chunked = delta.chunked
    monkeypatch.setattr(delta, "chunked", lambda *x: (betas.append(x[4]), chunked(*x))[1])
    spec = replace(tiny.TOKENS[f"{kind}0"], negative=negative)
    cfg = replace(tiny.config(f"{kind}0", layers=1), blocks={"b0": BlockConfig(spec, tiny.CHANNELS["swiglu0"])})
    own = blocks(build(cfg, Mesh(Parallel(), CPU), seed=3, dtype=DOUBLE).decoder)[0].token
    own(100 * randn(2, 9, tiny.WIDTH), Context.plain(2, 9))
    assert (betas[0].max() > 1) == negative
    assert betas[0].max() <= 2


@pytest.mark.parametrize("token", ["gated_delta1", "mamba20", "mamba0"])
def test_a_mixer_compiles_without_a_break(token: str) -> None:
    own, x, ctx = mixer(token), randn(2, 40, tiny.WIDTH), Context.plain(2, 40)
    close(torch.compile(own.forward, fullgraph=True, backend="eager")(x, ctx), own(x, ctx), 1e-12)


@pytest.mark.parametrize(("name", "full", "windows"), [("3to1", [3, 7, 11], 0), ("window", [1, 7], 4)])
def test_hybrids_are_ready_to_run(name: str, full: list[int], windows: int) -> None:
    path = EXAMPLES / f"gated-delta-{name}.toml"
    run = config.load(path, [])
    rules.check(run, 1)
    tokens = [block.token for block in run.model.kinds()]
    assert [i for i, t in enumerate(tokens) if t.kind == "attention" and not t.window] == full
    assert sum(t.kind == "attention" and t.window > 0 for t in tokens) == windows
    assert path.read_text().startswith(f"# {parameters(run.model)[0] / 1e6:.0f} M parameters")


def together(rank: int, n: int, parallel: Parallel) -> list[str]:
    return on_mesh(Mesh(parallel, CPU, rank, n), ("others", "between", "mixed"), {"layers": max(4, len(OTHERS))})


# Each feature of a layout once, and two ranks a dimension at most but for tp: mixers know of no other.
@pytest.mark.parametrize(("parallel", "n"), [
    (Parallel(tp=4), 4), (Parallel(tp=2, sequence=True, ep=2), 4), (Parallel(tp=2, pp=2, schedule="zero-bubble"), 4),
    (Parallel(pp=2, schedule="interleaved"), 4)],
    ids=lambda p: matrix.spell(p, 4) if isinstance(p, Parallel) else "")
def test_n_ranks_equal_one_rank(parallel: Parallel, n: int) -> None:
    assert not any(ranks.run(n, together, parallel, timeout=240))


def test_every_registered_mixer_is_among_those_compared() -> None:
    assert {tiny.TOKENS[t].kind for t in (*tiny.CROSSED, *OTHERS)} == {*TOKEN}
    assert all(find(TOKEN, kind).TINY for kind in TOKEN)
