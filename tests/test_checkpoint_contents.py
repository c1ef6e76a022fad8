"""What a checkpoint holds, of all ranks: other layouts and programs can read it, and it runs nobody's code."""

import argparse
import os
import pickle
import re
import resource
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from safetensors import safe_open
from test_checkpoint_store import META, no_room, same, save, step_folders, tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from stepladder.launch import export
from stepladder.parallel import checkpoint, checkpoint_folder
from stepladder.parallel.checkpoint import CheckpointError, Store


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Store(tmp_path), 1)
    path, state = tmp_path / "checkpoints/step-00000001", {"model/b": torch.zeros(7, dtype=torch.bfloat16)}
    evil = pickle.dumps(Evil())
    pickle.loads(evil)
    (tmp_path / "executed").rmdir()  # so it would execute

    index = checkpoint_folder.read_index(path)
    (path / ".metadata").write_bytes(evil)  # where DCP keeps its own
    (path / "rank-00000.bin").write_bytes(evil)
    index["files"]["rank-00000.bin"] = [len(evil), checkpoint_folder._checksum(path / "rank-00000.bin")]
    index["tensors"]["model/b"]["chunks"] = [[[0], [7], "rank-00000.bin", 0]]
    checkpoint_folder.write_index(path, index)
    Store(tmp_path).load(path, state, prefix="model/b")
    (path / "checkpoint.json").write_bytes(evil)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.fill(path, state)
    assert not (tmp_path / "executed").exists()


def test_an_index_cannot_point_out_of_its_folder(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(64))
    save(Store(tmp_path), 1)
    path = tmp_path / "checkpoints/step-00000001"
    index = checkpoint_folder.read_index(path)
    index["tensors"]["model/b"]["chunks"][0][2] = "../../secret"
    checkpoint_folder.write_index(path, index)
    with pytest.raises(CheckpointError, match="not a file of the checkpoint"):
        checkpoint.fill(path, {"model/b": torch.zeros(7, dtype=torch.bfloat16)})
    checkpoint_folder.write_index(path, index | {"files": {"../../secret": [64, "758d6336"]}})
    assert "names a file '../../secret'" in str(checkpoint.valid(path))


def test_another_format_is_refused_by_number(tmp_path):
    save(Store(tmp_path), 1)
    path = tmp_path / "checkpoints/step-00000001"
    checkpoint_folder.write_index(path, checkpoint_folder.read_index(path) | {"format": 2})
    assert "has format 2, this version reads 1" in str(checkpoint.valid(path))


def misfits():
    a = torch.zeros(3, 5)
    yield "missing", {"model/a": a, "model/c": torch.zeros(2)}, r"model/c \(2,\) is not in the checkpoint"
    yield "shape", {"model/a": torch.zeros(5, 3)}, r"model/a is \(3, 5\) in the checkpoint, \(5, 3\) in this model"
    yield "dtype", {"model/a": a.half()}, r"model/a is torch.float32 in the checkpoint, torch.float16 in this model"
    yield "extra", {"model/a": a}, r"model/b \(7,\) is in the checkpoint, but this model has no such tensor"


@pytest.mark.parametrize(("state", "says"), [pytest.param(*case, id=name) for name, *case in misfits()])
def test_a_tensor_that_does_not_fit_is_named_with_both_shapes_and_nothing_is_written(tmp_path, state, says):
    store = Store(tmp_path)
    save(store, 1)
    with pytest.raises(CheckpointError, match=says):
        store.load(store.folder / "step-00000001", state, prefix="model/")
    assert not any(t.any() for t in state.values())


def test_a_part_of_the_names_can_be_loaded_by_prefix(tmp_path):
    store = Store(tmp_path)
    save(store, 1)
    state = {name: torch.zeros_like(t) for name, t in tensors().items() if name.startswith("model/")}
    store.load(store.folder / "step-00000001", state, prefix="model/")
    assert same(state, {name: t for name, t in tensors(1).items() if name in state})


def test_the_first_differing_key_is_named_with_both_values():
    saved = {"model": {"width": 8, "blocks": {"gla": {"token": {"heads": 4}}}}, "manifest": "aa"}
    checkpoint.refuse_mismatch(
        saved, {"model": {"blocks": {"gla": {"token": {"heads": 4}}}, "width": 8}} | {"manifest": "aa"}
    )
    with pytest.raises(
        CheckpointError, match=r"model.blocks.gla.token.heads: the checkpoint was made with 4, this run has 2"
    ):
        checkpoint.refuse_mismatch(
            saved, {"model": {"width": 9, "blocks": {"gla": {"token": {"heads": 2}}}}, "manifest": "aa"}
        )
    with pytest.raises(CheckpointError, match="manifest: the checkpoint was made with 'aa', this run has nothing"):
        checkpoint.refuse_mismatch(saved, {"model": saved["model"]})


