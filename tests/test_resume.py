"""A run that dies and starts again is, bit for bit, the run that never died; another layout goes on where it stood."""
from __future__ import annotations

import gzip
import io
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import corpora
import pytest
import ranks
import tiny
import torch

from stepladder.launch import cli, hardware
from stepladder.parallel import checkpoint, init
from stepladder.parallel.build import build
from stepladder.parallel.checkpoint import Store
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.optimizer import Optimizer, Report
from stepladder.parallel.shard import local
from stepladder.parallel.support import Parallel

STEPS, EVERY = 12, 3
RUN = f"""
[model]
vocab = 260
width = 32
layers = 4
pattern = ["gla", "full"]
[model.blocks.gla]
token = {{ kind = "gla", heads = 2, key_dim = 8, value_dim = 8 }}
channel = {{ kind = "moe", experts = 4, top_k = 2, hidden = 16, ahead = true, bias_rate = 0.01 }}
lag = [1, 1]
[model.blocks.full]
token = {{ kind = "attention", heads = 4, kv_heads = 2, head_dim = 8 }}
channel = {{ kind = "swiglu", hidden = 32 }}
lag = [0, 1]
[data]
seq = 32
batch_tokens = 512
rows = 4
lanes = 4
workers = WORKERS
[data.sources.small]
shards = "SHARDS"
[train]
steps = {STEPS}
device = "cpu"
dtype = "fp32"
[optimizer]
lr = 1e-2
warmup_steps = 2
[checkpoint]
every = {EVERY}
keep_last = 20
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    shards = corpora.corpus(folder / "shards", corpora.texts(200))
    for workers in (0, 1):
        text = RUN.replace("SHARDS", str(shards)).replace("WORKERS", str(workers))
        (folder / f"run{workers}.toml").write_text(text)
    return folder


def train(config: Path, run: Path, *more: str) -> int:
    """`stepladder train` in this process, its words kept back."""
    with redirect_stdout(io.StringIO()):
        return cli.main(["train", str(config), "--folder", str(run), *more])


def records(run: Path) -> dict[int, dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return {r["step"]: r for r in map(json.loads, (line for line in lines if line.endswith("\n")))}


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    """The run that never dies."""
    _alone(folder / "run0.toml", folder / "whole")
    return folder / "whole"


def _alone(config: Path, run: Path, *more: str) -> None:
    ranks.run(1, lambda_train, config, run, more)


def lambda_train(rank: int, n: int, config: Path, run: Path, more: tuple[str, ...] = ()) -> None:
    assert train(config, run, *more) == 0


def without_initial_values(rank: int, n: int, config: Path, run: Path, more: tuple[str, ...]) -> None:
    """Making them takes a large model longer than loading it."""
    init.fill = lambda *_: pytest.fail("a checkpoint has all weights")
    lambda_train(rank, n, config, run, more)


def killed(target: Callable[..., None], *args: Any, when: Callable[[], bool]) -> None:
    """Runs target in a process of its own and kills it with SIGKILL as soon as `when` holds."""
    process = ranks.process(target, *args)
    process.start()
    assert process.pid is not None
    end = time.monotonic() + 60
    while not when():
        assert process.is_alive(), "it ended by itself"
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def in_a_step(config: Path, run: Path, at: int) -> None:
    """Trains; stops dead between the backward pass and the update of step `at`, having said so."""
    update = Optimizer.step

    def step(self: Optimizer, *args: Any, **kw: Any) -> Report:
        if int(self.steps) == at - 1:
            (run / "now").touch()
            time.sleep(60)
        return update(self, *args, **kw)

    torch.set_num_threads(1)
    Optimizer.step = step
    train(config, run)


def in_a_save(config: Path, run: Path, at: int) -> None:
    """Trains; the save of step `at` stops dead when its files are written but not published."""
    publish = Store._publish

    def slow(self: Store, step: int, *args: Any, **kw: Any) -> Any:
        if step == at:
            (run / "now").touch()
            time.sleep(60)
        return publish(self, step, *args, **kw)

    torch.set_num_threads(1)
    Store._publish = slow
    train(config, run)


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    path = run / "checkpoints" / f"step-{step:08d}"
    state = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.names(path).items()}
    checkpoint.fill(path, state)
    return state


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("death", "at"), [(in_a_step, 5), (in_a_step, 10), (in_a_save, 6)])
def test_a_killed_run_goes_on_bitwise(folder: Path, undisturbed: Path, death: Callable[..., None], at: int,
                                      workers: int) -> None:
    run, config = folder / f"{death.__name__}-{at}-{workers}", folder / f"run{workers}.toml"
    killed(death, config, run, at, when=(run / "now").exists)
    left = checkpoint.steps(run / "checkpoints")
    assert [p.name for p in left] == [f"step-{s:08d}" for s in range((at - 1) // EVERY * EVERY, 0, -EVERY)]
    ranks.run(1, without_initial_values, config, run, ("--resume", "must"))
    ours, theirs = records(run), records(undisturbed)
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "lr", "tokens", "load", "entropy"):
        assert [r[key] for r in ours.values()] == [r[key] for r in theirs.values()], key
    ends = tensors(run, STEPS), tensors(undisturbed, STEPS)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(a, ends[1][name]) for name, a in ends[0].items())


def test_a_prefetched_batch_does_not_reach_the_checkpoint(folder: Path, undisturbed: Path) -> None:
    """The mutation: a cursor taken from the loader's own position, not from the batch, skips rows after a resume."""
    run = folder / "greedy"
    ranks.run(1, greedy, folder / "run0.toml", run)
    _alone(folder / "run0.toml", run)
    losses = [[r["loss"] for r in records(f).values()] for f in (run, undisturbed)]
    assert losses[0][:EVERY] == losses[1][:EVERY]
    assert losses[0][EVERY] != losses[1][EVERY]


def greedy(rank: int, n: int, config: Path, run: Path) -> None:
    from stepladder.launch.train import Trainer
    save = Trainer.save

    def ahead(self: Trainer) -> None:
        self.cursor = next(self.loader).cursor            # the batch after the one that was trained on
        save(self)

    Trainer.save = ahead
    lambda_train(rank, n, config, run, ("--steps-now", str(EVERY)))


LAYOUTS = {        # name -> layout, ranks
    "alone": (Parallel(), 1), "tp": (Parallel(tp=2), 2), "sp": (Parallel(tp=2, sequence=True), 2),
    "pp": (Parallel(pp=2), 2), "interleaved": (Parallel(pp=2, schedule="interleaved"), 2),
    "zero-bubble": (Parallel(pp=2, schedule="zero-bubble"), 2), "fsdp": (Parallel(), 2), "ep": (Parallel(ep=2), 2),
    "ddp": (Parallel(shard=False), 2), "offloaded": (Parallel(tp=2, offload=True), 2),
    "tp4": (Parallel(tp=4), 4), "pp4": (Parallel(pp=4), 4), "ep4": (Parallel(tp=2, ep=4), 4),
    "hsdp": (Parallel(dp_replicate=2), 4)}
SAVED = 3


def model(name: str, rank: int, n: int, seed: int | None) -> Optimizer:
    cfg = tiny.config("every", "between", "mixed", tied=True)
    parts = build(cfg, Mesh(LAYOUTS[name][0], torch.device("cpu"), rank, n), seed=seed, dtype=torch.float64)
    return Optimizer(parts, eps=1e-3)       # large: where a gradient is all but zero, Adam would amplify its rounding


def step(optimizer: Optimizer, at: int) -> Report:
    mesh = optimizer.parts.mesh
    batch = [tiny.micro(2, 16, seed=10 * at + i) for i in range(4)]
    result = optimizer.parts.pipe(batch[mesh.dp_rank::mesh.dp])
    optimizer.parts.sums()
    return optimizer.step(result, 1e-2)


def write(rank: int, n: int, names: list[str], out: Path) -> None:
    for name in names:
        optimizer = model(name, rank, n, seed=5)
        for at in range(SAVED):
            step(optimizer, at)
        Store(out / name, background=False).save(SAVED, optimizer.state(), {}, shapes=optimizer.shapes())


def read(rank: int, n: int, pairs: list[tuple[str, str]], out: Path) -> list[tuple[float, float, list[float] | None]]:
    """Resumes each written checkpoint in each layout and takes the next step: loss, norm, a moment where it is held."""
    found = []
    for written, name in pairs:
        optimizer, store = model(name, rank, n, seed=None), Store(out / written)
        for p in optimizer.parts.parameters().values():
            local(p.detach()).fill_(torch.nan)
        path = store.newest()
        assert path is not None
        store.load(path, optimizer.state())
        optimizer.loaded()
        report = step(optimizer, SAVED)
        moment = optimizer.state().get("optimizer/exp_avg_sq/blocks.3.token.wq")
        whole = moment.full_tensor() if hasattr(moment, "full_tensor") else moment  # pyright: ignore
        found.append((float(report.loss), float(report.norm), None if whole is None else whole.flatten().tolist()))
    return found


def test_every_layout_writes_the_same_checkpoint_and_takes_the_same_step_from_it(tmp_path: Path) -> None:
    """Each reads one rank's, and that of the layout before it, which is the same as every other's."""
    of = {n: [name for name, (_, ranks_) in LAYOUTS.items() if ranks_ == n] for n in (1, 2, 4)}
    for n, names in of.items():
        ranks.run(n, write, names, tmp_path)
    written = {name: tensors(tmp_path / name, SAVED) for name in LAYOUTS}
    for name, state in written.items():
        assert state.keys() == written["alone"].keys(), name
        for key, ours in written["alone"].items():
            assert float((state[key] - ours).norm()) <= 1e-8 * float(ours.norm()), (name, key)
    ((loss, norm, moment),) = ranks.run(1, read, [("alone", "alone")], tmp_path)[0]
    order = [*LAYOUTS]
    for n, names in of.items():
        pairs = [(other, name) for name in names for other in ("alone", order[order.index(name) - 1])]
        answers = ranks.run(n, read, pairs, tmp_path, timeout=240)
        for pair, results in zip(pairs, zip(*answers, strict=True), strict=True):
            held = [theirs for _, _, theirs in results if theirs is not None]
            assert held, pair                                   # by the ranks of one stage at least
            assert all(abs(theirs / loss - 1) < 1e-10 for theirs, _, _ in results), pair
            assert all(abs(theirs / norm - 1) < 1e-10 for _, theirs, _ in results), pair
            assert all(theirs == pytest.approx(moment, rel=1e-8, abs=1e-14) for theirs in held), pair


