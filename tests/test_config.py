"""launch/config.py and rules.py: what a TOML file may say, and the sentence for what it may not."""
from __future__ import annotations

import copy
import math
import re
import tomllib
from dataclasses import asdict
from typing import Any

import pytest
import torch

from stepladder.launch import config, rules
from stepladder.launch.config import ConfigError
from stepladder.parallel import support
from stepladder.parallel.support import UnsupportedError

TEXT = """
[model]
vocab = 256
width = 64
layers = 4
pattern = ["gla", "full"]

[model.blocks.gla]
token = { kind = "gla", heads = 4, key_dim = 8, value_dim = 16 }
channel = { kind = "moe", experts = 4, top_k = 2, hidden = 64, ahead = 1 }
lag = [1, 1]

[model.blocks.full]
token = { kind = "attention", heads = 4, kv_heads = 2, head_dim = 16, max_length = 128 }
channel = { kind = "swiglu", hidden = 128 }
lag = [1, 1]

[data]
seq = 64
batch_tokens = 1024
rows = 2
heldout = 0.1
sources.plays.shards = "data/plays"

[train]
steps = 100

[optimizer]
lr = 1e-3
"""


def table(**changes: object) -> dict:
    """The sound run of TEXT with values replaced: table(**{"data.rows": 4}); None removes the key."""
    whole = copy.deepcopy(tomllib.loads(TEXT))
    for path, value in changes.items():
        *outer, key = path.split(".")
        inner = whole
        for name in outer:
            inner = inner.setdefault(name, {})
        if value is None:
            del inner[key]
        else:
            inner[key] = value
    return whole


def parsed(**changes: object) -> config.Run:
    return config.parse(table(**changes))


def says(call, *args: object) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_dumped_run_reads_back_equal():
    sources = {'a"b. c': {"shards": "x\\y\x7f\t"}, "é": {"shards": "", "weight": 1 / 3}}
    run = parsed(**{"train.deterministic": True, "optimizer.eps": 1e-20, "data.sources": sources})
    assert config.parse(tomllib.loads(config.dump(run))) == run
    run = parsed()
    assert config.parse(tomllib.loads(config.dump(run))) == run
    assert run.train.deterministic is None


def test_a_dumped_run_names_every_default():
    run = parsed(**{"train.deterministic": False, "parallel.zero": 2})
    saved = tomllib.loads(config.dump(run))
    for section in ("train", "optimizer", "data", "parallel", "checkpoint"):
        assert set(saved[section]) == set(asdict(run)[section])


def test_an_integer_is_a_number_but_true_is_not_an_integer():
    assert parsed(**{"optimizer.lr": 1}).optimizer.lr == 1.0
    assert says(config.parse, table(**{"train.steps": True})) == "train.steps = true must be an integer"


def test_a_run_is_frozen():
    with pytest.raises(AttributeError):
        parsed().train.steps = 3    # pyright: ignore


def test_overrides_take_toml_values_and_bare_strings(tmp_path):
    (tmp_path / "run.toml").write_text(TEXT)
    run = config.load(tmp_path / "run.toml", [
        "train.steps=1_000", "train.dtype=fp32", "optimizer.betas=[0.8, 0.9]", "data.sources.books.shards=/d/b=1#x",
        "model.pattern=['full']", "train.compile=true", "checkpoint.every = 7", "data.sources.plays.shards=2024-01-01"])
    assert (run.train.steps, run.train.dtype, run.optimizer.betas) == (1000, "fp32", (0.8, 0.9))
    assert (run.model.pattern, run.train.compile, run.checkpoint.every) == (("full",), True, 7)
    assert {name: s.shards for name, s in run.data.sources.items()} == {"plays": "2024-01-01", "books": "/d/b=1#x"}


@pytest.mark.parametrize(("override", "sentence"), [
    ("steps", "override 'steps' is not of the form section.key=value, like train.steps=100"),
    ("steps=3", "override 'steps=3' is not of the form section.key=value, like train.steps=100"),
    ("train..steps=3", "override 'train..steps=3' is not of the form section.key=value, like train.steps=100"),
    ("train.steps.x=3", "override 'train.steps.x=3': train.steps is a value, not a section"),
    ("train.compile=True", 'train.compile = "True" must be true or false'),
    ("train.stpes=3", "unknown key train.stpes, did you mean steps?; [train] knows steps, seed,"),
])
def test_a_bad_override_gets_a_sentence(tmp_path, override, sentence):
    (tmp_path / "run.toml").write_text(TEXT)
    assert says(config.load, tmp_path / "run.toml", [override]).startswith(sentence)


