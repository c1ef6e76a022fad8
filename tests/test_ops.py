"""Every fast op equals its definition, forward and gradients, with every uninitialised element poisoned."""
from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from stepladder.model.residual import Stats
from stepladder.model.token.attention import angles, rotate
from stepladder.ops import attention, experts, gla, kernels, rows
from stepladder.ops.attach import attach
from stepladder.ops.compiled import allow_variants
from stepladder.ops.loss import IGNORE, cross_entropy
from stepladder.ops.norm import rms_norm

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory is NaN: an element that nobody writes shows."""
    settings = torch.utils.deterministic                # a training run in this process turns the filling off
    before, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, True  # pyright: ignore
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    settings.fill_uninitialized_memory = before  # pyright: ignore


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def close(got: Tensor, want: Tensor, tolerance: float, what: str = "") -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    error = float((got - want).detach().norm() / want.detach().norm().clamp_min(1.0))
    assert error < tolerance, f"{what} is off by {error:.1e}"


def gradients(f: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs of f, and gradients of a random linear function of all of them in every floating input."""
    inputs = tuple(x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs)
    out = f(*inputs)
    loss = sum((y * randn(*y.shape, seed=100 + i, dtype=y.dtype)).sum() for i, y in enumerate(out))
    return out, torch.autograd.grad(loss, [x for x in inputs if x.is_floating_point()])  # pyright: ignore


def agree(f: Callable[..., tuple[Tensor, ...]], g: Callable[..., tuple[Tensor, ...]], *inputs: Tensor,
          tolerance: float = 1e-10) -> None:
    for kind, got, want in zip(("output", "gradient"), gradients(f, *inputs), gradients(g, *inputs), strict=True):
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            close(a, b, tolerance, f"{kind} {i}")


# Gated linear recurrence

GATES = {"none": lambda u: 0 * u,
         "to -5": lambda u: -5 * u,
         "to -50": lambda u: -50 * u,
         "now and then -50": lambda u: torch.where(u > 0.8, -50.0, -0.01 * u)}
STARTS = {"one long document": lambda u: u < 0,
          "at the first token": lambda u: torch.arange(u.shape[1]).expand_as(u) == 0,
          "anywhere": lambda u: u < 0.15,
          "at every token": lambda u: u >= 0}


def gla_inputs(T: int, gate: str, start: str, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, ...]:
    B, H, K, V = 2, 2, 4, 3
    u = torch.rand(B, T, H, K, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    begins = torch.rand(B, T, generator=torch.Generator().manual_seed(6), dtype=DOUBLE)
    return (*(randn(B, T, H, n, seed=n, dtype=dtype) for n in (K, K, V)), GATES[gate](u).to(dtype),
            STARTS[start](begins), randn(B, H, K, V, seed=9, dtype=dtype))


def test_the_recurrence_is_a_decayed_sum_over_the_document_so_far() -> None:
    q, k, v, g, start, S = gla_inputs(9, "to -5", "anywhere")
    start[1, 4] = True
    doc, b = start.cumsum(1), g.cumsum(1)
    want = torch.zeros_like(v)
    for row in range(2):
        for t in range(9):
            if doc[row, t] == 0:
                want[row, t] += torch.einsum("hk,hk,hkv->hv", q[row, t], b[row, t].exp(), S[row])
            for s in range(t + 1):
                if doc[row, s] == doc[row, t]:
                    A = torch.einsum("hk,hk,hk->h", q[row, t], k[row, s], (b[row, t] - b[row, s]).exp())
                    want[row, t] += A[:, None] * v[row, s]
    close(gla.recurrent(q, k, v, g, start, S)[0], want, 1e-12)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("gate", GATES)
def test_chunked_gla_equals_the_recurrence(gate: str, start: str) -> None:
    for T, chunk in ((1, 64), (2, 64), (3, 2), (7, 1), (17, 4), (17, 64), (37, 16), (70, 64)):
        agree(lambda *x, c=chunk: gla.chunked(*x, chunk=c), gla.recurrent, *gla_inputs(T, gate, start))


def test_chunked_gla_equals_the_recurrence_in_single_precision() -> None:
    for gate in GATES:
        agree(gla.chunked, gla.recurrent, *gla_inputs(70, gate, "anywhere", torch.float32), tolerance=1e-4)


# Attention

def naive_attention(q: Tensor, k: Tensor, v: Tensor, doc: Tensor, window: int) -> tuple[Tensor]:
    B, T, H, K = q.shape
    rows = []
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(t + 1) if doc[b, s] == doc[b, t] and (not window or t - s < window)]
            for h in range(H):
                g = h * k.shape[2] // H
                p = (k[b, seen, g] @ q[b, t, h] / K ** 0.5).softmax(0)
                rows.append(p @ v[b, seen, g])
    return (torch.stack(rows).view(B, T, H, K),)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_attention_equals_a_loop_over_what_a_query_may_see(window: int, packed: bool) -> None:
    q, k, v = randn(2, 9, 4, 6, seed=1), randn(2, 9, 2, 6, seed=2), randn(2, 9, 2, 6, seed=3)
    start = torch.tensor([[1, 0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1]]).bool() & packed
    doc = start.cumsum(1)
    agree(lambda q, k, v: (attention.causal(q, k, v, doc if packed else None, None, window),),
          lambda q, k, v: naive_attention(q, k, v, doc, window), q, k, v)


