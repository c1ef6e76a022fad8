"""What cannot run is refused here, before any work starts: each rule is a sentence with the way out."""
from __future__ import annotations

import math
from typing import Any

import torch

from stepladder.data.fetch import elsewhere
from stepladder.launch.config import Run, derived
from stepladder.launch.toml import ConfigError, text
from stepladder.model.config import BlockConfig
from stepladder.parallel import support, zero


def check(run: Run, world_size: int) -> None:
    """Raise ConfigError, one sentence with the way out, for what cannot run on `world_size` processes like this one."""
    if run.train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('train.device = "cuda", but torch finds no GPU here; set it to "cpu" or "auto"')
    anywhere(run, world_size)
    if run.parallel.engine == "deepspeed" and (lacks := zero.missing(run.parallel)) is not None:
        raise ConfigError(lacks)


def anywhere(run: Run, world_size: int) -> None:
    """The same, but for what depends on this machine: jobs are made on another than they run on."""
    for rule in (_mesh, _heads, _tensor, _copies, _experts, _pregates, _sequence, _data, _batch, _pipeline, _schedule,
                 _engine, _shard_ctas, _graph):
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


def _mesh(run: Run, world: int) -> None:
    p = run.parallel
    _divides("the number of processes", world, "parallel.tp x parallel.pp", p.tp * p.pp,
             f"start a multiple of {p.tp * p.pp}, or lower parallel.tp or parallel.pp")
    dp = world // (p.tp * p.pp)
    way_out = lambda processes, key, number: f"start a multiple of {processes}, or set {key} to a divisor of {number}"
    _divides("dp", dp, "parallel.dp_replicate", p.dp_replicate,
             way_out(p.pp * p.tp * p.dp_replicate, "parallel.dp_replicate", dp))
    _divides("dp x tp", dp * p.tp, "parallel.ep", p.ep,
             way_out(p.pp * math.lcm(p.tp, p.ep), "parallel.ep", dp * p.tp))


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
        for name in ("heads", "inner"):
            _divides(f"{path}.token.{name}", getattr(block.token, name, 0), "parallel.tp", tp, lower)
        groups = getattr(block.token, "groups", 1)
        if groups > 1:                    # a single one is held by all
            _divides(f"{path}.token.groups", groups, "parallel.tp", tp, lower)
        kv = getattr(block.token, "kv_heads", 0)
        if kv and kv % tp and tp % kv:    # fewer than tp is fine: each is then held by tp / kv_heads ranks
            raise ConfigError(f"{path}.token.kv_heads = {kv}, parallel.tp = {tp}: neither divides the other; {lower}")
        if not _is_moe(block):            # experts are never split over tp
            _divides(f"{path}.channel.hidden", getattr(block.channel, "hidden", 0), "parallel.tp", tp, lower)


def _copies(run: Run, world: int) -> None:
    p, way_out = run.parallel, "set parallel.copies = false"
    if p.copies and p.tp == p.ep == 1:
        raise ConfigError(f"parallel.copies = true moves the sums of tensor and the tokens of expert parallelism, but "
                          f"parallel.tp = 1 and parallel.ep = 1; {way_out} or raise one of them")
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
    has = (f"data.batch_tokens = {data.batch_tokens} gives a rank {passes} micro-batch{'es' * (passes > 1)} of "
           f"{data.rows} rows")
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
    fetching, stall, patience = run.data.fetch_minutes, run.data.stall_seconds, run.train.collective_minutes
    if 1.5 * fetching + stall / 60 >= patience and any(elsewhere(source.shards) for source in sources.values()):
        raise ConfigError(f"data.fetch_minutes = {fetching:g}, half of it again, and data.stall_seconds = "
                          f"{stall:g} for shards that do not come, but a step may take train.collective_minutes = "
                          f"{patience:g}; lower the former or raise the latter")


