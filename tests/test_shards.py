"""Shards: the same blocks from a file, a pipe and a web server; broken ones are named, nothing is ever unpickled."""

import errno
import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from corpora import corpus, texts

from stepladder.data import shards
from stepladder.data.fetch import Limits, Remote
from stepladder.data.manifest import Columns
from stepladder.data.shards import Corpus, ShardError
from stepladder.launch import events

ONCE = Limits(retries=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("made") / "out", texts(400))


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.fixture(scope="module")
def server():
    """Serves the file system, quietly; the value is its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory="/"))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def blocks(found: Corpus) -> list[tuple[bytes, bytes]]:
    at = [(i, j) for i, shard in enumerate(found.manifest.shards) for j in range(len(shard.blocks))]
    return [(block.tokens.tobytes(), block.pieces.tobytes()) for block in (found.read(i, j) for i, j in at)]


def test_file_pipe_and_web_server_give_the_same_blocks(made, server):
    local = Corpus(made)
    assert len(local.manifest.shards) > 2
    for base in (f"{server}{made}", f"{server}{made}/manifest.json", f"pipe:cat {made}", f"pipe:cat {made}/{{file}}"):
        remote = Corpus(base, keep=1)
        assert blocks(remote) == blocks(local)
        assert remote.tokenizer().hash == local.tokenizer().hash
        remote.verify(0)
    local.verify(0)


def test_a_streamed_shard_is_fetched_once_for_all_its_blocks(made, monkeypatch):
    opened = []
    real = Remote.fetch
    monkeypatch.setattr(Remote, "fetch", lambda self, url, *how: opened.append(url) or real(self, url, *how))
    remote = Corpus(f"pipe:cat {made}", keep=1)
    blocks(remote)
    assert len(opened) == 1 + len(remote.manifest.shards)


@pytest.mark.parametrize("where", ["{}", "pipe:cat {}"])
@pytest.mark.parametrize("harm", ["truncated", "flipped", "header"])
def test_a_broken_block_is_named_by_shard_and_offset(copy, where, harm):
    row = Corpus(copy).manifest.shards[1].blocks[2]
    at = int(row[Columns.OFFSET])
    shard = copy / "shard-00001.tar"
    data = bytearray(shard.read_bytes())
    if harm == "truncated":
        del data[at + 700 :]
    else:
        data[at + (700 if harm == "flipped" else 0)] ^= 255
    shard.write_bytes(data)
    found = Corpus(where.format(copy), limits=ONCE)
    found.read(1, 1)
    with pytest.raises(ShardError, match=rf"shard-00001.tar: .* at byte {at};") as caught:
        found.read(1, 2)
    assert caught.value.offset == at
    assert pickle.loads(pickle.dumps(caught.value)).offset == at, "it must come out of a worker process whole"
    with pytest.raises(ShardError):
        found.verify(1)


def test_a_shard_that_is_missing_empty_short_or_forbidden_is_refused_at_once(copy, monkeypatch):
    shard = copy / "shard-00001.tar"
    size = shard.stat().st_size
    found = Corpus(copy)
    found.check_sizes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: not str(path).endswith("00001.tar"))
        with pytest.raises(ShardError, match=r"shard-00001.tar: no permission"):
            found.check_sizes()
    for keep, message in ((size - 512, f"truncated: {size - 512} bytes, the manifest says {size}"), (0, "empty")):
        os.truncate(shard, keep)
        with pytest.raises(ShardError, match=message):
            found.check_sizes()
    shard.unlink()
    with pytest.raises(ShardError, match=r"cannot be read .No such file"):
        found.check_sizes()
    with pytest.raises(ShardError, match="cannot be read"):
        found.read(1, 0)
    with pytest.raises(ShardError, match="cannot be fetched"):
        Corpus(f"pipe:cat {copy}", limits=ONCE).read(1, 0)


@pytest.mark.parametrize(("number", "passing"), [
    (errno.ESTALE, True), (errno.EIO, True), (errno.ENOENT, False), (errno.EACCES, False)])  # fmt: skip
def test_a_disk_that_fails_may_be_well_at_another_start_and_a_missing_file_is_not(copy, monkeypatch, number, passing):
    found = Corpus(copy)

    def fails(*args):
        raise OSError(number, os.strerror(number))

    for where, name, call in (
        (shards, "open", lambda: found.read(0, 0)),
        (os, "stat", found.check_sizes),
        (Path, "read_bytes", lambda: Corpus(copy)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fails, raising=False)
            with pytest.raises(ValueError, match="cannot be read") as caught:
                call()
        assert events._passing(pickle.loads(pickle.dumps(caught.value))) is passing


def test_other_members_are_never_decoded_or_written(copy, tmp_path):
    """A pickle that would run, a name that would escape, a link: all are passed over."""

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    shard = copy / "shard-00000.tar"
    before = blocks(Corpus(copy))
    new = tmp_path / "new.tar"
    with tarfile.open(shard) as old, tarfile.open(new, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("000000.pyd", "000000.pkl", "000000.pth", "../../escape", str(tmp_path / "absolute")):
            member = tarfile.TarInfo(name)
            member.size = len(pickle.dumps(Harm()))
            tar.addfile(member, io.BytesIO(pickle.dumps(Harm())))
        link = tarfile.TarInfo("000000.tokens")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        longer = tar.offset
        for member in old:
            tar.addfile(member, old.extractfile(member))
    shard.write_bytes(new.read_bytes())
    table = json.loads((copy / "manifest.json").read_text())
    told = table["shards"][0]
    told |= {"bytes": new.stat().st_size, "sha256": hashlib.sha256(new.read_bytes()).hexdigest()}
    for number, row in enumerate(told["blocks"]):
        row[Columns.SIZE if number == 0 else Columns.OFFSET] += longer  # the first block's bytes hold the strangers
    (copy / "manifest.json").write_text(json.dumps(table))
    for base in (copy, f"pipe:cat {copy}"):
        assert blocks(Corpus(base)) == before
    assert not (tmp_path / "harmed").exists()
    assert not (tmp_path / "absolute").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "new.tar"]


def test_a_pickle_in_the_place_of_tokens_is_a_corrupt_block(copy):
    data = (copy / "shard-00000.tar").read_bytes()
    (copy / "shard-00000.tar").write_bytes(data.replace(b"000000.tokens", b"000000.pyd\0\0\0", 1))
    with pytest.raises(ShardError, match="at byte 0"):
        Corpus(copy).read(0, 0)


def test_a_corpus_that_is_not_there_gets_a_sentence(tmp_path, server):
    for base in (tmp_path, tmp_path / "none", f"{server}{tmp_path}/none", f"pipe:cat {tmp_path}/none"):
        with pytest.raises(ValueError, match=r"manifest.json: cannot be read"):
            Corpus(base, limits=ONCE)


def test_a_tokenizer_that_is_not_the_manifests_is_refused(copy):
    from stepladder.data import tokenizer

    tokenizer.train_bpe(["abc"], 300).save(copy)
    with pytest.raises(ValueError, match=r"tokenizer.json: hash .* the manifest says"):
        Corpus(copy).tokenizer()


def test_verify_sees_a_change_outside_the_blocks(copy):
    shard = copy / "shard-00000.tar"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    blocks(Corpus(copy))
    with pytest.raises(ShardError, match=f"sha256 {hashlib.sha256(data).hexdigest()[:12]} is not"):
        Corpus(copy).verify(0)


def test_the_manifest_hash_follows_the_tokens_and_nothing_else(made, copy):
    table = json.loads((copy / "manifest.json").read_text())
    table["inputs"] = []
    (copy / "manifest.json").write_text(json.dumps(table))
    assert Corpus(copy).manifest.hash() == Corpus(made).manifest.hash()
    table["shards"][0]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(table))
    assert Corpus(copy).manifest.hash() != Corpus(made).manifest.hash()
