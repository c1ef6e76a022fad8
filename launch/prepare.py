"""`stepladder prepare`: text to shards, with progress on stderr."""

from __future__ import annotations

import argparse
import os
import sys
import time

from stepladder.data.prepare import Options, prepare


def run(args: argparse.Namespace) -> int:
    options = Options(**{key: value for key in Options._fields if (value := getattr(args, key, None)) is not None})
    bar = Bar()
    done = prepare(
        args.inputs,
        args.out,
        tokens=args.tokenizer or "bytes",
        train=args.train_tokenizer or 0,
        workers=args.workers or os.cpu_count() or 1,
        name=args.name or "",
        options=options,
        progress=bar,
    )
    bar.end()
    if (asked := args.train_tokenizer or 0) > (has := done.tokenizer["vocab"]):
        print(f"the tokenizer has {has:,} tokens of {asked:,}: the text has no more pairs to merge", file=sys.stderr)
    text = sum(shard.text_bytes for shard in done.shards)
    print(
        f"{args.out}: {done.documents:,} documents, {done.tokens:,} tokens of {done.tokenizer['name']} "
        f"({text / done.tokens:.2f} bytes a token) in {len(done.shards)} shards"
    )
    return 0


class Bar:
    """One line that is written over on a terminal; elsewhere a line every ten seconds."""

    def __init__(self):
        self.live = sys.stderr.isatty()
        self.what = ""
        self.began = self.told = time.monotonic()

    def __call__(self, what: str, done: int, total: int, size: int) -> None:
        now = time.monotonic()
        if what != self.what:
            self.end()
            self.what, self.began, self.told = what, self.told, now
        if not self.live and now - self.told < 10:
            return
        self.told = now
        seconds = max(now - self.began, 1e-3)
        left = _clock(seconds * (total - done) / max(done, 1))
        line = f"{what}: {size / 1e6:,.1f} MB of text, {size / 1e6 / seconds:.1f} MB/s, {left} left"
        print(f"\r\033[K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.live and self.what:
            print(file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
