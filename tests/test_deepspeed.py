"""DeepSpeed as the engine: the losses of FSDP2, checkpoints that either reads, and refusals in a sentence.

NVMe and the kernels that it compiles take minutes: tests/nvme.py, by `make deepspeed-test`.
"""
from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import corpora
import pytest
import ranks
import test_resume
import tiny
import torch

from stepladder.launch import config, rules
from stepladder.launch.config import ConfigError
from stepladder.launch.world import World
from stepladder.parallel import zero
from stepladder.parallel.build import build
from stepladder.parallel.checkpoint import Store
from stepladder.parallel.labels import span
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.optimizer import Optimizer
from stepladder.parallel.shard import local
from stepladder.parallel.support import Parallel, UnsupportedError, refuse

ZERO = {f"zero{stage}{' offload' if offload else ''}": Parallel(engine="deepspeed", zero=stage, offload=offload)
        for stage in (1, 2, 3) for offload in (False, True)}
LAYOUTS = ZERO | {"fsdp": Parallel(), "ddp": Parallel(shard=False)}
CPU = torch.device("cpu")
# At 1e-3 a weight that is changed by 1e-7 changes the loss by 2e-5 after 20 steps, so no two engines agree to 1e-5.
LR = 3e-4
ranks.preload("deepspeed", "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.zero.stage3",
              "torch._inductor.compile_fx")              # three seconds of every rank


class Run:
    """A few steps of a model on this rank's share of each batch."""

    def __init__(self, rank: int, n: int, parallel: Parallel, dtype: torch.dtype = torch.float32, seed: int | None = 3,
                 **kw: Any):
        World(rank, n, rank).export(CPU)
        model = replace(tiny.config("every", "between", "mixed"), std=0.1)
        self.parts = build(model, Mesh(parallel, CPU, rank, n), seed=seed, dtype=dtype, **kw)
        for p in self.parts.parameters().values() if seed is None else ():
            local(p.detach()).fill_(torch.nan)           # as what memory held before may be
        self.adam, self.at = Optimizer(self.parts, clip=0.5, weight_decay=0.3), 0

    def steps(self, count: int) -> list[float]:
        return [self.step() for _ in range(count)]

    def step(self, after_backward: Callable[[], None] = lambda: None) -> float:
        mesh = self.parts.mesh
        micros = [tiny.micro(2, 24, seed=10 * self.at + i) for i in range(4)]
        result = self.parts.pipe(micros[mesh.dp_rank::mesh.dp])
        after_backward()
        self.parts.sums()
        self.at += 1
        return float(self.adam.step(result, LR).loss)

    def held_out(self) -> float:
        return float(self.parts.pipe([tiny.micro(2, 24, seed=999)], train=False).nll)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()      # pyright: ignore
                for name, t in self.adam.state().items()}


def losses(rank: int, n: int, layouts: list[str], steps: int, kw: dict[str, Any]) -> list[list[float]]:
    """Of training, of an evaluation, and of a step after it."""
    return [[*(run := Run(rank, n, LAYOUTS[name], **kw)).steps(steps), run.held_out(), *run.steps(1)]
            for name in layouts]


def test_every_stage_has_the_losses_of_fsdp2() -> None:
    layouts = ["zero1", "zero2", "zero3 offload"]
    want, *rest = ranks.run(2, losses, ["fsdp", *layouts], 20, {})[0]
    for name, got in zip(layouts, rest, strict=True):
        assert got == pytest.approx(want, rel=2e-6), name


def test_bf16_has_the_losses_of_fsdp2_in_bf16_and_recomputes() -> None:
    layouts = ["zero1", "zero2 offload", "zero3"]
    want, *rest = ranks.run(2, losses, ["fsdp", *layouts], 6, {"dtype": torch.bfloat16, "recompute": "both"})[0]
    for name, got in zip(layouts, rest, strict=True):
        assert got == pytest.approx(want, rel=2e-3), name


def masters(rank: int, n: int) -> list[tuple[str, bool, list[str]]]:
    """Layout, whether what it computes with is bf16, and what of its first checkpoint was rounded."""
    want, seen = Run(rank, n, LAYOUTS["ddp"]).weights(), []
    for name in ("zero1", "zero2", "zero3"):
        run = Run(rank, n, ZERO[name], torch.bfloat16)
        assert run.adam.zero is not None
        half = all(p.dtype == torch.bfloat16 for p in run.adam.zero.params.values())
        seen.append((name, half, [key for key, t in run.weights().items() if not torch.equal(t, want[key])]))
    return seen


def test_masters_are_fp32_and_begin_unrounded() -> None:
    assert ranks.run(2, masters) == [[("zero1", False, []), ("zero2", True, []), ("zero3", True, [])]] * 2


