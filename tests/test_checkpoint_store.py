"""What a run can rely on when it saves, dies and comes back."""

import contextlib
import errno
import os
import random
import resource
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks
import torch

from stepladder.parallel import checkpoint, checkpoint_folder
from stepladder.parallel.checkpoint import CheckpointError, Store
from stepladder.parallel.lock import InUse, Lock

META = {"step": 0, "config": "[model]\nwidth = 8\n", "cursor": {"lanes": [1, 2]}}


def tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    """Odd sizes, every kind of dtype that training keeps, a scalar and an empty one."""
    return {
        "model/a": torch.arange(15.0).view(3, 5) + value,
        "model/b": torch.full((7,), value, dtype=torch.bfloat16),
        "optimizer/step": torch.tensor(float(value)),
        "optimizer/mask": torch.tensor([True, False, True]),
        "rng/cpu": torch.arange(9, dtype=torch.uint8),
        "model/none": torch.empty(0, 4),
    }


def save(store: Store, step: int, state: dict[str, torch.Tensor] | None = None) -> None:
    state = tensors(step) if state is None else state
    store.save(step, state, META | {"step": step}, shapes={name: tuple(t.shape) for name, t in state.items()})
    store.finish()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """A longer file is an OSError, as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def step_folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_was_saved_is_what_is_loaded(tmp_path):
    store = Store(tmp_path)
    assert store.newest() is None
    save(store, 12)
    path = store.newest()
    assert path is not None
    assert path == tmp_path / "checkpoints" / "step-00000012"
    state = {name: torch.zeros_like(t) for name, t in tensors().items()}
    assert Store(tmp_path).load(path, state) == META | {"step": 12} == checkpoint.meta(path)
    assert same(state, tensors(12))
    assert checkpoint.names(path)["model/b"] == ((7,), torch.bfloat16)
    assert store.failures == []


def test_changes_right_after_save_returns_are_not_saved(tmp_path):
    store, state = Store(tmp_path), {"w": torch.ones(1 << 20)}
    for step in (1, 2):  # the second save reuses the buffer and the plan of the first
        state["w"].fill_(step)
        store.save(step, state, {}, shapes={"w": (1 << 20,)})
        state["w"].fill_(-1.0)
    store.finish()
    for step in (1, 2):
        store.load(store.folder / f"step-{step:08d}", state)
        assert (state["w"] == step).all()


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 5300])
def test_the_checksum_of_a_file_is_joined_from_those_of_its_pieces(tmp_path, monkeypatch, size):
    monkeypatch.setattr(checkpoint_folder, "PIECE", 1000)
    data = random.Random(size).randbytes(size)
    assert checkpoint_folder.write_file(tmp_path / "file", memoryview(data)) == f"{zlib.crc32(data):08x}"
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.gpu
def test_kernels_run_beside_the_copies_of_a_gpu_and_what_changes_tensors_waits_for_them(tmp_path):
    store, w = Store(tmp_path), torch.ones(1 << 28, device="cuda")
    for step in (1, 2):
        w.fill_(step)
        copied = store.save(step, {"w": w}, {}, shapes={"w": (1 << 28,)})
        done = torch.cuda.current_stream().record_event()
        assert copied is not None
        if step == 2:  # the first makes the buffer
            done.synchronize()
            assert not copied.query()  # 1 GiB takes 20 ms
        torch.cuda.current_stream().wait_event(copied)
        w.fill_(-1.0)
    assert store.buffer.is_pinned()  # torch.cuda.cudart().cudaHostRegister
    store.finish()
    for step in (1, 2):
        store.load(store.folder / f"step-{step:08d}", {"w": w})
        assert (w == step).all()


def test_saving_happens_beside_the_training(tmp_path, monkeypatch):
    release, write = threading.Event(), checkpoint.write_file
    monkeypatch.setattr(checkpoint, "write_file", lambda *args: release.wait(10) and write(*args))
    store, state = Store(tmp_path), tensors()
    store.save(1, state, {}, shapes={name: tuple(t.shape) for name, t in state.items()})
    assert not (store.folder / "step-00000001").exists()  # save has returned and nothing is written yet
    release.set()
    store.finish()
    assert store.newest() is not None


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "index", "no index"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, harm):
    notes: list[str] = []
    store = Store(tmp_path, note=notes.append)
    save(store, 1)
    save(store, 2)
    path = store.folder / "step-00000002"
    file = path / ("checkpoint.json" if "index" in harm else "rank-00000.bin")
    data = bytearray(file.read_bytes())
    if harm in ("remove", "no index"):
        file.unlink()
    elif harm == "truncate":
        file.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert file.name in str(checkpoint.valid(path))
    assert Store(tmp_path, note=notes.append).newest() == store.folder / "step-00000001"
    assert len(notes) == 1
    assert str(file) in notes[0]
    with pytest.raises(CheckpointError, match=file.name):
        Store(tmp_path).load(path, tensors())


def test_no_sound_checkpoint_among_several_is_an_error_not_a_fresh_start(tmp_path):
    save(Store(tmp_path), 1)
    (tmp_path / "checkpoints/step-00000001/rank-00000.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is sound: .*rank-00000.bin is missing; restore"):
        Store(tmp_path).newest()


def save_and_hang(run: str) -> None:
    """Save step 1, then hang in the middle of saving step 2, when its file lies there and the index does not."""
    store = Store(Path(run))
    save(store, 1)
    checkpoint.write_index = lambda *args: time.sleep(60)
    save(store, 2)


def save_for_ever(run: str) -> None:
    store, state = Store(Path(run), keep_last=1), {"w": torch.zeros(1 << 18)}
    for step in range(1, 100000):
        store.save(step, {"w": state["w"].fill_(step)}, {}, shapes={"w": (1 << 18,)})


def killed(target, run: Path, when) -> None:
    """Run target in a process of its own and kill -9 it as soon as `when` holds."""
    process = ranks.process(target, str(run))
    process.start()
    deadline = time.monotonic() + 30
    while not when():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_kill_in_the_middle_of_a_save_leaves_the_last_checkpoint(tmp_path):
    killed(save_and_hang, tmp_path, lambda: any(tmp_path.glob("checkpoints/step-00000002.tmp-*/rank-00000.bin")))
    assert len(step_folders(tmp_path)) == 2  # the torn one is there
    store, state = Store(tmp_path), tensors()
    path = store.newest()
    assert path is not None
    assert store.load(path, state)["step"] == 1
    assert same(state, tensors(1))
    save(store, 2)  # the next run goes on, and clears up
    assert step_folders(tmp_path) == ["step-00000001", "step-00000002"]


def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    for attempt in range(6):
        run = tmp_path / str(attempt)
        start = time.monotonic()

        def ripe(run=run, start=start, attempt=attempt):
            return any(run.glob("checkpoints/step-????????")) and time.monotonic() > start + 0.3 + 0.0171 * attempt

        killed(save_for_ever, run, ripe)
        store, state = Store(run), {"w": torch.zeros(1 << 18)}
        path = store.newest()
        assert path is not None
        store.load(path, state)
        assert (state["w"] == int(path.name[5:])).all()


def test_a_full_disk_is_reported_and_the_run_goes_on(tmp_path):
    told: list[str] = []
    store = Store(tmp_path, on_failure=told.append)
    save(store, 1)
    with no_room():
        save(store, 2)
    assert told == store.failures
    assert len(told) == 1
    assert told[0].startswith(f"step 2 was not saved in {store.folder} (rank 0: [Errno 27]")
    assert told[0].endswith("; the checkpoints before it are untouched")
    assert step_folders(tmp_path) == ["step-00000001"]
    assert store.newest() == store.folder / "step-00000001"
    save(store, 2)
    assert step_folders(tmp_path) == ["step-00000001", "step-00000002"]


def test_the_last_n_and_every_kth_step_are_kept(tmp_path):
    store = Store(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 12):
        save(store, step)
    assert [int(name[5:]) for name in step_folders(tmp_path)] == [4, 8, 10, 11]


def test_a_broken_later_checkpoint_never_pushes_out_the_sound_one(tmp_path):
    save(Store(tmp_path), 5)
    file = tmp_path / "checkpoints/step-00000005/rank-00000.bin"
    file.write_bytes(bytes(file.stat().st_size))  # only the checksum tells
    store = Store(tmp_path, keep_last=1)
    save(store, 3)
    save(store, 4)
    assert store.newest() == store.folder / "step-00000004"
    save(store, 5)  # the run gets there again and replaces the broken one
    assert store.newest() == store.folder / "step-00000005"
    assert step_folders(tmp_path) == ["step-00000005"]


def test_a_broken_checkpoint_does_not_count_as_one_of_the_last(tmp_path):
    store = Store(tmp_path, keep_last=2)
    save(store, 1)
    save(store, 2)
    file = tmp_path / "checkpoints/step-00000002/rank-00000.bin"
    file.write_bytes(file.read_bytes()[1:])
    save(store, 3)
    assert step_folders(tmp_path) == ["step-00000001", "step-00000003"]


def unreadable(monkeypatch, path: Path, times: int) -> list[int]:
    """The index of path cannot be read the next times; how often that happened."""
    happened, read = [0], checkpoint_folder.read_index

    def read_index(of):
        if of == path and happened[0] < times:
            happened[0] += 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return read(of)

    monkeypatch.setattr(checkpoint_folder, "read_index", read_index)
    monkeypatch.setattr(checkpoint_folder, "PAUSE", 0)
    return happened


def test_checkpoints_that_cannot_be_read_now_or_by_us_are_not_removed(tmp_path, monkeypatch):
    store = Store(tmp_path, keep_last=2)
    save(store, 1)
    save(store, 2)
    other = store.folder / "step-00000001"
    checkpoint_folder.write_index(other, checkpoint_folder.read_index(other) | {"format": 2})
    happened = unreadable(monkeypatch, store.folder / "step-00000002", 1)
    save(store, 3)
    assert happened == [1]
    assert [int(name[5:]) for name in step_folders(tmp_path)] == [1, 2, 3]
    save(store, 4)  # it can be read again, and has its turn
    assert [int(name[5:]) for name in step_folders(tmp_path)] == [1, 3, 4]


@pytest.mark.parametrize(("times", "taken"), [(1, 2), (2, 1)])
def test_a_checkpoint_that_cannot_be_read_is_tried_once_more(tmp_path, monkeypatch, times, taken):
    store = Store(tmp_path)
    save(store, 1)
    save(store, 2)
    happened = unreadable(monkeypatch, store.folder / "step-00000002", times)
    assert store.newest() == store.folder / f"step-{taken:08d}"
    assert happened == [times]


def test_what_was_just_saved_is_not_superseded_whatever_became_of_it(tmp_path):
    store = Store(tmp_path)
    save(store, 1)
    (store.folder / "step-00000001" / "rank-00000.bin").unlink()
    assert checkpoint_folder.superseded(store.folder, 1, 1, 0) == []
    assert checkpoint_folder.superseded(store.folder, 2, 1, 0) == [store.folder / "step-00000001"]


def test_a_second_program_is_refused_the_run_folder(tmp_path):
    with Lock(tmp_path):
        child = os.fork()  # its own open of the lock file, and an inherited one of ours
        if child == 0:
            try:
                with Lock(tmp_path):
                    os._exit(1)
            except InUse as error:
                os._exit(0 if f"in use by process {os.getppid()} on host" in str(error) else 2)
        assert os.waitpid(child, 0)[1] == 0
    with Lock(tmp_path):
        pass


def test_a_forked_worker_does_not_hold_the_run_after_its_parent(tmp_path):
    reader, writer = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        with Lock(tmp_path):
            if os.fork() == 0:
                os.read(reader, 1)  # the worker outlives the trainer
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(trainer, 0)
    try:
        with Lock(tmp_path):
            pass
    finally:
        os.write(writer, b"x")
