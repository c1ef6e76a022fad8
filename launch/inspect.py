"""`stepladder inspect`: what is in a prepared corpus, some of its documents, and whether its bytes are sound."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from stepladder.data.manifest import Columns
from stepladder.data.shards import Corpus

SHOWN = 400  # characters of a document


def run(args: argparse.Namespace) -> int:
    corpus = Corpus(args.shards)
    _summary(corpus)
    tokenizer = corpus.tokenizer() if args.documents else None
    for number, (at, ids) in enumerate(_documents(corpus)) if tokenizer else ():
        if number == args.documents:
            break
        assert tokenizer is not None
        text = tokenizer.decode(ids)
        cut = f" ... ({len(text):,} characters)" if len(text) > SHOWN else ""
        print(f"\n--- document {number}, {at}, {len(ids):,} tokens\n{text[:SHOWN]}{cut}")
    if args.verify:
        for shard in range(len(corpus.manifest.shards)):
            corpus.verify(shard)
        print(f"\nall {len(corpus.manifest.shards)} checksums are right")
    return 0


def _summary(corpus: Corpus) -> None:
    found = corpus.manifest
    blocks = np.concatenate([shard.blocks[:, Columns.TOKENS] for shard in found.shards])
    text = sum(shard.text_bytes for shard in found.shards)
    rows = {
        "corpus": found.name,
        "tokenizer": f"{found.tokenizer['name']}, {found.tokenizer['vocab']:,} ids, {found.tokenizer['hash'][:12]}",
        "dtype": found.dtype,
        "documents": f"{found.documents:,}, {found.tokens / found.documents:,.0f} tokens each",
        "tokens": f"{found.tokens:,}",
        "text": f"{text / 1e6:,.1f} MB, {text / found.tokens:.2f} bytes a token",
        "shards": f"{len(found.shards):,}, {sum(shard.bytes for shard in found.shards) / 1e6:,.1f} MB",
        "blocks": f"{len(blocks):,}, {blocks.mean():,.0f} tokens each; as many lanes at most",
        "hash": found.hash(),
    }
    for key, value in rows.items():
        print(f"{key:<10} {value}")


def _documents(corpus: Corpus) -> Iterator[tuple[str, np.ndarray]]:
    """Every document in the order it was given, with its place; pieces of a long one are joined."""
    for index, shard in enumerate(corpus.manifest.shards):
        parts: list[np.ndarray] = []
        last = 0
        for block in range(len(shard.blocks)):
            tokens, pieces = corpus.read(index, block)
            ends = np.cumsum(pieces[:, 1])
            for (number, count), end in zip(pieces.tolist(), ends.tolist(), strict=True):
                if parts and number != last:
                    yield shard.file, np.concatenate(parts)
                    parts = []
                parts, last = [*parts, tokens[end - count : end]], number
        if parts:
            yield shard.file, np.concatenate(parts)
