"""stepladder prepare: whatever happens on the way, the same text gives the same bytes."""

import argparse
import errno
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from corpora import jsonl, texts

from stepladder.data import manifest, tokenizer
from stepladder.data import prepare as prepare_module
from stepladder.data.manifest import Columns
from stepladder.data.prepare import Options, prepare
from stepladder.data.shards import Corpus
from stepladder.launch import cli, inspect
from stepladder.launch import prepare as program

SMALL = Options(block_bytes=512, shard_bytes=4000)


def documents(out: Path) -> list[str]:
    """The corpus read back, pieces joined, every end of text checked."""
    corpus = Corpus(out)
    found = []
    for _, ids in inspect._documents(corpus):
        assert ids[-1] == 256
        assert 256 not in ids[:-1]
        found.append(corpus.tokenizer().decode(ids))
    return found


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_documents_come_back_in_their_order(tmp_path):
    told = [*texts(150), "", "a<|endoftext|>b", "é😀" * 700]
    prepare([jsonl(tmp_path / "in.jsonl", told)], tmp_path / "out", options=SMALL)
    assert documents(tmp_path / "out") == [text for text in told if text]
    found = Corpus(tmp_path / "out").manifest
    assert len(found.shards) > 2
    assert found.documents == len(told) - 1
    assert sum(shard.text_bytes for shard in found.shards) == sum(len(text.encode()) for text in told)


def test_text_jsonl_packed_files_and_folders_are_read(tmp_path):
    folder = tmp_path / "in"
    jsonl(folder / "a.jsonl", ["one", "two"])
    packed = zstandard.compress(b'{"text": "three"}\n') + zstandard.compress(b'{"text": "four"}')
    (folder / "b.jsonl.zst").write_bytes(packed)
    (folder / "c" / "d").mkdir(parents=True)
    (folder / "c" / "d" / "e.txt").write_text("five\nsix")
    (folder / "f.md.zst").write_bytes(zstandard.compress("sieben ö".encode()))
    (folder / "g.ndjson.gz").write_bytes(gzip.compress(b'{"text": "acht"}\n') + gzip.compress(b'{"text": "neun"}\n'))
    (folder / "h.txt.gz").write_bytes(gzip.compress(b"zehn\nelf"))
    (folder / ".hidden").write_bytes(b"\xff")
    prepare([folder], folder / "out")
    assert documents(folder / "out") == ["one", "two", "three", "four", "five\nsix", "sieben ö", "acht", "neun",
                                          "zehn\nelf"]