def test_rotation_keeps_norms_and_shows_only_relative_positions() -> None:
    q, k = randn(1, 1, 2, 8, seed=1), randn(1, 1, 2, 8, seed=2)
    at = lambda x, p: rotate(x, angles(torch.tensor([[p]]), 8, 100.0))
    close(at(q, 0), q, 1e-15)
    close(at(q, 1234).norm(dim=-1), q.norm(dim=-1), 1e-12)
    products = torch.stack([(at(q, m) * at(k, n)).sum(-1) for m, n in ((5, 2), (3, 0), (903, 900))])
    close(products, products[:1].expand_as(products), 1e-10)
    assert (products[0] - (at(q, 6) * at(k, 2)).sum(-1)).abs().min() > 1e-3


# Norm, cross entropy, auxiliary losses

def test_rms_norm_divides_by_the_root_mean_square_in_at_least_fp32() -> None:
    x, scale = randn(3, 5, 16), randn(16, seed=1)
    agree(lambda x, s: (rms_norm(x, s),),
          lambda x, s: (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * s,), x, scale)
    x, scale = (1e3 * randn(64, 48)).to(torch.bfloat16), randn(48, seed=1).float()
    once = rms_norm(x.double(), scale.double()).to(torch.bfloat16)
    assert (rms_norm(x, scale) == once).double().mean() > 0.99            # rounding twice would change a quarter


def plain_cross_entropy(x: Tensor, table: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor]:
    logits = x @ table.t()
    z = logits.logsumexp(-1)[targets != IGNORE].square().sum()
    return (F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE) + z_loss * z,)


N, VOCAB = 11, 13
TARGETS = {"all": torch.arange(N), "some": torch.arange(N).where(torch.arange(N) % 3 != 1, IGNORE),
           "none": torch.full((N,), IGNORE)}


@pytest.mark.parametrize("live", TARGETS)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_cross_entropy_equals_torchs_for_every_chunk_size(z_loss: float, live: str) -> None:
    x, table = randn(N, 6, seed=1), randn(VOCAB, 6, seed=2)
    for chunk in (1, 4, N, 4096):
        agree(lambda x, w, t, c=chunk: cross_entropy(x, w, t, z_loss=z_loss, chunk=c)[:1],
              lambda x, w, t: plain_cross_entropy(x, w, t, z_loss), x, table, TARGETS[live])
        nll = cross_entropy(x, table, TARGETS[live], z_loss=z_loss, chunk=chunk)[1]
        close(nll, plain_cross_entropy(x, table, TARGETS[live], 0.0)[0], 1e-10)


def test_evaluation_makes_no_gradient_of_the_head() -> None:
    x, table = randn(N, 6), randn(VOCAB, 6).requires_grad_()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cross_entropy(x, table, TARGETS["all"])
    assert counter.get_total_flops() == 2 * N * 6 * VOCAB


