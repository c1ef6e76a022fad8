"""What triton and ptxas are known to get wrong on Hopper, found in what they made: no GPU is needed.

Both were met on an H100, as wrong results, some of them now and then, and as illegal memory accesses.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

ARGUMENTS = 0x210           # where a kernel's begin in constant bank 0 of sm_90; before them is what all launches have
LAYOUT = re.compile(r"^(#\w+) = #ttg.nvidia_mma<\{versionMajor = 3.*?warpsPerCTA = \[(\d+)", re.MULTILINE)


def hazards(ttgir: str, sass: str) -> list[str]:
    """A sentence for each kind and cause."""
    return [*overwritten(ttgir), *strayed(sass), *halved(sass)]


def repeated(ttgir: str) -> int:
    """Products that have warps for more rows than there are: these are computed again. It costs time and is right."""
    warps = {name: int(n) for name, n in LAYOUT.findall(ttgir)}
    products = re.findall(r"warp_group_dot %.*-> tensor<(\d+)x.*, (#\w+)>", ttgir)
    return sum(16 * warps[layout] > int(rows) for rows, layout in products)


def overwritten(ttgir: str) -> Iterator[str]:
    """What a pipelined loop reads by a product and otherwise as well has one buffer: it is filled for the next trip
    once the latter is done, though products that were not waited for may still read it."""
    single = set(re.findall(r"(%\S+) = ttg.local_alloc : \(\) -> !ttg.memdesc<1x", ttgir))
    whole = dict(re.findall(r"(%\S+) = ttg.memdesc_\w+ (%\w+)", ttgir))          # what a view is a view of
    for held in re.findall(r"warp_group_dot_wait (.*?) \{pendings = [1-9]", ttgir):
        for name in held.split(", "):
            while name in whole:
                name = whole[name]
            if name in single:
                single.remove(name)
                yield f"{name} has one buffer, which is filled anew while products may still read it"


class Instruction(NamedTuple):
    address: str
    guard: str              # the predicate that it runs under
    op: str
    operands: list[str]


State = dict[str, str]      # registers that depend on more than constants and the thread's number, and on what


def strayed(sass: str) -> Iterator[str]:
    """Where operands of a product lie follows from constants and the thread's number. Where many such addresses do
    not change in a loop, ptxas 12.8 forms some from a register that holds an argument, a block's number or data.
    Where that register holds another constant, it is halved() that finds it."""
    code = parse(sass)
    assert sum("GMMA" in i.op for i in code) == sass.count("GMMA."), "what the tool prints has another form"
    entries: dict[str, State] = {target(i): {} for i in code if i.op.startswith("BRA")}
    found: list[tuple[str, str]] = []
    known = -1
    while known != (known := sum(map(len, entries.values()))):          # until loops bring nothing new
        found = walk(code, entries)
    for on in dict.fromkeys(why for _, why in found):
        places = ", ".join(at for at, why in found if why == on)
        yield f"where an operand lies depends on {on}, for products at {places}"


def halved(sass: str) -> Iterator[str]:
    """A constant address with its flags is a sum of 64 bits whose high half begins with zero. The same ptxas, in the
    same place, takes one register for both halves: one of the sums is not that of the address. Seen in the compiled
    code of wrong gradients, where the register was a loop's counter."""
    low: dict[str, str] = {}                # the register added to, by the predicate that carries over
    for i in parse(sass):
        carries = [x for x in i.operands if re.fullmatch(r"U?P\d", x)]
        sources = [x.removesuffix(".reuse") for x in i.operands[1:] if not re.fullmatch(r"!?U?P(\d|T)", x)]
        sums = carries and re.fullmatch(r"U?IADD3(\.X)?", i.op) and "0x" in sources[1]
        if sums and i.op.endswith(".X") and sources[0] == low.get(carries[0]) not in ("RZ", "URZ"):
            yield f"both halves of an address are formed from {sources[0]}, at {i.address}"
        low = {p: r for p, r in low.items() if r not in written(i)}
        if sums and not i.op.endswith(".X"):
            low[carries[0]] = sources[0]


def parse(sass: str) -> list[Instruction]:
    """What cuobjdump prints."""
    lines = re.findall(r"^\s*/\*0*(\w+)\*/\s+(?:@(\S+) )?\s*([A-Z][^\s;]*) *(.*?) ?;", sass, re.MULTILINE)
    return [Instruction(at, guard, op, re.split(", *", rest)) for at, guard, op, rest in lines]


def target(branch: Instruction) -> str:
    return branch.operands[-1].removeprefix("0x")


def walk(code: list[Instruction], entries: dict[str, State]) -> list[tuple[str, str]]:
    """Addresses of products that stray, and on what: by the states in which branches are taken, which it adds to."""
    found, state = [], State()
    for i in code:
        if i.address in entries:
            state |= entries[i.address]
        if "GMMA" in i.op:
            found += [(i.address, state[r]) for r in descriptors(i) if r in state][:1]
        elif i.op.startswith("BRA"):
            entries[target(i)] |= state
        else:
            write(i, state)
        if not i.guard and i.op in ("BRA", "EXIT"):
            state = State()                         # what follows is reached by branches alone
    return found


def descriptors(product: Instruction) -> list[str]:
    """Two registers for each operand in shared memory. B's are the latter two even where A lies in registers. One of
    no address, which ptxas puts in to wait for those before it, has none."""
    first = re.search(r"gdesc\[UR(\d+|Z)\]", " ".join(product.operands))
    assert first is not None, product
    if first[1] == "Z":
        return []
    return [f"UR{int(first[1]) + n}" for n in range(2 if product.operands[1].startswith("R") else 0, 4)]


def written(i: Instruction) -> list[str]:
    into = next((x for x in i.operands if not re.fullmatch(r"!?U?P(\d|T)", x)), "")
    register = re.fullmatch(r"(U?R)(\d+)", into)
    if register is None or "SETP" in i.op or "PLOP3" in i.op:           # it stores, or writes predicates alone
        return []
    wide = re.search(r"\.64\b|\.WIDE|^CS2R$|\.M88\.2$", i.op) is not None
    width = 4 if re.search(r"\.128\b|\.M88\.4$", i.op) else 2 if wide else 1
    return [f"{register[1]}{int(register[2]) + n}" for n in range(width)]


def write(i: Instruction, state: State) -> None:
    """What an instruction leaves in the registers that it writes; predicates are not followed."""
    _, *read = [x for x in i.operands if not re.fullmatch(r"!?U?P(\d|T)", x)] or [""]
    why = depends(i.op, " ".join(read), 2 if i.op.endswith(".64") else 1, state)
    for name in written(i):
        if why:
            state[name] = why
        elif not i.guard:
            state.pop(name, None)


def depends(op: str, read: str, width: int, state: State) -> str:
    """On what a result depends besides constants and the thread's number, or "". Of spills nothing is said."""
    if re.match(r"LD(G|S|SM)?\b|ATOM", op):
        return "data"
    if "SR_CTAID" in read:
        return "a block's number"
    if any(int(at, 16) >= ARGUMENTS for at in re.findall(r"c\[0x0\]\[.*?(0x\w+)\]", read)):
        return "an argument"
    names = (f"{kind}{int(n) + k}" for kind, n in re.findall(r"(U?R)(\d+)", read) for k in range(width))
    return next((state[name] for name in names if name in state), "")
