"""Blocks out of tar shards: by offset from a local file, in one stream through webdataset's openers from anywhere else.

The only file that imports webdataset: its tar reading and its openers, never its sharding or decoding. Members are
taken by exact name as raw bytes, so nothing else in an archive is unpickled, unpacked or written anywhere.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from webdataset.gopen import gopen
from webdataset.tariterators import tar_file_iterator

from stepladder.data import manifest, tokenizer
from stepladder.data.manifest import Columns, Manifest

REMOTE = ("http://", "https://", "pipe:")


class ShardError(ValueError):
    """A shard that is missing, cut short or corrupt; `offset` is the byte in it where the unreadable block begins."""

    def __init__(self, shard: str, offset: int, what: str):
        super().__init__(shard, offset, what)
        self.shard, self.offset, self.what = shard, offset, what

    def __str__(self) -> str:
        return f"{self.shard}: {self.what} at byte {self.offset}; prepare or copy it again, or set on_error to skip"


class Block(NamedTuple):
    tokens: np.ndarray  # (tokens,) uint16 or uint32
    pieces: np.ndarray  # (pieces, 2) int64: number of the document in the shard, tokens


class Corpus:
    """A prepared corpus: its manifest and its blocks, `base` being a folder, an http(s) URL or a `pipe:` command.

    A `pipe:` command has the file's name put in the place of `{file}`, or after a slash at its end.
    """

    def __init__(self, base: str | Path, keep: int = 8):
        self.base = str(base).removesuffix("/" + manifest.FILE).rstrip("/")
        self.remote = self.base.startswith(REMOTE)
        self.manifest: Manifest = manifest.parse(self.fetch(manifest.FILE), self.url(manifest.FILE))
        self.keep = keep  # streamed shards held in memory: as many as there are lanes reading
        self._streamed: OrderedDict[int, tuple[dict[int, Block], str]] = OrderedDict()

    def url(self, file: str) -> str:
        return self.base.replace("{file}", file) if "{file}" in self.base else f"{self.base}/{file}"

    def fetch(self, file: str) -> bytes:
        """A whole small file of the corpus."""
        url = self.url(file)
        try:
            if not self.remote:
                return Path(url).read_bytes()
            with gopen(url) as stream:
                return stream.read()
        except (OSError, subprocess.SubprocessError) as error:
            way = "`stepladder prepare` makes such a folder" if not self.remote else "is the address right?"
            raise ValueError(f"{url}: cannot be read ({error}); {way}") from None

    def tokenizer(self) -> tokenizer.Tokenizer:
        found = tokenizer.parse(self.fetch(tokenizer.FILE), self.url(tokenizer.FILE))
        if found.hash != self.manifest.tokenizer["hash"]:
            hashes = f"hash {found.hash[:12]}, the manifest says {self.manifest.tokenizer['hash'][:12]}"
            raise ValueError(f"{self.url(tokenizer.FILE)}: {hashes}; copy both again, or prepare the corpus again")
        return found

    def check_sizes(self) -> None:
        """Refuses local shards that are missing or of another size, without reading them."""
        for shard in () if self.remote else self.manifest.shards:
            path = self.url(shard.file)
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise ShardError(path, 0, f"cannot be read ({error.strerror})") from None
            if size != shard.bytes:
                short = "empty" if size == 0 else "truncated" if size < shard.bytes else "too long"
                raise ShardError(path, size, f"{short}: {size} bytes, the manifest says {shard.bytes}, so it ends")
            if not os.access(path, os.R_OK):
                raise ShardError(path, 0, "no permission to read it")

    def read(self, shard: int, block: int) -> Block:
        """One block, its checksum verified. Raises ShardError."""
        if not self.remote:
            return self._local(shard, block)
        # A lane reads the blocks of one shard before the next shard's, so a shard is streamed about once an epoch.
        if shard not in self._streamed:
            self._streamed[shard] = self._stream(shard)
        self._streamed.move_to_end(shard)
        while len(self._streamed) > self.keep:
            self._streamed.popitem(last=False)
        found, why = self._streamed[shard]
        if block not in found:
            self._raise(shard, block, why)
        return found[block]

    def verify(self, shard: int) -> None:
        """Reads the whole shard against its sha256 and its blocks' checksums. Raises ShardError."""
        told = self.manifest.shards[shard]
        digest = hashlib.sha256()
        try:
            with open(self.url(told.file), "rb") if not self.remote else gopen(self.url(told.file)) as stream:
                while data := stream.read(1 << 20):
                    digest.update(data)
        except OSError as error:
            self._raise(shard, 0, f"cannot be read ({error.strerror or error})")
        for block in range(len(told.blocks)):
            self.read(shard, block)
        if digest.hexdigest() != told.sha256:
            self._raise(shard, 0, f"sha256 {digest.hexdigest()[:12]} is not the manifest's {told.sha256[:12]}: corrupt")

    def _local(self, shard: int, block: int) -> Block:
        row = self.manifest.shards[shard].blocks[block]
        path = self.url(self.manifest.shards[shard].file)
        try:
            with open(path, "rb") as file:
                file.seek(int(row[Columns.OFFSET]))
                data = file.read(int(row[Columns.SIZE]))
        except OSError as error:
            self._raise(shard, block, f"cannot be read ({error.strerror})")
        for found, sample in self._samples(shard, io.BytesIO(data)):
            if found == block:
                return sample
        self._raise(shard, block, "truncated or corrupt")

    def _stream(self, shard: int) -> tuple[dict[int, Block], str]:
        """The blocks of a shard that can be read, and why others cannot."""
        found: dict[int, Block] = {}
        try:
            with gopen(self.url(self.manifest.shards[shard].file)) as stream:
                found.update(self._samples(shard, stream))
        except OSError as error:
            return found, f"cannot be read ({error})"
        return found, "truncated or corrupt"

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

    def _raise(self, shard: int, block: int, what: str) -> NoReturn:
        offset = int(self.manifest.shards[shard].blocks[block][Columns.OFFSET])
        raise ShardError(self.url(self.manifest.shards[shard].file), offset, what)
