"""Small corpora for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from stepladder.data.manifest import Manifest
from stepladder.data.prepare import Options, prepare


def texts(count: int, name: str = "a") -> list[str]:
    """Documents of different lengths that are all different."""
    return [f"{name}{i:04d} " + chr(97 + i % 26) * (i * 37 % 90) for i in range(count)]


def jsonl(file: Path, documents: Sequence[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
    return file


def corpus(out: Path, documents: Sequence[str], block_bytes: int = 512, shard_bytes: int = 6000) -> Path:
    """The documents as a prepared corpus of byte tokens: several shards, each of several blocks."""
    source = jsonl(out.with_suffix(".jsonl"), documents)
    made: Manifest = prepare([source], out, options=Options(block_bytes=block_bytes, shard_bytes=shard_bytes))
    assert made.documents == len(documents)
    return out
