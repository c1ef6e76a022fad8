"""From a configuration and a mesh to this rank's part of the model, ready to train. The order of things is here."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepladder.model.channel.moe import Mixer as MoE
from stepladder.model.config import ModelConfig
from stepladder.model.decoder import Decoder, blocks, skeleton
from stepladder.model.leaf import Decl, Leaf, declared
from stepladder.ops.compiled import allow_variants
from stepladder.parallel import init
from stepladder.parallel.copies import Rows
from stepladder.parallel.expert import AllToAll, Carry
from stepladder.parallel.flight import Lanes
from stepladder.parallel.labels import label
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.pipeline import Pipe, Stage
from stepladder.parallel.shard import Sums, copies, local, pair, wrap
from stepladder.parallel.spans import spans
from stepladder.parallel.tensor import OwnTokens, Ranks, TensorComm


@dataclass
class Parts:
    """This rank's part of a model."""
    mesh: Mesh
    decoders: list[Decoder]           # the spans of layers it holds, in order
    pipe: Pipe                        # micro-batches through the stages
    sums: Sums                        # the gradient sums FSDP does not do; call after the passes of a step
    decls: dict[str, Decl]
    sharded: dict[str, int]           # what an engine has: parameter -> dimension that it, or a checkpoint, cuts

    @property
    def decoder(self) -> Decoder:
        """The model, where this rank holds it in one piece."""
        (only,) = self.decoders
        return only

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: decoder.get_parameter(name) for decoder in self.decoders for name in declared(decoder)}

    def copies(self, name: str) -> int:
        """How many ranks hold the same piece of a parameter."""
        stages = 1 if pair(name, self.decoders[0].cfg, self.mesh) is None else 2
        return stages * copies(self.decls[name], self.mesh, name in self.sharded)

    def label(self, name: str, piece: Tensor) -> Tensor:
        """A tensor cut like parameter `name` (itself, its gradient, its moments) as a piece of the declared whole."""
        return label(local(piece), self.decls[name], self.mesh, self.sharded.get(name))


@torch.inference_mode(False)         # weights are filled by threads, which would not know of it
def build(cfg: ModelConfig, mesh: Mesh, *, seed: int | None, dtype: torch.dtype = torch.float32,
          recompute: str = "none", compiled: bool = False, captured: bool = False, seq: int = 4096) -> Parts:
    """Weights of at least fp32, computing in `dtype`. recompute: none, token, channel or both.

    seed: of the initial values; None leaves the weights to be filled from a checkpoint.
    captured: training passes are CUDA graphs, see graph.py.

    seq: tokens a row, by which the stages of a pipeline are balanced.
    """
    # Making a group is collective: every stage makes them all, in one order, also those of layers it does not hold.
    mesh.connect(declared(skeleton(cfg)).values(), tied=cfg.tied)
    cuts = spans(cfg, mesh.layout.stages, seq)
    decoders = [skeleton(cfg, cuts[i]) for i in mesh.layout.held(mesh.pp_rank)]
    for decoder in decoders:
        _materialise(decoder, mesh, seed, dtype)
    if cfg.tied and len(decoders) > 1 and decoders[0].embed is not None and decoders[-1].embed is not None:
        decoders[-1].embed = decoders[0].embed        # both ends of a V: one table
        decoders[0].embed.replicated = True           # which two FSDP roots cannot share
    copied = mesh.layout.copies and mesh.ep > 1 and mesh.device.type == "cuda"
    rows = Rows(mesh.group("ep"), mesh.device) if copied else None       # one for all: its memory is large
    for decoder in decoders:
        connect(decoder, mesh, rows)
        _choose(decoder, recompute, compiled)
    stages = [Stage(decoder) for decoder in decoders]
    sharded = {k: v for stage in stages for k, v in wrap(stage, stage.decoder, mesh, dtype).items()}
    decls = {k: v for decoder in decoders for k, v in declared(decoder).items()}
    pipe = Pipe(stages, mesh)
    if captured:
        pipe.capture()
    return Parts(mesh, decoders, pipe, Sums(decoders, mesh, sharded), decls, sharded)


def _materialise(decoder: Decoder, mesh: Mesh, seed: int | None, dtype: torch.dtype) -> None:
    """This rank's slices, with their initial values: a second for 100 M of them and a core."""
    init.split(decoder, mesh)
    home = torch.device("cpu") if mesh.layout.handed_over else mesh.device   # a device may not have room for all of it
    decoder.to(dtype=torch.promote_types(dtype, torch.float32)).to_empty(device=home)
    if seed is not None:
        init.fill(decoder, mesh, seed)
    decoder.dtype = dtype


def _choose(decoder: Decoder, recompute: str, compiled: bool) -> None:
    """How its blocks are computed."""
    if compiled:
        allow_variants()
    for block in blocks(decoder):
        block.recompute = recompute in ("token", "both"), recompute in ("channel", "both")
        if compiled:
            for part in (block.norm1, block.norm2, block.token, block.channel):
                part.compile(dynamic=False)
    if compiled and decoder.head is not None and decoder.norm is not None:
        decoder.norm.compile(dynamic=False)
        decoder.head.compiled = True


def connect(decoder: Decoder, mesh: Mesh, rows: Rows | None) -> None:
    """Give every sublayer its way to the other ranks. rows: how tokens travel to experts, if not by NCCL."""
    if mesh.tp * mesh.ep == 1:
        return
    lanes = Lanes(mesh.device)
    ranks = lambda axis, copies=False: Ranks(lanes, mesh.group(axis), mesh.beside(axis), copies)
    tp = ranks("tp", mesh.layout.copies) if mesh.tp > 1 else None
    stream = lambda name: TensorComm(lanes, tp, mesh.layout.sequence, name)
    exchange = AllToAll(ranks("ep"), rows) if mesh.ep > 1 else Carry(lanes)
    for layer, block in zip(decoder.blocks, blocks(decoder), strict=True):
        block.token_comm, block.channel_comm = stream(f"blocks.{layer}.token"), stream(f"blocks.{layer}.channel")
        if block.channel.tokens == "own":
            block.channel_comm = OwnTokens(block.channel_comm)
        for mixer, comm in ((block.token, block.token_comm), (block.channel, block.channel_comm)):
            for leaf in mixer.modules():
                if isinstance(leaf, Leaf):
                    leaf.comm = comm
        if isinstance(block.channel, MoE):
            block.channel.experts.exchange = exchange
    decoder.embed_comm, decoder.head_comm = stream("embed"), stream("head")
    for end in (decoder.embed, decoder.head):
        if end is not None:
            end.comm = decoder.head_comm
            end.first = mesh.tp_rank * decoder.cfg.vocab // mesh.tp
