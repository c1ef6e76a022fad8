"""stepladder check: whether machines are fit for a run: this one, or under srun all of a job, as in slurm/train.sbatch.

The first process of each machine looks at its GPUs, its disks and what else it is told to. Then all sum a number:
inside each machine, so that a broken one shows, and over all. Who is silent for longer than the limit is at fault, too.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import xml.etree.ElementTree as xml
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from stepladder.launch import agree, world

GIB = 10.0                                 # free in each folder, if nobody says how many
FREE = 0.95                                # of a GPU's memory
MARGIN = timedelta(seconds=30)             # for rank 0 to say whom it missed
GOODBYE = timedelta(seconds=5)             # for the others to hear that it is over
EVERYBODY = "all"                          # in place of a machine: it could not be told which


def run(args: argparse.Namespace) -> int:
    """The program: `stepladder check`. 1 if a machine is unfit: named on the console and in the file of --bad."""
    w, limit = world.find(), timedelta(minutes=args.minutes)
    nodes = args.nodes or [socket.gethostname()]
    if w.size % len(nodes):
        raise ValueError(f"the number of processes = {w.size} is not divisible by that of --nodes = {len(nodes)}; give "
                         "the names of all machines, and start as many processes on each")
    if args.gib is not None and not args.disk:
        raise ValueError(f"--gib {args.gib:g} is about the folders of --disk, and none is given; add --disk DIR")
    if args.bad and not Path(args.bad).parent.is_dir():
        raise ValueError(f"--bad {args.bad}: there is no folder {Path(args.bad).parent}; make it, or give another file")
    each = w.size // len(nodes)
    told = "; ".join(faults(args, limit)) if w.rank % each == 0 else ""
    store = w.meet()
    if store is None:
        return report({nodes[0]: told} if told else {}, nodes, args.bad)
    bad: dict[str, str] = {}

    def hear(words: dict[int, str]) -> None:
        bad.update(judge(words, "said", nodes, w.size, limit))

    # Rank 0 may be looking at its machine, which has two limits.
    store = agree.on_the_start(store, w.rank, w.size, args.minutes if w.main else 3 * args.minutes, told, hear)
    if not bad:
        own = store.clone()  # pyright: ignore[reportAttributeAccessIssue]  # this thread waits in the other one
        threading.Thread(target=add_up, args=(w, own, each, args.gpus, limit), daemon=True).start()
        for what in ("inside", "over all"):
            if w.main and not bad:
                words = agree.words(dist.PrefixStore(what, store), w.size, args.minutes)
                bad = judge(words, what, nodes, w.size, limit)
    code = report(bad, nodes, args.bad) if w.main else 0
    with contextlib.suppress(RuntimeError):
        if w.main:
            store.set("over", "")
            store.wait([f"heard/{rank}" for rank in range(1, w.size)], GOODBYE)
        else:
            store.wait(["over"], 3 * limit + MARGIN)
            store.set(f"heard/{w.rank}", "")
    sys.stdout.flush()
    os._exit(code)                          # a collective may hang


def faults(args: argparse.Namespace, limit: timedelta) -> Iterator[str]:
    """What is wrong with this machine."""
    if args.gpus:
        found = torch.cuda.device_count()
        if found != args.gpus:
            yield f"torch finds {found} GPUs instead of {args.gpus}"
        yield from gpus(limit)
    for folder in map(Path, args.disk):
        yield from disk(folder, GIB if args.gib is None else args.gib)
    if args.also:
        yield from _said(["bash", "-c", args.also], args.also, limit)[1]


def gpus(limit: timedelta) -> Iterator[str]:
    """What nvidia-smi, where there is one, says of the GPUs."""
    if shutil.which("nvidia-smi") is None:
        return
    text, wrong = _said(["nvidia-smi", "-q", "-x"], "nvidia-smi", limit)
    yield from wrong
    with contextlib.suppress(xml.ParseError):
        for gpu in xml.fromstring(text).findall("gpu"):
            yield from (f"GPU {gpu.get('id')} {fault}" for fault in _ails(gpu))


def _ails(gpu: xml.Element) -> Iterator[str]:
    says = lambda path: (gpu.findtext(path) or "").strip()
    total, free = (float(says(f"fb_memory_usage/{what}").partition(" ")[0] or 0) for what in ("total", "free"))
    if free < FREE * total:
        yield f"has {free / 1024:.1f} of {total / 1024:.1f} GiB free, others use it"
    errors = sum(int(e.text or 0) for e in gpu.findall("ecc_errors/volatile/*")
                 if "uncorrectable" in e.tag and (e.text or "").strip().isdecimal())
    if errors:
        yield f"has {errors} uncorrectable memory errors"
    for path in ("remapped_rows/remapped_row_pending", "remapped_rows/remapped_row_failure",
                 "retired_pages/pending_retirement"):
        if says(path) == "Yes":
            yield f"has {path.rpartition('/')[2].replace('_', ' ')}"
    if says("gpu_recovery_action") not in ("", "None", "N/A"):     # what an Xid error asks for
        yield f"wants {says('gpu_recovery_action')}"


def disk(folder: Path, gib: float) -> Iterator[str]:
    """Room, and that something can be written. A folder that is not there is not made: its disk may not be mounted."""
    try:
        if not folder.is_dir():
            yield f"--disk {folder} is {'a file; name' if folder.exists() else 'not there; make it, or name'} a folder"
            return
        free = shutil.disk_usage(folder).free / 2**30
        if free < gib:
            yield f"{folder} has {free:.3g} GiB free, {gib:g} are wanted"
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        yield f"{folder} cannot be written to ({error.strerror}); mend it, or name another folder"


def _said(command: Sequence[str], name: str, limit: timedelta) -> tuple[str, list[str]]:
    """What a command prints, and what is wrong if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit.total_seconds())
    except subprocess.TimeoutExpired:
        return "", [f"{name} was not over in {limit.total_seconds():g} s; what takes longer wants more --minutes"]
    except OSError as error:
        return "", [f"{name} does not start ({error.strerror}); install what is missing"]
    last = [f": {line}" for line in (*done.stdout.splitlines(), *done.stderr.splitlines())][-1:]
    return done.stdout, [f"{name} ended with {done.returncode}{''.join(last)}"] * (done.returncode != 0)