class Halves:
    """Two threads that sum and compare, as the ranks of a vocabulary split in two do."""

    def __init__(self) -> None:
        self.here, self.seen = Barrier(2, timeout=10), {}

    def of(self, rank: int, over: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def reduce(v: Tensor) -> Tensor:
            self.seen[rank] = v
            self.here.wait()
            out = over(self.seen[0], self.seen[1])
            self.here.wait()
            return out
        return reduce


def test_cross_entropy_over_a_split_vocabulary_equals_the_whole() -> None:
    x, table = randn(N, 6, seed=1), randn(VOCAB, 6, seed=2)
    halves, cut = Halves(), 5

    def half(rank: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        rows = slice(0, cut) if rank == 0 else slice(cut, VOCAB)
        return gradients(lambda x, w: cross_entropy(
            x, w, TARGETS["some"], first=rows.start, z_loss=0.1, chunk=4, total=halves.of(rank, torch.add),
            highest=halves.of(rank, torch.maximum))[:1], x, table[rows])

    with ThreadPoolExecutor(2) as pool:
        (loss0, (dx0, dw0)), (loss1, (dx1, dw1)) = pool.map(half, range(2))
    loss, (dx, dw) = gradients(lambda x, w: plain_cross_entropy(x, w, TARGETS["some"], 0.1), x, table)
    for got, want in ((loss0[0], loss[0]), (loss1[0], loss[0]), (dx0 + dx1, dx), (torch.cat([dw0, dw1]), dw)):
        close(got, want, 1e-10)


@pytest.mark.parametrize("recompute", [False, True])
def test_an_attached_loss_enters_the_backward_exactly_once(recompute: bool) -> None:
    w = torch.tensor(3.0, requires_grad=True)
    f = lambda x: attach(2 * x, x.square())                       # the loss's own gradient is 2 w = 6
    y = checkpoint(f, w, use_reentrant=False) if recompute else f(w)
    assert y.item() == 6.0
    (5 * y).backward()                                            # 5 scales the main path only
    assert w.grad is not None
    assert w.grad.item() == 5 * 2 + 6


# Experts

@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 10, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 7, 0, 6]], ids=str)
@pytest.mark.parametrize(("D", "hidden"), [(32, 32), (12, 20)])
def test_grouped_experts_equal_the_loop(counts: list[int], D: int, hidden: int) -> None:
    single = torch.float32
    x = randn(sum(counts), D, dtype=single)
    up, gate = (randn(4, hidden, D, seed=i, dtype=single) / D ** 0.5 for i in (1, 2))
    down = randn(4, D, hidden, seed=3, dtype=single) / hidden ** 0.5
    assert experts.can_group(x, hidden)
    ends = torch.tensor(counts).cumsum(0)
    agree(lambda x, u, g, d: (experts.grouped(x, ends, u, g, d),),
          lambda x, u, g, d: (experts.loop(x, ends, u, g, d),), x, up, gate, down, tolerance=1e-5)


def test_shapes_and_precisions_that_cannot_be_grouped_are_left_to_the_loop() -> None:
    for D, hidden, dtype in ((7, 8, torch.float32), (8, 7, torch.float32), (12, 16, torch.bfloat16), (16, 16, DOUBLE)):
        assert not experts.can_group(randn(3, D, dtype=dtype), hidden)


def test_a_gpu_that_runs_the_loop_of_experts_says_why_once(caplog: pytest.LogCaptureFixture) -> None:
    kernels.say.cache_clear()
    for dtype, D, hidden in ((torch.bfloat16, 16, 8), *[(torch.float32, 16, 8)] * 2, (torch.bfloat16, 16, 12)):
        size = dtype.itemsize
        x: Any = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(3, D), element_size=lambda size=size: size)
        experts.can_group(x, hidden)
    kernels.say.cache_clear()
    assert [r.message for r in caplog.records] == [
        f"experts: no grouped products for {why}; running the loop"
        for why in ("torch.float32", "rows of 12 numbers, not a multiple of 16 bytes")]


@pytest.mark.parametrize(("ids", "many"), [([[2, 0], [1, 2], [0, 1], [2, 1], [1, 0]], 10),
                                           ([[3, 0], [1, 3], [3, 3], [2, 1]], 4), ([[3, 3]], 0)], ids=str)