def test_a_run_goes_on_over_other_ranks(folder: Path, undisturbed: Path) -> None:
    """One rank, then two by data, two by tensor, and one again: the same losses but for rounding."""
    run = folder / "moved"
    for n, more in ((1, ()), (2, ()), (2, ("parallel.tp=2", "parallel.sequence=true")), (1, ())):
        ranks.run(n, lambda_train, folder / "run0.toml", run, ("--steps-now", "3", *more))
    ours, theirs = records(run), records(undisturbed)
    assert list(ours) == list(theirs)
    assert [r["loss"] for r in ours.values()][:3] == [r["loss"] for r in theirs.values()][:3]
    for step_, r in ours.items():
        assert abs(r["loss"] / theirs[step_]["loss"] - 1) < 1e-4, step_


def test_a_profile_is_a_trace_of_a_few_steps(folder: Path) -> None:
    _alone(folder / "run0.toml", folder / "traced", "--steps-now", "6", "--profile")
    events = json.loads(gzip.decompress((folder / "traced" / "trace-rank0.json.gz").read_bytes()))["traceEvents"]
    assert sum(e["name"].startswith("Optimizer.step") for e in events) == 3


@pytest.fixture(scope="module")
def piped(folder: Path) -> Path:
    """A run of two ranks, the second of which takes more memory."""
    run, more = folder / "piped", ("parallel.pp=2", "parallel.schedule=zero-bubble")
    ranks.run(2, lopsided, folder / "run0.toml", run, ("--steps-now", "3", "--timeline", *more))
    return run


def lopsided(rank: int, n: int, config: Path, run: Path, more: tuple[str, ...]) -> None:
    hardware.memory = lambda device: 1.5 + rank
    lambda_train(rank, n, config, run, more)


def test_the_memory_logged_is_that_of_the_rank_that_takes_most(piped: Path) -> None:
    assert [r["memory_gib"] for r in records(piped).values()] == [2.5, 2.5, 2.5]


def test_a_timeline_is_a_picture_of_a_step(piped: Path) -> None:
    assert (piped / "timeline.png").read_bytes()[:4] == b"\x89PNG"


EVALUATED = ("data.heldout=0.3", "train.eval_every=3", "train.eval_batches=2", "--steps-now", "6")


@pytest.mark.parametrize("layout", [(), ("parallel.ep=2",), ("parallel.tp=2",), ("parallel.pp=2",),
                                    ("parallel.reshard=false",)], ids=lambda more: more[0] if more else "fsdp")
def test_held_out_loss_and_checkpoints_of_every_layout(folder: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    """The same rows whatever the layout; and a model that has just been evaluated can be saved."""
    one, two = tmp_path / "one", tmp_path / "two"
    ranks.run(1, lambda_train, folder / "run0.toml", one, EVALUATED)
    ranks.run(2, lambda_train, folder / "run0.toml", two, (*EVALUATED, *layout))
    want, got = ([r["eval_loss"] for r in records(run).values() if "eval_loss" in r] for run in (one, two))
    assert len(want) == 2
    assert got == pytest.approx(want, rel=1e-4)
    saved = tensors(two, 6)
    for name, tensor in tensors(one, 6).items():
        assert saved[name].shape == tensor.shape
    assert float((saved["model/norm.scale"] - tensors(one, 6)["model/norm.scale"]).norm()) < 1e-3


def test_ctrl_c_saves(folder: Path, tmp_path: Path) -> None:
    (out,) = ranks.run(1, interrupted, folder / "run0.toml", tmp_path / "run")
    assert "SIGINT: stops after this step, with a checkpoint; again: at once, without\n" in out
    newest = checkpoint.steps(tmp_path / "run" / "checkpoints")[0].name
    assert newest == "step-00000001"             # the one in which it came


def interrupted(rank: int, n: int, config: Path, run: Path) -> str:
    update = Optimizer.step

    def step(self: Optimizer, *args: Any, **kw: Any) -> Report:
        if int(self.steps) == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, *args, **kw)

    Optimizer.step = step
    with redirect_stdout(io.StringIO()) as out:
        assert cli.main(["train", str(config), "--folder", str(run)]) == 0
    return out.getvalue()
