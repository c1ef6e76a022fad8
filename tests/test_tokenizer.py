"""Tokenizers: the fast engine gives the ids of the slow one, and text is only ever text."""

import json
import random
import time

import pytest

from stepladder.data import tokenizer
from stepladder.data.tokenizer import EOT

WORDS = [
    "the",
    " ladder",
    " don't",
    "I'LL",
    " 12345",
    "\n\n  ",
    "\t\r\n",
    " naïve",
    "東京",
    "😀",
    "...",
    "<|endoftext|>",
    "  x",
]


@pytest.fixture(scope="module")
def bpe() -> tokenizer.Tokenizer:
    return tokenizer.train_bpe(texts(400), 600)


def texts(count: int) -> list[str]:
    pick = random.Random(0)
    return ["".join(pick.choices(WORDS, k=40)) for _ in range(count)]


def test_tiktoken_gives_the_ids_of_hugging_face(bpe):
    assert bpe._fast is not None
    for text in [*texts(100), " " * 70, "\n" * 9 + "a", "ſK 1½ ²", "\x00\x85\u2028", ""]:
        assert bpe.encode(text).tolist() == bpe._hf.encode(text, add_special_tokens=False).ids
        assert bpe.decode(bpe.encode(text)) == text


def test_a_million_blanks_are_encoded(bpe):
    for blank in (" ", "\t ", "\n "):
        text = blank * (1_000_000 // len(blank))
        assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize("fast", [True, False])
def test_special_token_text_in_a_document_is_text(bpe, fast, monkeypatch):
    if not fast:
        monkeypatch.setitem(bpe.__dict__, "_fast", None)
    ids = bpe.encode(f"a{EOT}b")
    assert bpe.eot not in ids
    assert bpe.decode(ids) == f"a{EOT}b"
    assert bpe.decode([*ids, bpe.eot]) == f"a{EOT}b"


def test_bytes_round_trip_and_end_of_text_is_no_byte():
    found = tokenizer.load("bytes")
    assert found.decode(found.encode("é<|endoftext|>")) == "é<|endoftext|>"
    assert (found.vocab, found.eot, found.encode("é").tolist()) == (257, 256, [0xC3, 0xA9])


def test_saved_tokenizers_are_the_same_again(bpe, tmp_path):
    for made in (bpe, tokenizer.load("bytes")):
        made.save(tmp_path)
        again = tokenizer.load(tmp_path)
        assert (again.hash, again.vocab, again.eot, again.name) == (made.hash, made.vocab, made.eot, made.name)
        assert again.encode("the ladder").tolist() == made.encode("the ladder").tolist()


def test_training_again_gives_the_same_tokenizer(bpe):
    assert tokenizer.train_bpe(texts(400), 600).hash == bpe.hash


def test_a_word_of_a_million_letters_is_no_word_to_train_on():
    """It would cost its length squared: 100,000 letters took 4 s."""
    began = time.monotonic()
    assert tokenizer.train_bpe(["one two " + "abcdefgh" * 125_000, " " * 500_000], 300).vocab > 280
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("kind", ["bytes", "bpe", "words"])
def test_streamed_text_is_the_text_and_holds_whole_characters(bpe, kind):
    found = {"bytes": tokenizer.load("bytes"), "bpe": bpe, "words": words()}[kind]
    text = "the ladder" if kind == "words" else "the naïve 東京 😀 ladder"
    stream = found.stream()
    pieces = [stream.push(int(i)) for i in found.encode(text)]
    assert "".join(pieces) + stream.end() == text
    assert "\ufffd" not in "".join(pieces)


def words() -> tokenizer.Tokenizer:
    """A tokenizer that tiktoken cannot run."""
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "decoder": None,
        "post_processor": None, "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [{"id": 0, "content": EOT, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True}],
        "model": {"type": "WordLevel", "vocab": {EOT: 0, "the": 1, "ladder": 2, "?": 3}, "unk_token": "?"},
    }  # fmt: skip
    return tokenizer.parse(json.dumps(spec).encode(), "words")


def test_other_hugging_face_tokenizers_run_on_their_own_engine():
    found = words()
    assert found._fast is None
    assert found.encode("the ladder the").tolist() == [1, 2, 1]


@pytest.mark.parametrize("change", [
    lambda spec: spec["model"].update(merges=spec["model"]["merges"][::-1]),
    lambda spec: spec.update(normalizer={"type": "Lowercase"}),
    lambda spec: spec["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    lambda spec: spec["added_tokens"][0].update(special=False),
])  # fmt: skip
def test_tiktoken_is_refused_where_its_ids_would_differ(bpe, change):
    spec = json.loads(bpe.source)
    change(spec)
    assert tokenizer.parse(json.dumps(spec).encode(), "changed")._fast is None


@pytest.mark.parametrize(("given", "message"), [
    ("no/such/file", "no/such/file: no such tokenizer"),
    ("{}", "not a tokenizers JSON file"),
    (None, "no end-of-text token"),
])  # fmt: skip
def test_bad_tokenizers_get_a_sentence(bpe, tmp_path, given, message):
    file = tmp_path / "t.json"
    file.write_text(bpe.source.replace(EOT, "<odd>") if given is None else given)
    with pytest.raises(ValueError, match=message):
        tokenizer.load(given if given == "no/such/file" else file)
    with pytest.raises(ValueError, match="vocabulary of 100"):
        tokenizer.train_bpe(["a"], 100)
