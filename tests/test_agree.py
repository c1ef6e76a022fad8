"""Ranks that were not started alike, or hold other batches, are told so; those that agree train as one does."""
from __future__ import annotations

import contextlib
import io
import json
import time
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import corpora
import pytest
import ranks
import torch
import torch.distributed as dist
from test_watch import CPU, store

from stepladder.data.loader import Batch, Loader
from stepladder.launch import agree, cli
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel


def disagreement(rank: int, n: int, config: dict[int, str], flags: dict[int, int]) -> str:
    agree.on_the_run(store(), rank, n, config[0], {}, 1)      # ranks that agree go on
    with pytest.raises(agree.Disagreement) as caught:
        agree.on_the_run(store(), rank, n, config.get(rank, config[0]), {"--steps-now": flags.get(rank)}, 1)
    return str(caught.value)


@pytest.mark.parametrize(("changed", "flags", "says"), [
    ({1: "[train]\nsteps = 3\nlr = 1"}, {}, "train.steps: 2 on ranks 0 and 2, 3 on rank 1; start every rank with"),
    ({2: "[train]\nsteps = 2\n"}, {}, "train.lr: 1 on ranks 0 and 1, absent on rank 2; start every rank"),
    ({}, {0: 5}, "--steps-now: 5 on rank 0, null on ranks 1 and 2; start"),
])
def test_ranks_with_different_settings_are_told_the_first_key(changed, flags, says) -> None:
    found = ranks.run(3, disagreement, {0: "[train]\nsteps = 2\nlr = 1"} | changed, flags)
    assert len(set(found)) == 1
    assert found[0].startswith(f"the ranks differ in {says}")


def test_code_is_told_apart_by_every_byte_and_name(tmp_path: Path) -> None:
    for layer in agree.LAYERS:
        (tmp_path / layer / "deep").mkdir(parents=True)
    file = tmp_path / "model" / "deep" / "a.py"
    found = [agree.code(tmp_path)]
    for text in ("x = 1", "x = 2"):
        file.write_text(text)
        found.append(agree.code(tmp_path))
    file.rename(file.with_name("b.py"))
    assert len({*found, agree.code(tmp_path), agree.code()}) == 5


def differing_code(rank: int, n: int) -> str:
    agree.code = lambda: f"hash{rank}"
    with pytest.raises(agree.Disagreement) as caught:
        agree.on_the_run(store(), rank, n, "", {}, 1)
    return str(caught.value)


def test_ranks_with_different_code_are_told_so() -> None:
    assert ranks.run(2, differing_code) == [
        'the ranks differ in the code of stepladder: "hash0" on rank 0, "hash1" on rank 1; '
        "install one version on every machine"] * 2


def absence(rank: int, n: int, absent: int) -> str:
    if rank == absent:
        time.sleep(1.5)
        return ""
    agree.GOODBYE = agree.MARGIN = timedelta(seconds=0.5)     # the absent one does not hear it
    with pytest.raises(agree.Missing) as caught:
        agree.on_the_run(store(), rank, n, "", {}, 0.01)
    return str(caught.value)


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_does_not_come_to_the_start_is_named(absent: int) -> None:
    found = ranks.run(3, absence, absent)
    for said in (found[2], found[1 - absent]):
        assert said.startswith(f"rank {absent} did not come within 0.01 minutes")


def comes(port: int, rank: int, size: int, heard: Connection) -> None:
    """A process of a start that may well be killed: says how many of it have met in what it takes for their part."""
    met = agree.on_the_start(dist.TCPStore("127.0.0.1", port), rank, size, 0.5)
    heard.send(met.add("met", 1))


def test_ranks_that_are_started_again_meet_whoever_came_first_and_nobody_of_before() -> None:
    """In a store that outlives them, as torchrun's does, which numbers no start."""
    outlives = dist.TCPStore("127.0.0.1", 0, is_master=True)
    hear, said = Pipe(duplex=False)

    def start(*came: int, size: int, waits: str = "") -> list[ForkServerProcess]:
        """These ranks, in this order; who waits under that key is let be."""
        started = []
        for rank in came:
            started.append(ranks.process(comes, outlives.port, rank, size, said))
            started[-1].start()
            if waits:
                outlives.wait([waits.format(rank)], timedelta(seconds=20))
        return started

    def meet(started: list[ForkServerProcess]) -> None:
        assert all(hear.poll(20) for _ in started)
        assert sorted(hear.recv() for _ in started) == [*range(1, 1 + len(started))]

    meet(start(0, 1, size=2))
    for process in start(0, size=2, waits="start/2/0"):                   # rank 1 dies before it comes, then this
        process.kill()
    meet([*start(1, size=2, waits="start/2/1"), *start(0, size=2)])       # rank 1 comes to the one that failed
    meet(start(2, 1, 0, size=3))                                          # joined by another machine
    meet(start(0, size=1, waits="start/5/open"))