def test_the_number_of_workers_changes_no_byte(tmp_path):
    source = jsonl(tmp_path / "in.jsonl", texts(300))
    for workers in (1, 2):
        prepare([source], tmp_path / f"out{workers}", workers=workers, name="x", options=SMALL)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path):
    source = jsonl(tmp_path / "in.jsonl", texts(300))
    prepare([source], tmp_path / "whole", train=300, name="x", options=SMALL)
    code = f"""
import os
from stepladder.data.prepare import Options, prepare
def kill(what, done, total, size):
    if what == "shards" and size > 8000:
        open({str(tmp_path / "out" / "shard-00002.tmp")!r}, "wb").write(b"half a shard")
        os.kill(os.getpid(), 9)
prepare([{str(source)!r}], {str(tmp_path / "out")!r}, train=300, name="x", options=Options{tuple(SMALL)}, progress=kill)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / ".src")}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -signal.SIGKILL
    first = tmp_path / "out" / "shard-00000.tar"
    when = first.stat().st_mtime_ns
    assert not (tmp_path / "out" / "manifest.json").exists()
    prepare([source], tmp_path / "out", train=300, name="x", options=SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert first.stat().st_mtime_ns == when, "a finished shard was made again"


def test_a_finished_shard_is_made_again_when_its_text_changed(tmp_path):
    source = jsonl(tmp_path / "in.jsonl", texts(300))

    def stop(what, done, total, size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], tmp_path / "out", options=SMALL, progress=stop)
    changed = ["B" + text[1:] for text in texts(300)]
    prepare([jsonl(source, changed)], tmp_path / "out", options=SMALL)
    assert documents(tmp_path / "out") == changed


def test_a_finished_corpus_is_kept_and_never_overwritten_by_another(tmp_path):
    source, out = jsonl(tmp_path / "in.jsonl", texts(30)), tmp_path / "out"
    made = prepare([source], out, options=SMALL)
    before = contents(out)
    assert prepare([source], out, options=SMALL).hash() == made.hash()
    with pytest.raises(ValueError, match="block_bytes = 512, not 600"):
        prepare([source], out, options=SMALL._replace(block_bytes=600))
    with pytest.raises(ValueError, match=r"with tokenizer = bytes [0-9a-f]{12}, not trained 300: choose"):
        prepare([source], out, options=SMALL, train=300)
    prepare([source], tmp_path / "bpe", options=SMALL, train=300)
    with pytest.raises(ValueError, match=r"with tokenizer = trained 300, not bytes [0-9a-f]{12}: choose"):
        prepare([source], tmp_path / "bpe", options=SMALL)
    with pytest.raises(ValueError, match="other files"):
        prepare([jsonl(tmp_path / "other.jsonl", texts(3))], out, options=SMALL)
    later = out.joinpath("manifest.json").stat().st_mtime + 9
    os.utime(source, (later, later))
    with pytest.raises(ValueError, match="was changed after"):
        prepare([source], out, options=SMALL)
    assert contents(out) == before


def test_a_small_corpus_has_blocks_for_64_lanes(tmp_path):
    plays = [" ".join(texts(200, str(i))) for i in range(5)]
    for name, train in (("bytes", 0), ("bpe", 400)):
        made = prepare([jsonl(tmp_path / "in.jsonl", plays)], tmp_path / name, train=train)
        assert sum(len(shard.blocks) for shard in made.shards) >= 64


def test_only_documents_longer_than_a_block_are_cut(tmp_path):
    told = ["x" * 200, "y" * 40, "z" * 3000, *texts(400)]
    prepare([jsonl(tmp_path / "in.jsonl", told)], tmp_path / "out", options=Options(block_bytes=512))
    corpus = Corpus(tmp_path / "out")
    blocks = [corpus.read(0, i).pieces.tolist() for i in range(len(corpus.manifest.shards[0].blocks))]
    assert all(sum(count for _, count in block) <= 256 for block in blocks)
    pieces = [piece for block in blocks for piece in block]
    lengths = [[count for n, count in pieces if n == number] for number in range(len(told))]
    assert [sum(counts) for counts in lengths] == [len(text) + 1 for text in told]
    assert [len(counts) for counts in lengths] == [1, 1, 12] + [1] * 400
    assert max(lengths[2]) - min(lengths[2]) <= 1
    rows = corpus.manifest.shards[0].blocks
    assert rows[:, Columns.FIRST].tolist() == [block[0][0] for block in blocks]
    assert rows[:, Columns.DOCUMENTS].tolist() == [block[-1][0] - block[0][0] + 1 for block in blocks]


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer.Tokenizer, "vocab", 70_000, raising=False)
    monkeypatch.setattr(tokenizer.Tokenizer, "__setattr__", lambda self, key, value: (
        None if key == "vocab" else object.__setattr__(self, key, value)))  # fmt: skip
    made = prepare([jsonl(tmp_path / "in.jsonl", ["abc"])], tmp_path / "out")
    assert made.dtype == "uint32"
    assert Corpus(tmp_path / "out").read(0, 0).tokens.dtype == np.uint32


@pytest.mark.parametrize(("data", "message"), [
    (b'{"text": "a"}\n{"body": "b"}\n', r"in.jsonl:2: no key 'text' \(body\)"),
    (b'{"text": "a"}\n\n{"text": 3}\n', r"in.jsonl:3: 'text' is int, not a string"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', r"in.jsonl:2: not UTF-8: invalid start byte; convert it \(with iconv, "),
    (b'{"text": "a"}\n{"text": "b"\n', r"in.jsonl:2: not JSON: Expecting ',' delimiter at column 13$"),
    (b'[1]\n', r"in.jsonl:1: list, not an object with the key 'text'"),
    (b'{"text": "\\ud800"}\n', r"in.jsonl:1: half of a surrogate pair"),
    (b'\n{"text": ""}\n', r"no documents"),
    (b"", r"no documents"),
])  # fmt: skip
def test_bad_jsonl_gets_a_sentence_with_file_and_line(tmp_path, data, message):
    source = tmp_path / "in.jsonl"
    source.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        prepare([source], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_there_outlives_what_is_refused(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"[1]\n")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="list, not an object"):
        prepare([tmp_path / "in.jsonl"], tmp_path / "out")
    assert (tmp_path / "out").exists()


def test_bad_inputs_get_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    text = tmp_path / "a.txt"
    text.write_bytes(b"one\ntwo\n\xffthree")
    packed = tmp_path / "b.jsonl.zst"
    packed.write_bytes(zstandard.compress(b'{"text": "three"}\n' * 9999)[:-9])
    cut, plain = tmp_path / "c.txt.gz", tmp_path / "d.jsonl.gz"
    cut.write_bytes(gzip.compress(os.urandom(9999))[:-9])
    plain.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"--out .*a.txt is a file: name a folder"):
        prepare([packed], text)
    for inputs, message in (
        ([tmp_path / "empty"], "empty: the folder holds no files"),
        ([tmp_path / "none"], "none: no such file or folder"),
        (["/dev/null"], "/dev/null: neither file nor folder"),
        ([text], "a.txt:3: not UTF-8"),
        ([packed], "b.jsonl.zst: not readable as zstd: it ends in the middle"),
        ([cut], "c.txt.gz: not readable as gzip: Compressed file ended before"),
        ([plain], "d.jsonl.gz: not readable as gzip: Not a gzipped file"),
        ([], r"no inputs given: name text, .jsonl or .ndjson files, packed as .zst or .gz or not, or folders of them"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(inputs, tmp_path / "out")
    with pytest.raises(ValueError, match="exclude each other"):
        prepare([text], tmp_path / "out", tokens="x.json", train=300)
    with pytest.raises(ValueError, match="--workers 0"):
        prepare([text], tmp_path / "out", workers=0)
    with pytest.raises(ValueError, match="--block-bytes 3: must be at least 4"):
        prepare([text], tmp_path / "out", options=Options(block_bytes=3))


@pytest.mark.parametrize("out", [".", "in"])
def test_a_folder_that_would_be_left_out_whole_is_refused(tmp_path, monkeypatch, out):
    jsonl(tmp_path / "in" / "a.jsonl", ["one"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"in lies in --out {out}, which is not read: name another --out"):
        prepare(["in"], out)


def test_a_file_that_prepare_could_write_over_is_refused(tmp_path, monkeypatch):
    """Or remove, when it tidies up."""
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer.json", "shard-00000.json", "elsewhere"):
        Path(name).write_text("one")
    Path("out").mkdir()
    Path("out/link").symlink_to("../elsewhere")
    for given, out in (("tokenizer.json", "."), ("shard-00000.json", "."), ("out/link", "out"), ("elsewhere",) * 2):
        with pytest.raises(ValueError, match=f"^{given} lies in --out {out}, which is not read: name another --out$"):
            prepare([given], out)
    assert {path.name for path in Path("out").iterdir()} == {"link"}


def test_a_prepared_corpus_is_no_text(tmp_path):
    """Not by itself, not among texts, not in parts, not before it is finished."""
    jsonl(tmp_path / "in" / "a.jsonl", ["one"])
    prepare([tmp_path / "in"], tmp_path / "in" / "out")
    refused = r"/in/out is a prepared corpus, no text: name it as shards in \[data\.sources\]"
    for given in ("in/out", "in", "in/out/shard-00000.tar"):
        with pytest.raises(ValueError, match=refused):
            prepare([tmp_path / given], tmp_path / "again")
    (tmp_path / "in" / "out" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=refused):
        prepare([tmp_path / "in"], tmp_path / "again")


def test_an_input_that_is_named_twice_is_refused_and_not_doubled(tmp_path, monkeypatch):
    jsonl(tmp_path / "in" / "a.jsonl", ["one"])
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    os.link("in/a.jsonl", "hard.jsonl")
    for inputs, named in (
        (["in", "in"], "in/a.jsonl is named twice, and"),
        (["in", "in/a.jsonl"], "in/a.jsonl is named by in and by in/a.jsonl, and"),
        (["in/a.jsonl", "link"], "link/a.jsonl and in/a.jsonl are one file, which"),
        (["in", "hard.jsonl"], "hard.jsonl and in/a.jsonl are one file, which"),
    ):
        with pytest.raises(ValueError, match=f"^{named} would count double: name it once$"):
            prepare(inputs, "out")
    os.link("hard.jsonl", "in/b.jsonl")
    with pytest.raises(ValueError, match=r"^in/b\.jsonl and in/a\.jsonl are one file"):
        prepare(["in"], "out")
    assert not Path("out").exists()


def test_a_folder_behind_a_link_is_not_left_out_without_a_word(tmp_path):
    jsonl(tmp_path / "in" / "a.jsonl", ["one"])
    jsonl(tmp_path / "more" / "b.jsonl", ["two"])
    (tmp_path / "in" / "more").symlink_to("../more")
    with pytest.raises(ValueError, match=rf"/in/more is a link to a folder, .* name the folder {tmp_path}/more as an"):
        prepare([tmp_path / "in"], tmp_path / "out")
    (tmp_path / "in" / "more").rename(tmp_path / "in" / ".more")
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "made").symlink_to("../out")
    prepare([tmp_path / "in"], tmp_path / "out")
    assert documents(tmp_path / "out") == ["one"]


def test_a_full_disk_is_told_with_the_file_that_it_could_not_hold(tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = jsonl(tmp_path / "in.jsonl", texts(3))
    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["prepare", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert capsys.readouterr().err == f"stepladder: {tmp_path}/out/tokenizer.json: No space left on device\n"
    monkeypatch.setattr(prepare_module, "_write", lambda *_: None)
    monkeypatch.setattr(prepare_module, "_loaded", lambda *_: tokenizer.load("bytes"))
    assert cli.main(["prepare", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert capsys.readouterr().err == f"stepladder: {tmp_path}/out/shard-00000.tar: No space left on device\n"


def test_two_runs_cannot_write_one_folder(tmp_path):
    source = jsonl(tmp_path / "in.jsonl", texts(3))

    def again(*_):
        with pytest.raises(ValueError, match="another prepare is writing here"):
            prepare([source], tmp_path / "out")
        seen.append(True)

    seen: list[bool] = []
    prepare([source], tmp_path / "out", progress=again)
    assert seen


def test_the_programs_tell_what_they_made(tmp_path, capsys):
    source = jsonl(tmp_path / "in.jsonl", texts(50))
    flags = {"inputs": [str(source)], "out": str(tmp_path / "out"), "tokenizer": None, "train_tokenizer": 300,
             "workers": 1, "name": "small", "text_key": "text", "block_bytes": None, "shard_bytes": None}  # fmt: skip
    assert program.run(argparse.Namespace(**flags)) == 0
    out, err = capsys.readouterr()
    assert "50 documents" in out
    assert err == ""
    few = {"inputs": [str(jsonl(tmp_path / "few.jsonl", ["abab"]))], "out": str(tmp_path / "few")}
    assert program.run(argparse.Namespace(**{**flags, **few})) == 0
    assert "the tokenizer has 259 tokens of 300: the text has no more pairs to merge" in capsys.readouterr().err
    assert inspect.run(argparse.Namespace(shards=str(tmp_path / "out"), documents=2, verify=True)) == 0
    shown = capsys.readouterr().out
    assert "50, " in shown
    assert "a0001 " + "b" * 37 in shown
    assert "a0002" not in shown
    assert "checksums are right" in shown


def test_manifests_of_another_format_are_refused():
    good = {"format": 1, "name": "a", "tokenizer": {"name": "bytes", "hash": "h", "vocab": 257, "eot": 256},
            "dtype": "uint16", "options": {}, "inputs": [],
            "shards": [{"file": "s.tar", "documents": 1, "tokens": 2, "text_bytes": 1, "bytes": 9, "sha256": "0" * 64,
                        "blocks": [[0, 9, 0, 0, 1, 2]]}]}  # fmt: skip
    assert manifest.parse(json.dumps(good).encode(), "m").tokens == 2
    for change, message in (
        ({"format": 9}, "format 9, not 1"),
        ({"dtype": "float"}, "dtype 'float'"),
        ({"tokenizer": {"name": "x"}}, "tokenizer lacks"),
        ({"shards": []}, "no documents"),
        ({"shards": [{**good["shards"][0], "file": "a;rm -rf .tar"}]}, "not a plain file name"),
        ({"shards": [{**good["shards"][0], "file": "../s.tar"}]}, "not a plain file name"),
        ({"shards": [{**good["shards"][0], "sha256": "../../s"}]}, "sha256 '../../s' is not 64 hexadecimal digits"),
        ({"shards": [{**good["shards"][0], "blocks": [[-1, 9, 0, 0, 1, 2]]}]}, "negative"),
        ({"shards": [{"file": "s.tar"}]}, "not a corpus manifest"),
    ):
        with pytest.raises(ValueError, match=message):
            manifest.parse(json.dumps({**good, **change}).encode(), "m")
    with pytest.raises(ValueError, match="not a corpus manifest"):
        manifest.parse(b"<html>", "m")
