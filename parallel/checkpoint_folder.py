"""A checkpoint folder: what lies in it, and how it is written, verified and read by one rank.

    RUN/checkpoints/step-00001234/checkpoint.json     the index: format, step, files (bytes and checksum of each),
                                                      tensors (dtype, shape and chunks of each), meta of the run
                                 /rank-00000.bin ...  the bytes, raw, one file a rank that had something to write

torch.distributed.checkpoint plans which part of which tensor is read. The bytes and the index are ours: its own index
is a pickle, and reading that of a stranger's checkpoint would run the stranger's code.
"""

import json
import math
import mmap
import os
import re
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

FORMAT = 1
INDEX = "checkpoint.json"
ALIGN = 64  # bytes; a tensor in a mapped file must start at a multiple of its element size
PIECE = 1 << 24  # bytes hashed and written at a time
PAUSE = 0.5  # seconds before a file that could not be read is tried once more
STEP = re.compile(r"step-(\d{8,})")
FILE = re.compile(r"rank-\d{5,}\.bin")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


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


def names(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Global shape and dtype of every tensor of the checkpoint."""
    return {name: (tuple(e["shape"]), DTYPES[e["dtype"]]) for name, e in read_index(path)["tensors"].items()}


def refuse_mismatch(saved: dict, ours: dict) -> None:
    """Refuse to continue with another model or other data: raises CheckpointError naming the first key that differs.

    Both are nested dicts of what must be equal, such as {"model": config["model"], "manifest": hash}.
    """
    theirs, mine = _dotted(saved), _dotted(ours)
    for key in sorted(theirs.keys() | mine.keys()):
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
        with ThreadPoolExecutor(4) as pool:  # crc32 lets go of the interpreter lock
            found = list(pool.map(_checksum, [path / name for name, _ in mine]))
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


def write_file(path: Path, buffer: Tensor) -> str:
    """Write the buffer durably, read it back, and return its checksum."""
    data, checksum = memoryview(buffer.numpy()), 0  # pyright: ignore[reportArgumentType]
    with open(path, "wb") as file:
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            checksum = zlib.crc32(piece, checksum)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if (found := _checksum(path)) != f"{checksum:08x}":
        raise OSError(f"{path} reads back with checksum {found} instead of {checksum:08x}")
    return found


def _checksum(path: Path) -> str:
    checksum, piece = 0, memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            checksum = zlib.crc32(piece[:count], checksum)
    return f"{checksum:08x}"


def misfit(state: dict[str, Tensor], index: dict[str, Any]) -> str | None:
    """The first tensor of state that the checkpoint cannot fill."""
    for name, tensor in state.items():
        entry = index["tensors"].get(name)
        if entry is None:
            return f"{name} {tuple(tensor.shape)} is not in the checkpoint"
        if tuple(tensor.shape) != tuple(entry["shape"]):
            return f"{name} is {tuple(entry['shape'])} in the checkpoint, {tuple(tensor.shape)} in this model"
        if tensor.dtype != DTYPES[entry["dtype"]]:
            return f"{name} is torch.{entry['dtype']} in the checkpoint, {tensor.dtype} in this model"
    return None


@torch.no_grad()
def fill(path: Path, state: dict[str, Tensor], index: dict[str, Any] | None = None) -> None:
    """Fill the tensors of state, in any layout, on this rank alone; what state does not name is not read.

    Raises CheckpointError naming the tensor and both shapes or dtypes. Checksums are not compared: see `valid`.
    """
    index = read_index(path) if index is None else index
    if problem := misfit(state, index):
        raise CheckpointError(f"{path}: {problem}")
    files: dict[str, mmap.mmap] = {}
    chunks = {(name, *chunk[0]): chunk for name in state for chunk in index["tensors"][name]["chunks"]}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, _dcp_metadata(index, state), is_coordinator=False)
    for request in planner.create_local_plan().items:
        target = planner.resolve_tensor(request)
        if not target.numel():
            continue
        _, sizes, file, start = chunks[request.storage_index.fqn, *(request.storage_index.offset or ())]
        if file not in index["files"]:
            raise CheckpointError(f"{path / INDEX} reads from {file!r}, which is not a file of the checkpoint")
        if file not in files:  # mapped, so that a slice of a chunk costs its own pages only
            with open(path / file, "rb") as opened:  # private: torch insists on memory that it could write to
                files[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        source = torch.frombuffer(files[file], dtype=target.dtype, count=math.prod(sizes), offset=start).view(sizes)
        for dim, (offset, length) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
            source = source.narrow(dim, offset, length)
        target.copy_(source)


def _dcp_metadata(index: dict[str, Any], state: dict[str, Tensor]) -> Metadata:
    """The index as DCP's load planner wants it. Never BytesStorageMetadata: the planner unpickles those."""
    tensors = {}
    for name in state:
        entry = index["tensors"][name]
        chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes, *_ in entry["chunks"]]
        properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
        tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
    return Metadata(tensors)


def _dotted(table: dict, prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested dict under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