def test_tokens_become_rows_for_their_experts_and_are_weighed_with_their_gradients(ids: list[list[int]], many: int
                                                                                    ) -> None:
    """Of three experts; the fourth is another rank's."""
    of, N = torch.tensor(ids), len(ids)
    order, inverse, ends = experts.sort(of, 3)
    assert torch.equal(order, of.flatten().argsort(stable=True))
    assert torch.equal(inverse[order], torch.arange(2 * N))
    assert ends.tolist() == [int((of <= e).sum()) for e in range(3)]
    if many == 0:                                # such a token does not come: what there is is empty
        order, inverse, of, N = order[:0], inverse[:0], of[:0], 0
    here, order = (of < 3).unsqueeze(-1), order[:many]
    x, weights = randn(N, 3), randn(N, 2)
    agree(lambda x: (rows.expand(x, order, inverse, 2),), lambda x: (x.repeat_interleave(2, 0)[order],), x)
    agree(lambda x, w: (rows.weigh(rows.expand(x, order, inverse, 2).sin(), order, inverse, w),),
          lambda x, w: ((here * w.unsqueeze(-1) * x.sin().unsqueeze(1)).sum(1),), x, weights)


@pytest.mark.parametrize("n", [1, 255, 256, 32_767, 32_768])
def test_choices_are_sorted_by_any_number_of_experts(n: int) -> None:
    """Their keys are no wider than they need be: a sort passes over each byte."""
    order, _, ends = experts.sort(torch.tensor([[n, 0], [n - 1, n]]), n)
    assert order.tolist() == [1, 2, 0, 3]
    assert ends[0] == (2 if n == 1 else 1)
    assert ends[-1] == 2


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_token_goes_to_a_rank_once_and_is_found_when_it_comes_home(n: int) -> None:
    ids = torch.randint(2 * n, (n, 7, 3), generator=torch.Generator().manual_seed(n))
    ids[:, 2] = 0                                                  # all of its choices are one rank's
    owner, k = ids // 2, ids.shape[2]
    for rank in range(n):
        visits = [[(s, t) for s in range(n) for t in range(7) if r in owner[s, t]] for r in range(n)]
        mine = [[t for s, t in visits[r] if s == rank] for r in range(n)]
        for apart in (False, True):
            at, sent, came, local, known = experts.tour(ids, rank, 2, apart)
            assert known.tolist() == [*map(len, mine), *(sum(s == r for s, _ in visits[rank]) for r in range(n)),
                                      int((owner == rank).sum())]
            assert sent[:sum(map(len, mine))].tolist() == [t for of in mine for t in of]
            came = came[:len(visits[rank])]
            assert came.tolist() == [7 * s + t for s, t in visits[rank]]
            assert torch.equal(local[came], torch.where(owner == rank, ids - 2 * rank, 2).view(-1, k)[came])
            going = torch.tensor([[t in of for t in range(7)] for of in mine])
            assert torch.equal(at < 7 * n, going.t())
            y = torch.zeros(7 * n if apart else sum(map(len, mine)), 2, dtype=DOUBLE)
            for r, of in enumerate(mine):                          # rank r makes 10^r of each
                begin = 7 * r if apart else sum(map(len, mine[:r]))
                y[begin:begin + len(of)] = 10.0 ** r
            want = sum(10.0 ** r * going[r] for r in range(n))
            assert torch.equal(rows.collect(y, at), torch.stack([torch.as_tensor(want)] * 2, 1))


# Private APIs of torch: what we lean on, and nothing else

def test_torch_foreach_div_divides_every_tensor_by_one_on_the_device() -> None:
    grads = [torch.full((2,), 6.0, dtype=DOUBLE), torch.full((3, 1), 3.0, dtype=DOUBLE)]
    torch._foreach_div_(grads, torch.tensor(3.0, dtype=DOUBLE))
    assert [g.unique().item() for g in grads] == [2.0, 1.0]


def test_torch_foreach_norm_is_the_euclidean_norm_of_each() -> None:
    norms = torch._foreach_norm([torch.tensor([3.0, 4.0]), torch.full((2, 2), 0.5)])
    assert [float(n) for n in norms] == [5.0, 1.0]


