"""Shards from elsewhere: the same rows as from a folder, whatever server, command, store or cache does in between."""
# ruff: noqa: F811  fixtures are imported

import hashlib
import io
import itertools
import json
import random
import tarfile
import time
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path

import fsspec
import pytest
import torch
from serving import PATIENT, Server, blocks, gib, made, server  # noqa: F401

from stepladder.data import fetch
from stepladder.data.fetch import Limits, Remote
from stepladder.data.loader import Batch, Loader, Source
from stepladder.data.manifest import Columns
from stepladder.data.shards import Corpus, ShardError
from stepladder.launch import events

STRICT = Limits(retries=1, stall=0.4, total=20, pause=0.01)
LANES = 4


def loader(base: Path | str, limits: Limits = PATIENT, **options) -> Loader:
    plain = {"seq": 50, "rows": 4, "lanes": LANES, "seed": 1, "prefetch": 0}
    return Loader([Source("s", str(base))], limits=limits, **{**plain, **options})


def take(count: int, base: Path | str, limits: Limits = PATIENT, **options) -> list[Batch]:
    made = loader(base, limits, **options)
    try:
        return list(itertools.islice(made, count))
    finally:
        made.close()


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a.cursor == b.cursor


@pytest.mark.parametrize("way", ["http", "cold cache", "warm cache", "tight cache", "pipe", "pipe and cache", "store"])
def test_rows_and_resume_do_not_depend_on_where_the_shards_are(made, server, tmp_path, way):
    told = take(60, made)
    assert told[30].cursor["state"]["0"]["token"] > 0, "the resume is in the middle of a document"
    base = f"pipe:cat {made}" if way.startswith("pipe") else f"file://{made}" if way == "store" else server.url
    limits = PATIENT._replace(cache=str(tmp_path / "cache") if "cache" in way else "")
    if way == "tight cache":
        limits = limits._replace(cache_gib=gib(LANES + 1, made))
    if way == "warm cache":
        blocks(Corpus(base, limits=limits))
        server.asked.clear()
    assert all(same(a, b) for a, b in zip(told, take(60, base, limits), strict=True))
    assert all(same(a, b) for a, b in zip(told[31:], take(29, base, limits, cursor=told[30].cursor), strict=True))
    if way == "warm cache":
        assert server.shards_asked() == 0
    if way == "tight cache":
        assert server.shards_asked() > len(Corpus(made).manifest.shards), "some were evicted and fetched again"
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.*")) <= limits.cache_gib * 2**30


@pytest.mark.parametrize("cached", [False, True])
def test_a_source_that_fails_for_a_while_is_asked_again(made, server, tmp_path, cached):
    limits = PATIENT._replace(cache=str(tmp_path / "cache") if cached else "")
    server.faults = {"manifest.json": ["503"], "shard-00001.tar": ["500", "cut", "wrong"]}
    assert blocks(Corpus(server.url, limits=limits)) == blocks(Corpus(made))
    assert (server.asked["manifest.json"], server.asked["shard-00001.tar"]) == (2, 4)


@pytest.mark.parametrize(("fault", "attempts", "last"), [
    ("500", 4, "4 attempts in .* s, the last: HTTP 500 Internal Server Error"),
    ("cut", 4, "4 attempts in .* s, the last: the connection ended \\d+ bytes early"),
    ("short", 4, "4 attempts in .* s, the last: truncated: 900 bytes, the manifest says"),
    ("wrong", 4, "4 attempts in .* s, the last: corrupt: sha256"),
    ("404", 1, "1 attempt in .* s, HTTP 404 Not Found"),
])  # fmt: skip
def test_a_shard_that_does_not_come_is_named_with_its_attempts_the_last_error_and_what_to_do(
    server, fault, attempts, last
):
    server.faults = {"shard-00001.tar": [fault] * 9}
    found = Corpus(server.url, limits=PATIENT)
    with pytest.raises(ShardError, match=rf"1.tar: cannot be fetched \({last}.*\) at byte \d+; see .* or train w"):
        found.verify(1)
    assert server.asked["shard-00001.tar"] == attempts


@pytest.mark.parametrize(("fault", "limits", "most", "last"), [
    ("silent", STRICT, 5, "2 attempts in .* s, the last: no byte came for 0.4 s"),
    ("half", STRICT, 5, "2 attempts in .* s, the last: no byte came for 0.4 s"),
    ("drip", STRICT._replace(stall=30, total=1), 5, "1 attempt in .* s, not done in time"),
])  # fmt: skip
def test_a_stalled_source_is_reported_within_its_limit(server, fault, limits, most, last):
    server.faults = {f"shard-{i:05d}.tar": [fault] * 9 for i in range(9)}
    began = time.monotonic()
    with pytest.raises(ShardError, match=last):
        take(100, server.url, limits)
    assert time.monotonic() - began < most


