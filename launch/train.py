"""stepladder train: batches in, checkpoints and a log out. The step itself is `train_step`."""
from __future__ import annotations

import argparse
import contextlib
import math
import os
import time
import tomllib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stepladder.data import loader as data
from stepladder.data.fetch import Limits
from stepladder.data.manifest import Manifest
from stepladder.launch import agree, config, hardware, rules, timeline, world
from stepladder.launch.events import Events
from stepladder.launch.late import Clock, Late
from stepladder.launch.log import Log, put, say
from stepladder.launch.stop import Stop
from stepladder.launch.toml import differing, flat
from stepladder.model.context import borders
from stepladder.model.decoder import flops, parameters
from stepladder.parallel import checkpoint, spans
from stepladder.parallel.build import Parts, build
from stepladder.parallel.checkpoint import CheckpointError, Store
from stepladder.parallel.checkpoint_folder import step_of, way_back
from stepladder.parallel.lock import Lock
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.optimizer import Optimizer, Report
from stepladder.parallel.pipeline import Micro
from stepladder.parallel.watch import watch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class TrainingError(RuntimeError):
    """The run cannot go on; what was saved is intact."""


def train_step(parts: Parts, optimizer: Optimizer, batches: list[data.Batch], lr: float) -> Report:
    """One optimizer step over this rank's micro-batches. Nothing here waits for the device."""
    result = parts.pipe([micro(b, parts.mesh.device) for b in batches])
    parts.sums()
    return optimizer.step(result, lr)


def micro(b: data.Batch, device: torch.device) -> Micro:
    on_gpu = device.type == "cuda"
    return Micro(b.tokens, b.targets, b.start, borders(b.start) if on_gpu else None).to(device)


def lr_at(step: int, o: config.Optimizer, steps: int) -> float:
    """Learning rate of step 1, 2, ...: linear warm-up, then cosine to the end, or flat with a linear end (wsd)."""
    low = o.lr * o.min_lr_ratio
    if step <= o.warmup_steps:
        return o.lr * step / o.warmup_steps
    if o.schedule == "wsd":
        left = steps - step
        return o.lr if left >= o.decay_steps else low + (o.lr - low) * left / o.decay_steps
    done = (step - o.warmup_steps) / max(1, steps - o.warmup_steps)
    return low + (o.lr - low) * (1 + math.cos(math.pi * done)) / 2


