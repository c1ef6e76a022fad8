"""Small models and batches for tests; every mixer's TINY, every wiring."""
from __future__ import annotations

from itertools import product

import torch

from stepladder.model.config import BlockConfig, ModelConfig
from stepladder.model.context import Context
from stepladder.model.registry import CHANNEL, TOKEN, find
from stepladder.parallel.pipeline import Micro

VOCAB, WIDTH = 48, 32
TOKENS = {f"{k}{i}": spec for k in TOKEN for i, spec in enumerate(find(TOKEN, k).TINY)}
CHANNELS = {f"{k}{i}": spec for k in CHANNEL for i, spec in enumerate(find(CHANNEL, k).TINY)}
LAGS = {"standard": (0, 0), "parallel": (0, 1), "ladder": (1, 1)}
# Token mixer, channel mixer, wiring. Attention and GLA meet everything; of the other recurrences, which know neither
# channel mixers nor wirings, each meets two, and all of them together everything.
CROSSED = [name for name in TOKENS if TOKENS[name].kind in ("attention", "gla")]
EVERY_CHANNEL, EVERY_LAG = [*CHANNELS, "between"], [*LAGS, "mixed"]
CELLS = [*product(CROSSED, EVERY_CHANNEL, EVERY_LAG), *(
    (name, EVERY_CHANNEL[(i + j) % len(EVERY_CHANNEL)], EVERY_LAG[(i + 2 * j) % len(EVERY_LAG)])
    for i, name in enumerate(name for name in TOKENS if name not in CROSSED) for j in (1, 2))]


def config(token: str = "attention0", channel: str = "swiglu0", lag: str = "standard", layers: int = 4,
           **kw: object) -> ModelConfig:
    """`token` may be "every", of attention and GLA, or "others", the recurrences beside them; `channel` may be
    "between": dense blocks between pre-gated ones; `lag` may be "mixed"."""
    lags = list(LAGS.values()) if lag == "mixed" else [LAGS[lag]]
    channels = ["moe1", "swiglu0"] if channel == "between" else [channel]
    tokens = {"every": CROSSED, "others": [name for name in TOKENS if name not in CROSSED]}.get(token, [token])
    n = len(lags) * len(channels) * len(tokens)
    pick = lambda names, i: names[i % len(names)]
    blocks = {f"b{i}": BlockConfig(TOKENS[pick(tokens, i)], CHANNELS[pick(channels, i)], pick(lags, i))
              for i in range(n)}
    return ModelConfig(vocab=VOCAB, width=WIDTH, layers=layers, blocks=blocks, pattern=tuple(blocks), std=0.3,
                       z_loss=1e-3, **kw)  # pyright: ignore[reportArgumentType]


def micro(rows: int, length: int, seed: int = 0, every: int = 7) -> Micro:
    """Packed rows: a document begins about every `every` tokens."""
    gen = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (rows, length + 1), generator=gen)
    start = torch.rand(rows, length, generator=gen) < 1 / every
    start[:, 0] = True
    targets = tokens[:, 1:].clone()
    targets[:, :-1][start[:, 1:]] = -100
    return Micro(tokens[:, :-1].contiguous(), targets, start)


def plain(rows: int, length: int) -> Context:
    return Context.plain(rows, length)
