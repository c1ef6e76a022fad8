"""The manifest of a corpus: its tokenizer, its shards and where every block lies in them.

A shard is a tar file. A block is one sample of it, `000012.tokens` (little-endian token ids) and `000012.pieces` (int64
pairs: number of the document in the shard, tokens). A piece is a whole document or, where that is longer than a block,
a part of one; a document's last token is its end of text.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, NamedTuple

import numpy as np

FILE = "manifest.json"
SHARD = re.compile(r"shard-\d{5,}\.tar")  # as prepare names them
FORMAT = 1
DTYPES = ("uint16", "uint32")


class Columns:
    """Columns of `Shard.blocks`."""

    OFFSET = 0  # of the sample's first tar header in the shard, bytes
    SIZE = 1  # of the sample in the tar, headers and padding included, bytes
    CRC = 2  # zlib.crc32 of the tokens and then the pieces
    FIRST = 3  # number in the shard of the first document that has a piece here
    DOCUMENTS = 4  # how many consecutive documents have one
    TOKENS = 5


class Shard(NamedTuple):
    file: str
    documents: int
    tokens: int
    text_bytes: int
    bytes: int
    sha256: str
    blocks: np.ndarray  # (blocks, 6) int64


class Manifest(NamedTuple):
    name: str
    tokenizer: dict[str, Any]  # name, hash, vocab, eot
    dtype: str
    shards: tuple[Shard, ...]
    options: dict[str, Any]  # what prepare was asked for, so that asking again for the same is recognised
    inputs: list[list]  # [file, bytes]

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    def hash(self) -> str:
        """sha256 of what decides the tokens read from here; where the text came from is left out."""
        shards = [(shard.file, shard.sha256, shard.documents) for shard in self.shards]
        told = json.dumps([FORMAT, self.tokenizer["hash"], self.dtype, shards])
        return hashlib.sha256(told.encode()).hexdigest()


def dump(manifest: Manifest) -> str:
    shards = ",\n  ".join(dump_shard(shard) for shard in manifest.shards)
    head = {"format": FORMAT, **manifest._asdict()}
    head["shards"] = "SHARDS"
    return json.dumps(head, indent=1).replace('"SHARDS"', f"[\n  {shards}\n ]") + "\n"


def dump_shard(shard: Shard) -> str:
    """One line of JSON."""
    return json.dumps({**shard._asdict(), "blocks": shard.blocks.tolist()})


def parse(data: bytes, where: str) -> Manifest:
    """Checks and reads a manifest's bytes; `where` names it in errors (ValueError)."""
    try:
        table = json.loads(data)
        if table["format"] != FORMAT:
            raise ValueError(f"{where}: manifest format {table['format']}, not {FORMAT}: prepare the corpus again")
        shards = tuple(parse_shard(row) for row in table["shards"])
        found = Manifest(**{key: table[key] for key in Manifest._fields if key != "shards"}, shards=shards)
        missing = {"name", "hash", "vocab", "eot"} - set(found.tokenizer)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where}: not a corpus manifest ({what}); prepare it again") from None
    if missing or found.dtype not in DTYPES:
        told = f"tokenizer lacks {sorted(missing)}, dtype {found.dtype!r}, which must be {' or '.join(DTYPES)}"
        raise ValueError(f"{where}: not a corpus manifest ({told}); prepare it again")
    if not found.tokens:
        raise ValueError(f"{where}: the corpus has no documents; prepare it from text that has some")
    return found


def parse_shard(row: dict) -> Shard:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", row["file"]):  # it may become part of a shell command
        raise ValueError(f"manifest: shard file {row['file']!r} is not a plain file name")
    if not re.fullmatch(r"[0-9a-f]{64}", row["sha256"]):  # it names a file of the cache
        raise ValueError(f"manifest: shard {row['file']}: sha256 {row['sha256']!r} is not 64 hexadecimal digits")
    blocks = np.array(row["blocks"], np.int64).reshape(-1, 6)
    if (blocks < 0).any():
        raise ValueError(f"manifest: shard {row['file']}: a block lies at a negative number")
    return Shard(**{key: row[key] for key in Shard._fields if key != "blocks"}, blocks=blocks)
