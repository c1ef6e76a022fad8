"""One TOML file a run, read into frozen dataclasses; what can be refused of one is in rules.py."""
from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch

from stepladder.launch import toml
from stepladder.launch.toml import ConfigError, Rule
from stepladder.model import registry
from stepladder.model.config import BlockConfig, ModelConfig
from stepladder.parallel.support import Parallel

Count = Annotated[int, Rule(lambda n: n >= 1, "at least 1")]
Natural = Annotated[int, Rule(lambda n: n >= 0, "0 or more")]
Above0 = Annotated[float, Rule(lambda x: x > 0, "above 0")]
From0 = Annotated[float, Rule(lambda x: x >= 0, "0 or more")]
Ratio = Annotated[float, Rule(lambda x: 0 <= x <= 1, "between 0 and 1")]
Below1 = Annotated[float, Rule(lambda x: 0 <= x < 1, "at least 0 and below 1")]


@dataclass(frozen=True)
class Source:
    """A corpus, under a name of yours."""
    shards: str                     # folder with a manifest.json, http(s) or fsspec address of one, or a pipe: command
    weight: From0 = 1.0             # tokens come from the sources in proportion to their weights


@dataclass(frozen=True)
class Data:
    """What a run learns from, and in which portions."""
    sources: dict[str, Source]
    seq: Count                      # tokens a row: the length of context
    batch_tokens: Count             # tokens an optimizer step, over all ranks; a multiple of seq x rows x dp
    rows: Count                     # rows a rank computes at once, a micro-batch; repeated for batch_tokens a step
    lanes: Count = 8                # readers among whom the corpus is dealt; rows come from them in turn, and each dp
                                    # rank has its own: a multiple of dp, and a divisor of the rows a step. The order of
                                    # the data depends on it, so keep it when dp changes
    heldout: Below1 = 0.0           # share of the documents kept from training, for evaluation
    workers: Natural = 0            # reader processes a rank; 0: none
    prefetch: Count = 4             # batches read ahead
    on_error: Literal["stop", "skip"] = "stop"    # what to do at a corrupt shard, or one that does not come
    retries: Natural = 4            # attempts at a shard from elsewhere after the first, with longer and longer pauses
    stall_seconds: Above0 = 30.0    # so long without a byte ends an attempt
    fetch_minutes: Above0 = 5.0     # limit for one shard, attempts and pauses together
    cache: str = ""                 # folder for shards from elsewhere, shared by a machine's processes; "": none
    cache_gib: Above0 = 100.0       # GiB that the cache holds at most; what was not used for longest goes first


@dataclass(frozen=True)
class Train:
    """How long a run trains, and how it computes."""
    steps: Count                    # optimizer steps of the whole run; the schedule ends here
    seed: Natural = 0               # of the initial weights and the order of the data
    device: Literal["auto", "cpu", "cuda"] = "auto"    # auto: GPUs where there are any
    dtype: Literal["bf16", "fp32", "fp64"] = "bf16"    # of computation; masters, the weights that AdamW updates, are
                                                       # fp32 (fp64 under fp64)
    deterministic: bool | None = None                  # the same bits every time; absent: true on CPUs, false on GPUs
    recompute: Literal["none", "channel", "token", "both"] = "none"    # activation checkpointing: mixers that are
                                                                       # computed again in the backward pass, not kept
    compile: bool = False           # torch.compile of the mixers
    graph: bool = False             # start a pass as one CUDA graph: where the host is slower than its GPUs
    clip: From0 = 1.0               # gradients of a larger global norm are scaled down to it; 0: no clipping
    max_skipped: Count = 10         # steps in a row without finite gradients, which are skipped, before the run stops
    eval_every: Natural = 0         # steps from one evaluation on held-out documents to the next; 0: none
    eval_batches: Count = 4         # batches an evaluation, of batch_tokens each; always the same ones, on every layout
    log_every: Count = 1            # steps from one console line to the next
    collective_minutes: Above0 = 10.0    # a collective or a step without progress for so long ends the run
    same_batch_steps: Natural = 3   # first steps in which ranks compare the batches that must be equal


