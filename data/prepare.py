"""Text to shards: documents are tokenised in parallel and written as blocks in tar files, the manifest last.

Shard number i is made from the i-th chunk of the input and from nothing else, so the number of workers changes no byte,
and a run that was killed keeps the shards it had finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stepladder.data import documents, manifest, tokenizer
from stepladder.data.documents import Part
from stepladder.data.manifest import Columns, Manifest, Shard

FEWEST_BLOCKS = 64  # lanes share out blocks: even a small corpus gets about this many
TRAINING_BYTES = 64 << 20  # of text that a tokenizer is trained on
Progress = Callable[[str, int, int, int], None]  # what is done; file bytes done, of how many; text bytes done


class Options(NamedTuple):
    """What decides a shard's bytes, besides its documents and the tokenizer."""

    text_key: str = "text"
    block_bytes: int = 1 << 20  # of tokens
    shard_bytes: int = 64 << 20  # of input


class Task(NamedTuple):
    index: int
    parts: list[Part]
    out: str
    tokenizer: str  # its hash
    options: Options
    limit: int  # tokens a block


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    tokens: str = "bytes",
    train: int = 0,
    workers: int = 1,
    name: str = "",
    options: Options = Options(),  # noqa: B008 (immutable)
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Writes shards, tokenizer.json and manifest.json to `out`.

    `tokens` names a tokenizer; `train` trains a BPE of that many ids instead. Asked again for the same, it goes on
    where it was stopped or returns what is there. Raises ValueError.
    """
    _check(workers, train, tokens, options)
    out = Path(out)
    files = documents.find(inputs, but=out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    with _folder(out), _lock(out):
        asked = {**options._asdict(), "tokenizer": f"trained {train}" if train else tokenizer.load(tokens).hash}
        told = [[file.name, file.stat().st_size] for file in files]
        if (out / manifest.FILE).exists():
            return _finished(out, asked, told, files, tokens)
        found = _tokenizer_for(out, tokens, train, files, options, progress)
        dtype = "uint16" if found.vocab <= 1 << 16 else "uint32"
        limit = _block_tokens(files, options, options.block_bytes // np.dtype(dtype).itemsize, found.name == "bytes")
        shards = _make_shards(files, Task(0, [], str(out), found.hash, options, limit), workers, progress)
        if not shards:
            _tidy(out, shards)
            raise ValueError(f"{', '.join(map(str, inputs))}: no documents, only empty lines or files")
        facts = {"name": found.name, "hash": found.hash, "vocab": found.vocab, "eot": found.eot}
        done = Manifest(name or out.resolve().name, facts, dtype, tuple(shards), asked, told)
        _write(out / manifest.FILE, manifest.dump(done).encode())
        _tidy(out, shards)
        return done


def make_shard(task: Task) -> Shard:
    """Writes one shard atomically, or returns the finished one that was made from the same task."""
    found = _loaded(task.out, task.tokenizer)
    file = Path(task.out) / f"shard-{task.index:05d}.tar"
    digest = hashlib.blake2b(repr((task.tokenizer, task.options, task.limit)).encode())
    for part in task.parts:
        digest.update(b"%d %d " % (part.jsonl, len(part.data)) + part.data)
    note = file.with_suffix(".json")
    if note.exists() and file.exists():
        kept = json.loads(note.read_text())
        if kept["digest"] == digest.hexdigest() and kept["shard"]["bytes"] == file.stat().st_size:
            return manifest.parse_shard(kept["shard"])
    texts = (text for part in task.parts for text in documents.texts(part, task.options.text_key))
    shard = _write_shard(file, texts, found, task.limit)
    _write(note, f'{{"digest": "{digest.hexdigest()}", "shard": {manifest.dump_shard(shard)}}}'.encode())
    return shard


def _write_shard(file: Path, texts: Iterator[str], found: tokenizer.Tokenizer, limit: int) -> Shard:
    dtype = np.dtype("<u2" if found.vocab <= 1 << 16 else "<u4")
    partial = file.with_suffix(".tmp")
    blocks: list[list[int]] = []
    sizes: list[int] = []
    ustar = tarfile.USTAR_FORMAT
    with _named(file), open(partial, "wb") as raw, tarfile.open(fileobj=raw, mode="w", format=ustar) as tar:
        for pieces, ids in _blocks(texts, found, limit, sizes):
            data, table = ids.astype(dtype).tobytes(), np.array(pieces, "<i8").tobytes()
            at = raw.tell()
            for part, content in (("tokens", data), ("pieces", table)):
                member = tarfile.TarInfo(f"{len(blocks):06d}.{part}")  # its time and owner stay 0: same bytes always
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            first, last = pieces[0][0], pieces[-1][0]
            crc = zlib.crc32(table, zlib.crc32(data))
            blocks.append([at, raw.tell() - at, crc, first, last - first + 1, len(ids)])
    with _named(file), open(partial, "r+b") as raw:
        os.fsync(raw.fileno())
        sha = hashlib.file_digest(raw, "sha256").hexdigest()
    os.replace(partial, file)
    rows = np.array(blocks, np.int64).reshape(-1, 6)
    tokens = int(rows[:, Columns.TOKENS].sum())
    return Shard(file.name, len(sizes), tokens, sum(sizes), file.stat().st_size, sha, rows)


def _blocks(texts: Iterator[str], found: tokenizer.Tokenizer, limit: int, sizes: list[int]):
    """Yields ([(document, tokens), ...], ids) of at most `limit` tokens and adds every text's bytes to `sizes`.

    A document that fits into a block is never cut; a longer one is cut into equal pieces.
    """
    pieces: list[tuple[int, int]] = []
    parts: list[np.ndarray] = []
    have = 0
    for number, text in enumerate(texts):
        sizes.append(len(text.encode()))
        ids = np.append(found.encode(text), found.eot)
        for piece in np.array_split(ids, -(-len(ids) // limit)) if len(ids) > limit else [ids]:
            if parts and have + len(piece) > limit:
                yield pieces, np.concatenate(parts)
                pieces, parts, have = [], [], 0
            pieces.append((number, len(piece)))
            parts.append(piece)
            have += len(piece)
    if parts:
        yield pieces, np.concatenate(parts)


def _make_shards(files: Sequence[Path], task: Task, workers: int, progress: Progress) -> list[Shard]:
    """All shards that hold documents, in order."""
    total = sum(file.stat().st_size for file in files)
    read: list[int] = []

    def tasks() -> Iterator[Task]:
        for index, (parts, position) in enumerate(documents.chunks(files, task.options.shard_bytes)):
            read.append(position)
            yield task._replace(index=index, parts=parts)

    shards: list[Shard] = []
    size = 0
    for index, shard in enumerate(_in_order(make_shard, tasks(), workers)):
        size += shard.text_bytes
        shards += [shard] if shard.documents else []
        progress("shards", read[index], total, size)
    return shards


def _in_order(function: Callable[[Task], Shard], tasks: Iterator[Task], workers: int) -> Iterator[Shard]:
    """Results in the order of the tasks, a few tasks ahead at most: each carries its shard's text."""
    if workers == 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    waiting: deque[Future[Shard]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker of prepare was killed, for want of memory perhaps (fewer --workers need less); "
            "the same command goes on where this one stopped"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A pool's worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _block_tokens(files: Sequence[Path], options: Options, most: int, plain: bool) -> int:
    """Tokens a block: `most`, or fewer so that a small corpus has enough blocks for its lanes."""
    shortest = 1 if plain else 8  # text bytes a token, at most
    if sum(file.stat().st_size for file in files) > FEWEST_BLOCKS * most * shortest:
        return most
    parts = (part for chunk, _ in documents.chunks(files, options.shard_bytes) for part in chunk)
    size = sum(len(text.encode()) for part in parts for text in documents.texts(part, options.text_key))
    return max(16, min(most, size // shortest // FEWEST_BLOCKS))


def _tokenizer_for(out: Path, tokens: str, train: int, files: Sequence[Path], options: Options, progress: Progress):
    """Loads or trains the tokenizer and saves it to `out`, where the workers find it."""
    found = tokenizer.train_bpe(_sample(files, options, progress), train) if train else tokenizer.load(tokens)
    _write(out / tokenizer.FILE, found.source.encode())
    return found


def _sample(files: Sequence[Path], options: Options, progress: Progress) -> Iterator[str]:
    """Documents spread evenly over the input, about TRAINING_BYTES of them."""
    total = sum(file.stat().st_size for file in files)
    every, size, number = max(1, total // TRAINING_BYTES), 0, 0
    for chunk, read in documents.chunks(files, options.shard_bytes):
        for text in (text for part in chunk for text in documents.texts(part, options.text_key)):
            if number % every == 0:
                size += len(text.encode())
                yield text
            number += 1
        progress("training the tokenizer", read, total, size)


def _finished(out: Path, asked: dict, told: list, files: Sequence[Path], tokens: str) -> Manifest:
    """The corpus that is there, if it is what was asked for, with the tokenizer that was called `tokens`."""
    where = out / manifest.FILE
    there = manifest.parse(where.read_bytes(), str(where))
    way = "choose another --out, or delete it first"
    for key, value in asked.items():
        if (has := there.options.get(key)) != value:
            if key == "tokenizer":
                has, value = _called(str(has), there.tokenizer["name"]), _called(value, tokens)
            raise ValueError(f"{out} holds a corpus with {key} = {has}, not {value}: {way}")
    if there.inputs != told:
        raise ValueError(f"{out} holds a corpus of {len(there.inputs)} other files than these {len(told)}: {way}")
    newer = [file for file in files if file.stat().st_mtime > where.stat().st_mtime]
    if newer:
        raise ValueError(f"{newer[0]} was changed after the corpus in {out} was written: {way}")
    return there


def _called(asked: str, name: str) -> str:
    """A tokenizer in a sentence: a hash alone says nothing."""
    return asked if asked.startswith("trained ") else f"{name} {asked[:12]}"


def _tidy(out: Path, shards: list[Shard]) -> None:
    """Removes the notes on finished shards and what earlier, interrupted runs left."""
    for note in out.glob("shard-*.json"):
        if note.with_suffix(".tar").name not in {shard.file for shard in shards}:
            note.with_suffix(".tar").unlink(missing_ok=True)
        note.unlink()
    for partial in out.glob("shard-*.tmp"):
        partial.unlink()


def _check(workers: int, train: int, tokens: str, options: Options) -> None:
    counts = {"workers": workers, "block-bytes": options.block_bytes, "shard-bytes": options.shard_bytes}
    for flag, value in counts.items():
        if value < 1:
            raise ValueError(f"--{flag} {value}: must be at least 1")
    if options.block_bytes < 4:
        raise ValueError(f"--block-bytes {options.block_bytes}: must be at least 4, what a token may take")
    if train and tokens != "bytes":
        raise ValueError(f"--tokenizer {tokens} and --train-tokenizer {train} exclude each other")


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Made if need be, and taken away if it was and the inputs are refused before there is a shard."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except ValueError:
        if new and not any(out.glob("shard-*")):
            shutil.rmtree(out)
        raise


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another prepare is writing here") from None
        except OSError as error:
            way = "mount its file system with locks (Lustre: -o flock), or choose another --out"
            raise ValueError(f"{out} cannot be locked ({error.strerror}); {way}") from None
        yield
    finally:
        os.close(folder)


@lru_cache(maxsize=1)
def _loaded(folder: str, _hash: str) -> tokenizer.Tokenizer:
    return tokenizer.load(folder)


def _write(file: Path, data: bytes) -> None:
    """All or nothing."""
    partial = file.with_suffix(".tmp")
    with _named(file), open(partial, "wb") as raw:
        raw.write(data)
        raw.flush()
        os.fsync(raw.fileno())
    os.replace(partial, file)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """What a full disk says names no file: let it name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise
