"""What works with what: the one table. It checks configurations, prints the documentation, and picks the tests."""
from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from stepladder.model.config import ModelConfig
from stepladder.model.registry import CHANNEL, TOKEN


@dataclass(frozen=True)
class Parallel:
    """How a model is laid over ranks. dp is what remains: world size / (tp * pp)."""
    tp: int = 1                    # tensor parallel: ranks that share a layer's matrices
    pp: int = 1                    # pipeline parallel: ranks that share the layers
    schedule: Literal["1f1b", "interleaved", "zero-bubble"] = "1f1b"   # in which order a pipeline's micro-batches run
    chunks: int = 2                # spans of layers a rank holds when interleaved; zero-bubble: always 2; 1f1b: 1
    ep: int = 1                    # expert parallel: ranks of dp x tp that share the experts
    dp_replicate: int = 1          # copies of the sharded weights: so many groups of dp ranks shard them (HSDP)
    sequence: bool = False         # sequence parallel: the stream between mixers is split over tp by tokens
    copies: bool = False           # tp's sums, ep's tokens by copy engines (GPUs of one machine), not by NCCL's kernels
    shard: bool = True             # FSDP2 over dp; false: gradients are all-reduced and every rank holds everything
    shard_ctas: int = 0            # multiprocessors that FSDP's collectives take and products leave; 0: NCCL's choice
    reshard: bool = True           # free gathered weights after the forward pass, gather again for the backward
    offload: bool = False          # what is sharded stays in host memory, which updates it: weights, gradients, moments
    engine: Literal["fsdp", "deepspeed"] = "fsdp"      # what shards over dp
    zero: Literal[1, 2, 3] | None = None    # DeepSpeed shards moments; from 2 on gradients; 3, or absent: and weights
    nvme: str = ""                 # folder on a local disk where DeepSpeed keeps what it offloads; "": in host memory

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "chunks", "ep", "dp_replicate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if not 0 <= self.shard_ctas <= 64:
            raise ValueError(f"shard_ctas = {self.shard_ctas} must be 1 to 64, NCCL's most, or 0 for its choice")
        if self.schedule == "zero-bubble" and self.chunks != 2:
            raise ValueError(f"chunks = {self.chunks}, but zero-bubble is a V of 2 spans a rank; set it to 2 "
                             "or schedule = \"interleaved\"")

    @property
    def handed_over(self) -> bool:
        """Whether an engine has the matrices even where there are no other ranks to share them with."""
        return self.offload or self.engine == "deepspeed"

    @property
    def zero_stage(self) -> int:
        return self.zero or 3

    @property
    def stages(self) -> int:
        """Spans of layers in all, each a stage of the pipeline."""
        return self.pp * (1 if self.schedule == "1f1b" or self.pp == 1 else self.chunks)

    def held(self, pp_rank: int) -> list[int]:
        """The stages of a pipeline rank: round and round, or there and back in a V, whose ends meet on rank 0."""
        if self.schedule == "zero-bubble" and self.pp > 1:
            return [pp_rank, 2 * self.pp - 1 - pp_rank]
        return list(range(pp_rank, self.stages, self.pp))

    def features(self, dp: int) -> frozenset[str]:
        """The names of what this layout uses, as they stand in LAYOUTS."""
        data = "ddp" if not self.shard else "hsdp" if self.dp_replicate > 1 else "fsdp"
        zero = self.engine == "deepspeed"
        pipe = "pp" if self.schedule == "1f1b" else self.schedule
        used = {"tp": self.tp > 1, "sp": self.sequence and self.tp > 1, pipe: self.pp > 1, "ep": self.ep > 1,
                data: dp > 1 and not (zero and data == "fsdp"), "zero": zero}
        return frozenset(name for name, on in used.items() if on)


FEATURES = {"tp": "tensor parallel", "sp": "sequence parallel", "pp": "pipeline (1F1B)",
            "interleaved": "pipeline (interleaved 1F1B)", "zero-bubble": "pipeline (zero-bubble V)",
            "ep": "expert parallel",
            "ddp": "data parallel, replicated", "fsdp": "FSDP2", "hsdp": "FSDP2, sharded groups replicated",
            "zero": "DeepSpeed"}

# Every set listed is run at two ranks a dimension: by tests/test_parity.py up to eight ranks, by `make parity` beyond;
# DeepSpeed, which knows no double precision, by tests/test_deepspeed.py.
LAYOUTS: list[frozenset[str]] = [
    frozenset((*tensor, *pipe, *expert, *data))
    for tensor, pipe, expert, data in product(
        [(), ("tp",), ("tp", "sp")], [(), ("pp",), ("interleaved",), ("zero-bubble",)], [(), ("ep",)],
        [(), ("ddp",), ("fsdp",), ("hsdp",)])
    if not (expert and not tensor and not data)          # ep has nothing to fold over
] + [frozenset(("zero",))]

WIRINGS = {"standard": (0, 0), "parallel": (0, 1), "ladder": (1, 1)}

# Combinations inside the listed layouts that do not work, each with its reason.
REFUSED = {
    ("ep", "no moe"): "there are no experts to split",
    ("offload", "ddp"): "only what FSDP manages can stay in host memory",
}


class UnsupportedError(ValueError):
    pass


def refuse(model: ModelConfig, parallel: Parallel, dp: int) -> None:
    """Raises UnsupportedError for a combination that is not listed, naming the nearest one that is."""
    used = parallel.features(dp)
    if used not in LAYOUTS:
        near = min(LAYOUTS, key=lambda layout: (len(layout ^ used), sorted(layout)))
        raise UnsupportedError(f"{_name(used)} is not a supported layout; the nearest is {_name(near)}")
    if parallel.sequence and parallel.tp == 1:
        raise UnsupportedError("parallel.sequence = true with parallel.tp = 1: sequence parallel splits tokens over "
                               "the tensor-parallel ranks; set parallel.tp above 1 or parallel.sequence = false")
    traits = set() if any(b.channel.kind == "moe" for b in model.kinds()) else {"no moe"}
    traits |= {name for name, on in (("offload", parallel.offload), ("ddp", not parallel.shard)) if on}
    for pair, reason in REFUSED.items():
        if set(pair) <= used | traits:
            rest = used - set(pair) | ({"fsdp"} if "ddp" in used & set(pair) else set())
            raise UnsupportedError(f"{' with '.join(pair)} is not supported: {reason}; "
                                   f"the nearest supported layout is {_name(rest)}")


def _name(features: frozenset[str]) -> str:
    return " x ".join(f for f in FEATURES if f in features) or "one rank"


def markdown() -> str:
    """The support table of the README."""
    data = ["ddp", "fsdp", "hsdp", "zero"]
    rows = ["| layout | alone | " + " | ".join(data) + " |", "|---|---|" + "---|" * len(data)]
    for base in sorted({layout - set(data) for layout in LAYOUTS}, key=lambda s: (len(s), _name(s))):
        cells = ["yes" if base | extra in LAYOUTS else "-" for extra in (frozenset(), *({d} for d in data))]
        rows.append(f"| {_name(base)} | " + " | ".join(cells) + " |")
    notes = [f"- {' with '.join(pair)}: no, {reason}." for pair, reason in REFUSED.items()]
    return "\n".join([
        f"Token mixers {', '.join(TOKEN)}; channel mixers {', '.join(CHANNEL)} (moe also pre-gated); "
        f"wirings {', '.join(f'{k} {list(v)}' for k, v in WIRINGS.items())}, mixed freely over the depth: "
        "each with every layout below.", "", *rows, "", *notes])
