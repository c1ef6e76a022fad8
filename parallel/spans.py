"""Which layers each stage of a pipeline holds: contiguous spans whose largest cost is the least there can be."""
from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

from stepladder.model.config import ModelConfig
from stepladder.model.decoder import costs
from stepladder.parallel.support import Parallel


def spans(cfg: ModelConfig, stages: int, T: int) -> list[range]:
    """The busiest stage has as few FLOPs as can be; then the fullest as few parameters; then they are most alike.

    T: tokens a row. The embedding stands with the first layer, the head with the last.
    """
    if stages > cfg.layers:
        raise ValueError(f"{stages} pipeline stages are more than the model's {cfg.layers} layers; lower parallel.pp "
                         "or parallel.chunks")
    first, *layers, last = costs(cfg, T)
    layers[0] += first
    layers[-1] += last
    flops, sizes = [0, *accumulate(c.flops for c in layers)], [0, *accumulate(c.parameters for c in layers)]
    work = lambda a, b: flops[b] - flops[a]
    room = lambda a, b: sizes[b] - sizes[a]
    most = _best(cfg.layers, stages, work, max)[0]
    busy = lambda a, b: float("inf") if work(a, b) > most else room(a, b)
    fullest = _best(cfg.layers, stages, busy, max)[0]
    uneven = lambda a, b: float("inf") if busy(a, b) > fullest else work(a, b) ** 2
    at = _best(cfg.layers, stages, uneven, lambda x, y: x + y)[1]
    return [range(a, b) for a, b in pairwise(at)]


def spell(cfg: ModelConfig, layout: Parallel, T: int) -> str:
    """Which layers each rank of the pipeline holds, and its share of the work."""
    cuts, (_, *layers, last) = spans(cfg, layout.stages, T), costs(cfg, T)
    layers[-1] += last
    total, words = sum(c.flops for c in layers), []
    for rank in range(layout.pp):
        held = [cuts[i] for i in layout.held(rank)]
        share = sum(layers[i].flops for span in held for i in span) / total
        words.append(f"rank {rank} {' and '.join(f'{s.start}-{s.stop - 1}' for s in held)} ({share:.0%})")
    return f"layers, and share of the FLOPs, of the pipeline's ranks: {', '.join(words)}; {layout.schedule}"


def _best(layers: int, stages: int, cost: Callable[[int, int], float],
          join: Callable[[float, float], float]) -> tuple[float, list[int]]:
    """The least cost of cutting `layers` into `stages` spans, joined over the spans, and where the cuts are."""
    best = {0: (0.0, [0])}                    # layers cut so far -> cost, cuts
    for stage in range(1, stages + 1):
        ends = range(stage, layers - stages + stage + 1)
        best = {b: min(((join(c, cost(a, b)), [*at, b]) for a, (c, at) in best.items() if a < b)) for b in ends}
    return best[layers]
