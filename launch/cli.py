"""The console script: every command and its flags. Programs are imported when they run, so that help costs no torch."""
from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

from stepladder.launch.events import refusals
from stepladder.launch.toml import nearest

ABOUT = """\
Pretrain decoders that mix attention, recurrence and experts, over many GPUs; resume exactly; sample.

start here
  demo        the whole walk in a few minutes on a CPU: prepare, train, kill, resume, sample
  support     which combinations of models and layouts work
  keys        what a run's TOML may say: every key, and every mixer with its knobs

data
  prepare     text to tokenised shards
  inspect     count, show and verify shards

training
  train       train or resume a run from its TOML file
  slurm       print or submit the job of a run
  check       look whether machines are fit for a run
  status      say where a run stands
  plot        draw the curves of runs
  compare     what runs differ in, and their curves over each other

models
  generate    continue prompts with a trained model
  export      write a checkpoint's weights as safetensors
"""
EXAMPLES = {
    "stepladder": """\
  stepladder prepare books/ --train-tokenizer 8192 --out data/books
  stepladder train run.toml --folder runs/first
  stepladder generate runs/first --prompt "It was"
  stepladder COMMAND --help""",
    "keys": """\
  stepladder keys
  stepladder keys train
  stepladder keys gated_delta""",
    "train": """\
  stepladder train run.toml
  stepladder train run.toml train.steps=100 optimizer.lr=1e-3 --folder runs/short
  torchrun --nproc-per-node 8 -m stepladder.launch.cli train run.toml parallel.tp=2
  srun --nodes 2 --ntasks-per-node 8 stepladder train run.toml
  mpiexec -n 8 stepladder train run.toml
  deepspeed --module stepladder.launch.cli train run.toml""",
    "prepare": """\
  stepladder prepare books/ --train-tokenizer 8192 --out data/books
  stepladder prepare more.jsonl.zst --tokenizer data/books --out data/more""",
    "inspect": """\
  stepladder inspect data/books --documents 3
  stepladder inspect data/books --verify""",
    "generate": """\
  stepladder generate runs/first --prompt "It was" --prompt "Call me" --temperature 0.8 --top-p 0.95
  stepladder generate runs/first --prompt-file prompts.txt --tokens 500 --seed 7""",
    "slurm": """\
  stepladder slurm run.toml --nodes 4 --time 12:00:00
  stepladder slurm run.toml parallel.tp=8 --nodes 2-4 --time 12:00:00 --folder runs/first --submit""",
    "check": """\
  stepladder check --gpus 8 --disk runs --disk /local/disk --gib 500
  srun --nodes 2 --ntasks-per-node 8 stepladder check --gpus 8 --nodes n1 n2""",
    "status": "  stepladder status runs/first",
    "export": "  stepladder export runs/first first.safetensors",
    "plot": "  stepladder plot runs/first runs/second --out curves.png",
    "compare": "  stepladder compare runs/first runs/second --out compared.png",
}


RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")    # of torchrun, two kinds of mpiexec, and srun
REFUSED = "STEPLADDER_REFUSED"           # by this file a job's script learns that a start would be refused again
NODES = 65_536                           # more than any cluster has


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 after one sentence on stderr about what the user can mend, or 130 when interrupted.

    A group that lost a rank is 70: nothing to mend, and the same command may be tried again.
    """
    os.umask(os.umask(0o022) | 0o002)      # nothing that a command writes is the whole world's to change
    try:
        with refusals(os.environ.get(REFUSED)):
            args = parse(argv)
        return args.program(args) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:    # `stepladder inspect ... | head`: nobody reads on, and Python must not flush into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        ours = type(error).__module__.startswith("stepladder.")
        debug = "--debug" in (sys.argv[1:] if argv is None else argv)
        if debug or not (ours or isinstance(error, ValueError | OSError | ImportError)):
            traceback.print_exc()
            return 2 if debug else 1
        # Every rank says its own; launch/world.py, which knows better, would bring torch.
        rank = next((os.environ[name] for name in RANK if name in os.environ), "0")
        print(f"stepladder{'' if rank == '0' else f' (rank {rank})'}: {_sentence(error)}", file=sys.stderr)
        return getattr(error, "exit", 2)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; `args.program(args)` runs the command."""
    parser = _parser("stepladder", ABOUT)
    parser.usage = "stepladder COMMAND [options]"
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    for name, (summary, flags, program) in COMMANDS.items():
        command = _parser(f"stepladder {name}", summary, commands.add_parser, name)
        flags(command)
        command.set_defaults(program=program)
    # DeepSpeed's launcher puts a flag of its own in front of every program's; launch/world.py reads its variables.
    given = [text for text in (sys.argv[1:] if argv is None else argv) if not text.startswith("--local_rank=")]
    asked = next((text for text in given if not text.startswith("-")), None)
    if asked is not None and asked not in COMMANDS:
        parser.error(f"there is no command {asked}{nearest(asked, COMMANDS)}; there are {', '.join(COMMANDS)}")
    args, rest = parser.parse_known_args(given)
    if args.command in ("train", "slurm"):    # argparse takes no overrides after a flag: run.toml --folder DIR x.y=9
        args.overrides += [text for text in rest if "=" in text and not text.startswith("-")]
        rest = [text for text in rest if text not in args.overrides]
    if rest:
        commands.choices[args.command].error(f"unknown arguments {' '.join(rest)}")
    return args


def _parser(prog: str, about: str, make: Callable[..., Any] = argparse.ArgumentParser, *name: str) -> Any:
    examples = EXAMPLES.get(prog.split()[-1])
    parser = make(*name, prog=prog, description=about, allow_abbrev=False, epilog=examples and f"examples\n{examples}",
                  formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")
    return parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"stepladder {version('stepladder')}")
        parser.exit()


Flags = Callable[[argparse.ArgumentParser], None]
Program = Callable[[argparse.Namespace], int | None]


def _program(name: str) -> Program:
    return lambda args: import_module(f"stepladder.launch.{name}").run(args)


def _train_program(args: argparse.Namespace) -> int | None:
    """Signals that come while torch is imported wait for launch/stop.py. Who started this may be gone by then, too."""
    args.parent = os.getppid()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    try:
        with refusals(os.environ.get(REFUSED)):
            return _program("train")(args)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _support(args: argparse.Namespace) -> None:
    print(import_module("stepladder.parallel.support").markdown())


def _keys(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", metavar="NAME", nargs="?",
                   help="only a section, like train or model.blocks, or a mixer, like gla (default: all)")


def _run_file(p: argparse.ArgumentParser) -> None:
    p.add_argument("config", metavar="RUN.toml", help="the run; see examples/")
    p.add_argument("overrides", metavar="section.key=value", nargs="*", help="replace values of the file")
    p.add_argument("--folder", dest="run", metavar="DIR",
                   help="folder for checkpoints, metrics and logs (default: runs/NAME OF FILE)")


def _slurm(p: argparse.ArgumentParser) -> None:
    _run_file(p)
    p.add_argument("--nodes", metavar="N[-M]", type=_range, default=(1, 1),
                   help="or as many as there are from N to M, with the same batch (default: 1)")
    p.add_argument("--time", metavar="LIMIT", default="24:00:00", help="of one job; restarts go on (default: 24:00:00)")
    p.add_argument("--per-node", metavar="N", type=_count, default=8, help="processes a node (default: 8)")
    p.add_argument("--gpus", metavar="N", type=_natural,
                   help="a node; 0: do not ask Slurm for any (default: one a process, on CPUs 0)")
    p.add_argument("--start", choices=("torchrun", "srun"), default="torchrun",
                   help="one torchrun a node, or one Slurm task a process (default: torchrun)")
    p.add_argument("--restarts", metavar="N", type=_count, default=20, help="at most so many (default: 20)")
    p.add_argument("--partition", metavar="NAME", help="(default: the cluster's)")
    p.add_argument("--account", metavar="NAME", help="(default: yours)")
    p.add_argument("--submit", action="store_true", help="hand it to sbatch; logs go to DIR/slurm")