def test_another_mixer_is_named_before_its_knobs():
    gla, mamba = ({"model": {"blocks": {"a": {"token": token}}}} for token in (
        {"kind": "gla", "heads": 4, "gate_rank": 16}, {"kind": "mamba", "channels": 64}))
    with pytest.raises(CheckpointError, match=r"token.kind: the checkpoint was made with 'gla', this run has 'mamba'"):
        checkpoint.refuse_mismatch(gla, mamba)


def test_undeclared_state_is_refused(tmp_path):
    store, w = Store(tmp_path), torch.zeros(2, 3)
    for state, shapes, says in [
        ({"w": w}, {"w": (4, 3)}, r"w would be recorded with shape \(2, 3\) but is declared as \(4, 3\)"),
        ({"w": w}, {}, "w is in the state but not declared"),
        ({}, {"w": (2, 3)}, "w is declared but not in the state"),
        ({"w": w.to(torch.complex64)}, {"w": (2, 3)}, "w has dtype torch.complex64"),
    ]:
        with pytest.raises(CheckpointError, match=says):
            store.save(1, state, {}, shapes=shapes)
    assert not store.folder.exists()
    save(store, 1, {})  # nothing to write is no error, and no excuse to skip the check at the next save
    with pytest.raises(CheckpointError, match="declared but not in the state"):
        store.save(2, {}, {}, shapes={"w": (2, 3)})


def test_safetensors_hold_the_model_the_config_and_the_step(tmp_path, capsys):
    save(Store(tmp_path), 7)
    out = tmp_path / "out" / "model.safetensors"
    export.run(argparse.Namespace(run=str(tmp_path), out=str(out)))
    with safe_open(out, "pt") as file:
        assert sorted(file.keys()) == ["a", "b", "none"]
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), tensors(7)[f"model/{name}"])
        assert file.metadata() == {"format": "pt", "config": META["config"], "step": "7"}
    save(Store(tmp_path), 8)
    for folder, step in (tmp_path, "8"), (tmp_path / "checkpoints" / "step-00000007", "7"):
        out = tmp_path / "out" / f"{step}.safetensors"
        export.run(argparse.Namespace(run=str(folder), out=str(out)))
        with safe_open(out, "pt") as file:
            assert file.metadata()["step"] == step
    with pytest.raises(CheckpointError, match="exists already"):
        export.run(argparse.Namespace(run=str(tmp_path), out=str(out)))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export.run(argparse.Namespace(run=str(tmp_path / "out"), out=str(tmp_path / "other")))


def test_an_export_that_does_not_fit_names_its_file_and_leaves_nothing(tmp_path):
    save(Store(tmp_path), 7)
    out = tmp_path / "out" / "model.safetensors"
    with no_room(), pytest.raises(CheckpointError, match=f"^{out}: File too large; make room, or choose another"):
        export.run(argparse.Namespace(run=str(tmp_path), out=str(out)))
    assert not list(out.parent.iterdir())


# --- more than one rank

WHOLE = torch.arange(42.0).view(6, 7)


def labelled(rank: int, n: int, fill: float | None = None) -> dict[str, torch.Tensor]:
    """Parts of WHOLE: rows split (rank 3 of 4 has none), columns split, replicated; and a tensor of rank 1 only."""
    mesh = init_device_mesh("cpu", (n,))
    whole = WHOLE if fill is None else torch.full_like(WHOLE, fill)
    state: dict[str, torch.Tensor] = {}
    for name, placement in {"rows": Shard(0), "columns": Shard(1), "copies": Replicate()}.items():
        local = whole
        if isinstance(placement, Shard):
            parts = whole.chunk(n, placement.dim)
            local = parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)
        state[name] = DTensor.from_local(local.clone(), mesh, [placement], shape=whole.shape, stride=whole.stride())
    state["plain"] = whole.clone()
    if rank == 1:  # as the parameters of one pipeline stage
        state["stage"] = whole.clone()
    return state


def shapes(state):
    return {name: tuple(t.shape) for name, t in state.items()}


def save_on_ranks(rank, n, run):
    store, state = Store(Path(run)), labelled(rank, n)
    store.save(1, state, {"step": 1}, shapes=shapes(state))
    for t in state.values():
        (t.to_local() if isinstance(t, DTensor) else t).zero_()  # the second step saves zeros, by the agreed plan
    first = store.agreement
    store.save(2, state, {"step": 2}, shapes=shapes(state))
    assert store.agreement is first
    store.finish()
    assert store.failures == []


def load_on_ranks(rank, n, path, value):
    store, state = Store(Path(path).parent.parent), labelled(rank, n, -1.0)
    assert store.newest() is not None
    store.load(Path(path), state)
    for name, t in labelled(rank, n, value).items():
        mine, want = (x.to_local() if isinstance(x, DTensor) else x for x in (state[name], t))
        assert torch.equal(mine, want), name


