"""The optimizer step: torch's AdamW and clipping on whole gradients is the reference."""
from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch

from stepladder.launch import config
from stepladder.launch.train import lr_at
from stepladder.model.config import BlockConfig
from stepladder.parallel.build import Parts, build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.optimizer import Optimizer
from stepladder.parallel.support import Parallel


def parts(dtype: torch.dtype = torch.float64, channel: str = "moe0") -> Parts:
    return build(tiny.config("gla0", channel, "ladder"), Mesh(Parallel(), torch.device("cpu")), seed=1, dtype=dtype)


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e9])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_a_step_is_torchs_adamw_on_the_mean_loss(clip: float, dtype: torch.dtype, error: float) -> None:
    ours, theirs = parts(dtype), parts(dtype)
    optimizer = Optimizer(ours, clip=clip, weight_decay=0.3, eps=1e-3)
    learn = {n: p for n, p in theirs.parameters().items() if p.requires_grad}
    matrices = [p for p in learn.values() if p.ndim > 1]
    vectors = [p for p in learn.values() if p.ndim == 1]              # norms, biases, decays: no weight decay
    adam = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}],
                             betas=(0.9, 0.95), eps=1e-3)
    for at in range(3):
        batch = [tiny.micro(2, 16, seed=at)]
        report = optimizer.step(ours.pipe(batch), 1e-2)
        result = theirs.pipe(batch)
        for p in learn.values():
            assert p.grad is not None
            p.grad /= result.count
        # Not clip_grad_norm_: it adds 1e-6 to the norm, which shows here.
        norm = torch.nn.utils.get_total_norm([p.grad for p in learn.values() if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_([*learn.values()], clip or math.inf, norm - 1e-6)
        adam.param_groups[0]["lr"] = adam.param_groups[1]["lr"] = 1e-2
        adam.step()
        adam.zero_grad()
        assert float(report.norm) == pytest.approx(float(norm), rel=error)
    for name, p in ours.parameters().items():
        if p.requires_grad:
            assert float((p - learn[name]).detach().norm() / learn[name].detach().norm()) < error, name


def test_the_next_step_waits_for_a_checkpoints_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, in truth: test_gpu.py: test_a_step_changes_nothing_that_a_checkpoint_still_copies."""
    p, waited = parts(torch.float32, "moe1"), []
    optimizer = Optimizer(p)
    before = {name: t.clone() for name, t in optimizer.state().items()}

    def wait(event: object) -> None:
        waited.append((event, [name for name, t in optimizer.state().items() if not torch.equal(t, before[name])]))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_event=wait))
    optimizer.copying = "copied"  # pyright: ignore[reportAttributeAccessIssue]
    for at in range(2):
        optimizer.step(p.pipe([tiny.micro(2, 16, seed=at)]), 1e-2)
    assert waited == [("copied", [])]


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    p = parts(torch.float32, "moe1")                                   # with a balance bias, which must not move either
    optimizer = Optimizer(p)
    optimizer.step(p.pipe([tiny.micro(2, 16)]), 1e-2)
    before = {name: t.clone() for name, t in optimizer.state().items()}
    result = p.pipe([tiny.micro(2, 16)])
    grad = p.decoder.get_parameter("blocks.1.token.wq").grad
    assert grad is not None
    grad[0, 0] = math.inf
    report = optimizer.step(result, 1e-2)
    assert (float(report.skipped), float(report.streak)) == (1, 1)
    changed = {n for n, t in optimizer.state().items() if not torch.equal(t, before[n])}
    assert changed == {"optimizer/skipped", "optimizer/streak"}
    report = optimizer.step(p.pipe([tiny.micro(2, 16)]), 1e-2)
    assert (float(report.skipped), float(report.streak), float(optimizer.steps)) == (1, 0, 2)


def test_a_piece_that_three_ranks_hold_counts_once_to_the_last_digit() -> None:
    """A third of it each, which fp32 does not know."""
    one, three = parts(), parts()
    three.copies = lambda name: 3  # pyright: ignore[reportAttributeAccessIssue]
    whole, third = (Optimizer(p).step(p.pipe([tiny.micro(2, 16)]), 1e-2).norm for p in (one, three))
    assert float(third) * 3**0.5 == pytest.approx(float(whole), rel=1e-12)


def test_crowds_are_of_the_experts_that_a_layer_has() -> None:
    few, many = (BlockConfig(tiny.TOKENS["gla0"], replace(tiny.CHANNELS["moe0"], experts=n), (0, 0)) for n in (2, 4))
    cfg = replace(tiny.config(layers=2), blocks={"few": few, "many": many}, pattern=("few", "many"))
    optimizer = Optimizer(build(cfg, Mesh(Parallel(), torch.device("cpu")), seed=1))
    assert optimizer.crowds(torch.tensor([[3.0, 1, 0, 0], [1, 1, 4, 2]])) == [1.5, 2.0]


@pytest.mark.parametrize(("schedule", "want"), [
    ("cosine", {1: 0.25, 4: 1.0, 52: 0.55, 100: 0.1}), ("wsd", {2: 0.5, 4: 1.0, 90: 1.0, 95: 0.55, 100: 0.1})])
def test_the_learning_rate_warms_up_and_falls(schedule: str, want: dict[int, float]) -> None:
    o = config.Optimizer(lr=2.0, schedule=schedule, warmup_steps=4,  # pyright: ignore[reportArgumentType]
                         decay_steps=10 if schedule == "wsd" else 0)
    for at, share in want.items():
        assert lr_at(at, o, 100) == pytest.approx(2.0 * share), at
