"""Blocks out of tar shards, by offset: from a local file, or from one fetched whole into a cache or into memory.

The only file that imports webdataset: its tar reading, never its openers (see data/fetch.py), sharding or decoding.
Members are taken by exact name as raw bytes, so nothing else in an archive is unpickled, unpacked or written anywhere.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
from webdataset.tariterators import tar_file_iterator

from stepladder.data import fetch, manifest, tokenizer
from stepladder.data.cache import Cache
from stepladder.data.fetch import FetchError, Gone, Limits
from stepladder.data.manifest import Columns, Manifest, Shard

LASTING = Gone, FileNotFoundError, NotADirectoryError, PermissionError  # another start would meet them again


class Away(ValueError):
    """A source that does not answer; another start may find it."""

    passing = True


class ShardError(ValueError):
    """A shard that is missing, cut short or corrupt; `offset` is the byte in it where the unreadable block begins.

    passing: another start may find it.
    """

    def __init__(
        self, shard: str, offset: int, what: str, way: str = "prepare or copy it again", passing: bool = False
    ):
        super().__init__(shard, offset, what, way, passing)
        self.shard, self.offset, self.what, self.way, self.passing = shard, offset, what, way, passing

    @property
    def fault(self) -> str:
        return f"{self.shard}: {self.what} at byte {self.offset}"

    def __str__(self) -> str:
        return f"{self.fault}; {self.way}, or train with data.on_error=skip"


class Block(NamedTuple):
    tokens: np.ndarray  # (tokens,) uint16 or uint32
    pieces: np.ndarray  # (pieces, 2) int64: number of the document in the shard, tokens


class Corpus:
    """A prepared corpus: its manifest and its blocks.

    base: a folder, an http(s) address, a `pipe:` command or an address of an object store that fsspec knows. A file's
    name is put in the place of `{file}`, or after a slash at its end.
    keep: shards from elsewhere held open: as many as there are lanes reading.
    known: its manifest, if it has been read before.
    """

    def __init__(
        self, base: str | Path, keep: int = 8, limits: Limits = fetch.DEFAULT, known: Manifest | None = None
    ):
        self.base = str(base).removesuffix("/" + manifest.FILE).rstrip("/")
        self.remote = fetch.Remote(self.base, limits) if fetch.elsewhere(self.base) else None
        self.manifest = known or manifest.parse(self.fetch(manifest.FILE), self.url(manifest.FILE))
        self.keep = keep
        self._held: OrderedDict[int, tuple[BinaryIO, FetchError | None]] = OrderedDict()  # and why it is not whole
        self._vain = 0.0  # seconds spent on shards that did not come, since the last that did
        self._cache: Cache | None = None
        if self.remote and limits.cache:
            self._cache = Cache(limits.cache, int(limits.cache_gib * 2**30))
            largest = max(self.manifest.shards, key=lambda shard: shard.bytes)
            if largest.bytes > self._cache.limit:
                raise ValueError(f"data.cache_gib = {limits.cache_gib:g} is less than {self.url(largest.file)}, "
                                 f"{largest.bytes / 2**30:.3g} GiB; raise it or drop data.cache")  # fmt: skip

    def url(self, file: str) -> str:
        return self.base.replace("{file}", file) if "{file}" in self.base else f"{self.base}/{file}"

    def fetch(self, file: str) -> bytes:
        """A whole small file of the corpus."""
        url = self.url(file)
        try:
            return self.remote.fetch(url, b"".join) if self.remote else Path(url).read_bytes()
        except OSError as error:
            lasting = isinstance(error, LASTING)
            local = "`stepladder prepare` makes such a folder" if lasting else "see to its disk"
            way = "is the address right?" if self.remote else local
            raise (ValueError if lasting else Away)(f"{url}: cannot be read ({error}); {way}") from None

    def close(self) -> None:
        """Ends a fetch that another thread waits for."""
        if self.remote:
            self.remote.closed = True

    def tokenizer(self) -> tokenizer.Tokenizer:
        found = tokenizer.parse(self.fetch(tokenizer.FILE), self.url(tokenizer.FILE))
        if found.hash != self.manifest.tokenizer["hash"]:
            hashes = f"hash {found.hash[:12]}, the manifest says {self.manifest.tokenizer['hash'][:12]}"
            raise ValueError(f"{self.url(tokenizer.FILE)}: {hashes}; copy both again, or prepare the corpus again")
        return found

    def check_sizes(self) -> None:
        """Refuses local shards that are missing or of another size, without reading them."""
        for number, shard in enumerate(() if self.remote else self.manifest.shards):
            path = self.url(shard.file)
            try:
                size = os.stat(path).st_size
            except OSError as error:
                self._raise(number, 0, error)
            if size != shard.bytes:
                short = "empty" if size == 0 else "truncated" if size < shard.bytes else "too long"
                raise ShardError(path, size, f"{short}: {size} bytes, the manifest says {shard.bytes}, so it ends")
            if not os.access(path, os.R_OK):
                raise ShardError(path, 0, "no permission to read it")

    def read(self, shard: int, block: int) -> Block:
        """One block, its checksum verified. Raises ShardError."""
        told = self.manifest.shards[shard]
        if self.remote:
            return self._block(*self._hold(shard), shard, block)
        try:
            with open(self.url(told.file), "rb") as file:
                return self._block(file, None, shard, block)
        except OSError as error:
            self._raise(shard, block, error)

    def verify(self, shard: int) -> None:
        """Reads the whole shard against its sha256 and its blocks' checksums. Raises ShardError."""
        told = self.manifest.shards[shard]
        for block in range(len(told.blocks)):
            self.read(shard, block)
        if self.remote:
            if why := self._hold(shard)[1]:
                self._raise(shard, 0, why)
            return  # nothing else is called whole
        with open(self.url(told.file), "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != told.sha256:
            self._raise(shard, 0, f"sha256 {found[:12]} is not the manifest's {told.sha256[:12]}: corrupt")

    def _hold(self, shard: int) -> tuple[BinaryIO, FetchError | None]:
        """A shard from elsewhere, and why it is not whole; then its sound blocks are read all the same.

        A lane reads the blocks of one shard before the next shard's, so it is asked for about once an epoch.
        """
        if shard not in self._held:
            self._held[shard] = self._wait(self.manifest.shards[shard])
        self._held.move_to_end(shard)
        while len(self._held) > self.keep:
            _, (file, _) = self._held.popitem(last=False)
            file.close()
        return self._held[shard]

    def _wait(self, told: Shard) -> tuple[BinaryIO, FetchError | None]:
        """As `_fetch`. After a shard that did not come the next has what is left of its time, at least half of it, for
        it may be sound and slow; when that does not come either: Away."""
        assert self.remote is not None
        limits, began, before = self.remote.limits, time.monotonic(), self._vain
        file, why = self._fetch(self.remote, told, began + max(limits.stall, limits.total / 2, limits.total - before))
        came = why is None or isinstance(why, Gone)
        self._vain = 0.0 if came else before + time.monotonic() - began
        if before and self._vain >= limits.total:
            raise Away(f"{self.base}: no shard came in {self._vain:.0f} s, the last {told.file} ({why}); see to the "
                       "source, or raise data.fetch_minutes")  # fmt: skip
        return file, why

    def _fetch(self, remote: fetch.Remote, told: Shard, until: float) -> tuple[BinaryIO, FetchError | None]:
        """A shard from elsewhere and why it is not whole, if it is not."""
        why: FetchError | None = None

        def fill(file: BinaryIO) -> bool:
            nonlocal why
            try:
                remote.fetch(self.url(told.file), lambda chunks: _store(chunks, file, told), until, not self._vain)
            except FetchError as error:
                why = error
            return why is None

        if self._cache:
            try:
                if file := self._cache.open(told.sha256, told.bytes, fill, until):
                    return file, why
            except TimeoutError as error:
                return io.BytesIO(), FetchError(str(error))
            except OSError:
                why = None  # the cache cannot be used, the shard perhaps can
        file = io.BytesIO()
        fill(file)
        return file, why

    def _block(self, file: BinaryIO, why: FetchError | None, shard: int, block: int) -> Block:
        row = self.manifest.shards[shard].blocks[block]
        file.seek(int(row[Columns.OFFSET]))
        data = file.read(int(row[Columns.SIZE]))
        for found, sample in self._samples(shard, io.BytesIO(data)):
            if found == block:
                return sample
        self._raise(shard, block, why or "truncated or corrupt")

    def _samples(self, shard: int, stream) -> Iterator[tuple[int, Block]]:
        """Sound blocks of a tar stream, in its order; stops where the tar cannot be followed."""
        rows = self.manifest.shards[shard].blocks
        wanted = {f"{i:06d}.{part}" for i in range(len(rows)) for part in ("tokens", "pieces")}
        tokens = b""
        try:
            for member in tar_file_iterator(stream, select_files=wanted.__contains__):
                name, part = member["fname"].split(".")
                if part == "tokens":
                    tokens = member["data"]
                    continue
                row = rows[int(name)]
                if zlib.crc32(member["data"], zlib.crc32(tokens)) == row[Columns.CRC]:
                    kind = np.dtype(self.manifest.dtype).newbyteorder("<")
                    if len(tokens) != row[Columns.TOKENS] * kind.itemsize:  # sound bytes, but of another dtype
                        told = f"{row[Columns.TOKENS]} tokens of {self.manifest.dtype}"
                        self._raise(shard, int(name), f"{len(tokens)} bytes where the manifest says {told},")
                    ids = np.frombuffer(tokens, kind)
                    yield int(name), Block(ids, np.frombuffer(member["data"], "<i8").reshape(-1, 2))
        except (tarfile.TarError, EOFError, zlib.error):
            return

    def _raise(self, shard: int, block: int, what: str | OSError) -> NoReturn:
        told, passing = self.manifest.shards[shard], isinstance(what, OSError) and not isinstance(what, LASTING)
        way = "see to its disk" if passing else "prepare or copy it again"
        if self.remote:
            way = "see whether its source still has what was prepared"
        if isinstance(what, OSError):
            what = f"cannot be {'fetched' if self.remote else 'read'} ({what.strerror or what})"
        raise ShardError(self.url(told.file), int(told.blocks[block][Columns.OFFSET]), what, way, passing) from None


def _store(chunks: Iterator[bytes], file: BinaryIO, told: Shard) -> None:
    """Writes a shard from its beginning; an OSError unless its bytes are the manifest's."""
    file.seek(0)
    digest, size = hashlib.sha256(), 0
    for data in chunks:
        size += len(data)
        if size > told.bytes:
            raise OSError(f"longer than the manifest's {told.bytes} bytes")
        digest.update(data)
        file.write(data)
    if size < told.bytes:
        raise OSError(f"truncated: {size} bytes, the manifest says {told.bytes}")
    if digest.hexdigest() != told.sha256:
        raise OSError(f"corrupt: sha256 {digest.hexdigest()[:12]} is not the manifest's {told.sha256[:12]}")