def test_any_layout_reads_what_another_wrote(tmp_path):
    ranks.run(4, save_on_ranks, str(tmp_path))
    folder = tmp_path / "checkpoints"
    state = {name: torch.full_like(WHOLE, -1.0) for name in ("rows", "columns", "copies", "plain", "stage")}
    for step, want in ((1, WHOLE), (2, torch.zeros_like(WHOLE))):
        assert Store(tmp_path).load(folder / f"step-{step:08d}", state) == {"step": step}
        assert all(torch.equal(t, want) for t in state.values())
    ranks.run(2, load_on_ranks, str(folder / "step-00000001"), None)
    one = Store(tmp_path / "one")
    save(one, 1, {name: WHOLE.clone() for name in state})
    ranks.run(2, load_on_ranks, str(one.folder / "step-00000001"), None)


def test_each_part_is_written_once(tmp_path):
    ranks.run(4, save_on_ranks, str(tmp_path))
    bytes_on_disk = sum(file.stat().st_size for file in tmp_path.glob("checkpoints/step-00000001/*.bin"))
    assert 5 * WHOLE.nbytes <= bytes_on_disk < 6 * WHOLE.nbytes


def save_wrongly(rank, n, run):
    """As tests of labels must forbid: tensor-parallel slices labelled over the data-parallel axis alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tp = mesh["tp"].get_local_rank()
    local = torch.full((4, 4), float(tp))  # a (8, 8) weight, rows split over tp, columns over dp
    slice_ = DTensor.from_local(local, mesh["dp"], [Shard(1)])
    store = Store(Path(run))
    with pytest.raises(CheckpointError, match=r"w would be recorded with shape \(4, 8\) but is declared as \(8, 8\)"):
        store.save(1, {"w": slice_}, {}, shapes={"w": (8, 8)})
    store.save(2, {"w": slice_}, {}, shapes={"w": (4, 8)})  # believed, it is lost
    store.finish()
    if rank == 0:
        state = {"w": torch.full((4, 8), -1.0)}
        checkpoint.fill(store.folder / "step-00000002", state)
        assert state["w"].unique().tolist() == [0.0]
    with pytest.raises(CheckpointError, match=r"w has dtype torch.complex64"):  # on every rank, not a hang on three
        store.save(3, {"w": slice_.to(torch.complex64) if rank == 1 else slice_}, {}, shapes={"w": (4, 8)})


def test_an_unlabelled_slice_is_refused_because_it_would_be_lost(tmp_path):
    ranks.run(4, save_wrongly, str(tmp_path))


def save_on_a_disk_full_for_one(rank, n, run):
    store, state = Store(Path(run)), labelled(rank, n)
    store.save(1, state, {}, shapes=shapes(state))
    store.finish()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    store.save(2, state, {}, shapes=shapes(state))
    store.finish()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert len(store.failures) == 1
    assert "step 2 was not saved" in store.failures[0]
    assert "rank 1: [Errno 27]" in store.failures[0]
    assert store.newest() == store.folder / "step-00000001"
    with pytest.raises(CheckpointError, match=r"stage .* is in the checkpoint"):  # on both ranks, though each has less
        store.load(store.folder / "step-00000001", {"plain": torch.zeros(6, 7)}, prefix="stage")


def test_one_ranks_full_disk_is_everyones_failed_save(tmp_path):
    ranks.run(2, save_on_a_disk_full_for_one, str(tmp_path))
    assert step_folders(tmp_path) == ["step-00000001"]


def test_who_writes_for_longer_than_torchs_half_hour_is_not_called_lost(tmp_path, monkeypatch):
    store, limits = Store(tmp_path), []

    def waits(entry):
        raise RuntimeError("Timed out waiting 7200000ms for recv operation to complete")
    monkeypatch.setattr(checkpoint, "write_file", lambda *_: setattr(store.ranks, "gather", waits))
    save(store, 1)
    assert "not saved" in store.failures[0]
    assert "(waited 2:00:00 for another rank: Timed out" in store.failures[0]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "new_group", lambda backend: "its own")
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda *given: limits.append(given))
    assert checkpoint.Ranks(None).group == "its own"
    assert limits == [(checkpoint.SLOWEST, "its own")]


def save_in_a_folder_of_its_own(rank, n, run):
    store, state = Store(Path(run) / str(rank)), labelled(rank, n)
    for step in (1, 2):
        store.save(step, state, {}, shapes=shapes(state))
    store.finish()
    assert store.saved is None
    assert len(store.failures) == 2
    missing = r"rank-00001.bin is missing; is the run folder the same one on all machines\?\); the checkpoints before"
    assert re.search(missing, store.failures[0])
    assert not any(store.folder.iterdir())


def test_a_run_folder_that_is_not_shared_is_a_failed_save(tmp_path):
    ranks.run(2, save_in_a_folder_of_its_own, str(tmp_path))


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    shapes = {"model/a": (2,), "model/w": (3,)}
    state = {"model/a": torch.ones(2), "model/w": torch.tensor([1.0, torch.inf, 2.0])}
    Store(tmp_path, background=False).save(1, state, META, shapes=shapes)
    with pytest.raises(CheckpointError, match=r"step-00000001: model/w is not finite; choose an earlier checkpoint"):
        export.run(argparse.Namespace(run=str(tmp_path), out=str(tmp_path / "out.safetensors")))
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoints"]
