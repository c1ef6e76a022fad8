"""Text to token ids and back: bytes, or a Hugging Face `tokenizers` JSON run by tiktoken where that gives the same ids.

Text in a document is only ever text: `<|endoftext|>` written in it is encoded as the characters it is made of.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

FILE = "tokenizer.json"
EOT = "<|endoftext|>"
_BYTES = '{"type": "bytes"}'
_ENDS = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "<｜end▁of▁sentence｜>")

# Words with their leading space, at most three digits, runs of punctuation, line ends. Contractions are spelled out: a
# case-insensitive group folds letters differently in the two regex engines.
_WORDS = (
    r"'(?:[sdmtSDMT]|ll|LL|ve|VE|re|RE)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# tiktoken's regex engine overflows its stack on a million blanks in a row; Hugging Face's does not.
_LONG_BLANK = 1 << 18
_BLANK = re.compile(rf"\s{{{_LONG_BLANK}}}")
# Training costs the square of a word's length: 100,000 letters without a blank take 4 s, half a million minutes.
_LONG_WORD = re.compile(r"\S{1024}|\s{1024}")


class Tokenizer:
    """Ids are below `vocab`; `eot` ends every document; `hash` (sha256) tells two tokenizers apart."""

    def __init__(self, source: str = _BYTES, where: str = "tokenizer"):
        self.hash = hashlib.sha256(source.encode()).hexdigest()
        self.source = source  # the text of its tokenizer.json
        self._hf: tokenizers.Tokenizer | None = None
        if source == _BYTES:
            self.name, self.vocab, self.eot = "bytes", 257, 256
            return
        self._hf = _read(source, where)
        self._hf.encode_special_tokens = True  # otherwise special-token text in a document becomes the special token
        ids = self._hf.get_vocab(with_added_tokens=True)
        self.vocab = max(ids.values()) + 1
        self.name = f"{json.loads(source)['model'].get('type', 'model').lower()}-{self.vocab}"
        ends = [ids[end] for end in _ENDS if end in ids]
        if not ends:
            raise ValueError(f"{where}: no end-of-text token; it must have one of {', '.join(_ENDS)}")
        self.eot = ends[0]

    def encode(self, text: str) -> np.ndarray:
        """The text's ids, int64; no special token is added or recognised. The ids do not depend on the engine."""
        if self._hf is None:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        if self._fast is None or (len(text) > _LONG_BLANK and _BLANK.search(text)):
            return np.array(self._hf.encode(text, add_special_tokens=False).ids, np.int64)
        return self._fast.encode_to_numpy(text, allowed_special=set(), disallowed_special=()).astype(np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD, end-of-text tokens become nothing."""
        ids = [int(i) for i in ids]
        if self._bytes is None:
            assert self._hf is not None
            return self._hf.decode(ids)
        return b"".join(self._bytes[i] for i in ids).decode(errors="replace")

    def stream(self) -> TextStream:
        return TextStream(self)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, which `load` reads back with the same hash."""
        (Path(folder) / FILE).write_bytes(self.source.encode())

    def __reduce__(self):
        return Tokenizer, (self.source,)

    @cached_property
    def _fast(self) -> tiktoken.Encoding | None:
        return _tiktoken(self.source, self._hf) if self._hf is not None else None

    @cached_property
    def _bytes(self) -> list[bytes] | None:
        """Bytes of every id, or None where a token is more than its bytes (SentencePiece and its kind)."""
        if self._hf is None:
            return [bytes([i]) for i in range(256)] + [b""]
        if self._fast is None:
            return None
        special = self._fast._special_tokens.values()
        known = {i: token for token, i in self._fast._mergeable_ranks.items() if i not in special}
        return [known.get(i, b"") for i in range(self.vocab)]


class TextStream:
    """Turns ids that arrive one by one into text: a character is given out when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._hf = decoders.DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        table = self._tokenizer._bytes
        if table is not None:
            return self._utf8.decode(table[token])
        assert self._tokenizer._hf is not None
        return self._hf.step(self._tokenizer._hf, token) or ""

    def end(self) -> str:
        """What an unfinished character at the end leaves: U+FFFD or nothing."""
        return self._utf8.decode(b"", final=True)


def load(path: str | Path) -> Tokenizer:
    """`bytes`, a Hugging Face tokenizers JSON file, or a folder that holds tokenizer.json."""
    if str(path) == "bytes":
        return Tokenizer()
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"{path}: no such tokenizer; give `bytes`, a tokenizers JSON file or a folder with {FILE}")
    return parse(file.read_bytes(), str(file))


def parse(data: bytes, where: str) -> Tokenizer:
    """The tokenizer in a file's bytes; `where` names it in errors."""
    try:
        return Tokenizer(data.decode(), where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not a tokenizers JSON file: {error}") from None


def train_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab` ids (fewer if the texts run out of pairs), end of text being id 0."""
    if vocab < 257:
        raise ValueError(f"a BPE vocabulary of {vocab} cannot hold 256 bytes and the end-of-text token: give >= 257")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator((piece for text in texts for piece in _cut(text)), trainer)
    return Tokenizer(model.to_str())


def _cut(text: str) -> Iterator[str]:
    """The text, in pieces where words are so long that they are none."""
    begin = 0
    for found in _LONG_WORD.finditer(text):
        yield text[begin : found.end()]
        begin = found.end()
    yield text[begin:]


def _read(source: str, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{where}: not a tokenizers JSON file: {error}") from None


def _tiktoken(source: str, hf: tokenizers.Tokenizer) -> tiktoken.Encoding | None:
    """The same tokenizer run by tiktoken, six times faster; None unless it is a plain byte-level BPE with equal ids."""
    spec = json.loads(source)
    model, words = spec["model"], _split(spec.get("pre_tokenizer"))
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model.get("type") != "BPE" or words is None or spec.get("normalizer") or any(model.get(key) for key in odd):
        return None
    special = {added["content"]: added["id"] for added in spec["added_tokens"]}
    if not all(added["special"] for added in spec["added_tokens"]):
        return None  # an added word that is not special is matched in text, which tiktoken does not do
    to_byte = _byte_alphabet()
    try:
        ranks = {bytes(to_byte[c] for c in t): i for t, i in model["vocab"].items() if t not in special}
    except KeyError:
        return None
    ends = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    order = [model["vocab"].get(a + b, -1) for a, b in ends]
    if order != sorted(order) or any(bytes([b]) not in ranks for b in range(256)):
        return None  # tiktoken merges by id; ids must follow the order of the merges
    fast = tiktoken.Encoding("bpe", pat_str=words, mergeable_ranks=ranks, special_tokens=special)
    probe = _probe(hf)
    return fast if fast.encode_ordinary(probe) == hf.encode(probe, add_special_tokens=False).ids else None


def _split(pre: dict | None) -> str | None:
    """The word pattern of a byte-level pre-tokenizer, None for any other."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre]
    last = steps[-1] or {"type": None}
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return _GPT2_WORDS if last["use_regex"] else None
    first = steps[0] or {"type": None}
    plain = len(steps) == 2 and first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
    return first["pattern"].get("Regex") if plain and not last["use_regex"] else None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: a printable Latin-1 character is itself, the others are 256, 257, ... in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _probe(hf: tokenizers.Tokenizer) -> str:
    """A text on which two tokenizers that differ in merges or words would differ: tokens in a scrambled order."""
    size = hf.get_vocab_size()
    text = hf.decode([i * 7919 % size for i in range(min(size, 8192))], skip_special_tokens=True)
    return text + " don't I'LL 1234567 \t\n\n  x\r\n  ... ¿Qué? naïve 東京は😀 a\u00a0b  "
