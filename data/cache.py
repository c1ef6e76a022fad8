"""Shards from elsewhere kept in a folder, up to a limit, by all processes of a machine together.

A file is named after its sha256, so where it came from does not matter and a file under a final name is sound or is
thrown away. All locks are flock's and end with their process: whoever fetches a shard holds its .part exclusively,
whoever reads one holds it shared, and what is held is not evicted.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


class Cache:
    """Raises ValueError if the folder cannot be used."""

    def __init__(self, folder: str, limit: int):
        self.folder, self.limit = Path(folder).expanduser(), limit  # limit: bytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise ValueError(f"data.cache = {folder}: cannot be written ({error.strerror}); name another") from None

    def open(self, sha256: str, size: int, fill: Callable[[BinaryIO], bool], until: float) -> BinaryIO | None:
        """The shard's bytes, put there by `fill` if need be, by one process at a time; None where there is no room.

        The file stays until it is closed; what `fill` calls not whole is this reader's alone. `until` (time.monotonic)
        ends the wait for another process: TimeoutError.
        """
        final, part = self.folder / f"{sha256}.tar", self.folder / f"{sha256}.part"
        while True:
            if found := self._sound(final, sha256, size, until):
                return found
            file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b")
            try:
                _lock(file, fcntl.LOCK_EX, until)
                if not _is(file, part) or final.exists():  # another process was faster, or gave up
                    _remove(file, part)
                    file.close()
                    continue
                if not self._make_room(file, size, until):
                    _remove(file, part)
                    file.close()
                    return None
                whole = fill(file)
                file.flush()
                if whole:
                    part.rename(final)
                    fcntl.flock(file, fcntl.LOCK_SH)
                else:
                    _remove(file, part)
                return file
            except BaseException:
                file.close()
                raise

    def _sound(self, path: Path, sha256: str, size: int, until: float) -> BinaryIO | None:
        """The file opened and held, None if there is none; a torn or wrong one is removed."""
        try:
            file = open(path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return None
        _lock(file, fcntl.LOCK_SH, until)
        if os.fstat(file.fileno()).st_size == size and hashlib.file_digest(file, "sha256").hexdigest() == sha256:
            if _is(file, path):
                os.utime(path)  # last used now
                return file
        else:
            _remove(file, path)
        file.close()
        return None

    def _make_room(self, part: BinaryIO, size: int, until: float) -> bool:
        """Evicts the least recently used until `size` more bytes fit, and takes them on the disk; false if in vain."""
        with open(self.folder / "lock", "rb") as lock:
            _lock(lock, fcntl.LOCK_EX, until)
            part.truncate(0)  # a killed process may have left some of it
            there = []
            for path in [*self.folder.glob("*.part"), *self.folder.glob("*.tar")]:  # in this order none is missed
                with suppress(FileNotFoundError):
                    there.append((path.stat(), path))
            used = sum(stat.st_size for stat, _ in there)
            for stat, path in sorted(there, key=lambda one: (one[1].suffix == ".tar", one[0].st_mtime_ns)):
                if used + size <= self.limit:
                    break
                if _evict(path):
                    used -= stat.st_size
            if used + size > self.limit:
                return False
            try:
                os.posix_fallocate(part.fileno(), 0, size)  # a full disk is noticed here and not in the middle
            except OSError:
                part.truncate(0)
                return False
            return True


def _evict(path: Path) -> bool:
    """Removes the file unless a process holds it; a .part that nobody holds was left by a killed one."""
    with suppress(FileNotFoundError, BlockingIOError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(file, path)
        return True
    return False


def _remove(file: BinaryIO, path: Path) -> None:
    if _is(file, path):
        path.unlink()


def _is(file: BinaryIO, path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: BinaryIO, kind: int, until: float) -> None:
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise TimeoutError("another process of this machine fetches it and does not come to an end") from None
            time.sleep(0.02)
