"""Bad input, by the command line: one sentence that names the thing, both values and the way out, and exit code 2.

Every kind of it is here, but for run folders and their checkpoints, in test_bad_folders.py, and prompts that are empty,
too long or not text, and runs that cannot be sampled: those are in test_generate.py. Bad arguments are in test_cli.py,
bad text to prepare in test_prepare.py. Finer cases, one layer down, are in test_config.py, test_loader.py,
test_shards.py and test_checkpoint_contents.py.
"""
# ruff: noqa: F811  fixtures are imported
from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from refusals import FOLDER, FULL, GLA, RUN, before_work, here, prepared, refused, train  # noqa: F401

from stepladder.data import tokenizer
from stepladder.data.manifest import Columns
from stepladder.data.shards import Corpus
from stepladder.launch import world

# item of the list, processes, overrides, what the sentence says (in this order; the last is the way out)
SETTINGS: list[tuple[str, int, str, tuple[str, ...]]] = [
    ("manifest missing", 1, "data.sources.small.shards=nowhere", ("nowhere/manifest.json", "stepladder prepare")),
    ("vocabulary", 1, "model.vocab=256", ("257 ids", "model vocab = 256", "raise model.vocab")),
    ("sequence beyond RoPE", 1, "data.seq=128", ("data.seq = 128", "max_length = 64", "shorten")),
    ("unknown section", 1, "trian.steps=3", ("[trian]", "did you mean train?")),
    ("unknown key", 1, "train.stpes=3", ("train.stpes", "did you mean steps?")),
    ("unknown key of a mixer", 1, f"{FULL}.token.kvheads=2", (f"{FULL}.token.kvheads", "did you mean kv_heads?")),
    ("unknown mixer", 1, f"{GLA}.token.kind=gal", (f"{GLA}.token.kind", '"gal"', "did you mean gla?")),
    ("wrong type", 1, "train.steps=many", ("train.steps", '"many"', "must be an integer")),
    ("missing key", 1, "data.sources.books.weight=1", ("data.sources.books.shards is missing",)),
    ("out of range", 1, "data.heldout=1.5", ("data.heldout = 1.5", "must be at least 0 and below 1")),
    ("heads, kv heads", 1, f"{FULL}.token.kv_heads=3", (f"{FULL}.token", "heads = 4", "kv_heads = 3")),
    # Width and heads are independent here: head_dim is given, and odd ones are what RoPE cannot turn.
    ("head width", 1, f"{FULL}.token.head_dim=7", (f"{FULL}.token", "head_dim = 7", "must be even")),
    ("vocabulary by tp", 2, "parallel.tp=2 model.vocab=287", ("model.vocab = 287", "tp = 2", "round it up to 288")),
    ("width by tp", 2, "parallel.tp=2 model.width=17", ("model.width = 17", "tp = 2", "change")),
    ("heads by tp", 3, f"parallel.tp=3 model.vocab=288 model.width=48 {GLA}.token.heads=3 {FULL}.channel.hidden=18",
     (f"{FULL}.token.heads = 4", "tp = 3", "change")),
    ("hidden by tp", 2, f"parallel.tp=2 {FULL}.channel.hidden=15", (f"{FULL}.channel.hidden = 15", "tp = 2", "change")),
    ("experts by ep", 3, "parallel.ep=3", (f"{GLA}.channel.experts = 4", "ep = 3", "divisor")),
    ("layers by pp", 8, "parallel.pp=8", ("pp = 8", "layers = 4", "lower it")),
    ("micro-batches by pp", 4, "parallel.pp=4 data.rows=4", ("batch_tokens = 256", "pp = 4", "set it to 512")),
    ("pattern", 1, "model.pattern=['half']", ("model.pattern", "'half'", "gla, full")),
    ("one pre-gated block", 1, "model.layers=2", ("ahead = 1", "only 1 in 2 layers", "set ahead = 0")),
    ("unequal experts", 1, f"{FULL}.channel={{kind='moe',experts=8,top_k=1,hidden=8,ahead=1}}",
     ("experts = 4", "experts = 8", "make them equal")),
    ("top_k", 1, f"{GLA}.channel.top_k=5", (f"{GLA}.channel", "top_k = 5", "at most experts = 4")),
    ("batch tokens", 1, "data.batch_tokens=200", ("batch_tokens = 200", "32 x 2 x 1 = 64", "set it to 128 or 256")),
    ("lanes by dp", 2, "data.lanes=1", ("data.lanes = 1", "dp = 2", "set it to 2")),
    ("more mesh than processes", 1, "parallel.tp=2", ("processes = 1", "= 2", "start a multiple of 2")),
    ("processes that do not fill the mesh", 3, "parallel.tp=2", ("processes = 3", "= 2", "start a multiple of 2")),
    ("copies by dp", 2, "parallel.dp_replicate=3", ("dp = 2", "dp_replicate = 3", "divisor of 2")),
    ("offload without FSDP", 4, "parallel.tp=2 parallel.shard=false parallel.offload=true",
     ("offload with ddp", "only what FSDP manages", "the nearest supported layout is tp x fsdp")),
    ("chunks by layers", 4, "parallel.pp=4 parallel.schedule=interleaved",
     ("pp x chunks = 8", "layers = 4", "lower it")),
    ("compiled halves", 2, "parallel.pp=2 parallel.schedule=zero-bubble train.compile=true",
     ("compile = true", "zero-bubble", "set train.compile = false")),
    ("sequence parallel alone", 1, "parallel.sequence=true", ("sequence = true", "tp = 1", "set it to false")),
    ("negative weight", 1, "data.sources.small.weight=-1", ("small.weight = -1.0", "must be 0 or more")),
    ("no weight", 1, "data.sources.small.weight=0", ("none of the 1 sources", "raise a weight")),
]