@dataclass(frozen=True)
class Optimizer:
    """AdamW. Norms, biases and recurrent decays get no weight decay."""
    lr: Above0                      # learning rate after the warm-up, the highest
    betas: tuple[Below1, Below1] = (0.9, 0.95)    # decay a step of the running means of gradients and of their squares
    eps: Above0 = 1e-8              # added to the root of the second moment
    weight_decay: From0 = 0.1       # decoupled: a step takes lr x this share of a weight
    schedule: Literal["cosine", "wsd"] = "cosine"    # of lr: a cosine to the end, or flat with a linear end (wsd)
    warmup_steps: Natural = 0       # the first steps, in which lr rises linearly
    decay_steps: Natural = 0        # the last steps of wsd, falling linearly
    min_lr_ratio: Ratio = 0.1       # of lr, at the end


@dataclass(frozen=True)
class Checkpoint:
    """When a run is saved, and what is kept."""
    every: Natural = 1000           # steps from one checkpoint to the next; 0: only at the end and on a stop signal
    keep_last: Count = 3            # newest checkpoints that are kept
    keep_every: Natural = 0         # checkpoints of steps that this divides are never deleted; 0: none
    background: bool = True         # write while training goes on


@dataclass(frozen=True)
class Run:
    model: ModelConfig
    data: Data
    train: Train
    optimizer: Optimizer
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a TOML file; each override is "section.key=value", the value in TOML or a bare string."""
    try:
        table = tomllib.loads(Path(path).read_bytes().decode())
    except ValueError as error:    # not TOML, or not UTF-8
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
    for text in overrides:
        _override(table, text)
    return parse(table)


def _override(table: dict[str, Any], text: str) -> None:
    path, equals, raw = text.partition("=")
    *outer, key = path.strip().split(".")
    if not equals or not outer or not all([*outer, key]):
        raise ConfigError(f"override {text!r} is not of the form section.key=value, like train.steps=100")
    for i, name in enumerate(outer):
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {text!r}: {'.'.join(outer[:i + 1])} is a value, not a section")
    table[key] = _bare(raw.strip())


def _bare(raw: str) -> Any:
    """`raw` as TOML, or as a string where it is none: dtype=bf16 and shards=/data/x need no quotes."""
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw
    return value if isinstance(value, bool | int | float | str | list | dict) else raw    # a date: no key takes one


def parse(table: dict[str, Any]) -> Run:
    """Build the Run of a TOML table; unknown, missing, ill-typed and out-of-range keys raise ConfigError."""
    return toml.read(Run, table, "", READERS)


def _mixer(table: dict[str, str], value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise toml.wrong_type(path, value, "a table")
    kind = value.get("kind")
    if kind not in table:
        got = "is missing" if kind is None else f"= {toml.text(kind)} is no mixer{toml.nearest(kind, table)}"
        raise ConfigError(f"{path}.kind {got}; there are {', '.join(table)}")
    return toml.read(registry.find(table, kind).Spec, value, path)


READERS: toml.Readers = {
    (BlockConfig, "token"): lambda value, path: _mixer(registry.TOKEN, value, path),
    (BlockConfig, "channel"): lambda value, path: _mixer(registry.CHANNEL, value, path),
}


def dump(run: Run) -> str:
    """The resolved run as TOML text, defaults included; parse(tomllib.loads(dump(run))) == run."""
    return toml.write(asdict(run))


class Derived(NamedTuple):
    """What follows from a run and the number of its processes: printed, never set."""
    world: int
    dp: int
    shards: int               # dp ranks over which FSDP splits the weights
    accumulation: int         # forward and backward passes a step
    global_rows: int          # rows a step, over all ranks
    tokens: int               # of the whole run
    device: str               # "cpu" or "cuda"
    deterministic: bool

    def __str__(self) -> str:
        copies = self.dp // self.shards
        return (f"{self.world} processes on {self.device}: dp {self.dp} ({copies} x {self.shards} shards), "
                f"{self.global_rows} rows a step in {self.accumulation} micro-batches a rank, "
                f"{self.tokens:,} tokens in all, {'' if self.deterministic else 'not '}deterministic")


def derived(run: Run, world_size: int) -> Derived:
    """The numbers that nobody sets, of a run that check() let through."""
    p, data, train = run.parallel, run.data, run.train
    dp = world_size // (p.tp * p.pp)
    device = train.device if train.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return Derived(
        world=world_size, dp=dp, shards=dp // p.dp_replicate if p.shard else 1,
        accumulation=data.batch_tokens // (data.seq * data.rows * dp),
        global_rows=data.batch_tokens // data.seq,
        tokens=train.steps * data.batch_tokens, device=device,
        deterministic=device == "cpu" if train.deterministic is None else train.deterministic)