def test_a_file_that_is_not_toml_is_named(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[model\n")
    assert says(config.load, path).startswith(f"{path} is not a TOML file: ")
    path.write_bytes(b"\xff\xfe")
    assert says(config.load, path).startswith(f"{path} is not a TOML file: ")
    with pytest.raises(FileNotFoundError):
        config.load(tmp_path / "none.toml")


@pytest.mark.parametrize(("path", "value", "sentence"), [
    # unknown keys name the nearest
    ("optimiser", {}, "unknown section [optimiser], did you mean optimizer?; a run knows model, data, train,"),
    ("model.widht", 1, "unknown key model.widht, did you mean width?; [model] knows vocab, width,"),
    ("model.blocks.full.token.kvheads", 1, "unknown key model.blocks.full.token.kvheads, did you mean kv_heads?"),
    ("data.sources.plays.wieght", 1, "unknown key data.sources.plays.wieght, did you mean weight?"),
    # missing ones are named
    ("train", None, "section [train] is missing"),
    ("train.steps", None, "train.steps is missing"),
    ("model.blocks.full.channel", None, "model.blocks.full.channel is missing"),
    ("model.blocks.full.token.heads", None, "model.blocks.full.token.heads is missing"),
    ("data.sources.books.weight", 2.0, "data.sources.books.shards is missing"),
    # types
    ("data.seq", "64", 'data.seq = "64" must be an integer'),
    ("train.steps", 1e3, "train.steps = 1000.0 must be an integer, like 1000"),
    ("optimizer.lr", math.inf, "optimizer.lr = inf must be a finite number"),
    ("optimizer.betas", [0.9], "optimizer.betas = [0.9] has 1 values; it must have 2"),
    ("optimizer.betas", 0.9, "optimizer.betas = 0.9 must be a list"),
    ("model.pattern", ["full", 1], "model.pattern[1] = 1 must be a string"),
    ("train", 3, "train = 3 must be a table"),
    ("model.blocks.full.token", "attention", 'model.blocks.full.token = "attention" must be a table'),
    ("data.sources", ["x"], 'data.sources = ["x"] must be a table'),
    # ranges and choices
    ("data.sources.plays.weight", -1, "data.sources.plays.weight = -1.0 is out of range; it must be 0 or more"),
    ("data.heldout", 1.0, "data.heldout = 1.0 is out of range; it must be at least 0 and below 1"),
    ("optimizer.betas", [0.9, 1.0], "optimizer.betas[1] = 1.0 is out of range; it must be at least 0 and below 1"),
    ("optimizer.lr", 0, "optimizer.lr = 0.0 is out of range; it must be above 0"),
    ("train.dtype", "fp16", 'train.dtype = "fp16" is not one of "bf16", "fp32", "fp64", did you mean bf16?'),
    ("train.dtype", "bf61", 'train.dtype = "bf61" is not one of "bf16", "fp32", "fp64", did you mean bf16?'),
    ("parallel.tp", 0, "parallel: tp = 0 must be at least 1"),
    ("parallel.shard_ctas", 65, "parallel: shard_ctas = 65 must be 1 to 64, NCCL's most, or 0 for its choice"),
    ("parallel.shard_ctas", -1, "parallel: shard_ctas = -1 must be 1 to 64"),
    ("parallel", {"schedule": "zero-bubble", "chunks": 3}, "parallel: chunks = 3, but zero-bubble is a V of 2 spans"),
    ("parallel.schedule", "zb", 'parallel.schedule = "zb" is not one of "1f1b", "interleaved", "zero-bubble"'),
    # the model's own rules, under the path the user wrote
    ("model.layers", 0, "model.layers = 0 must be at least 1"),
    ("model.pattern", ["half"], "model.pattern names block 'half'; [model.blocks] has gla, full"),
    ("model.blocks.full.lag", [1, 0], "model.blocks.full: lag [1, 0] is not one of"),
    ("model.blocks.full.token.kv_heads", 3, "model.blocks.full.token: heads = 4 is not divisible by kv_heads = 3"),
    ("model.blocks.full.token.kv_heads", -2, "model.blocks.full.token: kv_heads = -2 must not be negative"),
    ("model.blocks.gla.channel.top_k", 5, "model.blocks.gla.channel: top_k = 5 must be at least 1 and at most experts"),
    ("model.blocks.full.token.kind", "atention",
     'model.blocks.full.token.kind = "atention" is no mixer, did you mean attention?; there are attention, gla'),
    ("model.blocks.full.channel.kind", None, "model.blocks.full.channel.kind is missing; there are swiglu, moe"),
])
def test_a_bad_table_gets_a_sentence(path, value, sentence):
    assert says(config.parse, table(**{path: value})).startswith(sentence)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_sound_run_passes(world):
    run = parsed(**{"parallel.tp": min(world, 2)})
    rules.check(run, world)
    plan = config.derived(run, world)
    assert plan.dp * plan.accumulation * run.data.rows * run.data.seq == run.data.batch_tokens
    assert plan.dp == max(1, world // 2)


DENSE = {"model.pattern": ["full"]}
TP2 = {"parallel.tp": 2}


@pytest.mark.parametrize(("world", "changes", "sentence"), [
    (3, TP2, "the number of processes = 3 is not divisible by parallel.tp x parallel.pp = 2; start"),
    (1, {"data.sources.plays.shards": "http://host/plays", "data.fetch_minutes": 6.5}, "data.fetch_minutes = 6.5, half "
     "of it again, and data.stall_seconds = 30 for shards that do not come, but a step may take "
     "train.collective_minutes = 10; lower the former or raise"),
    (2, {"parallel.dp_replicate": 4}, "dp = 2 is not divisible by parallel.dp_replicate = 4; start a multiple of 4"),
    (1, {"parallel.ep": 4}, "dp x tp = 1 is not divisible by parallel.ep = 4; start a multiple of 4, or set"),
    (2, TP2 | {"parallel.ep": 3}, "dp x tp = 2 is not divisible by parallel.ep = 3; start a multiple of 6, or"),
    (2, TP2 | {"model.vocab": 255}, "model.vocab = 255 is not divisible by parallel.tp = 2; round it up to 256"),
    (2, TP2 | {"model.width": 63}, "model.width = 63 is not divisible by parallel.tp = 2; "),
    (2, TP2 | {"model.blocks.gla.token.heads": 3}, "model.blocks.gla.token.heads = 3 is not divisible by "),
    (4, {"parallel.tp": 4, "model.blocks.full.token": {"kind": "attention", "heads": 12, "kv_heads": 6, "head_dim": 8}},
     "model.blocks.full.token.kv_heads = 6, parallel.tp = 4: neither divides the other; "),
    (2, TP2 | {"model.blocks.full.channel.hidden": 65}, "model.blocks.full.channel.hidden = 65 is not divisible by "),
    (4, {"parallel.ep": 4, "model.blocks.gla.channel.experts": 6},
     "model.blocks.gla.channel.experts = 6 is not divisible by parallel.ep = 4; set parallel.ep to a divisor"),
    (2, {"parallel.ep": 2} | DENSE, "parallel.ep = 2, but the model has 0 blocks with experts; set parallel.ep = 1"),
    (1, {"model.layers": 2}, "model.blocks.gla.channel.ahead = 1 chooses experts for a later MoE block, but the "
                             "model has only 1 in 2 layers; set ahead = 0 or add MoE blocks"),
    (1, {"model.blocks.full.channel": {"kind": "moe", "experts": 8, "top_k": 2, "hidden": 64, "ahead": 1}},
     "model.blocks.gla.channel.experts = 4 and model.blocks.full.channel.experts = 8 differ, but pre-gating"),
    (1, {"model.blocks.full.channel": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 64}},
     "model.blocks.gla.channel.ahead = 1 and model.blocks.full.channel.ahead = 0 differ, but pre-gating"),
    (8, {"parallel.pp": 8}, "parallel.pp = 8 is more stages than model.layers = 4; lower it"),
    (4, {"parallel.pp": 4, "data.rows": 8},
     "data.batch_tokens = 1024 gives a rank 2 micro-batches of 8 rows, too few for parallel.pp = 4 stages; set"),
    (4, {"parallel.pp": 4, "parallel.schedule": "interleaved"},
     "parallel.pp x chunks = 8 is more stages than model.layers = 4; lower it"),
    (2, {"parallel.pp": 2, "parallel.schedule": "interleaved", "data.batch_tokens": 1152, "data.lanes": 2},
     "data.batch_tokens = 1152 gives a rank 9 micro-batches of 2 rows, but interleaved stages take them by "
     "parallel.pp = 2 at a time; set it to 1280, or change"),
    (2, {"parallel.pp": 2, "parallel.schedule": "zero-bubble", "train.compile": True},
     "train.compile = true computes both halves of a backward at once, which parallel.schedule = \"zero-bubble\""),
    (1, {"parallel.chunks": 4}, 'parallel.chunks = 4 is for schedule = "interleaved", but the schedule is "1f1b"; '),
    (1, {"parallel.copies": True}, "parallel.copies = true moves the sums of tensor and the tokens of expert pa"),
    (3, {"parallel.tp": 3, "model.vocab": 258, "model.width": 66} | {f"model.blocks.{name}.token": {
        "kind": "mamba", "inner": 64} for name in ("gla", "full")},
     "model.blocks.gla.token.inner = 64 is not divisible by parallel.tp = 3; change one of them"),
    (4, {"parallel.tp": 4} | {f"model.blocks.{name}.token": {"kind": "mamba2", "heads": 4, "groups": 2}
                              for name in ("gla", "full")},
     "model.blocks.gla.token.groups = 2 is not divisible by parallel.tp = 4; change one of them"),
    (2, TP2 | {"parallel.copies": True, "train.device": "cpu"}, "parallel.copies = true copies from GPU to GPU, but"),
    (2, {"parallel.shard_ctas": 4, "train.device": "cpu"},
     "parallel.shard_ctas = 4 is about multiprocessors of a GPU, but this run is on the CPU; set parallel.shard_ctas"),
    (2, {"parallel.shard_ctas": 4, "parallel.shard": False},
     "parallel.shard_ctas = 4 is about what FSDP shards, but parallel.shard = false; drop shard_ctas or shard"),
    (2, {"parallel.shard_ctas": 4, "parallel.engine": "deepspeed"},
     'parallel.shard_ctas = 4 is for engine = "fsdp", but the engine is "deepspeed"; drop shard_ctas or change'),
    (2, {"parallel.dp_replicate": 2, "parallel.shard": False},
     "parallel.dp_replicate = 2 is about what FSDP shards, but parallel.shard = false; drop dp_replicate or shard"),
    (1, {"parallel.sequence": True}, "parallel.sequence = true splits tokens over tp ranks, but parallel.tp = 1;"),
    (2, TP2 | DENSE | {"parallel.sequence": True, "data.seq": 63}, "data.seq = 63 is not divisible by parallel"),
    (1, {"data.seq": 256}, "data.seq = 256 is longer than model.blocks.full.token.max_length = 128; shorten"),
    (1, {"data.sources": {}}, "none of the 0 sources in [data.sources] has a weight above 0; add one"),
    (1, {"data.sources.plays.weight": 0}, "none of the 1 sources in [data.sources] has a weight above 0; add one"),
    (1, {"train.eval_every": 10, "data.heldout": 0.0}, "train.eval_every = 10 has nothing to read, data.heldout = 0;"),
    (2, {"data.batch_tokens": 1000},
     "data.batch_tokens = 1000 is not divisible by data.seq x data.rows x dp = 64 x 2 x 2 = 256; set it to 512 or "),
    (2, {"data.batch_tokens": 100}, "data.batch_tokens = 100 is not divisible by data.seq x data.rows x dp = "
                                    "64 x 2 x 2 = 256; set it to 512,"),
    (2, {"data.lanes": 1}, "data.lanes = 1 is not divisible by dp = 2; "),
    (1, {"data.lanes": 3}, "data.batch_tokens / data.seq = 16 is not divisible by data.lanes = 3; "),
    (1, {"optimizer.warmup_steps": 101}, "optimizer.warmup_steps + decay_steps = 101 + 0 are more than train"),
    (1, {"optimizer.decay_steps": 10}, 'optimizer.decay_steps = 10 is for schedule = "wsd", but the schedule'),
])
def test_what_cannot_run_is_refused_with_a_way_out(world, changes, sentence):
    text = says(rules.check, parsed(**changes), world)
    assert text.startswith(sentence)
    assert ";" in text    # the way out


@pytest.mark.parametrize(("layout", "dp"), [
    ({}, "dp = 1 and dp_replicate = 1 "), (TP2, ""), (TP2 | {"parallel.ep": 2}, "dp = 1 and dp_replicate = 1 "),
    ({"parallel.dp_replicate": 2} | DENSE, "dp = 2 and dp_replicate = 2 "), (DENSE, "")])
def test_room_for_collectives_is_refused_where_ranks_share_no_weights(layout, dp):
    """Experts are shared over dp x tp / ep."""
    run = parsed(**layout | {"parallel.shard_ctas": 4, "train.device": "cuda", "data.lanes": 2})
    world = 2 if layout else 1
    if not dp:
        return rules.anywhere(run, world)
    assert says(rules.anywhere, run, world) == (
        f"parallel.shard_ctas = 4 is about weights that ranks share, but {dp}leave each rank its own; "
        "set parallel.shard_ctas = 0")


@pytest.mark.parametrize("dp", [2, 3, 5, 6, 7, 12])
def test_who_follows_the_advice_on_a_batch_gets_a_run(dp):
    """Lanes used to refuse what was advised for the batch."""
    changes: dict[str, Any] = {}
    for _ in range(2):
        try:
            return rules.check(parsed(**changes), dp)
        except config.ConfigError as error:
            key, advised = re.match(r"(data\.\w+).*; .*?set it to (\d+)", str(error)).groups()
            changes[key] = int(advised)
    rules.check(parsed(**changes), dp)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert says(rules.check, parsed(**{"train.device": "cuda"}), 1).startswith('train.device = "cuda", but torch ')
    assert config.derived(parsed(), 1).device == "cpu"


def test_an_unlisted_combination_is_refused_by_the_support_table(monkeypatch):
    monkeypatch.setattr(support, "LAYOUTS", [f for f in support.LAYOUTS if f != {"tp", "ep", "hsdp"}])
    with pytest.raises(UnsupportedError, match="tp x ep x hsdp is not a supported layout; the nearest is ep x hsdp"):
        rules.check(parsed(**TP2 | {"parallel.ep": 2, "parallel.dp_replicate": 2}), 8)


def test_tied_embeddings_may_be_on_two_stages():
    rules.check(parsed(**{"model.tied": True, "parallel.pp": 2}), 2)


def test_fewer_kv_heads_than_tensor_ranks_are_fine():
    rules.check(parsed(**{"parallel.tp": 4}), 4)


def test_unused_blocks_are_not_checked():
    rules.check(parsed(**TP2 | DENSE | {"model.blocks.gla.token.heads": 3}), 2)


@pytest.mark.parametrize(("changes", "shards"), [
    ({}, 4), ({"parallel.dp_replicate": 2}, 2), ({"parallel.shard": False}, 1)])
def test_shards_follow_from_the_copies(changes, shards):
    plan = config.derived(parsed(**changes | {"data.lanes": 4}), 4)
    assert (plan.dp, plan.shards) == (4, shards)


def test_determinism_is_the_cpu_default_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert config.derived(parsed(), 1).deterministic
    assert not config.derived(parsed(**{"train.deterministic": False}), 1).deterministic
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert config.derived(parsed(), 1)[-2:] == ("cuda", False)


def test_a_width_that_does_not_divide_by_the_heads_is_refused_with_both():
    block = {"token": {"kind": "attention", "heads": 5}, "channel": {"kind": "swiglu", "hidden": 8}}
    table = {"model": {"vocab": 16, "width": 32, "layers": 1, "blocks": {"a": block}, "pattern": ["a"]},
             "data": {"sources": {"x": {"shards": "s"}}, "seq": 8, "batch_tokens": 64, "rows": 8, "lanes": 8},
             "train": {"steps": 1, "device": "cpu"}, "optimizer": {"lr": 1e-3}}
    said = r"model\.blocks\.a\.token: model width = 32 .* heads = 5 .* set head_dim"
    with pytest.raises(config.ConfigError, match=said):
        rules.check(config.parse(table), 1)
    block["token"]["heads"] = 4                       # head_dim is width / heads then
    rules.check(config.parse(table), 1)


@pytest.mark.parametrize(("world", "changes", "sentence"), [
    (2, {"parallel.pp": 2}, "train.graph = true records a pass from end to end, but parallel.pp = 2; set"),
    (2, {"parallel.ep": 2}, "parallel.ep = 2 reads on the host how many tokens go where, which train.graph = true"),
    (2, {}, "train.graph = true with parallel.shard = true: FSDP moves weights while a pass runs"),
    (1, {"train.dtype": "fp32"}, "model.blocks.gla.channel.engine = 'grouped' with train.dtype = 'fp32' counts on"),
])
def test_a_pass_that_cannot_be_recorded_is_refused(monkeypatch, world, changes, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = parsed(**{"train.graph": True, "train.dtype": "bf16", "train.device": "cuda"} | changes)
    assert says(rules.check, run, world).startswith(sentence)


def test_a_recorded_pass_needs_a_gpu():
    run = parsed(**{"train.graph": True, "train.device": "cpu"})
    assert says(rules.check, run, 1).startswith("train.graph = true records the work of a GPU, but this run is on the")


def test_a_number_of_ranks_that_does_not_divide_is_refused_with_those_that_do():
    run = parsed(**{"data.seq": 32, "data.batch_tokens": 192, "data.rows": 1, "data.lanes": 2, "parallel.tp": 2})
    said = says(rules.check, run, 6)
    assert "set it to 3 in a new run, as one that resumes keeps its lanes" in said
    assert said.endswith("as it is, it runs on dp = 1, 2 (2, 4 processes)")
    rules.check(run, 4)