def judge(words: dict[int, str], what: str, nodes: Sequence[str], size: int, limit: timedelta) -> dict[str, str]:
    """The machines of which something bad is said, or not all of whose processes say anything."""
    each, found = size // len(nodes), {}
    for rank in range(size):
        said = words.get(rank, f"silent for {limit.total_seconds():.0f} s")
        if said:
            found.setdefault(nodes[rank // each], said if what == "said" else f"sum {what}: {said}")
    if len(found) == len(nodes) > 1:
        return {EVERYBODY: " and ".join(dict.fromkeys(found.values()))}
    if what == "said" and len(nodes) > 2 and nodes[0] not in found and len(found) == len(nodes) - 1:
        return {nodes[0]: "hears nobody"}
    return found


def add_up(w: world.World, store: dist.Store, each: int, gpus: int, limit: timedelta) -> None:
    """A one of every process, summed inside each machine and over all."""
    what = "inside"
    try:
        device = w.device("cuda" if gpus else "cpu")
        w.connect(device, store, 2 * limit)
        inside = dist.new_subgroups(each)[0] if each > 1 else None
        for what, group, want in (("inside", inside, each), ("over all", dist.group.WORLD, w.size)):
            one = torch.ones(1, device=device)
            if want > 1:
                dist.all_reduce(one, group=group)
            store.set(f"{what}/{w.rank}", "" if int(one) == want else f"{int(one)} instead of {want}")
    except (RuntimeError, ValueError) as error:
        store.set(f"{what}/{w.rank}", str(error).partition("\n")[0])


def report(bad: dict[str, str], nodes: Sequence[str], file: str | None) -> int:
    """The machines to leave out are written to `file`: none if all are fit, or none can be told from the others."""
    for node, why in bad.items():
        print(f"{node}: {why}")
    if not bad:
        print(f"{len(nodes)} machine{'s' * (len(nodes) > 1)} fit: {' '.join(nodes)}")
    if file is not None:
        Path(file).write_text("".join(f"{node} {why}\n" for node, why in bad.items() if node != EVERYBODY))
    return int(bool(bad))