@pytest.mark.parametrize(("fault", "cache"), [("silent", "cache"), ("half", "cache"), ("half", "")])
def test_lanes_go_on_without_a_stalled_shard(made, server, tmp_path, fault, cache):
    server.faults = {"shard-00001.tar": [fault] * 99}
    limits = STRICT._replace(cache=cache and str(tmp_path / cache))
    ahead = loader(server.url, limits, on_error="skip", rows=8)
    streamed = list(itertools.islice(ahead, 60))
    assert ahead.skipped == 1
    (why,) = ahead.news()
    assert "shard-00001.tar: cannot be fetched (2 attempts" in why
    assert not ahead.news(), "told once"
    assert server.asked["shard-00001.tar"] % 2 == 0, "asked for twice each time a lane comes to it"
    ahead.close()
    assert not list((tmp_path / "cache").glob("*.part"))
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in made.iterdir():
        data = path.read_bytes()
        gone = {"silent": 0, "half": len(data) // 2}[fault] if path.name == "shard-00001.tar" else len(data)
        (cut / path.name).write_bytes(data[:gone])
    assert all(same(a, b) for a, b in zip(take(60, cut, on_error="skip", rows=8), streamed, strict=True))


@pytest.mark.parametrize(("fault", "lanes", "says"), [
    ("silent", 1, r"no shard came in \d s, the last shard-\d+.tar \(1 attempt in .* s, .*\); see to the source"),
    ("500", LANES, "cannot read any document of an epoch; see to it"),
], ids=["silent", "refuses"])  # fmt: skip
def test_a_source_that_does_not_answer_at_all_is_not_skipped_but_ends_the_run_in_the_time_of_one_shard(
    server, fault, lanes, says
):
    server.faults = {f"shard-{i:05d}.tar": [fault] * 99 for i in range(99)}
    stall, total = (0.2, 0.8) if fault == "silent" else (30, 60)
    limits = Limits(retries=1, stall=stall, total=total, pause=0.01)
    with pytest.raises(ValueError, match=says) as caught:
        take(1, server.url, limits, on_error="skip", rows=1, lanes=lanes)
    assert events._passing(caught.value)
    if fault == "silent":
        assert [*server.asked.values()].count(2) <= 1, "only the first is asked for again"


@pytest.mark.parametrize(("vain", "left"), [(0, 100), (30, 70), (99, 50)])
def test_a_shard_after_one_that_did_not_come_has_at_least_half_its_time(server, monkeypatch, vain, left):
    found, given = Corpus(server.url, limits=Limits(stall=1, total=100)), []
    found._vain = vain

    def comes(remote, told, until):
        given.append(until - time.monotonic())
        return io.BytesIO(), None

    monkeypatch.setattr(found, "_fetch", comes)
    found._wait(found.manifest.shards[0])
    assert given == [pytest.approx(left, abs=9)]
    assert found._vain == 0


@pytest.mark.parametrize("file", ["manifest.json", "tokenizer.json", "shard-00000.tar"])
@pytest.mark.parametrize(("fault", "passing"), [("503", True), ("404", False)])
def test_a_source_that_is_away_may_be_found_by_another_start(server, file, fault, passing):
    server.faults = {file: [fault] * 9}

    def read_all() -> None:
        found = Corpus(server.url, limits=PATIENT)
        found.tokenizer()
        found.read(0, 0)

    with pytest.raises(ValueError, match=rf"{file}: cannot be (read|fetched) ") as caught:
        read_all()
    assert events._passing(caught.value) is passing


def test_a_loader_that_waits_for_a_stalled_source_closes_at_once(server):
    server.faults = {f"shard-{i:05d}.tar": ["silent"] for i in range(9)}
    ahead = loader(server.url, Limits(), prefetch=2)
    while not server.shards_asked():
        time.sleep(0.01)
    began = time.monotonic()
    ahead.close()
    assert time.monotonic() - began < 2


def test_a_command_that_fails_says_why_and_one_that_hangs_is_killed_with_what_it_started(made, tmp_path):
    found = Corpus(f"pipe:cat {made}", limits=STRICT)
    found.base = "pipe:echo no such bucket >&2; exit 3; "
    with pytest.raises(ShardError, match=r"2 attempts .* the last: the command ended with code 3: no such bucket"):
        found.read(0, 0)
    found.base = f"pipe:sleep 60 & echo $! > {tmp_path}/child; wait; "
    with pytest.raises(ShardError, match="no byte came for"):
        found.read(1, 0)
    with pytest.raises(ValueError, match=r"1 attempt .* code 127"):
        Corpus("pipe:no-such-command-at-all")
    child, deadline = int((tmp_path / "child").read_text()), time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_pauses_double_and_come_from_a_named_seed():
    before = random.getstate()
    one, again, other = (Remote("pipe:x", Limits(pause=1, seed=seed)) for seed in ("a", "a", "b"))
    pauses = [one._pause("u", attempt) for attempt in (1, 2, 3)]
    assert pauses == [again._pause("u", attempt) for attempt in (1, 2, 3)]
    assert all(2**i / 2 <= pause <= 2**i * 1.5 for i, pause in enumerate(pauses))
    assert len({one._pause("u", 1), other._pause("u", 1), one._pause("v", 1)}) == 3
    assert one._pause("u", 50) <= 45
    assert random.getstate() == before


def test_a_server_cannot_send_a_reader_out_of_the_web(made, server, tmp_path):
    shard = made / "shard-00000.tar"
    for target in (f"file://{shard}", f"ftp://x{shard}", "data:,x", f"pipe:touch {made}/x"):
        server.faults = {"shard-00000.tar": [f"to {target}"] * 9}
        with pytest.raises(ShardError, match=r"\(1 attempt .*(Redirection to .* not allowed|redirects to .* refused)"):
            Corpus(server.url, limits=PATIENT).read(0, 0)
    assert not (made / "x").exists()
    server.faults = {name: [f"to {server.url}/{name}"] for name in ("manifest.json", "shard-00000.tar")}
    assert Corpus(server.url, limits=PATIENT).read(0, 0), "a redirect to another web address is followed"
    for url in (f"file://{shard}", "data:,x"):
        with pytest.raises(urllib.error.URLError, match="unknown url type"):
            fetch._opener().open(url)
    secure = urllib.request.Request("https://a/b")
    follow = lambda target: fetch._Redirect().redirect_request(secure, None, 302, "", Message(), target)
    assert follow("https://c/d")
    with pytest.raises(fetch.Gone, match="redirects to http://a/b, which is refused"):
        follow("http://a/b")


@pytest.mark.parametrize("name", ["pipe:touch {}", "../{}", "{}", "x;touch {}", "http://127.0.0.1/{}", ".{}"])
def test_a_manifest_from_the_web_names_plain_files_and_starts_no_command(made, server, tmp_path, name):
    table = json.loads((made / "manifest.json").read_text())
    server.folder = tmp_path
    for key, value in (("file", name.format(tmp_path / "harmed")), ("sha256", name.format(tmp_path / "harmed"))):
        changed = [{**table["shards"][0], key: value}, *table["shards"][1:]]
        (tmp_path / "manifest.json").write_text(json.dumps({**table, "shards": changed}))
        with pytest.raises(ValueError, match=r"is not (a plain file name|64 hexadecimal digits)"):
            Corpus(server.url, limits=PATIENT._replace(cache=str(tmp_path / "cache")))
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_members_of_a_shard_from_the_web_are_not_unpacked(made, server, tmp_path):
    """Names that would escape, in a shard whose checksum is the manifest's; a cache holds it whole and nothing else."""
    table = json.loads((made / "manifest.json").read_text())
    harmful = io.BytesIO()
    with tarfile.open(fileobj=harmful, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("../escape", str(tmp_path / "absolute"), "000000.tokens/../../escape", "000000.pyd"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"harm"))
        longer = tar.offset
    data = harmful.getvalue()[:longer] + (made / "shard-00000.tar").read_bytes()
    told = table["shards"][0] | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for number, row in enumerate(told["blocks"]):
        row[Columns.SIZE if number == 0 else Columns.OFFSET] += longer
    server.folder = tmp_path / "served"
    server.folder.mkdir()
    (server.folder / "shard-00000.tar").write_bytes(data)
    (server.folder / "manifest.json").write_text(json.dumps({**table, "shards": [told]}))
    found = Corpus(server.url, limits=PATIENT._replace(cache=str(tmp_path / "cache")))
    assert blocks(found) == blocks(Corpus(made))[: len(told["blocks"])]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(["lock", f"{told['sha256']}.tar"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "served"]


def test_object_stores_need_fsspec_and_say_so(made, monkeypatch):
    with pytest.raises(ValueError, match=r"nosuch://x: fsspec cannot read it \(.*nosuch"):
        Corpus("nosuch://x")
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "fsspec", None)
        with pytest.raises(ValueError, match=r"s3://b: .* pip install 'stepladder\[fsspec\]'; folders, .* without it"):
            Corpus("s3://b")
        assert take(1, f"pipe:cat {made}")
    store = fsspec.filesystem("memory")
    store.put(f"{made}/", "/corpus", recursive=True)
    assert blocks(Corpus("memory://corpus", limits=PATIENT)) == blocks(Corpus(made))
    with pytest.raises(ValueError, match="1 attempt"):
        Corpus("memory://nothing", limits=PATIENT)
