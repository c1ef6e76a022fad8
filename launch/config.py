"""One TOML file a run, read into frozen dataclasses; what can be refused is refused here, before any work starts."""
from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch

from stepladder.data.fetch import elsewhere
from stepladder.launch import toml
from stepladder.launch.toml import ConfigError, Rule
from stepladder.model import registry
from stepladder.model.config import BlockConfig, ModelConfig
from stepladder.parallel import support
from stepladder.parallel.support import Parallel

Count = Annotated[int, Rule(lambda n: n >= 1, "at least 1")]
Natural = Annotated[int, Rule(lambda n: n >= 0, "0 or more")]
Above0 = Annotated[float, Rule(lambda x: x > 0, "above 0")]
From0 = Annotated[float, Rule(lambda x: x >= 0, "0 or more")]
Ratio = Annotated[float, Rule(lambda x: 0 <= x <= 1, "between 0 and 1")]
Below1 = Annotated[float, Rule(lambda x: 0 <= x < 1, "at least 0 and below 1")]


@dataclass(frozen=True)
class Source:
    shards: str                     # folder with a manifest.json, http(s) or fsspec address of one, or a pipe: command
    weight: From0 = 1.0             # share of the tokens, relative to the other sources


@dataclass(frozen=True)
class Data:
    sources: dict[str, Source]
    seq: Count                      # tokens a row
    batch_tokens: Count             # tokens an optimizer step, over all ranks
    rows: Count                     # rows a rank computes at once; passes are repeated until batch_tokens are reached
    lanes: Count = 8                # readers of the corpus; the data order depends on it, so keep it when dp changes
    heldout: Below1 = 0.0           # share of the documents kept for evaluation
    workers: Natural = 0            # reader processes a rank; 0: none
    prefetch: Count = 4             # batches read ahead
    on_error: Literal["stop", "skip"] = "stop"    # at a corrupt shard, or one that does not come
    retries: Natural = 4            # of a shard from elsewhere, after the first attempt, with longer and longer pauses
    stall_seconds: Above0 = 30.0    # without a byte end an attempt
    fetch_minutes: Above0 = 5.0     # for one shard, attempts and pauses together
    cache: str = ""                 # folder for shards from elsewhere, shared by a machine's processes; "": none
    cache_gib: Above0 = 100.0       # it holds at most; what was not used for longest goes first


@dataclass(frozen=True)
class Train:
    steps: Count                    # optimizer steps of the whole run; the schedule ends here
    seed: Natural = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["bf16", "fp32", "fp64"] = "bf16"    # of the computation; masters are fp32 (fp64 under fp64)
    deterministic: bool | None = None                  # absent: on the CPU yes, on GPUs no
    recompute: Literal["none", "channel", "token", "both"] = "none"    # sublayers computed again in the backward pass
    compile: bool = False           # torch.compile of the mixers
    graph: bool = False             # start a pass as one CUDA graph: where the host is slower than its GPUs
    clip: From0 = 1.0               # global gradient norm; 0: no clipping
    max_skipped: Count = 10         # non-finite steps in a row before the run stops
    eval_every: Natural = 0         # steps; 0: no evaluation
    eval_batches: Count = 4         # of batch_tokens held-out tokens, the same ones every time and on every layout
    log_every: Count = 1            # steps a console line
    collective_minutes: Above0 = 10.0    # a collective or a step without progress for so long ends the run
    same_batch_steps: Natural = 3   # first steps in which ranks compare the batches that must be equal


@dataclass(frozen=True)
class Optimizer:
    """AdamW. Norms, biases and recurrent decays get no weight decay."""
    lr: Above0
    betas: tuple[Below1, Below1] = (0.9, 0.95)
    eps: Above0 = 1e-8
    weight_decay: From0 = 0.1
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: Natural = 0
    decay_steps: Natural = 0        # the last steps of wsd, falling linearly
    min_lr_ratio: Ratio = 0.1       # of lr, at the end