class Trainer:
    """A run on this rank: everything that lives from the first step to the last."""

    def __init__(self, run: config.Run, folder: Path, w: world.World, mesh: Mesh, meeting: dist.Store | None,
                 resume: str, events: Events, stop: Stop):
        self.run, self.folder, self.world, self.mesh, self.meeting = run, folder, w, mesh, meeting
        self.events, self.stop, self.stopped = events, stop, ""
        self.plan, self.device = config.derived(run, w.size), mesh.device
        _numerics(self.plan, run.train.dtype)
        self.store = Store(folder, keep_last=run.checkpoint.keep_last, keep_every=run.checkpoint.keep_every,
                           background=run.checkpoint.background, on_failure=self._unsaved, note=self._tell)
        self.log: Log | None = None
        self.changed: dict[str, list[str]] = {}         # settings, since the checkpoint: what each was and is
        start = self._choose(resume)
        meta = checkpoint.meta(start) if start is not None else {}
        if meta:
            saved, ours = tomllib.loads(meta["config"]), tomllib.loads(config.dump(run))
            checkpoint.refuse_mismatch({"model": saved["model"]}, {"model": ours["model"]})
            self.changed = dict(differing([flat(saved), flat(ours)]))
        self.manifests: dict[str, Manifest] = {}
        if run.train.eval_every:
            self._loader(None, "heldout").close()       # too few documents for it: said now, not at step eval_every
        self.loader = self._loader(meta.get("cursor"))
        with contextlib.ExitStack() as undo:            # readers that are left running would abort the interpreter
            undo.callback(self.loader.close)
            self._make(run, start, meta)
            undo.pop_all()

    def _make(self, run: config.Run, start: Path | None, meta: dict[str, Any]) -> None:
        """The model, from its checkpoint if there is one, and the log."""
        if meta:
            checkpoint.refuse_mismatch({"data": meta["manifest"]}, {"data": self.loader.manifest_hash})
        self.tokenizer = self.loader.tokenizer               # may be missing: before the log is cut to this step
        seed = run.train.seed if start is None else None
        self.parts = build(run.model, self.mesh, seed=seed, dtype=DTYPES[run.train.dtype],
                           recompute=run.train.recompute, compiled=run.train.compile, captured=run.train.graph,
                           seq=run.data.seq)
        o = run.optimizer
        self.optimizer = Optimizer(self.parts, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay,
                                   clip=run.train.clip)
        self.optimizer.memory = hardware.memory(self.device)
        self.at, self.tokens = meta.get("step", 0), meta.get("tokens", 0)
        if start is not None:
            self.store.load(start, self.optimizer.state())
            self.optimizer.loaded()
        self.stop.meet(self.meeting, self.world.rank, self.world.size, self.at + 1)
        self.skipped = int(self.optimizer.skipped)           # steps, as far as events.jsonl knows
        self.streak = int(self.optimizer.streak)             # of them in a row, when it was last asked
        self.log = Log(self.folder, main=self.world.main, total_steps=run.train.steps, step=self.at,
                       every=run.train.log_every)
        self.flops = 3 * flops(run.model, run.data.seq)
        self.peak = hardware.peak(self.device) * self.world.size
        self.clock = Clock()
        self.header: dict[str, Any] = {"mesh": repr(self.mesh)}      # of the first record
        self._introduce(start)

    def _choose(self, resume: str) -> Path | None:
        newest = self.store.newest() if resume != "never" else None
        if newest is None and resume == "must":
            raise CheckpointError(f"{self.folder} has no checkpoint to resume from; drop --resume must to start afresh")
        if resume == "never" and self.store.newest() is not None:
            raise CheckpointError(f"{self.folder} holds checkpoints already; give another folder with --folder, "
                                  "or resume with --resume auto")
        if newest is not None and (done := step_of(newest)) > self.run.train.steps:
            raise config.ConfigError(f"train.steps = {self.run.train.steps}, but {newest} has made {done} steps; raise "
                                     "train.steps, or give another folder with --folder")
        return newest

    def _loader(self, cursor: dict[str, Any] | None, split: str = "train") -> data.Loader:
        d, m = self.run.data, self.mesh
        made = data.Loader([data.Source(name, s.shards, s.weight) for name, s in d.sources.items()], seq=d.seq,
                           rows=d.rows, lanes=d.lanes, seed=self.run.train.seed, dp_rank=m.dp_rank, dp_size=m.dp,
                           split=split, heldout=d.heldout, cursor=cursor, workers=d.workers if split == "train" else 0,
                           prefetch=d.prefetch, pin=self.device.type == "cuda", on_error=d.on_error,
                           limits=Limits(d.retries, d.stall_seconds, 60 * d.fetch_minutes, cache=d.cache,
                                         cache_gib=d.cache_gib), vocab=self.run.model.vocab, manifests=self.manifests)
        self.manifests = made.manifests                      # a server that is away is no reason not to evaluate
        return made

    def _tell(self, text: str) -> None:
        if self.log is not None:
            self.log.note(text)
        elif self.world.main:
            say(text)

    def _unsaved(self, why: str) -> None:
        self._tell(why)
        self.events.add("unsaved", error=why)

    def _introduce(self, start: Path | None) -> None:
        total, active = parameters(self.run.model)
        known = {"passed_over": self.store.passed, "changed": self.changed}
        self._tell(f"{self.mesh!r}, told by {self.world.launcher}")
        if warning := world.slow_link(self.run, self.world, self.flops, self.peak / self.world.size):
            self._tell(warning)
        left = self.run.train.steps - self.at                # steps before a resume may have had other batches
        self._tell(f"{self.plan._replace(tokens=self.tokens + left * self.run.data.batch_tokens)}")
        if self.mesh.pp > 1:
            self._tell(spans.spell(self.run.model, self.run.parallel, self.run.data.seq))
        self._tell(f"{total / 1e6:.2f} M parameters, {active / 1e6:.2f} M of them for each token, "
                   f"{self.flops / 1e6:.1f} MFLOP a token, tokenizer {self.tokenizer.name}")
        self._tell(f"from step {self.at} in {start}" if start else f"from the beginning, in {self.folder}")
        if self.changed:
            self._tell(f"changed since step {self.at}: "
                       f"{', '.join(f'{key} {was} -> {now}' for key, (was, now) in self.changed.items())}")
        self.events.begins("resume" if start else "start", step=self.at, ranks=self.world.size,
                           launcher=self.world.launcher, attempt=self.world.attempt, mesh=repr(self.mesh),
                           device=hardware.name(self.device), torch=torch.__version__, code=agree.code(),
                           data=self.loader.manifest_hash, environment=world.settings(),
                           **{name: what for name, what in known.items() if what})
        if self.at >= self.run.train.steps:
            self._tell(f"the run is finished: train.steps = {self.run.train.steps}; raise it to go on")

    def steps(self, now: int | None, *marks: Callable[[], None]) -> None:
        """Train to the end, or `now` more steps; `marks` are called after each."""
        end = self.run.train.steps if now is None else min(self.run.train.steps, self.at + now)
        c, t = self.run.checkpoint, self.run.train
        waiting: Late | None = None
        self.clock.start(self.loader.waited)
        compared, saved = 0, False
        while self.at < end and self.stop.may_begin(self.at + 1):
            batches = [next(self.loader) for _ in range(self.plan.accumulation)]
            self.at += 1
            watch.step(self.at)
            if self.meeting is not None and compared < t.same_batch_steps:
                agree.on_the_batch(self.meeting, self.mesh, self.at, batches, t.collective_minutes)
                compared += 1
            self.cursor = batches[-1].cursor
            self.tokens += self.run.data.batch_tokens
            lr = lr_at(self.at, self.run.optimizer, t.steps)
            report = train_step(self.parts, self.optimizer, batches, lr)
            for mark in marks:
                mark()
            late = Late(self.at, self.tokens, lr, report, self.loader.waited)
            # A step is read when the next has been queued, so that the device never waits for the log.
            if waiting is not None:
                self._record(waiting)
            waiting, last = late, self.at == end
            held_out = t.eval_every > 0 and (last or self.at % t.eval_every == 0)
            save = last or (c.every > 0 and self.at % c.every == 0)
            saved = False
            if held_out or save:
                saved = self._settle(late, save, held_out, last)
                waiting = None
        if self.at < end:
            self.stopped = self.stop.asked
            self.events.add("signal", signal=self.stopped, step=self.at)
            if not saved:
                self._settle(waiting, save=True, last=True)
        with watch.rest():
            self.store.finish()

    def _settle(self, late: Late | None, save: bool, evaluate: bool = False, last: bool = False) -> bool:
        """Between two steps. late: what is not logged yet of the one before. Whether there is a checkpoint of it.

        While steps are skipped none is made but the last: it would be of the same weights, and push better ones out.
        """
        if late is not None:
            self.streak = int(late.read()[0].streak)         # before the watch rests: no step is under way now
        if save and self.streak and not last:
            self._tell(f"step {self.at} is not saved: {self.streak} in a row have changed nothing")
            save = False
        with watch.rest():
            if save:                                         # first: an evaluation that fails must not cost it
                self.save()
            if late is not None:
                self._record(late, evaluate)
        self.clock.start(self.loader.waited)                 # the next step's time is its own
        return save

    def save(self) -> None:
        self.store.finish()              # the save before speaks over the same group, in a thread
        cursors = self.store.ranks.gather(self.cursor)
        mesh, whole = self.mesh, {}
        if cursors:
            whole = data.merge([cursors[d * mesh.tp] for d in range(mesh.dp)])
        meta = {"config": config.dump(self.run), "manifest": self.loader.manifest_hash, "step": self.at,
                "tokens": self.tokens, "cursor": whole,
                "tokenizer": {"name": self.tokenizer.name, "hash": self.tokenizer.hash}}
        state, shapes = self.optimizer.state(), self.optimizer.shapes()
        self.optimizer.copying = self.store.save(self.at, state, meta, shapes=shapes, prune=not self.streak)

    def evaluate(self) -> float:
        """Mean negative log-likelihood of the first held-out rows, the same ones every time."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with contextlib.closing(self._loader(None, "heldout")) as rows:
            for _ in range(self.run.train.eval_batches):     # not all at once: a pass keeps what its stages send
                micros = [micro(next(rows), self.device) for _ in range(self.plan.accumulation)]
                result = self.parts.pipe(micros, train=False)
                sums += torch.stack([result.nll.double(), result.count.double()]) / self.mesh.tp
        if not self.mesh.alone:
            dist.all_reduce(sums)
        nll, count = sums.tolist()
        return nll / max(1.0, count)

    def _record(self, late: Late, evaluate: bool = False) -> None:
        """Log a step."""
        assert self.log is not None
        r, arrived = late.read()
        took, waited = self.clock.lap(arrived, late.waited)
        speed = self.run.data.batch_tokens / took
        self.optimizer.memory = memory = hardware.memory(self.device)        # the others hear of it in the next step
        record = {"step": late.step, "loss": float(r.nll), "tokens": late.tokens, "lr": late.lr,
                  "grad_norm": float(r.norm), "tokens_per_s": speed,
                  "mfu": speed * self.flops / self.peak if self.peak else None,
                  "memory_gib": max(memory, float(r.memory.max())), "data_wait": waited / took,
                  "load": self.optimizer.crowds(r.load),
                  "entropy": r.entropy.tolist(), "balance": r.balance.tolist(), "skipped": int(r.skipped)}
        if evaluate:
            record["eval_loss"] = self.evaluate()
        record |= self.header
        self.header = {}
        if lost := self._left_out(late.step):
            record["skipped_shards"] = lost
        self.log.step(record)
        if int(r.skipped) > self.skipped:
            self.skipped = int(r.skipped)
            self.events.add("skip", step=late.step, skipped=self.skipped)
        if (streak := int(r.streak)) >= self.run.train.max_skipped:
            first = late.step - streak + 1
            self.store.finish()
            back = way_back(self.store.folder, first)
            raise TrainingError(f"{streak} steps in a row, {first} to {late.step}, had a gradient that is not finite "
                                f"and changed nothing; {back}, or raise train.max_skipped if it is the data")

    def _left_out(self, step: int) -> int:
        """Shards of which blocks were left out, told by whichever rank reads them. One that two read counts twice."""
        if self.mesh.tp_rank == self.mesh.pp_rank == 0:
            for why in self.loader.news():
                (self._tell if self.world.main else put)(f"skipped {why}")
                self.events.left_out(step, why)
                if self.meeting is not None:
                    self.meeting.add("skipped", 1)
        if self.meeting is None or self.run.data.on_error == "stop":
            return self.loader.skipped
        return self.meeting.add("skipped", 0) if self.world.main else 0


def _numerics(plan: config.Derived, dtype: str) -> None:
    if plan.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore  # a pass over every buffer
    if dtype == "bf16":
        torch.set_float32_matmul_precision("high")                      # what stays fp32 there is small, or a state


def run(args: argparse.Namespace) -> int:
    """The program: `stepladder train`."""
    w = world.find()
    chosen = config.load(args.config, args.overrides)
    rules.check(chosen, w.size)
    if args.timeline and chosen.parallel.pp == 1:
        raise config.ConfigError("--timeline draws a pipeline, but parallel.pp = 1; set parallel.pp or drop the flag")
    if args.timeline and args.steps_now is not None and args.steps_now <= timeline.AFTER:
        raise config.ConfigError(f"--timeline draws step {timeline.AFTER + 1} of this program, but --steps-now is "
                                 f"{args.steps_now}; raise it or drop the flag")
    world.refuse_far_copies(chosen, w)
    folder = Path(args.run or Path("runs") / Path(args.config).stem)
    device, minutes = w.device(config.derived(chosen, w.size).device), chosen.train.collective_minutes
    events = Events(folder, w.rank)
    with (Lock(folder) if w.main else contextlib.nullcontext(), events.faults(),
          contextlib.closing(Stop(events.fault, say if w.main else lambda text: None, w.size == 1)) as stop):
        if w.launcher in world.PARENTS:
            stop.follow(args.parent, f"{w.launcher}, which started rank {w.rank}, is gone; start the run again")
        events.begin()
        patient = max(minutes, agree.START)
        store = w.meet(patient)
        if store is not None:
            flags = {"--folder": str(folder), "--resume": args.resume, "--steps-now": args.steps_now,
                     "--timeline": args.timeline, "the kind of device": device.type}
            agree.on_the_run(store, w.rank, w.size, config.dump(chosen), flags, patient)
        stop.came.set()
        events.started()
        patience = timedelta(minutes=minutes + 2)            # torch's own limit: the watchdog speaks first, in words
        w.connect(device, store, patience)
        w.export(device)
        mesh = Mesh(chosen.parallel, device, w.rank, w.size, patience, w.local_size)
        with contextlib.nullcontext() if store is None else watch.over(mesh, store, 60 * minutes, events.fault):
            with watch.rest():                               # no step is under way: a slow disk or build is no hang
                trainer = Trainer(chosen, folder, w, mesh, store, args.resume, events, stop)
            kept = _train(args, trainer)
    if dist.is_initialized() and w.launcher != "given":
        dist.destroy_process_group()
    return 0 if kept else 1


def _train(args: argparse.Namespace, trainer: Trainer) -> bool:
    """Whether the last step is saved."""
    began, folder, main = time.perf_counter(), trainer.folder, trainer.world.main
    try:
        # What a run that is finished was asked besides, no step was made with.
        if main and (trainer.at < trainer.run.train.steps or not (folder / "config.toml").exists()):
            (folder / "config.tmp").write_text(config.dump(trainer.run))
            os.replace(folder / "config.tmp", folder / "config.toml")
            trainer.tokenizer.save(folder)             # the run can be sampled without its shards
        with (timeline.profiled(args.profile, folder, trainer.world.rank) as mark,
              timeline.drawn(args.timeline, trainer.parts, folder / "timeline.png", trainer._tell) as draw):
            trainer.steps(args.steps_now, mark, draw)
    finally:
        trainer.store.finish()                                # a save under way is not lost with the run
        trainer.stop.close()
        trainer.loader.close()
        trainer.parts.pipe.close()
        assert trainer.log is not None
        trainer.log.close()
    kept = trainer.store.saved == trainer.at
    trainer.events.end(trainer.at, kept, trainer.stopped if trainer.at < trainer.run.train.steps else "")
    if main:
        left = "" if kept else ": the last step is not saved; make room if a disk is full, then run the same again"
        say(f"step {trainer.at} of {trainer.run.train.steps}, {trainer.tokens:,} tokens, "
            f"{time.perf_counter() - began:.0f} s; {folder}{left}")
    return kept
