"""Input files to documents: a plain text file is one document, a line of JSONL is one; both may be packed."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from stepladder.data import manifest

try:
    import zstandard
except ImportError:              # plain text and JSONL need none
    zstandard = None

LINES = (".jsonl", ".ndjson")  # one document a line
PACKED = (".zst", ".gz")
KNOWN = f"text, {' or '.join(LINES)} files, packed as {' or '.join(PACKED)} or not"


class Part(NamedTuple):
    """Whole lines of a JSONL file, or a whole text file."""

    file: str
    jsonl: bool
    line: int  # number of its first line in the file
    data: bytes


def find(inputs: Sequence[str | Path], but: Path) -> list[Path]:
    """Files in the order they are read: as given, folders sorted; hidden files and the folder `but` are left out."""
    seen: dict[tuple[int, int], tuple[Path, Path]] = {}  # file, by device and number -> input, and name in it
    files: list[Path] = []
    for given in map(Path, inputs):
        for file in _files(given, but):
            status = file.stat()
            other, before = seen.setdefault((status.st_dev, status.st_ino), (given, file))
            if before is not file:
                raise ValueError(f"{_twice(given, file, other, before)}: name it once")
            files.append(file)
    if not files:
        raise ValueError(f"no inputs given: name {KNOWN}, or folders of them")
    return files


def _twice(given: Path, file: Path, other: Path, before: Path) -> str:
    if file != before:
        return f"{file} and {before} are one file, which would count double"
    return f"{file} is named {'twice' if other == given else f'by {other} and by {given}'}, and would count double"


def _files(given: Path, but: Path) -> list[Path]:
    """Those of one input."""
    if not given.exists():
        raise ValueError(f"{given}: no such file or folder")
    if but.resolve() in (given.resolve(), *given.resolve().parents, *given.absolute().parents):
        raise ValueError(f"{given} lies in --out {but}, which is not read: name another --out")
    if given.is_dir():
        inside = sorted(given.rglob("*"))
        inside = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(given).parts)]
        inside = [path for path in inside if but.resolve() not in (path.resolve(), *path.resolve().parents)]
        if link := next((path for path in inside if path.is_symlink() and path.is_dir()), None):
            raise ValueError(f"{link} is a link to a folder, and such are not followed: take it away, and name the "
                             f"folder {link.resolve()} as an input of its own if it is to be read")
        inside = [path for path in inside if path.is_file()]
        if not inside:
            raise ValueError(f"{given}: the folder holds no files")
    elif given.is_file():
        inside = [given]
    else:
        raise ValueError(f"{given}: neither file nor folder")
    # Shards of bytes may well be UTF-8.
    if shard := next((path for path in inside if manifest.SHARD.fullmatch(path.name)), None):
        raise ValueError(f"{shard.parent} is a prepared corpus, no text: name it as shards in [data.sources] of a run")
    return inside


def chunks(files: Sequence[Path], size: int) -> Iterator[tuple[list[Part], int]]:
    """Runs of parts of about `size` bytes of input, each with the file bytes read so far.

    A chunk becomes a shard, so where it ends depends on the inputs and `size` alone.
    """
    chunk: list[Part] = []
    have = before = 0
    for file in files:
        jsonl = (file.stem if file.suffix in PACKED else file.name).endswith(LINES)
        with _open(file) as (raw, stream):
            line = 1
            while data := _lines(stream, size - have) if jsonl else stream.read():
                chunk.append(Part(str(file), jsonl, line, data))
                have += len(data)
                line += data.count(b"\n")
                if have >= size:
                    yield chunk, before + raw.tell()
                    chunk, have = [], 0
        before += file.stat().st_size
    if chunk:
        yield chunk, before


def texts(part: Part, key: str) -> Iterator[str]:
    """The part's documents, empty ones left out. Raises ValueError with the file and the line."""
    if not part.jsonl:
        try:
            text = part.data.decode()
        except UnicodeDecodeError as error:
            line = part.line + part.data.count(b"\n", 0, error.start)
            raise _not_utf8(f"{part.file}:{line}", error) from None
        if text:
            yield text
        return
    for number, line in enumerate(part.data.split(b"\n"), part.line):
        if line.strip():
            text = _text(line, key, f"{part.file}:{number}")
            if text:
                yield text


def _text(line: bytes, key: str, where: str) -> str:
    try:
        table = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None
    except json.JSONDecodeError as error:  # its own text counts lines anew
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {type(table).__name__}, not an object with the key {key!r}")
    if key not in table:
        raise ValueError(f"{where}: no key {key!r} ({', '.join(table)}); name the text's key with --text-key")
    text = table[key]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {key!r} is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: half of a surrogate pair, which is no character") from None
    return text


def _not_utf8(where: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{where}: not UTF-8: {error.reason}; convert it (with iconv, say), or unpack it: what is read "
                      f"is {KNOWN}")


def _lines(stream: io.BufferedReader, size: int) -> bytes:
    return stream.read(max(size, 1)) + stream.readline()


@contextmanager
def _open(file: Path) -> Iterator[tuple[io.BufferedReader, io.BufferedReader]]:
    """The file as it lies on disk, to tell the position, and its unpacked bytes."""
    with open(file, "rb") as raw:
        if file.suffix not in PACKED:
            yield raw, raw
            return
        if file.suffix == ".gz":
            try:
                yield raw, io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
            except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise ValueError(f"{file}: not readable as gzip: {error}") from None
            return
        if zstandard is None:
            raise ValueError(f"{file} needs package zstandard, which is not installed; install it or unpack the file")
        try:
            yield raw, io.BufferedReader(_Unpacked(raw), 1 << 20)
        except (zstandard.ZstdError, EOFError) as error:
            raise ValueError(f"{file}: not readable as zstd: {error}") from None


def _decompressor():
    assert zstandard is not None
    return zstandard.ZstdDecompressor().decompressobj()


class _Unpacked(io.RawIOBase):
    """A zstd file unpacked. Unlike the library's own reader it does not take a truncated file for a shorter one."""

    def __init__(self, raw: io.BufferedReader):
        self._raw, self._zstd, self._fed, self._ready = raw, _decompressor(), False, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            data = self._zstd.unused_data if self._zstd.eof else b""
            if self._zstd.eof:
                self._zstd, self._fed = _decompressor(), False
            data = data or self._raw.read(1 << 18)
            if not data:
                if self._fed:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._ready, self._fed = self._zstd.decompress(data), True
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