def _batch(run: Run, world: int) -> None:
    data, dp = run.data, world // (run.parallel.tp * run.parallel.pp)
    _divides("data.lanes", data.lanes, "dp", dp,
             f"each dp rank reads its own lanes, so set it to {-(-data.lanes // dp) * dp} in a new run, as one that "
             f"resumes keeps its lanes{_fitting(run)}")
    unit = data.seq * data.rows * dp
    both = math.lcm(unit, data.seq * data.lanes)               # what lanes would refuse is no way out
    below = data.batch_tokens // both * both
    way_out = f"set it to {f'{below} or ' if below else ''}{below + both}"
    _divides("data.batch_tokens", data.batch_tokens,
             f"data.seq x data.rows x dp = {data.seq} x {data.rows} x {dp}", unit,
             f"{way_out}, or change data.rows{_fitting(run)}")
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
        raise ConfigError(f"parallel.ep = {p.ep} reads on the host how many tokens go where, which train.graph = true "
                          f"cannot record; {way_out} or parallel.ep = 1")
    if p.offload or (p.shard and (dp > 1 or (moe and p.tp > 1))):
        raise ConfigError(f"train.graph = true with parallel.shard = true: FSDP moves weights while a pass runs, which "
                          f"cannot be recorded; {way_out} or parallel.shard = false")
    for path, channel in moe:
        if channel.engine != "grouped" or train.dtype != "bf16":
            raise ConfigError(f"{path}.engine = {channel.engine!r} with train.dtype = {train.dtype!r} counts on the "
                              f"host, which train.graph = true cannot record; use \"grouped\" and \"bf16\", "
                              f"or {way_out}")


def _shard_ctas(run: Run, world: int) -> None:
    p, plan, way_out = run.parallel, derived(run, world), "set parallel.shard_ctas = 0"
    if not p.shard_ctas:
        return
    if plan.device == "cpu":
        raise ConfigError(f"parallel.shard_ctas = {p.shard_ctas} is about multiprocessors of a GPU, but this run is on "
                          f"the CPU; {way_out}")
    if plan.shards == 1 and not (_moe(run) and plan.dp * p.tp > p.ep):
        raise ConfigError(f"parallel.shard_ctas = {p.shard_ctas} is about weights that ranks share, but dp = {plan.dp} "
                          f"and dp_replicate = {p.dp_replicate} leave each rank its own; {way_out}")


def _engine(run: Run, world: int) -> None:
    p, train = run.parallel, run.train
    theirs = {"zero": p.zero, "nvme": p.nvme or None}                 # None: not asked for
    ours = {"reshard": None if p.reshard else False, "dp_replicate": p.dp_replicate if p.dp_replicate > 1 else None,
            "shard_ctas": p.shard_ctas or None}
    other, idle = ("deepspeed", theirs) if p.engine == "fsdp" else ("fsdp", ours)
    for key, value in idle.items():
        if value is not None:
            raise ConfigError(f'parallel.{key} = {text(value)} is for engine = "{other}", but the engine is '
                              f'"{p.engine}"; drop {key} or change the engine')
    if p.engine == "fsdp":
        for key, value in ours.items():
            if value is not None and not p.shard:
                raise ConfigError(f"parallel.{key} = {text(value)} is about what FSDP shards, but parallel.shard = "
                                  f"false; drop {key} or shard")
        return
    if not p.shard:
        raise ConfigError('parallel.shard = false, but parallel.engine = "deepspeed" is there to shard; set '
                          'parallel.engine = "fsdp", which keeps weights whole, or drop shard')
    if train.dtype == "fp64":
        raise ConfigError('train.dtype = "fp64", but parallel.engine = "deepspeed" knows no double precision; '
                          'set one to "fp32" or the other to "fsdp"')
    if p.nvme and not (p.offload and p.zero_stage == 3):
        raise ConfigError(f'parallel.nvme = "{p.nvme}" is where ZeRO-3 offloads to, but parallel.zero = {p.zero_stage} '
                          f"and parallel.offload = {str(p.offload).lower()}; set 3 and true, or drop nvme")
    if train.graph:
        raise ConfigError('train.graph = true with parallel.engine = "deepspeed": its hooks run on the host, which '
                          "cannot be recorded; set train.graph = false")