def batches(rank: int, n: int, layout: Parallel, odd: int, part: str) -> str:
    mesh = Mesh(layout, CPU, rank, n)
    rows = torch.arange(8).view(2, 4) + 100 * mesh.dp_rank
    batch = Batch(rows, rows + 1, rows % 4 == 0, {})
    agree.on_the_batch(store(), mesh, 1, [batch, batch], 1)   # ranks that agree go on
    other = {"start": ~batch.start, "tokens": rows + 1, "targets": rows}[part]
    with pytest.raises(agree.Disagreement) as caught:
        agree.on_the_batch(store(), mesh, 2, [batch, batch._replace(**{part: other}) if rank == odd else batch], 1)
    return str(caught.value)


@pytest.mark.parametrize(("layout", "odd", "part", "alike"), [
    (Parallel(tp=2), 3, "tokens", 2), (Parallel(pp=2), 3, "targets", 1), (Parallel(pp=2), 2, "start", 0)])
def test_ranks_that_must_hold_the_same_batch_are_named_where_they_do_not(layout, odd, part, alike) -> None:
    found = ranks.run(4, batches, layout, odd, part)
    assert len(set(found)) == 1
    dp_rank = Mesh(layout, CPU, odd, 4).dp_rank
    assert found[0].startswith(f"the ranks of data-parallel rank {dp_rank} hold different batches in step 2: ")
    assert f" on rank {alike}, " in found[0]
    assert f" on rank {odd}; make data.sources" in found[0]


RUN = """
[model]
vocab = 260
width = 32
layers = 2
pattern = ["full"]
[model.blocks.full]
token = { kind = "attention", heads = 2, head_dim = 8 }
channel = { kind = "swiglu", hidden = 32 }
lag = [1, 1]
[data]
seq = 32
batch_tokens = 192
rows = 1
lanes = 6
[data.sources.small]
shards = "SHARDS"
[train]
steps = 4
device = "cpu"
dtype = "fp64"
[optimizer]
lr = 1e-2
"""


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    shards = corpora.corpus(folder / "shards", corpora.texts(200))
    (folder / "run.toml").write_text(RUN.replace("SHARDS", str(shards)))
    return folder / "run.toml"


def program(rank: int, n: int, toml: Path, folder: Path, *more: str, own: str = "") -> tuple[int, str, str]:
    """`stepladder train`, `own` added on rank 1: exit code and what it wrote."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main(["train", str(toml), "--folder", str(folder), *more, *([own] if own and rank == 1 else [])])
    return code, out.getvalue(), err.getvalue()


def other_seed(rank: int, n: int, toml: Path, folder: Path) -> tuple[int, str, str]:
    return program(rank, n, toml, folder, own="train.seed=1")


def other_batch(rank: int, n: int, toml: Path, folder: Path) -> tuple[int, str, str]:
    read = Loader.__next__

    def shifted(self: Loader) -> Batch:
        b = read(self)
        return b._replace(tokens=b.tokens.roll(1)) if rank == 1 and b.cursor else b

    Loader.__next__ = shifted
    return program(rank, n, toml, folder, "parallel.tp=2")


@pytest.mark.parametrize(("fault", "says"), [
    (other_seed, "the ranks differ in train.seed: 0 on rank 0, 1 on rank 1; start every rank with the same"),
    (other_batch, "the ranks of data-parallel rank 0 hold different batches in step 1: "),
])
def test_a_run_whose_ranks_differ_ends_with_a_sentence_and_exit_code_2(fault, says, toml, tmp_path) -> None:
    for code, out, err in ranks.run(2, fault, toml, tmp_path / "run"):
        assert code == 2
        assert err.startswith(f"stepladder: {says}")
        assert err.count("\n") == 1
        assert " loss " not in out


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_three_ranks_train_as_one_does_and_the_log_begins_with_the_mesh(toml: Path, tmp_path: Path) -> None:
    """Of four ranks three are left, and 3 divides neither the width nor the heads."""
    for n in (1, 3):
        found = ranks.run(n, program, toml, tmp_path / f"{n}")
        assert {code for code, _, _ in found} == {0}
        mesh = f"Mesh({n} cpu: pp1 x dp{n}{' fsdp' if n > 1 else ''} x tp1, ep1 x edp{n})"
        assert found[0][1].startswith(mesh)
        first, *rest = map(json.loads, (tmp_path / f"{n}" / "metrics.jsonl").read_text().splitlines())
        assert first["mesh"] == mesh
        assert not any("mesh" in record for record in rest)
    assert losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "1"), rel=1e-10)


@pytest.mark.parametrize(("layout", "n", "says"), [
    (Parallel(), 1, "Mesh(1 cpu: pp1 x dp1 x tp1, ep1 x edp1)"),
    (Parallel(tp=2, pp=2, ep=2, sequence=True), 8, "Mesh(8 cpu: pp2 1f1b x dp2 fsdp x tp2 sp, ep2 x edp2)"),
    (Parallel(pp=2, schedule="interleaved", shard=False), 4, "Mesh(4 cpu: pp2 interleaved x dp2 x tp1, ep1 x edp2)"),
    (Parallel(dp_replicate=2, offload=True), 4, "Mesh(4 cpu: pp1 x dp4=2x2 fsdp offload x tp1, ep1 x edp4)"),
])
def test_one_line_says_how_ranks_are_laid_out(layout: Parallel, n: int, says: str) -> None:
    assert repr(Mesh(layout, CPU, 0, n)) == says
