"""A checkpoint folder: what lies in it, and how it is written and verified; without torch, which takes seconds to load.

    RUN/checkpoints/step-00001234/checkpoint.json     the index: format, step, files (bytes and checksum of each),
                                                      tensors (dtype, shape and chunks of each), meta of the run
                                 /rank-00000.bin ...  the bytes, raw, one file a rank that had something to write

The index is ours: torch.distributed.checkpoint's own is a pickle, and reading that of a stranger's checkpoint would run
the stranger's code.
"""

import functools
import json
import operator
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FORMAT = 1
INDEX = "checkpoint.json"
PIECE = 1 << 24  # bytes hashed at a time
THREADS = 4  # that hash; one does 2 GB/s
PAUSE = 0.5  # seconds before a file that could not be read is tried once more
STEP = re.compile(r"step-(\d{8,})")
FILE = re.compile(r"rank-\d{5,}\.bin")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found or used as asked; one sentence that says why and what to do."""


class Torn(CheckpointError):
    """Bytes of a checkpoint are missing or are not those that were written: looking again will not help."""


def valid(path: Path) -> str | None:
    """Why the checkpoint in path must not be used; None if every byte of it is as it was written."""
    return fault(Path(path))


def meta(path: Path) -> dict:
    """What the run said about itself when it saved."""
    return read_index(path)["meta"]


def refuse_mismatch(saved: dict, ours: dict) -> None:
    """Refuse to continue with another model or other data: raises CheckpointError naming the first key that differs.

    Both are nested dicts of what must be equal, such as {"model": config["model"], "manifest": hash}. Another kind of
    mixer is named before what the two kinds are told.
    """
    theirs, mine = _dotted(saved), _dotted(ours)
    for key in sorted(theirs.keys() | mine.keys(), key=lambda key: (not key.endswith(".kind"), key)):
        a, b = (repr(values[key]) if key in values else "nothing" for values in (theirs, mine))
        if a != b:
            raise CheckpointError(
                f"{key}: the checkpoint was made with {a}, this run has {b}; change it back or start a new run folder"
            )


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def steps(folder: Path) -> list[Path]:
    """Checkpoint folders by name, newest first."""
    found = [path for path in folder.glob("step-*") if STEP.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def superseded(folder: Path, step: int, keep_last: int, keep_every: int) -> list[Path]:
    """The checkpoints that need not be kept once the one of step is written.

    Later ones are left alone: they are broken, or of a future that this run has left behind, and must not push the
    present one out. Torn ones do not count as kept. What cannot be read now, or not by us, may be sound, and stays.
    """
    whole, torn = [], []
    for path in steps(folder):
        if step_of(path) <= step:
            try:
                verify(path, parts=0)
                whole.append(path)
            except Torn:
                torn.append(path)
            except (OSError, CheckpointError):
                continue
    kept = {*whole[:keep_last], *(path for path in whole if keep_every and step_of(path) % keep_every == 0)}
    return [path for path in whole + torn if path not in kept and step_of(path) < step]


def way_back(folder: Path, first: int) -> str:
    """What to do when steps since `first` had no finite gradient: the step before may have made the weights so."""
    found = steps(folder)
    good = next((path for path in found if step_of(path) < first - 1), None)
    if good is None:
        return "start in another folder with a lower optimizer.lr"
    later = [path.name for path in found if step_of(path) > step_of(good)]
    remove = f"remove {', '.join(later)} from {folder} and " if later else ""
    return f"{remove}run the same again with a lower optimizer.lr: it goes on from step {step_of(good)}"


def sweep(folder: Path, token: str) -> None:
    """Remove what saves that died have left behind. Only a store that writes does this, so that none reads it."""
    for path in folder.glob("step-*.tmp-*"):
        if token not in path.name:
            shutil.rmtree(path, ignore_errors=True)


def fault(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """As `valid`, but of the checksums only those of files part, part + parts, ...; none if parts is 0."""
    for pause in (PAUSE, 0):
        try:
            verify(path, part, parts)
        except CheckpointError as error:
            return str(error)
        except OSError as error:  # such as that of a server which has just changed
            reason = str(error)
            time.sleep(pause)
        else:
            return None
    return reason


def verify(path: Path, part: int = 0, parts: int = 1) -> None:
    """Raises Torn, an OSError if a file cannot be read now, or CheckpointError. part, parts: as in `fault`."""
    files = sorted(read_index(path)["files"].items())
    try:
        for name, (size, _) in files:
            if (found := (path / name).stat().st_size) != size:
                raise Torn(f"{path / name} has {found} bytes instead of {size}")
        mine = files[part::parts] if parts else []
        found = [_checksum(path / name) for name, _ in mine]
    except FileNotFoundError as error:
        raise Torn(f"{error.filename} is missing") from None
    for (name, (_, checksum)), now in zip(mine, found, strict=True):
        if now != checksum:
            raise Torn(f"{path / name} has checksum {now} instead of {checksum}")


def read_index(path: Path) -> dict[str, Any]:
    """The index of a checkpoint, whole, of a format we know, and pointing to nothing outside the folder."""
    file = Path(path) / INDEX
    try:
        head, _, body = file.read_text().partition("\n")
    except FileNotFoundError:
        raise Torn(f"{file} is missing; {path} is not a checkpoint") from None
    except UnicodeDecodeError:
        head = body = ""
    if head != _seal(body):
        raise Torn(f"{file} is damaged: it does not have the checksum in its first line")
    index = json.loads("{" + body)
    if index["format"] != FORMAT:
        raise CheckpointError(
            f"{file} has format {index['format']}, this version reads {FORMAT}; use the stepladder that wrote it"
        )
    if stray := next((name for name in index["files"] if not FILE.fullmatch(name)), None):
        raise CheckpointError(f"{file} names a file {stray!r}, which no checkpoint has")
    return index


def write_index(path: Path, index: dict[str, Any]) -> None:
    """Write the index with a checksum of itself in the first line, and make all names in the folder durable."""
    body = json.dumps(index)[1:]
    with open(path / INDEX, "w") as file:
        file.write(f"{_seal(body)}\n{body}")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path)


def _seal(body: str) -> str:
    return f'{{"checksum": "{zlib.crc32(body.encode()):08x}",'


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: memoryview) -> str:
    """Write the bytes durably, read them back, and return their checksum."""
    with open(path, "wb") as file, ThreadPoolExecutor(THREADS) as pool:
        sums = pool.map(zlib.crc32, [data[start : start + PIECE] for start in range(0, len(data), PIECE)])
        file.write(data)  # while the pieces are hashed
        file.flush()
        os.fsync(file.fileno())
        checksum = _join(sums, len(data))
    if (found := _checksum(path)) != checksum:
        raise OSError(f"{path} reads back with checksum {found} instead of {checksum}")
    return found


def _checksum(path: Path) -> str:
    """crc32 of a file, which several threads read: crc32 and reading let go of the interpreter lock."""
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
        size = os.fstat(file.fileno()).st_size
        return _join(pool.map(lambda start: _piece(file.fileno(), start), range(0, size, PIECE)), size)


def _piece(descriptor: int, start: int) -> int:
    checksum, end = 0, start + PIECE
    while start < end and (data := os.pread(descriptor, end - start, start)):  # a server may give less than asked
        checksum, start = zlib.crc32(data, checksum), start + len(data)
    return checksum


def _join(sums: Iterable[int], size: int) -> str:
    """crc32 of `size` bytes from those of their pieces, of which only the last may be shorter than PIECE.

    What zero bytes behind some bytes do to their crc32 is linear over its bits, and twice as many do it twice:
    crc(A + B) = zeros(crc(A), len(B)) ^ crc(B).
    """
    total = 0
    for start, found in zip(range(0, size, PIECE), sums, strict=True):
        total = _through(_zeros(min(PIECE, size - start)), total) ^ found
    return f"{total:08x}"


@functools.cache
def _zeros(count: int) -> tuple[int, ...]:
    """What each bit of a crc32 becomes when `count` zero bytes follow."""
    if count == 1:
        return tuple(zlib.crc32(b"\0", 1 << bit) ^ zlib.crc32(b"\0") for bit in range(32))
    half = _zeros(count // 2)
    twice = tuple(_through(half, x) for x in half)
    return tuple(_through(_zeros(1), x) for x in twice) if count % 2 else twice


def _through(images: tuple[int, ...], checksum: int) -> int:
    return functools.reduce(operator.xor, (x for bit, x in enumerate(images) if checksum >> bit & 1), 0)


def _dotted(table: dict, prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested dict under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