def test_torch_foreach_zero_leaves_zeros() -> None:
    grads = [torch.ones(2), torch.full((3, 1), float("nan"))]
    torch._foreach_zero_(grads)
    assert [float(g.abs().sum()) for g in grads] == [0.0, 0.0]


def test_fused_adamw_divides_by_grad_scale_and_stands_still_on_found_inf() -> None:
    def stepped(scale: float, found: float) -> Tensor:
        p = torch.nn.Parameter(torch.ones(4))
        adam = torch.optim.AdamW([p], lr=0.1, eps=1.0, weight_decay=0.0, fused=True)     # eps: the size of p.grad shows
        p.grad = torch.full((4,), 6.0)
        adam.grad_scale, adam.found_inf = torch.tensor(scale), torch.tensor(found)  # pyright: ignore
        adam.step()
        return p.detach()

    close(stepped(3.0, 0.0), torch.full((4,), 1 - 0.1 * 2 / 3), 1e-6)
    assert torch.equal(stepped(3.0, 1.0), torch.ones(4))


def test_private_pytree_reaches_into_named_tuples() -> None:
    from torch.utils._pytree import tree_map
    stats = Stats(torch.ones(2), torch.zeros(()), torch.zeros(()))
    doubled = tree_map(lambda t: t * 2, stats)
    assert isinstance(doubled, Stats)
    assert torch.equal(doubled.load, torch.full((2,), 2.0))


def test_private_recompile_limit_lets_a_function_have_more_than_eight_shapes() -> None:
    made = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    allow_variants()
    f = torch.compile(lambda x: x + 1, backend=backend, dynamic=False)
    for n in (*range(2, 14), 2, 13):
        assert f(torch.zeros(n)).shape == (n,)
    assert len(made) == 12


TESTED = {      # private names in use -> their test
    "torch._foreach_div_": "test_torch_foreach_div_divides_every_tensor_by_one_on_the_device",
    "torch._foreach_zero_": "test_torch_foreach_zero_leaves_zeros",
    "torch._foreach_norm": "test_torch_foreach_norm_is_the_euclidean_norm_of_each",
    "torch.utils._pytree.tree_map": "test_private_pytree_reaches_into_named_tuples",
    "torch._C._autograd": "test_private_set_sequence_nr_moves_a_node_back",
    "torch._C._autograd._get_sequence_nr": "test_private_set_sequence_nr_moves_a_node_back",
    "torch._C._set_sm_carveout_experimental":
        "test_sm_carveout_experimental_is_what_collectives_take_that_run_beside_products",
    "torch._dynamo": "test_private_recompile_limit_lets_a_function_have_more_than_eight_shapes",
    "torch._dynamo.config": "test_private_recompile_limit_lets_a_function_have_more_than_eight_shapes",
    "torch._dynamo.config.recompile_limit": "test_private_recompile_limit_lets_a_function_have_more_than_eight_shapes",
    "torch.distributed._symmetric_memory": "test_private_symmetric_memory_carries_what_nccl_would",
    "dist.distributed_c10d._get_default_store": "test__get_default_store_and__set_pg_timeout",
    "dist.distributed_c10d._set_pg_timeout": "test__get_default_store_and__set_pg_timeout",
}


def test_no_other_private_torch_api_is_used() -> None:
    root, found = Path(__file__).parent.parent, set()
    folders = ("launch", "parallel", "model", "ops", "kernels", "data")
    for file in (file for folder in folders for file in (root / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.ImportFrom(module=module, names=names):
                    found |= {f"{module}.{a.name}" for a in names}
                case ast.Import(names=names):
                    found |= {a.name for a in names}
                case ast.Attribute():
                    found.add(ast.unparse(node))
    private = {name for name in found if re.fullmatch(r"(torch|dist)(\.\w+)*\._[a-z][\w.]*", name)}
    assert private == set(TESTED)
    tests = "".join(f.read_text() for f in Path(__file__).parent.glob("test_*.py"))
    for name, test in TESTED.items():
        assert f"def {test}" in tests, name