def spoiled(rank: int, n: int) -> list[tuple[float, list[str]]]:
    """How many steps were skipped, and what they changed, where one gradient that DeepSpeed does not see was not
    finite, then all that it sees."""
    seen = []
    for name, dtype in (("zero1 offload", torch.float32), ("zero2", torch.bfloat16), ("zero3", torch.bfloat16)):
        run = Run(rank, n, ZERO[name], dtype)
        ours, backward = run.adam.params, run.parts.pipe.backward
        run.steps(1)
        before = run.weights()
        run.step(lambda p=ours["norm.scale"]: p.grad[0].fill_(math.nan if rank == 0 else 0))
        run.parts.pipe.backward = lambda loss, f=backward: f(loss * math.nan)
        run.step(lambda ps=ours: [p.grad.zero_() for p in ps.values()])
        after = run.weights()
        seen.append((float(run.adam.skipped), [key for key, t in after.items() if not torch.equal(t, before[key])]))
    return seen


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    assert ranks.run(2, spoiled) == [[(2, ["optimizer/skipped", "optimizer/streak"])] * 3] * 2


def saved(run: Run, folder: Path) -> None:
    Store(folder, background=False).save(run.at, run.adam.state(), {}, shapes=run.adam.shapes())


def resumed(rank: int, n: int, layout: str, folder: Path) -> Run:
    """Without initial values, as a resume is."""
    run, store = Run(rank, n, LAYOUTS[layout], seed=None), Store(folder)
    path = store.newest()
    assert path is not None
    store.load(path, run.adam.state())
    run.adam.loaded()
    run.at = store.saved or 0
    return run


def handed_on(rank: int, n: int, layouts: list[str], folder: Path) -> tuple[list[float], list[float]]:
    """Losses of two steps on each layout, from the checkpoint of the one before, and of a run that stays on the
    first."""
    run = Run(rank, n, LAYOUTS[layouts[0]])
    seen = run.steps(2)
    saved(run, folder)
    want = seen + run.steps(2 * len(layouts) - 2)
    for name in layouts[1:]:
        run = resumed(rank, n, name, folder)
        seen = seen + run.steps(2)
        saved(run, folder)
    return seen, want


def test_a_checkpoint_of_one_engine_goes_on_under_the_other(tmp_path: Path) -> None:
    layouts = ["fsdp", "zero3 offload", "zero1", "fsdp", "zero3", "zero2 offload", "ddp"]
    for got, want in ranks.run(2, handed_on, layouts, tmp_path):
        assert got == pytest.approx(want, rel=1e-5)


EXACT = ["zero1", "zero2 offload", "zero3", "zero3 offload"]


def again(rank: int, n: int, folder: Path) -> list[tuple[list[float], list[float]]]:
    return [handed_on(rank, n, [name, name], folder / name) for name in EXACT]


def test_a_resume_on_the_same_layout_is_exact(tmp_path: Path) -> None:
    for got, want in ranks.run(2, again, tmp_path)[0]:
        assert got == want


def named(rank: int, n: int) -> None:
    for layout in (ZERO["zero2"], ZERO["zero3"]):
        run = Run(rank, n, layout)
        assert run.adam.zero is not None
        engine = run.adam.zero.engine.optimizer
        assert hasattr(engine, "_lazy_init_hp_params_optimizer_state") == (layout.zero < 3)
        report = run.adam.step(run.parts.pipe([tiny.micro(2, 24)]), 1e-3)
        assert 0 < float(engine._global_grad_norm) * n < float(report.norm * report.count)


def test_global_grad_norm_and_lazy_init_hp_params_optimizer_state_are_there() -> None:
    ranks.run(1, named)


def test_train_is_the_same_command_under_deepspeeds_launcher_and_alone(tmp_path: Path) -> None:
    """Three steps on two ranks, whose checkpoint one rank goes on from."""
    toml = tmp_path / "run.toml"
    shards = corpora.corpus(tmp_path / "shards", corpora.texts(200))
    toml.write_text(test_resume.RUN.replace("SHARDS", str(shards)).replace("WORKERS", "0").replace("1e-2", "1e-3"))
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(port),
         "--module", "stepladder.launch.cli", "train", str(toml), "--folder", str(tmp_path / "zero"), "train.steps=4",
         "parallel.engine=deepspeed", "--steps-now", "3"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "dp2 zero3" in done.stdout
    assert "told by DeepSpeed's launcher" in done.stdout
    alone = "train.steps=4", "parallel.engine=deepspeed", "parallel.zero=2"
    ranks.run(1, test_resume.lambda_train, toml, tmp_path / "zero", alone)
    ranks.run(2, test_resume.lambda_train, toml, tmp_path / "fsdp", ("train.steps=4",))
    got, want = ([r["loss"] for r in test_resume.records(tmp_path / run).values()] for run in ("zero", "fsdp"))
    assert got == pytest.approx(want, rel=1e-5)
    assert len(got) == 4