@pytest.mark.parametrize(("ranks", "overrides", "says"), [case[1:] for case in SETTINGS],
                         ids=[case[0] for case in SETTINGS])
def test_a_setting_that_cannot_work_is_refused_in_one_sentence(before_work, ranks, overrides, says):
    sentence = before_work(*overrides.split(), ranks=ranks)
    at = [sentence.find(part) for part in says]
    assert -1 not in at, sentence
    assert at == sorted(at), sentence


def test_a_missing_key_or_section_is_named(before_work):
    Path("run.toml").write_text(RUN.replace("steps = 2\n", ""))
    assert before_work() == "train.steps is missing"
    Path("run.toml").write_text(RUN.partition("[optimizer]")[0])
    assert before_work() == "section [optimizer] is missing"


def test_a_run_file_that_is_not_there_or_not_toml_is_named(before_work):
    Path("run.toml").write_text("[model\n")
    assert before_work().startswith("run.toml is not a TOML file: ")
    Path("run.toml").unlink()
    assert before_work() == "run.toml: No such file or directory"


@pytest.mark.parametrize(("env", "says"), [
    ({"RANK": "0"}, "RANK = 0 is set but WORLD_SIZE and MASTER_ADDR and MASTER_PORT not; start with torchrun"),
    ({"RANK": "7", "WORLD_SIZE": "2"}, "RANK = 7, WORLD_SIZE = 2 name no process of a group; start with torchrun"),
    ({"RANK": "0", "WORLD_SIZE": "two"}, "RANK = 0, WORLD_SIZE = two name no process of a group; start with torchrun"),
])
def test_a_launcher_that_contradicts_itself_is_refused(refused, monkeypatch, env, says):
    whole = env | ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} if len(env) > 1 else {})
    for name, value in whole.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(world.World, "connect", lambda *_: pytest.fail("the ranks would have been joined"))
    prefix = "stepladder: " if env["RANK"] == "0" else f"stepladder (rank {env['RANK']}): "
    assert refused("train", "run.toml", prefix=prefix)[0].startswith(says)


