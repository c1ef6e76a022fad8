"""A cache of shards: processes of a machine fetch each once, and what befalls it costs the cache only."""
# ruff: noqa: F811  fixtures are imported

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import time

import pytest
from serving import PATIENT, blocks, gib, made, server  # noqa: F401

from stepladder.data import cache as cache_module
from stepladder.data.cache import Cache
from stepladder.data.shards import Corpus


@pytest.mark.parametrize("harm", ["torn", "flipped", "empty"])
def test_a_wrong_file_in_the_cache_is_fetched_again(made, server, tmp_path, harm):
    limits = PATIENT._replace(cache=str(tmp_path))
    blocks(Corpus(server.url, limits=limits))
    told = Corpus(made).manifest.shards[1]
    kept = tmp_path / f"{told.sha256}.tar"
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes({"torn": data[:900], "flipped": data, "empty": b""}[harm])
    server.asked.clear()
    assert blocks(Corpus(server.url, limits=limits)) == blocks(Corpus(made))
    assert (server.shards_asked(), server.asked["shard-00001.tar"]) == (1, 1)
    assert kept.read_bytes() == (made / "shard-00001.tar").read_bytes()


def test_the_least_recently_used_is_evicted_and_never_one_in_use(tmp_path):
    cache = Cache(str(tmp_path), 3000)
    contents = {hashlib.sha256(letter.encode() * 1000).hexdigest(): letter for letter in "abcde"}
    names = {letter: name for name, letter in contents.items()}

    def get(letter: str):
        data = letter.encode() * 1000
        file = cache.open(names[letter], 1000, lambda file: bool(file.write(data)), time.monotonic() + 5)
        if file:
            file.seek(0)
            assert file.read() == data
        return file

    def there() -> str:
        return "".join(sorted(contents[path.stem] for path in tmp_path.glob("*.tar")))

    held = get("a")
    for letter in "bc":
        get(letter).close()
        time.sleep(0.01)
    get("b").close()  # used again
    get("d").close()
    assert there() == "abd", "c was the oldest that nobody held"
    both = get("b"), get("d")
    assert get("e") is None, "no room, so it is not kept"
    assert there() == "abd"
    held.close()
    get("e").close()
    assert there() == "bde"
    both[0].close()
    (tmp_path / ("f" * 64 + ".part")).write_bytes(b"x" * 900)  # left by processes that were killed
    (tmp_path / (names["a"] + ".part")).write_bytes(b"x" * 900)
    get("a").close()
    assert there() == "ade"
    assert not list(tmp_path.glob("*.part"))
    both[1].close()


def test_a_full_disk_and_a_cache_that_is_gone_cost_the_cache_only(made, server, tmp_path, monkeypatch):
    limits = PATIENT._replace(cache=str(tmp_path / "cache"))
    found = Corpus(server.url, limits=limits)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert blocks(found) == blocks(Corpus(made))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]
    again = Corpus(server.url, limits=limits)
    (tmp_path / "cache" / "lock").unlink()
    (tmp_path / "cache").rmdir()
    assert blocks(again) == blocks(Corpus(made))


READER = """
import hashlib, sys, time
from pathlib import Path
from stepladder.data.cache import Cache
folder, log, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def fill(file):
    with open(log, "a") as lines:
        print(mode, file=lines)
    file.write(data)
    time.sleep(60 if mode == "hangs" else 0.1)
    return True
for letter in "abc" if mode == "works" else "d":
    data = letter.encode() * 1000
    found = Cache(folder, 10000).open(hashlib.sha256(data).hexdigest(), 1000, fill, time.monotonic() + 60)
    found.seek(0)
    assert found.read() == data
"""


def reader(*told: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-P", "-c", READER, *map(str, told)])


def test_processes_of_a_machine_fetch_each_shard_once(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    assert [process.wait(60) for process in [reader(cache, log, "works") for _ in range(4)]] == [0] * 4
    assert log.read_text().split() == ["works"] * 3
    assert len(list(cache.glob("*.tar"))) == 3
    assert not list(cache.glob("*.part"))


def test_a_process_killed_in_the_middle_of_a_shard_is_not_waited_for(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    log.touch()
    first = reader(cache, log, "hangs")
    while not log.read_text():
        time.sleep(0.01)
    second = reader(cache, log, "takes over")
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.5)
    first.kill()
    assert second.wait(10) == 0
    assert log.read_text().splitlines() == ["hangs", "takes over"]
    assert first.wait() < 0


def test_a_process_waits_for_another_no_longer_than_its_limit(tmp_path):
    cache, name = Cache(str(tmp_path), 1000), "a" * 64
    with open(tmp_path / f"{name}.part", "wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="another process of this machine"):
            cache.open(name, 10, lambda file: True, time.monotonic() + 0.1)


def test_a_shard_that_another_process_finished_or_gave_up_meanwhile_is_looked_for_anew(tmp_path, monkeypatch):
    cache, data = Cache(str(tmp_path), 1000), b"x" * 10
    name = hashlib.sha256(data).hexdigest()
    final, part = tmp_path / f"{name}.tar", tmp_path / f"{name}.part"
    real, filled = cache_module._lock, []

    def get() -> None:
        with cache.open(name, 10, lambda file: bool(file.write(data)) and not filled.append(1), time.monotonic() + 5):
            pass

    def gives_up(file, kind, until):
        monkeypatch.setattr(cache_module, "_lock", real)
        part.unlink()
        return real(file, kind, until)

    def finishes(file, kind, until):
        monkeypatch.setattr(cache_module, "_lock", real)
        final.write_bytes(data)
        return real(file, kind, until)

    monkeypatch.setattr(cache_module, "_lock", gives_up)
    get()
    assert (final.read_bytes(), filled) == (data, [1])
    final.unlink()
    monkeypatch.setattr(cache_module, "_lock", finishes)
    get()
    assert (filled, part.exists()) == ([1], False), "it is not fetched a second time"


def test_a_cache_that_cannot_work_is_refused_at_once(made, server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data.cache = .*/file/x: cannot be written .Not a directory.; name another"):
        Corpus(server.url, limits=PATIENT._replace(cache=str(tmp_path / "file" / "x")))
    with pytest.raises(ValueError, match=r"data.cache_gib = .* is less than http.*shard-\d+.tar, .* GiB; raise it"):
        Corpus(server.url, limits=PATIENT._replace(cache=str(tmp_path / "cache"), cache_gib=gib(0.9, made)))
    Cache(str(tmp_path / "new"), 10)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