def test_the_pieces_of_a_dimension_are_all_of_it() -> None:
    for n, count in ((8, 2), (7, 2), (7, 4), (4, 4), (3, 4)):
        assert [i for rank in range(count) for i in span(n, rank, count)] == list(range(n))


@pytest.mark.parametrize(("layout", "dp", "sentence"), [
    (Parallel(tp=2, engine="deepspeed"), 1, "tp x zero is not a supported layout; the nearest is "),
    (Parallel(pp=2, engine="deepspeed"), 2, "pp x zero is not a supported layout; the nearest is "),
    (Parallel(ep=2, engine="deepspeed"), 2, "ep x zero is not a supported layout; the nearest is "),
    (Parallel(dp_replicate=2, engine="deepspeed"), 4, "hsdp x zero is not a supported layout; the nearest is "),
    (Parallel(shard=False, engine="deepspeed"), 2, "ddp x zero is not a supported layout; the nearest is ")])
def test_anything_but_data_parallelism_is_refused(layout: Parallel, dp: int, sentence: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^{sentence}"):
        refuse(tiny.config(), layout, dp)


OFFLOADED = ["parallel.engine=deepspeed", "parallel.offload=true"]
DEMO = Path(__file__).parents[1] / "examples/demo.toml"


def says(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        rules.check(config.load(DEMO, overrides), 1)
    return str(error.value)


@pytest.mark.parametrize(("overrides", "sentence"), [
    (["parallel.zero=2"], 'parallel.zero = 2 is for engine = "deepspeed", but the engine is "fsdp"; drop zero'),
    (["parallel.zero=3"], 'parallel.zero = 3 is for engine = "deepspeed", but the engine is "fsdp"; drop zero'),
    (["parallel.engine=deepspeed", "parallel.reshard=false"],
     'parallel.reshard = false is for engine = "fsdp", but the engine is "deepspeed"; drop reshard or change'),
    (["parallel.shard=false", "parallel.reshard=false"],
     "parallel.reshard = false is about what FSDP shards, but parallel.shard = false; drop reshard or shard"),
    ([*OFFLOADED, "parallel.nvme=/nowhere/disk"], 'parallel.nvme = "/nowhere/disk" is no folder of '),
    ([*OFFLOADED, "parallel.nvme=/dev/null"], 'parallel.nvme = "/dev/null" is no folder of '),
    ([*OFFLOADED, "parallel.nvme=/proc"], 'parallel.nvme = "/proc" takes no files on '),
    (["parallel.nvme=/tmp"], 'parallel.nvme = "/tmp" is for engine = "deepspeed", but the engine is "fsdp"; drop nvme'),
    (["parallel.engine=deepspeed", "parallel.zero=0"], "parallel.zero = 0 is not one of 1, 2, 3"),
    (["parallel.engine=deepspeed", "parallel.shard=false"], 'parallel.shard = false, but parallel.engine = '),
    (["parallel.engine=deepspeed", "train.dtype=fp64"], 'train.dtype = "fp64", but parallel.engine = "deepspeed"'),
    (["parallel.engine=deepspeed", "train.graph=true"], 'train.graph = true with parallel.engine = "deepspeed"'),
    (["parallel.engine=deepspeed", "parallel.nvme=/tmp"], 'parallel.nvme = "/tmp" is where ZeRO-3 offloads to, but '
     "parallel.zero = 3 and parallel.offload = false; set 3 and true"),
])
def test_what_deepspeed_cannot_do_is_refused(overrides: list[str], sentence: str) -> None:
    said = says(*overrides)
    assert said.startswith(sentence)
    assert ";" in said or "not one of" in said                   # the way out


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    assert "pip install 'stepladder[deepspeed]'" in says("parallel.engine=deepspeed")


def test_a_disk_that_cannot_be_read_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = SimpleNamespace(is_compatible=lambda verbose: False)
    package = SimpleNamespace(AsyncIOBuilder=lambda: reader, __compatible_ops__={})
    monkeypatch.setattr(zero, "import_module", lambda name: package)
    with pytest.raises(ValueError, match=r'parallel.nvme = "/disk" needs libaio, .* apt install libaio-dev'):
        zero._deepspeed(Mesh(replace(ZERO["zero3 offload"], nvme="/disk"), CPU))


def test_export_says_where_a_rank_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of Slurm that sees one GPU finds it as number 0, whatever its own number is."""
    for key in ("LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(key, "")
    World(3, 4, 1).export(CPU)
    assert (os.environ["LOCAL_RANK"], os.environ["DS_ACCELERATOR"]) == ("1", "cpu")
    World(3, 4, 1).export(torch.device("cuda", 0))
    assert (os.environ["LOCAL_RANK"], os.environ["DS_ACCELERATOR"]) == ("0", "cuda")