def test_a_gpu_that_is_not_there_is_not_waited_for(before_work, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert before_work("train.device=cuda").endswith('torch finds no GPU here; set it to "cpu" or "auto"')
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    sentence, _ = refused("train", "run.toml", "train.device=auto", prefix="stepladder (rank 1): ")
    assert sentence.startswith("rank 1 is number 1 on this machine, which has 1 GPUs; start fewer processes here")


# --- shards


def change_manifest(**change: object) -> None:
    table = json.loads(Path("shards/manifest.json").read_text())
    Path("shards/manifest.json").write_text(json.dumps(table | change))


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """root may read everything, so the permission is taken away in the answer."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("00001.tar") and real(path, mode))


SHARD = Path("shards/shard-00001.tar")


@pytest.mark.parametrize(("harm", "says"), [
    (lambda _: SHARD.unlink(), "cannot be read (No such file or directory) at byte 0; prepare or copy it again"),
    (lambda _: os.truncate(SHARD, 0), "empty: 0 bytes, the manifest says "),
    (lambda _: os.truncate(SHARD, 5000), "truncated: 5000 bytes, the manifest says "),
    (forbid, "no permission to read it at byte 0; prepare or copy it again"),
], ids=["missing", "empty", "truncated", "unreadable"])
def test_a_shard_that_cannot_be_read_is_named_before_training(before_work, monkeypatch, harm, says):
    harm(monkeypatch)
    sentence = before_work()
    assert sentence.startswith(f"{SHARD}: {says}")
    assert sentence.endswith("prepare or copy it again, or train with data.on_error=skip")


def test_a_block_that_is_corrupt_inside_stops_the_run_or_is_skipped(refused, train):
    block = Corpus("shards").manifest.shards[1].blocks[1]
    data = bytearray(SHARD.read_bytes())
    data[block[Columns.OFFSET] + 600] ^= 1
    SHARD.write_bytes(data)
    sentence, _ = refused("train", "run.toml", "train.steps=40")
    assert sentence.startswith(f"{SHARD}: truncated or corrupt at byte {block[Columns.OFFSET]}; prepare or copy it")
    fault = sentence.partition(";")[0]
    assert f"skipped {fault}\n" in train("train.steps=40", "data.on_error=skip")
    assert json.loads(Path(FOLDER, "metrics.jsonl").read_text().splitlines()[-1])["skipped_shards"] == 1
    (skip,) = [event for line in Path(FOLDER, "events.jsonl").read_text().splitlines()
               if (event := json.loads(line))["event"] == "skip"]
    assert skip["shard"] == fault


def test_the_manifest_is_read_once_and_not_at_every_evaluation(train, monkeypatch):
    """Or a server of shards that is away for a while would end a run that has them all."""
    asked, fetch = [], Corpus.fetch
    monkeypatch.setattr(Corpus, "fetch", lambda self, file: asked.append(file) or fetch(self, file))
    train("data.heldout=0.3", "train.eval_every=1", "train.steps=1")
    assert asked.count("manifest.json") == 1


def test_a_source_that_falls_silent_is_reported_within_its_limit(refused):
    """The configuration's limits reach the readers, for the manifest and for shards, and so does the cache."""
    limits = "data.retries=1", "data.stall_seconds=0.3", "data.fetch_minutes=1", "data.cache=kept", "data.cache_gib=1"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/corpus"
        sentence, _ = refused("train", "run.toml", f"data.sources.small.shards={url}", *limits)
        assert sentence.startswith(f"{url}/manifest.json: cannot be read (2 attempts in ")
        assert sentence.endswith(" s, the last: no byte came for 0.3 s); is the address right?")
    pipe = "pipe:case {file} in *.tar) sleep 60;; *) cat shards/{file};; esac"
    sentence, _ = refused("train", "run.toml", f"data.sources.small.shards={pipe}", *limits)
    assert " esac: cannot be fetched (2 attempts in " in sentence
    assert " s, the last: no byte came for 0.3 s) at byte " in sentence
    assert [path.name for path in Path("kept").iterdir()] == ["lock"]


@pytest.mark.parametrize(("change", "says"), [
    ({"dtype": "float"}, ("dtype 'float'", "uint16 or uint32", "prepare it again")),
    ({"tokenizer": {"name": "bytes"}}, ("tokenizer lacks ['eot', 'hash', 'vocab']", "prepare it again")),
    ({"format": 9}, ("format 9, not 1", "prepare the corpus again")),
    ({"shards": []}, ("no documents", "prepare it")),
], ids=["dtype", "tokenizer", "format", "empty"])
def test_a_manifest_that_cannot_be_used_is_refused(before_work, change, says):
    change_manifest(**change)
    sentence = before_work()
    assert sentence.startswith("shards/manifest.json: ")
    assert all(part in sentence for part in says), sentence


def test_tokens_of_another_dtype_than_the_manifests_are_not_read(refused):
    """Four bytes for two: half as many tokens, most of them no token of anything."""
    change_manifest(dtype="uint32")
    sentence, out = refused("train", "run.toml")
    assert " bytes where the manifest says " in sentence
    assert " tokens of uint32, at byte " in sentence
    assert " loss " not in out


def test_a_tokenizer_that_is_not_the_manifests_is_refused(before_work):
    tokenizer.train_bpe(["abc"], 280).save("shards")
    sentence = before_work()
    assert sentence.startswith("shards/tokenizer.json: hash ")
    assert ", the manifest says " in sentence
    assert sentence.endswith("; copy both again, or prepare the corpus again")


@pytest.mark.parametrize("key", ["tokenizer", "dtype"])
def test_sources_of_another_tokenizer_or_dtype_are_refused(before_work, key):
    shutil.copytree("shards", "other")
    change_manifest(**{"tokenizer": {"name": "bpe-300", "hash": "f" * 64, "vocab": 280, "eot": 0}}
                    if key == "tokenizer" else {"dtype": "uint32"})
    sentence = before_work("data.sources.other.shards=other")
    assert sentence.startswith(f"sources 'small' and 'other' have different {key}s, ")
    assert all(part in sentence for part in (("bpe-300 ", "bytes ") if key == "tokenizer" else ("uint32", "uint16")))
    assert sentence.endswith("prepare one with --tokenizer shards/tokenizer.json")


@pytest.mark.parametrize(("args", "says"), [
    (("inspect", "nowhere"), "nowhere/manifest.json: cannot be read"),
    (("prepare", "nowhere.txt", "--out", "new"), "nowhere.txt: no such file or folder"),
    (("prepare", "run.toml", "--out", "new", "--tokenizer", "nowhere"), "nowhere: no such tokenizer; give `bytes`"),
], ids=" ".join)
def test_other_programs_refuse_what_is_not_there(refused, args, says):
    assert refused(*args)[0].startswith(says)


# --- models


def test_a_folder_without_a_run_has_nothing_to_export(refused):
    Path("empty").mkdir()
    sentence, _ = refused("export", "empty", "model.safetensors")
    assert sentence.startswith("empty holds no checkpoint (looked for empty/checkpoints/step-*)")
    assert not Path("model.safetensors").exists()
