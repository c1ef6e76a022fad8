"""What kernels become on a Hopper GPU, without one: the launches of a function, compiled ahead of time.

    python tests/aot.py FAMILY     prints a line of JSON for each kernel that tests/aot_cases.py launches
    make hazards                   all families, by the Triton of GPU machines, and only what compilers get wrong

It runs the very launch code of kernels/ on CPU tensors: triton is told that the device is an H100, and that it should
compile and not start. Not under TRITON_INTERPRET.
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import isfunction
from pathlib import Path
from typing import Any, NamedTuple

import hazards
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

LIMIT = 227 * 1024          # bytes of shared memory that a block of sm_90 can have
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Compiled(NamedTuple):
    kernel: str
    constants: str
    registers: int
    spills: int             # loads from and stores to local memory, counted in the machine code
    shared: int             # bytes
    repeated: int           # products whose rows are computed twice
    powers: int             # of two, formed element by element, that the machine code writes out
    hazards: list[str]      # what the compilers are known to get wrong


class Hopper:
    """A driver of a GPU that is not there."""
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


@contextmanager
def compiling() -> Iterator[list[Compiled]]:
    """Launches in here are compiled for sm_90, not started; the list fills."""
    out: list[Compiled] = []
    run: Callable[..., Any] = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = run(self, *args, grid=grid, warmup=True, **options)
        names = [p.name for p in self.params if p.is_constexpr]
        said = {n: v for n, v in dict(zip(self.arg_names, args, strict=False)).items() if n in names} | options
        out.append(measure(self.__name__, said, made))
        return made

    driver.set_active(Hopper())        # pyright: ignore[reportArgumentType]
    JITFunction.run = compile_only     # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield out
    finally:
        JITFunction.run = run          # the driver stays: where there is no GPU, triton has none to go back to


def measure(name: str, said: dict[str, Any], made: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(made.asm["cubin"])
        f.flush()
        usage, code = (subprocess.run([TOOL, flag, f.name], capture_output=True, text=True, check=True).stdout
                       for flag in ("-res-usage", "-sass"))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Compiled(name, " ".join(f"{k}={v}" for k, v in said.items()), int(registers[1]),
                    len(re.findall(r"\b(?:LDL|STL)\b", code)), made.metadata.shared,
                    hazards.repeated(made.asm["ttgir"]), code.count("MUFU.EX2"),
                    hazards.hazards(made.asm["ttgir"], code))


def search(cases: dict[str, Callable[[], None]]) -> int:
    """Say what compilers get wrong in any of the cases."""
    print(f"triton {triton.__version__}", flush=True)
    wrong = 0
    for name, launch in cases.items():
        with compiling() as found:
            launch()
        bad = {f"{one.kernel}({one.constants}): {why}" for one in found for why in one.hazards}
        print(f"{name}: {len(found)} launches", *sorted(bad), sep="\n  ", flush=True)
        wrong += len(bad)
    return int(wrong > 0)


if __name__ == "__main__":
    from importlib import import_module
    families = {n: f for n, f in vars(import_module("aot_cases")).items() if isfunction(f) and not n.startswith("_")}
    if len(sys.argv) == 1:
        sys.exit(search(families))
    with compiling() as made:
        families[sys.argv[1]]()
    for launched in made:
        print(json.dumps(launched._asdict()))