@dataclass(frozen=True)
class Checkpoint:
    every: Natural = 1000           # steps; 0: only at the end and on a stop signal
    keep_last: Count = 3
    keep_every: Natural = 0         # checkpoints of these steps are never deleted; 0: none
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


def check(run: Run, world_size: int) -> None:
    """Raise ConfigError, one sentence with the way out, for what cannot run on `world_size` processes."""
    for rule in (_device, _mesh, _heads, _tensor, _copies, _experts, _pregates, _sequence, _data, _batch, _pipeline,
                 _schedule, _graph):
        rule(run, world_size)
    support.refuse(run.model, run.parallel, world_size // (run.parallel.tp * run.parallel.pp))


def _divides(what: str, a: int, by: str, b: int, way_out: str) -> None:
    if a % b:
        raise ConfigError(f"{what} = {a} is not divisible by {by} = {b}; {way_out}")


def _blocks(run: Run) -> list[tuple[str, BlockConfig]]:
    """The blocks that stand in the model, each once, with their path."""
    used = dict.fromkeys(run.model.pattern[:run.model.layers])
    return [(f"model.blocks.{name}", run.model.blocks[name]) for name in used]


def _moe(run: Run) -> list[tuple[str, Any]]:
    return [(f"{path}.channel", block.channel) for path, block in _blocks(run) if _is_moe(block)]


def _is_moe(block: BlockConfig) -> bool:
    return hasattr(block.channel, "experts")


def _device(run: Run, world: int) -> None:
    if run.train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('train.device = "cuda", but torch finds no GPU here; set it to "cpu" or "auto"')


def _mesh(run: Run, world: int) -> None:
    p = run.parallel
    _divides("the number of processes", world, "parallel.tp x parallel.pp", p.tp * p.pp,
             f"start a multiple of {p.tp * p.pp}, or lower parallel.tp or parallel.pp")
    dp = world // (p.tp * p.pp)
    _divides("dp", dp, "parallel.dp_replicate", p.dp_replicate, f"set parallel.dp_replicate to a divisor of {dp}")
    _divides("dp x tp", dp * p.tp, "parallel.ep", p.ep, f"set parallel.ep to a divisor of {dp * p.tp}")


def _heads(run: Run, world: int) -> None:
    for path, block in _blocks(run):
        if hasattr(block.token, "channels"):
            try:
                block.token.channels(run.model.width)
            except ValueError as error:
                raise ConfigError(f"{path}.token: model {error}") from None


def _tensor(run: Run, world: int) -> None:
    tp, lower = run.parallel.tp, "change one of them"
    _divides("model.vocab", run.model.vocab, "parallel.tp", tp, f"round it up to {-(-run.model.vocab // tp) * tp}")
    _divides("model.width", run.model.width, "parallel.tp", tp, lower)
    for path, block in _blocks(run):
        _divides(f"{path}.token.heads", getattr(block.token, "heads", 0), "parallel.tp", tp, lower)
        kv = getattr(block.token, "kv_heads", 0)
        if kv and kv % tp and tp % kv:    # fewer than tp is fine: each is then held by tp / kv_heads ranks
            raise ConfigError(f"{path}.token.kv_heads = {kv}, parallel.tp = {tp}: neither divides the other; {lower}")
        if not _is_moe(block):            # experts are never split over tp
            _divides(f"{path}.channel.hidden", getattr(block.channel, "hidden", 0), "parallel.tp", tp, lower)


def _copies(run: Run, world: int) -> None:
    p, way_out = run.parallel, "set parallel.copies = false"
    if p.copies and p.tp == 1:
        raise ConfigError(f"parallel.copies = true moves the sums of tensor parallelism, but parallel.tp = 1; "
                          f"{way_out} or raise parallel.tp")
    if p.copies and derived(run, world).device == "cpu":
        raise ConfigError(f"parallel.copies = true copies from GPU to GPU, but this run is on the CPU; {way_out}")


def _experts(run: Run, world: int) -> None:
    ep = run.parallel.ep
    if ep > 1 and not _moe(run):
        raise ConfigError(f"parallel.ep = {ep}, but the model has 0 blocks with experts; set parallel.ep = 1")
    for path, channel in _moe(run):
        _divides(f"{path}.experts", channel.experts, "parallel.ep", ep, "set parallel.ep to a divisor of it")


def _pregates(run: Run, world: int) -> None:
    """A pre-gate chooses among the experts of a later MoE block: there must be one, and it must be alike."""
    moe = _moe(run)
    if not any(channel.ahead for _, channel in moe):
        return
    path, first = moe[0]
    layers = sum(map(_is_moe, run.model.kinds()))
    if layers <= first.ahead:
        raise ConfigError(f"{path}.ahead = {first.ahead} chooses experts for a later MoE block, but the model has only "
                          f"{layers} in {run.model.layers} layers; set ahead = 0 or add MoE blocks")
    for other_path, other in moe[1:]:
        for name in ("experts", "ahead"):
            a, b = getattr(first, name), getattr(other, name)
            if a != b:
                raise ConfigError(f"{path}.{name} = {a} and {other_path}.{name} = {b} differ, "
                                  f"but pre-gating links all MoE blocks; make them equal or set every ahead = 0")


def _pipeline(run: Run, world: int) -> None:
    """The micro-batches of a step, or of an evaluation, are what fills the pipeline."""
    p, data = run.parallel, run.data
    if p.schedule == "1f1b" and p.chunks != 2:
        raise ConfigError(f'parallel.chunks = {p.chunks} is for schedule = "interleaved", but the schedule is "1f1b"; '
                          f'drop chunks or change the schedule')
    if p.pp == 1:
        return
    if p.stages > run.model.layers:
        what = "parallel.pp" if p.schedule == "1f1b" else "parallel.pp x chunks"
        raise ConfigError(f"{what} = {p.stages} is more stages than model.layers = {run.model.layers}; lower it")
    if p.schedule == "zero-bubble" and run.train.compile:
        raise ConfigError('train.compile = true computes both halves of a backward at once, which parallel.schedule = '
                          '"zero-bubble" takes apart; set train.compile = false or another schedule')
    passes = derived(run, world).accumulation
    has = f"data.batch_tokens = {data.batch_tokens} gives a rank {passes} micro-batches of {data.rows} rows"
    set_to = f"set it to {data.batch_tokens // passes * -(-passes // p.pp) * p.pp}"
    if passes < p.pp:
        raise ConfigError(f"{has}, too few for parallel.pp = {p.pp} stages; {set_to}, "
                          "or lower data.rows or parallel.pp")
    if p.schedule == "interleaved" and passes % p.pp:
        raise ConfigError(f"{has}, but interleaved stages take them by parallel.pp = {p.pp} at a time; {set_to}, "
                          "or change data.rows or the schedule")


def _sequence(run: Run, world: int) -> None:
    p, seq = run.parallel, run.data.seq
    if p.sequence and p.tp == 1:
        raise ConfigError("parallel.sequence = true splits tokens over tp ranks, but parallel.tp = 1; set it to false")
    if p.sequence or _moe(run):    # each tp rank then works on its own slice of the tokens
        _divides("data.seq", seq, "parallel.tp", p.tp, f"round it up to {-(-seq // p.tp) * p.tp}")
    for path, block in _blocks(run):
        longest = getattr(block.token, "max_length", 0)
        if longest and seq > longest:
            raise ConfigError(f"data.seq = {seq} is longer than {path}.token.max_length = {longest}; "
                              f"shorten the rows, or raise max_length (with theta or rope_scale)")


def _data(run: Run, world: int) -> None:
    sources = run.data.sources
    if not any(source.weight for source in sources.values()):
        raise ConfigError(f"none of the {len(sources)} sources in [data.sources] has a weight above 0; "
                          f"add one, like data.sources.books.shards = \"path\", or raise a weight")
    if run.train.eval_every and not run.data.heldout:
        raise ConfigError(f"train.eval_every = {run.train.eval_every} has nothing to read, data.heldout = 0; "
                          f"set data.heldout (0.01, say) or train.eval_every = 0")
    fetching, patience = run.data.fetch_minutes, run.train.collective_minutes
    if fetching >= patience and any(elsewhere(source.shards) for source in sources.values()):
        raise ConfigError(f"data.fetch_minutes = {fetching:g} for a shard that does not come, but a step may take "
                          f"train.collective_minutes = {patience:g}; lower the first or raise the second")


def _batch(run: Run, world: int) -> None:
    data, dp = run.data, world // (run.parallel.tp * run.parallel.pp)
    unit = data.seq * data.rows * dp
    below = data.batch_tokens // unit * unit
    _divides("data.batch_tokens", data.batch_tokens,
             f"data.seq x data.rows x dp = {data.seq} x {data.rows} x {dp}", unit,
             f"set it to {f'{below} or ' if below else ''}{below + unit}, or change data.rows{_fitting(run)}")
    _divides("data.lanes", data.lanes, "dp", dp,
             f"each dp rank reads its own lanes, so set it to a multiple{_fitting(run)}")
    rows = data.batch_tokens // data.seq
    _divides("data.batch_tokens / data.seq", rows, "data.lanes", data.lanes,
             f"each lane gives as many rows a step, so set data.lanes to a divisor of {rows}")


def _fitting(run: Run) -> str:
    """The data-parallel sizes, and numbers of processes, that the batch of this run can be dealt to as it is."""
    p, data = run.parallel, run.data
    sizes = [dp for dp in range(1, data.lanes + 1)
             if data.lanes % dp == 0 and data.batch_tokens % (data.seq * data.rows * dp) == 0
             and dp % p.dp_replicate == 0 and dp * p.tp % p.ep == 0
             and data.batch_tokens // (data.seq * data.rows * dp) >= p.pp]
    ranks = "as it is, it runs on dp = " + ", ".join(map(str, sizes))
    processes = ", ".join(str(dp * p.tp * p.pp) for dp in sizes)
    return f"; {ranks} ({processes} {'process' if processes == '1' else 'processes'})" if sizes else ""


def _schedule(run: Run, world: int) -> None:
    o, steps = run.optimizer, run.train.steps
    if o.warmup_steps + o.decay_steps > steps:
        raise ConfigError(f"optimizer.warmup_steps + decay_steps = {o.warmup_steps} + {o.decay_steps} are more than "
                          f"train.steps = {steps}; lower them or train longer")
    if o.decay_steps and o.schedule != "wsd":
        raise ConfigError(f'optimizer.decay_steps = {o.decay_steps} is for schedule = "wsd", but the schedule is '
                          f'"{o.schedule}"; drop decay_steps or change the schedule')


def _graph(run: Run, world: int) -> None:
    """A recorded pass cannot ask the host for anything, and keeps its weights where they were."""
    p, train = run.parallel, run.train
    if not train.graph:
        return
    dp, moe = world // (p.tp * p.pp), _moe(run)
    way_out = "set train.graph = false"
    if derived(run, world).device != "cuda":
        raise ConfigError(f"train.graph = true records the work of a GPU, but this run is on the CPU; {way_out}")
    if p.pp > 1:
        raise ConfigError(f"train.graph = true records a pass from end to end, but parallel.pp = {p.pp}; {way_out} or "
                          "parallel.pp = 1")
    if p.ep > 1:
        raise ConfigError(f"parallel.ep = {p.ep} reads on the host how many rows go where, which train.graph = true "
                          f"cannot record; {way_out} or parallel.ep = 1")
    if p.offload or (p.shard and (dp > 1 or (moe and p.tp > 1))):
        raise ConfigError(f"train.graph = true with parallel.shard = true: FSDP moves weights while a pass runs, which "
                          f"cannot be recorded; {way_out} or parallel.shard = false")
    for path, channel in moe:
        if channel.engine != "grouped" or train.dtype != "bf16":
            raise ConfigError(f"{path}.engine = {channel.engine!r} with train.dtype = {train.dtype!r} counts on the "
                              f"host, which train.graph = true cannot record; use \"grouped\" and \"bf16\", "
                              f"or {way_out}")