def _status(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", metavar="RUN", help="run folder")


def _check(p: argparse.ArgumentParser) -> None:
    p.add_argument("--gpus", metavar="N", type=_natural, default=0,
                   help="this machine is to have (default: 0, on CPUs)")
    p.add_argument("--disk", metavar="DIR", action="append", default=[],
                   help="that is there, and can be written to; may be given again")
    p.add_argument("--gib", metavar="X", type=_from0, help="free in each DIR (default: 10)")
    p.add_argument("--also", metavar="CMD", help="of your site, to end with 0: 'dcgmi diag -r 1'")
    p.add_argument("--nodes", metavar="NAME", nargs="+", help="the machines, in the order of their processes")
    p.add_argument("--minutes", metavar="N", type=_above0, default=3.0, help="who says nothing for so long is unfit")
    p.add_argument("--bad", metavar="FILE", help="write the unfit machines there, one a line")


def _train(p: argparse.ArgumentParser) -> None:
    _run_file(p)
    p.add_argument("--resume", choices=("auto", "never", "must"), default="auto",
                   help="auto: from the newest checkpoint, if any; must: never start afresh (default: auto)")
    p.add_argument("--steps-now", metavar="N", type=_count, help="stop after N more steps, with a checkpoint")
    p.add_argument("--profile", action="store_true", help="write a trace of steps 3 to 5 to the run folder")
    p.add_argument("--timeline", action="store_true",
                   help="draw the pipeline of the third step, with its bubble, to the run folder")


def _prepare(p: argparse.ArgumentParser) -> None:
    p.add_argument("inputs", metavar="INPUT", nargs="+",
                   help="text, .jsonl or .ndjson files, packed as .zst or .gz or not, or folders of them")
    p.add_argument("--out", metavar="DIR", required=True, help="folder for the shards and manifest.json")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", metavar="FILE", help="tokenizers JSON, prepared folder or bytes (default: bytes)")
    which.add_argument("--train-tokenizer", metavar="VOCAB", type=_count, help="train a BPE of so many tokens on INPUT")
    p.add_argument("--text-key", metavar="KEY", help="of a JSONL object, holds the document (default: text)")
    p.add_argument("--name", help="of the corpus (default: the name of the folder)")
    p.add_argument("--workers", metavar="N", type=_count, help="processes (default: one a core)")
    p.add_argument("--block-bytes", metavar="N", type=_size, help="tokens read at once, in bytes (default: 1M)")
    p.add_argument("--shard-bytes", metavar="N", type=_size, help="text a shard, in bytes (default: 64M)")


def _inspect(p: argparse.ArgumentParser) -> None:
    p.add_argument("shards", metavar="SHARDS", help="a prepared folder, or the URL of its manifest")
    p.add_argument("--documents", metavar="N", type=_count, default=0, help="show the first N documents")
    p.add_argument("--verify", action="store_true", help="read everything and compare checksums")


def _generate(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", metavar="RUN", help="run folder, or one of its checkpoints")
    p.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="may be given several times")
    p.add_argument("--prompt-file", metavar="FILE", help="one prompt a line")
    p.add_argument("--tokens", metavar="N", type=_count, default=200, help="to generate for each prompt (default: 200)")
    p.add_argument("--temperature", metavar="X", type=_from0, default=1.0, help="0: always the likeliest (default: 1)")
    p.add_argument("--top-k", metavar="K", type=_count, default=0, help="choose among the K likeliest (default: all)")
    p.add_argument("--top-p", metavar="P", type=_share, default=1.0,
                   help="choose among the likeliest that sum to P (default: 1)")
    p.add_argument("--seed", metavar="N", type=int, default=0, help="same seed, same text (default: 0)")
    p.add_argument("--tokenizer", metavar="FILE",
                   help="the model's, where it is not found: tokenizers JSON, prepared folder or bytes")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")


def _export(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", metavar="RUN", help="run folder, whose newest sound checkpoint is taken, or a checkpoint")
    p.add_argument("out", metavar="OUT.safetensors", help="file to write")


def _plot(p: argparse.ArgumentParser) -> None:
    p.add_argument("runs", metavar="RUN", nargs="+", help="run folders, drawn over each other")
    p.add_argument("--out", metavar="FILE", help="PNG to write (default: curves.png in the first run folder)")


def _compare(p: argparse.ArgumentParser) -> None:
    p.add_argument("runs", metavar="RUN", nargs="+", help="two or more run folders; differences are to the first")
    p.add_argument("--out", metavar="FILE", help="PNG to write (default: compared.png in the first run folder)")


def _demo(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", metavar="DIR", default="runs/demo", help="everything is written there (default: runs/demo)")


class Command(NamedTuple):
    summary: str
    flags: Flags
    program: Program


COMMANDS = {
    "demo": Command("Prepare, train, kill, resume and sample a small hybrid on a CPU.", _demo, _program("demo")),
    "support": Command("Print the table of supported combinations as Markdown.", lambda p: None, _support),
    "keys": Command("Print every key of a run's TOML as Markdown: values, default and what it is.", _keys,
                    _program("keys")),
    "prepare": Command("Turn text into tokenised shards with a manifest; restartable.", _prepare, _program("prepare")),
    "inspect": Command("Count what is in shards, show documents, verify checksums.", _inspect, _program("inspect")),
    "train": Command("Train the run of a TOML file, or resume it; also under torchrun.", _train, _train_program),
    "slurm": Command("Print the Slurm job of a run, slurm/train.sbatch filled in, or submit it.", _slurm,
                     _program("slurm")),
    "check": Command("Look whether machines are fit: GPUs, disks, your own command, and a sum over all processes.",
                     _check, _program("check")),
    "status": Command("Say where a run stands: step, time left, restarts, last checkpoint, last error.", _status,
                      _program("status")),
    "plot": Command("Draw loss, gradient norm, learning rate and speed as a PNG.", _plot, _program("plot")),
    "compare": Command("Say what runs differ in and where their losses part, and draw them over each other.",
                       _compare, _program("compare")),
    "generate": Command("Continue prompts with a trained model, streaming.", _generate, _program("generate")),
    "export": Command("Write the newest checkpoint's weights as safetensors.", _export, _program("export")),
}


def _number(kind: type, holds: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text} must be {expected}")
        return value
    return read


_count = _number(int, lambda n: n >= 1, "an integer, at least 1")
_natural = _number(int, lambda n: n >= 0, "an integer, 0 or more")
_from0 = _number(float, lambda x: 0 <= x < float("inf"), "a number, 0 or more")
_above0 = _number(float, lambda x: 0 < x < float("inf"), "a number above 0")
_share = _number(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")


def _range(text: str) -> tuple[int, int]:
    low, _, high = (text if "-" in text else f"{text}-{text}").partition("-")
    if not low.isdecimal() or not high.isdecimal() or not 1 <= int(low) <= int(high) <= NODES:
        raise argparse.ArgumentTypeError(f"{text} must be a number of nodes like 4, or a range like 2-4, up to {NODES}")
    return int(low), int(high)


def _size(text: str) -> int:
    """Bytes, with K, M or G for powers of 1024."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:].upper(), 1)
    try:
        return _count(text[:-1] if unit > 1 else text) * unit
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text} must be a number of bytes above 0, like 4096, 64K or 16M") from None


if __name__ == "__main__":
    sys.exit(main())
