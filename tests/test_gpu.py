"""What only a GPU can show: its kernels, compiled mixers, no host sync, bitwise repetition. `make gpu-test` runs it."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from stepladder.model.channel import moe
from stepladder.model.config import BlockConfig, ModelConfig
from stepladder.model.context import borders
from stepladder.model.token import attention as attention_mixer
from stepladder.model.token import gla as gla_mixer
from stepladder.ops import attention, experts, gla
from stepladder.ops.linear import linear
from stepladder.parallel.build import Parts, build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.optimizer import Optimizer
from stepladder.parallel.pipeline import Micro
from stepladder.parallel.support import Parallel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
BF16_ERROR = 1e-2           # ||a - b|| / ||b||, bf16 operands


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def inputs(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=gen).to(GPU, dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("window", [0, 37])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_packed_attention_equals_its_dense_reference(window: int, heads: tuple[int, int]) -> None:
    B, T, K = 3, 333, 64
    H, G = heads
    start = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) < 0.02
    doc = start.long().cumsum(1).to(GPU)
    q, k, v = inputs((B, T, H, K), (B, T, G, K), (B, T, G, K))
    y = attention.causal(q, k, v, doc, borders(start).to(GPU), window)
    g = torch.randn_like(y)
    got = (y, *torch.autograd.grad(y, (q, k, v), g))
    q, k, v = (z.detach().double().requires_grad_() for z in (q, k, v))
    ref = attention.causal(q, k, v, doc, None, window)
    want = (ref, *torch.autograd.grad(ref, (q, k, v), g.double()))
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < BF16_ERROR


@pytest.mark.parametrize("counts", [[5, 0, 130, 57], [0, 0, 192, 0]])
def test_grouped_experts_equal_the_loop(counts: list[int]) -> None:
    x, up, gate, down = inputs((192, 64), (4, 96, 64), (4, 96, 64), (4, 64, 96))
    ends = torch.tensor(counts, device=GPU).cumsum(0)
    y = experts.grouped(x, ends, up, gate, down)
    g = torch.randn_like(y)
    got = (y, *torch.autograd.grad(y, (x, up, gate, down), g))
    x, up, gate, down = (z.detach().double().requires_grad_() for z in (x, up, gate, down))
    ref = experts.loop(x, ends, up, gate, down)
    want = (ref, *torch.autograd.grad(ref, (x, up, gate, down), g.double()))
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 2 * BF16_ERROR


def test_weight_gradients_leave_the_product_in_fp32() -> None:
    x, w = inputs((512, 128), (64, 128), dtype=torch.float32)
    y = linear(x.bfloat16(), w)
    g = torch.randn_like(y)
    (dw,) = torch.autograd.grad(y, w, g)
    exact = g.double().t() @ x.bfloat16().double()
    assert dw.dtype == torch.float32
    assert error(dw, exact) < 1e-6              # bf16 rounding of the result alone would be 2e-3


def test_chunked_gla_equals_its_definition_in_fp32() -> None:
    B, T, H, K, V = 2, 200, 3, 32, 64
    q, k, v = inputs((B, T, H, K), (B, T, H, K), (B, T, H, V), dtype=torch.float32)
    g = (-5 * torch.rand(B, T, H, K, device=GPU)).requires_grad_()
    start = torch.rand(B, T, device=GPU) < 0.03
    S = torch.zeros(B, H, K, V, device=GPU)
    y, end = gla.chunked(q, k, v, g, start, S)
    ref, ref_end = gla.recurrent(*(z.double() for z in (q, k, v, g)), start, S.double())
    assert error(y, ref) < 1e-5
    assert error(end, ref_end) < 1e-5


def hybrid(layers: int = 4, dense: bool = False) -> ModelConfig:
    token = gla_mixer.Spec(heads=2, key_dim=64, value_dim=64), attention_mixer.Spec(heads=4, kv_heads=2, head_dim=64)
    expert = tiny.CHANNELS["swiglu0"] if dense else moe.Spec(experts=8, top_k=2, hidden=256, ahead=1)
    blocks = {"a": BlockConfig(token[0], expert, (1, 1)), "b": BlockConfig(token[1], tiny.CHANNELS["swiglu0"], (1, 1)),
              "c": BlockConfig(replace(token[1], window=50), expert, (1, 1))}
    return ModelConfig(vocab=512, width=256, layers=layers, blocks=blocks, pattern=("a", "b", "c"))


def batch(seed: int, rows: int = 4, length: int = 256) -> Micro:
    m = tiny.micro(rows, length, seed, every=60)
    assert m.start is not None
    return m._replace(borders=borders(m.start)).to(GPU)


def parts(dense: bool = False, **kw: Any) -> Parts:
    return build(hybrid(dense=dense), Mesh(Parallel(), GPU), seed=0, **kw)


def gradients(p: Parts) -> tuple[float, dict[str, torch.Tensor]]:
    result = p.pipe([batch(0)])
    out = {name: w.grad.clone() for name, w in p.parameters().items() if w.grad is not None}
    return float(result.loss), out


def test_bf16_gradients_are_close_to_fp64() -> None:
    # Without experts: a token whose scores nearly tie is routed elsewhere in another precision.
    loss, got = gradients(parts(dense=True, dtype=torch.bfloat16))
    want_loss, want = gradients(parts(dense=True, dtype=torch.float64))
    assert abs(loss / want_loss - 1) < 1e-3
    flat = [torch.cat([g[k].flatten().double() for k in want]) for g in (got, want)]
    assert error(*flat) < 0.1                  # fp32's error, 2e-5 at most a weight, times bf16's coarser grain


def test_compiled_equals_eager() -> None:
    loss, got = gradients(parts(dtype=torch.float32, compiled=True))
    want_loss, want = gradients(parts(dtype=torch.float32))
    assert abs(loss / want_loss - 1) < 1e-5
    for name in want:
        assert error(got[name], want[name]) < 1e-3, name


@pytest.mark.parametrize("recompute", ["none", "both"])
def test_a_training_step_never_waits_for_the_device(recompute: str) -> None:
    p = parts(dtype=torch.bfloat16, recompute=recompute)
    optimizer = Optimizer(p)
    batches = [batch(i) for i in range(4)]

    def step(m: Micro) -> None:
        result = p.pipe([m])
        p.sums()
        optimizer.step(result, 1e-3)

    step(batches[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for m in batches[1:]:
            step(m)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_deterministic_steps_repeat_bitwise() -> None:
    def run() -> list[torch.Tensor]:
        p = parts(dtype=torch.bfloat16, compiled=True)
        optimizer = Optimizer(p)
        for i in range(5):
            result = p.pipe([batch(i)])
            p.sums()
            optimizer.step(result, 1e-3)
        return [w.detach().clone() for w in p.parameters().values()]

    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_offload_trains_as_without_it_and_leaves_the_device_less() -> None:
    def run(layout: Parallel) -> tuple[list[float], dict[str, torch.Tensor], int]:
        p = build(hybrid(dense=True), Mesh(layout, GPU), seed=0)
        optimizer, seen = Optimizer(p, eps=1e-3), []               # large: Adam would amplify rounding
        for i in range(4):
            result = p.pipe([batch(2 * i), batch(2 * i + 1)])      # two: gradients are added up on the host
            p.sums()
            report = optimizer.step(result, 1e-3)
            seen += [float(report.nll), float(report.norm)]
        held = torch.cuda.memory_allocated()
        return seen, {name: w.detach().clone() for name, w in optimizer.pieces.items()}, held

    def alone(layout: Parallel) -> tuple[list[float], dict[str, torch.Tensor], int]:
        before = torch.cuda.memory_allocated()
        seen, pieces, held = run(layout)
        return seen, pieces, held - before

    alone(Parallel())                                              # now libraries have their workspaces
    want, on_device, much = alone(Parallel())
    got, pieces, little = alone(Parallel(offload=True))
    torch.distributed.destroy_process_group()
    assert got == pytest.approx(want, rel=1e-2)                    # rounding grows from step to step
    assert little < much / 4
    for name, piece in pieces.items():
        assert piece.is_cuda == ("norm" in name or piece.ndim == 1), name
        assert error(piece.to(GPU), on_device[name]) < 1e-2, name


def test_a_non_finite_step_changes_nothing() -> None:
    p = parts(dtype=torch.bfloat16)
    optimizer = Optimizer(p)
    before = {name: w.detach().clone() for name, w in p.parameters().items()}
    result = p.pipe([batch(0)])
    p.sums()
    next(iter(p.parameters().values())).grad[0, 0] = torch.nan  # pyright: ignore
    report = optimizer.step(result, 1e-3)
    assert float(report.skipped) == float(report.streak) == 1
    assert all(torch.equal(before[name], w) for name, w in p.parameters().items())


def test_a_step_changes_nothing_that_a_checkpoint_still_copies() -> None:
    p = parts(dtype=torch.bfloat16)
    optimizer, beside, busy = Optimizer(p), torch.cuda.Stream(), torch.randn(8192, 8192, device=GPU)
    state, seen = optimizer.state(), {}
    before = {name: x.clone() for name, x in state.items()}
    result = p.pipe([batch(0)])
    p.sums()
    with torch.cuda.stream(beside):
        for _ in range(20):                    # 20 ms apiece in fp32
            busy = (busy @ busy).mul_(1e-2)
        seen = {name: x.clone() for name, x in state.items()}
        optimizer.copying = torch.cuda.Event()
        optimizer.copying.record()
    optimizer.step(result, 1e-3)
    torch.cuda.synchronize()
    for name, x in before.items():
        assert torch.equal(seen[name], x), name
        assert not torch.equal(state[name], x) or name in ("optimizer/skipped", "optimizer/streak"), name


def test_a_recorded_pass_equals_one_that_the_host_starts() -> None:
    """Losses, statistics and gradients over three micro-batches of two shapes, and the steps made of them."""
    def run(**kw: Any) -> list[torch.Tensor]:
        p = parts(dtype=torch.bfloat16, compiled=True, **kw)
        optimizer, out = Optimizer(p), []
        for i in range(3):
            result = p.pipe([batch(i), batch(i + 10), batch(i + 20, rows=2)])
            p.sums()
            report = optimizer.step(result, 1e-3)
            out += [result.loss, result.nll, *(s.load for s in result.stats), report.norm]
        return out + [w.detach().clone() for w in p.parameters().values()]

    torch.use_deterministic_algorithms(True)
    try:
        for a, b in zip(run(captured=True), run(), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.use_deterministic_algorithms(False)
